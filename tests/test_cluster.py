"""Cluster file systems for real: three servers on three mounts of CephFS (ceph-fuse), and of GlusterFS (FUSE).

Each mount is a client of its own, as on a host of its own. The clusters run in user space on loopback."""

import contextlib
import fcntl
import itertools
import json
import os
import random
import signal
import threading
import uuid

import pytest
from conftest import Answer, Server, run_tinyreg, until
from engines import private_folder, require, require_root, run
from samples import CONFIG
from test_crash import check_store
from test_hosts import put_image
from tinyreg import Digest, Directory

HOSTS = 3

CEPH_CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:13300,v1:127.0.0.1:16789]
public network = 127.0.0.0/8
public addr = 127.0.0.1
run dir = {home}
admin socket = {home}/$cluster-$name.$pid.asok
pid file = {home}/$name.pid
log file = {home}/$name.log
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail warn = 2
mon data avail crit = 1
mon data = {home}/mon
ms bind ipv6 = false
mgr data = {home}/mgr
mds data = {home}/mds
mds tick interval = 0.1
osd data = {home}/osd
osd objectstore = bluestore
bluestore block size = 4294967296
bluestore block db create = false
bluestore block wal create = false
[client]
keyring = {home}/keyring
log file = {home}/client.$pid.log
pid file =
"""


class Cluster:
    """A file system that is mounted once for each host, at folder/1 and so on."""

    def __init__(self, folder):
        self.folder = folder
        self.home = os.path.join(folder, "home")
        os.mkdir(self.home)
        self.clients = {}  # the process of each mount
        for host in range(1, HOSTS + 1):
            os.mkdir(self.at(host))

    def at(self, host, *path):
        return os.path.join(self.folder, str(host), *path)

    def mount(self, host):
        self.mount_at(self.at(host))
        self.clients[host] = process_of(self.client, self.at(host))

    def kill_mount(self, host):
        """What a host that dies does to its mount."""
        os.kill(self.clients[host], signal.SIGKILL)

    def mount_anew(self, host):
        run("umount", "-l", self.at(host))
        self.mount(host)

    def forget(self, host):
        """What lets the others go on at once, and not after a time-out, when a host has died."""

    def end(self):
        for pid in self.clients.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def process_of(*words):
    """The id of the one process whose command line has all these words."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open("/proc/%s/cmdline" % entry) as file:
            if set(words) <= set(file.read().split("\0")):
                return int(entry)
    raise AssertionError("%s is not running" % " ".join(words))


class CephFS(Cluster):
    """One mon, mgr, OSD and MDS. An MDS that ticks rarely would let look-ups wait for up to five seconds."""

    programs = ("ceph", "ceph-mon", "ceph-mgr", "ceph-osd", "ceph-mds", "ceph-fuse", "setfattr")
    client = "ceph-fuse"

    def start(self):
        self.conf = os.path.join(self.home, "ceph.conf")
        with open(self.conf, "w") as file:
            file.write(CEPH_CONF.format(home=self.home, fsid=uuid.uuid4()))
        for name in ("mon", "mgr", "mds", "osd"):
            os.mkdir(os.path.join(self.home, name))
        everything = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mds", "allow *", "--cap", "mgr",
                      "allow *"]
        keyring, monmap = os.path.join(self.home, "keyring"), os.path.join(self.home, "monmap")
        run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *everything)
        run("monmaptool", "--create", "--addv", "a", "[v2:127.0.0.1:13300,v1:127.0.0.1:16789]", "--fsid",
            self.setting("fsid"), monmap)
        self.run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self.run("ceph-mon", "-i", "a")
        until(lambda: self.run("ceph", "-s", ok=False).returncode == 0, what="the mon")
        for daemon, key in (("mgr.x", "mgr"), ("mds.m", "mds")):
            shown = self.run("ceph", "auth", "get-or-create", daemon, "mon", "allow profile " + key, "osd", "allow *",
                             "mds", "allow *")
            with open(os.path.join(self.home, key, "keyring"), "w") as file:
                file.write(shown.stdout)
        self.run("ceph-mgr", "-i", "x")
        key = run("ceph-authtool", "--gen-print-key").stdout.strip()
        osd = str(uuid.uuid4())
        self.run("ceph", "osd", "new", osd, "-i", "-", input=json.dumps({"cephx_secret": key}))
        run("ceph-authtool", "--create-keyring", self.home + "/osd/keyring", "-n", "osd.0", "--add-key", key)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.run("ceph-osd", "-i", "0")
        self.run("ceph-mds", "-i", "m")
        for pool in ("meta", "data"):
            self.run("ceph", "osd", "pool", "create", pool, "8")
        self.run("ceph", "fs", "new", "cephfs", "meta", "data")
        until(lambda: "up:active" in self.run("ceph", "mds", "stat").stdout, what="the MDS")
        for host in range(1, HOSTS + 1):
            self.mount(host)

    def setting(self, name):
        with open(self.conf) as file:
            return next(line.split(" = ")[1].strip() for line in file if line.startswith(name + " = "))

    def run(self, program, *arguments, **settings):
        return run(program, "-c", self.conf, *arguments, **settings)

    def mount_at(self, path):
        self.run("ceph-fuse", "--id", "admin", path)

    def forget(self, host):
        shown = self.run("ceph", "tell", "mds.m", "session", "ls").stdout
        for session in json.loads(shown[shown.index("\n["):]):  # above it may be lines of a log
            if session["client_metadata"].get("mount_point") == self.at(host):
                self.run("ceph", "tell", "mds.m", "session", "evict", "id=%d" % session["id"])

    def osd(self, number):
        with open(os.path.join(self.home, "osd.0.pid")) as file:
            os.kill(int(file.read()), number)

    def lose_disk(self):
        self.osd(signal.SIGSTOP)

    def disk_is_back(self):
        self.osd(signal.SIGCONT)

    def limit(self, size):
        run("setfattr", "-n", "ceph.quota.max_bytes", "-v", size, self.at(1, "registry"))

    def end(self):
        super().end()
        for program in ("mds.m", "osd.0", "mgr.x", "mon.a"):
            with contextlib.suppress(OSError, ValueError), open(os.path.join(self.home, program + ".pid")) as file:
                os.kill(int(file.read()), signal.SIGKILL)


class GlusterFS(Cluster):
    """A volume of one brick, set as the README says."""

    programs = ("glusterd", "gluster", "glusterfs")
    client = "/usr/sbin/glusterfs"
    address = "127.0.0.2"

    def start(self):
        volfile = os.path.join(self.home, "glusterd.vol")
        os.mkdir(os.path.join(self.home, "state"))
        with open(volfile, "w") as file:
            file.write("volume management\n type mgmt/glusterd\n option working-directory %s/state\n"
                       " option transport-type socket\n option transport.socket.bind-address %s\nend-volume\n"
                       % (self.home, self.address))
        run("glusterd", "-f", volfile, "-l", self.home + "/glusterd.log", "-p", self.home + "/glusterd.pid")
        until(lambda: self.gluster("pool", "list", ok=False).returncode == 0, what="glusterd")
        self.gluster("volume", "create", "reg", "%s:%s/brick" % (self.address, self.home), "force")
        for name, value in (("transport.address-family", "inet"), ("auth.allow", "127.0.0.*"),
                            ("performance.stat-prefetch", "off"), ("performance.open-behind", "off")):
            self.gluster("volume", "set", "reg", name, value)
        self.gluster("volume", "start", "reg")
        for host in range(1, HOSTS + 1):
            self.mount(host)

    def gluster(self, *arguments, ok=True):
        return run("gluster", "--mode=script", *arguments, ok=ok)

    def mount_at(self, path):
        run("mount", "-t", "glusterfs", "-o", "attribute-timeout=0,entry-timeout=0,log-file=%s/mount.log" % self.home,
            self.address + ":/reg", path)

    def lose_disk(self):
        self.gluster("volume", "stop", "reg", "force")

    def disk_is_back(self):
        self.gluster("volume", "start", "reg")

    def limit(self, size):
        self.gluster("volume", "quota", "reg", "enable")
        self.gluster("volume", "quota", "reg", "soft-timeout", "0")
        self.gluster("volume", "quota", "reg", "hard-timeout", "0")
        self.gluster("volume", "quota", "reg", "limit-usage", "/", str(size))

    def end(self):
        super().end()
        self.gluster("volume", "stop", "reg", "force", ok=False)
        self.gluster("volume", "delete", "reg", ok=False)
        with contextlib.suppress(OSError, ValueError), open(self.home + "/glusterd.pid") as file:  # it never came up
            os.kill(int(file.read()), signal.SIGTERM)


@pytest.fixture(scope="module", params=[CephFS, GlusterFS], ids=lambda kind: kind.__name__)
def cluster(request):
    require_root()
    if not os.path.exists("/dev/fuse"):
        pytest.skip("this kernel has no FUSE")
    require(*request.param.programs)
    # One at a time on a machine: glusterd has one socket, and the mon one port.
    with open("/tmp/tinyreg-cluster.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for is_last in (False, True):  # on a busy machine a daemon may be too late for another
            with private_folder("cluster", "/tmp") as folder:  # they want the attributes of a disk
                cluster = request.param(folder)
                try:
                    try:
                        cluster.start()
                    except AssertionError:
                        if is_last:
                            raise
                        continue
                    yield cluster
                    return
                finally:
                    cluster.end()


class Site:
    """A server on each host, and a client that goes from one to the next."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.servers = {host: Server(cluster.at(host, "registry"), "--shared", "--anonymous", "admin", "--workers", "2",
                                     log_path=os.path.join(cluster.home, "server%d" % host), READINESS_WAIT=1.0)
                        for host in range(1, HOSTS + 1)}
        self.turn = itertools.cycle(self.servers)

    def ask(self, *arguments, **headers):
        """The answer of the next server; its status is 0 where there is none."""
        return self.at(next(self.turn), *arguments, **headers)

    def at(self, host, *arguments, **headers):
        try:
            return self.servers[host].ask(*arguments, **headers)
        except OSError:
            return Answer(0, {}, b"")

    def becomes_ready(self, host, status):
        """Wait until /readyz answers with this status; returns the Answer."""
        return until(lambda: [answer for answer in [self.at(host, "GET", "/readyz")] if answer.status == status],
                     what="/readyz with %d" % status)[0]

    def end(self):
        for server in self.servers.values():
            server.stop(signal.SIGKILL)


@pytest.fixture
def site(cluster):
    """Three servers on an empty store."""
    site = Site(cluster)
    try:
        yield site
        assert not [host for host, server in site.servers.items() if "Traceback" in server.log()]
    finally:
        site.end()
        run("rm", "-rf", *[path for path in (cluster.at(1, "registry"),) if os.path.exists(path)])


def test_hosts_see_at_once_what_another_has_changed(site):
    """Each request of an upload is at the next host; one tag is moved by all of them."""
    digests = [put_image(site.ask, "app", "latest", (b"layer %d" % serial,)) for serial in range(3)]
    contents = [site.at(1, "GET", "/v2/app/manifests/" + digest).body for digest in digests]
    assert [Digest.of(content) for content in contents] == digests
    for host, content in itertools.product(site.servers, contents):
        assert site.at(host, "PUT", "/v2/app/manifests/latest", content).status == 201
        assert {site.at(other, "GET", "/v2/app/manifests/latest").body for other in site.servers} == {content}
        assert site.at(host, "PUT", "/v2/app/manifests/new", content).status == 201
        assert {site.at(other, "HEAD", "/v2/app/manifests/new").status for other in site.servers} == {200}
        assert site.at(host, "DELETE", "/v2/app/manifests/new").status == 202
        assert {site.at(other, "HEAD", "/v2/app/manifests/new").status for other in site.servers} == {404}


def test_a_host_that_dies_in_a_storm_takes_nothing_along(site):
    """Clients push at all hosts while gc runs; one host is killed with its mount. What was acknowledged is there."""
    acknowledged, failures, stop = {}, [], threading.Event()
    living = list(site.servers)

    def push(number):
        dice = random.Random(number)
        try:
            for serial in itertools.count():
                if stop.is_set():
                    break
                layers = (b"shared %d" % dice.randrange(8), b"%d %d" % (number, serial))
                digest = put_image(lambda *words, **headers: site.at(dice.choice(living), *words, **headers),
                                   "app%d" % dice.randrange(2), "%d-%d" % (number, serial), layers)
                if digest:
                    acknowledged[number, serial] = digest, layers
        except Exception as error:  # a thread's would be lost
            failures.append(error)

    threads = [threading.Thread(target=push, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(acknowledged) > 8 or failures, what="pushes at three hosts")
        collected = run_tinyreg("gc", "--grace", "0", "--root", site.cluster.at(1, "registry"))
        assert collected.returncode == 0, collected.stderr
        site.cluster.kill_mount(3)
        site.servers[3].stop(signal.SIGKILL)
        living.remove(3)
        site.cluster.forget(3)
        before = len(acknowledged)
        until(lambda: len(acknowledged) > before + 8 or failures, what="pushes at two hosts")
        collected = run_tinyreg("gc", "--grace", "0", "--root", site.cluster.at(2, "registry"))
        assert collected.returncode == 0, collected.stderr
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        site.cluster.mount_anew(3)
    assert not failures
    site.servers[3].start()
    store = Directory(site.cluster.at(3, "registry"))
    assert store.shared
    tags = check_store(store)
    assert {digest for digest, _ in acknowledged.values()} <= set(tags.values())
    for host, (digest, layers) in zip(itertools.cycle(site.servers), list(acknowledged.values())[-12:]):
        name = next(name for (name, _), present in tags.items() if present == digest)
        for layer in layers + (CONFIG,):
            assert site.at(host, "GET", "/v2/%s/blobs/%s" % (name, Digest.of(layer))).body == layer


def test_a_disk_that_was_away_needs_no_restart(site):
    """Not ready, says each server, and none of them hangs or ends. Then all goes on."""
    pushed = put_image(site.ask, "app", "1", (b"layer",))
    site.cluster.lose_disk()
    try:
        for host in site.servers:
            answer = site.becomes_ready(host, 503)
            assert b"network disk is away" in answer.body or b"has not answered" in answer.body
            assert site.at(host, "GET", "/healthz").status == 200
    finally:
        site.cluster.disk_is_back()
    for host in site.servers:
        site.becomes_ready(host, 200)
    assert put_image(site.ask, "app", "2", (b"another layer",))
    assert {site.at(host, "HEAD", "/v2/app/manifests/1").headers["Docker-Content-Digest"]
            for host in site.servers} == {pushed}


def test_a_disk_that_is_read_only_says_so(site):
    assert put_image(site.ask, "app", "1", (b"layer",))
    run("mount", "-o", "remount,ro", site.cluster.at(2))
    try:
        answer = site.at(2, "POST", "/v2/app/blobs/uploads/")
        assert (answer.status, answer.code) == (503, "UNAVAILABLE") and b"read-only" in answer.body
        assert site.at(2, "GET", "/v2/app/manifests/1").status == 200
        assert site.at(1, "POST", "/v2/app/blobs/uploads/").status == 202
    finally:
        run("mount", "-o", "remount,rw", site.cluster.at(2))
    assert site.at(2, "POST", "/v2/app/blobs/uploads/").status == 202


def test_a_quota_that_is_reached_is_507_and_rm_and_gc_give_room(site):
    """Quotas of cluster file systems are noticed late, so a push may be taken that goes a little beyond."""
    assert put_image(site.ask, "app", "1", (os.urandom(4 << 20),))
    site.cluster.limit(8 << 20)
    refused = []

    def is_full():
        location = site.at(1, "POST", "/v2/app/blobs/uploads/")
        if location.status == 202:
            location = site.at(1, "PATCH", location.headers["Location"], os.urandom(4 << 20))
        if location.status == 202:
            content = os.urandom(1 << 20)
            location = site.at(1, "PUT", location.headers["Location"] + "&digest=sha256:" + "0" * 64, content)
        refused.append(location)
        return location.status == 507 or put_image(site.ask, "app", "more", (os.urandom(4 << 20),)) is None

    until(is_full, what="the quota")
    if refused[-1].status == 507:
        assert b"the store is full" in refused[-1].body
    for command in (["rm", "app:1"], ["gc", "--grace", "0", "--untagged"]):
        done = run_tinyreg(*command, "--root", site.cluster.at(2, "registry"))
        assert done.returncode == 0, done.stderr
