"""Blobs, manifests and images for the tests, and the pushing of them through the Registry interface."""

import gzip
import hashlib
import io
import json
import tarfile

from tinyreg import (DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Digest, parse_manifest)

CONFIG = b'{"os":"linux","architecture":"amd64"}'
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


def to_bytes(document):
    return json.dumps(document).encode()


def descriptor(content, media_type=LAYER_TYPE, algorithm="sha256", **fields):
    """The descriptor of these bytes, as a manifest has it."""
    return dict({"mediaType": media_type, "digest": Digest.of(content, algorithm), "size": len(content)}, **fields)


def image(layers=(b"layer one", b"layer two"), config=CONFIG, media_type=OCI_MANIFEST, algorithm="sha256", **fields):
    """The document of an image manifest; `fields` are added, or replace what is there."""
    document = {"schemaVersion": 2, "mediaType": media_type,
                "config": descriptor(config, CONFIG_TYPE, algorithm),
                "layers": [descriptor(layer, algorithm=algorithm) for layer in layers]}
    document.update(fields)
    return document


def index(*children, **fields):
    """The document of an index whose children are these Manifests."""
    entries = [{"mediaType": child.media_type, "digest": child.digest, "size": len(child.content)}
               for child in children]
    return dict({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}, **fields)


def to_manifest(document, algorithm="sha256"):
    """The Manifest of a document, checked as a pushed one is."""
    content = json.dumps(document).encode()
    return parse_manifest(content, digest=Digest.of(content, algorithm))


def push_blob(registry, name, content, algorithm="sha256"):
    """Upload these bytes; returns their digest."""
    digest = Digest.of(content, algorithm)
    session = registry.start_upload(name, algorithm)
    session.append(io.BytesIO(content))
    session.commit(digest)
    return digest


def make_image(registry, name, tag="latest", layers=(b"layer one", b"layer two"), config=CONFIG,
               media_type=OCI_MANIFEST, algorithm="sha256", **fields):
    """Push config, layers and manifest; returns the Manifest. No tag if `tag` is None."""
    for content in (config,) + tuple(layers):
        push_blob(registry, name, content, algorithm)
    manifest = to_manifest(image(layers, config, media_type, algorithm, **fields), algorithm)
    registry.put_manifest(name, manifest, [tag] if tag else [])
    return manifest


def real_image(store, name, tag="1", contents=None, architecture="amd64"):
    """An image that clients can unpack: layers with a file each, and a config that says so."""
    layers = [tar_of(content) for content in contents or [name.encode()]]
    diffs = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {"architecture": architecture, "os": "linux", "config": {"Cmd": ["/name"]},
              "rootfs": {"type": "layers", "diff_ids": diffs}}
    return make_image(store, name, tag, layers=[gzip.compress(layer) for layer in layers],
                      config=json.dumps(config).encode())


def tar_of(content):
    """A tar with one file."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        info = tarfile.TarInfo("name")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return tar.getvalue()


def make_docker_image(registry, name, tag="latest"):
    """The same in Docker's media type."""
    return make_image(registry, name, tag, media_type=DOCKER_MANIFEST)


def make_referrer(registry, name, subject, **fields):
    """Push an untagged image manifest about another Manifest; returns it."""
    about = {"mediaType": subject.media_type, "digest": subject.digest, "size": len(subject.content)}
    return make_image(registry, name, None, layers=(), subject=about, **fields)


def read_blob(registry, name, digest):
    """All bytes of a blob."""
    with registry.open_blob(name, digest) as blob:
        return blob.read()


# What a stranger may say: the title of the window, a screen that is cleared, a line of its own, a line
# that turns, half a character, and one that ASCII has not got.
EVIL = "\x1b]0;owned\x07\x1b[2J\x7f\x9b2J\r\nall is well\u2028\u202e\ud800\xfc"


def is_harmless(output):
    """Whether a command's output is lines of text and nothing else."""
    return not [letter for letter in output if letter != "\n" and not letter.isprintable()]


def buildkit_cache(registry, name, tag):
    """Push a cache as BuildKit exports it with image-manifest=false: an index of layers."""
    for content in b"cached layer", CONFIG:
        push_blob(registry, name, content)
    registry.put_manifest(name, to_manifest({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        descriptor(b"cached layer"),
        descriptor(CONFIG, "application/vnd.buildkit.cacheconfig.v0")]}), [tag])
