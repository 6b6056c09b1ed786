"""Remote: other registries, as upstream and as target: Distribution (Debian's docker-registry), with and without
logins, behind a strict token server, behind proxies that cut, delay and redirect; and pull and push on top of it."""

import base64
import concurrent.futures
import contextlib
import errno
import http.client
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

import tinyreg
from conftest import PATIENCE, TINYREG, Client, free_port, get, open_url, run_tinyreg, until
from registries import Proxy, needs_distribution
from samples import (EVIL, index, is_harmless, make_image, make_referrer, read_blob, to_manifest)
from test_copy import make_multi
from tinyreg import (ClientSetup, Digest, Directory, RegistryError, Remote, Traffic, client_script,
                     copy, copy_bytes, find_login)

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No login of whoever runs the tests is used."""
    path = tmp_path / "home"
    path.mkdir()
    monkeypatch.setenv("HOME", str(path))
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    return path


def login_entry(user="me", password="secret"):
    return {"auth": base64.b64encode(("%s:%s" % (user, password)).encode()).decode()}


def save_login(home, host, **login):
    """What docker login writes."""
    (home / ".docker").mkdir(exist_ok=True)
    (home / ".docker" / "config.json").write_text(json.dumps({"auths": {host: login_entry(**login)}}))


@pytest.fixture
def root(tmp_path):
    """Not where servers have theirs."""
    return tmp_path / "near"


@pytest.fixture
def quick(monkeypatch):
    """Back-off without the waiting; the waits are returned."""
    waits = []
    monkeypatch.setattr(tinyreg.time, "sleep", waits.append)
    return waits


def holdings(registry, name):
    """{tag: digest}, and the digests of all that hangs below them."""
    found, tags = set(), {tag: registry.resolve(name, tag) for tag in registry.tags(name)}

    def walk(digest):
        manifest = registry.manifest(name, digest)
        found.add(digest)
        for child in manifest.manifests:
            walk(child.digest)
        for blob in manifest.blobs:
            with registry.open_blob(name, blob.digest) as opened:
                content = bytearray()
                copy_bytes(opened, blob.size, content.extend)
            assert Digest.of(bytes(content), blob.digest.algorithm) == blob.digest
            found.add(blob.digest)
    for digest in tags.values():
        walk(digest)
    return tags, found


# Distribution as target and upstream

@needs_distribution
def test_an_index_goes_to_distribution_and_back(store, distribution, tmp_path):
    make_multi(store, "demo")
    copy(store, Remote(distribution), "demo", "latest", "far/demo")
    assert holdings(Remote(distribution), "far/demo") == holdings(store, "demo")
    back = Directory(str(tmp_path / "back"))
    copy(Remote(distribution), back, "far/demo", "latest", "demo")
    assert holdings(back, "demo") == holdings(store, "demo")


@needs_distribution
def test_referrers_travel_by_the_fallback_tag_where_there_is_no_api(store, distribution, tmp_path):
    manifest = make_image(store, "demo")
    notes = [make_referrer(store, "demo", manifest, artifactType="application/x.%d" % number) for number in range(2)]
    copy(store, Remote(distribution), "demo", "latest")
    tag = "sha256-" + manifest.digest.encoded
    listed = Remote(distribution).manifest("demo", Remote(distribution).resolve("demo", tag)).manifests
    assert {entry.digest for entry in listed} == {note.digest for note in notes}
    back = Directory(str(tmp_path / "back"))
    report = copy(Remote(distribution), back, "demo", "latest")
    assert {found.digest for found in back.referrers("demo", manifest.digest)} == {note.digest for note in notes}
    assert sorted(referrer["type"] for referrer in report.referrers) == ["application/x.0", "application/x.1"]


@needs_distribution
def test_a_second_push_sends_nothing_and_another_name_is_mounted(store, distribution, start_proxy):
    make_image(store, "demo")
    proxy = start_proxy(distribution)
    remote = Remote(proxy.host)
    copy(store, remote, "demo", "latest", "one")
    proxy.seen.clear()
    copy(store, remote, "demo", "latest", "one")
    assert {verb for verb, _, _ in proxy.seen} <= {"HEAD", "GET"}
    proxy.seen.clear()
    copy(store, remote, "demo", "latest", "two")
    assert len(proxy.asked("POST", "mount=")) == 3 and not proxy.asked("PATCH", "")
    assert holdings(Remote(distribution), "two") == holdings(store, "demo")


@needs_distribution
def test_large_blobs_go_in_chunks(store, distribution, start_proxy, monkeypatch):
    monkeypatch.setattr(tinyreg, "UPLOAD_CHUNK", 1 << 20)
    make_image(store, "demo", layers=(os.urandom(2500000),))
    proxy = start_proxy(distribution)
    copy(store, Remote(proxy.host), "demo", "latest")
    ranges = [headers["content-range"] for verb, _, headers in proxy.seen if "content-range" in headers]
    assert ranges == ["0-1048575", "1048576-2097151", "2097152-2499999"]
    assert holdings(Remote(distribution), "demo") == holdings(store, "demo")


def cut_second_chunk(handler, cuts):
    """Cut the connection on which the second chunk of 1 MiB comes, the first time."""
    if handler.command == "PATCH" and handler.headers.get("Content-Range", "").startswith("1048576-") and not cuts:
        cuts.append(1)
        return handler.cut()


def test_an_upload_that_is_cut_goes_on_where_the_other_side_is(store, server, start_proxy, monkeypatch, quick):
    monkeypatch.setattr(tinyreg, "UPLOAD_CHUNK", 1 << 20)
    make_image(store, "demo", layers=(os.urandom(3 << 20),))
    cuts = []
    proxy = start_proxy(server.host, lambda handler: cut_second_chunk(handler, cuts))
    copy(store, Remote(proxy.host), "demo", "latest")
    chunks = [headers["content-range"] for _, _, headers in proxy.seen if "content-range" in headers]
    assert cuts and chunks.count("0-1048575") == 1
    assert holdings(Remote(server.host), "demo") == holdings(store, "demo")


def test_an_upload_that_is_refused_after_a_cut_begins_anew_whatever_the_refusal_says_of_it(
        store, server, start_proxy, monkeypatch, quick):
    monkeypatch.setattr(tinyreg, "UPLOAD_CHUNK", 1 << 20)
    make_image(store, "demo", layers=(os.urandom(3 << 20),))
    cuts = []

    def spoil(handler):
        if handler.command == "GET" and "/uploads/" in handler.path:
            return handler.answer(404, {"Range": "0-1048575"})
        return cut_second_chunk(handler, cuts)

    proxy = start_proxy(server.host, spoil)
    copy(store, Remote(proxy.host), "demo", "latest")
    chunks = [headers["content-range"] for _, _, headers in proxy.seen if "content-range" in headers]
    assert cuts and chunks.count("0-1048575") == 2
    assert holdings(Remote(server.host), "demo") == holdings(store, "demo")


@needs_distribution
def test_an_upload_that_distribution_forgets_after_a_cut_begins_anew(store, distribution, start_proxy, quick):
    make_image(store, "demo", layers=(os.urandom(3 << 20),))
    cuts = []

    def spoil(handler):
        if handler.command == "PATCH" and int(handler.headers["Content-Length"]) > 1 << 20 and not cuts:
            cuts.append(1)
            return handler.cut()

    copy(store, Remote(start_proxy(distribution, spoil).host), "demo", "latest")
    assert cuts and holdings(Remote(distribution), "demo") == holdings(store, "demo")


def test_blobs_go_whole_where_no_chunks_are_taken(store, server, start_proxy, monkeypatch, quick):
    """As at Google's Artifact Registry."""
    monkeypatch.setattr(tinyreg, "UPLOAD_CHUNK", 1000)
    make_image(store, "demo", layers=(os.urandom(3000),))

    def spoil(handler):
        if "Content-Range" in handler.headers:
            handler.rfile.read(int(handler.headers["Content-Length"]))
            return handler.answer(416)

    copy(store, Remote(start_proxy(server.host, spoil).host), "demo", "latest")
    assert holdings(Remote(server.host), "demo") == holdings(store, "demo")


@pytest.mark.parametrize("forgets", [False, True])
def test_the_last_answer_may_be_lost(store, server, start_proxy, quick, forgets):
    """The blob is there then, and its upload session gone: nothing is sent again."""
    make_image(store, "demo", layers=(os.urandom(3 << 20),))

    def spoil(handler):
        if handler.command == "PUT" and "digest=" in handler.path:
            server.ask("PUT", handler.path)
            return None if forgets else handler.cut()  # it comes a second time, or no answer comes

    proxy = start_proxy(server.host, spoil)
    copy(store, Remote(proxy.host), "demo", "latest")
    assert len(proxy.asked("PATCH", "")) == 2
    assert holdings(Remote(server.host), "demo") == holdings(store, "demo")


def test_a_mount_that_is_refused_becomes_an_upload(store, server, start_proxy):
    make_image(store, "demo")
    remote = Remote(start_proxy(server.host, lambda handler: "mount=" in handler.path and handler.answer(403)
                                or None).host)
    for name in ("one", "two"):
        copy(store, remote, "demo", "latest", name)
    assert holdings(Remote(server.host), "two") == holdings(store, "demo")


def test_a_registry_that_knows_no_head_of_manifests_takes_images(store, server, start_proxy):
    make_image(store, "demo")
    proxy = start_proxy(server.host, lambda handler: handler.command == "HEAD" and "/manifests/" in handler.path
                        and handler.answer(501) or None)
    copy(store, Remote(proxy.host), "demo", "latest")
    assert holdings(Remote(server.host), "demo") == holdings(store, "demo")


def test_a_blob_that_can_not_be_read_here_is_no_failure_of_the_other_side(store, server, monkeypatch):
    make_image(store, "demo")

    def fail(blob, view):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tinyreg.Blob, "readinto", fail)
    with pytest.raises(RegistryError, match="can't be read here: .*Input/output error"):
        copy(store, Remote(server.host), "demo", "latest")


def test_tags_and_referrers_come_in_pages(store, server, start_proxy):
    manifest = make_image(store, "demo")
    notes = [make_referrer(store, "demo", manifest, artifactType="application/x.%d" % number) for number in range(5)]
    for tag in "cab":
        store.put_manifest("demo", manifest, [tag])
    copy(store, Remote(server.host), "demo", "latest")
    there = Directory(server.root)
    for tag in "cab":
        there.put_manifest("demo", manifest, [tag])

    def spoil(handler):
        if "n=" not in handler.path and re.search("tags/list|referrers", handler.path):
            handler.path += "?n=2"

    remote = Remote(start_proxy(server.host, spoil).host)
    assert list(remote.tags("demo")) == ["a", "b", "c", "latest"]
    assert sorted(remote.referrer_digests("demo", manifest.digest)) == sorted(note.digest for note in notes)


@needs_distribution
def test_a_repository_without_a_list_of_tags_is_called_by_its_name(server):
    with pytest.raises(RegistryError, match=r" has no far/gone; check its name$"):
        Remote(server.host).tags("far/gone")


def test_an_index_without_all_its_children_is_refused_with_what_to_do(store, distribution):
    make_multi(store, "demo")
    with pytest.raises(RegistryError, match="copy them as well; or add --strip"):
        copy(store, Remote(distribution), "demo", "latest", platforms=["linux/amd64"])


@pytest.mark.parametrize("status", [200, 400, 403, 406, 501])
def test_a_registry_that_knows_no_referrers_may_say_so_as_it_likes(store, server, start_proxy, status):
    manifest = make_image(store, "demo")
    note = make_referrer(store, "demo", manifest)
    copy(store, Remote(server.host), "demo", "latest")
    fallback = to_manifest(index(note))
    Directory(server.root).put_manifest("demo", fallback, ["sha256-" + manifest.digest.encoded])
    proxy = start_proxy(server.host, lambda handler: "/referrers/" in handler.path
                        and handler.answer(status, {"Content-Type": "text/html"}, b"<html>") or None)
    assert Remote(proxy.host).referrer_digests("demo", manifest.digest) == [note.digest]


def test_one_repository_without_referrers_says_nothing_of_another(store, server, start_proxy):
    manifest = make_image(store, "demo")
    note = make_referrer(store, "demo", manifest)
    copy(store, Remote(server.host), "demo", "latest")
    remote = Remote(start_proxy(server.host, lambda handler: "/other/referrers/" in handler.path
                                and handler.answer(404) or None).host)
    assert remote.referrer_digests("other", manifest.digest) == []
    assert remote.referrer_digests("demo", manifest.digest) == [note.digest]


# Logins

@needs_distribution
def test_basic_logins_come_from_docker_s_file(store, start_distribution, tmp_path, home):
    htpasswd = shutil.which("htpasswd")
    if not htpasswd:
        pytest.skip("htpasswd is not installed")
    lines = subprocess.run([htpasswd, "-Bbn", "me", "secret"], stdout=subprocess.PIPE, check=True).stdout
    (tmp_path / "users").write_bytes(lines)
    host = start_distribution("auth: {htpasswd: {realm: lab, path: %s}}\n" % (tmp_path / "users"))
    make_image(store, "demo")
    with pytest.raises(RegistryError, match="there is none in .*config.json.*; log in with: tinyreg.py login " + host):
        copy(store, Remote(host), "demo", "latest")
    save_login(home, host, password="wrong")
    with pytest.raises(RegistryError, match="does not let me do this, with the login from .*config.json"):
        copy(store, Remote(host), "demo", "latest")
    save_login(home, host)
    copy(store, Remote(host), "demo", "latest")
    assert holdings(Remote(host), "demo") == holdings(store, "demo")


class TokenServer:
    """A strict token server and, as Proxy.spoil, the guard of a registry that wants its tokens: each for one scope,
    short-lived, for the right user only."""

    def __init__(self, users=None, life=300, identity=None):
        self.users, self.life, self.identity, self.issued, self.asked = users, life, identity, {}, []

    def __call__(self, handler):
        path, _, query = handler.path.partition("?")
        if path == "/token":
            return self.issue(handler, urllib.parse.parse_qs(query))
        match = re.fullmatch("/v2/(.+)/(manifests|blobs|tags|referrers)/.*", path)
        action = "pull" if handler.command in ("GET", "HEAD") else "push"
        name = match.group(1) if match else ""
        scheme, _, token = handler.headers.get("Authorization", "").partition(" ")
        scopes, ends = self.issued.get(token, ((), 0))
        allowed = any(scope.startswith("repository:%s:" % name) and action in scope.rpartition(":")[2].split(",")
                      for scope in scopes)
        if scheme == "Bearer" and allowed and time.monotonic() < ends:
            return None
        handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        wanted = "pull" if action == "pull" else "pull,push"
        return handler.answer(401, {"WWW-Authenticate": 'Bearer realm="http://%s/token",service="lab, \\"x\\"",scope="'
                                    'repository:%s:%s"' % (handler.server.host, name, wanted)})

    def issue(self, handler, query):
        form = handler.rfile.read(int(handler.headers.get("Content-Length") or 0)).decode()
        if handler.command == "POST":
            query = urllib.parse.parse_qs(form)
            if self.identity is None:
                return handler.answer(405)
            if query.get("refresh_token") != [self.identity] or query.get("grant_type") != ["refresh_token"]:
                return handler.answer(401)
        elif self.users is not None and handler.headers.get("Authorization", "")[6:] not in self.users:
            return handler.answer(401)
        assert query["service"] == ['lab, "x"']
        scopes = " ".join(query["scope"]).split()
        self.asked.append(scopes)
        token = "t%d" % len(self.issued)
        self.issued[token] = scopes, time.monotonic() + self.life
        body = {"access_token": token, "expires_in": self.life}
        return handler.answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())


def test_tokens_are_fetched_for_each_scope_once(store, server, start_proxy):
    make_multi(store, "demo")
    tokens = TokenServer()
    proxy = start_proxy(server.host, tokens)
    copy(store, Remote(proxy.host), "demo", "latest")
    assert holdings(Remote(server.host), "demo") == holdings(store, "demo")
    pushes = len(tokens.asked)
    back = Directory(store.root + "-back")
    copy(Remote(proxy.host), back, "demo", "latest")
    assert len(tokens.asked) == pushes + 1 and pushes <= 3
    assert holdings(back, "demo") == holdings(store, "demo")


def test_tokens_that_end_are_renewed(store, server, start_proxy, monkeypatch):
    make_multi(store, "demo")
    tokens = TokenServer(life=1)
    proxy = start_proxy(server.host, lambda handler: time.sleep(0.1) or tokens(handler))
    copy(store, Remote(proxy.host), "demo", "latest")
    assert len(tokens.asked) > 2 and holdings(Remote(server.host), "demo") == holdings(store, "demo")


def test_a_token_server_gets_the_login_and_the_registry_never_does(store, server, start_proxy, home):
    make_image(store, "demo")
    copy(store, Remote(server.host), "demo", "latest")
    proxy = start_proxy(server.host, TokenServer(users=[base64.b64encode(b"me:secret").decode()]))
    back = Directory(store.root + "-back")
    with pytest.raises(RegistryError) as caught:
        copy(Remote(proxy.host), back, "demo", "latest")
    assert caught.value.code == "UNAUTHORIZED" and "tinyreg.py login" in str(caught.value)
    save_login(home, proxy.host)
    copy(Remote(proxy.host), back, "demo", "latest")
    assert holdings(back, "demo") == holdings(store, "demo")
    for _, path, headers in proxy.seen:
        assert path.startswith("/token") or not headers.get("authorization", "").startswith("Basic")


def test_identity_tokens_are_exchanged(store, server, start_proxy, home):
    make_image(store, "demo")
    copy(store, Remote(server.host), "demo", "latest")
    proxy = start_proxy(server.host, TokenServer(users=[], identity="refresh-me"))
    (home / ".docker").mkdir()
    entry = dict(login_entry("<token>", ""), identitytoken="refresh-me")
    (home / ".docker" / "config.json").write_text(json.dumps({"auths": {proxy.host: entry}}))
    assert Remote(proxy.host).resolve("demo", "latest") == store.resolve("demo", "latest")


def test_a_login_to_another_tinyreg(store, start_server, tmp_path, home):
    users = tmp_path / "users"
    done = run_tinyreg("passwd", "me", "--users", users, "--stdin", input="secret\n")
    assert done.returncode == 0, done.stderr
    server = start_server(None, "--users", str(users))
    make_multi(store, "demo")
    with pytest.raises(RegistryError, match="tinyreg.py login"):
        copy(store, Remote(server.host), "demo", "latest")
    save_login(home, server.host)
    copy(store, Remote(server.host), "demo", "latest")
    assert holdings(Remote(server.host), "demo") == holdings(store, "demo")


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io"])
def test_docker_hub_s_login_is_found_under_each_of_its_names(home, key):
    save_login(home, key)
    assert find_login("docker.io", "library/alpine")[:3] == ("me", "secret", None)
    assert find_login("quay.io", "library/alpine") is None


def test_the_longest_key_and_the_first_place_count(home, monkeypatch, tmp_path):
    save_login(home, "lab.example", user="docker")
    (home / ".config" / "containers").mkdir(parents=True)
    entries = {"lab.example": "host", "lab.example/team": "team", "lab.example/teamwork": "other"}
    (home / ".config" / "containers" / "auth.json").write_text(json.dumps({"auths": {
        key: login_entry(user) for key, user in entries.items()}}))
    assert find_login("lab.example", "team/app").user == "team"
    assert find_login("lab.example", "app").user == "host"
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {"lab.example": login_entry("env")}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    assert find_login("lab.example", "team/app").user == "env"


@pytest.mark.parametrize("content", ["{", '{"auths": []}', '{"auths": {"lab.example": {"auth": 5}}}'])
def test_a_damaged_file_has_no_login(home, content):
    (home / ".docker").mkdir()
    (home / ".docker" / "config.json").write_text(content)
    assert find_login("lab.example") is None


def test_credential_helpers_are_asked_and_their_failure_is_no_login(home, monkeypatch, tmp_path):
    helper = tmp_path / "docker-credential-test"
    helper.write_text('#!/bin/sh\nread host\n[ "$host" = lab.example ] || { echo credentials not found; exit 1; }\n'
                      'echo \'{"ServerURL":"lab.example","Username":"<token>","Secret":"s3"}\'\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + ":" + os.environ["PATH"])
    (home / ".docker").mkdir()
    config = {"credsStore": "test", "credHelpers": {"gone.example": "not-installed"}, "auths": {"lab.example": {}}}
    (home / ".docker" / "config.json").write_text(json.dumps(config))
    assert find_login("lab.example")[:3] == ("<token>", "s3", "s3")
    assert find_login("quay.io") is None and find_login("gone.example") is None


# login and logout

@pytest.fixture
def guarded(start_server, store, tmp_path):
    """A tinyreg that wants a password: that of me is "secret"."""
    users = tmp_path / "users"
    run_tinyreg("passwd", "me", "--users", users, "--stdin", input="secret\n")
    make_multi(store, "demo")
    return start_server(store.root, "--users", str(users))


@pytest.fixture
def open_to_pull(start_server, guarded, tmp_path):
    """The same, of which everybody may pull: it asks with a Bearer challenge."""
    return start_server(guarded.root, "--users", str(tmp_path / "users"), "--anonymous", "pull")


def log_in(host, *options, user="me", password="secret"):
    return run_tinyreg("login", host, "--user", user, "--stdin", *options, input=password + "\n")


def fails(done, says):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and says in done.stderr, done


def logins(path):
    return json.loads(path.read_text())


def test_login_is_used_by_pull_and_by_skopeo(guarded, home, tmp_path):
    image = guarded.host + "/demo:latest"
    fails(run_tinyreg("pull", image, "--root", tmp_path / "there"), "log in with: tinyreg.py login " + guarded.host)
    done = log_in(guarded.host)
    file = home / ".docker" / "config.json"
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    assert str(file) in done.stdout and "as base64, which is no encryption" in done.stdout
    assert logins(file) == {"auths": {guarded.host: login_entry()}}
    assert os.stat(str(file)).st_mode & 0o777 == 0o600 and os.listdir(str(file.parent)) == ["config.json"]
    assert run_tinyreg("pull", image, "--root", tmp_path / "there").returncode == 0
    if shutil.which("skopeo"):
        subprocess.run(["skopeo", "inspect", "--raw", "--tls-verify=false", "docker://" + image], check=True,
                       stdout=subprocess.PIPE)
    done = run_tinyreg("logout", guarded.host)
    assert (done.returncode, done.stderr) == (0, "") and logins(file) == {"auths": {}}
    fails(run_tinyreg("pull", image, "--root", tmp_path / "elsewhere"), "tinyreg.py login")
    fails(run_tinyreg("logout", guarded.host), "there is no login for " + guarded.host)


def test_a_wrong_login_is_not_kept(guarded, open_to_pull, home):
    for host in (guarded.host, open_to_pull.host):
        for user, password, says in [
                ("me", "wrong", "does not take the user me with this password; nothing was written"),
                ("you", "secret", "does not take the user you"), ("a:b", "secret", "no user name"),
                ("", "secret", "no user name"), ("me", "", "a password has 1 to")]:
            fails(log_in(host, user=user, password=password), says)
    assert not (home / ".docker").exists()


def test_login_where_everybody_may_pull(open_to_pull, home):
    assert log_in(open_to_pull.host, "--quiet").stdout == ""
    assert find_login(open_to_pull.host).user == "me"


def test_a_login_that_the_registry_does_not_ask_for_is_kept_and_said_to_be_unchecked(server):
    done = log_in(server.host)
    assert done.returncode == 0 and "was not checked" in done.stderr
    assert find_login(server.host).secret == "secret"


@pytest.mark.parametrize("host, says", [
    ("a/b", "'a/b' is no registry"), ("", "'' is no registry"), ("127.0.0.1:1", "nothing listens there")])
def test_login_at_what_is_no_registry(host, says):
    done = log_in(host)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and says in done.stderr


def test_a_login_of_a_page_that_is_no_registry(start_proxy, home):
    proxy = start_proxy(None, lambda handler: handler.answer(404))
    fails(log_in(proxy.host), "has no registry")
    assert not (home / ".docker").exists()


def test_login_keeps_all_else_in_the_file(guarded, home):
    file = home / ".docker" / "config.json"
    file.parent.mkdir()
    other = {"HttpHeaders": {"X": "\u00e9\ud800"}, "psFormat": "table", "n": 1, "credHelpers": {"gcr.io": "gcloud"}}
    auths = {"quay.io": {"auth": "eDp5", "email": "e"}, "http://" + guarded.host + "/v1/": {"identitytoken": "old"},
             guarded.host + "/team": login_entry("team")}
    file.write_text(json.dumps(dict(other, auths=auths)))
    file.chmod(0o644)
    real = home / "real.json"
    file.rename(real)
    file.symlink_to(real)
    assert log_in(guarded.host).returncode == 0
    del auths["http://" + guarded.host + "/v1/"]
    assert logins(file) == dict(other, auths=dict(auths, **{guarded.host: login_entry()}))
    assert file.is_symlink() and os.stat(str(real)).st_mode & 0o777 == 0o600
    assert run_tinyreg("logout", guarded.host).returncode == 0
    assert logins(file) == dict(other, auths=auths)


def test_login_goes_where_it_is_read(guarded, home, monkeypatch, tmp_path):
    """Docker's file, unless only another one is there, or another one has a login that would hide it."""
    docker, user = home / ".docker" / "config.json", home / ".config" / "containers" / "auth.json"
    runtime = tmp_path / "run" / "containers" / "auth.json"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    for file in (runtime, user):
        file.parent.mkdir(parents=True)
    runtime.write_text("{}")
    assert log_in(guarded.host).returncode == 0 and guarded.host in logins(runtime)["auths"]
    docker.parent.mkdir()
    docker.write_text("{}")
    assert log_in(guarded.host).returncode == 0 and logins(docker) == {}
    runtime.unlink()
    user.write_text("{}")
    assert log_in(guarded.host).returncode == 0 and guarded.host in logins(docker)["auths"] and logins(user) == {}
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "new" / "auth.json"))
    assert log_in(guarded.host).returncode == 0 and guarded.host in logins(tmp_path / "new" / "auth.json")["auths"]
    monkeypatch.delenv("REGISTRY_AUTH_FILE")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    user.unlink()
    assert log_in(guarded.host).returncode == 0 and guarded.host in logins(tmp_path / "docker" / "config.json")["auths"]


def test_logout_takes_the_login_out_of_each_file(guarded, home):
    save_login(home, guarded.host)
    user = home / ".config" / "containers" / "auth.json"
    user.parent.mkdir(parents=True)
    user.write_text(json.dumps({"auths": {guarded.host: login_entry()}}))
    done = run_tinyreg("logout", guarded.host)
    assert done.returncode == 0 and "auth.json" in done.stdout and "config.json" in done.stdout
    assert find_login(guarded.host) is None


def test_docker_hub_s_login_has_docker_s_key(home):
    file = tinyreg.choose_login_file("docker.io")
    login = tinyreg.Login("me", "secret", None, file)
    tinyreg.replace_login(file, "docker.io", login)
    assert logins(home / ".docker" / "config.json") == {"auths": {"https://index.docker.io/v1/": login_entry()}}
    assert find_login("docker.io") == login
    assert run_tinyreg("logout", "registry-1.docker.io").returncode == 0 and find_login("docker.io") is None


@pytest.mark.parametrize("field", ["credsStore", "credHelpers"])
def test_login_writes_no_password_where_a_helper_has_them(guarded, home, field):
    (home / ".docker").mkdir()
    before = {field: "pass" if field == "credsStore" else {guarded.host: "pass"}}
    (home / ".docker" / "config.json").write_text(json.dumps(before))
    fails(log_in(guarded.host), "docker-credential-pass")
    assert logins(home / ".docker" / "config.json") == before


def test_logout_says_that_a_helper_still_has_the_login(home, monkeypatch, tmp_path):
    helper = tmp_path / "docker-credential-test"
    helper.write_text('#!/bin/sh\necho \'{"Username":"me","Secret":"s3"}\'\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path) + ":" + os.environ["PATH"])
    (home / ".docker").mkdir()
    (home / ".docker" / "config.json").write_text('{"credsStore": "test"}')
    fails(run_tinyreg("logout", "lab.example"), "test has a login for lab.example; log out with: docker logout")


@pytest.mark.parametrize("content", ["{", '{"auths": [1]}', '{"credHelpers": "x"}', "[]"])
def test_login_leaves_a_damaged_file_alone(guarded, home, content):
    (home / ".docker").mkdir()
    (home / ".docker" / "config.json").write_text(content)
    fails(log_in(guarded.host), "is damaged")
    fails(run_tinyreg("logout", guarded.host), "is damaged")
    assert (home / ".docker" / "config.json").read_text() == content


def test_login_asks_on_the_terminal_once_and_shows_no_password(guarded, home):
    import pty
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, tinyreg.__file__, "login", guarded.host])
    shown = b""
    for prompt, answer in ((b"user name at", b"me\n"), (b"password of me:", b"secret\n"), (b"logged in", b"")):
        while prompt not in shown:
            shown += os.read(terminal, 1000)
        os.write(terminal, answer)
    assert os.waitpid(process, 0)[1] == 0
    os.close(terminal)
    assert b"secret" not in shown and find_login(guarded.host).user == "me"


def test_login_without_a_user_or_a_terminal(guarded):
    fails(run_tinyreg("login", guarded.host, "--stdin", input="secret\n"), "--user NAME")
    fails(run_tinyreg("login", guarded.host, input="secret\n"), "--user NAME")


def test_a_crash_of_login_leaves_the_old_file(guarded, home):
    """Killed by a file size limit in the middle of its write."""
    save_login(home, "other.example")
    file = home / ".docker" / "config.json"
    before = json.dumps(dict(logins(file), filler="x" * 2000))
    file.write_text(before)
    done = subprocess.run(["sh", "-c", 'ulimit -f 1; echo secret | "$0" "$1" login "$2" --user me --stdin',
                           sys.executable, tinyreg.__file__, guarded.host], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
    assert done.returncode != 0 and b"Traceback" not in done.stderr and file.read_text() == before


@pytest.mark.parametrize("header, found", [
    ('Bearer realm="https://a/t",service="s",scope="repository:x:pull,push"',
     {"bearer": {"realm": "https://a/t", "service": "s", "scope": "repository:x:pull,push"}}),
    ('Basic realm="lab", Bearer realm=https://a/t', {"basic": {"realm": "lab"}, "bearer": {"realm": "https://a/t"}}),
    ("Negotiate", {}), ("", {}),
])
def test_challenges(header, found):
    assert tinyreg.parse_challenges(header) == found


# What goes wrong on the way

@pytest.fixture
def filled(store, server):
    """The store, with an image that the server has as well, whose layer has 3 MiB."""
    make_image(store, "demo", layers=(os.urandom(3 << 20),))
    copy(store, Remote(server.host), "demo", "latest")
    return store


@pytest.fixture
def back(tmp_path):
    return Directory(str(tmp_path / "back"))


def test_a_redirect_to_another_host_gets_no_authorization(filled, server, back, start_proxy, home):
    cdn = start_proxy(server.host)

    def spoil(handler):
        if "Authorization" not in handler.headers:
            return handler.answer(401, {"WWW-Authenticate": 'Basic realm="x"'})
        if "/blobs/" in handler.path:
            return handler.answer(307, {"Location": "http://%s%s" % (cdn.host, handler.path)})

    front = start_proxy(server.host, spoil)
    save_login(home, front.host)
    copy(Remote(front.host), back, "demo", "latest")
    assert holdings(back, "demo") == holdings(filled, "demo")
    assert cdn.asked("GET", "/blobs/") and not any("authorization" in headers for _, _, headers in cdn.seen)


def test_a_token_server_s_redirect_to_another_host_gets_no_login(start_proxy, home):
    other = start_proxy(None, lambda handler: handler.answer(200, {}, b'{"token": "t"}'))

    def spoil(handler):
        if handler.path.startswith("/token"):
            return handler.answer(307, {"Location": "http://%s%s" % (other.host, handler.path)})
        return handler.answer(401, {"WWW-Authenticate": 'Bearer realm="http://%s/token"' % handler.server.host})

    front = start_proxy(None, spoil)
    save_login(home, front.host)
    with pytest.raises(RegistryError, match="does not let me do this"):
        Remote(front.host).resolve("demo", "latest")
    assert "authorization" in front.seen[-2][2] or "authorization" in front.seen[1][2]
    assert other.seen and not any("authorization" in headers for _, _, headers in other.seen)


def test_redirects_for_ever_are_an_error(start_proxy, quick):
    proxy = start_proxy(None, lambda handler: handler.answer(302, {"Location": "/v2/again"}))
    with pytest.raises(RegistryError, match="redirects more than"):
        Remote(proxy.host).resolve("demo", "latest")


def test_a_blob_that_is_cut_goes_on_from_there(filled, server, back, start_proxy, quick):
    ranges = []

    def spoil(handler):
        if handler.command == "GET" and "/blobs/" in handler.path:
            ranges.append(handler.headers.get("Range"))
            return 1 << 20

    proxy = start_proxy(server.host, spoil)
    report = copy(Remote(proxy.host), back, "demo", "latest", traffic=Traffic(1))
    assert (report.present_bytes, report.copied_bytes) == (0, report.total_bytes)
    assert holdings(back, "demo") == holdings(filled, "demo")
    assert "bytes=1048576-" in ranges and "bytes=2097152-" in ranges


def test_a_manifest_that_is_cut_is_asked_for_again(filled, server, back, start_proxy, quick):
    cuts = []

    def spoil(handler):
        if handler.command == "GET" and "/manifests/" in handler.path and len(cuts) < 2:
            cuts.append(handler.path)
            return 10

    copy(Remote(start_proxy(server.host, spoil).host), back, "demo", "latest", traffic=Traffic(1))
    assert len(cuts) == 2 and holdings(back, "demo") == holdings(filled, "demo")


def test_an_upstream_that_always_cuts_its_manifests_is_told_of_in_one_line(filled, start_server, server, start_proxy,
                                                                           tmp_path):
    """And to a client of the pull-through cache it is an upstream that is away, not a bug."""
    proxy = start_proxy(server.host, lambda handler: 10 if "/manifests/" in handler.path else None)
    done = run_tinyreg("pull", proxy.host + "/demo", "--retries", "1", "--root", tmp_path / "root")
    assert done.returncode == 1 and "can't reach" in done.stderr and "Traceback" not in done.stderr
    cache = start_server(tmp_path / "cache", "--upstream", "up=http://" + proxy.host)
    assert cache.ask("GET", "/v2/up/demo/manifests/latest").status in (404, 503)
    assert "Traceback" not in cache.log()


def test_a_list_of_tags_may_be_larger_than_a_manifest(start_proxy):
    tags = ["%0128d" % number for number in range(50000)]
    body = json.dumps({"name": "demo", "tags": tags}).encode()
    proxy = start_proxy(None, lambda handler: handler.answer(200, {"Content-Type": "application/json"}, body))
    assert len(body) > tinyreg.MAX_MANIFEST and list(Remote(proxy.host).tags("demo")) == tags


def test_without_ranges_a_cut_blob_is_read_over(filled, server, back, start_proxy, quick):
    limits = [2 << 20, 1 << 20, 5 << 19]  # the second one in the middle of what is there already

    def spoil(handler):
        del handler.headers["Range"]
        large = handler.command == "GET" and filled.manifest("demo", image).blobs[1].digest in handler.path
        return limits.pop(0) if large and limits else None

    image = filled.resolve("demo", "latest")
    copy(Remote(start_proxy(server.host, spoil).host), back, "demo", "latest", traffic=Traffic(1))
    assert not limits and holdings(back, "demo") == holdings(filled, "demo")


@needs_distribution
def test_a_pull_that_was_killed_before_its_last_step_ends_well(store, distribution, back, start_proxy, quick):
    """All bytes of a blob had come, and it was not a blob yet. Distribution 2 refuses the empty rest with the blob's
    Content-Length and another body."""
    image = make_image(store, "demo", layers=(os.urandom(3 << 20),))
    copy(store, Remote(distribution), "demo", "latest")
    for blob in image.blobs:
        session = back.session_of_blob("demo", blob.digest)
        session.begin(blob.digest.algorithm)
        with store.open_blob("demo", blob.digest) as opened:
            session.append(opened)
    proxy = start_proxy(distribution)
    report = copy(Remote(proxy.host), back, "demo", "latest")
    assert (report.present_bytes, report.copied_bytes) == (report.total_bytes, 0)
    assert holdings(back, "demo") == holdings(store, "demo")
    assert not proxy.asked("GET", "/blobs/")


def test_a_cache_that_was_killed_before_its_last_step_asks_for_nothing(mirror, filled):
    front, proxy = mirror
    blob, name = filled.manifest("demo", filled.resolve("demo", "latest")).blobs[1], "docker.io/library/demo"
    cache = Directory(front.root)
    session = cache.session_of_blob(name, blob.digest)
    session.begin(blob.digest.algorithm)
    with filled.open_blob("demo", blob.digest) as opened:
        session.append(opened)
    answer = front.ask("GET", "/v2/%s/blobs/%s" % (name, blob.digest))
    assert answer.status == 200 and Digest.of(answer.body) == blob.digest
    assert not proxy.asked("GET", "/blobs/")


@needs_distribution
def test_the_refusal_of_an_empty_rest_is_not_read(store, distribution, quick):
    """Where nobody has said how large the blob is, it is asked for."""
    blob = make_image(store, "demo", layers=(os.urandom(3 << 20),)).blobs[1]
    copy(store, Remote(distribution), "demo", "latest")
    with Remote(distribution).open_blob("demo", blob.digest, blob.size) as rest:
        assert rest.readinto(memoryview(bytearray(10))) == 0
    assert quick == []


def test_a_refusal_is_not_read_to_its_promised_length(start_proxy, monkeypatch, quick):
    monkeypatch.setattr(tinyreg, "REFUSAL_LIMIT", 0.2)
    proxy = start_proxy(None, lambda handler: handler.answer(404, {"Content-Length": 1 << 30}, b"nothing here"))
    with pytest.raises(RegistryError, match="has no demo:latest"):
        Remote(proxy.host).call("GET", "demo", "/manifests/latest")
    assert len(proxy.seen) == 1


# Registries that mean no good

@pytest.mark.parametrize("field, listing", [
    ("tags", lambda remote: list(remote.tags("demo"))),
    ("manifests", lambda remote: remote.referrer_digests("demo", Digest.of(b"")))])
def test_a_list_that_does_not_end_is_given_up(start_proxy, monkeypatch, field, listing):
    monkeypatch.setattr(tinyreg, "MAX_PAGES", 20)
    body = json.dumps({field: []}).encode()

    def spoil(handler):
        more = len(handler.server.seen) < 100
        link = {"Link": '<%s?last=%d>; rel="next"' % (handler.path.partition("?")[0], len(handler.server.seen))}
        return handler.answer(200, link if more else {}, body)

    proxy = start_proxy(None, spoil)
    with pytest.raises(RegistryError, match="sends a list of the %s of demo that does not end" % field):
        listing(Remote(proxy.host))
    assert len(proxy.seen) == 20


def test_a_list_of_tags_is_given_up_before_it_takes_much_memory(start_proxy, monkeypatch):
    """A tag of three letters is six bytes of a page, and ten times as much in memory."""
    monkeypatch.setattr(tinyreg, "MAX_LIST", 1 << 20)
    body = json.dumps({"tags": ["abc"] * 1000}).encode()

    def spoil(handler):
        link = '<%s?last=%d>; rel="next"' % (handler.path.partition("?")[0], len(handler.server.seen))
        return handler.answer(200, {"Link": link}, body)

    proxy = start_proxy(None, spoil)
    with pytest.raises(RegistryError, match="sends a list of the tags of demo that does not end"):
        list(Remote(proxy.host).tags("demo"))
    assert len(proxy.seen) * 1000 * sys.getsizeof("abc") < 2 << 20


@pytest.fixture
def drip():
    """A function that lets a Handler send a byte every now and then, until the test ends; `begun` is an Event."""
    end = threading.Event()

    def send(handler, status=200, head=b""):
        send.begun.set()
        with contextlib.suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 %d OK\r\n" % status + head)
            while not end.wait(0.05):
                handler.wfile.write(b"x")
        return handler.cut()

    send.begun = threading.Event()
    yield send
    end.set()


HEAD = b"Content-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize("head", [b"X-Header: ", HEAD])
def test_an_answer_that_drips_is_not_waited_for(start_proxy, monkeypatch, drip, head):
    monkeypatch.setattr(tinyreg, "REMOTE_TIMEOUT", 0.5)
    proxy = start_proxy(None, lambda handler: drip(handler, 200, head))
    with pytest.raises(RegistryError, match="can't reach .*: (it sends too slowly|timed out)"):
        list(Remote(proxy.host, retries=0).tags("demo"))


def test_a_blob_that_drips_is_not_waited_for(filled, server, back, start_proxy, monkeypatch, drip):
    monkeypatch.setattr(tinyreg, "REMOTE_TIMEOUT", 0.5)
    proxy = start_proxy(server.host, lambda handler: "/blobs/" in handler.path and drip(handler, 200, HEAD) or None)
    with pytest.raises(RegistryError, match="can't reach .*: (it sends too slowly|timed out)"):
        copy(Remote(proxy.host, retries=0), back, "demo", "latest")


def test_who_reads_slowly_is_not_taken_for_a_slow_sender(monkeypatch):
    """A laptop that was asleep, a disk that was busy."""
    clock = [0.0]
    monkeypatch.setattr(tinyreg.time, "monotonic", lambda: clock[0])
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("rb", buffering=0) as raw:
        ours.settimeout(60)
        stream = tinyreg.MovingStream(raw, ours)
        for _ in range(3):
            theirs.send(b"x")
            assert stream.read(1) == b"x"
            clock[0] += 1000


def test_of_endless_referrers_a_cache_keeps_a_bounded_number(mirror, filled):
    front, proxy = mirror
    note = make_referrer(filled, "demo", filled.manifest("demo", filled.resolve("demo", "latest")))
    entries = [dict(note.referrer(), digest=Digest.of(b"%d" % number)) for number in range(tinyreg.PAGE_SIZE + 100)]
    body = json.dumps({"manifests": entries}).encode()
    proxy.spoil = lambda handler: "/referrers/" in handler.path and handler.answer(200, {}, body) or (
        "/manifests/" in handler.path and handler.answer(404)) or None
    assert front.ask("GET", "/v2/docker.io/library/demo/referrers/" + note.subject).status == 200
    assert len(proxy.asked("GET", "/manifests/")) == tinyreg.PAGE_SIZE


def test_of_what_clients_ask_for_no_more_is_kept_than_has_room(start_proxy, monkeypatch):
    """Neither tokens for each name that they make up, nor a connection for each that was busy at once."""
    monkeypatch.setattr(tinyreg, "MAX_TOKENS", 8)
    monkeypatch.setattr(tinyreg, "MAX_IDLE", 2)
    tokens, busy = TokenServer(), threading.Barrier(5)

    def spoil(handler):
        if tokens(handler):
            return True
        busy.wait(PATIENCE)
        return handler.answer(200, {"Docker-Content-Digest": Digest.of(b"")})

    remote = Remote(start_proxy(None, spoil).host)
    for turn in range(4):
        clients = [threading.Thread(target=remote.resolve, args=("demo%d-%d" % (turn, number), "latest"))
                   for number in range(5)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert len(tokens.issued) == 20 and 0 < len(remote.tokens.tokens) <= 8
    assert 0 < sum(map(len, remote.client.pool.idle.values())) < 5


def test_a_token_server_that_drips_holds_up_its_own_repository_only(start_proxy, monkeypatch, drip):
    tokens = TokenServer()
    fallen = []

    def spoil(handler):
        if handler.path.startswith("/token") and "slow" in handler.path:
            return drip(handler, 200, HEAD)
        return tokens(handler) or handler.answer(200, {"Docker-Content-Digest": Digest.of(b"")})

    def resolve():
        try:
            remote.resolve("slow", "latest")
        except RegistryError as error:
            fallen.append(error)

    remote = Remote(start_proxy(None, spoil).host, retries=0)
    monkeypatch.setattr(tinyreg, "TOKEN_TIMEOUT", 3600)
    waiting = threading.Thread(target=resolve, daemon=True)
    waiting.start()
    assert drip.begun.wait(PATIENCE)
    assert remote.resolve("demo", "latest") == Digest.of(b"")  # else this would wait as long
    assert waiting.is_alive()
    monkeypatch.setattr(tinyreg, "TOKEN_TIMEOUT", 0.5)
    with pytest.raises(RegistryError, match="can't reach .*: (it sends too slowly|timed out)"):
        Remote(remote.host, retries=0).resolve("slow", "latest")
    assert fallen == []


def test_overload_is_waited_for_as_long_as_the_server_says(filled, server, back, start_proxy, quick):
    answers = [(429, {"Retry-After": "7"}), (503, {"Retry-After": "11"}), (500, {})]
    proxy = start_proxy(server.host, lambda handler: handler.answer(*answers.pop(0)) if answers else None)
    copy(Remote(proxy.host), back, "demo", "latest")
    assert quick[:2] == [7.0, 11.0] and len(quick) == 3


def test_a_registry_that_fails_is_not_taken_for_one_that_has_no_referrers(filled, server, start_proxy):
    proxy = start_proxy(server.host, lambda handler: "/referrers/" in handler.path and handler.answer(500) or None)
    digest = filled.resolve("demo", "latest")
    with pytest.raises(RegistryError, match="answered 500"):
        Remote(proxy.host, retries=0).referrer_digests("demo", digest)


@pytest.mark.parametrize("method, part", [("HEAD", "/manifests/"), ("POST", "mount=")])
def test_a_push_goes_on_where_only_a_shortcut_fails(filled, server, start_proxy, method, part):
    """A comparison with what is there saves a PUT, and a mount an upload: both can be done without."""
    proxy = start_proxy(server.host, lambda handler: handler.command == method and part in handler.path
                        and handler.answer(500) or None)
    remote, image = Remote(proxy.host, retries=0), filled.manifest("demo", filled.resolve("demo", "latest"))
    remote.put_manifest("demo", image, ["again"])
    assert Remote(server.host).resolve("demo", "again") == image.digest
    blob = image.blobs[0].digest
    assert remote.mount("other", blob, "demo") == (method == "HEAD")
    remote.put_blob("other", blob, lambda offset: filled.open_blob("demo", blob, offset))
    assert Remote(server.host).find_size("other", blob) == image.blobs[0].size


@pytest.mark.parametrize("errors", [["text"], [[]], [5], [{}], {"code": "DENIED"}, [{"code": []}], [{"code": "DENIED"}],
                                    [{"code": "NO_SUCH", "message": {"a": [1]}}], None])
def test_an_error_whose_body_is_odd_is_an_error_like_others(start_proxy, errors):
    body = json.dumps({"errors": errors}).encode()
    proxy = start_proxy(None, lambda handler: handler.answer(400, {"Content-Type": "application/json"}, body))
    with pytest.raises(RegistryError, match=re.escape(proxy.host) + " answered 400: "):
        list(Remote(proxy.host).tags("demo"))


def test_where_plain_http_is_refused_the_option_is_named(start_proxy):
    proxy = start_proxy(None, lambda handler: handler.answer(400, {}, b"HTTP request to an HTTPS server"))
    with pytest.raises(RegistryError, match="leave out --plain-http"):
        list(Remote(proxy.host, plain_http=True).tags("demo"))


def test_a_redirect_to_what_is_no_http_is_an_error_like_others(start_proxy, quick):
    proxy = start_proxy(None, lambda handler: handler.answer(302, {"Location": "ftp://127.0.0.1:%d/x" % free_port()}))
    with pytest.raises(RegistryError, match="can't reach " + proxy.host):
        Remote(proxy.host).resolve("demo", "latest")


def test_retries_end_and_so_does_a_long_retry_after(start_proxy, quick):
    proxy = start_proxy(None, lambda handler: handler.answer(500))
    with pytest.raises(RegistryError, match="answered 500"):
        Remote(proxy.host, retries=2).resolve("demo", "latest")
    assert len(proxy.asked("HEAD", "")) == 3
    proxy = start_proxy(None, lambda handler: handler.answer(429, {"Retry-After": "21600"}))
    with pytest.raises(RegistryError, match="answered 429"):
        Remote(proxy.host).resolve("demo", "latest")
    assert len(proxy.seen) == 1


def test_bytes_that_are_not_the_digest_s_are_never_stored(filled, server, back, start_proxy):
    def spoil(handler):
        if handler.command == "GET" and "/blobs/" in handler.path:
            return handler.answer(200, {}, b"something else")

    with pytest.raises(RegistryError) as caught:
        copy(Remote(start_proxy(server.host, spoil).host), back, "demo", "latest")
    assert caught.value.code == "DIGEST_INVALID" and not list(back.digests())


def test_an_endless_blob_does_not_fill_the_disk(filled, server, back, start_proxy):
    def spoil(handler):
        if handler.command == "GET" and "/blobs/" in handler.path:
            return handler.answer(200, {}, b"x" * (5 << 20))

    with pytest.raises(RegistryError) as caught:
        copy(Remote(start_proxy(server.host, spoil).host), back, "demo", "latest")
    assert caught.value.code == "SIZE_INVALID"


def test_a_second_pull_gets_no_manifest_and_no_blob(filled, server, back, start_proxy):
    """Docker Hub counts the GETs of manifests."""
    proxy = start_proxy(server.host)
    copy(Remote(proxy.host), back, "demo", "latest")
    proxy.seen.clear()
    copy(Remote(proxy.host), back, "demo", "latest")
    assert proxy.asked("HEAD", "/manifests/latest")
    assert not proxy.asked("GET", "/manifests/") and not proxy.asked("GET", "/blobs/")


# The commands

def test_pull_stores_under_the_origin_s_name_and_says_what_came(filled, server, tmp_path):
    make_referrer(Directory(server.root), "demo", filled.manifest("demo", filled.resolve("demo", "latest")),
                  artifactType="application/spdx+json")
    image = server.host + "/demo"
    done = run_tinyreg("pull", image, "--root", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert "%s:latest: sha256:" % image in done.stdout and "referrers: 1 application/spdx+json" in done.stdout
    back = Directory(str(tmp_path / "back"))
    name = image.replace(":", "_")
    assert back.resolve(name, "latest") == filled.resolve("demo", "latest")
    done = run_tinyreg("pull", image, "--root", tmp_path / "back")
    assert "copied 0 B in 0 blobs, 2 there already" in done.stdout


def test_pull_in_json_and_dry(filled, server, tmp_path):
    (tmp_path / "images.txt").write_text("# what we need\n%s/demo:latest  # the demo\n\n" % server.host)
    done = run_tinyreg("pull", "-f", tmp_path / "images.txt", "--dry-run", "--root", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert "to copy: 3.0 MiB in 2 blobs, 0 there already" in done.stdout and "free" in done.stdout
    assert not list(Directory(str(tmp_path / "back")).digests())
    done = run_tinyreg("pull", "-f", tmp_path / "images.txt", "--json", "--root", tmp_path / "back")
    report = json.loads(done.stdout)
    assert report["failed"] == [] and report["images"][0]["copied_bytes"] == report["needed_bytes"] > 3 << 20
    assert run_tinyreg("pull", "-f", tmp_path / "images.txt", "--quiet", "--root", tmp_path / "back").stdout == ""


def test_an_image_that_fails_does_not_stop_the_others(filled, server, tmp_path):
    gone, there = server.host + "/gone:1", server.host + "/demo:latest"
    done = run_tinyreg("pull", gone, there, "--root", tmp_path / "back")
    assert done.returncode == 1
    reason = "%s: %s has no gone:1; check its name and tag" % (gone, server.host)
    assert done.stderr.splitlines() == [
        "tinyreg: " + reason, "tinyreg: 1 of 2 images failed; it is said above why"]
    assert there in done.stdout


def test_a_pattern_that_fits_very_many_tags_is_refused(server, filled, start_proxy, tmp_path):
    """A list of tags is a stranger's: to plan half a million images would take days."""
    tags = ["1.%d" % number for number in range(tinyreg.MOST + 1)]

    def spoil(handler):
        if "/tags/list" in handler.path:
            return handler.answer(200, {}, json.dumps({"tags": tags + ["latest"]}).encode())

    host = start_proxy(server.host, spoil).host
    done = run_tinyreg("pull", host + "/demo:*", host + "/demo:late*", "--root", tmp_path / "back")
    assert done.returncode == 1 and done.stdout.count(": sha256:") == 1
    first, last = done.stderr.splitlines()
    assert first.startswith("tinyreg: %s/demo:*: %d tags fit, " % (host, len(tags) + 1)) and "1 of 2" in last
    assert "--newest N" in first and "--versions RANGE" in first
    done = run_tinyreg("pull", host + "/demo:*", "--newest", "2", "--root", tmp_path / "back")
    assert "2 of 2 images failed" in done.stderr  # these two, which are not there


def test_an_image_pinned_by_tag_and_digest_keeps_its_tag_wherever_it_goes(server, tmp_path):
    """As Helm charts pin their images: gc --untagged deleted what had been pulled so."""
    there = Directory(server.root)
    old = make_image(there, "a/b", "1.0")
    new = make_image(there, "a/b", "1.0", layers=(b"new",))
    root, image = tmp_path / "back", "%s/a/b:1.0@%s" % (server.host, old.digest)
    done = run_tinyreg("pull", "--root", root, image)
    line = "tinyreg: %s: the tag 1.0 has moved to %s; the digest was taken, and gets the tag here"
    assert (done.returncode, done.stderr) == (0, line % (image, new.digest) + "\n")
    back, name = Directory(str(root)), server.host.replace(":", "_") + "/a/b"
    assert back.resolve(name, "1.0") == old.digest
    assert run_tinyreg("gc", "--untagged", "--grace", "0", "--root", root).returncode == 0
    archive, pushed = tmp_path / "images.tar", "%s:1.0@%s" % (name, old.digest)
    done = run_tinyreg("save", "--root", root, image, "-o", archive)
    assert (done.returncode, done.stderr) == (0, "")
    assert run_tinyreg("load", "--root", tmp_path / "far", archive).returncode == 0
    assert Directory(str(tmp_path / "far")).resolve(name, "1.0") == old.digest
    assert run_tinyreg("push", "--root", root, pushed, "--to", server.host + "/x").returncode == 0
    assert there.resolve("x/" + name, "1.0") == old.digest
    report = json.loads(run_tinyreg("pull", "--json", "--root", root, image).stdout)
    assert report["images"][0]["moved"] == {"1.0": new.digest}
    done = run_tinyreg("rm", "--root", root, "%s:1.0@%s" % (name, Digest.of(b"another")))
    assert done.returncode == 1 and back.resolve(name, "1.0") == old.digest
    assert run_tinyreg("rm", "--root", root, pushed).returncode == 0
    assert list(back.tags(name)) == [] and back.manifest(name, old.digest)


def test_rm_deletes_no_tag_that_points_elsewhere(tmp_path):
    store = Directory(str(tmp_path / "back"))
    old = make_image(store, "a", "1")
    new = make_image(store, "a", "1", layers=(b"new",))
    done = run_tinyreg("rm", "--root", store.root, "a:1@" + old.digest)
    assert done.returncode == 1 and "points to " + new.digest in done.stderr
    assert store.resolve("a", "1") == new.digest


def test_what_a_registry_says_neither_moves_the_cursor_nor_ends_pull(server, start_proxy, tmp_path):
    for name in ("one", "gone", "two"):
        manifest = make_image(Directory(server.root), name)
        make_referrer(Directory(server.root), name, manifest, artifactType=EVIL)

    def spoil(handler):
        if handler.command == "GET" and "/gone/" in handler.path:
            error = {"code": "NAME_UNKNOWN", "message": EVIL + "!" * 100000}
            return handler.answer(400, body=json.dumps({"errors": [error]}).encode())

    host = start_proxy(server.host, spoil).host
    images = [host + "/one", host + "/gone", host + "/two"]
    done = run_tinyreg("pull", "--root", tmp_path / "back", *images)
    assert done.returncode == 1 and is_harmless(done.stdout + done.stderr)
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()[:2]] == [
        host + "/one:latest", host + "/two:latest"]
    assert len(done.stderr.splitlines()) == 2 and len(done.stderr) < 4000 and "owned" in done.stderr
    report = json.loads(run_tinyreg("pull", "--json", "--root", tmp_path / "back", *images).stdout)
    assert [entry["referrers"][0]["type"] for entry in report["images"]] == [EVIL, EVIL]


@pytest.mark.parametrize("arguments, wanted", [
    (["pull"], "no image is named"),
    (["pull", "Not/An/Image"], "invalid repository name"),
    (["pull", "127.0.0.1:1/x"], "can't reach 127.0.0.1:1: nothing listens there"),
    (["pull", "no-such-host.invalid/x"], "no-such-host.invalid"),
    (["push", "nothing", "--to", "127.0.0.1:1"], "nothing: not in the store as nothing:latest; `tinyreg.py ls`"),
    (["pull", "x", "--ca", "/nowhere"], "can't use /nowhere as the CA"),
    (["pull", "-f", "/nowhere"], "/nowhere: No such file or directory"),
])
def test_what_is_wrong_is_told_in_one_line(tmp_path, arguments, wanted):
    Directory(str(tmp_path / "back"))
    done = run_tinyreg(*(arguments + ["--root", tmp_path / "back"]))
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert wanted in done.stderr


def test_a_target_that_is_no_registry_is_a_wrong_option(tmp_path):
    done = run_tinyreg("push", "x", "--to", "http://lab", "--root", tmp_path / "back")
    assert done.returncode == 2 and "write HOST[:PORT] or HOST[:PORT]/PREFIX" in done.stderr


def test_push_goes_below_the_prefix_and_back_to_its_own_registry(server, tmp_path):
    store = Directory(str(tmp_path / "store"))
    first = make_image(store, "docker.io/library/alpine", "3.19")
    second = make_image(store, server.host.replace(":", "_") + "/team/app", "1", layers=(b"app",))
    done = run_tinyreg("push", "alpine:3.19", "--to", server.host + "/mirror", "--root", store.root)
    assert done.returncode == 0, done.stderr
    done = run_tinyreg("push", server.host + "/team/app:1", "--to", server.host, "--root", store.root)
    assert done.returncode == 0, done.stderr
    there = Directory(server.root)
    assert there.resolve("mirror/docker.io/library/alpine", "3.19") == first.digest
    assert there.resolve("team/app", "1") == second.digest


def test_pull_that_is_killed_goes_on_inside_the_blob(store, server, start_proxy, tmp_path):
    """kill -9 half-way, then again: only the rest is fetched."""
    size = 8 << 20
    make_image(store, "demo", layers=(os.urandom(size),))
    copy(store, Remote(server.host), "demo", "latest")
    held, stalled = threading.Event(), []

    def spoil(handler):
        if handler.command == "GET" and "/blobs/" in handler.path and not held.is_set() and handler.path not in stalled:
            stalled.append(handler.path)
            body = server.ask("GET", handler.path).body
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            part = body[:5 << 20]
            handler.wfile.write(part)
            handler.server.sent += len(part)
            if len(body) > len(part):
                held.wait(PATIENCE)
                return handler.cut()
            return True

    proxy = start_proxy(server.host, spoil)
    root = tmp_path / "back"
    command = [sys.executable, TINYREG, "pull", proxy.host + "/demo", "--root", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def parts():
        return sum(path.stat().st_size for path in root.glob("tinyreg/uploads/**/_*"))

    until(lambda: parts() >= 5 << 20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    held.set()
    assert parts() >= 5 << 20
    proxy.sent = 0
    done = run_tinyreg("pull", proxy.host + "/demo", "--root", root)
    assert done.returncode == 0, done.stderr
    assert size - (5 << 20) <= proxy.sent < size - (5 << 20) + 10000
    assert holdings(Directory(str(root)), proxy.host.replace(":", "_") + "/demo") == holdings(store, "demo")


def test_ctrl_c_ends_a_pull_that_waits_for_its_upstream(filled, server, start_proxy, tmp_path):
    asked, go_on = threading.Event(), threading.Event()

    def spoil(handler):
        if handler.command == "GET" and "/blobs/" in handler.path:
            asked.set()
            go_on.wait(3600)

    command = [sys.executable, TINYREG, "pull", start_proxy(server.host, spoil).host + "/demo", "--root",
               str(tmp_path / "back")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert asked.wait(PATIENCE)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE)
    go_on.set()
    assert (process.returncode, output) == (130, b"") and b"interrupted; run it again" in errors


def test_a_terminal_shows_a_bar(filled, server, start_proxy, tmp_path):
    """In one line that moves, which the line that stays replaces."""
    import pty
    proxy = start_proxy(server.host, lambda handler: time.sleep(0.2) if "/blobs/" in handler.path else None)
    ours, theirs = pty.openpty()
    command = [sys.executable, TINYREG, "pull", proxy.host + "/demo", "--root", str(tmp_path / "back")]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal whose last writer is gone
        while True:
            block = os.read(ours, 65536)
            if not block:
                break
            shown += block
    os.close(ours)
    assert process.wait() == 0
    bars = re.findall(rb"\r\S+/demo:latest \[[#-]{20}\] \d+ %, in total [0-9.]+ \w+ of 3.0 MiB", shown)
    assert bars, shown
    assert shown.rstrip().splitlines()[-2].endswith(b"referrers: none found")


def test_pull_goes_through_the_proxy_that_the_environment_names(filled, server, start_proxy, tmp_path):
    proxy = start_proxy(server.host)
    environment = dict(os.environ, http_proxy="http://me:secret@" + proxy.host)
    done = run_tinyreg("pull", "far.example/demo", "--plain-http", "--root", tmp_path / "back", env=environment)
    assert done.returncode == 0, done.stderr
    verb, path, headers = proxy.seen[0]
    assert (verb, path) == ("CONNECT", "far.example:80")
    assert headers["proxy-authorization"] == "Basic " + base64.b64encode(b"me:secret").decode()


def test_pull_goes_through_a_proxy_to_a_registry_with_tls(filled, server, start_proxy, start_tls, tmp_path):
    proxy = start_proxy(server.host)
    proxy.tunnel, ca = start_tls(server)
    environment = dict(os.environ, https_proxy=proxy.host)
    pull = ["pull", "far.example:5000/demo", "--root", tmp_path / "back", "--retries", "0"]
    done = run_tinyreg(*pull, "--insecure", env=environment)
    assert done.returncode == 0, done.stderr
    assert proxy.seen[0][:2] == ("CONNECT", "far.example:5000")
    done = run_tinyreg(*pull, "--ca", ca, env=environment)
    assert done.returncode == 1 and "its certificate is not trusted" in done.stderr  # it is for 127.0.0.1


@pytest.mark.parametrize("scheme, status", [("http", None), ("https", None), ("https", 407), ("http", 502)])
def test_a_proxy_that_fails_is_named(start_proxy, tmp_path, scheme, status):
    """And not the registry behind it: that "nothing listens there" sends people to the wrong host."""
    proxy = start_proxy(None, lambda handler: handler.answer(status)).host if status else "127.0.0.1:%d" % free_port()
    environment = dict(os.environ, **{scheme + "_proxy": "http://me:secret@" + proxy})
    done = run_tinyreg("pull", "far.example/demo", *(["--plain-http"] if scheme == "http" else []), "--root",
                       tmp_path / "back", "--retries", "0", env=environment)
    line, = done.stderr.splitlines()
    assert done.returncode == 1 and "can't reach far.example: the proxy %s fails (" % proxy in line
    assert "check %s_proxy in the environment" % scheme in line and "secret" not in line
    assert str(status or "Connection refused") in line


def test_pull_over_tls_names_the_ca_that_is_not_trusted(filled, server, tmp_path, start_tls):
    host, ca = start_tls(server)
    image = host + "/demo"
    done = run_tinyreg("pull", image, "--ca", ca, "--root", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    other = start_tls(server)[1]
    done = run_tinyreg("pull", image, "--ca", other, "--root", tmp_path / "back2")
    assert done.returncode == 1 and "its certificate is not trusted" in done.stderr and "--ca FILE" in done.stderr
    assert run_tinyreg("pull", image, "--insecure", "--root", tmp_path / "back3").returncode == 0
    done = run_tinyreg("pull", image, "--plain-http", "--retries", "0", "--root", tmp_path / "back4")
    assert done.returncode == 1 and "leave out --plain-http" in done.stderr


@pytest.fixture
def start_tls(tmp_path):
    """A function that puts a TLS listener, with a certificate of its own, before a server; returns (host, CA file)."""
    import ssl
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("openssl is not installed")
    started = []

    def start(server):
        base = str(tmp_path / ("tls%d" % len(started)))
        subprocess.run([openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", base + ".key", "-out",
                        base + ".crt", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
                        "-days", "9"], check=True, stderr=subprocess.DEVNULL)
        proxy = Proxy(server.host)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(base + ".crt", base + ".key")
        proxy.socket = context.wrap_socket(proxy.socket, server_side=True, do_handshake_on_connect=False)
        started.append(proxy)
        return proxy.host, base + ".crt"

    yield start
    for proxy in started:
        proxy.shutdown()
        proxy.server_close()


# Names on reads

def test_a_mirror_answers_for_every_origin(server):
    store = Directory(server.root)
    hub = make_image(store, "docker.io/library/alpine", "3.19", layers=(b"hub",))
    quay = make_image(store, "quay.io/library/alpine", "3.19", layers=(b"quay",))
    own = make_image(store, "app", "1", layers=(b"own",))
    make_referrer(store, "docker.io/library/alpine", hub)
    asked = [("library/alpine/manifests/3.19?ns=docker.io", hub, "docker.io"),
             ("library/alpine/manifests/3.19?ns=quay.io", quay, "quay.io"),
             ("library/alpine/manifests/3.19", hub, None), ("alpine/manifests/3.19", hub, None),
             ("quay.io/library/alpine/manifests/3.19", quay, None), ("app/manifests/1", own, None)]
    for path, manifest, origin in asked:
        status, headers, _ = server.ask("GET", "/v2/" + path)
        assert (status, headers["Docker-Content-Digest"]) == (200, manifest.digest), path
        assert headers["OCI-Namespace"] == origin, path
    assert server.ask("GET", "/v2/library/alpine/manifests/3.19?ns=ghcr.io").status == 404  # not docker.io's
    blob = hub.blobs[1].digest
    assert server.ask("GET", "/v2/library/alpine/blobs/%s?ns=docker.io" % blob).status == 200
    assert server.ask("GET", "/v2/alpine/tags/list").status == 200
    assert len(server.ask("GET", "/v2/alpine/referrers/" + hub.digest).json["manifests"]) == 1
    assert server.ask("GET", "/v2/app/manifests/2").status == 404


def test_who_may_push_a_name_answers_for_no_other_registry_with_it(server):
    """Neither for docker.io, of which nothing is here."""
    make_image(Directory(server.root), "team/app", "1")
    for origin in ("docker.io", "registry-1.docker.io", "quay.io", "ghcr.io", "lab.example:5000"):
        for path in ("manifests/1", "tags/list"):
            assert server.ask("GET", "/v2/team/app/%s?ns=%s" % (path, origin)).status == 404, (path, origin)
    assert server.ask("GET", "/v2/team/app/manifests/1").status == 200


def test_a_tag_that_our_own_repository_lacks_is_not_answered_with_docker_io_s(server):
    """Whoever registers team/app there would choose what our hosts run."""
    store = Directory(server.root)
    own = make_image(store, "team/app", "1.0", layers=(b"own",))
    theirs = make_image(store, "docker.io/team/app", "2.0", layers=(b"theirs",))
    blob = theirs.blobs[1].digest
    for path in ("manifests/2.0", "manifests/" + theirs.digest, "blobs/" + blob):
        assert server.ask("GET", "/v2/team/app/" + path).status == 404, path
    assert server.ask("GET", "/v2/team/app/manifests/1.0").headers["Docker-Content-Digest"] == own.digest
    store.delete_tag("team/app", "1.0")
    assert server.ask("GET", "/v2/team/app/manifests/2.0").status == 404
    for command in (["rm"], ["save", "-o", server.root + ".tar"]):
        done = run_tinyreg(*command, "team/app:2.0", "--root", server.root)
        assert done.returncode == 1 and "not in the store as team/app:2.0" in done.stderr
    assert store.resolve("docker.io/team/app", "2.0") == theirs.digest


def test_a_repository_below_a_name_does_not_hide_docker_io_s_of_that_name(server):
    store = Directory(server.root)
    make_image(store, "alpine/git", "1")
    hub = make_image(store, "docker.io/library/alpine", "3.19")
    assert server.ask("GET", "/v2/alpine/manifests/3.19").headers["Docker-Content-Digest"] == hub.digest


def test_pushes_take_the_name_as_it_is(store, server):
    make_image(Directory(server.root), "docker.io/library/alpine", "3.19")
    make_image(store, "alpine", "mine", layers=(b"mine",))
    copy(store, Remote(server.host), "alpine", "mine")
    assert sorted(Directory(server.root).repositories()) == ["alpine", "docker.io/library/alpine"]
    assert server.ask("GET", "/v2/alpine/manifests/3.19").status == 404
    assert server.ask("GET", "/v2/library/alpine/manifests/3.19").status == 200


def test_ls_and_rm_take_short_names(store):
    make_image(store, "docker.io/library/alpine", "3.19")
    assert "3.19" in run_tinyreg("ls", "alpine", "--root", store.root).stdout
    assert run_tinyreg("rm", "alpine:3.19", "--root", store.root).returncode == 0
    assert not list(store.tags("docker.io/library/alpine"))


# Pull-through

@pytest.fixture
def mirror(filled, server, start_proxy, start_server, tmp_path):
    """(a server with an upstream, the proxy in front of that upstream): library/demo is there."""
    proxy = start_proxy(server.host)
    copy(filled, Remote(server.host), "demo", "latest", "library/demo")
    front = start_server(tmp_path / "mirror", "--upstream", "docker.io=http://" + proxy.host, "--upstream-ttl", "0")
    return front, proxy


def test_pull_through_fetches_once_and_serves_when_the_upstream_is_away(mirror, filled, server):
    front, proxy = mirror
    page = front.url + "/?repository=docker.io/library/demo&reference=latest"
    assert (get(page).status, proxy.seen) == (404, [])  # to look is not to fetch
    assert front.ask("GET", "/v2/docker.io/library/demo/manifests/latest").status == 200
    proxy.seen.clear()
    assert (get(page).status, proxy.seen) == (200, [])  # before its blobs came
    assert holdings(Remote(front.host), "docker.io/library/demo") == holdings(filled, "demo")
    proxy.seen.clear()
    assert holdings(Remote(front.host), "library/demo") == holdings(filled, "demo")
    assert not proxy.asked("GET", "/blobs/") and not proxy.asked("GET", "/manifests/")
    changed = make_image(Directory(server.root), "library/demo", "latest", layers=(b"new",))
    assert Remote(front.host).resolve("docker.io/library/demo", "latest") == changed.digest
    server.stop()
    proxy.server_close()
    assert Remote(front.host).resolve("docker.io/library/demo", "latest") == changed.digest
    assert front.ask("GET", "/v2/docker.io/library/demo/manifests/other").status == 404


def test_an_archive_of_what_an_upstream_has_contains_the_signatures_that_it_has(mirror, filled):
    front, proxy = mirror
    note = make_referrer(filled, "demo", filled.manifest("demo", filled.resolve("demo", "latest")))
    copy(filled, Remote(proxy.host), "demo", "latest", "library/demo")
    answer = front.ask("GET", "/archive/docker.io/library/demo:latest.tar")
    assert (answer.status, note.content in answer.body) == (200, True)


def test_a_clock_that_begins_in_1970_hides_no_tag_of_an_upstream(filled, server, back, monkeypatch):
    upstreams = {"far": tinyreg.Upstream(Remote(server.host), "")}
    monkeypatch.setattr(tinyreg.time, "time", lambda: 60.0)
    front = tinyreg.PullThrough(back, upstreams)
    assert front.resolve("far/demo", "latest") == filled.resolve("demo", "latest")


def test_an_upstream_is_not_asked_for_a_tag_that_our_own_repository_lacks(mirror, filled):
    front, proxy = mirror
    make_image(Directory(front.root), "library/demo", "1.0", layers=(b"own",))
    proxy.seen.clear()
    assert front.ask("GET", "/v2/library/demo/manifests/latest").status == 404
    assert proxy.seen == []
    assert front.ask("GET", "/v2/library/demo/manifests/latest?ns=docker.io").status == 200


def test_pull_through_answers_clients_that_say_ns_and_refuses_pushes(mirror, filled):
    front, proxy = mirror
    status, headers, _ = front.ask("GET", "/v2/library/demo/manifests/latest?ns=docker.io")
    assert (status, headers["OCI-Namespace"]) == (200, "docker.io")
    assert front.ask("GET", "/v2/library/demo/manifests/latest?ns=quay.io").status == 404
    assert not proxy.asked("GET", "ns=")
    with pytest.raises(RegistryError) as caught:
        copy(filled, Remote(front.host), "demo", "latest", "docker.io/library/mine")
    assert caught.value.code == "DENIED"
    proxy.seen.clear()
    refused = front.ask("POST", "/v2/docker.io/library/mine/blobs/uploads/")
    assert refused.status == 403 and b"push under another name" in refused.body  # before it takes the first byte
    mount = "?mount=%s&from=library/demo" % filled.manifest("demo", filled.resolve("demo", "latest")).blobs[0].digest
    assert front.ask("POST", "/v2/docker.io/library/mine/blobs/uploads/" + mount).status == 403
    copy(filled, Remote(front.host), "demo", "latest", "mine")
    assert Remote(front.host).resolve("mine", "latest") == filled.resolve("demo", "latest")


def test_parallel_clients_share_one_download_that_streams(mirror, filled, server, monkeypatch):
    front, proxy = mirror
    digest = filled.manifest("demo", filled.resolve("demo", "latest")).blobs[1].digest
    go_on = threading.Event()

    def spoil(handler):
        if handler.command == "GET" and "/blobs/" in handler.path:
            body = server.ask("GET", handler.path).body
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[:2 << 20])
            handler.wfile.flush()
            assert go_on.wait(PATIENCE)
            handler.wfile.write(body[2 << 20:])
            return True

    proxy.spoil = spoil
    url = "%s/v2/docker.io/library/demo/blobs/%s" % (front.url, digest)
    clients = [open_url(url) for _ in range(3)]
    try:
        starts = [client.read(1 << 20) for client in clients]  # before the upstream has sent all
        go_on.set()
        for start, client in zip(starts, clients):
            assert Digest.of(start + client.read()) == digest
    finally:
        go_on.set()
        for client in clients:
            client.close()
    assert len(proxy.asked("GET", "/blobs/")) == 1
    answer = get(url, range="bytes=100-199")
    assert answer.status == 206 and len(answer.body) == 100


@pytest.mark.parametrize("limit, status", [
    ("--min-free=8000T", 507), ("--max-blob=1M", 413), ("--quota=docker.io=1M", 403)])
def test_the_limits_of_the_store_are_those_of_what_is_fetched(mirror, filled, start_server, tmp_path, limit, status):
    _, proxy = mirror
    limited = start_server(tmp_path / "limited", "--upstream", "docker.io=http://" + proxy.host, limit)
    digest = filled.manifest("demo", filled.resolve("demo", "latest")).blobs[1].digest
    answer = limited.ask("GET", "/v2/docker.io/library/demo/blobs/" + digest)
    assert answer.status == status and limit.split("=")[0] in answer.text
    assert digest not in set(Directory(limited.root).digests())


def test_wrong_bytes_from_upstream_never_arrive_whole(mirror, filled):
    front, proxy = mirror
    digest = filled.manifest("demo", filled.resolve("demo", "latest")).blobs[1].digest
    size = filled.manifest("demo", filled.resolve("demo", "latest")).blobs[1].size
    proxy.spoil = lambda handler: (handler.command == "GET" and "/blobs/" in handler.path
                                   and handler.answer(200, {}, b"x" * size) or None)
    with front.open("GET", "/v2/docker.io/library/demo/blobs/" + digest) as answer:
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
    assert digest not in set(Directory(front.root).digests())


def test_pull_through_of_a_blob_whose_size_the_upstream_does_not_say(mirror, filled):
    front, proxy = mirror

    def spoil(handler):
        if handler.command == "HEAD" and "/blobs/" in handler.path:
            handler.send_response(200)
            handler.end_headers()
            return handler.cut()

    proxy.spoil = spoil
    assert holdings(Remote(front.host), "docker.io/library/demo") == holdings(filled, "demo")


def test_an_endless_blob_does_not_fill_the_disk_of_a_cache(mirror, filled):
    front, proxy = mirror
    blob, written = filled.manifest("demo", filled.resolve("demo", "latest")).blobs[1], []

    def spoil(handler):
        if handler.command == "GET" and "/blobs/" in handler.path:
            handler.send_response(200)
            handler.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(64):
                    written.append(handler.wfile.write(bytes(1 << 20)))
            return handler.cut()

    proxy.spoil = spoil
    with front.open("GET", "/v2/docker.io/library/demo/blobs/" + blob.digest) as answer:
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
    assert 2 < len(written) < 32


def test_an_upstream_that_fails_at_one_image_is_asked_for_others(mirror, filled):
    front, proxy = mirror
    proxy.spoil = lambda handler: "/manifests/bad" in handler.path and handler.answer(500) or None
    with Client(front) as client:  # of one worker
        for tag, status in (("bad", 404), ("latest", 200)):
            answer = client.ask("GET", "/v2/docker.io/library/demo/manifests/" + tag)
            assert (answer.status, bool(answer.body)) == (status, True)


def test_what_an_upstream_that_is_away_may_have_is_not_called_missing(mirror, filled, server):
    """A client that is told of a missing blob gives the image up; one that is told to come again does."""
    front, proxy = mirror
    name, image = "docker.io/library/demo", filled.manifest("demo", filled.resolve("demo", "latest"))
    assert front.ask("GET", "/v2/%s/manifests/latest" % name).status == 200
    for path in ("blobs/" + Digest.of(b"none"), "manifests/" + Digest.of(b"none")):
        assert front.ask("GET", "/v2/%s/%s" % (name, path)).status == 404
    server.stop()
    proxy.server_close()
    for path in ("blobs/" + image.blobs[1].digest, "manifests/" + Digest.of(b"none")):
        answer = front.ask("GET", "/v2/%s/%s" % (name, path))
        assert answer.status == 503 and b"can't be asked at present" in answer.body
        assert proxy.host not in answer.text
    assert front.ask("GET", "/v2/%s/manifests/latest" % name).status == 200
    assert front.ask("GET", "/v2/%s/tags/list" % name).json["tags"] == ["latest"]
    assert front.ask("GET", "/v2/%s/referrers/%s" % (name, image.digest)).status == 200


def test_while_an_upstream_is_away_what_was_pulled_of_an_index_is_an_archive(mirror, filled, server):
    front, proxy = mirror
    name = "docker.io/library/multi"
    make_multi(filled, "multi", "1", attest=False)
    copy(filled, Remote(server.host), "multi", "1", "library/multi")
    multi = filled.manifest("multi", filled.resolve("multi", "1"))
    first = filled.manifest("multi", multi.manifests[0].digest)
    front.ask("GET", "/v2/%s/manifests/1" % name)
    front.ask("GET", "/v2/%s/manifests/%s" % (name, first.digest))
    for blob in first.blobs[1:]:
        front.ask("GET", "/v2/%s/blobs/%s" % (name, blob.digest))
    server.stop()
    proxy.server_close()
    target = "/archive/%s:1.tar" % name
    assert front.ask("GET", target).status == 503  # it may come yet
    copy(filled, Directory(front.root), "multi", first.digest, name)
    answer = front.ask("GET", target)
    assert (answer.status, b"amd64 layer" in answer.body) == (200, True)


def test_pull_through_logs_in_and_gives_no_login_away(filled, server, start_proxy, start_server, tmp_path, home):
    copy(filled, Remote(server.host), "demo", "latest", "library/demo")
    proxy = start_proxy(server.host, TokenServer(users=[base64.b64encode(b"me:secret").decode()]))
    front = start_server(tmp_path / "mirror", "--upstream", "docker.io=http://" + proxy.host)
    status, headers, _ = front.ask("GET", "/v2/docker.io/library/demo/manifests/latest")
    assert status == 404 and "WWW-Authenticate" not in headers
    save_login(home, proxy.host)
    second = start_server(tmp_path / "mirror2", "--upstream", "docker.io=http://" + proxy.host)
    assert holdings(Remote(second.host), "docker.io/library/demo") == holdings(filled, "demo")
    assert "secret" not in second.log() and "me" not in front.log().split()
    proxy.seen.clear()
    second.restart()
    assert second.ask("GET", "/v2/docker.io/library/demo/manifests/latest").status == 200
    assert not proxy.seen  # within --upstream-ttl
    link = Directory(second.root).layout.current_path("docker.io/library/demo", "latest") + "/link"
    os.utime(link, (time.time() + 1e8, time.time() + 1e8))  # as a wrong clock left it: it was not asked for years
    assert second.ask("GET", "/v2/docker.io/library/demo/manifests/latest").status == 200
    assert proxy.seen


# Real clients

def test_containerd_mirrors_every_registry_by_its_ns(ctr, server, tmp_path):
    """One hosts.toml for all, as `clients` writes it; containerd says in `ns` whom it means."""
    store = Directory(server.root)
    images = {name: make_image(store, name, "1", layers=(name.encode(),))
              for name in ("docker.io/library/demo", "quay.io/team/demo", "lab.example_5000/team/demo")}
    script = client_script("containerd", ClientSetup(server.host, None, ["docker.io"]))
    folder = tmp_path / "certs.d" / "_default"
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(re.search("_default/hosts.toml.*\n([^']*)END\n", script).group(1))
    for name, manifest in images.items():
        image = name.replace("_5000", ":5000") + ":1"
        ctr("content", "fetch", "--hosts-dir", str(tmp_path / "certs.d"), image)
        assert manifest.digest in ctr("images", "ls", "name==" + image)
        ctr("images", "rm", "--sync", image)


def test_skopeo_pushes_under_a_short_name_what_is_here_under_the_long_one(skopeo, server, tmp_path):
    """Its HEAD finds the blobs in docker.io/library/demo, so it does not send them."""
    store = Directory(server.root)
    manifest = make_image(store, "docker.io/library/demo", "1")
    source = "docker://%s/docker.io/library/demo:1" % server.host
    skopeo("copy", "--src-tls-verify=false", source, "dir:%s/d" % tmp_path)
    skopeo("copy", "--dest-tls-verify=false", "dir:%s/d" % tmp_path, "docker://%s/demo:2" % server.host)
    assert Directory(server.root).resolve("demo", "2") == manifest.digest
    for blob in manifest.blobs:
        assert read_blob(store, "demo", blob.digest)


@needs_distribution
def test_skopeo_s_image_goes_through_distribution_pull_push_and_back(skopeo, distribution, server, tmp_path):
    made = Directory(str(tmp_path / "made"))
    make_image(made, "demo", "1")
    copy(made, Remote(server.host), "demo", "1")
    skopeo("copy", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://%s/demo:1" % server.host,
           "docker://%s/team/demo:1" % distribution)
    image = "%s/team/demo:1" % distribution
    done = run_tinyreg("pull", image, "--root", tmp_path / "store")
    assert done.returncode == 0, done.stderr
    done = run_tinyreg("push", image, "--to", server.host + "/far", "--root", tmp_path / "store")
    assert done.returncode == 0, done.stderr
    name = "far/%s/team/demo" % distribution.replace(":", "_")
    found = skopeo("inspect", "--tls-verify=false", "--format", "{{.Digest}}", "docker://%s/%s:1" % (server.host, name))
    assert found == Remote(distribution).resolve("team/demo", "1")


def test_no_other_image_stands_in_for_one_that_may_not_be_pulled(start_server, tmp_path):
    (tmp_path / "rules").write_text("** @anonymous pull\nalpine @anonymous none\nquay.io/** @anonymous none\n"
                                    "docker.io/library/secret @anonymous none\n")
    server = start_server(None, "--anonymous", "pull", "--rules", str(tmp_path / "rules"))
    store = Directory(server.root)
    for name in ("alpine", "docker.io/library/alpine", "quay.io/team/app", "team/app", "docker.io/library/secret"):
        make_image(store, name, "1", layers=(name.encode(),))
    for path, status in [("docker.io/library/alpine/manifests/1", 200), ("alpine/manifests/1", 403),
                         ("team/app/manifests/1", 200), ("team/app/manifests/1?ns=quay.io", 403),
                         ("secret/manifests/1", 404), ("docker.io/library/secret/manifests/1", 403)]:
        assert server.ask("GET", "/v2/" + path).status == status, path


# Trees of caches

@pytest.fixture
def tree(store, start_server, tmp_path):
    """Three servers in a row, each the parent of the next: the store's, that of a rack, that of a node."""
    center = start_server(store.root)
    rack = start_server(tmp_path / "rack", "--upstream", "*=http://" + center.host)
    node = start_server(tmp_path / "node", "--upstream", "*=http://%s/" % rack.host, "--upstream-ttl", "0")
    return center, rack, node


def test_a_tree_of_caches_has_all_origins_under_their_names(tree, store):
    center, rack, node = tree
    names = ["docker.io/library/demo", "quay.io/a/b", "lab.example_5000/x"]
    for name in names:
        make_image(store, name, layers=(name.encode(),))
        make_referrer(store, name, store.manifest(name, store.resolve(name, "latest")))
    ours = make_image(store, "team/app")
    for name in names:
        assert holdings(Remote(node.host), name) == holdings(store, name)
        (note,) = store.referrer_digests(name, store.resolve(name, "latest"))
        assert Remote(node.host).referrer_digests(name, store.resolve(name, "latest")) == [note]
    assert node.ask("GET", "/v2/library/demo/manifests/latest?ns=docker.io").status == 200
    assert node.ask("GET", "/v2/demo/manifests/latest").status == 200
    # What is from nowhere else is each server's own.
    assert node.ask("GET", "/v2/team/app/manifests/" + ours.digest).status == 404
    assert node.ask("POST", "/v2/team/app/blobs/uploads/").status == 202
    assert node.ask("POST", "/v2/quay.io/a/b/blobs/uploads/").status == 403
    center.stop()
    rack.stop()
    assert holdings(Remote(node.host), names[1]) == holdings(store, names[1])


def test_many_nodes_at_once_cost_the_parent_one_transfer(store, start_server, start_proxy, tmp_path):
    layer = bytes(range(256)) * 4096
    make_image(store, "quay.io/a/b", layers=(layer,))
    proxy = start_proxy(start_server(store.root).host)
    rack = start_server(tmp_path / "rack", "--upstream", "*=http://" + proxy.host, "--workers", "2")
    digest = Digest.of(layer)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        blobs = list(pool.map(lambda _: rack.ask("GET", "/v2/quay.io/a/b/blobs/" + digest).body, range(8)))
    assert blobs == [layer] * 8 and len(proxy.asked("GET", "/blobs/")) == 1


def test_an_origin_that_is_named_is_asked_itself(store, filled, server, start_server, start_proxy, tmp_path):
    make_image(store, "docker.io/library/demo", layers=(b"of the parent",))
    parent = start_proxy(start_server(store.root).host)
    copy(filled, Remote(server.host), "demo", "latest", "library/demo")
    front = start_server(tmp_path / "front", "--upstream", "*=http://" + parent.host,
                         "--upstream", "docker.io=http://" + server.host)
    assert Remote(front.host).resolve("docker.io/library/demo", "latest") == filled.resolve("demo", "latest")
    assert parent.seen == []
    assert front.ask("GET", "/v2/quay.io/a/b/manifests/latest").status == 404 and len(parent.seen) == 1


def test_caches_that_are_each_others_parents_share_what_they_have_and_ask_once_for_the_rest(
        start_server, start_proxy, tmp_path):
    port = free_port()
    one = start_server(tmp_path / "one", "--upstream", "*=http://127.0.0.1:%d" % port)
    between = start_proxy(one.host)
    two = start_server(tmp_path / "two", "--upstream", "quay.io=http://%s/quay.io" % between.host,
                       listen="127.0.0.1:%d" % port)
    shared = make_image(Directory(two.root), "quay.io/a/b")
    assert Remote(one.host).resolve("quay.io/a/b", "latest") == shared.digest
    between.seen.clear()
    for path in ("manifests/none", "blobs/" + Digest.of(b"none"), "manifests/" + Digest.of(b"none")):
        for server in (one, two):
            assert server.ask("GET", "/v2/quay.io/a/b/" + path).status == 404
    assert "leads in a circle" in one.log() and "leads in a circle" in two.log()
    vias = [headers["via"].count("tinyreg-") for _, _, headers in between.seen]
    assert vias == [2, 1] * 3
    # Whoever makes up a long way is not listened to.
    between.seen.clear()
    long_way = ", ".join("1.1 tinyreg-%016x" % number for number in range(100))
    assert two.ask("GET", "/v2/quay.io/a/b/manifests/none", via=long_way).status == 404 and between.seen == []


@pytest.mark.parametrize("url", ["https://registry-1.docker.io", "docker.io", "http://quay.io/x", "*=http://x"])
def test_no_registry_of_the_internet_is_the_parent_of_all(tmp_path, url):
    done = run_tinyreg("serve", "--root", tmp_path / "x", "--upstream", "*=" + url)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert re.search("another|is no upstream|is for a tinyreg", done.stderr)
