"""Files from outside: what is no ordinary file is refused by name, without waiting for it."""

import os
import socket

import pytest

from trm_fast._files import open_file, read_file


@pytest.fixture(params=["a pipe", "a device", "a directory"])
def other(request, tmp_path):
    """Something that is no file, and what messages call it."""
    path = tmp_path / "x"
    if request.param == "a pipe":
        os.mkfifo(path)
    elif request.param == "a directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path, request.param


def test_what_is_no_ordinary_file_is_refused(other):
    path, kind = other
    with pytest.raises(ValueError, match=f"/x: an ordinary file is required; got {kind}$"):
        read_file(path)
    assert not [fd for fd in os.listdir("/proc/self/fd") if _target(fd) == str(path)]


def _target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return None


def test_a_socket_is_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "x"))
        with pytest.raises(OSError, match="x"):
            read_file(tmp_path / "x")


def test_links_are_followed_unless_they_shall_not_be(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_file(tmp_path / "b") == b"1"
    with pytest.raises(OSError, match="b"):
        read_file(tmp_path / "b", links=False)


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    assert read_file(tmp_path / "a", 3) == b"123"
    with pytest.raises(ValueError, match="/a: at most 2 bytes are read; got 3"):
        read_file(tmp_path / "a", 2)


def test_a_sparse_file_beyond_the_memory_is_not_read(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        try:
            file.truncate(1 << 43)
        except OSError as error:
            pytest.skip(f"this file system has no files of 8 TB: {error}")
    with pytest.raises(ValueError, match=r"/a: at most .* bytes are read; got 8796093022208"):
        read_file(tmp_path / "a")


def test_a_failing_disk_names_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    with pytest.raises(OSError) as caught, open_file(tmp_path / "a"):
        raise OSError(5, "Input/output error")
    assert caught.value.filename == str(tmp_path / "a")
