"""Which images are meant: what files name, patterns, the newest versions; against a registry that is Distribution's.

The files have the forms in which projects publish them; their lines are cut down to what names an image.
"""

import json
import os
import signal

import pytest

import tinyreg
from conftest import run_tinyreg
from engines import private_folder, require
from samples import make_image
from test_distribution import Distribution
from tinyreg import Digest, Directory, Filter, read_choices

DIGEST = Digest.of(b"an image")
TAGS = ["3.2", "3.9", "3.10", "3.10.1", "3.11-rc1", "3.12.0alpha2", "3.12-dev", "2.99", "latest", "v3.3", "3.9-slim",
        "sha256-%s.sig" % DIGEST.encoded]


@pytest.fixture(scope="module")
def host():
    """The address of docker-registry, with one small image under several names."""
    require("docker-registry")
    with private_folder("choice") as folder:
        store = Directory(os.path.join(folder, "root"))
        for name, tags in (("app", TAGS), ("team/web", ["1.0"]), ("team/reloader", ["v0.9"]), ("other", ["1"])):
            for tag in tags:
                make_image(store, name, tag, layers=(b"layer",))
        distribution = Distribution(store.root, folder)
        with distribution:
            yield distribution.host


@pytest.fixture
def run(root, no_fsync, capsys, monkeypatch):
    """A function that runs a command on the store, in this process, and expects this exit status."""
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    level = tinyreg.logger.level

    def run(command, *words, status=0):
        done = tinyreg.main([command, "--root", str(root)] + list(map(str, words)))
        printed = capsys.readouterr()
        assert done == status, printed.err
        return printed

    yield run
    tinyreg.logger.setLevel(level)


@pytest.fixture
def filled(store):
    """A store with images of two teams and of Docker Hub; one was pulled by its digest, one belongs to nobody."""
    for name, tag, layer in (("team/app", "1", b"a"), ("team/app", "2", b"b"), ("team/sub/web", "1", b"c"),
                             ("docker.io/library/alpine", "3.9", b"d"), ("docker.io/library/alpine", "3.10", b"e")):
        make_image(store, name, tag, layers=(layer * 5000,))
    pinned = make_image(store, "team/pin", None, layers=(b"p" * 5000,))
    store.put_manifest("team/pin", pinned, [pinned.digest])
    store.pin = pinned.digest
    make_image(store, "team/app", None, layers=(b"untagged",))
    return store


def choices_in(folder, text):
    """What a file with this text names: [(line, image)], and the same of the guesses."""
    path = folder / "file"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    named, guessed = [], []
    for choice in read_choices([], [str(path)]):
        where, _, line = choice.where.rpartition(":")
        assert where == str(path)
        (guessed if choice.is_guess else named).append((int(line), choice.image))
    return named, guessed


def tags_of(store):
    return {name: list(store.tags(name)) for name in store.repositories()}


# Files

INGRESS = """apiVersion: apps/v1
kind: Deployment
spec:
  template:
    spec:
      containers:
      - args: [/nginx-ingress-controller, --publish-service=$(POD_NAMESPACE)/ingress-nginx-controller]
        image: registry.k8s.io/ingress-nginx/controller:v1.15.1@%s
        imagePullPolicy: IfNotPresent
      # image: registry.k8s.io/ingress-nginx/old:v0
      - image:    "registry.k8s.io/ingress-nginx/opentelemetry:v2"   # with a comment
""" % DIGEST

OPERATOR = """          properties:
            image:
              description: |-
                Image if specified has precedence over baseImage, as in
                https://kubernetes.io/docs/concepts/containers/images/#image-names.
              type: string
      - args:
        - --kubelet-service=kube-system/kubelet
        - --prometheus-config-reloader=quay.io/prometheus-operator/prometheus-config-reloader:v0.93.1
        image: quay.io/prometheus-operator/prometheus-operator:v0.93.1
        seccompProfile: {app.kubernetes.io/name: x}
"""

CHART = """# Source: kube-prometheus-stack/templates/grafana.yaml
          image: 'docker.io/grafana/grafana:12.0'
          env:
            - {name: SIDECAR, image: kiwigrid/k8s-sidecar:1.30, other: x}
---
data:
  config: |
    image: "{{ annotation .ObjectMeta `sidecar.istio.io/proxyImage` }}"
"""

COMPOSE = """x-app: &app example.com/app:1
services:
  web:
    image: *app
  db: {image: "postgres:17"}
  cache:
    image: &cache redis:${REDIS:-7}-alpine
    build: .
  again:
    image: *cache
  empty:
    image: ""
"""

DOCKERFILE = """# syntax=docker/dockerfile:1
ARG VERSION=1.26 BASE="docker.io/library/debian:12"
ARG GO=golang:${VERSION}
FROM --platform=$BUILDPLATFORM $GO AS builder
RUN pip install x && echo "from os import path"
FROM builder as test
FROM scratch AS empty
FROM ${BASE}
COPY --from=builder /a /b
"""

K3S = ("docker.io/rancher/klipper-helm:v0.9\r\n\r\n"
       "docker.io/rancher/klipper-lb:v0.4.9  # for services\r\n")

PODS = {"apiVersion": "v1", "kind": "List", "items": [{
    "kind": "Pod", "metadata": {"annotations": {"last-applied": json.dumps({"image": "nginx:old"})}},
    "spec": {"containers": [{"image": "nginx:1.27", "name": "web"}],
             "initContainers": [{"args": ["--reload=quay.io/a/reloader:v1"], "image": "ghcr.io/a/init:2"}]},
    "status": {"containerStatuses": [{"image": "docker.io/library/nginx:1.27", "name": "web",
                                      "imageID": "docker.io/library/nginx@" + DIGEST},
                                     {"image": DIGEST, "imageID": "", "state": {"image": None}}]}}]}


@pytest.mark.parametrize("text, named, guessed", [
    (INGRESS, [(8, "registry.k8s.io/ingress-nginx/controller:v1.15.1@" + DIGEST),
               (11, "registry.k8s.io/ingress-nginx/opentelemetry:v2")], []),
    (OPERATOR, [(10, "quay.io/prometheus-operator/prometheus-operator:v0.93.1")],
     [(9, "quay.io/prometheus-operator/prometheus-config-reloader:v0.93.1")]),
    (CHART, [(2, "docker.io/grafana/grafana:12.0"), (4, "kiwigrid/k8s-sidecar:1.30")],
     [(8, "{{ annotation .ObjectMeta `sidecar.istio.io/proxyImage` }}")]),
    (COMPOSE, [(4, "example.com/app:1"), (5, "postgres:17"), (7, "redis:7-alpine")], []),
    (DOCKERFILE, [(4, "golang:1.26"), (8, "docker.io/library/debian:12")], []),
    (K3S, [(1, "docker.io/rancher/klipper-helm:v0.9"), (3, "docker.io/rancher/klipper-lb:v0.4.9")], []),
    (b"\xef\xbb\xbf" + K3S.encode(), [(1, "docker.io/rancher/klipper-helm:v0.9"),
                                      (3, "docker.io/rancher/klipper-lb:v0.4.9")], []),
    ("registry.k8s.io/pause:3.10\nregistry.k8s.io/coredns/coredns:v1.12.0\n",
     [(1, "registry.k8s.io/pause:3.10"), (2, "registry.k8s.io/coredns/coredns:v1.12.0")], []),
    ("lab.example_5000/x:1\nalpine:3.*\nalpine:3@%s\nalpine:3.*\n" % DIGEST,
     [(1, "lab.example_5000/x:1"), (2, "alpine:3.*"), (3, "alpine:3@" + DIGEST)], []),
    (json.dumps(PODS), [(1, "nginx:1.27"), (1, "ghcr.io/a/init:2"), (1, "docker.io/library/nginx:1.27")],
     [(1, "quay.io/a/reloader:v1")]),
    ("# for the image: see below, image: x\r\nalpine:3.19\r\nnginx:1  # {image: old}\r\n",
     [(2, "alpine:3.19"), (3, "nginx:1")], []),
    ("alpine:3.19\r\n---\nimage: nginx:1\n", [(3, "nginx:1")], [(1, "alpine:3.19")]),
], ids=["manifest", "operator", "chart", "compose", "Dockerfile", "k3s", "BOM", "kubeadm", "list", "kubectl",
        "comments", "joined"])
def test_a_file_of_any_form_names_its_images(tmp_path, text, named, guessed):
    assert choices_in(tmp_path, text) == (named, guessed)


def test_the_json_of_kubectl_names_the_same_with_and_without_line_breaks(tmp_path):
    dense, pretty = json.dumps(PODS, separators=(",", ":")), json.dumps(PODS, indent=4)
    named, guessed = choices_in(tmp_path, dense)
    assert [image for _, image in named] == ["nginx:1.27", "ghcr.io/a/init:2", "docker.io/library/nginx:1.27"]
    for text in (pretty, dense):
        assert [[image for _, image in part] for part in choices_in(tmp_path, text)] == [
            [image for _, image in part] for part in (named, guessed)]


@pytest.mark.parametrize("text, told", [
    ("sha256:%s\n" % ("0" * 64), ["is no image"]),  # of load --want
    ("alpine:3\nalpine 3.19\n\n- busybox\n", ["file:2: 'alpine 3.19' is no image", "file:4: '- busybox' is no image"]),
    ("services:\n  a:\n    image: a:${TAG}\n  b:\n    image: b:1\n",
     ["file:3: a:${TAG}: a variable has no value; put it in, for example with envsubst"]),
    ("ARG X\nFROM $X\n", ["file:2: $X: a variable has no value"]),
    ("image: busybox latest\n", ["file:1: 'busybox latest' is no image"]),
    ("image: >-\n  busybox\n", ["file:1: '>-' is no image"]),
    ("image: *nowhere\n", ["*nowhere: invalid repository name", "/file:1)"]),
    ("FROM x\nFROM\talpine 3\n", ["file:2: 'alpine 3' is no image"]),
    ("apiVersion: v1\n" * 30, ["file:1: 'apiVersion: v1' is no image", "; and 25 more"]),
    ("image:\n  repository: a/b\n  tag: 1\n", ["file:1: 'image:' is no image", "rendered first: helm template CHART"]),
    ("a:1\n\x1b[2J\u202e\n", ["file:2:"]),
    (b"a:1\n\xff\xfe\x00b\n", ["file:2:"]),
])
def test_each_line_that_can_t_be_read_is_told_and_nothing_is_copied(tmp_path, run, text, told):
    (tmp_path / "file").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run("pull", "-f", tmp_path / "file", status=1)
    assert done.out == "" and len(done.err.splitlines()) == 1
    assert all(line in done.err for line in told), done.err


def test_no_command_takes_the_rest_of_a_file_that_has_a_wrong_line(tmp_path, run, filled):
    before = tags_of(filled)
    (tmp_path / "file").write_text("team/app:1\nteam app\n")
    for command in (["rm"], ["push", "--to", "127.0.0.1:1"], ["save", "-o", tmp_path / "x.tar"]):
        assert "file:2: 'team app' is no image" in run(*command, "-f", tmp_path / "file", status=1).err
    assert not (tmp_path / "x.tar").exists() and tags_of(filled) == before


def test_a_file_without_end_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(tinyreg, "MAX_LIST_FILE", 100)
    (tmp_path / "file").write_text("alpine\n" * 50)
    with pytest.raises(tinyreg.CommandError, match="file is larger than 100 B: take the lines that name images"):
        read_choices([], [str(tmp_path / "file")])


def test_pull_takes_what_files_name_and_tries_what_they_may_name(tmp_path, run, host, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deploy.yaml").write_text(
        "  - args: [--reloader=%s/team/reloader:v0.9, --gone=%s/gone:v1]\n    image: %s/team/web:1.0\n"
        "    image: \"{{ .Values.image }}\"\n" % (host, host, host))
    (tmp_path / "images.txt").write_text("%s/other:1\n%s/team/web:1.0\n" % (host, host))
    files = ["-f", "deploy.yaml", "-f", "images.txt"]
    done = run("pull", *files, "--dry-run")
    plan = done.out.splitlines()
    for line, image, where in zip(plan, ["team/web:1.0", "other:1", "team/reloader:v0.9"],
                                  ["deploy.yaml:2", "images.txt:1", "deploy.yaml:1"]):
        assert line.startswith("%s/%s (%s): sha256:" % (host, image, where)) and "to copy: 4" in line
    assert len(plan) == 4 and plan[3].startswith("in total: 2 blobs, ")
    lost = [line for line in done.err.splitlines() if "which may name no image: left out" in line]
    assert len(lost) == len(done.err.splitlines()) == 2
    assert "%s/gone:v1: " % host in lost[0] + lost[1] and "deploy.yaml:1, which" in lost[0] + lost[1]
    monkeypatch.setattr("sys.stdin", open("deploy.yaml"))
    report = json.loads(run("pull", "-f", "-", "--json").out)
    assert report["failed"] == [] and [image["where"] for image in report["images"]] == ["-:2", "-:1"]
    store, name = Directory(str(tmp_path / "registry")), host.replace(":", "_")
    assert tags_of(store) == {name + "/team/reloader": ["v0.9"], name + "/team/web": ["1.0"]}
    done = run("pull", "-f", "images.txt", host + "/gone:1", status=1)
    assert done.err.count("%s/gone:1: " % host) == 1 and "tinyreg: 1 of 3 images failed; " in done.err
    done = run("push", *files, "--to", "127.0.0.1:1/x", "--retries", "0", status=1)
    assert "gone:v1: not in the store" in done.err
    done = run("save", *files, "-o", "x.tar", "--no-self")
    assert "x.tar: 3 images" in done.out
    lines = run("save", *files, "-o", "x.tar", "--no-self", "--dry-run").out.splitlines()
    assert lines[1].startswith("  %s/team/web:1.0  " % host) and lines[1].endswith("  deploy.yaml:2")
    done = run("rm", *files, "--dry-run")
    assert [line.split(",")[0] for line in done.out.splitlines()[:2]] == [
        "would delete %s/%s" % (host, image) for image in ("team/web:1.0", "other:1")]
    assert "left out, " in done.err and "%s/team/reloader:v0.9 (deploy.yaml:1)" % host in done.err


# Versions

def test_a_list_of_tags_that_are_none_names_no_image(run, start_proxy):
    def spoil(handler):
        if "/tags/list" in handler.path:
            return handler.answer(200, body=json.dumps({"tags": ["../../x", "a b", "1\x1b[2J", "-x", ""]}).encode())

    proxy = start_proxy(None, spoil)
    assert "app:*: no tag fits" in run("pull", proxy.host + "/app:*", status=1).err
    assert [path for _, path, _ in proxy.seen] == ["/v2/app/tags/list"]


@pytest.mark.parametrize("pattern, newest, tags", [
    ("3.*", 3, ["3.10.1", "3.10", "3.9-slim"]),
    ("3.*", 9, ["3.10.1", "3.10", "3.9-slim", "3.9", "3.2"]),
    ("*", 2, ["3.10.1", "3.10"]),
    ("*", 8, ["3.10.1", "3.10", "3.9-slim", "3.9", "v3.3", "3.2", "2.99", "latest"]),
    ("3.*-rc*", 1, ["3.11-rc1"]),
    ("*dev", 1, ["3.12-dev"]),
    ("*alpha*", 1, ["3.12.0alpha2"]),
    ("sha256-*", 5, TAGS[-1:]),
    ("3.1*", None, ["3.10", "3.10.1", "3.11-rc1", "3.12.0alpha2", "3.12-dev"]),
])
def test_newest_is_the_order_of_versions_without_pre_releases(pattern, newest, tags):
    assert Filter([], newest).tags("app", TAGS, pattern) == tags


@pytest.mark.parametrize("versions, tags", [
    (">=3.9,<4", ["3.10.1", "3.10", "3.9-slim", "3.9"]),
    (">3.9", ["3.10.1", "3.10", "3.9-slim"]),
    ("<3.3", ["3.2", "2.99"]),
    (">=v3.2, <= 3.3", ["v3.3", "3.2"]),
    (">=5", []),
])
def test_a_range_is_of_versions_and_takes_no_pre_releases(versions, tags):
    assert Filter([], None, tinyreg.parse_versions(versions)).tags("app", TAGS) == tags


@pytest.mark.parametrize("text", ["", "3.18", ">=", ">=latest", "=>3", ">=3;<4", ">=3,", "~3"])
def test_a_range_that_is_none_is_a_wrong_option(run, text):
    with pytest.raises(tinyreg.CommandError, match="is no range of versions"):
        tinyreg.parse_versions(text)


def test_what_is_excluded_is_no_candidate_for_the_newest():
    chosen = Filter(list(map(tinyreg.parse_glob, ["*-slim", "app:3.10*", "other:*"])), 2)
    assert chosen.tags("app", TAGS, "3.*") == ["3.9", "3.2"]


# Patterns

def test_pull_asks_the_registry_which_tags_there_are(tmp_path, run, host):
    done = run("pull", host + "/app:3.*", host + "/other:1", "--newest", "2", "--exclude", "*.*.*")
    store, name = Directory(str(tmp_path / "registry")), host.replace(":", "_")
    assert tags_of(store) == {name + "/app": ["3.10", "3.9-slim"], name + "/other": ["1"]}
    assert done.out.splitlines()[0].startswith(host + "/app:3.10: ")
    run("pull", host + "/app:*", "--versions", ">=2.99,<3.10")
    assert tags_of(store)[name + "/app"] == sorted(["2.99", "3.10", "3.2", "3.9", "3.9-slim", "v3.3"])
    done = run("pull", host + "/app:4.*", host + "/other:1", status=1)
    assert "tinyreg: %s/app:4.*: no tag fits\n" % host in done.err and "/other:1: " in done.out
    for pattern in ("/*:1", "/*"):
        assert "invalid repository name" in run("pull", host + pattern, status=1).err
    assert "--newest and --versions choose among the tags" in run("pull", host + "/app", "--newest", "1", status=1).err


def saved(run, folder, *words):
    run("save", *words, "-o", folder / "x.tar", "--no-self")
    return sorted("%s:%s" % (entry["repository"], entry["tag"] or entry["digest"])
                  for entry in json.loads(run("ls", folder / "x.tar", "--json").out))


def test_save_takes_all_that_a_pattern_fits(tmp_path, run, filled):
    everything = ["docker.io/library/alpine:3.10", "docker.io/library/alpine:3.9", "team/app:1", "team/app:2",
                  "team/pin:" + filled.pin, "team/sub/web:1"]
    assert saved(run, tmp_path, "**") == everything
    assert saved(run, tmp_path, "team/*", "team/app:1") == everything[2:5]
    assert saved(run, tmp_path, "**:1", "alpine:3.*") == everything[:3] + everything[5:]
    assert saved(run, tmp_path, "**", "--newest", "1") == [everything[0], everything[3], everything[5]]
    assert saved(run, tmp_path, "**", "--exclude", "team/**", "--exclude", "3.9") == everything[:1]
    run("tag", "team/app:1", "lab.example:5000/x:1")
    assert saved(run, tmp_path, "lab.example:5000/**") == ["lab.example_5000/x:1"]
    done = run("save", "team/app:1", "nobody/**", "-o", tmp_path / "none.tar", status=1)
    assert done.err == "tinyreg: nobody/** fits no image in the store; `tinyreg.py ls --tags` shows what is there\n"
    assert not (tmp_path / "none.tar").exists()


def test_two_tags_of_one_digest_are_two_images(tmp_path, run, filled):
    digest = filled.resolve("team/app", "1")
    filled.put_manifest("team/app", filled.manifest("team/app", digest), ["also"])
    words = ["team/app:%s@%s" % (tag, digest) for tag in ("1", "also", "1")]
    assert saved(run, tmp_path, *words) == ["team/app:1", "team/app:also"]
    words = ["team/app:1", "team/*:1", "team/app:1@" + digest]
    done = run("save", *words, "-o", tmp_path / "y.tar", "--json", "--no-self")
    assert [image["image"] for image in json.loads(done.out)["images"]] == ["team/app:1", "team/app:1@" + digest]


def test_push_takes_all_that_a_pattern_fits(tmp_path, run, filled, start_server):
    server = start_server(tmp_path / "there")
    run("push", "team/**", "--exclude", "team/pin@*", "--to", server.host)
    assert tags_of(Directory(server.root)) == {"team/app": ["1", "2"], "team/sub/web": ["1"]}


def test_ls_lists_several_names_and_what_fits_patterns(run, filled):
    def listed(*words):
        return ["%s:%s" % (entry["repository"], entry["tag"]) for entry in
                json.loads(run("ls", "--json", *words).out)]

    everything = listed("--tags")
    assert len(everything) == 7 and everything == listed("**")
    assert listed("team/app:*", "alpine") == ["team/app:1", "team/app:2", "docker.io/library/alpine:3.10",
                                              "docker.io/library/alpine:3.9"]
    assert listed("alpine", "--newest", "1") == ["docker.io/library/alpine:3.10"]
    assert run("ls", "--tags").out.splitlines()[1].startswith("docker.io/library/alpine:3.10 ")
    assert run("ls", "team/sub/web").out.splitlines()[1].startswith("1 ")
    assert set(run("ls", "team/*", "--digests").out.split()) == set(filled.digests("team/app")) | set(
        filled.digests("team/pin"))
    assert "nothing/** fits" in run("ls", "nothing/**:1", status=1).err.replace(":1", "")
    assert "there is no repository nothing/**" in run("ls", "nothing/**", status=1).err


def test_rm_says_what_would_go_and_what_that_frees(run, filled):
    before = tags_of(filled)
    done = run("rm", "team/app:*", "--dry-run").out.splitlines()
    assert [line.split(",")[0] for line in done] == [
        "would delete team/app:1", "would delete team/app:2",
        "2 images; gc --untagged would then free up to 10.6 KiB more"]
    report = json.loads(run("rm", "**", "--dry-run", "--json").out)
    assert report["dryRun"] and 30000 < report["size"] < 40000 and len(report["deleted"]) == 6
    assert tags_of(filled) == before and list(filled.pinned("team/pin")) == [filled.pin]


def test_rm_says_which_tags_go_with_a_manifest(run, filled):
    digest = filled.resolve("team/app", "1")
    filled.put_manifest("team/app", filled.manifest("team/app", digest), ["also"])
    done = run("rm", "team/app@" + digest, "--dry-run").out.splitlines()
    assert [line.split(",")[0] for line in done[:3]] == [
        "would delete team/app:1", "would delete team/app:also", "would delete team/app@" + digest]


def test_rm_with_a_pattern_deletes_what_fits_and_nothing_else(run, filled):
    done = run("rm", "team/**", "team/app:1", "--exclude", "2")
    assert [line.split(",")[0] for line in done.out.splitlines()[:3]] == [
        "deleted team/app:1", "deleted team/pin@" + filled.pin, "deleted team/sub/web:1"]
    assert tags_of(filled) == {"docker.io/library/alpine": ["3.10", "3.9"], "team/app": ["2"], "team/pin": [],
                               "team/sub/web": []}
    assert list(filled.pinned("team/pin")) == []


def test_rm_of_everything_wants_a_word(run, filled):
    before = tags_of(filled)
    for pattern in ("**", "**:*", "*/**", "**:1"):
        done = run("rm", pattern, status=1)
        assert "would go; look at them with --dry-run, and say --yes if all of them are meant" in done.err
    assert "6 images would go" in run("rm", "**", status=1).err and tags_of(filled) == before
    assert "1 image would go" in run("rm", "alpine:*", "--newest", "1", status=1).err and tags_of(filled) == before
    run("rm", "alpine:*", "--newest", "1", "--yes")
    assert list(filled.tags("docker.io/library/alpine")) == ["3.9"]
    run("rm", "**", "--yes")
    assert not any(tags_of(filled).values())
    manifest = make_image(filled, "many", "0")
    filled.put_manifest("many", manifest, ["%d" % number for number in range(101)])
    done = run("rm", "many:*", status=1)
    assert "tinyreg: 101 images would go; " in done.err and "many:* fits 101 images\n" in done.err
    assert len(list(filled.tags("many"))) == 101


def test_rm_deletes_nothing_if_one_of_the_images_is_not_there(run, filled):
    before = tags_of(filled)
    for wrong in ("gone/**", "team/gone:1", "team/app:x*"):
        assert run("rm", "team/app:1", wrong, status=1).out == ""
    assert tags_of(filled) == before


def test_verify_reads_the_images_that_are_named(tmp_path, run, filled):
    def damage(name, tag):
        manifest = filled.manifest(name, filled.resolve(name, tag))
        path = filled.layout.blob_path(manifest.blobs[-1].digest)
        with open(path, "r+b") as file:
            file.write(b"x")
        return manifest.blobs[-1].digest

    whole = json.loads(run("verify", "--json").out)
    noted = os.path.join(filled.layout.own, "verify")
    os.utime(noted, (1, 1))
    part = json.loads(run("verify", "alpine:3.9", "team/sub/**", "--json").out)
    assert os.stat(noted).st_mtime == 1  # the metrics tell of runs over everything
    assert part["damage"] == [] and part["blobs"] == 5 < whole["blobs"] and 10000 < part["size"] < 12000
    blob = damage("docker.io/library/alpine", "3.9")
    assert json.loads(run("verify", "alpine:3.10", "--json").out)["damage"] == []
    report = json.loads(run("verify", "alpine:*", "--json", status=1).out)
    assert [(entry["name"], entry["harms"]) for entry in report["damage"]] == [
        (blob, ["docker.io/library/alpine:3.9"])]
    (tmp_path / "file").write_text("team/app:1\n")
    damage("team/app", "1")
    assert "harms team/app:1" in run("verify", "-f", tmp_path / "file", status=1).out
    assert "put aside: " in run("verify", "team/app:1", "--repair", status=1).out
    assert "missing blob" in run("verify", "team/app:*", status=1).out
    assert "gone:latest" in run("verify", "team/gone", status=1).err
    assert "images go with the store" in run("verify", "team/app:2", tmp_path / "file", status=1).err


def test_where_no_image_is_left_nothing_is_written_or_read(tmp_path, run, filled):
    (tmp_path / "values.yaml").write_text("note: we may take quay.io/gone/app:1\nimage: null\n")
    for words in (["team/app:1", "--exclude", "1"], ["-f", tmp_path / "values.yaml"]):
        for command in (["save", "-o", tmp_path / "none.tar"], ["verify"], ["push", "--to", "127.0.0.1:9"]):
            done = run(*command, *words, status=1)
            assert done.out == "" and "no image is left" in done.err
    assert not (tmp_path / "none.tar").exists()
    assert "no image is left" in run("pull", "127.0.0.1:9/team/app:1", "--exclude", "1", status=1).err


def test_rm_deletes_what_a_plan_names_but_no_tag_that_has_moved_since(tmp_path, run, filled):
    lines = ["team/app:%s@%s\n" % (tag, filled.resolve("team/app", tag)) for tag in "12"]
    (tmp_path / "going.txt").write_text("".join(lines))
    moved = make_image(filled, "team/app", "1", layers=(b"new",))
    done = run("rm", "-f", tmp_path / "going.txt", status=1)
    assert done.err == "tinyreg: %s stays: the tag points to %s\n" % (lines[0].strip(), moved.digest)
    assert done.out.startswith("deleted team/app:2@sha256:") and list(filled.tags("team/app")) == ["1"]


def test_rm_of_a_plan_goes_on_where_it_was_cut(tmp_path, run, filled):
    """The tags that are gone are told; their manifests are there until gc, or not."""
    lines = ["team/app:%s@%s\n" % (tag, filled.resolve("team/app", tag)) for tag in "12"]
    (tmp_path / "going.txt").write_text("".join(lines))
    run("rm", "team/app:1")
    done = run("rm", "-f", tmp_path / "going.txt")
    assert done.err == "tinyreg: %s: is gone already\n" % lines[0].strip()
    assert done.out.startswith("deleted team/app:2@sha256:") and list(filled.tags("team/app")) == []
    run("gc", "--untagged", "--grace", "0")
    assert run("rm", "-f", tmp_path / "going.txt").err.count("is gone already") == 2
    assert "not in the store" in run("rm", lines[0].strip(), status=1).err  # it may be a slip
    make_image(filled, "team/app", "1", layers=(b"new",))
    assert "is gone already" not in run("rm", "-f", tmp_path / "going.txt", status=1).err


def test_a_pattern_means_docker_io_too_unless_it_deletes(run, filled):
    """As a name does, so that what `pull acme/app` has fetched is pushed as acme/*."""
    make_image(filled, "docker.io/acme/app", "1", layers=(b"x",))
    listed = json.loads(run("ls", "acme/*", "--json").out)
    assert "docker.io/acme/app" in json.dumps(listed)
    assert "3.10" in run("ls", "alp*:3.1*").out
    assert "fits no image" in run("rm", "acme/*", status=1).err
    assert "docker.io" not in run("ls", "team/*").out


def test_rm_deletes_of_a_file_only_what_it_surely_names(tmp_path, run, filled):
    """Neither what stands in it and looks like an image, nor latest where no tag is said; nor everything unasked."""
    before, file = tags_of(filled), tmp_path / "file"
    make_image(filled, "team/app", "latest")
    for text, told in (("**\n", "say --yes"), ("team/app\n", "team/app: say which tag"),
                       ("note: [docker.io/library/alpine:3.9, {image: team/gone:1}]\n", "gone:1: not in the store")):
        file.write_text(text)
        assert told in run("rm", "-f", file, status=1).err
    file.write_text("image: team/app:latest\nnote: we keep docker.io/library/alpine:3.9\n")
    run("rm", "-f", file)
    assert tags_of(filled) == before
    file.write_text("image: null\nnote: we keep docker.io/library/alpine:3.9\n")
    assert "no image is left" in run("rm", "-f", file, status=1).err
    assert tags_of(filled) == before


def test_rm_by_digest_passes_over_a_damaged_tag(run, filled):
    digest = filled.resolve("team/app", "2")
    with open(filled.layout.link_in(filled.layout.current_path("team/app", "1")), "w") as file:
        file.write("damaged")
    run("rm", "team/app@" + digest)
    assert list(filled.tags("team/app")) == ["1"]


def test_rm_leaves_a_tag_that_moves_while_it_is_at_work(monkeypatch, capsys, filled):
    delete = Directory.delete_tag

    def delete_slowly(store, name, tag):
        delete(store, name, tag)
        make_image(filled, name, "2", layers=(b"just pushed",))

    monkeypatch.setattr(Directory, "delete_tag", delete_slowly)
    assert tinyreg.main(["rm", "--root", filled.root, "team/app:*"]) == 1
    assert "team/app:2 stays: the tag points to " + filled.resolve("team/app", "2") in capsys.readouterr().err


def test_variables_that_double_each_other_take_no_memory():
    lines = ["ARG A0=aaaaaaaa"] + ["ARG A%d=$A%d$A%d" % (number + 1, number, number) for number in range(60)]
    images = list(tinyreg.iter_mentioned(lines + ["FROM $A3", "FROM $A60", "FROM " + "$A3" * 1000], bool))
    assert [len(image[1]) for image in images] == [64, 4, 3000]


def test_stdin_may_be_named_twice(root, filled):
    done = run_tinyreg("rm", "--root", root, "--dry-run", "-f", "-", "-f", "-", input="team/app:1\n")
    assert "team/app:1" in done.stdout and not done.stderr
