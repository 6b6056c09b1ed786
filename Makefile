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
	.venv/bin/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

bench: .venv/test
	.venv/bin/python tests/bench.py $(ARGS)

lint: .venv/lint
	.venv/bin/ruff check --no-cache
	.venv/bin/mypy --disallow-untyped-defs --allow-redefinition --cache-dir .venv/mypy tinyreg.py
	.venv/bin/vermin --target=3.6- --no-tips --violations tinyreg.py

.venv/test: Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet pytest pytest-xdist hypothesis prometheus_client
	touch $@

.venv/lint: Makefile
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet ruff==0.17.6 mypy==2.4.1 vermin==1.9.2
	touch $@

# For systemd: tinyreg with a user of its own, its store in /var/lib/tinyreg, its options (TINYREG_LISTEN=:5000 and so
# on) in /etc/default/tinyreg, and nothing of the host that it does not need.
define UNIT
[Unit]
Description=tinyreg, a container registry
After=network.target
RequiresMountsFor=/var/lib/tinyreg

[Service]
Type=notify
NotifyAccess=all
EnvironmentFile=-/etc/default/tinyreg
Environment=TINYREG_ROOT=/var/lib/tinyreg
ExecStart=$(PREFIX)/bin/tinyreg serve
ExecReload=/bin/kill -HUP $$MAINPID
WatchdogSec=60
Restart=on-failure
KillMode=mixed
TimeoutStopSec=60
LimitNOFILE=65536
DynamicUser=yes
StateDirectory=tinyreg
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes

[Install]
WantedBy=multi-user.target
endef
export UNIT

install:
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/lib/systemd/system"
	install -m 755 tinyreg.py "$(DESTDIR)$(PREFIX)/bin/tinyreg"
	printf '%s\n' "$$UNIT" > "$(DESTDIR)$(PREFIX)/lib/systemd/system/tinyreg.service"

clean:
	rm -rf .venv .pytest_cache .hypothesis __pycache__ tests/__pycache__

.PHONY: help test bench lint install clean
