"""Single equations of a traced program, as functions."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core as jex


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of a variable or literal of a program."""
    return tuple(atom.aval.shape)


def dtype_of(atom: Any) -> Any:
    """The dtype of a variable or literal of a program."""
    return atom.aval.dtype


def bind(eqn: jex.JaxprEqn, args: Sequence[Any], **changes: Any) -> list[Any]:
    """Applies an equation's primitive, with some parameters changed."""
    out = eqn.primitive.bind(*args, **{**eqn.params, **changes})
    return list(out) if eqn.primitive.multiple_results else [out]


def as_function(eqn: jex.JaxprEqn) -> Callable[..., list[Any]]:
    """An equation as a function of its inputs, derivative rules included."""
    variables = [atom for atom in eqn.invars if not isinstance(atom, jex.Literal)]
    distinct = list(dict.fromkeys(variables))

    def function(*args: Any) -> list[Any]:
        by_variable = {
            atom: arg
            for atom, arg in zip(eqn.invars, args, strict=True)
            if not isinstance(atom, jex.Literal)
        }
        return list(run(*(by_variable[variable] for variable in distinct)))

    jaxpr = jex.Jaxpr(
        constvars=(),
        invars=distinct,
        outvars=eqn.outvars,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jex.DebugInfo("equation", eqn.primitive.name, None, None),
    )
    run = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))
    return function


def evaluate(eqn: jex.JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Applies an equation as it was traced."""
    has_program = any(
        isinstance(leaf, jex.Jaxpr | jex.ClosedJaxpr)
        for parameter in eqn.params.values()
        for leaf in (parameter if isinstance(parameter, tuple | list) else [parameter])
    )
    return as_function(eqn)(*args) if has_program else bind(eqn, args)
