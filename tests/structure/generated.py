"""Small networks drawn at random, for cases that nobody thought of."""

import jax
import jax.numpy as jnp
import numpy as np

BATCH, INPUTS = 5, 6

ACTIVATIONS = (
    jax.nn.relu,
    jax.nn.relu6,
    jax.nn.sigmoid,
    jnp.tanh,
    jax.nn.silu,
    jax.nn.softplus,
    lambda x: jnp.exp(jnp.clip(x, -3, 3)),
    jnp.square,
    jnp.abs,
)


class Network:
    """A program over a list of hidden values, and the shapes of its parameters.

    Args:
      seed: of everything that is drawn.
    """

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.shapes = {}
        self.steps = []
        self.widths = [INPUTS]
        for _ in range(self.rng.integers(5, 14)):
            names = list(LAYERS) if len(self.widths) > 2 else ["dense"]
            self._add(str(self.rng.choice(names)))
        count = min(3, len(self.widths))
        self.heads = [
            (place, self.parameter(self.widths[place], 3)) for place in range(-count, 0)
        ]

    def _add(self, name):
        place = int(self.rng.integers(len(self.widths)))
        layer = LAYERS[name](self, place, self.widths[place])
        if layer is not None:
            widths, function = layer
            self.widths += widths
            self.steps.append((name, place, function))

    def parameter(self, *shape):
        name = f"p{len(self.shapes):02}"
        self.shapes[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return name

    def same_width(self, width):
        return int(self.rng.choice(np.flatnonzero(np.array(self.widths) == width)))

    def values(self):
        return {
            name: self.rng.normal(size=s.shape) / np.sqrt(s.shape[0])
            for name, s in self.shapes.items()
        }

    def __call__(self, params, x):
        hidden = [x]
        for _, place, function in self.steps:
            out = function(params, hidden, hidden[place])
            hidden += out if isinstance(out, list) else [out]
        return sum(hidden[place] @ params[name] for place, name in self.heads)


def _dense(net, place, width):
    out = int(net.rng.choice([4, 8, 12]))
    w = net.parameter(width, out)
    return [out], lambda p, hidden, x: x @ p[w]


def _activation(net, place, width):
    function = ACTIVATIONS[net.rng.integers(len(ACTIVATIONS))]
    return [width], lambda p, hidden, x: function(x)


def _add(net, place, width):
    other = net.same_width(width)
    return [width], lambda p, hidden, x: x + hidden[other]


def _multiply(net, place, width):
    other = net.same_width(width)
    return [width], lambda p, hidden, x: x * hidden[other]


def _bias(net, place, width):
    b = net.parameter(width)
    return [width], lambda p, hidden, x: x + p[b]


def _scale(net, place, width):
    s = net.parameter(width)
    return [width], lambda p, hidden, x: x * p[s]


def _concatenate(net, place, width):
    other = int(net.rng.integers(len(net.widths)))
    if width + net.widths[other] > 40:
        return None
    return [width + net.widths[other]], lambda p, hidden, x: jnp.concatenate(
        [x, hidden[other]], -1
    )


def _split(net, place, width):
    if width % 2:
        return None
    return [width // 2] * 2, lambda p, hidden, x: jnp.split(x, 2, -1)


def _slice(net, place, width):
    if width <= 4:
        return None
    start = int(net.rng.integers(0, 3))
    return [width - 4], lambda p, hidden, x: x[:, start : x.shape[1] - 4 + start]


def _stride(net, place, width):
    if width % 2:
        return None
    return [width // 2], lambda p, hidden, x: x[:, ::2]


def _pad(net, place, width):
    if width > 16:
        return None
    low, high = (int(n) for n in net.rng.integers(0, 3, 2))
    return [width + low + high], lambda p, hidden, x: jnp.pad(x, [(0, 0), (low, high)])


def _flip(net, place, width):
    return [width], lambda p, hidden, x: x[:, ::-1]


def _roll(net, place, width):
    return [width], lambda p, hidden, x: jnp.roll(x, 1, -1)


def _layer_norm(net, place, width):
    return [width], lambda p, hidden, x: jax.nn.standardize(x, epsilon=1e-2)


def _rms_norm(net, place, width):
    s = net.parameter(width)
    return (
        [width],
        lambda p, hidden, x: (
            x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-2) * p[s]
        ),
    )


def _batch_norm(net, place, width):
    s = net.parameter(width)
    return [
        width
    ], lambda p, hidden, x: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-2) * p[s]


def _residual(net, place, width):
    up, down = net.parameter(width, 8), net.parameter(8, width)
    return [width], lambda p, hidden, x: x + jax.nn.relu(x @ p[up]) @ p[down]


def _low_rank(net, place, width):
    w, a, b = (net.parameter(*s) for s in ((width, 8), (width, 4), (4, 8)))
    return [8], lambda p, hidden, x: x @ (p[w] + p[a] @ p[b])


def _gated(net, place, width):
    up, down = net.parameter(width, 16), net.parameter(8, width)

    def function(p, hidden, x):
        gate, value = jnp.split(x @ p[up], 2, -1)
        return (jax.nn.sigmoid(gate) * value) @ p[down]

    return [width], function


def _heads(net, place, width):
    if width % 4:
        return None
    w = net.parameter(width // 4, 4, 5)
    return [5], lambda p, hidden, x: jnp.einsum(
        "bhk,hko->bo", x.reshape(BATCH, -1, 4), p[w]
    )


def _attention(net, place, width):
    if width % 4:
        return None
    other, w = net.same_width(width), net.parameter(width, 8)

    def function(p, hidden, x):
        query, key = (y.reshape(BATCH, -1, 4) for y in (x, hidden[other]))
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", query, key))
        return jnp.einsum("qk,kd->qd", weights.mean(0), x @ p[w])

    return [8], function


def _shuffle(net, place, width):
    if width % 4:
        return None
    return [
        width
    ], lambda p, hidden, x: x.reshape(BATCH, 4, -1).swapaxes(1, 2).reshape(BATCH, -1)


def _maxout(net, place, width):
    if width % 2:
        return None
    return [width // 2], lambda p, hidden, x: x.reshape(BATCH, -1, 2).max(-1)


def _outer(net, place, width):
    other = net.same_width(width)
    if width > 8:
        return None
    return [width * width], lambda p, hidden, x: (
        x[:, :, None] * hidden[other][:, None]
    ).reshape(BATCH, -1)


def _repeat(net, place, width):
    if width > 12:
        return None
    return [2 * width], lambda p, hidden, x: jnp.broadcast_to(
        x[:, :, None], (BATCH, width, 2)
    ).reshape(BATCH, -1)


def _recurrent(net, place, width):
    w = net.parameter(width, width)

    def function(p, hidden, x):
        def step(carry, _):
            return jnp.tanh(carry @ p[w] + x), None

        return jax.lax.scan(step, jnp.zeros_like(x), None, length=2)[0]

    return [width], function


def _layers(net, place, width):
    up, down = net.parameter(3, width, 8), net.parameter(3, 8, width)

    def function(p, hidden, x):
        def layer(carry, weights):
            a, b = weights
            return carry + jax.nn.relu(carry @ a) @ b, None

        return jax.lax.scan(layer, x, (p[up], p[down]))[0]

    return [width], function


LAYERS = {
    name.removeprefix("_"): layer
    for name, layer in list(globals().items())
    if name.startswith("_") and callable(layer)
}
