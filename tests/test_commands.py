"""Commands: help, exit statuses, what is printed where; and the whole program under every Python found."""

import calendar
import errno
import glob
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

import tinyreg
from conftest import PATIENCE, TINYREG, found_pythons, run_tinyreg
from samples import (CONFIG, EVIL, buildkit_cache, image, index, is_harmless, make_image,
                     make_referrer, push_blob, to_manifest)
from tinyreg import OCI_INDEX, OCI_MANIFEST, Digest, Directory, __version__, command_text, local_time

PYTHONS = found_pythons()


def commands():
    """The commands that --help lists."""
    listed = run_tinyreg("--help").stdout.split("COMMAND")[2]
    return re.findall(r"^    ([a-z]+) ", listed, re.MULTILINE)


@pytest.fixture
def run(root):
    """A function that runs a command on the store, and expects this exit status and, if it fails, one line."""
    def run(command, *arguments, status=0, **settings):
        done = run_tinyreg(command, "--root", root, *arguments, **settings)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        if status:
            assert len(done.stderr.splitlines()) == 1, done.stderr
        return done
    return run


# Help and wrong command lines

def test_help():
    done = run_tinyreg("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:" in done.stdout
    assert {"serve", "ls", "rm"} <= set(commands())
    assert run_tinyreg("-h").stdout == done.stdout


def test_help_of_each_command():
    for command in commands():
        done = run_tinyreg(command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        examples = done.stdout.split("\nexamples:\n")[1]
        assert re.search(r"^  (python3 )?tinyreg\.py %s\b" % command, examples, re.MULTILINE), command
        assert "--root" in done.stdout and "(default: ./registry)" in " ".join(done.stdout.split())
        assert not re.search(r"default:\s+(None|False|\[)", done.stdout)
        for option in re.findall(r"^  --[a-z-]+ (?:TIME|SIZE|N)\b.*(?:\n    .*)*", done.stdout, re.MULTILINE):
            assert "(default:" in option


def test_each_option_of_serve_can_come_from_the_environment(monkeypatch):
    shown = run_tinyreg("serve", "--help").stdout.split("\n\nexamples:")[0]
    texts = {text.split()[0]: " ".join(text.split()) for text in shown.split("\n  --")[1:]}
    options = {"--" + name for name in texts}
    assert len(options) > 20
    repeated = {option.names[0] for option in tinyreg.read_options(tinyreg.SERVE_OPTIONS)
                if option.settings.get("action") == "append"}
    for option in options:
        text = texts[option[2:]]
        assert (option in repeated) == ("may be repeated" in text), text
        monkeypatch.setenv(tinyreg.variable_of(option), "1")
    monkeypatch.setenv("TINYREG_PORT", "tcp://10.0.0.1:5000")  # Kubernetes', beside a Service called tinyreg
    values = {argument.partition("=")[0] for argument in tinyreg.with_environment([], pytest.fail)}
    assert values == options
    assert tinyreg.with_environment(["--listen", ":1"], pytest.fail).count("--listen") == 1


def test_help_has_what_is_needed_at_night(tmp_path):
    """Each topic fits a terminal, and what it says of our command lines is true."""
    topics = run_tinyreg("help").stdout.splitlines()[0].partition(": ")[2].split(", ")
    assert {"gc", "disk-full", "clients", "tls", "mirror", "parts", "systemd", "lesson"} <= set(topics)
    for topic in topics:
        text = run_tinyreg("help", topic).stdout
        assert text and max(map(len, text.splitlines())) <= 100, topic
        for line in re.findall(r"^    (?:python3 )?tinyreg\.py (.*?)(?:  .*)?$", text, re.MULTILINE):
            words = shlex.split(line.replace("CLIENT", "docker"))
            tinyreg.build_parser().parse_args(words)  # exits with 2 if it is none
        parsers = tinyreg.build_parser().commands.values()
        known = {name for parser in parsers for name in parser._option_string_actions}
        for option in re.findall(r"(?:serve|gc|clients|save|rm|load)(?: --[a-z-]+(?: [^-\s]\S*)?)+", text):
            assert set(re.findall(r"--[a-z-]+", option)) <= known, option
    assert run_tinyreg("help", "pull").stdout == run_tinyreg("pull", "--help").stdout
    done = run_tinyreg("help", "nothing")
    assert done.returncode == 2 and "disk-full" in done.stderr


def test_a_variable_that_is_no_option_is_named_before_serve_runs_without_it(tmp_path):
    for name, text in (("TINYREG_READONLY", "1"), ("TINYREG_ARCHIVES", "x"), ("TINYREG_PORT", "5000"),
                       ("TINYREG_UPSTREAMS", "docker.io=https://registry-1.docker.io")):
        done = run_tinyreg("serve", cwd=str(tmp_path), env=dict(os.environ, **{name: text}))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and name in done.stderr
        assert run_tinyreg("serve", "--help", env=dict(os.environ, **{name: text})).returncode == 0
    assert os.listdir(str(tmp_path)) == []


def test_the_variables_of_kubernetes_are_no_options(monkeypatch):
    for name, text in (("PORT", "tcp://10.0.0.1:5000"), ("SERVICE_HOST", "10.0.0.1"), ("SERVICE_PORT_HTTP", "5000"),
                       ("PORT_5000_TCP_ADDR", "10.0.0.1"), ("LAB_SERVICE_PORT", "5000"), ("LAB_PORT", "udp://[::1]:1")):
        monkeypatch.setenv("TINYREG_" + name, text)
    monkeypatch.setenv("TINYREG_ROOT", "/srv")
    assert tinyreg.with_environment([], pytest.fail) == ["--root=/srv"]


def test_version():
    done = run_tinyreg("--version")
    assert (done.returncode, done.stdout) == (0, "tinyreg %s\n" % __version__)


@pytest.mark.parametrize("arguments", [
    ["no-such-command"], ["serve", "--no-such-option"], ["--no-such-option"], ["gc", "stray"],
    ["serve", "--listen", "5000"], ["--listen", "x:99999"], ["serve", "--listen", ":-1"], ["serve", "--listen"],
    ["--listen", "a..b:5000"], ["serve", "--anonymous", "everyone"], ["serve", "--drain", "soon"],
    ["serve", "--drain", "-1"],
    ["serve", "--workers", "0"], ["ls", "--no-such-option"], ["ls", "--newest", "0"]])
def test_wrong_command_line(tmp_path, arguments):
    done = run_tinyreg(*arguments, cwd=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("tinyreg.py")
    assert os.listdir(str(tmp_path)) == []


@pytest.mark.parametrize("variable, value", [
    ("TINYREG_LISTEN", "nowhere"), ("TINYREG_ANONYMOUS", "everyone"), ("TINYREG_DRAIN", "soon"),
    ("TINYREG_WORKERS", "many"), ("TINYREG_READ_ONLY", "maybe")])
def test_wrong_environment(tmp_path, variable, value):
    done = run_tinyreg("serve", cwd=str(tmp_path), env=dict(os.environ, **{variable: value}))
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and variable in done.stderr
    assert os.listdir(str(tmp_path)) == []


def test_an_unknown_option_sends_to_the_help_that_has_the_options(tmp_path):
    assert "(see tinyreg.py serve --help)" in run_tinyreg("serve", "--port", "5000", cwd=str(tmp_path)).stderr
    assert "(see tinyreg.py gc --help)" in run_tinyreg("gc", "--delete-untagged", cwd=str(tmp_path)).stderr


def test_who_serves_the_configuration_of_registry_2_hears_that_there_is_none(tmp_path):
    (tmp_path / "config.yml").write_text("version: 0.1\n")
    done = run_tinyreg("serve", "config.yml", cwd=str(tmp_path))
    assert done.returncode == 1 and "there is no configuration file" in done.stderr


def test_the_store_is_not_the_working_directory_where_a_script_s_variable_is_empty(tmp_path):
    for command in (["ls"], ["serve", "--listen", "127.0.0.1:0"]):
        done = run_tinyreg(*command, "--root", "", cwd=str(tmp_path))
        assert done.returncode == 1 and "--root '' names no directory" in done.stderr
    assert os.listdir(str(tmp_path)) == []


def test_a_file_that_notifications_need_is_missed_before_they_are_sent(tmp_path):
    for setting in ("secret", "headers"):
        done = run_tinyreg("serve", "--notify", "http://127.0.0.1:1/#%s=nosuch" % setting, cwd=str(tmp_path))
        assert done.returncode == 2 and "can't read nosuch" in done.stderr


@pytest.mark.parametrize("folder", ["_data/docker", "_data/docker/registry", "_data/docker/registry/v2", ""])
def test_a_folder_inside_a_store_and_that_of_a_volume_are_not_taken_for_an_empty_store(tmp_path, folder):
    """registry:2 names its directory too, but people look for the images in it, and docker adds _data."""
    (tmp_path / "_data/docker/registry/v2/blobs").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for command in (["ls"], ["serve", "--listen", "127.0.0.1:0"]):
        done = run_tinyreg(*command, "--root", tmp_path / folder)
        assert done.returncode == 1 and "write --root %s\n" % (tmp_path / "_data") in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "_data/docker/docker/registry/v2").mkdir(parents=True)  # may be a store, too
    assert run_tinyreg("ls", "--root", tmp_path / "_data/docker").returncode == 0


# ls

def test_ls_of_nothing(run, store):
    assert run("ls").stdout == ""
    assert json.loads(run("ls", "--json").stdout) == []
    assert run("ls", "--digests").stdout == ""


def test_ls(run, store):
    for name in ("b", "a/b", "a-b", "a"):
        make_image(store, name)
    push_blob(store, "only-blobs", b"content")
    names = ["a", "a-b", "a/b", "b"]
    assert run("ls").stdout.splitlines() == names
    assert json.loads(run("ls", "--json").stdout) == names


def test_ls_repository(run, store):
    one = make_image(store, "lab/tools", "1.0")
    arm = make_image(store, "lab/tools", None, config=b'{"os":"linux","architecture":"arm64","variant":"v8"}')
    absent = to_manifest(image((b"never pushed",)))
    store.put_manifest("lab/tools", to_manifest(index(one, arm, absent)), ["multi"])
    make_image(store, "lab/tools", "helm", (), b"{}", artifactType="application/vnd.cncf.helm")
    make_referrer(store, "lab/tools", one)
    size = len(one.content) + len(CONFIG) + 18
    before = time.time()
    found = {entry["tag"]: entry for entry in json.loads(run("ls", "lab/tools", "--json").stdout)}
    assert list(found) == ["1.0", "helm", "multi"]
    pushed = calendar.timegm(time.strptime(found["1.0"].pop("pushed"), "%Y-%m-%dT%H:%M:%SZ"))
    assert before - 600 < pushed <= before
    assert found["1.0"] == {"repository": "lab/tools", "tag": "1.0", "digest": one.digest,
                            "mediaType": OCI_MANIFEST, "missing": 0, "size": size,
                            "count": 4, "platforms": ["linux/amd64"], "created": None}
    assert found["multi"]["mediaType"] == OCI_INDEX and found["multi"]["missing"] == 1
    assert found["multi"]["platforms"] == ["linux/amd64", "linux/arm64/v8"]
    assert found["multi"]["size"] > size + len(arm.content)  # the layers that both have count once
    assert len(found["helm"]["platforms"]) == 1
    lines = [re.split(r"  +", line) for line in run("ls", "lab/tools").stdout.splitlines()]
    assert lines[0] == ["TAG", "SIZE", "PLATFORMS", "PUSHED", "DIGEST"]
    assert lines[1] == ["1.0", "%d B" % size, "linux/amd64", tinyreg.timestamp(pushed), one.digest]
    assert lines[3][2] == "linux/amd64,linux/arm64/v8 (1 not here)"


def test_ls_of_a_buildkit_cache_calls_it_complete(run, store):
    buildkit_cache(store, "app", "cache")
    lines = run("ls", "app").stdout
    assert "not here" not in lines and lines.splitlines()[1].split()[3] == "-"
    entry, = json.loads(run("ls", "app", "--json").stdout)
    assert entry["size"] > len(CONFIG) + len(b"cached layer") and entry["missing"] == 0


def test_ls_of_a_damaged_tag(run, store, root):
    good = make_image(store, "a", "good")
    make_image(store, "a", "bad", layers=())
    bad = to_manifest(image(layers=())).digest
    path = root / "docker/registry/v2/blobs/sha256" / bad.encoded[:2] / bad.encoded / "data"
    path.write_bytes(b"")
    found = {entry["tag"]: entry for entry in json.loads(run("ls", "a", "--json").stdout)}
    assert found["good"]["digest"] == good.digest and "unknown" in found["bad"]["error"]
    assert "unknown" in run("ls", "a").stdout.splitlines()[1]


def test_ls_shows_what_has_no_tag_and_is_no_part_of_anything(run, store):
    """An image that was pulled by its digest left its repository looking empty."""
    child = make_image(store, "a", None)
    both = to_manifest(index(child))
    store.put_manifest("a", both)
    make_referrer(store, "a", both)
    assert [line.split()[0] for line in run("ls", "a").stdout.splitlines()] == ["TAG", "-"]
    entries = json.loads(run("ls", "a", "--json").stdout)
    assert [entry["digest"] for entry in entries] == [both.digest]
    store.put_manifest("a", both, ["1"])
    orphan = make_referrer(store, "a", to_manifest(image(layers=(b"never here",))))
    entries = json.loads(run("ls", "a", "--json").stdout)
    assert [(entry["tag"], entry["digest"]) for entry in entries] == [
        ("1", both.digest), (None, orphan.digest)]


def test_ls_of_images_by_tag_and_digest(run, store):
    one, two = make_image(store, "docker.io/library/a", "1"), make_image(store, "b", "2", ())
    images = ["a:1", "b@" + two.digest, "b:2@" + two.digest, "b"]
    entries = json.loads(run("ls", "--json", *images).stdout)
    assert [(entry["repository"], entry["tag"], entry["digest"]) for entry in entries] == [
        ("docker.io/library/a", "1", one.digest), ("b", None, two.digest), ("b", "2", two.digest),
        ("b", "2", two.digest)]
    store.put_manifest("b", make_image(store, "b", None, (b"new",)), ["2"])
    assert json.loads(run("ls", "--json", "b:2@" + two.digest).stdout)[0]["tag"] is None
    store.put_manifest("b", two, ["2"])
    lines = run("ls", "a:1", "b@" + two.digest, "b:2@" + two.digest, "b:2").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "IMAGE", "docker.io/library/a:1", "b@" + two.digest[:19] + "…", "b:2", "b:2"]


def test_ls_does_not_put_off_gc(run, store):
    manifest = make_image(store, "a", None)
    for folder, _, files in os.walk(store.root):
        for file in files:
            os.utime(os.path.join(folder, file), (1e9, 1e9))
    assert manifest.digest in run("ls", "a").stdout
    assert manifest.digest in run("gc", "--untagged", "--dry-run").stdout


def test_ls_of_an_archive_without_its_configs_has_the_platforms_from_the_index(run, store, tmp_path):
    one = make_image(store, "a", None, config=b'{"os":"linux","architecture":"arm64"}')
    document = index(one)
    document["manifests"][0]["platform"] = {"os": "linux", "architecture": "arm64"}
    store.put_manifest("a", to_manifest(document), ["1"])
    (tmp_path / "have.txt").write_text(run("ls", "--digests").stdout)
    run("save", "a:1", "-o", tmp_path / "rest.tar", "--have", tmp_path / "have.txt")
    assert json.loads(run("ls", "--json", tmp_path / "rest.tar").stdout)[0]["platforms"] == ["linux/arm64"]


@pytest.mark.parametrize("content", [
    b"one, two\n", "sha256:".encode("utf-16"), b"{", b"{}", b'{"holds": 1}', b'{"holds": ["sha256:../x"]}',
    b'{"holds": [{}]}', b"{" * 100000])
def test_have_of_what_is_neither_a_list_nor_an_archive(run, store, tmp_path, content):
    make_image(store, "a", "1")
    (tmp_path / "have.txt").write_bytes(content)
    done = run("save", "a:1", "-o", tmp_path / "rest.tar", "--have", tmp_path / "have.txt", status=1)
    assert done.stderr.count("\n") == 1
    assert "ls --digests" in done.stderr and "have.txt" in done.stderr


def test_serve_of_an_archive_says_what_was_left_out_of_it(run, store, start_server, tmp_path):
    make_image(store, "a", "1")
    run("save", "a:1", "-o", tmp_path / "whole.tar")
    run("save", "a:1", "-o", tmp_path / "rest.tar", "--have", tmp_path / "whole.tar")
    for archive, says in (("whole.tar", False), ("rest.tar", True)):
        server = start_server(None, tmp_path / archive)
        server.stop()
        assert ("3 blobs, of which save --have left out 3:" in server.banner) is says


def test_ls_of_archives_says_what_is_complete(run, store, tmp_path):
    one = make_image(store, "docker.io/library/a", "1")
    make_image(store, "b", "2", (b"layer one", b"another"))
    whole, rest = tmp_path / "whole.tar", tmp_path / "rest.tar"
    run("save", "a:1", "-o", whole)
    run("save", "b:2", "-o", rest, "--have", whole)
    lines = [re.split("  +", line) for line in run("ls", rest).stdout.splitlines()]
    assert lines[0][0] == "IMAGE" and lines[1][0] == "b:2"
    assert lines[1][-1] == "complete with 2 blobs of the far side, of which this store has 2"
    there = run_tinyreg("ls", "--root", tinyreg.Directory(str(tmp_path / "far")).root, rest).stdout
    assert there.endswith("of which this store has 0\n")
    entries = json.loads(run("ls", "--json", whole, rest).stdout)
    assert [(entry["repository"], entry["lacking"]) for entry in entries] == [
        ("b", 0), ("docker.io/library/a", 0)]
    digests = run("ls", "--digests", whole).stdout.splitlines()
    assert digests == sorted([one.digest] + [blob.digest for blob in one.blobs])
    os.unlink(store.layout.blob_path(Digest.of(b"another")))  # now the store's folder is no whole archive
    shown = [line.split("  ")[-1] for line in run("ls", store.root).stdout.splitlines()]
    assert shown[1:] == ["lacks 1 blob", "complete"]
    done = run_tinyreg("ls", "rest.tar", cwd=str(tmp_path))  # where no store is
    assert (done.returncode, done.stderr) == (0, "") and "b:2" in done.stdout


def test_ls_takes_a_name_that_the_store_has_for_no_file(run, store, tmp_path):
    make_image(store, "a", "1")
    (tmp_path / "a").mkdir()
    (tmp_path / "a.tar").write_bytes(b"no tar")
    assert "linux/amd64" in run("ls", "a", cwd=str(tmp_path)).stdout
    assert "a.tar" in run("ls", "a.tar", cwd=str(tmp_path), status=1).stderr
    make_image(store, "a.tar", "1")
    assert "linux/amd64" in run("ls", "a.tar", cwd=str(tmp_path)).stdout


def test_an_image_that_was_pulled_is_found_beside_one_of_that_name_that_was_pushed(run, store):
    """pull alpine:3.19 and save alpine:3.19, after docker push localhost:5000/alpine."""
    make_image(store, "alpine", "latest")
    pulled = make_image(store, "docker.io/library/alpine", "3.19", (b"pulled",))
    assert json.loads(run("ls", "--json", "alpine:3.19").stdout)[0]["digest"] == pulled.digest


def test_an_image_that_is_not_there_is_told_with_the_tags_that_are(run, store, tmp_path):
    for tag in ("3.18", "3.19"):
        make_image(store, "docker.io/library/alpine", tag)
    for command in (["save", "alpine", "-o", tmp_path / "x.tar"], ["push", "alpine", "--to", "lab"],
                    ["rm", "alpine:latest"], ["ls", "alpine:latest"]):
        assert "docker.io/library/alpine:latest, but as 3.18, 3.19; " in run(
            *command, status=1).stderr
    for tag in "abcdef":
        make_image(store, "docker.io/library/alpine", tag)
    assert "3.18, 3.19, a, b, c and more; " in run("ls", "alpine:latest", status=1).stderr


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_an_image_says_of_itself_neither_moves_the_cursor_nor_ends_ls(run, store, encoding):
    config = json.dumps({"os": EVIL, "architecture": "amd64", "created": EVIL}).encode()
    make_image(store, "a", "1", config=config)
    make_image(store, "a", "2", (), b"{}", artifactType=EVIL)
    make_image(store, "a", "3", config=b'{"os":"linux","architecture":{"":{}}}')
    make_image(store, "a", "4", config=json.dumps({"os": "x" * 1000}).encode())
    shown = run("ls", "a", env=dict(os.environ, PYTHONIOENCODING=encoding)).stdout
    assert is_harmless(shown) and len(shown.splitlines()) == 5
    assert "owned" in shown and "linux " in shown
    assert "{" not in shown and max(map(len, shown.splitlines()[2:4])) < 250
    entries = json.loads(run("ls", "a", "--json").stdout)
    assert entries[0]["platforms"] == [EVIL + "/amd64"] and entries[1]["platforms"] == [EVIL]


def test_a_command_s_warning_reads_like_its_errors(run, store):
    manifest = make_image(store, "a", "1")
    with open(store.layout.blob_path(manifest.digest), "wb") as file:
        file.write(b"damaged")
    line = "tinyreg: damaged manifest, taken as missing: %s in a" % manifest.digest
    assert line in run("ls", "a:1").stderr.splitlines()


def test_ls_digests(run, store):
    """What `save --have` wants to know: everything held, in one repository or in all."""
    manifest = make_image(store, "a")
    other = push_blob(store, "b", b"other", "sha512")
    of_a = sorted([manifest.digest] + [blob.digest for blob in manifest.blobs])
    assert run("ls", "a", "--digests").stdout.splitlines() == of_a
    assert run("ls", "--digests").stdout.splitlines() == of_a + [other]
    assert json.loads(run("ls", "--digests", "--json").stdout) == of_a + [other]


@pytest.mark.parametrize("arguments, words", [
    (["nowhere"], "nowhere"), (["Bad"], "Bad"), (["nowhere", "--json"], "nowhere")])
def test_ls_of_what_is_not_there(run, store, arguments, words):
    done = run("ls", *arguments, status=1)
    assert done.stdout == "" and words in done.stderr


@pytest.mark.parametrize("command", ["ls", "rm"])
def test_no_store(run, root, command):
    done = run(command, "a:b", status=1)
    assert str(root) in done.stderr and "--root" in done.stderr
    assert not root.exists()


def with_buffers():
    """The environment, in which Python keeps output back until it is much, or the end."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_the_reader_has_seen_enough(store, root):
    """`ls | head`: no traceback, whether little was left to print, which is written at the end, or much."""
    for count in (1, 3000):
        for name in range(count):
            (root / "docker/registry/v2/repositories" / ("x" * 60 + str(name)) / "_manifests").mkdir(parents=True,
                                                                                                    exist_ok=True)
        process = subprocess.Popen([sys.executable, TINYREG, "ls", "--root", str(root)], env=with_buffers(),
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        with process.stderr:
            assert process.stderr.read() == b""
        assert process.wait() == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("count", [1, 3000])
def test_the_output_can_t_be_written(store, root, count):
    """`ls --digests > have.txt` on a full disk: a line, and a status that says so."""
    for name in range(count):
        (root / "docker/registry/v2/repositories" / ("x" * 60 + str(name)) / "_manifests").mkdir(parents=True)
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, TINYREG, "ls", "--root", str(root)], stdout=full, stderr=subprocess.PIPE,
                              env=with_buffers())
    assert done.returncode == 1
    assert done.stderr in (b"tinyreg: can't write the output: No space left on device\n",
                           b"tinyreg: No space left on device\n")


def test_no_output_at_all(run, store):
    """`ls >&-`"""
    make_image(store, "a")
    assert run("ls", preexec_fn=lambda: os.close(1)).stdout == ""


# tag

@pytest.fixture
def moved(store):
    """The manifests that the tag app:prod has pointed to, the oldest first, a day apart."""
    manifests = [make_image(store, "app", "prod", (layer,)) for layer in (b"one", b"two", b"three")]
    for days, manifest in enumerate(manifests, 10):
        os.utime(os.path.join(store.layout.former_path("app", "prod"), "sha256", manifest.digest.encoded, "link"),
                 (days * 86400, days * 86400))
    os.utime(os.path.join(store.layout.current_path("app", "prod"), "link"), (12 * 86400, 12 * 86400))
    return [manifest.digest for manifest in manifests]


def all_tags(store):
    """{repository: {tag: digest}} of all that is there."""
    return {name: {tag: store.resolve(name, tag) for tag in store.tags(name)} for name in store.repositories()}


def test_tag_within_a_repository(run, store):
    one, two = make_image(store, "a", "1"), make_image(store, "a", "2", (b"other",))
    make_referrer(store, "a", one)
    assert run("tag", "a:1", "a:stable").stdout == "a:stable is %s\n" % one.digest
    assert run("tag", "a@" + two.digest, "a:stable").stdout == "a:stable is %s, and was %s\n" % (
        two.digest, one.digest)
    assert run("tag", "a:1@" + one.digest, "a:3", "--quiet").stdout == ""
    assert all_tags(store) == {"a": {"1": one.digest, "2": two.digest, "3": one.digest, "stable": two.digest}}


def test_tag_into_another_repository_brings_all_that_the_image_needs(run, store):
    one, arm = make_image(store, "ci/app", None), make_image(store, "ci/app", None, (b"arm",))
    both = to_manifest(index(one, arm))
    store.put_manifest("ci/app", both, ["build-7"])
    signature = make_referrer(store, "ci/app", both)
    cosign = make_image(store, "ci/app", both.digest.replace(":", "-") + ".sig", (b"cosign",))
    run("tag", "ci/app:build-7", "team/app:1.0")
    run("rm", *["ci/app@" + digest for digest in list(store.revisions("ci/app"))])
    run("gc", "--untagged", "--grace", "0")
    assert store.resolve("team/app", "1.0") == both.digest
    assert store.resolve("team/app", both.digest.replace(":", "-") + ".sig") == cosign.digest
    assert [manifest.digest for manifest in store.referrers("team/app", both.digest)] == [signature.digest]
    for manifest in (one, arm, signature, cosign):
        assert {blob.digest for blob in manifest.blobs} <= set(store.digests("team/app"))
        assert store.manifest("team/app", manifest.digest)
    run("verify")


def test_tag_finds_the_repository_of_an_image_that_was_pulled(run, store):
    pulled = make_image(store, "docker.io/library/alpine", "3.19")
    assert run("tag", "alpine:3.19", "alpine:stable").stdout.startswith("docker.io/library/alpine:stable is ")
    run("tag", "alpine:3.19", "registry.lab:5000/base:1")
    assert all_tags(store) == {
        "docker.io/library/alpine": {"3.19": pulled.digest, "stable": pulled.digest},
        "registry.lab_5000/base": {"1": pulled.digest}}


def test_tag_sets_no_tag_whose_blobs_are_missing(run, store):
    manifest = make_image(store, "a", "1")
    os.unlink(store.layout.blob_path(manifest.blobs[1].digest))
    assert manifest.blobs[1].digest in run("tag", "a:1", "b:1", status=1).stderr
    assert all_tags(store) == {"a": {"1": manifest.digest}}


@pytest.mark.parametrize("arguments", [
    ["a:1"], ["a:1", "a"], ["a:1", "a@" + Digest.of(b"x")], ["a:1", "a:2@" + Digest.of(b"x")], ["a:1", "A:2"],
    ["a:1", "a:-x"], ["a:1", ""], ["a:1", ":"], ["a:no", "a:2"], ["no:1", "a:2"], ["a@sha256:x", "a:2"],
    ["--undo", "a:1"], ["--undo", "a:1", "a:2"], ["--undo", "a"], ["--undo", "a:no"], ["--undo", "no:1"],
    ["--undo", "a@" + Digest.of(b"x")]])
def test_tag_of_what_can_t_be(run, store, arguments):
    manifest = make_image(store, "a", "1")
    done = run("tag", *arguments, status=1)
    assert done.stdout == "" and done.stderr.startswith("tinyreg: ")
    assert all_tags(store) == {"a": {"1": manifest.digest}}


def test_ls_history(run, store, moved):
    run("rm", "app@" + moved[0])
    entries = json.loads(run("ls", "--history", "app:prod", "--json").stdout)
    assert entries == [
        {"repository": "app", "tag": "prod", "digest": moved[2], "pushed": "1970-01-13T00:00:00Z",
         "present": True, "gone": False},
        {"repository": "app", "tag": "prod", "digest": moved[1], "pushed": "1970-01-12T00:00:00Z",
         "present": False, "gone": False},
        {"repository": "app", "tag": "prod", "digest": moved[0], "pushed": "1970-01-11T00:00:00Z",
         "present": False, "gone": True}]
    lines = [re.split("  +", line) for line in run("ls", "--history", "app:prod").stdout.splitlines()]
    assert lines == [["TAG", "PUSHED", "DIGEST"],
                     ["app:prod", "1970-01-13T00:00:00Z", moved[2], "present"],
                     ["app:prod", "1970-01-12T00:00:00Z", moved[1]],
                     ["app:prod", "1970-01-11T00:00:00Z", moved[0], "gone"]]


@pytest.mark.parametrize("arguments", [[], ["app"], ["app:no"], ["no:1"], ["app@" + Digest.of(b"x")]])
def test_ls_history_of_what_is_no_tag(run, store, moved, arguments):
    assert run("ls", "--history", *arguments, status=1).stdout == ""


def test_tag_undo(run, store, moved):
    assert run("tag", "--undo", "app:prod").stdout == "app:prod is %s, and was %s\n" % (moved[1], moved[2])
    entries = json.loads(run("ls", "--history", "app:prod", "--json").stdout)
    assert [entry["digest"] for entry in entries] == [moved[1], moved[2], moved[0]]
    assert entries[0]["present"] and entries[0]["pushed"] > "2"
    run("tag", "--undo", "app:prod")
    assert store.resolve("app", "prod") == moved[2]


def test_tag_undo_of_a_move_to_what_it_was_once_before(run, store, moved):
    """The time of a move back counts, not that of the first."""
    run("tag", "app@" + moved[0], "app:prod")
    assert moved[2] in run("tag", "--undo", "app:prod").stdout
    assert store.resolve("app", "prod") == moved[2]


def test_tag_undo_says_what_is_gone(run, store, moved):
    run("rm", "app@" + moved[1])
    assert moved[1] + " before, and that is gone" in run("tag", "--undo", "app:prod", status=1).stderr
    assert store.resolve("app", "prod") == moved[2]


def test_tag_on_a_disk_that_is_full_sets_no_tag_before_its_image_is_there(store, monkeypatch, capsys):
    """Whichever file is the first that can't be written."""
    one = make_image(store, "a", None)
    both = to_manifest(index(one))
    store.put_manifest("a", both, ["1"])
    publish, left = tinyreg.Files.publish, [0]

    def fail_later(files, temporary, path, **how):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        publish(files, temporary, path, **how)

    monkeypatch.setattr(tinyreg.Files, "publish", fail_later)
    for written in range(20):
        left[0], name = written, "b%d" % written
        if tinyreg.main(["tag", "a:1", name + ":1", "--root", str(store.root)]) == 0:
            break
        assert "No space left" in capsys.readouterr().err and "1" not in all_tags(store).get(name, {})
        for digest in store.revisions(name):
            assert {blob.digest for blob in store.manifest(name, digest).blobs} <= set(store.digests(name))
    assert written > 5 and store.resolve(name, "1") == both.digest


# rm

def test_rm_tag(run, store):
    manifest = make_image(store, "a", "one")
    store.put_manifest("a", manifest, ["two"])
    done = run("rm", "a:one")
    assert "a:one" in done.stdout and done.stderr == ""
    assert list(store.tags("a")) == ["two"] and store.manifest("a", manifest.digest)


def test_rm_manifest(run, store):
    manifest = make_image(store, "a", "one")
    store.put_manifest("a", manifest, ["two"])
    other = make_image(store, "a", "other", layers=())
    assert manifest.digest in run("rm", "a@" + manifest.digest).stdout
    assert list(store.tags("a")) == ["other"] and store.resolve("a", "other") == other.digest


def test_rm_several(run, store):
    manifest = make_image(store, "a/b", "one")
    store.put_manifest("a/b", manifest, ["two"])
    done = run("rm", "a/b:one", "a/b:two", "a/b@" + manifest.digest, "--json")
    assert json.loads(done.stdout) == {"deleted": ["a/b:one", "a/b:two", "a/b@" + manifest.digest],
                                       "digests": [manifest.digest] * 3}


def test_rm_says_what_the_tag_pointed_to_and_when_its_space_comes_back(run, store):
    """gc --untagged, which it had recommended, freed nothing for an hour, and did not say so."""
    manifest = make_image(store, "a", "one", layers=(b"x" * (3 << 20), b"shared"))
    make_image(store, "a", "two", layers=(b"shared",))
    store.put_manifest("a", manifest, ["three"])
    assert run("rm", "a:three").stdout.splitlines() == [
        "deleted a:three, which was " + manifest.digest, "no space comes back: what is left needs all of it"]
    deleted, waits, command = run("rm", "a:one").stdout.splitlines()
    assert deleted == "deleted a:one, which was " + manifest.digest
    assert re.fullmatch("up to 3.0 MiB can't be freed before [0-9-]{10} [0-9:]{5}, since clients may be at it; "
                        "while nobody pushes, this does not wait:", waits)
    assert waits.split("before ")[1][:16] in {local_time(time.time() + 3660 - ago) for ago in range(120)}
    assert command == "  tinyreg.py gc --untagged --root %s --grace 0" % store.root
    for arguments, freed in ((["--dry-run"], "would remove"), ([], "removed")):
        done = run("gc", "--untagged", *arguments)
        result, waits, again = done.stdout.splitlines()[-3:]
        assert result.startswith(freed + " 0 manifests") and waits.startswith("3.0 MiB more can't be freed before 2")
        assert again == command_text("gc", "--root", store.root, "--untagged", *arguments, "--grace", "0")
    report = json.loads(run("gc", "--untagged", "--json").stdout)
    assert report["size"] == 0 and report["waiting"] > 3 << 20 and report["waitingUntil"].endswith("Z")
    freed = run(*again.split()[1:]).stdout.splitlines()
    assert len(freed) == 1 and freed[0].startswith("removed 1 manifest, ") and freed[0].endswith("; 3.0 MiB")


def test_rm_of_what_nobody_has_asked_for_lately_has_nothing_to_wait_for(run, store):
    make_image(store, "a", "one")
    for folder, _, names in os.walk(store.root):
        for name in names:
            os.utime(os.path.join(folder, name), (1, 1))
    size, command = run("rm", "a:one").stdout.splitlines()[1:]
    assert re.fullmatch("up to [0-9]+ B come back with:", size)
    assert command == "  tinyreg.py gc --untagged --root " + store.root
    assert run("gc", "--untagged").stdout.count("\n") == 1


def test_rm_deletes_nothing_of_another_repository_than_the_one_that_is_named(run, store):
    make_image(store, "alpine", "1")
    make_image(store, "docker.io/library/alpine", "2")
    done = run("rm", "alpine:2", status=1)
    assert "not in the store as alpine:2, but as 1; " in done.stderr and done.stdout == ""
    assert list(store.tags("docker.io/library/alpine")) == ["2"]
    make_image(store, "docker.io/library/busybox", "2")
    run("rm", "busybox:2")
    assert list(store.tags("docker.io/library/busybox")) == []


def test_rm_quiet(run, store):
    make_image(store, "a", "one")
    done = run("rm", "--quiet", "a:one")
    assert (done.stdout, done.stderr) == ("", "")
    assert list(store.tags("a")) == []


@pytest.mark.parametrize("image_name", ["a:nothing", "nowhere:one", "a", "A:one", "a:-x", "a@sha256:short",
                                        "a@" + Digest.of(b"nothing"), "a:one@" + Digest.of(b"nothing"), ":", "@", ""])
def test_rm_of_what_is_not_there(run, store, image_name):
    make_image(store, "a", "one")
    make_image(store, "a", "kept")
    done = run("rm", "a:one", image_name, "a:kept", status=1)
    assert done.stderr.startswith("tinyreg: ")
    assert "kept" in store.tags("a")
    if "one" not in store.tags("a"):
        assert "a:one" in done.stderr or "a:one" in done.stdout


# serve

def test_banner(start_server, root):
    server = start_server()
    server.stop()
    assert "http://127.0.0.1:%d" % server.port in server.banner
    assert str(root) in server.banner
    assert "pull, push and delete" in server.banner
    assert "docker push localhost:%d/" % server.port in server.banner
    assert "docker pull localhost:%d/" % server.port in server.banner


def test_the_banner_names_upstreams_and_whose_certificates_let_in(start_server, tmp_path):
    """The URL may end in the /v2 of the API, as containerd's do."""
    parse = tinyreg.parse_upstream
    assert parse("quay.io=https://lab/v2/") == parse("quay.io=https://lab")
    assert parse("quay.io=https://lab/v2/q") == parse("quay.io=https://lab/q")
    assert parse("quay.io=https://lab/v2x") != parse("quay.io=https://lab/x")
    server = start_server(None, "--upstream", "quay.io=http://127.0.0.1:1/v2/", "--upstream", "*=https://lab.test/x")
    server.stop()
    assert re.search("caches +quay.io from http://127.0.0.1:1/\n +\\* from https://lab.test/x/\n", server.banner)
    access = tinyreg.Access("none", client_ca="ca.pem")
    assert access.takes_pushes() and access.in_words("whoever can reach it", False) == [
        "whoever can reach it may do nothing without a certificate",
        "those with a certificate of ca.pem may pull, push and delete"]


def test_rules_that_name_users_want_users(start_server, tmp_path):
    """Else all would be let in whom the rules were to keep out."""
    (tmp_path / "rules").write_text("** * pull\n")
    options = ["--root", tmp_path / "root", "--listen", "127.0.0.1:0", "--rules", tmp_path / "rules"]
    assert "add --users FILE" in run_tinyreg("serve", *options).stderr
    (tmp_path / "rules").write_text("** @anonymous pull\n")
    server = start_server(None, "--rules", tmp_path / "rules")
    server.stop()
    assert "may what the rules in %s say of @anonymous\n" % (tmp_path / "rules") in server.banner


def test_banner_of_a_read_only_server(start_server, store, root):
    make_image(store, "a/b", "v1")
    server = start_server(root, "--read-only")
    server.stop()
    assert "docker push" not in server.banner and "docker pull localhost:%d/a/b:v1\n" % server.port in server.banner


@pytest.mark.parametrize("listen, options, words", [
    (":0", [], "may pull (change it with --anonymous)"),
    (":0", ["--anonymous", "push"], "may pull and push"),
    ("127.0.0.1:0", ["--anonymous", "none"], "may do nothing"),
    ("localhost:0", [], "may pull, push and delete")])
def test_who_may_do_what(start_server, listen, options, words):
    server = start_server(None, *options, listen=listen)
    assert words in server.banner + server.process.stdout.readline() + server.process.stdout.readline()
    status = server.ask("POST", "/v2/a/blobs/uploads/")[0]
    assert status == (202 if "push" in words else 403)


@pytest.mark.parametrize("arguments", [[], ["serve"], ["--workers", "1"]])
def test_serve_is_what_it_does_without_a_command(tmp_path, arguments):
    environment = dict(os.environ, TINYREG_LISTEN="127.0.0.1:0", PYTHONDONTWRITEBYTECODE="1")
    process = subprocess.Popen([sys.executable, TINYREG] + arguments, cwd=str(tmp_path), env=environment,
                               stdout=subprocess.PIPE, universal_newlines=True)
    try:
        while "Ctrl-C" not in process.stdout.readline():
            assert process.poll() is None
        assert sorted(os.listdir(str(tmp_path))) == ["registry"]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0
        process.stdout.close()


@pytest.mark.parametrize("python", sorted(PYTHONS), ids=lambda version: "%d.%d" % version)
def test_ctrl_c_during_the_imports_ends_it_without_a_word(tmp_path, python):
    """On a slow machine they take a second. The module stands for the first of them."""
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([PYTHONS[python], TINYREG, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_environment(start_server, tmp_path):
    content = json.dumps(image((b"never pushed",), b"never pushed either"))
    server = start_server(tmp_path / "one", environment={"TINYREG_SPARSE": "1", "TINYREG_ANONYMOUS": "push"})
    assert server.ask("PUT", "/v2/a/manifests/latest", content)[0] == 201
    assert server.ask("DELETE", "/v2/a/manifests/latest")[0] == 403
    server = start_server(tmp_path / "two", environment={"TINYREG_SPARSE": "off"})
    assert server.ask("PUT", "/v2/a/manifests/latest", content)[0] == 400
    environment = dict(os.environ, TINYREG_ROOT=str(tmp_path / "one"))
    assert run_tinyreg("ls", env=environment).stdout == "a\n"


def test_the_command_line_counts_more_than_the_environment(start_server, tmp_path):
    server = start_server(None, "--anonymous", "none", environment={
        "TINYREG_ANONYMOUS": "admin", "TINYREG_ROOT": str(tmp_path / "elsewhere"),
        "TINYREG_LISTEN": "192.0.2.1:1 192.0.2.2:2"})  # no addresses of this machine
    assert server.ask("GET", "/v2/")[0] == 403
    assert not (tmp_path / "elsewhere").exists()


def test_several_addresses(start_server):
    server = start_server(None, "--listen", "127.0.0.1:0")
    ports = re.findall(r"127\.0\.0\.1:(\d+)", server.banner.split("listens on")[1].splitlines()[0])
    assert len(set(ports)) == 2
    for server.port in map(int, ports):
        assert server.ask("GET", "/v2/")[0] == 200


def test_port_in_use(server, run):
    done = run("serve", "--listen", server.host, status=1)
    assert done.stdout == "" and server.host in done.stderr and "in use" in done.stderr and "--listen" in done.stderr


def test_address_of_another_machine(run):
    done = run("serve", "--listen", "192.0.2.1:5000", status=1)
    assert "192.0.2.1:5000 is no address of this machine" in done.stderr


@pytest.mark.parametrize("place", ["file", "file/below", "/dev/null/below", "tree"])
def test_a_root_that_can_t_be_one(tmp_path, place):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "docker").write_bytes(b"a file in the way")
    done = run_tinyreg("serve", "--root", tmp_path / place, "--listen", "127.0.0.1:0")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1 and place in done.stderr and "--root" in done.stderr


def test_a_root_that_may_not_be_written():
    """As another user, where the tests run as root."""
    def become_nobody():
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)

    def may_run(python):
        try:
            return run_tinyreg("--version", python=python, preexec_fn=become_nobody).returncode == 0
        except PermissionError:
            return False

    python = next(filter(may_run, ["/usr/bin/python3"] + list(PYTHONS.values())), None)
    if python is None:
        pytest.skip("another user may not run any Python here, or not read " + TINYREG)
    done = run_tinyreg("serve", "--root", "/tinyreg-test", "--listen", "127.0.0.1:0", python=python,
                       preexec_fn=become_nobody)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == ("tinyreg: can't use /tinyreg-test as the store: Permission denied; "
                           "choose another directory with --root\n")


def test_what_root_stores_for_a_service_belongs_to_the_service(tmp_path):
    """It runs as a user of its own, who has to change later what `sudo tinyreg load` has made."""
    if os.getuid():
        pytest.skip("only root can give files away")
    source, root = tmp_path / "source", tmp_path / "root"
    make_image(Directory(str(source)), "demo", "1")
    root.mkdir()
    os.chown(str(root), 65534, 65534)
    for words in (["load", source], ["tag", "demo:1", "demo:2"], ["rm", "demo:1"], ["gc", "--untagged", "--grace", "0"],
                  ["add", __file__, "--to", "files:1"]):
        assert tinyreg.main([words[0], "--root", str(root)] + [str(word) for word in words[1:]]) == 0
    assert {os.lstat(path).st_uid for path in glob.glob(str(root / "**"), recursive=True)} == {65534}
    others = tmp_path / "others"
    others.write_bytes(b"")
    (root / "tinyreg" / "lock.changes").unlink()
    (root / "tinyreg" / "lock.changes").symlink_to(others)
    assert tinyreg.main(["tag", "--root", str(root), "files:1", "files:2"]) == 0
    assert others.stat().st_uid == 0  # a link of that user's may lead to any file


def test_a_wrong_name_of_an_archive_makes_no_store(tmp_path):
    done = run_tinyreg("load", "images.tar", cwd=str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "tinyreg: images.tar: No such file or directory\n")
    assert run_tinyreg("verify", cwd=str(tmp_path)).returncode == 1  # not: all is well


def test_an_empty_store_says_that_it_is_empty(store):
    done = run_tinyreg("ls", "--root", store.root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "%s holds no images\n" % store.root)


@pytest.mark.parametrize("words, says", [
    (["push", "demo:1", "--to", "lab", "--signed-by", "key"], "see tinyreg.py push --help"),
    (["serve", "--port", "5000"], "see tinyreg.py serve --help"),
    (["passwd", "--users", "users"], "passwd NAME --users FILE"),
    (["ls", "--history"], "ls --history NAME:TAG"),
    (["gc", "--plan", "going.txt"], "--keep, --older-than or --only")])
def test_what_was_forgotten_is_said(store, words, says):
    done = run_tinyreg(words[0], "--root", store.root, *words[1:])
    assert done.returncode and says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("options, lines", [([], 2), (["--quiet"], 0)])
def test_a_line_for_each_request(start_server, options, lines):
    server = start_server(None, *options)
    server.ask("GET", "/v2/nowhere/tags/list")
    server.ask("GET", "/v2/?x=1")
    server.stop()
    found = server.log().splitlines()
    assert len(found) == lines
    if lines:
        line = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 GET /v2/nowhere/tags/list 404 .*"
        assert [bool(re.fullmatch(line, shown)) for shown in sorted(found, key=len)] == [False, True]


@pytest.mark.parametrize("host, is_local, says", [
    ("fd00::1", False, "[fd00::1]:5000"), ("fd00::1", True, "localhost:5000"),
    ("127.0.0.1", True, "localhost:5000"), ("127.0.0.2", True, "127.0.0.2:5000")])
def test_the_banner_names_an_address_that_clients_can_use(host, is_local, says):
    """What it says to try was no name of an image, or nobody listened there."""
    assert tinyreg.outer_addresses((host, 5000), is_local, ()) == [says]


def test_the_banner_tells_where_other_machines_find_what_to_do(start_server):
    """They don't know this machine's name; and its own docker takes plain HTTP from localhost alone."""
    server = start_server(None, "--anonymous", "push", listen=":0")
    server.stop()
    assert "docker push localhost:%d/alpine" % server.port in server.banner
    addresses = {name for name in tinyreg.host_names() if re.fullmatch("[0-9.]+", name)} - {"127.0.0.1"}
    assert re.search(r"\n  elsewhere   http://(\S+):%d/use" % server.port, server.banner)[1] in (
        addresses or {socket.gethostname()})
    if shutil.which("openssl"):
        server = start_server(None, "--tls", "--tls-name", "registry.lab", listen=":0")
        server.stop()
        assert "docker pull registry.lab:%d/" % server.port in server.banner
        assert "\n  elsewhere   https://registry.lab:%d/use says what to do\n" % server.port in server.banner


# Every Python

@pytest.mark.parametrize("python", sorted(PYTHONS), ids=lambda version: "%d.%d" % version)
def test_each_python(start_server, run, python):
    """Push, pull, list, delete, end in order; with warnings as errors, so that what goes away is heard of in time."""
    interpreter = PYTHONS[python]
    server = start_server(python=interpreter, environment={"PYTHONWARNINGS": "error"})
    digests = []
    for content in (CONFIG, b"layer one", b"layer two" * 100000):
        digests.append(Digest.of(content))
        assert server.ask("POST", "/v2/a/b/blobs/uploads/?digest=" + digests[-1], content)[0] == 201
    manifest = to_manifest(image((b"layer one", b"layer two" * 100000)))
    assert server.ask("PUT", "/v2/a/b/manifests/latest", manifest.content)[0] == 201
    assert server.ask("GET", "/v2/a/b/manifests/latest")[::2] == (200, manifest.content)
    assert server.ask("GET", "/v2/a/b/blobs/" + digests[2])[::2] == (200, b"layer two" * 100000)
    assert server.ask("GET", "/v2/a/b/referrers/" + manifest.digest)[0] == 200
    assert server.ask("GET", "/v2/a/b/blobs/sha256:short")[0] == 400
    settings = {"python": interpreter, "env": dict(os.environ, PYTHONWARNINGS="error")}
    found = json.loads(run("ls", "a/b", "--json", **settings).stdout)
    assert [(entry["tag"], entry["digest"]) for entry in found] == [("latest", manifest.digest)]
    run("rm", "a/b:latest", **settings)
    assert server.ask("GET", "/v2/a/b/manifests/latest")[0] == 404
    run("ls", "nowhere", status=1, **settings)
    assert server.stop() == 0
    assert "Traceback" not in server.log() and "Warning" not in server.log()
