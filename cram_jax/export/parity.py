"""How far the outputs of an exported network are from the original's."""

from typing import Any

import numpy as np


class ParityError(ValueError):
    """An exported network does not compute what the original does."""


def check_parity(got: Any, expected: Any, tolerance: float, name: str = "") -> float:
    """The largest difference of outputs, as a share of the largest output.

    Args:
      got: what the exported network returns: an array, or a tuple or list of arrays.
      expected: what the original returns for the same inputs.
      tolerance: the share that is allowed.
      name: of the format, for the error.

    Returns:
      The share.

    Raises:
      ParityError: it is above the tolerance, the number of outputs or their shapes
        differ, or a number is not finite.

    Example:
      >>> from cram_jax.export import check_parity
      >>> round(check_parity([1.0, -2.0], [1.0, -2.002], tolerance=0.01), 3)
      0.001
    """
    every, wanted = _arrays(got), _arrays(expected)
    if len(every) != len(wanted):
        raise ParityError(
            f"{name or 'the export'} returns {len(every)} arrays, expected "
            f"{len(wanted)}"
        )
    largest = 0.0
    for ours, theirs in zip(every, wanted, strict=True):
        if ours.shape != theirs.shape:
            raise ParityError(
                f"{name or 'the export'} returns shape {ours.shape}, expected "
                f"{theirs.shape}"
            )
        scale = float(np.abs(theirs).max(initial=0)) or 1.0
        difference = float(np.abs(ours - theirs).max(initial=0)) / scale
        if not difference <= tolerance:  # NaN, too
            raise ParityError(
                f"{name or 'the export'} differs from JAX by {difference:.2g} of the "
                f"largest output, above the tolerance of {tolerance:.2g}"
            )
        largest = max(largest, difference)
    return largest


def _arrays(outputs: Any) -> list[np.ndarray]:
    several = isinstance(outputs, tuple) or (
        isinstance(outputs, list) and any(np.ndim(x) for x in outputs)
    )
    every = [np.asarray(x) for x in (outputs if several else (outputs,))]
    wide = [np.complex128 if np.iscomplexobj(x) else np.float64 for x in every]
    return [x.astype(dtype) for x, dtype in zip(every, wide, strict=True)]
