"""Disks that refuse: one line, and nothing finished is lost."""

import errno
import os
import stat
import subprocess
import sys

import pytest

from megatron_papo.errors import UserError
from megatron_papo.run import output_lock, room
from megatron_papo.run.manifest import read_manifest
from megatron_papo.run.output_lock import OutputLock
from megatron_papo.run.room import refusal, replace_file, require_room
from megatron_papo.run.stage_output import MARK, StageOutput
from tests.helpers import ROOT


def make(directory, work=lambda out: None):
    out = StageOutput("stage1_prepare_data", directory, {}, {})
    with out:
        (out.partial / "file").write_text("x")
        work(out)
    return out


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wrapped(*_, **__):
    try:
        no_space()
    except OSError as error:
        raise RuntimeError("the writer of a library failed") from error


@pytest.mark.parametrize("work", [no_space, wrapped])
def test_a_full_disk_inside_a_stage_is_one_line(tmp_path, work):
    with pytest.raises(UserError, match="data: cannot write: No space left on device: .*free space") as said:
        make(tmp_path / "data", work)
    assert len(said.value.lines) == 1 and list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError):  # control: another fault is none of the disk's
        make(tmp_path / "data", lambda out: 1 / 0)


def test_a_full_disk_anywhere_in_a_command():
    code = (
        "import errno, os\nfrom megatron_papo.run.command_line import run\n"
        "def main(): raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), '/place/file')\nrun(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: /place/file: cannot write (Disk quota exceeded): free space there, or choose another place\n"
    )


def test_words_of_libraries():
    assert refusal(RuntimeError("unable to write to file </torch_1>: No space left on device (28)"))
    assert refusal(ValueError("no number")) is None


@pytest.mark.parametrize("code, is_published", [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_directories_that_cannot_be_synced(tmp_path, monkeypatch, code, is_published):
    """As CIFS, FUSE and Ceph say; of a file it would be a fault."""
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(room.os, "fsync", fsync)
    if is_published:
        make(tmp_path / "data")
        assert read_manifest(tmp_path / "data") is not None
    else:
        with pytest.raises(UserError, match="cannot write"):
            make(tmp_path / "data")


def test_a_file_that_cannot_be_synced_is_not_published(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(room.os, "fsync", fsync)
    with pytest.raises(UserError, match="cannot write"):
        make(tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named_with_the_cure(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(output_lock.fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"data.lock: the file system \w+ at /.* has no locks .*mount it"):
        OutputLock(tmp_path / "data")


def test_room_is_asked_for(tmp_path):
    require_room(tmp_path / "not" / "there", 1)
    with pytest.raises(UserError, match=r"needs 1,000,000,000.0 GB \(a checkpoint\), .* free: free space"):
        require_room(tmp_path / "not" / "there", 10**18, "a checkpoint")


def test_a_small_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    replace_file(tmp_path / "f", "one")
    monkeypatch.setattr(room.os, "fsync", no_space)
    with pytest.raises(UserError, match="cannot write .No space"):
        replace_file(tmp_path / "f", "two")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("kind", ["files", "file", "link"])
def test_a_partial_of_somebody_else_is_left_alone(tmp_path, kind):
    partial = tmp_path / "data.partial"
    if kind == "files":
        partial.mkdir()
        (partial / "thesis.tex").write_text("x")
    elif kind == "file":
        partial.write_text("x")
    else:
        (tmp_path / "theirs").mkdir()
        partial.symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="data.partial: is in the way, and not of this pipeline's making"):
        make(tmp_path / "data")
    assert partial.exists() and not (tmp_path / "data.lock").exists()


def test_a_partial_of_ours_is_replaced(tmp_path):
    partial = tmp_path / "data.partial"
    (partial / "deep").mkdir(parents=True)
    (partial / MARK).touch()
    (partial / "deep" / "stale").write_text("x")
    make(tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["file", "manifest.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
