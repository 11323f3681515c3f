# Everything a newcomer needs: `make demo` to see it work, `make test` to check it.
# The environment is .venv here; PYTHON chooses the interpreter it is made with.

PYTHON ?= python3

.PHONY: docs demo test test-all test-unit test-cluster test-slow test-pages check wheel install clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt scripts/install
	PYTHON=$(PYTHON) scripts/install
	touch $@

demo: install
	.venv/bin/qaic-ray demo

test: install
	scripts/test

test-unit: install
	scripts/test tests/unit

test-cluster: install
	scripts/test cluster

test-slow: install
	scripts/test slow

# Every page of the documentation, typed from top to bottom; one: scripts/test tests/pages -k quickstart
test-pages: install
	scripts/test tests/pages

test-all: install
	scripts/test all

check: install
	scripts/check

# The pages of docs/ as a site in site/, to be opened as files or served; no network is needed.
docs: install
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build
	@echo "site/index.html is the first page."

# The package as a file, as configs/cluster/dl2q.yaml carries it to the nodes of a cluster.
wheel: install
	rm -rf build dist
	.venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist site qpc runs *-kv
