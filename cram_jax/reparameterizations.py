"""Parameters as functions of other parameters, inside the loss.

Plain differentiable functions: besides the model's parameters they take a flat
dictionary, from the path of a leaf to an array, which trains along with them.
Differentiate ``loss_fn(function(params, scores), batch)``, and call the function once
more after training: its result is the compressed model.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.axes import AxesLike
from cram_jax.keys import as_key
from cram_jax.leaves import Where, prunable
from cram_jax.paths import named_leaves
from cram_jax.projector import Params, Projector, check_projector, widened
from cram_jax.selection import keep_largest
from cram_jax.sparsity import kept_count
from cram_jax.validation import check_choice, holds

Scores: TypeAlias = Mapping[str, jax.Array]
"""From the path of a leaf to an array; leaves without an entry stay unchanged."""

# The ends of the stretched interval and the temperature of the hard concrete.
LOW, HIGH, TEMPERATURE = -0.1, 1.1, 2 / 3


def scores_like(
    params: Params,
    value: float,
    *,
    each: str = "weight",
    where: Where | None = None,
    axes: AxesLike | None = None,
) -> dict[str, jax.Array]:
    """Constant arrays for the prunable leaves: initial scores, gates, thresholds.

    Args:
      params: the parameters.
      value: of every entry.
      each: whether there is an entry for each "weight" or for each "leaf".
      where: which leaves, see `prunable`.
      axes: what is known of the axes, see `axes_of`.

    Returns:
      A dictionary from path to array, of the leaf's dtype.

    Raises:
      ValueError: ``each`` is unknown; or see `prunable`.

    Example:
      >>> params = {"dense": {"bias": jnp.ones(2), "kernel": jnp.ones((1, 2))}}
      >>> scores_like(params, 0.0)
      {'dense/kernel': Array([[0., 0.]], dtype=float32)}
      >>> scores_like(params, -3.0, each="leaf")
      {'dense/kernel': Array(-3., dtype=float32)}
    """
    check_choice("each", each, ("weight", "leaf"))
    return {
        path: jnp.full_like(leaf, value, shape=() if each == "leaf" else None)
        for (path, leaf), is_chosen in zip(
            named_leaves(params), prunable(params, where, axes), strict=True
        )
        if is_chosen
    }


def straight_through(projector: Projector) -> Callable[[Params], Params]:
    r"""Compresses in the forward pass, and is the identity in the backward pass.

    The gradient of :math:`L(C(\theta))` is taken to be that at :math:`C(\theta)`. Only
    for projectors without state that do not draw. It costs one evaluation of the
    gradient, and the loss's auxiliary data, such as batch statistics, are the
    compressed model's. (``loss_fn(compress(params, projector).params)`` only has
    gradients for kept weights.)

    Args:
      projector: the compression :math:`C`.

    Returns:
      A function of parameters.

    Raises:
      TypeError: the projector is not one.
      ValueError: at use, the projector keeps a state.

    Example:
      >>> loss_fn = lambda params: jnp.sum(params**2)
      >>> ste = straight_through(top_k(0.5))
      >>> jax.grad(lambda params: loss_fn(ste(params)))(jnp.array([[3.0, 1.0]]))
      Array([[6., 0.]], dtype=float32)

    Reference: Bengio et al., Estimating or propagating gradients, 2013, arXiv
      1308.3432.
    """
    check_projector("projector", projector)

    def apply(params: Params) -> Params:
        state = projector.init(params)
        if jax.tree.leaves(state):
            raise ValueError(
                f"straight_through needs a projector without state, got {projector!r}; "
                f"use cram(loss_fn, projector, rho=0, sparse_gradients=False)"
            )
        fixed = jax.lax.stop_gradient(params)
        (compressed, _), _ = projector.project(fixed, state, None)
        # Not params + (compressed - fixed), which is not exactly compressed.
        return jax.tree.map(lambda c, p, f: c + (p - f), compressed, params, fixed)

    return apply


def soft_threshold(params: Params, thresholds: Scores) -> Params:
    r"""Shrinks weights towards zero by a learned threshold.

    .. math:: S(w, s) = \mathrm{sign}(w) \max(|w| - \sigma(s), 0)

    Weight decay of :math:`s` makes the threshold grow, so the sparsity cannot be set:
    it follows from the initial :math:`s` and the decay.

    Args:
      params: the parameters.
      thresholds: :math:`s`, see `scores_like`, one for each leaf or each weight; or
        arrays that broadcast to the leaves.

    Returns:
      The parameters with weights below the threshold at zero.

    Raises:
      ValueError: a path is not that of a parameter, or an array does not broadcast to
        its leaf.

    Example:
      >>> params = {"kernel": jnp.array([[2.0, -0.75, 0.25]])}
      >>> soft_threshold(params, {"kernel": jnp.array(0.0)})  # sigmoid(0) = 0.5
      {'kernel': Array([[ 1.5 , -0.25,  0.  ]], dtype=float32)}

    Reference: Kusupati et al., Soft threshold weight reparameterization, ICML 2020,
      equation 6, arXiv 2002.03231.
    """

    def shrink(weights: jax.Array, threshold: jax.Array, _: int) -> jax.Array:
        size = jnp.abs(weights) - jax.nn.sigmoid(threshold)
        return (jnp.sign(weights) * jax.nn.relu(size)).astype(weights.dtype)

    return _map_scored(shrink, params, thresholds)


def scored(params: Params, scores: Scores, share: float | jax.Array) -> Params:
    r"""Keeps the weights with the highest scores, a share of each leaf.

    .. math::
        W' = M \odot W, \qquad
        \frac{\partial L}{\partial W} = \frac{\partial L}{\partial W'} \odot M, \qquad
        \frac{\partial L}{\partial S} = \frac{\partial L}{\partial W'} \odot W

    :math:`M` marks the :math:`\lfloor v n \rfloor` largest scores of the n of a leaf,
    and its gradient goes straight through. Among equal scores the first are kept.

    Args:
      params: the parameters.
      scores: :math:`S`, one for each weight, see `scores_like`; they usually start at
        zero.
      share: :math:`v`, the share that is kept, from 0 to 1; it may be traced.

    Returns:
      The parameters with the other weights at zero.

    Raises:
      ValueError: a path is not that of a parameter, scores are not of the shape of
        their leaf, or the share is out of range.

    Example:
      >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
      >>> scores = {"kernel": jnp.array([[0.5, -9.0]])}
      >>> scored(params, scores, 0.5)
      {'kernel': Array([[1., 0.]], dtype=float32)}
      >>> jax.grad(lambda s: scored(params, s, 0.5)["kernel"].sum())(scores)
      {'kernel': Array([[1., 2.]], dtype=float32)}

    Reference: Sanh et al., Movement pruning, NeurIPS 2020, section 4, arXiv 2005.07683.
    """
    _check_one_for_each_weight(params, scores)
    _check_share("share", share)

    def keep(weights: jax.Array, scores: jax.Array, _: int) -> jax.Array:
        count = scores.size - kept_count(scores.size, share)
        return _masked(weights, scores, _highest(scores, count))

    return _map_scored(keep, params, scores)


def thresholded(params: Params, scores: Scores, threshold: float | jax.Array) -> Params:
    r"""Keeps the weights whose scores are above a threshold, over all leaves alike.

    Like `scored` with :math:`M = 1\{\sigma(S) > \tau\}`, so that training decides how
    the leaves share the sparsity. A penalty on :math:`\sigma(S)`, such as
    ``sum(sigmoid(s).mean() ...)``, pushes scores down. Whatever the threshold, half a
    percent of each leaf stays.

    Args:
      params: the parameters.
      scores: :math:`S`, one for each weight, see `scores_like`.
      threshold: :math:`\tau`, from 0 to 1; it may be traced.

    Returns:
      The parameters with the other weights at zero.

    Raises:
      ValueError: a path is not that of a parameter, scores are not of the shape of
        their leaf, or the threshold is out of range.

    Example:
      >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
      >>> thresholded(params, {"kernel": jnp.array([[0.5, -9.0]])}, 0.1)
      {'kernel': Array([[1., 0.]], dtype=float32)}

    Reference: Sanh et al., Movement pruning, NeurIPS 2020, section 4.2, arXiv
      2005.07683.
    """
    _check_one_for_each_weight(params, scores)
    _check_share("threshold", threshold)

    def keep(weights: jax.Array, scores: jax.Array, _: int) -> jax.Array:
        least = _highest(scores, scores.size // 200 + 1)
        return _masked(weights, scores, (jax.nn.sigmoid(scores) > threshold) | least)

    return _map_scored(keep, params, scores)


def gated(
    params: Params, log_alpha: Scores, key: int | jax.Array | None = None
) -> Params:
    r"""Multiplies weights by random gates that are often exactly zero or one.

    With uniform :math:`u` and :math:`\gamma, \zeta, \beta = -0.1, 1.1, 2/3`:

    .. math::
        s = \sigma((\log u - \log(1 - u) + a) / \beta), \qquad
        z = \min(1, \max(0, s (\zeta - \gamma) + \gamma)), \qquad
        W' = z \odot W

    Without a key, it is the deterministic gate of evaluation, :math:`s = \sigma(a)`.
    Gates scale the weights that stay, so the compressed model is this product, not a
    mask.

    Args:
      params: the parameters.
      log_alpha: :math:`a`, see `scores_like`; or arrays that broadcast to the leaves,
        such as (1, outputs) for one gate per output.
      key: PRNG key or seed of the step; None after training.

    Returns:
      The parameters times their gates.

    Raises:
      TypeError: ``key`` is neither a PRNG key nor a seed.
      ValueError: a path is not that of a parameter, or an array does not broadcast to
        its leaf.

    Example:
      >>> params = {"kernel": jnp.array([[1.0, 2.0, 3.0]])}
      >>> gated(params, {"kernel": jnp.array([[9.0, -9.0, 0.0]])})
      {'kernel': Array([[1. , 0. , 1.5]], dtype=float32)}

    Reference: Louizos et al., Learning sparse networks through L0 regularization, ICLR
      2018, equations 10 to 13, arXiv 1712.01312.
    """
    draw = None if key is None else as_key(key)

    def gate(weights: jax.Array, log_alpha: jax.Array, index: int) -> jax.Array:
        open_ = log_alpha
        if draw is not None:
            # A narrow dtype has too few numbers near 0 and 1 for the tails.
            wide = widened(log_alpha)
            uniform = jax.random.uniform(
                jax.random.fold_in(draw, index), wide.shape, wide.dtype, 1e-6, 1 - 1e-6
            )
            logit = jnp.log(uniform) - jnp.log1p(-uniform)
            open_ = (logit + wide) / TEMPERATURE
        stretched = jax.nn.sigmoid(open_) * (HIGH - LOW) + LOW
        return weights * jnp.clip(stretched, 0, 1).astype(weights.dtype)

    return _map_scored(gate, params, log_alpha)


def open_share(log_alpha: Scores) -> jax.Array:
    r"""The expected share of gates that are not zero: the penalty of `gated`.

    .. math:: \sigma(a - \beta \log(-\gamma / \zeta))

    Args:
      log_alpha: :math:`a`, as in `gated`.

    Returns:
      The mean over leaves of the mean over their gates.

    Example:
      >>> open_share({"kernel": jnp.array([[99.0, -99.0]])})
      Array(0.5, dtype=float32)
    """
    shift = TEMPERATURE * jnp.log(-LOW / HIGH)
    gates = [a for a in log_alpha.values() if jnp.size(a)]
    shares = [jax.nn.sigmoid(a - shift).mean() for a in gates]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.stack(shares).mean()


@jax.custom_vjp
def _masked(weights: jax.Array, scores: jax.Array, mask: jax.Array) -> jax.Array:
    del scores
    return jnp.where(mask, weights, jnp.zeros_like(weights))


def _masked_forward(weights: jax.Array, scores: jax.Array, mask: jax.Array) -> Any:
    return _masked(weights, scores, mask), (weights, scores[..., :0], mask)


def _masked_backward(saved: Any, gradient: jax.Array) -> Any:
    weights, like_scores, mask = saved
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(gradient.dtype, like_scores.dtype)
    of_scores = gradient.astype(wide) * weights.astype(wide)
    return (
        jnp.where(mask, gradient, jnp.zeros_like(gradient)),
        of_scores.astype(like_scores.dtype),
        None,
    )


_masked.defvjp(_masked_forward, _masked_backward)


def _highest(scores: jax.Array, count: int | jax.Array) -> jax.Array:
    """Which scores are the highest; a constant in differentiation."""
    return keep_largest([jax.lax.stop_gradient(scores)], count, signed=True)[0]


def _check_one_for_each_weight(params: Params, scores: Scores) -> None:
    for path, leaf in named_leaves(params):
        if path in scores and jnp.shape(scores[path]) != jnp.shape(leaf):
            raise ValueError(
                f"scores[{path!r}] must be one for each weight, of the shape "
                f"{jnp.shape(leaf)}, got the shape {jnp.shape(scores[path])}; see "
                f"scores_like"
            )


def _check_share(name: str, value: float | jax.Array) -> None:
    """Raises unless it is from 0 to 1; a traced one is trusted."""
    is_traced = isinstance(value, jax.core.Tracer)
    # That of a schedule may be off by a rounding error.
    if not is_traced and not holds(lambda: -1e-6 <= value <= 1 + 1e-6):
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")


def _broadcasts(array: jax.Array, leaf: jax.Array) -> bool:
    """Whether an array broadcasts to the shape of a leaf."""
    try:
        return np.broadcast_shapes(jnp.shape(array), jnp.shape(leaf)) == jnp.shape(leaf)
    except ValueError:
        return False


def _map_scored(
    function: Callable[[jax.Array, jax.Array, int], jax.Array],
    params: Params,
    scores: Scores,
) -> Params:
    """Applies the function to leaves that have scores; it gets the leaf's number."""
    named = named_leaves(params)
    unknown = set(scores) - {path for path, _ in named}
    if unknown:
        raise ValueError(
            f"scores must be of parameters, got {sorted(unknown)}; the parameters are "
            f"{[path for path, _ in named]}"
        )
    for path, leaf in named:
        if path in scores and not _broadcasts(scores[path], leaf):
            raise ValueError(
                f"scores[{path!r}] must broadcast to its leaf of shape "
                f"{jnp.shape(leaf)}, got the shape {jnp.shape(scores[path])}"
            )
    structure: Any = jax.tree.structure(params)
    # Scores may be wider than their leaf. NumPy's float64 may not be a dtype that jax
    # has enabled.
    with jax.numpy_dtype_promotion("standard"):
        return structure.unflatten(
            function(jnp.asarray(leaf), jnp.asarray(scores[path]), index)
            if path in scores
            else leaf
            for index, (path, leaf) in enumerate(named)
        )
