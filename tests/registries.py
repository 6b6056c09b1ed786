"""Other registries, and proxies that spoil what goes to them and back, as fixtures of all tests."""

import contextlib
import http.server
import select
import shutil
import socket
import subprocess
import threading

import pytest

from conftest import ask, free_port, until

DISTRIBUTION = shutil.which("docker-registry")
needs_distribution = pytest.mark.skipif(not DISTRIBUTION, reason="docker-registry is not installed")

CONFIGURATION = """version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %s}, delete: {enabled: true}}
http: {addr: "127.0.0.1:%d"}
"""


def came_up(process, port):
    """Wait until a process listens on a port, or has ended; whether it lives."""
    def is_listening():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(lambda: process.poll() is not None or is_listening())
    return process.poll() is None


@pytest.fixture
def start_distribution(tmp_path):
    """A function that starts Distribution on a free port; returns its host."""
    started = []

    def start(extra=""):
        for attempt in range(5):  # a free port may be taken by another test before it is listened on
            port = free_port()
            path = tmp_path / ("distribution%d.yml" % port)
            path.write_text(CONFIGURATION % (tmp_path / ("distribution%d" % port), port) + extra)
            process = subprocess.Popen([DISTRIBUTION, "serve", str(path)], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            started.append(process)
            if came_up(process, port):
                return "127.0.0.1:%d" % port
        raise RuntimeError("docker-registry did not start")

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def distribution(start_distribution):
    return start_distribution()


class Proxy(http.server.ThreadingHTTPServer):
    """A proxy in front of a registry, which spoils what a test wants spoilt.

    `spoil(handler)` is called first for each request; it answers and returns True, or returns what to do: None, or a
    number of body bytes after which to cut the connection. `seen` has (method, path, headers), `sent` the body bytes.
    """

    daemon_threads = True
    tunnel = None  # the host to which a CONNECT leads, whatever it names

    def __init__(self, upstream, spoil=lambda handler: None):
        self.upstream, self.spoil, self.seen, self.sent = upstream, spoil, [], 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.host = "127.0.0.1:%d" % self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass

    def asked(self, method, part):
        return [path for verb, path, _ in self.seen if verb == method and part in path]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *anything):
        pass

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for name, value in dict({"Content-Length": len(body)}, **dict(headers)).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return True

    def cut(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def handle_all(self):
        server = self.server
        server.seen.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        limit = server.spoil(self)
        if limit is True or not server.upstream:
            return None
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
        if headers.get("Host") != server.host:
            headers["Host"] = server.upstream
        answer = ask("http://" + server.upstream, self.command, self.path, body, **headers)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        self.end_headers()
        part = answer.body if limit is None else answer.body[:limit]
        self.wfile.write(part)
        self.wfile.flush()
        server.sent += len(part)
        if limit is not None:
            self.cut()

    def do_CONNECT(self):
        """As a proxy that lets everything through; what comes then is for the upstream."""
        self.server.seen.append((self.command, self.path, {key.lower(): text for key, text in self.headers.items()}))
        if not self.server.upstream:
            return self.server.spoil(self)
        self.send_response(200)
        self.end_headers()
        self.close_connection = False
        if self.server.tunnel:
            self.relay(self.server.tunnel)

    def relay(self, host):
        """Pass on bytes, as they come, to a host and back."""
        self.close_connection = True
        with socket.create_connection(host.split(":")) as there:
            pairs = {self.connection: there, there: self.connection}
            while pairs:
                for sock in select.select(list(pairs), [], [])[0]:
                    block = sock.recv(65536)
                    if not block:
                        return
                    pairs[sock].sendall(block)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = handle_all


@pytest.fixture
def start_proxy():
    started = []

    def start(upstream=None, spoil=lambda handler: None):
        started.append(Proxy(upstream, spoil))
        return started[-1]

    yield start
    for proxy in started:
        proxy.shutdown()
        proxy.server_close()
