"""Builds the guide and the API reference: ``make docs``."""

import sys
from pathlib import Path

import cram_jax

sys.path.insert(0, str(Path(__file__).parent))  # for the last two

project = "cram_jax"
author = "the cram_jax developers"
release = cram_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "notebooks",
    "offline",
]
exclude_patterns = ["_build"]
nitpicky = False
default_role = "py:obj"  # `cram` links to it where it is ours

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_type_aliases = {
    name: name
    for name in ("AxisName", "Block", "Number", "Params", "Where", "optax.Schedule")
}
napoleon_use_rtype = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "cram_jax"
