# Every target needs Python 3.10+ and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= out
MINUTES ?= 20

.PHONY: install demo demo-model export test test-long test-grid fuzz lint docs typing clean
install: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all]"
	touch $@

demo: $(STAMP)
	$(BIN)/sam3x demo -o $(OUT)

# hours on two cores; goes on where it was stopped
demo-model: $(STAMP)
	$(BIN)/python -m sam3x.demo.train $(TRAIN_ARGS)

export: $(STAMP)
	$(BIN)/sam3x export --target onnx -o $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not long and not grid" $(PYTEST_ARGS)

test-long: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all,tools]"
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m long $(PYTEST_ARGS)

test-grid: $(STAMP)
	$(BIN)/python -m pytest -q -n 0 -s -m grid $(PYTEST_ARGS)

fuzz: $(STAMP)
	$(BIN)/python -W ignore tests/fuzz.py --minutes $(MINUTES) $(FUZZ_ARGS)

lint: $(STAMP) typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p sam3x

docs: $(STAMP) typing
	$(BIN)/python docs/options_table.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# the folders as the package they are, for tools that read sources and know nothing of setuptools' package-dir
typing:
	rm -rf build/typing && mkdir -p build/typing/sam3x
	ln -s $(CURDIR)/exporter/* $(CURDIR)/passes $(CURDIR)/targets build/typing/sam3x/

clean:
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache
