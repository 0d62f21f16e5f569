"""Folders of pairs and images as people have them: what is read, what is left out and said so."""

import collections
import io
import os
import pickle
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps, PngImagePlugin

import data
from config import TrainConfig, UserError
from data import BadSample, Folder, read_image, to_rgb

ORIENTATION = 0x0112


def photo(size=(48, 40)) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def put(folder: Path, *names: str) -> None:
    """Files: images that are whole, and captions that say their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".txt":
            path.write_bytes(f"a kite and a ball, {name}".encode(errors="replace"))
        else:
            path.write_bytes(encoded(photo(), "JPEG"))


def captions(folder: Folder) -> list[str]:
    order = folder.order(0, 0, 0, 1, folder.START)
    return sorted(folder.read(item, None)[1].split(", ")[1] for _, item in order)


# --- what is read of a folder ---------------------------------------------------------------------


def test_all_of_a_folder_is_read_or_counted(tmp_path):
    root, elsewhere = tmp_path / "pairs", tmp_path / "elsewhere"
    put(elsewhere, "far.jpg", "far.txt")
    put(root, "a.jpg", "a.txt", "b.JPG", "b.TXT", "c.tif", "c.txt", "v1.0 d.jpg", "v1.0 d.txt")
    put(root, "lonely.jpg", "deep/lonely.png", "deep/also.webp", "raw.heic", "raw.txt")
    (root / "more").symlink_to("../elsewhere")
    folder = Folder(str(root))
    assert captions(folder) == ["a.txt", "b.TXT", "c.txt", "far.txt", "v1.0 d.txt"]
    assert "; ".join(folder.found) == (
        "5 pairs; 3 images without a caption; 1 .txt file without an image of the same name"
    )
    assert folder.names == ["a.jpg", "b.JPG", "c.tif", "more/far.jpg", "v1.0 d.jpg"]


def test_what_systems_add_to_a_folder_is_no_data(tmp_path):
    put(tmp_path, "a.jpg", "a.txt", "._a.jpg", "._a.txt", "__MACOSX/b.jpg", "__MACOSX/b.txt")
    put(tmp_path, ".ipynb_checkpoints/c.jpg", ".ipynb_checkpoints/c.txt", "deep/._d.jpg")
    folder = Folder(str(tmp_path))
    assert folder.names == ["a.jpg"] and folder.found == ["1 pair"]


def test_a_folder_of_that_name_is_read_if_it_is_asked_for(tmp_path):
    put(tmp_path / "__MACOSX", "a.jpg", "a.txt")
    assert Folder(str(tmp_path / "__MACOSX")).found == ["1 pair"]


def test_links_that_lead_back_are_followed_once(tmp_path):
    root = tmp_path / "pairs"
    put(root, "a/1.jpg", "a/1.txt", "b/2.jpg", "b/2.txt")
    put(tmp_path, "beside.jpg", "beside.txt")
    (root / "a" / "self").symlink_to(".")
    (root / "a" / "root").symlink_to("../..")  # holds the link: what is beside the root stays out
    (root / "0").symlink_to("b")  # a second way to b: b's own name counts, as it did before
    (root / "c").symlink_to("nowhere")
    put(tmp_path / "other", "3.jpg", "3.txt")
    (tmp_path / "other" / "back").symlink_to(root)
    (root / "x").symlink_to(tmp_path / "other")
    (root / "y").symlink_to(tmp_path / "other")
    assert Folder(str(root)).names == ["a/1.jpg", "b/2.jpg", "x/3.jpg"]


def test_folders_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    put(tmp_path, "a.jpg", "a.txt", "locked/b.jpg", "locked/b.txt")
    scandir = os.scandir

    def refuse(path):  # as for anybody but root, who may read it all
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    locked = tmp_path / "locked"
    said = f"1 folder that cannot be read ({locked}: permission denied)"
    assert Folder(str(tmp_path)).found == ["1 pair", said]
    with pytest.raises(UserError, match="none of its 0 images.*1 folder that cannot be read"):
        Folder(str(locked))


def test_no_pair_at_all_says_what_there_is(tmp_path):
    put(tmp_path, "a.jpg", "b.jpg", "c.caption", "d.txt")
    with pytest.raises(UserError, match="none of its 2 images .*; 1 .txt file without an image"):
        Folder(str(tmp_path))


def test_home_and_names_too_long(tmp_path, monkeypatch):
    put(tmp_path, "photos/a.jpg", "photos/a.txt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~/photos").names == ["a.jpg"]
    with pytest.raises(UserError, match="no such folder"):
        Folder("long" * 2000)


def test_names_that_are_not_utf8(tmp_path):
    put(tmp_path, "caf\udce9.jpg", "caf\udce9.txt")
    folder = Folder(str(tmp_path))
    assert folder.names == ["caf\udce9.jpg"]
    ((_, item),) = folder.order(0, 0, 0, 1, folder.START)
    assert folder.read(item, None)[0].size == (48, 40)


def test_the_line_at_the_start(tmp_path, capsys, monkeypatch):
    put(tmp_path, "a.jpg", "a.txt", "b.jpg")
    data.open_source(TrainConfig(pairs=str(tmp_path)))
    assert capsys.readouterr().out == "1 pair; 1 image without a caption\n"
    data.open_source(TrainConfig(preset="shapes"))
    assert capsys.readouterr().out == "5000 drawn scenes\n"
    monkeypatch.setattr(data, "process_rank", lambda: 1)
    data.open_source(TrainConfig(pairs=str(tmp_path)))
    assert capsys.readouterr().out == ""


def test_files_that_cannot_be_opened_give_the_real_reason(tmp_path):
    put(tmp_path, "a.jpg", "a.txt", "b.jpg", "b.txt", "c.txt")
    folder = Folder(str(tmp_path))
    (tmp_path / "c.jpg").symlink_to("nowhere")
    (tmp_path / "a.txt").unlink()
    causes = collections.Counter()
    for source in (folder, Folder(str(tmp_path))):
        for _, item in source.order(0, 0, 0, 1, source.START):
            try:
                source.read(item, None)
            except BadSample as cause:
                causes[str(cause)] += 1
    assert causes == {"caption: no such file or directory": 1, "no such file or directory": 1}
    with pytest.raises(BadSample, match="^is a directory$"):
        read_image(tmp_path)


def test_permission_denied_is_no_corrupt_image(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(BadSample, match="^permission denied$"):
        read_image(tmp_path / "x.jpg")


# --- whole images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(photo(), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert np.array_equal(read_image(content, whole=True), expected)


def entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


def exif(*entries: bytes) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)


ROTATED = entry(ORIENTATION, 3, 1, 6)
BROKEN_EXIF = {  # and whether the orientation can still be read
    "no tiff at all": (b"Exif\0\0no tiff at all", False),
    "empty": (b"Exif\0\0", False),
    "cut off": (exif(ROTATED)[:20], False),
    "orientation in letters": (exif(entry(ORIENTATION, 2, 4, 0x636261)), False),
    "a value outside the file": (exif(ROTATED, entry(0x011A, 5, 1, 9_999_999)), True),
    "a folder outside the file": (exif(ROTATED, entry(0x8769, 4, 1, 9_999_999)), True),
    "an unknown type": (exif(ROTATED, entry(0x9999, 77, 1, 0)), True),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("damage", BROKEN_EXIF)
def test_broken_exif_is_no_broken_image(kind, damage):
    content, readable = BROKEN_EXIF[damage]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor a line on stderr for each of them
        image = read_image(encoded(photo(), kind, exif=content))
    assert image.size == ((40, 48) if readable else (48, 40))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_colour_profiles_of_megabytes(kind):
    assert read_image(encoded(photo(), kind, icc_profile=b"x" * 2_000_000)).size == (48, 40)


@pytest.mark.parametrize("zipped", [False, True])
def test_texts_of_megabytes(zipped):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=zipped)
    info.add_itxt("prompt", "x" * 2_000_000, zip=zipped)
    assert read_image(encoded(photo(), "PNG", pnginfo=info)).size == (48, 40)


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "one colour": {},
    "grey": {},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_without_its_end_marker_is_whole_and_one_without_data_is_not(kind):
    image = Image.new("RGB", (96, 80), "red") if kind == "one colour" else photo((96, 80))
    content = encoded(image.convert("L") if kind == "grey" else image, "JPEG", **JPEGS[kind])
    expected = read_image(content)
    for behind in (b"", b"\xff", b"\0" * 100):
        assert np.array_equal(read_image(content[:-2] + behind), expected)
    begin = content.index(b"\xff\xda") + 14  # of the first scan's data
    cuts = [*range(begin, len(content) - 2, 23), *range(len(content) - 9, len(content) - 2)]
    if kind == "restart markers":
        if tuple(map(int, PIL.__version__.split(".")[:2])) < (10, 2):
            pytest.skip("this Pillow writes no restart markers")
        found = [i for i in range(begin, len(content)) if content[i : i + 2] == b"\xff\xd0"]
        assert found
        cuts += [*found, *(i + 2 for i in found)]  # where nothing but whole rows is missing
    if kind == "progressive":  # but between two scans, where the image is coarse but whole
        scans = re.finditer(b"\xff[\xc4\xda]", content)
        between = {scan.start() + more for scan in scans for more in (0, 1)}
        cuts = [cut for cut in cuts if cut not in between]
    for cut in cuts:
        with pytest.raises(BadSample, match="corrupt image"):
            read_image(content[:cut])


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "PNG", "WEBP"])
def test_truncated_images_stay_bad(kind):
    content = encoded(photo(), kind)
    with pytest.raises(BadSample, match="corrupt image"):
        read_image(content[: len(content) * 2 // 3])


# --- numbers wider than a byte --------------------------------------------------------------------

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
GREY = (RAMP * 255).round()


def as_tiff(array: np.ndarray) -> np.ndarray:
    """What is read of a TIFF of this array, the first of three equal channels."""
    image = read_image(encoded(Image.fromarray(array), "TIFF"))
    red, green, blue = np.moveaxis(np.asarray(image, np.float64), -1, 0)
    assert (red == green).all() and (red == blue).all()
    return red


@pytest.mark.parametrize("white", [0.5, 1, 1.04, 3, 100, 255, 4095, 65_535, 1e6])
def test_floats_of_any_range(white):
    full = next((w for w in (1, 255, 65_535) if w / 10 < white <= w), white)
    assert np.abs(as_tiff((RAMP * white).astype(np.float32)) - GREY * white / full).max() <= 1


@pytest.mark.parametrize("white", [1, 255, 4095, 65_535, 10**6, 2**31 - 1])
def test_32_bit_integers_of_any_range(white):
    full = next((w for w in (255, 65_535) if w / 10 < white <= w), max(white, 255))
    ramp = (RAMP * white).round()
    assert np.abs(as_tiff(ramp.astype(np.int32)) - ramp / full * 255).max() <= 0.51


def test_16_bit_integers():
    assert (as_tiff((GREY * 257).astype(np.uint16)) == GREY).all()
    assert (as_tiff(GREY.astype(np.uint16)) == GREY).all()  # bytes in a wider type
    assert np.abs(as_tiff((RAMP * 4095).astype(np.uint16)) - GREY).max() <= 1  # 12 bits


def test_negative_values_nan_and_infinity():
    assert np.abs(as_tiff((RAMP * 2 - 1).astype(np.float32)) - GREY).max() <= 1
    array = RAMP.astype(np.float32)
    array[0, 0], array[0, 1], array[0, 2] = np.nan, np.inf, -np.inf
    grey = as_tiff(array)
    assert grey[0, :3].tolist() == [0, 255, 0] and np.abs(grey - GREY)[1:].max() <= 1
    for value in (np.nan, 0):
        assert (as_tiff(np.full((20, 20), value, np.float32)) == 0).all()
    assert (np.asarray(to_rgb(Image.new("F", (9, 9), 1.0))) == 255).all()


# --- the shapes world -----------------------------------------------------------------------------


def test_a_reader_of_the_shapes_world_keeps_no_scenes():
    world = data.ShapesWorld(5)
    first = world.read(3, np.random.default_rng(0))
    assert len(pickle.dumps(world)) < 1000
    again = world.read(3, np.random.default_rng(1))
    assert np.array_equal(first[0], again[0]) and first[1] != again[1]
