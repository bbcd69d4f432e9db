"""Core ML packages with small weights, which Linux can write but not run."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np

from cram_jax.export.extras import quiet, require
from cram_jax.validation import check_choice
from cram_jax.writing import replacing

Weights: TypeAlias = Literal["float16", "int8", "int4", "int4 in blocks"]
"""What weights are stored as."""
_FEWEST = 2048
"""Smaller weights stay dense, as coremltools advises."""


def to_coreml(
    function: Callable[..., Any],
    examples: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    weights: Weights = "float16",
) -> dict[str, np.ndarray]:
    """Writes a function of JAX as a Core ML package whose zeros take no space.

    Weights of 2,048 numbers or more, at least half of them zero, are stored as a bit
    mask and the non-zero values, in which form the Neural Engine and recent processors
    of Apple compute with them. Smaller weights stay float16, also with integers. The
    package is for iOS 18 and macOS 15 or newer. It holds the date and random
    identifiers, so no two are byte-for-byte equal.

    Args:
      function: of arrays, with its parameters inside, that returns an array or a tuple
        of arrays; what `jax.export` takes.
      examples: arrays or `jax.ShapeDtypeStruct`, one for each argument; the package is
        for their shapes, batch size included.
      path: of the package, ``.mlpackage``, a folder that appears when it is complete.
      weights: "float16"; "int8" or "int4", with a float16 scale for each output, for
        which `fake_quant` of 8 or 4 bits trains; or "int4 in blocks" of 32 inputs, for
        ``fake_quant(4, block=32, scale="float16")``. The integers are those of the
        projector, the scales within a rounding of float16; activations stay float16.
        Only linear layers whose number of inputs is a multiple of 32 are in blocks.

    Returns:
      The weights that the package holds in a smaller form, by their names in it, as
      float16 arrays with their zeros, for a comparison.

    Raises:
      ValueError: ``weights`` is unknown.
      ImportError: coremltools or stablehlo-coreml is not installed.

    Example:
      >>> from cram_jax.export import to_coreml
      >>> kernel = jnp.eye(64)  # mostly zeros
      >>> x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
      >>> held = to_coreml(lambda x: x @ kernel, [x], "a.mlpackage")  # doctest: +SKIP
      >>> [weights.shape for weights in held.values()]  # doctest: +SKIP
      [(64, 64)]
    """
    check_choice("weights", weights, get_args(Weights))
    with quiet():
        tools = require("coremltools", "coreml")
        stablehlo = require("stablehlo_coreml", "coreml")
        compression = require("coremltools.optimize.coreml", "coreml")
        exported = jax.export.export(jax.jit(function), platforms=["cpu"])(*examples)
        mlir = require("jax.extend.mlir.ir", "coreml")
        make_context = require("jax.interpreters.mlir", "coreml").make_ir_context
        with make_context():
            module = mlir.Module.parse(exported.mlir_module())
        target = tools.target.iOS18
        dense = tools.convert(
            stablehlo.convert(module, minimum_deployment_target=target),
            source="milinternal",
            minimum_deployment_target=target,
            pass_pipeline=stablehlo.build_pass_pipeline(),
        )
        sparse = compression.prune_weights(
            dense,
            compression.OptimizationConfig(
                compression.OpThresholdPrunerConfig(
                    # Float16 has no smaller number: only zeros are below.
                    threshold=1e-12,
                    minimum_sparsity_percentile=0.5,
                    weight_threshold=_FEWEST,
                )
            ),
        )
        small = sparse if weights == "float16" else _quantise(sparse, weights)
        with replacing(path) as beside:
            small.save(os.fspath(beside))
            return coreml_weights(beside)


def _quantise(model: Any, weights: Weights) -> Any:
    compression = require("coremltools.optimize.coreml", "coreml")
    config = compression.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype="int8" if weights == "int8" else "int4",
        granularity="per_block" if weights == "int4 in blocks" else "per_channel",
        block_size=32,
        weight_threshold=_FEWEST,
    )
    if weights == "int4 in blocks":
        # A block of a convolution would be of 32 channels at all places of its window.
        of_linear = dict.fromkeys(("linear", "matmul"), config)
        options = compression.OptimizationConfig(op_type_configs=of_linear)
    else:
        options = compression.OptimizationConfig(config)
    # Once for dense weights and once for what is kept of the sparse ones.
    for joint in (False, True):
        model = compression.linear_quantize_weights(
            model, options, joint_compression=joint
        )
    return model


def coreml_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The sparse and the quantised weights of a Core ML package, by name.

    Args:
      path: of the package, as `to_coreml` writes it.

    Returns:
      float16 arrays, with their zeros.

    Raises:
      ImportError: coremltools is not installed.

    Example:
      >>> from cram_jax.export import coreml_weights, to_coreml
      >>> kernel = jnp.eye(64)  # mostly zeros
      >>> x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
      >>> held = to_coreml(lambda x: x @ kernel, [x], "a.mlpackage")  # doctest: +SKIP
      >>> list(coreml_weights("a.mlpackage"))  # doctest: +SKIP
      ['const_0_to_fp16_sparsified']
    """
    with quiet():
        tools = require("coremltools", "coreml")
        load = require("coremltools.converters.mil.frontend.milproto.load", "coreml")
        model = tools.models.MLModel(os.fspath(path), skip_model_load=True)
        program = load.load(
            model.get_spec(),
            specification_version=model.get_spec().specificationVersion,
            file_weights_dir=model.weights_dir,
        )
    return {
        operation.name: _decode(operation)
        for operation in program.functions["main"].operations
        if operation.op_type
        in ("constexpr_sparse_to_dense", "constexpr_blockwise_shift_scale")
    }


def _decode(operation: Any) -> np.ndarray:
    """The dense float16 weights of an operation that a package decodes when loaded."""
    if operation.op_type == "constexpr_blockwise_shift_scale":
        return _scaled(np.asarray(operation.data.val), operation.scale.val)
    # Of integers the kept ones come from an operation that knows their scales.
    source = operation.nonzero_data.op
    are_integers = source.op_type == "constexpr_sparse_blockwise_shift_scale"
    mask = np.asarray((source.data_mask if are_integers else operation.mask).val) != 0
    kept = (source if are_integers else operation).nonzero_data.val
    dense = np.zeros(mask.shape, np.int8 if are_integers else np.float16)
    dense[mask] = kept
    return _scaled(dense, source.scale.val) if are_integers else dense


def _scaled(integers: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Integers times their scales, one for each block of an axis."""
    for axis, size in enumerate(integers.shape):
        scale = np.repeat(scale, size // scale.shape[axis], axis)
    return (integers.astype(np.float32) * scale.astype(np.float32)).astype(np.float16)
