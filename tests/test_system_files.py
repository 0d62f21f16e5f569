"""What systems add to folders and archives is told from data by its name alone."""

import pytest

from support.system_files import added_by_system


@pytest.mark.parametrize(
    "path",
    [
        "._0.jpg",
        "./._0.jpg",
        "a/b/._0.txt",
        "__MACOSX/0.jpg",
        "__MACOSX/photos/._0.jpg",
        ".ipynb_checkpoints/0-checkpoint.jpg",
        "photos/.ipynb_checkpoints/0.png",
        ".DS_Store",
        "a/Thumbs.db",
        "thumbs.db",
        "desktop.ini",
        "$RECYCLE.BIN/0.jpg",
        "photos\\._0.jpg",
        "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
        ".Trash-1000/files/0.jpg",
    ],
)
def test_files_of_systems(path):
    assert added_by_system(path)


@pytest.mark.parametrize(
    "path",
    ["0.jpg", "./0.jpg", "../0.jpg", "_0.jpg", ".hidden/0.jpg", "a.b/0.jpg",
     "MACOSX/0.jpg", "my Thumbs.db.jpg", "d [v1]/0.jpg", "caf\udce9.jpg", ""],
)  # fmt: skip
def test_files_of_users(path):
    assert not added_by_system(path)
