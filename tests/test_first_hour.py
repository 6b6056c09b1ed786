"""The first hour: each mistake that a newcomer makes is made here, and what they read then says what to do next."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time

import pytest

from conftest import TINYREG, found_pythons, run_tinyreg
from engines import private_folder, require, require_root, run, running_docker
from house import THERE, running_house
from samples import index, real_image, to_manifest
from test_readme import README
from tinyreg import Directory


def told(done, *words, status=1):
    """What a command said that has failed: one line, with these words."""
    assert (done.returncode, done.stdout) == (status, ""), (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tinyreg"), done.stderr
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.fixture
def store(store):
    """The store with an image, in the folder in which commands run."""
    real_image(store, "alpine", "3.19", [b"x" * 20000])
    return store


@pytest.fixture
def command(tmp_path):
    """A function that runs a command in a folder of its own."""
    def run_here(*arguments, **settings):
        return run_tinyreg(*arguments, cwd=str(tmp_path), **settings)
    return run_here


@pytest.fixture
def archive(store, command, tmp_path):
    assert command("save", "alpine:3.19", "-o", "images.tar").returncode == 0
    return tmp_path / "images.tar"


@pytest.fixture
def nobody():
    """A function that runs a command as a user who may do little, with tinyreg.py in a folder that they may read.
    Besides there are `closed`, a folder that they may not, and `open`, in which they may write."""
    require("setpriv")
    require_root()
    with private_folder("nobody") as folder:
        os.chmod(folder, 0o755)
        shutil.copy(TINYREG, folder)
        os.mkdir(folder + "/closed", 0o700)
        os.mkdir(folder + "/open")
        os.chmod(folder + "/open", 0o777)

        def run_as_nobody(*arguments):
            return subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/env",
                                   "python3", "-B", "tinyreg.py"] + list(arguments), cwd=folder, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, universal_newlines=True,
                                  env={"PATH": "/usr/bin:/bin"})
        yield run_as_nobody


# Addresses and ports


@pytest.mark.parametrize("listen", ["5000", ":99999", "localhost", ":"])
def test_an_address_that_is_none(command, listen):
    told(command("serve", "--listen", listen), "write HOST:PORT or :PORT, for example 127.0.0.1:5000", status=2)


def test_two_servers_on_one_port(command, server):
    told(command("serve", "--listen", server.host), server.host, "another tinyreg", "stop it",
         "choose another port with --listen 127.0.0.1:%d" % (server.port + 1))


def test_a_port_that_is_another_program_s(command):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        told(command("serve", "--listen", "127.0.0.1:%d" % other.getsockname()[1]), "another program", "--listen")


def test_a_port_for_root_only(nobody):
    with open("/proc/sys/net/ipv4/ip_unprivileged_port_start") as file:
        if int(file.read()) <= 80:
            pytest.skip("here everybody may listen on port 80")
    done = nobody("serve", "--root", "open/registry", "--listen", "127.0.0.1:80")
    told(done, "127.0.0.1:80", "choose a port above 1023 with --listen")


def test_a_port_where_no_registry_is(command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        host = "127.0.0.1:%d" % free.getsockname()[1]
        told(command("pull", host + "/alpine", "--retries", "0"), host, "nothing listens there", "check the port")


def test_a_host_that_is_none(command):
    told(command("pull", "no-such-host.invalid/alpine", "--retries", "0"), "no such host", "/etc/hosts")


# The disk


@pytest.mark.parametrize("line", [["serve"], ["ls"], ["pull", "alpine"], ["gc"]])
def test_no_permission_on_the_root(nobody, line):
    told(nobody(*line, "--root", "closed/registry"), "closed/registry", "Permission denied", "--root")


def test_who_may_not_read_a_file_is_told_as_whom_it_was_tried(nobody):
    """A service meets what its admin has made as root, and does not know the name that systemd gave it."""
    told(nobody("serve", "--root", "open/registry", "--rules", "closed/rules"), "Permission denied (to uid ")


def test_a_root_that_can_t_be_made(command):
    """Below /proc: mkdir says that there is no such directory, however often its parents are made."""
    told(command("serve", "--root", "/proc/registry"), "/proc/registry")


def test_no_store_here(command):
    told(command("ls"), "no registry is stored in", "--root")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)], stderr=subprocess.PIPE).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_is_full(command, store, start_server, small_disk, tmp_path, skopeo):
    real_image(store, "large", "1", [os.urandom(2 << 20)])
    told(command("save", "large:1", "-o", str(small_disk / "large.tar")), str(small_disk), "are needed")
    assert command("save", "large:1", "-o", "large.tar").returncode == 0
    told(command("load", "large.tar", "--root", str(small_disk / "r")), "are needed", "make room")
    server = start_server(small_disk / "registry")
    said = skopeo.run("copy", "--dest-tls-verify=false", "oci-archive:%s" % (tmp_path / "large.tar"),
                      "docker://%s/large:1" % server.host, ok=False)
    assert said.returncode == 1 and "507 the store is full: no space left on the registry's disk" in said.stdout


# TLS


def test_no_openssl(command):
    told(command("serve", "--tls", "--listen", "127.0.0.1:0", env=dict(os.environ, PATH="/nonexistent")),
         "needs the openssl command", "install it", "--tls-cert")


def make_certificate(folder, days=(0, 2)):
    """A certificate for 127.0.0.1 that signs itself, good between these days from now; its key is in the same file."""
    require("openssl")
    folder.mkdir()
    (folder / "index").touch()
    (folder / "config").write_text("[ca]\ndefault_ca=ca\n[ca]\ndatabase=index\nserial=serial\nnew_certs_dir=.\n"
                                   "default_md=sha256\npolicy=any\nx509_extensions=names\n[any]\ncommonName=supplied\n"
                                   "[names]\nsubjectAltName=IP:127.0.0.1\nbasicConstraints=CA:true\n")
    first, last = (time.strftime("%y%m%d%H%M%SZ", time.gmtime(time.time() + day * 86400)) for day in days)
    run("openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", "key", "-out",
        "request", cwd=str(folder))
    run("openssl", "ca", "-batch", "-config", "config", "-selfsign", "-keyfile", "key", "-in", "request", "-notext",
        "-create_serial", "-startdate", first, "-enddate", last, "-out", "certificate", cwd=str(folder))
    path = folder / "server.pem"
    path.write_text((folder / "certificate").read_text() + (folder / "key").read_text())
    return str(path)


def test_a_wrong_ca(command, store, start_server, tmp_path):
    certificate, other = make_certificate(tmp_path / "its"), make_certificate(tmp_path / "other")
    server = start_server(None, "--tls-cert", certificate)
    image = server.host + "/alpine:3.19"
    told(command("pull", image, "--ca", other, "--retries", "0"), server.host, "not trusted", "name its CA with --ca")
    assert command("pull", image, "--ca", certificate, "--retries", "0").returncode == 0
    told(command("pull", image, "--ca", "nothing.crt"), "nothing.crt", "No such file")


def test_a_clock_that_is_wrong(command, start_server, tmp_path):
    """Ours is right, so the certificate begins in ten days; or it ended ten days ago."""
    for days, what in (((10, 20), "is not yet valid"), ((-20, -10), "has expired")):
        certificate = make_certificate(tmp_path / what, days)
        server = start_server(tmp_path / what / "registry", "--tls-cert", certificate)
        line = ["pull", server.host + "/alpine", "--ca", certificate, "--retries", "0"]
        assert re.search(r"It says 20\d\d-\d\d-\d\d", told(command(*line), what, "clock"))
        told(command(*line, python=min(found_pythons().items())[1]), "clock")  # 3.6 does not say what is wrong
    assert "certificate has expired or is not yet valid" in README and "date -s" in README


# Images


def test_an_image_that_is_not_there(command, store, server):
    for line in (["save", "alpine:3.20", "-o", "x.tar"], ["push", "alpine:3.20", "--to", server.host],
                 ["rm", "alpine:3.20"], ["rm", "alpin:3.19"], ["save", "alpin", "-o", "x.tar"]):
        told(command(*line), line[1] + ": ", "tinyreg.py ls")
    told(command("ls", "alpin"), "alpin", "tinyreg.py ls")
    told(command("pull", server.host + "/alpine:3.20"), "has no alpine:3.20", "check its name and tag")


def test_a_short_name_finds_the_tag_wherever_it_is(command, store):
    """alpine:3.18 was pulled, alpine:3.19 pushed. rm takes the name as it is: while there is an alpine, it deletes
    nothing from docker.io/library/alpine that is not named so."""
    real_image(store, "docker.io/library/alpine", "3.18")
    for tag in ("3.18", "3.19"):
        assert command("save", "alpine:" + tag, "-o", "x.tar").returncode == 0
    told(command("rm", "alpine:3.18"), "alpine:3.18", "but as 3.19")
    assert list(store.tags("docker.io/library/alpine")) == ["3.18"]
    for name in ("docker.io/library/alpine:3.18", "alpine:3.19"):
        assert command("rm", name).returncode == 0
    assert list(store.tags("alpine")) == list(store.tags("docker.io/library/alpine")) == []


def test_an_image_for_another_platform(command, store, start_server, tmp_path, skopeo):
    child = real_image(store, "multi", None, architecture="arm64")
    document = index(child)
    document["manifests"][0]["platform"] = {"os": "linux", "architecture": "arm64"}
    store.put_manifest("multi", to_manifest(document), ["1"])
    server = start_server(tmp_path / "registry")
    told(command("pull", server.host + "/multi:1", "--platform", "linux/s390x", "--root", "r"),
         "no image for linux/s390x", "there are linux/arm64")
    said = skopeo.run("--override-arch", "s390x", "copy", "--src-tls-verify=false", "docker://%s/multi:1" % server.host,
                      "oci:%s" % (tmp_path / "layout"), ok=False)
    assert "no image found" in said.stdout and "s390x" in said.stdout
    assert "linux/arm64" in command("ls", "multi").stdout


# Archives


@pytest.mark.parametrize("line", [["load"], ["serve", "--listen", "127.0.0.1:0"], ["verify", "--quiet"]])
def test_archives_that_are_none(command, archive, tmp_path, line):
    content = archive.read_bytes()
    half, none = tmp_path / "half.tar", tmp_path / "none.tar"
    half.write_bytes(content[:-30000])
    none.write_bytes(os.urandom(100000))
    with tarfile.open(str(tmp_path / "files.tar"), "w") as tar:
        tar.add(TINYREG, "tinyreg.py")
    told(command(*line, "half.tar"), "half.tar", "damaged or cut off; copy it again")
    told(command(*line, "none.tar"), "none.tar", "not a tar file")
    told(command(*line, "files.tar"), "files.tar", "no images in it")
    told(command(*line, "absent.tar"), "absent.tar", "o such file")


def test_an_archive_of_an_old_docker(command, tmp_path):
    """Before 1.10, docker save wrote no manifest.json."""
    folder = tmp_path / "old"
    (folder / "abc").mkdir(parents=True)
    (folder / "repositories").write_text(json.dumps({"alpine": {"latest": "abc"}}))
    for name, content in (("VERSION", "1.0"), ("json", "{}"), ("layer.tar", "")):
        (folder / "abc" / name).write_text(content)
    with tarfile.open(str(tmp_path / "old.tar"), "w") as tar:
        tar.add(str(folder), ".")
    told(command("load", "old.tar"), "old.tar", "load it with docker, and save it with a newer one")


# A root that another version has written


def test_a_root_of_a_newer_version(command, store, start_server):
    """There is no version in it: the images are in Distribution's layout, which is v2, and what a newer tinyreg keeps
    beside them can be lost without losing an image. What we don't know is left alone."""
    unknown = [os.path.join(store.layout.own, "from-the-future", "file"),
               os.path.join(store.root, "docker/registry/v3/file")]
    for path in unknown:
        os.makedirs(os.path.dirname(path))
        open(path, "w").close()
    for line in (["ls"], ["verify"], ["gc", "--grace", "0"], ["save", "alpine:3.19", "-o", "x.tar"]):
        done = command(*line)
        assert (done.returncode, done.stderr) == (0, "")
    start_server(store.root)
    assert all(map(os.path.exists, unknown))


# The environment


def test_a_wrong_environment(command, store):
    """It is told by serve; no other command minds, nor does --help."""
    environment = dict(os.environ, TINYREG_DRAIN="soon")
    told(command("serve", env=environment), "TINYREG_DRAIN", "write for example 30s", status=2)
    assert command("ls", env=environment).stdout == "alpine\n"
    assert command("serve", "--help", env=environment).returncode == 0


# Docker, on another machine


def test_docker_is_told_of_no_insecure_registry(tmp_path):
    """Its words for it are in the README, and what to do about them."""
    with running_house() as house, running_docker(house.folder, house.here.enter) as docker:
        world = house.folder + "/lab"
        real_image(Directory(world), "alpine", "latest")
        house.serve(house.there, house.folder, sys.executable, TINYREG, "serve", "--root", world, "--listen", ":5000")
        said = docker.run("pull", THERE + ":5000/alpine", ok=False)
        refusal = "http: server gave HTTP response to HTTPS client"
        assert said.returncode == 1 and refusal in said.stdout
        assert re.search(r"`%s`.{,600}insecure-registries" % refusal, README, re.DOTALL)
        said = docker.run("pull", THERE + ":5001/alpine", ok=False)
        assert "connection refused" in said.stdout
