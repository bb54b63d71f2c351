# `make` says what there is. Everything is installed into .venv, from the hashed locks, when a target
# first needs it and again only when a lock or pyproject.toml changes.

VENV := .venv
BIN := $(VENV)/bin
PARITY := .venv-parity
TPU := .venv-tpu
JOBS ?= 2
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.12 --generate-hashes \
    --no-emit-index-url --no-annotate --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)

# pyright's own wheels hold all it needs: neither another node on PATH nor the network.
export PYRIGHT_PYTHON_GLOBAL_NODE := off
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help quickstart test test-all test-parity test-tpu-aot notebooks lint format docs lock clean-venv

help:
	@echo "cla-jax: cross-layer key/value sharing in JAX"
	@echo
	@echo "  make quickstart             train tiny MQA and MQA-CLA2 side by side, compare and draw (minutes)"
	@echo "  make quickstart TEXT=PATH   the same on your own UTF-8 text file or folder; OUT=DIR says where to"
	@echo "  make test                   the fast tests; ARGS='tests/test_sharing.py -k segments' narrows them"
	@echo "  make test-all               those and the slow ones (CLA_JAX_TEST_GPU=1: on the GPU as well)"
	@echo "  make test-parity            checkpoints against the real transformers, in an environment of their own (.venv-parity)"
	@echo "  make test-tpu-aot           training, prefill and decoding compile for TPU and fit, on a CPU (.venv-tpu, with libtpu)"
	@echo "  make notebooks              make the notebooks anew from their .py texts and save what they show; ARGS=on_a_gpu: one"
	@echo "  make lint                   ruff, formatting, types, import arrows"
	@echo "  make format                 let ruff format and fix what it can"
	@echo "  make docs                   the documentation as a site, build/docs/index.html, without network"
	@echo "  make lock                   rewrite the locks from pyproject.toml; UPGRADE=1 takes newer versions"
	@echo "  make clean-venv             remove .venv, .venv-parity and .venv-tpu (the next target makes them anew)"
	@echo
	@echo "Python 3.12, 3.13 or 3.14 is looked for, and fetched if need be; PYTHON=PATH chooses one for a new .venv."

quickstart: $(VENV)/.stamp-run
	$(BIN)/python experiments/quickstart.py $(if $(TEXT),--text "$(TEXT)") $(if $(OUT),--out "$(OUT)")

test: $(VENV)/.stamp-dev
	$(BIN)/pytest -n $(JOBS) -m "not slow and not gpu" $(ARGS)

# No mark left out: everything that `make test` runs, the slow tests, and on a GPU machine those too.
test-all: $(VENV)/.stamp-dev
	$(BIN)/pytest -n $(JOBS) $(ARGS)

# torch and transformers stay out of .venv: they have an environment of their own, which needs nothing
# of this project. PARITY_PYTHON=PATH makes it with another Python.
test-parity: $(VENV)/.stamp-dev $(PARITY)/.stamp
	CLA_JAX_PARITY_PYTHON=$(PARITY)/bin/python $(BIN)/pytest -m transformers $(ARGS)

# libtpu stays out of .venv, where JAX would look for a TPU at every start. .venv-tpu is it, and all
# that .venv has.
test-tpu-aot: $(VENV)/.stamp-dev $(TPU)/.stamp
	$(TPU)/bin/python -m pytest -m tpu_aot $(ARGS)

# A notebook is written as its .py; the .ipynb beside it is made of that. `make test-all` executes the
# notebooks too, and saves nothing.
notebooks: $(VENV)/.stamp-dev
	$(BIN)/python .ci/execute_notebooks.py $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.stamp-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "build/docs/index.html"

# The development lock is the run-time lock and more, at the same versions. Needs uv alone, so that a
# lock that no longer installs can be replaced.
lock: $(BIN)/uv
	$(LOCK) pyproject.toml --group build --output-file requirements.lock
	$(LOCK) pyproject.toml --group build --extra dev --constraint requirements.lock \
	    --output-file requirements-dev.lock

clean-venv:
	rm -rf $(VENV) $(PARITY) $(TPU)

# An environment made by hand is kept if it will do; else a new one is made, beside a Python that was
# fetched into it.
$(VENV)/.stamp-venv:
	@mkdir -p $(VENV)
	@if ! { test -z "$(PYTHON)" && .ci/find-python --check $(BIN)/python && \
	        $(BIN)/python -m pip --version >/dev/null; } 2>/dev/null; then \
	    python="$$(.ci/find-python)" && \
	    find $(VENV) -mindepth 1 -maxdepth 1 ! -name bootstrap -exec rm -rf {} + && \
	    echo "Making $(VENV) with $$python" && \
	    "$$python" -m venv $(VENV); \
	fi
	@touch $@

$(BIN)/uv: | $(VENV)/.stamp-venv
	$(BIN)/python -m pip install --quiet uv

# The package itself goes in without dependencies and without an isolated build: the lock has both.
# Python's own pip may be old; before 24 it stumbles over an extra of a locked package (typepy[datetime]).
define install
@echo "Installing $(1) into $(VENV): $(2), once ..."
@$(BIN)/python -m pip install --quiet --upgrade "pip>=24.1" || true
@$(BIN)/python -m pip install --quiet --require-hashes --requirement $(1)
@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
endef

$(VENV)/.stamp-run: $(VENV)/.stamp-venv requirements.lock pyproject.toml
	$(call install,requirements.lock,about 260 MB to download, 1.0 GB on disk)
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv requirements-dev.lock pyproject.toml
	$(call install,requirements-dev.lock,about 470 MB to download, 2.0 GB on disk)
	@touch $(VENV)/.stamp-run $@

# torch's build for CPUs where it can be had, else the package index's, which is larger.
PARITY_PYTHON ?= $(BIN)/python
$(PARITY)/.stamp: requirements-parity.txt | $(VENV)/.stamp-dev
	@echo "Installing requirements-parity.txt into $(PARITY): torch and transformers, once ..."
	@rm -rf $(PARITY) && $(PARITY_PYTHON) -m venv $(PARITY)
	@$(BIN)/uv pip install --quiet --python $(PARITY)/bin/python --torch-backend=cpu \
	    --requirement $< 2>/dev/null || \
	    $(PARITY)/bin/python -m pip install --quiet --requirement $<
	@touch $@

$(TPU)/.stamp: requirements-tpu.txt | $(VENV)/.stamp-dev
	@echo "Installing requirements-tpu.txt into $(TPU): libtpu, 140 MB to download, once ..."
	@rm -rf $(TPU) && $(BIN)/python -m venv $(TPU)
	@$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
	    > "$$($(TPU)/bin/python -c 'import site; print(site.getsitepackages()[0])')/venv.pth"
	@$(TPU)/bin/python -m pip install --quiet --no-deps --requirement $<
	@touch $@
