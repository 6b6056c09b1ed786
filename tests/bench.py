#!/usr/bin/env python3
"""tinyreg beside Debian's docker-registry, and pushes beside a bare loop, in one run on one machine.

    python3 tests/bench.py                          everything, five rounds
    python3 tests/bench.py push pull --quick        two benchmarks, smaller and shorter
    python3 tests/bench.py small --serve "--workers 1" --tinyreg /tmp/other/tinyreg.py --json figures.json
    python3 tests/bench.py --rollout                what a tree of caches saves, computed from this machine's rates

How it measures: in every round each server in turn is started on an empty directory of the same disk, does the same
work for the same clients, and is stopped; then its directory is deleted, so that the next one writes into the page
cache that it left. Clients are processes of their own. The figures are medians (least..most) of the rounds; a ratio
is the median of the rounds' own ratios, because what else the machine does changes from round to round. CPU seconds
are utime + stime of the server and all its children; memory is looked at every 20 ms, and what they share is counted
once.

Both servers log to a file, as they do by default. docker-registry does not fsync what it is sent; tinyreg does.
The bare loop is the least that Python can do for a push: receive into 1 MiB, sha256, write; at the end fsync.
"""

import argparse
import collections
import contextlib
import hashlib
import http.client
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time

TINYREG, PEER, FLOOR = "tinyreg", "docker-registry", "bare loop"
PACKAGES = {"wrk": "wrk", "ab": "apache2-utils", "docker-registry": "docker-registry", "openssl": "openssl"}
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
TREE = "docker/registry/v2"
MIB, GIB = 1 << 20, 1 << 30
ZEROS = "sha256:49bc20df15e412a64472421e13fe86ff1c5165e18b2afccf160d4dc19fe68a14"  # of 1 GiB of them
FORK = multiprocessing.get_context("fork")

# What is to be reached: benchmark, figure, compared with (server, or server and benchmark, or nothing), limit.
TARGETS = [
    ("push", "GiB/s", PEER, ">=", 2.0),
    ("push", "s/GiB", FLOOR, "<=", 1.15),
    ("push", "CPU s/GiB", FLOOR, "<=", 1.15),
    ("push, one PUT", "GiB/s", PEER, ">=", 2.0),
    ("push, one PUT", "s/GiB", FLOOR, "<=", 1.15),
    ("push, one PUT", "CPU s/GiB", FLOOR, "<=", 1.15),
    ("pull", "GiB/s", PEER, ">=", 1.0),
    ("pull", "CPU s/GiB", None, "<=", 0.6),
    ("GET manifest by tag", "requests/s", PEER, ">=", 20),
    ("HEAD manifest by tag", "requests/s", PEER, ">=", 20),
    ("GET small blob", "requests/s", PEER, ">=", 20),
    ("HEAD blob", "requests/s", PEER, ">=", 20),
    ("GET manifest, new connections", "requests/s", PEER, ">=", 1.5),
    ("small images, 8 clients", "images/s", PEER, ">=", 2.0),
    ("TLS push", "GiB/s", (PEER, "push"), ">=", 0.8),
    ("TLS pull", "GiB/s", (PEER, "pull"), ">=", 0.8),
    ("start", "idle MiB a worker", None, "<=", 25),
    ("30 transfers of 1 GiB", "peak MiB", None, "<=", 64),
    ("start", "first answer s", None, "<=", 0.25),
]


class Failed(Exception):
    """Why a benchmark has no figures of a server: it can't run there, or went wrong."""


# ---------------------------------------------------------------------------------------------------------
# Servers
# ---------------------------------------------------------------------------------------------------------

def bare_loop(root, port):
    """The floor: answers POST, PATCH and PUT as a registry does, and does nothing with a body but what it must."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    buffer = memoryview(bytearray(MIB))
    while True:
        sock, _ = listener.accept()
        with sock, open(os.path.join(root, "blob"), "wb", buffering=0) as file:
            hasher, head = hashlib.sha256(), True
            while head:
                head, _, body = sock.recv(65536).partition(b"\r\n\r\n")  # the client sends a head in one piece
                hasher.update(body)
                file.write(body)
                left = int((re.findall(rb"Content-Length: (\d+)", head) or [0])[0]) - len(body)
                while left:
                    count = sock.recv_into(buffer, min(left, MIB))
                    hasher.update(buffer[:count])
                    file.write(buffer[:count])
                    left = left - count if count else 0
                if head.startswith(b"PUT"):
                    os.fsync(file.fileno())
                status = b"201 Created" if head.startswith(b"PUT") else b"202 Accepted"
                sock.sendall(b"HTTP/1.1 " + status + b"\r\nLocation: /upload\r\nContent-Length: 0\r\n\r\n")


def tree(pid):
    """A process and all below it: {pid: (parent, CPU seconds)}; CPU includes that of ended children."""
    every = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open("/proc/%s/stat" % entry) as file:
            fields = file.read().rpartition(")")[2].split()
            every[int(entry)] = (int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK"))
    found, more = {}, [pid]
    while more:
        found.update((pid, every[pid]) for pid in more if pid in every)
        more = [pid for pid, (parent, _) in every.items() if parent in more]
    return found


def memory_of(pid):
    """MiB of the tree: what each process has alone, and once what they share (the most that one of them shares).
    The sum of Pss would be less whenever any other Python, or docker-registry, runs on the machine."""
    alone, shared = 0, [0]
    for entry in tree(pid):
        with contextlib.suppress(OSError), open("/proc/%d/smaps_rollup" % entry) as file:
            sizes = {key: int(size) for key, size in re.findall(r"^(\w+): +(\d+)", file.read(), re.M)}
            own = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
            alone += own
            shared.append(sizes.get("Rss", 0) - own)
    return (alone + max(shared)) / 1024.0


class Server:
    """One of the servers on `root`, as a process of its own; `with` starts it, waits for its first answer, ends it."""

    def __init__(self, run, who, root=None, tls=False, more=()):
        self.who, self.tls = who, tls
        self.own_root = root is None
        self.root = root or os.path.join(run.dir, "root")
        os.makedirs(self.root, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = os.path.join(run.dir, who.replace(" ", "-") + ".log")
        if who == TINYREG:
            self.command = run.tinyreg + ["serve", "--root", self.root, "--listen", "127.0.0.1:%d" % self.port]
            self.command += shlex.split(run.options.serve) + list(more)
            self.command += ["--tls-cert", run.certificate, "--tls-key", run.certificate] if tls else []
        elif who == PEER:
            self.command = ["docker-registry", "serve", write_config(run, self.root, self.port, tls)]
        else:
            self.command = [sys.executable, os.path.abspath(__file__), "--bare-loop", self.root, str(self.port)]

    def __enter__(self):
        began = time.monotonic()
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        while True:
            try:
                client = Client(self)
                if self.who != FLOOR:
                    client.ask("GET", "/v2/", 200)
                self.first_answer = time.monotonic() - began
                client.sock.close()  # the bare loop serves one connection after the other
                return self
            except ConnectionError:
                if self.process.poll() is not None or time.monotonic() > began + 60:
                    self.process.kill()
                    raise Failed("%s does not answer; its log is\n%s" % (self.who, open(self.log).read()[-2000:]))
                time.sleep(0.002)

    def __exit__(self, *exc_info):
        self.process.send_signal(signal.SIGKILL if self.who == FLOOR else signal.SIGTERM)
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Failed("it does not end after SIGTERM")
        finally:
            if self.own_root:
                shutil.rmtree(self.root, ignore_errors=True)

    def cpu(self):
        return sum(seconds for _, seconds in tree(self.process.pid).values())

    def memory(self):
        return memory_of(self.process.pid)

    def workers(self):
        """How many of its processes have no children: those that serve."""
        found = tree(self.process.pid)
        return len(set(found) - {parent for parent, _ in found.values()})


def write_config(run, root, port, tls=False):
    """Debian's own configuration, without its htpasswd; returns the path."""
    path = os.path.join(run.dir, "config.yml")
    lines = ["version: 0.1", "log: {fields: {service: registry}}", "storage:", "  cache: {blobdescriptor: inmemory}",
             "  filesystem: {rootdirectory: %s}" % root, "  delete: {enabled: true}", "http:",
             "  addr: 127.0.0.1:%d" % port, "  headers: {X-Content-Type-Options: [nosniff]}"]
    lines += ["  tls: {certificate: %s, key: %s}" % (run.certificate, run.certificate)] if tls else []
    lines += ["health: {storagedriver: {enabled: true, interval: 10s, threshold: 3}}"]
    with open(path, "w") as file:
        file.write("\n".join(lines) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------
# Clients
# ---------------------------------------------------------------------------------------------------------

def path_of(headers):
    """The path and query of a Location, which docker-registry sends with its host."""
    return re.sub("^https?://[^/]*", "", headers["location"])


class Client:
    """One kept connection, as thin as Python allows, so that the time measured is the server's."""

    def __init__(self, server):
        self.sock = socket.create_connection(("127.0.0.1", server.port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if server.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self.sock = context.wrap_socket(self.sock)
        self.head = "Host: 127.0.0.1:%d\r\nAccept: %s\r\n" % (server.port, OCI_MANIFEST)

    def send_head(self, method, target, length, media_type="application/octet-stream"):
        self.sock.sendall(("%s %s HTTP/1.1\r\n%sContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
                           % (method, target, self.head, media_type, length)).encode())

    def read_head(self, expected):
        """Returns the answer's headers, and what has come of its body."""
        received = b""
        while b"\r\n\r\n" not in received:
            block = self.sock.recv(65536)
            if not block:
                raise ConnectionResetError("the server closed the connection")
            received += block
        head, _, body = received.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        if int(lines[0].split()[1]) != expected:
            raise RuntimeError("%s, where %d was expected\n%s" % (lines[0], expected, body.decode(errors="replace")))
        return {key.lower(): value for key, _, value in (line.partition(": ") for line in lines[1:])}, body

    def ask(self, method, target, expected, content=b"", upto=GIB, **settings):
        """One exchange; a body that comes is read and dropped, at most `upto` bytes of it. Returns the headers."""
        self.send_head(method, target, len(content), **settings)
        if content:
            self.sock.sendall(content)
        headers, body = self.read_head(expected)
        left = 0 if method == "HEAD" else min(int(headers.get("content-length", 0)), upto) - len(body)
        buffer = bytearray(max(0, min(left, MIB)))
        while left > 0:
            count = self.sock.recv_into(buffer, min(left, MIB))
            if not count:
                raise ConnectionResetError("the server closed the connection in the middle of a body")
            left -= count
        return headers

    def start_upload(self, name):
        return path_of(self.ask("POST", "/v2/%s/blobs/uploads/" % name, 202))

    def push_blob(self, name, digest, content, patch=True):
        """As docker does it: POST, PATCH, PUT; or POST and one PUT."""
        target = self.start_upload(name)
        if patch:
            target = path_of(self.ask("PATCH", target, 202, content))
            content = b""
        self.ask("PUT", target + ("&" if "?" in target else "?") + "digest=" + digest, 201, content)

    def push_image(self, name, tag, image):
        """As docker does it: ask for every blob, push it, then the manifest. `image` is what make_image returned."""
        for digest, content in image.blobs:
            self.ask("HEAD", "/v2/%s/blobs/%s" % (name, digest), 404)
            self.push_blob(name, digest, content)
        self.ask("PUT", "/v2/%s/manifests/%s" % (name, tag), 201, image.manifest, media_type=OCI_MANIFEST)

    def pull_image(self, name, tag, image):
        self.ask("GET", "/v2/%s/manifests/%s" % (name, tag), 200)
        for digest, _ in image.blobs:
            self.ask("GET", "/v2/%s/blobs/%s" % (name, digest), 200)


Image = collections.namedtuple("Image", "manifest blobs")


def sha256(content):
    return "sha256:" + hashlib.sha256(content).hexdigest()


def make_image(*layers):
    """An image with a config of its own: Image(manifest, [(digest, content), ...])."""
    config = json.dumps({"os": "linux", "architecture": "amd64", "id": os.urandom(8).hex()}).encode()
    blobs = [(sha256(content), content) for content in (config,) + layers]
    entries = [{"mediaType": "application/vnd.oci.image.%s" % kind, "digest": digest, "size": len(content)}
               for kind, (digest, content) in zip(["config.v1+json"] + ["layer.v1.tar"] * len(layers), blobs)]
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": entries[0], "layers": entries[1:]}
    return Image(json.dumps(document).encode(), blobs)


Use = collections.namedtuple("Use", "seconds cpu peak")


def measure(server, count, task):
    """Run task(client, number) in `count` processes at once; returns the Use until the last has ended."""
    def run_client(number):
        start.wait(60)
        task(Client(server), number)
        ends.put(time.monotonic())

    start, ends = FORK.Barrier(count + 1), FORK.SimpleQueue()
    clients = [FORK.Process(target=run_client, args=(number,), daemon=True) for number in range(count)]
    for client in clients:
        client.start()
    cpu, peak = server.cpu(), 0
    start.wait(60)
    began = time.monotonic()
    running = clients
    while running:
        peak = max(peak, server.memory())
        multiprocessing.connection.wait([client.sentinel for client in running], 0.02)
        running = [client for client in running if client.exitcode is None]
    if any(client.exitcode for client in clients):
        raise Failed("a client of %s failed" % server.who)
    return Use(max(ends.get() for _ in clients) - began, server.cpu() - cpu, peak)


def measure_command(command, log_path):
    """The Use of a command that must end well."""
    with open(log_path, "w") as log:
        began, peak, pid = time.monotonic(), 0, 0
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while not pid:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.005)
            pid, process.returncode, used = os.wait4(process.pid, os.WNOHANG)
    if process.returncode:
        raise Failed("%s failed:\n%s" % (" ".join(command), open(log_path).read()[-2000:]))
    return Use(time.monotonic() - began, used.ru_utime + used.ru_stime, peak)


def measure_requests(server, tool, path):
    """Requests a second of wrk or ab, and the server's CPU microseconds for each."""
    url = "http://127.0.0.1:%d%s" % (server.port, path)
    cpu = server.cpu()
    shown = subprocess.run(tool + ["-H", "Accept: " + OCI_MANIFEST, url], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, universal_newlines=True).stdout
    cpu = server.cpu() - cpu
    done = re.search(r"(\d+) requests in|Complete requests: +(\d+)", shown)
    rate = re.search(r"Requests(?:/sec| per second): +([0-9.]+)", shown)
    if not rate or re.search(r"Non-2xx|Socket errors|Failed requests: +[1-9]", shown):
        raise Failed("%s of %s went wrong:\n%s" % (tool[0], server.who, shown))
    return {"requests/s": float(rate.group(1)), "CPU us/request": cpu * 1e6 / int(done.group(1) or done.group(2))}


def write(root, path, content):
    """A file of Distribution's tree; returns its path."""
    path = os.path.join(root, TREE, path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
    return path


def blob_path(digest):
    return "blobs/sha256/%s/%s/data" % (digest[7:9], digest[7:])


def link(root, folder, digest, entry=None):
    write(root, "repositories/%s/%s/link" % (folder, entry or digest[7:]), digest.encode())


def make_store(root, count):
    """Images of ten blobs (a config, eight layers, a manifest), a hundred in each repository; made on disk."""
    for number in range(count // 10):
        image, name = make_image(*(b"layer %d of %d" % (layer, number) for layer in range(8))), number // 100
        digest = sha256(image.manifest)
        for blob, content in image.blobs:
            write(root, blob_path(blob), content)
            link(root, "repository%d/_layers/sha256" % name, blob)
        write(root, blob_path(digest), image.manifest)
        link(root, "repository%d/_manifests/revisions/sha256" % name, digest)
        link(root, "repository%d/_manifests/tags/v%d" % (name, number % 100), digest, "current")
        link(root, "repository%d/_manifests/tags/v%d/index/sha256" % (name, number % 100), digest)


# ---------------------------------------------------------------------------------------------------------
# Benchmarks: each runs one round for one server, and notes figures with run.add
# ---------------------------------------------------------------------------------------------------------

def per_gib(use, size, count=1):
    gib = count * size / GIB
    return {"GiB/s": gib / use.seconds, "s/GiB": use.seconds / gib, "CPU s/GiB": use.cpu / gib, "peak MiB": use.peak}


def push(run, who, patch=True, bench="push"):
    """One large blob."""
    def task(client, number):
        client.push_blob("large", run.digest, run.content, patch)

    with Server(run, who) as server:
        run.add(bench, who, **per_gib(measure(server, 1, task), run.size))


def push_in_one(run, who):
    """The same by POST and one PUT."""
    push(run, who, False, "push, one PUT")


def pull(run, who, tls=False):
    """One large blob, four times on one connection."""
    def task(client, number):
        for _ in range(4):
            client.ask("GET", "/v2/large/blobs/" + run.digest, 200)

    with Server(run, who, tls=tls) as server:
        use = measure(server, 1, lambda client, number: client.push_blob("large", run.digest, run.content))
        if tls:
            run.add("TLS push", who, **per_gib(use, run.size))
        run.add("TLS pull" if tls else "pull", who, **per_gib(measure(server, 1, task), run.size, 4))


def tls(run, who):
    """The same with TLS. The client's share of the work is as large as the server's, and it has no core of its own."""
    if who == TINYREG and "--tls-cert" not in run.help("serve"):
        raise Failed("this tinyreg.py has no --tls-cert yet")
    pull(run, who, tls=True)


def small(run, who):
    """Small answers, from eight connections that are kept, and with a new connection for each."""
    image = make_image(os.urandom(4096))
    wrk = ["wrk", "-t2", "-c8", "-d%ds" % run.seconds]
    ab = ["ab", "-q", "-c8", "-t%d" % run.seconds, "-n1000000"]  # it does HEAD, for which wrk waits for a body
    manifest, blob = "/v2/small/manifests/latest", "/v2/small/blobs/" + image.blobs[1][0]
    with Server(run, who) as server:
        Client(server).push_image("small", "latest", image)
        for bench, tool, path in [("GET manifest by tag", wrk, manifest),
                                  ("HEAD manifest by tag", ab + ["-ik"], manifest),
                                  ("GET small blob", wrk, blob), ("HEAD blob", ab + ["-ik"], blob),
                                  ("GET manifest, new connections", ab, manifest)]:
            run.add(bench, who, **measure_requests(server, tool, path))
        run.add("after small answers", who, MiB=server.memory())


def images(run, who):
    """Small images, each of a config and two layers of 10 KiB, pushed by eight clients."""
    work = [[make_image(os.urandom(10240), os.urandom(10240)) for _ in range(run.images)] for _ in range(8)]

    def task(client, number):
        for tag, image in enumerate(work[number]):
            client.push_image("client%d" % number, "v%d" % tag, image)

    # Kept until the run ends: for a minute ext4 gives no deleted file's place to a new one, and searches the longer.
    with Server(run, who, tempfile.mkdtemp(dir=run.dir)) as server:
        use = measure(server, 8, task)
    count = 8 * run.images
    run.add("small images, 8 clients", who, **{"images/s": count / use.seconds, "CPU ms/image": use.cpu * 1e3 / count,
                                               "peak MiB": use.peak})


def classroom(run, who):
    """Thirty clients pull one image at once: three layers, a config, a manifest."""
    third = run.size // 24
    image = make_image(*(run.content[third * part:third * (part + 1)] for part in range(3)))
    with Server(run, who) as server:
        Client(server).push_image("class", "latest", image)
        use = measure(server, 30, lambda client, number: client.pull_image("class", "latest", image))
    run.add("classroom, 30 pulls at once", who, **per_gib(use, 3 * third, 30))


def memory(run, who):
    """Fifteen pushes and fifteen pulls of 1 GiB: each moves a part of it, then stands still with all others open."""
    def task(client, number):
        if number % 2:
            client.ask("GET", "/v2/large/blobs/" + ZEROS, 200, upto=part)
        else:
            target = client.start_upload("large")
            client.send_head("PATCH", target, GIB)
            client.sock.sendall(run.content[:part])
        time.sleep(1)

    part = run.size // 16
    with Server(run, who) as server:
        path = write(server.root, blob_path(ZEROS), b"")
        os.truncate(path, GIB)
        link(server.root, "large/_layers/sha256", ZEROS)
        run.add("30 transfers of 1 GiB", who, **{"peak MiB": measure(server, 30, task).peak})


def start(run, who):
    """An empty store: from the start of the process to the first answer, and what is then held in memory."""
    with Server(run, who) as server:
        time.sleep(0.5)
        held, workers = server.memory(), server.workers()
        run.add("start", who, **{"first answer s": server.first_answer, "idle MiB": held, "workers": workers,
                                 "idle MiB a worker": held / workers})


def list_pages(server, path, expected):
    """The seconds that each page took."""
    connection, times, entries = http.client.HTTPConnection("127.0.0.1", server.port), [], 0
    while path:
        began = time.monotonic()
        connection.request("GET", path)
        answer = connection.getresponse()
        document = json.loads(answer.read().decode())
        times.append(time.monotonic() - began)
        entries += len(document.get("tags") or document.get("repositories") or [])
        following = re.match("<([^>]*)>", answer.getheader("Link") or "")
        path = following and path_of({"location": following.group(1)})
    if not expected <= entries <= expected + 1:
        raise Failed("%s listed %d entries, not %d" % (server.who, entries, expected))
    return times


def listing(run, who):
    """10,000 tags of a repository, and 10,000 repositories, in pages of 1,000 (the store is made once)."""
    root = os.path.join(run.dir, "listing")
    if not os.path.isdir(root):
        digest = sha256(b"{}")
        for number in range(10000):
            link(root, "many/_manifests/tags/t%05d" % number, digest, "current")
            for folder in ("_layers", "_uploads", "_manifests/revisions"):
                os.makedirs(os.path.join(root, TREE, "repositories/r%05d" % number, folder))
        os.makedirs(os.path.join(root, TREE, "repositories/many/_layers"))
    with Server(run, who, root) as server:
        for bench, path in (("10,000 tags", "/v2/many/tags/list?n=1000"),
                            ("10,000 repositories", "/v2/_catalog?n=1000")):
            cpu, times = server.cpu(), list_pages(server, path, 10000)
            run.add(bench, who, **{"seconds": sum(times), "pages": len(times), "slowest page s": max(times),
                                   "CPU s": server.cpu() - cpu, "again s": sum(list_pages(server, path, 10000))})


def growth(run, who):
    """Start, answers, a pushed image, gc and verify, in stores of a hundred to a hundred thousand blobs."""
    for count in run.growth:
        root, bench = os.path.join(run.dir, "growth%d" % count), "store of {:,} blobs".format(count)
        if not os.path.isdir(root):
            make_store(root, count)
        with Server(run, who, root) as server:
            run.add(bench, who, **{"first answer s": server.first_answer})
            wrk = ["wrk", "-t2", "-c8", "-d1s"]
            run.add(bench, who, **measure_requests(server, wrk, "/v2/repository0/manifests/v0"))
            image = make_image(os.urandom(10240))
            use = measure(server, 1, lambda client, number, image=image: client.push_image("fresh", "latest", image))
            run.add(bench, who, **{"image pushed ms": use.seconds * 1e3, "idle MiB": server.memory()})
        commands = {"gc": ["docker-registry", "garbage-collect", write_config(run, root, 1)]}
        if who == TINYREG:
            commands = {name: run.tinyreg + [name, "--root", root, "--quiet"] for name in ("verify", "gc")}
            commands["gc"] += ["--grace", "0"] if "--grace" in run.help("gc") else []
        garbage = [write(root, blob_path(sha256(b"garbage %d" % number)), b"garbage %d" % number)
                   for number in range(count // 10)]
        for name, command in commands.items():
            if who == TINYREG and not run.help(name):
                run.failed[name] = "this tinyreg.py has no such command yet"
                continue
            use = measure_command(command, os.path.join(run.dir, name + ".log"))
            if name == "gc" and any(map(os.path.exists, garbage)):
                raise Failed("gc of %s left garbage" % who)
            run.add(bench, who, **{name + " s": use.seconds, name + " CPU s": use.cpu, name + " peak MiB": use.peak})


BENCHES = collections.OrderedDict([
    ("push", push), ("push-in-one", push_in_one), ("pull", pull), ("small", small), ("images", images), ("tls", tls),
    ("classroom", classroom), ("memory", memory), ("start", start), ("listing", listing), ("growth", growth),
])


# ---------------------------------------------------------------------------------------------------------
# A rollout to a cluster, computed
# ---------------------------------------------------------------------------------------------------------

NAME = "quay.io/lab/image"
RACKS, NODES, SIZE = 20, 1000, 500e6


def sent_by(server):
    """How many bytes of bodies a tinyreg has sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/metrics")
    return int(re.search(rb"^tinyreg_sent_bytes_total (\d+)", connection.getresponse().read(), re.M).group(1))


def measure_rates(run):
    """Rates of a centre and a cache behind it on this machine: (bytes/s that the cache gives to eight clients; bytes/s
    that it fetches while it gives them what has come; bytes that all of them got; bytes that left the centre)."""
    third = run.size // 3
    image = make_image(*(run.content[third * part:third * (part + 1)] for part in range(3)))
    size = sum(len(content) for _, content in image.blobs)
    roots = [os.path.join(run.dir, name) for name in ("centre", "rack")]
    with Server(run, TINYREG, roots[0]) as centre:
        Client(centre).push_image(NAME, "latest", image)
        before = sent_by(centre)
        with Server(run, TINYREG, roots[1], more=["--upstream", "*=http://127.0.0.1:%d" % centre.port]) as rack:
            cold = measure(rack, 8, lambda client, number: client.pull_image(NAME, "latest", image))
            warm = measure(rack, 8, lambda client, number: client.pull_image(NAME, "latest", image))
        left = sent_by(centre) - before
    return 8 * size / warm.seconds, size / cold.seconds, 16 * size, left


def simulate(racks, gives, takes, link):
    """(bytes that leave the centre, seconds) until all nodes have the image, which all begin to pull at once. A server
    gives at most `gives` bytes/s to all, a cache takes at most `takes`, a server's link carries `link`; a cache passes
    on what has come. Without racks all pull from the centre."""
    out, step, seconds, came, got = min(gives, link), 0.01, 0.0, 0.0, 0.0  # all racks, and all nodes, are alike
    while got < SIZE:
        seconds += step
        came = min(SIZE, came + step * min(takes, out / racks)) if racks else SIZE
        got = min(came, got + step * out / (NODES / (racks or 1)))
    return SIZE * (racks or NODES), seconds


def rollout(run):
    gives, takes, got, left = measure_rates(run)
    print("measured here, with %d cores for a centre, a cache and 8 clients: the cache gives %.2f GB/s of what it has, "
          "and fetches %.2f GB/s while they wait for that; for %.1f GB that clients got, %.2f GB left the centre\n"
          % (os.cpu_count(), gives / 1e9, takes / 1e9, got / 1e9, left / 1e9))
    print("%.0f MB to %d nodes at once      from the centre    time on 10 Gbit/s   on 1 Gbit/s" % (SIZE / 1e6, NODES))
    for racks in (0, RACKS):
        (sent, fast), (_, slow) = (simulate(racks, gives, takes, link) for link in (1.25e9, 1.25e8))
        who = "%d racks with a cache each" % racks if racks else "all from the centre"
        print("  %-28s %13.0f GB %16.0f s %13.0f s" % (who, sent / 1e9, fast, slow))


# ---------------------------------------------------------------------------------------------------------
# The run, and what it prints
# ---------------------------------------------------------------------------------------------------------

class Run:
    """Options, shared material and the figures: {benchmark: {figure: {server: [one value a round]}}}."""

    def __init__(self, options, directory):
        self.options, self.dir = options, directory
        self.tinyreg = [options.python, shutil.copy(options.tinyreg, directory)]  # somebody may be editing it
        self.size = (64 if options.quick else 512) * MIB
        self.seconds = 2 if options.quick else 5
        self.images = 10 if options.quick else 50
        self.growth = (100, 2000) if options.quick else (100, 10000, 100000)
        self.content = memoryview(os.urandom(self.size))
        self.digest = sha256(self.content)
        self.certificate = os.path.join(directory, "certificate.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=bench",
                        "-keyout", self.certificate, "-out", self.certificate + ".part"],
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        with open(self.certificate, "a") as both, open(self.certificate + ".part") as part:
            both.write(part.read())
        self.figures = collections.OrderedDict()
        self.failed = collections.OrderedDict()

    def help(self, command):
        """What `tinyreg.py COMMAND --help` says; empty if there is no such command."""
        return subprocess.run(self.tinyreg + [command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              universal_newlines=True).stdout

    def add(self, bench, who, **figures):
        for figure, value in figures.items():
            values = self.figures.setdefault(bench, collections.OrderedDict()).setdefault(figure, {})
            values.setdefault(who, []).append(value)

    def warm(self):
        """Let the kernel touch the memory that the page cache will use: the first touch is slow on virtual ones."""
        path = os.path.join(self.dir, "warm")
        with open(path, "wb", buffering=0) as file:
            for _ in range(3):
                file.write(self.content)
        os.unlink(path)

    def play(self, name):
        """All rounds of one benchmark, the servers in turn; who begins changes."""
        servers = [PEER, TINYREG] + ([FLOOR] if name.startswith("push") else [])
        for number in range(self.options.rounds):
            for who in servers[number % len(servers):] + servers[:number % len(servers)]:
                print("%s, round %d, %s" % (name, number + 1, who), file=sys.stderr, flush=True)
                try:
                    BENCHES[name](self, who)
                except Failed as reason:
                    self.failed[name + ", " + who] = str(reason)
                    servers = [other for other in servers if other != who]  # so that the others' rounds stay in step

    def ratios(self, bench, figure, against):
        """tinyreg's value over the other's, round by round; tinyreg's own values where there is no other."""
        own = self.figures.get(bench, {}).get(figure, {}).get(TINYREG, [])
        if against is None:
            return own
        who, other = against if isinstance(against, tuple) else (against, bench)
        return [mine / theirs for mine, theirs in zip(own, self.figures.get(other, {}).get(figure, {}).get(who, []))
                if theirs]

    def judge(self):
        """The targets: [(what, wanted, [values], met or not)]; no values if it was not measured."""
        rows = []
        for bench, figure, against, sense, limit in TARGETS:
            values = self.ratios(bench, figure, against)
            what = "%s, %s" % (bench, figure)
            if against:
                what += " / %s" % (against if isinstance(against, str) else "%s's plain %s" % against)
            middle = statistics.median(values) if values else 0
            met = middle >= limit if sense == ">=" else middle <= limit
            rows.append((what, "%s %g" % (sense, limit), values, met))
        return rows


def shown(number):
    return "{:,.0f}".format(number) if number >= 100 else "%.3g" % number


def spread(values):
    """Median and range: 0.52 (0.48..0.6)"""
    if not values:
        return "-"
    middle = shown(statistics.median(values))
    return middle if len(values) == 1 else "%s (%s..%s)" % (middle, shown(min(values)), shown(max(values)))


def report(run):
    """Print all figures, then the targets; write the JSON that was asked for."""
    version = subprocess.run(["docker-registry", "--version"], stdout=subprocess.PIPE, universal_newlines=True).stdout
    print("%d cores, load %.1f, Python %s, %s; %d rounds%s\n"
          % (os.cpu_count(), os.getloadavg()[1], sys.version.split()[0], version.strip(), run.options.rounds,
             " (--quick)" if run.options.quick else ""))
    row = "%-20s %-26s %-26s %-26s %s"
    print(row % ("", TINYREG, PEER, FLOOR, TINYREG + " / " + PEER))
    for bench, figures in run.figures.items():
        print("\n" + bench)
        for figure, values in figures.items():
            print((row % ("  " + figure, *(spread(values.get(who)) for who in (TINYREG, PEER, FLOOR)),
                          spread(run.ratios(bench, figure, PEER)))).rstrip())
    for what, reason in run.failed.items():
        print("\nleft out: %s: %s" % (what, reason))
    if run.options.json:
        with open(run.options.json, "w") as file:
            json.dump({"figures": run.figures, "left out": run.failed, "targets": run.judge()}, file, indent=1)
    print("\nreach")
    for what, wanted, values, met in run.judge():
        verdict = ("met" if met else "NOT MET") if values else "not measured"
        print("  %-64s %-8s %-26s %s" % (what, wanted, spread(values), verdict))


def check_programs():
    missing = [program for program in PACKAGES if not shutil.which(program)]
    if missing:
        sys.exit("bench: %s not found; on Debian and Ubuntu: apt install %s"
                 % (", ".join(missing), " ".join(PACKAGES[program] for program in missing)))


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description="tinyreg beside Debian's docker-registry: figures, ratios, targets.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, epilog="\n".join(
                                         "%-12s %s" % (name, bench.__doc__) for name, bench in BENCHES.items()))
    parser.add_argument("names", metavar="NAME", nargs="*", help="benchmarks to run (default: all)")
    parser.add_argument("--rollout", action="store_true", help="compute a rollout to 1,000 nodes, and nothing else")
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="how often (default: 5)")
    parser.add_argument("--quick", action="store_true", help="smaller and shorter; the figures are rougher")
    parser.add_argument("--json", metavar="FILE", help="write all values there")
    parser.add_argument("--tinyreg", metavar="FILE", default=os.path.join(os.path.dirname(here), "tinyreg.py"))
    parser.add_argument("--python", metavar="FILE", default=sys.executable, help="what runs it (default: this Python)")
    parser.add_argument("--serve", metavar="OPTIONS", default="", help='more options for it, as in "--workers 1"')
    parser.add_argument("--dir", metavar="DIR", help="where to store and delete (default: the temporary directory)")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHES)
    if unknown:
        parser.error("no benchmark %s; there are %s" % (", ".join(sorted(unknown)), ", ".join(BENCHES)))
    check_programs()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    directory = tempfile.mkdtemp(prefix="tinyreg-bench-", dir=options.dir)
    try:
        run = Run(options, directory)
        try:
            run.warm()
            if options.rollout:
                return rollout(run)
            for name in options.names or BENCHES:
                run.play(name)
        except KeyboardInterrupt:
            print("interrupted; this is what there is until here\n", file=sys.stderr)
        report(run)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bare-loop"]:
        bare_loop(sys.argv[2], int(sys.argv[3]))
    main()
