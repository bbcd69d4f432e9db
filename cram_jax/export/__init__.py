"""Compressed models in files that today's engines and libraries take.

The core imports nothing of this. What a format needs beyond jax and NumPy is an extra
of its own, imported when the format is used: ``pip install 'cram_jax[onnx]'``.
"""

from cram_jax.export.onnx_files import n_m_layers, onnx_inputs, run_onnx, to_onnx
from cram_jax.export.packed import PackedFile, Saved, load_packed, save_packed
from cram_jax.export.parity import ParityError, check_parity

__all__ = [
    "PackedFile",
    "ParityError",
    "Saved",
    "check_parity",
    "load_packed",
    "n_m_layers",
    "onnx_inputs",
    "run_onnx",
    "save_packed",
    "to_onnx",
]
