"""Server: raw bytes over real sockets to a real process. What is refused as malformed is in test_hostile.py."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import time

import pytest

from conftest import PATIENCE, by_digest, until, workers_of
from samples import make_image, push_blob
from tinyreg import DOCKER_MANIFEST, DOCKER_SCHEMA1, MAX_DRAIN, OCI_INDEX, OCI_MANIFEST, Digest, Directory

SHORT = {"TICK": 1.0, "IDLE_LIMIT": 1.0, "HEAD_LIMIT": 1.0, "LINGER_LIMIT": 1.0, "PACE_WINDOW": 2.0}
LARGE = bytes(range(256)) * (24 << 12)  # 24 MiB, more than the sockets' buffers hold
LARGE_DIGEST = Digest.of(LARGE)


class Reply:
    """A response as it came: version, status, headers (a list, and a dict with names in lower case), body."""

    def __init__(self, head, body):
        status_line, *lines = head.decode("latin-1").split("\r\n")
        self.version, status, self.reason = status_line.split(" ", 2)
        self.status = int(status)
        self.lines = [tuple(line.split(": ", 1)) for line in lines]
        self.headers = {name.lower(): value for name, value in self.lines}
        assert len(self.headers) == len(self.lines), "a header came twice"
        self.body = body

    @property
    def code(self):
        return json.loads(self.body.decode())["errors"][0]["code"]


class Wire:
    """A client that sends just what it is told to, and reads what comes back byte by byte."""

    def __init__(self, server, host="127.0.0.1"):
        self.sock = socket.create_connection((host, server.port), timeout=PATIENCE)
        self.buffer = b""

    def send(self, *lines, body=b""):
        """Send a request of these lines and this body, in one write."""
        self.sock.sendall("\r\n".join(lines + ("", "")).encode("latin-1") + body)

    def _receive(self):
        block = self.sock.recv(1 << 16)
        if not block:
            raise EOFError(self.buffer[:300])
        self.buffer += block

    def head(self):
        """The next block up to an empty line."""
        while b"\r\n\r\n" not in self.buffer:
            self._receive()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        return head

    def reply(self, method="GET"):
        """The next response, with the body that its headers announce."""
        head = self.head()
        reply = Reply(head, b"")
        if method == "HEAD" or reply.status in (204, 304):
            return reply
        blocks, left = [], int(reply.headers["content-length"])
        while left:
            if not self.buffer:
                self._receive()
            block, self.buffer = self.buffer[:left], self.buffer[left:]
            blocks.append(block)
            left -= len(block)
        reply.body = b"".join(blocks)
        return reply

    def ask(self, line, *headers, body=b""):
        """Send a request with a Host, and a Content-Length if it has a body; the reply to it."""
        if body:
            headers += ("Content-Length: %d" % len(body),)
        self.send(line + " HTTP/1.1", "Host: localhost", *headers, body=body)
        return self.reply(line.split()[0])

    def is_closed(self):
        """Wait for the server to close, in order; whether nothing came before that."""
        assert self.buffer == b""
        return self.sock.recv(1) == b""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.sock.close()


@pytest.fixture
def connect():
    """A function that opens a Wire; all are closed with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda server, host="127.0.0.1": stack.enter_context(Wire(server, host))


@pytest.fixture
def wire(server, connect):
    return connect(server)


def store_of(server):
    return Directory(server.root)


def start_upload(wire, name="a"):
    """The Location of a new upload."""
    reply = wire.ask("POST /v2/%s/blobs/uploads/" % name)
    assert reply.status == 202
    return reply.headers["location"]


# Requests and answers

def test_what_every_answer_has(server, wire):
    """Clients find out by a header that this is a registry, from refusals too; and by another no browser takes a blob
    or a manifest for a page or a script."""
    manifest, blob = make_image(store_of(server), "b", "1"), push_blob(store_of(server), "b", b"<html>")
    for target, status in (("/v2/", 200), ("/v2/a/tags/list", 404), ("/v2/A/tags/list", 400), ("/", 200), ("/no", 404),
                           ("/v2/b/manifests/" + manifest.digest, 200), ("/v2/b/blobs/" + blob, 200)):
        reply = wire.ask("GET " + target)
        assert (reply.version, reply.status) == ("HTTP/1.1", status)
        assert reply.headers["docker-distribution-api-version"] == "registry/2.0"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", reply.headers["date"])
        assert "transfer-encoding" not in reply.headers and "content-encoding" not in reply.headers
        assert int(reply.headers["content-length"]) == len(reply.body) > 0


@pytest.mark.parametrize("size", [0, 1, 5000, 65536, 65537, 3000000])
def test_head_has_the_headers_of_get_and_no_body(server, wire, size):
    """And on the connection after it, the next answer is the next answer."""
    content = LARGE[:size]
    digest = push_blob(store_of(server), "a", content)
    manifest = make_image(store_of(server), "a")
    for target, body in (("/v2/a/blobs/" + digest, content), ("/v2/a/manifests/latest", manifest.content),
                         ("/v2/a/manifests/no", None), ("/v2/a/tags/list", None), ("/nothing", None)):
        got, head = wire.ask("GET " + target), wire.ask("HEAD " + target)
        assert [line for line in got.lines if line[0] != "Date"] == [line for line in head.lines if line[0] != "Date"]
        assert int(head.headers["content-length"]) == len(got.body)
        assert body is None or got.body == body


def test_answers_without_a_body(server, wire):
    location = start_upload(wire)
    manifest = make_image(store_of(server), "a")
    for reply in (wire.ask("GET " + location), wire.ask("DELETE " + location),
                  wire.ask("GET /v2/a/manifests/latest", 'If-None-Match: "%s"' % manifest.digest)):
        assert reply.status in (204, 304) and "content-length" not in reply.headers
    assert wire.ask("GET /v2/").status == 200


def test_a_small_answer_comes_in_one_piece(server, wire):
    """Clients connect anew for each request, so a second packet would cost more than all the rest."""
    manifest = make_image(store_of(server), "a")
    wire.send("GET /v2/a/manifests/latest HTTP/1.1", "Host: localhost")
    assert wire.sock.recv(1 << 16).endswith(b"\r\n\r\n" + manifest.content)


def test_six_accept_lines(server, wire):
    """What docker, skopeo and podman send."""
    manifest = make_image(store_of(server), "a")
    types = [DOCKER_SCHEMA1, "application/json", OCI_INDEX, DOCKER_MANIFEST, "application/vnd.example", OCI_MANIFEST]
    reply = wire.ask("GET /v2/a/manifests/latest", *["Accept: " + media_type for media_type in types])
    assert (reply.status, reply.body) == (200, manifest.content)


@pytest.mark.parametrize("size", [10, 3000000])
def test_ranges(server, wire, size):
    """Of a blob that is sent from memory, and of one that the kernel copies."""
    content = LARGE[:size]
    digest = push_blob(store_of(server), "a", content)
    for first, last in ((0, 0), (3, 7), (size // 2, size - 1), (size - 1, size - 1)):
        reply = wire.ask("GET /v2/a/blobs/" + digest, "Range: bytes=%d-%d" % (first, last))
        assert (reply.status, reply.body) == (206, content[first:last + 1])
        assert reply.headers["content-range"] == "bytes %d-%d/%d" % (first, last, size)
    assert wire.ask("GET /v2/a/blobs/" + digest, "Range: bytes=%d-" % size).status == 416
    assert wire.ask("GET /v2/a/blobs/" + digest).body == content


def test_a_download_goes_on_after_the_connection_is_lost(server, connect):
    push_blob(store_of(server), "a", LARGE)
    lost = connect(server)
    lost.send("GET /v2/a/blobs/%s HTTP/1.1" % LARGE_DIGEST, "Host: localhost")
    lost.head()
    while len(lost.buffer) < 100000:
        lost._receive()
    lost.sock.close()
    reply = connect(server).ask("GET /v2/a/blobs/" + LARGE_DIGEST, "Range: bytes=%d-" % len(lost.buffer))
    assert reply.status == 206 and lost.buffer + reply.body == LARGE
    assert "Traceback" not in server.log()


# Keeping a connection, or not

def test_keep_alive(server, wire):
    for _ in range(3):
        reply = wire.ask("GET /v2/")
        assert reply.status == 200 and "connection" not in reply.headers
    assert wire.ask("GET /v2/a/tags/list").status == 404
    assert wire.ask("PATCH /v2/").status == 405
    assert wire.ask("GET /v2/").status == 200


@pytest.mark.parametrize("wish", ["close", "Close", "foo, close"])
def test_connection_close(wire, wish):
    """What docker and skopeo ask for with every request."""
    reply = wire.ask("GET /v2/", "Connection: " + wish)
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    assert wire.is_closed()


def test_http_1_0(server, connect):
    wire = connect(server)
    wire.send("GET /v2/ HTTP/1.0")
    reply = wire.reply()
    assert (reply.version, reply.status, reply.headers["connection"]) == ("HTTP/1.0", 200, "close")
    assert wire.is_closed()
    wire = connect(server)
    for _ in range(2):
        wire.send("GET /v2/ HTTP/1.0", "Connection: keep-alive")
        reply = wire.reply()
        assert (reply.version, reply.status, reply.headers["connection"]) == ("HTTP/1.0", 200, "keep-alive")


def test_pipelining(server, wire):
    """Requests that follow each other without waiting are answered in their order, bodies between them or not."""
    location, digest = start_upload(wire), Digest.of(b"0123456789")
    host = "Host: localhost"
    requests = [("GET", ("GET /v2/ HTTP/1.1", host), b""),
                ("PATCH", ("PATCH %s HTTP/1.1" % location, host, "Content-Length: 4"), b"0123"),
                ("HEAD", ("HEAD /v2/a/tags/list HTTP/1.1", host), b""),
                ("PATCH", ("PATCH %s HTTP/1.1" % location, host, "Transfer-Encoding: chunked"),
                 b"3\r\n456\r\n0\r\n\r\n"),
                ("POST", ("POST /v2/a/tags/list HTTP/1.1", host, "Content-Length: 5"), b"GET /"),
                ("PUT", ("PUT %s HTTP/1.1" % by_digest(location, digest), host, "Content-Length: 3"), b"789"),
                ("GET", ("GET /v2/a/blobs/%s HTTP/1.1" % digest, host), b"")]
    wire.sock.sendall(b"".join("\r\n".join(lines + ("", "")).encode() + body for _, lines, body in requests))
    replies = [wire.reply(method) for method, _, _ in requests]
    assert [reply.status for reply in replies] == [200, 202, 404, 202, 405, 201, 200]
    assert replies[-1].body == b"0123456789"


def test_a_request_that_arrives_byte_by_byte(server, wire):
    location = start_upload(wire)
    request = ("PATCH %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
               "2;x=y\r\nab\r\n1\r\nc\r\n0\r\nX: y\r\n\r\n")
    wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in (request % location).encode():
        wire.sock.sendall(bytes([byte]))
    reply = wire.reply()
    assert (reply.status, reply.headers["range"]) == (202, "0-2")


def test_empty_lines_before_a_request(server, wire):
    """RFC 9112, 2.2: some clients send one after a body."""
    wire.sock.sendall(b"\r\n\r\nGET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert wire.reply().status == 200


def test_a_client_that_closes_its_sending_side_gets_its_answer(server, wire):
    wire.send("GET /v2/ HTTP/1.1", "Host: localhost")
    wire.sock.shutdown(socket.SHUT_WR)
    assert wire.reply().status == 200
    assert wire.is_closed()


# Bodies

CHUNKED = [
    # sizes of the chunks, their extensions, the trailer
    ([10], "", ""),
    ([1] * 10, "", ""),
    ([3, 7], ";name=value", ""),
    ([10], ' ; a="b;c"', "X-Checksum: 1\r\nX-Other: 2\r\n"),
    ([65536, 1, 65535, 1000000, 3], "", "X: y\r\n"),
    ([], "", ""),
]


@pytest.mark.parametrize("sizes, extension, trailer", CHUNKED)
def test_chunked_bodies(server, wire, sizes, extension, trailer):
    """What docker's pushes are; and the connection stays good for the next request."""
    content, sent = LARGE[:sum(sizes)], 0
    pieces = []
    for size in sizes:
        pieces.append(b"%x%s\r\n%s\r\n" % (size, extension.encode(), content[sent:sent + size]))
        sent += size
    body = b"".join(pieces) + b"000%s\r\n%s\r\n" % (extension.encode(), trailer.encode())
    location = start_upload(wire)
    wire.send("PATCH %s HTTP/1.1" % location, "Host: localhost", "transfer-encoding: Chunked", body=body)
    reply = wire.reply()
    assert (reply.status, reply.headers["range"]) == (202, "0-%d" % max(sent - 1, 0))
    digest = Digest.of(content)
    assert wire.ask("PUT " + by_digest(reply.headers["location"], digest)).status == 201
    assert wire.ask("GET /v2/a/blobs/" + digest).body == content


@pytest.mark.parametrize("framing", ["Content-Length: %d", "Transfer-Encoding: chunked"])
def test_a_refused_body_that_is_small_is_read_and_the_connection_kept(server, wire, framing):
    """An early error with the body still to come."""
    body = LARGE[:50000]
    if "%d" in framing:
        framing %= len(body)
    else:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    for _ in range(2):
        wire.send("POST /v2/BAD/blobs/uploads/ HTTP/1.1", "Host: localhost", framing, body=body)
        reply = wire.reply()
        assert (reply.status, reply.code) == (400, "NAME_INVALID") and "connection" not in reply.headers
    assert wire.ask("GET /v2/").status == 200


@pytest.mark.parametrize("framing", ["Content-Length: %d", "Transfer-Encoding: chunked"])
def test_a_refused_body_that_is_large_ends_in_order(server, wire, framing):
    """The answer, then an end; no reset that takes the answer away from a client that is still sending."""
    body = LARGE[:MAX_DRAIN * 8]
    if "%d" in framing:
        framing %= len(body)
    else:
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    wire.send("POST /v2/BAD/blobs/uploads/ HTTP/1.1", "Host: localhost", framing, body=body)
    reply = wire.reply()
    assert (reply.status, reply.code, reply.headers["connection"]) == (400, "NAME_INVALID", "close")
    assert wire.is_closed()


def test_expectation_accepted(server, wire):
    """What curl sends before a body above 1 MiB: it waits for the 100, then sends."""
    location = start_upload(wire)
    wire.send("PATCH %s HTTP/1.1" % location, "Host: localhost", "Content-Length: 10", "Expect: 100-continue")
    assert wire.head() == b"HTTP/1.1 100 Continue"
    wire.sock.sendall(b"0123456789")
    reply = wire.reply()
    assert (reply.status, reply.headers["range"]) == (202, "0-9")
    assert wire.ask("GET /v2/").status == 200


def test_expectation_refused(server, wire):
    """No 100, the refusal at once, and an end: whether the client sends the body now is not known."""
    wire.send("PATCH /v2/a/blobs/uploads/01234567-89ab-4cde-8f01-23456789abcd HTTP/1.1", "Host: localhost",
              "Content-Length: 10", "Expect: 100-continue")
    reply = wire.reply()
    assert (reply.status, reply.code, reply.headers["connection"]) == (404, "BLOB_UPLOAD_UNKNOWN", "close")
    assert wire.is_closed()


@pytest.mark.parametrize("framing, sent", [("Content-Length: 100", b"x" * 40),
                                           ("Transfer-Encoding: chunked", b"28\r\n" + b"x" * 40 + b"\r\n3c\r\n")])
def test_a_body_that_breaks_off_goes_on_later(server, connect, framing, sent):
    """What arrived is kept; the status says how much; the rest follows on another connection."""
    wire = connect(server)
    location = start_upload(wire)
    wire.send("PATCH %s HTTP/1.1" % location, "Host: localhost", framing, body=sent)
    wire.sock.close()

    def kept():
        reply = connect(server).ask("GET " + location)
        return reply if reply.headers["range"] == "0-39" else None

    location = until(kept).headers["location"]
    reply = connect(server).ask("PATCH " + location, "Content-Range: 40-99", body=b"y" * 60)
    assert (reply.status, reply.headers["range"]) == (202, "0-99")
    digest = Digest.of(b"x" * 40 + b"y" * 60)
    assert connect(server).ask("PUT " + by_digest(reply.headers["location"], digest)).status == 201
    assert connect(server).ask("GET /v2/a/blobs/" + digest).body == b"x" * 40 + b"y" * 60
    assert "Traceback" not in server.log()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_upload_goes_on_after_the_server_was_restarted(server, connect, how):
    """Each chunk that was answered counts, with the Location from before."""
    wire = connect(server)
    location = wire.ask("PATCH " + start_upload(wire), body=LARGE[:3000000]).headers["location"]
    wire.sock.close()
    server.restart(how)
    wire = connect(server)
    assert wire.ask("GET " + location).headers["range"] == "0-2999999"
    reply = wire.ask("PATCH " + location, "Content-Range: 3000000-3999999", body=LARGE[3000000:4000000])
    assert reply.status == 202
    digest = Digest.of(LARGE[:4000000])
    assert wire.ask("PUT " + by_digest(reply.headers["location"], digest)).status == 201
    assert wire.ask("GET /v2/a/blobs/" + digest).body == LARGE[:4000000]


def test_an_upload_whose_chunks_take_other_connections(server, connect):
    """So that they meet other processes, of a server that has several."""
    content, location = LARGE[:2000000], start_upload(connect(server))
    for start in range(0, len(content), 100000):
        reply = connect(server).ask("PATCH " + location, "Content-Range: %d-%d" % (start, start + 99999),
                                    body=content[start:start + 100000])
        assert (reply.status, reply.headers["range"]) == (202, "0-%d" % (start + 99999))
        location = reply.headers["location"]
    assert connect(server).ask("PUT " + by_digest(location, Digest.of(content))).status == 201
    assert connect(server).ask("GET /v2/a/blobs/" + Digest.of(content)).body == content


# Several connections and processes

def test_no_answer_is_older_than_the_change_before_it(server, connect):
    """What one connection pushed, every other one sees at once; what another process did, too."""
    wires = [connect(server) for _ in range(8)]
    store = store_of(server)
    for number in range(5):
        manifest = make_image(store, "a", None, layers=(b"%d" % number,))
        reply = wires[number].ask("PUT /v2/a/manifests/latest", "Content-Type: " + OCI_MANIFEST, body=manifest.content)
        assert reply.status == 201
        for wire in wires * 2:
            assert wire.ask("GET /v2/a/manifests/latest").body == manifest.content
            assert wire.ask("GET /v2/a/tags/list").body == b'{"name":"a","tags":["latest"]}\n'
    store.put_manifest("a", manifest, ["other"])
    for wire in wires:
        assert json.loads(wire.ask("GET /v2/a/tags/list").body.decode())["tags"] == ["latest", "other"]
    store.delete_manifest("a", manifest.digest)
    for wire in wires:
        assert wire.ask("GET /v2/a/manifests/latest").status == 404
        assert wire.ask("GET /v2/a/manifests/" + manifest.digest).status == 404


def test_every_address(start_server, connect):
    """`:PORT` is IPv4 and IPv6."""
    server = start_server(listen=":0")
    assert connect(server, "127.0.0.1").ask("GET /v2/").status == 200
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert connect(server, "::1").ask("GET /v2/").status == 200


# TLS on a port that has none

def test_tls_on_a_plain_port(server, wire):
    """Go's clients take an answer that begins with HTTP/ for what it is, and may fall back to HTTP."""
    hello = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="registry")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    wire.sock.sendall(hello.read())
    reply = wire.reply()
    assert (reply.version, reply.status) == ("HTTP/1.0", 400)
    assert b"HTTPS" in reply.body
    assert wire.is_closed()


# Clients that are slow

@pytest.fixture
def short(start_server, tmp_path):
    """A server that loses its patience within two seconds."""
    return start_server(None, **SHORT)


def test_an_idle_connection_is_closed(short, connect):
    unused, used = connect(short), connect(short)
    assert used.ask("GET /v2/").status == 200
    assert unused.is_closed() and used.is_closed()


def drip(wire, content, pause=0.05):
    """Send a byte now and then until the server says something or closes."""
    wire.sock.settimeout(pause)
    deadline = time.monotonic() + PATIENCE
    with contextlib.suppress(ConnectionError):
        for byte in content:
            assert time.monotonic() < deadline, "nobody minds"
            wire.sock.sendall(bytes([byte]))
            try:
                wire.buffer += wire.sock.recv(1 << 16)
                break
            except socket.timeout:
                continue
    wire.sock.settimeout(PATIENCE)


def test_a_head_that_takes_too_long(short, connect):
    wire = connect(short)
    drip(wire, b"GET /v2/ HTTP/1.1\r\nHost: " + b"x" * 1000)
    reply = wire.reply()
    assert (reply.status, reply.headers["connection"]) == (408, "close")
    assert wire.is_closed()


@pytest.mark.parametrize("media_type", ["application/\u0439", "a/b\r\nX-Forged: yes", "\xe9", " "])
def test_a_stored_media_type_that_no_header_can_carry(server, connect, media_type):
    """Another program may have stored such a manifest."""
    store = store_of(server)
    content = json.dumps({"schemaVersion": 2, "mediaType": media_type, "config": {}}).encode()
    push_blob(store, "a", content)
    store.files.write(*store.link(store.layout.revision_path("a", Digest.of(content)), Digest.of(content))[:2])
    reply = connect(server).ask("GET /v2/a/manifests/" + Digest.of(content))
    assert (reply.status, reply.body, reply.headers["content-type"]) == (200, content, "application/octet-stream")
    assert "x-forged" not in reply.headers and "Traceback" not in server.log()


def test_a_body_that_takes_too_long(short, connect):
    """What came of it is kept."""
    wire = connect(short)
    location = start_upload(wire)
    wire.send("PATCH %s HTTP/1.1" % location, "Host: localhost", "Content-Length: 1000")
    drip(wire, b"x" * 1000)
    assert wire.buffer == b""
    arrived = until(lambda: int(connect(short).ask("GET " + location).headers["range"][2:]))
    assert 10 < arrived < 1000
    placed = "Content-Range: %d-%d" % (arrived + 1, arrived + 5)
    assert connect(short).ask("PATCH " + location, placed, body=b"again").status == 202


def server_side(wire):
    """The state of the server's end of a connection, from the kernel's table; "" once it is gone."""
    here, there = wire.sock.getsockname()[1], wire.sock.getpeername()[1]
    with open("/proc/net/tcp") as table:
        for line in table:
            _, local, remote, state = line.split()[:4]
            if local.endswith(":%04X" % there) and remote.endswith(":%04X" % here):
                return state
    return ""


@pytest.mark.skipif(not os.path.exists("/proc/net/tcp"), reason="needs Linux's table of connections")
def test_a_client_that_does_not_read(short, connect):
    push_blob(store_of(short), "a", LARGE)
    wire = connect(short)
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.send("GET /v2/a/blobs/%s HTTP/1.1" % LARGE_DIGEST, "Host: localhost")
    assert server_side(wire) == "01"
    until(lambda: server_side(wire) != "01")
    assert connect(short).ask("GET /v2/a/blobs/" + LARGE_DIGEST).body == LARGE
    assert "Traceback" not in short.log()


def test_a_large_body_after_a_refusal_is_not_read_for_ever(short, connect):
    wire = connect(short)
    wire.send("POST /v2/BAD/blobs/uploads/ HTTP/1.1", "Host: localhost", "Content-Length: 1000000000")
    assert wire.reply().status == 400
    with pytest.raises(ConnectionError):
        until(lambda: wire.sock.sendall(b"x"))


# The end of a server

def refuses_connections(server):
    try:
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_running_transfers_end_and_nothing_new_begins(server, connect, how):
    push_blob(store_of(server), "a", LARGE)
    idle, download, upload = connect(server), connect(server), connect(server)
    location = start_upload(upload)
    upload.send("PATCH %s HTTP/1.1" % location, "Host: localhost", "Content-Length: 20", body=b"0123456789")
    download.send("GET /v2/a/blobs/%s HTTP/1.1" % LARGE_DIGEST, "Host: localhost")
    download._receive()
    idle.ask("GET /v2/")
    server.process.send_signal(how)
    assert idle.is_closed()
    until(lambda: refuses_connections(server))
    assert server.process.poll() is None
    upload.sock.sendall(b"abcdefghij")
    reply = upload.reply()
    assert (reply.status, reply.headers["range"], reply.headers["connection"]) == (202, "0-19", "close")
    assert download.reply().body == LARGE
    assert server.process.wait(PATIENCE) == 0
    assert "Traceback" not in server.log()


def test_a_transfer_that_does_not_end_is_cut(start_server, connect):
    server = start_server(None, "--drain", "0.2")
    wire = connect(server)
    location = start_upload(wire)
    wire.send("PATCH %s HTTP/1.1" % location, "Host: localhost", "Content-Length: 20", "Expect: 100-continue")
    wire.head()  # now the server waits for the body
    assert server.stop() == 0
    assert "cut 1 transfer" in server.log() and "--drain" in server.log()


def test_a_second_ctrl_c_waits_for_nobody(server, connect):
    wire = connect(server)
    wire.send("PATCH %s HTTP/1.1" % start_upload(wire), "Host: localhost", "Content-Length: 20", "Expect: 100-continue")
    wire.head()
    server.process.send_signal(signal.SIGINT)
    until(lambda: refuses_connections(server))
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(PATIENCE) == 130


def test_after_a_kill_the_port_is_free_and_the_store_as_acknowledged(server, connect):
    manifest = make_image(store_of(server), "a", None)
    assert connect(server).ask("PUT /v2/a/manifests/latest", body=manifest.content).status == 201
    workers = workers_of(server)
    server.restart(signal.SIGKILL)
    assert connect(server).ask("GET /v2/a/manifests/latest").body == manifest.content
    until(lambda: not any(os.path.exists("/proc/%d" % process) for process in workers))


def test_a_worker_that_dies_is_replaced(start_server, connect):
    server = start_server(None, "--workers", "2")
    workers = until(lambda: len(workers_of(server)) == 2 and workers_of(server))
    os.kill(workers[0], signal.SIGKILL)
    until(lambda: len(workers_of(server)) == 2 and workers[0] not in workers_of(server))
    assert all(connect(server).ask("GET /v2/").status == 200 for _ in range(20))
    assert server.stop() == 0
