import errno
import hashlib
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys

import pytest

from nanochat_native.runtime.files import is_temporary, lock_folder, sha256_file, temporaries_of, write_atomically


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "result.json"
    path.write_bytes(b"old")
    return path


@pytest.mark.parametrize(
    ("content", "written"),
    [
        (b"\x00\xff", b"\x00\xff"),
        ("ä\r\n", "ä\r\n".encode()),
        ("", b""),
        (lambda file: [file.write(b"in "), file.write(b"parts")], b"in parts"),
    ],
)
def test_content_replaces_the_file_and_nothing_else_stays(path, content, written):
    for target in (path, path.with_name("new.json")):
        write_atomically(target, content)
        assert target.read_bytes() == written
    assert sorted(os.listdir(path.parent)) == ["new.json", "result.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_gets_the_permissions_of_the_umask(path, mask):
    before = os.umask(mask)
    try:
        write_atomically(path, "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_link_is_replaced_and_its_target_stays(path):
    link = path.with_name("link")
    link.symlink_to(path)
    write_atomically(link, "new")
    assert not link.is_symlink()
    assert (link.read_text(), path.read_text()) == ("new", "old")


def broken_writer(file):
    file.write(b"half")
    raise ZeroDivisionError


def test_an_error_of_the_writing_function_leaves_the_old_file(path):
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, broken_writer)
    assert {p.name: p.read_text() for p in path.parent.iterdir()} == {"result.json": "old"}


def calls(step, action):
    """Return a replacement for os.fsync or os.replace that runs `action` at the call number `step`."""
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    order = [("fsync", 1), ("replace", 1), ("fsync", 2)]
    count = {"fsync": 0, "replace": 0}

    def patched(name):
        def call(*args):
            count[name] += 1
            if (name, count[name]) == order[step]:
                action()
            return real[name](*args)

        return call

    return {name: patched(name) for name in real}


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# After the rename, which is the second step, the new file is the one that is whole.
@pytest.mark.parametrize(("step", "whole"), [(0, "old"), (1, "old"), (2, "new")])
def test_an_error_at_any_step_leaves_a_whole_file_and_no_temporary_one(path, monkeypatch, step, whole):
    with monkeypatch.context() as patch:
        for name, call in calls(step, no_space).items():
            patch.setattr(os, name, call)
        with pytest.raises(OSError, match="No space left on device") as error:
            write_atomically(path, "new")
    assert (error.value.errno, error.value.filename, error.value.filename2) == (errno.ENOSPC, str(path), None)
    assert {p.name: p.read_text() for p in path.parent.iterdir()} == {"result.json": whole}


def test_a_write_that_the_system_cuts_off_leaves_the_old_file(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_text() for p in path.parent.iterdir()} == {"result.json": "old"}


def die_at(path, step):
    for name, call in calls(step, lambda: os.kill(os.getpid(), signal.SIGKILL)).items():
        setattr(os, name, call)
    write_atomically(path, "new")


@pytest.mark.parametrize(("step", "whole"), [(0, "old"), (1, "old"), (2, "new")])
def test_kill_9_at_any_step_leaves_a_whole_file(path, step, whole):
    process = multiprocessing.get_context("forkserver").Process(target=die_at, args=(path, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == whole
    left = [other for other in path.parent.iterdir() if other != path]
    assert len(left) == (whole == "old")
    assert all(map(is_temporary, left))
    write_atomically(path, "after")
    assert path.read_text() == "after"


def test_only_temporary_files_are_taken_for_such(path):
    assert not any(is_temporary(path.with_name(name)) for name in ("result.json", "a.tmp", ".tmp-step_000001", ".tmpx"))


def test_file_and_folder_are_flushed_around_the_rename(path, monkeypatch):
    order = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        target = os.readlink(f"/proc/self/fd/{descriptor}")
        order.append("folder" if target == str(path.parent) else "file")
        if order[-1] == "file":
            assert os.fstat(descriptor).st_size == len("new")
        real_fsync(descriptor)

    def replace(*args):
        order.append("rename")
        real_replace(*args)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(path, "new")
    assert order == ["file", "rename", "folder"]


def test_a_missing_folder_is_named_by_the_path_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        write_atomically(tmp_path / "nowhere" / "a.json", "text")
    assert error.value.filename == str(tmp_path / "nowhere" / "a.json")


def test_sha256_of_a_file(path):
    path.write_bytes(bytes(range(256)) * 5000)
    assert sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_module_needs_no_torch():
    script = "import sys, nanochat_native.runtime.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_a_folder_is_no_error(path, monkeypatch, number):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_temporaries_are_those_of_the_file_alone(path):
    left = [path.with_name(name) for name in (".result.json.01234567.tmp", ".result.json.89abcdef.tmp")]
    others = (".result.json.tmp", ".result.json.0123456.tmp", ".other.json.01234567.tmp", "result.json.01234567.tmp")
    for name in (*left, *map(path.with_name, others)):
        name.touch()
    assert sorted(temporaries_of(path)) == left


def test_a_folder_is_locked_until_its_descriptor_is_closed(tmp_path):
    lock = lock_folder(tmp_path / "a/b")
    with pytest.raises(BlockingIOError):
        lock_folder(tmp_path / "a/b")
    os.close(lock)
    os.close(lock_folder(tmp_path / "a/b"))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        lock_folder(tmp_path / "file")
    if os.path.isdir("/proc/self/fd"):
        before = os.listdir("/proc/self/fd")
        lock = lock_folder(tmp_path / "a")
        with pytest.raises(BlockingIOError):
            lock_folder(tmp_path / "a")
        os.close(lock)
        assert os.listdir("/proc/self/fd") == before, "no descriptor stays open"
