"""From nothing to a pull over TLS: real clients that `tinyreg.py clients` tells whom to trust, and nobody else; that
log in, may do what the rules say, are denied the rest, and log out.

The clients live in a mount namespace whose /etc is a copy that is gone afterwards, so that the printed lines are run as
they are, and the server on an address that no client trusts by itself (as Docker does 127.0.0.1).
"""

import json
import os
import ssl
import subprocess
import sys

import pytest
from conftest import TINYREG, Server, ask, run_tinyreg, until
from engines import (Program, private_folder, require, require_root, run, running_containerd, running_docker,
                     unavailable)
from house import no_systemctl
from samples import make_image, real_image
from tinyreg import Directory, host_names

RULES = """
** bob pull
team/** alice push
pub/** @anonymous pull
library/** @anonymous pull
docker.io/library/** @anonymous pull
secret/** bob none
"""


def outside_address():
    """An IPv4 address of this machine that is not loopback."""
    for address in sorted(host_names()):
        if address.count(".") == 3 and address.replace(".", "").isdigit() and not address.startswith("127."):
            return address
    return unavailable("this machine has no address but loopback")


class Machine:
    """A mount namespace with its own /etc."""

    def __init__(self, folder):
        script = ("mount -t tmpfs tmpfs {0} && mkdir {0}/upper {0}/work && mount -t overlay overlay "
                  "-o lowerdir=/etc,upperdir={0}/upper,workdir={0}/work /etc && echo ready && exec sleep infinity")
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script.format(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        universal_newlines=True)
        if self.process.stdout.readline() != "ready\n":
            unavailable("no overlay of /etc can be mounted here")
        self.enter = ["nsenter", "--mount=/proc/%d/ns/mnt" % self.process.pid]
        no_systemctl(folder)
        self.environment = {"PATH": folder + ":" + os.environ["PATH"]}
        self.sh("echo '127.0.0.1 registry-1.docker.io quay.io' >> /etc/hosts")  # nothing goes out to them

    def sh(self, script):
        return run(*self.enter + ["sh", "-e", "-c", script], environment=self.environment)

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def machine():
    require("unshare", "nsenter")
    require_root()
    with private_folder("machine") as folder:
        machine = Machine(folder)
        yield machine
        machine.end()


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A server with TLS, users and rules; `address` is what the clients call it."""
    require("openssl")
    folder = tmp_path_factory.mktemp("login")
    root = folder / "registry"
    store = Directory(str(root))
    for name in ("team/app", "pub/app", "secret/app", "library/app", "docker.io/library/app", "quay.io/org/app"):
        real_image(store, name)
    for user in ("alice", "bob"):
        run_tinyreg("passwd", user, "--users", folder / "users", "--stdin", input="pw-%s\n" % user)
    (folder / "rules").write_text(RULES)
    server = Server(root, "--tls", "--tls-name", "other.lab", "--users", folder / "users", "--rules", folder / "rules",
                    listen=outside_address() + ":0")
    server.users, server.rules = folder / "users", folder / "rules"
    server.address = "%s:%d" % (outside_address(), server.port)
    yield server
    server.stop()
    assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def open_to_pull(registry):
    """A server of the same store, from which everybody may pull, and to which users may push."""
    server = Server(registry.root, "--tls", "--tls-name", "other.lab", "--users", registry.users, "--anonymous", "pull",
                    listen=outside_address() + ":0")
    server.address = "%s:%d" % (outside_address(), server.port)
    yield server
    server.stop()


@pytest.fixture(params=["some need no password", "all need one"])
def challenge(request, registry):
    """Both ways to ask for credentials, Bearer and Basic."""
    registry.rules.write_text(RULES if request.param.startswith("some") else RULES.replace("@anonymous", "bob"))
    wanted = "Bearer" if request.param.startswith("some") else "Basic"
    # Each process sees the change on its own, and there is no telling which one answers.
    until(lambda: all(wanted in challenge_of(registry) for _ in range(20)))
    return wanted


def challenge_of(registry):
    """What a client hears that has no password."""
    context = ssl.create_default_context(cafile=registry.root + "/tinyreg/tls/ca.crt")
    return ask("https://" + registry.address, "GET", "/v2/", context=context).headers["WWW-Authenticate"]


def clients(registry, machine, *arguments, **settings):
    """Run what `tinyreg.py clients` prints, on the clients' machine."""
    printed = run_tinyreg("clients", *arguments, "--root", registry.root, "--host", registry.address, **settings)
    assert (printed.returncode, printed.stderr) == (0, "")
    machine.sh(printed.stdout)


def refused(client, *command, **settings):
    """The output of a client that must fail."""
    done = client.run(*command, ok=False, **settings)
    assert done.returncode != 0, done.stdout
    return done.stdout


# Docker

@pytest.fixture(scope="module")
def docker(machine):
    with private_folder("docker-tls") as folder, running_docker(folder, machine.enter) as client:
        client.folder = folder
        yield client


@pytest.fixture(scope="module")
def trusted_by_docker(registry, machine, docker):
    """The engine's client, before and after the printed lines have been run."""
    assert "x509" in refused(docker, "login", "-u", "alice", "--password-stdin", registry.address, input="pw-alice")
    clients(registry, machine, "docker")
    return docker


def test_docker(registry, trusted_by_docker, challenge):
    docker, host = trusted_by_docker, registry.address
    if challenge == "Bearer":
        docker("pull", host + "/pub/app:1")
        docker("image", "rm", host + "/pub/app:1")
    refused(docker, "pull", host + "/team/app:1")
    assert "nauthorized" in refused(docker, "login", "-u", "alice", "--password-stdin", host, input="pw-bob")
    docker("login", "-u", "alice", "--password-stdin", host, input="pw-alice")
    docker("pull", host + "/team/app:1")
    target = host + "/team/other:" + challenge.lower()
    docker("tag", host + "/team/app:1", target)
    docker("tag", host + "/team/app:1", host + "/other/app:1")
    docker("push", target)
    assert "--rules" in refused(docker, "push", host + "/other/app:1")
    docker("login", "-u", "bob", "--password-stdin", host, input="pw-bob")
    assert "bob may" in refused(docker, "push", target)
    docker("pull", target)
    refused(docker, "pull", host + "/secret/app:1")
    docker("logout", host)
    refused(docker, "pull", host + "/team/app:1")
    docker("image", "rm", "--force", host + "/team/app:1", host + "/other/app:1", target)


def test_docker_pulls_logged_out_and_pushes_logged_in(open_to_pull, machine, docker):
    clients(open_to_pull, machine, "docker")
    image, target = open_to_pull.address + "/team/app:1", open_to_pull.address + "/new/app:docker"
    docker("pull", image)
    docker("tag", image, target)
    assert "denied" in refused(docker, "push", target)
    docker("login", "-u", "alice", "--password-stdin", open_to_pull.address, input="pw-alice")
    docker("push", target)
    docker("logout", open_to_pull.address)
    assert "denied" in refused(docker, "push", target)
    docker("image", "rm", target, image)
    docker("pull", target)
    docker("image", "rm", target)


@pytest.mark.parametrize("challenge", ["some need no password"], indirect=True)
def test_docker_with_a_mirror(registry, machine, trusted_by_docker, challenge):
    """20.10 takes docker.io's images from it, without credentials: it sends a mirror none."""
    docker = trusted_by_docker
    machine.sh("rm -f /etc/docker/daemon.json")
    clients(registry, machine, "docker", "--mirror")
    machine.sh("cp /etc/docker/daemon.json %s; kill -HUP $(cat %s/docker.pid)" % (docker.folder, docker.folder))
    until(lambda: registry.address in docker("info"), what="the mirror")
    docker("pull", "app:1")
    docker("image", "rm", "app:1")
    assert "GET /v2/library/app/manifests/" in registry.log()
    machine.sh("rm /etc/docker/daemon.json")


# podman and skopeo

@pytest.fixture(scope="module")
def containers_environment(containers):
    """Theirs, but for the registries: those are what /etc/containers says."""
    return {name: value for name, value in containers.items() if name != "CONTAINERS_REGISTRIES_CONF"}


@pytest.fixture(scope="module")
def trusted_by_podman(registry, machine):
    clients(registry, machine, "podman", "--mirror")


def client_in(machine, environment, *command):
    return Program(*machine.enter + list(command), environment=environment)


def test_podman(registry, machine, containers_environment, trusted_by_podman, challenge):
    require("podman")
    podman, host = client_in(machine, containers_environment, "podman"), registry.address
    if challenge == "Bearer":
        podman("pull", host + "/pub/app:1")
        podman("rmi", host + "/pub/app:1")
    refused(podman, "pull", host + "/team/app:1")
    refused(podman, "login", "-u", "alice", "--password-stdin", host, input="pw-bob")
    podman("login", "-u", "alice", "--password-stdin", host, input="pw-alice")
    podman("pull", host + "/team/app:1")
    podman("push", host + "/team/app:1", host + "/team/podman:1")
    refused(podman, "push", host + "/team/app:1", host + "/other/app:1")
    podman("login", "-u", "bob", "--password-stdin", host, input="pw-bob")
    for image in ("docker.io/library/app:1", "quay.io/org/app:1"):  # the origins that --mirror has put in
        podman("pull", image)
        podman("rmi", image)
    refused(podman, "pull", host + "/secret/app:1")
    podman("rmi", host + "/team/app:1")
    podman("logout", host)
    refused(podman, "pull", host + "/team/app:1")


def test_skopeo(registry, machine, containers_environment, trusted_by_podman, challenge, tmp_path):
    require("skopeo")
    skopeo, host = client_in(machine, containers_environment, "skopeo"), "docker://" + registry.address
    refused(skopeo, "inspect", host + "/team/app:1")
    refused(skopeo, "login", "-u", "bob", "--password-stdin", registry.address, input="pw-alice")
    skopeo("login", "-u", "bob", "--password-stdin", registry.address, input="pw-bob")
    assert json.loads(skopeo("list-tags", host + "/team/app"))["Tags"] == ["1"]
    refused(skopeo, "copy", host + "/team/app:1", host + "/team/skopeo:1")
    skopeo("login", "-u", "alice", "--password-stdin", registry.address, input="pw-alice")
    skopeo("copy", host + "/team/app:1", host + "/team/skopeo:1")
    refused(skopeo, "delete", host + "/team/skopeo:1")
    skopeo("logout", registry.address)
    refused(skopeo, "inspect", host + "/team/app:1")


# containerd

@pytest.fixture(scope="module")
def ctr(machine):
    require("ctr", "containerd")
    require_root()
    with private_folder("ctr-tls") as folder, running_containerd(folder) as address:
        yield client_in(machine, {"CONTAINERD_SNAPSHOTTER": "native"}, "ctr", "--address", address, "images")


def test_ctr(registry, machine, ctr, challenge):
    clients(registry, machine, "containerd", "--mirror")
    host, hosts = registry.address, ("--hosts-dir", "/etc/containerd/certs.d")
    if challenge == "Bearer":
        ctr("pull", *hosts, host + "/pub/app:1")
    refused(ctr, "pull", *hosts, host + "/team/app:1")
    refused(ctr, "pull", *hosts, "--user", "bob:wrong", host + "/team/app:1")
    ctr("pull", *hosts, "--user", "bob:pw-bob", host + "/team/app:1")
    target = host + "/team/ctr:" + challenge.lower()
    refused(ctr, "push", *hosts, "--user", "bob:pw-bob", target, host + "/team/app:1")
    ctr("push", *hosts, "--user", "alice:pw-alice", target, host + "/team/app:1")
    refused(ctr, "pull", *hosts, "--user", "bob:pw-bob", host + "/secret/app:1")


def test_ctr_pushes_without_a_token_where_everybody_may_pull(open_to_pull, machine, ctr):
    """As docker build --push must, whose command line would fetch it, and trusts no CA but the system's."""
    clients(open_to_pull, machine, "containerd")
    image, hosts = open_to_pull.address + "/team/app:1", ("--hosts-dir", "/etc/containerd/certs.d")
    target = open_to_pull.address + "/new/app:ctr"
    ctr("pull", *hosts, image)
    refused(ctr, "push", *hosts, target, image)
    before = len(open_to_pull.log())
    ctr("push", *hosts, "--user", "alice:pw-alice", target, image)
    assert "/token" not in open_to_pull.log()[before:] and "user=alice" in open_to_pull.log()[before:]


@pytest.mark.parametrize("challenge", ["some need no password"], indirect=True)
def test_ctr_with_a_mirror(registry, machine, ctr, challenge):
    clients(registry, machine, "containerd", "--mirror")
    ctr("pull", "--hosts-dir", "/etc/containerd/certs.d", "docker.io/library/app:1")
    assert "/v2/library/app/manifests/1?ns=docker.io" in registry.log()


@pytest.mark.parametrize("challenge", ["all need one"], indirect=True)
def test_a_mirror_that_wants_a_password_is_given_it(registry, machine, ctr, challenge):
    """Who does not read hosts.toml, which root alone may, gets nothing."""
    hosts = ("--hosts-dir", "/etc/containerd/certs.d")
    clients(registry, machine, "containerd", "--mirror")
    refused(ctr, "pull", *hosts, "quay.io/org/app:1")
    clients(registry, machine, "containerd", "--mirror", "--user", "bob", input="pw-bob\n")
    ctr("pull", *hosts, "quay.io/org/app:1")
    file = "/etc/containerd/certs.d/_default/hosts.toml"
    assert machine.sh("stat -c %a " + file).stdout == "600\n"
    clients(registry, machine, "containerd", "--mirror")
    assert machine.sh("stat -c %a " + file).stdout == "644\n"


@pytest.mark.parametrize("how", [["--mirror"], ["--mirror", "--known-origins"]], ids=" ".join)
@pytest.mark.parametrize("challenge", ["some need no password"], indirect=True)
def test_a_push_to_another_registry_does_not_come_to_the_mirror(registry, machine, ctr, challenge, how):
    """There is no such registry here, so it fails, as it should; the mirror hears nothing of it."""
    machine.sh("rm -r /etc/containerd/certs.d")
    clients(registry, machine, "containerd", *how)
    hosts = ("--hosts-dir", "/etc/containerd/certs.d")
    ctr("pull", *hosts, "docker.io/library/app:1")
    before = len(registry.log())
    refused(ctr, "push", *hosts, "docker.io/library/foo:1", "docker.io/library/app:1")
    refused(ctr, "push", *hosts, "quay.io/foo/bar:1", "docker.io/library/app:1")
    heard = registry.log()[before:]
    assert "foo" not in heard, heard
    known = machine.sh("ls /etc/containerd/certs.d").stdout.split()
    assert ("quay.io" in known) is ("_default" not in known) is ("--known-origins" in how)


# The command itself

@pytest.mark.parametrize("client, file, also", [
    ("docker", "/etc/docker/certs.d/reg.lab:5000/ca.crt", "_default"),
    ("containerd", "/etc/containerd/certs.d/reg.lab:5000/ca.crt", "_default"),
    ("podman", "/etc/containers/certs.d/reg.lab:5000/ca.crt", 'prefix = "quay.io"'),
    ("k3s", "/etc/rancher/k3s/registries.yaml", '"*":')])
def test_clients_prints_each(tmp_path, client, file, also):
    ca = "-----BEGIN CERTIFICATE-----\nTUlJ\n-----END CERTIFICATE-----\n"
    (tmp_path / "ca.crt").write_text(ca)
    make_image(Directory(str(tmp_path / "r")), "quay.io/a/b")
    arguments = ["clients", client, "--root", tmp_path / "r", "--host", "reg.lab:5000", "--ca", tmp_path / "ca.crt"]
    plain, mirror = (run_tinyreg(*arguments + options).stdout for options in ([], ["--mirror"]))
    assert ca in plain and file in plain and also not in plain
    assert ca in mirror and also in mirror
    without = run_tinyreg(*arguments[:-2] + ["--plain-http"]).stdout
    assert "https://" not in without and "CERTIFICATE" not in without and "reg.lab:5000" in without


@pytest.mark.parametrize("options, says", [([], "--plain-http"), (["--host", "a;b", "--plain-http"], "HOST:PORT"),
                                           (["--install", "--plain-http"], "CLIENT --install")])
def test_clients_refuses_in_one_line(tmp_path, options, says):
    done = run_tinyreg("clients", "--root", tmp_path / "r", *options)
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1


def test_clients_install_writes_the_files_and_keeps_the_settings_of_others(machine, registry):
    command = [sys.executable, TINYREG, "clients", "docker", "--install", "--mirror", "--root", registry.root,
               "--host", "other.lab:5000"]
    machine.sh("echo '{\"debug\": true}' > /etc/docker/daemon.json")
    shown = run(*machine.enter + command, environment=machine.environment).stdout
    assert "daemon.json by hand" in shown and "/etc/docker/certs.d/other.lab:5000/ca.crt" in shown
    with open(registry.root + "/tinyreg/tls/ca.crt") as file:
        assert machine.sh("cat /etc/docker/certs.d/other.lab:5000/ca.crt").stdout == file.read()
    assert json.loads(machine.sh("cat /etc/docker/daemon.json").stdout) == {"debug": True}
    assert json.loads(machine.sh("cat /etc/docker/daemon.json.tinyreg").stdout) == {"registry-mirrors":
                                                                                    ["https://other.lab:5000"]}
