"""What second-order pruning keeps of the accuracy of a small MLP on the digits.

    python -m benchmarks.second_order_accuracy

Trained on 1,200 images with plain Adam, pruned on 1,024 of them, tested on the other
597: no compression-aware training, no fine-tuning. Each row is one seed. Takes a few
minutes.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import cram_jax
from benchmarks import timing

FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "1 recomputation": {"recomputations": 1},
    "1, damping 1e-5": {"recomputations": 1, "damping": 1e-5},
    "damping 1e-4": {"damping": 1e-4},
}


def mlp(params: Any, images: jax.Array) -> jax.Array:
    """Logits of a network with one hidden layer."""
    hidden = jax.nn.relu(images @ params["hidden"])
    return hidden @ params["output"] + params["bias"]


def loss_fn(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    logits = mlp(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def digits() -> tuple[jax.Array, jax.Array]:
    """Images of 64 values up to 1, and labels, in a fixed random order."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return jnp.asarray(data.data[order] / 16, jnp.float32), jnp.asarray(
        data.target[order], jnp.int32
    )


@jax.jit
def trained(images: jax.Array, labels: jax.Array, seed: int) -> Any:
    """Parameters after 400 steps of Adam, batch 64."""
    optimizer = optax.adam(3e-3)
    *keys, order = jax.random.split(jax.random.key(seed), 3)
    params = {
        "bias": jnp.zeros(10),
        "hidden": jax.random.normal(keys[0], (64, 64)) * (2 / 64) ** 0.5,
        "output": jax.random.normal(keys[1], (64, 10)) * (1 / 64) ** 0.5,
    }

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        batch = jax.random.randint(key, (64,), 0, len(labels))
        grads = jax.grad(loss_fn)(params, images[batch], labels[batch])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    return jax.lax.scan(step, start, jax.random.split(order, 400))[0][0]


def accuracy(params: Any, images: jax.Array, labels: jax.Array) -> float:
    """The share of images that are classified correctly."""
    return float((mlp(params, images).argmax(-1) == labels).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, and prints a row for every seed and sparsity."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.7, 0.8, 0.9])
    options = parser.parse_args(arguments)
    print(timing.machine())
    images, labels = digits()
    test = images[1200:], labels[1200:]
    examples = {"images": images[:1024], "labels": labels[:1024]}
    print("test accuracy in %")
    print(f"{'':16s}{'dense':>12s}{'magnitude':>12s}", end="")
    print("".join(f"{name:>18s}" for name in FORMS))
    for seed in range(options.seeds):
        params = trained(images[:1200], labels[:1200], seed)
        for sparsity in options.sparsities:
            magnitude = cram_jax.compress(params, cram_jax.top_k(sparsity))
            row = [accuracy(params, *test), accuracy(magnitude.params, *test)]
            print(f"seed {seed}, {sparsity:.0%}".ljust(16), end="")
            print("".join(f"{100 * value:12.1f}" for value in row), end="")
            for form in FORMS.values():
                projector = cram_jax.second_order(sparsity, loss_fn, examples, **form)
                pruned = cram_jax.compress(params, projector).params
                print(f"{100 * accuracy(pruned, *test):18.1f}", end="", flush=True)
            print()


if __name__ == "__main__":
    main()
