# Everything a newcomer needs: `make demo` to see it work, `make test` to check it.
# The environment is .venv here; PYTHON chooses the interpreter it is made with.

PYTHON ?= python3

.PHONY: demo test test-all test-unit test-slow check install clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt scripts/install
	PYTHON=$(PYTHON) scripts/install
	touch $@

demo: install
	.venv/bin/qaic-ray launch jobs/smollm2.yaml

test: install
	scripts/test

test-unit: install
	scripts/test tests/unit

test-slow: install
	scripts/test slow

test-all: install
	scripts/test all

check: install
	scripts/check

clean:
	rm -rf .venv qpc runs *-kv
