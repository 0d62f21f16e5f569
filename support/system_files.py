"""Files that systems put beside a user's own: they are no data anywhere."""

import re

# In lower case: macOS, Windows, Jupyter, Synology's and QNAP's disks, Linux.
_NAMES = {
    "__macosx", ".ds_store", ".appledouble", ".spotlight-v100", ".fseventsd", ".temporaryitems",
    ".trashes", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin",
    "system volume information", ".ipynb_checkpoints", "@eadir", ".@__thumb", "lost+found",
}  # fmt: skip
_PREFIXES = ("._", ".trash-", ".nfs")  # AppleDouble files (a Mac's second half of a file), ...


def added_by_system(path: str) -> bool:
    """Whether a name in a relative path is one that a system adds: `._0.jpg`, `__MACOSX/0.jpg`.

    path: below the folder or inside the archive that the user named, as a string; the folders
    above are the user's choice, whatever they are called.
    """
    parts = [part.lower() for part in re.split(r"[/\\]", path)]
    return any(part in _NAMES or part.startswith(_PREFIXES) for part in parts)
