"""Overlays, legends and sheets hold the pixels they should."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import draw


def test_overlay_tints_by_label_and_leaves_the_rest():
    image = Image.new("RGB", (6, 4), (100, 100, 100))
    labels = np.full((4, 6), -1)
    labels[:, 3:] = 1
    red, blue = (200, 0, 0), (0, 0, 200)
    pixels = np.asarray(draw.overlay(image, labels, [red, blue], opacity=0.5))
    assert pixels[2, 5].tolist() == [50, 50, 150]
    assert pixels[2, 3].tolist() == [255, 255, 255]  # the outline
    assert len(set(pixels[2, 0].tolist())) == 1  # grey stays grey


def test_palette_colours_differ():
    assert len(set(draw.palette(171))) == 171


RED, BLUE, GREEN = (200, 0, 0), (0, 0, 200), (0, 200, 0)


def test_joined_images_lie_where_they_should():
    a, b = Image.new("RGB", (30, 20), RED), Image.new("RGB", (10, 40), BLUE)
    row, column = draw.beside(a, b), draw.below(a, b)
    assert row.size == (40, 40) and column.size == (30, 60)
    assert row.getpixel((29, 19)) == RED and row.getpixel((30, 39)) == BLUE
    assert row.getpixel((29, 20)) == draw.PAPER  # below the shorter one
    assert column.getpixel((29, 19)) == RED and column.getpixel((9, 20)) == BLUE
    assert column.getpixel((10, 20)) == draw.PAPER


def test_a_sheet_has_every_image_in_its_cell():
    images = [
        [Image.new("RGB", (8, 8), colour) for colour in row] for row in ((RED, BLUE), (GREEN, RED))
    ]
    sheet = draw.contact_sheet(images, ["one", "two"], cell=50, gap=5)
    assert sheet.size == (5 + 2 * 55, 28 + 2 * 55)
    for row, colours in enumerate(((RED, BLUE), (GREEN, RED))):
        for column, colour in enumerate(colours):
            left, top = 5 + column * 55, 28 + row * 55
            assert sheet.getpixel((left, top)) == sheet.getpixel((left + 49, top + 49)) == colour
            assert sheet.getpixel((left + 50, top)) == draw.PAPER
    titles = np.asarray(sheet)[:28] != draw.PAPER
    assert titles[:, 5:55].any() and titles[:, 60:110].any()


def test_a_legend_has_a_patch_beside_every_name():
    colours = draw.palette(10)
    legend = np.asarray(draw.legend(["a", "much longer name"] * 5, colours, 120))
    assert legend.shape[1] == 120 and legend.shape[0] > 60  # several lines
    tops = []
    for colour in colours:
        rows, columns = np.nonzero((legend == colour).all(-1))
        assert len(rows) == 15 * 15  # a square of 14 pixels, its edge included
        tops.append((rows.min(), columns.min()))
    assert tops == sorted(tops)  # in reading order


def test_label_maps_stand_beside_the_image_and_hidden_classes_stay_untinted():
    image = Image.new("RGB", (40, 30), (100, 100, 100))
    label = np.zeros((30, 40), np.uint8)
    label[:, 20:] = 2
    label[:5] = 255
    found = np.asarray(draw.label_maps(image, [label, label * 0 + 2], ["none", "a", "b"], (255, 0)))
    (colour,) = draw.palette(1)
    tint = [round(0.4 * 100 + 0.6 * value) for value in colour]
    assert found[:30, :40].reshape(-1, 3).tolist() == [[100, 100, 100]] * 1200
    assert abs(found[20, 40 + 30].astype(int) - tint).max() <= 1
    assert len(set(found[20, 40 + 5].tolist())) == 1 and len(set(found[2, 40 + 30].tolist())) == 1
    assert abs(found[20, 80 + 5].astype(int) - tint).max() <= 1
    assert (found[30:] == colour).all(-1).sum() == 15 * 15  # one class in the legend


def test_columns_stand_in_bands_and_rows_are_centred():
    columns = [[Image.new("RGB", (40, 20), c), Image.new("RGB", (20, 10), c)] for c in (RED, BLUE)]
    columns.append([Image.new("RGB", (20, 40), GREEN), Image.new("RGB", (40, 30), GREEN)])
    sheet = draw.in_bands([columns[0], columns[2], columns[1]], in_a_band=2, gap=4)
    first, second = 4 + 44 + 34, 4 + 24 + 14
    assert sheet.size == (4 + 2 * 44, first + 2 + second)  # 2: the line between them
    pixels = np.asarray(sheet)
    for colour, boxes in (
        (RED, [(4, 4 + 10, 40, 20), (4 + 10, 4 + 44 + 10, 20, 10)]),
        (GREEN, [(48 + 10, 4, 20, 40), (48, 4 + 44, 40, 30)]),
        (BLUE, [(4, first + 6, 40, 20), (14, first + 6 + 24, 20, 10)]),
    ):
        where = np.zeros(pixels.shape[:2], bool)
        for x, y, width, height in boxes:
            where[y : y + height, x : x + width] = True
        assert np.array_equal((pixels == colour).all(-1), where), colour
    one = draw.in_bands(columns[:1], in_a_band=2, gap=4)
    assert one.width == 48  # no room for what is not there


def test_text_is_underlined_in_its_colour():
    image = np.asarray(draw.coloured_text([("a", None), ("kite", (0, 200, 0))], 100, height=40))
    assert (image == (0, 200, 0)).all(-1).sum() > 20


# --- letters --------------------------------------------------------------------------------------


@pytest.fixture
def fonts_in(monkeypatch):
    """Let fonts be looked for in these folders alone, and nothing be said yet."""

    def look(*folders):
        monkeypatch.setattr(draw, "FONT_FOLDERS", tuple(map(str, folders)))
        monkeypatch.setattr(draw, "_said_boxes", [])
        draw._system_fonts.cache_clear()
        draw.set_in_type.cache_clear()

    yield look
    draw._system_fonts.cache_clear()
    draw.set_in_type.cache_clear()


def box_of(path, size: int = 20) -> bytes:
    return bytes(draw._load(path, size).getmask("\U0010ffff"))


@pytest.mark.parametrize(
    "text, drawn",
    [
        ("dog", "dog"),
        ("chien à poil", "chien a poil"),
        ("jalapeño", "jalapeno"),
        (unicodedata.normalize("NFD", "jalapeño"), "jalapeno"),  # names of files on a Mac
        ("Übergröße", "Ubergrosse"),
        ("Łódź, smørrebrød, ærø", "Lodz, smorrebrod, aero"),
        ("fine – “ball”…", "fine - “ball”…"),
        ("a\u200bb\ufe0f", "ab"),
    ],
)
def test_without_fonts_base_letters_are_drawn(text, drawn, fonts_in, tmp_path, capsys):
    fonts_in(tmp_path)
    assert draw.set_in_type(text, 20)[0] == drawn
    named, plain = (draw.legend([name], [RED], 400, 20) for name in (text, drawn))
    assert np.array_equal(np.asarray(named), np.asarray(plain))
    assert capsys.readouterr().err == ""


def test_letters_that_no_font_has_are_said_once(fonts_in, tmp_path, capsys):
    fonts_in(tmp_path)
    draw.legend(["漢字 à", "🎈", "dog"], [RED, BLUE, GREEN], 400)
    draw.coloured_text([("собака", None), ("dog", None)], 400)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "no font of this system has 漢 字," in said[0]
    assert draw.set_in_type("漢字 à", 20)[0] == "漢字 a"


def system_font() -> Path | None:
    """A font with Latin letters that Pillow's own lacks."""
    found = (path for path in draw._system_fonts() if not draw._missing(path, "àñßŁ"))
    return next(map(Path, found), None)


@pytest.mark.skipif(system_font() is None, reason="no font with accents here")
def test_a_font_of_the_system_has_the_letters(fonts_in, tmp_path, capsys):
    source = system_font()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / source.name).write_bytes(source.read_bytes())
    (tmp_path / "aaa.ttf").write_text("no font")  # is passed over
    fonts_in(tmp_path / "nowhere", tmp_path)
    for text in ("chien à poil", "jalapeño", "Übergröße", "Łódź"):
        drawn, writing = draw.set_in_type(text, 20)
        assert (drawn, Path(writing.path).name) == (text, source.name)
        for letter in text.replace(" ", ""):
            assert bytes(writing.getmask(letter)) != box_of(writing.path), letter
    assert draw.set_in_type("dog", 20)[1].getname()[0] == draw._load(None, 20).getname()[0]
    assert capsys.readouterr().err == ""


def test_words_of_several_fonts_stand_on_one_baseline():
    """ "n" ends on the same row whatever font the other letters of its word need."""
    rows = []
    for word in ("n", "ñ"):
        image = np.asarray(draw.coloured_text([(word, None)], 60, 30)).min(-1)
        rows.append(np.nonzero(image < 128)[0].max())
    assert abs(int(rows[0]) - int(rows[1])) <= 1
