"""The mutants of tests/mutants are about the library as it is."""

from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("module", mutants.MUTANTS)
def test_a_mutant_changes_one_place_of_its_module(module):
    source = (ROOT / "cram_jax" / f"{module}.py").read_text()
    for old, new in mutants.MUTANTS[module][1]:
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        assert old != new
        compile(source.replace(old, new), module, "exec")


@pytest.mark.parametrize("module", mutants.MUTANTS)
def test_the_tests_of_a_mutant_exist(module):
    for name in mutants.MUTANTS[module][0]:
        assert (ROOT / "tests" / f"test_{name}.py").is_file()
