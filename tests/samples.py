"""Blobs, manifests and images for the tests, and the pushing of them through the Registry interface."""

import io
import json

from tinyreg import (DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Digest, parse_manifest)

CONFIG = b'{"os":"linux","architecture":"amd64"}'
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


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
