"""CPU devices, seeded property tests, and the location of larger reference data."""

import atexit
import gc
import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

# What one process has compiled the others load: pytest's workers and those that tests
# start inherit these variables from the first process, whose folder it is.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="cram_jax-compiled-")
    atexit.register(compiled.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,  # the first example of a shape compiles
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ci")
hypothesis.settings.register_profile(
    "mutants",  # a failure is enough: its smallest example may take minutes to compile
    hypothesis.settings.get_profile("ci"),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    report_multiple_bugs=False,
)


def pytest_addoption(parser):
    parser.addoption(
        "--shared",
        type=Path,
        default=os.environ.get("CRAM_JAX_SHARED"),
        help="folder with golden/ and datasets/; by default $CRAM_JAX_SHARED",
    )
    parser.addoption(
        "--devices",
        type=int,
        default=1,
        help="how many CPU devices there are; tests marked several_devices need 8",
    )
    parser.addoption(
        "--generated-networks",
        type=int,
        default=500,
        help="how many random networks structure/test_generated.py removes channels of",
    )
    parser.addoption(
        "--kills", type=int, default=1, help="how often test_interruption.py kills"
    )


def pytest_configure(config):
    jax.config.update("jax_num_cpu_devices", config.getoption("devices"))


def pytest_collection_finish(session):
    # What the modules hold stays, and tracing makes many objects that do not last.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_setup(item):
    if item.get_closest_marker("several_devices") and jax.device_count() < 8:
        pytest.skip("needs --devices 8")


@pytest.fixture(scope="session")
def shared(request):
    """The folder of larger reference data; skips if there is none."""
    folder = request.config.getoption("--shared")
    if folder is None:
        pytest.skip("needs --shared or $CRAM_JAX_SHARED, the larger reference data")
    if not Path(folder).is_dir():
        pytest.fail(f"--shared must be a folder, got {folder}")
    return Path(folder)


@pytest.fixture(scope="module")
def quick_compilation():
    """These tests compile much and compute little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
