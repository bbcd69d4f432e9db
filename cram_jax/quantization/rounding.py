"""What all projectors that round have in common."""

import abc
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cram_jax.axes import Axes
from cram_jax.leaves import Leaf, LeafProjector
from cram_jax.projector import widened


class RoundingProjector(LeafProjector):
    """Rounds each leaf by itself; masks are True, gradients pass straight through."""

    @property
    def only_masks(self) -> bool:
        """False: it rounds."""
        return False

    @abc.abstractmethod
    def round_leaf(self, wide: jax.Array, axes: Axes) -> jax.Array:
        """Rounds a leaf that was cast to float32, or is wider."""

    def project_leaves(
        self, leaves: Sequence[Leaf]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Rounds each leaf."""
        for leaf in leaves:
            if jnp.finfo(leaf.value.dtype).bits < 16:
                raise TypeError(
                    f"params[{leaf.path!r}] has dtype {leaf.value.dtype}, which is "
                    f"rounded already, expected float16, bfloat16, float32 or float64; "
                    f"exclude the leaf with `where`"
                )
        return [
            (self._round(leaf.value, leaf.axes), jnp.ones_like(leaf.value, bool))
            for leaf in leaves
        ]

    def _round(self, leaf: jax.Array, axes: Axes) -> jax.Array:
        # bfloat16 cannot hold the ratio w / scale to the nearest of 255 levels.
        wide = widened(leaf)
        rounded = self.round_leaf(wide, axes).astype(wide.dtype)
        # The outermost level may lie outside the dtype's range.
        limit = jnp.finfo(leaf.dtype).max.astype(wide.dtype)
        rounded = jnp.clip(rounded, -limit, limit).astype(leaf.dtype)
        return jax.lax.stop_gradient(rounded) + (leaf - jax.lax.stop_gradient(leaf))
