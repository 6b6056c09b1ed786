"""What every room's tests share: where tinyreg.py is, which Pythons can run it, a server, a client that talks to it,
a store, and the way to wait for something."""

import contextlib
import glob
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import typing
import urllib.parse
from time import monotonic, sleep  # tests replace time's

import pytest

pytest_plugins = ["engines", "registries"]  # real clients, and what they need; other registries

HERE = os.path.dirname(os.path.abspath(__file__))
TINYREG = os.path.join(os.path.dirname(HERE), "tinyreg.py")
sys.path.insert(0, os.path.dirname(TINYREG))

# `program` needs the bytecode of tinyreg.py, also where the environment says not to write any.
sys.dont_write_bytecode = False
import tinyreg  # noqa: E402  what follows needs the path
from samples import descriptor  # noqa: E402
from tinyreg import MANIFEST_TYPES, OCI_INDEX, Digest, Directory  # noqa: E402

# Seconds until a test gives up waiting for something. Large, so that a busy machine fails no test;
# what comes is never waited for longer than it takes.
PATIENCE = 60


def memory():
    """A folder in memory, if there is one that programs run from, with room for two workers' large images; or None."""
    path = "/dev/shm"
    if os.path.isdir(path):
        disk = os.statvfs(path)
        if disk.f_bavail * disk.f_frsize >= 4 << 30 and not disk.f_flag & (os.ST_RDONLY | os.ST_NOEXEC):
            return path
    return None


# What tests write is there: none of them pulls the plug, so none needs to wait for a disk.
MEMORY = memory()
if MEMORY:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)


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


def until(condition, seconds=PATIENCE, what="what was awaited", process=None, log=None):
    """Wait until a function returns something true; returns that.

    Fails when the time is up, or when `process`, which should bring it about, has ended."""
    deadline = monotonic() + seconds
    pause = 0.001
    while True:
        is_last_look = monotonic() > deadline or (process and process.poll() is not None)
        value = condition()
        if value:
            return value
        if is_last_look:
            text = ""
            if log:
                with open(log, errors="replace") as file:
                    text = ":\n" + file.read()[-3000:]
            raise AssertionError("%s did not come to be%s" % (what, text))
        sleep(pause)
        pause = min(pause * 1.5, 0.05)


def by_digest(location, digest):
    """The target that ends an upload: the digest is added to a Location that may have a query already."""
    return location + ("&" if "?" in location else "?") + "digest=" + digest


class Answer(typing.NamedTuple):
    """What a server answered, whatever the status."""

    status: int
    headers: http.client.HTTPMessage  # headers["Name"], in any case; None where it is not there
    body: bytes

    @property
    def text(self):
        return self.body.decode()

    @property
    def json(self):
        return json.loads(self.body.decode())

    @property
    def error(self):
        """The first error of a refusal: its code, message and detail."""
        return self.json["errors"][0]

    @property
    def code(self):
        """The one error code of a refusal."""
        codes = {error["code"] for error in self.json["errors"]}
        assert len(codes) == 1
        return codes.pop()


class Client:
    """The HTTP client of all tests. It keeps its connection from request to request, unless `keep` is false.

    `where` is a Server or a URL, whose path goes before all targets. A request that gets no answer
    raises OSError, and the next one connects again. Headers are in Python's spelling (user_agent)."""

    def __init__(self, where, context=None, timeout=PATIENCE, keep=True):
        self.keep = keep
        url = urllib.parse.urlsplit(getattr(where, "url", where))
        self.prefix = url.path.rstrip("/")
        if url.scheme == "https":
            self.connection = http.client.HTTPSConnection(url.hostname, url.port, timeout=timeout, context=context)
        else:
            self.connection = http.client.HTTPConnection(url.hostname, url.port, timeout=timeout)

    def _send(self, method, target, body, headers):
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if not self.keep:
            headers["Connection"] = "close"
        if not target.startswith("/"):  # the whole URL, as some servers have it in a Location
            parts = urllib.parse.urlsplit(target)
            target = parts.path + (parts.query and "?" + parts.query)
        else:
            target = self.prefix + target
        if self.connection.sock is None:
            self.connection.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # A server that refuses the body before it has come ends that way; its answer says why.
            self.connection.request(method, target, body, headers)

    def ask(self, method, target, body=None, **headers):
        """The Answer to a request."""
        try:
            self._send(method, target, body, headers)
            response = self.connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            if isinstance(error, OSError):
                raise
            raise ConnectionError(repr(error))

    def open(self, method, target, body=None, **headers):
        """The response itself, of http.client, for who reads its body bit by bit and closes it."""
        self._send(method, target, body, headers)
        return self.connection.getresponse()

    def close(self):
        self.connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    # The registry's API, as scripts use it.

    def digest(self, name, tag):
        """What a tag points to, or None."""
        answer = self.ask("HEAD", "/v2/%s/manifests/%s" % (name, tag), accept=", ".join(MANIFEST_TYPES))
        return answer.headers["Docker-Content-Digest"] if answer.status == 200 else None

    def manifest(self, name, reference):
        return json.loads(self.manifest_bytes(name, reference).decode())

    def manifest_bytes(self, name, reference):
        """The manifest, or None."""
        answer = self.ask("GET", "/v2/%s/manifests/%s" % (name, reference), accept=", ".join(MANIFEST_TYPES))
        return answer.body if answer.status == 200 else None

    def blob(self, name, digest):
        """The blob, or None."""
        answer = self.ask("GET", "/v2/%s/blobs/%s" % (name, digest))
        return answer.body if answer.status == 200 else None

    def tags(self, name):
        return self.ask("GET", "/v2/%s/tags/list" % name).json["tags"]

    def referrers(self, name, digest):
        """The digests of the manifests about another."""
        answer = self.ask("GET", "/v2/%s/referrers/%s" % (name, digest))
        assert (answer.status, answer.headers["Content-Type"]) == (200, OCI_INDEX)
        return [entry["digest"] for entry in answer.json["manifests"]]

    def upload(self, name, content):
        """Push a blob as docker does, in a session; returns the Answer to the last request."""
        answer = self.ask("POST", "/v2/%s/blobs/uploads/" % name)
        if answer.status == 202:
            answer = self.ask("PATCH", answer.headers["Location"], content)
        if answer.status == 202:
            answer = self.ask("PUT", by_digest(answer.headers["Location"], Digest.of(content)))
        return answer

    def put_blob(self, name, content):
        """Push a blob in one request; returns its digest."""
        digest = Digest.of(content)
        answer = self.ask("POST", "/v2/%s/blobs/uploads/?digest=%s" % (name, digest), content)
        assert answer.status == 201, answer
        return digest

    def put_manifest(self, name, document, reference=None):
        """Push a manifest by its digest or under a tag; returns its descriptor and the answer's headers."""
        content = json.dumps(document).encode()
        target = "/v2/%s/manifests/%s" % (name, reference or Digest.of(content))
        answer = self.ask("PUT", target, content, content_type=document["mediaType"])
        assert answer.status == 201, answer
        return descriptor(content, document["mediaType"]), answer.headers


def ask(where, method, target, body=None, context=None, **headers):
    """The Answer to one request over a connection of its own, to a Server or below a URL."""
    with Client(where, context, keep=False) as client:
        return client.ask(method, target, body, **headers)


def get(url, **headers):
    """The Answer to a GET of a URL."""
    return ask(url, "GET", url, **headers)


def open_url(url, **headers):
    """The response to a GET of a URL, for who reads its body bit by bit and closes it."""
    return Client(url, keep=False).open("GET", url, **headers)


def workers_of(server):
    """The process ids of a server's workers."""
    with open("/proc/%d/task/%d/children" % (server.process.pid, server.process.pid)) as file:
        return [int(word) for word in file.read().split()]


def free_port():
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def program(python=sys.executable, **constants):
    """What runs tinyreg.py: with this Python, its bytecode, since to compile the file anew for each of a thousand
    processes would take a large part of a test run. `constants` replaces some of the module's."""
    if python != sys.executable and not constants:
        return [python, TINYREG]
    return [python, "-c", "import sys; sys.path[0] = %r; import tinyreg; sys.argv[0] = tinyreg.__file__; "
            "vars(tinyreg).update(%r); sys.exit(tinyreg.main())" % (os.path.dirname(TINYREG), constants)]


class Server:
    """tinyreg.py serving a root, as a process of its own on a free port; `host` is what an image name begins with.

    `limits` replaces constants of the module (IDLE_LIMIT=1), for tests that wait until one is reached."""

    def __init__(self, root, *options, python=sys.executable, listen="127.0.0.1:0", environment=None, log_path=None,
                 **limits):
        self.root = str(root)
        self.options = list(options)
        self.listen = listen
        self.environment = environment
        self.program = program(python, **limits)
        self.log_path = log_path or self.root.rstrip("/") + ".log"
        self.start()

    def start(self):
        command = self.program + ["serve", "--root", self.root, "--listen", self.listen] + self.options
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

    def ask(self, method, target, body=None, **headers):
        """The Answer to one request over a connection of its own; headers are in Python's spelling (user_agent)."""
        return ask(self, method, target, body, **headers)

    def open(self, method, target, body=None, **headers):
        """The response to a request, for who reads its body bit by bit and closes it."""
        return Client(self, keep=False).open(method, target, body, **headers)

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


# The files of tests that take longest, the longest first. They come before all others, so that in the end no worker
# is left alone with one of them.
LONGEST = ["cluster", "readme", "archive", "remote", "commands", "clients", "crash", "hosts", "mirror", "first_hour",
           "login", "gc", "carry", "distribution", "tls", "signatures", "copy", "server", "workers", "full_disk"]


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the files that have the most tests


def pytest_collection_modifyitems(items):
    """Tests of one file stay together, in their order."""
    rank = {"test_%s.py" % name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def same_process():
    """What a command or a request that ran in this process has set for its process, or thread, is undone."""
    yield
    tinyreg.HOPS.passed = None
    tinyreg.logger.handlers[:] = []
    tinyreg.logger.setLevel(logging.NOTSET)


@pytest.fixture
def root(tmp_path):
    """Where the store is, and where servers have theirs if the test says nothing else."""
    return tmp_path / "registry"


@pytest.fixture
def no_fsync(monkeypatch):
    """This process needs not survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def store(root, no_fsync):
    """A fresh store, the one that `server` serves; without fsync, because no test pulls the plug."""
    return Directory(str(root))


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


def python_that_opens(files, folder):
    """An interpreter that may have no more than so many files open, and can't allow itself more."""
    path = os.path.join(str(folder), "python-%d" % files)
    with open(path, "w") as script:
        script.write('#!/bin/sh\nulimit -n %d\nexec "%s" "$@"\n' % (files, sys.executable))
    os.chmod(path, 0o755)
    return path


def run_tinyreg(*arguments, **settings):
    """Run one tinyreg command to its end; returns the CompletedProcess with text output."""
    return subprocess.run(program(settings.pop("python", sys.executable)) + [str(word) for word in arguments],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, **settings)


