# If needed, a target first creates a virtual environment in .venv with the project and its tools.
# PYTHON chooses the interpreter of the environment: make test PYTHON=python3.12
# JOBS is the number of processes that run tests, with one thread each: make test JOBS=1

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR := logs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow gpu-check lint links format demo-weights omniglot clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing the project and its tools into $(VENV) (PyTorch is large, so this takes minutes)"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(VENV)/installed  ## draw a small data set, train TMGF on it without labels, show the results
	$(BIN)/python tools/train_net.py --config-file projects/TMGF/configs/demo.yaml --overwrite \
		OUTPUT_DIR $(DEMO_DIR)
	@echo
	@echo "The run on one page: $(DEMO_DIR)/report.html"
	@echo
	@echo "What to try next"
	@echo "  features of cameras and persons  $(BIN)/python tools/visualize.py embed --model $(DEMO_DIR) --colour camera --output $(DEMO_DIR)/cameras.png"
	@echo "  the best weights, with flip-test $(BIN)/python tools/train_net.py --config-file $(DEMO_DIR)/config.yaml --eval-only MODEL.WEIGHTS $(DEMO_DIR)/model_best.safetensors TEST.FLIP true OUTPUT_DIR $(DEMO_DIR)_flip"
	@echo "  another setting, side by side    $(BIN)/python tools/train_net.py --config-file projects/TMGF/configs/demo.yaml OUTPUT_DIR $(DEMO_DIR)_eps CLUSTERER.EPS 0.4 && $(BIN)/python tools/report.py $(DEMO_DIR) $(DEMO_DIR)_eps --output $(DEMO_DIR)_eps/beside.html"
	@echo "More: the paper's data sets (projects/TMGF/README.md), your own images (docs/own_cameras.md), the report (docs/report.md)"

test: $(VENV)/installed lint  ## check style, types and floors, then run the tests (about 7 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(VENV)/installed  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

gpu-check: $(VENV)/installed  ## check a GPU in six minutes: results and speed (docs/gpu_check.md)
	$(BIN)/python tools/gpu_check.py

lint: $(VENV)/installed links  ## check style, types and floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

links:  # linters do not run reid/projects/__init__.py, so they find the projects through links
	@find reid/projects -type l -delete
	@for init in projects/*/*/__init__.py; do \
		ln -s "../../$$(dirname $$init)" "reid/projects/$$(basename $$(dirname $$init))"; done

format: $(VENV)/installed  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo-weights: $(VENV)/installed  ## make the weights that the demo starts from again
	$(BIN)/python tools/train_net.py --config-file projects/TMGF/configs/demo_pretrain.yaml --overwrite
	$(BIN)/python tools/convert_weights.py logs/demo_pretrain/model_final.safetensors \
		projects/TMGF/weights/demo_backbone.safetensors --part backbone --half
	$(BIN)/python tools/train_net.py --config-file projects/TMGF/configs/demo_pretrain_resnet.yaml --overwrite
	$(BIN)/python tools/convert_weights.py logs/demo_pretrain_resnet/model_final.safetensors \
		projects/TMGF/weights/demo_resnet.safetensors --part backbone --half

omniglot: $(VENV)/installed  ## train on real images: supervised, then without labels (docs/benchmarks.md)
	$(BIN)/python tools/train_net.py --config-file configs/omniglot_supervised.yaml --overwrite
	$(BIN)/python tools/train_net.py --config-file configs/omniglot_unsupervised.yaml --overwrite

clean:  ## remove the environment, caches and the demo's output
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info $(DEMO_DIR)
