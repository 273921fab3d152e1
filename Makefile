# `make book` and `make test` set up all they need. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable
AXE := 4.14.1
PORTABLE := tests/test_rng.py $(addprefix tests/,by_hand core data methods models own wire) tests/runs/test_records.py
NIGHT := fedmrn fedsparse feddq fedpt fedcompress

# Targets are relative to this folder: names with a space in them, as the path of a clone may have, cannot be targets.
# On Windows, where CI calls `portable`, programs lie elsewhere; the recipes run in Git's shell.
WINDOWS := $(filter Windows_NT,$(OS))
PROGRAMS := $(if $(WINDOWS),Scripts,bin)
BIN := $(VENV)/$(PROGRAMS)
PIP := $(BIN)/pip$(if $(WINDOWS),.exe)
STAMP := $(VENV)/.stamp
FLEET := $(VENV)-fleet
PYTEST := python -m pytest -n 2 --dist loadfile
HTML := book/_build/html
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(BIN)$(if $(WINDOWS),;,:)$(PATH)

.DEFAULT_GOAL := help
.PHONY: help book test test-fleet check lint portable smoke lab night labs bench bench-fleet serve links publish dist clean env fleet data extra chromium axe

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

book: env data ## run the pipeline and build the book
	dvc repro
	@echo "The book: $(CURDIR)/$(HTML)/index.html"

test: env chromium axe ## run all tests; where no book is built yet, the browser tests get one of profile smoke
	@test -n "$$FEDLIB_BOOK" || test -f $(HTML)/index.html || test -f .smoke/$(HTML)/index.html || $(MAKE) smoke
	test -n "$$FEDLIB_BOOK" || test -f $(HTML)/index.html || export FEDLIB_BOOK=.smoke/$(HTML); $(PYTEST)

test-fleet: fleet ## test real clients: Flower's processes on this machine, in an environment of their own
	$(FLEET)/bin/python -m fedlib data get fashion-mnist
	$(FLEET)/bin/python -m pytest -n 2 --dist loadfile tests/fleet

check: lint ## format, lint, types and the fast tests
	$(PYTEST) -m "not slow and not browser"

lint: env ## format, lint and types
	ruff format --check
	ruff check
	mypy

portable: env ## the fast tests of what trains, counts bytes and writes records, on any system that Python runs on
	$(BIN)/$(PYTEST) -m "not slow and not browser" $(PORTABLE)

smoke: env data ## the whole pipeline in seconds a run, in a copy (.smoke)
	$(in-a-copy)

lab: env data extra ## the whole pipeline with everything trained anew, in a copy (.lab)
	$(in-a-copy)

night: env data ## train profile night, some hours a paper; stop it and start it again at will
	set -e; for paper in $(NIGHT); do nice python -m fedlib run $$paper --profile night; done

# The profile is the target's name. Records are left out, so that everything is trained. Without Git, as in a downloaded
# archive, or in a repository that is not ours: all but what is made here.
MADE := .git .venv .venv-fleet .cache .dvc/cache .dvc/tmp .smoke .lab data data-extra records labs book/_build build dist node_modules
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

bench-fleet: fleet ## measure what real clients cost, in seconds and in bytes on the wire
	$(FLEET)/bin/python bench/flower.py

serve: ## show the built book at a local address
	@test -f $(HTML)/index.html || { echo "There is no book yet: run make book" >&2; exit 1; }
	$(PYTHON) -m http.server --bind 127.0.0.1 --directory $(HTML) $(PORT)

links: book ## look whether the addresses that the book links to still answer
	jupyter-book build book --builder linkcheck

publish: ## push the built book to branch gh-pages of origin, without a history
	@test -f $(HTML)/index.html || { echo "There is no book yet: run make book" >&2; exit 1; }
	$(publish-pages)

# By an index of its own, so that neither the checkout nor what is staged in it changes.
define publish-pages
@set -e; export GIT_DIR="$$(git rev-parse --absolute-git-dir)" GIT_WORK_TREE=. GIT_INDEX_FILE="$$PWD/.cache/pages-index"; \
mkdir -p .cache; rm -f .cache/pages-index; cd $(HTML); touch .nojekyll; git add --all --force .; \
export GIT_AUTHOR_NAME="$$(git log -1 --format=%an)" GIT_AUTHOR_EMAIL="$$(git log -1 --format=%ae)"; \
export GIT_COMMITTER_NAME="$$GIT_AUTHOR_NAME" GIT_COMMITTER_EMAIL="$$GIT_AUTHOR_EMAIL"; \
commit=$$(git commit-tree "$$(git write-tree)" -m "Publish the book of $$(git rev-parse --short HEAD)"); \
git push --force origin "$$commit:refs/heads/gh-pages"
endef

dist: book ## wheel, source, book and records as archives, in dist
	rm -rf dist build && mkdir dist
	python -c "from setuptools.build_meta import build_sdist, build_wheel; build_sdist('dist'); build_wheel('dist')"
	set -e; stem=fedlib-$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml); \
	tar -czf dist/$$stem-book.tar.gz -C $(HTML) --transform "s,^\.,$$stem-book," .; \
	tar -czf dist/$$stem-records.tar.gz --exclude=smoke --exclude='*.unfinished' --transform "s,^,$$stem-records/," \
	  CITATION.cff LICENSE experiments published records scores
	rm -rf build

clean: ## remove what the pipeline made; keep environment, data and records
	rm -rf book/_build book/papers/*.ipynb book/papers/figures book/compare/*.ipynb .smoke .lab .cache .dvc/cache .dvc/tmp dvc.lock
	rm -rf .pytest_cache .hypothesis .mypy_cache .ruff_cache build dist

env: $(STAMP)

fleet: $(FLEET)/.stamp ## install the environment of real clients, with Flower (.venv-fleet)

$(STAMP): requirements.lock | $(PIP)
$(FLEET)/.stamp: requirements-fleet.lock | $(FLEET)/bin/pip

$(STAMP) $(FLEET)/.stamp:
	$(@D)/$(PROGRAMS)/python -m pip install --no-deps -r $<
	$(@D)/$(PROGRAMS)/python -m pip install --no-deps --no-build-isolation -e .
	$(@D)/$(PROGRAMS)/python -m pip check
	@touch $@

$(PIP) $(FLEET)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.11. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(@D:/$(PROGRAMS)=)

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
