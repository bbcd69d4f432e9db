"""A projector of its own for each leaf."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax

from cram_jax.axes import Axes, AxesLike, axes_value
from cram_jax.leaves import Leaf, LeafProjector
from cram_jax.paths import ByPath, named_leaves
from cram_jax.projector import Params, Projection


def per_leaf(
    projectors: Mapping[str, LeafProjector], *, axes: AxesLike | None = None
) -> "PerLeaf":
    """Prunes each leaf with its own projector, such as to its own sparsity.

    Each sees only its leaf, so that ``top_k`` counts within it. Their own ``where`` is
    ignored.

    Args:
      projectors: by the path of a leaf; those that `cram_jax.top_k`, `cram_jax.n_m`,
        `cram_jax.fake_quant`, `wanda` or `sparse_gpt` make. Other leaves stay dense.
      axes: what is known of the axes, see `cram_jax.axes_of`; by default what the
        projector of a leaf knows.

    Returns:
      A projector.

    Raises:
      ValueError: there is none; at use, if a path is not that of a leaf.
      TypeError: one is of another kind.

    Example:
      >>> from cram_jax.layerwise import per_leaf
      >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0, 4.0]])}
      >>> compress(params, per_leaf({"a": top_k(0.5)})).params
      {'a': Array([[0., 2.]], dtype=float32), 'b': Array([[3., 4.]], dtype=float32)}
    """
    if not projectors:
        raise ValueError("projectors must name at least one leaf, got none")
    for path, projector in projectors.items():
        if not isinstance(projector, LeafProjector):
            raise TypeError(
                f"projectors[{path!r}] must be one that works leaf by leaf, such as "
                f"top_k, got {projector!r}"
            )
    own = tuple(projectors.items())
    return PerLeaf(
        own,
        where=Named(frozenset(projectors)),
        axes=OwnAxes(own) if axes is None else axes_value(axes),
    )


@dataclass(frozen=True)
class Named:
    """Chooses leaves by their exact paths, whatever their shape."""

    paths: frozenset[str]

    def __call__(self, path: str, leaf: jax.Array) -> bool:
        """Whether a leaf is chosen."""
        del leaf
        return path in self.paths


@dataclass(frozen=True)
class OwnAxes:
    """What the projector of each leaf knows of its axes."""

    projectors: tuple[tuple[str, LeafProjector], ...]

    def __call__(self, path: str, leaf: jax.Array) -> Axes | None:
        """The axes of a leaf, if its projector knows."""
        projector = dict(self.projectors).get(path)
        axes = None if projector is None else projector.axes
        if isinstance(axes, ByPath):
            return dict(axes.entries).get(path)
        return axes if axes is None else axes(path, leaf)


@dataclass(frozen=True, repr=False)
class PerLeaf(LeafProjector):
    """See `per_leaf`."""

    projectors: tuple[tuple[str, LeafProjector], ...]
    _: KW_ONLY
    where: Named
    axes: Any = None

    def __repr__(self) -> str:
        return f"per_leaf({dict(self.projectors)})"

    @property
    def only_masks(self) -> bool:
        """Whether all of them only set entries to zero."""
        return all(projector.only_masks for _, projector in self.projectors)

    def obstacle(self, leaf: Leaf) -> str:
        """What its own projector says."""
        return dict(self.projectors)[leaf.path].obstacle(leaf)

    def project(
        self, params: Params, state: Any, key: jax.Array | None
    ) -> tuple[Projection, Any]:
        """Compresses the leaves that have a projector."""
        paths = [path for path, _ in named_leaves(params)]
        for path, _ in self.projectors:
            if path not in paths:
                raise ValueError(
                    f"projectors must name leaves of params, got {path!r}, expected "
                    f"some of {paths}"
                )
        return super().project(params, state, key)

    def project_leaves(
        self, leaves: Sequence[Leaf]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Compresses each leaf by itself."""
        own = dict(self.projectors)
        return [own[leaf.path].project_leaves([leaf])[0] for leaf in leaves]
