"""The notebook of the docs, cell by cell."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "guide" / "own_model.ipynb"


@pytest.mark.usefixtures("quick_compilation")
def test_the_notebook_runs_and_prints_what_it_stores(capsys):
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            continue
        exec("".join(cell["source"]), names)
        printed = capsys.readouterr().out.splitlines()
        stored = [line for output in cell["outputs"] for line in output["text"]]
        # Not every figure: training rounds differently on another machine.
        assert [line.split()[:1] for line in printed] == [
            line.split()[:1] for line in stored
        ]
    assert names["accuracy"](names["params"], names["batch_stats"]) > 90
    pruned, statistics = names["pruned"], names["statistics"]
    assert names["accuracy"](pruned, statistics) > 80  # 90 was seen
    kept = sum(
        int((leaf != 0).sum())
        for leaf in (
            pruned["conv1"]["kernel"],
            pruned["conv2"]["kernel"],
            pruned["head"]["kernel"],
        )
    )
    assert kept == 508  # a tenth of 5,072, rounded up
