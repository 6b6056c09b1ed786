"""Notifications: Distribution's events, kept on disk until their endpoint has had them, in order, at least once."""

import hashlib
import hmac
import http.server
import itertools
import json
import os
import re
import signal
import threading

import pytest
from conftest import PATIENCE, run_tinyreg, until
from samples import CONFIG, image, push_blob

import tinyreg
from tinyreg import OCI_MANIFEST, CommandError, Digest, Endpoint, EventQueue, Metrics


class Hook:
    """An endpoint that keeps what it gets; answers `status`, and hangs while `open` is not set."""

    def __init__(self):
        self.got, self.status, self.open, self.asked = [], 200, threading.Event(), False
        self.open.set()
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hook.asked = True
                hook.open.wait(PATIENCE)
                if hook.status < 400:
                    hook.got.append((self.path, dict(self.headers), body))
                self.send_response(hook.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *anything):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = "http://127.0.0.1:%d/hook" % self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def events(self):
        return [json.loads(body.decode())["events"][0] for _, _, body in self.got]

    def tags(self):
        return [event["target"]["tag"] for event in self.events() if "tag" in event["target"]]

    def close(self):
        self.open.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hook():
    hook = Hook()
    yield hook
    hook.close()


def push(server, name, *tags):
    """Push one small image under some tags; returns its manifest's bytes."""
    for blob in (CONFIG, b"layer one"):
        status = server.ask("POST", "/v2/%s/blobs/uploads/?digest=%s" % (name, Digest.of(blob)), blob).status
        assert status == 201
    manifest = json.dumps(image([b"layer one"])).encode()
    for tag in tags:
        assert server.ask("PUT", "/v2/%s/manifests/%s" % (name, tag), manifest,
                          content_type=OCI_MANIFEST).status == 201
    return manifest


def test_events_are_distributions(start_server, hook, tmp_path):
    server = start_server(None, "--notify", hook.url + "#actions=push,pull,mount,delete")
    manifest = push(server, "lab/app", "v1")
    digest, layer = Digest.of(manifest), Digest.of(b"layer one")
    server.ask("GET", "/v2/lab/app/manifests/v1", User_Agent="test/1")
    server.ask("GET", "/v2/lab/app/blobs/" + layer)
    server.ask("HEAD", "/v2/lab/app/blobs/" + layer)
    server.ask("POST", "/v2/lab/new/blobs/uploads/?from=lab/app&mount=" + layer)
    server.ask("DELETE", "/v2/lab/app/manifests/v1")
    server.ask("DELETE", "/v2/lab/app/manifests/" + digest)
    server.ask("DELETE", "/v2/lab/app/blobs/" + layer)
    until(lambda: len(hook.got) >= 9)
    events = hook.events()
    assert [event["action"] for event in events] == ["push"] * 3 + ["pull"] * 2 + ["mount"] + ["delete"] * 3
    target = events[2]["target"]
    assert target == {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest,
                      "size": len(manifest), "length": len(manifest), "repository": "lab/app", "tag": "v1",
                      "url": "%s/v2/lab/app/manifests/%s" % (server.url, digest)}
    assert events[1]["target"]["digest"] == layer and events[1]["target"]["size"] == 9
    assert events[1]["target"]["mediaType"] == "application/octet-stream"
    assert events[3]["target"]["tag"] == "v1" and events[4]["target"]["digest"] == layer
    assert events[3]["request"]["useragent"] == "test/1" and events[3]["request"]["method"] == "GET"
    assert events[3]["request"]["addr"] == "127.0.0.1" and events[3]["request"]["host"] == server.host
    assert events[5]["target"]["fromRepository"] == "lab/app" and events[5]["target"]["repository"] == "lab/new"
    assert events[6]["target"]["tag"] == "v1" and events[6]["target"]["digest"] == ""
    assert events[7]["target"]["digest"] == digest and events[8]["target"]["digest"] == layer
    assert len({event["id"] for event in events}) == 9
    assert len({event["source"]["instanceID"] for event in events}) == 1
    assert hook.got[0][1]["Content-Type"] == "application/vnd.docker.distribution.events.v2+json"


def test_filters_headers_and_signature(start_server, hook, tmp_path):
    (tmp_path / "secret").write_text("a shared secret\n")
    (tmp_path / "headers").write_text("X-Team: lab\nAuthorization: Bearer abc\n")
    server = start_server(None, "--notify", "%s?key=1#actions=push&repositories=lab/*&secret=%s&headers=%s" % (
        hook.url, tmp_path / "secret", tmp_path / "headers"))
    push(server, "other/app", "no")
    push(server, "lab/app/deeper", "no")
    push(server, "lab/app", "yes")
    server.ask("DELETE", "/v2/lab/app/manifests/yes")
    push(server, "lab/app", "last")
    until(lambda: "last" in hook.tags())
    assert hook.tags() == ["yes", "last"]
    assert {event["action"] for event in hook.events()} == {"push"}
    path, headers, body = hook.got[0]
    assert path == "/hook?key=1" and headers["X-Team"] == "lab" and headers["Authorization"] == "Bearer abc"
    assert headers["X-Hub-Signature-256"] == "sha256=" + hmac.new(b"a shared secret", body, hashlib.sha256).hexdigest()


def test_events_survive_kill_9_and_come_in_order(start_server, hook):
    hook.status = 503
    server = start_server(None, "--notify", hook.url + "#actions=push", "--workers", "2")
    push(server, "lab/app", *["t%d" % number for number in range(5)])
    server.restart(signal.SIGKILL)
    push(server, "lab/app", *["t%d" % number for number in range(5, 10)])
    server.restart(signal.SIGKILL)
    hook.status = 200
    until(lambda: "t9" in hook.tags())
    assert hook.tags() == ["t%d" % number for number in range(10)]
    assert "does not take notifications: it answered 503" in server.log()


def test_an_endpoint_that_hangs_slows_nothing_and_hinders_no_other(start_server, hook):
    stuck = Hook()
    stuck.open.clear()
    try:
        server = start_server(None, "--notify", stuck.url, "--notify", hook.url, NOTIFY_LIMIT=3600.0)
        push(server, "warm", "up")
        push(server, "lab/app", *["t%d" % number for number in range(20)])
        until(lambda: "t19" in hook.tags())
        waiting = ['tinyreg_notifications_waiting{endpoint="%s"} %d\n' % (Endpoint(url).shown, number)
                   for url, number in ((hook.url, 0), (stuck.url, 25))]
        until(lambda: all(line in server.ask("GET", "/metrics").text for line in waiting), what="the metrics")
    finally:
        stuck.close()


def test_what_is_answered_from_memory_is_a_pull_all_the_same(start_server, hook):
    server = start_server(None, "--notify", hook.url + "#actions=pull", "--workers", "1")
    push(server, "lab/app", "v1")
    for _ in range(5):
        server.ask("GET", "/v2/lab/app/manifests/v1")
    until(lambda: len(hook.got) >= 5)


def test_a_full_queue_drops_its_oldest_and_says_so(start_server, hook):
    hook.status = 503
    server = start_server(None, "--notify", hook.url + "#repositories=lab/app", MAX_EVENTS=5)
    push(server, "lab/app", *["t%d" % number for number in range(8)])
    hook.status = 200
    until(lambda: "t7" in hook.tags())
    assert hook.tags()[-5:] == ["t3", "t4", "t5", "t6", "t7"]
    assert "the oldest was dropped" in server.log()
    dropped, = re.findall("tinyreg_events_dropped_total ([0-9]+)\n", server.ask("GET", "/metrics").text)
    assert int(dropped) + len(hook.got) == 10


def test_what_is_dropped_while_an_endpoint_is_slow_is_the_oldest(start_server, tmp_path, hook):
    folder = tmp_path / "registry" / "tinyreg" / "notify" / Endpoint(hook.url).key

    def fill(numbers):
        for number in numbers:
            (folder / str(number)).write_text('{"events": [{"target": {"tag": "%d"}}]}' % number)

    folder.mkdir(parents=True)
    fill(range(1000, 1200))
    (folder / "README").write_text("not ours")
    hook.open.clear()
    start_server(None, "--notify", hook.url, MAX_EVENTS=200)
    until(lambda: hook.asked)
    fill(range(1200, 1400))
    hook.open.set()
    until(lambda: "1399" in hook.tags())
    assert hook.tags() == ["%d" % number for number in itertools.chain(range(1000, 1100), range(1200, 1400))]


def test_a_clock_that_is_set_back_turns_no_order_round(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    endpoint = Endpoint("http://127.0.0.1:1/")
    queue = EventQueue(str(tmp_path), endpoint, Metrics([]))
    now = [0]
    monkeypatch.setattr(tinyreg.time, "time", lambda: now[0] + 1e9)
    for now[0] in (1000, 2000, 500, 501, 500):
        queue.put({"target": now[0]})
    folder = tmp_path / "notify" / endpoint.key
    events = [json.loads((folder / name).read_text())["events"][0] for name in sorted(os.listdir(str(folder)))]
    assert [event["target"] for event in events] == [1000, 2000, 500, 501, 500]


def test_a_new_endpoint_hears_of_what_is_new(start_server, hook):
    server = start_server(None, "--notify", "http://127.0.0.1:1/")
    push(server, "lab/app", "old")
    server.options += ["--notify", hook.url]
    server.restart()
    push(server, "lab/app", "new")
    until(lambda: "new" in hook.tags())
    assert "old" not in hook.tags()


def test_a_push_whose_event_can_not_be_queued_is_not_acknowledged(start_server, hook, tmp_path):
    server = start_server(None, "--notify", hook.url)
    push(server, "lab/app", "v1")
    until(lambda: "v1" in hook.tags())
    queue = tmp_path / "registry" / "tinyreg" / "notify"
    os.rename(str(queue), str(queue) + ".away")
    manifest = json.dumps(image([b"layer one"])).encode()
    assert server.ask("PUT", "/v2/lab/app/manifests/v2", manifest).status == 500
    os.rename(str(queue) + ".away", str(queue))
    assert server.ask("PUT", "/v2/lab/app/manifests/v2", manifest).status == 201
    until(lambda: "v2" in hook.tags())


def test_an_upstream_that_goes_away_before_its_pull_is_told_of_fails_no_pull(store):
    class Leaving(tinyreg.Wrapper):
        """A registry that opens one blob, and is away from then on."""

        opened = 0

        def open_blob(self, name, digest, offset=0):
            self.opened += 1
            if self.opened > 1:
                raise tinyreg.RegistryError("UNAVAILABLE")
            return self.inner.open_blob(name, digest, offset)

    digest = push_blob(store, "lab/app", b"layer one")
    endpoint = Endpoint("http://127.0.0.1:1/#actions=pull")
    request = tinyreg.Request("GET", "/v2/lab/app/blobs/" + digest)
    request.observation = tinyreg.Observation(store.layout.own, "off", {}, [endpoint])
    response = tinyreg.dispatch(Leaving(store), tinyreg.Access("pull"), request)
    assert response.status == 200
    with response.body as blob:
        assert blob.read() == b"layer one"
    (queue,) = request.observation.queues
    assert len(queue.numbers()) == 1


@pytest.mark.parametrize("text", ["ftp://x/", "hook", "http:///x", "http://x/#actions=shout", "http://x/#colour=red",
                                  "http://x/#actions", "http://user:word@host/", "http://:word@host/", "http://x:y/",
                                  "http://x:99999/", "http://[x/"])
def test_a_bad_endpoint_is_a_usage_error(text):
    with pytest.raises(CommandError) as raised:
        Endpoint(text)
    assert "word@" not in str(raised.value)


def test_no_token_of_an_endpoint_is_shown():
    digits = hashlib.sha256(b"https://host:1/path?token=abc").hexdigest()[:8]
    assert Endpoint("https://host:1/path?token=abc").shown == "https://host:1 (%s)" % digits


def test_an_endpoint_that_is_there_twice_is_refused_in_one_line(tmp_path):
    done = run_tinyreg("serve", "--root", tmp_path / "registry", "--listen", "127.0.0.1:0", "--notify", "http://x/abc",
                       "--notify", "http://x/abc#actions=pull", timeout=PATIENCE)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "twice" in done.stderr
    assert "abc" not in done.stderr
