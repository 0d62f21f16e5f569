"""Images of what the model does: overlays, legends, coloured captions, contact sheets."""

import colorsys
import functools
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.files import whole_file

INK, PAPER = (32, 33, 36), (255, 255, 255)
Colour = tuple[int, int, int]


def palette(count: int) -> list[Colour]:
    """Well separated colours: hues by the golden angle, in three brightnesses."""
    colours = []
    for i in range(count):
        rgb = colorsys.hsv_to_rgb((0.02 + i * 0.381966) % 1, 0.85, (0.95, 0.75, 0.55)[i % 3])
        colours.append(tuple(round(255 * value) for value in rgb))
    return colours


# --- letters --------------------------------------------------------------------------------------

# Where systems keep their fonts: Linux, macOS, Windows.
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "$WINDIR/Fonts",
    "$LOCALAPPDATA/Microsoft/Windows/Fonts",
)
# Taken first among the system's fonts, and last.
_PLAIN = ("dejavusans.", "notosans-regular.", "notosanscjk-regular.", "arial.", "segoeui.")
_STYLED = ("bold", "italic", "oblique", "mono", "condensed", "light", "serif", "thin", "black")
_NEVER_ASSIGNED = "\U0010ffff"  # no font has it: drawn as what stands for missing letters


@functools.cache
def set_in_type(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """What is drawn of a text, and the font that has its letters.

    Pillow's own font if it has all of them, else one of the system's; else base letters stand for
    letters with accents. What no font has is drawn as a box, and said on stderr, once.
    """
    text = unicodedata.normalize("NFC", text)  # names of files on a Mac hold accents apart
    fonts = (None, *_system_fonts())
    for path in fonts:
        if not _missing(path, text):
            return text, _load(path, size)
    forms = {path: _with_base_letters(path, text) for path in fonts}
    best = min(forms, key=lambda path: len(_missing(path, forms[path])))
    if boxes := _missing(best, forms[best]):
        _say_boxes(boxes)
    return forms[best], _load(best, size)


@functools.lru_cache(maxsize=16)  # each holds a file open
def _load(path: str | None, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@functools.cache
def _system_fonts() -> list[str]:
    """Font files, plain ones first."""
    found = set()
    for folder in FONT_FOLDERS:
        for parent, _, names in os.walk(os.path.expandvars(os.path.expanduser(folder))):
            fonts = (name for name in names if name.lower().endswith((".ttf", ".ttc", ".otf")))
            found |= {os.path.join(parent, name) for name in fonts}

    def rank(path: str) -> tuple:
        name = os.path.basename(path).lower()
        return not name.startswith(_PLAIN), any(style in name for style in _STYLED), name, path

    return sorted(found, key=rank)


def _missing(path: str | None, text: str) -> str:
    """The letters of a text that a font lacks."""
    return "".join(letter for letter in text if not letter.isspace() and not _has(path, letter))


@functools.cache
def _has(path: str | None, letter: str) -> bool:
    """Whether a font has a letter: it draws another shape than for one that no font has."""
    try:
        ours, box = (_load(path, 20).getmask(form) for form in (letter, _NEVER_ASSIGNED))
    except Exception:  # a damaged font of the system, or one of fixed sizes (coloured emoji)
        return False
    return ours.size != box.size or bytes(ours) != bytes(box)


def _with_base_letters(path: str | None, text: str) -> str:
    """A text in which base letters stand for the letters that a font lacks, if it has these."""
    letters = []
    for letter in text:
        if not letter.isspace() and not _has(path, letter):
            base = _base_letters(letter)
            letter = letter if _missing(path, base) else base
        letters.append(letter)
    return "".join(letters)


def _base_letters(letter: str) -> str:
    """What is like a letter: "a" for "à", "o" for "ø", "ss" for "ß", "-" for any dash, "" for
    what is not seen."""
    found = ""
    for part in unicodedata.normalize("NFKD", letter):
        category, name = unicodedata.category(part), unicodedata.name(part, "")
        latin = re.match(r"LATIN (CAPITAL|SMALL) LETTER (DOTLESS )?([A-Z]{1,2})( WITH|$)", name)
        if category in ("Mn", "Cf"):  # accents, joiners, variants of emoji
            continue
        elif part == "ß":
            found += "ss"
        elif category == "Pd":
            found += "-"
        elif latin:
            found += latin[3] if latin[1] == "CAPITAL" else latin[3].lower()
        else:
            found += part
    return found


_said_boxes: list[str] = []


def _say_boxes(letters: str) -> None:
    if not _said_boxes:
        print(
            f"no font of this system has {' '.join(dict.fromkeys(letters))}, so there are boxes in "
            "the figures (https://fonts.google.com/noto has fonts of all scripts)",
            file=sys.stderr,
        )
    _said_boxes.append(letters)


def _length(text: str, size: int) -> float:
    text, writing = set_in_type(text, size)
    return writing.getlength(text)


def _write(pen: ImageDraw.ImageDraw, x: float, y: float, text: str, ink: Colour, size: int) -> None:
    """Text whose line begins at (x, y), all fonts on one baseline."""
    text, writing = set_in_type(text, size)
    ascent, _ = _load(None, size).getmetrics()
    pen.text((x, y + ascent), text, ink, writing, anchor="ls")


# --- images ---------------------------------------------------------------------------------------


def overlay(
    image: Image.Image, labels: np.ndarray, colours: Sequence[Colour], opacity: float = 0.6
) -> Image.Image:
    """Tint an image by a label map and outline the regions.

    labels: (H, W), -1 = untouched, i = colours[i]. Untouched pixels fade towards grey.
    """
    pixels = np.asarray(image.convert("RGB"), np.float32)
    grey = pixels.mean(-1, keepdims=True).repeat(3, -1)
    table = np.array([*colours, (0, 0, 0)], np.float32)
    tinted = pixels * (1 - opacity) + table[labels] * opacity
    result = np.where((labels >= 0)[..., None], tinted, 0.5 * pixels + 0.35 * grey + 38)
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    result[edge] = 255
    return Image.fromarray(result.clip(0, 255).astype(np.uint8))


def enlargement(image: Image.Image) -> int:
    """How many times larger a small image is shown."""
    return max(1, round(400 / max(image.size)))


def label_maps(
    image: Image.Image,
    maps: Sequence[np.ndarray],
    names: Sequence[str],
    hidden: Sequence[int],
    note: str = "",
) -> Image.Image:
    """An image beside label maps of it, (H, W) each, above a legend of the classes in them.

    hidden: class indices that stay untinted; note: a line at the legend's end.
    """
    present = [i for i in np.unique(np.stack(maps)) if i not in hidden]
    colours, row_of = palette(len(present)), np.full(256, -1)
    row_of[present] = np.arange(len(present))
    row = beside(image, *(overlay(image, row_of[labels], colours) for labels in maps))
    entries = [names[i] for i in present] + ([note] if note else [])
    return below(row, legend(entries, [*colours, PAPER], row.width))


def legend(
    names: Sequence[str], colours: Sequence[Colour], width: int, size: int = 14
) -> Image.Image:
    """Names beside patches of their colours, in as many lines as the width needs."""
    places, x, y = [], size // 2, size // 2
    for name in names:
        needed = int(_length(name, size)) + round(2.6 * size)
        if x + needed > width and x > size // 2:
            x, y = size // 2, y + round(1.6 * size)
        places.append((x, y))
        x += needed
    image = Image.new("RGB", (width, y + round(1.8 * size)), PAPER)
    pen = ImageDraw.Draw(image)
    for name, colour, (x, y) in zip(names, colours, places):
        pen.rectangle((x, y + 2, x + size, y + size + 2), fill=colour)
        _write(pen, x + round(1.4 * size), y, name, INK, size)
    return image


def coloured_text(
    words: Sequence[tuple[str, Colour | None]],
    width: int,
    letters: int = 14,
    height: int = 0,
    behind: bool = False,
) -> Image.Image:
    """Words set in lines of a width, centred in a height if the lines leave room.

    A word with a colour is underlined with it, or set on a patch of it (`behind`).
    """
    space = _length(" ", letters)
    lines: list[list[tuple[float, str, Colour | None]]] = [[]]
    x = margin = letters / 2
    for word, colour in words:
        length = _length(word, letters)
        if x + length > width - margin and lines[-1]:
            lines.append([])
            x = margin
        lines[-1].append((x, word, colour))
        x += length + space
    step = round(1.7 * letters)
    height = max(height, round(step * len(lines) + margin))
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    y = max(margin / 2, (height - step * len(lines)) / 2)
    for line in lines:
        for x, word, colour in line:
            end = x + _length(word, letters)
            if colour is not None:
                top, bottom = (-0.1, 1.4) if behind else (1.25, 1.45)
                pen.rectangle((x, y + top * letters, end, y + bottom * letters), fill=colour)
            ink = PAPER if behind and colour and sum(colour) < 380 else INK
            _write(pen, x, y, word, ink, letters)
        y += step
    return image


def heat(image: Image.Image, scores: np.ndarray) -> Image.Image:
    """A heat map over the image in grey: scores (H, W) in [0, 1], from dark blue to yellow."""
    stops = np.array([(0, 0, 60), (90, 20, 120), (200, 60, 80), (250, 150, 40), (250, 250, 120)])
    places = np.linspace(0, 1, len(stops))
    colour = np.stack([np.interp(scores, places, channel) for channel in stops.T], axis=-1)
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    return Image.fromarray((0.3 * grey + 0.7 * colour).astype(np.uint8))


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], cell: int = 160, gap: int = 6
) -> Image.Image:
    """Images in rows under column titles; each is scaled to a cell x cell square (nearest)."""
    head = 28
    width = gap + len(titles) * (cell + gap)
    sheet = Image.new("RGB", (width, head + len(rows) * (cell + gap)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = gap + column * (cell + gap)
        title, writing = set_in_type(title, 15)
        pen.text((x + cell / 2, head / 2), title, INK, writing, anchor="mm")
        for row, images in enumerate(rows):
            image = images[column]
            if image.size != (cell, cell):
                image = image.resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(image, (x, head + row * (cell + gap)))
    return sheet


def in_bands(
    columns: Sequence[Sequence[Image.Image]], in_a_band: int, gap: int = 16
) -> Image.Image:
    """Columns of as many images side by side, so many in a band, the bands one below the other.

    What stands in one row of a band is centred in it; a line parts the bands.
    """
    in_a_band = min(in_a_band, len(columns))
    side = max(image.width for images in columns for image in images)
    width, rows = gap + in_a_band * (side + gap), []
    for start in range(0, len(columns), in_a_band):
        if start:
            rows.append(Image.new("RGB", (width, 2), (200, 200, 204)))
        rows.append(Image.new("RGB", (width, gap), PAPER))
        for images in zip(*columns[start : start + in_a_band]):
            height = max(image.height for image in images)
            row = Image.new("RGB", (width, height + gap), PAPER)
            for i, image in enumerate(images):
                x = gap + i * (side + gap) + (side - image.width) // 2
                row.paste(image, (x, (height - image.height) // 2))
            rows.append(row)
    return below(*rows)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG. Raises UserError."""
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")


def indexed(labels: np.ndarray, colours: Sequence[int]) -> Image.Image:
    """A label map (H, W) of ids up to 255 as an indexed PNG; colours: flat r, g, b by id."""
    image = Image.fromarray(labels.astype(np.uint8)).convert("P")
    image.putpalette(list(colours))
    return image


def beside(*images: Image.Image) -> Image.Image:
    """Images side by side, top edges aligned."""
    height = max(image.height for image in images)
    joined = Image.new("RGB", (sum(image.width for image in images), height), PAPER)
    x = 0
    for image in images:
        joined.paste(image, (x, 0))
        x += image.width
    return joined


def below(*images: Image.Image) -> Image.Image:
    """Images one below the other, left edges aligned."""
    width = max(image.width for image in images)
    joined = Image.new("RGB", (width, sum(image.height for image in images)), PAPER)
    y = 0
    for image in images:
        joined.paste(image, (0, y))
        y += image.height
    return joined
