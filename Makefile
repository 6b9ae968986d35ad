# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
DAGS   := .venv-dags
UV     := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)

.PHONY: install demo test test-dags slow lint lock lock-dags clean

install: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml
	@command -v $(UV) >/dev/null || { $(PYTHON) -m venv .uv && .uv/bin/pip install --quiet uv; }
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV)
	@$(UV) pip install --quiet --python $(VENV) --require-hashes -r requirements.lock
	@$(UV) pip install --quiet --python $(VENV) --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	$(VENV)/bin/clearshard demo demo

test: install
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

# Airflow in an environment of its own, Ray and clearshard from the other.
test-dags: install $(DAGS)/.ready
	CLEARSHARD_VENV=$(CURDIR)/$(VENV) $(DAGS)/bin/python -m pytest --confcutdir=tests/dags/with_airflow \
	    tests/dags/with_airflow

$(DAGS)/.ready: dags/requirements.lock
	@$(UV) venv --quiet --allow-existing --python $(PYTHON) $(DAGS)
	@$(UV) pip install --quiet --python $(DAGS) --require-hashes -r dags/requirements.lock
	@touch $@

slow: install
	$(VENV)/bin/python -m pytest -m slow

lint: install
	$(VENV)/bin/ruff check .

lock:
	@$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
	    --python-version 3.11 --extra test pyproject.toml -o requirements.lock

lock-dags:
	@$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
	    --python-version 3.11 dags/requirements.in -o dags/requirements.lock

clean:
	rm -rf $(VENV) $(DAGS) .uv demo
