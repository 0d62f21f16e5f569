"""Segment any words in any image, or an image and its caption together (figures 4.2 and 4.4).

Examples:
    python segment.py photo.jpg "a red balloon" grass             # CLIP's own weights: NACLIP
    python segment.py photo.jpg "a red balloon" grass --checkpoint code_released.pth
    python segment.py photo.jpg --caption "a dog and a red ball" --checkpoint code_released.pth
    python segment.py photos/ person bicycle --html out/page.html

For every image NAME it writes NAME.overlay.png (regions and a legend; with a caption also its
words, shaded by every noun's word mask) and NAME.labels.png (an indexed PNG of the image's size:
0 is background, i the i-th query), with --show-scores NAME.score-I.png. An image that cannot be
read is named, the others are done, and the exit code is 2.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from checkpoints import load_method
from clip import SHAPES_ARCHITECTURE, noun_prompts, tokenize, tokens_of
from config import MASK_PRESETS, MaskConfig, UserError, check_ranges, option, parse, run_script
from data import nltk_tagger, select_nouns, shapes_tagger
from datasets.protocols import (
    alternatives,
    completed,
    described,
    read_names,
    training_free_names,
)
from model import CoDe, word_mask
from segmenter import Segmenter, arg_max, with_background
from sources import IMAGE_SUFFIXES, BadSample, read_image
from support.device import choose_device
from support.draw import (
    below,
    coloured_text,
    enlargement,
    heat,
    indexed,
    legend,
    overlay,
    palette,
    save_png,
)
from support.files import refuse_folder, save_text
from support.page import page_item, word_content, write_page


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
        elif path.suffix.lower() in IMAGE_SUFFIXES or given.endswith("/"):
            raise UserError(f"{given}: no such image or folder")
        else:
            words.append(" ".join(given.split()))
    if not images:
        missing = f" ({', '.join(words)}: no such file)" if words else ""
        raise UserError(f"no image given{missing}: name images or folders, then the words")
    distinct: dict[str, str] = {}
    for word in words:
        distinct.setdefault(word.lower(), word)  # CLIP reads lower case
    return images, list(distinct.values())


def queries(words: Sequence[str], config: SegmentConfig, settings: MaskConfig) -> list[str]:
    """The words, the lines of --names, or the nouns of the caption. Raises UserError."""
    sources = {"words": words, "--names": settings.names, "--caption": config.caption is not None}
    if len(given := [name for name, value in sources.items() if value]) > 1:
        raise UserError(f"{given[0]} and {given[1]}: give one of them")
    if settings.names is not None:
        lines = read_names(settings.names)
        first = [called(line).lower() for line in lines]
        if twice := next((name for name in first if first.count(name) > 1), None):
            raise UserError(f"--names {settings.names}: two lines begin with {twice!r}")
        return lines
    if config.caption is None:
        if not words:
            raise UserError("no words to look for: name some after the images, or a --caption")
        return list(words)
    if not config.caption:
        raise UserError("--caption: it is empty")
    nouns = select_nouns(
        config.caption, shapes_tagger() if config.preset == "shapes" else nltk_tagger()
    )
    if not nouns:
        raise UserError(f"--caption {config.caption!r}: no nouns found in it; name words instead")
    return nouns


def called(line: str) -> str:
    """What a query is called: the first of its alternatives."""
    return line.split(",")[0].strip()


def chosen(settings: MaskConfig, names: Sequence[str]) -> MaskConfig:
    """The options completed for any image: without a checkpoint NACLIP, and without training its
    own protocol, in which the things that may surround the names are the background's words."""
    if settings.method is None and settings.checkpoint is None:
        # The built-in CLIP was pretrained for the features that MaskCLIP reads.
        settings = replace(settings, method="maskclip" if settings.clip == "shapes" else "naclip")
    if settings.protocol is None and settings.method not in (None, "code"):
        settings = replace(settings, protocol="training-free")
    settings = completed(settings)
    if settings.background_words is None and settings.protocol == "training-free":
        (common, *_) = training_free_names("shapes" if settings.clip == "shapes" else "voc")
        asked = {name.lower() for line in names for name in alternatives(line, "query")}
        others = [word for word in common.split(",") if word not in asked]
        settings = replace(settings, background_words=",".join(others))
    return settings


def load_segmenter(words: Sequence[str], preset: str = "thesis", **options) -> Segmenter:
    """From Python: a segmenter of these words, to be called with PIL images.

    preset: "shapes" for checkpoints of the built-in world; options: fields of `config.MaskConfig`,
    such as checkpoint="code_released.pth"; without one it is NACLIP on CLIP's own weights, which
    are fetched the first time. Raises UserError.
    """
    if isinstance(words, str) or not words or "names" in options:
        raise UserError("words: a list of at least one, and no file of names beside it")
    settings = MaskConfig(**MASK_PRESETS.get(preset, {}) | options)
    check_ranges(settings)
    return segmenter_for(words, settings, preset)


def segmenter_for(words: Sequence[str], settings: MaskConfig, preset: str) -> Segmenter:
    """A segmenter by the options completed for any image. Raises UserError."""
    settings = chosen(settings, words)
    clip, model = load_method(settings, choose_device(settings.device))
    of_shapes = clip.text_projection.shape[0] == SHAPES_ARCHITECTURE["embed_dim"]
    if of_shapes != (preset == "shapes"):
        change = "add --preset shapes" if of_shapes else "leave --preset shapes out"
        change += ' (from Python: preset="shapes")'
        raise UserError(f"this CLIP is {'' if of_shapes else 'not '}the shapes world's: {change}")
    return Segmenter(clip, model, words, settings)


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
    masks = word_mask(model.text_segmenter.word_logits(x_t, n))[:, 0, 1:-1]  # (J, tokens)
    parts = masks.cpu().split([len(piece) for piece in pieces], dim=1)
    return torch.stack([part.mean(1) for part in parts], dim=1).numpy()


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


def check_options(config: SegmentConfig, settings: MaskConfig) -> None:
    """What the dataclasses cannot say. Raises UserError."""
    if config.preset not in ("thesis", "shapes"):
        raise UserError(f"--preset {config.preset}: 'thesis' or 'shapes'")
    for name in ("background", "background_words"):
        if config.no_background and getattr(settings, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--no-background and {flag}: give one of them")
    if config.no_background:
        settings.background_words = ""
    for name in filter(None, (config.json, config.html)):
        refuse_folder(name)  # not after all the images


def main() -> None:
    config, settings = parse(__doc__, SegmentConfig, MaskConfig, presets=MASK_PRESETS)
    check_options(config, settings)
    paths, words = images_and_words(config.inputs)
    if config.caption is not None:
        config.caption = " ".join(word for word in config.caption.split() if tokens_of(word))
    names = queries(words, config, settings)
    if len(names) > 255:
        raise UserError(f"{len(names)} queries: an indexed PNG holds 255 at most")
    if settings.checkpoint is None and settings.method is None:
        print(announcement(settings), flush=True)
    segmenter = segmenter_for(names, settings, config.preset)
    settings, model, masks = segmenter.config, segmenter.model, None
    if config.caption is not None:
        if model is None or not model.decomposes_text:
            raise UserError("--caption: this method has no text segmenter; name words instead")
        masks = word_masks(model, config.caption, names)
    asked = settings.names or f"{len(names)} quer{'y' if len(names) == 1 else 'ies'}"
    print(described(replace(settings, names=asked)), flush=True)
    names = [called(line) for line in names]
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
        index, background = index - segmenter.first_class, settings.background
        labels = index + 1 if config.no_background else with_background(best, index, background)
        result = Result(name, image, best.numpy(), labels.numpy())
        save_png(figure_of(result, names, config.caption, masks), out / f"{name}.overlay.png")
        save_png(indexed(result.labels, flat_palette), out / f"{name}.labels.png")
        if config.show_scores:
            for i, score in enumerate(scores[segmenter.first_class :], start=1):
                score = F.interpolate(score[None, None], size, mode="bilinear")[0, 0].cpu().numpy()
                save_png(heat(image, score), out / f"{name}.score-{i}.png")
        found[str(path)] = shares(result, names)
        if config.html:
            shown = 0 if config.no_background else settings.background
            here = page_item(name, image, best.numpy(), index.numpy(), names, shown)
            items.append(here | word_content(config.caption, masks))
        print(f"{path}: {summary(found[str(path)])}; {out / name}.overlay.png", flush=True)
    if config.json:
        save_text(json.dumps(found, indent=1), config.json)
    if config.html and items:
        write_page(items, config.html)
    if bad:
        print(f"{bad} of {len(paths)} images could not be read", file=sys.stderr)
        sys.exit(2)


def announcement(settings: MaskConfig) -> str:
    """What is done without a checkpoint, with which weights, and how much is fetched."""
    if settings.clip == "shapes":
        return "no --checkpoint: MaskCLIP, without training, on the built-in CLIP"
    weights = {
        "none": "random weights, so the masks mean nothing",
        "openai": "openai's weights, fetched the first time",
    }.get(settings.clip_weights, settings.clip_weights)
    if (settings.clip, settings.clip_weights) == (MaskConfig.clip, MaskConfig.clip_weights):
        weights += ": 600 MB"
    return f"no --checkpoint: NACLIP, without training, on {settings.clip} ({weights})"


def summary(found: dict) -> str:
    return ", ".join(f"{name} {100 * value['share']:.1f} %" for name, value in found.items())


if __name__ == "__main__":
    run_script(main)
