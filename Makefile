# Everything a newcomer or CI types. `make quickstart`, `make test` and `make docs` need nothing but Python 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

# The back end: Metal comes with mlx itself; on Linux one of two wheels, never both (they own the same files).
ifeq ($(shell uname -s),Darwin)
BACKEND :=
else ifneq ($(wildcard /proc/driver/nvidia/version),)
BACKEND := cuda13,
else
BACKEND := cpu,
endif
UV := $(shell command -v uv 2>/dev/null)

.PHONY: quickstart docs test test-lowest test-slow test-examples test-models test-faults soak mutants test-gpu lint bench clean

quickstart: $(VENV)/.run
	$(BIN)/grpo train quickstart --again

# The site, in build/docs: works offline, and from the file system. A warning is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html -d build/doctrees docs build/docs
	@echo "the site: build/docs/index.html"

# Two files at a time: the tests compute with one thread each, and a file's tests share its runs and models. In the order
# of their names: xdist would leave files with few tests to the end, and those are whole runs that take a minute each.
# Containers often tell Python to keep no bytecode; each of the hundreds of processes here would compile the package again.
WITH := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python $(WITH)

test: $(VENV)/.test
	$(PYTEST)

# With the oldest versions that pyproject.toml allows, in an environment of its own.
test-lowest: $(LOWEST)/.test
	env -u PYTHONDONTWRITEBYTECODE $(LOWEST)/bin/python $(WITH)

test-slow: $(VENV)/.test
	$(PYTEST) -m "not faults and not examples"

# Every example of examples/, by the command of its README.
test-examples: $(VENV)/.test
	$(PYTEST) -m "examples or not examples" tests/examples

# Hours: every architecture of mlx-lm; the same command continues where it stopped.
test-models: $(VENV)/.test
	$(BIN)/python tests/models/train_models.py

# Whole runs with injected faults, and a checker that reads what each run wrote.
test-faults: $(VENV)/.test
	$(PYTEST) -m "faults or not faults" tests/run/faults tests/rundir/test_checkpoint_faults.py \
	  tests/run/test_hangs.py tests/run/test_patience.py

# A run whose actors are killed at random for SOAK seconds, then a clean one of the same length; prints both.
SOAK ?= 1800
soak: $(VENV)/.test
	SOAK=$(SOAK) $(BIN)/python -m pytest -s -m faults tests/run/faults/test_soak.py

# Hours: `make mutants SEED=2 COUNT=300 MODULE=rundir`; the same command continues where it stopped.
SEED ?= 0
COUNT ?= 300
mutants: $(VENV)/.test
	$(BIN)/python tests/mutants.py --seed $(SEED) --count $(COUNT) --module "$(MODULE)"

# Kernels are compiled on first use, for minutes, on one core each: so by many processes, which have their own (tests/conftest.py).
test-gpu: $(VENV)/.test
	$(PYTEST) -n 10 -m "gpu and not slow"

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.run
	$(BIN)/python -m grpo_actors.bench rollout --against mlx-lm
	$(BIN)/python -m grpo_actors.bench learner
	$(BIN)/python -m grpo_actors.bench weights

clean:
	rm -rf $(VENV) $(LOWEST)

# A stamp for each set of extras; made anew when pyproject.toml changes.
$(VENV)/.run: pyproject.toml
	$(call install,$(BACKEND)gguf)
$(VENV)/.docs: pyproject.toml
	$(call install,$(BACKEND)docs)
$(VENV)/.test: pyproject.toml
	$(call install,$(BACKEND)gguf$(comma)test$(comma)lint)
$(LOWEST)/.test: pyproject.toml
	mkdir -p $(LOWEST)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
	  | sed 's/>=/==/' > $(LOWEST)/constraints.txt
	$(call install,$(BACKEND)gguf$(comma)test,-c $(LOWEST)/constraints.txt)

comma := ,
# $(call install,EXTRAS,OPTIONS), into the folder of the target.
define install
	$(if $(UV),uv venv --quiet --allow-existing --python $(PYTHON) $(@D),$(PYTHON) -m venv $(@D))
	$(if $(UV),uv pip install --quiet --python $(@D)/bin/python,$(@D)/bin/python -m pip install --quiet) $(2) -e ".[$(1)]"
	touch $@
endef
