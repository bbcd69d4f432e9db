"""Networks without a framework: functions of a tree of arrays."""

import jax
import jax.numpy as jnp
from structure.models.shapes import TOKENS, array


def scanned_functions():
    shapes = {
        "embedding": array(11, 16),
        "layers": {
            "up": array(3, 16, 24),
            "bias": array(3, 24),
            "down": array(3, 24, 16),
        },
    }

    def feed_forward(layer, x):
        return jax.nn.gelu(x @ layer["up"] + layer["bias"]) @ layer["down"]

    def apply(params, ids):
        def step(x, layer):
            return x + jax.checkpoint(feed_forward)(layer, x), None

        x, _ = jax.lax.scan(step, params["embedding"][ids], params["layers"])
        return x @ params["embedding"].T

    return apply, shapes, array(2, 5, dtype=jnp.int32)


def heads_by_vmap():
    shapes = {"into": array(5, 16, 4), "out": array(5, 4, 16)}

    def apply(params, x):
        def head(into, out):
            return jnp.tanh(x @ into) @ out

        return jax.vmap(head)(params["into"], params["out"]).sum(0)

    return apply, shapes, TOKENS


def mixture_of_experts():
    """The two best of four experts; their hidden units are shared groups."""
    shapes = {
        "router": array(16, 4),
        "up": array(4, 16, 12),
        "down": array(4, 12, 16),
    }

    def apply(params, x):
        scores = x @ params["router"]
        best, _ = jax.lax.top_k(scores, 2)
        gates = jax.nn.softmax(jnp.where(scores >= best[..., -1:], scores, -jnp.inf))
        hidden = jax.nn.relu(jnp.einsum("bti,eiu->bteu", x, params["up"]))
        return jnp.einsum("bteu,euo,bte->bto", hidden, params["down"], gates)

    return apply, shapes, TOKENS
