"""The worksheet of `tinyreg.py help lesson`: every line of it, in the order in which a student meets them."""

import functools
import os
import re
import shutil
import sys

import pytest
from conftest import TINYREG, run_tinyreg, until
from engines import run


def steps():
    """[(title, [command line], [what /live shall show])] of the worksheet."""
    parts = re.split(r"^([0-9]+\. .*)\n", run_tinyreg("help", "lesson").stdout, flags=re.MULTILINE)[1:]
    for title, text in zip(parts[::2], parts[1::2]):
        lines = re.findall(r"^    (\S.*)", text, re.MULTILINE)
        yield title, lines, re.findall('"([^"]+)"', re.sub(r"(?m)^    \S.*", "", text).replace("\n   ", " "))


@pytest.fixture
def student(docker, tmp_path):
    """A function that runs a line in a student's shell: the folder with tinyreg.py, our docker, the last variables."""
    os.mkdir(str(tmp_path / "bin"))
    with open(str(tmp_path / "bin" / "docker"), "w") as file:
        file.write('#!/bin/sh\nexec %s %s "$@"\n' % (shutil.which("docker"), " ".join(docker.command[1:])))
    os.chmod(str(tmp_path / "bin" / "docker"), 0o755)
    shutil.copy(TINYREG, str(tmp_path))
    os.symlink(sys.executable, str(tmp_path / "bin" / "python3"))
    path = "%s:%s" % (tmp_path / "bin", os.environ["PATH"])

    def type_in(line):
        return run("sh", "-c", "[ ! -f .vars ] || . ./.vars; %s\nstatus=$?; set | grep -E '^(url|d|r|b)=' > .vars\n"
                   "exit $status" % line, ok=False, environment={"PATH": path}, cwd=str(tmp_path))
    yield type_in
    docker.run("image", "rm", "--force", *set(docker("images", "--quiet").split()), ok=False)


def shows(server, begin, words):
    return words in server.log()[begin:]


def test_the_lesson(start_server, student, tmp_path):
    server = start_server(tmp_path / "registry", "--log", "explain")
    done = list(steps())
    assert [int(title.split(".")[0]) for title, _, _ in done] == list(range(1, 11))
    for title, lines, shown in done:
        begin = len(server.log())
        for line in lines:
            command, _, remark = line.partition(" # ")
            said = student(command.replace("localhost:5000", server.host))
            assert bool(said.returncode) == ("fails" in remark), "%s\n%s\n%s" % (title, line, said.stdout)
        assert shown
        for words in shown:
            until(functools.partial(shows, server, begin, words), what="%s: %s" % (title, words))
    assert "already" in student("docker push %s/lesson:arm64" % server.host).stdout
