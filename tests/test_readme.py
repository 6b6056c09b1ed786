"""The README: every command line in it is run, from top to bottom, from a folder with nothing but tinyreg.py."""

import os
import re
import shlex
import shutil
import tarfile
import unicodedata
from pathlib import Path

import pytest

import tinyreg
from conftest import TINYREG, found_pythons
from engines import BUSYBOX, require, running_docker, unavailable
from house import reload, running_house
from samples import real_image
from test_signatures import Signer, tag_signatures

HERE = os.path.dirname(TINYREG)
with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
    README = file.read()

# What the README names that isn't here: {as it stands there: what the test has in its place, words or its own folder}
PLACES = {
    "/where/you/like": "like",
    "/var/lib/docker-registry": "distribution",
    "/mnt/registry": "shared",
    # beside tinyreg.py a layer of a megabyte fits, and a second does not
    "--split 3900M": "--split %dK" % ((os.path.getsize(TINYREG) >> 10) + 1120),
    "docker login registry.lab:5000": "docker login -u alice -p secret registry.lab:5000",  # it wants a terminal
}
IN_A_CONTAINER = ('docker run --stop-timeout 40 -p 5000:5000 -v "$PWD:/w" -w /w '
                  'python:3-slim python3 tinyreg.py serve --listen :5000')
DISTRIBUTION = 'docker run -p 5000:5000 -v "$PWD/registry:/var/lib/registry" registry:3'

# Lines that are not run, and why. What can be checked of them, the tests below check.
NOT_RUN = {
    "sudo firewall-cmd --permanent --add-port=5000/tcp && sudo firewall-cmd --reload": "there is no firewall here",
    "sudo ufw allow 5000/tcp": "there is no firewall here",
    "sudo systemctl enable --now tinyreg": "no systemd runs here; systemd-analyze verifies the unit",
    IN_A_CONTAINER: "python:3-slim is out in the network",
    DISTRIBUTION: "registry:3 is out in the network; the test has Debian's docker-registry",
}

CLIENTS = ["docker", "podman", "skopeo", "ctr", "curl"]

# What a line has to print, in part.
PRINTS = {
    "python3 tinyreg.py ls": "alpine",
    "python3 tinyreg.py ls images.tar": "complete",
    "python3 tinyreg.py verify images.tar": "all is well",
    "python3 tinyreg.py pull -f deploy.yaml --dry-run": "deploy.yaml",
    "python3 tinyreg.py save -f images.lock -o images.tar --split 3900M": "in 3 files",
    "python3 tinyreg.py verify images-*of3.tar": "all is well",
    "python3 tinyreg.py clients system --host registry.lab:5000": "BEGIN CERTIFICATE",
    "docker login registry.lab:5000": "Login Succeeded",
    "python3 tinyreg.py gc --untagged": "removed",
    "python3 tinyreg.py verify --repair": "all is well",
    "python3 tinyreg.py verify images.tar --signed-by cosign.pub": "all is well",
}


def without_comment(line):
    return re.split(r"(?:^|\s+)# ", line)[0].strip()


def blocks():
    """[(title of the section, [line, ...])] of all that is indented."""
    found, title, lines = [], "", []
    for line in README.splitlines() + [""]:
        if line.startswith("    "):
            lines.append(line[4:])
            continue
        if lines:
            found.append((title, lines))
        lines = []
        title = line[3:] if line.startswith("## ") else title
    return found


def commands():
    """Every line of a code block that runs tinyreg.py, without its comment."""
    lines = [without_comment(line).split(" | ")[-1] for _, lines in blocks() for line in lines]
    return sorted({line for line in lines if line.startswith("python3 tinyreg.py")})


@pytest.mark.parametrize("line", commands())
def test_each_command_line_is_one(line):
    line = line.replace(" --signed-by cosign.pub", "")  # the parser reads the key, which test_every_line makes
    words = shlex.split(re.split(r" > | 2> ", line)[0])[2:]
    if words != ["--help"]:
        tinyreg.build_parser().parse_args(words or ["serve"])  # exits with 2 if not


def test_each_option_exists():
    known = set()
    for command in tinyreg.build_parser().commands.values():
        known.update(command._option_string_actions)
    of_others = {"--tls-verify", "--dest-tls-verify", "--now", "--permanent", "--add-port", "--reload", "--help",
                 "--push", "--create-dirs", "--stop-timeout", "--rollout"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known - of_others == set()


def width(line):
    """The columns that a line takes: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in line)


def test_it_is_short():
    assert len(README.splitlines()) <= 320
    assert [line for line in README.splitlines() if width(line) > 120] == []


def test_what_is_said_of_lines_here_is_said_of_lines_there():
    lines = {without_comment(line) for _, lines in blocks() for line in lines}
    assert set(NOT_RUN) | set(PRINTS) | set(BEFORE) <= lines
    firsts = [lines[0] for _, lines in blocks()]
    assert all(any(first.startswith(begin) for first in firsts) for begin in FILES)
    assert all(place in README for place in PLACES)


def test_the_container_runs_a_command_line_that_is_one():
    command = shlex.split(IN_A_CONTAINER)
    tinyreg.build_parser().parse_args(command[command.index("tinyreg.py") + 1:])


@pytest.mark.parametrize("version", sorted({min(found_pythons()), max(found_pythons())}))
def test_every_line(version, containers):
    """Line by line, on a machine of its own."""
    if min(found_pythons()) != (3, 6) and version == min(found_pythons()):
        pytest.skip("there is no Python 3.6 here")
    require("docker", "dockerd", "containerd", "runc", "docker-registry", "nginx", "systemd-analyze", *CLIENTS)
    if BUSYBOX is None:
        unavailable("not installed: busybox-static")
    with running_house(found_pythons()[version]) as house, running_docker(house.folder, house.here.enter) as docker:
        reader = Reader(house, docker, containers)
        for title, lines in blocks():
            reader.read(title, lines)
        reader.close()


class Reader:
    """Who goes through the README, in the folders in which its lines are meant to be run."""

    def __init__(self, house, docker, containers):
        self.house = house
        self.folder = house.folder + "/stick"  # where the next line runs
        self.stop = None                       # ends the server that runs, if one does
        for name in ("stick", "like", "near"):
            os.mkdir(os.path.join(house.folder, name))
        shutil.copy(TINYREG, self.folder)
        shutil.copy(os.path.join(HERE, "README.md"), self.folder)
        world = house.open_world()
        signer = Signer(Path(house.folder), "cosign", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
        for name, tag, contents in (("library/alpine", "3.19", None),
                                    ("prometheus/prometheus", "v2.53.0", [os.urandom(1000 << 10) for _ in range(3)])):
            digest = real_image(world, name, tag, contents).digest
            tag_signatures(world, name, digest, signer.simple(digest))
        house.program("docker", shutil.which("docker"), *docker.command[1:])
        house.program("ctr", shutil.which("ctr"), "--address", house.folder + "/containerd.sock")
        house.environment.update(containers, CONTAINERD_SNAPSHOTTER="native")
        house.sh("mkdir -p /etc/containers /etc/docker; rm -f /etc/docker/daemon.json\n"
                 "echo '{\"default\": [{\"type\": \"insecureAcceptAnything\"}]}' > /etc/containers/policy.json\n"
                 "mkdir -p image/bin; cp %s image/bin/; tar -C image -cf root.tar .; docker import root.tar alpine\n"
                 "podman import root.tar localhost/alpine; podman tag alpine localhost:5000/alpine" % BUSYBOX)

    def read(self, title, lines):
        """Do what a block of lines says: it is a file, or there are command lines."""
        for first, use in FILES.items():
            if lines[0].startswith(first):
                use(self, "\n".join(lines) + "\n")
                return
        script = []
        for line in lines:
            command = without_comment(line)
            if re.match(r"python3 tinyreg\.py( serve .*)?$", command):
                self.run(script)
                self.prepare(command)
                self.serve(command)
                script = []
            elif command in BEFORE or command in PRINTS or command in NOT_RUN:
                self.run(script)
                self.prepare(command)
                if command not in NOT_RUN:
                    said = self.run([line])
                    assert PRINTS.get(command, "") in said, (command, said)
                script = []
            elif command:
                script.append(line)
        self.run(script)

    def prepare(self, command):
        BEFORE.get(command, lambda reader: None)(self)

    def here(self, text):
        for named, place in PLACES.items():
            text = text.replace(named, place if " " in place else os.path.join(self.house.folder, place))
        return text

    def run(self, script):
        """Run lines in one shell; returns what they print. The shell's folder is where the next lines run.

        There is no terminal, so that passwords are read from standard input."""
        if not script:
            return ""
        text = "set -ex\n%s\npwd > %s/folder\n" % (self.here("\n".join(script)), self.house.folder)
        said = self.house.sh(text, self.folder, input="secret\nsecret\n", start_new_session=True)
        with open(self.house.folder + "/folder") as file:
            self.folder = file.read().strip()
        return said

    def serve(self, command):
        self.close()
        self.stop = self.house.serve(self.house.here, self.folder, "sh", "-c", "exec " + self.here(command))

    def close(self):
        """End the server that runs."""
        if self.stop:
            self.stop()
        self.stop = None

    def go(self, name, *files):
        """To another folder, new or not, and take files along."""
        target = os.path.join(self.house.folder, name)
        os.makedirs(target, exist_ok=True)
        for file in files:
            shutil.copy(os.path.join(self.folder, file), target)
        self.folder = target

    # What the README tells between the lines

    def carry_images(self):
        self.go("far%d" % len(os.listdir(self.house.folder)), "images.tar")

    def go_back(self):
        """To where there is a network, with the list of what the far side has."""
        self.go("like", "have.txt")
        with open(self.folder + "/deploy.yaml", "w") as file:
            file.write("containers:\n- image: alpine:3.19\n- image: quay.io/prometheus/prometheus:v2.53.0\n")

    def carry_parts(self):
        self.go("parts", "tinyreg.py", *["images-%dof3.tar" % number for number in (1, 2, 3)])

    def reload_docker(self):
        """What systemctl reload docker does: our engine reads what is in /etc/docker/daemon.json by now."""
        settings = self.house.sh("tee daemon.json < /etc/docker/daemon.json").strip()
        assert settings == "{}" or "`%s`" % settings in README
        with open(self.house.folder + "/docker.pid") as file:
            pid = int(file.read())
        reload(pid, self.house.folder + "/nsenter.log", "Reloaded configuration")

    def check_certificates(self):
        """From here on, docker takes plain HTTP, and certificates that it does not know, from no other machine."""
        self.house.sh("echo '{}' > /etc/docker/daemon.json")
        self.reload_docker()

    def write_files(self):
        """What a site has beside its images, and the public key of who signs them."""
        self.go("like")
        for name in ("install.sh", "rke2.tar.gz", "Chart.yaml"):
            with open(os.path.join(self.folder, name), "w") as file:
                file.write("apiVersion: v2\nname: web\nversion: 1.2.3\n")
        with tarfile.open(self.folder + "/web-1.2.3.tgz", "w:gz") as chart:
            chart.add(self.folder + "/Chart.yaml", "web/Chart.yaml")
        shutil.copy(self.house.folder + "/cosign.pub", self.folder)

    def check_unit(self):
        """The unit is one for systemd."""
        said = self.house.sh("systemd-analyze verify /etc/systemd/system/tinyreg.service")
        assert "tinyreg" not in said, said

    def copy_volume(self):
        if not os.path.exists(self.house.folder + "/distribution"):
            shutil.copytree(self.folder + "/registry", self.house.folder + "/distribution")

    # Blocks that are files

    def write_rules(self, text):
        with open(self.folder + "/rules", "w") as file:
            file.write(text)

    def run_nginx(self, text):
        """Push through it, with a password where others need none to pull, so that there are tokens."""
        conf = ("events {}\npid %s/nginx.pid;\nerror_log stderr;\nhttp {\naccess_log off;\n%s}\n"
                % (self.house.folder, text))
        with open(self.house.folder + "/nginx.conf", "w") as file:
            file.write(conf)
        self.house.sh(
            "mkdir -p /etc/nginx; cd /etc/nginx\n"
            "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=hub.lab -addext subjectAltName=DNS:hub.lab "
            "-keyout hub.lab.key -out hub.lab.crt 2>/dev/null\n"
            "mkdir -p /etc/containers/certs.d/hub.lab; cp hub.lab.crt /etc/containers/certs.d/hub.lab/ca.crt\n"
            "cd {0}\nnginx -t -c {0}/nginx.conf; nginx -c {0}/nginx.conf\n"
            "trap 'kill $(cat {0}/nginx.pid)' EXIT\n"
            "skopeo copy --dest-creds alice:secret docker-archive:like/alpine.tar docker://hub.lab/through/nginx:1\n"
            "skopeo inspect docker://hub.lab/through/nginx:1\n"
            "! skopeo delete docker://hub.lab/through/nginx:1\n".format(self.house.folder))

    def run_distribution(self):
        """Distribution opens the directory."""
        self.close()
        path = self.house.folder + "/distribution.yml"
        with open(path, "w") as file:
            file.write('version: 0.1\nstorage: {filesystem: {rootdirectory: %s/registry}}\nhttp: {addr: ":5000"}\n'
                       % self.folder)
        said = self.house.sh(
            "unset REGISTRY_AUTH_FILE  # podman's, but REGISTRY_... is Distribution's\n"
            "docker-registry serve {0} > {0}.log 2>&1 & trap 'kill $!' EXIT\n"
            "curl --silent --fail --retry 9 --retry-delay 1 --retry-connrefused "
            "http://localhost:5000/v2/_catalog || cat {0}.log".format(path))
        assert '"alpine"' in said


# {how the first line of a block begins that is no command: what is done with it}
FILES = {
    "# REPOSITORY": Reader.write_rules,
    "server {": Reader.run_nginx,
}

# What happens before a line.
BEFORE = {
    "docker pull registry.lab:5000/alpine": Reader.reload_docker,
    "tar -xf images.tar tinyreg.py": Reader.carry_images,
    "python3 tinyreg.py pull -f deploy.yaml --dry-run": Reader.go_back,
    "python3 tinyreg.py load images-*of3.tar": Reader.carry_parts,
    "python3 tinyreg.py add install.sh rke2.tar.gz --to rke2/files:v1.34": Reader.write_files,
    "docker login registry.lab:5000": Reader.check_certificates,
    "sudo systemctl enable --now tinyreg": Reader.check_unit,
    "python3 tinyreg.py serve --root /var/lib/docker-registry": Reader.copy_volume,
    DISTRIBUTION: Reader.run_distribution,
}
