# `make book` and `make test` set up all they need. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
AXE := 4.14.1
NIGHT := fedmrn fedsparse feddq fedpt fedcompress

# Targets are relative to this folder: names with a space in them, as the path of a clone may have, cannot be targets.
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PYTEST := python -m pytest -n 2 --dist loadfile
HTML := book/_build/html
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help book test check lint smoke lab night labs bench serve clean env data extra chromium axe

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

book: env data ## run the pipeline and build the book
	dvc repro
	@echo "The book: $(CURDIR)/$(HTML)/index.html"

test: env chromium axe ## run all tests; where no book is built yet, the browser tests get one of profile smoke
	@test -n "$$FEDLIB_BOOK" || test -f $(HTML)/index.html || test -f .smoke/$(HTML)/index.html || $(MAKE) smoke
	test -n "$$FEDLIB_BOOK" || test -f $(HTML)/index.html || export FEDLIB_BOOK=.smoke/$(HTML); $(PYTEST)

check: lint ## format, lint, types and the fast tests
	$(PYTEST) -m "not slow and not browser"

lint: env ## format, lint and types
	ruff format --check
	ruff check
	mypy

smoke: env data ## the whole pipeline in seconds a run, in a copy (.smoke)
	$(in-a-copy)

lab: env data extra ## the whole pipeline with everything trained anew, in a copy (.lab)
	$(in-a-copy)

night: env data ## train profile night, some hours a paper; stop it and start it again at will
	set -e; for paper in $(NIGHT); do nice python -m fedlib run $$paper --profile night; done

# The profile is the target's name. Records are left out, so that everything is trained. Without Git, as in a downloaded
# archive, or in a repository that is not ours: all but what is made here.
MADE := .git .venv .cache .dvc/cache .dvc/tmp .smoke .lab data data-extra records labs book/_build node_modules
define in-a-copy
rm -rf .$@ && mkdir .$@
if test "$$(git rev-parse --show-toplevel 2>/dev/null)" = "$$(pwd -P)"; then \
  git ls-files -z --cached --others --exclude-standard -- ':!records' | tar --null --files-from=- -c; \
else tar -c $(MADE:%=--exclude=./%) .; fi | tar -x -C .$@
mkdir -p data-extra && ln -s ../data ../data-extra .$@
sed -i 's/^profile: .*/profile: $@/' .$@/params.yaml
cd .$@ && PYTHONPATH="$$PWD" dvc repro
@echo "The book: $(CURDIR)/.$@/$(HTML)/index.html"
endef

labs: env ## write the lab notebooks, without solutions and with them, into labs
	python -m fedlib labs

bench: env ## measure speed and size
	python bench/entropy.py
	python bench/payload.py
	python bench/primitives.py
	python bench/rotation.py
	python bench/quantize.py
	python bench/clustering.py
	python bench/clustered_training.py
	python bench/inference.py
	python bench/compare.py
	python bench/server.py
	python bench/own.py
	python bench/local_training.py
	python bench/precision.py
	python bench/partial.py
	python bench/engines.py
	python bench/population.py
	python bench/pfl/run.py
	python bench/book.py

serve: ## show the built book at a local address
	@test -f $(HTML)/index.html || { echo "There is no book yet: run make book" >&2; exit 1; }
	$(PYTHON) -m http.server --bind 127.0.0.1 --directory $(HTML) $(PORT)

clean: ## remove what the pipeline made; keep environment, data and records
	rm -rf book/_build book/papers/*.ipynb book/papers/figures book/compare/*.ipynb .smoke .lab .cache .dvc/cache .dvc/tmp dvc.lock
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache

env: $(STAMP)

$(STAMP): requirements.lock | $(BIN)/pip
	$(BIN)/python -m pip install --no-deps -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.11. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

data: env
	python -m fedlib data get fashion-mnist

# What one of the papers' runs take beside it, where their records are left out or stale.
extra: env
	python -m fedlib data get spoken-digits

# Takes the Chromium that is there, or installs Debian's as root. Never fails: the tests that need it then say so.
chromium:
	@test -z "$$FEDLIB_CHROMIUM" || exit 0; \
	for browser in $(BROWSERS); do command -v $$browser >/dev/null && exit 0; done; \
	root=no; test "$$(id -u)" = 0 && root=; test -n "$$root" && sudo -n true 2>/dev/null && root="sudo -n"; \
	test "$$root" != no && command -v apt-get >/dev/null && $$root apt-get update -q && \
	  $$root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends chromium && exit 0; \
	echo "*****" >&2; \
	echo "No Chromium here and no right to install one: THE BROWSER TESTS WILL BE SKIPPED." >&2; \
	echo "To run them: install Chromium, or name one with FEDLIB_CHROMIUM=/path/to/chromium, and run make test again." >&2; \
	echo "*****" >&2

# axe-core, which looks for what bars readers from a page. Never fails either.
axe:
	@! grep -qs '"version": "$(AXE)"' .cache/axe/node_modules/axe-core/package.json || exit 0; \
	command -v npm >/dev/null && \
	  npm install --prefix .cache/axe --no-save --no-package-lock --ignore-scripts --no-audit --no-fund axe-core@$(AXE) && exit 0; \
	echo "*****" >&2; \
	echo "axe-core could not be fetched with npm: THE TESTS OF ACCESSIBILITY WILL BE SKIPPED." >&2; \
	echo "*****" >&2
