"""The small parts of the page's figures: tiles, chips, shaded words, tables of tokens."""

import html
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip import IMAGE_MEAN, IMAGE_STD
from docs.book.observe import Observation, Observations
from support.page import data_uri

NOUNS = "ab"  # classes of colours of the two drawn nouns
HEAT = ((42, 16, 80), (92, 44, 130), (190, 70, 110), (244, 150, 80), (252, 240, 170))
STRIP = 0.35  # the largest number of a unit vector that has a colour of its own


def at(variants: Sequence[str], tag: str = "span") -> str:
    """What differs between the steps; the page shows one of them."""
    if len(set(variants)) == 1:
        return variants[0]
    return "".join(f'<{tag} class="at at-{i}">{v}</{tag}>' for i, v in enumerate(variants))


def every(seen: Observations, draw: Callable[[Observation], str], tag: str = "span") -> str:
    return at([draw(o) for o in seen], tag)


def signed(number: float, digits: int = 2) -> str:
    """A number with a true minus sign, and no negative zero."""
    return f"{round(number, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def value(name: str, number: float, digits: int = 3) -> str:
    """A number, in full for whoever checks it."""
    return f'<data data-name="{name}" value="{number!r}">{signed(number, digits)}</data>'


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


def scale(low: float, high: float, what: str) -> str:
    """The colour bar of `heat` with its ends."""
    stops = ", ".join(f"rgb{colour}" for colour in HEAT)
    bar = f'<i style="background: linear-gradient(90deg, {stops})"></i>'
    return f'<p class="scale">{what} {low:g} {bar} {high:g}</p>'.replace("-0", "\N{MINUS SIGN}0")


def strip(embedding: Tensor, alt: str) -> str:
    """A unit vector as a row of cells."""
    kind = f"{alt}, {len(embedding)} numbers"
    return tile(heat(embedding[None], -STRIP, STRIP), kind, kind="strip")


def two_strips(noun: str, j: int, first: Tensor, second: Tensor, names: Sequence[str]) -> str:
    """Two embeddings of a noun one above the other, and their cosine."""
    said = [f"{name} of {noun}" for name in names]
    letters = "".join(f"<i>{name}</i>" for name in names)
    return (
        f'<div class="vectors"><span>{chip(noun, j)}</span><span class="names">{letters}</span>'
        f'<span class="strips">{strip(first, said[0])}{strip(second, said[1])}</span>'
        f"<span>cosine {signed(float(first @ second))}</span></div>"
    )


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


def token_table(tokens: Sequence[str], name: str, rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows of cells below a caption's tokens; name: what a screen reader says."""
    head = "".join(f"<th scope=col>{html.escape(t)}</th>" for t in tokens)
    body = "".join(f"<tr><th scope=row>{n}</th>{''.join(cells)}</tr>" for n, cells in rows)
    table = f'<table class="tokens"><tr><td></td>{head}</tr>{body}</table>'
    return f'<div class="scroll" role="group" aria-label="{name}">{table}</div>'
