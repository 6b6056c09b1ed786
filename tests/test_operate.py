"""A server that runs for years: refused writes, fixed tags, systemd, nginx in front of it."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse

import pytest
from conftest import PATIENCE, TINYREG, Client, ask, free_port, open_url, run_tinyreg, until, workers_of
from engines import NGINX_BEGIN, own_address
from samples import CONFIG, image, index, make_image, push_blob, read_blob, to_manifest

from tinyreg import Digest, ImmutableTags, RegistryError, Wrapper, parse_glob


def test_read_only_refuses_what_writes_and_says_so(start_server, store):
    manifest = make_image(store, "lab/app", "v1")
    server = start_server(None, "--read-only")
    assert server.ask("GET", "/v2/lab/app/manifests/v1")[0] == 200
    for method, path in (("POST", "/v2/lab/app/blobs/uploads/"), ("PUT", "/v2/lab/app/manifests/v2"),
                         ("DELETE", "/v2/lab/app/manifests/v1"), ("DELETE", "/v2/lab/app/blobs/" + Digest.of(b"x"))):
        status, _, text = server.ask(method, path, manifest.content if method == "PUT" else None)
        error = json.loads(text)["errors"][0]
        assert status == 403 and error["code"] == "DENIED" and "read-only" in error["message"]  # docker stops at a 403


@pytest.mark.parametrize("options", [(), ("--read-only",)])
def test_a_server_whose_store_is_taken_away_says_so_once_and_ends(start_server, root, store, options):
    """Its disk may be unmounted: a new store on the mount point would hide the old one, and take pushes."""
    make_image(store, "lab/app", "v1")
    server = start_server(None, *options)
    assert server.ask("GET", "/v2/lab/app/manifests/v1").status == 200
    root.rename(root.parent / "unmounted")
    until(lambda: server.process.poll() is not None, what="the end of the server")
    assert server.stop() == 1
    assert server.log().count("is gone: deleted, or its disk was unmounted; the server ends") == 1
    assert not root.exists() and "Traceback" not in server.log()


def test_a_read_only_server_needs_a_store(tmp_path):
    done = run_tinyreg("serve", "--root", tmp_path / "none", "--listen", "127.0.0.1:0", "--read-only")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "none").exists()


def test_immutable_tags_do_not_move(start_server, store):
    first = make_image(store, "lab/app", "v1")
    store.put_manifest("lab/app", first, ["latest"])
    other = to_manifest(image(annotations={"now": "another"}))
    server = start_server(None, "--immutable-tags", "v*", "--immutable-tags", "prod/**:*")

    def put(name, tag, manifest):
        return server.ask("PUT", "/v2/%s/manifests/%s" % (name, tag), manifest.content)

    status, _, text = put("lab/app", "v1", other)
    assert status == 403 and "v1 can't be moved" in json.loads(text)["errors"][0]["message"]
    assert put("lab/app", "v1", first)[0] == 201  # the same again is no move
    assert put("lab/app", "v2", other)[0] == 201 and put("lab/app", "latest", other)[0] == 201
    assert server.ask("DELETE", "/v2/lab/app/manifests/v1")[0] == 403
    assert server.ask("DELETE", "/v2/lab/app/manifests/" + first.digest)[0] == 403
    assert store.resolve("lab/app", "v1") == first.digest and store.resolve("lab/app", "latest") == other.digest
    assert server.ask("DELETE", "/v2/lab/app/manifests/latest")[0] == 202
    # By digest with several tags at once: all or none.
    several = "/v2/lab/app/manifests/%s?tag=new&tag=v1" % other.digest
    assert server.ask("PUT", several, other.content)[0] == 403
    with pytest.raises(RegistryError):
        store.resolve("lab/app", "new")
    make_image(store, "prod/a/b", "any")
    assert put("prod/a/b", "any", other)[0] == 403 and put("prod/a/b", "new", other)[0] == 201
    assert run_tinyreg("rm", "--root", server.root, "lab/app:v1").returncode == 0  # its owner may


def test_what_an_immutable_tag_needs_can_not_be_deleted_from_under_it(start_server, store):
    child, loose = [make_image(store, "app", None, layers=(layer,)) for layer in (b"child", b"loose")]
    inner = to_manifest(index(child))
    store.put_manifest("app", inner)
    store.put_manifest("app", to_manifest(index(inner)), ["v1"])
    store.put_manifest("app", to_manifest(index(loose)), ["latest"])
    server = start_server(None, "--immutable-tags", "v*")
    for path in ["manifests/" + inner.digest, "manifests/" + child.digest,
                 "blobs/" + Digest.of(b"child"), "blobs/" + Digest.of(CONFIG)]:
        status, _, text = server.ask("DELETE", "/v2/app/" + path)
        assert status == 403 and "the tag v1 needs it" in json.loads(text)["errors"][0]["message"]
    for path in ["blobs/" + Digest.of(b"loose"), "manifests/" + loose.digest]:
        assert server.ask("DELETE", "/v2/app/" + path)[0] == 202
    assert store.manifest("app", child.digest) and read_blob(store, "app", Digest.of(b"child"))


def test_what_an_immutable_tag_needs_is_looked_for_in_the_store_alone(store):
    """Behind the store there may be another registry, and a deletion is no reason to ask it."""
    class Behind(Wrapper):
        def manifest(self, *arguments):
            raise AssertionError("another registry was asked")

        tags = resolve = manifest

    manifest = make_image(store, "app", "v1")
    registry = ImmutableTags(Behind(store), [parse_glob("v*")], store.lock_repository)
    for delete, what in [(registry.delete_manifest, manifest.digest), (registry.delete_tag, "v1"),
                         (registry.delete_blob, Digest.of(CONFIG))]:
        with pytest.raises(RegistryError, match="the tag v1"):
            delete("app", what)


def test_a_blob_of_a_repository_without_manifests_can_be_deleted_beside_immutable_tags(store):
    digest = push_blob(store, "blobs", b"content")
    ImmutableTags(store, [parse_glob("*")], store.lock_repository).delete_blob("blobs", digest)
    with pytest.raises(RegistryError):
        store.open_blob("blobs", digest)


def test_of_two_first_pushes_at_once_one_wins(store):
    make_image(store, "lab/app", "base")
    store = ImmutableTags(store, [parse_glob("v*")], store.lock_repository)
    manifests = [to_manifest(image(annotations={"number": str(number)})) for number in range(8)]
    won, start = [], threading.Barrier(8)

    def push(manifest):
        start.wait()
        try:
            store.put_manifest("lab/app", manifest, ["v1"])
            won.append(manifest.digest)
        except RegistryError as error:
            assert error.code == "DENIED"

    threads = [threading.Thread(target=push, args=(manifest,)) for manifest in manifests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [store.resolve("lab/app", "v1")]


def test_a_worker_that_was_killed_has_no_watchers(start_server):
    server = start_server(None, "--workers", "1")
    with server.open("GET", "/live/events"):
        until(lambda: "tinyreg_watchers 1\n" in server.ask("GET", "/metrics").text)
        worker, = workers_of(server)
        os.kill(worker, signal.SIGKILL)
        until(lambda: set(workers_of(server)) - {worker})
    assert "tinyreg_watchers 0\n" in server.ask("GET", "/metrics").text


def test_connections_are_counted_until_they_end_or_their_worker_is_killed(start_server):
    server = start_server(None, "--workers", "1")

    def count():
        return re.search("^tinyreg_connections (.+)$", server.ask("GET", "/metrics").text, re.M).group(1)

    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(server)) for _ in range(3)]
        for client in clients:
            client.ask("GET", "/v2/")
        until(lambda: count() == "4")  # the one that asks is the fourth
        clients[0].close()
        until(lambda: count() == "3")
        worker, = workers_of(server)
        os.kill(worker, signal.SIGKILL)
        until(lambda: set(workers_of(server)) - {worker})
    until(lambda: count() == "1")


def test_counts_survive_the_death_of_a_worker(start_server):
    server = start_server(None, "--workers", "2")

    def count():
        text = server.ask("GET", "/metrics").text
        return sum(int(number) for number in re.findall(r'requests_total\{.*route="get_base".*\} (\d+)', text))

    for _ in range(20):
        server.ask("GET", "/v2/")
    until(lambda: count() == 20)
    before = set(workers_of(server))
    for worker in before:
        os.kill(worker, signal.SIGKILL)
    until(lambda: len(set(workers_of(server)) - before) == 2)
    for _ in range(20):
        server.ask("GET", "/v2/")
    until(lambda: count() == 40)


# systemd

def test_systemd_hears_that_it_is_ready_lives_and_stops(start_server, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        server = start_server(None, "--workers", "2", environment={
            "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"})
        assert server.ask("GET", "/v2/")[0] == 200
        heard = [manager.recv(100) for _ in range(6)]
        assert heard.count(b"READY=1") == 1 and heard.count(b"WATCHDOG=1") == 5
        server.process.send_signal(signal.SIGTERM)
        while manager.recv(100) != b"STOPPING=1":
            pass
        assert server.stop() == 0


@pytest.mark.parametrize("family, host", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_it_serves_on_sockets_that_systemd_opened(tmp_path, family, host):
    start = ("import os, sys\nos.dup2(int(sys.argv[1]), 3)\n"
             "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
             "os.execv(sys.executable, [sys.executable] + sys.argv[2:])\n")
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            pytest.skip("no IPv6 here")
        listener.listen(5)
        port = listener.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-c", start, str(listener.fileno()), TINYREG, "serve", "--quiet", "--root",
             str(tmp_path / "registry")], stdout=subprocess.PIPE, pass_fds=[listener.fileno()], universal_newlines=True)
    try:
        url = "http://%s:%d" % ("[::1]" if family == socket.AF_INET6 else host, port)
        assert ask(url, "GET", "/v2/")[0] == 200  # waits in the socket's queue until it serves
        process.terminate()
        assert url in process.stdout.read()  # the banner
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_make_install(tmp_path):
    """The program runs from where it was put, and systemd finds nothing wrong with the unit."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    subprocess.run(["make", "install", "DESTDIR=%s" % tmp_path, "PREFIX=/opt/tinyreg"], cwd=os.path.dirname(TINYREG),
                   check=True, stdout=subprocess.DEVNULL)
    program = tmp_path / "opt/tinyreg/bin/tinyreg"
    assert subprocess.run([str(program), "--version"], stdout=subprocess.PIPE).stdout.startswith(b"tinyreg ")
    unit = (tmp_path / "opt/tinyreg/lib/systemd/system/tinyreg.service").read_text()
    assert "ExecStart=/opt/tinyreg/bin/tinyreg serve\n" in unit and "kill -HUP $MAINPID\n" in unit
    if shutil.which("systemd-analyze"):
        (tmp_path / "tinyreg.service").write_text(unit.replace("/opt/tinyreg/bin/tinyreg", str(program)))
        checked = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "tinyreg.service")],
                                 stderr=subprocess.PIPE, universal_newlines=True)
        assert checked.returncode == 0 and "tinyreg.service" not in checked.stderr


# nginx

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")

BARE = "location / {{ proxy_pass http://{upstream}; }}"

# As the README has it, with two ways to share a host: the page below /registry/, and all names below team/.
AS_IN_THE_README = """
        proxy_http_version 1.1;
        proxy_request_buffering off;
        proxy_buffering off;
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-Host $http_host;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        location /v2/ {{ proxy_pass http://{upstream}; }}
        location /registry/ {{ proxy_pass http://{upstream}/; }}
        location /v2/team/ {{ proxy_pass http://{upstream}/v2/; proxy_redirect /v2/ /v2/team/; }}
"""


@pytest.fixture
def start_nginx(tmp_path):
    """A function that puts an nginx in front of a server, with these locations; returns its URL."""
    if not NGINX:
        pytest.skip("nginx is not installed")
    with contextlib.ExitStack() as stack:
        def start(server, locations, address="127.0.0.1"):
            port = free_port()
            block = NGINX_BEGIN + "server {{ listen {address}:{port}; client_max_body_size 0; %s }} }}" % locations
            (tmp_path / "nginx.conf").write_text(block.format(folder=tmp_path, address=address, port=port,
                                                              upstream=server.host))
            nginx = subprocess.Popen([NGINX, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
                                     stderr=subprocess.DEVNULL)
            stack.callback(nginx.wait)
            stack.callback(nginx.terminate)

            def answers():
                with socket.socket() as probe:
                    return probe.connect_ex((address, port)) == 0

            until(answers)
            return "http://%s:%d" % (address, port)

        yield start


@pytest.fixture
def proxied(start_server, start_nginx, store):
    """(a tinyreg, the URL of an nginx in front of it)"""
    make_image(store, "lab/app", "v1", (b"x" * 3000000,))
    server = start_server(None, "--log", "explain", "--anonymous", "push")
    return server, start_nginx(server, AS_IN_THE_README)


def test_behind_an_nginx_that_was_told_nothing_nobody_pushes_or_deletes(start_server, start_nginx, store):
    manifest = make_image(store, "lab/app", "v1")
    server = start_server()
    url = start_nginx(server, BARE)
    assert ask(url, "GET", "/v2/lab/app/manifests/v1").status == 200
    for method, path in (("POST", "/v2/lab/app/blobs/uploads/"), ("PUT", "/v2/lab/app/manifests/v1"),
                         ("DELETE", "/v2/lab/app/manifests/v1")):
        answer = ask(url, method, path, manifest.content if method == "PUT" else None)
        assert answer.status == 403 and "through no proxy" in answer.error["message"]
    assert ask(server, "PUT", "/v2/lab/app/manifests/v2", manifest.content).status == 201


def test_an_nginx_that_passes_v2_alone_passes_logins_too(start_server, start_nginx, store, tmp_path):
    """As Distribution's documentation has it, so those who come from there have it."""
    make_image(store, "lab/app", "v1")
    run_tinyreg("passwd", "alice", "--users", tmp_path / "users", "--stdin", input="secret")
    server = start_server(None, "--users", tmp_path / "users", "--anonymous", "pull")
    url = start_nginx(server, "location /v2/ {{ proxy_pass http://{upstream}; proxy_set_header Host $http_host; }}")
    challenge = ask(url, "GET", "/v2/").headers["WWW-Authenticate"]
    realm = re.match('Bearer realm="(.*?)"', challenge).group(1)
    assert realm.startswith(url)
    token = ask(url, "GET", realm[len(url):] + "?scope=repository:lab/app:pull").json["token"]
    assert ask(url, "GET", "/v2/lab/app/manifests/v1", authorization="Bearer " + token).status == 200
    wrong = "Basic " + base64.b64encode(b"alice:wrong").decode()
    answer = ask(url, "GET", realm[len(url):], authorization=wrong)
    assert answer.status == 401 and "Bearer" not in answer.headers["WWW-Authenticate"]


def test_behind_nginx_the_log_has_the_client_and_limits_are_the_client_s(start_server, start_nginx, store):
    """Asked twice, so that the second answer comes from memory, with another client in between."""
    address = own_address()
    make_image(store, "lab/app", "v1")
    server = start_server(None, "--anonymous", "push", "--workers", "1", MAX_UPLOADS=2)
    url = start_nginx(server, AS_IN_THE_README, address)
    for where in (url, server, url, server):
        assert ask(where, "GET", "/v2/lab/app/manifests/v1", x_forwarded_for="6.6.6.6").status == 200
    until(lambda: server.log().count("manifests/v1") == 4)
    clients = sorted(line.split()[1] for line in server.log().splitlines() if "manifests/v1" in line)
    assert clients == sorted([address, "6.6.6.6"] * 2)
    pushes = [ask(url, "POST", "/v2/lab/app/blobs/uploads/").status for _ in range(3)]
    assert pushes == [202, 202, 429]
    assert ask(server, "POST", "/v2/lab/app/blobs/uploads/").status == 202


def test_another_machine_s_proxy_is_believed_where_it_is_named(start_server, tmp_path):
    address = own_address()
    trusting = ["--trusted-proxy", "203.0.113.0/24", "--trusted-proxy", address]
    for options, client in (([], address), (trusting, "10.0.0.9")):
        server = start_server(tmp_path / client, "--anonymous", "push", *options, listen=":0")
        url = "http://%s:%d" % (address, server.port)
        assert ask(url, "GET", "/v2/", x_forwarded_for="6.6.6.6, 10.0.0.9").status == 200
        server.stop()
        assert server.log().split()[1] == client


def test_what_is_no_network_is_named():
    done = run_tinyreg("serve", "--trusted-proxy", "10.0.0.0/33")
    assert done.returncode == 2 and "10.0.0.0/24" in done.stderr


def test_the_page_works_below_a_path_and_names_the_outer_host(proxied):
    _, url = proxied
    where = url + "/registry/?repository=lab/app&reference=v1"
    answer = ask(url, "GET", where)
    text = answer.text
    assert answer.status == 200 and "docker pull %s/lab/app:v1" % url[7:] in text
    links = re.findall(r'href="([^"]+)"', text)
    assert len(links) > 6
    for link in links:
        target = urllib.parse.urljoin(where, link.replace("&amp;", "&"))
        assert target.startswith("data:") or ask(url, "GET", target)[0] == 200, target
    with open_url(url + "/registry/live/events") as stream:
        until(lambda: "watchers 1" in ask(url, "GET", "/registry/metrics").text)
        ask(url, "GET", "/v2/lab/app/tags/list")
        while b"which tags has lab/app?" not in stream.readline():
            pass


@pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")
@pytest.mark.parametrize("prefix", ["", "team/"])
def test_skopeo_copies_through_nginx(proxied, prefix):
    server, url = proxied
    where = "docker://%s/%s" % (url[7:], prefix)
    done = subprocess.run(["skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false",
                           where + "lab/app:v1", where + "lab/copy:v2"],
                          stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    assert server.ask("GET", "/v2/lab/copy/tags/list").json["tags"] == ["v2"]
