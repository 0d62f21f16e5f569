"""Files are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from config import UserError


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end: never a half-written file.

    Whatever goes wrong, the previous file stays and the temporary one goes. Raises UserError.
    """
    path = Path(path)
    refuse_folder(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def refuse_folder(path: str | Path) -> None:
    """Raises UserError for a folder where a file is to be written."""
    if not Path(path).name or Path(path).is_dir():
        raise UserError(f"{path}: a folder, not a file to write")


def save_text(text: str, path: str | Path) -> None:
    """Write a text file with a newline at its end. Raises UserError."""
    with whole_file(path) as temporary:
        temporary.write_text(text + "\n")
