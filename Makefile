# Two commands are all a newcomer needs: `make demo` and `make test`. Each makes its own .venv and installs what it needs.
#   BASE_PYTHON=python3.12 make test    use another interpreter for .venv
#   make test ENV=active                use the active environment (torch already in it) instead of .venv
# `make` alone lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
BASE_PYTHON ?= python3

ifeq ($(ENV),active)
PYTHON := $(BASE_PYTHON)
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/ready
endif

# With an NVIDIA GPU, what `pip install torch` gives (it brings its triton); without one, the pair that CI pins.
TORCH := $(if $(shell command -v nvidia-smi),torch,torch==2.13.0 triton==3.7.1)

COMPAT_TORCH := 2.11.0 2.14.1

.PHONY: help demo test test-megatron gpu-test gpu2-test memcheck bench compat lint clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## train a small sparse-MLA language model on real text; writes mla-ops-demo/
	@$(PYTHON) -c "import matplotlib, tqdm" 2>/dev/null || \
	  { echo "the demo needs matplotlib and tqdm: $(PYTHON) -m pip install matplotlib tqdm" >&2; exit 2; }
	$(PYTHON) -m mla_ops demo

# One process per core, each with one thread; a file stays in one process, for the worlds of ranks it starts once. Files in
# their own order: by number of tests, the longest, of the interpreter, would come last and alone.
test: $(READY)  ## the CPU suite
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not gpu" -n auto --dist loadfile --no-loadscope-reorder

# Newer Megatron-Core needs Python 3.12; on 3.11, `make test` runs the same file against the last line that takes it.
MEGATRON_PYTHON ?= python3.12
test-megatron: .venv-megatron/ready  ## the Megatron adapter against megatron-core >= 0.19
	.venv-megatron/bin/python -m pytest tests/adapters/test_megatron*.py "tests/package/test_docs.py::test_every_python_block_of_a_page_runs[megatron]"

gpu-test: $(READY)  ## the whole contract on a CUDA device
	$(PYTHON) -m pytest -m "gpu and not gpu2"

gpu2-test: $(READY)  ## what takes two CUDA devices in one process
	$(PYTHON) -m pytest -m gpu2

# Compiled first: under the sanitizer ptxas would take minutes. Only kernels of this package are checked.
MEMCHECK = -m gpu -q tests/kernels/test_kernels_gpu.py tests/kernels/test_hopper_*gpu.py \
  -k "unusual_widths or nan or strided or split_slots or in_chunks or partial"
memcheck: $(READY)  ## representative GPU tests under compute-sanitizer
	$(PYTHON) -m pytest $(MEMCHECK)
	compute-sanitizer --tool memcheck --kernel-name kns=_s --error-exitcode 9 $(PYTHON) -m pytest $(MEMCHECK)

bench: $(READY)  ## forward and backward on the GPU beside other formulations; writes benchmarks/results/
	$(PYTHON) $(if $(shell command -v nvidia-smi),-m mla_ops bench --sweeps all,benchmarks/cpu_operator.py)

compat:  ## the lowering's code generation on the oldest and the newest torch, each in an environment of its own
	set -e; for torch in $(COMPAT_TORCH); do \
	  env=.venv-torch-$$torch; test -x $$env/bin/python || $(BASE_PYTHON) -m venv $$env; \
	  $$env/bin/python -m pip install --quiet torch==$$torch "setuptools>=77"; \
	  $$env/bin/python -m pip install --quiet --no-build-isolation --editable ".[test]"; \
	  $$env/bin/python -m pytest tests/lowering/test_lowering.py tests/lowering/test_lowering_code.py; \
	done

lint: $(READY)  ## every rule of pre-commit, and mypy on the installed package (mypy cannot follow an editable install's finder)
	$(PYTHON) -m pre_commit run --all-files --show-diff-on-failure
	site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && root=$$PWD && \
	  case $(PYTHON) in /*) python=$(PYTHON);; */*) python=$$root/$(PYTHON);; *) python=$(PYTHON);; esac && \
	  "$$python" -m pip install --quiet --no-deps --no-build-isolation --target "$$site" . && \
	  cd "$$site" && MYPYPATH="$$site" "$$python" -m mypy --config-file "$$root/pyproject.toml" -p mla_ops

.venv/ready: pyproject.toml
	@echo "== making .venv with $$($(BASE_PYTHON) --version) and installing: $(TORCH), mla_ops[demo,test,dev]"
	test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH) "setuptools>=77"
	.venv/bin/python -m pip install --quiet --no-build-isolation --editable ".[demo,test,dev]"
	touch $@

.venv-megatron/ready: pyproject.toml
	@echo "== making .venv-megatron with $$($(MEGATRON_PYTHON) --version) and installing: $(TORCH), mla_ops[test]"
	test -x .venv-megatron/bin/python || $(MEGATRON_PYTHON) -m venv .venv-megatron
	.venv-megatron/bin/python -m pip install --quiet $(TORCH) "setuptools>=77"
	.venv-megatron/bin/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

clean:  ## remove environments, builds and caches
	rm -rf .venv .venv-megatron .venv-torch-* build dist *.egg-info mla-ops-demo .pytest_cache .mypy_cache .ruff_cache
