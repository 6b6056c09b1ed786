"""What other programs write, into tinyreg; and tinyreg's archives into them: across the gap with real clients."""

import json
import re
import subprocess
import sys

import pytest

from conftest import TINYREG, run_tinyreg
from engines import run
from samples import CONFIG_TYPE, descriptor, index, make_referrer, push_blob, read_blob, to_manifest
from tinyreg import OCI_MANIFEST, Archive, Digest, Directory, image_text

NAME = "docker.io/library/carried"


@pytest.fixture
def runnable(store, small_root, tmp_path):
    """An image that engines take: a gzipped layer with busybox, and a config that tells what is in it."""
    layer = tmp_path / "layer.tar"
    run("tar", "-C", small_root, "--sort=name", "-cf", layer, "bin", "etc")
    inner = Digest.of(layer.read_bytes())
    run("gzip", "-n", layer)
    content = (tmp_path / "layer.tar.gz").read_bytes()
    config = json.dumps({"os": "linux", "architecture": "amd64", "config": {"Cmd": ["/bin/sh"]},
                         "rootfs": {"type": "layers", "diff_ids": [inner]},
                         "history": [{"created_by": "test"}]}).encode()
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": {
        "mediaType": "application/vnd.oci.image.config.v1+json", "digest": push_blob(store, NAME, config),
        "size": len(config)}, "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                                          "digest": push_blob(store, NAME, content), "size": len(content)}]}
    manifest = to_manifest(document)
    store.put_manifest(NAME, manifest, ["1"])
    return manifest


@pytest.fixture
def archive(store, runnable, tmp_path):
    """tinyreg's archive of that image."""
    path = tmp_path / "carried.tar"
    done = run_tinyreg("save", "--root", store.root, "-o", path, "carried:1")
    assert done.returncode == 0, done.stderr
    return str(path)


def sign(store, manifest):
    """Push a signature of an image in NAME as cosign does, whose layer is no tar; returns its Manifest."""
    payload = b'{"critical":{"type":"cosign container image signature"}}'
    config = json.dumps({"architecture": "", "os": "", "config": {}, "created": "0001-01-01T00:00:00Z",
                         "history": [{"created": "0001-01-01T00:00:00Z"}],
                         "rootfs": {"type": "layers", "diff_ids": [Digest.of(payload)]}}).encode()
    for content in payload, config:
        push_blob(store, NAME, content)
    kind = "application/vnd.dev.cosign.simplesigning.v1+json"
    signature = to_manifest({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(config, CONFIG_TYPE),
        "layers": [descriptor(payload, kind, annotations={"dev.cosignproject.cosign/signature": "MEUC"})]})
    store.put_manifest(NAME, signature, ["sha256-%s.sig" % manifest.digest.encoded])
    return signature


def loaded(tmp_path, *paths):
    """A fresh store into which these archives were loaded."""
    root = str(tmp_path / "loaded")
    done = run_tinyreg("load", "--root", root, *paths)
    assert (done.returncode, done.stderr) == (0, "")
    return Directory(root)


# tinyreg's archives into others

def test_docker_loads_it_by_name(archive, runnable, docker):
    assert "carried:1" in docker("load", "--input", archive)
    try:
        assert docker("image", "inspect", "--format", "{{.Id}}", "carried:1") == runnable.blobs[0].digest
    finally:
        docker("image", "rm", "carried:1")


def test_podman_loads_it_with_its_digest(archive, runnable, podman):
    assert "docker.io/library/carried:1" in podman("load", "--input", archive)
    try:
        assert podman("image", "inspect", "--format", "{{.Digest}}", "carried:1") == runnable.digest
    finally:
        podman("image", "rm", "docker.io/library/carried:1")


def test_containerd_imports_it_with_its_digest(archive, runnable, ctr):
    ctr("images", "import", archive)
    try:
        line = [line for line in ctr("images", "ls").splitlines() if line.startswith(NAME + ":1 ")]
        assert line and runnable.digest in line[0]
    finally:
        ctr("images", "rm", NAME + ":1")


@pytest.mark.parametrize("transport", ["oci-archive:%s", "oci-archive:%s:docker.io/library/carried:1"])
def test_skopeo_copies_from_it_with_its_digest(archive, runnable, skopeo, tmp_path, transport):
    skopeo("copy", transport % archive, "dir:%s" % (tmp_path / "dir"))
    assert Digest.of((tmp_path / "dir" / "manifest.json").read_bytes()) == runnable.digest


def test_skopeo_reads_it_as_docker_archive(archive, runnable, skopeo):
    assert json.loads(skopeo("inspect", "--config", "docker-archive:" + archive))["config"] == {"Cmd": ["/bin/sh"]}


def test_umoci_unpacks_it(archive, umoci, tmp_path):
    folder = tmp_path / "layout"
    folder.mkdir()
    run("tar", "-C", folder, "-xf", archive)
    assert umoci("ls", "--layout", folder).splitlines() == [NAME + ":1"]


def test_several_images_with_a_signature_load_by_name(store, runnable, docker, ctr, podman, tmp_path):
    for blob in runnable.blobs:
        assert store.mount("quay.io/team/other", blob.digest)
    store.put_manifest("quay.io/team/other", runnable, ["2"])
    make_referrer(store, NAME, runnable)
    signature = sign(store, runnable)
    path = str(tmp_path / "two.tar")
    assert run_tinyreg("save", "--root", store.root, "-o", path, "carried:1", "quay.io/team/other:2").returncode == 0
    names = {NAME + ":1", "quay.io/team/other:2"}
    docker("load", "--input", path)
    podman("load", "--input", path)
    ctr("images", "import", path)
    try:
        assert "carried:1" in docker("images", "--format", "{{.Repository}}:{{.Tag}}").splitlines()
        assert names <= set(podman("images", "--format", "{{.Repository}}:{{.Tag}}").splitlines())
        assert names == set(ctr("images", "ls", "-q").splitlines())
        assert not [line for line in docker("images").splitlines() if "sha256-" in line]
    finally:
        docker("image", "rm", "carried:1", "quay.io/team/other:2")
        podman("image", "rm", *names)
        ctr("images", "rm", *ctr("images", "ls", "-q").splitlines())
    tag = "sha256-%s.sig" % runnable.digest.encoded
    assert loaded(tmp_path, path).resolve(NAME, tag) == signature.digest


def test_docker_loads_from_a_pipe(store, runnable, docker):
    save = subprocess.Popen([sys.executable, TINYREG, "save", "--root", store.root, "-o", "-", "carried:1"],
                            stdout=subprocess.PIPE)
    output = docker.run("load", stdin=save.stdout).stdout
    save.stdout.close()
    assert save.wait() == 0 and "carried:1" in output
    docker("image", "rm", "carried:1")


# Others' archives into tinyreg

def test_what_docker_save_wrote(archive, runnable, docker, tmp_path):
    docker("load", "--input", archive)
    path = str(tmp_path / "docker.tar")
    docker("save", "--output", path, "carried:1")
    docker("image", "rm", "carried:1")
    store = loaded(tmp_path, path)
    manifest = store.manifest(NAME, store.resolve(NAME, "1"))
    assert manifest.blobs[0].digest == runnable.blobs[0].digest
    inner = json.loads(read_blob(store, NAME, manifest.blobs[0].digest).decode())["rootfs"]["diff_ids"]
    assert [layer.digest for layer in manifest.blobs[1:]] == inner
    assert Archive([path]).resolve(NAME, "1") == manifest.digest


@pytest.mark.parametrize("form", ["oci-archive", "docker-archive", "oci-dir", "docker-dir"])
def test_what_podman_save_wrote(archive, runnable, podman, tmp_path, form):
    podman("load", "--input", archive)
    path = str(tmp_path / "carried")
    podman("save", "--format", form, "--output", path, "carried:1")
    podman("image", "rm", NAME + ":1")
    store = loaded(tmp_path, path)
    name = "carried" if form == "docker-dir" else NAME  # `dir:` has no names
    manifest = store.manifest(name, store.resolve(name, list(store.tags(name))[0]))
    assert manifest.blobs[0].digest == runnable.blobs[0].digest


def test_several_images_that_podman_saved_in_one_file(archive, runnable, podman, tmp_path):
    podman("load", "--input", archive)
    names = [NAME + ":1", "quay.io/team/other:2", "lab.example:5000/third:3"]
    for name in names[1:]:
        podman("tag", names[0], name)
    podman("save", "--multi-image-archive", "--output", tmp_path / "many.tar", *names)
    podman("image", "rm", *names)
    store = loaded(tmp_path, tmp_path / "many.tar")
    assert {image_text(name, tag) for name in store.repositories() for tag in store.tags(name)} == {
        name.replace(":5000", "_5000") for name in names}
    assert store.manifest(NAME, store.resolve(NAME, "1")).blobs[0].digest == runnable.blobs[0].digest


def test_what_ctr_exported(archive, runnable, ctr, tmp_path):
    ctr("images", "import", archive)
    path = str(tmp_path / "ctr.tar")
    ctr("images", "export", path, NAME + ":1")
    ctr("images", "rm", NAME + ":1")
    assert loaded(tmp_path, path).resolve(NAME, "1") == runnable.digest


@pytest.mark.parametrize("transport, name, tag, same", [
    ("oci-archive:%s:v1", "carried", "v1", True),
    ("oci:%s:v1", "carried", "v1", True),
    ("dir:%s", "carried", "latest", True),
    ("docker-archive:%s:carried:1", NAME, "1", False)])
def test_what_skopeo_copied(archive, runnable, skopeo, tmp_path, transport, name, tag, same):
    folder = tmp_path / "out"
    folder.mkdir()
    skopeo("copy", "oci-archive:" + archive, transport % (folder / "carried"))
    store = loaded(tmp_path, folder / "carried")
    manifest = store.manifest(name, store.resolve(name, tag))
    assert manifest.blobs[0].digest == runnable.blobs[0].digest
    assert (manifest.digest == runnable.digest) is same


@pytest.mark.parametrize("scoped", [True, False])
def test_what_skopeo_synced_into_a_folder(store, runnable, skopeo, start_server, tmp_path, scoped):
    store.put_manifest(NAME, to_manifest(index(runnable)), ["all"])
    server = start_server(store.root)
    skopeo("sync", "--all", "--src", "docker", "--dest", "dir", "--src-tls-verify=false",
           *["--scoped"][:scoped], "%s/%s" % (server.host, NAME), tmp_path / "synced")
    there = loaded(tmp_path, tmp_path / "synced")
    name = "%s/%s" % (server.host.replace(":", "_"), NAME) if scoped else "carried"
    assert {tag: there.resolve(name, tag) for tag in there.tags(name)} == {
        tag: store.resolve(NAME, tag) for tag in store.tags(NAME)}


def test_a_layout_that_umoci_made(umoci, tmp_path):
    layout = tmp_path / "made"
    umoci("init", "--layout", layout)
    umoci("new", "--image", "%s:v1" % layout)
    store = loaded(tmp_path, layout)
    digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
    assert store.resolve("made", "v1") == digest


def test_docker_pulls_from_a_served_archive(archive, runnable, docker, start_server):
    server = start_server(None, archive)
    name = "%s/%s:1" % (server.host, NAME)
    assert runnable.digest in docker("pull", name)
    docker("image", "rm", name)
    server.stop()
    assert re.search("serves +.*carried.tar", server.banner) and "docker pull localhost:" in server.banner
    assert "/%s:1\n" % NAME in server.banner and "docker push" not in server.banner
