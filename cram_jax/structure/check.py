"""Whether a model's own function can be called with smaller arrays."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from cram_jax.structure.equations import dtype_of, shape_of
from cram_jax.structure.interpret import called
from cram_jax.structure.shrink import shrink
from cram_jax.structure.small import model_of, small_apply
from cram_jax.structure.structure import Structure

LEAVES = ("input", "constant", "traced constant")
NO_OPERATION = frozenset(["copy", "stop_gradient", "sharding_constraint", "name"])
IRRELEVANT = frozenset(
    ["name", "sharding", "out_sharding", "layout", "debug_info", "ctx_mesh"]
)


def check_apply(
    structure: Structure,
    kept: Any,
    *inputs: Any,
    apply: Callable[..., Any] | None = None,
) -> str | None:
    """Says why a function cannot be called with the smaller variables; None if it can.

    A model's own function can fail with smaller arrays, or silently return something
    else: ``x.reshape(b, t, 4, -1)`` after two of four heads were removed, ``x /
    sqrt(width)``, or ``x[:, 3]``. So its program is traced with the smaller arrays and
    compared, operation by operation, with that of `small_apply`.

    Save and serve such a function if you can, because it does not need this package. If
    the model's own fails, try a module built with the smaller widths: see
    `small_shapes`.

    Args:
      structure: from `trace_structure`, of all variables.
      kept: as for `shrink`.
      *inputs: to check for; by default those of the trace, abstract.
      apply: the function to check; by default the one that was traced.

    Returns:
      None if the function does exactly what `small_apply` does, else why not.

    Raises:
      TypeError: as for `shrink`.
      ValueError: as for `small_apply`.

    Example:
      >>> from cram_jax.structure import check_apply, trace_structure
      >>> def apply(params, x):
      ...     hidden = x @ params["a"]
      ...     return jnp.tanh(hidden / hidden.shape[-1]) @ params["b"]
      >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> structure = trace_structure(apply, params, jnp.ones((1, 3)))
      >>> check_apply(structure, np.array([True, True, False, True]))
      'it has the number 3.0 where the smaller network has the number 4.0'
    """
    model = model_of(structure)
    small = jax.eval_shape(lambda v: shrink(structure, v, kept), model.variables)
    inputs = inputs or model.inputs
    expected = jax.make_jaxpr(small_apply(structure, kept))(small, *inputs)
    try:
        own = jax.make_jaxpr(apply or model.apply)(small, *inputs)
    except Exception as error:  # the answer is whatever a model raises
        return f"it raises {type(error).__name__}: {str(error).splitlines()[0]}"
    table = Expressions()
    wanted, got = table.read(expected), table.read(own)
    if wanted == got:
        return None
    return table.difference(wanted, got)


class Expressions:
    """Numbers every distinct expression, so that equal programs have equal numbers."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.entries: list[tuple[Any, ...]] = []

    def read(self, program: jex.ClosedJaxpr) -> tuple[int, ...]:
        """The numbers of a program's outputs."""
        inputs = [
            self._number("input", place, _type(var))
            for place, var in enumerate(program.jaxpr.invars)
        ]
        return self._run(program, inputs)

    def difference(self, wanted: Sequence[int], got: Sequence[int]) -> str:
        """The first place, from the inputs on, where two programs differ."""
        if len(wanted) != len(got):
            return f"it returns {len(got)} arrays, expected {len(wanted)}"
        pair = next(p for p in zip(wanted, got, strict=True) if p[0] != p[1])
        while True:
            left, right = (self.entries[number] for number in pair)
            inside = _unequal_programs(left, right)
            if inside is not None:
                return self.difference(*inside)
            deeper = _unequal_arguments(left, right)
            if deeper is None:
                return _describe(left, right)
            pair = deeper

    def _number(self, *entry: Any) -> int:
        if entry not in self.numbers:
            self.numbers[entry] = len(self.entries)
            self.entries.append(entry)
        return self.numbers[entry]

    def _run(self, program: jex.ClosedJaxpr, args: Sequence[int]) -> tuple[int, ...]:
        jaxpr = program.jaxpr
        values: dict[Any, int] = dict(zip(jaxpr.invars, args, strict=True))
        for var, const in zip(jaxpr.constvars, program.consts, strict=True):
            values[var] = self._constant(const)

        def read(atom: Any) -> int:
            if isinstance(atom, jex.Literal):
                return self._constant(np.asarray(atom.val, dtype_of(atom)))
            return values[atom]

        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            values.update(zip(eqn.outvars, outs, strict=True))
        return tuple(read(atom) for atom in jaxpr.outvars)

    def _constant(self, value: Any) -> int:
        if isinstance(value, jax.core.Tracer):
            return self._number("traced constant", id(value))
        if jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        shown = f"the number {array}" if array.ndim == 0 else "other constants"
        # Bytes tell 0.0 from -0.0, and one NaN equals another.
        entry = (array.dtype.name, array.shape, array.tobytes(), shown)
        return self._number("constant", *entry)

    def _equation(self, eqn: jex.JaxprEqn, args: Sequence[int]) -> Sequence[int]:
        inner = called(eqn)
        if inner is not None:
            return self._run(inner, args)
        name = eqn.primitive.name
        if name == "cond":
            args = [self._unclamped(args[0], len(eqn.params["branches"])), *args[1:]]
        if name in NO_OPERATION or _changes_nothing(eqn):
            return list(args)
        if name == "convert_element_type" and self.entries[args[0]][0] == "constant":
            return [self._converted(self.entries[args[0]], eqn.params["new_dtype"])]
        # jax adds the size of an axis to a negative index, also if the index is 0.
        scalars = [self._scalar(self.entries[arg]) for arg in args]
        if name == "lt" and None not in scalars:
            return [self._constant(np.less(*scalars))]
        if name == "select_n" and scalars[0] is not None:
            return [args[1 + int(scalars[0])]]
        params = tuple(
            (key, self._parameter(value))
            for key, value in sorted(_canonical(eqn).items())
            if key not in IRRELEVANT
        )
        return [
            self._number(name, params, place, _type(var), tuple(args))
            for place, var in enumerate(eqn.outvars)
        ]

    def _unclamped(self, index: int, branches: int) -> int:
        """The number of a branch before it was clamped, which changes nothing."""
        while self.entries[index][0] == "clamp":
            low, inner, high = self.entries[index][-1]
            bounds = [self._constant(np.int32(end)) for end in (0, branches - 1)]
            if [low, high] != bounds:
                break
            index = inner
        return index

    def _scalar(self, entry: tuple[Any, ...]) -> Any:
        """The value of a constant without axes, or None."""
        if entry[0] != "constant" or entry[2]:
            return None
        return np.frombuffer(entry[3], np.dtype(entry[1]))[0]

    def _converted(self, entry: tuple[Any, ...], dtype: Any) -> int:
        _, name, shape, content, _ = entry
        array = np.frombuffer(content, np.dtype(name)).reshape(shape)
        return self._constant(array.astype(np.dtype(dtype)))

    def _parameter(self, value: Any) -> Hashable:
        if isinstance(value, jex.Jaxpr):
            value = jex.ClosedJaxpr(value, [])
        if isinstance(value, jex.ClosedJaxpr):
            return ("program", self.read(value))
        if isinstance(value, tuple | list):
            return tuple(self._parameter(item) for item in value)
        try:
            hash(value)
        except TypeError:
            return repr(value)
        return value


def _type(var: Any) -> tuple[Any, ...]:
    return shape_of(var), str(dtype_of(var))


def _canonical(eqn: jex.JaxprEqn) -> dict[str, Any]:
    """An equation's parameters, with equivalent ones in one form."""
    params = dict(eqn.params)
    if eqn.primitive.name == "slice":
        # The shape of the result says where it ends.
        del params["limit_indices"]
        params["strides"] = params["strides"] or (1,) * len(params["start_indices"])
    return params


def _changes_nothing(eqn: jex.JaxprEqn) -> bool:
    """Whether it is a reshape, broadcast or slice to the shape that its input has."""
    shaped = ("reshape", "broadcast_in_dim", "squeeze", "slice", "convert_element_type")
    return eqn.primitive.name in shaped and (
        _type(eqn.invars[0]) == _type(eqn.outvars[0])
    )


def _unequal_arguments(
    left: tuple[Any, ...], right: tuple[Any, ...]
) -> tuple[int, int] | None:
    """The first arguments that differ in two applications of one operation."""
    if left[0] != right[0] or left[0] in LEAVES:
        return None
    if len(left[-1]) != len(right[-1]):
        return None
    pairs = zip(left[-1], right[-1], strict=True)
    return next((pair for pair in pairs if pair[0] != pair[1]), None)


def _unequal_programs(
    left: tuple[Any, ...], right: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Outputs of the first inner programs that differ, such as bodies of scans."""
    if left[0] != right[0] or left[0] in LEAVES:
        return None
    for (_, wanted), (_, got) in zip(left[1], right[1], strict=True):
        is_program = isinstance(wanted, tuple) and wanted[:1] == ("program",)
        if is_program and wanted != got:
            return wanted[1], got[1]
    return None


def _describe(wanted: tuple[Any, ...], got: tuple[Any, ...]) -> str:
    return f"it has {_shown(got)} where the smaller network has {_shown(wanted)}"


def _shown(entry: tuple[Any, ...]) -> str:
    if entry[0] == "constant":
        return str(entry[-1])
    if entry[0] in LEAVES:
        return f"a{'n' if entry[0] == 'input' else ''} {entry[0]}"
    return f"{entry[0]} of shape {entry[3][0]}"
