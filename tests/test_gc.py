"""Garbage collection: what goes, what stays, and that pushes beside it lose nothing."""

import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid

import pytest

import tinyreg
from conftest import PATIENCE, TINYREG, run_tinyreg, until
from samples import (CONFIG, buildkit_cache, image, index, make_image, make_referrer, push_blob, read_blob,
                     to_manifest)
from tinyreg import (DOCKER_SCHEMA1, OCI_MANIFEST, Collection, CommandError, Digest, Directory, Expiry, Manifest,
                     RegistryError, collect_garbage, copy, local_time)

HOUR = 3600


def files_below(path):
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(str(path)) for name in names)


def make_old(store, seconds=10 * HOUR):
    """Let everything in the store be as if it had been pushed hours ago."""
    then = time.time() - seconds
    for path in files_below(store.root):
        os.utime(path, (then, then))


def collect(store, keep=None, older_than=None, repositories=None, **how):
    return collect_garbage(store, expiry=Expiry(keep, older_than, repositories), **how)


def gc(store, **how):
    """Collect garbage in a store where everything is old; returns the set of kinds and names that went."""
    gone = set()
    collect(store, tell=lambda kind, what, size: gone.add((kind, what)), **how)
    return gone


def has_blob(store, name, content):
    try:
        return read_blob(store, name, Digest.of(content)) == content
    except RegistryError:
        return False


# What stays

def test_a_fresh_store_loses_nothing_but_what_nothing_refers_to(store):
    kept = make_image(store, "a/b", layers=(b"one", b"two"))
    stray = push_blob(store, "a/b", b"stray")
    make_old(store)
    before = set(files_below(store.layout.tree))
    gone = gc(store)
    assert gone == {("link", "a/b@" + stray), ("blob", stray)}
    left = set(files_below(store.layout.tree))
    assert {path for path in before - left} == {path for path in before if stray.encoded in path}
    assert store.manifest("a/b", kept.digest).content == kept.content
    assert gc(store) == set()
    assert os.listdir(store.files.scratch) == []


def test_a_large_blob_goes_too(store):
    digest = push_blob(store, "app", bytes(3 << 20))
    make_old(store)
    assert collect_garbage(store).counts["bytes"] == 3 << 20
    assert not os.path.exists(os.path.dirname(store.layout.blob_path(digest)))
    assert os.listdir(store.files.scratch) == []


def test_the_blobs_of_a_deleted_manifest_go_unless_another_needs_them(store):
    make_image(store, "app", "one", layers=(b"shared", b"only one"))
    make_image(store, "app", "two", layers=(b"shared", b"only two"))
    store.delete_manifest("app", store.resolve("app", "one"))
    make_old(store)
    gc(store)
    assert has_blob(store, "app", b"shared") and has_blob(store, "app", b"only two")
    assert not has_blob(store, "app", b"only one")


def test_a_layer_that_another_repository_needs_goes_from_the_one_that_does_not(store):
    make_image(store, "one", layers=(b"shared",))
    make_image(store, "two", layers=(b"shared",))
    store.delete_manifest("one", store.resolve("one", "latest"))
    make_old(store)
    gc(store)
    assert not has_blob(store, "one", b"shared")
    assert has_blob(store, "two", b"shared")
    assert list(store.repositories()) == ["two"]  # nothing was left in one


def test_an_index_keeps_children_and_a_buildkit_index_its_layers(store):
    first = make_image(store, "app", None, layers=(b"amd64",))
    second = make_image(store, "app", None, layers=(b"arm64",))
    store.put_manifest("app", to_manifest(index(to_manifest(index(first)), second)), ["multi"])
    store.put_manifest("app", to_manifest(index(first)))
    buildkit_cache(store, "app", "cache")
    make_old(store)
    assert gc(store, untagged=True) == set()


def test_sha512_schema_1_and_odd_json_are_followed(store):
    make_image(store, "app", "sha512", layers=(b"five",), algorithm="sha512")
    push_blob(store, "app", b"old layer")
    push_blob(store, "app", b"escaped")
    old = json.dumps({"schemaVersion": 1, "mediaType": DOCKER_SCHEMA1,
                      "fsLayers": [{"blobSum": Digest.of(b"old layer")}]}).encode()
    odd = json.dumps(image((b"escaped",))).replace("sha256:", "sha\\u003256:").encode()
    push_blob(store, "app", CONFIG)
    for content in (old, odd):  # as Distribution would have stored them
        push_blob(store, "app", content)
        store.files.write(*store.link(store.layout.revision_path("app", Digest.of(content)), Digest.of(content))[:2])
    make_old(store)
    gc(store)
    for content in (b"old layer", b"escaped"):
        assert has_blob(store, "app", content)
    assert read_blob(store, "app", Digest.of(b"five", "sha512")) == b"five"


def test_a_blob_that_distribution_linked_from_its_sha512_stays(store):
    """Distribution stores what is pushed by its sha512 under its sha256; its own gc loses it."""
    content = json.dumps(image((b"layer",), algorithm="sha512")).encode()
    for part in (b"layer", CONFIG):
        push_blob(store, "app", part)
        store.files.write(*store.link(store.layout.layer_path("app", Digest.of(part, "sha512")), Digest.of(part))[:2])
    manifest = to_manifest(json.loads(content.decode()))
    store.put_manifest("app", manifest, ["latest"])
    make_old(store)
    gc(store, untagged=True)
    assert read_blob(store, "app", Digest.of(b"layer", "sha512")) == b"layer"


def test_without_untagged_every_manifest_stays(store):
    old = make_image(store, "app", "latest", layers=(b"old",))
    make_image(store, "app", "latest", layers=(b"new",))
    make_old(store)
    gc(store)
    assert store.manifest("app", old.digest) and has_blob(store, "app", b"old")


def test_untagged_drops_what_no_tag_index_or_subject_reaches(store):
    old = make_image(store, "app", "latest", layers=(b"old",))
    signed_old = make_referrer(store, "app", old, artifactType="application/x")
    new = make_image(store, "app", "latest", layers=(b"new",))
    signature = make_referrer(store, "app", new, artifactType="application/y")
    about_signature = make_referrer(store, "app", signature, artifactType="application/z")
    make_old(store)
    gone = gc(store, untagged=True)
    assert {what for kind, what in gone if kind == "manifest"} == {
        "app@" + old.digest, "app@" + signed_old.digest}
    assert not has_blob(store, "app", b"old")
    assert [manifest.digest for manifest in store.referrers("app", new.digest)] == [signature.digest]
    assert store.manifest("app", about_signature.digest)


def test_a_tagged_referrer_keeps_its_subject(store):
    subject = make_image(store, "app", None, layers=(b"subject",))
    referrer = make_referrer(store, "app", subject)
    store.put_manifest("app", referrer, ["sbom"])
    make_old(store)
    gc(store, untagged=True)
    assert store.manifest("app", subject.digest) and has_blob(store, "app", b"subject")


def test_what_was_pulled_by_its_digest_alone_stays_until_it_is_deleted_by_it(store, tmp_path):
    source = Directory(str(tmp_path / "elsewhere"))
    child = make_image(source, "app", None, layers=(b"child",))
    multi = to_manifest(index(child))
    source.put_manifest("app", multi)
    make_image(source, "app", "1", layers=(b"tagged",))
    copy(source, store, "app", multi.digest, "kept")
    for reference in ("1", child.digest):
        copy(source, store, "app", reference)
    store.put_manifest("app", source.manifest("app", child.digest), ["moves-on"])
    make_image(store, "app", "moves-on", layers=(b"next",))
    make_old(store)
    again = Directory(store.root)
    assert gc(again, untagged=True) == set() and list(again.pinned("app")) == [child.digest]
    assert has_blob(again, "kept", b"child") and again.manifest("kept", multi.digest)
    store.delete_tag("app", "1")
    make_old(store)
    gc(again, untagged=True, older_than=HOUR, force=True)
    assert has_blob(again, "app", b"child") and not has_blob(again, "app", b"tagged")
    rm = run_tinyreg("rm", "--root", store.root, "app@" + child.digest, "kept@" + multi.digest)
    assert rm.returncode == 0, rm.stderr
    make_old(store)
    gc(again, untagged=True)
    assert not has_data(store, b"child") and list(store.repositories()) == []
    assert files_below(os.path.join(store.layout.own, "pinned")) == []
    make_image(store, "app", None, layers=(b"child",))  # who pushes it again has not asked for it by its digest
    make_old(store)
    gc(again, untagged=True)
    assert not has_data(store, b"child")


def test_what_an_archive_names_by_digest_alone_stays_and_its_signature_does_not_hold_back_others(store, tmp_path):
    source = Directory(str(tmp_path / "elsewhere"))
    by_digest = make_image(source, "app", None, layers=(b"by digest",))
    tagged = make_image(source, "app", "1", layers=(b"tagged",))
    make_referrer(source, "app", tagged, artifactType="application/x")
    archive = str(tmp_path / "images.tar")
    for command in (["save", "--root", source.root, "app:1", "app@" + by_digest.digest, "-o", archive],
                    ["load", "--root", store.root, archive], ["rm", "--root", store.root, "app:1"]):
        done = run_tinyreg(*command)
        assert done.returncode == 0, done.stderr
    make_old(store)
    gc(store, untagged=True)
    assert list(store.revisions("app")) == [by_digest.digest] and has_blob(store, "app", b"by digest")


def test_what_tags_have_left_behind_in_a_registry_that_is_loaded_does_not_stay_for_ever(store, tmp_path):
    source, pulled = Directory(str(tmp_path / "source")), Directory(str(tmp_path / "elsewhere"))
    make_image(source, "app", layers=(b"old",))
    make_image(source, "app", layers=(b"new",))
    by_digest = make_image(pulled, "app", None, layers=(b"by digest",))
    copy(pulled, source, "app", by_digest.digest)
    assert run_tinyreg("load", "--root", store.root, source.root).returncode == 0
    assert has_blob(store, "app", b"old") and list(store.pinned("app")) == [by_digest.digest]
    make_old(store)
    gc(store, untagged=True)
    assert not has_data(store, b"old") and has_blob(store, "app", b"by digest") and has_blob(store, "app", b"new")


def test_the_list_of_what_would_go_names_the_repositories(store):
    gone = make_image(store, "team/app", None, layers=(b"layer",))
    make_image(store, "other", layers=(b"layer",))
    make_old(store)
    shown = run_tinyreg("gc", "--root", store.root, "--untagged", "--dry-run").stdout.splitlines()
    assert "manifest  team/app@" + gone.digest in shown
    assert "link  team/app@" + Digest.of(b"layer") in shown


# The grace period

def test_what_was_just_uploaded_or_mounted_stays(store):
    make_image(store, "source", layers=(b"layer",))
    make_old(store)
    uploaded = push_blob(store, "app", b"uploaded")
    store.mount("app", Digest.of(b"layer"), "source")
    store.delete_manifest("source", store.resolve("source", "latest"))
    assert ("blob", uploaded) not in gc(store, grace=HOUR)
    assert has_blob(store, "app", b"uploaded") and has_blob(store, "app", b"layer")
    assert not has_blob(store, "source", b"layer")
    make_old(store)
    gc(store, grace=HOUR)
    assert not has_blob(store, "app", b"uploaded") and not has_blob(store, "app", b"layer")


def test_an_upload_that_took_long_is_young_when_it_is_done(store):
    session = store.start_upload("app")
    session.append(io.BytesIO(b"slow"))
    make_old(store)
    session.commit(Digest.of(b"slow"))
    os.remove(os.path.join(store.layout.layer_path("app", Digest.of(b"slow")), "link"))
    gc(store, grace=HOUR)
    assert has_data(store, b"slow")  # though no repository has a link to it


def has_data(store, content):
    return os.path.exists(store.layout.blob_path(Digest.of(content)))


def test_a_blob_that_a_client_was_told_about_stays(start_server, tmp_path):
    server = start_server()
    store = Directory(server.root)
    asked, other = push_blob(store, "app", b"asked"), push_blob(store, "app", b"not asked")
    child = make_image(store, "app", None, layers=(b"child",))
    make_old(store)
    for path in ("blobs/" + asked, "manifests/" + child.digest):
        assert server.ask("HEAD", "/v2/app/" + path).status == 200
    gone = gc(store, grace=HOUR, untagged=True)
    assert gone == {("link", "app@" + other), ("blob", other)}
    assert has_blob(store, "app", b"child")


def test_no_grace(store):
    push_blob(store, "app", b"stray")
    make_old(store, 1)
    gc(store, grace=0)
    assert not has_data(store, b"stray")


# Uploads, repositories, scratch

def test_sessions_that_were_idle_for_a_day_go_and_others_stay(store):
    for number, hours in enumerate((25, 23)):
        session = store.start_upload("app%d" % number)
        session.append(io.BytesIO(b"half"))
        then = time.time() - hours * HOUR
        os.utime(session.path, (then, then))
    broken = os.path.dirname(store.layout.foreign_upload_path("app2", str(uuid.uuid4())))  # of Distribution
    os.makedirs(broken)
    os.utime(broken, (1, 1))
    for name, hours in (("app25", 25), ("app23", 23)):
        path = store.layout.foreign_upload_path(name, str(uuid.uuid4()))
        os.makedirs(os.path.dirname(path))
        with open(path, "wb") as file:
            file.write(b"half")
        os.utime(path, (time.time() - hours * HOUR,) * 2)
    for folder in (store.layout.uploads, os.path.join(store.layout.uploads, "app1"),
                   store.layout.repository_path("app23", "_uploads")):
        with open(os.path.join(folder, ".nfs0001"), "wb"):  # what NFS leaves; no session
            os.utime(os.path.join(folder, ".nfs0001"), (1, 1))
    gone = gc(store)
    assert {what.split()[0] for kind, what in gone if kind == "upload"} == {"app0", "app2", "app25"}
    assert sorted(name for name, _, _ in store.layout.iter_uploads()) == ["app1", "app23"]
    assert sorted(os.listdir(store.layout.uploads)) == [".nfs0001", "app1"]
    assert os.listdir(store.layout.repositories) == ["app23"]


def test_folders_of_uploads_are_made_while_gc_can_not_delete_them(store, monkeypatch):
    def is_locked(how):
        with open(store.lock.path, "r+b") as lock:
            try:
                fcntl.flock(lock, how | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def begins(function, how):
        def call(path, *more, **settings):
            if path.startswith(store.layout.uploads + "/"):
                held.append(is_locked(how))
            return function(path, *more, **settings)
        return call

    held = []
    monkeypatch.setattr(tinyreg, "make_directories", begins(tinyreg.make_directories, fcntl.LOCK_EX))
    monkeypatch.setattr(os, "rmdir", begins(os.rmdir, fcntl.LOCK_SH))
    session = store.start_upload("deep/down/app")
    gc(store)
    session.append(io.BytesIO(b"half"))
    session.cancel()
    gc(store)
    assert not os.path.exists(store.layout.uploads)
    store.start_upload("deep/down/app")
    assert len(held) >= 5 and all(held)


def test_empty_repositories_go_and_those_below_stay(store):
    make_image(store, "a", layers=(b"x",))
    make_image(store, "a/b/c", layers=(b"y",))
    make_image(store, "d/e/f", layers=(b"z",))
    for name in ("a", "d/e/f"):
        store.delete_manifest(name, store.resolve(name, "latest"))
    make_old(store)
    gone = gc(store)
    assert {what for kind, what in gone if kind == "repository"} == {"a", "d/e/f"}
    assert os.listdir(os.path.join(store.layout.tree, "repositories")) == ["a"]
    assert list(store.repositories()) == ["a/b/c"]


def test_two_downloads_of_a_blob_never_write_at_once_however_long_one_takes(store, monkeypatch):
    """The lock of one that takes longer than a day must not be taken for what a crash left."""
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began + 25 * HOUR)

    def open_from(offset):
        assert len(os.listdir(store.files.scratch)) == 1
        Collection(store).purge()
        assert len(os.listdir(store.files.scratch)) == 1
        raise RegistryError("BLOB_UNKNOWN")

    with pytest.raises(RegistryError):
        store.put_blob("app", Digest.of(b"blob"), open_from)
    assert os.listdir(store.files.scratch) == []


def test_what_a_crash_left_in_scratch_goes(store):
    grave = os.path.join(store.files.scratch, "x.grave")
    os.makedirs(os.path.join(grave, "below"))
    writing = os.path.join(store.files.scratch, "file")
    open(writing, "w").close()
    gc(store)
    assert os.listdir(store.files.scratch) == ["file"]  # someone may be writing it


# Damage

def test_of_a_damaged_manifest_everything_is_kept(store):
    manifest = make_image(store, "app", layers=(b"layer",))
    stray = push_blob(store, "app", b"stray")
    make_old(store)
    for content in (b"", b"{}", None):
        if content is None:
            os.unlink(store.layout.blob_path(manifest.digest))
        else:
            with open(store.layout.blob_path(manifest.digest), "wb") as file:
                file.write(content)
        done = collect_garbage(store)
        assert done.unread == ["app@" + manifest.digest]
        assert has_blob(store, "app", b"layer") and has_blob(store, "app", b"stray")
    # It mends by a push, and then the rest goes.
    store.put_manifest("app", manifest, ["latest"])
    make_old(store)
    gc(store)
    assert has_blob(store, "app", b"layer") and not has_data(store, b"stray") and stray


def test_a_damaged_tag_keeps_untagged_manifests(store):
    manifest = make_image(store, "app", layers=(b"layer",))
    with open(os.path.join(store.layout.tag_path("app", "latest"), "current", "link"), "w"):
        pass
    make_old(store)
    assert collect_garbage(store, untagged=True).unread == ["app:latest"]
    assert store.manifest("app", manifest.digest)


def test_a_folder_that_can_not_be_read_stops_it(store, monkeypatch):
    make_image(store, "app", layers=(b"layer",))
    make_old(store)
    real = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("repositories"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        collect_garbage(store)
    assert has_blob(store, "app", b"layer")


def test_repositories_on_a_disk_that_is_not_mounted(store):
    make_image(store, "app", layers=(b"layer",))
    make_old(store)
    top = os.path.join(store.layout.tree, "repositories")
    os.rename(top, top + ".elsewhere")
    shown = run_tinyreg("gc", "--root", store.root)
    assert shown.returncode == 1 and "No such file or directory" in shown.stderr
    assert has_data(store, b"layer")


# Tags that expire

def age_tag(store, name, tag, hours):
    """Let a tag be as if it had been moved hours ago."""
    then = time.time() - hours * HOUR
    os.utime(os.path.join(store.layout.tag_path(name, tag), "current", "link"), (then, then))


@pytest.fixture
def aged(store):
    """A store whose repository `app` has the tags 1 (an hour old) to 5 (five hours old), each with a layer of its own;
    all but the tags is older."""
    for number in range(1, 6):
        make_image(store, "app", str(number), layers=(b"shared", b"layer %d" % number))
    make_image(store, "other", "old", layers=(b"other",))
    make_old(store)
    for number in range(1, 6):
        age_tag(store, "app", str(number), number)
    return store


@pytest.mark.parametrize("how, left", [
    ({"keep": 2}, "12"), ({"keep": 9}, "12345"), ({"older_than": 3.5 * HOUR}, "123"),
    ({"keep": 1, "older_than": 3.5 * HOUR}, "123"), ({"keep": 4, "older_than": 1.5 * HOUR}, "1234"),
    ({"keep": 1, "grace": 2.5 * HOUR}, "12"), ({}, "12345")])
def test_tags_expire_with_what_only_they_led_to(aged, how, left):
    gone = gc(aged, **dict(how, repositories=None))
    assert list(aged.tags("app")) == list(left)
    assert {what for kind, what in gone if kind == "tag" and what.startswith("app")} == {
        "app:%s" % tag for tag in "12345" if tag not in left}
    for tag in "12345":
        assert has_blob(aged, "app", b"layer " + tag.encode()) is (tag in left)
        assert has_data(aged, b"layer " + tag.encode()) is (tag in left)
    assert has_blob(aged, "app", b"shared")
    for tag in left:
        assert aged.manifest("app", aged.resolve("app", tag))
    # Distribution lists these folders.
    assert not [name for name in os.listdir(aged.layout.tag_path("app", "")) if name not in left]


def test_what_had_no_tag_before_stays_unless_untagged_is_said(aged):
    untagged = make_image(aged, "app", None, layers=(b"by digest",))
    child = make_image(aged, "app", "5", layers=(b"child",))
    multi = to_manifest(index(child))
    aged.put_manifest("app", multi)
    make_old(aged)
    gc(aged, keep=1, repositories=re.compile("app"))
    assert len(list(aged.tags("app"))) == 1 and list(aged.tags("other")) == ["old"]
    assert {untagged.digest, child.digest, multi.digest} <= set(aged.revisions("app"))
    assert has_blob(aged, "app", b"by digest") and has_blob(aged, "app", b"child")
    gc(aged, keep=1, untagged=True, repositories=re.compile("app"))
    assert not {untagged.digest, multi.digest} & set(aged.revisions("app"))


def test_two_tags_of_one_manifest(aged):
    aged.put_manifest("app", aged.manifest("app", aged.resolve("app", "5")), ["latest"])
    age_tag(aged, "app", "latest", 0.5)
    aged.manifest("app", aged.resolve("app", "latest"))  # a client was told of it
    gc(aged, keep=1, grace=60)
    assert list(aged.tags("app")) == ["latest"] and has_blob(aged, "app", b"layer 5")


def test_signatures_are_no_tags_and_go_with_what_they_sign(aged):
    kept, gone = aged.resolve("app", "1"), aged.resolve("app", "5")
    for digest in (kept, gone):
        make_image(aged, "app", "sha256-%s.sig" % digest.encoded, layers=(b"signed " + digest.encode(),))
        about = {"mediaType": OCI_MANIFEST, "digest": digest, "size": 1}
        attached = make_image(aged, "app", None, layers=(b"sbom " + digest.encode(),), subject=about)
        aged.put_manifest("app", to_manifest(index(attached)), ["sha256-" + digest.encoded])
    elsewhere = "sha256-%s.sig" % Digest.of(b"in another repository").encoded
    make_image(aged, "app", elsewhere, layers=(b"alone",))
    links = {tag: os.path.join(aged.layout.tag_path("app", tag), "current", "link") for tag in "12345"}
    moved = {tag: os.stat(link).st_mtime for tag, link in links.items()}
    make_old(aged)
    for tag, then in moved.items():
        os.utime(os.path.join(aged.layout.tag_path("app", tag), "current", "link"), (then, then))
    gc(aged, keep=1)
    assert set(aged.tags("app")) == {"1", "sha256-" + kept.encoded, "sha256-%s.sig" % kept.encoded, elsewhere}
    for digest, stays in ((kept, True), (gone, False)):
        for what in (b"signed ", b"sbom "):
            assert has_data(aged, what + digest.encode()) is stays
    assert has_data(aged, b"alone")


def test_a_signature_goes_with_an_untagged_manifest_also_where_no_tag_expires(aged):
    untagged = make_image(aged, "app", None, layers=(b"untagged",))
    make_image(aged, "app", "sha256-%s.sig" % untagged.digest.encoded, layers=(b"signed",))
    make_old(aged)
    gc(aged, keep=99, untagged=True)
    assert list(aged.tags("app")) == list("12345")
    assert not has_data(aged, b"untagged") and not has_data(aged, b"signed")


def test_an_expired_tag_takes_along_neither_subject_nor_base_image(aged):
    """Both were pushed by their digest, on purpose: they stay as long as nobody says --untagged."""
    subject, base = [make_image(aged, "app", None, layers=(layer,)) for layer in (b"subject", b"base")]
    sbom = make_referrer(aged, "app", subject, artifactType="application/x")
    aged.put_manifest("app", sbom, ["sbom-1"])
    built = make_image(aged, "app", "built", layers=(b"built",),
                       annotations={"org.opencontainers.image.base.digest": base.digest})
    attached = make_referrer(aged, "app", built)
    make_old(aged)
    age_tag(aged, "app", "1", 1)
    gc(aged, keep=1)
    left = set(aged.revisions("app"))
    assert list(aged.tags("app")) == ["1"] and {subject.digest, base.digest} <= left
    assert not left & {sbom.digest, built.digest, attached.digest} and not has_data(aged, b"built")
    gc(aged, untagged=True)
    assert set(aged.revisions("app")) == {aged.resolve("app", "1")}


def test_a_tag_that_moves_meanwhile_stays(aged, monkeypatch):
    first, fourth = aged.resolve("app", "1"), aged.resolve("app", "4")
    manifest, again = [Manifest(aged.layout.manifest_content(digest), digest) for digest in (first, fourth)]
    sweep = Collection.sweep

    def push_first(collection, kind, entries, name=None):
        if (kind, name) == ("tag", "app") and not aged.lock.pushed:
            aged.lock.pushed = True
            aged.put_manifest("app", manifest, ["5"])
            aged.put_manifest("app", again, ["new"])
        return sweep(collection, kind, entries, name)

    aged.lock.pushed = False
    monkeypatch.setattr(Collection, "sweep", push_first)
    collect(aged, keep=2)
    assert list(aged.tags("app")) == ["1", "2", "5", "new"] and aged.resolve("app", "5") == manifest.digest
    assert aged.manifest("app", aged.resolve("app", "new")) and has_blob(aged, "app", b"layer 4")


def test_what_a_client_was_just_told_of_stays_with_its_tag(aged):
    aged.manifest("app", aged.resolve("app", "4"))
    gc(aged, keep=2, grace=30 * 60)
    assert list(aged.tags("app")) == ["1", "2", "4"] and has_blob(aged, "app", b"layer 4")


@pytest.mark.parametrize("keep", [1, 4])
def test_what_tags_hold_only_because_they_are_young_is_said_to_wait(aged, keep):
    """In `app` only 5 is older than the grace period; 2, 3 and 4 would go with it."""
    collection = collect(aged, keep=keep, grace=4.5 * HOUR)
    assert list(aged.tags("app")) == list("1234") and has_blob(aged, "app", b"layer 4")
    waiting, until_then = collection.waiting_bytes()
    assert (waiting > len(b"layer 2layer 3layer 4")) is (keep == 1)
    assert (until_then > time.time()) is (keep == 1)


def test_no_tag_expires_where_a_manifest_is_damaged(aged):
    with open(aged.layout.blob_path(aged.resolve("app", "5")), "w"):
        pass
    gc(aged, keep=1)
    assert list(aged.tags("app")) == list("12345") and has_data(aged, b"layer 4")


def test_the_command_shows_what_would_expire_and_lets_it(aged):
    before = files_below(aged.layout.tree)
    command = ["gc", "--root", aged.root, "--keep", "2", "--older-than", "210m", "--repositories", "a*"]
    shown = run_tinyreg(*command + ["--dry-run"]).stdout.splitlines()
    assert [line for line in shown if line.startswith("tag ")] == ["tag  app:4", "tag  app:5"]
    assert shown[-1].startswith("would remove 2 tags, 2 manifests, 2 links, 4 blobs")
    assert files_below(aged.layout.tree) == before
    removed = json.loads(run_tinyreg(*command + ["--json"]).stdout)["removed"]
    assert {"kind": "tag", "name": "app:5", "size": 0} in removed
    assert list(aged.tags("app")) == list("123") and list(aged.tags("other")) == ["old"]
    assert run_tinyreg("gc", "--root", aged.root, "--keep", "0").returncode == 2
    alone = run_tinyreg("gc", "--root", aged.root, "--repositories", "a*")
    assert alone.returncode == 1 and "--keep" in alone.stderr and len(alone.stderr.splitlines()) == 1
    assert run_tinyreg("verify", "--root", aged.root).returncode == 0


# Lists of what stays

def list_of(tmp_path, *lines):
    path = tmp_path / "images.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def listed(aged):
    """The same store with images of several origins."""
    make_image(aged, "docker.io/library/alpine", "3.19")
    make_image(aged, "docker.io/team/app", "1")
    make_image(aged, "lab.example_5000/x", "1")
    make_old(aged)
    for number in range(1, 6):
        age_tag(aged, "app", str(number), number + 1)
    return aged


def left_by(store, *options):
    """All tags that are left after a run of gc with these options."""
    assert tinyreg.main(["gc", "--root", store.root] + list(options)) == 0
    return {"%s:%s" % (name, tag) for name in store.repositories() for tag in store.tags(name)}


def test_tags_that_no_list_names_go_and_those_that_one_names_in_any_spelling_stay(listed, tmp_path):
    digest = listed.resolve("app", "3")
    assert left_by(listed, "--only", list_of(
        tmp_path, "app:1   # as it is called here", "alpine:3.19", "team/app:1", "lab.example:5000/x:1",
        "app:2@" + digest, "app@" + digest, "not/here:1")) == {
            "app:1", "app:2", "app:3", "docker.io/library/alpine:3.19", "docker.io/team/app:1", "lab.example_5000/x:1"}
    assert not has_data(listed, b"layer 4") and not has_data(listed, b"other") and has_data(listed, b"layer 3")


def test_patterns_and_guesses_in_a_list_keep_what_they_name(listed, tmp_path):
    make_image(listed, "quay.io/tool", "v1")
    make_old(listed)
    assert left_by(listed, "--only", list_of(
        tmp_path, "containers:", "- image: alpine:3.*", "- image: lab.example:5000/*", "- image: gone.lab/**:*",
        "- image: 'a*:4'", "- args: [--tool=quay.io/tool:v1]")) == {
            "docker.io/library/alpine:3.19", "lab.example_5000/x:1", "quay.io/tool:v1", "app:4"}


@pytest.mark.parametrize("lines", [
    ["HOST:5000/app:1", "HOST/lab.example_5000/x:1", "localhost:5000/docker.io/team/app:1", "HOST:5000/alpine:*"],
    ["# of the cluster, image: see below", "app:1", "lab.example:5000/x:1", "docker.io/team/app:1  # {image: old}",
     "alpine:3.19"],
    ["app:1", "lab.example:5000/x:1", "docker.io/team/app:1", "---", "image: alpine:3.19"],
    ["images:", "- app:1", "- 'lab.example:5000/x:1'", "args: [--run=docker.io/team/app:1]", "- {image: alpine:3.19}"]])
def test_a_tag_stays_wherever_and_however_a_list_names_it(listed, tmp_path, lines):
    """As clients call what they pull from here; in a list whose comments speak of images; in files of several kinds."""
    lines = [line.replace("HOST", "registry.lab") for line in lines]
    assert left_by(listed, "--only", list_of(tmp_path, *lines)) == {
        "app:1", "docker.io/library/alpine:3.19", "docker.io/team/app:1", "lab.example_5000/x:1"}


def test_each_of_several_lists_has_to_name_something(listed, tmp_path, capsys):
    before, other = left_by(listed), tmp_path / "other.txt"
    images = list_of(tmp_path, "app:1")
    other.write_text("lab.example:5000/x:9\n")
    assert tinyreg.main(["gc", "--root", listed.root, "--only", images, "--only", str(other)]) == 1
    assert "no tag here is named in %s, " % other in capsys.readouterr().err
    assert left_by(listed) == before
    other.write_text("app@%s\n" % listed.resolve("app", "3"))
    assert left_by(listed, "--only", str(other)) == {"app:3"}
    assert left_by(listed, "--only", images, "--force") == set()


def test_a_platform_that_a_list_names_by_its_digest_stays_without_the_tag_of_its_index(listed, tmp_path):
    children = [make_image(listed, "app", None, layers=(platform,)) for platform in (b"amd64", b"arm64")]
    listed.put_manifest("app", to_manifest(index(*children)), ["index"])
    make_old(listed)
    assert left_by(listed, "--only", list_of(tmp_path, "app:1", "app@" + children[0].digest, "app:gone*")) == {"app:1"}
    assert has_data(listed, b"amd64") and not has_data(listed, b"arm64")
    assert listed.manifest("app", children[0].digest)


def test_a_template_that_names_nothing_is_said_to_keep_nothing(listed, tmp_path, capsys, caplog):
    images = list_of(tmp_path, "image: app:1", "image: '{{ .Values.image }}'")
    assert left_by(listed, "--only", images) == {"app:1"}
    assert "images.txt:2: {{ .Values.image }} may name any image; no tag stays for it" in caplog.text


def test_only_deletes_where_repositories_says_and_what_other_rules_would_delete_too(listed, tmp_path):
    """A name without a tag means latest, as everywhere."""
    images = list_of(tmp_path, "app:5", "alpine")
    before = left_by(listed)
    assert left_by(listed, "--only", images, "--repositories", "other") == before - {"other:old"}
    assert left_by(listed, "--only", images, "--repositories", "app", "--older-than", "210m") \
        == before - {"other:old", "app:3", "app:4"}
    assert left_by(listed, "--only", images, "--grace", "150m") == {"app:1", "app:5"}


def test_what_is_just_pushed_and_what_a_signature_is_about_stays(listed, tmp_path):
    signed, other = (listed.resolve("app", tag) for tag in "12")
    for digest in signed, other:
        make_image(listed, "app", digest.replace(":", "-") + ".sig", layers=(digest.encode(),))
    make_old(listed)
    make_image(listed, "app", "new", layers=(b"new",))
    assert left_by(listed, "--only", list_of(tmp_path, "app:1")) == {
        "app:1", "app:new", "app:%s.sig" % signed.replace(":", "-")}


def test_a_plan_changes_nothing_and_rm_carries_out_what_still_holds_of_it(listed, tmp_path, capsys):
    before, plan = files_below(listed.layout.tree), str(tmp_path / "going.txt")
    assert tinyreg.main(["gc", "--root", listed.root, "--only", list_of(tmp_path, "app:1", "alpine:3.19"),
                         "--repositories", "a*", "--plan", plan]) == 0
    with open(plan) as file:
        assert file.read().splitlines() == ["app:%s@%s" % (tag, listed.resolve("app", tag)) for tag in "2345"]
    assert "tag  app:3\n" in capsys.readouterr().out and files_below(listed.layout.tree) == before
    make_image(listed, "app", "4", layers=(b"moved since",))
    assert tinyreg.main(["rm", "--root", listed.root, "-f", plan]) == 1
    assert "stays: the tag points to" in capsys.readouterr().err
    assert list(listed.tags("app")) == ["1", "4"] and list(listed.tags("other")) == ["old"]


@pytest.mark.parametrize("lines, message", [
    ([""], "no image is named"), (["# nothing"], "no image is named"), (["<html>"], "is no image"),
    (["image: ${TAG}"], "a variable has no value"), (["a: 1", "image: x y"], "is no image"),
    (["else/where:1"], "no tag here is named")])
def test_a_list_that_would_delete_everything_or_cannot_be_read_is_refused(aged, tmp_path, capsys, lines, message):
    before = files_below(aged.layout.tree)
    assert tinyreg.main(["gc", "--root", aged.root, "--only", list_of(tmp_path, *lines)]) == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert files_below(aged.layout.tree) == before


def test_a_list_that_is_not_there_is_refused_and_one_that_names_nothing_here_needs_force(aged, tmp_path):
    done = run_tinyreg("gc", "--root", aged.root, "--only", tmp_path / "nowhere")
    assert done.returncode == 1 and "nowhere: No such file" in done.stderr and done.stderr.count("\n") == 1
    assert left_by(aged, "--only", list_of(tmp_path, "else/where:1"), "--force", "--grace", "0") == set()


# Wrong clocks

def set_time(store, moment, *paths):
    for path in paths or files_below(store.root):
        os.utime(path, (moment, moment))


def test_what_was_stored_while_the_clock_was_wrong_is_collected_once_it_has_aged(store):
    """Its times said 2050, so gc took it for young until then."""
    make_image(store, "app", None, layers=(b"layer",))
    session = store.start_upload("app")
    lost = os.path.join(store.files.scratch, "lost")
    open(lost, "w").close()
    set_time(store, time.time() + 24 * 365 * 24 * HOUR)
    before = files_below(store.layout.tree)
    assert gc(store, grace=HOUR, untagged=True) == set() and files_below(store.layout.tree) == before
    Collection(store).purge()
    assert all(os.stat(path).st_mtime < time.time() + 60 for path in [session.path, lost])
    make_old(store, 25 * HOUR)  # a day later
    gone = gc(store, grace=HOUR, untagged=True)
    assert not has_data(store, b"layer") and not os.path.exists(lost)
    assert ("upload", "app " + session.id) in gone


def test_a_clock_that_is_a_year_ahead_deletes_no_tag(aged):
    """`gc --older-than 90d` deleted every tag of every repository."""
    year = 365 * 24 * HOUR
    set_time(aged, time.time() - year)
    for arguments in [], ["--keep", "1"], ["--repositories", "app"]:
        done = run_tinyreg("gc", "--root", aged.root, "--older-than", "90d", *arguments)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert any("clock says " + local_time(time.time() - ago) in done.stderr for ago in range(120))
        assert "--force" in done.stderr
    assert list(aged.tags("app")) == list("12345")
    planned = run_tinyreg("gc", "--root", aged.root, "--older-than", "90d", "--dry-run")
    assert planned.returncode == 0 and "would remove 6 tags" in planned.stdout and "--force" in planned.stderr
    make_image(aged, "other", "new")  # so the clock is right, and the rest is old
    assert run_tinyreg("gc", "--root", aged.root, "--older-than", "90d").returncode == 0
    assert list(aged.repositories()) == ["other"] and list(aged.tags("other")) == ["new"]
    set_time(aged, time.time() - year)
    assert run_tinyreg("gc", "--root", aged.root, "--older-than", "90d", "--force").returncode == 0
    assert list(aged.repositories()) == []


def test_a_quiet_week_is_no_wrong_clock_where_tags_are_kept_by_their_number(aged):
    set_time(aged, time.time() - 7 * 24 * HOUR)
    gc(aged, keep=2, older_than=24 * HOUR)
    assert len(list(aged.tags("app"))) == 2


def test_a_tag_of_the_future_does_not_push_out_what_is_new(aged):
    set_time(aged, time.time() + 100 * HOUR, os.path.join(aged.layout.current_path("app", "5"), "link"))
    with pytest.raises(CommandError, match="^app:5, of .*, would count as the newest from now on.*clock says"):
        collect(aged, keep=1)
    assert list(aged.tags("app")) == list("12345")
    gc(aged, keep=1, force=True)
    assert list(aged.tags("app")) == ["5"]


# The command

def test_dry_run_lists_and_leaves(store):
    make_image(store, "app", layers=(b"layer",))
    stray = push_blob(store, "app", b"stray")
    make_old(store)
    before = files_below(store.layout.tree)
    shown = run_tinyreg("gc", "--root", store.root, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "blob  %s  5 bytes" % stray in shown.stdout
    assert "would remove 0 manifests, 1 link, 1 blob," in shown.stdout
    report = json.loads(run_tinyreg("gc", "--root", store.root, "--dry-run", "--json").stdout)
    assert {"kind": "blob", "name": stray, "size": 5} in report["removed"] and report["size"] == 5
    assert files_below(store.layout.tree) == before
    shown = run_tinyreg("gc", "--root", store.root, "--untagged", "--grace", "1h")
    assert "removed 0 manifests, 1 link, 1 blob," in shown.stdout
    assert not has_data(store, b"stray")


def test_one_at_a_time(store):
    with open(os.path.join(store.layout.own, "gc"), "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shown = run_tinyreg("gc", "--root", store.root)
    assert shown.returncode == 1
    assert shown.stderr.startswith("tinyreg: another gc is at work in ")


def test_gc_every(start_server, store):
    push_blob(store, "app", b"stray")
    make_old(store)
    start_server(store.root, "--gc-every", "1s", "--grace", "1h")
    until(lambda: not has_data(store, b"stray"))


def test_gc_every_after_a_run_whose_clock_was_ahead(start_server, store):
    push_blob(store, "app", b"stray")
    open(os.path.join(store.layout.own, "gc"), "w").close()
    make_old(store)
    set_time(store, time.time() + 24 * 365 * 24 * HOUR, os.path.join(store.layout.own, "gc"))
    start_server(store.root, "--gc-every", "24h", "--grace", "1h")
    until(lambda: not has_data(store, b"stray"))


def test_a_volume_that_only_distribution_wrote(store):
    make_image(store, "app", "gone", layers=(b"layer",))
    make_old(store)
    shutil.rmtree(store.layout.own)
    assert run_tinyreg("rm", "--root", store.root, "app@" + store.resolve("app", "gone")).returncode == 0
    assert run_tinyreg("gc", "--root", store.root).returncode == 0
    assert not has_data(store, b"layer")


# Beside pushes

@pytest.mark.parametrize("when", ["manifest", "link", "blob"])
@pytest.mark.parametrize("how", ["mount", "push", "again"])
def test_a_push_after_the_marking(store, monkeypatch, when, how):
    """A push that comes when gc has decided what is garbage, and before it takes it away, keeps what it needs."""
    manifest = make_image(store, "app", "gone", layers=(b"layer",))
    store.delete_tag("app", "gone")
    make_image(store, "app", None, layers=(b"untagged",))
    if how != "again":
        store.delete_manifest("app", manifest.digest)
    make_old(store)
    sweep = Collection.sweep

    def push_first(collection, kind, entries, name=None):
        entries = list(entries)
        if kind == when and not store.has_pushed:
            store.has_pushed = True
            if how == "mount":
                for content in (b"layer", CONFIG):
                    if not store.mount("other", Digest.of(content)):
                        push_blob(store, "other", content)
                store.put_manifest("other", manifest, ["latest"])
            elif how == "push" or when != "manifest":
                make_image(store, "other", layers=(b"layer",))
            else:
                store.put_manifest("app", manifest, ["latest"])
        return sweep(collection, kind, entries, name)

    store.has_pushed = False
    monkeypatch.setattr(Collection, "sweep", push_first)
    collect_garbage(store, untagged=True)
    assert store.has_pushed
    name = "app" if how == "again" and when == "manifest" else "other"
    assert store.resolve(name, "latest") == manifest.digest
    for blob in store.manifest(name, manifest.digest).blobs:
        read_blob(store, name, blob.digest)


@pytest.mark.parametrize("when, how", [(1, "outer index"), (1, "referrer"), (2, "again")])
def test_a_push_between_an_index_and_its_children(store, monkeypatch, when, how):
    """A push touches only what it mentions itself; what that leads to has to stay as well."""
    child = make_image(store, "app", None, layers=(b"child",))
    inner = to_manifest(index(child))
    store.put_manifest("app", inner)
    make_old(store)
    sweep, levels = Collection.sweep, []

    def push_first(collection, kind, entries, name=None):
        entries = list(entries)
        if kind == "manifest":
            levels.append({digest for digest, _ in entries})
            if len(levels) == when:
                if how == "referrer":
                    make_referrer(store, "app", inner)
                else:
                    store.put_manifest("app", to_manifest(index(inner)) if how == "outer index" else inner, ["new"])
        return sweep(collection, kind, entries, name)

    monkeypatch.setattr(Collection, "sweep", push_first)
    collect_garbage(store, untagged=True)
    assert levels == [{inner.digest}, {child.digest}][:when]
    assert store.manifest("app", inner.digest) and store.manifest("app", child.digest)
    assert has_blob(store, "app", b"child")


def test_gc_does_not_go_by_what_nfs_remembers_of_a_file(store, monkeypatch):
    """An NFS client may answer stat from memory, for up to a minute, while another host touches the file."""
    manifest = make_image(store, "app", "gone", layers=(b"layer",))
    store.delete_tag("app", "gone")
    make_old(store)
    real, remembered, sweep = os.stat, {}, Collection.sweep

    def stat(path, **settings):
        found = real(path, **settings)
        return remembered.setdefault(path, found) if str(path).startswith(store.layout.tree) else found

    def push_first(collection, kind, entries, name=None):
        entries = list(entries)
        if kind == "manifest":
            for _, folder in entries:
                os.stat(os.path.join(folder, "link"))
            store.put_manifest("app", manifest, ["again"])
        return sweep(collection, kind, entries, name)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(Collection, "sweep", push_first)
    collect_garbage(store, untagged=True)
    assert store.manifest("app", store.resolve("app", "again")) and has_blob(store, "app", b"layer")


PUSHER = """
import os, random, sys
sys.path[:0] = sys.argv[1:3]
from samples import CONFIG, image, index, push_blob, to_manifest
from tinyreg import Digest, Directory, RegistryError
store, seed, stop = Directory(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
dice = random.Random(seed)
while not os.path.exists(stop):
    name = "app%d" % dice.randrange(2)
    parts = [b"layer %d" % dice.randrange(6) for _ in range(3)] + [CONFIG]
    if dice.random() < 0.3:
        try:
            tag = dice.choice(["%d-%d" % (seed, number) for number in range(8)])
            store.delete_manifest(name, store.resolve(name, tag))
        except RegistryError:
            pass
    for part in parts:
        if not store.mount(name, Digest.of(part)):
            push_blob(store, name, part)
    manifest = to_manifest(image(parts[:3], annotations={"by": "%d %d" % (seed, dice.randrange(4))}))
    tag = "%d-%d" % (seed, dice.randrange(8))
    try:
        store.put_manifest(name, manifest, [tag])
    except RegistryError as error:
        assert error.code == "MANIFEST_BLOB_UNKNOWN", error  # without grace, gc may come before the manifest
        continue
    print("pushed", flush=True)
    for part in parts:
        with store.open_blob(name, Digest.of(part)) as blob:
            assert blob.read() == part
"""


@pytest.mark.parametrize("untagged", [False, True], ids=["", "untagged"])
def test_no_acknowledged_manifest_ever_lacks_a_blob(store, tmp_path, untagged):
    """Three processes that push images with shared layers, and delete some; and gc without any grace, in a loop."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = [sys.executable, "-c", PUSHER, os.path.dirname(TINYREG), here, store.root]
    stop, logs, pushers, went = tmp_path / "stop", [tmp_path / str(seed) for seed in range(3)], [], []
    begin = time.monotonic()
    for seed, path in enumerate(logs):
        with path.open("w") as log:
            pushers.append(subprocess.Popen(command + [str(seed), str(stop)], stdout=log, stderr=log))

    def enough_was_collected():
        done = collect_garbage(store, untagged=untagged)
        assert not done.unread
        went.append(done.counts["blob"])
        pushed = [path.read_text().count("pushed") for path in logs]
        has_each_worked = min(pushed) > 20 and len(went) > 10 and sum(went) > 10
        has_one_failed = any(pusher.poll() is not None for pusher in pushers)
        return (has_each_worked and time.monotonic() > begin + 5) or has_one_failed

    try:
        until(enough_was_collected, 300)
    finally:
        stop.touch()
    for pusher, path in zip(pushers, logs):
        assert pusher.wait(PATIENCE) == 0, path.read_text()
    check_whole(store)


def check_whole(store):
    """Every tag leads to a manifest, and each manifest has its blobs."""
    images = 0
    for name in store.repositories():
        for tag in store.tags(name):
            store.resolve(name, tag)
        for digest in store.revisions(name):
            for blob in store.manifest(name, digest).blobs:
                assert Digest.of(read_blob(store, name, blob.digest)) == blob.digest
            images += 1
    assert images > 5
