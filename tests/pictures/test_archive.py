"""Pictures are read out of an archive, and nothing else: whatever its names and headers say."""

import os
import struct
import zipfile
import zlib

import pytest

from megatron_papo.errors import UserError
from megatron_papo.pictures import archive
from megatron_papo.pictures.archive import read_member, require_member
from megatron_papo.pictures.files import read_inside

NAME = "images/a/1.png"
CONTENT = bytes(range(256)) * 40


def made(path, *members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as stream:
        for name, content in members:
            stream.writestr(zipfile.ZipInfo(name), content, compression)
    return path


def test_a_member_is_read_in_place(tmp_path):
    path = made(tmp_path / "a_images.zip", (NAME, CONTENT), ("./images/a/2.png", b"two"), ("images/a/", b""))
    assert read_member(path, NAME) == CONTENT
    assert read_inside(path, "./" + NAME) == CONTENT
    assert read_member(path, "images/a/2.png") == b"two"
    assert os.listdir(tmp_path) == ["a_images.zip"]


def test_a_list_of_too_many_members(tmp_path, monkeypatch):
    """It is refused before it is read; control: a list below the limit, of an archive that is larger than it."""
    path = made(tmp_path / "a.zip", *((f"images/a/{number}.png", CONTENT) for number in range(40)))
    monkeypatch.setattr(archive, "LARGEST_LIST", 4_000)
    assert path.stat().st_size > 4_000 and read_member(path, "images/a/7.png") == CONTENT
    many = made(tmp_path / "many.zip", *((f"images/a/{number}.png", b"") for number in range(80)))
    with pytest.raises(
        UserError, match="many.zip: its list of members takes more than 0 MiB: download it again"
    ) as refusal:
        require_member(many, "images/a/7.png")
    assert len(refusal.value.lines) == 1


def test_a_changed_archive_is_read_again(tmp_path):
    path = made(tmp_path / "a.zip", (NAME, b"old"))
    assert read_member(path, NAME) == b"old"
    made(path, (NAME, b"newer"))
    assert read_member(path, NAME) == b"newer"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "images/../../secret", "a\\..\\secret", "", "a\0b"])
def test_names_that_lead_out_are_refused_or_never_matched(tmp_path, name):
    """Even where the archive has a member of that very name."""
    (tmp_path / "secret").write_bytes(b"secret")
    path = made(tmp_path / "a.zip", (name.replace("\0", "") or "x", b"trap"), (NAME, CONTENT))
    with pytest.raises(UserError, match="leads out of the archive"):
        read_member(path, name)
    assert read_member(path, NAME) == CONTENT  # control


def test_a_member_that_would_be_unpacked_elsewhere_is_not_there_under_its_plain_name(tmp_path):
    path = made(tmp_path / "a.zip", ("../images/a/1.png", b"trap"), ("/images/a/2.png", b"trap"))
    for name in (NAME, "images/a/2.png"):
        with pytest.raises(UserError, match="not in this archive"):
            read_member(path, name)


def test_two_members_of_one_name(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = made(tmp_path / "a.zip", (NAME, b"one"), (NAME, b"two"), ("images/b.png", b"b"))
    with pytest.raises(UserError, match="2 members of the archive have this name"):
        read_member(path, NAME)
    assert read_member(path, "images/b.png") == b"b"
    path = made(tmp_path / "b.zip", (NAME, b"one"), ("./" + NAME, b"two"))  # the same place, spelled otherwise
    with pytest.raises(UserError, match="2 members"):
        require_member(path, NAME)


def test_bombs_by_size_and_by_ratio(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LARGEST", 3 << 20)
    path = made(tmp_path / "a.zip", ("bomb.png", b"\0" * ((3 << 20) + 1)), ("fits.png", b"\0" * (3 << 20)))
    assert path.stat().st_size < 20_000
    with pytest.raises(UserError, match="more than 3 MiB, too large for a picture"):
        read_member(path, "bomb.png")
    assert len(read_member(path, "fits.png")) == 3 << 20


def lying(path, name, content, told: int):
    """Write an archive whose list and header tell another size than `name` has."""
    made(path, (name, content))
    data = bytearray(path.read_bytes())
    true = struct.pack("<I", len(content))
    for start, offset in ((data.index(b"PK\x03\x04"), 22), (data.index(b"PK\x01\x02"), 24)):
        assert data[start + offset : start + offset + 4] == true
        data[start + offset : start + offset + 4] = struct.pack("<I", told)
    path.write_bytes(data)
    return path


def test_headers_that_lie_about_the_size(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "LARGEST", 1 << 20)
    content = b"\0" * (8 << 20)
    with pytest.raises(UserError, match="damaged"):
        read_member(lying(tmp_path / "small.zip", NAME, content, told=100), NAME)
    with pytest.raises(UserError, match="more than 1 MiB"):
        read_member(lying(tmp_path / "large.zip", NAME, b"x", told=2 << 20), NAME)
    assert read_member(lying(tmp_path / "true.zip", NAME, b"x", told=1), NAME) == b"x"  # control


def test_what_a_member_unpacks_to_is_counted_while_it_is_read(monkeypatch):
    """Whatever a library promises of a header."""

    class Endless:
        taken = 0

        def read(self, size):
            Endless.taken += size
            return b"\0" * size

    monkeypatch.setattr(archive, "LARGEST", 5 << 20)
    with pytest.raises(UserError, match="more than 5 MiB"):
        archive._read_at_most(Endless(), "place")
    assert Endless.taken <= 6 << 20


def test_an_encrypted_member(tmp_path):
    path = made(tmp_path / "a.zip", (NAME, CONTENT))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x03\x04") + 6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="encrypted: unpack the archive"):
        read_member(path, NAME)


DAMAGES = {
    "empty": lambda data: b"",
    "cut in half": lambda data: data[: len(data) // 2],
    "no list": lambda data: data[: data.index(b"PK\x01\x02")],
    "a page of HTML": lambda data: b"<html>rate limited</html>",
    "a pointer of LFS": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
    "random": lambda data: os.urandom(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_archives_are_one_line(tmp_path, damage):
    path = made(tmp_path / "a.zip", (NAME, CONTENT))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError) as error:
        read_member(path, NAME)
    assert len(error.value.lines) == 1 and str(path) in str(error.value) and "download it again" in str(error.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_unpacks_all_at_once_is_refused_before_it_is_read(tmp_path, compression):
    """A member of a few bytes whose header lies about its size: zipfile would unpack all of it before it looks."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("images/a.png", bytes(1 << 20))
    with pytest.raises(UserError, match="packed in a way that is not read: pack the archive again"):
        read_member(path, "images/a.png")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_flipped_byte_is_an_error_or_the_same_content(tmp_path, compression):
    """The checksum of a member is checked; what the flip leaves whole may be read."""
    path = made(tmp_path / "a.zip", (NAME, os.urandom(120)), compression=compression)
    good, data = read_member(path, NAME), path.read_bytes()
    refused = 0
    for position in range(len(data)):
        flipped = tmp_path / f"{position}.zip"
        flipped.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
        try:
            assert read_member(flipped, NAME) == good
        except UserError:
            refused += 1
        flipped.unlink()
    assert refused > 150
    assert zlib.crc32(good) != 0  # control of the control: there is something to check


def test_no_archive_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_member(tmp_path / "gone.zip", NAME)
