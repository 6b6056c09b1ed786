"""Values: what text is taken for a digest, a name, a tag, a range or a manifest, and what is refused, and how."""

import json

import pytest

import tinyreg
from samples import CONFIG, CONFIG_TYPE, descriptor, image, index, to_bytes, to_manifest
from tinyreg import (DOCKER_LIST, DOCKER_MANIFEST, OCI_ARTIFACT, OCI_INDEX, OCI_MANIFEST, Digest, Manifest,
                     RegistryError, image_text, load_json, parse_content_range, parse_count,
                     parse_descriptor, parse_digest,
                     parse_manifest, parse_name, parse_range, parse_reference, parse_session_id, parse_tag,
                     split_image)

SHA256 = "sha256:" + "ab" * 32
SHA512 = "sha512:" + "cd" * 64


def refusal(function, *arguments):
    """The RegistryError that a call ends with."""
    with pytest.raises(RegistryError) as caught:
        function(*arguments)
    return caught.value


# Digests

@pytest.mark.parametrize("text, algorithm, encoded", [(SHA256, "sha256", "ab" * 32), (SHA512, "sha512", "cd" * 64)])
def test_digest(text, algorithm, encoded):
    digest = parse_digest(text)
    assert digest == text
    assert (digest.algorithm, digest.encoded) == (algorithm, encoded)


def test_digest_of_bytes():
    assert Digest.of(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert Digest.of(b"abc", "sha512").encoded.startswith("ddaf35a193617abacc417349ae204131")


@pytest.mark.parametrize("text", [
    "", "sha256", "sha256:", SHA256[:-1], SHA256 + "0", "sha256:" + "AB" * 32, "sha256:" + "xy" * 32,
    SHA256 + "\n", "sha512:" + "ab" * 32, "sha256:" + "ab" * 64, "sha256:../../etc/passwd",
    "sha256:" + "\u0660" * 64,
])
def test_malformed_digest(text):
    error = refusal(parse_digest, text)
    assert (error.code, error.status, error.message) == ("DIGEST_INVALID", 400, "invalid digest")


@pytest.mark.parametrize("text", ["md5:" + "a" * 32, "sha384:" + "a" * 96, "blake3:" + "a" * 64, "sha256+b64:abcd=",
                                  SHA256.upper(), " " + SHA256])
def test_unknown_digest_algorithm(text):
    error = refusal(parse_digest, text)
    assert error.code == "DIGEST_INVALID"
    assert "unsupported digest algorithm" in error.message


# Names, tags, references, session ids

@pytest.mark.parametrize("text", ["a", "0", "library/alpine", "a.b_c__d-e---f", "docker.io/library/alpine",
                                  "lab.example_5000/x/y/z", "a" * 255])
def test_name(text):
    assert parse_name(text) == text


@pytest.mark.parametrize("text", [
    "", "/", "A", "a/", "/a", "a//b", "a/../b", "..", ".a", "a.", "-a", "a-", "_a", "a_", "a..b", "a___b", "a._b",
    "a b", "a:b", "a@b", "a\n", "ä", "a/_uploads", "a/B",
])
def test_malformed_name(text):
    error = refusal(parse_name, text)
    assert (error.code, error.status) == ("NAME_INVALID", 400)


def test_long_name():
    error = refusal(parse_name, "a" * 256)
    assert error.code == "NAME_INVALID"
    assert "255" in error.message


@pytest.mark.parametrize("text", ["latest", "1.0", "_x", "V1.2-rc.3_4", "a" * 128, "sha256-" + "a" * 64 + ".sig"])
def test_tag(text):
    assert parse_tag(text) == text
    assert parse_reference(text) == text


@pytest.mark.parametrize("text", ["", ".", "..", ".a", "-a", "a/b", "a b", "a+b", "a" * 129, "a\n", "é"])
def test_malformed_tag(text):
    error = refusal(parse_tag, text)
    assert (error.code, error.status) == ("MANIFEST_INVALID", 400)
    assert error.message.startswith("invalid tag")


def test_reference_with_a_colon_is_a_digest():
    assert isinstance(parse_reference(SHA256), Digest)
    assert refusal(parse_reference, "a:b").code == "DIGEST_INVALID"


@pytest.mark.parametrize("text, good", [
    ("0191e4b8-7c1e-7def-8abc-0123456789ab", True), ("0191E4B8-7C1E-7DEF-8ABC-0123456789AB", False),
    ("0191e4b87c1e7def8abc0123456789ab", False), ("../../../etc", False), ("", False),
])
def test_session_id(text, good):
    if good:
        assert parse_session_id(text) == text
    else:
        error = refusal(parse_session_id, text)
        assert (error.code, error.status) == ("BLOB_UPLOAD_UNKNOWN", 404)


@pytest.mark.parametrize("text, wanted", [
    ("alpine", ("alpine", None)),
    ("alpine:3.19", ("alpine", "3.19")),
    ("docker.io/library/alpine:3.19", ("docker.io/library/alpine", "3.19")),
    ("a/b@" + SHA256, ("a/b", SHA256)),
    ("a@" + SHA512, ("a", SHA512)),
    ("a/b:1@" + SHA256, ("a/b", SHA256)),
])
def test_split_image(text, wanted):
    assert split_image(text) == wanted


@pytest.mark.parametrize("number, noun, words", [
    (0, "blob", "0 blobs"), (1, "blob", "1 blob"), (2, "repository", "2 repositories"),
    (1, "repository", "1 repository")])
def test_plurals(number, noun, words):
    assert tinyreg.counted(number, noun) == words


@pytest.mark.parametrize("text", ["a/b:1", "a/b@" + SHA256, "a/b:1@" + SHA256])
def test_an_image_s_name_is_what_it_was_split_from(text):
    assert image_text(*split_image(text)) == text


@pytest.mark.parametrize("text, tag", [("a@" + SHA256, None), ("a:1@" + SHA256, "1")])
def test_a_digest_keeps_the_tag_beside_it(text, tag):
    for reference in split_image(text)[1], tinyreg.parse_image(text).reference:
        assert (reference, reference.tag) == (SHA256, tag)


@pytest.mark.parametrize("text, code", [
    ("", "NAME_INVALID"), ("Alpine:1", "NAME_INVALID"), ("a:", "MANIFEST_INVALID"), ("a:b:c", "MANIFEST_INVALID"),
    ("localhost:5000/a:1", "MANIFEST_INVALID"), ("a@", "DIGEST_INVALID"), ("a@b", "DIGEST_INVALID"),
    ("A:1@" + SHA256, "NAME_INVALID"), ("a:@" + SHA256, "MANIFEST_INVALID"),
])
def test_split_malformed_image(text, code):
    assert refusal(split_image, text).code == code


# Numbers and ranges

@pytest.mark.parametrize("text, wanted", [("0", 0), ("7", 7), ("007", 7), ("9" * 18, 10 ** 18 - 1)])
def test_count(text, wanted):
    assert parse_count(text) == wanted


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "x", " 1", "1\n", "9" * 19, "\u0661"])
def test_malformed_count(text):
    error = refusal(parse_count, text)
    assert (error.code, error.status) == ("UNSUPPORTED", 400)


@pytest.mark.parametrize("header, wanted", [
    ("bytes=0-0", (0, 1)),
    ("bytes=0-99", (0, 100)),
    ("bytes=500-", (500, 500)),
    ("bytes=500-999", (500, 500)),
    ("bytes=999-999", (999, 1)),
    ("bytes=500-4000", (500, 500)),                      # a last position past the end is cut
    ("bytes=0-999999999999999999", (0, 1000)),
    ("bytes=-1", (999, 1)),                              # suffixes
    ("bytes=-1000", (0, 1000)),
    ("bytes=-5000", (0, 1000)),
    ("bytes= 0-9", (0, 10)),
    ("", None),                                          # what is no range, or several, is ignored
    ("bytes=-", None),
    ("bytes=a-b", None),
    ("bytes=0-9,20-29", None),
    ("bytes=0x1-2", None),
    ("lines=0-9", None),
    ("0-9", None),
    ("bytes=0-9\n", None),
])
def test_range(header, wanted):
    assert parse_range(header, 1000) == wanted


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=1000-1000", "bytes=5000-6000", "bytes=500-0", "bytes=-0"])
def test_range_with_nothing_in_it(header):
    error = refusal(parse_range, header, 1000)
    assert (error.code, error.status) == ("RANGE_INVALID", 416)
    assert error.headers == [("Content-Range", "bytes */1000")]


@pytest.mark.parametrize("header", ["bytes=0-", "bytes=0-0", "bytes=5-9", "bytes=-1"])
def test_an_empty_blob_is_sent_whole(header):
    assert parse_range(header, 0) is None


@pytest.mark.parametrize("header, wanted", [
    ("0-0", (0, 0)), ("0-99", (0, 99)), ("100-199", (100, 199)),
    ("bytes 0-99/*", (0, 99)), ("bytes 0-99/200", (0, 99)), ("bytes=0-99", (0, 99)),
])
def test_content_range(header, wanted):
    assert parse_content_range(header) == wanted


@pytest.mark.parametrize("header", ["", "-", "0-", "-99", "99-0", "a-b", "0-99,200-299", "0-99/", "bytes */100",
                                    "0-" + "9" * 19, "0-99\n"])
def test_malformed_content_range(header):
    error = refusal(parse_content_range, header)
    assert (error.code, error.status) == ("RANGE_INVALID", 416)


# JSON

def test_json():
    assert load_json('{"ä":[1,-2,3.5,true,null]}'.encode()) == {"ä": [1, -2, 3.5, True, None]}


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b'"text"', b"1", b"null", b"{} x", b"{'a':1}",
    b'{"a":"\xff"}', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}",
    b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}',
    b'{"a":' + b"1" * 100000 + b"}",
    b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}",
    b'{"a":' * 100000 + b"1" + b"}" * 100000,
], ids=lambda content: repr(content[:12]))
def test_not_a_json_object(content):
    with pytest.raises(ValueError):
        load_json(content)


@pytest.mark.parametrize("begin, end", [("[", "]"), ('{"a":', "}")])
def test_how_deep_json_may_be_depends_neither_on_python_nor_on_who_reads_it(begin, end):
    """Else a manifest that one server took could not be loaded by the next."""
    def nested(depth):
        return ('{"a":' + begin * (depth - 1) + "1" + end * (depth - 1) + "}").encode()

    assert load_json(nested(100))
    for depth in (101, 500, 900):
        with pytest.raises(ValueError, match="nested too deeply"):
            load_json(nested(depth))


def test_json_that_is_nested_deeply_or_has_huge_numbers_makes_no_manifest():
    for content in (b'{"a":' + b"[" * 100000 + b"]" * 100000 + b"}", b'{"a":' + b"1" * 4000000 + b"}"):
        error = refusal(parse_manifest, content)
        assert (error.code, error.status) == ("MANIFEST_INVALID", 400)


# Descriptors

def test_descriptor():
    found = parse_descriptor({"mediaType": "a/b", "digest": SHA256, "size": 7, "annotations": {}})
    assert found == ("a/b", SHA256, 7, False, "")
    assert found.digest.algorithm == "sha256"


@pytest.mark.parametrize("value, foreign", [
    ({"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"}, True),
    ({"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"}, True),
    ({"mediaType": "a/b", "urls": ["https://example.com/layer"]}, True),
    ({"mediaType": "a/b", "urls": []}, False),
    ({"mediaType": "application/vnd.oci.image.layer.v1.tar"}, False),
])
def test_foreign_descriptor(value, foreign):
    assert parse_descriptor(dict(value, digest=SHA256, size=1)).foreign is foreign


MALFORMED_DESCRIPTORS = [
    ("text", "MANIFEST_INVALID"),
    ([], "MANIFEST_INVALID"),
    ({}, "MANIFEST_INVALID"),
    ({"mediaType": "a/b", "size": 1}, "MANIFEST_INVALID"),
    ({"mediaType": "a/b", "digest": 1, "size": 1}, "MANIFEST_INVALID"),
    ({"mediaType": 1, "digest": SHA256, "size": 1}, "MANIFEST_INVALID"),
    ({"mediaType": None, "digest": SHA256, "size": 1}, "MANIFEST_INVALID"),
    ({"mediaType": "a/b", "digest": SHA256}, "MANIFEST_INVALID"),
    ({"mediaType": "a/b", "digest": SHA256, "size": -1}, "MANIFEST_INVALID"),
    ({"mediaType": "a/b", "digest": SHA256, "size": "1"}, "MANIFEST_INVALID"),
    ({"mediaType": "a/b", "digest": SHA256, "size": 1.5}, "MANIFEST_INVALID"),
    ({"mediaType": "a/b", "digest": SHA256, "size": True}, "MANIFEST_INVALID"),
    ({"mediaType": "a/b", "digest": "sha256:../../x", "size": 1}, "DIGEST_INVALID"),
    ({"mediaType": "a/b", "digest": "md5:" + "a" * 32, "size": 1}, "DIGEST_INVALID"),
]


@pytest.mark.parametrize("value, code", MALFORMED_DESCRIPTORS)
def test_malformed_descriptor(value, code):
    assert refusal(parse_descriptor, value).code == code


@pytest.mark.parametrize("value, code", MALFORMED_DESCRIPTORS)
@pytest.mark.parametrize("place", ["config", "layers", "manifests", "subject", "blobs"])
def test_malformed_descriptor_wherever_a_manifest_has_one(place, value, code):
    if place == "manifests":
        document = index(manifests=[value])
    elif place == "blobs":
        document = {"mediaType": OCI_ARTIFACT, "artifactType": "a/b", "blobs": [value]}
    else:
        document = dict(image(), **{place: [value] if place == "layers" else value})
    assert refusal(parse_manifest, to_bytes(document)).code == code


# Manifests

CHILD = to_manifest(image())
ARTIFACT = {"mediaType": OCI_ARTIFACT, "artifactType": "a/b", "blobs": [descriptor(b"one")]}


@pytest.mark.parametrize("document, media_type", [
    (image(), OCI_MANIFEST),
    (image(media_type=DOCKER_MANIFEST), DOCKER_MANIFEST),
    (index(CHILD), OCI_INDEX),
    (index(CHILD, mediaType=DOCKER_LIST), DOCKER_LIST),
    (index(), OCI_INDEX),
    (ARTIFACT, OCI_ARTIFACT),
    ({key: value for key, value in image().items() if key != "mediaType"}, OCI_MANIFEST),
    ({key: value for key, value in index(CHILD).items() if key != "mediaType"}, OCI_INDEX),
    (image(mediaType=""), OCI_MANIFEST),
    (image(layers=()), OCI_MANIFEST),
    (dict(image(), layers=None), OCI_MANIFEST),
])
def test_manifest_type(document, media_type):
    content = to_bytes(document)
    manifest = parse_manifest(content, media_type)
    assert manifest.media_type == media_type
    assert manifest.content == content
    assert manifest.digest == Digest.of(content)


def test_what_an_image_refers_to():
    about = {"mediaType": OCI_MANIFEST, "digest": SHA256, "size": 5}
    manifest = to_manifest(image((b"one", b"two"), subject=about))
    assert [blob.digest for blob in manifest.blobs] == [Digest.of(CONFIG), Digest.of(b"one"), Digest.of(b"two")]
    assert [blob.size for blob in manifest.blobs] == [len(CONFIG), 3, 3]
    assert manifest.manifests == []
    assert manifest.subject == SHA256


def test_what_an_index_refers_to():
    manifest = to_manifest(index(CHILD))
    assert [(child.digest, child.size) for child in manifest.manifests] == [(CHILD.digest, len(CHILD.content))]
    assert manifest.blobs == []
    assert manifest.subject is None


def test_what_an_artifact_refers_to():
    assert [blob.digest for blob in to_manifest(ARTIFACT).blobs] == [Digest.of(b"one")]


@pytest.mark.parametrize("content_type", ["", "application/json", "application/octet-stream", "text/plain",
                                          "application/x-www-form-urlencoded", OCI_MANIFEST,
                                          OCI_MANIFEST + "; charset=utf-8", OCI_MANIFEST.upper()])
def test_content_type_that_fits_or_is_vague(content_type):
    assert parse_manifest(to_bytes(image()), content_type).media_type == OCI_MANIFEST


@pytest.mark.parametrize("content_type", [DOCKER_MANIFEST, OCI_INDEX, "image/png"])
def test_content_type_of_something_else(content_type):
    error = refusal(parse_manifest, to_bytes(image()), content_type)
    assert (error.code, error.status) == ("MANIFEST_INVALID", 400)
    assert error.details == ({"Content-Type": content_type, "mediaType": OCI_MANIFEST},)


def test_no_media_type_and_the_other_content_type():
    """What the content shows counts: an image without mediaType can't be pushed as an index (CVE-2021-41190)."""
    document = {key: value for key, value in image().items() if key != "mediaType"}
    assert refusal(parse_manifest, to_bytes(document), OCI_INDEX).code == "MANIFEST_INVALID"


@pytest.mark.parametrize("document", [
    {"schemaVersion": 1, "name": "a", "tag": "b", "fsLayers": [], "history": []},
    {"schemaVersion": 1, "mediaType": "application/vnd.docker.distribution.manifest.v1+json"},
    {"schemaVersion": 1, "mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws"},
])
def test_schema_1_is_named_as_such(document):
    error = refusal(parse_manifest, to_bytes(document))
    assert (error.code, error.status) == ("MANIFEST_INVALID", 400)
    assert "schema 1" in error.message
    assert "v2s2" in error.message


@pytest.mark.parametrize("document", [
    {},
    {"schemaVersion": 2},
    {"mediaType": "image/png"},
    {"mediaType": 7},
    dict(image(), manifests=[]),                          # an index and an image at once
    dict(index(CHILD), config=descriptor(CONFIG)),
    dict(index(CHILD), layers=[]),
    {"schemaVersion": 2, "manifests": [], "config": descriptor(CONFIG), "layers": []},
    dict(ARTIFACT, manifests=[]),
    dict(image(), config=None),
    {key: value for key, value in image().items() if key != "config"},
    dict(image(), layers={}),
    dict(image(), layers="text"),
    index(manifests="text"),
    index(manifests={"a": 1}),
    image(schemaVersion=1),
    image(schemaVersion="2"),
    image(schemaVersion=None),
    image(annotations=[1]),
    image(annotations="text"),
    image(annotations={"a": 1}),                          # Go clients could not read a list of referrers with it
    image(annotations={"a": None}),
    image(artifactType=1),
    image(subject="text"),
])
def test_malformed_manifest(document):
    error = refusal(parse_manifest, to_bytes(document))
    assert (error.code, error.status) == ("MANIFEST_INVALID", 400)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_pushed_by_digest(algorithm):
    content = to_bytes(image())
    assert parse_manifest(content, digest=Digest.of(content, algorithm)).digest == Digest.of(content, algorithm)


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_pushed_by_another_digest(algorithm):
    content, other = to_bytes(image()), Digest.of(b"other", algorithm)
    error = refusal(parse_manifest, content, OCI_MANIFEST, other)
    assert (error.code, error.status) == ("DIGEST_INVALID", 400)
    assert error.details == ({"wanted": other, "got": Digest.of(content, algorithm)},)


def test_nothing_but_the_json_counts_for_a_stored_manifest():
    """A store also holds what another registry took: it is read as it is, and answered with its own type."""
    content = to_bytes({"schemaVersion": 1, "fsLayers": []})
    assert Manifest(content, Digest.of(content)).media_type == tinyreg.DOCKER_SCHEMA1
    content = to_bytes({"mediaType": "x/y"})
    assert Manifest(content, Digest.of(content)).media_type == "x/y"


# Referrers

@pytest.mark.parametrize("document, wanted", [
    (image(), CONFIG_TYPE),
    (image(artifactType="a/b"), "a/b"),
    (image(artifactType=""), CONFIG_TYPE),
    (dict(image(), config=descriptor(b"{}", "")), None),
    (index(CHILD), None),
    (index(CHILD, artifactType="a/b"), "a/b"),
    (ARTIFACT, "a/b"),
])
def test_artifact_type(document, wanted):
    assert (to_manifest(document).artifact_type or None) == wanted


def test_referrer():
    manifest = to_manifest(image(artifactType="a/b", annotations={"k": "v"}))
    assert manifest.referrer() == {"mediaType": OCI_MANIFEST, "digest": manifest.digest, "size": len(manifest.content),
                                   "artifactType": "a/b", "annotations": {"k": "v"}}


def test_referrer_without_artifact_type_and_annotations():
    manifest = to_manifest(index(CHILD))
    assert manifest.referrer() == {"mediaType": OCI_INDEX, "digest": manifest.digest, "size": len(manifest.content)}


@pytest.mark.parametrize("text", [r'"\ud800"', r'"\udfff\ud800"', "1e999", "-1e999", '"\u2028 \\u0000"'])
def test_a_list_of_referrers_is_utf_8_and_json_whatever_the_annotations_say(text):
    content = to_bytes(image(annotations={"a": "TEXT"})).replace(b'"TEXT"', text.encode())
    try:
        entry = parse_manifest(content).referrer()
    except RegistryError as error:
        assert error.code == "MANIFEST_INVALID"
    else:
        assert load_json(tinyreg.to_json(entry))["digest"] == Digest.of(content)


# Errors

def test_error_body():
    body = json.loads(RegistryError("MANIFEST_BLOB_UNKNOWN", SHA256, SHA512).body().decode())
    assert [(entry["code"], entry["detail"]) for entry in body["errors"]] == [
        ("MANIFEST_BLOB_UNKNOWN", SHA256), ("MANIFEST_BLOB_UNKNOWN", SHA512)]
    body = json.loads(RegistryError("DENIED").body().decode())
    assert body == {"errors": [{"code": "DENIED", "message": "requested access to the resource is denied"}]}


def test_error_body_with_text_that_is_no_unicode():
    """A name with stray bytes arrives as surrogates, and must not make the answer fail."""
    assert b"NAME_INVALID" in refusal(parse_name, "a\udcff").body()


@pytest.mark.parametrize("text, host, path, reference, stored", [
    ("alpine", "docker.io", "library/alpine", "latest", "docker.io/library/alpine"),
    ("alpine:3.19", "docker.io", "library/alpine", "3.19", "docker.io/library/alpine"),
    ("docker.io/alpine", "docker.io", "library/alpine", "latest", "docker.io/library/alpine"),
    ("index.docker.io/grafana/grafana:10", "docker.io", "grafana/grafana", "10", "docker.io/grafana/grafana"),
    ("localhost/x", "localhost", "x", "latest", "localhost/x"),
    ("lab.example:5000/x", "lab.example:5000", "x", "latest", "lab.example_5000/x"),
    ("LAB/x:1", "LAB", "x", "1", "lab/x"),
    ("quay.io/a/b:tag@sha256:" + "a" * 64, "quay.io", "a/b", "sha256:" + "a" * 64, "quay.io/a/b"),
])
def test_images_have_docker_s_names_and_keep_their_origin(text, host, path, reference, stored):
    image = tinyreg.parse_image(text)
    assert (image.host, image.path, image.reference, image.stored_name) == (host, path, reference, stored)


@pytest.mark.parametrize("text, code", [
    ("", "NAME_INVALID"), ("Alpine", "NAME_INVALID"), ("a" * 64, "NAME_INVALID"), ("x.y/", "NAME_INVALID"),
    ("-x.y/z", "NAME_INVALID"), ("[::1]:5000/x", "NAME_INVALID"), ("https://quay.io/x", "NAME_INVALID"),
    ("alpine:", "MANIFEST_INVALID"), ("alpine@sha256:12", "DIGEST_INVALID"), ("x.y/" + "a" * 252, "NAME_INVALID"),
])
def test_images_that_are_none_are_refused(text, code):
    with pytest.raises(tinyreg.RegistryError) as caught:
        tinyreg.parse_image(text)
    assert caught.value.code == code


@pytest.mark.parametrize("name, origin, names", [
    ("alpine", None, ["alpine", "docker.io/library/alpine"]),
    ("library/alpine", None, ["library/alpine", "docker.io/library/alpine"]),
    ("library/alpine", "docker.io", ["docker.io/library/alpine"]),
    ("alpine", "docker.io", ["docker.io/library/alpine"]),
    ("a/b", "registry-1.docker.io", ["docker.io/a/b"]), ("a/b", "Docker.IO", ["docker.io/a/b"]),
    ("a/b", "quay.io", ["quay.io/a/b"]), ("alpine", "quay.io", ["quay.io/alpine"]),
    ("a/b", "lab.example:5000", ["lab.example_5000/a/b"]),
    ("a/b", "", ["a/b", "docker.io/a/b"]), ("a/" + "b" * 244, None, ["a/" + "b" * 244]),
    ("quay.io/a/b", None, ["quay.io/a/b"]), ("lab_5000/a", None, ["lab_5000/a"]),
])
def test_a_read_means_the_origin_that_it_names_else_the_name_else_docker_io(name, origin, names):
    assert tinyreg.names_to_try(name, origin) == names


@pytest.mark.parametrize("origin", ["no host at all", "../etc", "quay.io/a",
                                    "doc\u212aer.io"])  # KELVIN SIGN, a k in lower case
def test_an_origin_that_is_no_host_means_no_repository(origin):
    with pytest.raises(tinyreg.RegistryError, match="ns must be the host of a registry"):
        tinyreg.names_to_try("a/b", origin)
