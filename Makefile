# `make` alone prints this list. Every target makes the environment first, once.
PYTHON  ?= python3
MINUTES ?= 60
COCO    ?= data/coco
BIN     := .venv/bin
STAMP   := .venv/.installed
# A kernel named python3 is then always the environment's own, never one from the home folder.
export JUPYTER_PREFER_ENV_PATH := 1

.DEFAULT_GOAL := help
.PHONY: help env demo check test lab lint mini-clip campaign bench overfit constraints clean
# Versions that pass all tests; LATEST=1 takes what the registry has today.
PINNED  := $(if $(LATEST),,--constraint constraints.txt)

help:  ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PINNED) --editable '.[test]'
	@touch $@

env: $(STAMP)  ## create .venv and install the project into it (LATEST=1: newest libraries)

demo: env  ## run all notebooks on the mini lab and build the HTML report
	@$(BIN)/opentrans-lab run notebooks/grids/demo.yaml; status=$$?; \
	  $(BIN)/opentrans-lab report && exit $$status

check: env  ## style and the fast tests, in under three minutes
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m 'not slow' -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: env  ## run every test, the notebooks included, on up to four cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lab: env  ## open JupyterLab with the first notebook
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_index.ipynb

lint: env  ## check style
	$(BIN)/ruff check .

mini-clip: env  ## train the mini CLIP from scratch (about 20 minutes on two cores; resumes)
	$(BIN)/opentrans-lab mini-clip

campaign: env  ## run the large grids for MINUTES minutes (MINUTES=60), going on where it stopped
	$(BIN)/opentrans-lab campaign --minutes $(MINUTES)

bench: env  ## time alpha, masks, counting, steps, L_KD and mask heads against other libraries and ways
	$(BIN)/python tests/bench_alpha.py
	$(BIN)/python tests/bench_masks.py
	$(BIN)/python tests/bench_evaluate.py
	$(BIN)/python tests/bench_steps.py --out runs/bench/steps.csv
	$(BIN)/python tests/bench_heads.py --out runs/bench/heads.csv

overfit: env  ## let each framework learn 8 photographs: make overfit COCO=/data/coco (30 minutes)
	$(BIN)/python tests/overfit_coco.py $(COCO) runs/overfit

constraints: env  ## take the newest versions, try them with every test, and write constraints.txt
	$(BIN)/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	$(MAKE) test LATEST=1
	{ grep '^#' constraints.txt; $(BIN)/python -m pip freeze --all --exclude pip --exclude-editable; } > .constraints
	mv .constraints constraints.txt && touch $(STAMP)

clean:  ## remove caches and build products; runs and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -not -path './.venv/*' -prune -exec rm -rf {} +
