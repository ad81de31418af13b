# The first two targets are all that a newcomer needs; each works on a fresh clone.
export MPLBACKEND ?= Agg
# Another Python, as in `make test PYTHON=python3.12`, has an environment of its own.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
NOTEBOOKS := $(wildcard nbs/*.ipynb)
GENERATE := $(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/nbdev_clean --fname kaggle && $(BIN)/python .ci/readme.py
DATA_FLAG := $(if $(MGMT_FAST_DATA),--flags real)

.PHONY: demo test check nbs
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/mgmt_demo

# Tests write gigabytes: into a folder of their own, which goes with them.
test: check
	tmp=$$(mktemp -d) && trap "rm -rf $$tmp" EXIT && export TMPDIR=$$tmp OMP_NUM_THREADS=1 && \
	$(BIN)/nbdev_test $(DATA_FLAG) --n_workers 2 && rm -rf $$tmp/* && \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -o tmp_path_retention_policy=failed tests

# What is generated must be what is committed, and no line is wider than 120 characters.
check: $(VENV)/installed
	@before=$$(git status --porcelain; git diff | cksum); \
	$(GENERATE) || exit 1; \
	after=$$(git status --porcelain; git diff | cksum); \
	[ "$$before" = "$$after" ] || { echo "generated files were out of date; commit what changed:"; git status --short; exit 1; }
	$(BIN)/python -m pytest -q tests/test_house.py -k fit

# Readers see the saved outputs, so run everything in place, then clean.
nbs: $(VENV)/installed
	env -u MPLBACKEND MGMT_FAST_HOME=$$(mktemp -d) $(BIN)/jupyter nbconvert --to notebook --execute --inplace $(NOTEBOOKS) kaggle/*/*.ipynb
	$(GENERATE)

$(VENV)/installed: settings.ini setup.py
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
