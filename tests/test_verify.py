"""Verification: everything that can be damaged is named, with what it harms, and a push mends it."""

import json
import os
import shutil
import subprocess
import time

import pytest

from conftest import run_tinyreg
from samples import CONFIG, descriptor, image, index, make_image, make_referrer, push_blob, read_blob, to_manifest
from tinyreg import Digest, StoreVerification

LAYERS = (b"layer one", b"layer two")


def overwrite(path, content):
    with open(path, "wb") as file:
        file.write(content)


def verify(store, repair=False):
    """{(what, name): images harmed}"""
    check = StoreVerification(store, repair=repair)
    check.run()
    return {(what, name): images for (what, name, _), images in check.findings.items()}


def count_files(store):
    """How many there are, but for the referrers index, which repair forgets, and journals, which it settles."""
    return sum(len(names) - names.count("_index") for folder, _, names in os.walk(store.root)
               if folder != store.layout.journal)


def link_of(folder):
    return os.path.join(folder, "link")


def test_all_is_well(store):
    first = make_image(store, "a/b")
    store.put_manifest("a/b", to_manifest(index(first)), ["multi"])
    make_referrer(store, "a/b", first)
    make_image(store, "five", algorithm="sha512")
    list(store.referrers("a/b", first.digest))
    make_image(store, "a/b", layers=(b"the tag moves on",))
    store.delete_manifest("a/b", store.resolve("a/b", "latest"))
    shown = run_tinyreg("verify", "--root", store.root)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.endswith(": all is well\n")


# Each kind of damage: what is done to an image app:latest (and app:other, untouched), what verify says

def flip(store, manifest):
    overwrite(store.layout.blob_path(Digest.of(b"layer one")), b"layer 0ne")
    return {("damaged blob", Digest.of(b"layer one")): {"app:latest", "app:multi"}}


def truncate(store, manifest):
    overwrite(store.layout.blob_path(Digest.of(b"layer one")), b"")
    return {("damaged blob", Digest.of(b"layer one")): {"app:latest", "app:multi"}}


def damage_manifest(store, manifest):
    overwrite(store.layout.blob_path(manifest.digest), b"")
    return {("damaged blob", manifest.digest): {"app:latest", "app:multi"}}


def lose_blob(store, manifest):
    os.unlink(store.layout.blob_path(Digest.of(b"layer one")))
    return {("link to a missing blob", Digest.of(b"layer one")): {"app:latest", "app:multi"},
            ("missing blob", Digest.of(b"layer one")): {"app:latest", "app:multi"}}


def empty_layer_link(store, manifest):
    overwrite(link_of(store.layout.layer_path("app", Digest.of(b"layer one"))), b"")
    return {("damaged link", Digest.of(b"layer one")): {"app:latest", "app:multi"},
            ("missing blob", Digest.of(b"layer one")): {"app:latest", "app:multi"}}


def lose_layer_link(store, manifest):
    os.unlink(link_of(store.layout.layer_path("app", Digest.of(b"layer one"))))
    return {("missing blob", Digest.of(b"layer one")): {"app:latest", "app:multi"}}


def lose_manifest(store, manifest):
    os.unlink(store.layout.blob_path(manifest.digest))
    return {("link to a missing blob", manifest.digest): {"app:latest", "app:multi"},
            ("tag without manifest", "latest"): {"app:latest"}}


def empty_revision_link(store, manifest):
    overwrite(link_of(store.layout.revision_path("app", manifest.digest)), b"")
    return {("damaged link", manifest.digest): {"app:latest", "app:multi"},
            ("tag without manifest", "latest"): {"app:latest"}}


def empty_tag(store, manifest):
    overwrite(link_of(os.path.join(store.layout.tag_path("app", "latest"), "current")), b"")
    return {("damaged link", "latest"): {"app:latest"}}


@pytest.mark.parametrize("damage", [flip, truncate, damage_manifest, lose_blob, empty_layer_link, lose_layer_link,
                                    lose_manifest, empty_revision_link, empty_tag])
def test_damage_is_named_put_aside_and_mended(store, damage):
    manifest = make_image(store, "app", layers=LAYERS)
    multi = to_manifest(index(manifest))
    store.put_manifest("app", multi, ["multi"])
    make_image(store, "app", "other", layers=(b"layer two",))
    list(store.referrers("app", manifest.digest))
    wanted = damage(store, manifest)
    assert verify(store) == wanted
    size = count_files(store)
    verify(store, repair=True)
    assert count_files(store) == size  # moved, not deleted
    make_image(store, "app", layers=LAYERS)
    store.put_manifest("app", multi, ["multi"])
    assert verify(store) == {}
    assert read_blob(store, "app", Digest.of(b"layer one")) == b"layer one"
    assert list(store.referrers("app", manifest.digest)) == []


def test_a_link_that_leads_nowhere_is_damage_where_an_image_needs_it(store):
    make_image(store, "app", layers=(b"layer one",))
    make_image(store, "app", None, layers=(b"untagged",))
    for content in (b"untagged", b"stray"):
        os.unlink(store.layout.blob_path(push_blob(store, "app", content)))
    untagged, = set(store.revisions("app")) - {store.resolve("app", "latest")}
    check = StoreVerification(store)
    check.run()
    assert {(what, name) for what, name, _ in check.findings} == {
        (what, Digest.of(b"untagged")) for what in ("missing blob", "link to a missing blob")}
    assert set.union(*check.findings.values()) == {"app@" + untagged}
    assert check.leftovers == [link_of(store.layout.layer_path("app", Digest.of(b"stray")))]
    os.unlink(store.layout.blob_path(untagged))
    assert verify(store, repair=True) == {("link to a missing blob", untagged): set()}
    assert not os.path.exists(store.layout.layer_path("app", Digest.of(b"stray")))


def test_a_push_mends_without_repair_too(store):
    manifest = make_image(store, "app", layers=LAYERS)
    flip(store, manifest)
    make_image(store, "app", layers=LAYERS)
    assert verify(store) == {}


def test_repair_lets_the_referrers_index_be_made_anew(store):
    manifest = make_image(store, "app", layers=LAYERS)
    referrer = make_referrer(store, "app", manifest)
    assert [found.digest for found in store.referrers("app", manifest.digest)] == [referrer.digest]
    overwrite(store.layout.referrers_path("app"), ("%s -\n" % referrer.digest).encode())
    assert list(store.referrers("app", manifest.digest)) == []
    verify(store, repair=True)
    assert [found.digest for found in store.referrers("app", manifest.digest)] == [referrer.digest]


def test_foreign_layers_and_children_left_out_are_no_damage(store):
    absent = to_manifest({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []})
    store.put_manifest("app", to_manifest(index(absent)), ["sparse"])
    push_blob(store, "app", CONFIG)
    layer = descriptor(b"windows", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
    store.put_manifest("app", to_manifest(dict(image(()), layers=[layer])), ["windows"])
    assert verify(store) == {}


def test_an_untagged_image_is_named_by_its_digest(store):
    manifest = make_image(store, "app", None, layers=LAYERS)
    flip(store, manifest)
    assert verify(store) == {("damaged blob", Digest.of(b"layer one")): {"app@" + manifest.digest}}


def test_the_command(store):
    manifest = make_image(store, "app", layers=LAYERS)
    digest = Digest.of(b"layer one")
    flip(store, manifest)
    shown = run_tinyreg("verify", "--root", store.root)
    assert shown.returncode == 1
    assert shown.stdout.startswith("damaged blob: %s (%s)\n    harms app:latest\n"
                                   % (digest, store.layout.blob_path(digest)))
    shown = run_tinyreg("verify", "--root", store.root, "--repair", "--dry-run")
    assert shown.returncode == 1 and "\nwould be put aside: %s\n" % store.layout.blob_path(digest) in shown.stdout
    assert os.path.exists(store.layout.blob_path(digest)) and not os.path.exists(store.layout.own + "/damaged")
    report = json.loads(run_tinyreg("verify", "--root", store.root, "--json", "--repair").stdout)
    assert report["damage"] == [{"what": "damaged blob", "name": digest, "path": store.layout.blob_path(digest),
                                 "harms": ["app:latest"]}]
    moved, = report["moved"]
    with open(moved, "rb") as file:
        assert file.read() == b"layer 0ne"
    assert moved.startswith(os.path.join(store.layout.own, "damaged"))
    assert not os.path.exists(store.layout.blob_path(digest))


def test_repair_of_a_blob_that_clients_ask_for_meanwhile(store, monkeypatch):
    """A mount touches it, and changes nothing."""
    flip(store, make_image(store, "app", layers=LAYERS))
    check = StoreVerification(store, repair=True)
    path = store.layout.blob_path(Digest.of(b"layer one"))
    found = check._read_blobs
    monkeypatch.setattr(check, "_read_blobs", lambda: (found(), os.utime(path, (1, 1))))
    check.run()
    assert len(check.moved) == 1 and not os.path.exists(path)


def test_rate(store):
    for number in range(3):
        push_blob(store, "app", bytes([number]) * (1 << 20))
    began = time.monotonic()
    assert run_tinyreg("verify", "--root", store.root, "--rate", "2M").returncode == 0
    assert time.monotonic() - began > 1.2


def test_repair_leaves_what_a_push_has_mended_meanwhile(store, monkeypatch):
    manifest = make_image(store, "app", layers=LAYERS)
    flip(store, manifest)
    check = StoreVerification(store, repair=True)
    found = check._read_blobs
    monkeypatch.setattr(check, "_read_blobs", lambda: (found(), make_image(store, "app", layers=LAYERS)))
    check.run()
    assert check.moved == []
    assert read_blob(store, "app", Digest.of(b"layer one")) == b"layer one"


@pytest.mark.skipif(not shutil.which("docker-registry"), reason="docker-registry is not installed")
def test_a_volume_on_which_distribution_gives_up_is_repaired_for_it(store, tmp_path):
    config = tmp_path / "config.yml"
    config.write_text("version: 0.1\nstorage: {filesystem: {rootdirectory: %s}}\n" % store.root)
    collect = ["docker-registry", "garbage-collect", str(config)]
    manifest = make_image(store, "app", layers=LAYERS)
    make_image(store, "app", "other", layers=(b"layer two",))
    damage_manifest(store, manifest)
    overwrite(link_of(store.layout.revision_path("app", Digest.of(b"x"))[:-64] + manifest.digest.encoded), b"")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert subprocess.run(collect, **quiet).returncode != 0
    assert run_tinyreg("verify", "--repair", "--root", store.root).returncode == 1
    assert subprocess.run(collect, **quiet).returncode == 0
    make_image(store, "app", layers=LAYERS)
    assert verify(store) == {}
