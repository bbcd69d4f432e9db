"""A training pass that moves running statistics, as a function of their values."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

BatchStats: TypeAlias = Any
"""A pytree of running statistics: a Linen collection, an NNX State of BatchStat."""

Values: TypeAlias = dict[int, np.ndarray[Any, Any]]
"""Arrays by the index of their leaf in ``jax.tree.leaves(batch_stats)``."""


class TrainingPass:
    """``apply`` as a function of some leaves, on copies that it may modify.

    All arithmetic is in float64 on the host: statistics are small.

    Attributes:
      floating, integer: which leaves of the statistics are.
      old: these leaves as they were.
    """

    def __init__(
        self, apply: Callable[[BatchStats, Any], BatchStats], batch_stats: BatchStats
    ) -> None:
        leaves = jax.tree.leaves_with_path(batch_stats)
        self._apply = apply
        self._structure: Any = jax.tree.structure(batch_stats)
        self._paths = [jax.tree_util.keystr(path) for path, _ in leaves]
        self._leaves = [leaf for _, leaf in leaves]
        if any(isinstance(leaf, jax.core.Tracer) for leaf in self._leaves):
            raise TypeError(
                "recalibrate must be called outside jit, got traced statistics: jit "
                "apply instead"
            )
        dtypes = {i: jnp.result_type(leaf) for i, leaf in enumerate(self._leaves)}
        self.floating = [
            i for i, d in dtypes.items() if jnp.issubdtype(d, jnp.floating)
        ]
        self.integer = [i for i, d in dtypes.items() if jnp.issubdtype(d, jnp.integer)]
        with jax.numpy_dtype_promotion("standard"):
            self._dtypes = dtypes | {
                i: jnp.promote_types(dtypes[i], jnp.float32) for i in self.floating
            }
        self._widened = sorted(
            {dtypes[i].name for i in self.floating if dtypes[i] != self._dtypes[i]}
        )
        self.old = {
            i: _on_host(self._leaves[i]) for i in sorted(self.floating + self.integer)
        }

    def __call__(self, values: Values, batch: Any) -> Values:
        """The numbers after a pass from these values, the other leaves as before."""
        handed = self._with(self.old | values, self._dtypes)
        try:
            result = self._apply(handed, batch)
        except Exception as error:
            if self._widened:
                error.add_note(
                    f"recalibrate hands apply batch_stats of {self._widened} as "
                    f"float32: their momentum has too few digits otherwise"
                )
            raise
        moved = jax.tree.leaves_with_path(result)
        paths = [jax.tree_util.keystr(path) for path, _ in moved]
        if paths != self._paths:
            raise ValueError(
                f"apply must return statistics structured like batch_stats, with the "
                f"leaves {self._paths}, got {paths}"
            )
        for i, old in self.old.items():
            self._check_returned(i, old, moved[i][1])
        return {i: _on_host(moved[i][1]) for i in self.old}

    def _check_returned(self, i: int, old: np.ndarray[Any, Any], returned: Any) -> None:
        if isinstance(returned, jax.core.Tracer):
            raise TypeError("recalibrate must be called outside jit: jit apply instead")
        if jnp.shape(returned) != old.shape:
            raise ValueError(
                f"apply must return {self.name(i)} in its shape {old.shape}, got "
                f"{jnp.shape(returned)}"
            )
        if i not in self.floating:
            return
        dtype = jnp.result_type(returned)
        with jax.numpy_dtype_promotion("standard"):
            wide = jnp.promote_types(dtype, self._dtypes[i])
        if wide != dtype:
            raise TypeError(
                f"apply must return {self.name(i)} as {self._dtypes[i].name}, in which "
                f"it was handed, got {dtype.name}: its momentum cannot be read from "
                f"fewer digits"
            )

    def rounded(self, i: int, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The value that ``apply`` gets for this one."""
        return value.astype(self._dtypes[i]).astype(np.float64)

    def resolution(self, i: int) -> float:
        """The spacing of numbers at 1 in the dtype that ``apply`` gets."""
        return float(jnp.finfo(self._dtypes[i]).eps)

    def name(self, i: int) -> str:
        """The leaf as a user writes it."""
        return f"batch_stats{self._paths[i]}"

    def replace(self, values: Values) -> BatchStats:
        """``batch_stats`` with other values of some leaves."""
        dtypes = {i: jnp.result_type(self._leaves[i]) for i in values}
        return self._with(values, dtypes, copy=False)

    def _with(
        self, values: Values, dtypes: dict[int, Any], *, copy: bool = True
    ) -> BatchStats:
        leaves = [
            _like(leaf, values[i], dtypes[i])
            if i in values
            else (leaf.copy() if copy and hasattr(leaf, "copy") else leaf)
            for i, leaf in enumerate(self._leaves)
        ]
        return self._structure.unflatten(leaves)


def _on_host(leaf: Any) -> np.ndarray[Any, Any]:
    """A copy of a leaf, floating ones in float64."""
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    dtype = jnp.result_type(leaf)
    return np.array(leaf, np.float64 if jnp.issubdtype(dtype, jnp.floating) else dtype)


def _like(leaf: Any, value: np.ndarray[Any, Any], dtype: Any) -> jax.Array:
    """The value as an array on the devices of the leaf."""
    value = value.astype(dtype)
    if isinstance(leaf, jax.Array) and leaf.committed:
        return jax.device_put(value, leaf.sharding)
    return jnp.array(value)
