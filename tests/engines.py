"""Real clients for the tests: a Docker engine, a containerd, and roots for podman, buildah and skopeo, all private.

Everything they write lies in folders with short paths (because of Unix sockets' names), and is gone when the session
of tests ends. Nothing of the machine's own engines, storage or configuration is used.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile

import pytest

from conftest import MEMORY, until

IN_CI = os.environ.get("CI") == "true"
BUSYBOX = next((path for path in ("/usr/bin/busybox", "/bin/busybox") if os.path.exists(path)), None)
LARGE = 48 << 20  # bytes of files in the large root filesystem

# How the configuration of an nginx begins that keeps all of its files in one folder.
NGINX_BEGIN = """
daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
"""


def unavailable(reason):
    """Skip the test; but fail it in CI, which installs all clients: nothing may be skipped there unseen."""
    if IN_CI:
        pytest.fail(reason + " (and CI=true wants every client)")
    pytest.skip(reason)


def require(*programs):
    """Skip unless these programs are installed."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        unavailable("not installed: " + ", ".join(missing))


def require_root():
    if os.geteuid() != 0:
        unavailable("only root can start an engine of its own")


def run(*command, ok=True, environment=None, **settings):
    """Run a client; returns the CompletedProcess, its output and errors together as text. `ok=False`: may fail."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True, env=dict(os.environ, **(environment or {})), **settings)
    if ok and done.returncode:
        raise AssertionError("%s\nexit status %d\n%s" % (" ".join(done.args), done.returncode, done.stdout))
    return done


def unmount_below(folder):
    """Take away what an engine left mounted (dockerd: its network namespace)."""
    with open("/proc/self/mountinfo") as mounts:
        places = [line.split()[4] for line in mounts]
    for place in reversed(places):
        if place.startswith(folder + "/"):
            subprocess.run(["umount", "--lazy", place], check=False)


@contextlib.contextmanager
def private_folder(name, place=MEMORY or "/tmp"):
    """A folder with a short path; at the end nothing is mounted in it, and it is gone."""
    folder = tempfile.mkdtemp(prefix="tinyreg-%s-" % name, dir=place)
    try:
        yield folder
    finally:
        if os.geteuid() == 0:
            unmount_below(folder)
        shutil.rmtree(folder)


@contextlib.contextmanager
def daemon(command, folder, ready):
    """A program that runs in the background, until SIGTERM (or, if that takes too long, SIGKILL) ends it."""
    log = os.path.join(folder, os.path.basename(command[0]) + ".log")
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        until(ready, what=command[0], process=process, log=log)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Program:
    """A command with the options and the environment that make it use only what is ours."""

    def __init__(self, *command, environment=None):
        self.command = command
        self.environment = environment or {}

    def __call__(self, *arguments, **settings):
        """Run it; returns what it printed, without the newline at the end."""
        return self.run(*arguments, **settings).stdout.strip()

    def run(self, *arguments, **settings):
        return run(*self.command + arguments, environment=self.environment, **settings)


def own_address():
    """An address of this machine that is not its loopback; skips where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            unavailable("this machine has no address but its loopback")
        return probe.getsockname()[0]


@contextlib.contextmanager
def running_containerd(folder):
    """A containerd of our own, without Kubernetes' part of it; gives its socket's path."""
    address = os.path.join(folder, "containerd.sock")
    config = os.path.join(folder, "containerd.toml")
    with open(config, "w") as file:
        file.write('version = 2\nroot = "%s/root"\nstate = "%s/state"\n'
                   'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
                   '[grpc]\n  address = "%s"\n' % (folder, folder, address))
    probe = ["ctr", "--address", address, "version"]
    with daemon(["containerd", "--config", config], folder, lambda: run(*probe, ok=False).returncode == 0):
        yield address


@pytest.fixture(scope="session")
def ctr():
    """containerd's own client, with a containerd that keeps images as plain folders."""
    require("ctr", "containerd", "runc")
    require_root()
    with private_folder("ctr") as folder, running_containerd(folder) as address:
        yield Program("ctr", "--address", address, environment={"CONTAINERD_SNAPSHOTTER": "native"})


@contextlib.contextmanager
def running_docker(folder, enter=()):
    """A Docker engine that touches no firewall and no network; gives its client. `enter` is the begin of a command that
    enters a namespace, for an engine that lives in one."""
    require("docker", "dockerd", "containerd", "runc")
    require_root()
    with running_containerd(folder) as containerd:
        host = "unix://%s/docker.sock" % folder
        client = Program("docker", "--config", folder + "/client", "--host", host)
        with open(folder + "/daemon.json", "w") as file:
            json.dump({}, file)
        command = list(enter) + [
            "dockerd", "--config-file", folder + "/daemon.json", "--containerd", containerd,
            "--data-root", folder + "/data", "--exec-root", folder + "/exec", "--host", host,
            "--pidfile", folder + "/docker.pid", "--storage-driver", "vfs",
            "--iptables=false", "--ip6tables=false", "--bridge", "none"]
        with daemon(command, folder, lambda: client.run("info", ok=False).returncode == 0):
            yield client


@pytest.fixture(scope="session")
def docker():
    """A private Docker engine's client."""
    with private_folder("docker") as folder, running_docker(folder) as client:
        yield client


@pytest.fixture(scope="session")
def containers():
    """The environment in which podman, buildah and skopeo keep to a folder of their own."""
    with private_folder("containers") as folder:
        files = {
            "storage.conf": '[storage]\ndriver = "vfs"\ngraphroot = "%s/graph"\nrunroot = "%s/run"\n'
                            % (folder, folder),
            "registries.conf": "unqualified-search-registries = []\n",
            "auth.json": "{}\n",
            # runc, because Debian's crun refuses hybrid cgroups; limits that may be set without CAP_SYS_RESOURCE.
            "containers.conf": '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\n'
                               'tmp_dir = "%s/tmp"\nvolume_path = "%s/volumes"\n'
                               '[network]\nnetwork_config_dir = "%s/networks"\n'
                               '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\n'
                               % (folder, folder, folder),
        }
        for name, content in files.items():
            with open(os.path.join(folder, name), "w") as file:
                file.write(content)
        yield {"CONTAINERS_STORAGE_CONF": folder + "/storage.conf",
               "CONTAINERS_REGISTRIES_CONF": folder + "/registries.conf",
               "CONTAINERS_CONF": folder + "/containers.conf", "REGISTRY_AUTH_FILE": folder + "/auth.json"}


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    """A policy.json that accepts unsigned images; skopeo, podman and buildah refuse to work without any."""
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    path.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    return str(path)


@pytest.fixture(scope="session")
def skopeo(containers, policy):
    require("skopeo")
    return Program("skopeo", "--policy", policy, "--registries-conf", containers["CONTAINERS_REGISTRIES_CONF"],
                  environment=containers)


@pytest.fixture(scope="session")
def podman(containers):
    require("podman", "runc")
    require_root()
    return Program("podman", environment=containers)


@pytest.fixture(scope="session")
def buildah(containers):
    require("buildah")
    require_root()
    return Program("buildah", environment=containers)


@pytest.fixture(scope="session")
def umoci():
    require("umoci")
    require_root()
    return Program("umoci")


@pytest.fixture(scope="session")
def curl():
    require("curl")
    return Program("curl", "--silent", "--show-error", "--fail")


def fill_from_usr(folder, size):
    """Copy the machine's own files (no very large ones), in order, until there are so many bytes of them."""
    copied = 0
    for top, folders, names in os.walk("/usr/lib"):
        folders.sort()
        for name in sorted(names):
            if copied >= size:
                return
            path = os.path.join(top, name)
            if os.path.islink(path) or not os.path.isfile(path) or os.path.getsize(path) > size // 10:
                continue
            target = folder + path
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(path, target)
            copied += os.path.getsize(path)


def write_checksums(folder):
    """Put a list into the root filesystem by which a container can check that all its files came through."""
    lines = []
    for top, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(top, name)
            if not os.path.islink(path):
                with open(path, "rb") as file:
                    lines.append("%s  %s\n" % (hashlib.sha256(file.read()).hexdigest(), path[len(folder) + 1:]))
    with open(os.path.join(folder, "checksums"), "w") as file:
        file.writelines(lines)


@contextlib.contextmanager
def root_filesystem(size):
    """A folder that a container can run in: Debian's busybox, `size` bytes of files, and /checksums of all of it."""
    if BUSYBOX is None:
        unavailable("not installed: busybox-static")
    with private_folder("root") as folder:
        for name in ("bin", "etc", "proc", "sys", "dev", "tmp"):
            os.mkdir(os.path.join(folder, name))
        shutil.copy(BUSYBOX, folder + "/bin/busybox")
        for name in ("sh", "sha256sum", "echo"):
            os.symlink("busybox", os.path.join(folder, "bin", name))
        with open(folder + "/etc/passwd", "w") as file:
            file.write("root:x:0:0:root:/:/bin/sh\n")
        fill_from_usr(folder, size)
        write_checksums(folder)
        yield folder


@pytest.fixture(scope="session")
def small_root():
    with root_filesystem(0) as folder:
        yield folder


@pytest.fixture(scope="session")
def large_root():
    with root_filesystem(LARGE) as folder:
        yield folder


@pytest.fixture(params=["small", "large"])
def image_root(request):
    """Each test with it runs twice: with busybox alone, and with many megabytes beside it."""
    return request.getfixturevalue(request.param + "_root")
