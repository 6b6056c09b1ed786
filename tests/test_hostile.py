"""Hostile input: whatever comes in, the answer is below 500, nothing is written outside the store, nobody waits."""

import ast
import contextlib
import functools
import itertools
import json
import os
import random
import re
import socket
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import samples
import tinyreg
from conftest import PATIENCE, Client, ask, python_that_opens, until
from engines import own_address
from tinyreg import Digest, Directory, RequestReader, RegistryError, Request, Response, dispatch, load_json, parse_head

SEED = 20240601
DIGEST = Digest.of(b"layer one")
HEAD = "%s %s HTTP/1.1\r\nHost: localhost\r\n%s\r\n"


def exchange(server, content, wait=True):
    """Send bytes, end the sending side, and read all that comes back."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        try:
            sock.sendall(content)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused before we had sent it all
        answer = b""
        while wait:
            try:
                block = sock.recv(1 << 16)
            except ConnectionError:
                break
            if not block:
                break
            answer += block
        return answer


def statuses(answer):
    return [int(line.split()[1]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.")]


def files_outside(tmp_path):
    """What lies beside the store and its log."""
    return sorted(set(os.listdir(str(tmp_path))) - {"registry", "registry.log"})


@pytest.fixture
def filled(start_server, store):
    samples.make_image(store, "lib/a")
    return start_server()


# Paths and names

TRICKS = [
    "/v2/../../etc/passwd", "/v2/..%2f..%2fetc/passwd", "/v2/%2e%2e/manifests/latest", "/v2/a/../../b/manifests/latest",
    "/v2/lib/a/manifests/..", "/v2/lib/a/manifests/%2e%2e%2f%2e%2e", "/v2/lib/a/manifests/latest%00",
    "/v2/%00/tags/list",
    "/v2/lib/a/blobs/sha256:../../../x", "/v2/lib/a/blobs/sha256:" + "a" * 63 + "%2f", "/v2/lib/a/blobs/uploads/..",
    "/v2/lib/a/blobs/uploads/%2e%2e%2fx", "/v2/lib/_uploads/tags/list", "/v2/_layers/tags/list", "/v2/.git/tags/list",
    "/v2//tags/list", "//v2/lib/a/tags/list", "/v2/lib/a/tags/list/../list", "/v2/" + "a/" * 3000 + "tags/list",
    "/v2/" + "a" * 7000 + "/tags/list", "/v2/lib/a/tags/list?n=-1", "/v2/lib/a/tags/list?n=99999999999999999999",
    "/v2/lib/a/tags/list?n=1&last=%ff%fe", "/v2/_catalog?n=1e9", "/v2/_catalog?last=../../..", "/v2/%ff%fe/tags/list",
    "/v2/lib/a/referrers/" + DIGEST + "?artifactType=%00&n=0", "/v2/lib/a/referrers/sha256:xyz", "/?a=b", "*",
    "http://x/v2/",
    "/v2/lib/a/manifests/latest?ns=../../../etc", "/v2/lib/a/manifests/latest?ns=%00", "/v2/\u00e4/tags/list",
    "/v2/lib/a/manifests/sha256:" + "0" * 64 + "?tag=" + "&tag=".join(["x"] * 900),
]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
def test_path_tricks(filled, tmp_path, method):
    for target in TRICKS:
        for body in ("Content-Length: 0\r\n", "Content-Length: 2\r\n"):
            answer = exchange(filled, (HEAD % (method, target, body)).encode("utf-8") + b"{}"[:int(body[16:])])
            assert statuses(answer) and all(status < 500 for status in statuses(answer)), (target, answer)
    assert files_outside(tmp_path) == []
    assert "Traceback" not in filled.log()


def test_what_a_path_trick_asks_for_is_not_sent(filled):
    for target in TRICKS:
        assert b"root:" not in exchange(filled, (HEAD % ("GET", target, "")).encode("utf-8"))


# HTTP itself: a table of what two parsers could read differently. Each is refused, and its connection closed, so that
# the "smuggled" request behind it is not answered.

SMUGGLED = b"GET /v2/_catalog HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("head, status", [
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 4, 4\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: +4\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: -4\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1_0\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: 0x4\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length: \xb2\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nContent-Length : 4\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\n Content-Length: 4\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nX: a\r\n folded\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n", 501),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n", 501),
    (b"POST /v2/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"POST /v2/ HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"GET /v2/ HTTP/1.1\nHost: x\n\n", 400),
    (b"GET /v2/ HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", 400),
    (b"GET /v2/ HTTP/1.1\r\nHost: x\rX: y\r\n\r\n", 400),
    (b"GET /v2/ HTTP/1.1\r\nHost: x\x00\r\n\r\n", 400),
    (b"GET /v2/ HTTP/1.1\r\nHost\x00: x\r\n\r\n", 400),
    (b"GET /v2/ HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    (b"GET /v2/ HTTP/1.1\r\n\r\n", 400),
    (b"GET /v2/ HTTP/2.0\r\nHost: x\r\n\r\n", 400),
    (b"GET /v2/ HTTP/1.10\r\nHost: x\r\n\r\n", 400),
    (b"GET  /v2/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /v2/ x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"get /v2/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET /v2/\r\nHost: x\r\n\r\n", 400),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    (b"GET /v2/ HTTP/1.1\r\nHost: x\r\nExpect: 200-ok\r\n\r\n", 417),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    (b"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + b"X-Filler: " + b"a" * 70000 + b"\r\n\r\n", 431),
    (b"GET /v2/ HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 12000 + b"\r\n", 431),
])
def test_a_request_that_can_be_read_in_two_ways_is_refused(server, head, status):
    answer = exchange(server, head + SMUGGLED)
    assert statuses(answer) == [status]
    assert b"repositories" not in answer


@pytest.mark.parametrize("chunks", [
    b"g\r\n", b"-1\r\n", b"+2\r\nab\r\n0\r\n\r\n", b"0x2\r\nab\r\n0\r\n\r\n", b"2\nab\n0\n\n", b"2\r\nabc\r\n0\r\n\r\n",
    b"2 2\r\nab\r\n0\r\n\r\n", b"\r\n", b" 2\r\nab\r\n0\r\n\r\n", b"ffffffffffffffff\r\n",
    b"2;" + b"x" * 2000 + b"\r\nab\r\n",
    b"0\r\n" + b"X: y\r\n" * 20000 + b"\r\n", b"2\r\nab0\r\n\r\n",
])
def test_malformed_chunks(server, chunks):
    location = statuses_and_location(server)
    head = HEAD % ("PATCH", location, "Transfer-Encoding: chunked\r\n")
    answer = exchange(server, head.encode() + chunks + SMUGGLED)
    assert statuses(answer)[:1] == [400]
    assert b"repositories" not in answer


def statuses_and_location(server):
    answer = exchange(server, (HEAD % ("POST", "/v2/a/blobs/uploads/", "Content-Length: 0\r\n")).encode())
    lines = answer.split(b"\r\n")
    return next(line.split(b" ", 1)[1].decode() for line in lines if line.startswith(b"Location:"))


# Generated requests

WORDS = [b"GET", b"PUT", b"POST", b"PATCH", b"HEAD", b"DELETE", b" ", b"/", b"/v2/", b"lib/a", b"/manifests/",
         b"/blobs/",
         b"latest", b"uploads/", b"sha256:", b"0" * 64, b"?n=1", b"?digest=", b"%2e%2e", b"HTTP/1.1", b"HTTP/1.0",
         b"\r\n",
         b"\n", b"\r\n\r\n", b"Host: x\r\n", b"Content-Length: ", b"5", b"0", b"99999999999999999",
         b"Transfer-Encoding: chunked\r\n",
         b"Expect: 100-continue\r\n", b"Content-Range: 0-4\r\n", b"Range: bytes=0-\r\n", b"hello", b"{}",
         b"\x00", b"\x16\x03",
         b"\xff", b"5\r\nhello\r\n0\r\n\r\n", b"Connection: close\r\n", b"Accept: */*\r\n", b": ", b"a" * 300]
GOOD = [(HEAD % ("GET", "/v2/lib/a/manifests/latest", "")).encode(),
        (HEAD % ("GET", "/v2/lib/a/blobs/" + DIGEST, "Range: bytes=0-3\r\n")).encode(),
        (HEAD % ("PUT", "/v2/lib/b/manifests/x", "Content-Length: 2\r\nContent-Type: application/json\r\n")).encode()
        + b"{}",
        (HEAD % ("POST", "/v2/lib/a/blobs/uploads/?digest=" + DIGEST, "Content-Length: 9\r\n")).encode() + b"layer one",
        (HEAD % ("DELETE", "/v2/lib/a/manifests/none", "")).encode()]


def generated(choice):
    """A request: words in any order, or a good one with some bytes changed, cut or doubled."""
    if choice.random() < 0.5:
        return b"".join(choice.choice(WORDS) for _ in range(choice.randrange(1, 30)))
    request = bytearray(choice.choice(GOOD))
    for _ in range(choice.randrange(1, 5)):
        place = choice.randrange(len(request) + 1)
        request[place:place + choice.randrange(3)] = choice.choice(WORDS + [b"", bytes([choice.randrange(256)])])
    return bytes(request)


def test_generated_requests(filled, tmp_path):
    choice = random.Random(SEED)
    for _ in range(1500):
        request = generated(choice)
        answer = exchange(filled, request)
        assert all(status < 500 or status == 501 for status in statuses(answer)), (request, answer)
    assert statuses(exchange(filled, GOOD[0])) == [200]
    assert files_outside(tmp_path) == []
    assert "Traceback" not in filled.log() and " ERROR " not in filled.log()


class Feed:
    """A socket that gives prepared bytes, in pieces."""

    def __init__(self, content, step):
        self.content = content
        self.step = step

    def recv(self, count):
        piece, self.content = self.content[:min(count, self.step)], self.content[min(count, self.step):]
        return piece

    def recv_into(self, view):
        piece = self.recv(len(view))
        view[:len(piece)] = piece
        return len(piece)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(WORDS) | st.binary(max_size=20), max_size=25), st.integers(1, 5000))
def test_heads_are_parsed_or_refused(pieces, step):
    """And the same whichever way the bytes are cut into packets."""
    content = b"".join(pieces) + b"\r\n\r\n"
    found = []
    for size in (step, 1 << 20):
        try:
            head = RequestReader(Feed(content, size)).read_head()
            found.append(head and parse_head(head))
        except RegistryError as error:
            found.append(400 <= error.status <= 501)
        except tinyreg.ClientLeft:
            found.append("left")
    assert found[0] == found[1]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000), st.lists(st.integers(1, 700), min_size=1, max_size=20), st.integers(1, 900))
def test_chunked_bodies_arrive_as_they_were(content, sizes, step):
    """Whatever the chunks and the packets are; and the bytes behind the body are left for the next request."""
    wire, rest = b"", content
    for size in sizes:
        chunk, rest = rest[:size], rest[size:]
        if chunk:
            wire += b"%x;x=y\r\n%s\r\n" % (len(chunk), chunk)
    wire += (b"%X\r\n%s\r\n" % (len(rest), rest) if rest else b"") + b"0\r\nTrailer: x\r\n\r\n"
    incoming = RequestReader(Feed(wire + SMUGGLED, step))
    body, got, view = tinyreg.RequestBody(incoming, None), b"", memoryview(bytearray(333))
    while True:
        count = body.readinto(view)
        if not count:
            break
        got += bytes(view[:count])
    assert got == content
    assert incoming.read_head() == SMUGGLED


JSON_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) |
                           st.sampled_from([DIGEST, "sha256:x", "application/vnd.oci.image.manifest.v1+json"]),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                               ["mediaType", "digest", "size", "urls", "annotations", "x"]), inner, max_size=4),
                           max_leaves=8)
FIELDS = ["schemaVersion", "mediaType", "config", "layers", "manifests", "subject", "blobs", "annotations",
          "artifactType"]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=5), st.booleans())
def test_generated_manifests(tmp_path, changes, whole):
    """A manifest is stored, and then listed, described and deleted; or it is refused."""
    store = Directory(str(tmp_path / "registry"), sparse=True)
    access = tinyreg.Access("admin")
    content = json.dumps(dict(samples.image() if whole else {}, **changes)).encode()
    answers = [dispatch(store, access, Request("PUT", "/v2/a/manifests/x", {}, _Body(content)))]
    if answers[0].status == 201:
        digest = dict(answers[0].headers)["Docker-Content-Digest"]
        subject = store.manifest("a", Digest(digest)).subject
        answers += [dispatch(store, access, Request(method, target, {})) for method, target in (
            ("GET", "/v2/a/manifests/x"), ("GET", "/v2/a/referrers/" + (subject or digest)),
            ("DELETE", "/v2/a/manifests/" + digest))]
        load_json(answers[2].body)
    assert all(isinstance(answer, Response) and answer.status < 500 for answer in answers)


class _Body:
    def __init__(self, content):
        self.content = content

    def readinto(self, view):
        count = min(len(view), len(self.content))
        view[:count], self.content = self.content[:count], self.content[count:]
        return count


# Those who make others wait

def test_blanks_in_a_header_cost_nothing():
    """A pattern that matches them in three ways would take days here, and a worker with it."""
    with pytest.raises(RegistryError, match="malformed header"):
        parse_head(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b" " * 60000 + b"\x01\r\n\r\n")


def test_a_head_that_comes_byte_by_byte_costs_little():
    """What was looked at is not looked at again: a thousand such bytes would take seconds of a worker's time."""
    content = b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 60000
    began = time.process_time()
    with pytest.raises(tinyreg.ClientLeft):
        RequestReader(Feed(content, 30)).read_head()
    assert time.process_time() - began < 1


def test_many_idle_connections_keep_nobody_waiting(server):
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) for _ in range(200)]
    try:
        for sock in held[::2]:
            sock.sendall(b"GET /v2/ HT")  # half of them in the middle of a request
        done = []
        threads = [threading.Thread(target=lambda: done.append(statuses(exchange(server, GOOD[4])))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert done == [[404]] * 20
    finally:
        for sock in held:
            sock.close()


def test_silent_connections_of_four_addresses_don_t_keep_out_a_fifth(start_server, tmp_path):
    server = start_server(None, "--workers", "1", python=python_that_opens(256, tmp_path))
    with contextlib.ExitStack() as stack:
        for number in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE))
        assert statuses(exchange(server, GOOD[4])) == [404]
    assert "can't accept" not in server.log()


def test_one_client_s_transfers_leave_room_for_others(start_server, store, tmp_path):
    """Where few files may be open, and no connection is idle."""
    blob = samples.push_blob(store, "lib/a", b"x" * (16 << 20))
    server = start_server(None, "--workers", "1", listen=":0", python=python_that_opens(128, tmp_path))
    asked = (HEAD % ("GET", "/v2/lib/a/blobs/" + blob, "")).encode()
    begun = []
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            sock = stack.enter_context(socket.create_connection((own_address(), server.port), timeout=PATIENCE))
            with contextlib.suppress(ConnectionError):
                sock.sendall(asked)
                begun += statuses(sock.recv(1000))
        assert 10 < begun.count(200) < 30 and set(begun) <= {200, 429}
        other = (HEAD % ("GET", "/v2/lib/a/tags/list", "")).encode()
        assert statuses(exchange(server, other)) == [404]  # from 127.0.0.1
    assert "Traceback" not in server.log() and "too many" not in server.log()


def test_a_refused_request_with_a_large_body_gets_its_answer(server):
    """The client is still sending when it is refused; a reset would lose it the reason."""
    head = HEAD % ("PUT", "/v2/a/manifests/x", "Content-Length: %d\r\n" % (16 << 20))
    answer = exchange(server, head.encode() + b"x" * (16 << 20))
    assert statuses(answer) == [413]
    assert b"4 MiB" in answer


@pytest.mark.parametrize("target, status", [("/v2/Bad/blobs/uploads/", 400), ("/v2/a/blobs/uploads/?digest=x", 400),
                                            ("/v2/a/blobs/uploads/?mount=x", 400), ("/nothing", 404)])
def test_an_expectation_is_refused_before_the_body(server, target, status):
    head = HEAD % ("POST", target, "Content-Length: 1000\r\nExpect: 100-continue\r\n")
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        sock.sendall(head.encode())
        answer = sock.recv(1 << 16)
    assert statuses(answer) == [status]


def test_json_that_is_deep_or_huge_is_refused_quickly(server):
    for content in (b'{"a":' + b"[" * 2000000, b'{"a":' + b"9" * 4000000 + b"}", b"[" * 4000000,
                    b'{"a":"' + b"\\u0000" * 600000):
        head = HEAD % ("PUT", "/v2/a/manifests/x", "Content-Length: %d\r\n" % len(content))
        assert statuses(exchange(server, head.encode() + content)) == [400]
    assert "Traceback" not in server.log()


def test_one_client_can_t_have_all_connections(start_server):
    """The ones beyond the limit hear why, and whoever comes from elsewhere is served."""
    address = own_address()
    asked = (HEAD % ("GET", "/v2/a/tags/list", "")).encode()
    server = start_server(None, "--workers", "1", listen=":0", MAX_CONNECTIONS=10)
    held = [socket.create_connection((address, server.port), timeout=PATIENCE) for _ in range(10)]
    for sock in held:
        sock.sendall(asked)
        assert statuses(sock.recv(1 << 16)) == [404]
    with socket.create_connection((address, server.port), timeout=PATIENCE) as sock:
        sock.sendall(asked)
        answer = sock.recv(1 << 16)
    assert statuses(answer) == [429] and b"Retry-After" in answer and b"too many connections" in answer
    assert statuses(exchange(server, asked)) == [404]  # from 127.0.0.1
    for sock in held:
        sock.close()

    def is_served():
        with socket.create_connection((address, server.port), timeout=PATIENCE) as sock:
            sock.sendall(asked)
            return statuses(sock.recv(1 << 16)) == [404]
    until(is_served)


def test_behind_a_proxy_one_client_can_t_have_all_connections_either(start_server):
    """The proxy's connections count for the client whom they served last."""
    server = start_server(None, "--workers", "1", MAX_CONNECTIONS=2)
    with contextlib.ExitStack() as stack:
        proxy = [stack.enter_context(Client(server)) for _ in range(3)]

        def answers(number, client):
            return proxy[number].ask("GET", "/v2/a/tags/list", x_forwarded_for=client, x_number=str(number)).status

        assert [answers(number, "10.0.0.9") for number in range(3)] == [404, 404, 429]
        assert answers(2, "10.0.0.8") == 404
        assert answers(0, "10.0.0.8") == 404
        assert answers(0, "10.0.0.9") == 404


def test_one_client_can_t_have_all_upload_sessions(start_server):
    """Those that have ended don't count."""
    address = own_address()
    server = start_server(None, "--workers", "1", "--anonymous", "push", listen=":0", MAX_UPLOADS=3)

    def send(method, path):
        answer = ask("http://%s:%d" % (address, server.port), method, path)
        return answer.status, answer.headers["Location"]

    locations = [send("POST", "/v2/a/blobs/uploads/")[1] for _ in range(3)]
    assert send("POST", "/v2/a/blobs/uploads/")[0] == 429
    assert send("DELETE", locations[0])[0] == 204
    assert send("POST", "/v2/a/blobs/uploads/")[0] == 202
    assert send("POST", "/v2/a/blobs/uploads/")[0] == 429


# Patterns: what a stranger's bytes meet takes time in proportion to their number

SMALL, LARGE = 250, 4000
LINEAR, QUADRATIC = LARGE / SMALL, (LARGE / SMALL) ** 2


def seconds(action, text, rounds):
    """The processor time of the fastest of some rounds: other processes don't count."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        action(text)
        times.append(time.process_time() - began)
    return max(min(times), 1e-6)


def grows_too_fast(action, make):
    """Whether a text of LARGE characters takes nearer to the square of their number than to the
    number. One look is enough for what is fast; what seems slow is looked at again, longer."""
    for rounds in (1, 3, 9):
        ratio = seconds(action, make(LARGE), rounds) / seconds(action, make(SMALL), rounds)
        if ratio < (LINEAR * QUADRATIC) ** 0.5:
            return False
    return True


def repeated(before, unit, after):
    """A function that makes a text of so many characters, or bytes, of this shape."""
    return lambda length: before + unit * (length // len(unit)) + after


HEX = "0123456789abcdef" * 4
LAYERS = "docker/registry/v2/blobs/"
TAGS = "docker/registry/v2/repositories/"

# {pattern: [(begin, what is repeated, end)]}: for every pattern of the module, the texts that hurt it
# most, as far as we know.
ATTACKS = {
    "FOREIGN_LAYER_TYPES": [("application/vnd.docker.image.rootfs.foreign.", "a", "\n")],
    "NAME": [("", "a", "!"), ("", "a-", "!"), ("", "a__", "!"), ("a", "-", ""), ("", "a/", ""), ("", "a.", "A")],
    "TAG": [("", "a", "!"), ("", ".", "")],
    "DIGEST": [("sha256:", "a", ""), ("", "sha256:", "")],
    "HOST": [("", "a", "!"), ("", "a-", ""), ("", "a.", "!"), ("", "-", ""), ("", "a.a-", ".")],
    "SESSION_ID": [("", "a", ""), ("01234567", "-0123", "")],
    "COUNT": [("", "9", "x"), ("", "9", "")],
    "UNSAFE": [("", "\x1b", ""), ("", "a", "\x1b")],
    "COMMENT": [("", "a", ""), ("", " ", ""), ("a", " ", "x"), ("a ", "#", "")],
    "ENTRY_HEAD": [(b"", b"9", b"\n"), (b"1 ", b"9", b"")],
    "LASTING": [(LAYERS + "sha256/ab/", "a", "/"), (TAGS, "a/_layers/", "x"), (TAGS, "/", "_"),
                (TAGS + "a/_manifests/tags/", "a", "/"), ("tinyreg/pinned/", "a/_digests/", ""), (TAGS, "a/_", "")],
    "RENAMING": [("", "a", ""), ("a", "/", "x"), ("", "a/", "="), ("a=", "/", "x"), ("a=", "a/", "A"),
                 ("a/=", "a.", "")],
    "FALLBACK_TAG": [("sha256-" + HEX, ".", "\n"), ("", "sha256-", "")],
    "BOUND": [("", ">", ""), (">=", "1", ";"), ("<", " ", "")],
    "IMAGE_KEY": [("", " ", ""), ("", ", ", ""), (",", " ", ""), ("", "-", ""), ("", "image:", ""),
                  ("", ",image: ", ""),
                  ("", "{\"image\":\"", ""), ("", "{image: '", ""), ("", ",image:\"", ""), ("image: ", "${", ""),
                  ("image: ", "$", ""), ("image: ${", "a", ""), ("image: ", "a", ","), ("image:", " ", ""),
                  ("image", " ", ""),
                  ("image: \"", "a", ""), ("", ",image: ${", "")],
    "FROM": [("", "FROM", ""), ("FROM", " ", "")],
    "ANCHOR": [("", "&", ""), ("", "&a", ""), ("&", "a", ""), ("&a", " ", ""), ("", "&a ", ""), ("&a ", "a", "")],
    "VARIABLE": [("", "$", ""), ("", "${", ""), ("", "${a", ""), ("${", "a", ""), ("${a:-", "a", ""), ("", "${a:-", ""),
                 ("${a", ":-", ""), ("$", "a", "")],
    "TOKEN": [("", "a", ""), ("", " ", ""), ("", "a ", "")],
    "UNRELEASED": [("", "rc", ""), ("", "sha256-", ""), ("", "a", ""), ("", "-rc", "a")],
    "REFERRER_LINE": [("", "sha256:" + HEX + " ", ""), ("", "\n", ""), ("", "sha256:" + HEX + " -", "")],
    "MENTIONED": [(b"", b"sha256:", b""), (b"sha256:", b"a", b""), (b"", b"sha256:" + HEX[:63].encode(), b"")],
    "TEXT": [(b"", b" ", b"x"), (b"", b" ", b"{")],
    "LAYER_TYPES": [("", "application/vnd.", ""), ("application/vnd.oci.image.layer", ".", "")],
    "ARCHIVE_ROOT": [("", "a/", ""), ("", "/", ""), ("", LAYERS, ""), ("", LAYERS, "\n"), ("", TAGS, "\n"),
                     ("", "index.json/", ""), ("", "blob/sha256-" + HEX + "/", "")],
    "DAMAGED": [("", "tinyreg/damaged", ""), ("", "/tinyreg", ""), ("", "/", "")],
    "NAMED_BY_DIGEST": [("", ":", ""), ("", "/sha256-", ""), ("", "sha256-" + HEX, "x"), ("", HEX + "/", "x"),
                        ("", HEX + "/", "\n"), ("", HEX, ""), ("", "a:a/", "x")],
    "TREE_LINK": [(TAGS, "a/_manifests/tags/", ""), (TAGS, "/_manifests/revisions/a/a", ""),
                  (TAGS, "a/_manifests/tags/a/current/link/", ""), (TAGS + "a", "/", "")],
    "COSIGN_KIND": [("dev.hauler/", "a", "/"), ("", "dev.hauler/", "")],
    "CACHE_ENTRY": [("manifests/", "a", ""), ("manifests/", "a/", ""), ("manifests/", "_/", "\n/"),
                    ("manifests/a/", "digest/", ""), ("manifests/a/a/digest/sha256-", HEX, "x/")],
    "PAX_RECORD": [(b"9 ", b"a", b""), (b"", b"9", b""), (b"", b"9 a", b"")],
    "CHART_YAML": [("./", "a", "/Chart.yaml\n"), ("", "/", ""), ("", "/Chart.yaml", "")],
    "CHART_FIELD": [("name: ", "a", "\n "), ("name: ", "a ", "\n "), ("name:", " ", ""), ("name: a", " ", "#\n "),
                    ("", "name: a\n", " "), ("name: a", "\n", ""), ("name: a #", "#", "\n "), ("name: \"", "a", "\n"),
                    ("", "name: '", ""), ("name: a", " #", "\n "), ("", "\n", "")],
    "CHALLENGE": [("", ",", ""), ("", ", ", ""), ("Basic", " ", ""), ("Basic ", "a", ""), ("Basic ", "a=", ""),
                  ("Basic ", "a=b=", "\""), ("", ",Basic a=\"", ""), ("", "Basic,", ""), ("Basic a=\"", "\\\\", ""),
                  ("Basic a=\"", "\\\"", ""), ("", ",Basic a=\\\"", ""), ("Basic", ", a = b", ""),
                  ("Basic a", " ", "")],
    "PARAMETER": [("", "a", ""), ("a", " ", ""), ("", "a=\"", ""), ("a=\"", "\\\"", ""), ("", "a=", ""),
                  ("", "a ", ""), ("", "=", "")],
    "NEXT_LINK": [("", "<", ""), ("", "<>;", ""), ("", "<>; rel=", ""), ("<>", " ", ""), ("<>;", " rel=\"nex", ""),
                  ("", "<> ", ""), ("<>;", "a", ""), ("", "<>;,", "")],
    "USER": [("", "a", ":"), ("", "a", "")],
    "RULE": [("", "a", ""), ("a", " ", ""), ("a ", "a", ""), ("a ", "a ", "")],
    "SCRYPT": [("$scrypt$ln=14,r=8,p=1$", "a", ""), ("", "$", "")],
    "MOUNT": [("", "?", ""), ("", "&mount", ""), ("", "&", "")],
    "HOP": [("1.1 tinyreg-", "a", ""), ("", "1.1 tinyreg-", ""), ("", "1.1 ", "")],
    "PROXY_HEADER": [("x-forwarded", "-", "\n"), ("", "via", ""), ("x-forwarded", "a", "")],
    "SECRET_PARAMETER": [("", "?", ""), ("", "&", ""), ("?", "a", ""), ("", "?a=", "&"), ("", "&a", ""), ("", "?&", ""),
                         ("?", "n=&", ""), ("", "&=", "")],
    "REQUEST_LINE": [(b"GET ", b"/", b""), (b"", b"GET ", b""), (b"", b"G", b""), (b"GET ", b"/ HTTP/1.1", b"")],
    "HEADER_LINE": [(b"", b"a", b""), (b"a:", b" ", b"\0"), (b"a:", b"a", b"\0"), (b"", b"a:", b"\0")],
    "CHUNK_LINE": [(b"", b"a", b""), (b"a", b" ", b""), (b"a;", b" ", b"\0"), (b"a ", b";", b"\0")],
    "BARE_NEWLINE": [(b"", b"\r\n", b""), (b"", b"\r", b"\n"), (b"", b"a", b"")],
}


def module_patterns():
    """{name: pattern} of all that the module compiles once."""
    return {name: value for name, value in vars(tinyreg).items() if isinstance(value, type(tinyreg.NAME))}


@functools.lru_cache(maxsize=None)
def source_tree():
    with open(tinyreg.__file__, encoding="utf-8") as file:
        return ast.parse(file.read())


METHODS = {"fullmatch", "match", "search", "findall", "finditer", "sub", "split"}


def uses(name):
    """The methods of a pattern that the module uses."""
    return {node.attr for node in ast.walk(source_tree()) if isinstance(node, ast.Attribute)
            and getattr(node.value, "id", "") == name and node.attr in METHODS} or {"findall"}


def method(pattern, way):
    """A function of a text, for each method of patterns."""
    return (lambda text: pattern.sub(text[:0], text)) if way == "sub" else getattr(pattern, way)


def test_every_pattern_has_its_attacks():
    """Who adds a pattern thinks of the worst text for it."""
    assert sorted(ATTACKS) == sorted(module_patterns())


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_no_text_makes_a_pattern_slow(name):
    pattern = module_patterns()[name]
    for attack, way in itertools.product(ATTACKS[name], uses(name)):
        assert not grows_too_fast(method(pattern, way), repeated(*attack)), attack


@functools.lru_cache(maxsize=None)
def written_patterns():
    """The patterns that functions hand to re as they go: {pattern: names of re's functions}."""
    patterns = {}
    for call in ast.walk(source_tree()):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) \
                and getattr(call.func.value, "id", "") == "re" and isinstance(call.args[0], ast.Constant):
            patterns.setdefault(call.args[0].value, set()).add(call.func.attr)
    return patterns


def shapes_for(text):
    """Texts in which the letters of a pattern, alone and in pairs, are repeated."""
    letters = sorted(set(re.sub(r"\\[a-zA-Z]|\(\?[:P<]|[\\()|{}^$]", "", text)) | set("a0 .:/\"\n")) \
        if isinstance(text, str) else [bytes([code]) for code in sorted(set(text) | set(b"a0 \n"))]
    nothing = text[:0]
    for unit in letters:
        for before, after in ((nothing, nothing), (nothing, letters[0]), (letters[-1], nothing)):
            yield before, unit, after
    for first, second in itertools.permutations(letters[:9], 2):
        yield nothing, first + second, nothing


@pytest.mark.parametrize("text", sorted(set(written_patterns()), key=str))
def test_no_pattern_inside_a_function_is_slow(text):
    pattern = re.compile(text)
    for attack, way in itertools.product(shapes_for(text), sorted(written_patterns()[text] - {"compile", "split"})):
        assert not grows_too_fast(method(pattern, way), repeated(*attack)), attack


@pytest.mark.parametrize("unit", [
    ":", "@", "/", "a:", "a@", ":a", "/archive/", "/manifests/", "/manifests/a/", "/tags/list", "/blobs/uploads/",
    "/blobs/uploads", "/referrers/", "/blobs/", ".tar", ":.tar", "/a:a.tar", "sha256:", "\n", ":\n"])
def test_no_path_makes_the_routes_slow(unit):
    """They are matched before anybody has logged in."""
    def match(path):
        for pattern, _ in tinyreg.ROUTES:
            pattern.fullmatch(path)

    for before in ("", "/v2/a", "/archive/", "/archive/a"):
        for after in ("", "x\n", "/"):
            assert not grows_too_fast(match, repeated(before, unit, after)), (before, after)


@pytest.mark.parametrize("glob", [
    "**a**a**a**b", "*a*a*a*b", "*/*/*/**/x", "**a*a**b", "**/*a*/**/*b", "*a", "**a", "a**"])
def test_no_name_makes_a_glob_slow(glob):
    for unit in ("a", "a/", "aa/", "ab", "b/a"):
        for after in ("", "c", "\n"):
            assert not grows_too_fast(tinyreg.parse_glob(glob).fullmatch, repeated("", unit, after)), (unit, after)


@settings(max_examples=300, deadline=None)
@given(st.text("ab/*", max_size=8), st.text("ab/", max_size=12))
def test_a_glob_of_many_stars_means_what_one_of_few_does(glob, text):
    parts = re.split(r"(\*\*|\*)", glob)
    pattern = "".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)
    assert tinyreg.Glob(glob).fullmatch(text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize("parse, attack", [
    (tinyreg.parse_challenges, ("Basic ", "a=\"b\",", "")),
    (tinyreg.parse_pax_records, (b"", b"6 a=b\n", b"")),
    (tinyreg.harmless, ("", "\x1b", "")),
    (tinyreg.without_secrets, ("/?", "a=b&", "")),
    (tinyreg.full_name, ("", "_1", "/a")),
    (lambda text: parse_head(b"GET / HTTP/1.1\r\nHost: x\r\n" + text + b"\r\n"), (b"", b"a: b\r\n", b"")),
    (lambda text: load_json(b'{"a":[' + text + b"0]}"), (b"", b"1,", b"")),
    (lambda text: Request("GET", text), ("/?", "a=b&", "")),
])
def test_nothing_that_parses_a_stranger_s_text_is_slow(parse, attack):
    assert not grows_too_fast(parse, repeated(*attack))
