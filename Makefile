# tinyreg needs no building: tinyreg.py runs as it is. What is here is for those who work on it, and for packagers.

PREFIX  = /usr/local
DESTDIR =
PYTHON  = python3
JOBS    = auto
ARGS    =

help:
	@echo "make test      run all tests, on all cores (JOBS=1: one after another; ARGS='-k NAME': some of them)"
	@echo "make bench     measure the speed of transfers, beside docker-registry's"
	@echo "make lint      check the style, the types, and that tinyreg.py runs on Python 3.6"
	@echo "make install   copy tinyreg.py to $(DESTDIR)$(PREFIX)/bin/tinyreg, with a systemd unit (PREFIX=, DESTDIR=)"
	@echo "make clean     delete what the above leave behind"

# The tools live in .venv. Each stamp says that its tools are there, for this version of this file.

test: .venv/test
	.venv/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

bench: .venv/test
	.venv/bin/python tests/bench.py $(ARGS)

lint: .venv/lint
	.venv/bin/ruff check --no-cache
	.venv/bin/mypy --disallow-untyped-defs --allow-redefinition --cache-dir .venv/mypy tinyreg.py
	.venv/bin/vermin --target=3.6- --no-tips --violations tinyreg.py

.venv/test: Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet pytest pytest-xdist hypothesis prometheus_client "moto[server]"
	touch $@

.venv/lint: Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet ruff==0.17.6 mypy==2.4.1 vermin==1.9.2
	touch $@

install:
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/lib/systemd/system"
	install -m 755 tinyreg.py "$(DESTDIR)$(PREFIX)/bin/tinyreg"
	$(PYTHON) tinyreg.py help systemd | sed 's|/usr/local/|$(PREFIX)/|' > "$(DESTDIR)$(PREFIX)/lib/systemd/system/tinyreg.service"

clean:
	rm -rf .venv .pytest_cache .hypothesis __pycache__ tests/__pycache__

.PHONY: help test bench lint install clean
