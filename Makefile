# GNU make and a POSIX shell. Everything lands in .venv/ at the root; nothing outside this directory is touched.
# An editable install, so that what runs is this checkout; it is repeated only when pyproject.toml or constraints.txt
# changed since (the stamp files in .venv/).
SHELL = /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
comma := ,
# With a database to test against, its driver is needed too.
TEST_EXTRAS := cpu,dev,simulate$(if $(NEAPTIDE_TEST_POSTGRES_URL),$(comma)postgres)
TEST_STAMP := .venv/.installed-$(subst $(comma),-,$(TEST_EXTRAS))
# ARGS="--port 8080" is passed on by `make up` and `make demo`, ARGS="-k journal" by `make test`.
ARGS ?=

.PHONY: help up demo test bench wheel clean

help:
	@echo 'make up      install into .venv/ and start Neaptide in the foreground (ARGS="--port 8080")'
	@echo 'make demo    the same install, then a day in two minutes: scale from zero, a tide, a kill, the bill (ARGS="--short")'
	@echo 'make test    format, lint, types and every test (ARGS="-k journal" narrows the tests)'
	@echo 'make bench   the benchmarks, one after the other; results in bench/results/ (docs/results.md explains them)'
	@echo 'make wheel   build dist/neaptide-VERSION-py3-none-any.whl'
	@echo 'make clean   remove .venv/, build output and caches; .neaptide/ (keys, ledger) stays'
	@echo 'PYTHON=...   the interpreter to use instead of the first of python3.11, 3.12, 3.13, python3 that will do'

up: .venv/.installed-cpu
	@exec $(BIN)/neaptide up $(ARGS)

demo: .venv/.installed-cpu
	@exec $(BIN)/neaptide demo $(ARGS)

# Two workers: tests of services wait more than they compute.
test: $(TEST_STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@exec $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

bench: $(TEST_STAMP)
	@$(BIN)/python -m bench $(ARGS)

wheel: $(TEST_STAMP)
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist

clean:
	rm -rf .venv build dist neaptide.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A shim of pyenv exists for versions that are not active, and Debian's python3 may lack ensurepip: so each is asked.
.venv/bin/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	        2>/dev/null || continue; \
	    echo "$$("$$python" -V) ($$(command -v "$$python")) -> .venv/"; \
	    exec "$$python" -m venv .venv; \
	done; \
	echo 'error: no Python 3.11, 3.12 or 3.13 with venv and ensurepip was found' >&2; \
	echo '  fix  apt-get install python3 python3-venv, or make PYTHON=/path/to/python3.12 ...' >&2; \
	exit 1

.venv/.installed-%: pyproject.toml constraints.txt | .venv/bin/python
	@echo 'installing neaptide[$(subst -,$(comma),$*)] into .venv/ (the first time takes about a minute)'
	@$(call pip_install,-e '.[$(subst -,$(comma),$*)]')
	@touch $@ .venv/.installed-cpu

# Runs pip with its log in .venv/pip.log; a terminal sees what is being fetched, a failure sees pip's own words.
define pip_install
{ $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(1) 2>&1; echo "exit $$?"; } \
    | while IFS= read -r line; do \
        case $$line in \
        'exit 0') if [ -t 1 ]; then printf '\r\033[K'; fi; exit 0 ;; \
        'exit '*) printf '\n' >&2; tail -n 20 .venv/pip.log >&2; echo 'the whole log: .venv/pip.log' >&2; exit 1 ;; \
        esac; \
        printf '%s\n' "$$line" >>.venv/pip.log; \
        if [ -t 1 ]; then printf '\r\033[K  %.76s' "$$line"; fi; \
    done
endef
