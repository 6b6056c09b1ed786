"""Several processes, one store: an answer is never older than the last acknowledged change, whoever made it."""

import json
import os
import random
import signal
import threading

import pytest

import samples
from conftest import PATIENCE, Client, by_digest, run_tinyreg, until, workers_of
from tinyreg import OCI_MANIFEST, Digest, Directory

SEED = 20240602


class Model:
    """What the registry must say: for each repository its manifests, tags and blobs."""

    def __init__(self, choice):
        self.choice = choice
        self.manifests = {name: set() for name in ("a", "b/c")}
        self.tags = {name: {} for name in self.manifests}
        self.layers = {name: set() for name in self.manifests}
        self.known = [samples.to_manifest(samples.image(layers=())), samples.to_manifest(
            samples.image(layers=(), artifactType="x/y"))]
        for subject in self.known[:2]:
            about = {"mediaType": OCI_MANIFEST, "digest": subject.digest, "size": len(subject.content)}
            self.known.append(samples.to_manifest(samples.image(layers=(), artifactType="x/z", subject=about)))
        self.ever = set()  # repositories that have held a manifest

    def change(self, client):
        """One random change, acknowledged."""
        name, manifest, tag = (self.choice.choice(options) for options in (sorted(self.tags), self.known, "xyz"))
        what = self.choice.choice(["push"] * 4 + ["untag", "delete", "blob", "unblob"])
        if what == "push":
            self._blob(client, name, samples.CONFIG)
            assert client.ask("PUT", "/v2/%s/manifests/%s" % (name, tag), manifest.content,
                              content_type=OCI_MANIFEST)[0] == 201
            self.manifests[name].add(manifest.digest)
            self.tags[name][tag] = manifest.digest
            self.ever.add(name)
        elif what == "untag":
            status = client.ask("DELETE", "/v2/%s/manifests/%s" % (name, tag))[0]
            assert status == (202 if self.tags[name].pop(tag, None) else 404)
        elif what == "delete":
            status = client.ask("DELETE", "/v2/%s/manifests/%s" % (name, manifest.digest))[0]
            assert status == (202 if manifest.digest in self.manifests[name] else 404)
            self.manifests[name].discard(manifest.digest)
            self.tags[name] = {tag: digest for tag, digest in self.tags[name].items() if digest != manifest.digest}
        elif what == "blob":
            self._blob(client, name, b"layer of " + tag.encode())
        else:
            digest = Digest.of(b"layer of " + tag.encode())
            status = client.ask("DELETE", "/v2/%s/blobs/%s" % (name, digest))[0]
            assert status == (202 if digest in self.layers[name] else 404)
            self.layers[name].discard(digest)

    def _blob(self, client, name, content):
        digest = Digest.of(content)
        assert client.ask("POST", "/v2/%s/blobs/uploads/?digest=%s" % (name, digest), content)[0] == 201
        self.layers[name].add(digest)

    def check(self, client):
        """One random question, whose answer must be what the model says."""
        name, tag, manifest = (self.choice.choice(options) for options in (sorted(self.tags), "xyz", self.known))
        method = self.choice.choice(["GET", "HEAD"])
        what = self.choice.choice(["tag", "manifest", "tags", "catalog", "blob", "referrers"])
        if what == "tag":
            status, headers, _ = client.ask(method, "/v2/%s/manifests/%s" % (name, tag))
            assert headers.get("Docker-Content-Digest") == self.tags[name].get(tag), (name, tag, status)
        elif what == "manifest":
            status = client.ask(method, "/v2/%s/manifests/%s" % (name, manifest.digest))[0]
            assert status == (200 if manifest.digest in self.manifests[name] else 404)
        elif what == "tags" and name in self.ever:
            found = client.ask("GET", "/v2/%s/tags/list" % name).json
            assert found["tags"] == sorted(self.tags[name])
        elif what == "catalog":
            found = client.ask("GET", "/v2/_catalog").json
            assert found["repositories"] == sorted(self.ever)
        elif what == "blob":
            digest = Digest.of(b"layer of " + tag.encode())
            status = client.ask(method, "/v2/%s/blobs/%s" % (name, digest))[0]
            assert status == (200 if digest in self.layers[name] else 404)
        elif what == "referrers":
            found = client.ask("GET", "/v2/%s/referrers/%s" % (name, manifest.digest)).json
            wanted = [known.digest for known in self.known
                      if known.subject == manifest.digest and known.digest in self.manifests[name]]
            assert [entry["digest"] for entry in found["manifests"]] == sorted(wanted)


@pytest.mark.parametrize("workers", [1, 4])
def test_no_answer_is_older_than_the_last_change(start_server, tmp_path, workers):
    """Random changes and questions over many connections to two servers of one root, against a model."""
    servers = [start_server(tmp_path / "registry", "--workers", str(workers)) for _ in range(2)]
    clients = [Client(server) for server in servers for _ in range(6)]
    choice = random.Random(SEED)
    model = Model(choice)
    for _ in range(700):
        model.change(choice.choice(clients))
        for _ in range(4):
            model.check(choice.choice(clients))
    for client in clients:
        client.close()


def test_readers_never_see_a_tag_go_back(start_server, tmp_path):
    """One client moves a tag on and on, many read it all the time: what was acknowledged before a read began is the
    least that the read may see."""
    server = start_server(tmp_path / "registry", "--workers", "3")
    store = Directory(server.root)
    versions = [samples.make_image(store, "a", None, layers=(), annotations={"n": str(n)}) for n in range(150)]
    order = {manifest.digest: n for n, manifest in enumerate(versions)}
    acknowledged, wrong, done = [-1], [], threading.Event()

    def read():
        client = Client(server)
        while not done.is_set():
            least = acknowledged[0]
            digest = client.ask("GET", "/v2/a/manifests/x")[1].get("Docker-Content-Digest")
            if order.get(digest, -1) < least:
                wrong.append((least, digest))
        client.close()

    readers = [threading.Thread(target=read) for _ in range(6)]
    for reader in readers:
        reader.start()
    writer = Client(server)
    for n, manifest in enumerate(versions):
        assert writer.ask("PUT", "/v2/a/manifests/x", manifest.content, content_type=OCI_MANIFEST)[0] == 201
        acknowledged[0] = n
    done.set()
    for reader in readers:
        reader.join(PATIENCE)
    writer.close()
    assert wrong == []


def test_a_command_beside_a_running_server_counts_at_once(start_server, tmp_path):
    server = start_server(tmp_path / "registry", "--workers", "2")
    samples.make_image(Directory(server.root), "a", "x")
    clients = [Client(server) for _ in range(6)]
    assert {client.ask("GET", "/v2/a/manifests/x")[0] for client in clients} == {200}
    assert run_tinyreg("rm", "a:x", "--root", server.root).returncode == 0
    assert {client.ask("GET", "/v2/a/manifests/x")[0] for client in clients} == {404}
    for client in clients:
        client.close()


def test_an_upload_goes_from_worker_to_worker(start_server):
    """docker opens a new connection for each request, and any worker may get it."""
    server = start_server(None, "--workers", "4")
    for number in range(20):
        content = os.urandom(300000)
        location = server.ask("POST", "/v2/a/blobs/uploads/")[1]["Location"]
        for part in (content[:100000], content[100000:]):
            status, headers, _ = server.ask("PATCH", location, part)
            assert status == 202
            location = headers["Location"]
        digest = Digest.of(content, "sha512" if number % 4 == 3 else "sha256")
        assert server.ask("PUT", by_digest(location, digest))[0] == 201
        assert server.ask("GET", "/v2/a/blobs/" + digest)[2] == content


@pytest.mark.parametrize("state", ["", "5:sha256:" + "0" * 64 + ":" + "0" * 64, "x", "::::", "%ff", "a" * 4000])
def test_a_state_that_the_server_did_not_give_is_ignored(server, state):
    """A client can't vouch for bytes: they are read again, and hashed."""
    location = server.ask("POST", "/v2/a/blobs/uploads/")[1]["Location"].partition("?")[0]
    assert server.ask("PATCH", location, b"hello")[0] == 202
    wrong = "sha256:" + "0" * 64
    status, _, body = server.ask("PUT", "%s?state=%s&digest=%s" % (location, state, wrong))
    assert (status, json.loads(body.decode())["errors"][0]["code"]) == (400, "DIGEST_INVALID")
    location = server.ask("POST", "/v2/a/blobs/uploads/")[1]["Location"].partition("?")[0]
    assert server.ask("PATCH", location, b"hello")[0] == 202
    assert server.ask("PUT", "%s?state=%s&digest=%s" % (location, state, Digest.of(b"hello")))[0] == 201


def test_the_state_of_another_session_is_ignored(server):
    """The sum of these bytes, signed, but for another upload."""
    locations = []
    for content in (b"hello", b"other"):
        location = server.ask("POST", "/v2/a/blobs/uploads/")[1]["Location"]
        locations.append(server.ask("PATCH", location, content)[1]["Location"].partition("?"))
    stolen = "%s?%s&digest=%s" % (locations[1][0], locations[0][2], Digest.of(b"hello"))
    assert server.ask("PUT", stolen)[0] == 400


# The supervisor

def test_a_worker_that_dies_is_replaced(start_server):
    server = start_server(None, "--workers", "2")
    until(lambda: len(workers_of(server)) == 2)
    before = workers_of(server)
    os.kill(before[0], signal.SIGKILL)
    until(lambda: len(workers_of(server)) == 2 and before[0] not in workers_of(server))
    for _ in range(20):
        assert server.ask("GET", "/v2/")[0] == 200


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_processes(start_server, how):
    server = start_server(None, "--workers", "3")
    until(lambda: len(workers_of(server)) == 3)
    workers = workers_of(server)
    assert server.stop(how) == 0
    assert not any(os.path.exists("/proc/%d" % pid) for pid in workers)


def test_workers_end_when_their_supervisor_is_killed(start_server):
    server = start_server(None, "--workers", "3")
    until(lambda: len(workers_of(server)) == 3)
    workers = workers_of(server)
    server.stop(signal.SIGKILL)
    until(lambda: not any(os.path.exists("/proc/%d" % pid) for pid in workers))
