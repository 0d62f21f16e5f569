"""Overlays, legends and sheets hold the pixels they should."""

import numpy as np
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


def test_sheets_and_joined_images_have_the_right_size():
    a, b = Image.new("RGB", (30, 20)), Image.new("RGB", (10, 40))
    assert draw.beside(a, b).size == (40, 40) and draw.below(a, b).size == (30, 60)
    sheet = draw.contact_sheet([[a, b], [b, a]], ["one", "two"], cell=50, gap=5)
    assert sheet.size == (5 + 2 * 55, 28 + 2 * 55)
    legend = draw.legend(["a", "much longer name"] * 5, draw.palette(10), 120)
    assert legend.width == 120 and legend.height > 60  # several lines


def test_text_is_underlined_in_its_colour():
    image = np.asarray(draw.coloured_text([("a", None), ("kite", (0, 200, 0))], 100, height=40))
    assert (image == (0, 200, 0)).all(-1).sum() > 20
