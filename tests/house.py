"""A machine of its own for what the README tells: port 5000, /etc, /usr/local and names in the network, so that its
command lines run as they stand, and nothing of them stays.

Two network namespaces, joined by a cable. In the one, 192.168.1.10, whoever reads the README; in the other,
192.168.1.20, all the registries of the world, which are one tinyreg with a certificate for each name. The reader's
/etc and /usr/local are overlays that vanish with the mount namespace.
"""

import contextlib
import os
import signal
import stat
import subprocess
import sys

from conftest import TINYREG, until
from engines import private_folder, require, require_root, unavailable
from tinyreg import Directory

HERE, THERE = "192.168.1.10", "192.168.1.20"
NAMES = ["registry-1.docker.io", "quay.io", "other.lab"]  # there

MACHINE = """
mount -t tmpfs tmpfs {0}
for folder in etc usr/local; do
    mkdir -p {0}/upper/$folder {0}/work/$folder
    mount -t overlay overlay -o lowerdir=/$folder,upperdir={0}/upper/$folder,workdir={0}/work/$folder /$folder
done
ip link set lo up
echo ready
exec sleep infinity
"""


def no_systemctl(folder):
    """Put a systemctl into a folder that does nothing: that of this machine would reload its own engines."""
    path = os.path.join(folder, "systemctl")
    with open(path, "w") as file:
        file.write("#!/bin/sh\nexit 1\n")
    os.chmod(path, stat.S_IRWXU)


class Machine:
    """Namespaces that live as long as a process that sleeps in them."""

    def __init__(self, folder):
        os.mkdir(folder)
        self.process = subprocess.Popen(["unshare", "--mount", "--net", "--propagation", "private", "sh", "-ec",
                                         MACHINE.format(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        universal_newlines=True)
        if self.process.stdout.readline() != "ready\n":
            unavailable("no machine of its own can be made here: " + self.process.stderr.read().strip())
        self.enter = ["nsenter", "--mount=/proc/%d/ns/mnt" % self.process.pid,
                      "--net=/proc/%d/ns/net" % self.process.pid]

    def command(self, *command, cwd="/"):
        """The command line that runs a command there; entering a mount namespace changes to its root."""
        return self.enter + ["sh", "-c", 'cd "$0" && exec "$@"', cwd] + list(command)

    def run(self, *command, cwd="/", **settings):
        """Run a command there; returns the CompletedProcess, its output and errors together as text."""
        return subprocess.run(self.command(*command, cwd=cwd), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True, **settings)

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


class House:
    """The two machines. What the reader runs sees `environment`, and the programs of `programs` first."""

    def __init__(self, folder, python, ends):
        self.folder = folder
        self.ends = ends  # what has to be ended with it
        self.here = self.machine("here")
        self.there = self.machine("there")
        self.programs = folder + "/bin"
        os.mkdir(self.programs)
        self.program("python3", python)
        self.program("sudo")
        no_systemctl(self.programs)
        self.environment = dict(os.environ, PATH=self.programs + ":" + os.environ["PATH"] + ":/usr/sbin:/sbin",
                                PYTHONDONTWRITEBYTECODE="1", PYTHONUNBUFFERED="1", HOME=folder + "/home")
        os.mkdir(folder + "/home")
        self.connect()

    def machine(self, name):
        machine = Machine(os.path.join(self.folder, name))
        self.ends.callback(machine.end)
        return machine

    def program(self, name, *command):
        """A program that runs a command, with its own arguments at the end."""
        path = os.path.join(self.programs, name)
        with open(path, "w") as file:
            file.write('#!/bin/sh\nexec %s "$@"\n' % " ".join(command))
        os.chmod(path, stat.S_IRWXU)

    def connect(self):
        """The cable, and the names."""
        subprocess.run(self.here.enter + ["ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable",
                                          "netns", str(self.there.process.pid)], check=True)
        for machine, address in ((self.here, HERE), (self.there, THERE)):
            machine.run("ip", "address", "add", address + "/24", "dev", "cable", check=True)
            machine.run("ip", "link", "set", "cable", "up", check=True)
        # registry.lab, which the README adds, is there before: dockerd looks again after five seconds only.
        self.sh("echo '127.0.0.1 localhost\n%s %s\n%s registry.lab hub.lab' > /etc/hosts"
                % (THERE, " ".join(NAMES), HERE))

    def open_world(self):
        """Start the registry of all names; returns its store."""
        root = self.folder + "/world"
        names = [word for name in NAMES for word in ("--tls-name", name)]
        self.serve(self.there, self.folder, sys.executable, TINYREG, "serve", "--root", root,
                   "--listen", THERE + ":443", "--listen", THERE + ":5000", "--tls", *names, "--anonymous", "push",
                   "--workers", "1")
        self.environment["SSL_CERT_FILE"] = root + "/tinyreg/tls/ca.crt"
        return Directory(root)

    def sh(self, script, cwd=None, status=0, **settings):
        """Run a script here, with `sh -e`; returns its output, and expects this status."""
        done = self.here.run("sh", "-ec", script, cwd=cwd or self.folder, env=self.environment, timeout=120, **settings)
        assert done.returncode == status, "%s\nexit status %d\n%s" % (script, done.returncode, done.stdout)
        return done.stdout

    def serve(self, machine, cwd, *command):
        """Start a server, and wait until it serves; returns a function that ends it."""
        log = os.path.join(self.folder, "server.%d.log" % len(os.listdir(self.folder)))
        with open(log, "w") as output:
            process = subprocess.Popen(machine.command(*command, cwd=cwd), env=self.environment,
                                       stdin=subprocess.DEVNULL, stdout=output, stderr=output)

        def said():
            with open(log) as file:
                return file.read()

        def stop():
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(timeout=60) == 0 and "Traceback" not in said(), said()

        self.ends.callback(stop)
        until(lambda: "Ctrl-C ends it" in said() or process.poll() is not None, 60)
        assert process.poll() is None, "%s\n%s" % (" ".join(command), said())
        return stop


@contextlib.contextmanager
def running_house(python=sys.executable):
    """A House, where there can be one."""
    require("unshare", "nsenter", "ip", "openssl")
    require_root()
    with private_folder("house") as folder, contextlib.ExitStack() as ends:
        yield House(folder, python, ends)


def reload(pid, log, word):
    """Send SIGHUP to a daemon, and wait until its log has a word more often than before."""
    def count():
        with open(log) as file:
            return file.read().count(word)

    before = count()
    os.kill(pid, signal.SIGHUP)
    until(lambda: count() > before)
