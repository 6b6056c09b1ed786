"""What those who run a registry see of it: log lines, metrics and the narration."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import threading
import time

import pytest
from conftest import PATIENCE, Client, run_tinyreg, until
from samples import make_image, push_blob

import tinyreg
from tinyreg import (Access, Digest, Exchange, Metrics, Observation, Registry, Request, dispatch, harmless,
                     without_names, without_secrets)

WORDS = {(method, route.name): route.words
         for _, routes in tinyreg.ROUTES for method, route in routes.items()}
explain = Observation(None, "explain", WORDS).explain


def exchange(**fields):
    """An Exchange with something in every field."""
    values = {"client": "10.0.0.5", "user": "", "method": "GET", "target": "/v2/", "route": "get_base", "name": "",
              "reference": "", "status": 200, "received": 0, "sent": 3, "seconds": 0.001, "digest": "", "agent": ""}
    return Exchange(**dict(values, **fields))


def samples(server):
    """{(name, labels as a sorted tuple): value} of /metrics, as prometheus_client reads it."""
    parser = pytest.importorskip("prometheus_client.parser")
    found = {}
    for family in parser.text_string_to_metric_families(server.ask("GET", "/metrics").text):
        assert family.documentation and family.type in ("counter", "gauge", "histogram"), family
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


# Logs

def test_text_lines_have_bytes_time_and_digest(start_server, store):
    manifest = make_image(store, "lab/app", "v1")
    server = start_server()
    server.ask("GET", "/v2/lab/app/manifests/v1", User_Agent='an "agent"')
    line = until(server.log).splitlines()[0]
    assert re.fullmatch(r'\S+Z 127\.0\.0\.1 GET /v2/lab/app/manifests/v1 200 %d [0-9.]+ms digest=%s '
                        r'agent="an \'agent\'"' % (len(manifest.content), manifest.digest), line)


def test_json_lines_are_json_and_have_everything(start_server):
    server = start_server(None, "--log", "json")
    server.ask("POST", "/v2/lab/app/blobs/uploads/")
    server.ask("GET", "/v2/no/such/tags/list")
    until(lambda: server.log().count("\n") == 2)
    first, second = sorted((json.loads(line) for line in server.log().splitlines()), key=lambda line: line["status"])
    assert (first["route"], first["status"], first["name"]) == ("start_upload", 202, "lab/app")
    assert (second["route"], second["status"], second["method"]) == ("get_tags", 404, "GET")
    assert set(Exchange._fields) <= set(first) and first["time"].endswith("Z")
    server.stop()
    start, = map(json.loads, server.banner.splitlines())  # containers have one log for both outputs
    assert start["level"] == "info" and "listens on %s; stores in " % server.url in start["message"]


def test_what_goes_wrong_is_json_too(start_server, store):
    make_image(store, "lab/app", "v1")
    with open(store.layout.tag_path("lab/app", "v1") + "/current/link", "w") as file:
        file.write("nonsense")
    server = start_server(None, "--log", "json")
    server.ask("GET", "/v2/lab/app/manifests/v1")
    until(lambda: server.log().count("\n") == 2)
    lines = [json.loads(line) for line in server.log().splitlines()]
    assert lines[0]["level"] == "warning" and "damaged link" in lines[0]["message"]


@pytest.mark.parametrize("style", ["text", "json", "explain"])
def test_secrets_stay_out_of_every_log(start_server, style):
    server = start_server(None, "--log", style)
    server.ask("GET", "/v2/?access_token=SECRET1&n=5&SECRET2", Authorization="Basic U0VDUkVU")
    server.ask("GET", "/nothing?x=SECRET3")
    until(lambda: server.log().count("\n") == 2)
    assert "SECRET" not in server.log() and "U0VDUkVU" not in server.log()


@pytest.mark.parametrize("target, shown", [
    ("/v2/a/tags/list?n=5&last=b", "/v2/a/tags/list?n=5&last=b"),
    ("/v2/?token=x&n=1", "/v2/?token=***&n=1"),
    ("/v2/?n=1&&secret", "/v2/?n=1&&***"),
    ("http://user:word@host/v2/", "/v2/"),
    ("/v2/?next=x&nn=y", "/v2/?next=***&nn=***"),
    ("/v2/&token=x", "/v2/&token=***"),
])
def test_only_known_parameters_show_their_values(target, shown):
    assert without_secrets(target) == shown


def test_no_client_can_forge_a_line(start_server):
    server = start_server()
    address = server.host.split(":")
    for agent in (b"evil\x85\xff2026-01-01T00:00:00Z forged", b"\x9b31m"):
        with socket.create_connection((address[0], int(address[1]))) as sock:
            sock.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nUser-Agent: " + agent + b"\r\nConnection: close\r\n\r\n")
            while sock.recv(4096):
                pass
    until(lambda: server.log().count("\n") == 2)
    log = server.log()
    assert len(log.splitlines()) == 2 and "\\x85" in log and "\x9b" not in log and "\\x9b31m" in log
    assert harmless("a\nb\x00\u202e\ud800") == "a\\nb\\x00\\u202e\\ud800"


def test_a_log_file_is_opened_anew_at_sighup(start_server, tmp_path):
    path = tmp_path / "requests.log"
    server = start_server(None, "--log-file", str(path), "--workers", "2")
    server.ask("GET", "/v2/")
    until(lambda: path.exists() and "/v2/" in path.read_text())
    path.rename(tmp_path / "requests.log.1")
    server.process.send_signal(signal.SIGHUP)
    until(path.exists)

    def both_have_it():
        server.ask("GET", "/v2/after")
        return path.read_text().count("/v2/after") >= 10
    until(both_have_it)
    assert server.log() == ""


def test_a_log_file_that_can_not_be_opened_again_ends_nothing(start_server, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    server = start_server(None, "--log-file", str(folder / "requests.log"), "--workers", "1")
    folder.rename(tmp_path / "moved")
    server.process.send_signal(signal.SIGHUP)
    until(lambda: "the former log goes on" in (tmp_path / "moved" / "requests.log").read_text())
    assert server.ask("GET", "/v2/").status == 200


def test_a_transfer_that_the_client_cuts_is_logged_with_what_went_out(start_server, store):
    digest = push_blob(store, "lab/app", b"x" * (64 << 20))
    server = start_server()
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        sock.sendall(b"GET /v2/lab/app/blobs/%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % digest.encode())
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    sent = int(re.search(r" 200 ([0-9]+) ", until(server.log)).group(1))
    assert 0 < sent < 64 << 20


def test_an_upload_that_the_client_cuts_is_logged(start_server):
    server = start_server()
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        sock.sendall(b"POST /v2/lab/app/blobs/uploads/?digest=sha256:%s HTTP/1.1\r\n" % (b"0" * 64)
                     + b"Host: localhost\r\nContent-Length: 9\r\n\r\nabc")
    assert re.search(r"POST \S+ 499 0 \S+ in=3\n", until(server.log))


def test_a_log_file_that_can_not_be_opened_is_one_line(tmp_path):
    done = run_tinyreg("serve", "--root", tmp_path / "registry", "--listen", "127.0.0.1:0", "--log-file",
                       tmp_path / "no" / "such")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "no/such" in done.stderr


def test_off_and_quiet_say_nothing(start_server):
    for options in (["--log", "off"], ["--quiet"]):
        server = start_server(None, *options)
        assert server.ask("GET", "/v2/").status == 200
        server.stop()
        assert server.log() == ""


# The narration

def test_what_is_no_request_is_explained():
    words = explain(exchange(method="-", route="", target="-", status=400))
    assert "something that is no HTTP request" in words and "- -" not in words


def test_every_handler_of_the_protocol_is_explained():
    for pattern, handlers in tinyreg.ROUTES:
        for method, route in handlers.items():
            if pattern.pattern.startswith("/v2/"):
                words = explain(exchange(method=method, route=route.name, name="lab/app", reference="v1"))
                assert "GET /v2/" not in words and "{" not in words, words


def test_a_client_that_tries_https_first_is_no_alarm(start_server):
    """docker does so with each registry that it was told is insecure."""
    server = start_server(None, "--log", "explain")
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"\x16\x03\x01\x00\x02\x01\x00")
        assert sock.makefile("rb").readline().startswith(b"HTTP/1.0 400")
    until(server.log)
    assert "the client tries HTTPS first; that is normal) -> 400: no, only HTTP" in server.log()


@pytest.mark.parametrize("status, words", [(201, "yes; sha256:abab"), (202, "send its bytes")])
def test_a_mount_is_told_as_a_mount(status, words):
    asked = exchange(method="POST", route="start_upload", name="lab/app", status=status,
                     digest="sha256:" + "ab" * 32 if status == 201 else "",
                     target="/v2/lab/app/blobs/uploads/?from=lab/other&mount=sha256:abab")
    for seen in asked, without_names(asked):
        line = explain(seen)
        assert "may lab/app have a blob that another repository has? -> %d: " % status in line
        assert words in line and "it is here now" not in line


def test_a_push_reads_as_a_conversation():
    digest = "sha256:" + "ab" * 32
    asked = {"agent": "docker/24.0 go", "name": "lab/app"}
    lines = [explain(exchange(**dict(asked, **step))) for step in (
        {"method": "HEAD", "route": "get_blob", "reference": digest, "status": 404},
        {"method": "PATCH", "route": "append_to_upload", "status": 202, "received": 2048},
        {"method": "PUT", "route": "finish_upload", "status": 201, "digest": digest, "user": "alice"},
        {"method": "PUT", "route": "put_manifest", "reference": "v1", "status": 201, "digest": digest},
        {"method": "GET", "route": "get_manifest", "reference": digest, "status": 404},
        {"method": "GET", "route": "", "target": "/x{y}", "status": 418})]
    assert "docker/24.0 at 10.0.0.5: has lab/app the blob sha256:abababababab…? -> 404: no, so the client" in lines[0]
    assert "(2.0 KiB)" in lines[1] and "docker/24.0 (alice)" in lines[2] and "lab/app:v1" in lines[3]
    assert "lab/app@sha256:ab" in lines[4] and "/x{y}" in lines[5]


@contextlib.contextmanager
def terminal():
    """Standard error is a terminal; gives a function that reads so many exchanges from it."""
    def read(count):
        text = ""
        while text.count(" -> ") < count or not text.endswith("\n"):
            text += os.read(master, 1 << 16).decode()
        return text.replace("\r\n", "\n")

    master, slave = pty.openpty()
    former = os.dup(2)
    os.dup2(slave, 2)
    try:
        yield read
    finally:
        os.dup2(former, 2)
        for descriptor in (master, slave, former):
            os.close(descriptor)


def test_on_a_terminal_each_client_has_a_block_and_each_outcome_a_colour():
    observation = Observation(None, "explain", WORDS)
    alice = {"client": "10.0.0.5", "agent": "docker/28", "user": "alice", "route": "get_tags", "name": "lab/a\x1b[2J"}
    with terminal() as read:
        observation.record(exchange(**alice))
        observation.record(exchange(status=404, **alice))
        observation.record(exchange(client="10.0.0.6", status=507))
        observation.record(exchange(**alice))
        observation.record(exchange(method="HTTPS", route="", client="10.0.0.6", status=400))  # docker begins so
        blocks = re.findall("\x1b\\[1m(.*)\x1b\\[0m\n((?:  .*\n)*)", read(5))
    assert [who for who, _ in blocks] == ["docker/28 (alice) at 10.0.0.5", "someone at 10.0.0.6",
                                          "docker/28 (alice) at 10.0.0.5", "someone at 10.0.0.6"]
    colours = [re.findall("\x1b\\[([0-9]+)m[0-9:]{8} (.*?) -> ", lines) for _, lines in blocks]
    asked = "which tags has lab/a\\x1b[2J?"
    assert colours == [[("32", asked), ("33", asked)], [("31", "are you a registry?")], [("32", asked)],
                       [("33", "do you speak HTTPS? (the client tries HTTPS first; that is normal)")]]


def test_what_a_student_asks_what_that_is_can_be_read_there():
    upload = {"name": "lab/app", "reference": "01234567-0123-0123-0123-0123456789ab"}
    for fields, words in (
            (dict(route="get_tags", name="lab/app"), "names, each for one manifest"),
            (dict(route="get_referrers", name="lab/app"), "a signature, an SBOM"),
            (dict(route="get_upload", status=204, **upload), "(it was cut, and shall be resumed) -> 204: so far as"),
            (dict(route="get_token", target="/v2/token"), "stands for the password"),
            (dict(route="plain_http", status=400), "without TLS -> 400: no, this port speaks HTTPS"),
            (dict(route="plain_http", status=400, method="HEAD"), "without TLS -> 400: no, this port speaks HTTPS"),
            (dict(method="TLS", route="", status=tinyreg.CLIENT_LEFT), "does not like the certificate, and leaves")):
        assert words in explain(exchange(**fields)), fields


def test_a_teacher_reads_why_a_student_was_refused(start_server, store, tmp_path):
    """What the client is told, in place of one word for all refusals; and the question, if no name was checked yet."""
    (tmp_path / "users").write_text("alice:%s\n" % tinyreg.new_hash("pw"))
    (tmp_path / "rules").write_text("students/{user}/** * admin\n")
    make_image(store, "students/alice/app", "v1")
    server = start_server(store.root, "--log", "explain", "--users", tmp_path / "users", "--rules", tmp_path / "rules",
                          "--quota", "students/*=2K", "--immutable-tags", "v*")
    alice = tinyreg.basic_authorization("alice", "pw")
    content = os.urandom(3000)
    for method, target in (("POST", "/v2/students/bob/app/blobs/uploads/"),
                           ("POST", "/v2/students/alice/app/blobs/uploads/?digest=" + Digest.of(content)),
                           ("DELETE", "/v2/students/alice/app/manifests/v1")):
        assert server.ask(method, target, content, authorization=alice).status == 403
    server.ask("GET", "/v2/")
    server.ask("GET", "/v2/", authorization=tinyreg.basic_authorization("alice", "PW"))
    until(lambda: "wrong" in server.log())
    for words in ("403: alice may do nothing in students/bob/app, but may push to students/alice/**; whoever runs",
                  "-> 403: over the quota: students/alice has ", "-> 403: the tag v1 can't be moved or deleted",
                  "are you a registry? -> 401: who are you?", "are you a registry? -> 401: wrong user name or"):
        assert words in server.log(), server.log()


def test_live_shows_what_happens_in_all_workers(start_server):
    server = start_server(None, "--log", "explain", "--workers", "2")
    with server.open("GET", "/live/events") as stream:
        until(lambda: "tinyreg_watchers 1\n" in server.ask("GET", "/metrics").text)
        for number in range(8):
            server.ask("GET", "/v2/lab/n%d/tags/list" % number)
        waiting = {"which tags has lab/n%d?" % number for number in range(8)}  # in any order: two workers write
        while waiting:
            line = stream.readline().decode()
            found = {words for words in waiting if words in line}
            assert not found or line.startswith("data: ")
            waiting -= found
    server.ask("GET", "/v2/")
    until(lambda: "tinyreg_watchers 0\n" in server.ask("GET", "/metrics").text)


def test_live_is_for_the_classroom_or_an_admin(start_server):
    server = start_server(None, "--anonymous", "pull")
    assert [server.ask("GET", path).status for path in ("/live", "/live/events")] == [403] * 2


def test_live_names_no_repository_that_its_watcher_may_not_see(start_server, tmp_path):
    """Neither by a token's scope, nor by a query, nor where a request was refused before its name was looked at."""
    (tmp_path / "users").write_text("".join("%s:%s\n" % (user, tinyreg.new_hash("pw")) for user in ("alice", "bob")))
    (tmp_path / "rules").write_text("** * pull\nhidden/** * none\nhidden/** bob push\n")
    server = start_server(None, "--log", "explain", "--users", tmp_path / "users", "--rules", tmp_path / "rules")
    alice, bob = (tinyreg.basic_authorization(user, "pw") for user in ("alice", "bob"))
    asked = [("GET", "/v2/token?scope=repository:hidden/a:pull"), ("GET", "/?repository=hidden/a&reference=1"),
             ("GET", "/v2/_catalog?last=hidden/a"), ("GET", "/v2/hidden/a/tags/list"), ("GET", "/hidden/a"),
             ("PUT", "/v2/hidden/a/tags/list"), ("GET", "/v2/hidden/A/tags/list"), ("GET", "/archive/hidden/A:1.tar"),
             ("POST", "/v2/open/blobs/uploads/?from=hidden/a&mount=" + Digest.of(b"")), ("GET", "/v2/open/tags/list")]
    with server.open("GET", "/live/events", authorization=alice) as stream:
        until(lambda: "tinyreg_watchers 1\n" in server.ask("GET", "/metrics", authorization=bob).text)
        for method, target in asked:
            server.ask(method, target)
            server.ask(method, target, authorization=bob)
        lines = [b""]
        while b"bob" not in lines[-1] or b"which tags has open?" not in lines[-1]:
            lines.append(stream.readline())
    shown = b"".join(lines).decode()
    assert "hidden" not in shown and "a token, please" in shown and "GET …" in shown


@pytest.mark.parametrize("rules, status", [("** * pull\nci/** alice admin\n", 403), ("** alice admin\n", 200)])
def test_who_has_a_password_is_no_admin_for_that(tmp_path, rules, status):
    (tmp_path / "users").write_text("alice:%s\n" % tinyreg.new_hash("secret"))
    (tmp_path / "rules").write_text(rules)
    access = tinyreg.Access("none", str(tmp_path / "users"), str(tmp_path / "rules"))
    request = tinyreg.Request("GET", "/live", {"authorization": tinyreg.basic_authorization("alice", "secret")})
    request.observation = Observation(str(tmp_path), "off", [])
    answer = tinyreg.dispatch(tinyreg.Registry(), access, request)
    assert answer.status == status and (status == 200 or b"** alice admin" in answer.body)


def test_a_server_stops_while_somebody_looks(start_server):
    server = start_server(None, "--log", "explain", "--drain", "3600")
    with server.open("GET", "/live/events"):
        assert server.stop() == 0


def test_the_file_behind_live_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(tinyreg, "MAX_LIVE", 2000)
    observation = Observation(str(tmp_path), "off", [])
    lines = observation.live.watch()
    assert next(lines) is None
    for number in range(100):
        observation.record(exchange(target="/%d" % number))
        assert next(found for found in lines if found).target == "/%d" % number
    assert os.stat(observation.live.path).st_size < 3000
    lines.close()
    assert observation.metrics.total("watchers") == 0


# Metrics

def test_a_process_knows_how_much_more_it_has_than_the_one_with_least():
    metrics = Metrics([], processes=3)
    for process, connections in enumerate((2, 5, 3)):
        metrics.start(process)
        metrics.add("connections", connections)
    assert metrics.excess("connections") == 1
    metrics.row = 0
    assert metrics.excess("connections") == 0


def test_prometheus_reads_the_metrics_and_they_are_true(start_server, store):
    make_image(store, "lab/app", "v1", (b"x" * 1000,))
    server = start_server(None, "--workers", "2")
    with Client(server) as client:
        for _ in range(20):
            client.tags("lab/app")
        client.put_blob("lab/app", b"12345")
    server.ask("GET", "/nowhere")
    labels = (("method", "GET"), ("route", "get_tags"))
    unknown = "tinyreg_requests_total", (("method", "other"), ("route", "none"), ("status", "404"))
    until(lambda: unknown in samples(server))
    found = samples(server)
    assert found["tinyreg_requests_total", labels + (("status", "200"),)] == 20
    assert found["tinyreg_request_seconds_count", labels] == 20
    assert found["tinyreg_request_seconds_bucket", (("le", "+Inf"),) + labels] == 20
    assert 0 < found["tinyreg_request_seconds_sum", labels] < 20
    assert found[unknown] == 1
    assert found["tinyreg_received_bytes_total", ()] == 5
    assert found["tinyreg_sent_bytes_total", ()] > 20 * len('{"name":"lab/app","tags":["v1"]}')
    assert 0 < found["tinyreg_cache_hits_total", ()] < 20
    assert found["tinyreg_store_blobs", ()] == 4 and found["tinyreg_store_repositories", ()] == 1
    assert found["tinyreg_store_bytes", ()] > 1000 and found["tinyreg_store_free_bytes", ()] > 0


@pytest.mark.parametrize("request_bytes, status", [
    (b"no request\r\n\r\n", 400), (b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 70000, 431), (b"GET ", 408)])
def test_what_is_refused_before_it_is_a_request_is_logged_and_counted(start_server, request_bytes, status):
    server = start_server(None, **{"HEAD_LIMIT": 1.0, "TICK": 0.05} if status == 408 else {})
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        sock.sendall(request_bytes)
        assert b" %d " % status in sock.recv(100)
    assert re.fullmatch(r"\S+Z 127\.0\.0\.1 - - %d [1-9][0-9]* [0-9.]+ms\n" % status, until(server.log))
    labels = (("method", "other"), ("route", "none"), ("status", str(status)))
    assert samples(server)["tinyreg_requests_total", labels] == 1


def test_what_gc_and_verify_found_is_in_the_metrics(start_server, store):
    manifest = make_image(store, "lab/app", "v1", (b"x" * 1000,))
    push_blob(store, "lab/app", b"stray")
    server = start_server()
    assert not [name for name, _ in samples(server) if name.startswith("tinyreg_last_")]
    for command in (["gc", "--dry-run", "--grace", "0"], ["gc", "--grace", "0"], ["verify"]):
        assert run_tinyreg(*command, "--root", server.root).returncode == 0
        found = {name: value for (name, _), value in samples(server).items() if name.startswith("tinyreg_last_")}
        assert found.get("tinyreg_last_gc_freed_bytes") == (None if "--dry-run" in command else 5)
    assert found["tinyreg_last_verify_findings"] == 0 and found["tinyreg_last_verify_read_bytes"] > 1000
    assert abs(found["tinyreg_last_verify_seconds"] - time.time()) < 60
    with open(store.layout.blob_path(manifest.blobs[1].digest), "w") as file:
        file.write("damaged")
    assert run_tinyreg("verify", "--root", server.root).returncode == 1
    assert samples(server)["tinyreg_last_verify_findings", ()] == 1


def test_buckets_grow_and_no_count_is_lost_among_threads():
    metrics = Metrics([("GET", "get_blob")])
    for seconds in (0.0001, 0.001, 0.3, 100):
        metrics.count(exchange(route="get_blob", seconds=seconds, status=299))
    text = metrics.text([])
    buckets = [int(line.split()[-1]) for line in text.splitlines() if "_bucket{" in line]
    assert buckets == [1, 2, 2, 2, 2, 3, 3, 3, 4] and 'status="other"} 4' in text
    metrics.count(exchange(route="", seconds=100))  # to compute quantiles Prometheus wants the buckets of 0, too
    assert metrics.text([]).count("_bucket{") == 2 * 9 and 'route="none",le="0.0005"} 0\n' in metrics.text([])


# Health

def test_health_and_readiness_need_no_rights(start_server):
    server = start_server(None, "--anonymous", "none")
    assert server.ask("GET", "/healthz")[::2] == (200, b"ok\n")
    assert server.ask("GET", "/readyz")[::2] == (200, b"ready\n")


def test_a_store_that_can_not_be_written_is_not_ready(start_server, tmp_path):
    server = start_server()
    (tmp_path / "registry" / "tinyreg" / "scratch").rename(tmp_path / "away")
    assert server.ask("GET", "/readyz").status >= 500 and server.ask("GET", "/healthz").status == 200


def test_a_disk_that_answers_nothing_is_not_ready_and_readyz_does_not_hang(monkeypatch):
    """As a network's disk may, while it is away; and when it is back, so is the answer."""
    is_back, before = threading.Event(), threading.active_count()

    class Away(Registry):
        def check_ready(self, to_write=True):
            is_back.wait()

    monkeypatch.setattr("tinyreg.READINESS_WAIT", 0.05)
    for _ in range(3):
        answer = dispatch(Away(), Access(), Request("GET", "/readyz"))
        assert answer.status == 503 and b"has not answered" in answer.body
    assert threading.active_count() <= before + 1
    is_back.set()
    until(lambda: dispatch(Away(), Access(), Request("GET", "/readyz")).status == 200)
