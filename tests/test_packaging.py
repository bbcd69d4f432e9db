"""What is installed, and what is built."""

import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import cram_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED_HERE = ("litert", "coreml", "jax2onnx")  # by pyproject.toml itself
OLDER = "tests/data/packaging/older.txt"


def pins(name):
    """The releases of a file of requirements/, by name; several differ by Python."""
    found = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if match := re.match(r"([a-z0-9-]+)==(\S+)", line):
            found.setdefault(match[1], set()).add(match[2])
    return found


def bounds(*groups):
    """What pyproject.toml asks for, or of its dependency groups only some."""
    project, dependencies = PROJECT["project"], PROJECT["dependency-groups"]
    extras = project["optional-dependencies"]
    parts = [project["dependencies"]]
    parts += [extras[name] for name in extras if name not in PINNED_HERE]
    parts += [dependencies[group] for group in groups or dependencies]
    lines = itertools.chain.from_iterable(parts)
    return [Requirement(line) for line in lines if isinstance(line, str)]


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_requirement_has_a_pin_within_its_bounds():
    dev = pins("dev")
    for requirement in bounds():
        for release in dev[normalized(requirement.name)]:
            assert requirement.specifier.contains(release), requirement


@pytest.mark.parametrize("name", ["setup", "experiments", "newest"])
def test_a_part_has_the_pins_of_the_whole(name):
    dev = pins("dev")
    assert pins(name).items() <= dev.items()


def test_the_lowest_pins_are_the_lower_bounds():
    lowest, extras = pins("lowest"), PROJECT["project"]["optional-dependencies"]
    optional = {Requirement(line).name for lines in extras.values() for line in lines}
    for requirement in bounds("core-test"):
        if requirement.name not in optional:
            (bound,) = requirement.specifier
            releases = map(Version, lowest[normalized(requirement.name)])
            assert min(releases) == Version(bound.version), requirement


def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
    )
    (wheel,) = tmp_path.iterdir()
    assert f"-{cram_jax.__version__}-py3-none-any" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"cram_jax-{cram_jax.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"cram_jax", metadata}
    sources = (ROOT / "cram_jax").rglob("*.py")
    assert {f"{path.relative_to(ROOT).as_posix()}" for path in sources} < names
    assert "cram_jax/py.typed" in names


def test_a_pinned_release_installs_though_there_are_newer_ones(tmp_path):
    """pip looked for the newest coverage[toml], which had no hash here."""
    if not (Path(sys.prefix) / "bin" / "uv").exists():
        pytest.skip("needs uv beside this Python, as make test has it")
    options = {"VENV": sys.prefix, "REQUIREMENTS": OLDER, "TARGET": tmp_path}
    install = subprocess.run(
        ["make", "pins", *(f"{name}={value}" for name, value in options.items())],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if re.search("error sending request|network was disabled", install.stderr):
        pytest.skip("needs a package index")
    assert install.returncode == 0, install.stderr
    installed = sorted(path.stem for path in tmp_path.glob("*.dist-info"))
    assert installed == ["coverage-7.10.7", "pytest_cov-7.0.0"]
