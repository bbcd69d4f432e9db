"""Training under masks that a rule updates."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cram_jax.compress import held
from cram_jax.keys import check_key, key_data, split_key_data
from cram_jax.paths import check_masks
from cram_jax.projector import (
    Params,
    Projector,
    apply_masks,
    check_only_masks,
    check_projector,
    check_structure,
)
from cram_jax.validation import (
    check_choice,
    check_flag,
    check_function,
    check_integer,
    check_state,
)


class Step(NamedTuple):
    """What a `MaskRule` sees when an update ends.

    Attributes:
      count: int32 scalar, the number of updates, this one included.
      params: the parameters after the update.
      gradients: what the caller passed to the update, at the parameters before it.
      key: a PRNG key of this step.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, over tuple.count
    params: Params
    gradients: Params
    key: jax.Array


def _unchanged(state: Any, step: Step) -> Any:
    del step
    return state


class MaskRule(NamedTuple):
    """How masks start and change: `pruned` takes one, as `cram` takes a projector.

    All functions are pure and jittable; masks are bool trees like the parameters, True
    where a weight is kept.

    Attributes:
      init: ``(params, key) -> (masks, state)``.
      renew: ``(masks, state, step) -> (masks, state)``, with a `Step`; at every
        ``every``-th update.
      watch: ``(state, step) -> state``, at every update and before ``renew``; by
        default nothing is watched.

    Example:
      Prunes weights below a threshold, for good:

      >>> def init(params, key):
      ...     return jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), params), ()
      >>> def renew(masks, state, step):
      ...     return jax.tree.map(lambda leaf: jnp.abs(leaf) > 0.1, step.params), state
      >>> optimizer = pruned(optax.sgd(1.0), MaskRule(init, renew))
      >>> optimizer.init([jnp.zeros(2)]).masks
      [Array([ True,  True], dtype=bool)]
    """

    init: Callable[[Params, jax.Array], tuple[Params, Any]]
    renew: Callable[[Params, Any, Step], tuple[Params, Any]]
    watch: Callable[[Any, Step], Any] = _unchanged


class PrunedState(NamedTuple):
    """State of `pruned`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      key: uint32 array, the data of the PRNG key for the rule's draws.
      masks: bool, like the parameters; True where a weight is kept.
      rule_state: state of the rule.
      inner_state: state of the optimiser.
    """

    count: jax.Array  # type: ignore[assignment]  # optax's name, over tuple.count
    key: jax.Array
    masks: Params
    rule_state: Any
    inner_state: Any


def pruned(
    inner: optax.GradientTransformation,
    rule: MaskRule,
    *,
    every: int = 1,
    restart: Literal["new", "all"] | None = "new",
    hold: bool = True,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets an optimiser train under masks that a rule renews.

    With masks :math:`M`, gradient :math:`g` and optimiser :math:`\mathrm{opt}`:

    .. math::
        \theta' = M \odot (\theta + \mathrm{opt}(M \odot g)), \qquad
        M' = \mathrm{rule}(\theta', g), \qquad
        \theta \leftarrow M' \odot \theta'

    Masks are renewed at the end of an update, from the new parameters, so the caller's
    next gradient belongs to the weights that the new masks keep. (Renewed at the start,
    a rule would see a gradient of weights that it then prunes: a different algorithm.)
    Weights that come back start at zero.

    It wraps the whole optimiser, because it needs its state: rules such as `cram_plus`
    go inside, ``pruned(chain(cram_plus(...), sgd(...)), ...)``, and get the masked
    gradient. For masks that never change use `keep_pruned` at the end of a chain. The
    parameters that optimisers such as `optax.contrib.schedule_free` evaluate instead
    are dense: apply ``state.masks`` to them.

    Masks of ``rule.init`` that are not all True take effect with the first update, or
    without ``hold`` with the first that renews them; apply ``state.masks`` to the
    parameters first, or the first gradient is that of the dense model.

    Args:
      inner: the optimiser. Around it `optax.inject_hyperparams` works as always; around
        this, ``inner``, ``rule`` and ``every`` are static arguments.
      rule: how masks start and change, such as `renew_by`.
      every: updates between renewals.
      restart: which optimiser state, such as momentum, is zeroed when weights come
        back: only theirs ("new"), that of all parameters ("all"), or none (None).
        Counts and schedules continue.
      hold: whether pruned weights stay at zero until they come back. If False, masks
        set weights to zero when they are renewed, and until the next time all weights
        train; no weight has to come back, and nothing restarts.
      key: seed or PRNG key, for rules that draw.

    Returns:
      A gradient transformation with the state `PrunedState`. ``update`` needs
      ``params``, and passes further arguments to ``inner``. The updates have the wider
      of the dtypes of ``inner``'s updates and the parameters, because only that reaches
      exactly zero.

    Raises:
      TypeError: ``rule`` is not a `MaskRule`, or an argument is of a wrong type.
      ValueError: ``every`` is below 1 or ``restart`` is unknown; at ``init``, the masks
        are not like the parameters, or ``inner`` keeps a state for each parameter that
        is not shaped like it, as Adafactor does, so that single entries of it cannot
        restart; at ``update``, ``params`` is None.

    Example:
      Gradual magnitude pruning to 50 % in two renewals:

      >>> rule = renew_by(top_k, optax.linear_schedule(0.0, 0.5, 2))
      >>> optimizer = pruned(optax.sgd(1.0), rule)
      >>> params = [jnp.array([[1.0, 2.0, 3.0, 4.0]])]
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update([jnp.ones((1, 4))], state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params[0])
      [[0. 1. 2. 3.]]
      [[0. 0. 1. 2.]]
    """
    if not isinstance(rule, MaskRule):
        raise TypeError(f"rule must be a MaskRule, got {rule!r}")
    check_integer("every", every, 1)
    if restart is not None:
        check_choice("restart", restart, ("new", "all"))
    check_flag("hold", hold)
    check_key(key)
    inner = optax.with_extra_args_support(inner)
    restarts = restart if hold else None

    def init(params: Params) -> PrunedState:
        state, draw = split_key_data(key_data(key), key)
        masks, rule_state = rule.init(params, draw)
        check_structure("masks of rule.init", masks, params)
        check_masks("masks of rule.init", masks, params)
        inner_state = inner.init(params)
        # Raises now if the state cannot restart.
        jax.eval_shape(lambda s, m: _restart(inner, restarts, s, m), inner_state, masks)
        return PrunedState(
            jnp.zeros([], jnp.int32), state, masks, rule_state, inner_state
        )

    def update(
        updates: Params,
        state: PrunedState,
        /,
        params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, PrunedState]:
        if params is None:
            raise ValueError("pruned needs params in update(...), got None")
        check_state(state, PrunedState)
        key_after, draw = split_key_data(state.key, key)
        count = optax.safe_increment(state.count)
        seen = apply_masks(state.masks, updates) if hold else updates
        moves, inner_state = inner.update(seen, state.inner_state, params, **extra_args)
        moved = optax.apply_updates(params, moves)
        if hold:
            moved = apply_masks(state.masks, moved)

        step = Step(count, moved, updates, draw)
        is_due = count % every == 0
        # Passed in rather than captured, because captured arrays lose their sharding.
        masks, rule_state = jax.lax.cond(
            is_due,
            rule.renew,
            lambda masks, rule_state, step: (masks, rule_state),
            state.masks,
            rule.watch(state.rule_state, step),
            step,
        )
        if hold:
            kept = jax.tree.map(jnp.logical_and, masks, state.masks)
            revived = jax.tree.map(lambda new, old: new & ~old, masks, state.masks)
            inner_state = _restart(inner, restarts, inner_state, revived)
        else:
            kept = jax.tree.map(lambda mask: mask | ~is_due, masks)
        return (
            jax.tree.map(held, kept, moves, params),
            PrunedState(count, key_after, masks, rule_state, inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def renew_by(make: Callable[[Any], Projector], schedule: optax.Schedule) -> MaskRule:
    """Masks from a projector whose number follows a schedule, as in magnitude pruning.

    All weights are kept while the schedule is 0. The schedule gets the number of
    updates, so it does not depend on how often masks are renewed. Sparsities are below
    1, see `scheduled`.

    - Gradual pruning: a cubic, ``renew_by(top_k, optax.polynomial_schedule(...))``.
    - AC/DC: a square wave of a sparsity and 0.
    - Iterative hard thresholding: a constant.

    Args:
      make: from a number, which may be traced, to a projector, such as `top_k`, or
        ``lambda share: n_m(2, 4)``.
      schedule: from the number of updates to the number.

    Returns:
      A rule for `pruned`.

    Raises:
      TypeError: ``make`` or ``schedule`` is not a function; at ``init``, ``make`` does
        not return a projector.
      ValueError: at ``init``, its projector also changes what it keeps, as `fake_quant`
        does.

    Example:
      >>> wave = lambda count: jnp.where(count // 5 % 2, 0.9, 0.0)
      >>> ac_dc = pruned(optax.sgd(0.1), renew_by(top_k, wave), every=5, restart="all")
    """
    check_function("make", make)
    check_function("schedule", schedule)

    def masks_at(
        count: Any, params: Params, state: Any, key: jax.Array
    ) -> tuple[Params, Any]:
        number = schedule(count)
        projector = make(number)
        check_projector("make(...)", projector)
        check_only_masks(
            "make(...)", projector, "round at the end, with compress(params, ...)"
        )
        if state is None:
            state = projector.init(params)
        (_, masks), state = projector.project(params, state, key)
        return jax.tree.map(lambda mask: mask | (number == 0), masks), state

    def init(params: Params, key: jax.Array) -> tuple[Params, Any]:
        if not jax.tree.leaves(params):
            # The placeholder of optax.tree.map_params, which stands for the masks.
            return params, make(schedule(0)).init(params)
        return masks_at(0, params, None, key)

    def renew(masks: Params, state: Any, step: Step) -> tuple[Params, Any]:
        del masks
        return masks_at(step.count, step.params, state, step.key)

    return MaskRule(init, renew)


def _restart(
    inner: optax.GradientTransformationExtraArgs,
    restart: str | None,
    state: Any,
    revived: Params,
) -> Any:
    """The optimiser's state, zeroed for weights that came back."""
    if restart is None or not jax.tree.leaves(revived):
        return state
    if restart == "all":
        is_any = jnp.any(jnp.stack([leaf.any() for leaf in jax.tree.leaves(revived)]))
        revived = jax.tree.map(lambda leaf: is_any, revived)

    def is_hidden(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def zero(leaf: Any, where: jax.Array) -> Any:
        if is_hidden(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if restart == "new" and leaf.shape != where.shape:
            raise ValueError(
                f'restart="new" needs an optimiser whose state for a parameter is '
                f"shaped like it, got {leaf.shape} for a parameter of {where.shape}; "
                f'use restart="all" or None'
            )
        return jnp.where(where, jnp.zeros_like(leaf), leaf)

    return optax.tree.map_params(inner, zero, state, revived, is_leaf=is_hidden)
