# `make export` and `make test` need Python 3.10+ and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out
MINUTES ?= 20

.PHONY: install export test fuzz lint clean
install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]"
	touch $@

export: $(STAMP)
	$(BIN)/sam3x export --target onnx -o $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(PYTEST_ARGS)

fuzz: $(STAMP)
	$(BIN)/python -W ignore tests/fuzz.py --minutes $(MINUTES) $(FUZZ_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typing && mkdir -p build/typing/sam3x
	ln -s $(CURDIR)/exporter/* $(CURDIR)/passes $(CURDIR)/targets build/typing/sam3x/
	$(BIN)/mypy -p sam3x

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
