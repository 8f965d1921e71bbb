# Targets: demo (the main job in minutes), test (everything CI checks), gpu (the tests and benchmarks of a machine with a GPU), docs (the site, in build/docs), notebooks (runs them), wheel (in dist), bench, soak (random kills and bad inputs), clean. Each makes its own environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: help demo test gpu lint docs notebooks wheel bench soak clean
help:
	@grep -E '^# Targets' Makefile

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[demo,dev,onnx,hub]'
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/dodistill demo

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

gpu: $(BIN)/.installed
	$(BIN)/python -m pytest -n 4 tests/test_gpu.py
	$(BIN)/python benchmarks/step.py --precision bf16 --repeat 20 --compile graphs
	$(BIN)/python benchmarks/whole.py --precision bf16 --repeat 20 --real-steps 300
	$(BIN)/python benchmarks/papers.py recipes/table2.yaml

$(BIN)/.docs: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	@touch $@

docs: $(BIN)/.docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

notebooks: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_notebooks.py

wheel: $(BIN)/.installed
	$(BIN)/python -m build

bench: $(BIN)/.installed
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/synthesis.py
	$(BIN)/python benchmarks/kdci.py
	$(BIN)/python benchmarks/update.py
	$(BIN)/python benchmarks/cid.py
	$(BIN)/python benchmarks/upsample.py
	$(BIN)/python benchmarks/predict.py
	$(BIN)/python benchmarks/allocator.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/whole.py

soak: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python soak/kills.py --kills 200
	OMP_NUM_THREADS=1 $(BIN)/python soak/inputs.py

clean:
	rm -rf $(VENV) runs build dist docs/made docs/index.md .mypy_cache .ruff_cache .pytest_cache
