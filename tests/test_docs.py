"""The built documentation, which people read without a network, too."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
MODULES = ["", ".audit", ".engine", ".export", ".layerwise", ".structure"]


def build(out, **changes):
    """Builds the page with most formulas, as ``make docs`` builds all."""
    application = pytest.importorskip("sphinx.application", reason="needs sphinx")
    app = application.Sphinx(
        srcdir=DOCS,
        confdir=DOCS,
        outdir=out,
        doctreedir=out / "doctrees",
        buildername="html",
        confoverrides={
            "root_doc": "guide/concepts",
            "include_patterns": ["guide/concepts.md"],
            "suppress_warnings": ["myst.xref_missing"],
            **changes,
        },
        status=None,
        freshenv=True,
    )
    app.build()
    return (out / "guide" / "concepts.html").read_text()


def reference():
    """The names in the API reference, by module."""
    names, module = {}, ""
    for line in (DOCS / "api.rst").read_text().splitlines():
        if found := re.fullmatch(r"\.\. currentmodule:: (\S+)", line):
            module = found[1]
        elif found := re.match(
            r"\.\. (?:auto)?(?:function|class|data|exception):: (\w+)", line
        ):
            names.setdefault(module, []).append(found[1])
    return names


@pytest.mark.parametrize("module", [f"cram_jax{name}" for name in MODULES])
def test_the_reference_lists_every_public_name_once(module):
    there = importlib.import_module(module)
    functions = [
        name
        for name, value in vars(there).items()
        if inspect.isfunction(value)
        and value.__module__ == module
        and not name.startswith("_")
    ]
    public = getattr(there, "__all__", functions)
    expected = sorted(name for name in public if name != "__version__")
    assert sorted(reference()[module]) == expected


def test_the_reference_shows_every_property_of_its_classes():
    shown = {}
    for entry in (DOCS / "api.rst").read_text().split("\n.. ")[1:]:
        if found := re.match(r"currentmodule:: (\S+)", entry):
            module = importlib.import_module(found[1])
        elif found := re.match(r"autoclass:: (\w+)", entry):
            members = re.search(r"^ +:members:(.*)$", entry, re.MULTILINE)
            listed = re.findall(r"\w+", members[1]) if members else []
            everything = members is not None and not listed
            shown[getattr(module, found[1])] = None if everything else set(listed)
    missing = {
        f"{kind.__name__}.{name}"
        for kind, listed in shown.items()
        for name, value in vars(kind).items()
        if isinstance(value, property) and not name.startswith("_")
        if listed is not None and name not in listed
    }
    assert missing == set()


def test_formulas_are_mathml_and_need_no_script(tmp_path):
    text = build(tmp_path)
    source = (DOCS / "guide" / "concepts.md").read_text()
    formulas = re.findall(r"\$\$[^$]+\$\$|\$[^$]+\$", source)
    assert text.count('<math xmlns="http://www.w3.org/1998/Math/MathML"') == len(
        formulas
    )
    assert text.count('display="block"') == 1
    assert "<mi>&#x003B8;</mi>" in text  # theta
    assert not re.findall(r"\\(?:theta|nabla|odot|rho)\b", text)


def test_a_page_that_needs_the_network_fails_the_build(tmp_path):
    from sphinx.errors import SphinxError

    with pytest.raises(SphinxError, match=r"html needs the network: <script.*mathjax"):
        build(tmp_path, html_math_renderer="mathjax")
