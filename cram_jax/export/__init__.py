"""Compressed models in files that today's engines and libraries take.

The core does not import it. What a format needs beyond jax and NumPy is an extra of its
own, imported when the format is used: ``pip install 'cram_jax[onnx]'``.
"""

from cram_jax.export.coreml import coreml_weights, to_coreml
from cram_jax.export.litert import run_litert, to_litert
from cram_jax.export.onnx_files import n_m_layers, onnx_inputs, run_onnx, to_onnx
from cram_jax.export.onnx_function import function_to_onnx, run_onnx_function
from cram_jax.export.packed import PackedFile, Saved, load_packed, save_packed
from cram_jax.export.parity import ParityError, check_parity

__all__ = [
    "PackedFile",
    "ParityError",
    "Saved",
    "check_parity",
    "coreml_weights",
    "function_to_onnx",
    "load_packed",
    "n_m_layers",
    "onnx_inputs",
    "run_litert",
    "run_onnx",
    "run_onnx_function",
    "save_packed",
    "to_coreml",
    "to_litert",
    "to_onnx",
]
