"""API: what each endpoint answers, to the letter of its headers; through dispatch, without a socket."""

import errno
import io
import itertools
import json
import os
import re
import urllib.parse

import pytest

import tinyreg
from conftest import by_digest
from samples import (CONFIG, CONFIG_TYPE, descriptor, image, index, make_docker_image, make_image,
                     make_referrer, push_blob, read_blob, to_bytes, to_manifest)
from tinyreg import (DOCKER_LIST, DOCKER_MANIFEST, DOCKER_SCHEMA1, JSON, MAX_MANIFEST, OCI_ARTIFACT, OCI_INDEX,
                     OCI_MANIFEST, OCTET_STREAM, ROUTES, Access, Digest, Directory, Registry, Request, dispatch)

ALGORITHMS = ("sha256", "sha512")
NOWHERE = Digest.of(b"not in the registry")
SESSION = "01234567-89ab-4cde-8f01-23456789abcd"


class Answer:
    """A Response with its body read: status, headers as they are sent, body, and the JSON in it."""

    def __init__(self, response):
        self.status = response.status
        self.headers = response.headers
        self.length = response.length
        if isinstance(response.body, bytes):
            self.body = response.body
        else:
            with response.body as blob:
                self.body = blob.read()

    def header(self, name):
        """The value of a header, None where it is not there."""
        return dict(self.headers).get(name)

    @property
    def json(self):
        return json.loads(self.body.decode())

    @property
    def code(self):
        """The one error code of a refusal."""
        codes = {entry["code"] for entry in self.json["errors"]}
        assert len(codes) == 1 and self.header("Content-Type") == JSON
        return codes.pop()


class Client:
    def __init__(self, registry, level="admin"):
        self.registry = registry
        self.level = level

    def __call__(self, method, target, body=b"", **headers):
        """The Answer to a request; headers in Python's spelling (content_range)."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return Answer(dispatch(self.registry, Access(self.level), Request(method, target, headers, io.BytesIO(body))))


@pytest.fixture
def call(store):
    return Client(store)


# Determining support

@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/v2/", "/v2"])
def test_base(call, method, path):
    answer = call(method, path)
    assert (answer.status, answer.headers, answer.json) == (200, [("Content-Type", JSON)], {})


@pytest.mark.parametrize("path", ["/v1/", "/v3/", "/v2/a", "/v2/a/b", "/v2/a/manifests", "/v2//", "/x",
                                  "/v2/a/tags/list/", "/v2/a/blobs/x/y", "/v2/tags/list", "/v2/a%0Ab/tags/list"])
def test_no_endpoint(call, path):
    assert call("GET", path).status == 404


# What is refused, by code and status

ERRORS = [
    # method, path, status, code
    ("GET", "/v2/Bad/tags/list", 400, "NAME_INVALID"),
    ("GET", "/v2/a//b/tags/list", 400, "NAME_INVALID"),
    ("GET", "/v2/a%00/tags/list", 400, "NAME_INVALID"),
    ("GET", "/v2/..%2f..%2fetc/tags/list", 400, "NAME_INVALID"),
    ("GET", "/v2/" + "a" * 256 + "/tags/list", 400, "NAME_INVALID"),
    ("GET", "/v2/%s/manifests/latest" % urllib.parse.quote("ä"), 400, "NAME_INVALID"),
    ("POST", "/v2/Bad/blobs/uploads/", 400, "NAME_INVALID"),
    ("PUT", "/v2/Bad/manifests/latest", 400, "NAME_INVALID"),
    ("DELETE", "/v2/Bad/manifests/latest", 400, "NAME_INVALID"),
    ("GET", "/v2/nowhere/tags/list", 404, "NAME_UNKNOWN"),
    ("GET", "/v2/nowhere/manifests/latest", 404, "NAME_UNKNOWN"),
    ("GET", "/v2/nowhere/manifests/" + NOWHERE, 404, "NAME_UNKNOWN"),
    ("GET", "/v2/nowhere/blobs/" + NOWHERE, 404, "NAME_UNKNOWN"),
    ("DELETE", "/v2/nowhere/manifests/latest", 404, "NAME_UNKNOWN"),
    ("DELETE", "/v2/nowhere/manifests/" + NOWHERE, 404, "NAME_UNKNOWN"),
    ("DELETE", "/v2/nowhere/blobs/" + NOWHERE, 404, "NAME_UNKNOWN"),
    ("GET", "/v2/here/manifests/no-such-tag", 404, "MANIFEST_UNKNOWN"),
    ("GET", "/v2/here/manifests/" + NOWHERE, 404, "MANIFEST_UNKNOWN"),
    ("DELETE", "/v2/here/manifests/no-such-tag", 404, "MANIFEST_UNKNOWN"),
    ("DELETE", "/v2/here/manifests/" + NOWHERE, 404, "MANIFEST_UNKNOWN"),
    ("GET", "/v2/here/blobs/" + NOWHERE, 404, "BLOB_UNKNOWN"),
    ("DELETE", "/v2/here/blobs/" + NOWHERE, 404, "BLOB_UNKNOWN"),
    ("GET", "/v2/here/manifests/-bad", 400, "MANIFEST_INVALID"),
    ("PUT", "/v2/here/manifests/.bad", 400, "MANIFEST_INVALID"),
    ("PUT", "/v2/here/manifests/" + "x" * 129, 400, "MANIFEST_INVALID"),
    ("GET", "/v2/here/manifests/sha256:short", 400, "DIGEST_INVALID"),
    ("GET", "/v2/here/manifests/md5:d41d8cd98f00b204e9800998ecf8427e", 400, "DIGEST_INVALID"),
    ("GET", "/v2/here/blobs/latest", 400, "DIGEST_INVALID"),
    ("GET", "/v2/here/blobs/sha256:" + "A" * 64, 400, "DIGEST_INVALID"),
    ("GET", "/v2/here/referrers/sha256:short", 400, "DIGEST_INVALID"),
    ("GET", "/v2/here/referrers/latest", 400, "DIGEST_INVALID"),
    ("POST", "/v2/here/blobs/uploads/?digest=sha256:short", 400, "DIGEST_INVALID"),
    ("POST", "/v2/here/blobs/uploads/?mount=short", 400, "DIGEST_INVALID"),
    ("POST", "/v2/here/blobs/uploads/?digest-algorithm=md5", 400, "DIGEST_INVALID"),
    ("POST", "/v2/here/blobs/uploads/?mount=%s&from=Bad" % NOWHERE, 400, "NAME_INVALID"),
    ("GET", "/v2/here/blobs/uploads/" + SESSION, 404, "BLOB_UPLOAD_UNKNOWN"),
    ("GET", "/v2/here/blobs/uploads/no-uuid", 404, "BLOB_UPLOAD_UNKNOWN"),
    ("GET", "/v2/here/blobs/uploads/..", 404, "BLOB_UPLOAD_UNKNOWN"),
    ("PATCH", "/v2/here/blobs/uploads/" + SESSION, 404, "BLOB_UPLOAD_UNKNOWN"),
    ("PUT", "/v2/here/blobs/uploads/%s?digest=%s" % (SESSION, NOWHERE), 404, "BLOB_UPLOAD_UNKNOWN"),
    ("DELETE", "/v2/here/blobs/uploads/" + SESSION, 404, "BLOB_UPLOAD_UNKNOWN"),
    ("GET", "/v2/here/tags/list?n=-1", 400, "UNSUPPORTED"),
    ("GET", "/v2/here/tags/list?n=x", 400, "UNSUPPORTED"),
    ("GET", "/v2/here/tags/list?n=", 400, "UNSUPPORTED"),
    ("GET", "/v2/_catalog?n=-1", 400, "UNSUPPORTED"),
    ("GET", "/v2/_catalog?n=1.5", 400, "UNSUPPORTED"),
    ("GET", "/v2/here/referrers/%s?n=x" % NOWHERE, 400, "UNSUPPORTED"),
]


@pytest.mark.parametrize("method, path, status, code", ERRORS)
def test_refusal(call, store, method, path, status, code):
    make_image(store, "here")
    answer = call(method, path)
    assert (answer.status, answer.code) == (status, code)
    for entry in answer.json["errors"]:
        assert set(entry) <= {"code", "message", "detail"} and isinstance(entry["message"], str)
    if method == "GET":
        assert call("HEAD", path).status == status


ALLOWED = [
    # path, methods allowed
    ("/v2/", "GET, HEAD"),
    ("/v2/_catalog", "GET, HEAD"),
    ("/v2/a/tags/list", "GET, HEAD"),
    ("/v2/a/referrers/" + NOWHERE, "GET, HEAD"),
    ("/v2/a/manifests/latest", "GET, HEAD, PUT, DELETE"),
    ("/v2/a/blobs/uploads/", "POST"),
    ("/v2/a/blobs/uploads/" + SESSION, "GET, HEAD, PATCH, PUT, DELETE"),
    ("/v2/a/blobs/" + NOWHERE, "GET, HEAD, DELETE"),
    ("/files/a:1/b", "GET, HEAD"),
]


@pytest.mark.parametrize("path, methods", ALLOWED)
def test_method_not_allowed(call, path, methods):
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - set(methods.split(", ")):
        answer = call(method, path)
        assert (answer.status, answer.code, answer.header("Allow")) == (405, "UNSUPPORTED", methods)


def test_each_route_has_head_beside_get_and_an_action():
    for _, handlers in ROUTES:
        assert ("GET" in handlers) == ("HEAD" in handlers)
        assert all(route.action in tinyreg.NEEDED for route in handlers.values())


WHO_MAY = [
    # method, path, the least level
    ("GET", "/v2/", "pull"),
    ("GET", "/v2/_catalog", "pull"),
    ("GET", "/v2/here/tags/list", "pull"),
    ("GET", "/v2/here/manifests/latest", "pull"),
    ("GET", "/v2/here/referrers/" + NOWHERE, "pull"),
    ("HEAD", "/v2/here/blobs/" + Digest.of(CONFIG), "pull"),
    ("GET", "/files/here:latest", "pull"),
    ("POST", "/v2/here/blobs/uploads/", "push"),
    ("PATCH", "/v2/here/blobs/uploads/" + SESSION, "push"),
    ("PUT", "/v2/here/manifests/latest", "push"),
    ("DELETE", "/v2/here/blobs/uploads/" + SESSION, "push"),
    ("DELETE", "/v2/here/manifests/latest", "admin"),
    ("DELETE", "/v2/here/blobs/" + Digest.of(CONFIG), "admin"),
]


@pytest.mark.parametrize("method, path, least", WHO_MAY)
def test_who_may_do_what(store, method, path, least):
    """403 DENIED with a message ends docker's retries, a 405 or 5xx would not."""
    make_image(store, "here")
    levels = ["none", "pull", "push", "admin"]
    for level in levels:
        answer = Client(store, level)(method, path)
        if levels.index(level) < levels.index(least):
            assert (answer.status, answer.code) == (403, "DENIED")
            assert answer.json["errors"][0]["message"]
        else:
            assert answer.status != 403


class Broken(Registry):
    def __init__(self, error):
        self.error = error

    def repositories(self, last=""):
        return iter(["a"])

    def open_blob(self, name, digest):
        raise self.error


@pytest.mark.parametrize("number, status, code", [
    (errno.ENOSPC, 507, "UNAVAILABLE"), (errno.EDQUOT, 507, "UNAVAILABLE"), (errno.EFBIG, 507, "UNAVAILABLE"),
    (errno.EROFS, 503, "UNAVAILABLE"), (errno.EIO, 503, "UNAVAILABLE"), (errno.EMFILE, 503, "UNAVAILABLE"),
    (errno.EACCES, 500, "UNKNOWN")])
def test_a_host_that_fails(caplog, number, status, code):
    answer = Client(Broken(OSError(number, "secret reason", "/secret/path")))("GET", "/v2/a/blobs/" + NOWHERE)
    assert (answer.status, answer.code) == (status, code)
    assert b"secret" not in answer.body
    assert "/secret/path" in caplog.text


def test_a_bug(caplog):
    answer = Client(Broken(ZeroDivisionError("secret")))("GET", "/v2/a/blobs/" + NOWHERE)
    assert (answer.status, answer.code) == (500, "UNKNOWN")
    assert b"secret" not in answer.body
    assert "Traceback" in caplog.text and "ZeroDivisionError" in caplog.text


# Manifests

def manifest_headers(digest, media_type):
    return [("Content-Type", media_type), ("Docker-Content-Digest", digest), ("ETag", '"%s"' % digest)]


def test_an_archive_with_more_manifests_than_memory_should_hold_is_refused(store, call):
    """An index of 12 children of 4 MB each, most of it `{}`, took 1.3 GB; behind one small request."""
    children = [make_image(store, "a", None, junk=[{}] * 1000000, number=number) for number in range(9)]
    for count, status in ((2, 200), (9, 400)):
        store.put_manifest("a", to_manifest(index(*children[:count])), ["latest"])
        response = dispatch(store, Access("admin"), Request("GET", "/archive/a:latest.tar", {}, io.BytesIO()))
        assert response.status == status, response.body
    assert b"take more than 32 MiB" in response.body


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_manifest_that_is_asked_for_is_not_parsed_again(store, call, monkeypatch, method):
    """One of 4 MB could take a hundred in memory, and a tenth of a second, each time."""
    manifest = make_image(store, "a", "latest", junk=[{}] * 1000000)

    def parse(content):
        raise AssertionError("parsed")

    monkeypatch.setattr(tinyreg, "load_json", parse)
    answer = call(method, "/v2/a/manifests/latest")
    assert (answer.status, answer.header("Content-Type")) == (200, OCI_MANIFEST)
    assert answer.header("Docker-Content-Digest") == manifest.digest


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_get_manifest(call, store, method, algorithm):
    """The digest in the algorithm that the client used, the ETag, the length; HEAD answers the same."""
    manifest = make_image(store, "a/b", "latest", algorithm=algorithm)
    for reference in ("latest", manifest.digest):
        answer = call(method, "/v2/a/b/manifests/" + reference)
        assert (answer.status, answer.body, answer.length) == (200, manifest.content, len(manifest.content))
        assert answer.headers == manifest_headers(manifest.digest, OCI_MANIFEST)


@pytest.mark.parametrize("accept", ["", "*/*", "text/html", DOCKER_MANIFEST, DOCKER_SCHEMA1 + ", " + DOCKER_LIST,
                                    "application/json;q=0.1"])
def test_accept_is_no_reason_to_refuse(call, store, accept):
    """What is stored is served, whatever Accept says."""
    manifest = make_image(store, "a")
    answer = call("GET", "/v2/a/manifests/latest", accept=accept)
    assert (answer.status, answer.body, answer.header("Content-Type")) == (200, manifest.content, OCI_MANIFEST)


def test_manifests_are_kept_to_the_byte(call, store):
    push_blob(store, "a", CONFIG)
    content = json.dumps(image(layers=(), annotations={"ü": "ü"}), indent=5, ensure_ascii=False).encode() + b"\r\n \n"
    assert call("PUT", "/v2/a/manifests/odd", content, content_type=OCI_MANIFEST).status == 201
    assert call("GET", "/v2/a/manifests/odd").body == content


CONFIGLESS = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
TYPES = [
    # document, its type
    (image(layers=()), OCI_MANIFEST),
    (image(layers=(), media_type=DOCKER_MANIFEST), DOCKER_MANIFEST),
    (CONFIGLESS, OCI_INDEX),
    (dict(CONFIGLESS, mediaType=DOCKER_LIST), DOCKER_LIST),
    ({"mediaType": OCI_ARTIFACT, "artifactType": "application/x", "blobs": []}, OCI_ARTIFACT),
    ({"schemaVersion": 2, "config": descriptor(CONFIG, CONFIG_TYPE), "layers": []}, OCI_MANIFEST),
    ({"schemaVersion": 2, "manifests": []}, OCI_INDEX),
]


@pytest.mark.parametrize("document, media_type", TYPES)
@pytest.mark.parametrize("sent", ["{}", "{}; charset=utf-8", "", "application/json", "application/octet-stream",
                                  "application/x-www-form-urlencoded"])
def test_put_manifest(call, store, document, media_type, sent):
    """A Content-Type that means nothing is as good as none, and parameters count for nothing."""
    push_blob(store, "a/b", CONFIG)
    content = to_bytes(document)
    digest = Digest.of(content)
    answer = call("PUT", "/v2/a/b/manifests/v1", content, content_type=sent.format(media_type))
    assert answer.status == 201
    assert answer.headers == [("Location", "/v2/a/b/manifests/" + digest), ("Docker-Content-Digest", digest)]
    answer = call("GET", answer.header("Location"))
    assert (answer.body, answer.headers) == (content, manifest_headers(digest, media_type))
    assert call("GET", "/v2/a/b/manifests/v1").body == content


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_put_manifest_by_digest(call, store, algorithm):
    push_blob(store, "a", CONFIG, algorithm)
    manifest = to_manifest(image(layers=(), algorithm=algorithm), algorithm)
    answer = call("PUT", "/v2/a/manifests/" + manifest.digest, manifest.content)
    assert answer.status == 201 and answer.header("Docker-Content-Digest") == manifest.digest
    assert answer.header("OCI-Tag") is None and answer.header("OCI-Subject") is None
    assert list(store.tags("a")) == []
    assert call("GET", answer.header("Location")).body == manifest.content


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tag_parameters(call, store, algorithm):
    push_blob(store, "a", CONFIG)
    content = to_bytes(image(layers=()))
    digest = Digest.of(content, algorithm)
    tags = ["t%d" % number for number in range(12)]
    answer = call("PUT", "/v2/a/manifests/%s?%s" % (digest, "&".join("tag=" + tag for tag in tags)), content)
    assert answer.status == 201
    assert ("OCI-Tag", ", ".join(tags)) in answer.headers
    assert {store.resolve("a", tag) for tag in tags} == {digest}


def test_a_bad_tag_among_the_parameters_stores_nothing(call, store):
    push_blob(store, "a", CONFIG)
    content = to_bytes(image(layers=()))
    answer = call("PUT", "/v2/a/manifests/%s?tag=good&tag=-bad" % Digest.of(content), content)
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
    assert call("GET", "/v2/a/manifests/" + Digest.of(content)).status == 404


@pytest.mark.parametrize("by_digest", [False, True])
def test_subject(call, store, by_digest):
    """OCI-Subject tells the client that it need not keep a list under a fallback tag."""
    push_blob(store, "a", CONFIG)
    about = to_manifest(image())
    content = to_bytes(image(layers=(), subject={"mediaType": OCI_MANIFEST, "digest": about.digest, "size": 5}))
    answer = call("PUT", "/v2/a/manifests/" + (Digest.of(content) if by_digest else "tag"), content)
    assert (answer.status, answer.header("OCI-Subject")) == (201, about.digest)


SCHEMA1 = {"schemaVersion": 1, "name": "a", "tag": "latest", "architecture": "amd64", "fsLayers": [], "history": []}
BAD_MANIFESTS = [
    # content, Content-Type, words of the message
    (b"", OCI_MANIFEST, "not a manifest"),
    (b"{", OCI_MANIFEST, "not a manifest"),
    (b"[]", OCI_MANIFEST, "not a JSON object"),
    (b"\xff\xfe", OCI_MANIFEST, "not a manifest"),
    (to_bytes({}), OCI_MANIFEST, "type"),
    (to_bytes(SCHEMA1), DOCKER_SCHEMA1, "schema 1"),
    (to_bytes(SCHEMA1), JSON, "schema 1"),
    (to_bytes(dict(image(), mediaType="application/vnd.example")), "application/vnd.example", "artifactType"),
    (to_bytes(image()), DOCKER_MANIFEST, "Content-Type"),
    (to_bytes(image()), OCI_INDEX, "Content-Type"),
    (to_bytes(image(manifests=[])), OCI_MANIFEST, "at once"),
    (to_bytes(image(layers=(), schemaVersion=3)), OCI_MANIFEST, "schemaVersion"),
]


@pytest.mark.parametrize("content, content_type, words", BAD_MANIFESTS)
def test_put_bad_manifest(call, store, content, content_type, words):
    push_blob(store, "a", CONFIG)
    answer = call("PUT", "/v2/a/manifests/latest", content, content_type=content_type)
    assert (answer.status, answer.code) == (400, "MANIFEST_INVALID")
    assert words in answer.json["errors"][0]["message"]
    assert list(store.repositories()) == []


def test_put_manifest_with_another_digest(call, store):
    push_blob(store, "a", CONFIG)
    for digest in (NOWHERE, Digest.of(b"", "sha512")):
        answer = call("PUT", "/v2/a/manifests/" + digest, to_bytes(image(layers=())))
        assert (answer.status, answer.code) == (400, "DIGEST_INVALID")


def test_put_manifest_whose_blobs_are_missing(call, store):
    push_blob(store, "a", b"layer one")
    content = to_bytes(image())
    answer = call("PUT", "/v2/a/manifests/latest", content)
    assert (answer.status, answer.code) == (400, "MANIFEST_BLOB_UNKNOWN")
    missing = [Digest.of(CONFIG), Digest.of(b"layer two")]
    assert sorted(entry["detail"] for entry in answer.json["errors"]) == sorted(missing)
    sparse = Client(Directory(store.root, sparse=True))
    assert sparse("PUT", "/v2/a/manifests/latest", content).status == 201


@pytest.mark.parametrize("size, status", [(MAX_MANIFEST, 201), (MAX_MANIFEST + 1, 413)])
def test_the_largest_manifest(call, store, size, status):
    push_blob(store, "a", CONFIG)
    content = to_bytes(image(layers=(), annotations={"a": ""}))
    content = content.replace(b'""', b'"%s"' % (b"x" * (size - len(content))))
    assert len(content) == size
    answer = call("PUT", "/v2/a/manifests/latest", content)
    assert answer.status == status
    if status == 413:
        assert answer.code == "MANIFEST_INVALID"


def test_buildkit_cache(call, store):
    """An index whose children are layer blobs and a config, none of them a manifest."""
    layer, config = push_blob(store, "a", b"cached layer"), push_blob(store, "a", b'{"layers":[]}')
    content = to_bytes({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        descriptor(b"cached layer", annotations={"containerd.io/uncompressed": layer}),
        descriptor(b'{"layers":[]}', "application/vnd.buildkit.cacheconfig.v0")]})
    assert call("PUT", "/v2/a/manifests/cache", content, content_type=OCI_INDEX).status == 201
    assert call("GET", "/v2/a/manifests/cache").body == content
    assert call("GET", "/v2/a/blobs/" + layer).body == b"cached layer"
    assert call("GET", "/v2/a/blobs/" + config).body == b'{"layers":[]}'


def test_foreign_layers(call, store):
    """What may not be handed on need not be here."""
    push_blob(store, "a", CONFIG)
    foreign = descriptor(b"windows", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                         urls=["https://mcr.example/blob"])
    document = dict(image(media_type=DOCKER_MANIFEST), layers=[foreign])
    assert call("PUT", "/v2/a/manifests/windows", to_bytes(document), content_type=DOCKER_MANIFEST).status == 201
    assert call("GET", "/v2/a/blobs/" + foreign["digest"]).status == 404


def test_delete_tag(call, store):
    """The manifest and its other tags stay."""
    manifest = make_image(store, "a", "one")
    store.put_manifest("a", manifest, ["two"])
    assert call("DELETE", "/v2/a/manifests/one").status == 202
    assert call("DELETE", "/v2/a/manifests/one").status == 404
    assert call("GET", "/v2/a/manifests/one").status == 404
    assert call("GET", "/v2/a/manifests/two").status == call("GET", "/v2/a/manifests/" + manifest.digest).status == 200


def test_delete_manifest(call, store):
    manifest = make_image(store, "a", "one")
    store.put_manifest("a", manifest, ["two"])
    assert call("DELETE", "/v2/a/manifests/" + manifest.digest).status == 202
    for reference in ("one", "two", manifest.digest):
        assert call("GET", "/v2/a/manifests/" + reference).code == "MANIFEST_UNKNOWN"
    assert call("GET", "/v2/a/tags/list").json == {"name": "a", "tags": []}
    assert call("DELETE", "/v2/a/manifests/" + manifest.digest).code == "MANIFEST_UNKNOWN"


# Blobs

CONTENT = b"0123456789"
DIGEST = Digest.of(CONTENT)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_get_blob(call, store, method, algorithm):
    """The bytes as they are, whatever encodings the client would take."""
    digest = push_blob(store, "a/b", CONTENT, algorithm)
    answer = call(method, "/v2/a/b/blobs/" + digest, accept_encoding="zstd;q=1.0, gzip;q=0.8, deflate;q=0.5")
    assert (answer.status, answer.body, answer.length) == (200, CONTENT, 10)
    assert answer.headers == manifest_headers(digest, OCTET_STREAM) + [("Accept-Ranges", "bytes")]


RANGES = [
    # Range, status, Content-Range, body
    ("bytes=0-0", 206, "bytes 0-0/10", b"0"),
    ("bytes=2-4", 206, "bytes 2-4/10", b"234"),
    ("bytes=0-9", 206, "bytes 0-9/10", CONTENT),
    ("bytes=0-", 206, "bytes 0-9/10", CONTENT),
    ("bytes=9-", 206, "bytes 9-9/10", b"9"),
    ("bytes=5-99", 206, "bytes 5-9/10", b"56789"),
    ("bytes=-3", 206, "bytes 7-9/10", b"789"),
    ("bytes=-99", 206, "bytes 0-9/10", CONTENT),
    ("bytes=10-", 416, "bytes */10", None),
    ("bytes=99-100", 416, "bytes */10", None),
    ("bytes=-0", 416, "bytes */10", None),
    ("bytes=5-4", 416, "bytes */10", None),
    ("bytes=0-1,3-4", 200, None, CONTENT),
    ("bytes=0-1, -1", 200, None, CONTENT),
    ("bytes=-", 200, None, CONTENT),
    ("bytes=x-1", 200, None, CONTENT),
    ("lines=0-1", 200, None, CONTENT),
    ("0-1", 200, None, CONTENT),
    ("", 200, None, CONTENT),
]


@pytest.mark.parametrize("header, status, content_range, body", RANGES)
def test_range(call, store, header, status, content_range, body):
    push_blob(store, "a", CONTENT)
    answer = call("GET", "/v2/a/blobs/" + DIGEST, range=header)
    assert (answer.status, answer.header("Content-Range")) == (status, content_range)
    if body is None:
        assert answer.code == "RANGE_INVALID"
    else:
        assert answer.body == body and answer.length == len(body)
        assert answer.header("Docker-Content-Digest") == DIGEST
    answer = call("HEAD", "/v2/a/blobs/" + DIGEST, range=header)
    assert (answer.status, answer.length) == (200, 10), "Range is for GET only"


@pytest.mark.parametrize("header, status", [
    ('"%s"' % DIGEST, 206), ('W/"%s"' % DIGEST, 200), ('"other"', 200), ("Tue, 15 Nov 1994 12:45:26 GMT", 200)])
def test_if_range(call, store, header, status):
    push_blob(store, "a", CONTENT)
    answer = call("GET", "/v2/a/blobs/" + DIGEST, range="bytes=2-4", if_range=header)
    assert (answer.status, answer.body) == (status, b"234" if status == 206 else CONTENT)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("header, status", [
    ('"{}"', 304), ('W/"{}"', 304), ("*", 304), ('"other", "{}"', 304), ('"other",W/"{}"', 304),
    ("{}", 200), ('"other"', 200), ("", 200)])
def test_if_none_match(call, store, method, header, status):
    manifest, config = make_image(store, "a"), Digest.of(CONFIG)
    for path, digest in (("/v2/a/blobs/" + config, config), ("/v2/a/manifests/latest", manifest.digest)):
        answer = call(method, path, if_none_match=header.format(digest))
        assert answer.status == status
        assert answer.header("ETag") == '"%s"' % digest
        assert bool(answer.body) == (status == 200)
    assert call("GET", "/v2/a/blobs/" + config, if_none_match='"%s"' % config, range="bytes=0-1").status == 304


def test_delete_blob(call, store):
    push_blob(store, "a", CONTENT)
    push_blob(store, "b", CONTENT)
    assert call("DELETE", "/v2/a/blobs/" + DIGEST).status == 202
    assert call("GET", "/v2/a/blobs/" + DIGEST).code == "BLOB_UNKNOWN"
    assert call("DELETE", "/v2/a/blobs/" + DIGEST).code == "BLOB_UNKNOWN"
    assert call("GET", "/v2/b/blobs/" + DIGEST).body == CONTENT


# Uploads

UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


def begin(call, query="", **headers):
    """Start an upload to the repository a/b; returns its Location, after a look at all headers."""
    answer = call("POST", "/v2/a/b/blobs/uploads/" + query, **headers)
    assert answer.status == 202
    return check_upload(answer, "0-0")


def check_upload(answer, wanted):
    """A relative Location, a Range that docker can read, the session id."""
    location = answer.header("Location")
    found = re.fullmatch(r"/v2/a/b/blobs/uploads/(%s)(?:\?[!-~]+)?" % UUID, location)
    assert answer.headers == [("Location", location), ("Range", wanted), ("Docker-Upload-UUID", found.group(1))]
    assert answer.body == b""
    return location


def check_created(call, answer, digest, content):
    assert answer.status == 201
    assert answer.headers == [("Location", "/v2/a/b/blobs/" + digest), ("Docker-Content-Digest", digest)]
    assert call("GET", answer.header("Location")).body == content


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("announced", [False, True])
def test_post_and_put(call, algorithm, announced):
    """What containerd and oras do; the digest comes back in the algorithm asked with (trap 10)."""
    location = begin(call, "?digest-algorithm=" + algorithm if announced else "")
    digest = Digest.of(CONTENT, algorithm)
    answer = call("PUT", by_digest(location, urllib.parse.quote(digest)), CONTENT, content_type=OCTET_STREAM,
                  content_length="10")
    check_created(call, answer, digest, CONTENT)
    assert call("GET", location).code == "BLOB_UPLOAD_UNKNOWN"


@pytest.mark.parametrize("path", ["/v2/a/b/blobs/uploads/", "/v2/a/b/blobs/uploads"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_single_post(call, path, algorithm):
    digest = Digest.of(CONTENT, algorithm)
    check_created(call, call("POST", "%s?digest=%s" % (path, digest), CONTENT), digest, CONTENT)


def test_single_post_of_something_else_leaves_nothing(call, root):
    answer = call("POST", "/v2/a/b/blobs/uploads/?digest=" + NOWHERE, CONTENT)
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
    assert not [path for path in (root / "docker").rglob("*") if path.is_file()]


FORMS = [{}, {"content_type": OCTET_STREAM}, {"content_range": "{}-{}"}, {"content_range": "bytes {}-{}/*"},
         {"content_range": "bytes {}-{}/10"}, {"content_range": "bytes={}-{}"}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_length", [False, True])
def test_chunks(call, form, with_length):
    """Content-Range in either form or not at all, Content-Length or not, Content-Type or not."""
    location, sent = begin(call, content_type="application/json", content_length="0"), 0
    for chunk in (CONTENT[:1], CONTENT[1:4], CONTENT[4:]):
        headers = {name: value.format(sent, sent + len(chunk) - 1) for name, value in form.items()}
        if with_length:
            headers["content_length"] = str(len(chunk))
        answer = call("PATCH", location, chunk, **headers)
        sent += len(chunk)
        assert answer.status == 202
        location = check_upload(answer, "0-%d" % (sent - 1))
        answer = call("GET", location)
        assert answer.status == 204
        check_upload(answer, "0-%d" % (sent - 1))
        assert call("HEAD", location).headers == answer.headers
    check_created(call, call("PUT", by_digest(location, DIGEST)), DIGEST, CONTENT)


@pytest.mark.parametrize("headers", [{}, {"content_range": "4-9"}, {"content_range": "bytes 4-9/10"}])
def test_the_last_chunk_may_come_with_the_put(call, headers):
    location = begin(call)
    location = check_upload(call("PATCH", location, CONTENT[:4], content_range="0-3"), "0-3")
    answer = call("PUT", by_digest(location, DIGEST), CONTENT[4:], content_length="6", **headers)
    check_created(call, answer, DIGEST, CONTENT)


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
@pytest.mark.parametrize("placed", ["0-5", "3-8", "5-10", "bytes 9-14/*", "4", "x-y", "9-4", "-4"])
def test_a_chunk_out_of_place(call, method, placed):
    """416 says where to go on, and the upload can go on."""
    location = begin(call)
    call("PATCH", location, CONTENT[:4])
    answer = call(method, by_digest(location, DIGEST), CONTENT[4:], content_range=placed)
    assert (answer.status, answer.code) == (416, "RANGE_INVALID")
    if re.match(r"(bytes )?(\d+)-(1?\d)\b", placed) and placed != "9-4":
        assert (answer.header("Range"), answer.header("Location").split("?")[0]) == ("0-3", location)
    check_upload(call("GET", location), "0-3")
    answer = call("PUT", by_digest(location, DIGEST), CONTENT[4:], content_range="4-9")
    check_created(call, answer, DIGEST, CONTENT)


def test_a_chunk_of_another_size_than_it_says(call):
    location = begin(call)
    answer = call("PATCH", location, CONTENT, content_range="0-8", content_length="10")
    assert (answer.status, answer.code) == (400, "SIZE_INVALID")
    check_upload(call("GET", location), "0-0")
    answer = call("PATCH", location, CONTENT[:5], content_range="0-8")  # chunked: the length shows at its end
    assert (answer.status, answer.code) == (400, "SIZE_INVALID")
    check_upload(call("GET", location), "0-4")


@pytest.mark.parametrize("query, status", [("", 400), ("?digest=", 400), ("?digest=sha256:short", 400),
                                           ("?digest=sha384:" + "a" * 96, 400), ("?digest=" + NOWHERE, 400)])
def test_put_with_a_wrong_digest(call, query, status):
    location = begin(call)
    answer = call("PUT", location + query, CONTENT)
    assert (answer.status, answer.code) == (status, "DIGEST_INVALID")


def test_a_location_is_good_for_any_time_and_any_process(call, store):
    """Whatever query the Locations carry: an older one, a newer one, none, or another registry's, the digest that
    counts is that of the bytes which are there."""
    others = Client(Directory(store.root))
    for chooser, ender in itertools.product(range(4), (call, others)):
        start = begin(call)
        first = check_upload(call("PATCH", start, CONTENT[:4]), "0-3")
        second = check_upload(others("PATCH", first, CONTENT[4:]), "0-9")
        location = [start, first, second, second.split("?")[0]][chooser]
        check_created(call, ender("PUT", by_digest(location, DIGEST)), DIGEST, CONTENT)


@pytest.mark.parametrize("part", [b"", CONTENT[:4], CONTENT[4:]])
def test_a_location_proves_nothing_about_other_bytes(call, part):
    """The digest of what was there at the time of an older Location does not pass for the whole."""
    start = begin(call)
    first = check_upload(call("PATCH", start, CONTENT[:4]), "0-3")
    call("PATCH", first, CONTENT[4:])
    answer = call("PUT", by_digest(first, Digest.of(part)))
    assert (answer.status, answer.code) == (400, "DIGEST_INVALID")


def test_a_location_can_t_be_forged(call, store):
    """Neither a made-up sum nor that of another upload, which the server has signed, lets bytes pass for others; in a
    worker that has not seen the bytes, and has the key."""
    worker = Directory(store.root)
    worker.key = store.key
    other = check_upload(call("PATCH", begin(call), b"9876543210"), "0-9")
    claimed = Digest.of(b"9876543210")
    signed = urllib.parse.parse_qs(urllib.parse.urlsplit(other).query)["state"][0]
    for state in (signed, "10:%s:%s" % (claimed, "0" * 64), "10:%s:" % claimed, "10:%s" % claimed, "é", ""):
        location = check_upload(call("PATCH", begin(call), CONTENT), "0-9").split("?")[0]
        answer = Client(worker)("PUT", "%s?state=%s&digest=%s" % (location, urllib.parse.quote(state), claimed))
        assert (answer.status, answer.code) == (400, "DIGEST_INVALID")
        assert call("GET", "/v2/a/b/blobs/" + claimed).status == 404
    check_created(call, Client(worker)("PUT", by_digest(other, claimed)), claimed, b"9876543210")


def test_the_session_of_a_download_is_no_clients(call, store):
    """Its id can be computed, and comes again: the state of what it had would prove other bytes."""
    digest = Digest.of(b"content")
    session = store.session_of_blob("app", digest)
    session.begin("sha256")
    for method in ("GET", "PATCH", "PUT", "DELETE"):
        for session_id in (session.id, session.id.partition("-")[2]):
            answer = call(method, "/v2/app/blobs/uploads/%s?digest=%s" % (session_id, digest), b"content")
            assert (answer.status, answer.code) == (404, "BLOB_UPLOAD_UNKNOWN")
    assert os.path.getsize(session.path) == 0


def test_no_state_brings_headers_of_its_own(call):
    location = begin(call).split("?")[0]
    answer = call("PUT", location + "?state=%0d%0aX-Evil:+1&digest=" + NOWHERE, b"x", content_range="5-5")
    assert answer.status == 416 and answer.header("Location") == location


def test_cancel(call, root):
    location = begin(call)
    call("PATCH", location, CONTENT)
    answer = call("DELETE", location)
    assert (answer.status, answer.body) == (204, b"")
    for method in ("GET", "PATCH", "DELETE"):
        assert call(method, location).code == "BLOB_UPLOAD_UNKNOWN"
    assert not [path for path in (root / "docker").rglob("*") if path.is_file()]


DOCKER_EMPTY_LAYER = bytes.fromhex("1f8b080000096e8800ff621805a360148c5800080000ffff2eafb5ef00040000")


@pytest.mark.parametrize("content", [b"", b"{}", DOCKER_EMPTY_LAYER])
def test_small_blobs(call, content):
    """Nothing, the empty config, docker's empty layer."""
    digest = Digest.of(content)
    check_created(call, call("PUT", by_digest(begin(call), digest), content), digest, content)
    location = check_upload(call("PATCH", begin(call), content), "0-%d" % max(len(content) - 1, 0))
    check_created(call, call("PUT", by_digest(location, digest)), digest, content)
    check_created(call, call("POST", "/v2/a/b/blobs/uploads/?digest=" + digest, content), digest, content)
    answer = call("GET", "/v2/a/b/blobs/" + digest, range="bytes=0-")
    assert (answer.status, answer.body) == (206 if content else 200, content)


def test_dockers_empty_layer_is_the_one_that_everybody_knows():
    assert Digest.of(DOCKER_EMPTY_LAYER) == "sha256:a3ed95caeb02ffe68cdd9fd84406680ae93d633cb16422d00e8a7c22955b46d4"


MOUNTS = [
    # query, whether there is something to mount
    ("mount={0}&from=source", True),
    ("from=source&mount={0}", True),
    ("mount={0}&from=source&origin=docker.io", True),
    ("mount={0}", True),
    ("mount={0}&from=", True),
    ("mount={0}&from=other", False),
    ("mount={0}&from=nowhere", False),
    ("mount={1}&from=source", False),
    ("mount={1}", False),
    ("from=source", False),
]


@pytest.mark.parametrize("query, found", MOUNTS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_mount(call, store, query, found, algorithm):
    """Mounted with a 201, or a session to upload into with a 202."""
    digest = push_blob(store, "source", CONTENT, algorithm)
    make_image(store, "other")
    answer = call("POST", "/v2/a/b/blobs/uploads/?" + query.format(digest, NOWHERE))
    if found:
        check_created(call, answer, digest, CONTENT)
    else:
        assert answer.status == 202
        check_upload(answer, "0-0")
        assert call("GET", "/v2/a/b/blobs/" + digest).status == 404


# Listings

def pages(call, path, key):
    """The entries of each page, following the links."""
    found = []
    while path:
        answer = call("GET", path)
        assert answer.status == 200 and len(found) < 100
        found.append(answer.json[key])
        following = answer.header("Link")
        path = following and re.fullmatch(r'<(/v2/[^>]+)>; rel="next"', following).group(1)
    return found


TAGS = ["1.0", "2", "A", "_x", "a", "latest", "z"]


@pytest.fixture
def tagged(call, store):
    store.put_manifest("lab/tools", make_image(store, "lab/tools", None), TAGS)
    return call


def test_tags(tagged):
    answer = tagged("GET", "/v2/lab/tools/tags/list")
    assert (answer.status, answer.headers) == (200, [("Content-Type", JSON)])
    assert answer.json == {"name": "lab/tools", "tags": TAGS}


TAG_PAGES = [
    # query, tags, query of the next page
    ("n=0", [], None),
    ("n=1", ["1.0"], "n=1&last=1.0"),
    ("n=3", ["1.0", "2", "A"], "n=3&last=A"),
    ("n=6", TAGS[:6], "n=6&last=latest"),
    ("n=7", TAGS, None),
    ("n=8", TAGS, None),
    ("n=999999999999999999", TAGS, None),
    ("last=A", TAGS[3:], None),
    ("last=B", TAGS[3:], None),
    ("last=z", [], None),
    ("last=zz&n=2", [], None),
    ("last=&n=2", TAGS[:2], "n=2&last=2"),
    ("n=2&last=2", ["A", "_x"], "n=2&last=_x"),
    ("n=2&last=a", ["latest", "z"], None),
    ("n=0&last=a", [], None),
]


@pytest.mark.parametrize("query, tags, following", TAG_PAGES)
def test_pages_of_tags(tagged, query, tags, following):
    """Any n, also none and more than there are; last past the end; a Link that is relative."""
    answer = tagged("GET", "/v2/lab/tools/tags/list?" + query)
    assert (answer.status, answer.json["tags"]) == (200, tags)
    assert answer.header("Link") == (following and '</v2/lab/tools/tags/list?%s>; rel="next"' % following)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_all_pages_of_tags(tagged, count):
    found = pages(tagged, "/v2/lab/tools/tags/list?n=%d" % count, "tags")
    assert found == [TAGS[start:start + count] for start in range(0, len(TAGS), count)]


def test_tags_of_a_repository_without_tags(call, store):
    make_image(store, "a", None)
    assert call("GET", "/v2/a/tags/list").json == {"name": "a", "tags": []}


NAMES = ["a", "a-b", "a/b", "a/b/c", "b", "lab/tools"]


@pytest.fixture
def filled(call, store):
    manifest = to_manifest(index())
    for name in reversed(NAMES):
        store.put_manifest(name, manifest)
    return call


def test_empty_catalog(call):
    answer = call("GET", "/v2/_catalog")
    assert (answer.status, answer.headers, answer.json) == (200, [("Content-Type", JSON)], {"repositories": []})


@pytest.mark.parametrize("query, names, following", [
    ("", NAMES, None),
    ("n=0", [], None),
    ("n=2", NAMES[:2], "n=2&last=a-b"),
    ("n=3", NAMES[:3], "n=3&last=a%2Fb"),
    ("n=6", NAMES, None),
    ("n=999999999999999999", NAMES, None),
    ("last=a%2Fb", NAMES[3:], None),
    ("last=zzz", [], None),
    ("n=1&last=b", ["lab/tools"], None),
])
def test_catalog(filled, query, names, following):
    """Any n, also none and more than there are; any last; a Link that is relative."""
    answer = filled("GET", "/v2/_catalog?" + query)
    assert (answer.status, answer.json) == (200, {"repositories": names})
    assert answer.header("Link") == (following and '</v2/_catalog?%s>; rel="next"' % following)


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_all_pages_of_the_catalog(filled, count):
    found = pages(filled, "/v2/_catalog?n=%d" % count, "repositories")
    assert found == [NAMES[start:start + count] for start in range(0, len(NAMES), count)]


def test_a_page_of_the_catalog_has_a_limit(filled, monkeypatch):
    monkeypatch.setattr(tinyreg, "PAGE_SIZE", 4)
    for query in ("", "?n=100"):
        assert pages(filled, "/v2/_catalog" + query, "repositories") == [NAMES[:4], NAMES[4:]]


# Referrers

@pytest.fixture
def signed(store):
    """An image and its referrers: (Manifest, {artifactType: [Manifest, ...]})."""
    about = make_image(store, "a/b")
    made = {}
    for number in range(5):
        kind = "application/vnd.example.%s+json" % ("sbom" if number % 2 else "signature")
        made.setdefault(kind, []).append(
            make_referrer(store, "a/b", about, artifactType=kind, annotations={"number": str(number)}))
    return about, made


def entry_of(manifest, artifact_type):
    return {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.content),
            "artifactType": artifact_type, "annotations": manifest.document["annotations"]}


def test_referrers(call, signed):
    about, made = signed
    answer = call("GET", "/v2/a/b/referrers/" + about.digest)
    assert answer.status == 200
    assert answer.headers == [("Content-Type", OCI_INDEX)], "oras compares the type to the letter"
    wanted = [entry_of(manifest, kind) for kind, manifests in made.items() for manifest in manifests]
    assert answer.json == {"schemaVersion": 2, "mediaType": OCI_INDEX,
                           "manifests": sorted(wanted, key=lambda entry: entry["digest"])}


@pytest.mark.parametrize("kind, count", [
    ("application/vnd.example.sbom+json", 2), ("application/vnd.example", 0), ("", 0)])
def test_referrers_of_one_type(call, signed, kind, count):
    about, made = signed
    answer = call("GET", "/v2/a/b/referrers/%s?artifactType=%s" % (about.digest, urllib.parse.quote(kind, "")))
    assert answer.status == 200
    assert answer.headers == [("Content-Type", OCI_INDEX), ("OCI-Filters-Applied", "artifactType")]
    assert {entry["digest"] for entry in answer.json["manifests"]} == {found.digest for found in made.get(kind, ())}
    assert len(answer.json["manifests"]) == count


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_pages_of_referrers(call, signed, count):
    about, made = signed
    digests = sorted(manifest.digest for manifests in made.values() for manifest in manifests)
    found = pages(call, "/v2/a/b/referrers/%s?n=%d" % (about.digest, count), "manifests")
    assert [[entry["digest"] for entry in page] for page in found] \
        == [digests[start:start + count] for start in range(0, 5, count)]
    kind = "application/vnd.example.signature+json"
    path = "/v2/a/b/referrers/%s?n=1&artifactType=%s" % (about.digest, urllib.parse.quote(kind))
    found = pages(call, path, "manifests")
    assert [page[0]["artifactType"] for page in found] == [kind] * 3


def test_for_a_page_of_referrers_no_more_are_read_than_are_in_it(call, store, monkeypatch):
    """A thousand that have 4 MB of annotations would fill the memory."""
    about = make_image(store, "a", "1")
    for number in range(12):
        make_referrer(store, "a", about, annotations={"x": "%d" % number * (1 << 20)})
    read, manifest = [], Directory.manifest
    monkeypatch.setattr(Directory, "manifest", lambda *asked: read.append(asked) or manifest(*asked))
    answer = call("GET", "/v2/a/referrers/" + about.digest)
    count = len(answer.json["manifests"])
    assert 1 < count < 8 and len(answer.body) < MAX_MANIFEST and answer.header("Link")
    assert len([asked for asked in read if asked[-1] != about.digest]) == count + 1


def test_a_list_of_referrers_is_never_larger_than_a_manifest_may_be(call, store):
    about = make_image(store, "a")
    made = [make_referrer(store, "a", about, annotations={"large": str(number) * 1500000}) for number in range(4)]
    path, found = "/v2/a/referrers/" + about.digest, []
    while path:
        answer = call("GET", path)
        assert answer.length <= MAX_MANIFEST and answer.json["manifests"]
        found += [entry["digest"] for entry in answer.json["manifests"]]
        path = answer.header("Link") and answer.header("Link").split(">")[0][1:]
    assert found == sorted(manifest.digest for manifest in made)


def test_referrers_of_nothing(call, store):
    """An unknown repository has none: oras takes a 404 for a registry without referrers."""
    make_image(store, "a")
    for name in ("a", "nowhere"):
        for digest in (NOWHERE, Digest.of(b"", "sha512"), "sha256:" + "0" * 64):
            answer = call("GET", "/v2/%s/referrers/%s" % (name, digest))
            assert (answer.status, answer.header("Content-Type"), answer.json["manifests"]) == (200, OCI_INDEX, [])


def test_artifact_type_of_referrers(call, store):
    """An image's falls back to its config's type, an index's is left out."""
    about = make_image(store, "a")
    subject = {"mediaType": OCI_MANIFEST, "digest": about.digest, "size": len(about.content)}
    plain = make_referrer(store, "a", about)
    listing = to_manifest(index(subject=subject))
    store.put_manifest("a", listing)
    found = {entry["digest"]: entry for entry in call("GET", "/v2/a/referrers/" + about.digest).json["manifests"]}
    assert found[plain.digest]["artifactType"] == CONFIG_TYPE
    assert "artifactType" not in found[listing.digest] and found[listing.digest]["mediaType"] == OCI_INDEX


def test_referrers_under_a_fallback_tag(call, store):
    about = make_image(store, "a")
    old = make_image(store, "a", None, layers=(), artifactType="application/x")
    listing = to_bytes(index(old))
    call("PUT", "/v2/a/manifests/sha256-" + about.digest.encoded, listing, content_type=OCI_INDEX)
    answer = call("GET", "/v2/a/referrers/%s?artifactType=application/x" % about.digest)
    assert [entry["digest"] for entry in answer.json["manifests"]] == [old.digest]


# Requests

def test_a_name_may_come_with_its_slashes_quoted(call, store):
    make_image(store, "a/b")
    assert call("GET", "/v2/a%2Fb/tags/list").json["name"] == "a/b"
    assert call("GET", "http://proxy.example/v2/a/b/tags/list?n=1").json["name"] == "a/b"


def test_a_digest_may_come_with_its_colon_quoted(call, store):
    push_blob(store, "a", CONTENT)
    assert call("GET", "/v2/a/blobs/" + DIGEST.replace(":", "%3A")).body == CONTENT


def test_docker_images(call, store):
    manifest = make_docker_image(store, "a")
    answer = call("GET", "/v2/a/manifests/latest")
    assert (answer.body, answer.header("Content-Type")) == (manifest.content, DOCKER_MANIFEST)
    listing = to_bytes({"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [
        {"mediaType": DOCKER_MANIFEST, "digest": manifest.digest, "size": len(manifest.content),
         "platform": {"os": "linux", "architecture": "amd64"}}]})
    assert call("PUT", "/v2/a/manifests/multi", listing, content_type=DOCKER_LIST).status == 201
    assert call("GET", "/v2/a/manifests/multi").header("Content-Type") == DOCKER_LIST


def test_a_layer_type_that_nobody_knows_is_nobodys_business(call, store):
    push_blob(store, "a", CONFIG)
    push_blob(store, "a", b"wasm")
    document = dict(image(), layers=[descriptor(b"wasm", "application/wasm")])
    assert call("PUT", "/v2/a/manifests/wasm", to_bytes(document), content_type=OCI_MANIFEST).status == 201
    assert read_blob(store, "a", Digest.of(b"wasm")) == b"wasm"
