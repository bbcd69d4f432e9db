"""Operations along the last axis, whatever comes before it."""

import numpy as np

from cram_jax.engine.operations.base import (
    Operation,
    TensorType,
    expect,
    expect_features,
    floats,
    operation,
    set_array,
)


@operation
class Linear(Operation):
    """``x @ kernel + bias`` along the last axis.

    Attributes:
      kernel: (inputs, outputs).
      bias: (outputs,), or None.

    Raises:
      ValueError: an array has another shape, or an entry that is not finite.
      TypeError: an array is not of numbers.
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        set_array(self, "kernel", (None, None))
        set_array(self, "bias", (self.kernel.shape[1],), optional=True)

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1)
        expect_features(x, self.kernel.shape[0], "kernel's inputs")
        return TensorType((*x.shape[:-1], self.kernel.shape[1]))


@operation
class Affine(Operation):
    """``x * scale + offset`` along the last axis: batch norm in evaluation.

    Attributes:
      scale: (features,).
      offset: (features,).

    Raises:
      ValueError: an array has another shape, or an entry that is not finite.
      TypeError: an array is not of numbers.
    """

    scale: np.ndarray
    offset: np.ndarray

    def __post_init__(self) -> None:
        set_array(self, "scale", (None,))
        set_array(self, "offset", self.scale.shape)

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1)
        expect_features(x, len(self.scale), "scale")
        return x


def batch_norm(
    mean: np.ndarray,
    variance: np.ndarray,
    scale: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    epsilon: float = 1e-5,
) -> Affine:
    """Batch norm in evaluation, from its statistics.

    Args:
      mean: (features,), the running mean.
      variance: (features,), the running variance.
      scale: (features,), or None for 1.
      bias: (features,), or None for 0.
      epsilon: added to the variance.

    Returns:
      The operation.

    Raises:
      ValueError: the shapes differ, the variance is negative somewhere, or an entry of
        the result is not finite.

    Example:
      >>> import numpy as np
      >>> from cram_jax.engine import batch_norm
      >>> affine = batch_norm(np.array([1.0]), np.array([4.0]), epsilon=0.0)
      >>> affine.scale, affine.offset
      (array([0.5], dtype=float32), array([-0.5], dtype=float32))
    """
    if np.min(variance) < 0:
        raise ValueError(f"variance must be at least 0, got {np.min(variance)}")
    multiplier = np.asarray(1 if scale is None else scale, np.float64)
    multiplier = multiplier / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    offset = (0 if bias is None else bias) - np.asarray(mean, np.float64) * multiplier
    return Affine(multiplier, offset)


class _Pointwise(Operation):
    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1)
        return x


@operation
class Relu(_Pointwise):
    """``max(x, 0)``."""


@operation
class Gelu(_Pointwise):
    """The exact GELU, ``x * Phi(x)``."""


@operation
class Tanh(_Pointwise):
    """The hyperbolic tangent."""


@operation
class Softmax(_Pointwise):
    """Softmax along the last axis."""


@operation
class Add(Operation):
    """``x + y`` of equal shapes."""

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        x, y = floats(inputs, 2)
        expect(x.shape == y.shape, f"shapes differ: {x.shape} and {y.shape}")
        return x


@operation
class LayerNorm(Operation):
    """Layer norm along the last axis.

    Attributes:
      scale: (features,).
      bias: (features,).
      epsilon: added to the variance.

    Raises:
      ValueError: an array has another shape, or an entry that is not finite; or
        ``epsilon`` is not between 0 and 1.
      TypeError: an array is not of numbers.
    """

    scale: np.ndarray
    bias: np.ndarray
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        set_array(self, "scale", (None,))
        set_array(self, "bias", self.scale.shape)
        expect(0 < self.epsilon < 1, f"epsilon must be in (0, 1), got {self.epsilon!r}")
        object.__setattr__(self, "epsilon", float(self.epsilon))

    def infer(self, *inputs: TensorType) -> TensorType:
        """See `Operation.infer`."""
        (x,) = floats(inputs, 1)
        expect(len(x.shape) < 3, f"needs rank 1 or 2, got shape {x.shape}")
        expect_features(x, len(self.scale), "scale")
        return x
