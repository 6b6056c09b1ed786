"""The README: its commands are commands, and its story of the air gap happens as it is told."""

import os
import re
import shlex
import shutil
import subprocess
import urllib.request

import pytest

import samples
import tinyreg
from conftest import TINYREG, found_pythons
from tinyreg import Directory, parse_image

HERE = os.path.dirname(TINYREG)
with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
    README = file.read()


def commands():
    """Every line of a code block that runs tinyreg.py, without its comment."""
    lines = [line.strip().partition("   #")[0] for line in README.splitlines() if line.startswith("    ")]
    return sorted({line.split(" | ")[-1] if line.startswith("docker") else line.split(" | ")[0] for line in lines
                   if re.search(r"(^|\| )python3 tinyreg\.py\b", line)})


def section(title):
    """The lines of the code blocks of one section."""
    text = README.split("\n## %s\n" % title)[1].split("\n## ")[0]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("line", commands())
def test_each_command_line_is_one(line):
    words = shlex.split(re.split(r" > | 2> ", line)[0], comments=True)[2:]
    if words != ["--help"]:
        tinyreg.build_parser().parse_args(words or ["serve"])  # exits with 2 if not


def test_the_tests_that_the_readme_names_exist():
    named = set(re.findall(r"`(test_\w+)`", README))
    found = set()
    for name in os.listdir(os.path.join(HERE, "tests")):
        if name.endswith(".py"):
            with open(os.path.join(HERE, "tests", name), encoding="utf-8") as file:
                found.update(re.findall(r"^def (test_\w+)", file.read(), re.MULTILINE))
    assert named and named <= found


def run(folder, line):
    """Run a line in a shell; returns what it printed."""
    done = subprocess.run(["sh", "-ec", line], cwd=str(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True, timeout=120)
    assert done.returncode == 0, (line, done.stdout)
    return done.stdout


@pytest.mark.parametrize("version", sorted({min(found_pythons()), max(found_pythons())}))
def test_the_story_of_the_air_gap(start_server, tmp_path, version):
    """Line by line, with an upstream of our own under the names that the README has."""
    upstream = Directory(str(tmp_path / "upstream"))
    wanted = {"alpine:3.19": "docker.io/library/alpine",
              "quay.io/prometheus/prometheus:v2.53.0": "quay.io/prometheus/prometheus"}
    manifests = {name: samples.make_image(upstream, name, image.rpartition(":")[2], (name.encode(),))
                 for image, name in wanted.items()}
    host = start_server(tmp_path / "upstream").host
    near, far = tmp_path / "near", tmp_path / "far"
    for folder in (near, far):
        folder.mkdir()
    shutil.copy(TINYREG, str(near))

    def here(line):
        line = line.partition("   #")[0].replace("python3", found_pythons()[version])
        for image, name in wanted.items():
            line = line.replace(image, "%s/%s:%s" % (host, name, image.rpartition(":")[2]))
        return line

    pull, save, unpack, verify, serve, docker, load = section("Across the air gap")[:7]
    assert [line.split()[2] for line in (pull, save, verify, load)] == ["pull", "save", "verify", "load"]
    run(near, here(pull))
    run(near, here(save))
    shutil.copy(str(near / "images.tar"), str(far))
    run(far, here(unpack))
    assert "all intact" in run(far, here(verify))
    assert serve.split("   #")[0].strip() == "python3 tinyreg.py serve images.tar"
    stick = start_server(far / "unused", str(far / "images.tar"), python=found_pythons()[version])
    run(far, here(load))
    store = Directory(str(far / "registry"))
    for image, name in wanted.items():
        stored = parse_image(here(image)).stored_name
        assert store.resolve(stored, image.rpartition(":")[2]) == manifests[name].digest
        with urllib.request.urlopen("%s/v2/%s/manifests/%s" % (stick.url, stored, image.rpartition(":")[2])) as answer:
            assert answer.headers["Docker-Content-Digest"] == manifests[name].digest
    assert not os.path.exists(str(far / "unused"))  # nothing is unpacked, and nothing stored, by serve
