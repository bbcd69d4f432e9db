"""Breaks the library in one place at a time, and sees whether the tests notice.

    python -m tests.mutants                         # all of them
    python -m tests.mutants selection sparsity      # those of some modules
    python -m tests.mutants --results verdicts.txt  # continues where it was stopped

Each mutant is made in a copy of the tree. A mutant that no test kills is printed as
SURVIVED, and the exit status is the number of those. One survives, as all it changes
is speed: `sam` without ``sparse_gradients=False`` applies masks that are all True.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


def survives(tree: Path, module: str, mutant: Mutant, tests: list[str]) -> bool:
    """Whether the tests pass with the mutant in place of the module."""
    path = tree / "cram_jax" / f"{module}.py"
    source = path.read_text()
    if source.count(mutant.old) != 1:
        raise SystemExit(
            f"{mutant.old!r} is {source.count(mutant.old)} times in {path}"
        )
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        # A process for each file, so that a mutant is killed before the next is read;
        # what killed one mutant is likely to kill the next.
        for name in tests:
            if not passes(tree, f"tests/test_{name}.py"):
                tests.remove(name)
                tests.insert(0, name)
                return False
        return True
    finally:
        path.write_text(source)


def passes(tree: Path, file: str) -> bool:
    """Whether the tests of a file pass; a loop without an end is a failure."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--ff", "-m", "not nightly"]
    command += ["--hypothesis-profile", "mutants", "--devices", "8", file]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # to compile
    try:
        result = subprocess.run(
            command, cwd=tree, capture_output=True, env=quick, timeout=1800
        )
    except subprocess.TimeoutExpired:
        return False
    if result.returncode > 2:  # no verdict: an error of pytest, or no test
        raise SystemExit(result.stdout.decode() + result.stderr.decode())
    return result.returncode == 0


def main() -> int:
    """Tries the mutants; returns how many survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE")
    parser.add_argument("--results", type=Path, help="verdicts so far; added to")
    options = parser.parse_args()
    for module in options.modules:
        if module not in MUTANTS:
            parser.error(f"MODULE must be of {', '.join(MUTANTS)}, got {module}")
    known = {}
    if options.results is not None and options.results.exists():
        for line in options.results.read_text().splitlines():
            verdict, _, name = line.partition(" ")
            known[name] = verdict
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("benchmarks", "cram_jax", "experiments", "tests"):
            shutil.copytree(ROOT / name, tree / name)
        for name in ("pyproject.toml", "README.md", "conftest.py"):
            shutil.copy(ROOT / name, tree)
        verdicts = []
        for module in options.modules or MUTANTS:
            tests, mutants = MUTANTS[module]
            for mutant in mutants:
                name = f"{module}: {mutant.old!r} -> {mutant.new!r}"
                verdict = known.get(name)
                if verdict is None:
                    alive = survives(tree, module, mutant, tests)
                    verdict = "SURVIVED" if alive else "killed"
                    if options.results is not None:
                        with options.results.open("a") as results:
                            results.write(f"{verdict} {name}\n")
                print(verdict, name, flush=True)
                verdicts.append(verdict)
    survivors = verdicts.count("SURVIVED")
    print(f"{len(verdicts) - survivors} of {len(verdicts)} mutants killed")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
