"""Segment any words in any image, or an image and its caption together (figures 4.2 and 4.4).

Examples:
    python segment.py photo.jpg "a red balloon" grass --checkpoint code_released.pth
    python segment.py photo.jpg --caption "a dog and a red ball" --checkpoint code_released.pth
    python segment.py photos/ person bicycle --method naclip --html out/page.html  # no training

For every image NAME it writes NAME.overlay.png (regions and a legend; with a caption also its
words, shaded by every noun's word mask) and NAME.labels.png (an indexed PNG of the image's size:
0 is background, i the i-th query), with --show-scores NAME.score-I.png. An image that cannot be
read is named, the others are done, and the exit code is 2.
"""

import base64
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

from clip import (
    PRIOR_TEMPLATES,
    SHAPES_ARCHITECTURE,
    end_of_text,
    noun_prompts,
    tokenize,
)
from config import MASK_PRESETS, MaskConfig, UserError, option, parse, run
from data import nltk_tagger, select_nouns, shapes_tagger
from model import CoDe, word_mask
from segmenter import Segmenter, arg_max, background_threshold, load_method, with_background
from sources import IMAGE_SUFFIXES, BadSample, read_image
from support.device import choose_device
from support.draw import below, coloured_text, heat, indexed, legend, overlay, palette, save_png
from support.files import refuse_folder, save_text, whole_file


@dataclass
class SegmentConfig:
    """What is segmented, and what is written."""

    inputs: tuple[str, ...] = option(
        (), "images, folders of images, and the words to look for", positional=True
    )
    caption: str | None = option(None, "take the nouns of this caption, and segment it too")
    no_background: bool = option(False, "every pixel gets the likeliest of the words")
    preset: str = option("thesis", "sizes and constants: thesis, or shapes for its checkpoints")
    out: str = option("out/segment", "folder for the PNGs")
    show_scores: bool = option(False, "write a heat map of every query")
    json: str | None = option(None, "file for every query's share of the image and score")
    html: str | None = option(None, "file for a page with everything in it, to be explored")


@dataclass
class Result:
    """One image and what was found in it."""

    name: str
    image: Image.Image
    best: np.ndarray  # (H, W): the highest mask
    labels: np.ndarray  # (H, W): 0 is background, i the i-th query


def images_and_words(inputs: Sequence[str]) -> tuple[list[Path], list[str]]:
    """What exists is an image or a folder of images, anything else a query. Raises UserError."""
    images: list[Path] = []
    words: list[str] = []
    for given in inputs:
        path = Path(given)
        if os.path.isdir(given):  # a Path would raise on a query longer than any file name
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UserError(f"{given}: no images ({', '.join(IMAGE_SUFFIXES)}) in this folder")
            images += found
        elif os.path.isfile(given):
            images.append(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            raise UserError(f"{given}: no such image")
        else:
            words.append(" ".join(given.split()))
    if not images:
        raise UserError("no image given: name images or folders, then the words to look for")
    if any(not tokens_of(word) for word in words):
        raise UserError("an empty query: name words to look for")
    return images, list(dict.fromkeys(words))


def queries(words: Sequence[str], config: SegmentConfig) -> list[str]:
    """The words, or the nouns of the caption. Raises UserError."""
    if config.caption is None:
        if not words:
            raise UserError("no words to look for: name some after the images, or a --caption")
        return list(words)
    if words:
        raise UserError(f"{words[0]!r} and --caption: give words or a caption, not both")
    if not config.caption:
        raise UserError("--caption: it is empty")
    nouns = select_nouns(
        config.caption, shapes_tagger() if config.preset == "shapes" else nltk_tagger()
    )
    if not nouns:
        raise UserError(f"--caption {config.caption!r}: no nouns found in it; name words instead")
    return nouns


def check_lengths(names: Sequence[str], context_length: int) -> None:
    """CLIP's text tower holds 75 tokens beside SOS and EOT: the learned context and the query, or
    a template of the prior branch and the query."""
    templates = (len(tokens_of(template.format(""))) for template in PRIOR_TEMPLATES)
    room = 75 - max(context_length, *templates)
    for name in names:
        if (count := len(tokens_of(name))) > room:
            raise UserError(f"{name[:40]!r}...: {count} tokens, a query holds {room} at most")


def tokens_of(text: str) -> list[int]:
    """All BPE token ids of a text, without SOS and EOT; none of what is no text, such as a BOM."""
    row = open_clip.tokenize([text], context_length=4 * len(text) + 8)[0]
    return row[1 : int(end_of_text(row))].tolist()


@torch.no_grad()
def word_masks(model: CoDe, caption: str, nouns: Sequence[str]) -> np.ndarray:
    """m^t of every word between spaces: (J, words), the mean of a word's tokens.

    Raises UserError for a caption that is longer than CLIP's text tower.
    """
    pieces = [tokens_of(word) for word in caption.split()]  # none is empty, see `main`
    count = sum(map(len, pieces))
    if count > 75:
        raise UserError(f"--caption: {count} tokens, but CLIP's text tower holds 75")
    device = model.context.device
    start, end = tokenize([""])[0].tolist()
    tokens = torch.tensor([[start, *(t for piece in pieces for t in piece), end]], device=device)
    x_t = model.word_features(tokens)
    n = model.noun_embedding(noun_prompts(nouns, len(model.context)).to(device))[:, None]
    masks = word_mask(model.text_segmenter.word_logits(x_t, n))[0, :, 1:-1]  # (J, tokens)
    parts = masks.cpu().split([len(piece) for piece in pieces], dim=1)
    return torch.stack([part.mean(1) for part in parts], dim=1).numpy()


def enlargement(image: Image.Image) -> int:
    """How many times larger a small image is shown."""
    return max(1, round(400 / max(image.size)))


def figure_of(
    result: Result, names: Sequence[str], caption: str | None, masks: np.ndarray | None
) -> Image.Image:
    """Overlay and legend; with a caption, its words shaded by every noun's mask: figure 4.2."""
    colours = palette(len(names))
    tinted = overlay(result.image, result.labels - 1, colours)
    size = [side * enlargement(result.image) for side in tinted.size]
    tinted = tinted.resize(size, Image.Resampling.NEAREST)
    width = max(tinted.width, 400)  # of the text, also below a narrow image
    letters = max(14, width // 60)
    rows = [tinted, legend(names, colours, width, letters)]
    if masks is not None:
        for colour, mask in zip(colours, masks):
            shades = [tuple(round(255 + m * (c - 255)) for c in colour) for m in mask]
            words = list(zip(caption.split(), shades))
            rows.append(coloured_text(words, width, letters, behind=True))
    return below(*rows)


def shares(result: Result, names: Sequence[str]) -> dict:
    """Share of the image that each query takes, and the mean mask inside its region."""
    found = {}
    for i, name in enumerate(names, start=1):
        region = result.labels == i
        mean = float(result.best[region].mean()) if region.any() else None
        found[name] = {"share": float(region.mean()), "score": mean}
    return found


def data_uri(image: Image.Image, form: str) -> str:
    file = io.BytesIO()
    image.save(file, form, quality=88)
    return f"data:image/{form.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def page_item(
    result: Result,
    index: np.ndarray,
    names: Sequence[str],
    config: SegmentConfig,
    threshold: float,
    masks: np.ndarray | None,
) -> dict:
    """What page.html shows of one image, at 1,024 pixels at most."""
    scale = min(1.0, 1024 / max(result.image.size))
    width, height = (max(1, round(side * scale)) for side in result.image.size)
    rows = ((np.arange(height) + 0.5) / height * len(index)).astype(int)
    columns = ((np.arange(width) + 0.5) / width * index.shape[1]).astype(int)
    here = np.ix_(rows, columns)
    # Red: the best query; green and blue: its mask in 16 bits, which the page's threshold cuts.
    quantised = (result.best[here] * 65535).round().astype(np.uint16)
    packed = np.stack([index[here], quantised >> 8, quantised & 255], axis=-1)
    image = result.image.resize((width, height), Image.Resampling.LANCZOS)
    return {
        "name": result.name,
        "width": width,
        "height": height,
        "image": data_uri(image, "PNG" if enlargement(image) > 1 else "JPEG"),
        "masks": data_uri(Image.fromarray(packed.astype(np.uint8)), "PNG"),
        "threshold": 0 if config.no_background else threshold,
        "queries": [{"name": n, "colour": c} for n, c in zip(names, palette(len(names)))],
        "caption": config.caption or "",
        "words": (config.caption or "").split() if masks is not None else [],
        "word_masks": [] if masks is None else masks.round(3).tolist(),
    }


def save_page(items: Sequence[dict], path: str | Path) -> None:
    """Write a self-contained page of `page_item`s. Raises UserError."""
    page = Path(__file__).with_name("support").joinpath("page.html").read_text()
    content = json.dumps(items).replace("<", "\\u003c")  # no caption can close the script
    with whole_file(path) as temporary:
        temporary.write_text(page.replace("/*DATA*/[]", content))


def check_options(config: SegmentConfig, settings: MaskConfig) -> None:
    """What the dataclasses cannot say. Raises UserError."""
    if config.preset not in ("thesis", "shapes"):
        raise UserError(f"--preset {config.preset}: 'thesis' or 'shapes'")
    if config.no_background and settings.background is not None:
        raise UserError("--no-background and --background: give one of them")
    for name in filter(None, (config.json, config.html)):
        refuse_folder(name)  # not after all the images


def check_method(
    clip: open_clip.CLIP, model: CoDe | None, names: Sequence[str], config: SegmentConfig
) -> None:
    """Whether this CLIP and this model can do what is asked for. Raises UserError."""
    of_shapes = clip.text_projection.shape[0] == SHAPES_ARCHITECTURE["embed_dim"]
    if of_shapes != (config.preset == "shapes"):
        change = "add --preset shapes" if of_shapes else "leave --preset shapes out"
        raise UserError(f"this CLIP is {'' if of_shapes else 'not '}the shapes world's: {change}")
    check_lengths(names, len(model.context) if model is not None else 0)
    if config.caption is not None and (model is None or not model.decomposes_text):
        raise UserError("--caption: this method has no text segmenter; name words instead")


def main() -> None:
    config, settings = parse(__doc__, SegmentConfig, MaskConfig, presets=MASK_PRESETS)
    check_options(config, settings)
    paths, words = images_and_words(config.inputs)
    if config.caption is not None:
        config.caption = " ".join(word for word in config.caption.split() if tokens_of(word))
    names = queries(words, config)
    if len(names) > 255:
        raise UserError(f"{len(names)} queries: an indexed PNG holds 255 at most")
    clip, model = load_method(settings, choose_device(settings.device))
    check_method(clip, model, names, config)
    masks = None if config.caption is None else word_masks(model, config.caption, names)
    segmenter = Segmenter(clip, model, names, settings)
    threshold = background_threshold(settings)
    flat_palette = [0, 0, 0, *(value for colour in palette(len(names)) for value in colour)]

    out, taken, found, items, bad = Path(config.out), set(), {}, [], 0
    for path in paths:
        try:
            image = read_image(path, whole=True)
        except BadSample as cause:
            print(f"{sys.argv[0]}: error: {path}: {cause}", file=sys.stderr)
            bad += 1
            continue
        name = path.stem
        while name in taken:  # images of the same name in several folders
            name += "_"
        taken.add(name)
        scores, size = segmenter.scores(image), (image.height, image.width)
        best, index = (value.cpu() for value in arg_max(scores, size))
        labels = index + 1 if config.no_background else with_background(best, index, threshold)
        result = Result(name, image, best.numpy(), labels.numpy())
        save_png(figure_of(result, names, config.caption, masks), out / f"{name}.overlay.png")
        save_png(indexed(result.labels, flat_palette), out / f"{name}.labels.png")
        if config.show_scores:
            for i, score in enumerate(scores, start=1):
                score = F.interpolate(score[None, None], size, mode="bilinear")[0, 0].cpu().numpy()
                save_png(heat(image, score), out / f"{name}.score-{i}.png")
        found[str(path)] = shares(result, names)
        if config.html:
            items.append(page_item(result, index.numpy(), names, config, threshold, masks))
        print(f"{path}: {summary(found[str(path)])}; {out / name}.overlay.png", flush=True)
    if config.json:
        save_text(json.dumps(found, indent=1), config.json)
    if config.html and items:
        save_page(items, config.html)
    if bad:
        print(f"{bad} of {len(paths)} images could not be read", file=sys.stderr)
        sys.exit(2)


def summary(found: dict) -> str:
    return ", ".join(f"{name} {100 * value['share']:.1f} %" for name, value in found.items())


if __name__ == "__main__":
    run(main)
