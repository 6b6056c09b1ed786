"""Signatures: which images a key has signed, by pull, load, verify and serve --upstream; and every way to cheat.

The signatures are made here by openssl in cosign's documented forms (its SIGNATURE_SPEC and BUNDLE_SPEC)."""

import base64
import contextlib
import gzip
import json
import os
import subprocess

import pytest

import tinyreg
from conftest import run_tinyreg
from engines import require
from samples import (CONFIG, descriptor, image, index, make_image, make_referrer, push_blob, tar_of, to_bytes,
                     to_manifest)
from tinyreg import ArchiveWriter, Directory, Refused, Signed, copy, read_keys

require("openssl")

SIMPLE = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
SIGNATURE = "dev.cosignproject.cosign/signature"
IN_TOTO = "application/vnd.in-toto+json"
SIGN = "https://sigstore.dev/cosign/sign/v1"


class Signer:
    """A key pair; `public` is the file with the public key."""

    def __init__(self, folder, name, *how):
        self.private, self.public = str(folder / (name + ".key")), str(folder / (name + ".pub"))
        self.is_raw = "ed25519" in how
        subprocess.run(["openssl", "genpkey", "-algorithm", *how, "-out", self.private], check=True,
                       stderr=subprocess.DEVNULL)
        subprocess.run(["openssl", "pkey", "-in", self.private, "-pubout", "-out", self.public], check=True)

    def sign(self, content):
        """The signature of these bytes, in base64."""
        path = self.private + ".content"
        with open(path, "wb") as file:
            file.write(content)
        how = ["pkeyutl", "-sign", "-rawin", "-inkey", self.private, "-in", path]
        if not self.is_raw:
            how = ["dgst", "-sha256", "-sign", self.private, path]
        return base64.b64encode(subprocess.run(["openssl"] + how, stdout=subprocess.PIPE, check=True).stdout).decode()

    def simple(self, digest, kind="cosign container image signature", payload=None, **annotations):
        """(descriptor, content) of a layer of simple signing."""
        payload = payload or to_bytes({
            "critical": {"identity": {"docker-reference": "registry.lab/demo"}, "type": kind,
                         "image": {"docker-manifest-digest": digest}}, "optional": None})
        annotations = annotations or {SIGNATURE: self.sign(payload)}
        return descriptor(payload, SIMPLE, annotations=annotations), payload

    def bundle(self, digest, predicate=SIGN, payload_type=IN_TOTO, kind="https://in-toto.io/Statement/v1", copies=1):
        """(descriptor, content) of a bundle."""
        payload = to_bytes({"_type": kind, "subject": [{"digest": {"sha256": digest[7:]}}],
                            "predicateType": predicate, "predicate": {}})
        signature = self.sign(b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload))
        content = to_bytes({
            "mediaType": BUNDLE, "verificationMaterial": {"publicKey": {"hint": "x"}, "tlogEntries": []},
            "dsseEnvelope": {"payload": base64.b64encode(payload).decode(), "payloadType": payload_type,
                             "signatures": [{"sig": signature}] * copies}})
        return descriptor(content, BUNDLE), content


@pytest.fixture(scope="module")
def signers(tmp_path_factory):
    """{name: Signer}; nobody trusts eve's key."""
    folder = tmp_path_factory.mktemp("keys")
    curve = ["EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    return {"ec": Signer(folder, "ec", *curve), "eve": Signer(folder, "eve", *curve),
            "rsa": Signer(folder, "rsa", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
            "ed": Signer(folder, "ed", "ed25519")}


@pytest.fixture
def good(signers):
    return signers["ec"]


@pytest.fixture
def eve(signers):
    return signers["eve"]


def tag_signatures(registry, name, digest, *layers):
    """Push signatures as cosign does: layers of one manifest under the tag sha256-HEX.sig."""
    for content in [b"{}"] + [content for _, content in layers]:
        push_blob(registry, name, content)
    manifest = to_manifest(dict(image((), b"{}"), layers=[entry for entry, _ in layers]))
    registry.put_manifest(name, manifest, [digest.replace(":", "-") + ".sig"])
    return manifest


def attach(registry, name, subject, *layers):
    """Push signatures as a referrer."""
    for content in [b"{}"] + [content for _, content in layers]:
        push_blob(registry, name, content)
    about = {"mediaType": subject.media_type, "digest": subject.digest, "size": len(subject.content)}
    manifest = to_manifest(dict(
        image((), b"{}"), artifactType=BUNDLE, subject=about, layers=[entry for entry, _ in layers],
        config=descriptor(b"{}", "application/vnd.oci.empty.v1+json")))
    registry.put_manifest(name, manifest)
    return manifest


def make_index(registry, name, tag="latest"):
    """An index of two platforms; returns it and them."""
    children = [make_image(registry, name, None, layers=(name.encode(),),
                           config=to_bytes({"os": "linux", "architecture": architecture}))
                for architecture in ("amd64", "arm64")]
    manifest = to_manifest(index(*children))
    registry.put_manifest(name, manifest, [tag])
    return (manifest,) + tuple(children)


def is_taken(registry, name, reference, *signers):
    """Whether one of these keys lets an image pass."""
    digest = reference if ":" in reference else registry.resolve(name, reference)
    keys = [key for signer in signers for key in read_keys(signer.public)]
    try:
        Signed(registry, keys).check(name, reference, digest)
    except Refused:
        return False
    return True


# What is signed

@pytest.mark.parametrize("kind", ["ec", "rsa", "ed"])
def test_a_signature_of_each_form_and_each_kind_of_key_counts(store, signers, eve, kind):
    signer = signers[kind]
    one, two = make_image(store, "one"), make_image(store, "two", layers=(b"two",))
    tag_signatures(store, "one", one.digest, signer.simple(one.digest))
    attach(store, "two", two, signer.bundle(two.digest))
    for name in ("one", "two"):
        assert is_taken(store, name, "latest", eve, signer)
        assert not is_taken(store, name, "latest", eve)


def test_a_signature_that_cosign_keeps_as_a_referrer_counts(store, good):
    manifest = make_image(store, "demo")
    attach(store, "demo", manifest, good.simple(manifest.digest))
    assert is_taken(store, "demo", "latest", good)


def test_a_signature_by_an_unknown_key_beside_a_good_one_does_no_harm(store, good, eve):
    manifest = make_image(store, "demo")
    tag_signatures(store, "demo", manifest.digest, eve.simple(manifest.digest), good.simple(manifest.digest))
    assert is_taken(store, "demo", "latest", good)


def test_a_file_of_keys_has_several(store, signers, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# of the lab\n" + "".join(open(signers[name].public).read() for name in ("eve", "ed", "ec")))
    assert len(read_keys(str(keys))) == 3


# Cheats

def cheats(good, eve, digest, other):
    """{what it is: layers of signatures that are none of this digest}"""
    entry, payload = good.simple(digest)
    claim = '{"critical": {"type": "cosign container image signature", "image": {%s}}}'
    pair = '"docker-manifest-digest": "%s"'
    twice = (claim % ", ".join([pair % other, pair % digest])).encode()
    yield "another image's signature", good.simple(other)
    yield "another image's signature, with this digest beside it", (
        dict(good.simple(other)[0], **{key: entry[key] for key in ("digest", "size")}), payload)
    yield "an unknown key's", eve.simple(digest)
    yield "another kind of signature", good.simple(digest, kind="atomic container signature")
    yield "garbage for base64", good.simple(digest, **{SIGNATURE: "a\u00fc!"})
    yield "an empty signature", good.simple(digest, **{SIGNATURE: ""})
    yield "no signature", good.simple(digest, other="x")
    yield "a key that comes twice", good.simple(digest, payload=twice)
    yield "no JSON", good.simple(digest, payload=b"\xff")
    yield "a deep text", good.simple(digest, payload=b"[" * 100000)
    for odd in (b"[]", b"{}", b'{"critical":[]}', (claim % 7).replace("{7}", "7").encode()):
        yield "odd " + odd.decode(), good.simple(digest, payload=odd)
    yield "more than a signature needs", good.simple(digest, payload=payload[:-1] + b" " * (1 << 20) + b"}")
    yield "a bundle about another image", good.bundle(other)
    yield "a bundle by an unknown key", eve.bundle(digest)
    yield "a statement about an SBOM", good.bundle(digest, predicate="https://spdx.dev/Document")
    yield "an envelope of another type", good.bundle(digest, payload_type="text/plain")
    yield "a statement of another type", good.bundle(digest, kind="https://in-toto.io/Statement/v9")
    yield "several signatures in one envelope", good.bundle(digest, copies=2)
    content = to_bytes({"dsseEnvelope": {"payload": "", "payloadType": 5, "signatures": 5}})
    yield "an odd envelope", (descriptor(content, BUNDLE), content)


def test_no_cheat_is_taken_for_a_signature(store, good, eve):
    manifest, other = make_image(store, "demo"), make_image(store, "demo", "other", layers=(b"other",))
    for what, layer in cheats(good, eve, manifest.digest, other.digest):
        tag_signatures(store, "demo", manifest.digest, layer)
        assert not is_taken(store, "demo", "latest", good), what
    # They don't hide a true signature either.
    layers = [layer for _, layer in cheats(good, eve, manifest.digest, other.digest)]
    tag_signatures(store, "demo", manifest.digest, *layers + [good.bundle(manifest.digest)])
    assert is_taken(store, "demo", "latest", good)
    assert not is_taken(store, "demo", "other", good)


def test_a_manifest_that_says_it_is_about_a_signed_image_is_none(store, good):
    """Clients run such a manifest as any other."""
    signed = make_image(store, "demo")
    tag_signatures(store, "demo", signed.digest, good.simple(signed.digest))
    about = {"mediaType": signed.media_type, "digest": signed.digest, "size": len(signed.content)}
    evil = make_image(store, "demo", "evil", layers=(b"evil",), subject=about)
    dressed = attach(store, "demo", signed, (descriptor(b"layer one", SIMPLE), b"layer one"))
    store.put_manifest("demo", dressed, ["dressed"])
    plain = to_manifest(index(evil, subject=about))
    tag = signed.digest.replace(":", "-")
    store.put_manifest("demo", plain, [tag + ".sbom"])
    for reference in ("evil", evil.digest, "dressed", dressed.digest, plain.digest, tag + ".sbom"):
        assert not is_taken(store, "demo", reference, good), reference
    assert is_taken(store, "demo", tag + ".sig", good)


def test_a_platform_of_a_signed_index_that_is_named_alone_needs_its_own_signature(store, good):
    manifest, amd64, arm64 = make_index(store, "demo")
    tag_signatures(store, "demo", manifest.digest, good.simple(manifest.digest))
    assert is_taken(store, "demo", "latest", good)
    assert not is_taken(store, "demo", amd64.digest, good)
    tag_signatures(store, "demo", amd64.digest, good.simple(amd64.digest))
    assert is_taken(store, "demo", amd64.digest, good) and not is_taken(store, "demo", arm64.digest, good)


def test_so_many_signatures_are_looked_at_and_no_more(store, good, monkeypatch):
    monkeypatch.setattr(tinyreg, "MAX_SIGNATURES", 3)
    checks, keys = [], read_keys(good.public)
    monkeypatch.setattr(tinyreg, "openssl_reads", lambda *claim: checks.append(claim))
    manifest = make_image(store, "demo")
    tag_signatures(store, "demo", manifest.digest, *[good.simple(manifest.digest)] * 9)
    for number in range(9):
        attach(store, "demo", manifest, *[good.bundle(manifest.digest)] * (number + 1))
    assert not Signed(store, keys).is_signed("demo", manifest.digest) and len(checks) == 3


def test_what_else_is_about_an_image_does_not_count_as_signatures(store, good, monkeypatch):
    monkeypatch.setattr(tinyreg, "MAX_SIGNATURES", 3)
    manifest = make_image(store, "demo")
    attach(store, "demo", manifest, *[(descriptor(b"layer one"), b"layer one")] * 9)
    attach(store, "demo", manifest, good.bundle(manifest.digest))
    assert is_taken(store, "demo", "latest", good)


def unpackable(text):
    """A tar that begins with this text."""
    header = bytearray(text.ljust(257)[:257] + b"ustar\x0000".ljust(255, b" "))
    header[124:136], header[148:156] = b"%011o " % 0, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


PACKED = (tar_of(b"x"), gzip.compress(tar_of(b"x")), b"BZh91", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"\x50\x2a\x4d\x18")


def test_text_is_told_from_what_can_be_unpacked():
    for layer in PACKED + (unpackable(b'{"critical":'), unpackable("{\xfc".encode())):
        assert not tinyreg.is_text(layer[:512])
    for text in (b"{}", b" {", b"<xml/>", b"SPDXVersion: SPDX-2.3", b'{"sha256":"%s"' % (b"1234567" * 99)):
        assert tinyreg.is_text(text[:512])


@pytest.mark.parametrize("config, kind", [
    ("application/vnd.oci.image.config.v1+json", SIMPLE), ("application/octet-stream", ""),
    ("application/vnd.docker.container.image.v1+json", "application/octet-stream")])
def test_what_docker_would_unpack_is_no_signature_whatever_its_types_are(store, good, config, kind):
    """docker looks at the bytes of an image's layers, not at their types."""
    signed = make_image(store, "demo")
    tag, text = signed.digest.replace(":", "-") + ".sig", good.simple(signed.digest)[1]

    def is_let_through(*layers):
        for blob in (CONFIG,) + layers:
            push_blob(store, "demo", blob)
        manifest = to_manifest(dict(image(), config=descriptor(CONFIG, config),
                                    layers=[descriptor(layer, kind) for layer in layers]))
        store.put_manifest("demo", manifest, [tag])
        cached = Signed(store, read_keys(good.public), lambda name: True)
        with contextlib.suppress(Refused):
            return cached.resolve("demo", tag) == cached.manifest("demo", manifest.digest).digest
        return False

    assert is_let_through(text) and is_let_through(text, b"<xml/>")
    assert not is_let_through(PACKED[0]) and not is_let_through(text, PACKED[1])


# Keys that are none

@pytest.mark.parametrize("content, words", [
    (b"", "no public key in PEM"), (b"\x00\xff", "no public key in PEM"),
    (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "neither ECDSA P-256, RSA nor Ed25519"),
    (None, "No such file"), ("private", "keep it secret"), ("P-384", "neither ECDSA P-256, RSA nor Ed25519")])
def test_a_file_without_a_key_is_said_to_be_one(good, tmp_path, content, words):
    path = tmp_path / "cosign.pub"
    if content == "private":
        path = good.private
    elif content == "P-384":
        path = Signer(tmp_path, "large", "EC", "-pkeyopt", "ec_paramgen_curve:P-384").public
    elif content is not None:
        path.write_bytes(content)
    done = run_tinyreg("verify", "--root", tmp_path / "none", "--signed-by", path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and words in done.stderr, done.stderr


def test_without_openssl_or_with_an_old_one_the_error_says_so(signers, tmp_path):
    environment = dict(os.environ, PATH=str(tmp_path))
    for script, name, words in ((None, "ec", "needs the openssl command"), ("exit 1", "ec", "neither"), (
            'test $1 = pkeyutl && exit; echo ED25519', "ed", "takes OpenSSL 3")):
        if script:
            (tmp_path / "openssl").write_text("#!/bin/sh\n" + script)
            (tmp_path / "openssl").chmod(0o755)
        done = run_tinyreg("verify", "--signed-by", signers[name].public, env=environment)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and words in done.stderr, done.stderr


# The commands

@pytest.fixture
def lab(store, good, tmp_path):
    """A store and an archive with one signed index and one image that is not."""
    manifest, amd64, arm64 = make_index(store, "lab/signed")
    tag_signatures(store, "lab/signed", manifest.digest, good.simple(manifest.digest))
    make_image(store, "lab/plain", "1", layers=(b"plain",))
    writer = ArchiveWriter()
    for name, tag in (("lab/signed", "latest"), ("lab/plain", "1")):
        copy(store, writer, name, tag)
    writer.plan(str(tmp_path / "lab.tar"))
    writer.save()
    return store, str(tmp_path / "lab.tar"), amd64


def test_load_takes_what_is_signed_and_names_the_rest(lab, good, eve, tmp_path):
    store, archive, _ = lab
    done = run_tinyreg("load", archive, "--root", tmp_path / "near", "--signed-by", good.public)
    assert done.returncode == 1 and "lab/plain:1: no key of --signed-by has signed sha256:" in done.stderr
    near = Directory(str(tmp_path / "near"))
    assert list(near.repositories()) == ["lab/signed"]
    assert sorted(near.tags("lab/signed")) == sorted(store.tags("lab/signed"))
    assert is_taken(near, "lab/signed", "latest", good)
    done = run_tinyreg("load", archive, "--root", tmp_path / "none", "--signed-by", eve.public, "--json")
    failed = [entry["image"] for entry in json.loads(done.stdout)["failed"]]
    assert failed == ["lab/plain:1", "lab/signed:latest"]  # a signature itself needs none
    assert list(Directory(str(tmp_path / "none")).repositories()) == []


def test_verify_names_what_is_not_signed(lab, good, eve, root):
    _, archive, _ = lab
    for where in (["--root", root], [archive]):
        done = run_tinyreg("verify", *where, "--signed-by", good.public)
        assert done.returncode == 1 and "nothing is damaged; 1 image not signed" in done.stdout
        assert "not signed by a key of --signed-by: lab/plain:1\n" in done.stdout
        done = run_tinyreg("verify", *where, "--signed-by", eve.public, "--json", "--signed-by", good.public)
        assert json.loads(done.stdout)["unsigned"] == ["lab/plain:1"]
    run_tinyreg("rm", "lab/plain:1", "--root", root)
    done = run_tinyreg("verify", "--root", root, "--signed-by", good.public)
    assert done.returncode == 1 and "not signed by a key of --signed-by: lab/plain@sha256:" in done.stdout
    run_tinyreg("gc", "--untagged", "--grace", "0s", "--root", root)
    done = run_tinyreg("verify", "--root", root, "--signed-by", good.public)
    assert done.returncode == 0 and done.stdout.endswith("all is well\n")


def test_pull_takes_what_is_signed_and_names_the_rest(lab, good, start_server, root, tmp_path):
    store, _, amd64 = lab
    digest, note = store.resolve("lab/signed", "latest"), b'{"payload": "%s"}' % (b"x" * 2000)
    attestation = tag_signatures(store, "lab/signed", digest, (descriptor(note, "application/dsse+json"), note))
    store.put_manifest("lab/signed", attestation, [digest.replace(":", "-") + ".att"])
    tag_signatures(store, "lab/signed", digest, good.simple(digest))
    host = start_server(root).host
    words = ["--root", tmp_path / "near", "--signed-by", good.public, "--platform", "linux/amd64"]
    done = run_tinyreg("pull", host + "/lab/signed", host + "/lab/plain:1", *words)
    assert done.returncode == 1 and host + "/lab/plain:1: no key of --signed-by has signed" in done.stderr
    near = Directory(str(tmp_path / "near"))
    (name,) = near.repositories()
    assert near.resolve(name, "latest") == store.resolve("lab/signed", "latest")
    # The platform is here already, and comes from the store.
    done = run_tinyreg("pull", "%s/lab/signed@%s" % (host, amd64.digest), *words)
    assert done.returncode == 1 and "no key of --signed-by has signed " + amd64.digest in done.stderr
    # A signature by itself: that it can't run shows in its layer, which is looked at over there.
    tag = store.resolve("lab/signed", "latest").replace(":", "-") + ".sig"
    done = run_tinyreg("pull", "%s/lab/signed:%s" % (host, tag), *words[:4])
    assert (done.returncode, done.stderr) == (0, "") and near.resolve(name, tag) == store.resolve("lab/signed", tag)


def test_save_and_push_take_what_is_signed_and_name_the_rest(lab, good, start_server, root, tmp_path):
    store, _, _ = lab
    both = ["lab/signed", "lab/plain:1", "--root", root, "--signed-by", good.public]
    done = run_tinyreg("save", *both, "-o", tmp_path / "both.tar")
    assert done.returncode == 1 and "lab/plain:1: no key of --signed-by has signed" in done.stderr
    assert not (tmp_path / "both.tar").exists()
    host, lock = start_server(tmp_path / "far").host, tmp_path / "lock"
    done = run_tinyreg("push", *both, "--to", host, "--lock", lock)
    assert done.returncode == 1 and "lab/plain:1: no key of --signed-by has signed" in done.stderr
    digest = store.resolve("lab/signed", "latest")
    assert lock.read_text() == "lab/signed:latest@%s\n" % digest
    far = Directory(str(tmp_path / "far"))
    assert list(far.repositories()) == ["lab/signed"] and far.resolve("lab/signed", "latest") == digest


def test_what_is_checked_is_what_is_copied(store, good, tmp_path, no_fsync):
    """A tag that is moved while a pull is at work leads to the image that was checked, or to none."""
    manifest = make_image(store, "demo")
    tag_signatures(store, "demo", manifest.digest, good.simple(manifest.digest))

    class Moving(tinyreg.Wrapper):
        def resolve(self, name, tag):
            digest = super().resolve(name, tag)
            if tag == "latest":
                make_image(store, "demo", "latest", layers=(b"evil",))
            return digest

    options = tinyreg.build_parser().parse_args(["pull", "x", "--signed-by", good.public])
    options.strip = False
    near = Directory(str(tmp_path / "near"))
    source = Moving(store)
    copy = tinyreg.Copy(source, near, "demo", "latest", **tinyreg.copy_choices(options, source))
    copy.plan()
    copy.run()
    assert near.resolve("demo", "latest") == manifest.digest != store.resolve("demo", "latest")
    copy.clear()  # as where there is no memory for all plans
    with pytest.raises(Refused):
        copy.plan()


class Planted:
    """A signed index, and about it, a platform of it and a referrer: what may go along, and images that nobody
    signed, which a client could run. One has a tag of cosign's."""

    def __init__(self, store, name, signer):
        self.index, *self.platforms = make_index(store, name)
        tag_signatures(store, name, self.index.digest, signer.simple(self.index.digest))
        note = make_referrer(store, name, self.index)
        signed, *evil = [self.make_image(store, name, *image) for image in (
            (b"signed", self.index), (b"evil 1", self.index), (b"evil 2", self.platforms[0]), (b"evil 3", note))]
        tag_signatures(store, name, signed.digest, signer.simple(signed.digest))
        evil.append(to_manifest(dict(index(evil[0]), subject=note.document["subject"])))
        store.put_manifest(name, evil[-1])
        self.tag = self.index.digest.replace(":", "-") + ".att"
        evil.append(make_image(store, name, self.tag, layers=(b"tagged",)))
        self.good = {note.digest, signed.digest}
        self.evil = {manifest.digest for manifest in evil}
        self.names = {name + ":" + self.tag} | {"%s@%s" % (name, manifest.digest) for manifest in evil[:-1]}

    @staticmethod
    def make_image(store, name, layer, subject):
        about = {"mediaType": subject.media_type, "digest": subject.digest, "size": len(subject.content)}
        return make_image(store, name, None, layers=(layer,), subject=about)


@pytest.fixture
def planted(store, good):
    return Planted(store, "lab/planted", good)


@pytest.mark.parametrize("way", ["pull", "push", "save", "load"])
def test_an_unsigned_image_that_is_about_a_signed_one_is_left_out_and_named(planted, good, start_server, root, tmp_path,
                                                                            way):
    """Whoever may push there can add one, and a client would run it by its digest."""
    signed_by, image, name = ["--signed-by", good.public], "lab/planted:latest", "lab/planted"
    near, archive = tmp_path / "near", tmp_path / "planted.tar"
    if way == "pull":
        host = start_server(root).host
        name = host.replace(":", "_") + "/lab/planted"
        done = run_tinyreg("pull", host + "/" + image, "--root", near, *signed_by)
    elif way == "push":
        done = run_tinyreg("push", image, "--root", root, "--to", start_server(near).host, *signed_by)
    else:
        done = run_tinyreg("save", image, "--root", root, "-o", archive, *(signed_by if way == "save" else ()))
        last = run_tinyreg("load", archive, "--root", near, *(signed_by if way == "load" else ()))
        done = last if way == "load" else done
    store = Directory(str(near))
    present = {manifest.digest for manifest in store.manifests(name)}
    assert planted.good | {planted.index.digest} <= present and not planted.evil & present
    assert store.resolve(name, "latest") == planted.index.digest and planted.tag not in store.tags(name)
    left_out = [line for line in done.stderr.splitlines() if "is left out: no key of --signed-by has signed it" in line]
    assert len(left_out) == len(planted.names)
    for text in planted.names:
        assert sum(text in line for line in left_out) == 1, text


def test_a_platform_that_is_about_another_one_goes_with_its_signed_index(store, good, root, tmp_path):
    amd64 = make_image(store, "demo", None)
    arm64 = Planted.make_image(store, "demo", b"arm64", amd64)
    manifest = to_manifest(index(amd64, arm64))
    store.put_manifest("demo", manifest, ["latest"])
    tag_signatures(store, "demo", manifest.digest, good.simple(manifest.digest))
    done = run_tinyreg("save", "demo", "--root", root, "-o", tmp_path / "x.tar", "--signed-by", good.public)
    assert (done.returncode, done.stderr) == (0, "")
    assert arm64.digest in set(tinyreg.Archive([str(tmp_path / "x.tar")]).digests())


def test_verify_names_an_unsigned_image_that_is_about_a_signed_one(planted, good, root, tmp_path):
    run_tinyreg("save", "lab/planted:latest", "--root", root, "-o", tmp_path / "planted.tar")
    for where in ("--root", root), ("--root", root, "lab/planted:latest"), (tmp_path / "planted.tar",):
        done = run_tinyreg("verify", *where, "--signed-by", good.public, "--json")
        unsigned = json.loads(done.stdout)["unsigned"]
        assert done.returncode == 1 and len(unsigned) == len(planted.names), done.stdout
        assert set(unsigned) == planted.names


def test_no_unsigned_image_comes_along_under_a_tag_of_a_signature(store, good, tmp_path, no_fsync):
    manifest = make_image(store, "demo")
    tag_signatures(store, "demo", manifest.digest, good.simple(manifest.digest))
    tag = manifest.digest.replace(":", "-") + ".att"
    evil = make_image(store, "demo", tag, layers=(b"evil",))
    options = tinyreg.build_parser().parse_args(["pull", "x", "--signed-by", good.public])
    options.strip = False
    near = Directory(str(tmp_path / "near"))
    copy = tinyreg.Copy(store, near, "demo", "latest", **tinyreg.copy_choices(options, store))
    copy.plan()
    copy.run()
    assert evil.digest not in [manifest.digest for manifest in near.manifests("demo")]
    assert tag not in near.tags("demo") and copy.report.unsigned == ["demo:" + tag]


@pytest.mark.parametrize("way", ["load", "pull", "push"])
def test_what_is_about_a_refused_image_stays_behind_under_its_own_tag_too(lab, eve, start_server, root, tmp_path, way):
    store, archive, amd64 = lab
    tag_signatures(store, "lab/signed", amd64.digest, eve.simple(archive))
    near, signed_by = tmp_path / "near", ["--signed-by", eve.public]
    if way == "load":
        run_tinyreg("save", "lab/**", "--root", root, "-o", archive)
        done = run_tinyreg("load", archive, "--root", near, *signed_by)
    elif way == "pull":
        done = run_tinyreg("pull", start_server(root).host + "/lab/signed:*", "--root", near, *signed_by)
    else:
        done = run_tinyreg("push", "lab/**", "--root", root, "--to", start_server(near).host, *signed_by)
    assert done.returncode == 1 and "no key of --signed-by has signed" in done.stderr
    assert list(Directory(str(near)).repositories()) == [] and not list(Directory(str(near)).digests())


# Behind serve --upstream

@pytest.fixture
def cache(store, good, start_server, tmp_path):
    """(a server that serves what is signed of an upstream, the store of the upstream, its server)"""
    upstream = start_server(store.root)
    front = start_server(tmp_path / "cache", "--upstream", "lab=http://" + upstream.host, "--signed-by", good.public,
                         "--upstream-ttl", "0", "--workers", "2")
    return front, store, upstream


def test_a_cache_serves_what_is_signed_and_nothing_else_of_its_upstream(cache, good):
    front, store, upstream = cache
    manifest, amd64, _ = make_index(store, "web")
    signature = tag_signatures(store, "web", manifest.digest, good.simple(manifest.digest))
    note = make_referrer(store, "web", manifest)
    plain = make_image(store, "plain", layers=(b"plain",))

    def status(name, reference, method="GET"):
        return front.ask(method, "/v2/lab/%s/manifests/%s" % (name, reference)).status

    tag = manifest.digest.replace(":", "-") + ".sig"
    for reference in ("latest", manifest.digest, amd64.digest, tag, signature.digest, note.digest):
        assert {status("web", reference, method) for method in ("GET", "HEAD")} == {200}, reference
    answer = front.ask("GET", "/v2/lab/plain/manifests/latest")
    assert (answer.status, answer.code) == (403, "DENIED") and plain.digest in answer.text
    assert status("plain", plain.digest) == status("plain", "latest", "HEAD") == 403
    assert front.ask("GET", "/archive/lab/plain:latest.tar").status == 403
    # What is ours is not asked for a signature; what the store has of the upstream is, wherever it came from.
    ours = Directory(front.root)
    make_image(ours, "team/app")
    make_image(ours, "lab/old", layers=(b"old",))
    assert front.ask("GET", "/v2/team/app/manifests/latest").status == 200
    upstream.stop()
    assert (status("web", "latest"), status("web", amd64.digest), status("old", "latest")) == (200, 200, 403)
    assert front.ask("GET", "/archive/lab/old:latest.tar").status == 403


def test_a_cache_does_not_serve_an_unsigned_image_that_is_about_a_signed_one(cache, good, tmp_path):
    front, store, upstream = cache
    planted = Planted(store, "web", good)
    for reference in planted.evil | {planted.tag}:
        assert front.ask("GET", "/v2/lab/web/manifests/" + reference).status == 403
    for digest in planted.evil:  # a blob is no image, so anyone may let it come into the cache
        for blob in store.manifest("web", digest).blobs:
            assert front.ask("GET", "/v2/lab/web/blobs/" + blob.digest).status == 200
    for is_away in (False, True):
        if is_away:
            upstream.stop()
            Directory(front.root).delete_manifest("lab/web", planted.platforms[1].digest)  # it was never pulled
        with front.open("GET", "/archive/lab/web:latest.tar") as response:
            (tmp_path / "web.tar").write_bytes(response.read())
        present = set(tinyreg.Archive([str(tmp_path / "web.tar")]).digests())
        assert response.status == 200 and planted.good <= present and not planted.evil & present


def test_a_signature_that_cannot_be_read_is_none_while_the_upstream_is_away(cache, good):
    front, _, upstream = cache
    upstream.stop()
    store = Directory(front.root, sparse=True)
    manifest = make_image(store, "lab/old")
    entry, _ = good.simple(manifest.digest)
    signature = to_manifest(dict(image((), b"{}"), layers=[entry]))
    push_blob(store, "lab/old", b"{}")
    store.put_manifest("lab/old", signature, [manifest.digest.replace(":", "-") + ".sig"])
    for path in ("/v2/lab/old/manifests/latest", "/archive/lab/old:latest.tar"):
        assert front.ask("GET", path).status == 503, path


def test_signed_by_needs_an_upstream_to_serve(good, tmp_path):
    done = run_tinyreg("serve", "--root", tmp_path / "x", "--signed-by", good.public)
    assert done.returncode == 1 and "verify --signed-by" in done.stderr and len(done.stderr.splitlines()) == 1
