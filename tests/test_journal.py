"""The journal: what is pushed is durable before it is in place, comes back after a power cut, and undoes nothing.

test_crash.py cuts the power after each operation; here are the parts of it that can be told one by one."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import tinyreg
from conftest import TINYREG, Client, run_tinyreg, until
from samples import CONFIG, image, make_image, push_blob
from tinyreg import OCI_MANIFEST, Digest, Directory, RegistryError


def journals(store):
    return sorted(os.listdir(store.layout.journal)) if os.path.isdir(store.layout.journal) else []


def lose(store, *paths):
    """What a power cut does to names that were not synced."""
    for path in paths:
        shutil.rmtree(path)


def ended(store):
    """As if the process that has the store open had been killed: its journal stays."""
    store.journal.current.file.close()
    store.journal.current = None


def push_image(client, name, tag, layer):
    """In as few requests as an image takes, of which all are answered with 201."""
    content = json.dumps(image((layer,))).encode()
    for blob in (layer, CONFIG):
        assert client.ask("POST", "/v2/%s/blobs/uploads/?digest=%s" % (name, Digest.of(blob)), blob).status == 201
    path = "/v2/%s/manifests/%s" % (name, tag)
    assert client.ask("PUT", path, content, content_type=OCI_MANIFEST).status == 201


@pytest.fixture
def image_of_two(store):
    """(store, manifest) of an image app:latest, and another, app:other."""
    make_image(store, "app", "other", layers=(b"layer one", b"other"))
    return store, make_image(store, "app", "latest")


def test_what_a_power_cut_takes_comes_back(image_of_two):
    store, manifest = image_of_two
    ended(store)
    lose(store, os.path.join(store.layout.tree, "blobs"), store.layout.repository_path("app", "_layers"),
         store.layout.repository_path("app", "_manifests", "revisions"))
    os.mkdir(os.path.join(store.layout.tree, "blobs"))
    again = Directory(store.root)
    assert again.manifest("app", again.resolve("app", "latest")).content == manifest.content
    for content in (CONFIG, b"layer one", b"layer two", b"other"):
        with again.open_blob("app", Digest.of(content)) as blob:
            assert blob.read(1000) == content
    assert journals(store) == []


def test_a_damaged_file_is_mended(image_of_two):
    store, manifest = image_of_two
    ended(store)
    with open(store.layout.blob_path(manifest.digest), "wb") as file:
        file.write(bytes(len(manifest.content)))
    assert Directory(store.root).manifest("app", manifest.digest).content == manifest.content


def test_a_journal_that_is_written_to_is_left_alone(image_of_two):
    store, _ = image_of_two
    before = journals(store)
    assert len(before) == 1
    Directory(store.root)
    assert run_tinyreg("ls", "--root", store.root).returncode == 0
    assert journals(store) == before


@pytest.mark.parametrize("delete", [
    lambda store, digest: store.delete_manifest("app", digest),
    lambda store, digest: run_tinyreg("rm", "app:latest", "--root", store.root),
    lambda store, digest: run_tinyreg("rm", "app@" + digest, "--root", store.root),
], ids=["by this process", "a tag by another process", "a manifest by another process"])
def test_what_was_deleted_does_not_come_back(image_of_two, delete):
    """Though the process that pushed it had it in its journal, and is then killed."""
    store, manifest = image_of_two
    delete(store, manifest.digest)
    run_tinyreg("gc", "--untagged", "--grace", "0", "--root", store.root)
    push_blob(store, "app", b"later")
    ended(store)
    again = Directory(store.root)
    assert list(again.tags("app")) == ["other"]
    assert len(list(again.revisions("app"))) == 1 and not os.path.exists(store.layout.blob_path(manifest.digest))
    assert not os.path.exists(store.layout.blob_path(Digest.of(b"layer two")))
    again.open_blob("app", Digest.of(b"later")).close()


def test_a_tag_that_moved_stays_where_it_is(store):
    """A journal does not say what a tag points to: another program may have moved it since."""
    make_image(store, "app", "latest", layers=(b"one",))
    other = make_image(store, "app", "other", layers=(b"two",))
    ended(store)
    with open(os.path.join(store.layout.current_path("app", "latest"), "link"), "w") as link:
        link.write(other.digest)
    again = Directory(store.root)
    assert again.resolve("app", "latest") == other.digest and journals(again) == []


def test_a_stranger_s_journal_writes_nothing_but_what_a_push_could(store, tmp_path):
    """Somebody else's USB stick may have any journal."""
    good = Digest.of(b"good")
    blob = os.path.relpath(store.layout.blob_path(good), store.root)
    link = "docker/registry/v2/repositories/%s/link"
    layer = "app/_layers/sha256/" + good.encoded
    entries = [
        (blob, b"bad"),
        ("../outside", b"x"),
        (str(tmp_path / "outside"), b"x"),
        (blob.replace("blobs/sha256", "blobs/sha256/../../x"), b"good"),
        (link % ("../" + layer), good.encode()),
        (link % ("../../../../../outside/" + layer), good.encode()),
        (link % layer, b"no digest"),
        (link % layer, good.encode() + b"\n"),
        (link % "app/_manifests/tags/latest/current", good.encode()),
        (link % ("app/_manifests/tags/../index/sha256/" + good.encoded), good.encode()),
        ("tinyreg/usage", b"{}"), ("tinyreg/pinned/app/_digests/sha256/" + good.encoded, b"not empty"),
        ("docker/registry/v2/repositories/a\0/_layers/sha256/%s/link" % good.encoded, good.encode()),
    ]
    os.makedirs(store.layout.journal)
    for number, (path, content) in enumerate(entries):
        with open(os.path.join(store.layout.journal, str(number)), "wb") as file:
            for place, said in ((blob, b"good"), (path, content), (link % layer, good.encode())):
                file.write(b"%d %d\n%s%s" % (len(place), len(said), place.encode(), said))
    for number, text in enumerate((b"", b"1 1\n", b"99999999999 1\n", b"0 0\n", b"5 99999\n12345", bytes(4096),
                                   b"\xff" * 50)):
        with open(os.path.join(store.layout.journal, "spoilt%d" % number), "wb") as file:
            file.write(text)
    again = Directory(store.root)
    files = {os.path.join(folder, name) for folder, _, names in os.walk(str(tmp_path)) for name in names}
    assert {path for path in files if "/docker/" in path} == {store.layout.blob_path(good)}
    assert not any("outside" in path for path in files) and not os.path.exists(store.layout.usage)
    assert journals(again) == []


def fail_once(monkeypatch, store, error):
    """Let the next fsync of a journal fail, and tell which paths were synced."""
    failed = []

    def sync(descriptor, sync=tinyreg.sync):
        path = os.readlink("/proc/self/fd/%d" % descriptor)
        if os.path.dirname(path) == store.layout.journal and not failed:
            failed.append(path)
            raise OSError(error, os.strerror(error))
        sync(descriptor)
    monkeypatch.setattr(tinyreg, "sync", sync)
    return failed


def test_a_disk_that_fails_is_told_and_the_next_push_begins_a_new_journal(store, monkeypatch):
    push_blob(store, "app", b"before")
    failed = fail_once(monkeypatch, store, errno.EIO)
    with pytest.raises(OSError) as error:
        push_blob(store, "app", b"lost")
    assert error.value.errno == errno.EIO and failed
    with pytest.raises(RegistryError):
        store.open_blob("app", Digest.of(b"lost"))
    push_blob(store, "app", b"after")
    assert failed[0] not in {os.path.join(store.layout.journal, name) for name in journals(store)}
    ended(store)
    lose(store, os.path.dirname(store.layout.blob_path(Digest.of(b"after"))))
    again = Directory(store.root)
    for content in (b"before", b"after"):
        again.open_blob("app", Digest.of(content)).close()


def test_all_who_wait_for_a_sync_that_fails_hear_of_it(store, monkeypatch):
    """The kernel tells of a failure once. But what other threads had written is as lost."""
    push_blob(store, "app", b"before")
    failures, may_fail, waiting = [], threading.Event(), []
    journal = store.journal.current
    monkeypatch.setattr(journal, "syncing", threading.Lock())

    def sync(descriptor):
        if os.path.dirname(os.readlink("/proc/self/fd/%d" % descriptor)) == store.layout.journal and not waiting:
            waiting.append(descriptor)
            assert may_fail.wait(60)
            raise OSError(errno.EIO, "the disk fails")
    monkeypatch.setattr(tinyreg, "sync", sync)

    def push(content):
        try:
            push_blob(store, "app", content)
        except OSError as error:
            failures.append(error.errno)
    threads = [threading.Thread(target=push, args=(b"blob %d" % number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: journal.users == len(threads))
    may_fail.set()
    for thread in threads:
        thread.join()
    assert failures == 4 * [errno.EIO]
    assert len(list(store.digests())) == 1


def test_journals_do_not_grow_without_end(store):
    for number in range(100):
        push_blob(store, "app", b"%d " % number * 5000)
    until(lambda: len(journals(store)) <= 1)
    assert sum(os.path.getsize(os.path.join(store.layout.journal, name)) for name in journals(store)) < 300000
    assert len(list(store.digests())) == 100


def test_a_server_or_a_command_that_ends_leaves_no_journal(start_server, tmp_path):
    server = start_server()
    push_image(server, "app", "latest", b"layer")
    store = Directory(server.root)
    assert journals(store)
    archive = str(tmp_path / "app.tar")
    assert run_tinyreg("save", "app", "-o", archive, "--root", server.root).returncode == 0
    server.stop()
    assert journals(store) == []
    assert run_tinyreg("load", archive, "--root", str(tmp_path / "other")).returncode == 0
    assert journals(Directory(str(tmp_path / "other"))) == []


def test_who_may_only_read_the_store_reads_it(image_of_two):
    """And is told that the journal could not be read back."""
    store, _ = image_of_two
    ended(store)
    if os.geteuid():
        pytest.skip("to make the disk read-only takes root")
    command = "mount --bind {0} {0} && mount -o remount,bind,ro {0} && exec {1} {2} ls --root {0}".format(
        store.root, sys.executable, TINYREG)
    shown = subprocess.run(["unshare", "--mount", "sh", "-c", command], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, universal_newlines=True)
    assert shown.returncode == 0 and "app" in shown.stdout
    assert "power cut" in shown.stderr and len(shown.stderr.splitlines()) == 1
    assert journals(store)


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_how_often_a_small_image_waits_for_the_disk(tmp_path):
    """A config, one layer, a manifest with a new tag, into a repository that exists."""
    root, trace = str(tmp_path / "registry"), str(tmp_path / "trace")
    server = subprocess.Popen(
        ["strace", "-f", "-e", "trace=fsync,fdatasync,sync,syncfs,sync_file_range", "-e", "signal=none", "-o", trace,
         sys.executable, TINYREG, "serve", "--root", root, "--workers", "1", "--listen", "127.0.0.1:0", "--quiet"],
        stdout=subprocess.PIPE, universal_newlines=True)
    try:
        port = next(re.search(r"http://127.0.0.1:(\d+)", line).group(1) for line in server.stdout if "http://" in line)
        client = Client("http://127.0.0.1:" + port)
        counts = []
        for number in range(3):
            with open(trace) as file:
                before = len(re.findall(r"sync\w*\(", file.read()))
            push_image(client, "app", "v%d" % number, b"layer %d" % number)
            with open(trace) as file:
                counts.append(len(re.findall(r"sync\w*\(", file.read())) - before)
        client.close()
    finally:
        with open("/proc/%d/task/%d/children" % (server.pid, server.pid)) as children:
            os.kill(int(children.read()), signal.SIGTERM)  # strace itself would wait for it
        server.communicate(timeout=60)
    assert counts[-1] <= 14, counts


def test_what_is_appended_beside_a_sync_waits_for_one_of_its_own(store, monkeypatch):
    """A sync covers what was written before it began, and not what was about to be."""
    push_blob(store, "app", b"before")
    journal, stopped, go_on, unsynced = store.journal.current, threading.Event(), threading.Event(), []
    file = journal.file

    class Slow:
        """Stops before it writes the first time."""
        def write(self, entry):
            if not stopped.is_set():
                stopped.set()
                assert go_on.wait(60)
            unsynced.append(entry)
            return file.write(entry)

        def __getattr__(self, name):
            return getattr(file, name)

    def sync(descriptor, sync=tinyreg.sync):
        if os.path.dirname(os.readlink("/proc/self/fd/%d" % descriptor)) == store.layout.journal:
            unsynced.clear()
        sync(descriptor)
    monkeypatch.setattr(journal, "file", Slow())
    monkeypatch.setattr(tinyreg, "sync", sync)
    end = journal.size
    thread = threading.Thread(target=push_blob, args=(store, "app", b"slow"))
    thread.start()
    assert stopped.wait(60)
    journal.sync(end + 1)  # as another thread, whose entry would be there
    go_on.set()
    thread.join()
    assert unsynced == []


def fail_sync_of(monkeypatch, fails):
    """Let the sync of each file for whose path `fails` is true fail once; returns the inodes of these files.
    The kernel tells of such a failure once, and shows the bytes all the same."""
    failed = set()

    def sync(descriptor, sync=tinyreg.sync):
        inode = os.fstat(descriptor).st_ino
        if inode not in failed and fails(os.readlink("/proc/self/fd/%d" % descriptor)):
            failed.add(inode)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)
    monkeypatch.setattr(tinyreg, "sync", sync)
    return failed


def test_nothing_is_deleted_while_a_journal_could_bring_it_back(store, monkeypatch):
    manifest = make_image(store, "app", "latest")
    failed = fail_sync_of(monkeypatch, lambda path: path.endswith("/data") and not failed)
    with pytest.raises(OSError):
        store.delete_manifest("app", manifest.digest)
    assert store.resolve("app", "latest") == manifest.digest
    store.delete_manifest("app", manifest.digest)
    with pytest.raises(RegistryError):
        Directory(store.root).manifest("app", manifest.digest)


def test_gc_takes_nothing_while_a_full_disk_keeps_a_journal_from_being_read_back(store, monkeypatch):
    large = os.urandom(100000)
    manifest = make_image(store, "app", "latest", layers=(large,))
    ended(store)
    lose(store, store.layout.repository_path("app", "_manifests", "revisions"),
         store.layout.repository_path("app", "_layers"))
    os.utime(store.layout.blob_path(Digest.of(large)), (1, 1))
    with monkeypatch.context() as full:
        def fill(files, path, content, private=False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        full.setattr(tinyreg.Files, "fill", fill)
        opened = Directory(store.root)
        with pytest.raises(OSError):
            tinyreg.collect_garbage(opened, grace=3600)
    again = Directory(store.root)
    assert again.manifest("app", manifest.digest).content == manifest.content
    again.open_blob("app", Digest.of(large)).close()


def test_what_replaced_a_blob_is_synced_though_its_push_failed(store, monkeypatch):
    push_blob(store, "app", b"blob")
    store.journal.close()
    path = store.layout.blob_path(Digest.of(b"blob"))
    with monkeypatch.context() as failing:
        def publish(files, temporary, target, durable=True, publish=tinyreg.Files.publish):
            if target.endswith("/link"):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            publish(files, temporary, target, durable)
        failing.setattr(tinyreg.Files, "publish", publish)
        with pytest.raises(OSError):
            push_blob(store, "other", b"blob")
    synced = set()
    monkeypatch.setattr(tinyreg, "sync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    store.journal.close()
    assert os.stat(path).st_ino in synced


def test_a_file_whose_sync_has_failed_is_written_anew(store, monkeypatch):
    push_blob(store, "app", b"blob")
    path = store.layout.blob_path(Digest.of(b"blob"))
    failed = fail_sync_of(monkeypatch, lambda name: name == path and not failed)
    store.journal.close()
    assert journals(store)
    again = Directory(store.root)
    assert journals(store) == [] and os.stat(path).st_ino not in failed
    again.open_blob("app", Digest.of(b"blob")).close()


def test_a_deletion_waits_until_a_journal_is_gone_for_good(store, monkeypatch):
    """Whoever deleted it may have been killed before its folder was synced."""
    manifest = make_image(store, "app", "latest")
    store.journal.close()
    synced = []

    def sync_path(path, sync_path=tinyreg.sync_path):
        synced.append(path)
        sync_path(path)
    monkeypatch.setattr(tinyreg, "sync_path", sync_path)
    Directory(store.root).delete_manifest("app", manifest.digest)
    assert store.layout.journal in synced


def test_a_stranger_s_links_and_odd_files_lead_nowhere(store, tmp_path):
    evil, target = b"* * * * * root id\n", tmp_path / "cron.d"
    target.mkdir()
    make_image(store, "app", "latest")
    path = store.layout.blob_path(Digest.of(evil))
    os.makedirs(os.path.dirname(os.path.dirname(path)))
    os.symlink(str(target), os.path.dirname(path))
    place = os.path.relpath(path, store.root).encode()
    with open(os.path.join(store.layout.journal, "a" * 32), "wb") as file:
        file.write(b"%d %d\n%s%s" % (len(place), len(evil), place, evil))
    os.mkdir(os.path.join(store.layout.journal, "folder"))
    os.mkfifo(os.path.join(store.layout.journal, "fifo"))
    assert run_tinyreg("ls", "--root", store.root).returncode == 0
    assert run_tinyreg("rm", "app:latest", "--root", store.root).returncode == 0
    assert os.listdir(str(target)) == [] and not list(store.tags("app"))


@pytest.mark.parametrize("wait", [0, 0.002])
def test_a_journal_is_settled_whole_on_a_fast_and_on_a_slow_disk(store, monkeypatch, wait):
    """Several threads do it on the latter only."""
    contents, synced, threads = [b"%d" % number for number in range(5)], set(), set()
    for content in contents:
        push_blob(store, "app", content)

    def sync(descriptor, sync=tinyreg.sync):
        time.sleep(wait)
        synced.add(os.readlink("/proc/self/fd/%d" % descriptor))
        threads.add(threading.get_ident())
        sync(descriptor)

    monkeypatch.setattr(tinyreg, "sync", sync)
    store.journal.close()
    assert journals(store) == []
    if wait:
        assert len(threads) > 1
    for digest in map(Digest.of, contents):
        for path in (store.layout.blob_path(digest), store.layout.link_in(store.layout.layer_path("app", digest))):
            assert {path, os.path.dirname(path)} <= synced
