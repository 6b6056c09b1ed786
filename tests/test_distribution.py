"""The store against CNCF Distribution itself: Debian's docker-registry (2.8) opens what tinyreg wrote, and back.

Images here are a few bytes each, made by `samples`; what real clients make of both is test_clients.py's.
"""

import json
import os
import re
import sys

import pytest

from conftest import Client, free_port, run_tinyreg
from engines import daemon, private_folder, require, run
from samples import image, index, make_docker_image, make_image, make_referrer, push_blob, to_manifest
from tinyreg import OCI_INDEX, OCI_MANIFEST, Digest, Directory


class Distribution:
    """docker-registry on a root: served for the length of a `with`, or collecting garbage."""

    def __init__(self, root, folder, storage=None):
        self.folder = folder
        self.config = os.path.join(folder, "config.yml")
        storage = storage or {"filesystem": {"rootdirectory": str(root)}}
        # No cache of descriptors: it would answer from memory for what tinyreg has changed meanwhile.
        config = {"version": 0.1, "log": {"level": "info"}, "http": {"addr": "127.0.0.1:0"},
                  "storage": dict(storage, delete={"enabled": True}, redirect={"disable": True})}
        with open(self.config, "w") as file:
            json.dump(config, file)  # which is YAML, too

    def collect(self, *options):
        """Collect garbage; returns what it printed. Raises AssertionError if it failed."""
        return run("docker-registry", "garbage-collect", self.config, *options).stdout

    def address(self):
        with open(os.path.join(self.folder, "docker-registry.log")) as log:
            return re.search(r"listening on (127\.0\.0\.1:[0-9]+)", log.read())

    def __enter__(self):
        self.running = daemon(["docker-registry", "serve", self.config], self.folder, self.address)
        self.running.__enter__()
        self.host = self.address().group(1)
        return Client("http://" + self.host)

    def __exit__(self, *exc_info):
        self.running.__exit__(*exc_info)


@pytest.fixture
def distribution(root):
    require("docker-registry")
    with private_folder("distribution") as folder:
        yield Distribution(root, folder)


@pytest.fixture
def serve(start_server, root):
    """A function that serves the root by tinyreg, and gives a Client that keeps no connection; it ends the
    server before, if there is one."""
    servers = []

    def start():
        stop()
        servers.append(start_server(root))
        return Client(servers[-1], keep=False)

    def stop():
        while servers:
            servers.pop().stop()

    start.stop = stop
    return start


def push_image(api, name, tag, *layers, **fields):
    """Push an OCI image through the API; returns its manifest's descriptor."""
    config = b'{"os":"linux","architecture":"amd64"}'
    for content in (config,) + layers:
        assert api.upload(name, content).status == 201
    return api.put_manifest(name, image(layers, config, **fields), tag)[0]


# A volume of docker-registry's opens in tinyreg


def test_images_that_docker_registry_stored(distribution, serve, root):
    with distribution as theirs:
        pushed = {tag: push_image(theirs, "their/app", tag, tag.encode()) for tag in ("1", "2")}
        joint, _ = theirs.put_manifest("their/app", {"schemaVersion": 2, "mediaType": OCI_INDEX,
                                                     "manifests": list(pushed.values())}, "all")
        push_image(theirs, "other", "1", b"shared", b"layers")
        theirs.ask("DELETE", "/v2/their/app/manifests/" + push_image(theirs, "their/app", "gone", b"gone")["digest"])
    ours = serve()
    assert ours.ask("GET", "/v2/_catalog").json["repositories"] == ["other", "their/app"]
    assert ours.tags("their/app") == ["1", "2", "all"]
    assert {tag: ours.digest("their/app", tag) for tag in ("1", "2", "all")} == {
        "1": pushed["1"]["digest"], "2": pushed["2"]["digest"], "all": joint["digest"]}
    for blob in (b"1", b"2"):
        assert ours.blob("their/app", Digest.of(blob)) == blob
    assert ours.blob("other", Digest.of(b"1")) is None  # another repository's


def test_the_history_of_a_tag_that_docker_registry_moved_and_its_undo(distribution, root):
    with distribution as theirs:
        old, new = (push_image(theirs, "app", "prod", layer)["digest"] for layer in (b"old", b"new"))
        os.utime(str(root / "docker/registry/v2/repositories/app/_manifests/tags/prod/index/sha256"
                     / Digest(old).encoded / "link"), (1e9, 1e9))
        history = json.loads(run_tinyreg("ls", "--history", "app:prod", "--json", "--root", root).stdout)
        assert [(entry["digest"], entry["present"], entry["gone"]) for entry in history] == [
            (new, True, False), (old, False, False)]
        assert run_tinyreg("tag", "--undo", "app:prod", "--root", root).returncode == 0
        assert run_tinyreg("tag", "app@" + new, "team/app:1", "--root", root).returncode == 0
        assert (theirs.digest("app", "prod"), theirs.digest("team/app", "1")) == (old, new)
        assert theirs.blob("team/app", Digest.of(b"new")) == b"new"


def test_skopeo_copies_to_docker_registry(distribution, serve, start_server, skopeo, tmp_path):
    """An image goes from tinyreg to docker-registry, and that volume is served by tinyreg: the same digest."""
    made = make_image(Directory(str(tmp_path / "source")), "app", "1")
    source = start_server(tmp_path / "source")
    with distribution:
        skopeo("copy", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false",
               "docker://%s/app:1" % source.host, "docker://%s/app:1" % distribution.host)
    ours = serve()
    assert ours.digest("app", "1") == made.digest
    assert [Digest.of(ours.blob("app", blob.digest)) for blob in made.blobs] == [blob.digest for blob in made.blobs]


def test_referrers_that_docker_registry_does_not_know(distribution, serve):
    """Clients that find no referrers API keep a list in a tag; tinyreg finds the manifests themselves."""
    with distribution as theirs:
        subject = push_image(theirs, "signed", "1", b"layer")
        assert theirs.ask("GET", "/v2/signed/referrers/" + subject["digest"])[0] == 404
        signature = push_image(theirs, "signed", None, b"signature", subject=subject)
        listed = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [signature]}
        theirs.put_manifest("signed", listed, subject["digest"].replace(":", "-"))
    ours = serve()
    assert ours.referrers("signed", subject["digest"]) == [signature["digest"]]
    assert ours.tags("signed") == ["1", subject["digest"].replace(":", "-")]


def test_an_upload_that_docker_registry_had_begun(distribution, serve):
    with distribution as theirs:
        location = theirs.ask("POST", "/v2/half/blobs/uploads/")[1]["Location"]
        assert theirs.ask("PATCH", location, b"first half, ")[0] == 202
    ours = serve()
    session = re.search("half/blobs/uploads/[^?]+", location).group(0)
    assert ours.ask("GET", "/v2/" + session)[1]["Range"] == "0-11"
    digest = Digest.of(b"first half, second half")
    status, _, answer = ours.ask("PUT", "/v2/" + session + "?digest=" + digest, b"second half")
    assert status == 201, answer
    serve.stop()
    with distribution as theirs:
        assert theirs.blob("half", digest) == b"first half, second half"


# A volume of tinyreg's opens in docker-registry


def test_images_that_tinyreg_stored(distribution, serve, store):
    made = {"oci": make_image(store, "our/app", "oci"), "docker": make_docker_image(store, "our/app", "docker"),
            "empty": make_image(store, "our/app", "empty", layers=(b"",))}
    made["all"] = to_manifest(index(made["oci"], made["docker"]))
    store.put_manifest("our/app", made["all"], ["all"])
    make_image(store, "other", "1", layers=(b"other",))
    with distribution as theirs:
        assert theirs.ask("GET", "/v2/_catalog").json["repositories"] == ["other", "our/app"]
        assert sorted(theirs.tags("our/app")) == sorted(made)
        for tag, manifest in made.items():
            assert theirs.digest("our/app", tag) == manifest.digest
            assert theirs.manifest_bytes("our/app", tag) == manifest.content
            for blob in manifest.blobs:
                assert Digest.of(theirs.blob("our/app", blob.digest)) == blob.digest


def everything(store):
    """All that a store holds: {name: (tags, digests)}."""
    return {name: (list(store.tags(name)), list(store.digests(name))) for name in store.repositories()}


def test_garbage_collection_by_docker_registry(distribution, serve, store):
    """It takes what nothing refers to, and nothing else. With -m that includes untagged manifests, so signatures too
    (it knows no subjects), but not what a tag points to."""
    kept = make_image(store, "app", "1", layers=(b"kept",))
    make_image(store, "elsewhere", "1", layers=(b"kept",))
    signature = make_referrer(store, "app", kept)
    make_image(store, "app", "old", layers=(b"untagged",))
    store.delete_tag("app", "old")
    dropped = make_image(store, "app", None, layers=(b"dropped",))
    store.delete_manifest("app", dropped.digest)
    push_blob(store, "app", b"never used")
    half = store.start_upload("app")

    before = set(store.digests())
    distribution.collect()
    assert before - set(store.digests()) == {Digest.of(b"dropped"), Digest.of(b"never used"), dropped.digest}
    assert store.find_upload("app", half.id).offset == 0
    ours = serve()
    assert ours.blob("app", Digest.of(b"never used")) is None  # though 2.8 leaves the repository's link to it
    assert ours.referrers("app", kept.digest) == [signature.digest]

    distribution.collect("-m")
    assert not os.path.exists(store.layout.blob_path(Digest.of(b"untagged")))
    assert ours.referrers("app", kept.digest) == []
    for name in ("app", "elsewhere"):
        assert ours.manifest_bytes(name, "1") == kept.content
        for blob in kept.blobs:
            assert Digest.of(ours.blob(name, blob.digest)) == blob.digest


def test_what_its_garbage_collection_leaves_behind_is_no_damage(distribution, serve, store):
    """2.8 takes blobs away, and leaves the links to them."""
    kept = make_image(store, "app", "1", layers=(b"kept",))
    dropped = make_image(store, "app", None, layers=(b"dropped", b"dropped, too"), config=b"{}")
    with distribution as theirs:
        assert theirs.ask("DELETE", "/v2/app/manifests/" + dropped.digest)[0] == 202
    distribution.collect()
    shown = run_tinyreg("verify", "--root", store.root)
    assert shown.returncode == 0, shown.stdout
    leftovers, verdict = shown.stdout.splitlines()
    assert leftovers == (
        "3 links to blobs that are gone and that no image needs: no harm; --repair removes that")
    assert verdict.endswith(": all is well")
    report = json.loads(run_tinyreg("verify", "--root", store.root, "--json", "--repair").stdout)
    assert (report["damage"], report["moved"], report["leftovers"]) == ([], [], 3)
    assert run_tinyreg("verify", "--root", store.root).stdout.count("links") == 0
    assert everything(store) == {"app": (["1"], sorted([kept.digest, *(blob.digest for blob in kept.blobs)]))}


def test_an_index_under_garbage_collection_by_docker_registry(distribution, serve, store):
    """Without -m an index keeps all it refers to; with -m 2.8 takes its untagged children away. tinyreg then still
    serves what is left, and says that the rest is missing."""
    children = [make_image(store, "app", None, layers=(layer,)) for layer in (b"for amd64", b"for arm64")]
    store.put_manifest("app", to_manifest(index(*children)), ["all"])
    before = everything(store)
    distribution.collect()
    assert everything(store) == before
    distribution.collect("-m")
    ours = serve()
    assert ours.manifest_bytes("app", "all") is not None
    assert [ours.manifest_bytes("app", child.digest) for child in children] == [None, None]
    assert list(store.digests("app")) == [ours.digest("app", "all")]


def test_there_and_back(distribution, serve, store):
    """From tinyreg to docker-registry, a push there, and back: what both stored is served, signatures found."""
    ours_first = make_image(store, "app", "ours", layers=(b"shared", b"ours"))
    signature = make_referrer(store, "app", ours_first)
    with distribution as theirs:
        pushed = push_image(theirs, "app", "theirs", b"shared", b"theirs")
        about = {"mediaType": OCI_MANIFEST, "digest": ours_first.digest, "size": len(ours_first.content)}
        second = push_image(theirs, "app", None, b"second signature", subject=about)
        assert theirs.ask("DELETE", "/v2/app/manifests/" + ours_first.digest)[0] == 202
        assert push_image(theirs, "app", "ours", b"new content of ours")["digest"] != ours_first.digest
    ours = serve()
    assert ours.tags("app") == ["ours", "theirs"]
    assert ours.digest("app", "theirs") == pushed["digest"]
    assert ours.blob("app", Digest.of(b"new content of ours")) == b"new content of ours"
    assert ours.manifest_bytes("app", ours_first.digest) is None
    assert ours.referrers("app", ours_first.digest) == sorted([signature.digest, second["digest"]])


@pytest.fixture
def s3():
    """The URL of an object store: moto's, which is empty and takes any key."""
    server = os.path.join(os.path.dirname(sys.executable), "moto_server")
    require("rclone", server)
    port = free_port()
    with private_folder("s3") as folder:
        with daemon([server, "-H", "127.0.0.1", "-p", str(port)], folder,
                    lambda: "Running on" in open(folder + "/moto_server.log").read()):
            yield "http://127.0.0.1:%d" % port


def test_the_way_to_s3_and_back(serve, store, s3, root, tmp_path, monkeypatch):
    """As the README has it: rclone copies the tree into a bucket, Distribution serves it there; and back."""
    ours_first = make_image(store, "app", "ours", layers=(b"shared", b"ours"))
    remote = ":s3,provider=Other,access_key_id=key,secret_access_key=secret,endpoint='%s':registry/docker" % s3
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)  # the SDK of these old versions fails on it
    environment = {"RCLONE_CONFIG": str(tmp_path / "none")}
    run("rclone", "copy", root / "docker", remote, environment=environment)
    storage = {"s3": {"regionendpoint": s3, "region": "us-east-1", "bucket": "registry", "accesskey": "key",
                      "secretkey": "secret", "secure": False}}
    with private_folder("distribution") as folder, Distribution(root, folder, storage) as theirs:
        assert theirs.manifest_bytes("app", "ours") == ours_first.content
        assert {theirs.blob("app", blob.digest) for blob in ours_first.blobs} >= {b"shared", b"ours"}
        pushed = push_image(theirs, "app", "theirs", b"shared", b"theirs")
    run("rclone", "copy", remote, root / "docker", environment=environment)
    ours = serve()
    assert ours.tags("app") == ["ours", "theirs"] and ours.digest("app", "theirs") == pushed["digest"]
    assert run_tinyreg("verify", "--root", root).returncode == 0


def test_an_upload_that_tinyreg_had_begun(distribution, serve, store):
    """docker-registry can't go on with it (its Locations are signed), but isn't disturbed, nor harms it."""
    make_image(store, "half", "1")
    session = store.start_upload("half")
    ours = serve()
    path = "half/blobs/uploads/" + session.id
    assert ours.ask("PATCH", "/v2/" + path, b"first half, ")[0] == 202
    serve.stop()
    distribution.collect()
    with distribution as theirs:
        assert theirs.tags("half") == ["1"]
        push_image(theirs, "half", "2", b"another")
    digest = Digest.of(b"first half, second half")
    assert serve().ask("PUT", "/v2/" + path + "?digest=" + digest, b"second half")[0] == 201


# sha512


def test_sha512_in_docker_registry(distribution, serve, store):
    """What only sha512 names lies where 2.8 finds it, too: it serves it, and its garbage collection keeps it."""
    made = make_image(store, "app", "1", layers=(b"long",), algorithm="sha512")
    make_image(store, "app", "2", layers=(b"short",))
    push_blob(store, "app", b"mixed", "sha512")
    mixed = to_manifest(image((b"mixed",), algorithm="sha512"))  # by sha256 itself, its blobs by sha512
    store.put_manifest("app", mixed, ["3"])
    assert (made.digest.algorithm, mixed.digest.algorithm) == ("sha512", "sha256")
    with distribution as theirs:
        for tag, manifest in (("1", made), ("3", mixed)):
            assert theirs.digest("app", tag) == manifest.digest
            assert theirs.manifest_bytes("app", tag) == manifest.content
            for blob in manifest.blobs:
                assert Digest.of(theirs.blob("app", blob.digest), "sha512") == blob.digest
    before = everything(store)
    distribution.collect()
    assert everything(store) == before
    distribution.collect("-m")
    assert everything(store) == before


def test_a_blob_that_docker_registry_took_by_its_sha512(distribution, serve):
    """It stores the bytes by their sha256, and links to them from both: so a link may name another digest."""
    long = Digest.of(b"taken by sha512", "sha512")
    with distribution as theirs:
        location = theirs.ask("POST", "/v2/app/blobs/uploads/")[1]["Location"]
        path = re.sub("^.*/v2/", "", location)
        assert theirs.ask("PUT", "/v2/" + path + "&digest=" + long, b"taken by sha512")[0] == 201
    ours = serve()
    status, headers, content = ours.ask("GET", "/v2/app/blobs/" + long)
    assert (status, headers["Docker-Content-Digest"], content) == (200, long, b"taken by sha512")
    assert ours.blob("app", Digest.of(b"taken by sha512")) == b"taken by sha512"
    assert ours.ask("POST", "/v2/other/blobs/uploads/?from=app&mount=" + long)[0] == 201
    assert ours.blob("other", long) == b"taken by sha512"


# Damage, as registry:2 leaves it after a crash or on a full disk


def empty(path):
    assert os.path.getsize(path) > 0
    open(path, "w").close()


@pytest.fixture
def their_volume(distribution):
    """An image `app:1` of layers b"one" and b"two", stored by docker-registry; gives its digest."""
    with distribution as theirs:
        return Digest(push_image(theirs, "app", "1", b"one", b"two")["digest"])


def test_damage_opens_and_a_push_mends_it(their_volume, serve, root):
    """Links and blobs of no bytes, blobs cut short: missing for clients, who push them again, as on any push."""
    store = Directory(str(root))
    places = {
        "a blob's link": store.layout.layer_path("app", Digest.of(b"one")) + "/link",
        "a blob": store.layout.blob_path(Digest.of(b"two")),
        "a manifest": store.layout.blob_path(their_volume),
        "a manifest's link": store.layout.revision_path("app", their_volume) + "/link",
        "a tag's link": store.layout.tag_path("app", "1") + "/current/link",
    }
    ours = serve()
    for what, path in places.items():
        empty(path)
        check_missing(ours, their_volume, what)
        mend(ours, their_volume, what)
    for path in places.values():
        empty(path)
    check_missing(ours, their_volume, "everything")
    mend(ours, their_volume, "everything")


def test_a_blob_cut_short_is_noticed_by_the_next_push(start_server, root, skopeo, tmp_path):
    """Clients don't push a blob that they are told is there. So that push fails, and from then on the blob is missing
    for all: the next push brings it."""
    made = make_image(Directory(str(tmp_path / "source")), "app", "1")
    store, cut = Directory(str(root)), made.blobs[1].digest
    ours, name = start_server(root), "docker://%s/app:1"
    source = start_server(tmp_path / "source")
    command = ["copy", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false",
               name % source.host, name % ours.host]
    skopeo(*command)
    with open(store.layout.blob_path(cut), "r+b") as file:
        file.truncate(2)
    assert "manifest blob unknown" in skopeo(*command, ok=False)
    assert "damaged blob" in ours.log()
    skopeo(*command)
    api = Client(ours)
    assert api.digest("app", "1") == made.digest
    assert Digest.of(api.blob("app", cut)) == cut


def check_missing(api, digest, what):
    """Nothing crashes: each part is there, whole, or is answered as missing; not all of them are there."""
    statuses = [api.ask("GET", "/v2/app/manifests/1")[0], api.ask("GET", "/v2/app/manifests/" + digest)[0]]
    statuses += [api.ask("GET", "/v2/app/blobs/" + Digest.of(blob))[0] for blob in (b"one", b"two")]
    assert set(statuses) <= {200, 404} and 404 in statuses, what
    assert api.ask("GET", "/v2/app/tags/list")[0] == 200, what
    assert api.ask("GET", "/v2/_catalog")[0] == 200, what


def mend(api, digest, what):
    """Push the image again; all of it is served then."""
    assert push_image(api, "app", "1", b"one", b"two")["digest"] == digest, what
    assert api.digest("app", "1") == digest, what
    assert Digest.of(api.manifest_bytes("app", digest)) == digest, what
    for blob in (b"one", b"two"):
        assert api.blob("app", Digest.of(blob)) == blob, what


def test_a_mended_volume_is_good_for_docker_registry(their_volume, serve, distribution, root):
    """2.8 itself never gets over such damage: its garbage collection stops, and a push leaves the blob as it is."""
    store = Directory(str(root))
    empty(store.layout.blob_path(Digest.of(b"one")))
    empty(store.layout.revision_path("app", their_volume) + "/link")
    with pytest.raises(AssertionError, match="invalid checksum digest"):
        distribution.collect()
    mend(serve(), their_volume, "a blob and a manifest's link")
    serve.stop()
    distribution.collect("-m")
    with distribution as theirs:
        assert theirs.blob("app", Digest.of(b"one")) == b"one"
        assert theirs.digest("app", "1") == their_volume


# What a registry that takes an index only with all its children is given


def two_platforms(store, name):
    """Push an index of two images, one signed as cosign does; returns the index and its children."""
    children = [make_image(store, name, None, layers=(b"for " + architecture,),
                           config=b'{"os":"linux","architecture":"%s"}' % architecture)
                for architecture in (b"amd64", b"arm64")]
    document = index(*children)
    for entry, architecture in zip(document["manifests"], ("amd64", "arm64")):
        entry["platform"] = {"os": "linux", "architecture": architecture}
    both = to_manifest(document)
    store.put_manifest(name, both, ["1"])
    make_image(store, name, "sha256-%s.sig" % children[0].digest.encoded, layers=(b"signed",))
    return both, children


@pytest.mark.parametrize("way", ["push", "load", "save --strip"])
def test_a_strict_registry_takes_one_platform_with_strip_and_the_refusal_says_so(distribution, tmp_path, way):
    store = Directory(str(tmp_path / "store"))
    both, (amd64, arm64) = two_platforms(store, "app")
    archive = tmp_path / "one.tar"
    platform = ["--platform", "linux/amd64"]
    if way != "push":
        strip = ["--strip"] if way == "save --strip" else []
        done = run_tinyreg("save", "--root", store.root, "-o", archive, "app:1", *platform + strip)
        assert done.returncode == 0, done.stderr
    command = ["push", "--root", store.root, "app:1"] + platform if way == "push" else ["load", archive]
    with distribution as theirs:
        there = ["--to", distribution.host, "--plain-http"]
        if way != "save --strip":
            done = run_tinyreg(*command + there)
            assert done.returncode == 1 and "--strip" in done.stderr.splitlines()[0]
            command.append("--strip")
        done = run_tinyreg(*command + there)
        assert (done.returncode, done.stderr) == (0, "")
        assert way == "save --strip" or both.digest in done.stdout and amd64.digest in done.stdout
        assert theirs.digest("app", "1") == amd64.digest
        assert theirs.blob("app", amd64.blobs[1].digest) == b"for amd64"
        assert theirs.digest("app", "sha256-%s.sig" % amd64.digest.encoded)
