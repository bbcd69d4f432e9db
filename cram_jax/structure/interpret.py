"""Reads a traced program and labels every array in it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.extend import core as jex

from cram_jax.structure import contractions, elementwise, indexing, movement
from cram_jax.structure.equations import shape_of
from cram_jax.structure.labels import (
    Ids,
    Key,
    Labels,
    Refinements,
    Role,
    Source,
    Value,
)
from cram_jax.structure.movement import join

RULES = {
    **elementwise.RULES,
    **movement.RULES,
    **contractions.RULES,
    **indexing.RULES,
}
CALLS = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "core_closed_call",
        "remat",
        "remat2",
        "checkpoint",
        "remat_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    ]
)
STACKED = "layers or steps are scanned along it"
MAX_PASSES = 50


class Labelled(NamedTuple):
    """An equation, and the labels of its inputs and outputs."""

    eqn: jex.JaxprEqn
    ins: list[Value]
    outs: list[Value]


class Input(NamedTuple):
    """What is known about an input of a program before it is read.

    Attributes:
      source: weights for parameters, activations for the rest.
      zero: whether masks set removed positions to 0.
      frozen: why no position may be removed; None if any may.
    """

    source: Source
    zero: bool
    frozen: str | None = None


class Analysis(NamedTuple):
    """A program with its labels.

    Attributes:
      program: what was read.
      labels: all labels, and what rules noted about them.
      inputs: one for each input of the program.
      outputs: one for each output.
      equations: by path: the positions of an equation and of those it is inside.
      constants: by path, the labels of a program's constants.
      root: the class of each label.
      reasons: of each class that may not be removed, why.
    """

    program: jex.ClosedJaxpr
    labels: Labels
    inputs: list[Value]
    outputs: list[Value]
    equations: dict[Key, Labelled]
    constants: dict[Key, Value]
    root: Ids
    reasons: dict[int, str]


def analyse(
    program: jex.ClosedJaxpr,
    inputs: Sequence[Input],
    frozen_outputs: Sequence[str | None],
) -> Analysis:
    """Labels a program, reading it again until no reshape asks for a finer split.

    Args:
      program: the traced function.
      inputs: one for each input of the program.
      frozen_outputs: for each output, why its positions must stay; None if they may go.

    Returns:
      The labels, with their classes.
    """
    refinements: Refinements = {}
    for _ in range(MAX_PASSES):
        interpreter = Interpreter(Labels(refinements))
        values = [
            interpreter.labels.value(
                ("input", i),
                shape_of(var),
                spec.source,
                zero=spec.zero,
                frozen=spec.frozen,
            )
            for i, (var, spec) in enumerate(
                zip(program.jaxpr.invars, inputs, strict=True)
            )
        ]
        outputs = interpreter.run(program.jaxpr, program.consts, values, ())
        if not interpreter.labels.refined:
            break
    else:
        raise RuntimeError(f"no stable split of the axes after {MAX_PASSES} passes")
    labels = interpreter.labels
    for value, reason in zip(outputs, frozen_outputs, strict=True):
        if reason is not None:
            for axis in value.axes:
                labels.freeze(axis, reason)
    root = labels.solve()
    reasons: dict[int, str] = {}
    for ids, reason in labels.freezes:
        for label in set(root[ids].tolist()):
            reasons.setdefault(label, reason)
    return Analysis(
        program,
        labels,
        values,
        outputs,
        interpreter.equations,
        interpreter.constants,
        root,
        reasons,
    )


class Interpreter:
    """Carries labels through the equations of a program.

    Args:
      labels: where labels come from.
    """

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.equations: dict[Key, Labelled] = {}
        self.constants: dict[Key, Value] = {}

    def run(
        self, jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Value], path: Key
    ) -> list[Value]:
        """The labels of a program's outputs."""
        values: dict[Any, Value] = dict(zip(jaxpr.invars, args, strict=True))
        for i, (var, const) in enumerate(zip(jaxpr.constvars, consts, strict=True)):
            values[var] = self._constant((*path, "const", i), shape_of(var), const)
        for i, eqn in enumerate(jaxpr.eqns):
            key = (*path, i)
            ins = [self._read(atom, values) for atom in eqn.invars]
            outs = self._equation(eqn, ins, key)
            self.equations[key] = Labelled(eqn, ins, outs)
            values.update(zip(eqn.outvars, outs, strict=True))
        return [self._read(atom, values) for atom in jaxpr.outvars]

    def _constant(self, key: Key, shape: Sequence[int], const: Any) -> Value:
        value = self.labels.value(key, shape, Source.CONSTANT)
        if np.ndim(const) == 0 and not isinstance(const, jax.core.Tracer):
            value = value._replace(literal=_number(const))
        self.constants[key] = value
        return value

    def _read(self, atom: Any, values: dict[Any, Value]) -> Value:
        if isinstance(atom, jex.Literal):
            # Literals of a jaxpr are scalars.
            return Value(((),) * np.ndim(atom.val), Source.CONSTANT, atom.val)
        return values[atom]

    def _equation(
        self, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
    ) -> list[Value]:
        name = eqn.primitive.name
        if name in RULES:
            return RULES[name](self.labels, eqn, ins, key)
        if name in CONTROL:
            return CONTROL[name](self, eqn, ins, key)
        inner = called(eqn)
        if inner is not None:
            return self.run(inner.jaxpr, inner.consts, ins, key)
        return self._unknown(eqn, ins, key)

    def _unknown(
        self, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
    ) -> list[Value]:
        reason = f"it meets {eqn.primitive.name}, an operation without a rule"
        for value in ins:
            for axis in value.axes:
                self.labels.freeze(axis, reason)
        source = max((value.source for value in ins), default=Source.CONSTANT)
        return [
            self.labels.value((*key, i), shape_of(var), source, frozen=reason)
            for i, var in enumerate(eqn.outvars)
        ]

    def until_stable(
        self,
        carry: Sequence[Value],
        body: Callable[[list[Value]], list[Value]],
        key: Key,
    ) -> tuple[list[Value], list[Value]]:
        """What a loop carries, after as many iterations as its zeros need.

        Returns:
          The carried values, and the outputs of the body.
        """
        entry = list(carry)
        while True:
            outs = body(entry)
            joined = [
                join(self.labels, before, after, (*key, "carry", i))
                for i, (before, after) in enumerate(
                    zip(entry, outs[: len(entry)], strict=True)
                )
            ]
            if [_zeros(value) for value in joined] == [_zeros(v) for v in entry]:
                return joined, outs
            entry = joined


def called(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr | None:
    """The program that an equation only calls, as in jit; None for any other."""
    if eqn.primitive.name not in CALLS:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if isinstance(inner, jex.ClosedJaxpr):
            return inner
        if isinstance(inner, jex.Jaxpr):
            return jex.ClosedJaxpr(inner, [])
    return None


def _number(const: Any) -> Any:
    try:
        return np.asarray(const)
    except TypeError:  # a PRNG key is not a number
        return None


def _zeros(value: Value) -> list[list[bool]]:
    return [[factor.zero for factor in axis] for axis in value.axes]


def _with_source(values: Sequence[Value], source: Source) -> list[Value]:
    return [value._replace(source=source, literal=None) for value in values]


def _scan(
    interpreter: Interpreter, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    params, labels = eqn.params, interpreter.labels
    first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
    consts, carry, stacks = ins[:first], ins[first:last], ins[last:]
    source = max((value.source for value in ins), default=Source.CONSTANT)
    slices = []
    for value in stacks:
        labels.freeze(value.axes[0], STACKED)
        if value.source is Source.WEIGHT:
            labels.add_role(value.axes[0], Role.STACK)
        slices.append(Value(value.axes[1:], value.source))
    body: jex.ClosedJaxpr = params["jaxpr"]

    def turn(entry: list[Value]) -> list[Value]:
        return interpreter.run(body.jaxpr, body.consts, [*consts, *entry, *slices], key)

    carried, outs = interpreter.until_stable(_with_source(carry, source), turn, key)
    lead = labels.axis((*key, "length"), params["length"], frozen=STACKED)
    stacked = [Value((lead, *out.axes), source) for out in outs[len(carry) :]]
    return [*_with_source(carried, source), *stacked]


def _while(
    interpreter: Interpreter, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    params = eqn.params
    first = params["cond_nconsts"]
    last = first + params["body_nconsts"]
    source = max((value.source for value in ins), default=Source.CONSTANT)
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]

    def turn(entry: list[Value]) -> list[Value]:
        interpreter.run(cond.jaxpr, cond.consts, [*ins[:first], *entry], (*key, "cond"))
        return interpreter.run(
            body.jaxpr, body.consts, [*ins[first:last], *entry], (*key, "body")
        )

    carry = _with_source(ins[last:], source)
    carried, _ = interpreter.until_stable(carry, turn, key)
    return _with_source(carried, source)


def _cond(
    interpreter: Interpreter, eqn: jex.JaxprEqn, ins: Sequence[Value], key: Key
) -> list[Value]:
    source = max(value.source for value in ins)
    joined: list[Value] = []
    for i, branch in enumerate(eqn.params["branches"]):
        outs = interpreter.run(branch.jaxpr, branch.consts, ins[1:], (*key, i))
        joined = [
            join(interpreter.labels, *pair, (*key, i, "join", place))
            for place, pair in enumerate(zip(joined or outs, outs, strict=True))
        ]
    return _with_source(joined, source)


ControlRule: TypeAlias = Callable[
    [Interpreter, jex.JaxprEqn, Sequence[Value], Key], list[Value]
]
CONTROL: dict[str, ControlRule] = {"scan": _scan, "while": _while, "cond": _cond}
