"""The small parts of docs/read.html's figures: tiles, chips, shaded words, tables of tokens."""

import html
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from clip import IMAGE_MEAN, IMAGE_STD
from experiments.read_pair import Pairs
from support.page import data_uri

Observations = Sequence[SimpleNamespace]
NOUNS = "abcd"  # classes of colours: of the two drawn nouns, and of two words of section 4.1
HEAT = ((42, 16, 80), (92, 44, 130), (190, 70, 110), (244, 150, 80), (252, 240, 170))
GREY = ((0, 0, 0), (255, 255, 255))
STRIP = 0.35  # the largest number of a unit vector that has a colour of its own
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def at(variants: Sequence[str], tag: str = "span") -> str:
    """What differs between the snapshots; the page shows one of them."""
    if len(set(variants)) == 1:
        return variants[0]
    return "".join(f'<{tag} class="at at-{i}">{v}</{tag}>' for i, v in enumerate(variants))


def every(observations: Observations, draw: Callable[[SimpleNamespace], str]) -> str:
    return at([draw(o) for o in observations])


def value(name: str, number: float, digits: int = 3) -> str:
    """A number, in full for whoever checks it."""
    return f'<data data-name="{name}" value="{number!r}">{signed(number, digits)}</data>'


def signed(number: float, digits: int = 2) -> str:
    """A number with a true minus sign, and no negative zero."""
    return f"{round(number, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def readable(number: float) -> str:
    """A number as a reader writes it: 50,000, −2.5, 5 × 10⁻⁶."""
    if 0 < abs(number) < 1e-3:
        digits, power = f"{number:e}".split("e")
        return f"{float(digits):g} × 10{str(int(power)).translate(RAISED)}"
    return f"{number:,.10g}".replace("-", "\N{MINUS SIGN}")


def tile(array: np.ndarray | Tensor, alt: str, title: str = "", kind: str = "") -> str:
    """An image of the page above its title: (H, W) in [0, 1], or (H, W, 3) uint8."""
    array = np.asarray(array)
    if array.ndim == 2:
        array = array * 255
    source = data_uri(Image.fromarray(array.round().astype(np.uint8)), "WEBP")
    shown = f'<img class="px" src="{source}" alt="{html.escape(alt)}">'
    under = f'<span class="under">{title}</span>' if title else ""
    return f'<span class="tile {kind}">{shown}{under}</span>'


def row(*parts: str, kind: str = "") -> str:
    return f'<div class="row {kind}">{"".join(parts)}</div>'


def plot(height: int, alt: str, draw: Callable[[int], str]) -> str:
    """An SVG in two widths, so that its letters stay legible on a narrow screen."""
    return "".join(
        f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{alt}">'
        f"{draw(width)}</svg>"
        for kind, width in (("broad", 800), ("slim", 360))
    )


def chip(noun: str, j: int) -> str:
    return f'<b class="chip {NOUNS[j]}">{html.escape(noun)}</b>'


def pixels(image: Tensor) -> np.ndarray:
    """A normalised image (3, S, S) as it was before: (S, S, 3) uint8; what is beyond is cut off."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    return ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def heat(values: np.ndarray | Tensor, low: float, high: float) -> np.ndarray:
    """Values as colours from dark violet (low) to light yellow (high): (H, W) -> (H, W, 3)."""
    stops = np.array(HEAT)
    share = (np.asarray(values, np.float64) - low) / (high - low)
    places = np.linspace(0, 1, len(stops))
    colours = [np.interp(share.clip(0, 1), places, channel) for channel in stops.T]
    return np.stack(colours, axis=-1).round().astype(np.uint8)


def scale(low: float, high: float, what: str, colours: Sequence = HEAT) -> str:
    """A colour bar with its ends, of `heat` or of the grey of masks."""
    stops = ", ".join(f"rgb{tuple(colour)}" for colour in colours)
    bar = f'<i style="background: linear-gradient(90deg, {stops})"></i>'
    return f'<p class="scale">{what} {readable(low)} {bar} {readable(high)}</p>'


def strip(embedding: Tensor, alt: str) -> str:
    """A unit vector as a row of cells."""
    kind = f"{alt}, {len(embedding)} numbers"
    return tile(heat(embedding[None], -STRIP, STRIP), kind, kind="strip")


def tokens(pairs: Pairs) -> list[str]:
    """The first caption's tokens as text, from SOS to EOT."""
    decoder = open_clip.get_tokenizer("ViT-B-16-quickgelu").decoder
    ids = pairs.batch.caption_tokens[0]
    ids = ids[: int(ids.argmax()) + 1].tolist()
    return ["SOS", *(decoder[i].removesuffix("</w>") for i in ids[1:-1]), "EOT"]


def shaded(words: Sequence[str], masks: Sequence[float], j: int) -> str:
    """Words on their noun's colour, as strong as their masks."""
    spans = [
        f'<span class="word {NOUNS[j]}" style="--m:{m:.3f}">{html.escape(w)}</span>'
        for w, m in zip(words, masks)
    ]
    return f'<span class="words">{" ".join(spans)}</span>'


def blend(words: Sequence[str], mask: Sequence[float], j: int) -> str:
    """Every token as a box: filled as far as it is the caption's own, hatched where P^t stands."""
    boxes = [
        f'<span class="box {NOUNS[j]}" style="--m:{m:.3f}" title="{100 * m:.0f} % its own">'
        f"<span>{html.escape(w)}</span></span>"
        for w, m in zip(words, mask)
    ]
    return f'<span class="boxes">{"".join(boxes)}</span>'


def token_table(pairs: Pairs, name: str, rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows of cells below the caption's tokens; name: what a reader of the screen hears."""
    head = "".join(f"<th scope=col>{html.escape(t)}</th>" for t in tokens(pairs))
    body = "".join(f"<tr><th scope=row>{n}</th>{''.join(cells)}</tr>" for n, cells in rows)
    table = f'<table class="tokens"><tr><td></td>{head}</tr>{body}</table>'
    return f'<div class="scroll" role="group" aria-label="{name}">{table}</div>'
