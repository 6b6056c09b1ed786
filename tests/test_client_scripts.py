"""What `tinyreg.py clients` and /use hand out: scripts that are run as they are, on a machine whose /etc and /usr/local
vanish afterwards, by each shell that /bin/sh may be."""

import json
import os
import shutil
import stat

import pytest

from conftest import run_tinyreg
from engines import private_folder, require, require_root
from house import Machine
from samples import make_image
from tinyreg import CLIENTS, ClientSetup, Directory, client_script, make_certificates

HOST = "registry.lab:5000"
CA = "-----BEGIN CERTIFICATE-----\nTUlJ\n-----END CERTIFICATE-----\n"
SHELLS = {name: shutil.which(name.split()[0]) for name in ("dash", "bash", "busybox sh")}
HOSTS_TOML = "/etc/containerd/certs.d/_default/hosts.toml"
CONFIG = "/etc/containerd/config.toml"
SECTION_1 = '[plugins."io.containerd.grpc.v1.cri".registry]'
SECTION_2 = '[plugins."io.containerd.cri.v1.images".registry]'
CONFIG_PATH = 'config_path = "/etc/containerd/certs.d"'


class Client:
    """A machine of its own, with programs that stand in for those that are not here."""

    def __init__(self, machine, folder):
        self.machine, self.folder = machine, folder
        self.program("systemctl", 'echo "$@" >> %s/systemctl.log' % folder)

    def program(self, name, script):
        path = os.path.join(self.folder, name)
        with open(path, "w") as file:
            file.write("#!/bin/sh\n" + script + "\n")
        os.chmod(path, stat.S_IRWXU)

    def sh(self, script, shell="sh"):
        """The CompletedProcess of a script that a shell reads from its standard input."""
        environment = dict(os.environ, PATH=self.folder + ":" + os.environ["PATH"] + ":/usr/sbin")
        return self.machine.run(*shell.split(), input=script, env=environment)

    def read(self, path):
        return self.sh("cat '%s'" % path).stdout

    def restarts(self):
        """What systemctl was told since the last time."""
        path = self.folder + "/systemctl.log"
        said = open(path).read().splitlines() if os.path.exists(path) else []
        self.sh("rm -f " + path)
        return said


@pytest.fixture
def client():
    require("unshare", "nsenter")
    require_root()
    with private_folder("client") as folder:
        machine = Machine(folder + "/machine")
        os.mkdir(folder + "/bin")
        yield Client(machine, folder + "/bin")
        machine.end()


# The command


@pytest.fixture
def root(tmp_path):
    """A store with images of several origins, and the certificates of `serve --tls --tls-name registry.lab`."""
    require("openssl")
    store = Directory(str(tmp_path / "registry"))
    for name in ("docker.io/library/a", "quay.io/a/b", "quay.io/c", "lab_5000/x", "team/app", "z"):
        make_image(store, name)
    make_certificates(store.files, str(tmp_path / "registry/tinyreg/tls"), {"registry.lab", "10.0.0.1", "fd00::1"})
    return store.root


@pytest.mark.parametrize("host, lacking", [
    ("registry.lab:5000", None), ("REGISTRY.lab", None), ("10.0.0.1:5000", None), ("[fd00:0::1]:5000", None),
    ("other.lab:5000", "other.lab"), ("10.0.0.2", "10.0.0.2"), ("[fd00::2]:5000", "fd00::2")])
def test_a_name_that_the_certificate_is_not_valid_for_is_told_with_what_to_do(root, host, lacking):
    done = run_tinyreg("clients", "docker", "--root", root, "--host", host)
    if lacking is None:
        assert (done.returncode, done.stderr) == (0, "") and "/etc/docker/certs.d/%s/ca.crt" % host in done.stdout
    else:
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
        assert "add --tls-name %s to tinyreg.py serve" % lacking in done.stderr


@pytest.mark.parametrize("arguments", [[], ["podman", "--mirror", "--plain-http"]])
def test_run_on_a_client_it_says_that_it_belongs_onto_the_server(tmp_path, arguments):
    done = run_tinyreg("clients", *arguments, "--host", HOST, cwd=str(tmp_path))
    assert done.returncode == 1 and "belongs onto the server" in done.stderr and done.stderr.count("\n") == 1


def test_a_private_key_beside_the_certificate_gets_into_no_script(root):
    done = run_tinyreg("clients", "--root", root, "--host", HOST, "--server-ca", root + "/tinyreg/tls/server.pem")
    assert done.returncode == 0 and "BEGIN CERTIFICATE" in done.stdout and "PRIVATE" not in done.stdout


@pytest.mark.parametrize("client", ["docker", "containerd", "podman", "k3s"])
def test_behind_a_proxy_whose_certificate_clients_trust_no_ca_is_wanted(store, client):
    done = run_tinyreg("clients", client, "--root", store.root, "--host", "hub.lab", "--mirror",
                       "--server-ca", "system")
    assert done.returncode == 0, done.stderr
    assert "hub.lab" in done.stdout and "http://" not in done.stdout and "CERTIFICATE" not in done.stdout
    assert "insecure" not in done.stdout and "ca =" not in done.stdout and "ca_file" not in done.stdout


@pytest.mark.parametrize("arguments, says", [
    (["podman", "--mirror", "--user", "me"], "podman login"), (["docker", "--user", "me"], "--mirror"),
    (["docker", "--mirror", "--user", "a:b"], "no user name"), (["system", "--mirror"], "clients system"),
    (["system", "--server-ca", "system"], "leave out"),
    (["docker", "--known-origins"], "--mirror"), (["docker", "--mirror", "--user", "me"], "a password has")])
def test_options_that_do_not_go_together_are_told_in_one_line(root, arguments, says):
    done = run_tinyreg("clients", *arguments, "--root", root, "--host", HOST, input="")
    assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1


def test_podman_is_told_of_each_origin_that_the_store_has(root, start_server, tmp_path):
    printed = run_tinyreg("clients", "podman", "--mirror", "--root", root, "--host", HOST).stdout
    for origin in ("docker.io", "quay.io", "lab:5000"):
        assert printed.count('prefix = "%s"\nlocation = "%s/%s"\n' % (origin, HOST, origin.replace(":", "_"))) == 1
    assert printed.count("prefix = ") == 3
    (tmp_path / "rules").write_text("** @anonymous pull\nquay.io/** @anonymous none\n")
    server = start_server(root, "--rules", str(tmp_path / "rules"))
    answer = server.ask("GET", "/use/podman.sh?mirror")
    assert 'prefix = "lab:5000"' in answer.text and "quay.io" not in answer.text
    server.stop()
    (tmp_path / "users").touch()
    server = start_server(root, "--users", str(tmp_path / "users"))
    assert "lab:5000" not in server.ask("GET", "/use/podman.sh?mirror").text


def test_the_password_for_a_mirror_is_for_the_mirror_alone(root):
    """Docker's registry-mirrors can't have one, and would stop all pulls."""
    done = run_tinyreg("clients", "docker", "--mirror", "--user", "me", "--root", root, "--host", HOST, input="pw\n")
    hosts = done.stdout.split("END\n")[-2]
    assert 'hosts.toml\' 600' in hosts and "registry-mirrors" not in done.stdout
    assert hosts.endswith('  [host."https://%s".header]\n    Authorization = "Basic bWU6cHc="\n' % HOST)
    without = run_tinyreg("clients", "docker", "--mirror", "--root", root, "--host", HOST).stdout
    assert "Authorization" not in without and "serve --anonymous pull" in without and "registry-mirrors" in without


# The page


def test_the_page_tells_other_machines_this_machine_s_name(start_server):
    """Whoever looks at it on this machine, as localhost, reads what to do on the others."""
    server = start_server(None, "--anonymous", "push")
    name = "%s:%d" % (os.uname().nodename, server.port)
    for host in ("localhost:%d", "127.0.0.1:%d", "[::1]:%d"):
        for target in ("/use", "/use/docker.sh", "/use/podman.sh?mirror"):
            text = server.ask("GET", target, host=host % server.port).text
            assert name in text and host % server.port not in text, (host, target)
    assert "registry.lab:5000" in server.ask("GET", "/use/docker.sh", host=HOST).text


def test_the_page_of_a_server_that_is_for_this_machine_alone_calls_it_so(server):
    assert server.host in server.ask("GET", "/use/podman.sh").text


def test_scripts_are_there_alone(server):
    for client in CLIENTS:
        answer = server.ask("GET", "/use/%s.sh" % client)
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
        assert answer.text.startswith("# ") and "<" not in answer.text.replace("<<", "").replace("< $c", "")
    assert server.ask("GET", "/use/nothing.sh").status == 404
    for name in ("a'; rm -rf ~ #", "$(reboot)", "a\\b"):
        assert name not in server.ask("GET", "/use/docker.sh", x_forwarded_host=name).text


# The scripts


@pytest.mark.parametrize("shell", sorted(name for name, path in SHELLS.items() if path))
def test_a_script_that_runs_again_changes_nothing_and_nobody_s_settings_are_lost(client, shell):
    theirs = 'server = "https://theirs.lab"\n'
    client.sh("rm -rf /etc/containerd /etc/docker; mkdir -p %s; echo '%s' > %s"
              % (os.path.dirname(HOSTS_TOML), theirs.strip(), HOSTS_TOML))
    scripts = "".join(client_script(name, ClientSetup(HOST, None, ["docker.io"])) for name in CLIENTS)
    first = client.sh(scripts, shell)
    assert first.returncode == 0, first.stdout
    assert 'host."http://%s"' % HOST in client.read(HOSTS_TOML) and "theirs" not in client.read(HOSTS_TOML)
    assert client.sh("cat %s.*.bak" % HOSTS_TOML).stdout == theirs
    daemon = {"registry-mirrors": ["http://" + HOST], "insecure-registries": [HOST]}
    assert json.loads(client.read("/etc/docker/daemon.json")) == daemon
    assert client.restarts() == ["reload docker", "restart containerd"]
    files = "find /etc /usr/local -newer %s -type f" % HOSTS_TOML
    client.sh("sleep 0.01; touch " + HOSTS_TOML)
    before = client.sh(files).stdout
    again = client.sh(scripts, shell)
    assert again.returncode == 0 and "is as it should be" in again.stdout and "wrote" not in again.stdout
    assert len(client.sh("ls %s.*" % HOSTS_TOML).stdout.splitlines()) == 1
    assert client.restarts() == [] and client.sh(files + " -name '*.tinyreg'").stdout == "" and before == ""


def test_a_script_that_comes_only_in_part_does_nothing(client):
    script = client_script("podman", ClientSetup(HOST, None))
    for part in range(100, len(script) - 3, 97):
        client.sh(script[:part])
        assert "No such file" in client.read("/etc/containers/registries.conf.d/50-tinyreg.conf"), part


def test_docker_s_settings_that_are_there_are_told_to_be_changed_by_hand(client):
    client.sh("mkdir -p /etc/docker; echo '{\"debug\": true}' > /etc/docker/daemon.json")
    done = client.sh(client_script("docker", ClientSetup(HOST, None)))
    assert done.returncode == 0 and "to /etc/docker/daemon.json by hand" in done.stdout
    assert json.loads(client.read("/etc/docker/daemon.json")) == {"debug": True} and client.restarts() == []


def test_only_root_runs_a_script(client):
    require("setpriv")
    script = client_script("docker", ClientSetup(HOST, None))
    done = client.sh(script, "setpriv --reuid=65534 --clear-groups sh")
    assert done.returncode == 1 and done.stdout == "run this as root, for example with sudo sh\n"


CONTAINERD_2 = 'case "$*" in --version) echo containerd containerd.io v2.3.1 abc ;; *) cat "$2" ;; esac'


@pytest.mark.parametrize("two, before, after", [
    (False, "", "version = 2\n\n%s\n  %s\n" % (SECTION_1, CONFIG_PATH)),
    (True, "", "version = 3\n\n%s\n  %s\n" % (SECTION_2, CONFIG_PATH)),
    (False, 'version = 2\n[plugins]\n  %s\n    config_path = ""\n    [debug]\n' % SECTION_1,
     'version = 2\n[plugins]\n  %s\n  %s\n    [debug]\n' % (SECTION_1, CONFIG_PATH)),
    (True, "version = 3\n%s\nconfig_path = ''\n" % SECTION_2.replace('"', "'"),
     "version = 3\n%s\n  %s\n" % (SECTION_2.replace('"', "'"), CONFIG_PATH)),
    (True, 'version = 2\n[debug]\n  level = "info"\n',
     'version = 2\n[debug]\n  level = "info"\n\n%s\n  %s\n' % (SECTION_1, CONFIG_PATH)),
    (False, 'version = 2\n[plugins]\n[plugins."io.containerd.grpc.v1.cri".cni]\n  bin_dir = "/x"\n',
     'version = 2\n[plugins]\n[plugins."io.containerd.grpc.v1.cri".cni]\n  bin_dir = "/x"\n\n%s\n  %s\n'
     % (SECTION_1, CONFIG_PATH))])
def test_containerd_s_config_path_is_seen_to(client, two, before, after):
    require("containerd")
    if two:
        client.program("containerd", CONTAINERD_2)
    client.sh("rm -rf /etc/containerd; mkdir /etc/containerd; cat > %s <<'END'\n%sEND\n" % (CONFIG, before))
    script = client_script("containerd", ClientSetup(HOST, CA))
    done = client.sh(script)
    assert done.returncode == 0 and client.read(CONFIG) == after, done.stdout
    assert client.restarts() == ["restart containerd"]
    if before:
        assert client.sh("cat %s.*.bak" % CONFIG).stdout == before
    assert client.sh(script).returncode == 0 and client.read(CONFIG) == after and client.restarts() == []
    assert client.sh("ls /etc/containerd").stdout.split()[0] == "certs.d" and not client.read(CONFIG + ".new") \
        .startswith("version")


@pytest.mark.parametrize("config, is_told", [
    ("version = 2\n%s\n  config_path = '/etc/theirs'\n" % SECTION_1, True),
    ("version = 2\n%s\n" % SECTION_1.replace("registry]", 'registry.mirrors."docker.io"]'), True),
    ('[plugins.cri]\n  stream_server_address = "127.0.0.1"\n', True),
    ("version = 2\n%s\n%s\n" % (SECTION_1, CONFIG_PATH + '  # "/etc/containerd/certs.d:/etc/docker/certs.d"'), False),
    ('disabled_plugins = ["cri"]\n', False)])
def test_a_config_of_containerd_that_says_something_else_is_left_alone(client, config, is_told):
    client.sh("cat > %s <<'END'\n%sEND\n" % (CONFIG, config))
    done = client.sh(client_script("containerd", ClientSetup(HOST, CA)))
    assert done.returncode == 0 and client.read(CONFIG) == config and client.restarts() == []
    assert all((section in done.stdout) is is_told for section in (SECTION_1, SECTION_2)), done.stdout


def test_the_system_trusts_the_ca(client, root):
    """Debian's own programs do it; openssl, as crane and helm, goes by what the system trusts."""
    require("update-ca-certificates", "openssl")
    check = "openssl verify -verify_hostname registry.lab %s/tinyreg/tls/server.pem" % root
    assert client.sh(check).returncode != 0
    printed = run_tinyreg("clients", "system", "--root", root, "--host", HOST)
    for _ in range(2):
        done = client.sh(printed.stdout)
        assert done.returncode == 0, done.stdout
    done = client.sh(check)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("program, folder, made", [
    ("update-ca-trust", "/etc/pki/ca-trust/source/anchors", ""),                # RHEL, Fedora
    ("update-ca-trust", "/etc/ca-certificates/trust-source/anchors", "/etc/ca-certificates/trust-source"),  # Arch
    ("update-ca-certificates", "/etc/pki/trust/anchors", "/etc/pki/trust/anchors")])  # SUSE
def test_other_systems_trust_the_ca(client, program, folder, made):
    client.program(program, "ls %s" % folder)
    client.sh("mkdir -p /etc/pki %s" % made)
    done = client.sh(client_script("system", ClientSetup(HOST, CA)))
    assert done.returncode == 0 and done.stdout.endswith("\ntinyreg-registry.lab-5000.crt\n")
    assert client.read(folder + "/tinyreg-registry.lab-5000.crt") == CA


def test_a_ca_s_file_is_for_everyone_to_read(client):
    client.sh("umask 077\n" + client_script("podman", ClientSetup(HOST, CA)))
    assert client.sh("stat -c %%a '/etc/containers/certs.d/%s/ca.crt'" % HOST).stdout == "644\n"
