"""The projector: what is pruned, in how many steps, and what it refuses."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from cram_jax.axes import Axes, AxesLike, axes_value
from cram_jax.curvature import fisher
from cram_jax.curvature.examples import check_names, count_examples
from cram_jax.curvature.finite import Finite, check_finite
from cram_jax.curvature.removal import prune_to
from cram_jax.gradients import Caller, Gradient, gradient_of
from cram_jax.leaves import (
    Leaf,
    Where,
    described,
    notes_of,
    prunable,
    where_value,
)
from cram_jax.paths import check_masks
from cram_jax.projector import (
    Params,
    Projection,
    Projector,
    apply_masks,
    check_structure,
)
from cram_jax.sparsity import Number, check_sparsity, kept_count
from cram_jax.validation import (
    check_choice,
    check_flag,
    check_integer,
    check_positive,
)

_CALLER = Caller("examples and constants", "examples={{{!r}: ...}}")


def second_order(
    sparsity: Number,
    loss_fn: Callable[..., Any],
    examples: Mapping[str, Any],
    *,
    scope: Literal["global", "layer"] = "global",
    where: Where | None = None,
    axes: AxesLike | None = None,
    block_size: int = 50,
    damping: float = 1e-7,
    recomputations: int = 4,
    examples_per_gradient: int = 1,
    micro_batch: int = 16,
    masks: Params | None = None,
    constants: Mapping[str, Any] | None = None,
    has_aux: bool = False,
) -> "SecondOrder":
    r"""Prunes by the curvature of the loss, and adjusts the remaining weights.

    A weight's magnitude says little about how much the loss depends on it. The
    empirical Fisher matrix, restricted to diagonal blocks, approximates the Hessian of
    the loss at trained parameters:

    .. math:: F = \lambda I + \frac{1}{m} \sum_{i=1}^{m} g_i g_i^T

    over the gradients :math:`g_i` of m examples. The weights with the smallest
    saliencies :math:`\rho_i = w_i^2 / (2 [F^{-1}]_{ii})` are removed. If those are the
    weights Q of a block, the others of the block move by

    .. math:: \delta w = -F^{-1} E_Q (E_Q^T F^{-1} E_Q)^{-1} E_Q^T w_Q

    which minimises the quadratic model for all of Q jointly. Leaves that are not
    prunable do not change. It keeps exactly as many weights as `top_k`, with the same
    rule for ties. Fine-tune the result with `keep_pruned`.

    A block holds weights of the same output: the leaf is flattened with its output axes
    first. The last block may be smaller.

    The quadratic model holds near the parameters at which F was computed. Removing most
    weights at once leaves that neighbourhood and can do worse than magnitude, so F is
    recomputed on the way.

    Cost of each recomputation: m gradients and, for each of them, about three passes
    over ``block_size`` floats per prunable weight; on a CPU, one pass for each
    ``micro_batch`` of gradients. Memory has to hold that many floats, those of the
    largest leaf a second time, and ``micro_batch`` gradients; ``peak_memory(params)``
    says how much. The statistics are float32, float64 for float64 parameters. The same
    compiled programs serve every recomputation; their size depends on neither m nor
    ``block_size``.

    Sharded parameters give the same masks. With explicit axes, blocks are placed like
    their outputs, or copied to all devices if a block would straddle two of them; with
    automatic axes XLA decides. Traced calls, such as in a training step, are refused:
    pruning comes after training, and errors cannot be raised there.

    Args:
      sparsity: share of zeros, 0 <= sparsity < 1.
      loss_fn: ``loss_fn(params, ...) -> scalar``, or ``(scalar, aux)`` with
        ``has_aux``. It must be a mean over examples and accept a batch of one; use
        evaluation mode, since a single example has no batch statistics.
      examples: the arguments of the loss, by name, that have the examples along axis 0:
        arrays or trees of arrays. 1,024 training examples are usual.
      scope: "global" or "layer", see `top_k`.
      where: which leaves, see `prunable`.
      axes: what is known of the axes, see `axes_of`.
      block_size: weights in a block.
      damping: :math:`\lambda`, above 0.
      recomputations: how often F is computed. With R of them, the share of weights kept
        falls by the same factor R times, and F is computed for the remaining weights.
      examples_per_gradient: how many examples each gradient averages over; with more
        than one, the same examples give fewer gradients.
      micro_batch: gradients computed at a time; affects only speed and memory.
      masks: from an earlier pruning; weights pruned there stay pruned, and count.
      constants: the other arguments of the loss by name, the same for all examples,
        such as ``batch_stats``.
      has_aux: whether ``loss_fn`` returns auxiliary data, which is dropped.

    Returns:
      A projector. Its masks are bool, shaped like the leaves.

    Raises:
      TypeError: an argument is of a wrong type; at use, if ``loss_fn`` needs an
        argument that it does not get or gives no scalar, a leaf to prune is not of a
        floating dtype, or the call is traced.
      ValueError: a number is out of range, there is no example, the arrays hold
        different numbers of examples, or ``examples_per_gradient`` does not divide it;
        at use, if the masks do not fit, ``where`` chooses no leaf, or a weight or the
        gradient of an example is not finite, which the error names.

    Example:
      The inputs are proportional, so the remaining weight can do the work of both:

      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((x @ params["kernel"] - y) ** 2)
      >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [3.0, 3.0]])
      >>> params = {"kernel": jnp.array([[1.01], [0.9]])}
      >>> examples = {"x": x, "y": x @ jnp.array([[1.0], [0.9]])}
      >>> projector = second_order(0.5, loss_fn, examples)
      >>> compress(params, projector).params["kernel"].round(2)
      Array([[1.91],
             [0.  ]], dtype=float32)

    References:
      Kurtic et al., The Optimal BERT Surgeon, EMNLP 2022, arXiv 2203.07259;
      Singh and Alistarh, WoodFisher, NeurIPS 2020, arXiv 2004.14340.
    """
    check_sparsity(sparsity)
    check_choice("scope", scope, ("global", "layer"))
    check_flag("has_aux", has_aux)
    for name, value in (
        ("block_size", block_size),
        ("recomputations", recomputations),
        ("examples_per_gradient", examples_per_gradient),
        ("micro_batch", micro_batch),
    ):
        check_integer(name, value, minimum=1)
    check_positive("damping", damping)
    constants = {} if constants is None else constants
    check_names(examples, constants)
    size = count_examples(examples)
    if size % examples_per_gradient:
        raise ValueError(
            f"examples_per_gradient must divide the number of examples {size}, got "
            f"{examples_per_gradient}"
        )
    gradient = gradient_of(loss_fn, has_aux=has_aux, axis_name=None, caller=_CALLER)
    count = size // examples_per_gradient
    options = fisher.Options(
        count,
        examples_per_gradient,
        min(micro_batch, count),
        block_size,
        damping,
    )
    return SecondOrder(
        sparsity,
        gradient,
        fisher.Inputs(dict(examples), dict(constants)),
        options,
        scope,
        where_value(where),
        axes_value(axes),
        recomputations,
        masks,
    )


@dataclass(frozen=True, eq=False, repr=False)
class SecondOrder(Projector):
    """See `second_order`. It holds arrays, so it equals only itself."""

    sparsity: Number
    gradient: Gradient
    inputs: fisher.Inputs
    options: fisher.Options
    scope: Literal["global", "layer"]
    where: Any
    axes: Any
    recomputations: int
    masks: Params | None

    def __repr__(self) -> str:
        return f"second_order({self.sparsity}, ...)"

    @property
    def only_masks(self) -> bool:
        """False: it changes what it keeps."""
        return False

    def init(self, params: Params) -> tuple[()]:
        """None. Traces nothing, because tracing the loss takes time."""
        prunable(params, self.where, self.axes)
        return ()

    def notes(self, params: Params) -> list[str]:
        """Why leaves stay dense, and which axes were assumed for the others."""
        return notes_of(params, self.where, self.axes)

    def project(
        self, params: Params, state: Any, key: jax.Array | None
    ) -> tuple[Projection, Any]:
        """Prunes, unless traced."""
        del key
        self._check_concrete(params)
        leaves = self._leaves(params)
        projection = _already_pruned(params, self.masks)
        for share in _schedule(self.sparsity, self.recomputations) if leaves else ():
            projection, finite = self._prune(projection, leaves, share)
            paths = [leaf.path for leaf in leaves.values()]
            check_finite(finite, paths, self.options.examples_per_gradient)
        return projection, state

    def peak_memory(self, params: Params) -> int:
        """How much memory `project` needs, by XLA's analysis of its programs.

        Args:
          params: a pytree of arrays.

        Returns:
          Bytes, the parameters and examples included.
        """
        leaves = self._leaves(params)
        places, counts = _places(leaves), self._counts(leaves, self.sparsity)
        projection = _already_pruned(params, self.masks)
        first = self._first_roots.lower(params, places)
        roots = jax.tree.map(
            lambda root, sharding: jax.ShapeDtypeStruct(
                root.shape, root.dtype, sharding=sharding
            ),
            first.out_info,
            first.compile().output_shardings,
        )
        programs = (
            self._add_micro_batch.lower(roots, 0, projection, self.inputs, places),
            self._prune_to.lower(projection, roots, counts, places),
        )
        return max(_bytes_of(program.compile()) for program in programs)

    def _leaves(self, params: Params) -> dict[int, Leaf]:
        chosen = prunable(params, self.where, self.axes)
        return {
            i: leaf
            for i, leaf in enumerate(described(params, self.axes))
            if chosen[i] and jnp.size(leaf.value)
        }

    def _counts(self, leaves: dict[int, Leaf], share: Number) -> list[int | jax.Array]:
        """How many to keep, in all leaves together or in each layer."""
        sizes = [jnp.size(leaf.value) for leaf in leaves.values()]
        if self.scope == "global":
            return [kept_count(sum(sizes), share)]
        layers = [
            math.prod(jnp.shape(leaf.value)[axis] for axis in leaf.axes.stack)
            for leaf in leaves.values()
        ]
        return [
            kept_count(size // n, share) for size, n in zip(sizes, layers, strict=True)
        ]

    def _check_concrete(self, params: Params) -> None:
        for leaf in jax.tree.leaves((params, self.inputs)):
            if isinstance(leaf, jax.core.Tracer):
                raise TypeError(
                    f"{self!r} prunes trained parameters once and must not be traced, "
                    f"as in jit or in a step of training: call compress outside jit, "
                    f"and train for top_k instead"
                )

    def _prune(
        self, projection: Projection, leaves: dict[int, Leaf], share: Number
    ) -> tuple[Projection, Finite]:
        """Prunes to this share, by the curvature at the projected parameters."""
        places = _places(leaves)
        roots = self._first_roots(projection.params, places)
        finite = []
        # Not in one program: on CPUs XLA's convolutions are slow inside its loops.
        for start in range(0, self.options.gradients, self.options.micro_batch):
            roots, is_finite = self._add_micro_batch(
                roots, start, projection, self.inputs, places
            )
            finite.append(is_finite)
        projection, before, after = self._prune_to(
            projection, roots, self._counts(leaves, share), places
        )
        gradients = jnp.concatenate(finite)[: self.options.gradients]
        return projection, Finite(before, gradients, after)

    @cached_property
    def _first_roots(self) -> Any:
        start = partial(fisher.first_roots, options=self.options)
        return jax.jit(start, static_argnames="places")

    @cached_property
    def _add_micro_batch(self) -> Any:
        add = partial(
            fisher.add_micro_batch, gradient=self.gradient, options=self.options
        )
        return jax.jit(add, static_argnames="places", donate_argnames="roots")

    @cached_property
    def _prune_to(self) -> Any:
        prune = partial(prune_to, scope=self.scope, width=self.options.block_size)
        return jax.jit(prune, static_argnames="places")


def _bytes_of(program: jax.stages.Compiled) -> int:
    """The arguments, outputs and temporaries; what is donated counts once."""
    memory: Any = program.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def _outputs_first(axes: Axes) -> tuple[int, ...]:
    """The axes, outermost first: stacked layers, outputs, and what feeds them."""
    first = (*axes.stack, *axes.outputs)
    return (*first, *(i for i in range(len(axes.roles)) if i not in first))


def _places(leaves: dict[int, Leaf]) -> tuple[fisher.Place, ...]:
    return tuple(
        fisher.Place(i, _outputs_first(leaf.axes), leaf.axes.stack)
        for i, leaf in leaves.items()
    )


def _schedule(sparsity: Number, steps: int) -> Iterator[Number]:
    """Sparsities up to the last: the kept share falls by the same factor each time."""
    for step in range(1, steps):
        yield 1 - (1 - sparsity) ** (step / steps)
    yield sparsity


def _already_pruned(params: Params, masks: Params | None) -> Projection:
    if masks is None:
        return Projection(params, optax.tree.ones_like(params, dtype=bool))
    check_structure("masks", masks, params)
    check_masks("masks", masks, params)
    return Projection(apply_masks(masks, params), masks)
