# `make help` lists the targets. Everything runs from .venv, which is made on first use.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test check bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' Makefile

venv: $(STAMP)  ## make .venv and install hantc into it, editable

# The stamp is written last, so that a broken-off installation is done again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,demo,openvino,tensorrt]'
	@touch $@

demo: $(STAMP)  ## compile the demo's digit classifier for this machine
	tools/demo/run

test: $(STAMP)  ## the gate: format, lint, types, layers, tests
	tools/check

check: $(STAMP)  ## the gate without the tests
	tools/check --static

bench: $(STAMP)  ## the benchmarks of tools/bench that need no model of yours
	@for name in real_models onnx_node_tests ilp; do \
	    echo "== tools/bench/$$name.py"; $(VENV)/bin/python "tools/bench/$$name.py" || exit 1; done

clean:  ## remove all that was made here, .venv too
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
