"""Compressed models in files that today's engines and libraries take.

Nothing here is imported by the core. What a format needs beyond jax and NumPy is an
extra of its own, imported when the format is used.
"""

from cram_jax.export.packed import PackedFile, Saved, load_packed, save_packed

__all__ = ["PackedFile", "Saved", "load_packed", "save_packed"]
