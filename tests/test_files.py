"""Files: a write is there whole or not at all, whatever fails; and the lock between processes."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from conftest import PATIENCE, TINYREG, until
from tinyreg import (
    Files, SharedLock, alone, is_at, list_directory, make_directories, read_file, sync_path,
)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "scratch").mkdir()
    return Files(str(tmp_path / "scratch"))


def content_of(path):
    return path.read_bytes() if path.exists() else None


class Tracer:
    """Stands before functions of os: notes each call with its path, and fails the N-th."""

    def __init__(self, monkeypatch, names, fail_at=None, error=errno.EIO):
        self.calls = []
        self.fail_at = fail_at
        self.error = error
        for name in names:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, function):
        def call(first, *others, **settings):
            path = os.readlink("/proc/self/fd/%d" % first) if isinstance(first, int) else os.fspath(first)
            self.calls.append((name, path))
            if len(self.calls) == self.fail_at:
                raise OSError(self.error, os.strerror(self.error), path)
            return function(first, *others, **settings)
        return call

    def position(self, name, path):
        return self.calls.index((name, str(path)))


STEPS = ["fsync", "rename", "mkdir", "open"]  # os.open opens the folders that are synced


# Writing

def test_write(files, tmp_path):
    path = tmp_path / "a" / "b" / "c"
    files.write(str(path), b"content")
    assert path.read_bytes() == b"content"
    files.write(str(path), b"other")
    assert path.read_bytes() == b"other"
    files.write(str(path), b"")
    assert path.read_bytes() == b""
    assert os.listdir(files.scratch) == []


def test_write_of_what_is_there_already_only_makes_it_young(files, tmp_path):
    path = tmp_path / "file"
    files.write(str(path), b"content")
    os.utime(str(path), (1, 1))
    before = path.stat()
    files.write(str(path), b"content")
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime > 1000


@pytest.mark.parametrize("old", [b"conten", b"content and more", b""])
def test_write_over_a_beginning_or_a_continuation(files, tmp_path, old):
    path = tmp_path / "file"
    path.write_bytes(old)
    files.write(str(path), b"content")
    assert path.read_bytes() == b"content"


def test_publish_replaces(files, tmp_path):
    path = tmp_path / "deep" / "file"
    for content in (b"one", b"two"):
        temporary = tmp_path / "scratch" / "x"
        temporary.write_bytes(content)
        files.publish(str(temporary), str(path))
        assert path.read_bytes() == content
        assert not temporary.exists()


def test_publish_of_nothing(files, tmp_path):
    with pytest.raises(FileNotFoundError):
        files.publish(str(tmp_path / "scratch" / "x"), str(tmp_path / "deep" / "file"))


def test_publish_into_a_folder_that_is_deleted_meanwhile(files, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    temporary = tmp_path / "scratch" / "x"
    temporary.write_bytes(b"content")
    rename, times = os.rename, []

    def rename_too_late(source, target):
        times.append(1)
        if len(times) < 3:
            os.rmdir(os.path.dirname(target))
        return rename(source, target)

    monkeypatch.setattr(os, "rename", rename_too_late)
    files.publish(str(temporary), str(path))
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("old", [None, b"old content"], ids=["new", "replaced"])
@pytest.mark.parametrize("folders", ["", "a/b"], ids=["folder is there", "folders are made"])
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_failure_at_each_step_of_a_write(tmp_path, old, folders, error):
    """After any failure the name has its old content or the new one, whole; and nothing is left over."""
    finished = False
    for step in range(1, 100):
        root = tmp_path / str(step)
        path = root / folders / "file"
        (root / "scratch").mkdir(parents=True)
        if old is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(old)
        files = Files(str(root / "scratch"))
        with pytest.MonkeyPatch.context() as patch:
            tracer = Tracer(patch, STEPS, fail_at=step, error=error)
            try:
                files.write(str(path), b"new content")
                finished = len(tracer.calls) < step
            except OSError as caught:
                assert caught.errno == error
        assert content_of(path) in (old, b"new content")
        assert os.listdir(files.scratch) == []
        if finished:
            break
        # And whoever tries again succeeds.
        files.write(str(path), b"new content")
        assert path.read_bytes() == b"new content"
    assert finished and step > 3
    assert path.read_bytes() == b"new content"


def test_a_disk_that_is_full_in_the_middle_of_a_write(files, tmp_path):
    """A real limit, on the size of files, in a process of its own."""
    path = tmp_path / "file"
    path.write_bytes(b"old content")
    program = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
import tinyreg
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    tinyreg.Files(sys.argv[2]).write(sys.argv[3], b"x" * 100000)
except OSError as error:
    print(error.errno)
"""
    shown = subprocess.run([sys.executable, "-c", program, os.path.dirname(TINYREG), files.scratch, str(path)],
                           stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    assert int(shown) == errno.EFBIG
    assert path.read_bytes() == b"old content"
    assert os.listdir(files.scratch) == []


# The order of system calls

def test_order_of_a_write(files, tmp_path, monkeypatch):
    """The bytes are durable before the name shows them, and the name before the write is reported."""
    tracer = Tracer(monkeypatch, ["fsync", "rename"])
    files.write(str(tmp_path / "file"), b"content")
    renamed = [position for position, call in enumerate(tracer.calls) if call[0] == "rename"]
    assert len(renamed) == 1
    temporary = tracer.calls[renamed[0]][1]
    assert os.path.dirname(temporary) == files.scratch
    assert tracer.position("fsync", temporary) < renamed[0]
    assert tracer.calls[renamed[0] + 1:] == [("fsync", str(tmp_path))]


def test_order_of_a_write_in_new_folders(files, tmp_path, monkeypatch):
    """Each new folder is durable in its parent before anything is made in it."""
    tracer = Tracer(monkeypatch, ["fsync", "rename", "mkdir"])
    files.write(str(tmp_path / "a" / "b" / "file"), b"content")
    made = [position for position, call in enumerate(tracer.calls) if call[0] == "mkdir"]
    last = {path: max(position for position in made if tracer.calls[position][1] == path)
            for path in (str(tmp_path / "a"), str(tmp_path / "a" / "b"))}
    first, second = last[str(tmp_path / "a")], last[str(tmp_path / "a" / "b")]
    renamed = next(position for position, call in enumerate(tracer.calls) if call[0] == "rename")
    assert ("fsync", str(tmp_path)) in tracer.calls[first:second]
    assert ("fsync", str(tmp_path / "a")) in tracer.calls[second:renamed]
    assert tracer.calls[-1] == ("fsync", str(tmp_path / "a" / "b"))


def test_a_folder_made_by_another_process_is_synced_too(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    tracer = Tracer(monkeypatch, ["fsync"])
    make_directories(str(tmp_path / "a"))
    assert tracer.calls == [("fsync", str(tmp_path))]


def test_a_file_that_is_there_already_is_made_durable(files, tmp_path, monkeypatch):
    """Another process may have renamed it a moment ago, and not have come to its fsync."""
    (tmp_path / "file").write_bytes(b"content")
    tracer = Tracer(monkeypatch, ["fsync", "rename"])
    files.write(str(tmp_path / "file"), b"content")
    assert tracer.calls == [("fsync", str(tmp_path))]


def test_order_of_a_removal(files, tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"content")
    tracer = Tracer(monkeypatch, ["fsync", "rename", "unlink", "rmdir"])
    files.remove(str(tmp_path / "a"))
    assert tracer.calls[:2] == [("rename", str(tmp_path / "a")), ("fsync", str(tmp_path))]


# Folders, removal, reading

@pytest.mark.parametrize("refusal, calls", [(None, ["full"]), (errno.ENOTSUP, ["full", "fsync"])])
def test_macos_is_asked_to_empty_the_cache_of_the_drive(tmp_path, monkeypatch, refusal, calls):
    """fsync leaves the bytes in it; a network's file system knows nothing else."""
    made = []

    def full_sync(descriptor, command):
        assert command == 51
        made.append("full")
        if refusal:
            raise OSError(refusal, "not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", full_sync)
    monkeypatch.setattr(os, "fsync", lambda descriptor: made.append("fsync"))
    sync_path(str(tmp_path))
    assert made == calls


def test_an_error_of_the_drive_s_cache_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor, command):
        raise OSError(errno.EIO, "the disk failed")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match="the disk failed"):
        sync_path(str(tmp_path))


def test_make_directories(tmp_path):
    for _ in range(2):
        make_directories(str(tmp_path / "a" / "b" / "c"))
        assert (tmp_path / "a" / "b" / "c").is_dir()


def test_make_directories_where_a_file_is(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(FileExistsError):
        make_directories(str(tmp_path / "a"))
    with pytest.raises(NotADirectoryError):
        make_directories(str(tmp_path / "a" / "b"))


def test_remove(files, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"content")
    (tmp_path / "file").write_bytes(b"content")
    files.remove(str(tmp_path / "a"))
    files.remove(str(tmp_path / "file"))
    assert os.listdir(str(tmp_path)) == ["scratch"]
    assert os.listdir(files.scratch) == []
    with pytest.raises(FileNotFoundError):
        files.remove(str(tmp_path / "a"))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_failure_at_each_step_of_a_removal(files, tmp_path, monkeypatch, step):
    """What is removed is there whole or not at all under its name."""
    (tmp_path / "a").mkdir()
    for name in "xyz":
        (tmp_path / "a" / name).write_bytes(b"content")
    with pytest.MonkeyPatch.context() as patch:
        Tracer(patch, ["rename", "fsync", "unlink"], fail_at=step)
        with contextlib.suppress(OSError):
            files.remove(str(tmp_path / "a"))
    assert list_directory(str(tmp_path / "a")) in ([], ["x", "y", "z"])


def test_read_file(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert read_file(str(tmp_path / "file")) == b"content"
    assert read_file(str(tmp_path / "file"), 3) == b"con"
    assert read_file(str(tmp_path / "none")) is None
    assert read_file(str(tmp_path / "file" / "below")) is None
    with pytest.raises(OSError):
        read_file(str(tmp_path))


# The lock

HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
import tinyreg
with getattr(tinyreg.SharedLock(sys.argv[2]), sys.argv[3])():
    print("has it", flush=True)
    sys.stdin.readline()
"""


class Holder:
    """A process that takes the lock, says so, and gives it up when it is told to."""

    def __init__(self, path, how):
        self.process = subprocess.Popen([sys.executable, "-c", HOLDER, os.path.dirname(TINYREG), path, how],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, universal_newlines=True)
        self.has_it = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        if self.process.stdout.readline():
            self.has_it.set()

    def end(self, kill=False):
        if kill:
            self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate("\n", timeout=PATIENCE)


@pytest.fixture
def hold(tmp_path):
    holders = []

    def start(how):
        holders.append(Holder(str(tmp_path / "lock"), how))
        return holders[-1]

    yield start
    for holder in holders:
        if holder.process.poll() is None:
            holder.process.kill()
        holder.process.wait(timeout=PATIENCE)
        holder.reader.join(timeout=PATIENCE)
        holder.process.stdin.close()
        holder.process.stdout.close()


def waits_in_flock(holder):
    """Wait until a process is blocked by the lock (Linux shows what it waits for in the list of locks)."""
    def waits():
        assert not holder.has_it.is_set()
        with open("/proc/locks") as locks:
            return any("->" in line and " %d " % holder.process.pid in line for line in locks)
    return until(waits)


def test_many_share(hold):
    first, second = hold("shared"), hold("shared")
    assert first.has_it.wait(PATIENCE) and second.has_it.wait(PATIENCE)


@pytest.mark.parametrize("inside, outside", [("alone", "shared"), ("alone", "alone"), ("shared", "alone")])
@pytest.mark.parametrize("kill", [False, True], ids=["given up", "killed"])
def test_alone_is_alone(hold, inside, outside, kill):
    first = hold(inside)
    assert first.has_it.wait(PATIENCE)
    second = hold(outside)
    assert waits_in_flock(second)
    first.end(kill)
    assert second.has_it.wait(PATIENCE)


def test_who_wants_it_alone_is_next(hold):
    """Sharers that come later wait behind it, so that a stream of them can't keep it out."""
    inside = hold("shared")
    assert inside.has_it.wait(PATIENCE)
    alone = hold("alone")
    assert waits_in_flock(alone)
    late = hold("shared")
    assert waits_in_flock(late)
    inside.end()
    assert alone.has_it.wait(PATIENCE)
    assert not late.has_it.is_set()
    alone.end()
    assert late.has_it.wait(PATIENCE)


def test_threads_of_one_process_exclude_each_other(tmp_path):
    lock = SharedLock(str(tmp_path / "lock"))
    counter, seen = [0], []

    def work():
        for _ in range(50):
            with lock.alone():
                counter[0] += 1
                seen.append(counter[0])
                counter[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert seen == [1] * 200


def test_an_error_inside_gives_the_lock_up(tmp_path, hold):
    with pytest.raises(KeyError):
        with SharedLock(str(tmp_path / "lock")).alone():
            raise KeyError
    assert hold("alone").has_it.wait(PATIENCE)


def test_a_child_process_does_not_inherit_the_lock(tmp_path, hold):
    with SharedLock(str(tmp_path / "lock")).alone():
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert hold("alone").has_it.wait(PATIENCE)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=PATIENCE)


def test_whether_a_file_is_still_there_is_not_answered_by_what_nfs_remembers(tmp_path, monkeypatch):
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"")
    other.write_bytes(b"")
    with open(str(path), "rb") as file:
        assert is_at(file, str(path))
        remembered = os.stat(str(path))
        monkeypatch.setattr(os, "stat", lambda path: remembered)
        os.rename(str(other), str(path))
        assert not is_at(file, str(path))


def test_a_lock_file_goes_with_its_holder_and_still_keeps_others_out(tmp_path):
    """Each waiter finds the file that it waited for gone, and must not take that for having the lock."""
    path, inside, most = str(tmp_path / "lock"), [], []

    def work():
        for _ in range(50):
            with alone(path):
                inside.append(1)
                os.listdir(str(tmp_path))  # lets others run
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(most) == 400 and set(most) == {1}
    assert os.listdir(str(tmp_path)) == []
