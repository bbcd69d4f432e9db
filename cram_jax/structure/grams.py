"""Products of the inputs of every layer, for pruning after training."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from cram_jax.axes import Axes
from cram_jax.paths import named_leaves
from cram_jax.projector import check_arrays, widened
from cram_jax.structure.contracted import Contraction, Place, find_contractions
from cram_jax.structure.equations import evaluate, shape_of
from cram_jax.structure.interpret import called
from cram_jax.structure.labels import Key
from cram_jax.structure.structure import TracedAxes
from cram_jax.structure.trace import read_program
from cram_jax.validation import check_batches, check_function

Grams = dict[str, jax.Array]


class InputGrams(NamedTuple):
    """What `input_grams` returns.

    Attributes:
      grams: by the path of a parameter, the sum of :math:`X^T X` over all inputs that
        it multiplies; shape (inputs, inputs), or (layers, inputs, inputs) if layers are
        stacked in the parameter; float32, or float64 if the activations are.
      left_out: by the path of a parameter of two or more dimensions without a sum, the
        reason.
      axes: which axes of a parameter the inputs are, for the ``axes=`` of any projector
        of these parameters; those of the others are None.
    """

    grams: Grams
    left_out: dict[str, str]
    axes: TracedAxes


def input_grams(
    apply: Callable[[Any, Any], Any], params: Any, batches: Iterable[Any]
) -> InputGrams:
    r"""Sums the products of the inputs of each layer, over batches of examples.

    A layer computes :math:`X W`, where X has a row for each position of each example.
    Its error with other weights depends on the data only through :math:`G = X^T X`:

    .. math:: ||X \hat W - X W||^2 = tr((\hat W - W)^T G (\hat W - W))

    `cram_jax.layerwise` prunes by what this returns. It works for any function of a
    pytree of arrays, whose traced program is read, and run along with the sums. Nothing
    in the model has to be named or changed.

    The inputs of a kernel count as one axis, in the order of the leaf; for a
    convolution, window first: (height, width, channels) for a Flax kernel. The sums
    need ``inputs**2`` floats a layer. Parameters that the model looks up, changes
    before multiplying, or multiplies in groups, are left out.

    Padding counts like any other position: give batches with little of it.

    Args:
      apply: ``(params, batch) -> anything``, as for `jax.jit`; in evaluation mode. The
        outputs are dropped.
      params: a pytree of arrays.
      batches: pytrees of arrays, at least one. Batches of one shape share a
        compilation.

    Returns:
      The sums, why some parameters have none, and the axes of the others.

    Raises:
      TypeError: `apply` is not a function, a leaf of `params` is not an array, or
        `batches` is a single batch.
      ValueError: there is no batch, no example in any, or no parameter.

    Example:
      >>> from cram_jax.structure import input_grams
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.eye(2), "b": jnp.ones((2, 1))}
      >>> found = input_grams(apply, params, [jnp.array([[1.0, -2.0]])])
      >>> found.grams["a"]
      Array([[ 1., -2.],
             [-2.,  4.]], dtype=float32)
      >>> found.grams["b"]
      Array([[1., 0.],
             [0., 0.]], dtype=float32)
    """
    check_function("apply", apply)
    check_arrays("params", params)
    check_batches("batches", batches)
    paths = [path for path, _ in named_leaves(params)]
    if not paths:
        raise ValueError(f"params must have at least one array, got {params!r}")
    readers: dict[Any, _Reader] = {}
    totals: Grams = {}
    left_out: dict[str, str] = {}
    axes: dict[str, Axes] = {}
    has_examples = False
    for batch in batches:
        has_examples = has_examples or _has_examples(batch)
        kind = jax.tree.structure(batch), str(jax.eval_shape(lambda x: x, batch))
        if kind not in readers:
            readers[kind] = _Reader(apply, params, batch, paths)
            left_out = readers[kind].left_out | left_out
            axes = readers[kind].axes() | axes
        totals = readers[kind](params, batch, totals)
    if not readers:
        raise ValueError("batches must hold at least one batch, got none")
    if not has_examples:
        raise ValueError("batches must hold at least one example, got only empty ones")
    kept = {path: gram for path, gram in totals.items() if path not in left_out}
    known = tuple((path, own) for path, own in axes.items() if path in kept)
    return InputGrams(kept, left_out, TracedAxes(known))


def _has_examples(batch: Any) -> bool:
    """Whether any array of a batch has entries; numbers are not examples."""
    arrays = [leaf for leaf in jax.tree.leaves(batch) if np.ndim(leaf)]
    return not arrays or any(map(np.size, arrays))


class _Reader:
    """Reads the program for batches of one shape, and runs it."""

    def __init__(
        self,
        apply: Callable[[Any, Any], Any],
        params: Any,
        batch: Any,
        paths: Sequence[str],
    ) -> None:
        abstract = jax.eval_shape(lambda *trees: trees, params, batch)
        self.analysis, _ = read_program(apply, abstract[0], (abstract[1],), None)
        found, obstacles = find_contractions(self.analysis, len(paths))
        reached = {contraction.leaf for contraction in found.values()}
        self.contractions, self.paths = found, paths
        self.left_out = {
            path: obstacles.get(number, "no contraction reads it")
            for number, (path, leaf) in enumerate(
                zip(paths, jax.tree.leaves(abstract[0]), strict=True)
            )
            if number not in reached and leaf.ndim > 1
        }
        self._run = jax.jit(self._add)

    def __call__(self, params: Any, batch: Any, totals: Grams) -> Grams:
        """The sums with those of another batch."""
        consts = self.analysis.program.consts
        return self._run(consts, jax.tree.leaves((params, batch)), totals)

    def axes(self) -> dict[str, Axes]:
        """What the axes of the parameters with a sum are for."""
        found = {}
        for contraction in self.contractions.values():
            leaf = contraction.leaf
            roles = ["output"] * self.analysis.program.in_avals[leaf].ndim
            for place in contraction.rows:
                is_window = place.axis in contraction.windows
                roles[place.axis] = "window" if is_window else "input"
            for axis in contraction.stack_axes:
                roles[axis] = "stack"
            found[self.paths[leaf]] = Axes(*roles)
        return found

    def _add(self, consts: Sequence[Any], args: Sequence[Any], totals: Grams) -> Grams:
        program = self.analysis.program
        sums = GramReplay(self.contractions)(program.jaxpr, consts, args, ())[1]
        stacks = {c.leaf: c.stack_axes for c in self.contractions.values()}
        for leaf, gram in sums.items():
            layers = [program.in_avals[leaf].shape[axis] for axis in stacks[leaf]]
            gram = gram.reshape(*layers, *gram.shape[-2:])
            path = self.paths[leaf]
            totals[path] = totals[path] + gram if path in totals else gram
        return totals


Sums = dict[int, jax.Array]
"""By the number of a parameter, (layers, inputs, inputs)."""


class GramReplay:
    """Runs a program and sums the inputs that its contractions multiply by parameters.

    Args:
      contractions: by the path of an equation.
    """

    def __init__(self, contractions: dict[Key, Contraction]) -> None:
        self.contractions = contractions
        self.around = {key[:end] for key in contractions for end in range(1, len(key))}

    def __call__(
        self, jaxpr: jex.Jaxpr, consts: Sequence[Any], args: Sequence[Any], path: Key
    ) -> tuple[list[Any], Sums]:
        """The values of a program's outputs, and the sums."""
        values: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        values.update(zip(jaxpr.constvars, consts, strict=True))
        sums: Sums = {}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, jex.Literal) else values[atom]

        for i, eqn in enumerate(jaxpr.eqns):
            key, ins = (*path, i), [read(atom) for atom in eqn.invars]
            outs, found = self._equation(eqn, ins, key)
            values.update(zip(eqn.outvars, outs, strict=True))
            for leaf, gram in found.items():
                sums[leaf] = sums[leaf] + gram if leaf in sums else gram
        return [read(atom) for atom in jaxpr.outvars], sums

    def _equation(
        self, eqn: jex.JaxprEqn, args: Sequence[Any], key: Key
    ) -> tuple[Sequence[Any], Sums]:
        if key in self.contractions:
            contraction = self.contractions[key]
            other = args[1 - contraction.side]
            return evaluate(eqn, args), {
                contraction.leaf: _gram(eqn, other, contraction)
            }
        if key in self.around:
            if eqn.primitive.name == "scan":
                return self._scan(eqn, args, key)
            inner = called(eqn)
            assert inner is not None  # no other equation contains contractions
            return self(inner.jaxpr, inner.consts, args, key)
        return evaluate(eqn, args), {}

    def _scan(
        self, eqn: jex.JaxprEqn, args: Sequence[Any], key: Key
    ) -> tuple[Sequence[Any], Sums]:
        params = eqn.params
        first, count = params["num_consts"], params["num_carry"]
        consts, carry = args[:first], args[first : first + count]
        body: jex.ClosedJaxpr = params["jaxpr"]

        def turn(carry: Any, slices: Any) -> tuple[Any, Any]:
            outs, sums = self(body.jaxpr, body.consts, [*consts, *carry, *slices], key)
            return tuple(outs[:count]), (outs[count:], sums)

        carried, (stacked, sums) = jax.lax.scan(
            turn,
            tuple(carry),
            args[first + count :],
            length=params["length"],
            reverse=params["reverse"],
        )
        sliced = {c.leaf for c in self.contractions.values() if key in c.scans}
        sums = {
            leaf: gram if leaf in sliced else jnp.sum(gram, axis=0)
            for leaf, gram in sums.items()
        }
        return [*carried, *stacked], sums


def _gram(eqn: jex.JaxprEqn, activations: Any, contraction: Contraction) -> jax.Array:
    """The sum of one contraction, (layers, inputs, inputs)."""
    if eqn.primitive.name == "dot_general":
        rows = _rows_of_product(eqn, activations, 1 - contraction.side)
    else:
        rows = _rows_of_convolution(eqn, activations)
    rows = widened(rows)
    layers, positions, inputs = rows.shape

    def by_place(place: Place) -> tuple[bool, Place]:
        return place.axis not in contraction.windows, place

    rows = _reordered(rows, 2, contraction.rows, by_place)
    rows = _reordered(rows, 0, contraction.stack, by_place)
    rows = rows.reshape(layers, positions, inputs)
    return jnp.einsum("lpi,lpj->lij", rows, rows, precision="highest")


def _reordered(
    rows: jax.Array, axis: int, places: Sequence[Place], by: Callable[[Place], Any]
) -> jax.Array:
    """Brings the parts of an axis into an order."""
    before, after = rows.shape[:axis], rows.shape[axis + 1 :]
    parts = rows.reshape(*before, *(place.size for place in places), *after)
    order = sorted(range(len(places)), key=lambda i: by(places[i]))
    permutation = [
        *range(axis),
        *(axis + i for i in order),
        *range(axis + len(places), parts.ndim),
    ]
    return parts.transpose(permutation).reshape(rows.shape)


def _rows_of_product(eqn: jex.JaxprEqn, activations: Any, side: int) -> jax.Array:
    """The inputs that a matrix multiplies, as (layers, positions, inputs)."""
    contracted, batch = eqn.params["dimension_numbers"]
    summed, shared = [[int(i) for i in part[side]] for part in (contracted, batch)]
    free = [i for i in range(activations.ndim) if i not in {*summed, *shared}]
    sizes = [
        math.prod(activations.shape[i] for i in dimensions)
        for dimensions in (shared, free, summed)
    ]
    rows: jax.Array = jnp.transpose(activations, (*shared, *free, *summed))
    return rows.reshape(sizes)


def _rows_of_convolution(eqn: jex.JaxprEqn, image: Any) -> jax.Array:
    """The patches that a kernel sees, as (1, positions, channels and windows)."""
    params = eqn.params
    spec = params["dimension_numbers"]
    image = jnp.transpose(image, spec.lhs_spec)  # batch, channels, and the rest
    spatial = range(image.ndim - 2)
    padding = zip(params["padding"], params["lhs_dilation"], strict=True)
    image = jax.lax.pad(
        image,
        jnp.zeros([], image.dtype),
        [(0, 0, 0)] * 2
        + [(low, high, dilation - 1) for (low, high), dilation in padding],
    )
    window = [shape_of(eqn.invars[1])[i] for i in spec.rhs_spec[2:]]
    out = [shape_of(eqn.outvars[0])[i] for i in spec.out_spec[2:]]
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    patches = []
    for place in np.ndindex(*window):
        start = [place[i] * dilation[i] for i in spatial]
        stop = [start[i] + (out[i] - 1) * strides[i] + 1 for i in spatial]
        patches.append(
            jax.lax.slice(
                image, (0, 0, *start), (*image.shape[:2], *stop), (1, 1, *strides)
            )
        )
    rows = jnp.stack(patches, axis=2)  # batch, channels, window, positions
    rows = jnp.moveaxis(rows, (1, 2), (-2, -1))
    return rows.reshape(1, -1, image.shape[1] * len(patches))
