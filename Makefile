# Every command sets up what it needs: a fresh clone, python3, pip and make are enough.
# ARGS goes through to the program: make test ARGS="-k prediction".

PYTHON ?= python3
ARGS ?=
# Tests run in one process per core.
PYTEST := python -m pytest -n auto --dist worksteal
# Compiled quickly, where what is called matters more than how fast it runs.
QUICKLY := JAX_DISABLE_MOST_OPTIMIZATIONS=1

UV := .uv/bin/uv
VENV := .venv
FLOORS := .venv-floors
OPTAX := .venv-optax
TPU := .venv-tpu
WHEEL := .venv-wheel
DOCS := .venv-docs
BIN := $(VENV)/bin

# Of the tests, those of the package's modules and of its use with other libraries.
MODULES := $(wildcard stablegrad_optax/_[a-z]*.py)
PACKAGE_TESTS := tests/integration \
	$(wildcard $(MODULES:stablegrad_optax/_%.py=tests/test_%.py)) \
	tests/test_properties.py tests/test_public_api.py

# Those whose results a compiler could change.
NUMBERS := tests/test_stablegrad.py tests/test_statistics.py tests/test_dynamic_range.py \
	tests/test_scale_laws.py tests/test_properties.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export UV_PYTHON_DOWNLOADS := never

.DEFAULT_GOAL := help
.PHONY: help env demo test test-compiler test-floors test-optax test-tpu cost lint format format-check types workflows \
	check notebooks docs build test-wheel clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(VENV)/.dev ## make the development environment in .venv

demo: $(VENV)/.demo ## run the demo; ARGS="--problem poisson" chooses, ARGS=--help lists the options
	@$(BIN)/python -m benchmarks.demo $(ARGS)

test: $(VENV)/.dev ## run the whole test suite
	$(BIN)/$(PYTEST) $(ARGS)

test-compiler: $(VENV)/.dev ## run the tests of the core's numbers with XLA's usual compiler
	@# The other commands compile quickly, see tests/conftest.py.
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/$(PYTEST) $(NUMBERS) $(ARGS)

test-floors: $(FLOORS)/.floors ## run the package's tests on the oldest supported versions
	@# Killing and resuming jobs is slow, and no different there; documents are about the newest.
	$(QUICKLY) $(FLOORS)/bin/$(PYTEST) stablegrad_optax $(PACKAGE_TESTS) \
	--ignore tests/integration/test_kill_and_resume.py \
	--ignore tests/integration/test_many_hosts.py \
	--ignore-glob "*_document.py" $(ARGS)

test-optax: $(OPTAX)/.optax ## run optax's own tests, of a pinned release, against the package
	$(QUICKLY) $(OPTAX)/bin/$(PYTEST) tests/optax_suites $(ARGS)

test-tpu: $(TPU)/.tpu ## count the passes of the program that the TPU's compiler makes
	@# One process: libtpu does not let two have it.
	JAX_PLATFORMS=cpu $(TPU)/bin/$(PYTEST) -n 0 tests/test_cost.py -k TpuProgram $(ARGS)

cost: $(TPU)/.tpu ## measure what the transform costs, and write the tables of docs/cost.md
	JAX_PLATFORMS=cpu $(TPU)/bin/python -m benchmarks.cost tpu
	$(TPU)/bin/python -m benchmarks.cost gpu
	$(TPU)/bin/python -m benchmarks.cost time
	$(TPU)/bin/python -m benchmarks.cost training
	$(TPU)/bin/python -m benchmarks.cost growth
	$(TPU)/bin/python -m benchmarks.cost report

lint: $(VENV)/.dev ## check the style rules
	$(BIN)/ruff check

format: $(VENV)/.dev ## format the code and fix what lint can fix
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

format-check: $(VENV)/.dev ## check that the code is formatted
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## check the types
	$(BIN)/basedpyright

workflows: $(VENV)/.dev ## check what CI, the site and releases run
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --quiet --offline .github

check: lint format-check types workflows ## lint, format-check, types and workflows

notebooks: $(VENV)/.dev ## execute the notebooks again, in place
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

docs: $(DOCS)/.docs ## build the documentation site into docs/_build; warnings are errors
	JAX_PLATFORMS=cpu $(DOCS)/bin/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet \
	--builder html docs docs/_build/html
	@echo "docs/_build/html/index.html"

build: $(VENV)/.dev ## build the source distribution and the wheel into dist/
	rm -rf dist
	$(UV) build --quiet
	$(BIN)/twine check --strict dist/*

test-wheel: build | $(UV) ## install the built wheel alone in an empty environment and test it there
	$(call make_venv,$(WHEEL))
	$(INSTALL) $(WHEEL) dist/*.whl
	cd $(WHEEL) && bin/python -I -c "import stablegrad_optax as s; print(s.__name__, s.__version__)"
	@# Every public name's example, from outside of the checkout.
	$(INSTALL) $(WHEEL) "$$(ls dist/*.whl)[diagnostics,flax]" pytest
	cd $(WHEEL) && $(QUICKLY) bin/python -m pytest -q -c /dev/null -p no:cacheprovider --doctest-modules \
	-o "doctest_optionflags=NORMALIZE_WHITESPACE ELLIPSIS" --pyargs stablegrad_optax

clean: ## remove the environments, what was built and the caches
	rm -rf .uv $(VENV) $(FLOORS) $(OPTAX) $(TPU) $(WHEEL) $(DOCS) dist out docs/_build docs/generated \
	docs/notebooks .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Environments. Each ends in a stamp that is newer than pyproject.toml, so that a second call does
# nothing. They are made by uv, many times as fast as venv and pip; pip's --target needs no venv.
$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: \
	$(PYTHON) is missing or older than 3.11; name a newer one: make <command> PYTHON=python3.12" \
	>&2; exit 1; }
	@$(PYTHON) -m pip install --quiet --target .uv uv || { rm -rf .uv; echo "error: $(PYTHON) -m pip \
	could not install uv; install pip (Debian, Ubuntu: apt install python3-pip)" >&2; exit 1; }

define make_venv
	@$(UV) venv --quiet --clear --python $(PYTHON) $(1)
endef

# What follows is installed into the environment that is named first.
INSTALL := $(UV) pip install --quiet --python

$(BIN)/python: | $(UV)
	$(call make_venv,$(VENV))

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(INSTALL) $(VENV) --editable ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(INSTALL) $(VENV) --editable ".[dev]"
	@touch $@ $(VENV)/.demo

$(FLOORS)/.floors: pyproject.toml | $(UV)
	$(call make_venv,$(FLOORS))
	@$(FLOORS)/bin/python -c 'import tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	extras = project["optional-dependencies"]; \
	names = ("diagnostics", "examples", "experiments", "flax", "test"); \
	bounds = sum((extras[name] for name in names), project["dependencies"]); \
	print(*(b.replace(">=", "==") for b in bounds if ">=" in b), sep="\n")' > $(FLOORS)/floors.txt
	$(INSTALL) $(FLOORS) --constraint $(FLOORS)/floors.txt --editable ".[test]"
	@touch $@

$(OPTAX)/.optax: pyproject.toml | $(UV)
	$(call make_venv,$(OPTAX))
	$(INSTALL) $(OPTAX) --editable ".[optax-suites]"
	@touch $@

$(TPU)/.tpu: pyproject.toml | $(UV)
	$(call make_venv,$(TPU))
	$(INSTALL) $(TPU) --editable ".[tpu]"
	@touch $@

$(DOCS)/.docs: pyproject.toml | $(UV)
	$(call make_venv,$(DOCS))
	$(INSTALL) $(DOCS) --editable ".[docs]"
	@touch $@
