VENV := .venv
PYTHON := $(VENV)/bin/python
# torch first and alone: with no torch there, a range would bring the newest build and gigabytes of CUDA;
# on a CUDA machine install the torch you want into .venv before
TORCH := 2.13.0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# tests at once; each takes one core and about 2 GB
WORKERS := 2

.PHONY: demo test style format benchmark

# without these values accelerate prints what it chose for each; a demo needs one GPU, or none
demo: $(VENV)/installed
	$(VENV)/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --gpu_ids 0 --mixed_precision no \
		--dynamo_backend no recipes/vqa.py

test: $(VENV)/installed-dev
	$(PYTHON) -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

style: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

benchmark: $(VENV)/installed
	$(PYTHON) recipes/benchmark.py

$(VENV)/installed: requirements.txt pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -c "import torch" 2>/dev/null || $(PYTHON) -m pip install -qq torch==$(TORCH)
	$(PYTHON) -m pip install -qq -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-app.txt requirements-dev.txt
	$(PYTHON) -m pip install -qq -r requirements-dev.txt
	touch $@
