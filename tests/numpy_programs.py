"""Evaluates traced programs with NumPy in the precision of its inputs.

An independent reference, without XLA: nothing is compiled, so that many small networks
are cheap, and a program traced in float32 can be checked in float64.
"""

import itertools
import math

import numpy as np
from jax.extend import core as jex

erf = np.vectorize(math.erf, otypes=[float])


def evaluate(closed, args, dtype=np.float64):
    """The outputs of a closed jaxpr, floating-point numbers in this dtype."""
    consts = [_array(const, dtype) for const in closed.consts]
    return _run(closed.jaxpr, consts, [_array(arg, dtype) for arg in args], dtype)


def _array(value, dtype):
    value = np.asarray(value)
    return value.astype(dtype) if value.dtype.kind == "f" else value


def _run(jaxpr, consts, args, dtype):
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        if isinstance(atom, jex.Literal):
            # A number in a program has the precision of its type.
            return _array(np.asarray(atom.val, atom.aval.dtype), dtype)
        return values[atom]

    for eqn in _needed(jaxpr):
        outs = _equation(eqn, [read(atom) for atom in eqn.invars], dtype)
        for var, out in zip(eqn.outvars, outs, strict=True):
            assert np.shape(out) == var.aval.shape, (eqn, np.shape(out))
            values[var] = _array(out, dtype)
    return [read(atom) for atom in jaxpr.outvars]


def _needed(jaxpr):
    """The equations that the outputs depend on, without random numbers never used."""
    wanted = {atom for atom in jaxpr.outvars if not isinstance(atom, jex.Literal)}
    equations = []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            wanted.update(a for a in eqn.invars if not isinstance(a, jex.Literal))
            equations.append(eqn)
    return reversed(equations)


def _equation(eqn, args, dtype):
    name, params = eqn.primitive.name, eqn.params
    if name in SIMPLE:
        return [SIMPLE[name](*args)]
    if name in WITH_PARAMS:
        return [WITH_PARAMS[name](eqn, params, *args)]
    if name == "split":
        stops = np.cumsum(params["sizes"])[:-1]
        return np.split(args[0], stops, axis=params["axis"])
    if name == "scan":
        return _scan(params, args, dtype)
    if name == "while":
        return _while(params, args, dtype)
    if name == "cond":
        inner = params["branches"][int(args[0])]
        return _run(inner.jaxpr, inner.consts, args[1:], dtype)
    if name == "top_k":
        order = np.argsort(-args[0], axis=-1, kind="stable")[..., : params["k"]]
        return [np.take_along_axis(args[0], order, -1), order.astype(np.int32)]
    for key in ("jaxpr", "call_jaxpr"):
        inner = params.get(key)
        if isinstance(inner, jex.ClosedJaxpr):
            return _run(inner.jaxpr, inner.consts, args, dtype)
        if isinstance(inner, jex.Jaxpr):
            return _run(inner, [], args, dtype)
    raise NotImplementedError(name)


def _scan(params, args, dtype):
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    carry, body = list(args[first:last]), params["jaxpr"]
    rows = []
    steps = range(params["length"])
    for step in reversed(steps) if params["reverse"] else steps:
        slices = [stack[step] for stack in args[last:]]
        outs = _run(body.jaxpr, body.consts, [*args[:first], *carry, *slices], dtype)
        carry = outs[: len(carry)]
        rows.append(outs[len(carry) :])
    if params["reverse"]:
        rows.reverse()
    return [*carry, *(np.stack(column) for column in zip(*rows, strict=True))]


def _while(params, args, dtype):
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]
    cond, body, carry = params["cond_jaxpr"], params["body_jaxpr"], list(args[last:])
    while _run(cond.jaxpr, cond.consts, [*args[:first], *carry], dtype)[0]:
        carry = _run(body.jaxpr, body.consts, [*args[first:last], *carry], dtype)
    return carry


def _broadcast(eqn, params, array):
    shape = [1] * len(params["shape"])
    for start, to in enumerate(params["broadcast_dimensions"]):
        shape[to] = array.shape[start]
    return np.broadcast_to(array.reshape(shape), params["shape"])


def _dot(eqn, params, left, right):
    (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    a = [next(letters) for _ in left.shape]
    b = [next(letters) for _ in right.shape]
    pairs = [zip(left_sum, right_sum, strict=True)]
    pairs.append(zip(left_batch, right_batch, strict=True))
    for i, j in itertools.chain(*pairs):
        b[j] = a[i]
    out = [a[i] for i in left_batch]
    out += [c for i, c in enumerate(a) if i not in (*left_sum, *left_batch)]
    out += [c for j, c in enumerate(b) if j not in (*right_sum, *right_batch)]
    spec = f"{''.join(a)},{''.join(b)}->{''.join(out)}"
    return np.einsum(spec, left, right)


def _convolution(eqn, params, image, kernel):
    spec = params["dimension_numbers"]
    image = np.transpose(image, spec.lhs_spec)  # batch, features, positions
    kernel = np.transpose(kernel, spec.rhs_spec)  # outputs, inputs, window
    image = _dilate(image, params["lhs_dilation"])
    kernel = _dilate(kernel, params["rhs_dilation"])
    pads = [(0, 0), (0, 0), *params["padding"]]
    image = np.pad(image, [(max(low, 0), max(high, 0)) for low, high in pads])
    assert all(low >= 0 and high >= 0 for low, high in pads)
    window = kernel.shape[2:]
    axes = tuple(range(2, image.ndim))
    views = np.lib.stride_tricks.sliding_window_view(image, window, axes)
    views = views[
        (slice(None),) * 2
        + tuple(slice(None, None, s) for s in params["window_strides"])
    ]
    groups = params["feature_group_count"]
    outs = []
    for x, w in zip(
        np.split(views, groups, 1), np.split(kernel, groups, 0), strict=True
    ):
        n = len(window)
        summed = [1, *range(2 + n, 2 + 2 * n)]
        outs.append(np.tensordot(x, w, (summed, [1, *range(2, 2 + n)])))
    out = np.moveaxis(np.concatenate(outs, -1), -1, 1)
    return np.transpose(out, np.argsort(spec.out_spec))


def _dilate(array, factors):
    for axis, factor in enumerate(factors, 2):
        if factor > 1:
            shape = list(array.shape)
            shape[axis] = (shape[axis] - 1) * factor + 1
            new = np.zeros(shape, array.dtype)
            new[(slice(None),) * axis + (slice(None, None, factor),)] = array
            array = new
    return array


def _window(reduce, empty):
    def rule(eqn, params, array):
        pads = [tuple(pair) for pair in params["padding"]]
        array = np.pad(array, pads, constant_values=empty)
        views = np.lib.stride_tricks.sliding_window_view(
            array, params["window_dimensions"]
        )
        views = views[tuple(slice(None, None, s) for s in params["window_strides"])]
        return reduce(views, axis=tuple(range(array.ndim, 2 * array.ndim)))

    return rule


def _gather(eqn, params, table, indices):
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    assert not numbers.operand_batching_dims
    batch = indices.shape[:-1]
    out = np.empty(eqn.outvars[0].aval.shape, table.dtype)
    rest = [d for d in range(out.ndim) if d not in numbers.offset_dims]
    for place in np.ndindex(*batch):
        start = [0] * table.ndim
        for position, dimension in enumerate(numbers.start_index_map):
            limit = table.shape[dimension] - sizes[dimension]
            start[dimension] = int(np.clip(indices[place][position], 0, limit))
        part = table[tuple(slice(b, b + s) for b, s in zip(start, sizes, strict=True))]
        part = np.squeeze(part, tuple(numbers.collapsed_slice_dims))
        where = [slice(None)] * out.ndim
        for dimension, position in zip(rest, place, strict=True):
            where[dimension] = position
        out[tuple(where)] = part
    return out


def _dynamic_slice(eqn, params, array, *starts):
    sizes = params["slice_sizes"]
    bounds = []
    for start, size, whole in zip(starts, sizes, array.shape, strict=True):
        first = int(np.clip(start, 0, whole - size))
        bounds.append(slice(first, first + size))
    return array[tuple(bounds)]


def _dynamic_update_slice(eqn, params, array, update, *starts):
    array = array.copy()
    bounds = []
    for start, size, whole in zip(starts, update.shape, array.shape, strict=True):
        first = int(np.clip(start, 0, whole - size))
        bounds.append(slice(first, first + size))
    array[tuple(bounds)] = update
    return array


def _slice(eqn, params, array):
    strides = params["strides"] or (1,) * array.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return array[tuple(slice(*map(int, bound)) for bound in bounds)]


def _pad(eqn, params, array, value):
    config = params["padding_config"]
    array = _dilate(array[None, None], [middle + 1 for _, _, middle in config])[0, 0]
    crops = tuple(
        slice(max(-low, 0), size - max(-high, 0))
        for (low, high, _), size in zip(config, array.shape, strict=True)
    )
    pads = [(max(low, 0), max(high, 0)) for low, high, _ in config]
    return np.pad(array[crops], pads, constant_values=value)


def _select(predicate, *cases):
    predicate = np.asarray(predicate).astype(int)
    return np.choose(np.broadcast_to(predicate, np.shape(cases[0])), cases)


def _convert(eqn, params, array):
    return (
        array.astype(np.dtype(params["new_dtype"]), copy=False)
        if (np.dtype(params["new_dtype"]).kind != "f" or array.dtype.kind != "f")
        else array
    )


def _iota(eqn, params):
    shape, dimension = params["shape"], params["dimension"]
    line = np.arange(shape[dimension], dtype=np.dtype(params["dtype"]))
    return np.broadcast_to(
        line.reshape([-1 if d == dimension else 1 for d in range(len(shape))]), shape
    )


def _reduce(function):
    return lambda eqn, params, array: function(array, axis=tuple(params["axes"]))


def _along(function):
    def rule(eqn, params, array):
        axis = params["axis"]
        if params["reverse"]:
            return np.flip(function(np.flip(array, axis), axis=axis), axis)
        return function(array, axis=axis)

    return rule


def _integer_pow(eqn, params, array):
    return (
        array ** float(params["y"]) if array.dtype.kind == "f" else array ** params["y"]
    )


SIMPLE = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else (a / b).astype(a.dtype),
    "rem": np.fmod,
    "max": np.maximum,
    "min": np.minimum,
    "pow": np.power,
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "exp": np.exp,
    "exp2": np.exp2,
    "log": np.log,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
    "erf": erf,
    "erfc": lambda x: 1 - erf(x),
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "square": np.square,
    "floor": np.floor,
    "round": np.round,
    "stop_gradient": lambda x: x,
    "copy": lambda x: x,
    "is_finite": np.isfinite,
    "not": lambda x: ~x,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "select_n": _select,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}
WITH_PARAMS = {
    "broadcast_in_dim": _broadcast,
    "reshape": lambda eqn, params, x: x.reshape(params["new_sizes"]),
    "squeeze": lambda eqn, params, x: np.squeeze(x, tuple(params["dimensions"])),
    "expand_dims": lambda eqn, params, x: np.expand_dims(x, params["dimensions"]),
    "transpose": lambda eqn, params, x: np.transpose(x, params["permutation"]),
    "rev": lambda eqn, params, x: np.flip(x, tuple(params["dimensions"])),
    "stack": lambda eqn, params, *xs: np.stack(xs, params["axis"]),
    "concatenate": lambda eqn, params, *xs: np.concatenate(xs, params["dimension"]),
    "convert_element_type": _convert,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "slice": _slice,
    "pad": _pad,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "reduce_window_max": _window(np.max, -np.inf),
    "reduce_window_sum": _window(np.sum, 0),
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "reduce_sum": _reduce(np.sum),
    "reduce_max": _reduce(np.max),
    "reduce_min": _reduce(np.min),
    "reduce_prod": _reduce(np.prod),
    "reduce_and": _reduce(np.all),
    "reduce_or": _reduce(np.any),
    "argmax": lambda eqn, p, x: np.argmax(x, p["axes"][0]).astype(p["index_dtype"]),
    "cumsum": _along(np.cumsum),
    "sort": lambda eqn, params, x: np.sort(x, axis=params["dimension"]),
}
