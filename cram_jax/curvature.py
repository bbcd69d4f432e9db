"""Pruning after training that knows the curvature of the loss: oBERT and WoodFisher."""

import functools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax import fisher
from cram_jax.compress import compress
from cram_jax.gradients import Caller, gradient_of
from cram_jax.leaves import Where, prunable
from cram_jax.projector import (
    Params,
    Projection,
    Projector,
    apply_masks,
    check_structure,
    leaf_path,
    stateless,
)
from cram_jax.selection import keep_largest
from cram_jax.sparsity import Number, check_sparsity, kept_count
from cram_jax.validation import check_choice, check_integer

_CALLER = Caller("examples and constants", "examples={{{!r}: ...}}")


def second_order(
    sparsity: Number,
    loss_fn: Callable[..., Any],
    examples: Mapping[str, Any],
    *,
    scope: Literal["global", "layer"] = "global",
    where: Where | None = None,
    block_size: int = 50,
    damping: float = 1e-7,
    recomputations: int = 4,
    examples_per_gradient: int = 1,
    micro_batch: int = 16,
    masks: Params | None = None,
    constants: Mapping[str, Any] | None = None,
    has_aux: bool = False,
) -> Projector:
    r"""Prunes with the curvature of the loss, and moves the weights that stay.

    Magnitude says little about what a weight is worth. The empirical Fisher matrix, cut
    into diagonal blocks, stands for the Hessian of the loss at trained parameters:

    .. math:: F = \lambda I + \frac{1}{m} \sum_{i=1}^{m} g_i g_i^T

    over the gradients :math:`g_i` of m examples. The weights with the smallest
    saliencies :math:`\rho_i = w_i^2 / (2 [F^{-1}]_{ii})` go. With the weights Q of a
    block gone, the others of the block move by

    .. math:: \delta w = -F^{-1} E_Q (E_Q^T F^{-1} E_Q)^{-1} E_Q^T w_Q

    which is the minimum of the quadratic model, for all of Q together; leaves that are
    not prunable stay. Exactly as many weights are kept as by `top_k`, with its rule
    for equal ones. Fine-tune the result with `keep_pruned`.

    A block holds weights of the same output, the last axis: what is flattened is the
    leaf with that axis moved to the front. Its last block may be smaller.

    The quadratic model holds near the parameters that F is of. To remove most of the
    weights at once leaves its range, and can do worse than magnitude: hence the
    recomputations.

    Cost, for each recomputation: m gradients and, for each of them, some three passes
    over ``block_size`` floats for each prunable weight; on a CPU one pass for each
    ``micro_batch`` of gradients. That many have to fit in memory, once more those of
    the largest leaf, and ``micro_batch`` gradients. The statistics are float32, float64
    for float64 parameters. All runs in one compiled program, the same for every
    recomputation; its size depends on neither m nor ``block_size``. Sharded parameters
    give the same masks. With explicit axes, blocks lie where their outputs do, or are
    copied to all devices where one of them would lie across two; with automatic axes
    XLA decides.

    Args:
      loss_fn: ``loss_fn(params, ...) -> scalar``, a mean over examples that also works
        for one; or ``(scalar, aux)`` with ``has_aux``. In evaluation mode, rather: one
        example has no batch statistics.
      examples: those arguments of the loss, by name, that have the examples along axis
        0: arrays or trees of arrays. 1,024 of the training set are usual. An example
        reaches the loss as a batch of one.
      sparsity: share of zeros, 0 <= sparsity < 1.
      scope: "global" or "layer", see `top_k`.
      where: which leaves, see `prunable`; by default those of two or more dimensions.
      block_size: weights in a block.
      damping: :math:`\lambda`, above 0.
      recomputations: how often F is computed. With R of them the share of weights
        that is kept falls by the same factor R times; F is that of the parameters
        pruned so far, without what is pruned.
      examples_per_gradient: how many examples a gradient is averaged over. With more
        than one, as many examples give fewer gradients.
      micro_batch: gradients computed at a time; changes speed and memory alone.
      masks: from an earlier pruning: what was pruned there stays so, and counts.
      constants: further arguments of the loss by name, the same for all examples, such
        as ``batch_stats``.
      has_aux: whether ``loss_fn`` returns auxiliary data, which is dropped.

    Returns:
      The pruned parameters and the masks of the kept entries, both like ``params``.

    Raises:
      TypeError: an argument is of a wrong type, ``loss_fn`` needs an argument that it
        does not get or gives no scalar, or a leaf to prune is not of a floating dtype.
      ValueError: a number is out of range, there is no example, arrays of the examples
        differ in their number or ``examples_per_gradient`` does not divide it, the
        masks do not fit, or ``where`` chooses no leaf.

    Example:
      The inputs move together, so that the weight left does the work of both:

      >>> def loss_fn(params, x, y):
      ...     return jnp.mean((x @ params["kernel"] - y) ** 2)
      >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [3.0, 3.0]])
      >>> params = {"kernel": jnp.array([[1.01], [0.9]])}
      >>> examples = {"x": x, "y": x @ jnp.array([[1.0], [0.9]])}
      >>> second_order_prune(loss_fn, params, examples, 0.5).params["kernel"].round(2)
      Array([[1.91],
             [0.  ]], dtype=float32)

    References:
      Kurtic et al., The Optimal BERT Surgeon, EMNLP 2022, arXiv 2203.07259;
      Singh and Alistarh, WoodFisher, NeurIPS 2020, arXiv 2004.14340.
    """
    check_sparsity(sparsity)
    check_choice("scope", scope, ("global", "layer"))
    for name, value in (
        ("block_size", block_size),
        ("recomputations", recomputations),
        ("examples_per_gradient", examples_per_gradient),
        ("micro_batch", micro_batch),
    ):
        check_integer(name, value, minimum=1)
    _check_damping(damping)
    constants = {} if constants is None else constants
    _check_names(examples, constants)
    size = _count_examples(examples)
    if size % examples_per_gradient:
        raise ValueError(
            f"examples_per_gradient must divide the number of examples {size}, got "
            f"{examples_per_gradient}"
        )
    gradient = gradient_of(
        _scalar(loss_fn, has_aux), has_aux=has_aux, axis_name=None, caller=_CALLER
    )
    inputs = fisher.Inputs(dict(examples), dict(constants))
    options = fisher.Options(
        size // examples_per_gradient,
        examples_per_gradient,
        micro_batch,
        block_size,
        damping,
    )

    @partial(jax.jit, static_argnames="places")
    def prune(
        projection: Projection,
        inputs: fisher.Inputs,
        counts: list[int | jax.Array],
        places: tuple[int, ...],
    ) -> tuple[Projection, _Finite]:
        leaves, kept = map(jax.tree.leaves, projection)
        structure: Any = jax.tree.structure(projection.params)
        roots, finite_gradients = fisher.inverse_roots(
            gradient, projection, places, inputs, options
        )
        weights = [fisher.to_blocks(fisher.wide(leaves[i]), block_size) for i in places]
        ranks = [
            _ranks(fisher.saliency_root(root, w), kept[i])
            for i, w, root in zip(places, weights, roots, strict=True)
        ]
        groups = [ranks] if scope == "global" else [[rank] for rank in ranks]
        largest = [
            mask
            for group, count in zip(groups, counts, strict=True)
            for mask in keep_largest(group, count)
        ]
        before = [leaves[i] for i in places]
        for i, w, root, mask in zip(places, weights, roots, largest, strict=True):
            kept[i] = kept[i] & mask
            removed = ~fisher.to_blocks(kept[i], block_size)
            moved = fisher.from_blocks(fisher.eliminate(w, removed, root), leaves[i])
            leaves[i] = moved.astype(leaves[i].dtype)
        finite = _Finite(
            _all_finite(before),
            finite_gradients,
            _all_finite([leaves[i] for i in places]),
        )
        pruned = Projection(structure.unflatten(leaves), structure.unflatten(kept))
        return pruned, finite

    def project(params: Params, key: jax.Array | None) -> Projection:
        del key
        leaves = jax.tree.leaves_with_path(params)
        places = tuple(
            i
            for i, is_chosen in enumerate(prunable(params, where))
            if is_chosen and leaves[i][1].size
        )
        projection = _already_pruned(params, masks)
        if not places:
            return projection
        paths = [leaf_path(leaves[i][0]) for i in places]
        sizes = [leaves[i][1].size for i in places]
        sizes = [sum(sizes)] if scope == "global" else sizes
        for share in _schedule(sparsity, recomputations):
            counts = [kept_count(size, share) for size in sizes]
            projection, finite = prune(projection, inputs, counts, places)
            if isinstance(finite.before, jax.core.Tracer):
                projection = _nan_unless(finite, projection, places)
            else:
                _check_finite(finite, paths, examples_per_gradient)
        return projection

    return stateless(project, f"second_order({sparsity})")


def second_order_prune(
    loss_fn: Callable[..., Any],
    params: Params,
    examples: Mapping[str, Any],
    sparsity: Number,
    *,
    scope: Literal["global", "layer"] = "global",
    where: Where | None = None,
    block_size: int = 50,
    damping: float = 1e-7,
    recomputations: int = 4,
    examples_per_gradient: int = 1,
    micro_batch: int = 16,
    masks: Params | None = None,
    constants: Mapping[str, Any] | None = None,
    has_aux: bool = False,
) -> Projection:
    """Prunes trained parameters in one shot by the curvature of the loss.

    The same as ``compress(params, second_order(sparsity, loss_fn, examples, ...))``.

    Args: those of `second_order`, and ``params``, a pytree of trained floating-point
    arrays.

    Returns:
      The pruned parameters and the masks of the kept entries, both like ``params``.

    Raises:
      TypeError, ValueError: see `second_order`.

    Example:
      >>> def loss_fn(params, x):
      ...     return jnp.mean(x @ params["kernel"])
      >>> params = {"kernel": jnp.array([[2.0], [3.0]])}
      >>> examples = {"x": jnp.array([[1.0, 0.0], [0.0, 0.1]])}
      >>> second_order_prune(loss_fn, params, examples, 0.5).params["kernel"].round(2)
      Array([[2.],
             [0.]], dtype=float32)
    """
    projector = second_order(
        sparsity,
        loss_fn,
        examples,
        scope=scope,
        where=where,
        block_size=block_size,
        damping=damping,
        recomputations=recomputations,
        examples_per_gradient=examples_per_gradient,
        micro_batch=micro_batch,
        masks=masks,
        constants=constants,
        has_aux=has_aux,
    )
    return compress(params, projector)


class _Finite(NamedTuple):
    """Where statistics are finite.

    Attributes:
      before: bool, shape (leaves,): the weights that are pruned.
      gradients: bool, shape (gradients, leaves).
      after: bool, shape (leaves,): the weights that are left.
    """

    before: jax.Array
    gradients: jax.Array
    after: jax.Array


def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def _nan_unless(
    finite: _Finite, projection: Projection, places: tuple[int, ...]
) -> Projection:
    """What a traced call gives in place of an error."""
    leaves = jax.tree.leaves(projection.params)
    structure: Any = jax.tree.structure(projection.params)
    is_finite = jnp.stack([part.all() for part in finite]).all()
    for i in places:
        leaves[i] = jnp.where(is_finite, leaves[i], jnp.nan)
    return Projection(structure.unflatten(leaves), projection.masks)


def _check_finite(
    finite: _Finite, paths: list[str], examples_per_gradient: int
) -> None:
    for path, is_finite in zip(paths, finite.before, strict=True):
        if not is_finite:
            raise ValueError(f"params[{path!r}] must be finite, but are not all")
    bad = np.argwhere(~np.asarray(finite.gradients))
    if bad.size:
        number, leaf = bad[0]
        first = number * examples_per_gradient
        last = first + examples_per_gradient - 1
        examples = f"examples {first} to {last}" if last > first else f"example {first}"
        raise ValueError(
            f"loss_fn must have finite gradients, whose squares over damping can be "
            f"summed, but that of {examples} with respect to params[{paths[leaf]!r}] "
            f"is not finite or too large"
        )
    for path, is_finite in zip(paths, finite.after, strict=True):
        if not is_finite:
            raise ValueError(
                f"damping must be larger: the weights left in params[{path!r}] would "
                f"move beyond what their dtype holds"
            )


def _ranks(saliencies: jax.Array, kept: jax.Array) -> jax.Array:
    """In the shape of the leaf; above 0 for what is kept so far, even if it is zero."""
    ranks = fisher.from_blocks(saliencies, kept)
    return jnp.where(kept, jnp.maximum(ranks, jnp.finfo(ranks.dtype).tiny), 0)


def _schedule(sparsity: Number, steps: int) -> Iterator[Number]:
    """Sparsities up to the last: the kept share falls by the same factor each time."""
    for step in range(1, steps):
        yield 1 - (1 - sparsity) ** (step / steps)
    yield sparsity


def _scalar(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """The loss, refused where it is none."""
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")

    @functools.wraps(loss_fn)
    def checked(params: Params, **arguments: Any) -> Any:
        result = loss_fn(params, **arguments)
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"loss_fn must give a scalar and auxiliary data with has_aux=True, got "
                f"{_described(result)}"
            )
        loss = result[0] if has_aux else result
        if isinstance(loss, tuple) or jnp.shape(loss):
            raise TypeError(
                f"loss_fn must give a scalar (or, with has_aux=True, a scalar and "
                f"auxiliary data), got {_described(loss)}"
            )
        return result

    return checked


def _described(result: Any) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {len(result)}"
    return f"shape {jnp.shape(result)}"


def _already_pruned(params: Params, masks: Params | None) -> Projection:
    if masks is None:
        return Projection(
            params, jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
        )
    check_structure("masks", masks, params)
    for (path, mask), leaf in zip(
        jax.tree.leaves_with_path(masks), jax.tree.leaves(params), strict=True
    ):
        if (jnp.shape(mask), jnp.result_type(mask)) != (jnp.shape(leaf), jnp.bool_):
            raise ValueError(
                f"masks[{leaf_path(path)!r}] must be bool, of the shape of its "
                f"parameter {jnp.shape(leaf)}, got {jnp.result_type(mask).name}, "
                f"{jnp.shape(mask)}"
            )
    return Projection(apply_masks(masks, params), masks)


def _check_names(examples: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
    for name, value in (("examples", examples), ("constants", constants)):
        if not isinstance(value, Mapping):
            raise TypeError(
                f"{name} must map names of arguments of loss_fn to arrays, got "
                f"{type(value).__name__}"
            )
    if both := sorted(examples.keys() & constants.keys()):
        raise ValueError(f"examples and constants must not both hold {both}")


def _count_examples(examples: Mapping[str, Any]) -> int:
    sizes = {}
    for path, leaf in jax.tree.leaves_with_path(dict(examples)):
        if jnp.ndim(leaf) < 1:
            raise ValueError(
                f"examples[{leaf_path(path)!r}] must have the examples along axis 0, "
                f"got a scalar; pass what is the same for all in constants"
            )
        sizes[leaf_path(path)] = jnp.shape(leaf)[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"examples must all be of one number, got {sizes}")
    size = max(sizes.values(), default=0)
    if size == 0:
        raise ValueError(f"examples must hold at least one example, got {sizes}")
    return size


def _check_damping(damping: float) -> None:
    if isinstance(damping, bool) or not isinstance(damping, float | int | np.number):
        raise TypeError(f"damping must be a number above 0, got {damping!r}")
    if not 0 < damping < np.inf:
        raise ValueError(f"damping must be finite and above 0, got {damping!r}")
