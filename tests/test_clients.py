"""Real clients against a real server: push, forget, pull, compare, and run what came back.

The containers that are run check every file of their root filesystem against the list of checksums in it.
"""

import glob
import hashlib
import json
import os
import re
import signal
import subprocess

import pytest

from conftest import Client, found_pythons, until
from engines import run
from samples import image
from tinyreg import OCI_INDEX, OCI_MANIFEST, Digest

CHECK = ["/bin/sh", "-c", "sha256sum -c -s checksums && echo all intact"]


@pytest.fixture
def api(server):
    return Client(server)


def check_content(api, name, tag):
    """All that a tag's manifest refers to is served, and is what its digest says; returns the manifest's digest."""
    digest = api.digest(name, tag)
    content = api.ask("GET", "/v2/%s/manifests/%s" % (name, digest))[2]
    assert Digest.of(content) == digest
    document = json.loads(content.decode())
    for blob in [document["config"]] + document["layers"]:
        body = api.ask("GET", "/v2/%s/blobs/%s" % (name, blob["digest"]))[2]
        assert (Digest.of(body), len(body)) == (blob["digest"], blob["size"])
    return digest


# Docker Engine


@pytest.fixture
def docker_image(docker):
    """A function that makes a Docker image of a root filesystem; the images are deleted with the test."""
    made = []

    def make(folder, name):
        run("sh", "-c", 'tar -C "$0" -c . | "$@"', folder, *docker.command, "import", "-", name)
        made.append(name)
        return name

    yield make
    docker("image", "rm", "--force", *made)


def test_docker(server, api, docker, docker_image, image_root):
    name = docker_image(image_root, server.host + "/docker:1")
    image_id = docker("image", "inspect", "--format", "{{.Id}}", name)
    digest = re.search("sha256:[0-9a-f]{64}", docker("push", name)).group(0)
    assert check_content(api, "docker", "1") == digest
    docker("image", "rm", name)
    assert digest in docker("pull", name)
    assert docker("image", "inspect", "--format", "{{.Id}} {{.RepoDigests}}", name) == "%s [%s@%s]" % (
        image_id, server.host + "/docker", digest)
    assert docker("run", "--rm", "--network", "none", name, *CHECK) == "all intact"


def test_docker_pushes_a_layer_once(server, docker, docker_image, small_root):
    """A second repository mounts the layers of the first; a second push of the same finds all there."""
    first = docker_image(small_root, server.host + "/first:1")
    docker("push", first)
    second = server.host + "/second:1"
    docker("tag", first, second)
    assert "Mounted from first" in docker("push", second)
    assert "Layer already exists" in docker("push", second)
    docker("image", "rm", second)


def test_docker_pulls_by_digest(server, api, docker, docker_image, small_root):
    name = docker_image(small_root, server.host + "/pinned:1")
    docker("push", name)
    docker("image", "rm", name)
    pinned = "%s/pinned@%s" % (server.host, api.digest("pinned", "1"))
    docker("pull", pinned)
    docker("tag", pinned, name)
    docker("image", "rm", pinned)


def test_docker_is_told_why_it_may_not_push(start_server, docker, docker_image, small_root):
    """A 403 with a message: docker prints it and stops, where it would try a 405 five times."""
    server = start_server(None, "--anonymous", "pull")
    name = docker_image(small_root, server.host + "/denied:1")
    done = docker.run("push", name, ok=False)
    assert done.returncode == 1 and "serve --anonymous push" in done.stdout


def test_docker_is_told_of_a_quota_at_once(start_server, docker, docker_image, small_root):
    """It would try a 507 for almost a minute."""
    server = start_server(None, "--quota", "students/*=10K")
    done = docker.run("push", docker_image(small_root, server.host + "/students/alice/app:1"), ok=False)
    assert done.returncode == 1 and "denied: over the quota: students/alice has " in done.stdout, done.stdout
    assert "Retrying" not in done.stdout


# containerd


@pytest.fixture
def layout(skopeo, umoci, tmp_path):
    """A function that makes an image of a root filesystem with umoci: gives skopeo's name of it, `oci:FOLDER:TAG`."""

    def make(folder, tag="1"):
        place = str(tmp_path / "layout")
        umoci("init", "--layout", place)
        umoci("new", "--image", place + ":" + tag)
        umoci("insert", "--rootless", "--image", place + ":" + tag, folder, "/")
        umoci("config", "--image", place + ":" + tag, "--config.cmd", "/bin/sh")
        return "oci:%s:%s" % (place, tag)

    return make


def test_containerd(server, api, ctr, skopeo, layout, image_root, tmp_path):
    name, archive = server.host + "/containerd:1", str(tmp_path / "image.tar")
    skopeo("copy", layout(image_root), "oci-archive:%s:%s" % (archive, name))
    ctr("images", "import", archive)
    digest = listed_by(ctr)[name]
    ctr("images", "push", "--plain-http", name)
    assert check_content(api, "containerd", "1") == digest
    ctr("images", "rm", "--sync", name)
    ctr("content", "prune", "references")
    assert name not in listed_by(ctr)
    ctr("images", "pull", "--plain-http", name)
    assert listed_by(ctr)[name] == digest
    assert ctr("run", "--rm", name, "check", *CHECK) == "all intact"
    ctr("images", "rm", "--sync", name)


def listed_by(ctr):
    """{name: digest} of containerd's images."""
    lines = ctr("images", "ls").splitlines()[1:]
    return {line.split()[0]: line.split()[2] for line in lines if line}


# podman, buildah


def test_podman(server, api, podman, image_root, tmp_path):
    name, archive = server.host + "/podman:1", str(tmp_path / "root.tar")
    run("tar", "-C", image_root, "-cf", archive, ".")
    image_id = podman("import", "--quiet", archive, name)
    podman("push", "--quiet", "--tls-verify=false", "--digestfile", tmp_path / "digest", name)
    digest = (tmp_path / "digest").read_text()
    assert check_content(api, "podman", "1") == digest
    podman("image", "rm", name)
    assert podman("pull", "--quiet", "--tls-verify=false", name) == image_id.replace("sha256:", "")
    assert podman("image", "inspect", "--format", "{{.Digest}}", name) == digest
    assert podman("run", "--rm", "--network", "none", name, *CHECK) == "all intact"
    podman("image", "rm", name)


def test_buildah(server, api, buildah, image_root, tmp_path):
    name = server.host + "/buildah:1"
    buildah("commit", "--quiet", "--rm", from_folder(buildah, image_root), name)
    image_id = buildah("images", "--quiet", "--no-trunc", name)
    buildah("push", "--quiet", "--tls-verify=false", "--digestfile", tmp_path / "digest", name)
    digest = (tmp_path / "digest").read_text()
    assert check_content(api, "buildah", "1") == digest
    buildah("rmi", name)
    buildah("pull", "--quiet", "--tls-verify=false", name)
    assert buildah("images", "--quiet", "--no-trunc", name) == image_id
    container = buildah("from", "--pull-never", name)
    assert buildah("run", "--isolation", "chroot", container, "--", *CHECK) == "all intact"
    buildah("rm", container)
    buildah("rmi", name)


def from_folder(buildah, folder, *options):
    """A new working container with the folder's content; returns its name."""
    container = buildah("from", *options, "scratch")
    buildah("copy", "--quiet", container, folder, "/")
    return container


# skopeo, umoci


def test_skopeo_and_umoci(server, api, skopeo, umoci, layout, image_root, tmp_path):
    made, name = layout(image_root), "docker://%s/skopeo:1" % server.host
    skopeo("copy", "--dest-tls-verify=false", made, name)
    digest = check_content(api, "skopeo", "1")
    assert skopeo("inspect", "--format", "{{.Digest}}", made) == digest
    back = str(tmp_path / "back")
    skopeo("copy", "--src-tls-verify=false", name, "oci:%s:1" % back)
    assert skopeo("inspect", "--format", "{{.Digest}}", "oci:%s:1" % back) == digest
    umoci("unpack", "--image", back + ":1", tmp_path / "bundle")
    run("diff", "--recursive", "--no-dereference", image_root, tmp_path / "bundle" / "rootfs")


def test_skopeo_lists_and_deletes(server, api, skopeo, layout, small_root):
    """skopeo deletes what a tag points to, and with it every tag that points there."""
    name = "docker://%s/doomed" % server.host
    made = layout(small_root)
    for tag in ("1", "latest"):
        skopeo("copy", "--dest-tls-verify=false", made, name + ":" + tag)
    skopeo("copy", "--dest-tls-verify=false", "--format", "v2s2", made, name + ":docker")
    assert json.loads(skopeo("list-tags", "--tls-verify=false", name))["Tags"] == ["1", "docker", "latest"]
    skopeo("delete", "--tls-verify=false", name + ":1")
    assert json.loads(skopeo("list-tags", "--tls-verify=false", name))["Tags"] == ["docker"]
    assert "manifest unknown" in skopeo("inspect", "--tls-verify=false", name + ":latest", ok=False)
    check_content(api, "doomed", "docker")


def test_skopeo_is_told_that_schema_1_is_over(server, skopeo, layout, small_root):
    done = skopeo.run("copy", "--dest-tls-verify=false", "--format", "v2s1", layout(small_root),
                      "docker://%s/old:1" % server.host, ok=False)
    assert done.returncode == 1 and "schema 1 is not accepted" in done.stdout


def test_skopeo_pushes_again_after_kill_9(server, api, skopeo, layout, large_root, tmp_path):
    """The server dies in the middle of a push: the tag is not there; the same push, later, finds nothing in its way."""
    made, name = "dir:%s" % (tmp_path / "made"), "docker://%s/cut:1" % server.host
    skopeo("copy", "--dest-decompress", layout(large_root), made)  # so that it compresses while it pushes: that is slow
    command = [*skopeo.command, "copy", "--dest-tls-verify=false", made, name]
    uploads = os.path.join(server.root, "tinyreg/uploads/cut/_*")
    with subprocess.Popen(command, env=dict(os.environ, **skopeo.environment), stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as first:
        until(lambda: any(os.path.getsize(path) for path in glob.glob(uploads)), what="an upload", process=first)
        server.restart(signal.SIGKILL)
    assert first.returncode != 0
    assert api.digest("cut", "1") is None
    skopeo("copy", "--dest-tls-verify=false", made, name)
    check_content(api, "cut", "1")


@pytest.mark.parametrize("python", [pytest.param(path, id="%d.%d" % version) for version, path in
                                    sorted(found_pythons().items())])
def test_skopeo_with_every_python(start_server, skopeo, layout, small_root, tmp_path, python):
    server = start_server(python=python)
    made, name = layout(small_root), "docker://%s/any:1" % server.host
    skopeo("copy", "--dest-tls-verify=false", made, name)
    back = "oci:%s:1" % (tmp_path / "back")
    skopeo("copy", "--src-tls-verify=false", name, back)
    assert skopeo("inspect", "--format", "{{.Digest}}", back) == skopeo("inspect", "--format", "{{.Digest}}", made)
    assert server.stop() == 0


def test_a_client_that_insists_on_tls_says_what_is_wrong(server, skopeo):
    done = skopeo.run("inspect", "docker://%s/any:1" % server.host, ok=False)
    assert "server gave HTTP response to HTTPS client" in done.stdout


# The HTTP behind a client that tries TLS first


def test_docker_falls_back_to_http(server, docker, docker_image, small_root):
    """Docker takes addresses of this machine for insecure registries: it tries TLS, and then HTTP."""
    docker("push", docker_image(small_root, server.host + "/fallback:1"))


def test_containerd_falls_back_to_http(server, ctr, skopeo, layout, small_root):
    """So does containerd, which was told nothing but not to check certificates."""
    name = server.host + "/fallback:1"
    skopeo("copy", "--dest-tls-verify=false", layout(small_root), "docker://" + name)
    ctr("images", "pull", "--skip-verify", name)
    ctr("images", "rm", "--sync", name)
    ctr("images", "pull", name)
    ctr("images", "rm", "--sync", name)


# Images for several platforms


@pytest.fixture
def two_platforms(server, buildah, small_root):
    """The name of an index that buildah has made and pushed: images for amd64 and for arm64, which differ."""
    name, images = server.host + "/multi:1", []
    for architecture in ("amd64", "arm64"):
        container = from_folder(buildah, small_root, "--arch", architecture)
        buildah("config", "--arch", architecture, "--label", "made.for=" + architecture, container)
        images.append(buildah("commit", "--quiet", "--rm", container))
    buildah("manifest", "create", "multi", *images)
    buildah("manifest", "push", "--quiet", "--all", "--format", "oci", "--tls-verify=false", "multi",
            "docker://" + name)
    yield name
    buildah("manifest", "rm", "multi")
    buildah("rmi", *images, ok=False)  # podman, which has the same storage, may have deleted them already


def platforms(api, name, tag):
    """{architecture: digest} of an index's children."""
    return {child["platform"]["architecture"]: child["digest"] for child in api.manifest(name, tag)["manifests"]}


def test_docker_and_podman_pull_their_platform(server, api, two_platforms, docker, podman):
    children = platforms(api, "multi", "1")
    assert set(children) == {"amd64", "arm64"}
    for architecture, digest in children.items():
        check_content(api, "multi", digest)
        docker("pull", "--platform", "linux/" + architecture, two_platforms)
        podman("pull", "--quiet", "--tls-verify=false", "--arch", architecture, two_platforms)
        wanted = api.manifest("multi", digest)["config"]["digest"].replace("sha256:", "")
        assert docker("image", "inspect", "--format", "{{.Id}}", two_platforms) == "sha256:" + wanted
        assert podman("image", "inspect", "--format", "{{.Id}}", two_platforms) == wanted
        assert '"%s"' % architecture in podman("image", "inspect", "--format", "{{json .Labels}}", two_platforms)
        docker("image", "rm", two_platforms)
        podman("image", "rm", two_platforms)


def test_indexes_keep_their_digest(server, api, two_platforms, ctr, skopeo, tmp_path):
    """From registry to layout, to another repository, to containerd, and back: the same index, to the byte."""
    digest, back = api.digest("multi", "1"), "oci:%s:1" % (tmp_path / "back")
    skopeo("copy", "--all", "--preserve-digests", "--src-tls-verify=false", "docker://" + two_platforms, back)
    skopeo("copy", "--all", "--preserve-digests", "--dest-tls-verify=false", back,
           "docker://%s/again:1" % server.host)
    assert api.digest("again", "1") == digest
    ctr("content", "fetch", "--plain-http", "--all-platforms", two_platforms)
    assert listed_by(ctr)[two_platforms] == digest
    pushed = server.host + "/third:1"
    ctr("images", "tag", two_platforms, pushed)
    ctr("images", "push", "--plain-http", pushed)
    assert api.digest("third", "1") == digest
    for child in platforms(api, "third", "1").values():
        check_content(api, "third", child)
    ctr("images", "rm", "--sync", two_platforms, pushed)


# Referrers


def push_signature(api, name, subject_tag):
    """Push an artifact about an image, as cosign and notation do; returns its descriptor and the answer's headers."""
    headers = api.ask("HEAD", "/v2/%s/manifests/%s" % (name, subject_tag))[1]
    subject = {"mediaType": headers["Content-Type"], "digest": headers["Docker-Content-Digest"],
               "size": int(headers["Content-Length"])}
    signature, empty = b"signed, honestly", b"{}"
    for content in (signature, empty):
        api.put_blob(name, content)
    return api.put_manifest(name, image([signature], empty, subject=subject, artifactType="application/x.signature"))


def test_a_signature_is_found(server, api, skopeo, layout, small_root):
    name = "docker://%s/signed:1" % server.host
    skopeo("copy", "--dest-tls-verify=false", layout(small_root), name)
    digest = api.digest("signed", "1")
    signature, headers = push_signature(api, "signed", "1")
    assert headers["OCI-Subject"] == digest
    entry = dict(signature, artifactType="application/x.signature")
    assert api.ask("GET", "/v2/signed/referrers/" + digest).json["manifests"] == [entry]
    skopeo("delete", "--tls-verify=false", "docker://%s/signed@%s" % (server.host, signature["digest"]))
    assert api.referrers("signed", digest) == []


def test_a_signature_that_travels_by_its_fallback_tag(server, api, skopeo, layout, small_root):
    """Clients that know no referrers API keep a list of them in a tag. Who copies image and tag has the referrers."""
    made, name = layout(small_root), "docker://%s/%s:%s"
    skopeo("copy", "--dest-tls-verify=false", made, name % (server.host, "signed", "1"))
    digest = api.digest("signed", "1")
    signature, _ = push_signature(api, "signed", "1")
    listed = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [signature]}
    fallback = digest.replace(":", "-")
    api.put_manifest("signed", listed, fallback)
    for tag in ("1", fallback):
        skopeo("copy", "--all", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false",
               name % (server.host, "signed", tag), name % (server.host, "copied", tag))
    assert api.tags("copied") == ["1", fallback]
    assert api.referrers("copied", digest) == [signature["digest"]]


# curl


def test_curl(server, curl, image_root, tmp_path):
    """Push and pull with nothing but curl, as the README shows it; an interrupted download is resumed."""
    archive, back, url = str(tmp_path / "layer.tar"), tmp_path / "back.tar", server.url + "/v2/curl/"
    run("tar", "-C", image_root, "-cf", archive, ".")
    with open(archive, "rb") as file:
        layer = file.read()
    config = json.dumps({"os": "linux", "architecture": "amd64",
                         "rootfs": {"type": "layers", "diff_ids": [Digest.of(layer)]}}).encode()
    (tmp_path / "config").write_bytes(config)
    curl("--request", "POST", "--upload-file", tmp_path / "config", url + "blobs/uploads?digest=" + Digest.of(config))
    answer = curl("--request", "POST", "--include", url + "blobs/uploads/")
    location = re.search("(?m)^Location: (.*?)\r?$", answer).group(1)
    curl("--upload-file", archive, "%s%s?digest=%s" % (server.url, location, Digest.of(layer)))
    document = image([layer], config)
    (tmp_path / "manifest").write_text(json.dumps(document))
    curl("--header", "Content-Type: " + OCI_MANIFEST, "--upload-file", tmp_path / "manifest", url + "manifests/1")

    assert json.loads(curl(url + "manifests/1")) == document
    back.write_bytes(layer[:len(layer) // 3])
    curl("--continue-at", "-", "--output", back, url + "blobs/" + Digest.of(layer))
    assert hashlib.sha256(back.read_bytes()).hexdigest() == Digest.of(layer).encoded
