"""Disks that are full, broken or read-only, and limits of the host: clear answers, and no lasting harm."""

import concurrent.futures
import contextlib
import errno
import io
import json
import os
import re
import resource
import subprocess

import pytest

import tinyreg
from conftest import Client, ask, by_digest, python_that_opens, run_tinyreg
from samples import CONFIG, image, make_image, push_blob, read_blob, to_manifest
from tinyreg import OCI_MANIFEST, Access, Digest, Directory, RegistryError, Request, dispatch

MEGABYTE = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], stderr=subprocess.PIPE)
    if done.returncode:
        pytest.skip("may not mount a tmpfs here: %s" % done.stderr.decode().strip())
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def push(server, name, content):
    """(status, body) of an upload, in one chunk and in its end."""
    with Client(server) as client:
        answer = client.upload(name, content)
    return answer.status, answer.body


def put_image(server, name, tag, layers):
    content = json.dumps(image(layers)).encode()
    return server.ask("PUT", "/v2/%s/manifests/%s" % (name, tag), content,
                      content_type=OCI_MANIFEST)


def free(path):
    disk = os.statvfs(str(path))
    return disk.f_bavail * disk.f_frsize


def test_a_full_disk(start_server, small_disk, tmp_path):
    """A blob too large is refused and its space comes back; reads go on; smaller pushes, rm and gc work."""
    server = start_server(small_disk / "registry")
    layer = os.urandom(3 * MEGABYTE)
    for content in (layer, CONFIG):
        assert push(server, "app", content)[0] == 201
    assert put_image(server, "app", "one", (layer,))[0] == 201
    before = free(small_disk)
    for _ in range(3):
        status, body = push(server, "app", os.urandom(6 * MEGABYTE))
        assert status == 507
        error, = json.loads(body.decode())["errors"]
        assert error["code"] == "UNAVAILABLE" and "the store is full" in error["message"]
    assert free(small_disk) > before - 100000
    assert server.ask("GET", "/v2/app/blobs/" + Digest.of(layer))[2] == layer
    small = os.urandom(MEGABYTE)
    assert push(server, "app", small)[0] == 201

    # To the last byte: not even a manifest fits, nothing can be written, and all can be read and deleted.
    with contextlib.suppress(OSError), open(str(small_disk / "filler"), "wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    status, _, body = put_image(server, "app", "two", (layer, small))
    assert status == 507 and b"the store is full" in body
    assert push(server, "app", b"x" * 100)[0] == 507
    assert server.ask("GET", "/v2/app/manifests/one")[0] == 200
    assert server.ask("GET", "/v2/app/manifests/two")[0] == 404
    assert server.ask("DELETE", "/v2/app/manifests/" + Digest.of(json.dumps(image((layer,))).encode()))[0] == 202
    shown = run_tinyreg("gc", "--grace", "0", "--root", server.root)
    assert shown.returncode == 0, shown.stderr
    assert free(small_disk) > 4 * MEGABYTE  # all images are gone
    assert push(server, "app", layer)[0] == 201
    assert "Traceback" not in server.log()


def test_the_store_of_an_older_version_is_opened_on_a_disk_that_takes_no_new_file(small_disk):
    store = Directory(str(small_disk / "registry"))
    digest = push_blob(store, "app", b"blob")
    os.unlink(store.layout.collected)
    disk = os.statvfs(str(small_disk))
    settings = "remount,size=8m,nr_inodes=%d" % (disk.f_files - disk.f_ffree)
    subprocess.run(["mount", "-o", settings, str(small_disk)], check=True)
    assert read_blob(Directory(store.root), "app", digest) == b"blob" and not os.path.exists(store.layout.collected)


def test_no_space_between_a_blob_and_its_link(small_disk):
    """With one page after the other to spare, an upload is there whole or not at all, and what it took comes back."""
    store = Directory(str(small_disk / "registry"))
    push_blob(store, "app", b"first")
    content = b"x" * 5000
    results = set()
    for pages in range(12):
        with open(str(small_disk / "filler"), "wb") as filler:
            filler.write(bytes(free(small_disk) - pages * 4096))
        before = free(small_disk)
        try:
            push_blob(store, "app", content)
            results.add("stored")
            store.delete_blob("app", Digest.of(content))
            os.unlink(store.layout.blob_path(Digest.of(content)))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            results.add("full")
            with pytest.raises(RegistryError):
                store.open_blob("app", Digest.of(content))
            if os.path.exists(store.layout.blob_path(Digest.of(content))):  # before the link, which found no place
                os.unlink(store.layout.blob_path(Digest.of(content)))
        assert free(small_disk) >= before
        os.unlink(str(small_disk / "filler"))
    assert results == {"stored", "full"}
    assert os.listdir(store.files.scratch) == []


def test_min_free(start_server, small_disk):
    server = start_server(small_disk / "registry", "--min-free", "4M")
    layer = os.urandom(MEGABYTE)
    for content in (layer, CONFIG):
        assert push(server, "app", content)[0] == 201
    status, body = push(server, "app", os.urandom(5 * MEGABYTE))  # while it is appended
    assert status == 507 and b"the store is full" in body and b"--min-free" in body
    assert free(small_disk) > 6 * MEGABYTE
    with open(str(small_disk / "filler"), "wb") as filler:
        filler.write(bytes(4 * MEGABYTE))
    assert server.ask("POST", "/v2/app/blobs/uploads/")[0] == 507  # before it begins
    assert put_image(server, "app", "latest", (layer,))[0] == 201   # what is there may become an image
    os.unlink(str(small_disk / "filler"))
    assert push(server, "app", os.urandom(MEGABYTE))[0] == 201


def test_max_blob(start_server):
    server = start_server(None, "--max-blob", "1M")
    assert push(server, "app", b"x" * MEGABYTE)[0] == 201
    status, body = push(server, "app", b"x" * (MEGABYTE + 1))
    assert status == 413 and b"up to 1048576 bytes" in body
    assert not list(tinyreg.Layout(server.root).iter_uploads())


@pytest.mark.parametrize("size", ["", "G", "-1G", "10X", "1e3"])
def test_sizes_that_are_none(size):
    shown = run_tinyreg("serve", "--max-blob=" + size)
    assert shown.returncode == 2 and "is no size: write for example 700M" in shown.stderr


def start_limited(start_server, limit, value):
    """A server under a limit of the host."""
    soft, hard = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, hard))
    try:
        return start_server()
    finally:
        resource.setrlimit(limit, (soft, hard))


def test_a_limit_on_the_size_of_files(start_server):
    server = start_limited(start_server, resource.RLIMIT_FSIZE, 2 * MEGABYTE)
    status, body = push(server, "app", b"x" * (3 * MEGABYTE))
    assert status == 507 and b"larger than a file may be" in body
    assert not list(tinyreg.Layout(server.root).iter_uploads())
    assert push(server, "app", b"x" * MEGABYTE)[0] == 201


def test_where_few_files_may_be_open_idle_connections_make_room(start_server, tmp_path):
    """Those that have been idle for longest are closed; nobody is refused."""
    server = start_server(None, "--workers", "1", python=python_that_opens(40, tmp_path))
    assert push(server, "app", CONFIG)[0] == 201
    connections, target = [], "/v2/app/blobs/" + Digest.of(CONFIG)
    for number in range(90):
        connections.append(Client(server))
        # Each in its own words, so that no answer can come from memory.
        answer = connections[-1].ask("GET", target, x_number=str(number))
        assert (answer.status, answer.body) == (200, CONFIG)
    assert connections[0].connection.sock.recv(1) == b""
    assert connections[-1].ask("GET", target).body == CONFIG
    for connection in connections:
        connection.close()
    assert put_image(server, "app", "latest", ())[0] == 201
    assert "Traceback" not in server.log() and "can't accept" not in server.log()


def test_a_soft_limit_on_open_files_is_raised(start_server):
    server = start_limited(start_server, resource.RLIMIT_NOFILE, 100)  # this process, too, has some files open
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(Client(server)) for _ in range(150)]
        for client in [first] + others + [first]:
            assert client.ask("GET", "/healthz").body == b"ok\n"
            client.connection.auto_open = 0  # the first is to be open still when its turn comes again


# Every write, failed in turn, through the handlers

CALLS = ["open", "mkdir", "rename", "fsync", "utime", "replace"]


class FailingOs:
    """Fails the N-th call of those functions of os that change something."""

    def __init__(self, patch, number, error):
        self.left = number
        self.error = error
        for name in CALLS:
            patch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, function):
        def call(*arguments, **settings):
            self.left -= 1
            if self.left == 0:
                raise OSError(self.error, os.strerror(self.error))
            return function(*arguments, **settings)
        return call


def request(store, method, target, body=b""):
    headers = {"content-length": str(len(body)), "content-type": OCI_MANIFEST}
    if method != "PUT":
        del headers["content-type"]
    return dispatch(store, Access("admin"), Request(method, target, headers, io.BytesIO(body)))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE],
                         ids=errno.errorcode.get)
def test_each_step_of_a_push_fails_in_turn(tmp_path, no_fsync, error):
    """The client hears 507 or 503 and why; nothing is half there; and the same push then succeeds."""
    layer = b"the layer"
    manifest = to_manifest(image((layer,)))
    steps = 0
    for number in range(1, 400):
        store = Directory(str(tmp_path / str(number)))
        answers = []
        with pytest.MonkeyPatch.context() as patch:
            failing = FailingOs(patch, number, error)
            for content in (layer, CONFIG):
                answers.append(request(store, "POST", "/v2/app/blobs/uploads/?digest=" + Digest.of(content), content))
            answers.append(request(store, "PUT", "/v2/app/manifests/latest", manifest.content))
            steps = number
            if failing.left > 0:
                break
        failed = [answer for answer in answers if answer.status != 201]
        if failed:
            assert failed[0].status in (503, 507)
            assert (b"full" in failed[0].body) == (error in (errno.ENOSPC, errno.EDQUOT))
        else:
            assert answers[-1].status == 201  # it was a step that can be done without
        with contextlib.suppress(RegistryError):
            digest = store.resolve("app", "latest")
            for blob in store.manifest("app", digest).blobs:
                read_blob(store, "app", blob.digest)
        assert make_image(store, "app", layers=(layer,)).digest == manifest.digest
        assert read_blob(store, "app", Digest.of(layer)) == layer
    assert 30 < steps < 399


def test_rm_and_gc_work_on_a_full_disk_that_hosts_share(small_disk):
    """They need no file there that was not made before."""
    root = small_disk / "registry"
    store = Directory(str(root), shared=True)
    store.files.write(store.layout.shared, b"")
    manifest = make_image(store, "app", "1", (os.urandom(3 * MEGABYTE),))
    make_image(store, "app", "2", (b"small",))
    with contextlib.suppress(OSError), open(str(small_disk / "filler"), "wb") as filler:
        while True:
            filler.write(bytes(4096))
            filler.flush()
    for command in (["rm", "app:1"], ["gc", "--grace", "0", "--untagged"]):
        done = run_tinyreg(*command, "--root", root)
        assert done.returncode == 0, done.stderr
    assert free(small_disk) > 2 * MEGABYTE
    assert not os.path.exists(store.layout.blob_path(manifest.digest))
    assert not os.path.exists(store.lock.path + ".changes")


# Quotas

KILOBYTE = 1 << 10


def refusal(answer):
    """The message of a refused request, which says quota, used and limit."""
    assert (answer.status, answer.code) == (403, "DENIED")
    assert re.search(r"over the quota: \S+ has [0-9.]+ (B|KiB|MiB) of [0-9.]+ [KM]iB", answer.error["message"])
    return answer.error["message"]


def test_the_push_that_would_be_too_much_is_refused_and_not_the_next_one(start_server):
    """However it comes: at the start if nothing fits, by its length, by its bytes, at its end, and by its manifest."""
    server = start_server(None, "--quota", "students/*=64K", "--workers", "2")
    layer = os.urandom(60 * KILOBYTE)
    with Client(server) as client:
        assert client.upload("students/alice/app", layer).status == 201
        for content in (os.urandom(5 * KILOBYTE), os.urandom(MEGABYTE)):
            assert "students/alice has 60.0 KiB of 64.0 KiB" in refusal(client.upload("students/alice/other", content))
            digest = Digest.of(content)
            refusal(client.ask("POST", "/v2/students/alice/b/blobs/uploads/?digest=" + digest, content))
            refusal(client.ask("POST", "/v2/students/alice/b/blobs/uploads/?digest=" + digest, iter([content])))
            assert client.blob("students/alice/other", digest) is None
            assert client.upload("students/bob/app", b"mine").status == 201  # it is no matter of others
        # What fits exactly fits; then nothing begins any more.
        assert client.upload("students/alice/app", CONFIG).status == 201
        assert client.upload("students/alice/x/y", os.urandom(4 * KILOBYTE - len(CONFIG))).status == 201
        refusal(client.ask("POST", "/v2/students/alice/app/blobs/uploads/"))
        refusal(put_image(client, "students/alice/app", "v1", (layer,)))
        assert client.upload("students", os.urandom(70 * KILOBYTE)).status == 201  # its name is shorter than the glob
        assert client.ask("GET", "/v2/students/alice/app/blobs/" + Digest.of(layer)).body == layer


def test_what_comes_at_once_through_several_processes_does_not_exceed_the_quota(start_server):
    """All uploads begin while there is room; only as many end as fit."""
    server = start_server(None, "--quota", "students/*=10K", "--workers", "2")
    layers = [os.urandom(3 * KILOBYTE) for _ in range(6)]
    targets = []
    for number, layer in enumerate(layers):
        answer = ask(server, "POST", "/v2/students/alice/n%d/blobs/uploads/" % number)
        targets.append(ask(server, "PATCH", answer.headers["Location"], layer).headers["Location"])
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda target, layer: ask(server, "PUT", by_digest(target, Digest.of(layer))),
                                targets, layers))
    assert sorted(answer.status for answer in answers) == [201] * 3 + [403] * 3


def test_uploads_that_never_end_do_not_fill_the_disk(start_server):
    """One that was cut leaves room for the next; many of them don't, and ending one gives room."""
    server = start_server(None, "--quota", "students/*=10K", "--workers", "2")
    begun = [ask(server, "POST", "/v2/students/alice/n%d/blobs/uploads/" % number) for number in range(4)]
    assert [answer.status for answer in begun] == [202] * 4, (begun, server.log())
    targets = [answer.headers["Location"] for answer in begun]
    answers = [ask(server, "PATCH", target, os.urandom(9 * KILOBYTE)) for target in targets[:3]]
    assert [answer.status for answer in answers] == [202] * 3
    for method, path in (("POST", "/v2/students/alice/x/blobs/uploads/"), ("PATCH", targets[3])):
        assert "27.0 KiB of uploads that have not ended" in refusal(ask(server, method, path, b""))
    assert ask(server, "POST", "/v2/students/bob/x/blobs/uploads/").status == 202
    assert ask(server, "DELETE", answers[0].headers["Location"]).status == 204
    assert ask(server, "PATCH", targets[3], os.urandom(KILOBYTE)).status == 202


def test_an_upload_is_refused_as_soon_as_others_have_filled_the_room_for_uploads(store, monkeypatch):
    monkeypatch.setattr(tinyreg, "UPLOAD_STEP", MEGABYTE)
    store.quotas = [tinyreg.Quota("students/*", 10 * MEGABYTE)]
    other, session = (store.start_upload("students/carol/" + name) for name in "ab")

    class Endless(io.RawIOBase):
        def readinto(self, view):
            os.truncate(other.path, 30 * MEGABYTE)
            return len(view)

    with pytest.raises(RegistryError, match="30.. MiB of uploads that have not ended"):
        session.append(Endless())
    assert session.offset <= 2 * MEGABYTE


def test_content_counts_once_for_an_account_and_a_mount_counts(start_server):
    server = start_server(None, "--quota", "students/*=10K")
    layer = os.urandom(6 * KILOBYTE)
    with Client(server) as client:
        mount = "/v2/%s/blobs/uploads/?mount=" + Digest.of(layer) + "&from=students/alice/a"
        assert client.upload("students/alice/a", layer).status == 201
        assert client.upload("students/bob/own", os.urandom(5 * KILOBYTE)).status == 201
        assert client.ask("POST", mount % "students/alice/b").status == 201
        assert client.ask("POST", mount % "students/carol/b").status == 201
        assert "students/bob has 5.0 KiB" in refusal(client.ask("POST", mount % "students/bob/b"))


def test_what_is_deleted_and_collected_comes_back_to_its_quota(start_server, tmp_path):
    server = start_server(None, "--quota", "students/*=10K", "--quota", "students/bob=1K", "--immutable-tags", "v*")
    with Client(server) as client:
        layer = os.urandom(6 * KILOBYTE)
        refusal(client.upload("students/bob/app", os.urandom(6 * KILOBYTE)))  # the last quota that fits counts
        for content in (layer, CONFIG):
            assert client.upload("students/alice", content).status == 201
        client.put_manifest("students/alice", image((layer,)), "v1")
        refusal(client.upload("students/alice", os.urandom(6 * KILOBYTE)))
        for arguments in (["rm", "students/alice:v1"], ["gc", "--untagged", "--grace", "0"]):
            assert run_tinyreg(*arguments, "--root", server.root).returncode == 0
        assert client.upload("students/alice", os.urandom(6 * KILOBYTE)).status == 201


@pytest.mark.parametrize("text", ["students/*", "students/**=2G", "=2G", "students/*=much", "Students/*=2G"])
def test_what_is_no_quota_is_said_in_a_line(tmp_path, text):
    done = run_tinyreg("serve", "--quota", text, cwd=str(tmp_path))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--quota" in done.stderr
