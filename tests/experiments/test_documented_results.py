"""Every figure in the tables of documented results is one of a stored run."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From each heading to the folders below `results` that its tables are about.
SECTIONS = {
    "docs/guide/results.md": {
        "Short runs": ["cifar10_small"],
        "Five times as long": ["cifar10_small_40"],
        "Part of the batch for each gradient": [
            "cifar10_small_40",
            "cifar10_small_share",
        ],
        "Fine-tuning": [
            "cifar10_small_40",
            "cifar10_small",
            "cifar10_small_finetune",
            "cifar10_small_second_order",
            "cifar10_small_blocks_finetune",
        ],
        "A network of 1.2 million parameters": ["cifar10_million"],
        "A quarter of those parameters": ["cifar10_wide"],
        "SST-2": ["sst2_small"],
        "All sentences, and blocks": ["sst2_small_all", "sst2_small_blocks"],
        "SQuAD": [
            "squad_small",
            "squad_small_1000",
            "squad_small_sparse_finetune",
        ],
    },
    "docs/guide/methods.md": {
        "Side by side": ["compare_digits", "compare_cifar10_small"],
    },
    "README.md": {
        "What it buys": ["cifar10_small_40", "sst2_small_all", "squad_small"],
    },
}
NUMBER = re.compile(r"\d+\.\d+(?: ± \d+\.\d+)?")


def stored_figures(folder):
    """As reports print them, rounded once more or not, and those of single runs."""
    text = "\n".join(path.read_text() for path in folder.rglob("*.md"))
    for path in folder.rglob("evaluation.json"):
        for method in json.loads(path.read_text())["methods"].values():
            for run in method["runs"]:
                for kind in ("pruned", "recalibrated"):
                    text += "".join(f" {x:.1f}" for x in run.get(kind, {}).values())
    for path in folder.rglob("log.txt"):  # of models that `compress` judged
        text += "".join(re.findall(r".*Stored in", path.read_text()))
    printed = NUMBER.findall(text)
    means = [number.split()[0] for number in printed]
    return {*printed, *means, *(f"{float(mean):.1f}" for mean in means)}


@pytest.mark.parametrize(
    ("document", "heading"),
    [(document, heading) for document in SECTIONS for heading in SECTIONS[document]],
)
def test_tables_hold_what_the_runs_measured(document, heading):
    text = (ROOT / document).read_text()
    (section,) = re.findall(rf"\n#+ {heading}\n(.*?)(?=\n#+ |\Z)", text, re.DOTALL)
    rows = re.findall(r"^\|(.*)\|$", section.replace("**", ""), re.MULTILINE)
    cells = [cell for row in rows for cell in row.split("|")[1:]]
    shown = [number for cell in cells for number in NUMBER.findall(cell)]
    folders = SECTIONS[document][heading]
    stored = set().union(*(stored_figures(ROOT / "results" / f) for f in folders))
    assert shown
    assert [number for number in shown if number not in stored] == []
