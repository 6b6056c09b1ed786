"""Archives: written, read in place, loaded, served and verified; those of others, and those of enemies."""

import calendar
import contextlib
import errno
import gzip
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time

import pytest

import tinyreg
from conftest import TINYREG, found_pythons, run_tinyreg, until
from engines import private_folder, require, run
from samples import (CONFIG, EVIL, descriptor, image, index, is_harmless, make_image, make_referrer,
                     push_blob, read_blob, to_manifest)
from tinyreg import (OCI_ARTIFACT, OWN_NAME, PARTS, SUBJECT, Archive, ArchiveWriter, Digest,
                     Directory, RegistryError, copy, image_text, iter_tar, tar_header)

NAME = "docker.io/library/demo"
RANDOM = random.Random(7)
LARGE = bytes(RANDOM.getrandbits(8) for _ in range(1 << 16)) * 48  # 3 MiB


def add(archive, name, content=b"", **fields):
    """Add a member to an open tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(content))


def make_tar(path, members, **settings):
    """A tar of {name: bytes, or the target of a symbolic link}."""
    with tarfile.open(str(path), "w", **settings) as archive:
        for name, content in members.items():
            if isinstance(content, str):
                add(archive, name, type=tarfile.SYMTYPE, linkname=content)
            else:
                add(archive, name, content)
    return str(path)


def layout(*manifests, blobs=(), names=None):
    """The members of an OCI image layout; `names` are the annotations of each manifest's entry."""
    entries = [dict({"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.content)},
                    **({"annotations": given} if given else {}))
               for manifest, given in zip(manifests, names or [None] * len(manifests))]
    members = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
               "index.json": json.dumps({"schemaVersion": 2, "manifests": entries}).encode()}
    for content in list(blobs) + [manifest.content for manifest in manifests]:
        members["blobs/sha256/" + Digest.of(content).encoded] = content
    return members


def members_of(path):
    with tarfile.open(str(path)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.fixture
def root(tmp_path):
    """Not where servers have theirs."""
    return tmp_path / "near"


@pytest.fixture
def far(tmp_path):
    """The store on the other side of the gap."""
    return Directory(str(tmp_path / "far"))


@pytest.fixture
def save(store, tmp_path):
    """A function that saves images of the store; returns the archive's path."""
    def save(*arguments, name="images.tar"):
        path = str(tmp_path / name)
        done = run_tinyreg("save", "--root", store.root, "-o", path, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return path
    return save


@pytest.fixture
def load(far):
    """A function that loads archives on the other side; returns the CompletedProcess."""
    return lambda *arguments, **settings: run_tinyreg("load", "--root", far.root, *arguments, **settings)


def same(store, far, name=NAME, tag="1"):
    """Whether an image is the same in both, to the last byte."""
    digest = store.resolve(name, tag)
    assert far.resolve(name, tag) == digest
    stack = [digest]
    while stack:
        manifest = store.manifest(name, stack.pop())
        assert far.manifest(name, manifest.digest).content == manifest.content
        stack += [child.digest for child in manifest.manifests]
        for blob in manifest.blobs:
            assert read_blob(far, name, blob.digest) == read_blob(store, name, blob.digest)
    return True


# Saving and loading

def test_an_image_its_index_and_its_signatures_cross_the_gap(store, far, save, load):
    one = make_image(store, NAME, None)
    two = make_image(store, NAME, None, layers=(b"arm",))
    both = to_manifest(index(one, two))
    store.put_manifest(NAME, both, ["1"])
    referrer = make_referrer(store, NAME, both)
    signature = make_image(store, NAME, "sha256-%s.sig" % both.digest.encoded, layers=(b"signed",))
    done = load(save("demo:1"))
    assert (done.returncode, done.stderr) == (0, "")
    assert same(store, far)
    assert [found.digest for found in far.referrers(NAME, both.digest)] == [referrer.digest]
    assert far.resolve(NAME, "sha256-%s.sig" % both.digest.encoded) == signature.digest
    assert list(far.tags(NAME)) == sorted(["1", "sha256-%s.sig" % both.digest.encoded])


def test_referrers_stay_behind_if_wanted(store, far, save, load):
    manifest = make_image(store, NAME, "1")
    make_referrer(store, NAME, manifest)
    assert load(save("demo:1", "--no-referrers")).returncode == 0
    assert same(store, far) and list(far.referrers(NAME, manifest.digest)) == []


@pytest.mark.parametrize("name", ["demo", "team/demo", "quay.io/team/demo", "lab.example_5000/demo", "localhost/demo"])
def test_every_name_comes_back_as_it_was(store, far, save, load, name):
    make_image(store, name, "1")
    assert load(save(name + ":1")).returncode == 0
    assert list(far.repositories()) == [name] and same(store, far, name)


def test_an_image_without_a_tag_travels_by_its_digest(store, far, save, load):
    manifest = make_image(store, NAME, None)
    assert load(save("demo@" + manifest.digest)).returncode == 0
    assert far.manifest(NAME, manifest.digest).content == manifest.content and list(far.tags(NAME)) == []


def test_sha512_content_crosses_the_gap(store, far, save, load):
    make_image(store, NAME, "1", algorithm="sha512")
    assert load(save("demo:1")).returncode == 0
    assert same(store, far)


def test_a_list_of_images(store, far, save, load, tmp_path):
    make_image(store, NAME, "1")
    make_image(store, "quay.io/a/b", "latest", layers=(b"b",))
    (tmp_path / "images.txt").write_text("# what we need\ndemo:1\n\nquay.io/a/b  # the other\n")
    assert load(save("-f", tmp_path / "images.txt")).returncode == 0
    assert same(store, far) and same(store, far, "quay.io/a/b", "latest")


def test_one_platform_and_the_index_to_the_byte(store, far, save, load):
    one, two = make_image(store, NAME, None), make_image(store, NAME, None, layers=(b"arm",))
    document = index(one, two)
    for entry, architecture in zip(document["manifests"], ("amd64", "arm64")):
        entry["platform"] = {"os": "linux", "architecture": architecture}
    both = to_manifest(document)
    store.put_manifest(NAME, both, ["1"])
    path = save("demo:1", "--platform", "linux/arm64")
    assert load(path).returncode == 0
    assert far.manifest(NAME, far.resolve(NAME, "1")).content == both.content
    assert far.manifest(NAME, two.digest) and Digest.of(b"layer one") not in set(far.digests())
    assert "(1 not here)" in run_tinyreg("ls", "--root", far.root, NAME).stdout
    assert [record["Layers"] for record in json.loads(members_of(path)["manifest.json"].decode())] \
        == [["blobs/sha256/" + Digest.of(b"arm").encoded]]


def test_a_manifest_without_blobs_that_another_program_stored_is_saved(store, save):
    content = json.dumps({"schemaVersion": 2, "mediaType": tinyreg.OCI_MANIFEST, "layers": []}).encode()
    manifest = tinyreg.Manifest(content, Digest.of(content))
    store.put_manifest(NAME, manifest, ["1"])
    members = members_of(save("demo:1"))
    assert members["blobs/sha256/" + manifest.digest.encoded] == content and "manifest.json" not in members


def test_the_same_images_make_the_same_bytes(store, save, tmp_path):
    for tag in "12":
        make_image(store, NAME, tag, layers=(tag.encode(), b"shared"))
    other = Directory(str(tmp_path / "other"))
    for tag in "21":
        make_image(other, NAME, tag, layers=(tag.encode(), b"shared"))
    first = save("demo:1", "demo:2")
    second = str(tmp_path / "second.tar")
    assert run_tinyreg("save", "--root", other.root, "-o", second, "demo:2", "demo:1").returncode == 0
    assert open(first, "rb").read() == open(second, "rb").read()
    with tarfile.open(first) as archive:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in archive} == {(0, 0, 0, "")}
        assert archive.getnames()[:4] == ["tinyreg.py", "oci-layout", "index.json", "manifest.json"]


def test_every_python_makes_the_same_bytes(store, save, tmp_path):
    make_image(store, NAME, "1", algorithm="sha512")
    wanted = open(save("demo:1"), "rb").read()
    for version, python in found_pythons().items():
        path = str(tmp_path / ("%d.%d.tar" % version))
        run_tinyreg("save", "--root", store.root, "-o", path, "demo:1", python=python)
        assert open(path, "rb").read() == wanted


def test_a_blob_beyond_the_octal_size_has_a_header_that_tar_reads(tmp_path):
    with open(str(tmp_path / "large.tar"), "wb") as file:
        file.write(tar_header("large", 9 << 30))
        file.truncate((9 << 30) + 512 + 1024)
    assert subprocess.check_output(["tar", "-tvf", file.name], universal_newlines=True).split()[2] == str(9 << 30)
    with open(file.name, "rb", buffering=0) as file:
        assert [(entry.name, entry.size) for entry in iter_tar(file)] == [("large", 9 << 30)]


def test_stdout_has_the_same_bytes_and_stdin_takes_them(store, far, save, tmp_path):
    make_image(store, NAME, "1")
    path = save("demo:1", "--no-self")
    streamed = subprocess.run([sys.executable, TINYREG, "save", "--root", store.root, "--no-self", "-o", "-", "demo:1"],
                              stdout=subprocess.PIPE, check=True).stdout
    assert streamed == open(path, "rb").read() and "tinyreg.py" not in members_of(path)
    for content in streamed, gzip.compress(streamed):
        shutil.rmtree(far.root)
        subprocess.run([sys.executable, TINYREG, "load", "--root", far.root, "--quiet", "-"], input=content, check=True)
        assert same(store, far)
        assert os.listdir(os.path.join(far.root, "tinyreg", "scratch")) == []


def test_the_archive_brings_what_serves_it(store, save, tmp_path):
    make_image(store, NAME, "1")
    subprocess.run(["tar", "-xf", save("demo:1"), "tinyreg.py"], cwd=str(tmp_path), check=True)
    assert (tmp_path / "tinyreg.py").read_bytes() == open(TINYREG, "rb").read()
    assert os.access(str(tmp_path / "tinyreg.py"), os.X_OK)


def test_a_dry_run_says_how_much_and_writes_nothing(store, tmp_path, save):
    make_image(store, NAME, "1")
    path = tmp_path / "dry.tar"
    done = run_tinyreg("save", "--root", store.root, "--dry-run", "--json", "-o", path, "demo:1")
    assert not path.exists()
    assert json.loads(done.stdout)["bytes"] == os.path.getsize(save("demo:1"))


def test_a_dry_run_lists_the_images_and_the_size_of_each_file(parts, store, tmp_path):
    done = run_tinyreg("save", "--root", store.root, "--dry-run", "-o", tmp_path / "images.tar", "--split", "1M",
                       "--no-self", "demo:1", "quay.io/other:1")
    lines = done.stdout.splitlines()
    assert lines[3:] == ["  %s  %d bytes" % (path, os.path.getsize(path)) for path in parts]
    assert [line.split() for line in lines[1:3]] == [
        ["demo:1", "3.0", "MiB", store.resolve(NAME, "1")],
        ["quay.io/other:1", "1.0", "MiB", store.resolve("quay.io/other", "1")]]


def test_save_shows_on_a_terminal_how_far_it_is_and_clears_that(store, tmp_path):
    make_image(store, NAME, "1", layers=(LARGE,))
    master, slave = pty.openpty()
    subprocess.run([sys.executable, TINYREG, "save", "--root", store.root, "-o", "x.tar", "demo:1"], check=True,
                   cwd=str(tmp_path), stderr=slave, stdout=subprocess.DEVNULL)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    os.close(slave)
    assert re.match(r"\rx.tar \[[#-]{20}\] \d+ %, in total [^\r]+ of 3\.\d MiB\x1b\[K", shown)
    assert shown.endswith("\r\x1b[K")


@pytest.fixture
def writer(store, tmp_path):
    """What is to be saved as images.tar."""
    make_image(store, NAME, "1")
    writer = ArchiveWriter()
    copy(store, writer, NAME, "1")
    writer.plan(str(tmp_path / "images.tar"))
    return writer


def leftovers(folder):
    return sorted(name for name in os.listdir(str(folder)) if name.endswith(".part"))


def test_the_next_save_deletes_what_a_killed_one_has_left_and_nothing_else(store, writer, save, tmp_path):
    process = os.fork()
    if process == 0:
        try:
            writer.save(lambda count: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    os.waitpid(process, 0)
    killed, = leftovers(tmp_path)
    others = ["images.tar.0123456.part", "images.tar.part", "other.tar.01234567.part", "images-old.tar.01234567.part"]
    for name in others + ["images-1of2.tar.01234567.part"]:
        (tmp_path / name).write_bytes(b"a part of something else")
    assert killed.startswith("images.tar.")
    run_tinyreg("save", "--root", store.root, "--dry-run", "-o", tmp_path / "images.tar", "demo:1")
    assert killed in leftovers(tmp_path)
    save("demo:1")
    assert leftovers(tmp_path) == sorted(others)


def test_a_save_leaves_alone_what_another_one_is_writing(writer, save, load, tmp_path):
    during = []

    def save_meanwhile(count):
        if not during:
            during.extend(leftovers(tmp_path))
            save("demo:1")
            assert leftovers(tmp_path) == during

    writer.save(save_meanwhile)
    assert len(during) == 1 and leftovers(tmp_path) == []
    assert load(str(tmp_path / "images.tar")).returncode == 0


def test_save_replaces_no_device_and_no_archive_by_its_lock_file_and_follows_a_link(store, load, tmp_path):
    """As root, `save -o /dev/null` would have made a file of it."""
    make_image(store, NAME, "1")
    pipe, link, file = (str(tmp_path / name) for name in ("pipe", "link.tar", "x.tar"))
    os.mkfifo(pipe)
    for words, status, told in (
            (["save", "-o", pipe, "demo:1"], 1, "no file that could be replaced"),
            (["save", "-o", file, "demo:1", "--lock", pipe], 2, "can't be written"),
            (["save", "-o", file, "demo:1", "--lock", tmp_path / "." / "x.tar"], 1, "would replace the archive"),
            (["gc", "--only", file, "--plan", pipe], 2, "can't be written")):
        done = run_tinyreg(*words, "--root", store.root)
        assert done.returncode == status and told in done.stderr and done.stderr.count("\n") == 1
    os.symlink("x.tar", link)
    assert stat.S_ISFIFO(os.stat(pipe).st_mode) and not os.path.exists(file)
    run_tinyreg("save", "-o", link, "demo:1", "--root", store.root)
    assert os.path.islink(link) and load(file).returncode == 0


def test_serve_reads_a_manifest_once_however_many_names_it_has(store, save, monkeypatch):
    """A hundred thousand names may lead to one manifest of 4 MiB."""
    make_image(store, NAME, "1")
    archive = Archive([save("demo:1")])
    archive.names.update(("demo%d" % number, archive.names[NAME]) for number in range(100))
    reads, parse = [], tinyreg.parse_manifest
    monkeypatch.setattr(tinyreg, "parse_manifest", lambda *words, **more: reads.append(words) or parse(*words, **more))
    assert archive.lacking() == set() and len(reads) == 2  # what it mentions is kept, and what it is not


def test_an_archive_is_encrypted_and_decrypted_on_its_way(store, far):
    require("gpg")
    make_image(store, NAME, "1")
    with private_folder("gpg") as folder:
        gpg = "gpg --homedir %s --batch --quiet --pinentry-mode loopback --passphrase secret" % folder
        command = "set -eu; %s {0} save --root {1} -o - demo:1 | {3} -c > {4}/x.gpg; {3} -d {4}/x.gpg | " \
                  "%s {0} load --root {2} -"
        run("sh", "-c", (command % (sys.executable, sys.executable)).format(TINYREG, store.root, far.root, gpg, folder))
        with open(folder + "/x.gpg", "rb") as file:
            assert b"layer one" not in file.read()
        run("gpgconf", "--homedir", folder, "--kill", "all")
    assert same(store, far)


def test_a_damaged_blob_is_not_saved_and_the_old_archive_stays(store, save, tmp_path):
    make_image(store, NAME, "1")
    path = save("demo:1")
    before = open(path, "rb").read()
    with open(store.layout.blob_path(Digest.of(b"layer one")), "wb") as file:
        file.write(b"layer 0ne")
    done = run_tinyreg("save", "--root", store.root, "-o", path, "demo:1")
    assert done.returncode == 1 and Digest.of(b"layer one") in done.stderr and done.stderr.count("\n") == 1
    assert open(path, "rb").read() == before
    assert not [name for name in os.listdir(str(tmp_path)) if name.endswith(".part")]


def test_an_image_that_is_not_there(store, tmp_path):
    done = run_tinyreg("save", "--root", store.root, "-o", tmp_path / "x.tar", "nothing:1")
    assert done.returncode == 1 and "nothing:1: not in the store" in done.stderr and not (tmp_path / "x.tar").exists()


# One image out of many

@pytest.fixture
def many(store, tmp_path):
    """An archive with five images; its file."""
    names = [("docker.io/library/alpine", "3.18"), ("docker.io/library/alpine", "3.19"), ("team/app", "1"),
             ("team/web", "1")]
    for name, tag in names:
        make_image(store, name, tag, layers=(name.encode(), tag.encode()))
    digest = make_image(store, "team/app", None, layers=(b"untagged",)).digest
    make_referrer(store, "team/web", store.manifest("team/web", store.resolve("team/web", "1")))
    words = ["%s:%s" % image for image in names] + ["team/app@" + digest]
    assert run_tinyreg("save", "--root", store.root, "-o", tmp_path / "many.tar", *words).returncode == 0
    return tmp_path / "many.tar"


@pytest.mark.parametrize("words, expected", [
    (["alpine:3.19"], ["docker.io/library/alpine:3.19"]),  # as save takes it
    (["team/**"], ["team/app:1", "team/app@", "team/web:1"]),
    (["team/app:1", "docker.io/**"], ["docker.io/library/alpine:3.18", "docker.io/library/alpine:3.19", "team/app:1"]),
    (["team/*:1", "--exclude", "team/web:*"], ["team/app:1"]),
    (["--exclude", "docker.io/**"], ["team/app:1", "team/app@", "team/web:1"]),
    (["alpine:*", "--newest", "1"], ["docker.io/library/alpine:3.19"]),
    (["--newest", "1"], ["docker.io/library/alpine:3.19", "team/app:1", "team/web:1"]),
    (["-f", "list.txt"], ["docker.io/library/alpine:3.18"]),
    (["-f", "images.lock"], ["docker.io/library/alpine:3.19"]),
])
def test_load_takes_the_images_that_are_named_and_their_blobs_alone(store, far, many, tmp_path, words, expected):
    (tmp_path / "list.txt").write_text("alpine:3.18  # the old one\n")
    digest = store.resolve("docker.io/library/alpine", "3.19")
    (tmp_path / "images.lock").write_text("docker.io/library/alpine:3.19@%s\n" % digest)
    done = run_tinyreg("load", many, *words, "--root", far.root, cwd=str(tmp_path))
    assert done.returncode == 0, done.stderr
    present = [(name, tag) for name in far.repositories() for tag in [*far.tags(name), *far.pinned(name)]]
    assert [("%s@" if ":" in tag else "%s:" + tag) % name for name, tag in present] == expected
    wanted = set()
    for name, reference in present:
        plan = tinyreg.Plan(store, name, reference)
        plan.plan()
        wanted |= set(plan.blobs) | set(plan.manifests)
    assert set(far.digests()) == wanted


def test_load_says_which_named_image_an_archive_lacks(far, many):
    done = run_tinyreg("load", many, "team/app:2", "team/web:1", "--root", far.root)
    assert done.returncode == 1
    assert "team/app:2: no such file, and not in %s as team/app:2, but as 1; " % many in done.stderr
    assert list(far.repositories()) == ["team/web"]
    for words, reason in ((["nobody/**"], "nobody/** fits no image in "), (["--exclude", "**"], "no image is left"),
                          ([many.with_name("meny.tar")], "meny.tar: no such file, and ")):
        done = run_tinyreg("load", many, *words, "--root", far.root)
        assert done.returncode == 1 and reason in done.stderr and len(done.stderr.splitlines()) == 1
    assert list(far.repositories()) == ["team/web"]


# Differences

def test_only_what_the_far_side_lacks_travels(store, far, save, load, tmp_path):
    make_image(store, NAME, "1", layers=(LARGE, b"one"))
    assert load(save("demo:1")).returncode == 0
    make_image(store, NAME, "2", layers=(LARGE, b"two"))
    have = tmp_path / "have.txt"
    have.write_text(run_tinyreg("ls", "--root", far.root, "--digests").stdout)
    difference = save("demo:2", "--have", have, name="difference.tar")
    members = members_of(difference)
    assert set(members) == {
        "tinyreg.py", "oci-layout", "index.json", "tinyreg-parts.json",
        "blobs/sha256/" + Digest.of(b"two").encoded,
        "blobs/sha256/" + store.resolve(NAME, "2").encoded}
    left_out = json.loads(members["tinyreg-parts.json"].decode())["left_out"]
    assert left_out == sorted([Digest.of(LARGE), Digest.of(CONFIG)])
    assert load(difference).returncode == 0 and same(store, far, tag="2")
    assert open(save("demo:2", "--have", tmp_path / "images.tar"), "rb").read() == open(difference, "rb").read()


def test_what_to_leave_out_may_be_in_several_files(store, save, tmp_path):
    """As `--have images-*.tar` has it."""
    for name in "abc":
        make_image(store, name, "1", layers=(name.encode(), b"of all"))
    files = [save(name + ":1", name=name + ".tar") for name in "ab"]
    both = save("a:1", "b:1", "c:1", "--have", *files, name="rest.tar")
    blobs = {name for name in members_of(both) if name.startswith("blobs/")}
    assert blobs == {"blobs/sha256/" + digest.partition(":")[2] for digest in
                     [Digest.of(b"c")] + [store.resolve(name, "1") for name in "abc"]}
    done = run_tinyreg("save", "--root", store.root, "-o", tmp_path / "x.tar", "--have", files[0],
                       "c:1")
    assert done.returncode == 1 and "images are named before --have" in done.stderr
    assert not (tmp_path / "x.tar").exists()


def test_load_says_what_arrived_and_when(store, far, save, load):
    one = make_image(store, "a", "1")
    make_image(store, "b", "1", layers=(b"left out",))
    archive = save("a:1", "b:1")
    with open(archive, "rb") as file:
        content = file.read()
    with open(archive, "wb") as file:
        file.write(content.replace(b"left out", b"left 0ut"))
    before = time.time()
    images = json.loads(load(archive, "--json").stdout)["images"]
    arrived = calendar.timegm(time.strptime(images[0]["arrived"], "%Y-%m-%dT%H:%M:%SZ"))
    assert (images[0]["image"], images[0]["digest"]) == ("a:1", one.digest)
    assert before - 1 <= arrived <= time.time()
    assert images[1]["image"] == "b:1" and images[1]["arrived"] is None


def test_a_receipt_says_what_came_from_where_and_what_is_missing_and_save_leaves_that_out(
        store, far, save, load, tmp_path):
    """Of an image that has not arrived whole, blobs may be deleted again on the far side."""
    one = make_image(store, "a", "1")
    make_referrer(store, "a", one, config=b"{}")
    make_image(store, "b", "1", layers=(b"of b", b"lacked"))
    first = save("a:1")
    second = save("b:1", "--have", write(tmp_path / "have.txt", Digest.of(b"lacked")), name="second.tar")
    (tmp_path / "cut.tar").write_bytes(open(first, "rb").read()[:-3000])
    done = load(first, second, str(tmp_path / "cut.tar"), "--json")
    receipt = json.loads(done.stdout)
    assert done.returncode == 1 and receipt["store"] == far.root
    assert abs(calendar.timegm(time.strptime(receipt["finished"], "%Y-%m-%dT%H:%M:%SZ")) - time.time()) < 600
    assert [file["file"] for file in receipt["files"]] == [first, second, str(tmp_path / "cut.tar")]
    assert [bool(file["error"]) for file in receipt["files"]] == [False, False, True]
    image_a, image_b = receipt["images"]
    assert (image_a["digest"], image_a["total_bytes"]) == (one.digest, sum(blob.size for blob in one.blobs) + 2)
    assert len(image_a["referrers"]) == 1 and image_a["arrived"] and not image_b["arrived"]
    assert receipt["missing"] == image_b["missing"] == [Digest.of(b"lacked")]
    assert set(receipt["holds"]) == {blob.digest for blob in one.blobs} | {Digest.of(b"{}")}
    (tmp_path / "receipt.json").write_text(done.stdout)
    rest = save("a:1", "b:1", "--have", tmp_path / "receipt.json", name="rest.tar")
    assert Digest.of(b"of b") in Archive([rest]).digests() and Digest.of(b"layer one") not in Archive([rest]).digests()
    assert load(rest).returncode == 0 and same(store, far, "b")


def test_where_nothing_comes_back_save_leaves_out_what_its_lists_say_was_sent(store, far, save, load, tmp_path):
    files = []
    for number, layer in enumerate((b"first", b"second", b"third")):
        make_image(store, "a", str(number), layers=(b"base", layer))
        have = ["--have"] + files if files else []
        path = tmp_path / ("%d.tar" % number)
        done = run_tinyreg("save", "--root", store.root, "-o", path, "a:%d" % number, "--json", *have)
        files.append(write(tmp_path / ("sent-%d.json" % number), done.stdout))
        assert {blob for blob in Archive([str(path)]).blobs if blob in (Digest.of(b"base"), Digest.of(layer))} == (
            {Digest.of(layer)} if number else {Digest.of(b"base"), Digest.of(layer)})
        assert load(str(path)).returncode == 0 and same(store, far, "a", str(number))


def test_there_is_one_blob_and_there_are_two(store, save, load):
    make_image(store, "a", "1", layers=())
    archive = save("a:1")
    done = run_tinyreg("save", "--root", store.root, "a:1", "-o", archive)
    assert ": 1 image, " in done.stdout and " in 1 file\n" in done.stdout
    assert " in 1 blob, 0 there already" in load(archive).stdout
    assert " in 0 blobs, 1 there already" in load(archive).stdout
    assert run_tinyreg("verify", "--root", store.root).stdout.startswith("2 blobs, ")


def test_no_tag_before_all_is_there_and_what_is_missing_is_written_down(store, far, save, load, tmp_path):
    make_image(store, NAME, "1", layers=(b"base", b"one"))
    have, want = tmp_path / "have.txt", tmp_path / "want.txt"
    have.write_text(Digest.of(b"base") + "\n")
    difference = save("demo:1", "--have", have)
    done = load(difference, "--want", want)
    assert done.returncode == 1 and Digest.of(b"base") in done.stderr and "Traceback" not in done.stderr
    assert "left out on purpose" in done.stderr and done.stderr.count("\n") == 2
    assert want.read_text().splitlines()[1:] == [Digest.of(b"base")]
    refused = run_tinyreg("save", "demo:1", "--root", store.root, "-o", tmp_path / "x.tar", "--have", want)
    assert refused.returncode == 1 and "--have %s: it is neither" % want in refused.stderr  # it says the contrary
    assert list(far.repositories()) == []
    push_blob(far, "another", b"base")
    assert load(difference, "--want", want).returncode == 0
    assert same(store, far) and want.read_text() == ""


# Parts

@pytest.fixture
def parts(store, save, tmp_path):
    """The parts of two images, one with a blob larger than a part."""
    make_image(store, NAME, "1", layers=(LARGE, b"small"))
    make_image(store, "quay.io/other", "1", layers=(LARGE[:600000], LARGE[7:500000]))
    save("demo:1", "quay.io/other:1", "--split", "1M", "--no-self")
    return sorted(str(path) for path in tmp_path.glob("images-*.tar"))


@pytest.mark.parametrize("seed", range(3))
def test_parts_load_one_by_one_in_any_order(store, far, load, parts, seed):
    assert len(parts) > 4 and all(os.path.getsize(path) <= 1 << 20 for path in parts)
    random.Random(seed).shuffle(parts)
    statuses = [load(path).returncode for path in parts]
    assert statuses[:-1] == [1] * (len(parts) - 1) or 0 not in statuses[:-2]
    assert statuses[-1] == 0 and same(store, far) and same(store, far, "quay.io/other")
    kept = os.path.join(far.root, "tinyreg", "ranges")
    assert [files for _, _, files in os.walk(kept) if files] == []


def test_parts_that_do_not_say_what_each_holds_load_as_they_always_did(store, far, load, parts, tmp_path):
    """Earlier versions wrote only which files there are, and how blobs were cut."""
    described = json.loads(members_of(parts[0])["tinyreg-parts.json"].decode())
    table = json.dumps({key: described[key] for key in ("files", "joined")}).encode()
    early = [make_tar(tmp_path / ("early%d.tar" % number), dict(members_of(part), **{"tinyreg-parts.json": table}))
             for number, part in enumerate(parts)]
    done = run_tinyreg("verify", *early)
    assert done.returncode == 0 and "all is well" in done.stdout
    done = run_tinyreg("verify", *early[1:])
    assert done.returncode == 1 and "missing blob" in done.stdout and NAME + ":1" in done.stdout
    for path in early[:-1]:
        done = load(path)
        assert done.returncode == 1 and "missing in the source" in done.stderr and "needed" not in done.stderr
    done = load(early[-1])
    assert (done.returncode, done.stderr) == (0, "")
    assert same(store, far) and same(store, far, "quay.io/other")


def test_all_parts_at_once_and_which_are_missing(store, far, load, parts):
    done = load(*parts[:-1])
    assert done.returncode == 1 and done.stderr.endswith("; still needed: %d\n" % len(parts))
    assert load(*parts).returncode == 0 and same(store, far)


def test_a_part_says_once_what_is_taken_and_what_is_still_needed(store, far, load, parts, tmp_path):
    """By what is in the files, whatever they are called."""
    renamed = [str(tmp_path / ("stick%d" % number)) for number in range(len(parts))]
    for path, name in zip(parts, renamed):
        shutil.copy(path, name)
    total = len(parts)
    done = load(renamed[0])
    assert done.returncode == 1 and NAME not in done.stdout
    assert done.stderr == "tinyreg: part 1 of %d taken; 0 of 2 images complete; still needed: %s\n" % (
        total, ", ".join(str(number) for number in range(2, total + 1)))
    done = load(renamed[2], renamed[1])
    assert done.stderr == "tinyreg: parts 2, 3 of %d taken; 0 of 2 images complete; still needed: %s\n" % (
        total, ", ".join(str(number) for number in range(4, total + 1)))
    done = load(*renamed[3:])
    assert (done.returncode, done.stderr) == (0, "") and same(store, far)


def test_ls_and_serve_say_which_parts_have_what_is_lacking(parts, start_server):
    entries = json.loads(run_tinyreg("ls", "--json", *parts[1:]).stdout)
    assert [(entry["lacking"] > 0, entry["needs"]) for entry in entries] == [(True, [os.path.basename(parts[0])])] * 2
    lines = run_tinyreg("ls", *parts[1:]).stdout.splitlines()
    assert lines[1].endswith(" of images-1of5.tar") and lines[-1] == "parts 2, 3, 4, 5 of 5"
    assert run_tinyreg("ls", parts[2]).stdout.endswith("\npart 3 of 5\n")
    lines = run_tinyreg("ls", *parts).stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["complete"] * 2 and lines[3] == "parts 1, 2, 3, 4, 5 of 5"
    for given, says in ((parts[1:], True), (parts, False)):
        server = start_server(None, *given)
        server.stop()
        assert ("of which save --have left out 0: what needs them can't" in server.banner) is says


def test_ls_of_an_archive_names_what_is_about_an_image_and_the_files_of_artifacts(store, save, tmp_path):
    manifest = make_image(store, NAME, "1")
    make_referrer(store, NAME, manifest, artifactType="application/spdx+json")
    make_image(store, NAME, "sha256-%s.sig" % manifest.digest.encoded, layers=(b"signed",))
    (tmp_path / "install.sh").write_bytes(b"#!/bin/sh")
    assert run_tinyreg("add", "--root", store.root, tmp_path / "install.sh", "--to", "files:1").returncode == 0
    path = save("demo:1", "files:1")
    lines = {line.split()[0]: line.split("  ")[-1] for line in run_tinyreg("ls", path).stdout.splitlines()}
    assert lines[NAME + ":1"] == "complete; 1 application/spdx+json, 1 cosign's .sig"
    assert lines["files:1"] == "complete; files: install.sh"
    entries = {entry["tag"]: entry for entry in json.loads(run_tinyreg("ls", "--json", path).stdout)
               if entry["tag"] == "1" and entry["repository"] == NAME}
    assert sorted(referrer["type"] for referrer in entries["1"]["referrers"]) == [
        "application/spdx+json", "cosign's .sig"]


def test_an_artifact_whose_files_lead_out_of_the_folder_is_listed_with_a_warning(tmp_path):
    document = image((b"x",))
    document["layers"][0]["annotations"] = {"org.opencontainers.image.title": "../x"}
    path = make_tar(tmp_path / "x.tar", layout(to_manifest(document), blobs=(b"x", CONFIG)))
    done = run_tinyreg("ls", path)
    assert done.returncode == 0 and "may lead out of the folder" in done.stdout


def test_verify_names_the_part_that_was_not_given_and_no_blobs(parts):
    done = run_tinyreg("verify", *parts[:1] + parts[2:])
    assert done.returncode == 1 and "missing blob" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("part 2 of %d was not given: %s" % (len(parts), os.path.basename(parts[1])))
    assert [line for line in lines[1:-1] if not line.startswith("    harms ")] == []
    assert "what was given is well" in lines[-1]


def test_parts_cannot_come_one_by_one_into_another_registry_and_load_says_so(parts, start_server, tmp_path):
    server = start_server()
    there = ["--to", server.host, "--plain-http"]
    done = run_tinyreg("load", parts[0], *there)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "load all at once" in done.stderr
    done = run_tinyreg("load", *parts + there)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_blob_whose_ranges_are_all_the_same_is_joined_again(store, far, load, tmp_path):
    digest = push_blob(store, NAME, bytes(4 << 20))
    artifact = {"schemaVersion": 2, "mediaType": OCI_ARTIFACT, "artifactType": "x/zeros",
                "blobs": [descriptor(bytes(4 << 20))]}
    store.put_manifest(NAME, to_manifest(artifact), ["1"])
    limit, length = 2 << 20, 0
    while length != 1 << 20:  # until the ranges have a length of which the blob is a multiple
        limit += (1 << 20) - length if length else 0
        writer = ArchiveWriter()
        copy(store, writer, NAME, "1")
        writer.plan(str(tmp_path / "zeros.tar"), None, limit)
        length = writer.blobs[writer.joined[digest][0]].length
    assert len(set(writer.joined[digest])) == len(writer.save()) == 1
    assert load(writer.files[0].path).returncode == 0 and same(store, far)


def test_a_part_lists_for_docker_only_images_that_are_whole_in_it(store, parts, save, tmp_path):
    make_image(store, NAME, "2", layers=(CONFIG,))  # one blob, so it is whole in one part
    save("demo:1", "demo:2", "--split", "1M", name="mixed.tar")
    listed = []
    for path in sorted(tmp_path.glob("mixed-*.tar")):
        members = members_of(path)
        for record in json.loads(members.get("manifest.json", b"[]").decode()):
            assert {record["Config"], *record["Layers"]} <= set(members)
            listed += record["RepoTags"]
    assert listed == [NAME + ":2"]


def test_each_part_is_a_layout_of_its_own_and_names_all_parts_and_what_is_joined(parts):
    contents = [members_of(path) for path in parts]
    for members in contents:
        assert json.loads(members["oci-layout"].decode()) == {"imageLayoutVersion": "1.0.0"}
        for name, content in members.items():
            if name.startswith("blobs/"):
                assert Digest.of(content).encoded == name.split("/")[-1]
        described = json.loads(members["tinyreg-parts.json"].decode())
        assert described["files"] == [os.path.basename(part) for part in parts]
    together = {name: content for members in contents for name, content in members.items()}
    (whole, ranges), = described["joined"].items()
    assert whole == Digest.of(LARGE)
    assert b"".join(together["blobs/" + digest.replace(":", "/")] for digest in ranges) == LARGE


def test_a_damaged_part_is_named_and_replaced_by_itself(store, far, load, parts):
    with open(parts[2], "r+b") as file:
        content = file.read()
        place = content.rindex(LARGE[:1000])
        file.seek(place)
        file.write(b"\0")
    done = run_tinyreg("verify", *parts)
    assert done.returncode == 1
    assert "(%s)\n    harms " % parts[2] in done.stdout and parts[1] not in done.stdout
    done = load(*parts)
    assert done.returncode == 1 and parts[2] + " is damaged" in done.stderr and "{" not in done.stderr
    assert [part for part in parts if part in done.stderr] == [parts[2]]
    assert "; 1 of 2 images complete; still needed: 3\n" in done.stderr
    assert same(store, far, "quay.io/other") and NAME not in done.stdout
    shutil.rmtree(far.root)
    assert parts[2] + " is damaged" in load(parts[2]).stderr
    for path in parts[:2] + parts[3:]:
        done = load(path)
    assert done.stderr.endswith("still needed: 3\n")
    with open(parts[2], "wb") as file:
        file.write(content)
    assert run_tinyreg("verify", "--quiet", *parts).stdout == ""
    assert load(parts[2]).returncode == 0 and same(store, far)


def test_a_file_with_a_damaged_manifest_is_named(store, far, save, load):
    make_image(store, NAME, "1")
    make_image(store, NAME, "2", layers=(b"unharmed",))
    manifest = store.manifest(NAME, store.resolve(NAME, "1")).content
    path, good = save("demo:1", "demo:2"), save("demo:2", name="good.tar")
    with open(path, "r+b") as file:
        content = file.read()
        file.seek(content.index(manifest) + 5)
        file.write(b"!")
    done = load(path, good)
    assert done.returncode == 1 and path + " is damaged: copy it again" in done.stderr
    assert good not in done.stderr and same(store, far, tag="2")


def test_what_is_intact_in_a_part_that_was_cut_off_is_taken(store, far, load, parts):
    with open(parts[2], "r+b") as file:
        content = file.read()
        file.truncate(len(content) // 2 // 512 * 512)
    done = run_tinyreg("verify", *parts)
    assert done.returncode == 1 and "unreadable archive: " in done.stdout
    assert "part 3 of %d was not given" % len(parts) in done.stdout
    done = load(*parts)
    assert done.returncode == 1 and [part for part in parts if part in done.stderr] == [parts[2]]
    assert "copy it again" in done.stderr and "still needed: 3\n" in done.stderr
    assert same(store, far, "quay.io/other")
    with open(parts[2], "wb") as file:
        file.write(content)
    assert load(parts[2]).returncode == 0 and same(store, far)


def test_an_archive_that_is_no_archive_does_not_stop_the_others(store, far, save, load, tmp_path):
    make_image(store, NAME, "1")
    (tmp_path / "noise.tar").write_bytes(LARGE[:5000])
    done = load(tmp_path / "noise.tar", save("demo:1"))
    assert done.returncode == 1 and same(store, far)
    assert done.stderr == "tinyreg: %s: not a tar file\n" % (tmp_path / "noise.tar")


def test_parts_that_are_whole_and_not_the_blob_s_are_damage(parts, tmp_path):
    described = json.loads(members_of(parts[0])["tinyreg-parts.json"].decode())
    described["joined"][Digest.of(LARGE)].reverse()
    swapped = [make_tar(tmp_path / ("swapped%d.tar" % number),
                        dict(members_of(part), **{"tinyreg-parts.json": json.dumps(described).encode()}))
               for number, part in enumerate(parts)]
    assert run_tinyreg("verify", *parts).returncode == 0
    done = run_tinyreg("verify", *swapped)
    assert done.returncode == 1 and Digest.of(LARGE) in done.stdout and NAME + ":1" in done.stdout


def test_the_end_of_a_joined_blob(parts):
    with Archive(parts).open_blob(NAME, Digest.of(LARGE), len(LARGE) + 1) as blob:
        assert blob.readinto(memoryview(bytearray(10))) == 0


def test_a_layer_is_no_manifest(store, save):
    make_image(store, NAME, "1", layers=(b"layer",))
    with pytest.raises(RegistryError) as caught:
        Archive([save("demo:1")]).manifest(NAME, Digest.of(b"layer"))
    assert caught.value.code == "MANIFEST_UNKNOWN"


def test_a_part_that_does_not_fit_leaves_nothing_behind(far, parts, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        tinyreg.keep_ranges(far, Archive(parts[:-1]))
    assert os.listdir(far.files.scratch) == []


def test_what_two_cut_blobs_have_in_common_travels_once(store, far, save, load, tmp_path):
    make_image(store, NAME, "1", layers=(LARGE + b"one",))
    make_image(store, "quay.io/other", "1", layers=(LARGE + b"two",))
    save("demo:1", "quay.io/other:1", "--split", "1M", "--no-self")
    parts = sorted(str(path) for path in tmp_path.glob("images-*.tar"))
    assert sum(map(os.path.getsize, parts)) < len(LARGE) * 3 // 2
    assert [load(path).returncode for path in reversed(parts)][-1] == 0
    assert same(store, far) and same(store, far, "quay.io/other")


def test_parts_are_served_together(store, parts):
    archive = Archive(parts)
    assert same(store, archive)
    with archive.open_blob(NAME, Digest.of(LARGE)) as blob:
        part = blob.part(1000000, 500000)
        view, got = memoryview(bytearray(70000)), b""
        count = 1
        while count:
            count = part.readinto(view)
            got += bytes(view[:count])
        assert got == LARGE[1000000:1500000]


def test_a_part_too_small_for_the_manifests(store, tmp_path):
    make_image(store, NAME, "1")
    done = run_tinyreg("save", "--root", store.root, "--split", "10K", "-o", tmp_path / "x.tar", "demo:1")
    assert done.returncode == 1 and "has to be larger" in done.stderr


# Verifying

def test_verify_names_damage_the_images_it_harms_and_what_is_missing(store, save, tmp_path):
    make_image(store, NAME, "1", layers=(b"layer one", b"layer two"))
    make_image(store, NAME, "2", layers=(b"unharmed",))
    path = save("demo:1", "demo:2")
    assert run_tinyreg("verify", path).returncode == 0
    content = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(content.replace(b"layer one", b"layer 0ne"))
    done = run_tinyreg("verify", "--json", path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["damage"] == [
        {"what": "damaged blob", "name": Digest.of(b"layer one"), "path": path, "harms": [NAME + ":1"]}]


def test_what_was_left_out_on_purpose_is_no_damage(store, save):
    make_image(store, NAME, "2", layers=(b"unharmed",))
    path = save("demo:2")
    difference = save("demo:2", "--have", path, name="difference.tar")
    done = run_tinyreg("verify", difference)
    assert done.returncode == 0 and "all is well" in done.stdout
    assert "; 2 blobs left out: on the far side already" in done.stdout
    assert json.loads(run_tinyreg("verify", "--json", difference).stdout)["left_out"] == 2
    done = run_tinyreg("verify", path, difference)
    assert (done.returncode, done.stderr) == (0, "") and "left out" not in done.stdout


def test_save_prints_the_sha256_of_what_it_wrote(store, tmp_path):
    make_image(store, NAME, "1")
    path = str(tmp_path / "images.tar")
    done = run_tinyreg("save", "--root", store.root, "-o", path, "demo:1")
    assert Digest.of(open(path, "rb").read()) in done.stdout


def test_a_damaged_archive_gives_its_other_images(store, far, save, load):
    make_image(store, NAME, "1", layers=(b"layer one",))
    make_image(store, NAME, "2", layers=(b"unharmed",))
    path = save("demo:1", "demo:2")
    content = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(content.replace(b"layer one", b"layer 0ne"))
    done = load(path)
    assert done.returncode == 1 and NAME + ":1" in done.stderr and NAME + ":1" not in done.stdout
    assert path + " is damaged: copy it again" in done.stderr and "{" not in done.stderr
    assert list(far.tags(NAME)) == ["2"] and same(store, far, tag="2")


# Serving

def test_archives_are_served_with_ranges_and_refuse_writes(store, save, start_server, tmp_path):
    make_image(store, NAME, "1", layers=(LARGE,))
    make_image(store, "quay.io/other", "1")
    server = start_server(None, save("demo:1"), save("quay.io/other:1", name="second.tar"))
    assert server.ask("GET", "/v2/_catalog").json == {"repositories": [NAME, "quay.io/other"]}
    blob = "/v2/%s/blobs/%s" % (NAME, Digest.of(LARGE))
    assert server.ask("GET", blob)[::2] == (200, LARGE)
    assert server.ask("GET", blob, Range="bytes=5-1000004")[::2] == (206, LARGE[5:1000005])
    refused = server.ask("POST", "/v2/%s/blobs/uploads/" % NAME)
    assert refused.status == 403 and b"read-only" in refused.body
    assert not os.path.exists(server.root)


def test_a_blob_in_parts_is_served(parts, start_server):
    server = start_server(None, *parts)
    blob = "/v2/%s/blobs/%s" % (NAME, Digest.of(LARGE))
    assert server.ask("GET", blob)[::2] == (200, LARGE)
    assert server.ask("GET", blob, Range="bytes=900000-1200000")[::2] == (206, LARGE[900000:1200001])


def test_ten_thousand_blobs_are_ready_without_reading_a_layer(tmp_path, monkeypatch):
    layers = [b"%d" % number * 20 for number in range(10000)]
    manifests = [to_manifest(image(layers[start:start + 100])) for start in range(0, 10000, 100)]
    names = [{"io.containerd.image.name": "docker.io/library/demo:%d" % number} for number in range(100)]
    path = make_tar(tmp_path / "many.tar", layout(*manifests, blobs=[CONFIG] + layers, names=names))
    real, read = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *arguments: read.append(arguments[1]) or real(*arguments))
    archive = Archive([path])
    assert sorted(archive.repositories()) == [NAME] and len(list(archive.tags(NAME))) == 100
    headers = len(read) - 100 - 10
    assert headers < 10200
    index_size = len(members_of(path)["index.json"])
    assert sum(read) < 512 * 10200 + index_size + 4 * sum(len(manifest.content) for manifest in manifests) + (1 << 20)
    assert read_blob(archive, NAME, Digest.of(layers[4321])) == layers[4321]


# What others write

def test_an_oci_layout_as_a_directory_a_tar_and_a_tar_of_the_directory(tmp_path, far, load):
    manifest = to_manifest(image())
    members = layout(manifest, blobs=(CONFIG, b"layer one", b"layer two"),
                     names=[{"org.opencontainers.image.ref.name": "1"}])
    folder = tmp_path / "Demo"
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    subprocess.run(["tar", "-C", str(tmp_path), "-cf", str(tmp_path / "other.tar"), "Demo"], check=True)
    tar = make_tar(tmp_path / "plain.tar", members)
    with open(tar, "rb") as file, gzip.open(str(tmp_path / "packed.tar.gz"), "wb") as packed:
        packed.write(file.read())
    for path in folder, tmp_path / "other.tar", tar, tmp_path / "packed.tar.gz":
        assert load(path).returncode == 0
    assert {(name, far.resolve(name, "1")) for name in far.repositories()} == \
        {(name, manifest.digest) for name in ("demo", "other", "plain", "packed")}


@pytest.mark.parametrize("annotations, name, tag", [
    ({"org.opencontainers.image.ref.name": "v1"}, "file", "v1"),
    ({"org.opencontainers.image.ref.name": "quay.io/a/b:v1"}, "quay.io/a/b", "v1"),
    ({"org.opencontainers.image.ref.name": "library/demo:1", "io.containerd.image.name": "docker.io/library/demo:1"},
     NAME, "1"),
    ({"org.opencontainers.image.ref.name": "1", "io.containerd.image.name": "lab.example:5000/x:1"},
     "lab.example_5000/x", "1"),
    ({"tinyreg.name": "a/b"}, "a/b", "latest"),
    ({"io.containerd.image.name": "quay.io/a/b:1@sha256:" + "1" * 64}, "quay.io/a/b", "1"),
    ({"org.opencontainers.image.ref.name": "Not A Name"}, "file", "latest"),
    (None, "file", "latest"),
])
def test_names_as_others_write_them(tmp_path, annotations, name, tag):
    manifest = to_manifest(image())
    archive = Archive([make_tar(tmp_path / "file.tar", layout(manifest, names=[annotations]))])
    assert [(found, list(archive.tags(found))) for found in archive.repositories()] == [(name, [tag])]


@pytest.mark.parametrize("command", ["load", "verify", "ls"])
def test_what_an_archive_says_neither_moves_the_cursor_nor_ends_it(tmp_path, store, command):
    odd, plain = to_manifest(image(artifactType=EVIL)), to_manifest(image(layers=(b"another",)))
    about = {"mediaType": odd.media_type, "digest": odd.digest, "size": len(odd.content)}
    referrer = to_manifest(image(subject=about, artifactType=EVIL))
    members = layout(odd, referrer, plain, blobs=(CONFIG, b"layer one", b"layer two", b"another"),
                     names=[{OWN_NAME: "a:1"}, {OWN_NAME: EVIL, SUBJECT: odd.digest},
                            {OWN_NAME: "b:1"}])
    archive = make_tar(tmp_path / "file.tar", members)
    done = run_tinyreg(command, "--root", store.root, archive)
    assert (done.returncode, done.stderr) == (0, "") and is_harmless(done.stdout)
    assert json.loads(run_tinyreg(command, "--root", store.root, archive, "--json").stdout)
    parts = {"files": [EVIL], "joined": {EVIL: []}}
    members.update({"index.json": b"{}", PARTS: json.dumps(parts).encode()})
    done = run_tinyreg(command, "--root", store.root, make_tar(tmp_path / "odd.tar", members))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and is_harmless(done.stderr)


def test_every_image_of_a_folder_of_images_is_loaded_and_keeps_its_name(tmp_path, far, load):
    """As skopeo sync --dest dir writes them, with --scoped and without."""
    names = ["alpine:3.19", "docker.io/library/demo:1", "docker.io/library/demo:2", "localhost:5000/x:1"]
    manifests = [to_manifest(image((name.encode(),))) for name in names]
    members = {}
    for name, manifest in zip(names, manifests):
        for content in CONFIG, name.encode():
            members["%s/%s" % (name, Digest.of(content).encoded)] = content
        members[name + "/manifest.json"] = manifest.content
        members[name + "/version"] = b"Directory Transport Version: 1.1\n"
    folder = tmp_path / "synced"
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    expected = {("alpine", "3.19"): 0, (NAME, "1"): 1, (NAME, "2"): 2, ("localhost_5000/x", "1"): 3}
    for path in folder, make_tar(tmp_path / "synced.tar", members):
        assert load(path).returncode == 0
        stored = {(name, tag): far.resolve(name, tag) for name in far.repositories() for tag in far.tags(name)}
        assert stored == {image: manifests[number].digest for image, number in expected.items()}
        shutil.rmtree(far.root)
    assert load(folder / "docker.io/library/demo:2").returncode == 0
    assert far.resolve("demo", "2") == manifests[2].digest


def test_layouts_beside_each_other_are_all_loaded(tmp_path, far, load):
    one, two = to_manifest(image((b"one",))), to_manifest(image((b"two",)))
    members = {}
    for name, manifest, layer in ("one", one, b"one"), ("two", two, b"two"):
        members.update({name + "/" + path: content
                        for path, content in layout(manifest, blobs=(CONFIG, layer)).items()})
    assert load(make_tar(tmp_path / "both.tar", members)).returncode == 0
    assert (far.resolve("one", "latest"), far.resolve("two", "latest")) == (one.digest, two.digest)


def test_what_cosign_saved_has_its_signatures_under_cosigns_tags(tmp_path, far, load):
    manifest, signature, attestation = [to_manifest(image((layer,))) for layer in (b"it", b"sig", b"att")]
    kinds = [{"kind": "dev.cosignproject.cosign/" + kind} for kind in ("image", "sigs", "atts")]
    path = make_tar(tmp_path / "saved.tar", layout(manifest, signature, attestation, names=kinds,
                                                   blobs=(CONFIG, b"it", b"sig", b"att")))
    assert load(path).returncode == 0
    about = "sha256-" + manifest.digest.encoded
    assert {tag: far.resolve("saved", tag) for tag in far.tags("saved")} == {
        "latest": manifest.digest, about + ".sig": signature.digest, about + ".att": attestation.digest}


def entry_names(name, kind=None, **more):
    """The annotations of hauler: signatures, too, have the name of their image."""
    return dict({"kind": kind and "dev.hauler/" + kind, "io.containerd.image.name": name,
                 "org.opencontainers.image.ref.name": name.partition("/")[2]}, **more)


@pytest.mark.parametrize("is_for_containerd", [False, True])
def test_a_haul_has_its_images_charts_and_signatures_under_the_right_names(tmp_path, far, is_for_containerd):
    """As hauler 2 writes them; for containerd its index.json has images only."""
    one, child = to_manifest(image((b"it",))), to_manifest(image((b"child",)))
    many = to_manifest(index(child))
    chart = to_manifest(image((b"chart",)))
    signature, other, inner = [to_manifest(image((layer,))) for layer in (b"sig", b"other sig", b"inner sig")]
    about = {"mediaType": many.media_type, "digest": many.digest, "size": len(many.content)}
    bundle = to_manifest(image((b"bundle",), subject=about))
    hub, quay = "index.docker.io/library/demo:1", "quay.io/a/b:2"
    names = [entry_names(hub, "image"), entry_names(quay, "imageIndex"),
             {"kind": "dev.hauler/image", "org.opencontainers.image.ref.name": "hauler/web:1.2.3"},
             entry_names(hub, "sigs"), entry_names(quay, "sigs"), entry_names(quay, "referrers/" + bundle.digest[7:]),
             entry_names(quay, "atts/" + child.digest[7:], **{tinyreg.HAULER_SUBJECT: child.digest})]
    manifests = [one, many, chart, signature, other, bundle, inner]
    blobs = [b"it", b"child", b"chart", b"sig", b"other sig", b"inner sig", b"bundle", CONFIG, child.content]
    members = layout(*manifests, blobs=blobs, names=names)
    members["manifest.json"] = b"[]"
    if is_for_containerd:
        members["hauler-index.json"] = members["index.json"]
        del members["oci-layout"]
        members["index.json"] = layout(one, many, names=names)["index.json"]
    path = tmp_path / "haul.tar.zst"
    path.write_bytes(compress("zstd", open(make_tar(tmp_path / "haul.tar", members), "rb").read()))
    assert tinyreg.main(["load", "--root", far.root, "--quiet", str(path)]) == 0
    tag = "sha256-%s.%s"
    assert {image_text(name, tag): far.resolve(name, tag) for name in far.repositories() for tag in far.tags(name)} == {
        NAME + ":1": one.digest, NAME + ":" + tag % (one.digest[7:], "sig"): signature.digest,
        "quay.io/a/b:2": many.digest, "quay.io/a/b:" + tag % (many.digest[7:], "sig"): other.digest,
        "quay.io/a/b:" + tag % (child.digest[7:], "att"): inner.digest,
        "docker.io/hauler/web:1.2.3": chart.digest}
    assert [referrer.digest for referrer in far.referrers("quay.io/a/b", many.digest)] == [bundle.digest]


@pytest.mark.parametrize("annotations, loads", [
    ({"kind": 5}, True), ({"kind": "/" * 100}, True), ({"kind": "dev.hauler/sigs"}, True),
    ({"kind": "dev.hauler/sigs", tinyreg.HAULER_SUBJECT: "../../x"}, False),
    ({"kind": "dev.hauler/sigs", tinyreg.HAULER_SUBJECT: [1]}, False)])
def test_odd_kinds_in_a_haul_neither_take_a_tag_nor_harm_the_images(tmp_path, far, load, annotations, loads):
    one, odd = to_manifest(image((b"it",))), to_manifest(image((b"odd",)))
    names = [entry_names("quay.io/a/b:1", "image"), dict(annotations)]
    done = load(make_tar(tmp_path / "haul.tar", layout(one, odd, names=names, blobs=(b"it", b"odd", CONFIG))))
    assert done.returncode == (0 if loads else 1) and done.stderr.count("\n") == (not loads), done.stderr
    assert list(far.repositories()) == (["haul", "quay.io/a/b"] if loads else [])
    if loads:
        assert far.resolve("quay.io/a/b", "1") == one.digest
        assert far.manifest("haul", odd.digest).content == odd.content and list(far.tags("haul")) == []


@pytest.mark.parametrize("key", ["org.opencontainers.image.ref.name", "org.opencontainers.image.base.name"])
def test_a_package_of_zarf_has_its_images_under_their_names(tmp_path, far, key):
    """Until 2025 it wrote only what others call the name of an image's base."""
    one, two = to_manifest(image((b"it",))), to_manifest(image((b"chart",)))
    names = [{key: "ghcr.io/a/b:1"}, {key: "docker.io/library/demo@" + one.digest}, {key: "localhost:9999/charts/x:2"}]
    inner = layout(one, one, two, blobs=(b"it", b"chart", CONFIG), names=names)
    members = dict({"images/" + name: content for name, content in inner.items()}, **{
        "zarf.yaml": b"kind: ZarfPackageConfig", "checksums.txt": b"", "components/web.tar": b"no image",
        "sboms.tar": b"no image"})
    path = tmp_path / "zarf-package-web-amd64-1.0.tar.zst"
    path.write_bytes(compress("zstd", open(make_tar(tmp_path / "zarf.tar", members), "rb").read()))
    assert tinyreg.main(["load", "--root", far.root, "--quiet", str(path)]) == 0
    assert far.resolve("ghcr.io/a/b", "1") == far.manifest(NAME, one.digest).digest == one.digest
    assert far.resolve("localhost_9999/charts/x", "2") == two.digest


def test_the_name_of_a_base_is_no_name_outside_of_zarf_s_packages(tmp_path):
    members = layout(to_manifest(image()), names=[{"org.opencontainers.image.base.name": "quay.io/a/b:1"}])
    assert list(Archive([make_tar(tmp_path / "x.tar", members)]).repositories()) == ["x"]


@pytest.mark.parametrize("colon", ["-", ":"])
def test_an_image_cache_of_talos_has_its_images_under_their_names(tmp_path, far, load, colon):
    """As `talosctl images cache-create --layout flat` writes it; the first versions wrote colons."""
    child, single = to_manifest(image((b"child",))), to_manifest(image((b"it",)))
    many = to_manifest(index(child, to_manifest(image((b"for another platform",)))))
    signature = to_manifest(image((b"sig",)))
    fallback = to_manifest(index(signature))
    members = {"blob/" + Digest.of(content).replace(":", colon): content
               for content in (b"child", b"it", b"sig", CONFIG)}
    port = ":5000" if colon == ":" else "_5000_"
    for folder, manifests, tags in (
            ("docker.io/library/demo" if colon == "-" else "index.docker.io/library/demo", [single], {"1": single}),
            ("lab.example%s/a/b" % port, [many, child, signature, fallback],
             {"v2": many, "sha256-" + many.digest[7:]: fallback})):
        for manifest in manifests:
            members["manifests/%s/digest/%s" % (folder, manifest.digest.replace(":", colon))] = manifest.content
        for tag, manifest in tags.items():
            members["manifests/%s/reference/%s" % (folder, tag)] = manifest.content
    done = load(make_tar(tmp_path / "cache.tar", members))
    assert (done.returncode, done.stderr) == (0, "") and "1 manifest of the index left out" in done.stdout
    assert (far.resolve(NAME, "1"), far.resolve("lab.example_5000/a/b", "v2")) == (single.digest, many.digest)
    assert read_blob(far, "lab.example_5000/a/b", Digest.of(b"child")) == b"child"
    assert far.resolve("lab.example_5000/a/b", "sha256-" + many.digest[7:]) == fallback.digest


@pytest.mark.parametrize("names, message", [
    (["manifests/a b.example/x/reference/1"], "invalid"), (["manifests/docker.io/x/reference/a b"], "invalid"),
    (["manifests/../x/y/reference/1"], "leads out"), (["manifests/quay.io/a/reference/" + "a" * 129], "invalid")])
def test_an_odd_name_in_an_image_cache_is_refused_in_one_line(tmp_path, far, load, names, message):
    members = {"blob/sha256-" + "0" * 64: b"", names[0]: to_manifest(image()).content}
    done = load(make_tar(tmp_path / "cache.tar", members))
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert list(far.repositories()) == []


def test_what_docker_29_saves_is_the_whole_index_of_which_one_platform_is_there(tmp_path, far, load):
    here, elsewhere = to_manifest(image((b"it",))), to_manifest(image((b"arm",)))
    many = to_manifest(index(here, elsewhere))
    members = layout(many, blobs=(here.content, b"it", CONFIG), names=[{
        "containerd.io/distribution.source.docker.io": "library/demo",
        "io.containerd.image.name": "docker.io/library/demo:linux", "org.opencontainers.image.ref.name": "linux"}])
    paths = ["blobs/sha256/" + Digest.of(content).encoded for content in (CONFIG, b"it")]
    members["manifest.json"] = json.dumps([{"Config": paths[0], "RepoTags": ["demo:linux"],
                                            "Layers": paths[1:]}]).encode()
    done = load(make_tar(tmp_path / "saved.tar", members))
    assert (done.returncode, done.stderr) == (0, "") and "1 manifest of the index left out" in done.stdout
    assert list(far.tags(NAME)) == ["linux"] and far.resolve(NAME, "linux") == many.digest
    assert read_blob(far, NAME, Digest.of(b"it")) == b"it"


def test_what_is_no_image_is_said_to_be_a_file(tmp_path):
    """An installer, or a chart."""
    path = make_tar(tmp_path / "rke2.linux-amd64.tar", {"bin/rke2": b"", "share/rke2/LICENSE.txt": b""})
    done = run_tinyreg("load", "--root", tmp_path / "registry", path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "no images in it" in done.stderr and done.stderr.endswith("use tinyreg.py add\n")


def test_load_says_that_a_tag_is_in_two_archives(store, far, save, load):
    make_image(store, NAME, "1", layers=(b"earlier",))
    make_image(store, NAME, "2")
    first = save("demo:1", "demo:2")
    later = make_image(store, NAME, "1", layers=(b"later",))
    second = save("demo:1", "demo:2", name="second.tar")
    done = load(first, second)
    assert done.returncode == 0 and far.resolve(NAME, "1") == later.digest
    assert done.stderr.count("\n") == 1 and NAME + ":1 is two images" in done.stderr


def docker_config(*layers):
    inner = [Digest.of(gzip.decompress(layer) if layer[:1] == b"\x1f" else layer) for layer in layers]
    rootfs = {"type": "layers", "diff_ids": inner}
    return json.dumps({"os": "linux", "architecture": "amd64", "rootfs": rootfs}).encode()


def docker_save(dialect):
    """(members, layers as they lie there) of what one of the programs writes."""
    layers = [b"layer one", b"layer two", b"layer one"]
    if dialect == "crane":
        layers = [gzip.compress(layer, mtime=0) if sys.version_info >= (3, 8) else gzip.compress(layer)
                  for layer in layers[:2]]
        layers.append(layers[0])
    config = docker_config(*layers)
    name = Digest.of(config).encoded + ".json"
    if dialect == "docker 24":
        paths = ["%064x/layer.tar" % number for number in range(3)]
        members = dict(zip(paths, layers), **{name: config})
        members[paths[2]] = "../%064x/layer.tar" % 0
        members.update({path.replace("layer.tar", "json"): b"{}" for path in paths})
    elif dialect == "skopeo":
        paths = [Digest.of(layer).encoded + ".tar" for layer in layers]
        members = dict(zip(paths, layers), **{name: config})
    elif dialect == "crane":
        name = Digest.of(config)
        paths = [Digest.of(layer).encoded + ".tar.gz" for layer in layers]
        members = dict(zip(paths, layers), **{name: config})
    else:
        name, paths = "blobs/sha256/" + name[:-5], ["blobs/sha256/" + Digest.of(layer).encoded for layer in layers]
        members = dict(zip(paths, layers), **{name: config})
    members["manifest.json"] = json.dumps([{"Config": name, "RepoTags": ["demo:1", "lab.example:5000/x:2"],
                                            "Layers": paths}]).encode()
    return members, layers


@pytest.mark.parametrize("dialect", ["docker 24", "skopeo", "crane", "docker 25 without index.json"])
def test_docker_save_tars_are_loaded_and_served_with_one_digest(tmp_path, far, load, dialect):
    members, layers = docker_save(dialect)
    path = make_tar(tmp_path / "saved.tar", members)
    assert load(path).returncode == 0
    manifest = far.manifest(NAME, far.resolve(NAME, "1"))
    assert far.resolve("lab.example_5000/x", "2") == manifest.digest
    assert [read_blob(far, NAME, blob.digest) for blob in manifest.blobs[1:]] == layers
    kind = "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if dialect == "crane" else "")
    assert {blob.media_type for blob in manifest.blobs[1:]} == {kind}
    again = make_tar(tmp_path / "again.tar", dict(reversed(list(members.items()))), format=tarfile.PAX_FORMAT)
    archive = Archive([again])
    assert archive.resolve(NAME, "1") == manifest.digest
    assert [read_blob(archive, NAME, blob.digest) for blob in manifest.blobs[1:]] == layers


def test_layers_of_docker_save_are_not_read_to_open_it(tmp_path, monkeypatch):
    members, layers = docker_save("docker 24")
    path = make_tar(tmp_path / "saved.tar", members)
    monkeypatch.setattr("tinyreg.copy_bytes", lambda blob, length, *takers: pytest.fail("a layer is read")
                        if length != len(docker_config(*layers)) else takers[0](blob.read()))
    assert list(Archive([path]).tags(NAME)) == ["1"]


def test_a_registrys_data_directory_and_a_tar_of_it(store, tmp_path, load, far):
    make_image(store, NAME, "1")
    untagged = make_image(store, NAME, None, layers=(b"pinned",))
    make_image(store, "team/b", "2", layers=(b"b",))
    tar = str(tmp_path / "data.tar")
    subprocess.run(["tar", "-C", store.root, "-cf", tar, "docker"], check=True)
    for path in store.root, tar:
        shutil.rmtree(far.root)
        assert load(path).returncode == 0
        assert same(store, far) and same(store, far, "team/b", "2")
        assert far.manifest(NAME, untagged.digest)


def test_what_a_store_has_put_aside_is_not_served(store, tmp_path):
    """Nothing below tinyreg/ of a root is content: damaged blobs lie there under the names they had."""
    manifest = make_image(store, NAME, "1", layers=(b"whole", b"spoilt"))
    digest = manifest.blobs[2].digest
    with open(store.layout.blob_path(digest), "wb") as file:
        file.write(b"spoiled")
    with store.lock.alone():
        aside = store.quarantine(store.layout.blob_path(digest))
    assert os.path.exists(aside)
    inner, outer = str(tmp_path / "inner.tar"), str(tmp_path / "outer.tar")
    subprocess.run(["tar", "-C", store.root, "-cf", inner, "."], check=True)
    subprocess.run(["tar", "-C", str(tmp_path), "-cf", outer, os.path.basename(store.root)], check=True)
    for path in store.root, inner, outer:
        archive = Archive([path])
        assert digest not in set(archive.digests()) and manifest.blobs[1].digest in set(archive.digests())
        with pytest.raises(RegistryError):
            archive.open_blob(NAME, digest)
    shutil.rmtree(os.path.join(store.root, "docker"))
    with pytest.raises(RegistryError, match="no images in it"):
        Archive([store.root])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_old_and_new_tars_with_long_names(tmp_path, form):
    manifest = to_manifest(image())
    members = layout(manifest)
    folder = "a-folder-whose-name-is-long/" * (4 if form == tarfile.USTAR_FORMAT else 12)
    path = make_tar(tmp_path / "file.tar", {folder + name: content for name, content in members.items()}, format=form)
    assert Archive([path]).manifest("file", manifest.digest).content == manifest.content


def test_load_straight_into_another_registry(store, save, start_server, tmp_path):
    manifest = make_image(store, NAME, "1")
    make_referrer(store, NAME, manifest)
    server = start_server()
    done = run_tinyreg("load", save("demo:1"), "--to", server.host + "/mirror", "--plain-http",
                       cwd=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    target = Directory(server.root)
    assert target.resolve("mirror/" + NAME, "1") == manifest.digest
    assert len(list(target.referrers("mirror/" + NAME, manifest.digest))) == 1


# Enemies

def hostile(path, kind):
    """Write an archive that means harm."""
    members = layout(to_manifest(image()), blobs=(CONFIG, b"layer one", b"layer two"))
    digest = Digest.of(b"layer one").encoded
    deep = b'{"manifests":' * 100000
    replaced = {"deep json": {"index.json": deep}, "no json": {"index.json": b"\xff\xfe"},
                "empty": {"index.json": b'{"manifests":[]}'},
                "json of another kind": {"index.json": b'{"manifests":{"a":1}}'},
                "odd entries": {"index.json": b'{"manifests":[{"digest":5},7]}'},
                "odd annotations": {"index.json": b'{"manifests":[{"mediaType":"","digest":"sha256:%s","size":1,'
                                                  b'"annotations":[1]}]}' % digest.encode()},
                "huge json": {"index.json": b'{"manifests":[' + b"[]," * 8000000 + b"0]}"},
                "a link out": {"blobs/sha256/" + digest: "../../../../etc/passwd"},
                "an absolute link": {"blobs/sha256/" + digest: "/etc/passwd"}}
    members.update(replaced.get(kind, {}))
    if kind.startswith("parts: "):
        one = Digest.of(b"layer one")
        members["tinyreg-parts.json"] = json.dumps({"files": ["\x1b[2J"], "joined": {
            "parts: out": {"sha256:../../x": [one]}, "parts: numbers": {one: [1]},
            "parts: no table": [one]}.get(kind, {}), "holds": [] if kind == "parts: fewer" else [[1]]}
        ).encode()
    if kind == "docker: odd":
        members = {"manifest.json": b'[{"Config":["x"],"Layers":{"a":1}}]'}
    if kind == "docker: missing":
        members = {"manifest.json": b'[{"Config":"x.json","Layers":["/etc/passwd"]}]'}
    if kind == "docker: out":
        members = {"manifest.json": b'[{"Config":"../../etc/passwd","Layers":[]}]'}
    make_tar(path, members)
    fields = {"absolute": dict(name="/etc/evil"), "dots": dict(name="blobs/../../evil"),
              "a device": dict(name="blobs/sha256/" + digest, type=tarfile.CHRTYPE),
              "a fifo": dict(name="pipe", type=tarfile.FIFOTYPE),
              "a hard link out": dict(name="hard", type=tarfile.LNKTYPE, linkname="../x"),
              "two that differ": dict(name="blobs/sha256/" + digest, content=b"layer 0ne")}.get(kind)
    if fields:
        with tarfile.open(str(path), "a") as archive:
            add(archive, **fields)
    content = open(str(path), "rb").read()
    if kind == "cut off":
        content = content[:len(content) // 2 // 512 * 512 - 100]
    if kind == "cut off at a member":
        content = content[:1024]
    if kind == "larger than it is":
        header = bytearray(content[:512])
        header[124:136] = b"77777777777\0"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content = bytes(header) + content[512:]
    if kind == "negative size":
        header = bytearray(content[:512])
        header[124:136] = b"\xff" * 12
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content = bytes(header) + content[512:]
    if kind == "a damaged header":
        content = content[:1100] + b"\x55" + content[1101:]
    if kind == "a long name's bomb":
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = b"L", 1 << 20
        content = info.tobuf() + b"a" * (1 << 20) + content
    if kind == "malformed pax":
        info = tarfile.TarInfo("pax")
        info.type, info.size = b"x", 512
        content = info.tobuf() + b"0 path=x\n".ljust(512, b"\0") + content
    if kind == "nothing":
        content = b""
    if kind == "noise":
        content = LARGE[:100000]
    if kind == "zstd":
        content = b"\x28\xb5\x2f\xfd" + LARGE[:10000]
    if kind == "gzip of noise":
        content = b"\x1f\x8b" + LARGE[:10000]
    if kind == "gzip cut off":
        content = gzip.compress(content)[:-20]
    with open(str(path), "wb") as file:
        file.write(content)


@pytest.mark.parametrize("kind", [
    "absolute", "dots", "a device", "a fifo", "a hard link out", "a link out", "an absolute link", "two that differ",
    "cut off", "cut off at a member", "larger than it is", "negative size", "a damaged header", "a long name's bomb",
    "malformed pax", "nothing", "noise", "zstd", "gzip of noise", "gzip cut off", "deep json", "no json",
    "json of another kind", "empty", "odd entries", "odd annotations", "huge json", "docker: odd", "docker: missing",
    "docker: out", "parts: out", "parts: numbers", "parts: no table", "parts: odd", "parts: fewer"])
def test_hostile_archives_are_refused_and_harm_nothing(tmp_path, far, load, kind):
    path = tmp_path / "hostile.tar"
    hostile(path, kind)
    done = load(path)
    assert done.returncode == 1 and str(path) in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert list(far.digests()) == [] and list(far.repositories()) == []
    assert os.listdir(os.path.join(far.root, "tinyreg", "scratch")) == []
    assert kind == "empty" or run_tinyreg("verify", path).returncode == 1


def test_a_link_in_a_directory_is_refused(tmp_path, load):
    folder = tmp_path / "layout"
    (folder / "blobs" / "sha256").mkdir(parents=True)
    (folder / "index.json").write_text('{"manifests":[]}')
    (folder / "blobs" / "sha256" / Digest.of(b"x").encoded).symlink_to("/etc/passwd")
    done = load(folder)
    assert done.returncode == 1 and "is a link" in done.stderr


@pytest.mark.parametrize("ranges", [(), (b"layer one",) * 3, (b"layer two",), (b"layer one", b"lacks")])
def test_ranges_that_lie_do_not_count(tmp_path, far, load, ranges):
    manifest = to_manifest(image((b"layer one", b"cut")))
    members = layout(manifest, blobs=(CONFIG, b"layer one"))
    joined = {Digest.of(b"cut"): [Digest.of(content) for content in ranges],
              Digest.of(b"layer two"): [Digest.of(b"layer two")]}
    members["tinyreg-parts.json"] = json.dumps(
        {"files": ["\x1b[2J"], "joined": joined, "holds": [[Digest.of(b"elsewhere")]]}).encode()
    done = load(make_tar(tmp_path / "liar.tar", members))
    assert done.returncode == 1 and "liar:latest: " in done.stderr and "\x1b" not in done.stderr
    assert list(far.repositories()) == [] and Digest.of(b"cut") not in set(far.digests())


def test_a_small_archive_that_claims_a_hundred_gigabytes_is_refused_at_once(tmp_path, far, load):
    """One range, again and again: to read what that makes would take minutes."""
    content = bytes(1 << 20)
    members = layout(to_manifest(image((b"cut",))), blobs=(CONFIG, content))
    joined = {Digest.of(b"cut"): [Digest.of(content)] * 100000}
    members["tinyreg-parts.json"] = json.dumps({"files": [], "joined": joined}).encode()
    path = make_tar(tmp_path / "liar.tar", members)
    for done in (load(path), run_tinyreg("verify", path)):
        assert done.returncode == 1 and "104857600000 bytes" in done.stderr, done.stderr
    assert list(far.digests()) == []


def test_a_file_with_many_names_is_read_once(tmp_path, monkeypatch):
    """Ten thousand links to one layer, as digests or as the layers of docker save, cost what one does."""
    names = ["%064x" % number for number in range(1000)]
    members = layout(to_manifest(image()), blobs=(CONFIG, b"layer one", b"layer two", LARGE))
    members.update(("blobs/sha256/" + name, Digest.of(LARGE).encoded) for name in names)
    config = {"rootfs": {"diff_ids": []}}
    docker = {"manifest.json": json.dumps([{"Config": "c", "Layers": ["layer"] * 1000}]).encode(),
              "c": json.dumps(config).encode(), "layer": LARGE}
    read, copy_bytes = [], tinyreg.copy_bytes
    monkeypatch.setattr("tinyreg.copy_bytes", lambda blob, *rest: read.append(blob.length) or copy_bytes(blob, *rest))
    paths = [make_tar(tmp_path / "linked.tar", members)]
    check = tinyreg.Verification()
    tinyreg.verify_archive(check, Archive(paths), paths)
    assert read.count(len(LARGE)) == 1 and len(check.damaged) == 1000
    read.clear()
    Archive([make_tar(tmp_path / "docker.tar", docker)])
    assert read.count(len(LARGE)) == 1


def test_a_manifest_or_config_that_many_names_lead_to_is_read_once(tmp_path, monkeypatch):
    """A hundred thousand names fit in an index.json, and a manifest of 4 MiB takes long to read."""
    names = ["team/n%d:1" % number for number in range(200)]
    manifest = to_manifest(image())
    members = layout(*[manifest] * len(names), blobs=(CONFIG, b"layer one", b"layer two"),
                     names=[{OWN_NAME: name} for name in names])
    entries = [{"Config": "c", "Layers": ["l"], "RepoTags": [name]} for name in names]
    docker = {"manifest.json": json.dumps(entries).encode(), "c": docker_config(b"layer"), "l": b"layer"}
    read, load_json = [], tinyreg.load_json
    monkeypatch.setattr("tinyreg.load_json", lambda content: read.append(content) or load_json(content))
    archive = Archive([make_tar(tmp_path / "names.tar", members)])
    assert len(list(archive.images())) == len(names) and read.count(manifest.content) == 1
    archive = Archive([make_tar(tmp_path / "docker.tar", docker)])
    assert len(list(archive.repositories())) == len(names) and read.count(docker["c"]) == 1


@pytest.mark.parametrize("size", [b"9" * 60000, b"1_0", b"-1", b"0x1", b" 1", b""])
def test_a_size_that_is_no_number_is_refused(size):
    record = b" size=" + size + b"\n"
    length = len(record) + len(str(len(record) + 5))
    with pytest.raises(ValueError, match="malformed pax header"):
        tinyreg.parse_pax_records(str(length).encode() + record)


def test_a_blob_that_lies_about_its_digest_does_not_count(tmp_path, far, load):
    manifest = to_manifest(image())
    members = layout(manifest, blobs=(CONFIG, b"layer one"))
    members["blobs/sha256/" + Digest.of(b"layer two").encoded] = b"layer tw0"
    done = load(make_tar(tmp_path / "liar.tar", members))
    assert done.returncode == 1 and Digest.of(b"layer two") in done.stderr
    assert list(far.repositories()) == [] and Digest.of(b"layer two") not in set(far.digests())


@pytest.mark.parametrize("depth, status", [(50, 0), (2000, 1)])
def test_an_index_of_indexes_without_end_is_walked_once(tmp_path, load, depth, status):
    manifests = [to_manifest(image())]
    for _ in range(depth):
        manifests.append(to_manifest(index(manifests[-1], manifests[-1])))
    contents = [manifest.content for manifest in manifests[:-1]] + [CONFIG, b"layer one", b"layer two"]
    path = make_tar(tmp_path / "deep.tar", layout(manifests[-1], blobs=contents))
    assert list(Archive([path]).tags("deep")) == ["latest"]
    done = load(path)
    assert done.returncode == status and done.stderr.count("\n") == status, done.stderr


# Compressed archives

WAYS = [(program, way) for program in sorted(tinyreg.DECOMPRESSORS) for way in ("module", "command")
        if (program, way) != ("zstd", "module") or sys.version_info >= (3, 14)]


@pytest.fixture(params=WAYS, ids=" by ".join)
def compression(request, monkeypatch):
    """The name of a compression. If the command is to decompress it, Python's module for it can't be imported."""
    program, way = request.param
    if way == "command":
        monkeypatch.setitem(sys.modules, tinyreg.DECOMPRESSORS[program], None)
    return program


def compress(program, content):
    require(program)
    return subprocess.run([program, "-c"], input=content, stdout=subprocess.PIPE, check=True).stdout


def airgap_images(tmp_path, program, suffix):
    """A file as those with which k3s and RKE2 are installed: many images as docker save writes them, compressed."""
    members, _ = docker_save("docker 24")
    tar = make_tar(tmp_path / "k3s.tar", members)
    path = tmp_path / ("k3s-airgap-images-amd64.tar." + suffix)
    path.write_bytes(compress(program, open(tar, "rb").read()))
    return str(path)


def test_airgap_images_are_listed_and_loaded_as_they_come(tmp_path, far, compression, capsys):
    path = airgap_images(tmp_path, compression, "zst")
    assert tinyreg.main(["ls", path]) == 0 and "lab.example_5000/x:2" in capsys.readouterr().out
    assert tinyreg.main(["load", "--root", far.root, path]) == 0
    plain = Archive([str(tmp_path / "k3s.tar")])
    assert far.resolve(NAME, "1") == far.resolve("lab.example_5000/x", "2") == plain.resolve(NAME, "1")
    assert os.listdir(far.layout.scratch) == []


@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_comes_from_a_pipe_that_has_a_name(store, far, save, load, tmp_path, packed):
    """As the shell makes one of <(gpg -d images.tar.gpg)."""
    make_image(store, NAME, "1")
    content, pipe = open(save("demo:1"), "rb").read(), str(tmp_path / "pipe")
    os.mkfifo(pipe)
    writer = subprocess.Popen(["cp", "/dev/stdin", pipe], stdin=subprocess.PIPE)
    threading.Thread(target=writer.communicate, args=(gzip.compress(content) if packed else content,),
                     daemon=True).start()
    done = load(pipe)
    assert (done.returncode, done.stderr) == (0, "") and same(store, far)


@pytest.mark.parametrize("program", sorted(tinyreg.DECOMPRESSORS))
def test_a_compressed_archive_comes_from_a_pipe(tmp_path, far, program):
    content = open(airgap_images(tmp_path, program, "x"), "rb").read()
    subprocess.run([sys.executable, TINYREG, "load", "--root", far.root, "-"], input=content, check=True)
    assert far.resolve(NAME, "1") == Archive([str(tmp_path / "k3s.tar")]).resolve(NAME, "1")
    assert os.listdir(far.layout.scratch) == []


def test_streams_that_follow_one_another_are_one(tmp_path, far, compression):
    """As parallel compressors write them, and who appends one file to the other."""
    content = open(make_tar(tmp_path / "x.tar", docker_save("skopeo")[0]), "rb").read()
    path = tmp_path / "x.tar.zst"
    path.write_bytes(compress(compression, content[:700]) + compress(compression, content[700:]))
    assert tinyreg.main(["load", "--root", far.root, str(path)]) == 0
    assert far.resolve(NAME, "1") == Archive([str(tmp_path / "x.tar")]).resolve(NAME, "1")


@pytest.mark.parametrize("suffix", ["tar", "tgz", "tar.zst", "tar.xz", "tar.bz2", "txz", "oci.tar.gz"])
def test_no_suffix_gets_into_a_name(suffix):
    assert tinyreg.default_name("/media/Demo." + suffix) == "demo"


@pytest.mark.parametrize("damage", ["cut off", "cut off early", "a flipped bit", "noise"])
def test_a_damaged_stream_is_an_error_of_one_line(tmp_path, far, compression, damage, capsys):
    content = bytearray(compress(compression, LARGE[:1 << 18]))
    if damage == "a flipped bit":
        content[len(content) // 2] ^= 1
    path = tmp_path / "damaged.tar.zst"
    path.write_bytes({"cut off": content[:-3], "cut off early": content[:9], "noise": content[:6] + LARGE[:10000]}
                     .get(damage, content))
    assert tinyreg.main(["load", "--root", far.root, str(path)]) == 1
    errors = capsys.readouterr().err
    assert "%s: damaged: " % path in errors and errors.count("\n") == 1, errors
    assert os.listdir(far.layout.scratch) == [] and list(far.repositories()) == []


def test_a_bomb_is_given_up_before_the_disk_is_full(far, tmp_path, monkeypatch, compression, capsys):
    path, started, popen = tmp_path / "bomb.tar.zst", [], subprocess.Popen
    path.write_bytes(compress(compression, bytes(32 << 20)))
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **settings: (
        started.append(popen(*command, **settings)) or started[-1]))
    usage = shutil.disk_usage(str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=(64 << 20) - 1))
    assert tinyreg.main(["load", "--root", far.root, str(path)]) == 1
    assert "does not fit" in capsys.readouterr().err
    assert os.listdir(far.layout.scratch) == []
    assert [process.returncode for process in started] in ([], [-signal.SIGPIPE])


def test_a_full_disk_is_not_taken_for_damage(tmp_path, far, compression, monkeypatch, capsys):
    path, disk_usage = airgap_images(tmp_path, compression, "zst"), shutil.disk_usage

    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    assert tinyreg.main(["load", "--root", far.root, path]) == 1
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    errors = capsys.readouterr().err
    assert "No space left" in errors and "damaged" not in errors


@pytest.mark.parametrize("compression", [way for way in WAYS if way[0] in ("xz", "zstd")], ids=" by ".join,
                         indirect=True)
def test_a_stream_that_asks_for_gigabytes_of_memory_is_refused_and_not_taken_for_damage(
        tmp_path, far, compression, capsys):
    path = tmp_path / "large.tar.x"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8\x01\x00\x00")  # RFC 8878: a frame with a window of 2 GiB
    if compression == "xz":
        require("xz")
        path.write_bytes(subprocess.run(["xz", "--lzma2=preset=0,dict=512MiB"], input=b"x", stdout=subprocess.PIPE,
                                        check=True).stdout)
    assert tinyreg.main(["load", "--root", far.root, str(path)]) == 1
    assert capsys.readouterr().err == ("tinyreg: %s: to decompress it takes more memory than it may or can have; if "
                                       "you trust it, decompress it first\n" % path)


def test_zeros_between_streams_of_xz_are_passed_over(tmp_path, far):
    content = open(make_tar(tmp_path / "x.tar", docker_save("skopeo")[0]), "rb").read()
    path = tmp_path / "x.tar.xz"
    streams = [compress("xz", part) for part in (content[:700], content[700:])]
    path.write_bytes(bytes(tinyreg.SPOOL_BLOCK * 2).join(streams))
    assert tinyreg.main(["load", "--root", far.root, str(path)]) == 0
    assert far.resolve(NAME, "1") == Archive([str(tmp_path / "x.tar")]).resolve(NAME, "1")


def test_what_nothing_here_can_decompress_names_the_remedy(tmp_path, far, monkeypatch, capsys):
    path = airgap_images(tmp_path, "zstd", "zst")
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    for command in ["load", "--root", far.root, path], ["ls", path]:
        assert tinyreg.main(command) == 1
        assert capsys.readouterr().err == (
            "tinyreg: %s: it is compressed with zstd; install zstd, or decompress it first\n" % path)


@pytest.mark.parametrize("command", ["serve", "verify"])
@pytest.mark.parametrize("program", sorted(tinyreg.DECOMPRESSORS))
def test_serve_and_verify_say_what_to_do_with_compressed_archives(tmp_path, command, program):
    path = tmp_path / "x.tar.gz"
    path.write_bytes(compress(program, b"x"))
    done = run_tinyreg(command, path)
    assert done.returncode == 1 and program + "; decompress it first" in done.stderr


# Interruptions

def test_load_killed_at_any_time_leaves_nothing_half_and_goes_on(store, far, save, load):
    layers = tuple(LARGE[number:] for number in range(8))
    make_image(store, NAME, "1", layers=layers)
    path = save("demo:1")

    def load_until_there_are(wanted):
        process = subprocess.Popen([sys.executable, TINYREG, "load", "--root", far.root, path])
        until(lambda: process.poll() is not None or len(set(far.digests())) >= wanted)
        process.send_signal(signal.SIGKILL)
        process.wait()

    for wanted in (1, 4):
        load_until_there_are(wanted)
        for digest in far.digests():
            assert Digest.of(open(far.layout.blob_path(digest), "rb").read()) == digest
        with contextlib.suppress(RegistryError):
            far.resolve(NAME, "1")
            assert same(store, far)
    assert load(path).returncode == 0
    assert same(store, far)


def test_load_says_beforehand_that_the_disk_is_too_small(store, far, save, monkeypatch, capsys):
    import tinyreg
    make_image(store, NAME, "1", layers=(LARGE,))
    path = save("demo:1")
    monkeypatch.setattr(Directory, "free_space", lambda self: len(LARGE))
    assert tinyreg.main(["load", "--root", far.root, path]) == 1
    assert "are needed" in capsys.readouterr().err
    assert list(far.digests()) == []


def test_archive_errors_are_registry_errors_with_the_file_first(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar")
    with pytest.raises(RegistryError) as error:
        Archive([str(tmp_path / "x.tar")])
    assert str(error.value) == "%s: not a tar file" % (tmp_path / "x.tar")


def test_what_is_no_archive_is_said_to_be_none(tmp_path):
    for command in ("load", "verify", "serve"):
        done = run_tinyreg(command, TINYREG, "--root", tmp_path / "registry")
        assert done.returncode == 1 and done.stderr.strip().endswith("not a tar file") and done.stderr.count("\n") == 1
