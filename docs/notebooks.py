"""Notebooks as pages: their cells and stored outputs as Markdown, nothing is run.

Outputs are texts and pictures; a picture is a part of the page.
"""

import json

from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    """Takes ``.ipynb`` for a source of pages."""
    app.add_source_suffix(".ipynb", "markdown")
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    if app.env.doc2path(name).suffix == ".ipynb":
        source[0] = "\n\n".join(map(_markdown, json.loads(source[0])["cells"]))


def _markdown(cell: dict) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    blocks = [f"```python\n{text}\n```"]
    for output in cell["outputs"]:
        if "text" in output:
            blocks.append(f"```text\n{''.join(output['text'])}\n```")
        else:
            picture = output["data"]["image/png"].strip()
            blocks.append(
                f"![Drawn by the cell above](data:image/png;base64,{picture})"
            )
    return "\n\n".join(blocks)
