# make demo    sets everything up, draws the built-in data set, pre-trains on it, evaluates, writes a report
# make test    sets everything up, passes the tests
# make lint    ruff and mypy
# make kernels compiles every Triton kernel ahead of time, without a GPU, and prints its registers; fails where they spill
# make wheel   dist/*.whl with the compiled operators, for machines without a compiler
# make bench   the benchmarks, as far as this machine goes; results under benchmarks/results/
# make gpu     on a machine with a GPU: the model on its kernels, the step and the operators timed, the GPU tests; results under benchmarks/results/
# make install only sets up: .venv with the versions of constraints.txt, the compiled operators where a compiler is there
#
#   PYTHON=python3.12     the Python to make .venv with (3.11 or 3.12)
#   STACK=torch211        torch 2.11 for CUDA 13 instead of 2.10 for CUDA 12.8, without DALI, xformers and faiss; in .venv-torch211
#   PY=python3            run with an environment you have; nothing is installed
#   ARGS="..."            handed on to the demo, or to pytest
#   PARTS="tests step"    of make gpu only these; all: model step operators loading convergence tests backbones fidelity profile
#   DRY_RUN=1             make gpu on the CPU, its tests skipped, its results under build/dry-run

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := install
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: install demo test lint kernels wheel bench gpu clean

PYTHON ?= python3
STACK ?= default
NEEDED_GB := 10
ALL_PARTS := model step operators loading convergence tests backbones fidelity profile
PARTS ?= $(ALL_PARTS)

ifeq ($(STACK),default)
CONSTRAINTS := constraints.txt
VENV := .venv
EXTRAS := gpu,dev
else ifeq ($(STACK),torch211)
CONSTRAINTS := constraints-torch211.txt
VENV := .venv-torch211
EXTRAS := dev
else
$(error STACK=$(STACK) is unknown: default or torch211)
endif

ifdef PY
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels
READY :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.installed $(VENV)/.extension
endif

BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

install: $(READY)

# setuptools first and no build isolation: every version comes from the constraints, those of the build too.
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || version=missing
	case $$version in 3.11|3.12) ;; *)
	  echo "PersonMAE needs Python 3.11 or 3.12, and $(PYTHON) is $$version. Name another: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" >&2; exit 1;;
	esac
	if [ ! -d $(VENV)/lib ]; then
	  free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}')
	  if [ $$free -lt $(NEEDED_GB) ]; then
	    echo "The environment takes about $(NEEDED_GB) GB (torch and CUDA's libraries), and $(CURDIR) has $$free GB free: make room, or clone to another disk." >&2; exit 1
	  fi
	fi
	echo "Setting up $(VENV) with Python $$version: some minutes and about $(NEEDED_GB) GB, once."
	$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment (Debian: apt-get install python3-venv)." >&2; exit 1; }
	export PIP_DISABLE_PIP_VERSION_CHECK=1
	$(PY) -m pip install -q -c $(CONSTRAINTS) setuptools
	PERSONMAE_NO_EXTENSION=1 $(PY) -m pip install -c $(CONSTRAINTS) --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

# Made only when there is an extension: setup.py may leave it out, and then the next call tries again.
$(VENV)/.extension: $(VENV)/.installed setup.py $(wildcard csrc/*)
	@$(PY) setup.py -q build_ext --inplace
	if compgen -G 'kernels/personmae_kernels/_C*.so' >/dev/null; then touch $@; fi

demo: $(READY)
	@$(PY) -m personmae demo $(ARGS)

STARTS_PROGRAMS := tests/test_layout.py tests/test_demo.py tests/test_pretrain.py tests/test_unsupervised.py \
  -k "test_layout or test_demo or (test_pretrain and (leaves or mistakes or processes)) or (test_unsupervised and processes)"

# What starts programs, twice: with PYTHONSAFEPATH=1 the folder of a started program is not on the path, as some launchers have it.
test: $(READY)
	# One process for each core, the tests of a file together; torch's own threads would only crowd them.
	parallel=$$($(PY) -c 'import xdist' 2>/dev/null && echo "-n auto --dist loadfile --no-loadscope-reorder" || true)
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
	PYTHONSAFEPATH=1 $(PY) -m pytest -q $$parallel $(STARTS_PROGRAMS)
	$(PY) -m pytest --durations=20 $$parallel $(ARGS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy

kernels: $(READY)
	@$(PY) benchmarks/operators.py --compile-only

# One wheel for every torch from 2.10 on and Python 3.11 and 3.12 (stable ABI), with CUDA operators where nvcc is here.
wheel: $(READY)
	@$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	ls -1 dist/*.whl

bench: $(READY)
	@for benchmark in $(BENCHMARKS); do echo "$$benchmark"; $(PY) $$benchmark; done

# Its results may not overwrite those under benchmarks/results/ with what a CPU gives.
gpu: $(READY)
	@results=$(if $(DRY_RUN),build/dry-run,benchmarks/results)
	$(PY) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || [ -n "$(DRY_RUN)" ] || {
	  echo "There is no CUDA device here (torch.cuda.is_available() is False): run this on a machine with an NVIDIA GPU, or with DRY_RUN=1," >&2
	  echo "which runs all of it on the CPU, its tests skipped, to see whether the commands work." >&2; exit 1; }
	# Each part has its own time, and what fails does not keep the others from their results.
	failed=0
	part() {
	  case " $(PARTS) " in *" $$1 "*) ;; *) return 0;; esac
	  echo "== $$*"
	  timeout $$(($$2 * $(if $(DRY_RUN),5,1))) "$${@:3}" || { echo "== failed ($$?): $$*"; failed=1; }
	}
	for name in $(PARTS); do
	  case " $(ALL_PARTS) " in *" $$name "*) ;; *) echo "there is no part $$name; there are: $(ALL_PARTS)" >&2; exit 2;; esac
	done
	part model 200 $(PY) -m pytest -q tests/test_fused_model.py tests/test_gradients.py tests/test_optimisers.py tests/ops/test_launching.py
	part step 400 $(PY) benchmarks/throughput.py --output $$results/throughput.json
	part operators 400 $(PY) benchmarks/operators.py --output $$results/operators.json
	part loading 200 $(PY) benchmarks/loading.py --num-turns 3 --num-cores $$(nproc) --output $$results/loading.json
	part convergence 120 $(PY) -m pytest -q tests/test_fused_convergence.py
	part tests 400 $(PY) -m pytest -q -m gpu $(ARGS)
	part backbones 100 $(PY) benchmarks/backbones.py --output $$results/backbones-gpu.json
	# A dry run is on the CPU, where the size of a GPU would take hours.
	fidelity=$(if $(DRY_RUN),"--num-unlabelled 200 --num-test-ids 10 --seeds 0 --steps 50","--device cuda --preset vit-small --size 256 128 --batch-size 64 --num-test-ids 40 --num-unlabelled 2000 --jobs 2")
	part fidelity 480 $(PY) benchmarks/fidelity.py $$fidelity --output $$results/fidelity-gpu.json
	part profile 90 $(PY) benchmarks/step_profile.py --output $$results/step-profile.json
	exit $$failed

clean:
	rm -rf .venv .venv-torch211 build dist ./*.egg-info kernels/*.egg-info kernels/personmae_kernels/_C.*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
