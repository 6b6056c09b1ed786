"""What every room's tests share: where tinyreg.py is, which Pythons can run it, and a server to talk to."""

import glob
import os
import re
import signal
import subprocess
import sys
import time

import pytest

pytest_plugins = ["engines"]  # real clients, and what they need

HERE = os.path.dirname(os.path.abspath(__file__))
TINYREG = os.path.join(os.path.dirname(HERE), "tinyreg.py")
sys.path.insert(0, os.path.dirname(TINYREG))


def found_pythons():
    """One interpreter of each minor version from 3.6 on that this machine has: {(3, 6): path, ...}."""
    candidates = [sys.executable, "/usr/bin/python3"]
    candidates += sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python")))
    found = {}
    for path in candidates:
        if not os.access(path, os.X_OK):
            continue
        shown = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2])"],
                               stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
        version = tuple(int(part) for part in shown.split())
        if version >= (3, 6):
            found.setdefault(version, path)
    return found


class Server:
    """tinyreg.py serving a root, as a process of its own on a free port; `host` is what an image name begins with.

    `limits` replaces constants of the module (IDLE_LIMIT=1), for tests that wait until one is reached."""

    def __init__(self, root, *options, python=sys.executable, listen="127.0.0.1:0", environment=None, **limits):
        self.root = str(root)
        self.options = list(options)
        self.python = python
        self.listen = listen
        self.environment = environment
        self.program = [TINYREG]
        if limits:
            self.program = ["-c", "import sys; sys.path.insert(0, %r); import tinyreg; vars(tinyreg).update(%r); "
                            "sys.exit(tinyreg.main())" % (os.path.dirname(TINYREG), limits)]
        self.log_path = self.root.rstrip("/") + ".log"
        self.start()

    def start(self):
        command = [self.python] + self.program + ["serve", "--root", self.root, "--listen", self.listen] + self.options
        environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1", **(self.environment or {}))
        with open(self.log_path, "a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment,
                                            universal_newlines=True)
        self.banner = ""
        for line in self.process.stdout:
            self.banner += line
            found = re.search(r"https?://(\S+):(\d+)", line)
            if found:
                self.port = int(found.group(2))
                self.host = "127.0.0.1:%d" % self.port
                self.url = found.group(0).split("//")[0] + "//" + self.host
                return
        raise RuntimeError("the server did not start:\n%s%s" % (self.banner, self.log()))

    def log(self):
        with open(self.log_path) as log:
            return log.read()

    def stop(self, how=signal.SIGTERM):
        """End the server in order (or not: SIGKILL); returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(timeout=60)
        self.banner += self.process.stdout.read()
        self.process.stdout.close()
        return self.process.returncode

    def restart(self, how=signal.SIGTERM):
        """Stop, and serve the same root on the same port again."""
        self.stop(how)
        self.listen = self.host
        self.start()


@pytest.fixture
def start_server(tmp_path):
    """A function that starts servers; all that it started are ended with the test."""
    started = []

    def start(root=None, *options, **settings):
        server = Server(root or tmp_path / "registry", *options, **settings)
        started.append(server)
        return server

    yield start
    for server in started:
        if server.process.poll() is None:
            server.stop(signal.SIGKILL)


@pytest.fixture
def server(start_server):
    """A fresh registry on a free port of 127.0.0.1, in which anyone may do everything."""
    return start_server()


def until(condition, seconds=20):
    """Wait for a condition; returns its value."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return condition()


def run_tinyreg(*arguments, **settings):
    """Run one tinyreg command to its end; returns the CompletedProcess with text output."""
    return subprocess.run([settings.pop("python", sys.executable), TINYREG] + [str(word) for word in arguments],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, **settings)


