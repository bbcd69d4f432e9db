"""Pruning after training that knows the curvature of the loss: oBERT and WoodFisher."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax import fisher
from cram_jax.gradients import Caller, gradient_of
from cram_jax.leaves import Where, prunable
from cram_jax.projector import (
    Params,
    Projection,
    apply_masks,
    check_structure,
    leaf_path,
)
from cram_jax.selection import keep_largest
from cram_jax.sparsity import Number, check_sparsity, kept_count

_CALLER = Caller("examples and constants", "examples={{{!r}: ...}}")


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
      params: a pytree of floating-point arrays, trained.
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
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    for name, value in (
        ("block_size", block_size),
        ("recomputations", recomputations),
        ("examples_per_gradient", examples_per_gradient),
        ("micro_batch", micro_batch),
    ):
        _check_positive_integer(name, value)
    _check_damping(damping)
    chosen = prunable(params, where)
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
    structure: Any = jax.tree.structure(params)
    places = [place for place, is_chosen in enumerate(chosen) if is_chosen]

    @jax.jit
    def prune(
        projection: Projection, inputs: fisher.Inputs, counts: list[int | jax.Array]
    ) -> Projection:
        leaves, kept = map(jax.tree.leaves, projection)
        roots = fisher.inverse_roots(gradient, projection, places, inputs, options)
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
        for i, w, root, mask in zip(places, weights, roots, largest, strict=True):
            kept[i] = kept[i] & mask
            removed = ~fisher.to_blocks(kept[i], block_size)
            moved = fisher.from_blocks(fisher.eliminate(w, removed, root), leaves[i])
            leaves[i] = moved.astype(leaves[i].dtype)
        return Projection(structure.unflatten(leaves), structure.unflatten(kept))

    inputs = fisher.Inputs(dict(examples), dict(constants))
    options = fisher.Options(
        size // examples_per_gradient,
        examples_per_gradient,
        micro_batch,
        block_size,
        damping,
    )
    sizes = [jax.tree.leaves(params)[i].size for i in places]
    sizes = [sum(sizes)] if scope == "global" else sizes
    projection = _already_pruned(params, masks)
    for share in _schedule(sparsity, recomputations):
        counts = [kept_count(size, share) for size in sizes]
        projection = prune(projection, inputs, counts)
    return projection


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


def _check_positive_integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_damping(damping: float) -> None:
    if isinstance(damping, bool) or not isinstance(damping, float | int | np.number):
        raise TypeError(f"damping must be a number above 0, got {damping!r}")
    if not 0 < damping < np.inf:
        raise ValueError(f"damping must be finite and above 0, got {damping!r}")
