"""The notebook of the docs, cell by cell."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import pyplot

NOTEBOOK = Path(__file__).parents[1] / "docs" / "guide" / "own_model.ipynb"


mpl.use("Agg")
for module in ("llvmlite", "onnxruntime"):
    pytest.importorskip(module, reason="needs the extras engine and onnx")


@pytest.mark.usefixtures("quick_compilation")
def test_the_notebook_runs_and_prints_what_it_stores(capsys):
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            continue
        exec("".join(cell["source"]), names)
        printed = capsys.readouterr().out.splitlines()
        stored = [line for output in cell["outputs"] for line in output.get("text", [])]
        # Not every figure: training rounds differently on another machine.
        assert [line.split()[:1] for line in printed] == [
            line.split()[:1] for line in stored
        ]
    pyplot.close("all")
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
    dense, *files = names["accuracies"].values()
    # Of the three files one is INT8.
    expected = float(names["accuracy"](pruned, statistics))
    assert files == pytest.approx([expected] * 3, abs=1)
    assert dense > expected - 1
