"""Copy: one copy between any two registries, here between two stores; nothing is changed on the way."""

import functools
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import uuid

import pytest

import tinyreg
from conftest import PATIENCE, TINYREG, run_tinyreg, until
from samples import CONFIG, image, index, make_image, make_referrer, push_blob, read_blob, to_manifest
from tinyreg import (ArchiveWriter, Blob, Copy, Digest, Directory, RegistryError, Report,
                     TaggedDigest, Traffic, copy)

NAME = "docker.io/library/demo"


@pytest.fixture
def source(tmp_path):
    return Directory(str(tmp_path / "source"))


@pytest.fixture
def target(tmp_path):
    return Directory(str(tmp_path / "target"))


def config_for(architecture):
    return b'{"os":"linux","architecture":"%s"}' % architecture.encode()


def make_multi(store, name=NAME, tag="latest", architectures=("amd64", "arm64"), attest=True):
    """An index as BuildKit makes it: an image for each platform, each followed by an attestation about it."""
    children, entries = [], []
    for architecture in architectures:
        child = make_image(store, name, None, (architecture.encode() + b" layer", b"shared"), config_for(architecture))
        entries.append({"os": "linux", "architecture": architecture})
        children.append(child)
    document = index(*children)
    for entry, platform in zip(document["manifests"], entries):
        entry["platform"] = platform
    for child in list(children) if attest else ():
        note = make_image(store, name, None, (b"provenance of " + child.digest.encode(),), b'{"note":1}')
        document["manifests"].append({
            "mediaType": note.media_type, "digest": note.digest, "size": len(note.content),
            "platform": {"os": "unknown", "architecture": "unknown"},
            "annotations": {"vnd.docker.reference.type": "attestation-manifest",
                            "vnd.docker.reference.digest": child.digest}})
        children.append(note)
    top = to_manifest(document)
    store.put_manifest(name, top, [tag])
    return top, children


def holdings(store, name=NAME):
    """What a repository holds: its digests, and where its tags point."""
    return set(store.digests(name)), {tag: store.resolve(name, tag) for tag in store.tags(name)}


def test_an_image_arrives_with_its_digests_blobs_and_tag(source, target):
    manifest = make_image(source, NAME, "3.19")
    report = copy(source, target, NAME, "3.19")
    assert target.resolve(NAME, "3.19") == manifest.digest == report.digest
    assert target.manifest(NAME, manifest.digest).content == manifest.content
    for blob in manifest.blobs:
        assert read_blob(target, NAME, blob.digest) == read_blob(source, NAME, blob.digest)
    assert (report.copied_blobs, report.present_bytes, report.missing) == (3, 0, [])
    assert report.copied_bytes == report.total_bytes == sum(blob.size for blob in manifest.blobs)


def test_by_digest_and_under_another_name_there_is_no_tag(source, target):
    manifest = make_image(source, NAME)
    copy(source, target, NAME, manifest.digest, "mine/demo")
    assert holdings(target, "mine/demo")[1] == {}
    assert target.manifest("mine/demo", manifest.digest).content == manifest.content


def test_a_tag_beside_a_digest_is_set_and_the_digest_wins(source, target):
    old = make_image(source, NAME, "1")
    reference = TaggedDigest(old.digest, "1")
    assert copy(source, target, NAME, reference).moved == {}
    new = make_image(source, NAME, "1", layers=(b"new",))
    report = copy(source, target, NAME, reference)
    assert target.resolve(NAME, "1") == report.digest == old.digest
    assert report.moved == {"1": new.digest} and list(target.pinned(NAME)) == []
    source.delete_tag(NAME, "1")
    assert copy(source, target, NAME, reference).moved == {}


def test_a_second_copy_moves_no_bytes(source, target):
    make_multi(source)
    copy(source, target, NAME, "latest")
    report = copy(source, target, NAME, "latest")
    assert (report.copied_blobs, report.copied_bytes) == (0, 0)
    assert report.present_bytes == report.total_bytes


def test_blobs_that_another_repository_has_are_mounted(source, target):
    make_image(source, NAME)
    copy(source, target, NAME, "latest", "first")
    assert copy(source, target, NAME, "latest", "second").copied_bytes == 0


def test_a_whole_index_arrives(source, target):
    top, children = make_multi(source)
    report = copy(source, target, NAME, "latest")
    assert holdings(target) == holdings(source)
    assert report.absent == []


def test_one_platform_keeps_the_index_and_the_attestations(source, target):
    top, (amd64, arm64, amd64_note, arm64_note) = make_multi(source)
    report = copy(source, target, NAME, "latest", platforms=["linux/arm64"])
    assert target.resolve(NAME, "latest") == top.digest
    assert target.manifest(NAME, top.digest).content == top.content
    held = set(target.digests(NAME))
    assert {arm64.digest, arm64_note.digest} <= held and amd64.digest not in held
    assert report.absent == [amd64.digest]


def test_a_variant_is_any_unless_it_is_named(source, target):
    child = make_image(source, NAME, None)
    document = index(child)
    document["manifests"][0]["platform"] = {"os": "linux", "architecture": "arm", "variant": "v7"}
    source.put_manifest(NAME, to_manifest(document), ["arm"])
    assert copy(source, target, NAME, "arm", platforms=["linux/arm"]).absent == []
    assert copy(source, target, NAME, "arm", platforms=["linux/arm/v7"]).absent == []
    with pytest.raises(RegistryError, match="no image for linux/arm/v6; there are linux/arm/v7"):
        copy(source, target, NAME, "arm", platforms=["linux/arm/v6"])


def test_a_sparse_index_stays_sparse(source, target):
    top, children = make_multi(source)
    copy(source, target, NAME, "latest", platforms=["linux/amd64"])
    third = Directory(target.root + "3")
    report = copy(target, third, NAME, "latest")
    assert holdings(third) == holdings(target) and len(report.absent) == 1


def make_junk(store, children=3, size=1 << 20):
    """An index whose children are mostly `{}`: parsed, a manifest of them takes thirty times its bytes."""
    junk = [[{}] * (size // 4)]
    images = [make_image(store, NAME, None, junk=junk, number=number) for number in range(children)]
    top = to_manifest(index(*images))
    store.put_manifest(NAME, top, ["latest"])
    return sum(len(manifest.content) for manifest in [top] + images)


@pytest.mark.parametrize("make", [lambda store: Directory(store.root + "-back"), lambda store: ArchiveWriter()])
def test_a_copy_holds_the_bytes_of_its_manifests_and_not_what_they_take_when_parsed(source, make):
    size, target = make_junk(source), make(source)
    work = Copy(source, target, NAME, "latest")
    tracemalloc.start()
    try:
        work.plan()
        work.run()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < held < 2 * size


def test_an_image_with_more_manifests_than_memory_should_hold_is_refused(source, target, monkeypatch):
    monkeypatch.setattr(tinyreg, "MAX_MANIFESTS", make_junk(source, 3, 4000) + 4 * tinyreg.MANIFEST_COST - 1)
    with pytest.raises(RegistryError, match="the manifests of this image and of what is about it take more than"):
        copy(source, target, NAME, "latest")
    assert not list(target.digests())
    make_junk(source, 2, 4000)
    copy(source, target, NAME, "latest")


def test_strip_takes_other_platforms_out_of_the_index_and_its_images_stay_as_they_were(source, target):
    top, (amd64, arm64, arm) = make_multi(source, architectures=("amd64", "arm64", "arm"), attest=False)
    sbom = make_referrer(source, NAME, arm64, artifactType="application/spdx+json")
    about_all = make_referrer(source, NAME, top, artifactType="application/signature")
    report = copy(source, target, NAME, "latest", platforms=["linux/arm64", "linux/arm"], strip=True)
    made = target.manifest(NAME, target.resolve(NAME, "latest"))
    assert made.document == dict(top.document, manifests=top.document["manifests"][1:])
    assert (report.digest, report.stripped) == (made.digest, {top.digest: made.digest})
    assert report.absent == [amd64.digest]
    assert [found.digest for found in target.referrers(NAME, arm64.digest)] == [sbom.digest]
    held = set(target.digests(NAME))
    assert {arm64.digest, arm.digest} <= held and not {top.digest, about_all.digest} & held


def test_strip_lets_the_tag_point_to_the_one_image_that_is_left(source, target):
    top, (amd64, arm64) = make_multi(source, attest=False)
    report = copy(source, target, NAME, "latest", platforms=["linux/amd64"], strip=True)
    assert target.resolve(NAME, "latest") == amd64.digest == report.digest
    assert report.stripped == {top.digest: amd64.digest}


def test_strip_keeps_the_attestations_beside_their_image(source, target):
    top, (amd64, arm64, amd64_note, arm64_note) = make_multi(source)
    copy(source, target, NAME, "latest", platforms=["linux/amd64"], strip=True)
    made = target.manifest(NAME, target.resolve(NAME, "latest"))
    assert [child.digest for child in made.manifests] == [amd64.digest, amd64_note.digest, arm64_note.digest]


def test_strip_reaches_an_index_in_an_index(source, target):
    inner, (amd64, arm64) = make_multi(source, tag="inner", attest=False)
    other, _ = make_multi(source, tag="other", architectures=("riscv64",), attest=False)
    outer = to_manifest(index(inner, other, inner))
    source.put_manifest(NAME, outer, ["outer"])
    copy(source, target, NAME, "outer", platforms=["linux/arm64"], strip=True)
    assert target.resolve(NAME, "outer") != arm64.digest
    made = target.manifest(NAME, target.resolve(NAME, "outer"))
    assert [(child.digest, child.media_type) for child in made.manifests] == [(arm64.digest, arm64.media_type)] * 2


def test_strip_changes_nothing_where_all_goes_along(source, target):
    top, _ = make_multi(source)
    assert copy(source, target, NAME, "latest", strip=True).stripped == {}
    assert holdings(target) == holdings(source) and target.resolve(NAME, "latest") == top.digest


def test_strip_of_an_index_none_of_whose_images_is_here_is_an_error(source, target):
    top, children = make_multi(source)
    for child in children[:2]:
        source.delete_manifest(NAME, child.digest)
    with pytest.raises(RegistryError, match="none of the images of this index is here"):
        copy(source, target, NAME, "latest", strip=True)


def test_referrers_of_referrers_and_cosign_tags_travel(source, target):
    manifest = make_image(source, NAME)
    sbom = make_referrer(source, NAME, manifest, artifactType="application/spdx+json")
    signature = make_referrer(source, NAME, sbom, artifactType="application/signature")
    tag = "sha256-%s.sig" % manifest.digest.encoded
    cosign = make_image(source, NAME, tag, (b"cosign payload",), b'{"cosign":1}')
    report = copy(source, target, NAME, "latest")
    assert holdings(target) == holdings(source)
    assert [m.digest for m in target.referrers(NAME, manifest.digest)] == [sbom.digest]
    assert {(referrer["digest"], referrer["type"]) for referrer in report.referrers} == {
        (sbom.digest, "application/spdx+json"), (signature.digest, "application/signature"),
        (cosign.digest, "cosign's .sig")}


def test_no_referrers_when_they_are_not_wanted(source, target):
    manifest = make_image(source, NAME)
    sbom = make_referrer(source, NAME, manifest)
    assert copy(source, target, NAME, "latest", referrers=False).referrers == []
    assert sbom.digest not in set(target.digests(NAME))


def test_a_referrer_that_contains_its_subject_ends(source, target):
    manifest = make_image(source, NAME)
    about = {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.content)}
    source.put_manifest(NAME, to_manifest(index(manifest, subject=about)), [])
    copy(source, target, NAME, "latest")
    assert holdings(target) == holdings(source)


def test_missing_blobs_are_listed_and_the_tag_is_not_set(source, target):
    top, (amd64, arm64) = make_multi(source, attest=False)
    lost = arm64.blobs[1].digest
    source.delete_blob(NAME, lost)
    report = copy(source, target, NAME, "latest")
    assert report.missing == [lost]
    assert holdings(target)[1] == {}
    assert not list(target.layout.iter_uploads())
    assert amd64.digest in set(target.digests(NAME)) and arm64.digest not in set(target.digests(NAME))


def test_a_missing_blob_of_a_signature_does_not_hold_back_the_image(source, target):
    manifest = make_image(source, NAME)
    sbom = make_referrer(source, NAME, manifest, config=b'{"only":"its own"}')
    source.delete_blob(NAME, sbom.blobs[0].digest)
    report = copy(source, target, NAME, "latest")
    assert target.resolve(NAME, "latest") == manifest.digest
    assert report.missing == [sbom.blobs[0].digest]


def test_foreign_layers_stay_where_they_are(source, target):
    foreign = {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "size": 9,
               "digest": "sha256:" + "5" * 64, "urls": ["https://example.com/layer"]}
    push_blob(source, NAME, CONFIG)
    source.put_manifest(NAME, to_manifest(dict(image(), layers=[foreign])), ["win"])
    assert copy(source, target, NAME, "win").copied_blobs == 1
    assert target.resolve(NAME, "win")


def test_a_blob_that_is_damaged_in_the_target_is_sent_again(source, target):
    manifest = make_image(source, NAME)
    copy(source, target, NAME, "latest")
    digest = manifest.blobs[1].digest
    with open(target.layout.blob_path(digest), "r+b") as file:
        file.truncate(3)
    copy(source, target, NAME, "latest")
    assert read_blob(target, NAME, digest) == b"layer one"


def test_an_unknown_image_is_an_error(source, target):
    with pytest.raises(RegistryError) as caught:
        copy(source, target, NAME, "latest")
    assert caught.value.code == "NAME_UNKNOWN"


def test_the_plan_says_what_the_target_lacks(source, target):
    make_multi(source, attest=False)
    copy(source, target, NAME, "latest", platforms=["linux/amd64"])
    work = Copy(source, target, NAME, "latest")
    report = work.plan()
    assert sum(work.measure().values()) == report.needed_bytes == len(b"arm64 layer" + config_for("arm64"))
    assert (report.needed_blobs, report.total_blobs) == (2, 5)
    assert holdings(target)[1] != {} and report.copied_bytes == 0


class Cut(Blob):
    """A blob whose reading fails after some bytes."""

    def __init__(self, content, limit):
        super().__init__(None, 0, len(content))
        self.content = content
        self.limit = limit

    def readinto(self, view):
        if self.limit <= self.position < len(self.content):
            raise OSError("cut")
        count = min(len(view), 1000, self.limit - self.position, len(self.content) - self.position)
        view[:count] = self.content[self.position:self.position + count]
        self.position += count
        return count

    def close(self):
        pass


def test_a_blob_goes_on_where_it_was_cut(target):
    content = os.urandom(50000)
    digest = Digest.of(content)
    offsets = []

    def open_from(offset):
        offsets.append(offset)
        return Cut(content[offset:], 20000)

    for attempt in range(2):
        with pytest.raises(OSError):
            target.put_blob(NAME, digest, open_from)
    target.put_blob(NAME, digest, open_from)
    assert offsets == [0, 20000, 40000]
    assert read_blob(target, NAME, digest) == content


def test_a_spoilt_part_is_thrown_away_and_the_blob_fetched_anew(target):
    """After a power cut the part may hold anything: it was never synced."""
    content = os.urandom(5000)
    digest = Digest.of(content)
    session = target.session_of_blob(NAME, digest)
    session.begin("sha256")
    session.append(io.BytesIO(b"\0" * 3000))
    target.put_blob(NAME, digest, lambda offset: Cut(content[offset:], 9000))
    assert read_blob(target, NAME, digest) == content


def test_two_copies_of_one_blob_at_once_share_it(target):
    """Two pulls side by side: the second waits for the first one's bytes and takes them."""
    content = b"shared" * 1000
    digest = Digest.of(content)
    entered, go_on, opened = threading.Event(), threading.Event(), []

    def open_slowly(offset):
        opened.append(offset)
        entered.set()
        assert go_on.wait(PATIENCE)
        return Cut(content[offset:], 9000)

    first = threading.Thread(target=target.put_blob, args=(NAME, digest, open_slowly))
    second = threading.Thread(target=target.put_blob, args=(NAME, digest, open_slowly))
    first.start()
    assert entered.wait(PATIENCE)
    second.start()

    def second_waits():
        with open("/proc/locks") as locks:
            return any("-> FLOCK" in line and " %d " % os.getpid() in line for line in locks)

    until(second_waits)
    go_on.set()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert opened == [0] and read_blob(target, NAME, digest) == content


def test_an_error_ends_the_whole_copy(source, target):
    """One blob's bytes are wrong: the copy fails with that, and sets no tag."""
    manifest = make_image(source, NAME, layers=tuple(os.urandom(2000) for _ in range(8)))
    with open(source.layout.blob_path(manifest.blobs[3].digest), "r+b") as file:
        file.write(b"spoilt")
    with pytest.raises(RegistryError) as caught:
        copy(source, target, NAME, "latest", traffic=Traffic(2))
    assert caught.value.code == "DIGEST_INVALID"
    assert not list(target.repositories())


def test_the_report_is_heard_of_while_bytes_move(source, target):
    make_image(source, NAME)
    heard = []
    copy(source, target, NAME, "latest", report=Report(watch=lambda report: heard.append(report.copied_bytes)))
    assert heard and heard == sorted(heard) and heard[-1] == 18 + len(config_for("amd64"))


# Two machines, and a file that is carried from one to the other

IP = shutil.which("ip")


@pytest.fixture
def machines():
    """Two functions that run a command on a machine of its own: a network namespace with nothing but its loopback."""
    names = ["tinyreg-%s" % uuid.uuid4().hex[:8] for _ in range(2)]
    made = []
    try:
        for name in names:
            if not IP or subprocess.run([IP, "netns", "add", name], stderr=subprocess.DEVNULL).returncode:
                pytest.skip("no network namespace can be made here (needs root and iproute2)")
            made.append(name)
            subprocess.run([IP, "-n", name, "link", "set", "lo", "up"], check=True)
        yield [functools.partial(on_machine, name) for name in names]
    finally:
        for name in made:
            for pid in subprocess.run([IP, "netns", "pids", name], stdout=subprocess.PIPE).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run([IP, "netns", "del", name])


def on_machine(name, *command, **settings):
    """Start a command in a namespace; returns the Popen."""
    return subprocess.Popen([IP, "netns", "exec", name] + [str(word) for word in command], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, universal_newlines=True, **settings)


def finish(process):
    """The output of a command that has to succeed."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def serve_on(machine, program, *arguments):
    """Start a server on port 5000 of a machine; returns once it says that it listens."""
    process = machine(sys.executable, program, *arguments)
    for line in process.stdout:
        if "listens on" in line:
            return process
    raise AssertionError(process.stderr.read())


def test_two_machines_with_no_route_between_them(machines, tmp_path):
    """pull on the one, carry a file over, load and serve on the other: the digests are the same. Then the far side says
    what it has, and only the rest travels."""
    if "save" not in run_tinyreg("--help").stdout:
        pytest.skip("there is no save and load yet")
    near, far = machines
    origin = Directory(str(tmp_path / "origin"))
    top, children = make_multi(origin, "team/app", "1", attest=False)
    signature = make_referrer(origin, "team/app", top, artifactType="application/signature")
    serve_on(near, TINYREG, "serve", "--root", origin.root)
    store, stick = tmp_path / "store", tmp_path / "stick"
    stick.mkdir()
    image = "127.0.0.1:5000/team/app"
    assert "1 application/signature" in finish(near(sys.executable, TINYREG, "pull", image + ":1", "--root", store))
    finish(near(sys.executable, TINYREG, "save", image + ":1", "-o", stick / "images.tar", "--root", store))
    dial = "import socket; socket.create_connection(('127.0.0.1', 5000), 5)"
    assert "refused" in far(sys.executable, "-c", dial).communicate(timeout=60)[1]  # no way over

    finish(far("tar", "-xf", "images.tar", "tinyreg.py", cwd=str(stick)))
    program, root = stick / "tinyreg.py", tmp_path / "far"
    finish(far(sys.executable, program, "load", stick / "images.tar", "--root", root))
    server = serve_on(far, program, "serve", "--root", root)
    back = tmp_path / "back"
    asked = "127.0.0.1:5000/127.0.0.1_5000/team/app:1"
    finish(far(sys.executable, TINYREG, "pull", asked, "--root", back))
    name = "127.0.0.1_5000/127.0.0.1_5000/team/app"
    assert holdings(Directory(str(back)), name) == holdings(origin, "team/app")
    assert signature.digest in holdings(Directory(str(back)), name)[0]

    have = finish(far(sys.executable, program, "ls", "--digests", "--root", root))
    (stick / "have.txt").write_text(have)
    second = make_image(origin, "team/app", "2", (b"shared", b"new" * 100000), config_for("amd64"))
    finish(near(sys.executable, TINYREG, "pull", image + ":2", "--root", store))
    finish(near(sys.executable, TINYREG, "save", image + ":2", "--have", stick / "have.txt", "--no-self",
                "-o", stick / "more.tar", "--root", store))
    with tarfile.open(str(stick / "more.tar")) as archive:
        carried = {os.path.basename(member.name) for member in archive if "blobs/sha256/" in member.name}
    assert second.blobs[2].digest.encoded in carried and second.blobs[1].digest.encoded not in carried
    finish(far(sys.executable, program, "load", stick / "more.tar", "--root", root))
    assert Directory(str(root)).resolve("127.0.0.1_5000/team/app", "2") == second.digest
    server.terminate()
    server.communicate(timeout=60)
