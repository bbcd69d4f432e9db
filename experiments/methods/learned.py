"""Learning which weights to keep: STR, movement pruning, L0.

The extra parameters live in the optimiser's state, so that the loop's parameters are
the model's. At the last step the parameters become what the function makes of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cram_jax import gated, open_share, scored, soft_threshold, thresholded

Scores = dict[str, jax.Array]


class Learned(NamedTuple):
    """A method with extra parameters that are trained along with the model's.

    Attributes:
      apply: ``(params, scores, count, key) -> params``, inside the loss.
      finish: ``(params, scores) -> params``, after training.
      penalty: ``(scores, count) -> scalar``, added to the loss.
    """

    apply: Callable[[Any, Scores, jax.Array, jax.Array], Any]
    finish: Callable[[Any, Scores], Any]
    penalty: Callable[[Scores, jax.Array], Any] = lambda scores, count: 0.0


class LearnedState(NamedTuple):
    """State of `train_beside`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      key: uint32 array, the data of the PRNG key of the gates.
      scores: the extra parameters.
      scores_state: state of their optimiser.
      inner_state: state of the model's.
      compressed_loss: the loss of the last update, without the penalty.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, over tuple.count
    key: jax.Array
    scores: Scores
    scores_state: Any
    inner_state: Any
    compressed_loss: jax.Array


def soft_thresholds() -> Learned:
    """STR: soft thresholds, whose growth is the weight decay of the scores.

    Train the scores with the model's own optimiser. The sparsity cannot be set: it
    follows from the initial scores and the decay.

    Example:
      >>> params = {"kernel": jnp.array([[2.0, 0.25]])}
      >>> soft_thresholds().finish(params, {"kernel": jnp.array(0.0)})
      {'kernel': Array([[1.5, 0. ]], dtype=float32)}

    Reference: Kusupati et al., ICML 2020, arXiv 2002.03231.
    """
    return Learned(
        lambda params, scores, count, key: soft_threshold(params, scores),
        soft_threshold,
    )


def movement(kept: optax.Schedule) -> Learned:
    """Movement pruning: the highest scores of every leaf stay, fewer and fewer.

    Args:
      kept: the share that stays, by the step count.

    Example:
      >>> cubic = optax.polynomial_schedule(1.0, 0.1, 3, 500, 100)
      >>> method = movement(cubic)

    Reference: Sanh et al., NeurIPS 2020, arXiv 2005.07683.
    """
    last = jnp.iinfo(jnp.int32).max
    return Learned(
        lambda params, scores, count, key: scored(params, scores, kept(count)),
        lambda params, scores: scored(params, scores, kept(last)),
    )


def soft_movement(threshold: optax.Schedule, strength: float) -> Learned:
    """Soft movement pruning: scores above a rising threshold stay.

    The penalty is the mean of their sigmoid, times the strength as it rises with the
    threshold.

    Args:
      threshold: by the step count, from 0.
      strength: of the penalty, at the end.

    Example:
      >>> method = soft_movement(optax.polynomial_schedule(0.0, 0.1, 3, 500), 400.0)

    Reference: Sanh et al., NeurIPS 2020, section 4.2, arXiv 2005.07683.
    """
    last = threshold(jnp.iinfo(jnp.int32).max)

    def penalty(scores: Scores, count: jax.Array) -> jax.Array:
        means = [jax.nn.sigmoid(score).mean() for score in scores.values()]
        return strength * threshold(count) / last * jnp.stack(means).mean()

    return Learned(
        lambda params, scores, count, key: thresholded(
            params, scores, threshold(count)
        ),
        lambda params, scores: thresholded(params, scores, last),
        penalty,
    )


def l0(strength: float) -> Learned:
    """L0 regularisation with hard concrete gates, one a weight.

    Its unstructured form does worse than magnitude pruning.

    Args:
      strength: of the penalty on the expected share of open gates.

    Example:
      >>> method = l0(0.1)

    Reference: Louizos et al., ICLR 2018, arXiv 1712.01312.
    """
    return Learned(
        lambda params, scores, count, key: gated(params, scores, key),
        gated,
        lambda scores, count: strength * open_share(scores),
    )


def train_beside(
    inner: optax.GradientTransformation,
    loss_fn: Callable[..., Any],
    method: Learned,
    init_scores: Callable[[Any], Scores],
    scores_optimizer: optax.GradientTransformation,
    *,
    steps: int,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains a model and the scores of a method, with one evaluation a step.

    The incoming gradient is not read. After the last of ``steps`` steps the parameters
    are the pruned ones.

    Args:
      inner: the model's optimiser.
      loss_fn: ``(params, **arguments) -> (loss, auxiliary data)``; ``update`` takes
        the arguments by name.
      method: see `Learned`.
      init_scores: from parameters to the first scores.
      scores_optimizer: theirs.
      steps: of the whole run.
      seed: of the gates.

    Returns:
      A gradient transformation with the state `LearnedState`.
    """

    def init(params: Any) -> LearnedState:
        if not jax.tree.leaves(params):  # the placeholder of optax.tree.map_params
            scores: Any = {}
        else:
            scores = init_scores(params)
        return LearnedState(
            jnp.zeros([], jnp.int32),
            jax.random.key_data(jax.random.key(seed)),
            scores,
            scores_optimizer.init(scores),
            inner.init(params),
            jnp.zeros([], jnp.float32),
        )

    def update(
        updates: Any, state: LearnedState, params: Any = None, **arguments: Any
    ) -> tuple[Any, LearnedState]:
        del updates
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)

        def objective(params: Any, scores: Scores) -> tuple[jax.Array, jax.Array]:
            loss, _ = loss_fn(
                method.apply(params, scores, state.count, key), **arguments
            )
            return loss + method.penalty(scores, state.count), loss

        (gradient, by_scores), loss = jax.grad(objective, (0, 1), has_aux=True)(
            params, state.scores
        )
        moves, inner_state = inner.update(gradient, state.inner_state, params)
        by_scores, scores_state = scores_optimizer.update(
            by_scores, state.scores_state, state.scores
        )
        scores = optax.apply_updates(state.scores, by_scores)
        count = optax.safe_increment(state.count)
        finished = method.finish(optax.apply_updates(params, moves), scores)
        moves = jax.tree.map(
            lambda move, end, p: jnp.where(count == steps, end - p, move),
            moves,
            finished,
            params,
        )
        loss = loss.astype(state.compressed_loss.dtype)
        return moves, LearnedState(
            count, state.key, scores, scores_state, inner_state, loss
        )

    return optax.GradientTransformationExtraArgs(init, update)
