"""Crashes: kill -9 at any moment, and a power cut that drops whatever was not made durable."""

import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from conftest import TINYREG, Client, run_tinyreg, until
from samples import CONFIG, image
from tinyreg import OCI_MANIFEST, Digest, Directory, RegistryError, digest_folders


def put_manifest(client, name, tag, content):
    """The status of the answer to it."""
    return client.ask("PUT", "/v2/%s/manifests/%s" % (name, tag), content, content_type=OCI_MANIFEST).status


def check_store(store):
    """What must hold whatever happened: returns {(name, tag): digest}."""
    for digest in store.digests():
        with open(store.layout.blob_path(digest), "rb") as file:
            assert Digest.of(file.read(), digest.algorithm) == digest
    tags = {}
    for name in store.repositories():
        for digest, folder in digest_folders(store.layout.repository_path(name), "_layers"):
            if os.path.exists(os.path.join(folder, "link")):
                store.open_blob(name, digest).close()
        for digest, folder in digest_folders(store.layout.repository_path(name), "_manifests", "revisions"):
            if os.path.exists(os.path.join(folder, "link")):
                for blob in store.manifest(name, digest).blobs:
                    store.open_blob(name, blob.digest).close()
        for tag in os.listdir(os.path.join(store.layout.repository_path(name), "_manifests", "tags")) if os.path.isdir(
                os.path.join(store.layout.repository_path(name), "_manifests", "tags")) else []:
            if os.path.exists(os.path.join(store.layout.tag_path(name, tag), "current", "link")):
                tags[name, tag] = store.resolve(name, tag)
                store.manifest(name, tags[name, tag])
    return tags


# kill -9

def push_until_told(server, number, acknowledged, unsure, stop):
    """Push images that share layers with those of others; note what was acknowledged, and what may have been."""
    dice = random.Random(number)
    while not stop.is_set():
        name = "app%d" % dice.randrange(2)
        tag = "%d-%d" % (number, dice.randrange(10))
        layers = [b"layer %d" % dice.randrange(20) * 5000 for _ in range(2)]
        serial = {"serial": "%d %d" % (number, dice.randrange(10 ** 9))}
        content = json.dumps(image(layers, annotations=serial)).encode()
        unsure[name, tag] = unsure.get((name, tag), ()) + (Digest.of(content),)
        try:
            client = Client(server)
            if all(client.upload(name, part).status == 201 for part in layers + [CONFIG]):
                if put_manifest(client, name, tag, content) == 201:
                    acknowledged[name, tag] = unsure[name, tag] = (Digest.of(content),)
            client.close()
        except OSError:
            time.sleep(0.02)


def test_kill_at_any_moment(server):
    """A dozen times kill -9 in the middle of parallel pushes: nothing that was acknowledged is missing or wrong."""
    acknowledged, unsure, stop = {}, {}, threading.Event()
    threads = [threading.Thread(target=push_until_told, args=(server, number, acknowledged, unsure, stop))
               for number in range(4)]
    dice = random.Random(7)
    for thread in threads:
        thread.start()
    try:
        for _ in range(12):
            had = len(acknowledged)
            time.sleep(dice.uniform(0.1, 0.5))
            server.restart(signal.SIGKILL)
            assert len(acknowledged) >= had
        until(lambda: len(acknowledged) > 5)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    server.stop(signal.SIGKILL)
    store = Directory(server.root)
    tags = check_store(store)
    assert len(acknowledged) > 5
    for key in acknowledged:
        assert tags[key] in unsure[key], key
    shown = run_tinyreg("verify", "--root", server.root)
    assert shown.returncode == 0, shown.stdout


def test_an_upload_goes_on_after_kill(server):
    content = os.urandom(3 << 20)
    client = Client(server)
    location = client.ask("POST", "/v2/app/blobs/uploads/")[1]["Location"]
    assert client.ask("PATCH", location, content[:2 << 20])[0] == 202
    server.restart(signal.SIGKILL)
    client = Client(server)
    status, headers, _ = client.ask("GET", location)
    assert (status, headers["Range"]) == (204, "0-%d" % ((2 << 20) - 1))
    place = {"Content-Range": "%d-%d" % (2 << 20, (3 << 20) - 1)}
    assert client.ask("PATCH", location, content[2 << 20:], **place)[0] == 202
    assert client.ask("PUT", "%s?digest=%s" % (location, Digest.of(content)))[0] == 201
    assert client.ask("GET", "/v2/app/blobs/" + Digest.of(content))[2] == content


def test_kill_of_gc(server, tmp_path):
    """gc without grace is killed again and again while it deletes; no manifest ever lacks a blob."""
    client = Client(server)
    store = Directory(server.root)
    layers = [b"layer %d" % number for number in range(150)]
    keep = json.dumps(image(layers[:40])).encode()
    for part in layers + [CONFIG]:
        assert client.upload("app", part).status == 201
    assert put_manifest(client, "app", "keep", keep) == 201

    def count_links():
        return len(list(digest_folders(store.layout.repository_path("app"), "_layers")))

    def count_blobs():
        return len(list(store.digests()))

    def kill_when_fewer(count, left):
        process = subprocess.Popen([sys.executable, TINYREG, "gc", "--quiet", "--grace", "0", "--root", server.root])
        until(lambda: count() < left, process=process)
        process.kill()
        process.wait()

    for count, left in [(count_links, 149), (count_links, 100), (count_links, 45),
                        (count_blobs, 149), (count_blobs, 100), (count_blobs, 45)]:
        kill_when_fewer(count, left)
        assert check_store(store) == {("app", "keep"): Digest.of(keep)}
    assert run_tinyreg("gc", "--grace", "0", "--root", server.root).returncode == 0
    assert len(list(store.digests())) == 42
    assert os.listdir(store.files.scratch) == []


# A power cut

class Disk:
    """A file system that remembers which of the operations on it are durable: bytes after fsync of their file; names
    after fsync of a folder that they came to or went from. A rename happens whole or not at all."""

    def __init__(self):
        self.nodes = [{}]      # a folder's entries {name: node}, or a file's bytes
        self.synced = {}       # {node: its durable bytes}
        self.changes = []      # [durable?, [(folder, name, node or None), ...]]

    def find(self, path):
        node = 0
        for part in path:
            node = self.nodes[node].get(part) if isinstance(self.nodes[node], dict) else None
            if node is None:
                return None
        return node

    def change(self, *entries):
        self.changes.append([False, entries])
        for folder, name, node in entries:
            if node is None:
                self.nodes[folder].pop(name, None)
            else:
                self.nodes[folder][name] = node

    def make(self, path, content):
        self.nodes.append(content)
        self.change((self.find(path[:-1]), path[-1], len(self.nodes) - 1))

    def rename(self, source, target):
        node = self.find(source)
        self.change((self.find(source[:-1]), source[-1], None), (self.find(target[:-1]), target[-1], node))

    def sync(self, path):
        node = self.find(path)
        if isinstance(self.nodes[node], bytes):
            self.synced[node] = self.nodes[node]
        else:
            for change in self.changes:
                change[0] = change[0] or any(folder == node for folder, _, _ in change[1])

    def after_cut(self, keep):
        """What is there after a power cut, as {path: bytes, or None for a folder}. `keep` says of each operation that
        was not durable whether it came through."""
        folders = {}
        for durable, entries in self.changes:
            if durable or keep():
                for folder, name, node in entries:
                    folders.setdefault(folder, {})[name] = node
        found = {}

        def walk(folder, path):
            for name, node in folders.get(folder, {}).items():
                if node is None:
                    continue
                if isinstance(self.nodes[node], dict):
                    found[path + (name,)] = None
                    walk(node, path + (name,))
                else:
                    content, synced = self.nodes[node], self.synced.get(node, b"")
                    if content != synced and not keep():
                        content = synced + bytes(len(content) - len(synced)) if keep() else synced
                    found[path + (name,)] = content

        walk(0, ())
        return found


CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+|\?)")
TRACED = ("openat,open,creat,write,pwrite64,mkdir,mkdirat,rename,renameat,renameat2,unlink,unlinkat,rmdir,"
          "fsync,fdatasync,sendto")


def read_trace(path, root):
    """[(operation, path or bytes, ...)] of the successful calls below a folder, and the answers that were sent."""
    operations, unfinished = [], {}
    string = r'"((?:[^"\\]|\\.)*)"'
    place = r"(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"

    def text(quoted):
        return ast.literal_eval('b"%s"' % quoted)

    def below(folder, name):
        full = os.path.join(folder or "/", text(name).decode()) if name is not None else folder
        return tuple(full[len(root) + 1:].split("/")) if full.startswith(root + "/") else () if full == root else None

    with open(path, encoding="latin-1") as trace:
        for line in trace:
            pid = line.split()[0]
            if "<unfinished ...>" in line:
                unfinished[pid] = line.split(" <unfinished ...>")[0]
                continue
            resumed = re.match(r"^\d+ +<\.\.\. \w+ resumed>(.*)", line)
            if resumed:
                line = unfinished.pop(pid) + resumed.group(1) + "\n"
            call = CALL.match(line)
            if not call or call.group(3).startswith("-"):
                continue
            name, arguments = call.group(1), call.group(2)
            if name in ("sendto", "write") and re.match(r'\d+<(?:socket|TCP)[^>]*>+, "HTTP/1.1 2\d\d', arguments):
                operations.append(("answer",))
            elif name in ("write", "pwrite64"):
                found = re.match(r"\d+<([^>]*)>(?:\(deleted\))?, " + string, arguments)
                where = below(found.group(1), None) if found else None
                if where:
                    operations.append(("write", where, text(found.group(2))))
            elif name in ("fsync", "fdatasync"):
                where = below(re.match(r"\d+<([^>]*)>", arguments).group(1), None)
                if where is not None:
                    operations.append(("sync", where))
            elif name in ("open", "openat", "creat"):
                found = re.match(place + string, arguments)
                where = below(found.group(1), found.group(2))
                if where and ("O_CREAT" in arguments or "O_TRUNC" in arguments):
                    operations.append(("create", where, "O_TRUNC" in arguments))
            elif name.startswith("rename"):
                found = re.match(place + string + ", " + place + string, arguments)
                operations.append(("rename", below(*found.group(1, 2)), below(*found.group(3, 4))))
            elif name in ("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir"):
                found = re.match(place + string, arguments)
                where = below(*found.group(1, 2))
                if where:
                    operations.append((name.replace("at", ""), where))
    return operations


def perform(disk, operation):
    kind, path = operation[0], operation[1]
    if kind == "create":
        node = disk.find(path)
        if node is None:
            disk.make(path, b"")
        elif operation[2]:
            disk.nodes[node] = b""
    elif kind == "write" and disk.find(path) is not None:
        disk.nodes[disk.find(path)] += operation[2]  # nobody here writes elsewhere than at the end
    elif kind == "mkdir":
        disk.make(path, {})
    elif kind == "rename":
        disk.rename(path, operation[2])
    elif kind in ("unlink", "rmdir"):
        disk.change((disk.find(path[:-1]), path[-1], None))
    elif kind == "sync" and disk.find(path) is not None:
        disk.sync(path)


def write_out(state, root):
    shutil.rmtree(root, ignore_errors=True)
    os.mkdir(root)
    for path, content in sorted(state.items()):
        full = "/".join((root,) + path)
        if content is None:
            os.mkdir(full)
        else:
            with open(full, "wb") as file:
                file.write(content)


OLDER = ("older", "older2", "older3", "older4")


def record(root, trace):
    """Run a server, push, move a tag, delete, push again and collect garbage, all under strace. Returns what each
    acknowledged request promised: {(name, tag): digest} after each answer, and at the end of it all."""
    strace = ["strace", "-f", "-y", "-s", "10000000", "-e", "trace=" + TRACED, "-e", "signal=none", "-o"]
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE="1")
    server = subprocess.Popen(strace + [trace + ".1", sys.executable, TINYREG, "serve", "--root", root, "--quiet",
                                        "--listen", "127.0.0.1:0"],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=environment)
    try:
        for line in server.stdout:
            if "http://" in line:
                port = int(re.search(r":(\d+)", line.split("//")[1]).group(1))
                break
        client = Client("http://127.0.0.1:%s" % port)
        promised = [{}]

        def did(status, *wanted, **change):
            assert status in wanted
            promised.append(dict(promised[-1], **change))

        def push(name, tag, layers):
            content = json.dumps(image(layers)).encode()
            for part in layers + (CONFIG,):
                status, headers, _ = client.ask("POST", "/v2/%s/blobs/uploads/" % name)
                did(status, 202)
                did(client.ask("PATCH", headers["Location"], part)[0], 202)
                did(client.ask("PUT", "%s?digest=%s" % (headers["Location"], Digest.of(part)))[0], 201,
                    **{"blob %s %s" % (name, Digest.of(part)): True})
            did(put_manifest(client, name, tag, content), 201, **{"%s:%s" % (name, tag): Digest.of(content)})
            return Digest.of(content)

        push("app", "older", (b"layer zero",))
        for tag in OLDER[1:]:
            content = json.dumps(image((b"layer zero",), annotations={"of": tag})).encode()
            did(put_manifest(client, "app", tag, content), 201, **{"app:" + tag: Digest.of(content)})
        first = push("app", "latest", (b"layer one", b"layer two" * 5000))
        push("app", "latest", (b"layer one", b"layer three"))
        did(client.ask("POST", "/v2/deep/er/blobs/uploads/?from=app&mount=" + Digest.of(b"layer one"))[0], 201,
            **{"blob deep/er " + Digest.of(b"layer one"): True})
        push("deep/er", "v1", (b"layer one",))
        did(client.ask("POST", "/v2/nest/blobs/uploads/")[0], 202)  # a repository above another
        push("nest/er", "v1", (b"layer one",))
        push("app", "gone", (b"layer four",))
        did(client.ask("DELETE", "/v2/app/manifests/gone")[0], 202, **{"app:gone": None})
        did(client.ask("DELETE", "/v2/app/manifests/" + first)[0], 202)
        client.close()
    finally:
        for child in open("/proc/%d/task/%d/children" % (server.pid, server.pid)).read().split():
            os.kill(int(child), signal.SIGKILL)
        server.communicate(timeout=60)
    for number, option in enumerate((["--untagged"], ["--keep", "1"]), 2):
        command = [sys.executable, TINYREG, "gc", "--grace", "0", "--root", root] + option
        subprocess.run(strace + ["%s.%d" % (trace, number)] + command, check=True, stdout=subprocess.DEVNULL,
                       env=environment)
    return promised + [dict(promised[-1], **{"app:" + tag: None for tag in OLDER})]


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_a_power_cut_after_each_operation(tmp_path, no_fsync):
    """After each system call of pushes, deletions and gc: with everything written, with nothing but what was synced,
    and with random halves of the rest."""
    root = str(tmp_path / "registry")
    os.mkdir(root)
    trace = str(tmp_path / "trace")
    promised = record(root, trace)
    operations = read_trace(trace + ".1", root)
    assert operations.count(("answer",)) == len(promised) - 2
    operations += read_trace(trace + ".2", root) + read_trace(trace + ".3", root)
    disk, answers, dice, seen = Disk(), 0, random.Random(1), set()
    copy = str(tmp_path / "copy")
    for number, operation in enumerate(operations):
        if operation == ("answer",):
            answers += 1
        else:
            perform(disk, operation)
        now, after = promised[answers], promised[min(answers + 1, len(promised) - 1)]
        collecting = answers == len(promised) - 2
        for keep in (lambda: True, lambda: False, lambda: dice.random() < 0.5, lambda: dice.random() < 0.8):
            state = disk.after_cut(keep)
            seal = hashlib.sha256(repr((answers, sorted(state.items(), key=str))).encode()).digest()
            if seal in seen:
                continue
            seen.add(seal)
            write_out(state, copy)
            where = "after operation %d: %r" % (number, operation[:2])
            try:
                check_promises(Directory(copy), now, after, collecting)
            except (AssertionError, RegistryError) as error:
                pytest.fail("%s: %r" % (where, error))
    assert len(seen) > 300
    assert "app:older" in now and set(check_store(Directory(copy))) == {("app", "latest"), ("deep/er", "v1"),
                                                                              ("nest/er", "v1")}


def check_promises(store, now, after, collecting):
    tags = check_store(store)
    for key, value in now.items():
        if key.startswith("blob "):
            if not collecting:  # then those that nothing refers to may be gone
                store.open_blob(key.split()[1], Digest(key.split()[2])).close()
        else:
            assert tags.pop(tuple(key.split(":")), None) in (value, after[key]), key
    for key, value in tags.items():
        assert after.get(":".join(key)) == value
