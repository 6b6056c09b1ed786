"""Artifacts: files and Helm charts into a store, through archives, and out again by get, by HTTP and by skopeo."""

import gzip
import io
import json
import os
import tarfile

import pytest

import tinyreg
from conftest import ask
from samples import descriptor, image, index, make_image, make_referrer, push_blob, read_blob, to_manifest
from test_api import Client as Call
from tinyreg import OCI_ARTIFACT, Archive, Digest, Directory, parse_chart

TITLE = "org.opencontainers.image.title"
FILES = {"install.sh": b"#!/bin/sh\necho hello\n", "rke2.tar.gz": os.urandom(100000)}
CHART_YAML = b"""apiVersion: v2
name: web
version: 1.2.3+lab.1
appVersion: "2.0"
description: A page 'for' the lab   # not for others
home: 'https://web.lab'
keywords:
- name: not this
maintainers:
  - name: nor this
"""


def pack(files):
    """A .tgz with these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


CHART = pack({"web/values.yaml": b"a: 1\n", "web/charts/sub/Chart.yaml": b"name: sub\n", "web/Chart.yaml": CHART_YAML})


@pytest.fixture
def files(tmp_path):
    """A folder with the files; returns their paths."""
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return [str(folder / name) for name in FILES]


@pytest.fixture
def chart(tmp_path):
    path = tmp_path / "web-1.2.3+lab.1.tgz"
    path.write_bytes(CHART)
    return str(path)


@pytest.fixture
def tinyreg_does(store, capsys):
    """A function that runs a command with the store; returns its exit status, its output and its errors."""
    def run(command, *words):
        status = tinyreg.main([command, "--root", store.root] + [str(word) for word in words])
        output = capsys.readouterr()
        return status, output.out, output.err
    level = tinyreg.logger.level
    yield run
    tinyreg.logger.setLevel(level)  # verify logs errors only


@pytest.fixture
def added(store, files, tinyreg_does):
    """The files in the store, as rke2/files:v1."""
    status, output, errors = tinyreg_does("add", *files, "--to", "rke2/files:v1")
    assert (status, errors) == (0, "")
    assert output == "rke2/files:v1 is %s\n" % store.resolve("rke2/files", "v1")
    return store.manifest("rke2/files", store.resolve("rke2/files", "v1"))


def only_line(errors):
    """The one line on stderr."""
    assert errors.startswith("tinyreg: ") and errors.count("\n") == 1, errors
    return errors


def in_folder(folder):
    """{name: content} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def described(content, media_type, title):
    return descriptor(content, media_type, annotations={TITLE: title})


# Into the store

def test_files_are_stored_as_oras_stores_them(added):
    """As oras 1.3 pushed two files, but for the time, and the copy of the config in its descriptor."""
    assert added.document == {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": "application/vnd.unknown.artifact.v1",
        "config": descriptor(b"{}", "application/vnd.oci.empty.v1+json"),
        "layers": [described(content, "application/vnd.oci.image.layer.v1.tar", name)
                   for name, content in FILES.items()]}


def test_the_same_files_have_the_same_digest_and_other_files_move_the_tag(store, added, files, tinyreg_does):
    assert tinyreg_does("add", *files, "--to", "other:1")[0] == 0
    assert store.resolve("other", "1") == added.digest
    assert tinyreg_does("add", files[0], "--to", "other:1")[0] == 0
    assert store.resolve("other", "1") != added.digest


@pytest.mark.parametrize("to, name, tag", [("charts", "charts/web", "1.2.3_lab.1"), ("my/page:1", "my/page", "1")])
def test_a_chart_is_stored_as_helm_stores_it(store, chart, tinyreg_does, to, name, tag):
    with open(chart + ".prov", "wb") as file:
        file.write(b"signed")
    assert tinyreg_does("add", chart, "--to", to)[0] == 0
    document = store.manifest(name, store.resolve(name, tag)).document
    assert document["config"]["mediaType"] == "application/vnd.cncf.helm.config.v1+json"
    assert json.loads(read_blob(store, name, Digest(document["config"]["digest"])).decode()) == {
        "apiVersion": "v2", "name": "web", "version": "1.2.3+lab.1", "appVersion": "2.0",
        "description": "A page 'for' the lab", "home": "https://web.lab"}
    assert document["layers"] == [
        described(CHART, "application/vnd.cncf.helm.chart.content.v1.tar+gzip", "web-1.2.3+lab.1.tgz"),
        described(b"signed", "application/vnd.cncf.helm.chart.provenance.v1.prov", "web-1.2.3+lab.1.tgz.prov")]
    assert document["annotations"] == {
        "org.opencontainers.image.title": "web", "org.opencontainers.image.version": "1.2.3+lab.1",
        "org.opencontainers.image.description": "A page 'for' the lab",
        "org.opencontainers.image.url": "https://web.lab"}


def test_several_charts_are_an_image_each_and_a_chart_among_files_is_a_file(
        store, chart, files, tmp_path, tinyreg_does):
    other = tmp_path / "db.tgz"
    other.write_bytes(pack({"./db/Chart.yaml": b"apiVersion: v1\nname: db\nversion: 0.1.0\n"}))
    assert tinyreg_does("add", chart, other, "--to", "charts")[0] == 0
    assert list(store.tags("charts/web")) == ["1.2.3_lab.1"] and list(store.tags("charts/db")) == ["0.1.0"]
    assert tinyreg_does("add", files[0], chart, "--to", "all:1")[0] == 0
    document = store.manifest("all", store.resolve("all", "1")).document
    assert [layer["mediaType"] for layer in document["layers"]] == ["application/vnd.oci.image.layer.v1.tar"] * 2


@pytest.mark.parametrize("text, version", [
    ("version: 1.10", "1.10"), ("version: '1.10' # x", "1.10"), ('version: "1.10"', "1.10"),
    ("version:   1.10 ", "1.10"), ("version: 1.10\r", "1.10"), ("version: 1.1#0", "1.1#0"),
    ("version: 1.10\n\n# x", "1.10"), ("version:\n  1.10", "1.10"),
    ("version: 1.10\n  and  more # x", "1.10 and  more"), ("version: '1.10\n\tand: more'", "1.10 and: more"),
    # What has paragraphs, or needs more of YAML, is passed over
    ("version: 1.10\n\n  and more", None), ("version: |\n  1.10", None), ("version: >- # x\n  1.10", None),
    ('version: "1.1\\x30"', None), ("version: 'it''s'", None), ("version: &v 1.10", None), ("version: [1]", None),
    ("  version: 1.10", None), ("version:", None), ("version: # 1", None), ("versions: 1.10", None),
    ('"version": 1.10', None)])
def test_a_field_of_a_chart_is_read_as_it_is_meant_or_not_at_all(text, version):
    content = ("apiVersion: v2\n%s\nname: web" % text).encode()
    if version is None:
        with pytest.raises(tinyreg.CommandError, match="has no apiVersion, name or version"):
            parse_chart(content)
    else:
        assert parse_chart(content) == {"apiVersion": "v2", "name": "web", "version": version}


ZEROS = gzip.compress(bytes(1 << 20)) * (1 + (tinyreg.MAX_CHART >> 20))  # gzip may be in several members
BAD = {
    "no chart": ("x.tgz", pack({"web/values.yaml": b""}), "holds no Helm chart; for files, write --to charts:TAG"),
    "no gzip": ("x.tgz", b"something else", "holds no Helm chart"),
    "cut off": ("x.tgz", CHART[:60], "holds no Helm chart"),
    "no tgz": ("x.txt", CHART, "holds no Helm chart"),
    "a bomb": ("x.tgz", ZEROS, "holds no Helm chart"),
    "not at its place": ("x.tgz", pack({"Chart.yaml": CHART_YAML, "web/charts/web/Chart.yaml": CHART_YAML}), "no Helm"),
    "nothing in it": ("x.tgz", pack({"web/Chart.yaml": b""}), "helm would refuse this chart"),
    "no YAML": ("x.tgz", pack({"web/Chart.yaml": b"\xff\0" * 99}), "helm would refuse this chart"),
    "outside": ("x.tgz", pack({"web/Chart.yaml": CHART_YAML.replace(b"web", b"../web")}), "invalid repository name"),
    "no tag": ("x.tgz", pack({"web/Chart.yaml": CHART_YAML.replace(b"1.2.3", b"../1")}), "invalid tag"),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_what_is_no_chart_is_named_and_nothing_stored(store, tmp_path, tinyreg_does, name, content, message):
    (tmp_path / name).write_bytes(content)
    status, output, errors = tinyreg_does("add", tmp_path / name, "--to", "charts")
    assert (status, output) == (1, "") and message in only_line(errors)
    assert list(store.digests()) == [] and os.listdir(store.layout.scratch) == []


def test_a_tgz_that_is_no_chart_is_a_file_like_others(store, tmp_path, tinyreg_does):
    (tmp_path / "x.tgz").write_bytes(b"something else")
    assert tinyreg_does("add", tmp_path / "x.tgz", "--to", "x:1")[0] == 0
    assert ask_files(store, "x:1").body == b"x.tgz\n"


def test_what_cannot_be_stored_is_named(files, tmp_path, tinyreg_does):
    (tmp_path / "install.sh").write_bytes(b"another")
    (tmp_path / "a\nb").write_bytes(b"")
    os.mkfifo(str(tmp_path / "pipe"))
    for words, message in [((files[0], tmp_path / "nowhere"), "nowhere is no file"), ((tmp_path,), "make a .tar.gz"),
                           ((tmp_path / "pipe",), "is no file"), ((files[0], tmp_path / "install.sh"), "one name"),
                           ((tmp_path / "a\nb",), "refused")]:
        status, output, errors = tinyreg_does("add", *words, "--to", "x:1")
        assert (status, output) == (1, "") and message in only_line(errors)
    for to in "x@" + Digest.of(b""), "X:1", "x:-", "":
        status, output, errors = tinyreg_does("add", files[0], "--to", to)
        assert (status, output) == (1, "") and only_line(errors)


def test_a_large_file_is_not_held_in_memory(store, tmp_path, tinyreg_does):
    path = tmp_path / "large"
    with open(str(path), "wb") as file:
        file.truncate(64 << 20)
    tracemalloc = pytest.importorskip("tracemalloc")
    tracemalloc.start()
    try:
        assert tinyreg_does("add", path, "--to", "x:1")[0] == 0
        assert tinyreg_does("get", "x:1", "-o", tmp_path / "out")[0] == 0
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "large").stat().st_size == 64 << 20


# Out of it

def test_get_writes_the_files_and_replaces_none_unasked(added, tmp_path, tinyreg_does):
    out = tmp_path / "made" / "out"
    assert tinyreg_does("get", "rke2/files:v1", "-o", out) == (
        0, "".join("%s\n" % (out / name) for name in FILES), "")
    assert in_folder(out) == FILES
    (out / "install.sh").unlink()
    (out / "rke2.tar.gz").write_bytes(b"mine")
    status, _, errors = tinyreg_does("get", "rke2/files:v1", "-o", out)
    assert status == 1 and "rke2.tar.gz is there; --force replaces it" in only_line(errors)
    assert in_folder(out) == {"rke2.tar.gz": b"mine"}
    assert tinyreg_does("get", "rke2/files@" + added.digest, "-o", out, "--force")[0] == 0
    assert in_folder(out) == FILES


def strange(store, *titles, config=b"{}", media_type="application/octet-stream", layers=None):
    """An artifact x:1 in the store, as anyone may push it: its layers are called so, None for one without a name."""
    contents = [b"content of layer %d" % number for number in range(len(titles))]
    layers = layers or [described(content, media_type, title) if title is not None else descriptor(content, media_type)
                        for content, title in zip(contents, titles)]
    for content in contents + [config]:
        push_blob(store, "x", content)
    store.put_manifest("x", to_manifest(dict(image((), config), layers=layers)), ["1"])


def test_get_names_a_chart_that_helm_pushed_as_helm_would(store, tmp_path, tinyreg_does):
    """helm gives its layers no names."""
    strange(store, None, config=b'{"name":"web","version":"1.2.3+x"}',
            media_type="application/vnd.cncf.helm.chart.content.v1.tar+gzip")
    assert tinyreg_does("get", "x:1", "-o", tmp_path / "out")[0] == 0
    assert in_folder(tmp_path / "out") == {"web-1.2.3+x.tgz": b"content of layer 0"}


def test_get_makes_the_folders_that_names_have_and_passes_over_what_has_no_name(store, tmp_path, tinyreg_does):
    strange(store, "a/b/c.txt", None, "a/d.txt")
    assert tinyreg_does("get", "x:1", "-o", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "a" / "b" / "c.txt").read_bytes() == b"content of layer 0"
    assert sorted(os.listdir(str(tmp_path / "out" / "a"))) == ["b", "d.txt"]


def test_a_folder_that_oras_has_packed_is_a_tar_gz(store, tmp_path, tinyreg_does):
    packed = {TITLE: "conf", "io.deis.oras.content.unpack": "true"}
    strange(store, None, layers=[descriptor(b"content of layer 0", annotations=packed)])
    assert tinyreg_does("get", "x:1", "-o", tmp_path / "out")[0] == 0
    assert in_folder(tmp_path / "out") == {"conf.tar.gz": b"content of layer 0"}


def test_get_takes_an_artifact_manifest_of_early_oras(store, tmp_path, tinyreg_does):
    blobs = [described(b"content of layer 0", "text/plain", "a.txt")]
    push_blob(store, "x", b"content of layer 0")
    store.put_manifest("x", to_manifest({"mediaType": OCI_ARTIFACT, "artifactType": "a/b", "blobs": blobs}), ["1"])
    assert tinyreg_does("get", "x:1", "-o", tmp_path / "out")[0] == 0
    assert in_folder(tmp_path / "out") == {"a.txt": b"content of layer 0"}


LEADING_OUT = ["../evil", "/evil", "a/../../evil", "..", ".", "a/./b", "a//b", "a/", "\n", "a\0b", "\x1b[2J", "\u202e"]


@pytest.mark.parametrize("title", LEADING_OUT)
def test_a_name_that_leads_out_of_the_folder_writes_nothing_at_all(store, tmp_path, tinyreg_does, title):
    strange(store, "good", title)
    out = tmp_path / "in" / "out"
    status, output, errors = tinyreg_does("get", "x:1", "-o", out)
    assert (status, output) == (1, "") and "refused" in only_line(errors)
    assert not (tmp_path / "in").exists() and not (tmp_path / "evil").exists()
    assert ask_files(store, "x:1").status == 400


@pytest.mark.parametrize("annotations, status", [
    ([], 200), ("a", 200), (1, 200), ({TITLE: None}, 200), ({TITLE: ["a"]}, 200), ({TITLE: {"a": 1}}, 200),
    ({TITLE: ""}, 200), ({TITLE: "/"}, 400), ({TITLE: 1}, 200)])
def test_annotations_that_are_malformed_fail_no_request(store, annotations, status):
    strange(store, None, layers=[descriptor(b"content of layer 0", annotations=annotations)])
    assert ask_files(store, "x:1").status == status


def test_two_files_of_one_name_are_refused_unless_they_are_the_same(store, tmp_path, tinyreg_does):
    strange(store, "a", "a")
    assert "two files have one name" in only_line(tinyreg_does("get", "x:1", "-o", tmp_path / "out")[2])
    assert not (tmp_path / "out").exists()
    layer = described(b"content of layer 0", "a/b", "a")
    strange(store, None, layers=[layer, layer])
    assert tinyreg_does("get", "x:1", "-o", tmp_path / "out")[0] == 0


def test_the_config_of_many_charts_is_read_once(store):
    """A manifest has room for 20000 layers, and a config for 4 MiB that would be parsed as often."""
    config = push_blob(store, "many", b'{"name":"web","version":"1"}')
    chart = {"mediaType": tinyreg.CHART, "digest": push_blob(store, "many", b"chart"), "size": 5}
    manifest = to_manifest(dict(
        image(), config={"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": config, "size": 28},
        layers=[chart] * 100))
    reads = []

    class Counting(tinyreg.Wrapper):
        def open_blob(self, *arguments):
            reads.append(arguments)
            return super().open_blob(*arguments)

    assert list(tinyreg.files_in(Counting(store), "many", manifest)) == ["web-1.tgz"] and len(reads) == 1
    os.unlink(store.layout.blob_path(config))
    assert list(tinyreg.files_in(Counting(store), "many", manifest)) == ["-.tgz"] and len(reads) == 2


def test_get_follows_no_link_that_somebody_has_laid(store, tmp_path, tinyreg_does):
    strange(store, "a/b", "c")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").symlink_to(elsewhere)
    assert "a link is on the way" in only_line(tinyreg_does("get", "x:1", "-o", out, "--force")[2])
    (out / "a").unlink()
    (out / "c").symlink_to(elsewhere / "c")
    assert "is there" in only_line(tinyreg_does("get", "x:1", "-o", out)[2])
    assert tinyreg_does("get", "x:1", "-o", out, "--force")[0] == 0
    assert list(elsewhere.iterdir()) == [] and not (out / "c").is_symlink()


def test_get_says_what_is_no_artifact_and_what_is_not_there(store, tmp_path, tinyreg_does):
    child = make_image(store, "app", "1")
    store.put_manifest("app", to_manifest(index(child)), ["all"])
    for name, message in [("app:1", "app:1 holds no files: it is an image for containers"), ("app:all", "an index"),
                          ("app:2", "not in the store as app:2, but as 1, all"), ("nowhere:1", "not in the store"),
                          ("A:1", "invalid")]:
        status, output, errors = tinyreg_does("get", name, "-o", tmp_path / "out")
        assert (status, output) == (1, "") and message in only_line(errors)
    assert not (tmp_path / "out").exists()


def test_get_leaves_no_file_behind_that_is_damaged_in_the_store(store, added, tmp_path, tinyreg_does):
    digest = Digest.of(FILES["install.sh"])
    with open(store.layout.blob_path(digest), "r+b") as file:
        file.write(b"X")
    status, _, errors = tinyreg_does("get", "rke2/files:v1", "-o", tmp_path / "out")
    assert status == 1 and only_line(errors) == "tinyreg: a file is damaged: %s\n" % digest
    assert in_folder(tmp_path / "out") == {}


# Over HTTP

def ask_files(registry, path, level="pull", method="GET", **headers):
    return Call(registry, level)(method, "/files/" + path, **headers)


def test_a_file_over_http_is_downloaded_and_never_shown(store, added):
    content = FILES["rke2.tar.gz"]
    for path in "rke2/files:v1/rke2.tar.gz", "rke2/files@%s/rke2.tar.gz" % added.digest:
        answer = ask_files(store, path)
        assert (answer.status, answer.body) == (200, content)
        assert answer.header("Content-Type") == "application/octet-stream"
        assert answer.header("Content-Disposition") == "attachment; filename*=UTF-8''rke2.tar.gz"
    assert ask_files(store, "rke2/files:v1/rke2.tar.gz", method="HEAD").length == len(content)
    part = ask_files(store, "rke2/files:v1/rke2.tar.gz", range="bytes=10-19")
    assert (part.status, part.body) == (206, content[10:20])
    assert ask_files(store, "rke2/files:v1").body == ask_files(store, "rke2/files:v1/").body \
        == b"install.sh\nrke2.tar.gz\n"


@pytest.mark.parametrize("path, status, code", [
    ("rke2/files:v2/install.sh", 404, "MANIFEST_UNKNOWN"), ("nowhere:v1/install.sh", 404, "NAME_UNKNOWN"),
    ("Bad:v1/install.sh", 400, "NAME_INVALID"), ("rke2/files:-/install.sh", 400, "MANIFEST_INVALID"),
    ("rke2/files@sha256:0/x", 400, "DIGEST_INVALID")])
def test_what_is_no_artifact_has_its_status(store, added, path, status, code):
    answer = ask_files(store, path)
    assert (answer.status, answer.code) == (status, code)


@pytest.mark.parametrize("file", ["/nowhere", "/../install.sh", "//install.sh", "/a%0Ab", "/install.sh/"])
def test_a_file_that_is_not_there_is_answered_with_those_that_are(store, added, file):
    answer = ask_files(store, "rke2/files:v1" + file)
    assert (answer.status, answer.body) == (404, b"install.sh\nrke2.tar.gz\n")


def test_a_name_with_folders_and_of_any_letters(store):
    strange(store, "a/f\u00fc nf.txt")
    answer = ask_files(store, "x:1/a/f%C3%BC%20nf.txt")
    assert answer.status == 200
    assert answer.header("Content-Disposition") == "attachment; filename*=UTF-8''f%C3%BC%20nf.txt"
    assert ask_files(store, "x:1").body == "a/f\u00fc nf.txt\n".encode()


def test_who_may_not_pull_gets_no_file(store, added):
    assert ask_files(store, "rke2/files:v1/install.sh", level="none").code == "DENIED"
    assert ask_files(store, "rke2/files:v1", level="none").code == "DENIED"
    assert ask_files(store, "rke2/files:v1/install.sh", method="PUT").status == 405


# With all the rest

def test_an_artifact_goes_through_archives_and_is_served_and_read_from_them(
        store, added, chart, tmp_path, start_server, tinyreg_does):
    """In parts, and as the difference to what the far side has."""
    assert tinyreg_does("add", chart, "--to", "charts")[0] == 0
    make_referrer(store, "rke2/files", added)
    far, archive = Directory(str(tmp_path / "far")), tmp_path / "x.tar"
    assert tinyreg_does("save", "rke2/files:v1", "charts/web:1.2.3_lab.1", "-o", archive, "--no-self")[0] == 0
    assert tinyreg_does("verify", archive)[0] == 0
    out = tmp_path / "out"
    assert tinyreg_does("get", "rke2/files:v1", "--from", archive, "-o", out)[0] == 0
    assert tinyreg_does("get", "charts/web:1.2.3_lab.1", "--from", archive, "-o", out)[0] == 0
    assert in_folder(out) == dict(FILES, **{os.path.basename(chart): CHART})
    referrer, = Archive([str(archive)]).referrers("rke2/files", added.digest)  # which has no name
    status, _, errors = tinyreg_does("get", "rke2/files@" + referrer.digest, "--from", archive, "-o", tmp_path / "sbom")
    assert status == 1 and "not in" not in errors, errors  # it is found, and has no file with a name
    status, _, errors = tinyreg_does("get", "rke2/files:none", "--from", archive, "-o", out)
    assert status == 1 and "ls ARCHIVE" in errors
    assert ask_files(Archive([str(archive)]), "rke2/files:v1/install.sh").body == FILES["install.sh"]
    assert tinyreg.main(["load", "--root", far.root, str(archive)]) == 0
    assert far.resolve("rke2/files", "v1") == added.digest and len(list(far.referrers("rke2/files", added.digest))) == 1
    (tmp_path / "new.sh").write_bytes(b"new")
    new = [tmp_path / "new.sh", tmp_path / "files" / "rke2.tar.gz"]
    assert tinyreg_does("add", *new, "--to", "rke2/files:v2")[0] == 0
    assert tinyreg_does("save", "rke2/files:v2", "-o", tmp_path / "y.tar", "--no-self", "--have", archive)[0] == 0
    assert (tmp_path / "y.tar").stat().st_size < 50000
    assert tinyreg.main(["load", "--root", far.root, str(tmp_path / "y.tar")]) == 0
    assert ask_files(far, "rke2/files:v2/rke2.tar.gz").body == FILES["rke2.tar.gz"]
    # Once nothing names the files they go, and what is named stays.
    far.delete_tag("rke2/files", "v1")
    assert tinyreg.main(["gc", "--root", far.root, "--untagged", "--grace", "0"]) == 0
    assert Digest.of(FILES["install.sh"]) not in set(far.digests())
    assert ask_files(far, "rke2/files:v2/rke2.tar.gz").status == 200


def test_skopeo_takes_an_artifact_and_brings_it_back(store, added, chart, start_server, skopeo, tmp_path, tinyreg_does):
    assert tinyreg_does("add", chart, "--to", "charts")[0] == 0
    server = start_server(store.root)
    for name in "rke2/files:v1", "charts/web:1.2.3_lab.1":
        layout = "oci:%s:x" % (tmp_path / name.replace(":", "-"))
        (tmp_path / name.partition("/")[0]).mkdir()
        skopeo("copy", "--src-tls-verify=false", "docker://%s/%s" % (server.host, name), layout)
        skopeo("copy", "--dest-tls-verify=false", layout, "docker://%s/back/%s" % (server.host, name))
        repository, _, tag = name.partition(":")
        assert store.resolve("back/" + repository, tag) == store.resolve(repository, tag)
    assert ask(server, "GET", "/files/back/rke2/files:v1/install.sh").body == FILES["install.sh"]
    part = ask(server, "GET", "/files/back/charts/web:1.2.3_lab.1/" + os.path.basename(chart), range="bytes=-5")
    assert (part.status, part.body, part.headers["X-Content-Type-Options"]) == (206, CHART[-5:], "nosniff")
