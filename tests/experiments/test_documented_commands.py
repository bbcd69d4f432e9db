"""Every command that we print, in documents and recipes, has options that exist."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from experiments.__main__ import parse

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs" / "guide").glob("*.md")),
    *sorted((ROOT / "experiments" / "recipes").glob("*.py")),
]
COMMAND = re.compile(  # in running text it may be broken where a line ends
    r"`python -m experiments ([^`]+)`|python -m experiments ((?:\\\n|[^\n`#])+)"
)
OPTION = re.compile(r"`(--[a-z][a-z0-9.-]*)")


def commands():
    """(file, words), each shape of a command once."""
    seen = {}
    for page in PAGES:
        for in_text, in_block in COMMAND.findall(page.read_text()):
            words = shlex.split((in_text or in_block).replace("\\\n", " "))
            options = tuple(word for word in words[1:] if word.startswith("-"))
            if "--resume" not in options and len(words) > 1:
                seen.setdefault((words[0], options), (page.name, words))
    return list(seen.values())


@pytest.mark.parametrize(
    ("page", "words"), [pytest.param(*c, id=" ".join(c[1])) for c in commands()]
)
def test_a_printed_command_parses(page, words):
    if "--config" in words:  # a file that only the reader has
        at = words.index("--config")
        words = ["train", "digits", *words[1:at], *words[at + 2 :]]
    parse(words)


@pytest.fixture(scope="module")
def known():
    """All options of all verbs, by their help."""
    text = io.StringIO()
    for words in (
        ["train", "own_images"],
        ["train", "own_texts"],
        ["evaluate"],
        ["report"],
        ["compress"],
        ["export"],
    ):
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            parse([*words, "--help"])
    options = set(re.findall(r"--[a-z][a-z0-9.-]*", text.getvalue()))
    return options | {option.split(".")[0] for option in options}  # and groups


@pytest.mark.parametrize("page", ["quickstart.md", "vision.md", "language.md"])
def test_an_option_in_the_text_exists(page, known):
    named = set(OPTION.findall((ROOT / "docs" / "guide" / page).read_text()))
    assert named - known - {"--help"} == set()
