"""A projector that removes whole channels, heads and units."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cram_jax.projector import Projection, Projector, apply_masks
from cram_jax.sparsity import (
    Drawn,
    Number,
    Traced,
    check_sparsity,
    kept_count,
    sparsity_now,
    sparsity_value,
)
from cram_jax.structure.choosing import WhereFamily, choose
from cram_jax.structure.costs import share, total
from cram_jax.structure.groups import group_masks, has_groups, leaves_like
from cram_jax.structure.ranking import Rank, producer_norm
from cram_jax.structure.stacks import one_layer, stacked_leaves
from cram_jax.structure.structure import Structure
from cram_jax.validation import check_choice, check_flag, check_function, check_integer


def channels(
    sparsity: Number,
    structure: Structure,
    *,
    scope: Literal["global", "family"] = "global",
    of: Literal["groups", "parameters", "multiply_adds"] = "groups",
    rank: Rank | None = None,
    where: WhereFamily | None = None,
    multiple_of: int = 1,
    at_least: int = 1,
    by_layer: bool = False,
) -> "Channels":
    """Keeps the channels that matter most, and sets everything of the others to 0.

    Of ``size`` groups ``size - floor(sparsity * size)`` stay, counted over all families
    together or in each. A group is removed as a whole: the weights that compute the
    channel, its bias, the scale, shift and statistics of its normalisation, and the
    weights that read it. `shrink` then makes the network smaller.

    With ``multiple_of=8`` families keep 8, 16, 24 ... groups, or all of them, for
    hardware that computes in vectors. As many groups then stay as fit into the number
    above. A family that is no larger than the multiple stays whole and is not counted.

    With ``of="parameters"`` or ``"multiply_adds"`` the sparsity is the share of the
    traced model's parameters, or of the multiplications of one call, that is removed:
    as many groups stay as fit, in the order of their rank, to the precision of float32.

    Args:
      sparsity: 0 <= sparsity < 1; a number or a scalar array, which may be traced.
      structure: of the parameters that are projected: see `trace_structure` and, if
        that also saw batch statistics, `Structure.part`.
      scope: "global" or "family".
      of: what the sparsity is a share of; "groups" if the scope is "family".
      rank: ``(structure, params) -> scores``, one for each group; by default
        `producer_norm`.
      where: which families: names of axes as the structure prints them, such as
        ``["mlp/up/kernel[1]"]``; a regular expression to search for in these names; or
        ``family -> bool``. By default all.
      multiple_of: see above.
      at_least: groups that stay in every family.
      by_layer: whether layers that are stacked for a scan each keep their own best
        channels, the same number in all; by default all keep the same ones. See
        `Family.layers`.

    Returns:
      A projector without randomness.

    Raises:
      ValueError: a number is out of range; ``where`` names a frozen axis, with the
        reason, or chooses no family; more has to stay than the sparsity leaves; or with
        ``by_layer``, the chosen families differ in their number of layers.
      TypeError: ``sparsity`` is not a number, or ``structure`` not a `Structure`.

    Example:
      >>> from cram_jax import compress
      >>> from cram_jax.structure import channels, trace_structure
      >>> def apply(params, x):
      ...     return jax.nn.relu(x @ params["a"] + params["b"]) @ params["c"]
      >>> params = {
      ...     "a": jnp.array([[1.0, 3.0, 2.0]]), "b": jnp.ones(3), "c": jnp.ones((3, 1))
      ... }
      >>> structure = trace_structure(apply, params, jnp.ones((1, 1)))
      >>> compress(params, channels(1 / 3, structure)).params["b"]
      Array([0., 1., 1.], dtype=float32)
    """
    check_sparsity(sparsity)
    if not isinstance(structure, Structure):
        raise TypeError(f"structure must be a Structure, got {structure!r}")
    check_choice("scope", scope, ("global", "family"))
    check_choice("of", of, ("groups", "parameters", "multiply_adds"))
    if scope == "family" and of != "groups":
        raise ValueError(f"of must be 'groups' if the scope is 'family', got {of!r}")
    check_integer("multiple_of", multiple_of, minimum=1)
    check_integer("at_least", at_least, minimum=1)
    if where is not None and not callable(where) and not isinstance(where, str):
        where = tuple(where)
    check_flag("by_layer", by_layer)
    if rank is not None:
        check_function("rank", rank)
    projector = Channels(
        sparsity_value(sparsity),
        structure,
        scope=scope,
        of=of,
        rank=rank,
        where=where,
        multiple_of=int(multiple_of),
        at_least=int(at_least),
        by_layer=by_layer,
    )
    projector.check()
    return projector


class Block(NamedTuple):
    """Groups of one family that stay or go together.

    Attributes:
      family: its number.
      first: place of the first of them when the family is sorted by rank.
      size: how many they are.
      stays: whether they must stay.
    """

    family: int
    first: int
    size: int
    stays: bool


@dataclass(frozen=True, repr=False)
class Channels(Projector):
    """See `channels`."""

    sparsity: Any
    structure: Structure
    _: KW_ONLY
    scope: Literal["global", "family"] = "global"
    of: Literal["groups", "parameters", "multiply_adds"] = "groups"
    rank: Rank | None = None
    where: Any = None
    multiple_of: int = 1
    at_least: int = 1
    by_layer: bool = False

    def __repr__(self) -> str:
        options = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.kw_only and getattr(self, field.name) != field.default
        ]
        return f"channels({', '.join([repr(self.sparsity), 'structure', *options])})"

    @property
    def shared(self) -> Hashable:
        """Itself with another sparsity."""
        return None if isinstance(self.sparsity, Traced) else replace(self, sparsity=0)

    def drawn(self, members: Sequence["Channels"], index: jax.Array) -> "Channels":
        """Itself with the sparsity of ``members[index]``."""
        return replace(self, sparsity=Drawn(tuple(m.sparsity for m in members), index))

    def changes(self, params: Any) -> list[bool]:
        """The leaves that channels can be removed from."""
        del params
        return [
            any(has_groups(leaf, axis) for axis in range(len(leaf.shape)))
            for leaf in self.structure.leaves
        ]

    def project(
        self, params: Any, state: Any, key: jax.Array | None
    ) -> tuple[Projection, Any]:
        """Masks everything that belongs to the groups of lowest rank."""
        del key
        leaves_like(self.structure, "params", params)
        masks = self._masks(self.keep(params), params)
        return Projection(apply_masks(masks, params), masks), state

    def keep(self, params: Any) -> jax.Array:
        """The groups that stay: one bool for each, or a row of them for each layer.

        Args:
          params: a tree like those that were traced.
        """
        scores = self._scores(self.structure, params)
        if not self.by_layer:
            return self._keep_best(scores)
        layers = self._layers()
        of_layers = self._scores_of_layers(params, layers)
        chosen = [f for f in self.structure.families if f.layers == layers]
        for family in chosen:
            # A group's position is that of its rank, whichever group that is in each
            # layer.
            best = -jnp.sort(-of_layers[:, family.groups], axis=1)
            scores = scores.at[family.groups].set(best.mean(axis=0))
        kept = jnp.tile(self._keep_best(scores), (layers, 1))
        for family in chosen:
            order = jnp.argsort(-of_layers[:, family.groups], axis=1, stable=True)
            ranks = jnp.argsort(order, axis=1)
            count = jnp.sum(kept[0, family.groups])
            kept = kept.at[:, family.groups].set(ranks < count)
        return kept

    def _scores(self, structure: Structure, params: Any) -> jax.Array:
        scores = jnp.asarray((self.rank or producer_norm)(structure, params))
        if jnp.shape(scores) != (structure.size,):
            raise ValueError(
                f"rank must return one score for each of {structure.size} groups, got "
                f"shape {jnp.shape(scores)}"
            )
        return jnp.where(jnp.isnan(scores), -jnp.inf, scores)

    def _scores_of_layers(self, params: Any, layers: int) -> jax.Array:
        """(layers, groups): each layer ranked separately."""
        one = one_layer(self.structure, layers)
        leaves = jax.tree.leaves(params)
        treedef: Any = jax.tree.structure(params)
        axes = [0 if s else None for s in stacked_leaves(self.structure, layers)]

        def of_one(*leaves: Any) -> jax.Array:
            return self._scores(one, treedef.unflatten(leaves))

        return jax.vmap(of_one, in_axes=axes)(*leaves)

    def _layers(self) -> int:
        """The number of layers of all chosen families that are stacked."""
        families = [self.structure.families[number] for number in self._families()]
        lengths = {family.layers for family in families} - {1}
        if len(lengths) != 1:
            raise ValueError(
                f"by_layer needs families of one number of layers, stacked for a scan, "
                f"got {sorted(lengths)}; choose some with where"
            )
        return lengths.pop()

    def _keep_best(self, scores: jax.Array) -> jax.Array:
        """The groups that stay, by their scores."""
        kept = jnp.ones(self.structure.size, bool)
        families = self._families()
        scopes = [families] if self.scope == "global" else [[f] for f in families]
        for members in scopes:
            kept = self._keep_of(members, scores, kept)
        return kept

    def check(self) -> None:
        """Raises if `where` chooses nothing, or more must stay than can."""
        families = self._families()
        if self.by_layer:
            self._layers()
        if isinstance(self.sparsity, Traced):
            return
        scopes = [families] if self.scope == "global" else [[f] for f in families]
        for members in scopes:
            stays = sum(b.size for b in self._blocks(members) if b.stays)
            size = sum(self.structure.families[f].size for f in members)
            may_stay = kept_count(size, self.sparsity)
            if self.of == "groups" and stays > may_stay:
                raise ValueError(
                    f"sparsity={self.sparsity} leaves {may_stay} of {size} groups, but "
                    f"at_least={self.at_least} and multiple_of={self.multiple_of} keep "
                    f"{stays}"
                )
        if self.of != "groups" and self._fixed_share() > 1 - self.sparsity:
            raise ValueError(
                f"sparsity={self.sparsity} of {self.of} is out of reach: with as few "
                f"groups as may be {self._fixed_share():.3f} of them are left"
            )

    def _families(self) -> list[int]:
        chosen = choose(self.structure, self.where)
        # A family no larger than the multiple is one block, which always stays.
        whole = self.multiple_of if self.multiple_of > 1 else 0
        return [n for n in chosen if self.structure.families[n].size > whole]

    def _blocks(self, families: Sequence[int]) -> list[Block]:
        blocks = []
        for number in families:
            size = self.structure.families[number].size
            for first in range(0, size, self.multiple_of):
                length = min(self.multiple_of, size - first)
                blocks.append(Block(number, first, length, first < self.at_least))
        return blocks

    def _fixed_share(self) -> float:
        """The share of the cost that is left with the blocks that must stay."""
        kept = np.ones(self.structure.size, bool)
        for block in self._blocks(self._families()):
            start = self.structure.families[block.family].start + block.first
            kept[start : start + block.size] = block.stays
        terms, parts = (
            getattr(self.structure.costs, self.of),
            self.structure.costs.parts,
        )
        return total(terms, parts, kept) / total(terms, parts)

    def _keep_of(
        self, families: Sequence[int], scores: jax.Array, kept: jax.Array
    ) -> jax.Array:
        """Chooses among the groups of families that compete."""
        blocks = self._blocks(families)
        if not blocks:
            return kept
        # Not one operation for each group: BERT-base has 39,000.
        groups = self._sorted_groups(families, scores)
        sizes = np.array([block.size for block in blocks])
        block_of = np.repeat(np.arange(len(blocks)), sizes)
        means = jax.ops.segment_sum(scores[groups], block_of, len(blocks)) / sizes
        # Rounding must not lift a block of equal scores above the one before it.
        last = np.cumsum(sizes) - 1
        best, worst = (scores[groups[at]] for at in (last - sizes + 1, last))
        means = jnp.clip(means, worst, best)
        means = jnp.where(np.array([b.stays for b in blocks]), jnp.inf, means)
        order = jnp.argsort(-means, stable=True)
        position = jnp.zeros(len(blocks), int).at[order].set(jnp.arange(len(blocks)))

        def keep_first(count: jax.Array) -> jax.Array:
            return kept.at[groups].set((position < count)[block_of])

        return keep_first(self._block_count(blocks, order, keep_first))

    def _sorted_groups(self, families: Sequence[int], scores: jax.Array) -> jax.Array:
        """The groups, family by family, the best first, ties in their order."""
        chosen = [self.structure.families[number] for number in families]
        runs = [range(f.start, f.start + f.size) for f in chosen]
        groups = np.concatenate([np.array(run) for run in runs])
        place = np.repeat(np.arange(len(chosen)), [f.size for f in chosen])
        # One sort for all families: XLA takes most of a second to compile each.
        keys = (place, -scores[groups], groups)
        return jax.lax.sort(tuple(map(jnp.asarray, keys)), num_keys=2)[-1]

    def _block_count(
        self,
        blocks: Sequence[Block],
        order: jax.Array,
        keep_first: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """How many blocks stay, the best first."""
        sizes = np.array([block.size for block in blocks])
        fixed = sum(block.stays for block in blocks)
        if self.of == "groups":
            may_stay = kept_count(int(sizes.sum()), self.sparsity)
            fits = jnp.cumsum(jnp.asarray(sizes)[order]) <= may_stay
            # A traced sparsity could not be checked earlier.
            return jnp.maximum(jnp.sum(fits), fixed)
        costs = self.structure.costs
        terms, limit = getattr(costs, self.of), 1 - sparsity_now(self.sparsity)

        def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> Any:
            low, high = bounds  # low blocks fit, high ones do not
            middle = (low + high) // 2
            fits = share(terms, costs.parts, keep_first(middle)) <= limit
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

        bounds = jnp.array(fixed), jnp.array(len(blocks) + 1)
        turns = (len(blocks) + 1).bit_length()
        return jax.lax.fori_loop(0, turns, halve, bounds)[0]

    def _masks(self, kept: jax.Array, params: Any) -> Any:
        masks = jax.tree.leaves(group_masks(self.structure, kept))
        treedef: Any = jax.tree.structure(params)
        return treedef.unflatten(masks)
