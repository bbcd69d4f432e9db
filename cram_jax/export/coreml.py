"""Core ML packages with sparse weights, which Linux can write but not run."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from cram_jax.export.extras import require
from cram_jax.safetensors import replacing

_FEWEST = 2048
"""Smaller weights stay dense, as coremltools advises."""


def to_coreml(
    function: Callable[..., Any],
    examples: Sequence[Any],
    path: str | os.PathLike[str],
) -> dict[str, np.ndarray]:
    """Writes a function of JAX as a Core ML package whose zeros take no space.

    Weights are float16. Those of 2,048 numbers or more, at least half of them zero, are
    stored as a bit mask and the non-zero values, in which form the Neural Engine and
    recent processors of Apple compute with them. The package is for iOS 18 and macOS 15
    or newer. It holds the date and random identifiers, so no two are byte-for-byte
    equal.

    Args:
      function: of arrays, with its parameters inside, that returns an array or a tuple
        of arrays; what `jax.export` takes.
      examples: arrays or `jax.ShapeDtypeStruct`, one for each argument; the package is
        for their shapes, batch size included.
      path: of the package, ``.mlpackage``, a folder that appears when it is complete.

    Returns:
      The sparse weights that the package holds, by their names in it, as float16
      arrays with their zeros, for a comparison.

    Raises:
      ImportError: coremltools or stablehlo-coreml is not installed.
    """
    with _quiet():
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
        with replacing(path) as beside:
            sparse.save(os.fspath(beside))
            return coreml_sparse_weights(beside)


def coreml_sparse_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The sparse weights of a Core ML package, with their zeros, by name.

    Raises:
      ImportError: coremltools is not installed.
    """
    with _quiet():
        tools = require("coremltools", "coreml")
        load = require("coremltools.converters.mil.frontend.milproto.load", "coreml")
        model = tools.models.MLModel(os.fspath(path), skip_model_load=True)
        program = load.load(
            model.get_spec(),
            specification_version=model.get_spec().specificationVersion,
            file_weights_dir=model.weights_dir,
        )
    found = {}
    for operation in program.functions["main"].operations:
        if operation.op_type == "constexpr_sparse_to_dense":
            mask = np.asarray(operation.mask.val).astype(bool)
            weights = np.zeros(mask.shape, np.float16)
            weights[mask] = operation.nonzero_data.val
            found[operation.name] = weights
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress bars, and advice on libraries that are not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
