"""Files are written whole or not at all."""

import contextlib
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from config import UserError


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end: never a half-written file.

    Whatever goes wrong, the previous file stays and the temporary one goes. A symbolic link stays
    and its target is replaced; a device or a pipe receives the content. Raises UserError.
    """
    path = Path(path)
    refuse_folder(path)
    temporary = None
    try:
        if takes_a_stream(path):
            handle, name = tempfile.mkstemp()
            os.close(handle)
            temporary = Path(name)
            yield temporary
            send(temporary, path)
        else:
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A long name cannot become longer.
            temporary = target.with_name(f"{target.name[:40]}.{os.getpid()}.tmp")
            yield temporary
            os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def takes_a_stream(path: Path) -> bool:
    """Whether a path is a device, a pipe or a socket, or one of the names of open files, such as
    /dev/stdout: these are written to, and never replaced by a file."""
    if re.fullmatch(r"/dev/(stdout|stderr|fd/\d+)|/proc/[^/]+/fd/\d+", str(path)):
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def send(file: Path, stream: Path) -> None:
    """Write the content of a file to a device or a pipe, after what was printed before."""
    sys.stdout.flush()
    target: str | int = os.fspath(stream)
    for opened in (1, 2):  # /dev/stdout and its like: what is printed later comes after it
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(stream), os.fstat(opened)):
                target = os.dup(opened)
                break
    with open(file, "rb") as content, open(target, "ab", buffering=0) as output:
        while part := content.read(1 << 16):
            while part:
                part = part[output.write(part) :]


def refuse_folder(path: str | Path) -> None:
    """Raises UserError for a folder, or no name at all, where a file is to be written."""
    if not Path(path).name or "\0" in str(path) or os.path.isdir(path):
        raise UserError(f"{path}: a folder, not a file to write")


def save_text(text: str, path: str | Path) -> None:
    """Write a UTF-8 text file with a newline at its end. Raises UserError."""
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def printable(name: str) -> str:
    """A file's name as text that every terminal takes: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
