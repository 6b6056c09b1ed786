"""Several hosts on one directory: three servers in network namespaces of their own, behind nginx.

Each also has a private lock.changes, as the mapped memory of several hosts is not one, so whatever goes by it shows.
What NFS and CephFS do beyond that is not here: no such file system is to be had in a test."""

import contextlib
import ctypes
import fcntl
import gzip
import http.server
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import uuid

import pytest
from conftest import TINYREG, Answer, Client, by_digest, run_tinyreg, until
from engines import NGINX_BEGIN, private_folder, require, require_root, run, unavailable
from samples import CONFIG, image, make_image, to_manifest
from tinyreg import (MANIFEST_TYPES, OCI_INDEX, CommandError, Digest, Directory, Endpoint, EventQueue, Layout, Metrics,
                     check_mount, collect_garbage, token_key)

FRONT = "10.77.0.1"  # where the load balancer is
HOSTS = (1, 2, 3)

# As the README has it; there with `hash`, so that a client stays with a host. Here each request goes to the next one.
NGINX_CONF = NGINX_BEGIN + """
    upstream registry {{
        server 10.77.1.2:5000;
        server 10.77.2.2:5000;
        server 10.77.3.2:5000;
        keepalive 32;
    }}
    server {{
        listen {front}:80;
        client_max_body_size 0;
        proxy_http_version 1.1;
        proxy_request_buffering off;
        proxy_buffering off;
        proxy_set_header Connection "";
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-Host $http_host;
        proxy_set_header X-Forwarded-Proto $scheme;
        location / {{ proxy_pass http://registry; }}
    }}
}}
"""


@contextlib.contextmanager
def inside(namespace):
    """This thread, and the programs that it starts, on another network."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    with open("/proc/thread-self/ns/net") as before, open(os.path.join("/run/netns", namespace)) as there:
        assert setns(there.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert setns(before.fileno(), 0) == 0


class Network:
    """A front and three hosts, each linked with it and not with each other."""

    def __init__(self):
        self.prefix = "tinyreg-" + uuid.uuid4().hex[:6]
        self.made = []

    def name(self, host=0):
        return "%s-%d" % (self.prefix, host)

    def make(self):
        for host in (0,) + HOSTS:
            if run("ip", "netns", "add", self.name(host), ok=False).returncode:
                unavailable("no network namespace can be made here")
            self.made.append(self.name(host))
            run("ip", "-n", self.name(host), "link", "set", "lo", "up")
        run("ip", "-n", self.name(), "address", "add", FRONT + "/32", "dev", "lo")
        for host in HOSTS:
            if run("ip", "-n", self.name(host), "link", "add", "eth0", "type", "veth", "peer", "name", "host%d" % host,
                   "netns", self.name(), ok=False).returncode:
                unavailable("no pair of veth devices can be made here")
            for end, device, last in ((host, "eth0", 2), (0, "host%d" % host, 1)):
                address = "10.77.%d.%d/24" % (host, last)
                run("ip", "-n", self.name(end), "address", "add", address, "dev", device)
                run("ip", "-n", self.name(end), "link", "set", device, "up")
            run("ip", "-n", self.name(host), "route", "add", "default", "via", "10.77.%d.1" % host)

    def kill(self, host):
        """kill -9 to all that runs there."""
        for pid in run("ip", "netns", "pids", self.name(host), ok=False).stdout.split():
            with contextlib.suppress(ProcessLookupError):
                if int(pid) != os.getpid():  # whose threads may be inside
                    os.kill(int(pid), signal.SIGKILL)

    def remove(self):
        for host in (0,) + HOSTS:
            if self.name(host) in self.made:
                self.kill(host)
                run("ip", "netns", "delete", self.name(host), ok=False)


class Site:
    """Three servers on a root, and what asks them."""

    def __init__(self, folder, network, options):
        self.folder, self.network, self.options = folder, network, options
        self.root = os.path.join(folder, "registry")
        self.processes = {}

    def command(self, host, *arguments):
        """A command of tinyreg.py, as it is run on a host: with a private lock.changes."""
        private = os.path.join(self.folder, "changes%d" % host)
        if not os.path.exists(private):
            with open(private, "wb") as file:
                file.write(os.urandom(8))
        script = 'mount --bind "$0" "$1" && shift && exec "$@"'
        return ["ip", "netns", "exec", self.network.name(host), "sh", "-c", script, private,
                os.path.join(self.root, "tinyreg", "lock.changes"), sys.executable, TINYREG] + list(arguments)

    def start(self, host):
        with open(os.path.join(self.folder, "log%d" % host), "a") as log:
            self.processes[host] = subprocess.Popen(
                self.command(host, "serve", "--root", self.root, "--listen", ":5000", "--workers", "2", *self.options),
                stdout=subprocess.PIPE, stderr=log, universal_newlines=True)
        for line in self.processes[host].stdout:
            if "Ctrl-C" in line:
                return
        raise RuntimeError("host %d did not start:\n%s" % (host, self.log(host)))

    def log(self, host):
        with open(os.path.join(self.folder, "log%d" % host)) as log:
            return log.read()

    def end(self):
        for host, process in self.processes.items():
            self.network.kill(host)
            process.wait()
            process.stdout.close()


@contextlib.contextmanager
def site(*options):
    """A Site whose servers have these options."""
    require("ip", "nginx")
    require_root()
    network = Network()
    with private_folder("hosts") as folder:
        hosts = Site(folder, network, options)
        try:
            network.make()
            make_image(Directory(hosts.root), "there", "1")  # and so lock.changes is there
            for host in HOSTS:
                hosts.start(host)
            yield hosts
        finally:
            try:
                hosts.end()
            finally:
                network.remove()


@contextlib.contextmanager
def nginx(hosts):
    """The load balancer, in the front namespace."""
    path = os.path.join(hosts.folder, "nginx.conf")
    with open(path, "w") as file:
        file.write(NGINX_CONF.format(folder=hosts.folder, front=FRONT))
    process = subprocess.Popen(["nginx", "-p", hosts.folder, "-c", path], stderr=subprocess.DEVNULL)
    try:
        until(lambda: ask(FRONT, "GET", "/v2/")[0] in (200, 401), what="nginx", process=process,
              log=hosts.folder + "/error.log")
        yield
    finally:
        process.terminate()
        process.wait()


def client_of(host):
    """A client of a host's number, or of an address."""
    return Client("http://%s:80" % host if isinstance(host, str) else "http://10.77.%d.2:5000" % host)


def ask(host, method, path, body=None, client=None, **headers):
    """The Answer of a host's number, or of an address; its status is 0 where there is none."""
    with contextlib.ExitStack() as stack:
        client = client or stack.enter_context(client_of(host))
        try:
            return client.ask(method, path, body, **headers)
        except OSError:
            return Answer(0, {}, b"")


def put_image(ask, name, tag, layers):
    """Push an image in the API's steps; `ask` gets each. Returns its digest, or None if it was not acknowledged."""
    content = json.dumps(image(layers)).encode()
    for part in layers + (CONFIG,):
        status, headers, _ = ask("POST", "/v2/%s/blobs/uploads/" % name)
        half = len(part) // 2
        if status == 202:
            status, headers, _ = ask("PATCH", headers["Location"], part[:half])
        if status == 202:
            status, headers, _ = ask("PATCH", headers["Location"], part[half:])
        if status == 202:
            status, _, _ = ask("PUT", by_digest(headers["Location"], Digest.of(part)))
        if status != 201:
            return None
    status, _, _ = ask("PUT", "/v2/%s/manifests/%s" % (name, tag), content,
                       **{"Content-Type": to_manifest(json.loads(content.decode())).media_type})
    return Digest.of(content) if status == 201 else None


# One thing at a time

def test_hosts_see_each_others_uploads_and_changes_at_once():
    with site("--shared", "--anonymous", "admin") as hosts, inside(hosts.network.name()):
        clients = {host: client_of(host) for host in HOSTS}
        turn = itertools.cycle(HOSTS)

        def at(host, *arguments, **headers):
            return ask(host, *arguments, client=clients[host], **headers)

        def at_the_next(*arguments, **headers):
            return at(next(turn), *arguments, **headers)

        # An upload, each of whose requests is at another host.
        digests = [put_image(at_the_next, "app", "latest", (b"layer %d" % serial,)) for serial in range(4)]
        contents = {digest: at(1, "GET", "/v2/app/manifests/" + digest)[2] for digest in digests}
        assert [Digest.of(content) for content in contents.values()] == digests
        # A change on one, seen on the others, which are asked the same again and again.
        for digest in digests * 8:
            assert at(1, "PUT", "/v2/app/manifests/latest", contents[digest])[0] == 201
            for host in HOSTS * 2:
                assert at(host, "GET", "/v2/app/manifests/latest")[2] == contents[digest], host
            assert at(1, "PUT", "/v2/app/manifests/new", contents[digest])[0] == 201
            assert {at(host, "HEAD", "/v2/app/manifests/new")[0] for host in HOSTS * 2} == {200}
            assert at(1, "DELETE", "/v2/app/manifests/new")[0] == 202
            assert {at(host, "HEAD", "/v2/app/manifests/new")[0] for host in HOSTS * 2} == {404}
        for client in clients.values():
            client.close()
        assert not [host for host in HOSTS if "Traceback" in hosts.log(host)]


def test_a_certificate_of_one_host_is_not_for_several(tmp_path):
    done = run_tinyreg("serve", "--root", tmp_path / "registry", "--listen", "127.0.0.1:0", "--shared", "--tls")
    assert done.returncode == 1 and "--tls-cert" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_shared_store_says_so_on_its_disk(start_server, tmp_path):
    """So what is run beside the servers, without --shared, does as they do, until the note is deleted."""
    root = tmp_path / "registry"
    make_image(Directory(str(root), shared=True), "app", "1")
    start_server(root, "--shared").stop()
    store = Directory(str(root))
    start_server(root).stop()
    for command in (["ls"], ["tag", "app:1", "app:2"], ["rm", "app:1"], ["gc"], ["verify"]):
        assert run_tinyreg(*command, "--root", root).returncode == 0
    assert store.shared and not os.path.exists(store.lock.path + ".changes")
    done = run_tinyreg("serve", "--root", root, "--listen", "127.0.0.1:0", "--tls")
    assert done.returncode == 1 and "--shared has several" in done.stderr
    with open(store.layout.shared) as note:
        assert "delete this file" in note.read()
    os.unlink(store.layout.shared)
    assert run_tinyreg("rm", "app:2", "--root", root).returncode == 0
    assert os.path.exists(store.lock.path + ".changes")


def test_a_session_that_is_not_seen_whole_yet_blames_nobody_and_stays(server):
    """Another host's file system may show the file as it was a second ago."""
    location = server.ask("POST", "/v2/app/blobs/uploads/").headers["Location"]
    location = server.ask("PATCH", location, b"hello").headers["Location"]
    path, _, _ = location.partition("?")
    data = Layout(server.root).upload_path("app", path.rpartition("/")[2])
    os.truncate(data, 2)
    end = "&digest=" + Digest.of(b"hello!")
    for method, query, headers in (("PATCH", "", {"content_range": "5-5"}), ("PUT", end, {}),
                                   ("PUT", end, {"content_range": "5-5"}), ("PATCH", "", {"content_length": "0"})):
        answer = server.ask(method, location + query, b"" if "content_length" in headers else b"!", **headers)
        assert (answer.status, answer.code, answer.headers["Retry-After"]) == (503, "UNAVAILABLE", "1")
    assert server.ask("GET", path).status == 204
    with open(data, "ab") as file:
        file.write(b"llo")
    assert server.ask("PUT", location + "&digest=" + Digest.of(b"hello!"), b"!").status == 201
    assert server.ask("GET", "/v2/app/blobs/" + Digest.of(b"hello!")).body == b"hello!"


MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
40 21 0:50 / /mnt/my\\040registry rw - fuse.rclone remote: rw,user_id=0
41 21 0:51 / /mnt/s3 rw - fuse.s3fs s3fs rw
42 21 0:52 / /mnt/ssh rw - fuse.sshfs host:/x rw
43 21 0:53 / /mnt/nfs rw - nfs4 server:/x rw,vers=4.2,hard,proto=tcp,local_lock=none,addr=10.0.0.1
44 21 0:54 / /mnt/nolock rw - nfs server:/x rw,vers=3,nolock,noac,local_lock=all,addr=10.0.0.1
45 21 0:55 / /mnt/right rw - nfs4 server:/x rw,vers=4.2,acregmin=0,acregmax=0,acdirmin=0,acdirmax=0,hard,local_lock=none
46 21 0:56 / /mnt/ceph rw - fuse.ceph-fuse ceph-fuse rw
47 21 0:57 / /mnt/s3/over rw - xfs /dev/sdb rw
"""


@pytest.mark.parametrize("root,kind,word", [
    ("/mnt/my registry/a", "refused", "fuse.rclone"), ("/mnt/s3", "refused", "fuse.s3fs"),
    ("/mnt/ssh/registry", "refused", "fuse.sshfs"), ("/mnt/nfs/registry", "warned", "actimeo=0"),
    ("/mnt/nolock", "warned", "without locks"), ("/mnt/right", "taken", ""), ("/mnt/ceph/x", "taken", ""),
    ("/mnt/s3/over/x", "taken", ""), ("/mnt/nfsother", "taken", ""), ("/", "taken", "")])
def test_a_file_system_that_can_t_be_shared_is_refused_or_named(root, kind, word, tmp_path, caplog):
    table = tmp_path / "mountinfo"
    table.write_text(MOUNTS)
    if kind == "refused":
        with pytest.raises(CommandError, match="lost") as error:
            check_mount(root, str(table))
        assert word in str(error.value)
    else:
        check_mount(root, str(table))
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (kind == "warned") and all(word in line for line in warned)


def test_locks_are_of_files_that_are_opened_as_nfs_wants(tmp_path, monkeypatch):
    """NFS makes flock a lock on bytes: to share it takes a file open for reading, to have it alone one for writing."""
    taken = set()
    real = fcntl.flock

    def flock(file, how):
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        path = os.readlink("/proc/self/fd/%d" % (file if isinstance(file, int) else file.fileno()))
        kind = how & ~fcntl.LOCK_NB
        if kind != fcntl.LOCK_UN:
            assert mode in (os.O_RDWR, os.O_RDONLY if kind == fcntl.LOCK_SH else os.O_WRONLY), path
            taken.add((os.path.basename(path), kind))
        return real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    store = Directory(str(tmp_path / "registry"), shared=True)
    manifest = make_image(store, "app", "1")
    digest = Digest.of(b"put")
    session = store.start_upload("app")
    session.append(io.BytesIO(b"put"))
    session.commit(digest)
    with store.open_blob("app", digest) as blob:
        Directory(str(tmp_path / "other")).put_blob("app", digest, lambda offset: blob)
    store.usage()
    token_key(store)
    endpoint = Endpoint("http://127.0.0.1:9/")
    queue = EventQueue(store.layout.own, endpoint, Metrics([]))
    queue.put({"action": "push"})
    monkeypatch.setattr(Endpoint, "deliver", lambda self, body: sys.exit())
    with pytest.raises(SystemExit):
        queue.deliver()
    store.delete_manifest("app", manifest.digest)
    collect_garbage(store)
    alone = {"lock", "gc", os.path.basename(session.path), store.session_of_blob("app", digest).id, "token.key.lock",
             endpoint.key + ".sender", endpoint.key + ".lock"}
    assert {(name, fcntl.LOCK_EX) for name in alone} | {("lock", fcntl.LOCK_SH)} <= taken
    assert not os.path.exists(os.path.join(store.layout.own, "lock.changes"))


# All at once

class Endless(http.server.BaseHTTPRequestHandler):
    """An endpoint of notifications."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.server.events += body["events"]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def endpoint():
    """An HTTP server in this thread's network that collects `events`."""
    server = http.server.HTTPServer((FRONT, 8000), Endless)
    server.events = []
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Storm:
    """Clients that push and delete at random through the front, and remember what was acknowledged. Each has tags of
    its own: `known` is {(name, tag): the digests that it may have now, None for no such tag}."""

    def __init__(self, hosts, folder):
        self.hosts, self.folder = hosts, folder
        self.known, self.acknowledged, self.failures = {}, [], []
        self.stop = threading.Event()

    def begin(self, *clients):
        self.threads = [threading.Thread(target=self._run, args=(client, number))
                        for number, client in enumerate(clients)]
        for thread in self.threads:
            thread.start()

    def reach(self, goal):
        """Wait until so many pushes have been acknowledged."""
        until(lambda: len(self.acknowledged) >= goal or self.failures, 300)

    def end(self):
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def _run(self, client, number):
        dice = random.Random(number)
        try:
            with inside(self.hosts.network.name()):
                for serial in itertools.count():
                    if self.stop.is_set():
                        break
                    name, tag = "app%d" % dice.randrange(2), "%d-%d" % (number, dice.randrange(6))
                    self._change(client, name, tag, dice, "%d %d" % (number, serial))
        except Exception as error:  # a thread's would be lost
            self.failures.append(error)

    def _change(self, client, name, tag, dice, serial):
        before = self.known.get((name, tag), {None})
        if None not in before and dice.random() < 0.2:
            self.known[name, tag] = before | {None}
            status = ask(FRONT, "DELETE", "/v2/%s/manifests/%s" % (name, tag), Authorization=BASIC)[0]
            if status == 202:
                self.known[name, tag] = {None}
            return
        base = random.Random(dice.randrange(8)).getrandbits(8 * 300000).to_bytes(300000, "big")
        layers = tuple(gzip.compress(part, 1, mtime=0) for part in (base, serial.encode()))  # else skopeo compresses
        digest = Digest.of(json.dumps(image(layers)).encode())
        self.known[name, tag] = before | {digest}
        if client(name, tag, layers):
            self.known[name, tag] = {digest}
            self.acknowledged.append((name, tag, digest))


BASIC = "Basic YWxpY2U6cHctYWxpY2U="  # alice:pw-alice


def by_api(name, tag, layers):
    def ask_as_alice(*arguments, **headers):
        return ask(FRONT, *arguments, Authorization=BASIC, **headers)
    return put_image(ask_as_alice, name, tag, layers)


def layout(folder, layers):
    """An OCI image layout with one image."""
    content = json.dumps(image(layers)).encode()
    os.makedirs(folder + "/blobs/sha256", exist_ok=True)
    for part in layers + (CONFIG, content):
        with open(folder + "/blobs/sha256/" + Digest.of(part).encoded, "wb") as file:
            file.write(part)
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        {"mediaType": json.loads(content.decode())["mediaType"], "digest": Digest.of(content), "size": len(content)}]}
    for name, value in (("index.json", index), ("oci-layout", {"imageLayoutVersion": "1.0.0"})):
        with open(os.path.join(folder, name), "w") as file:
            json.dump(value, file)
    return "oci:" + folder


def test_a_storm_on_three_hosts_of_which_one_dies(skopeo, tmp_path):
    """Clients push and delete at random through nginx, each request at another host; one host is killed, gc runs on
    another; then all that was acknowledged is there, on each host."""
    (tmp_path / "users").touch()
    run_tinyreg("passwd", "alice", "--users", tmp_path / "users", "--stdin", input="pw-alice\n")
    options = ["--shared", "--users", str(tmp_path / "users"), "--anonymous", "pull",
               "--notify", "http://%s:8000/#actions=push" % FRONT]

    def by_skopeo(name, tag, layers):
        folder = str(tmp_path / uuid.uuid4().hex)
        return skopeo.run("copy", "--dest-creds", "alice:pw-alice", "--dest-tls-verify=false", layout(folder, layers),
                          "docker://%s:80/%s:%s" % (FRONT, name, tag), ok=False).returncode == 0

    with site(*options) as hosts, inside(hosts.network.name()), endpoint() as heard, nginx(hosts):
        storm = Storm(hosts, tmp_path)
        storm.begin(by_api, by_api, by_skopeo, by_skopeo)
        try:
            collected = set()
            for goal in (20, 40, 60, 80):
                storm.reach(goal)
                if goal == 40:
                    hosts.network.kill(1)  # which came first, and so delivers the notifications
                done = run(*hosts.command(3, "gc", "--root", hosts.root, "--untagged", "--grace", "0", "--json"))
                collected |= {entry["kind"] for entry in json.loads(done.stdout)["removed"]}
        finally:
            storm.end()
        assert not storm.failures and {"manifest", "blob"} <= collected
        assert {tag[0] for _, tag, _ in storm.acknowledged} == set("0123")  # each client has got through
        hosts.processes.pop(1).communicate()
        hosts.start(1)
        check_all(hosts, storm.known)
        some = random.Random(1).sample(sorted(key for key, found in storm.known.items() if None not in found), 3)
        for name, tag in some:
            copied = str(tmp_path / ("%s-%s" % (name, tag)))
            skopeo("copy", "--src-tls-verify=false", "docker://%s:80/%s:%s" % (FRONT, name, tag), "dir:" + copied)
        verified = run(*hosts.command(1, "verify", "--root", hosts.root))
        assert "all is well" in verified.stdout
        told = {(name, tag, digest) for name, tag, digest in storm.acknowledged}
        until(lambda: told <= {(event["target"]["repository"], event["target"].get("tag"), event["target"]["digest"])
                               for event in heard.events})
        assert not [host for host in HOSTS if "Traceback" in hosts.log(host)]


def check_all(hosts, known):
    """On each host each tag has what it may have, and that is whole."""
    checked = set()
    for host in HOSTS:
        for (name, tag), may in known.items():
            status, _, content = ask(host, "GET", "/v2/%s/manifests/%s" % (name, tag), Accept=", ".join(MANIFEST_TYPES))
            assert (Digest.of(content) if status == 200 else None) in may, (host, name, tag, status)
            for blob in to_manifest(json.loads(content.decode())).blobs if status == 200 else ():
                if (host, name, blob.digest) not in checked:
                    found = ask(host, "GET", "/v2/%s/blobs/%s" % (name, blob.digest))
                    assert found[0] == 200 and Digest.of(found[2]) == blob.digest
                    checked.add((host, name, blob.digest))
