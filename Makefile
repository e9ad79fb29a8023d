# Everything from a clean clone: each target makes the virtual environment it needs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: test framework test-integrations test-theirs fingerprints demo paper bench sanitize lint kernels wheel compat clean

# torch first and pinned: autograd's node is built for it
$(VENV)/ready: setup.py pyproject.toml Makefile unigen_fast/_build.py unigen_fast/_ops.py $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" $(TRITON) "setuptools>=77" ninja ruff mypy
	$(BIN)/pip install -q -e ".[demo,bench,test]"
	$(BIN)/python -m unigen_fast info
	touch $@

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n auto --dist worksteal tests

# docs/framework.md, of what the tests of PyTorch's features find
framework: $(VENV)/ready
	$(BIN)/python -m pytest -q -n auto --dist worksteal tests/test_framework.py --framework-table docs/framework.md

# against the libraries that ours stands in for, in an environment of their own
INTEGRATIONS = build/integrations
$(INTEGRATIONS)/ready: $(VENV)/ready
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/pip install -q "$(TORCH)" numpy pytest scipy mpmath mlxtend arviz scvi-tools pydantic imageio \
		diffusers pyro-ppl lightning pytorch-lightning matplotlib nltk scikit-image tensorboard cloudpickle orjson pyvers \
		importlib_metadata zipp
	$(INTEGRATIONS)/bin/pip install -q --no-deps pythae multivae torchrl tensordict torchgan torch-mimicry taming-transformers
	touch $@

test-integrations: $(INTEGRATIONS)/ready
	PYTHONPATH=. $(INTEGRATIONS)/bin/python -m pytest -q -rs tests/integrations tests/test_third_party.py tests/test_importance.py

# the libraries' own tests of these functions, with ours in place, where the source distribution has any
THEIRS = PYTHONPATH=$(CURDIR):$(CURDIR)/tests/integrations TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 \
	$(abspath $(INTEGRATIONS))/bin/python -m pytest -q -p no:cacheprovider -p theirs
SOURCES = $(INTEGRATIONS)/sources
test-theirs: $(INTEGRATIONS)/ready
	$(INTEGRATIONS)/bin/pip download -q --no-deps --no-binary :all: -d $(SOURCES) multivae scvi-tools
	for archive in $(SOURCES)/*.tar.gz; do tar xzf $$archive -C $(SOURCES); done
	cd $(SOURCES)/multivae-*/ && $(THEIRS) --patch multivae tests/test_mmvae_model.py tests/test_cvae.py
	cd $(SOURCES)/scvi_tools-*/ && $(THEIRS) -p rich.pretty --patch scvi tests/distributions tests/module/test_vae.py \
		tests/model/test_scvi.py

# the functions of the libraries' newest releases, read out of their wheels: are they those that ours was compared with
fingerprints: $(VENV)/ready
	$(BIN)/python tests/integrations/fingerprints.py

demo: $(VENV)/ready
	$(BIN)/python -m unigen_fast demo --output demo-output

# the paper's Tables 2 and 3 on 5000 digits, and README's tables of them
paper: $(VENV)/ready
	$(BIN)/python examples/paper/gan.py
	$(BIN)/python examples/paper/vae.py
	$(BIN)/python examples/paper/memorization.py
	$(BIN)/python examples/paper/tried.py
	$(BIN)/python examples/paper/report.py

bench: $(VENV)/ready
	$(BIN)/python -m unigen_fast bench --all --passes 3 --json benches/results/cpu.json --plot benches/results/cpu.png
	UNIGEN_FAST_DISABLE=cpu,cuda,triton,autograd $(BIN)/python -m unigen_fast bench --all --no-compile --passes 3 \
		--json benches/results/without_kernels.json
	$(BIN)/python -m unigen_fast bench --readme

# the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; ARGS: what Python is to run on them
ARGS ?= -m pytest -q -x tests/test_likelihood.py tests/test_divergence.py tests/test_categorical.py tests/test_importance.py
sanitize: $(VENV)/ready
	$(BIN)/python tests/cpu_unit.py --sanitize $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/mypy

# every CUDA and Triton kernel, compiled for GPUs that need not be here
TRITON_TARGETS ?= sm_80 sm_90 gfx942
OTHER_TRITON ?= 3.6.0 newest
kernels: $(VENV)/ready
	$(BIN)/python benches/compile_cuda.py
	$(BIN)/python benches/compile_triton.py $(TRITON_TARGETS:%=--target %)
	set -e; for release in $(OTHER_TRITON); do \
		$(BIN)/python benches/compile_triton.py --triton $$release --front-end --target sm_90; done

# source distribution and wheel, built without torch, and what a package index would say of them
RELEASE = build/release
wheel:
	test -x $(RELEASE)/bin/python || $(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install -q build twine check-wheel-contents auditwheel
	rm -rf dist
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/check-wheel-contents dist/*.whl
	$(RELEASE)/bin/auditwheel show dist/*.whl

# that wheel under other Pythons and other torches, each in an environment of its own: docs/compatibility.md. Gigabytes.
COMPAT ?= python3.10=2.10.0 python3.11=2.13.0 python3.11=2.14.1 python3.12=2.12.0 python3.13=2.13.0
compat: wheel
	$(PYTHON) tests/compatibility.py dist/*.whl $(COMPAT)

clean:
	rm -rf $(VENV) build demo-output *.egg-info dist unigen_fast/*.so unigen_fast/_build_report.json
