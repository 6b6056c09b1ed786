"""Directory: CNCF Distribution's layout to the byte, the order of writes, damage, referrers, and many at once."""

import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading

import pytest

import tinyreg
from conftest import PATIENCE, TINYREG
from samples import (CONFIG, descriptor, image, index, make_image, make_referrer, push_blob,
                     read_blob, to_bytes, to_manifest)
from test_files import STEPS, Tracer
from tinyreg import OCI_ARTIFACT, Digest, Directory, ReadOnly, RegistryError

ALGORITHMS = ("sha256", "sha512")
TREE = "docker/registry/v2/"


def files_in(top):
    """{path below top: content} of all files."""
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def tree_of(root):
    """The same, of what Distribution has a place for."""
    return files_in(root / TREE)


def data(digest):
    return "blobs/%s/%s/%s/data" % (digest.algorithm, digest.encoded[:2], digest.encoded)


def link(name, kind, digest):
    return "repositories/%s/%s/%s/%s/link" % (name, kind, digest.algorithm, digest.encoded)


LAYERS, REVISIONS = "_layers", "_manifests/revisions"


def refusal(function, *arguments):
    """The code of the RegistryError that a call raises, also one that only iterating raises."""
    with pytest.raises(RegistryError) as caught:
        result = function(*arguments)
        if hasattr(result, "__next__"):
            list(result)
    return caught.value.code


def plant(root, name, content, tag=None):
    """Put a manifest into the tree by hand, as Distribution would; returns its digest."""
    digest = Digest.of(content)
    places = {data(digest): content, link(name, REVISIONS, digest): digest.encode()}
    if tag:
        places["repositories/%s/_manifests/tags/%s/current/link" % (name, tag)] = digest.encode()
        places[link(name, "_manifests/tags/%s/index" % tag, digest)] = digest.encode()
    for path, content in places.items():
        path = root / TREE / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return digest


def subject(manifest):
    return {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.content)}


def check_sound(root):
    """What must hold of a store at any instant: each file in Distribution's places only, each blob with the digest of
    its name, each link to something that is there, each image with its blobs."""
    shapes = [r"blobs/(sha256|sha512)/([0-9a-f]{2})/\2[0-9a-f]+/data",
              r"repositories/.+/(_layers|_manifests/(revisions|tags/[^/]+/index))/(sha256|sha512)/[0-9a-f]+/link",
              r"repositories/.+/_manifests/tags/[^/]+/current/link"]
    content = tree_of(root)
    for path, found in content.items():
        assert any(re.fullmatch(shape, path) for shape in shapes), path
        if path.startswith("blobs/"):
            algorithm, encoded = path.split("/")[1], path.split("/")[3]
            assert hashlib.new(algorithm, found).hexdigest() == encoded, path
        elif path.endswith("/link"):
            assert data(Digest(found.decode())) in content, path
        if path.endswith("current/link"):
            name = re.match("repositories/(.+)/_manifests/", path).group(1)
            assert link(name, REVISIONS, Digest(found.decode())) in content, path
        if "/_manifests/revisions/" in path:
            name = re.match("repositories/(.+)/_manifests/", path).group(1)
            document = json.loads(content[data(Digest(found.decode()))].decode())
            for blob in [document["config"]] + document["layers"]:
                assert link(name, LAYERS, Digest(blob["digest"])) in content, path


# Layout

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layout_to_the_byte(store, root, algorithm):
    manifest = make_image(store, "lab/tools", "1.0", algorithm=algorithm)
    blobs = [(Digest.of(content, algorithm), content) for content in (CONFIG, b"layer one", b"layer two")]
    digest = manifest.digest
    wanted = {data(digest): manifest.content, link("lab/tools", REVISIONS, digest): digest.encode(),
              "repositories/lab/tools/_manifests/tags/1.0/current/link": digest.encode(),
              link("lab/tools", "_manifests/tags/1.0/index", digest): digest.encode()}
    for blob, content in blobs:
        wanted[data(blob)] = content
        wanted[link("lab/tools", LAYERS, blob)] = blob.encode()
    assert tree_of(root) == wanted
    assert sorted(os.listdir(str(root))) == ["docker", "tinyreg"]
    assert os.listdir(str(root / "tinyreg" / "scratch")) == []


def test_layout_of_an_upload(store, root):
    session = store.start_upload("lab/tools")
    session.append(io.BytesIO(b"half"))
    assert tree_of(root) == {}  # Distribution's tree has nothing of it
    file = root / "tinyreg/uploads/lab/tools" / ("_" + session.id)
    assert file.read_bytes() == b"half"
    session.commit(Digest.of(b"half"))
    assert not file.exists()


def test_a_tag_that_moves_remembers_what_it_meant(store, root):
    first = make_image(store, "a", "latest")
    second = make_image(store, "a", "latest", layers=(b"other",))
    assert store.resolve("a", "latest") == second.digest
    history = {path for path in tree_of(root) if "/latest/index/" in path}
    assert history == {link("a", "_manifests/tags/latest/index", found.digest) for found in (first, second)}


def test_what_deletions_leave(store, root):
    manifest = make_image(store, "a", "one")
    store.put_manifest("a", manifest, ["two"])
    other = make_image(store, "a", "other", layers=())
    before = set(tree_of(root))
    store.delete_tag("a", "one")
    gone = before - set(tree_of(root))
    assert gone == {path for path in before if "/tags/one/" in path}
    assert store.manifest("a", manifest.digest).content == manifest.content

    before = set(tree_of(root))
    store.delete_manifest("a", manifest.digest)
    gone = before - set(tree_of(root))
    assert gone == {path for path in before if "/tags/two/" in path} | {link("a", REVISIONS, manifest.digest)}
    assert list(store.tags("a")) == ["other"] and store.resolve("a", "other") == other.digest

    before = set(tree_of(root))
    blob = Digest.of(b"layer one")
    store.delete_blob("a", blob)
    assert before - set(tree_of(root)) == {link("a", LAYERS, blob)}
    assert refusal(store.open_blob, "a", blob) == "BLOB_UNKNOWN"
    assert os.listdir(str(root / "tinyreg" / "scratch")) == []


def test_what_is_not_there(store):
    make_image(store, "here")
    digest = Digest.of(b"nothing")
    for name, manifest_code, blob_code in (("here", "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"),
                                           ("nowhere", "NAME_UNKNOWN", "NAME_UNKNOWN")):
        for function in (store.manifest, store.delete_manifest):
            assert refusal(function, name, digest) == manifest_code
        for function in (store.resolve, store.delete_tag):
            assert refusal(function, name, "no-tag") == manifest_code
        for function in (store.open_blob, store.delete_blob):
            assert refusal(function, name, digest) == blob_code
        assert list(store.referrers(name, digest)) == []
    assert refusal(store.tags, "nowhere") == "NAME_UNKNOWN"
    assert not store.mount("here", digest) and not store.mount("here", digest, "nowhere")


def test_a_blob_belongs_to_the_repositories_that_were_given_it(store):
    digest = push_blob(store, "a", b"content")
    assert refusal(store.open_blob, "b", digest) == "NAME_UNKNOWN"
    make_image(store, "b")
    assert refusal(store.open_blob, "b", digest) == "BLOB_UNKNOWN"
    assert not store.mount("c", digest, "b")
    assert store.mount("b", digest, "a") and read_blob(store, "b", digest) == b"content"
    assert store.mount("c", digest) and read_blob(store, "c", digest) == b"content"


def test_what_takes_the_space_is_told_also_where_it_can_not_be_kept(store, root, monkeypatch):
    manifest = make_image(store, "app")
    push_blob(store, "app", manifest.content)  # a manifest that was pushed as a blob, too, takes its space once

    def fail(path, content):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(store.files, "write", fail)
    (root / "tinyreg" / "usage").write_bytes(b"{}")
    usage = store.usage()
    assert usage["repositories"] == {"app": [usage["bytes"], 0]} and usage["shared"] == {}


def test_a_store_is_ready_without_writing_if_it_is_read_only(store, root):
    (root / "tinyreg" / "scratch").rmdir()
    with pytest.raises(OSError):
        store.check_ready()
    store = ReadOnly(store)
    store.check_ready()
    (root / "docker").rename(root / "unmounted")
    with pytest.raises(OSError):
        store.check_ready()


def test_what_an_earlier_upload_with_the_same_id_had_is_no_proof(store):
    """put_blob's have the same id in all processes. One has begun a blob; another forgets that, and begins anew."""
    digest, other, id = Digest.of(b"right"), Directory(store.root), store.session_of_blob("app", Digest.of(b"right")).id

    def begin(store):
        session = store.session_of_blob("app", digest)
        session.begin("sha256")
        return session

    begin(store).append(io.BytesIO(b"right"))
    other.find_upload("app", id).cancel()
    begin(other).append(io.BytesIO(b"wro"))
    session = store.find_upload("app", id)
    session.append(io.BytesIO(b"ng"))
    assert refusal(session.commit, digest)


def test_a_directory_that_is_no_store(tmp_path):
    with pytest.raises(FileNotFoundError):
        Directory(str(tmp_path / "nothing"), create=False)
    assert os.listdir(str(tmp_path)) == []


# Blobs

@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 3000000])
def test_blob(store, content, algorithm):
    digest = push_blob(store, "a", content, algorithm)
    with store.open_blob("a", digest) as blob:
        assert blob.length == len(content) and blob.read() == content
        assert blob.part(1, 1).read() == content[1:2]
    assert list(store.digests()) == [digest]
    assert list(store.digests("a")) == [digest]


def test_blob_linked_by_distribution_under_its_sha512(store, root):
    """Distribution stores what is pushed by its sha512 under its sha256, and links to that."""
    digest = push_blob(store, "a", b"content")
    asked = Digest.of(b"content", "sha512")
    place = root / TREE / link("a", LAYERS, asked)
    place.parent.mkdir(parents=True)
    place.write_text(digest)
    assert read_blob(store, "a", asked) == b"content"
    assert store.mount("b", asked, "a") and read_blob(store, "b", asked) == b"content"
    manifest = to_manifest(image((b"content",), config=b"content", algorithm="sha512"))
    store.put_manifest("a", manifest)


# Manifests

def image_of(*layers):
    """An image Manifest with these descriptors as its layers."""
    return to_manifest(dict(image(), layers=layers))


def test_an_image_must_have_its_blobs(store, root):
    push_blob(store, "a", b"layer one")
    push_blob(store, "elsewhere", CONFIG)
    manifest = to_manifest(image((b"layer one", b"layer two", b"layer three", b"layer two")))
    with pytest.raises(RegistryError) as caught:
        store.put_manifest("a", manifest, ["latest"])
    missing = [Digest.of(content) for content in (CONFIG, b"layer two", b"layer three")]
    assert caught.value.code == "MANIFEST_BLOB_UNKNOWN" and list(caught.value.details) == sorted(missing)
    assert not any("_manifests" in path for path in tree_of(root))
    Directory(str(root), sparse=True).put_manifest("a", manifest, ["latest"])
    assert store.resolve("a", "latest") == manifest.digest


@pytest.mark.parametrize("fields", [{"urls": ["https://elsewhere.example/layer"]},
                                    {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"},
                                    {"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar"}])
def test_foreign_layers_need_not_be_there(store, fields):
    """Layers that may not be handed on: they have the URL of their origin, or a media type that says so."""
    push_blob(store, "a", CONFIG)
    layer = dict(descriptor(b"elsewhere"), **fields)
    store.put_manifest("a", image_of(layer))
    assert refusal(store.put_manifest, "a", to_manifest(image((b"elsewhere",)))) == "MANIFEST_BLOB_UNKNOWN"


def test_an_index_may_be_sparse(store):
    absent = to_manifest(image())
    manifest = to_manifest(index(absent))
    store.put_manifest("a", manifest, ["latest"])
    assert store.manifest("a", store.resolve("a", "latest")).content == manifest.content


def test_a_size_that_is_wrong_is_the_makers_business(store):
    push_blob(store, "a", CONFIG)
    push_blob(store, "a", b"layer")
    store.put_manifest("a", image_of(dict(descriptor(b"layer"), size=99)))


def test_a_blob_that_many_descriptors_name_is_hashed_once(store):
    """A small manifest can name a large blob 27,000 times, each time with a wrong size."""
    content = bytes(5 << 20)
    push_blob(store, "a", CONFIG)
    push_blob(store, "a", content)
    blocks = []
    for count in (1, 500):
        blocks.append(0)

        def go_on():
            blocks[-1] += 1

        layers = [dict(descriptor(content), size=number) for number in range(count)]
        store.put_manifest("a", image_of(*layers), ["latest"], go_on)
    assert blocks[0] == blocks[1] > 0


def test_work_for_a_client_that_has_left_ends(store):
    content = bytes(5 << 20)
    push_blob(store, "a", CONFIG)
    push_blob(store, "a", content)
    ours, theirs = socket.socketpair()
    reader = tinyreg.RequestReader(ours)
    manifest = image_of(dict(descriptor(content), size=1))
    with ours, theirs:
        theirs.sendall(b"the next request")
        store.put_manifest("a", manifest, ["one"], reader.check_client)
        theirs.close()
        with pytest.raises(tinyreg.ClientLeft):
            store.put_manifest("a", manifest, ["two"], reader.check_client)
    assert list(store.tags("a")) == ["one"]


# Order of writes

class Journal:
    """Notes what a power cut could take back: stands before mkdir, rename and fsync, and knows which names and which
    content are durable. `published` maps each name that came by a rename to the names durable at that instant."""

    def __init__(self, monkeypatch, root):
        self.root = str(root)
        self.synced_files = set()
        self.pending = set()      # names that a sync of their folder would make durable
        self.durable = {path for path, _, _ in os.walk(self.root)}
        self.published = {}
        for name in ("mkdir", "rename", "fsync"):
            monkeypatch.setattr(os, name, self.wrap(getattr(self, name), getattr(os, name)))

    @staticmethod
    def wrap(note, function):
        def call(*arguments, **settings):
            if function.__name__ == "rename":
                note(*arguments)
            result = function(*arguments, **settings)
            if function.__name__ != "rename":
                note(*arguments)
            return result
        return call

    def mkdir(self, path, mode=None):
        self.pending.add(path)

    def rename(self, source, target):
        assert source in self.synced_files, "renamed before its content was synced: " + target
        self.published[target] = set(self.durable)
        self.pending.add(target)

    def fsync(self, descriptor):
        path = os.readlink("/proc/self/fd/%d" % descriptor)
        self.synced_files.add(path)
        safe = {name for name in self.pending if os.path.dirname(name) == path}
        self.pending -= safe
        self.durable |= safe

    def survives(self, path, durable=None):
        """Whether a name and all folders above it are durable, now or among the names given."""
        durable = self.durable if durable is None else durable
        while len(path) > len(self.root):
            if path not in durable:
                return False
            path = os.path.dirname(path)
        return True


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_order_of_writes(root, monkeypatch, algorithm):
    """Without a journal: content before link, link before tag; and all of it durable when the call returns."""
    store = Directory(str(root), shared=True)
    journal = Journal(monkeypatch, root)
    top = str(root / TREE)
    blobs = [push_blob(store, "a/b", content, algorithm) for content in (CONFIG, b"layer one", b"layer two")]
    chain = [[data(blob), link("a/b", LAYERS, blob)] for blob in blobs]
    assert all(journal.survives(os.path.join(top, place)) for places in chain for place in places)
    manifest = make_image(store, "a/b", "latest", algorithm=algorithm)
    chain.append([data(manifest.digest), link("a/b", REVISIONS, manifest.digest),
                  link("a/b", "_manifests/tags/latest/index", manifest.digest),
                  "repositories/a/b/_manifests/tags/latest/current/link"])
    for places in chain:
        for before, after in zip(places, places[1:]):
            durable_then = journal.published[os.path.join(top, after)]
            assert journal.survives(os.path.join(top, before), durable_then), "%s before %s" % (after, before)
        assert all(journal.survives(os.path.join(top, place)) for place in places)
    durable_then = journal.published[os.path.join(top, chain[-1][1])]
    assert all(journal.survives(os.path.join(top, link("a/b", LAYERS, blob)), durable_then) for blob in blobs)


def test_order_of_deletions(store, root, monkeypatch):
    """Tags go before the manifest that they point to."""
    manifest = make_image(store, "a", "one")
    store.put_manifest("a", manifest, ["two"])
    tracer = Tracer(monkeypatch, ["rename"])
    store.delete_manifest("a", manifest.digest)
    top = str(root / TREE / "repositories/a/_manifests")
    gone = [os.path.relpath(path, top) for _, path in tracer.calls if path.startswith(top)]
    assert gone == ["tags/one", "tags/two", "revisions/sha256/" + manifest.digest.encoded]


def stores(tmp_path, act):
    """Yield (N, root) for each of the STEPS that a call takes, the root being a fresh copy of the same store."""
    store = Directory(str(tmp_path / "first"))
    make_image(store, "a", "latest")
    make_image(store, "a", "other", layers=(b"of another image",))
    shutil.copytree(store.root, str(tmp_path / "counted"))
    counted = Directory(str(tmp_path / "counted"), create=False)
    with pytest.MonkeyPatch.context() as patch:
        tracer = Tracer(patch, STEPS)
        act(counted)
    assert len(tracer.calls) > 5
    for step in range(1, len(tracer.calls) + 1):
        shutil.copytree(store.root, str(tmp_path / str(step)))
        yield step, tmp_path / str(step)


def push_new(store):
    push_blob(store, "a", b"new layer")
    store.put_manifest("a", to_manifest(image((b"layer one", b"new layer"))), ["latest"])


def delete_image(store):
    store.delete_manifest("a", store.resolve("a", "latest"))


def delete_one_tag(store):
    store.delete_tag("a", "latest")


OLD, NEW = to_manifest(image()).digest, to_manifest(image((b"layer one", b"new layer"))).digest
ACTS = {push_new: {OLD, NEW}, delete_image: {OLD, None}, delete_one_tag: {OLD, None}}


def latest(root):
    """What a fresh look says about the tag, with its image complete; None where there is no tag."""
    store = Directory(str(root))
    if "latest" not in store.tags("a"):
        return None
    manifest = store.manifest("a", store.resolve("a", "latest"))
    for blob in manifest.blobs:
        assert Digest.of(read_blob(store, "a", blob.digest)) == blob.digest
    return manifest.digest


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_failure_at_each_step(tmp_path, act):
    """An error of the disk at any system call leaves the old state or the new one, and the next try succeeds."""
    for step, root in stores(tmp_path, act):
        store = Directory(str(root), create=False)
        with pytest.MonkeyPatch.context() as patch:
            tracer = Tracer(patch, STEPS, fail_at=step)
            try:
                act(store)
                acknowledged = True  # a failing of what is only tidying up
            except OSError:
                acknowledged = False
            assert len(tracer.calls) >= step
        check_sound(root)
        assert latest(root) in ACTS[act]
        assert latest(root) != OLD or not acknowledged
        if latest(root) == OLD:
            act(Directory(str(root)))
        assert latest(root) in ACTS[act] - {OLD}
        assert Directory(str(root)).resolve("a", "other")


def end_at(step):
    """Let this process end, with status 9, before the N-th of its STEPS."""
    counter = itertools.count(1)

    def wrap(function):
        def call(*arguments, **settings):
            if next(counter) == step:
                os._exit(9)
            return function(*arguments, **settings)
        return call

    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
def test_death_at_each_step(tmp_path, act):
    """The process ends at any system call, with no chance to tidy up."""
    for step, root in stores(tmp_path, act):
        store = Directory(str(root), create=False)
        child = os.fork()
        if not child:
            try:
                end_at(step)
                act(store)
            finally:
                os._exit(1)
        assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 9
        check_sound(root)
        assert latest(root) in ACTS[act]
        if latest(root) == OLD:
            act(Directory(str(root)))
        assert latest(root) in ACTS[act] - {OLD}


# Damage, as an old Distribution and a power cut leave it

def damage_nothing_left(content):
    return b""


def damage_newline(content):
    return content + b"\n"


def damage_cut(content):
    return content[:-1]


def damage_flipped(content):
    return content[:5] + bytes([content[5] ^ 1]) + content[6:]


def damage(path, how):
    path.write_bytes(how(path.read_bytes()))


LINK_DAMAGE = [damage_nothing_left, damage_newline, damage_cut]


@pytest.mark.parametrize("how", LINK_DAMAGE)
def test_damaged_tag_link(store, root, caplog, how):
    manifest = make_image(store, "a", "latest")
    make_image(store, "a", "other", layers=())
    damage(root / TREE / "repositories/a/_manifests/tags/latest/current/link", how)
    assert refusal(store.resolve, "a", "latest") == "MANIFEST_UNKNOWN"
    assert "tags/latest/current/link" in caplog.text
    assert store.manifest("a", manifest.digest)
    if how is damage_nothing_left:
        assert list(store.tags("a")) == ["other"]
    store.delete_manifest("a", Digest.of(to_manifest(image(layers=())).content))
    store.put_manifest("a", manifest, ["latest"])
    assert store.resolve("a", "latest") == manifest.digest
    check_sound(root)


@pytest.mark.parametrize("how", LINK_DAMAGE)
def test_damaged_revision_link(store, root, caplog, how):
    manifest = make_image(store, "a", "latest")
    damage(root / TREE / link("a", REVISIONS, manifest.digest), how)
    assert refusal(store.manifest, "a", manifest.digest) == "MANIFEST_UNKNOWN"
    assert refusal(store.delete_manifest, "a", manifest.digest) == "MANIFEST_UNKNOWN"
    assert manifest.digest.encoded in caplog.text
    store.put_manifest("a", manifest, ["latest"])
    assert store.manifest("a", manifest.digest).content == manifest.content
    check_sound(root)


@pytest.mark.parametrize("how", LINK_DAMAGE)
def test_damaged_layer_link(store, root, caplog, how):
    manifest = make_image(store, "a", "latest")
    blob = Digest.of(b"layer one")
    damage(root / TREE / link("a", LAYERS, blob), how)
    assert refusal(store.open_blob, "a", blob) == "BLOB_UNKNOWN"
    assert refusal(store.put_manifest, "a", manifest) == "MANIFEST_BLOB_UNKNOWN"
    assert not store.mount("b", blob, "a")
    assert blob.encoded in caplog.text
    push_blob(store, "a", b"layer one")
    store.put_manifest("a", manifest)
    check_sound(root)


@pytest.mark.parametrize("how", [damage_nothing_left, damage_cut])
def test_damaged_blob(store, root, caplog, how):
    """A blob of the wrong size does not pass for the one that a manifest refers to, and a new push mends it."""
    manifest = make_image(store, "a", "latest")
    blob = Digest.of(b"layer one")
    damage(root / TREE / data(blob), how)
    assert refusal(store.put_manifest, "a", manifest) == "MANIFEST_BLOB_UNKNOWN"
    assert blob.encoded in caplog.text
    push_blob(store, "b", b"layer one")
    assert read_blob(store, "a", blob) == b"layer one"
    store.put_manifest("a", manifest)
    check_sound(root)


def test_an_empty_blob_that_should_not_be_is_missing(store, root):
    blob = push_blob(store, "a", b"content")
    damage(root / TREE / data(blob), damage_nothing_left)
    assert refusal(store.open_blob, "a", blob) == "BLOB_UNKNOWN"
    assert not store.mount("b", blob, "a") and not store.mount("b", blob)


def test_a_blob_that_is_gone_is_missing(store, root):
    manifest = make_image(store, "a", "latest")
    blob = Digest.of(b"layer one")
    (root / TREE / data(blob)).unlink()
    assert refusal(store.open_blob, "a", blob) == "BLOB_UNKNOWN"
    assert not store.mount("b", blob, "a")
    assert refusal(store.put_manifest, "a", manifest) == "MANIFEST_BLOB_UNKNOWN"
    push_blob(store, "a", b"layer one")
    store.put_manifest("a", manifest)


@pytest.mark.parametrize("how", [damage_nothing_left, damage_cut, damage_flipped])
def test_damaged_manifest(store, root, caplog, how):
    manifest = make_image(store, "a", "latest")
    damage(root / TREE / data(manifest.digest), how)
    assert refusal(store.manifest, "a", manifest.digest) == "MANIFEST_UNKNOWN"
    assert manifest.digest in caplog.text
    assert list(store.referrers("a", manifest.digest)) == []
    store.put_manifest("a", manifest)
    assert store.manifest("a", manifest.digest).content == manifest.content
    check_sound(root)


def test_damaged_manifest_can_be_deleted(store, root):
    manifest = make_image(store, "a", "latest")
    damage(root / TREE / data(manifest.digest), damage_nothing_left)
    store.delete_manifest("a", manifest.digest)
    assert list(store.tags("a")) == []


# Listings

NAMES = ["0", "a", "a-b", "a-b/c", "a.b", "a/b", "a/b-c", "a/b/c", "a0", "a_b", "a__b/c", "b/a", "ab", "z/z/z/z"]


@pytest.fixture
def many(store, root):
    for name in NAMES:
        plant(root, name, to_bytes(image()))
    return store


def test_repositories_in_ascii_order(many):
    assert list(many.repositories()) == sorted(NAMES)


@pytest.mark.parametrize("last", sorted(NAMES) + ["", "A", "a/", "a/b/", "a/a", "a-", "a-b/d", "zz", "~", "/", "é"])
def test_repositories_after_another(many, last):
    assert list(many.repositories(last)) == [name for name in sorted(NAMES) if name > last]


def test_repositories_that_are_none(store, root):
    make_image(store, "good")
    push_blob(store, "only/blobs", b"content")
    repositories = root / TREE / "repositories"
    for path in (".trash/_manifests", "_own/_manifests", "Upper/_manifests", "good/_more/_manifests", "empty"):
        (repositories / path).mkdir(parents=True)
    (repositories / "file").write_bytes(b"")
    (repositories / "good" / "file").write_bytes(b"")
    assert list(store.repositories()) == ["good"]


TAGS = ["0.1", "1", "10", "2", "A", "Z", "_x", "a", "a-1", "a.b", "latest", "z"]


def test_tags_in_ascii_order(store):
    manifest = make_image(store, "a", None)
    assert list(store.tags("a")) == []
    store.put_manifest("a", manifest, reversed(TAGS))
    assert list(store.tags("a")) == sorted(TAGS)
    for last in TAGS + ["B", "~", ""]:
        assert list(store.tags("a", last)) == [tag for tag in sorted(TAGS) if tag > last]


def test_tags_that_are_none(store, root):
    make_image(store, "a", "good")
    tags = root / TREE / "repositories/a/_manifests/tags"
    (tags / "file").write_bytes(b"")
    (tags / "empty-folder").mkdir()
    (tags / "no-link" / "current").mkdir(parents=True)
    (tags / ".hidden" / "current").mkdir(parents=True)
    (tags / ".hidden" / "current" / "link").write_bytes((tags / "good/current/link").read_bytes())
    assert list(store.tags("a")) == ["good"]
    for tag in ("file", "empty-folder", "no-link"):
        assert refusal(store.resolve, "a", tag) == "MANIFEST_UNKNOWN"


def test_digests(store, root):
    manifest = make_image(store, "a")
    other = push_blob(store, "b", b"only in b", "sha512")
    of_a = sorted([manifest.digest] + [blob.digest for blob in manifest.blobs])
    assert list(store.digests("a")) == of_a
    assert list(store.digests()) == of_a + [other]
    (root / TREE / "blobs/sha256/tmp").mkdir()
    (root / TREE / "blobs/other").mkdir()
    assert list(store.digests()) == of_a + [other]


# Referrers

def digests_of(manifests):
    return [manifest.digest for manifest in manifests]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_referrers(store, algorithm):
    about = make_image(store, "a", algorithm=algorithm)
    made = sorted(make_referrer(store, "a", about, artifactType="application/x%d" % number).digest
                  for number in range(4))
    assert digests_of(store.referrers("a", about.digest)) == made
    for place, last in enumerate(made):
        assert digests_of(store.referrers("a", about.digest, last)) == made[place + 1:]
    assert list(store.referrers("b", about.digest)) == []
    assert list(store.referrers("a", made[0])) == []


def test_referrers_of_what_is_not_there_yet(store):
    about = to_manifest(image())
    referrer = make_referrer(store, "a", about)
    assert digests_of(store.referrers("a", about.digest)) == [referrer.digest]


def test_an_index_and_an_artifact_can_be_referrers(store):
    about = make_image(store, "a")
    children = to_manifest(index(about, subject=subject(about)))
    artifact = to_manifest({"mediaType": OCI_ARTIFACT, "artifactType": "application/x", "blobs": [],
                            "subject": subject(about)})
    store.put_manifest("a", children)
    store.put_manifest("a", artifact)
    assert digests_of(store.referrers("a", about.digest)) == sorted([children.digest, artifact.digest])


def test_deleted_referrers_are_gone(store):
    about = make_image(store, "a")
    first, second = (make_referrer(store, "a", about, artifactType="application/x%d" % number) for number in range(2))
    assert len(list(store.referrers("a", about.digest))) == 2
    store.delete_manifest("a", first.digest)
    assert digests_of(store.referrers("a", about.digest)) == [second.digest]
    store.put_manifest("a", first)
    assert digests_of(store.referrers("a", about.digest)) == sorted([first.digest, second.digest])


def test_referrers_that_others_wrote_are_found(store, root):
    about = make_image(store, "a")
    planted = []
    for number in range(3):
        document = image(layers=(), subject=subject(about), artifactType="x/%d" % number)
        planted.append(plant(root, "a", to_bytes(document)))
        assert digests_of(store.referrers("a", about.digest)) == sorted(planted)
    (root / TREE / link("a", REVISIONS, planted[1])).unlink()
    assert digests_of(store.referrers("a", about.digest)) == sorted([planted[0], planted[2]])


def test_referrers_of_a_large_repository_are_not_read_again_for_each_question(store, root, monkeypatch):
    """Twenty thousand manifests would cost half a second each time; but whatever comes is seen at once."""
    monkeypatch.setattr(tinyreg, "SETTLING_TIME", -1.0)
    about = make_image(store, "a")
    for number in range(20):
        make_image(store, "a", "t%d" % number, annotations={"number": str(number)})
    seen, read_link, read_file = [], store.layout.read_link, tinyreg.read_file
    monkeypatch.setattr(store.layout, "read_link", lambda folder: seen.append(folder) or read_link(folder))
    monkeypatch.setattr(tinyreg, "read_file", lambda path, *limit: seen.append(path) or read_file(path, *limit))

    def ask():
        """How many files are read for a question, and its answer."""
        del seen[:]
        digests = digests_of(store.referrers("a", about.digest))
        return len(seen), digests

    first = ask()[0]
    assert first > 20 and ask() == (2, []), "only the fallback tag is looked for"
    referrer = make_referrer(store, "a", about)
    assert ask()[1] == [referrer.digest] and len(seen) < 12, "what is known stays known"
    elsewhere = Directory(str(root))
    other = make_referrer(elsewhere, "a", about, artifactType="x/other")
    assert ask()[1] == sorted([referrer.digest, other.digest])
    elsewhere.delete_manifest("a", other.digest)
    assert ask()[1] == [referrer.digest]


@pytest.mark.parametrize("content", [b"", b"\x00\xff\n", b"sha256:0 -\n", b"cut off sha256:", None])
def test_the_referrers_index_may_be_lost_or_damaged(store, root, content):
    about = make_image(store, "a")
    referrer = make_referrer(store, "a", about)
    assert digests_of(store.referrers("a", about.digest)) == [referrer.digest]
    files = list((root / "tinyreg" / "referrers").rglob("*"))
    assert [path for path in files if path.is_file()]
    for path in files:
        if path.is_file():
            path.unlink() if content is None else path.write_bytes(content)
    assert digests_of(store.referrers("a", about.digest)) == [referrer.digest]
    again = make_referrer(store, "a", about, artifactType="application/x")
    assert digests_of(store.referrers("a", about.digest)) == sorted([referrer.digest, again.digest])


def test_referrers_without_a_place_for_their_index(store, root):
    about = make_image(store, "a")
    referrer = make_referrer(store, "a", about)
    (root / "tinyreg" / "referrers").write_bytes(b"a file in the way")
    assert digests_of(store.referrers("a", about.digest)) == [referrer.digest]


def test_foreign_manifests_that_are_none_don_t_hide_referrers(store, root):
    about = make_image(store, "a")
    referrer = make_referrer(store, "a", about)
    for content in (b"", b"{", b"[]", to_bytes({"subject": 1}), to_bytes({"subject": {"digest": "x"}}), b"\xff"):
        plant(root, "a", content)
    assert digests_of(store.referrers("a", about.digest)) == [referrer.digest]


# Referrers under fallback tags (distribution-spec, "Referrers Tag Schema" and "Enabling the Referrers API")

def fallback_tag(digest):
    return "%s-%s" % (digest.algorithm, digest.encoded[:64])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fallback_tag(store, root, algorithm):
    """Listed manifests count, with a subject or without, once each; others in the index don't."""
    about = make_image(store, "a", algorithm=algorithm)
    other = make_image(store, "a", "other", layers=())
    with_subject = make_referrer(store, "a", about)
    without = make_image(store, "a", None, layers=(), artifactType="application/x.old")
    of_another = make_referrer(store, "a", other)
    absent = to_manifest(image((b"never pushed",)))
    listed = to_bytes(index(with_subject, without, of_another, absent))
    plant(root, "a", listed, fallback_tag(about.digest))
    assert digests_of(store.referrers("a", about.digest)) == sorted([with_subject.digest, without.digest])
    assert digests_of(store.referrers("a", other.digest)) == [of_another.digest]
    unlisted = make_referrer(store, "a", about, artifactType="application/x.new")
    wanted = sorted([with_subject.digest, without.digest, unlisted.digest])
    assert digests_of(store.referrers("a", about.digest)) == wanted
    assert digests_of(store.referrers("a", about.digest, wanted[0])) == wanted[1:]
    store.delete_tag("a", fallback_tag(about.digest))
    assert digests_of(store.referrers("a", about.digest)) == sorted([with_subject.digest, unlisted.digest])


@pytest.mark.parametrize("document", [image(layers=()), {"manifests": 1}, {"manifests": [{"digest": "x"}]}, []])
def test_fallback_tag_on_something_else(store, root, document):
    about = make_image(store, "a")
    referrer = make_referrer(store, "a", about)
    plant(root, "a", to_bytes(document), fallback_tag(about.digest))
    assert digests_of(store.referrers("a", about.digest)) == [referrer.digest]


# Uploads

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_upload_goes_on_in_another_process(store, root, algorithm):
    """Another Directory on the same root knows nothing but the files."""
    store.start_upload("a").cancel()
    session = store.start_upload("a", algorithm)
    session.append(io.BytesIO(b"first, "), 0)
    resumed = Directory(str(root)).find_upload("a", session.id)
    assert resumed.offset == 7
    resumed.append(io.BytesIO(b"second, "), 7)
    again = store.find_upload("a", session.id)
    again.append(io.BytesIO(b"third"))
    digest = Digest.of(b"first, second, third", algorithm)
    Directory(str(root)).find_upload("a", session.id).commit(digest)
    assert read_blob(store, "a", digest) == b"first, second, third"
    assert refusal(store.find_upload, "a", session.id) == "BLOB_UPLOAD_UNKNOWN"


def test_no_upload_makes_a_store_anew_where_its_disk_was_mounted(store, root):
    make_image(store, "a")
    os.rename(str(root), str(root) + "-elsewhere")
    os.mkdir(str(root))
    with pytest.raises(FileNotFoundError):
        store.start_upload("a")
    assert os.listdir(str(root)) == []


def test_an_upload_that_distribution_began(store, root):
    session_id = "0198a7b4-1c0e-7000-8000-0123456789ab"
    folder = root / TREE / "repositories/a/_uploads" / session_id
    (folder / "hashstates/sha256").mkdir(parents=True)
    (folder / "hashstates/sha256/5").write_bytes(b"sha\x03")
    (folder / "data").write_bytes(b"begun")
    (folder / "startedat").write_text("2026-01-02T15:04:05Z")
    session = store.find_upload("a", session_id)
    session.append(io.BytesIO(b" and ended"), 5)
    session.commit(Digest.of(b"begun and ended"))
    assert read_blob(store, "a", Digest.of(b"begun and ended")) == b"begun and ended"
    assert not folder.exists()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_upload_committed_by_the_digest_that_was_not_announced(store, algorithm):
    session = store.start_upload("a", ALGORITHMS[algorithm == "sha256"])
    session.append(io.BytesIO(b"content"))
    session.commit(Digest.of(b"content", algorithm))
    assert list(store.digests()) == [Digest.of(b"content", algorithm)]


def test_more_uploads_than_hashes_are_kept(store, monkeypatch):
    monkeypatch.setattr(tinyreg, "HASHED_SESSIONS", 2)
    sessions = [store.start_upload("a") for _ in range(5)]
    for part in (b"one ", b"two"):
        for number, session in enumerate(sessions):
            session.append(io.BytesIO(part * number))
    for number, session in enumerate(sessions):
        session.commit(Digest.of(b"one " * number + b"two" * number))


def test_a_chunk_out_of_place(store):
    session = store.start_upload("a")
    session.append(io.BytesIO(b"0123"), 0)
    for start in (0, 3, 5):
        with pytest.raises(RegistryError) as caught:
            session.append(io.BytesIO(b"4567"), start)
        assert caught.value.code == "RANGE_INVALID" and session.offset == 4
    session.append(io.BytesIO(b"4567"), 4)
    session.commit(Digest.of(b"01234567"))


def test_wrong_digest_forgets_the_upload(store, root):
    session = store.start_upload("a")
    session.append(io.BytesIO(b"content"))
    assert refusal(session.commit, Digest.of(b"other")) == "DIGEST_INVALID"
    assert refusal(store.find_upload, "a", session.id) == "BLOB_UPLOAD_UNKNOWN"
    assert tree_of(root) == {}


def test_cancel(store, root):
    session = store.start_upload("a")
    session.append(io.BytesIO(b"content"))
    session.cancel()
    assert refusal(store.find_upload, "a", session.id) == "BLOB_UPLOAD_UNKNOWN"
    assert refusal(session.append, io.BytesIO(b"more")) == "BLOB_UPLOAD_UNKNOWN"
    assert refusal(session.commit, Digest.of(b"content")) == "BLOB_UPLOAD_UNKNOWN"
    assert tree_of(root) == {}


@pytest.mark.parametrize("size", [10, 200000])
def test_an_upload_that_is_cancelled_while_it_becomes_a_blob(store, monkeypatch, size):
    session = store.start_upload("a")
    session.append(io.BytesIO(b"x" * size))
    rename, threads = os.rename, []

    def cancel_and_rename(path, *to):
        if path == session.path:
            threads.append(threading.Thread(target=store.find_upload("a", session.id).cancel))
            threads[0].start()
            threads[0].join(0.1)
        rename(path, *to)

    monkeypatch.setattr(os, "rename", cancel_and_rename)
    session.commit(Digest.of(b"x" * size))
    threads[0].join()
    assert read_blob(store, "a", Digest.of(b"x" * size)) == b"x" * size
    assert not list(store.layout.iter_uploads())


def test_a_session_belongs_to_its_repository(store):
    session = store.start_upload("a")
    make_image(store, "b")
    assert refusal(store.find_upload, "b", session.id) == "BLOB_UPLOAD_UNKNOWN"


class Body:
    """A body that calls a function before it gives a block, or gives an error for one."""

    def __init__(self, *blocks):
        self.blocks = list(blocks)

    def readinto(self, view):
        block = self.blocks.pop(0) if self.blocks else b""
        if callable(block):
            block()
            return self.readinto(view)
        view[:len(block)] = block
        return len(block)


def leave():
    raise tinyreg.ClientLeft("left in the middle of a body")


def test_what_came_before_a_client_left_is_kept(store):
    session = store.start_upload("a")
    with pytest.raises(tinyreg.ClientLeft):
        session.append(Body(b"first half, ", leave))
    resumed = store.find_upload("a", session.id)
    assert resumed.offset == 12
    resumed.append(io.BytesIO(b"second half"), 12)
    resumed.commit(Digest.of(b"first half, second half"))


def test_two_writers_of_one_upload(store):
    """A client that came back goes on; the connection that it had lost fails when its bytes come at last."""
    lost, back = store.start_upload("a"), None

    def come_back():
        nonlocal back
        back = store.find_upload("a", lost.id)
        back.append(io.BytesIO(b"came back"))

    with pytest.raises(RegistryError) as caught:
        lost.append(Body(come_back, b"late"))
    assert caught.value.code == "RANGE_INVALID"
    back.commit(Digest.of(b"came back"))


def test_an_upload_that_became_a_blob_while_a_writer_was_at_it(store):
    lost = store.start_upload("a")

    def finish():
        session = store.find_upload("a", lost.id)
        session.append(io.BytesIO(b"content"))
        session.commit(Digest.of(b"content"))

    assert refusal(lost.append, Body(finish, b"late")) == "BLOB_UPLOAD_UNKNOWN"
    assert read_blob(store, "a", Digest.of(b"content")) == b"content"


def test_put_blob_goes_on_where_it_was_interrupted(store, root):
    digest = Digest.of(b"0123456789")
    asked = []

    def source(failing):
        def open_from(offset):
            asked.append(offset)
            blocks = [b"0123456789"[offset:offset + 4], leave if failing else b"0123456789"[offset + 4:]]
            blob = tinyreg.Blob(io.BytesIO(), 0, 10)
            blob.readinto = Body(*blocks).readinto
            return blob
        return open_from

    with pytest.raises(tinyreg.ClientLeft):
        store.put_blob("a", digest, source(True))
    Directory(str(root)).put_blob("a", digest, source(False))
    assert asked == [0, 4]
    assert read_blob(store, "a", digest) == b"0123456789"


# Many at once

WORK = """
import itertools, sys
sys.path[:0] = [%r, %r]
from samples import make_image, push_blob
from tinyreg import Directory, RegistryError
def work(root, who, rounds):
    store = Directory(root)
    for number in range(rounds):
        own = make_image(store, "lab/shared", "latest", layers=(b"shared", b"%%s %%d" %% (who, number)))
        store.put_manifest("lab/shared", own, [who.decode() + "-%%d" %% number])
        common = make_image(store, "lab/shared", "coming-and-going", layers=(b"shared",))
        for delete, what in ((store.delete_tag, "coming-and-going"), (store.delete_manifest, common.digest)):
            try:
                delete("lab/shared", what)
            except RegistryError as error:
                assert error.code == "MANIFEST_UNKNOWN", error
if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2].encode(), int(sys.argv[3]))
"""
WORK = WORK % (os.path.dirname(TINYREG), os.path.dirname(os.path.abspath(__file__)))


def test_pushes_and_deletions_from_threads_and_another_process(store, root):
    """Whatever was acknowledged and not deleted is there, whole; and nothing points to nothing."""
    scope = {"__name__": "work"}
    exec(WORK, scope)
    failures = []

    def run(who):
        try:
            scope["work"](str(root), who, 8)
        except BaseException as error:  # shown below, in the thread that decides
            failures.append(error)

    make_image(store, "lab/shared", "latest")
    other = subprocess.Popen([sys.executable, "-c", WORK, str(root), "process", "8"])
    threads = [threading.Thread(target=run, args=(b"thread%d" % number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) or other.poll() is None:
            manifest = store.manifest("lab/shared", store.resolve("lab/shared", "latest"))
            assert all(read_blob(store, "lab/shared", blob.digest) for blob in manifest.blobs)
    finally:
        for thread in threads:
            thread.join()
        other.wait()
    assert failures == [] and other.returncode == 0
    check_sound(root)
    wanted = {"%s-%d" % (who, number) for who, number in
              itertools.product(("process", "thread0", "thread1", "thread2"), range(8))}
    assert set(store.tags("lab/shared")) - {"coming-and-going", "latest"} == wanted
    assert store.resolve("lab/shared", "latest")
    for tag in wanted:
        who, number = tag.rsplit("-", 1)
        layer = Digest.of(("%s %s" % (who, number)).encode())
        assert layer in [blob.digest for blob in store.manifest("lab/shared", store.resolve("lab/shared", tag)).blobs]
    assert os.listdir(str(root / "tinyreg" / "scratch")) == []


def test_the_same_blob_from_many(store, root):
    content = b"x" * 100000
    barrier = threading.Barrier(6)
    digests = []

    def push(number):
        session = store.start_upload("repository%d" % (number % 2))
        session.append(io.BytesIO(content))
        barrier.wait(PATIENCE)
        session.commit(Digest.of(content))
        digests.append(read_blob(store, "repository%d" % (number % 2), Digest.of(content)))

    threads = [threading.Thread(target=push, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [content] * 6
    assert len(tree_of(root)) == 3
