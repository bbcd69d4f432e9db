"""How equations whose parameters name a size are applied to smaller arrays."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cram_jax.structure.equations import bind, dtype_of, shape_of
from cram_jax.structure.interpret import Labelled, called
from cram_jax.structure.labels import Key
from cram_jax.structure.movement import GENERATORS

if TYPE_CHECKING:
    from cram_jax.structure.replay import Replay

ReplayRule: TypeAlias = Callable[
    ["Replay", Labelled, Sequence[Any], Key], Sequence[Any]
]


def _broadcast_in_dim(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    del key
    shape = replay.shape(labelled.outs[0])
    return bind(labelled.eqn, args, shape=shape)


def _reshape(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    del key
    return bind(labelled.eqn, args, new_sizes=replay.shape(labelled.outs[0]))


def _slice(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    """A slice if what stays is evenly spaced, else a gather."""
    del key
    params, value = labelled.eqn.params, labelled.ins[0]
    array = args[0]
    strides = params["strides"] or (1,) * len(value.axes)
    bounds = []
    for dimension, axis in enumerate(value.axes):
        kept = replay.positions(axis)
        window = slice(
            int(params["start_indices"][dimension]),
            int(params["limit_indices"][dimension]),
            int(strides[dimension]),
        )
        places = (np.cumsum(kept) - 1)[window][kept[window]]
        bound = _even_slice(places, window.step)
        if bound is None:
            array = jnp.take(array, places, axis=dimension)
            bound = (0, len(places), 1)
        bounds.append(bound)
    starts, limits, steps = zip(*bounds, strict=True)
    has_strides = any(step != 1 for step in steps)
    return bind(
        labelled.eqn,
        [array],
        start_indices=starts,
        limit_indices=limits,
        strides=steps if has_strides or params["strides"] else None,
    )


def _even_slice(
    places: np.ndarray[Any, Any], stride: int
) -> tuple[int, int, int] | None:
    if not len(places):
        return (0, 0, 1)
    step = int(places[1] - places[0]) if len(places) > 1 else stride
    if not np.array_equal(places, places[0] + step * np.arange(len(places))):
        return None
    return int(places[0]), int(places[-1]) + 1, step


def _split(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    del key
    along = labelled.eqn.params["axis"]
    kept = replay.positions(labelled.ins[0].axes[along])
    stops = np.cumsum(labelled.eqn.params["sizes"])
    sizes = tuple(int(part.sum()) for part in np.split(kept, stops[:-1]))
    return bind(labelled.eqn, args, sizes=sizes)


def _pad(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    del key
    config = []
    for (low, high, interior), axis in zip(
        labelled.eqn.params["padding_config"], labelled.outs[0].axes, strict=True
    ):
        kept = replay.positions(axis)
        if low > 0:
            low = int(kept[:low].sum())
        if high > 0:
            high = int(kept[-high:].sum())
        config.append((low, high, interior))
    return bind(labelled.eqn, args, padding_config=tuple(config))


def _tile(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    """Repeats may go, too."""
    del key
    sizes = zip(replay.shape(labelled.outs[0]), args[0].shape, strict=True)
    counts = tuple(whole // part if part else 1 for whole, part in sizes)
    return bind(labelled.eqn, args, reps=counts)


def _generated(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    del key
    whole = bind(labelled.eqn, args)
    return [replay.cut(o, v) for o, v in zip(whole, labelled.outs, strict=True)]


def _convolution(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    del key
    params = labelled.eqn.params
    groups = params["feature_group_count"]
    if groups > 1:
        features = params["dimension_numbers"].lhs_spec[1]
        kept = replay.positions(labelled.ins[0].axes[features])
        groups = int(kept.reshape(groups, -1)[:, 0].sum())
        if not groups:  # no convolution has 0 groups
            shape = replay.shape(labelled.outs[0])
            return [jnp.zeros(shape, dtype_of(labelled.eqn.outvars[0]))]
    return bind(labelled.eqn, args, feature_group_count=groups)


def _sliced(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    """Gathers and dynamic slices: axes that are taken whole are smaller."""
    del key
    shape = shape_of(labelled.eqn.invars[0])
    sizes = [
        replay.size(axis) if size == full else size
        for size, full, axis in zip(
            labelled.eqn.params["slice_sizes"],
            shape,
            labelled.ins[0].axes,
            strict=True,
        )
    ]
    return bind(labelled.eqn, args, slice_sizes=tuple(sizes))


def _scan(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    params = labelled.eqn.params
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    body = params["jaxpr"]

    def turn(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        inputs = [*args[:first], *carry, *slices]
        outs = replay.run(body.jaxpr, body.consts, inputs, key)
        return outs[: len(carry)], outs[len(carry) :]

    carry, stacked = lax.scan(
        turn,
        list(args[first:last]),
        list(args[last:]),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *stacked]


def _while(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    params = labelled.eqn.params
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]

    def goes_on(carry: list[Any]) -> Any:
        inputs = [*args[:first], *carry]
        return replay.run(cond.jaxpr, cond.consts, inputs, (*key, "cond"))[0]

    def turn(carry: list[Any]) -> list[Any]:
        inputs = [*args[first:last], *carry]
        return replay.run(body.jaxpr, body.consts, inputs, (*key, "body"))

    return lax.while_loop(goes_on, turn, list(args[last:]))


def _cond(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    def branch(index: int, *operands: Any) -> list[Any]:
        inner = labelled.eqn.params["branches"][index]
        return replay.run(inner.jaxpr, inner.consts, operands, (*key, index))

    branches = [partial(branch, i) for i in range(len(labelled.eqn.params["branches"]))]
    return lax.switch(args[0], branches, *args[1:])


def _remat(
    replay: "Replay", labelled: Labelled, args: Sequence[Any], key: Key
) -> list[Any]:
    params = labelled.eqn.params
    inner = called(labelled.eqn)
    assert inner is not None

    def recomputed(*values: Any) -> list[Any]:
        return replay.run(inner.jaxpr, inner.consts, values, key)

    return jax.checkpoint(
        recomputed, prevent_cse=params["prevent_cse"], policy=params["policy"]
    )(*args)


RULES: dict[str, ReplayRule] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "pad": _pad,
    "tile": _tile,
    "conv_general_dilated": _convolution,
    "gather": _sliced,
    "dynamic_slice": _sliced,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    **dict.fromkeys(GENERATORS, _generated),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _remat),
}
