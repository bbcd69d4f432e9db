"""Data sets, read through tensorflow-datasets without TensorFlow."""
