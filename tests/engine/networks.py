"""Small networks that have every operation, with odd sizes, and inputs for them."""

import numpy as np

from cram_jax import engine


def sparse(rng, *shape, keep=0.3, block=(1, 1)):
    """A random kernel whose blocks of inputs x outputs are mostly zero."""
    inputs, outputs = shape[-2:]
    grid = rng.random((*shape[:-2], -(-inputs // block[0]), -(-outputs // block[1])))
    mask = np.repeat(np.repeat(grid < keep, block[0], -2), block[1], -1)
    kernel = rng.standard_normal(shape) * mask[..., :inputs, :outputs]
    return (kernel / np.sqrt(np.prod(shape[:-1]) * keep)).astype(np.float32)


def convolutional(rng):
    """Convolutions of all kinds, pools, a residual block; three outputs."""
    network = engine.GraphBuilder()
    x = network.add(engine.Input((13, 11, 3)), name="image")
    x = network.add(engine.Conv(sparse(rng, 5, 5, 3, 8, keep=1), strides=2), x)
    statistics = rng.standard_normal(8) / 10, rng.random(8) + 0.5
    x = network.add(engine.batch_norm(*statistics), x)
    x = network.add(engine.Relu(), x, name="stem")
    kernel = sparse(rng, 1, 1, 8, 10)
    shortcut = network.add(
        engine.Conv(kernel, strides=2, padding="VALID"), x, name="shortcut"
    )
    kernel, bias = sparse(rng, 3, 3, 8, 10, block=(4, 2)), rng.standard_normal(10)
    y = network.add(engine.Conv(kernel, bias, strides=2, padding=1), x)
    y = network.add(engine.Relu(), y, name="strided")
    y = network.add(engine.Conv(sparse(rng, 3, 3, 10, 10, block=(4, 1))), y)
    y = network.add(engine.Add(), y, shortcut)
    y = network.add(engine.Relu(), y, name="block")
    y = network.add(engine.MaxPool(2, 1, "SAME"), y, name="pool")
    y = network.add(
        engine.Conv(sparse(rng, 2, 2, 10, 6), padding="VALID"), y, name="signed"
    )
    mean = network.add(engine.Mean(), y, name="mean")
    flat = network.add(engine.Flatten(), network.add(engine.AvgPool(2), y), name="flat")
    logits = network.add(engine.Linear(sparse(rng, 6, 7)), mean, name="logits")
    shares = network.add(engine.Softmax(), logits, name="shares")
    graph = network.build(logits, flat, shares)
    return graph, (rng.standard_normal((3, 13, 11, 3)).astype(np.float32),)


def transformer(rng, length=19):
    """One encoder layer with padding, a pooler and a head for every token."""
    network = engine.GraphBuilder()
    ids, mask = (
        network.add(engine.Input((None,), "int32"), name=name)
        for name in ("ids", "mask")
    )
    table = rng.standard_normal((2, 50, 24)) / 2
    x = network.add(engine.Embedding(table[0]), ids)
    x = network.add(engine.AddPositions(table[1]), x)
    x = network.add(engine.Add(), x, network.add(engine.Embedding(table[1]), ids))
    x = network.add(_norm(rng, 24), x, name="embedded")
    query, key, value = (_linear(network, rng, x, 24, 24) for _ in range(3))
    y = network.add(engine.Attention(3), query, key, value, mask, name="attended")
    y = network.add(engine.Add(), _linear(network, rng, y, 24, 24), x)
    x = network.add(_norm(rng, 24), y, name="middle")
    y = network.add(engine.Gelu(), _linear(network, rng, x, 24, 30), name="hidden")
    y = network.add(engine.Add(), x, _linear(network, rng, y, 30, 24))
    x = network.add(_norm(rng, 24), y, name="features")
    first = network.add(engine.Token(0), x)
    pooled = network.add(engine.Tanh(), _linear(network, rng, first, 24, 9))
    token = network.add(engine.Linear(sparse(rng, 24, 2)), x, name="spans")
    graph = network.build(token, pooled, x)
    lengths = np.array([[length], [length // 2], [0]])
    inputs = rng.integers(0, 50, (3, length)), (np.arange(length) < lengths) * 1
    return graph, inputs


def pointwise(rng):
    """Unfused sums, affine maps, activations and features."""
    network = engine.GraphBuilder()
    x = network.add(engine.Input((None, 6)), name="x")
    scaled = network.add(
        engine.Affine(rng.standard_normal(6), rng.standard_normal(6)), x, name="scaled"
    )
    parts = [
        network.add(operation, scaled, name=name)
        for name, operation in (
            ("relu", engine.Relu()),
            ("gelu", engine.Gelu()),
            ("tanh", engine.Tanh()),
            ("softmax", engine.Softmax()),
            ("attended", engine.Attention(2)),
        )
        if name != "attended"
    ]
    parts.append(network.add(engine.Attention(2), scaled, x, scaled, name="attended"))
    total = parts[0]
    for part in parts[1:]:
        total = network.add(engine.Add(), total, part)
    graph = network.build(total, network.add(_norm(rng, 6), total))
    return graph, (3 * rng.standard_normal((2, 5, 6)).astype(np.float32),)


def _norm(rng, features):
    return engine.LayerNorm(
        1 + rng.standard_normal(features) / 5, rng.standard_normal(features), 1e-12
    )


def _linear(network, rng, x, inputs, outputs):
    kernel = sparse(rng, inputs, outputs, block=(4, 2))
    return network.add(engine.Linear(kernel, rng.standard_normal(outputs)), x)
