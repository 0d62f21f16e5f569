"""Files are written whole: to regular files, through links, into pipes and devices."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import ROOT

from config import UserError
from support.files import save_text, whole_file


def test_a_file_is_replaced_at_the_end_or_not_at_all(tmp_path):
    path = tmp_path / "new folder" / "metrics.json"
    save_text("ä", path)
    assert path.read_bytes() == "ä\n".encode()
    full = pytest.raises(UserError, match=r"metrics\.json could not be written \(No space left")
    with full, whole_file(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, os.strerror(28))
    assert path.read_text(encoding="utf-8") == "ä\n" and os.listdir(path.parent) == [path.name]


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    for target in ("disk/old.json", "disk/new.json"):
        (tmp_path / "disk/old.json").write_text("old")
        link = tmp_path / f"link to {Path(target).name}"
        link.symlink_to(target)
        save_text("new", link)
        assert link.is_symlink() and (tmp_path / target).read_text() == "new\n"


def test_a_name_as_long_as_names_can_be(tmp_path):
    for name in ("x" * 255, "漢" * 85):
        save_text("content", tmp_path / name)
        assert (tmp_path / name).read_text() == "content\n"
    with pytest.raises(UserError, match="could not be written .File name too long"):
        save_text("content", tmp_path / ("x" * 256))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_receives_the_content(tmp_path):
    path, received = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: received.append(path.read_text()))
    reader.start()
    text = "line\n" * 50_000  # more than a pipe holds
    save_text(text, path)
    reader.join(timeout=10)
    assert received == [text + "\n"] and path.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="needs root")
def test_a_device_stays_a_device(tmp_path):
    """As root, renaming onto /dev/null would make it a file for everybody."""
    path = tmp_path / "null"
    try:
        os.mknod(path, 0o20666, os.makedev(1, 3))
        path.write_text("x")
    except PermissionError:
        pytest.skip("no devices here")
    save_text("content", path)
    assert path.is_char_device()


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="no /dev/stdout here")
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1"])
def test_standard_output_in_the_order_of_printing(name, tmp_path):
    """Into a pipe, and into a file that the shell opened."""
    code = f"from support.files import save_text; print('1'); save_text('2', {name!r}); print('3')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n2\n3\n", done.stderr
    with open(tmp_path / "out.txt", "w") as file:
        file.write("first\n")
        file.flush()
        subprocess.run(command, cwd=ROOT, stdout=file, check=True)
    assert (tmp_path / "out.txt").read_text() == "first\n1\n2\n3\n"


@pytest.mark.parametrize("path", ["", ".", "a\0b"])
def test_no_name_is_no_file(path):
    with pytest.raises(UserError, match="a folder, not a file to write"):
        save_text("content", path)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no RAM disk here")
def test_a_ram_disk_holds_files_like_any_other():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for text in ("one", "two"):
            save_text(text, f"{folder}/new/a.json")
        assert Path(folder, "new/a.json").read_text() == "two\n"
