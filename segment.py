"""Segment any words in any image, or an image and its caption together (figures 4.2 and 4.4).

Examples:
    python segment.py photo.jpg "a red balloon" grass             # CLIP's own weights: NACLIP
    python segment.py photo.jpg "a red balloon" grass --checkpoint code_released.pth
    python segment.py photo.jpg --caption "a dog and a red ball" --checkpoint code_released.pth
    python segment.py photos/ person bicycle --html out/page.html
    python segment.py photos --words person photos                # what is a word and a folder too

What exists on disk is an image or a folder of images, everything else a word. Where a word is also
the name of a folder, --words says what the words are; all else then is images and folders. Of a
folder every file with the suffix of an image is taken, those of its subfolders are not.

For every image NAME it writes NAME.overlay.png (regions and a legend; with a caption also its
words, shaded by every noun's word mask) and NAME.labels.png (an indexed PNG of the image's size:
0 is background, i the i-th query), with --show-scores NAME.score-I.png. An image that cannot be
read, or whose files cannot be written, is named, the others are done, and the exit code is 2.
"""

import functools
import json
import os
import sys
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip import is_of_shapes, noun_prompts, tokenize, tokens_of
from config import (
    MASK_PRESETS,
    MaskConfig,
    UserError,
    check_ranges,
    given_options,
    option,
    parse,
    run_script,
)
from data import BadSample, nltk_tagger, read_image, select_nouns, shapes_tagger
from evaluate import Segmenter, alternatives, load_method, read_names, resize
from model import CoDe, word_mask
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
from support.files import printable, refuse_folder, save_text
from support.page import page_item, word_content, write_page
from support.system_files import added_by_system
from training_free import TrainingFree, TrainingFreeConfig, check_method, training_free_names

# Formats that cameras and the web have and Pillow does not read, or not everywhere.
OTHER_SUFFIXES = {
    *(".avif", ".eps", ".heic", ".heif", ".jxl", ".mpo", ".svg"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),
}
# Pillow knows these by name, but they are no pictures that it can decode.
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


@dataclass
class SegmentConfig:
    """What is segmented, and what is written."""

    inputs: tuple[str, ...] = option(
        (), "images, folders of images, and the words to look for", positional=True
    )
    words: tuple[str, ...] | None = option(
        None, "the words, where one of them is also the name of a file or folder"
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


@functools.cache
def readable_suffixes() -> set[str]:
    """Of the images that Pillow reads here."""
    formats = Image.registered_extensions()  # loads all its plugins
    return {suffix for suffix, name in formats.items() if name in Image.OPEN.keys() - NO_IMAGES}


def is_image_name(name: str) -> bool:
    return Path(name).suffix.lower() in readable_suffixes() | OTHER_SUFFIXES


def images_in(folder: str) -> list[Path]:
    """The images of a folder, not of its subfolders. Raises UserError where there are none."""
    try:
        found = sorted(
            path
            for path in Path(folder).iterdir()
            if is_image_name(path.name) and not path.is_dir() and not added_by_system(path.name)
        )
    except OSError as error:
        raise UserError(f"{folder}: this folder cannot be read ({error.strerror})") from error
    if not found:
        raise UserError(f"{folder}: no images (.jpg, .png, .tif, ...) in this folder")
    return found


def images_and_words(
    inputs: Sequence[str], words: Sequence[str] = ()
) -> tuple[list[Path], list[str]]:
    """Sort the inputs into images and words. Raises UserError.

    What exists is an image or a folder of images, anything else a word; if words are given beside
    the inputs, these are all images and folders.
    """
    places, unknown = [], []
    for given in inputs:
        # os.path, since a Path would raise on a word longer than any file name.
        (places if os.path.isdir(given) or os.path.isfile(given) else unknown).append(given)
    for given in unknown:
        if words or is_image_name(given) or given.endswith(("/", os.sep)):
            raise UserError(f"{given}: no such image or folder")
    if not places:
        missing = f" ({', '.join(unknown)}: no such file)" if unknown else ""
        raise UserError(f"no image given{missing}: name images or folders, then the words")
    for given in places:
        path_like = os.path.dirname(given) or is_image_name(given) or given in (".", "..")
        if not (words or path_like or len(places) == 1):  # there are other images: a word, perhaps
            kind = "folder" if os.path.isdir(given) else "file"
            raise UserError(
                f"{given}: there is a {kind} of this name; write {os.path.join('.', given)} if you "
                "mean it, or the words after --words if it is one of them"
            )
    images = [
        path
        for given in places
        for path in (images_in(given) if os.path.isdir(given) else [Path(given)])
    ]
    distinct: dict[str, str] = {}
    for word in [*unknown, *words]:
        word = " ".join(word.split())
        refuse_broken_text(word)
        distinct.setdefault(word.lower(), word)  # CLIP reads lower case
    return list(dict.fromkeys(images)), list(distinct.values())


def refuse_broken_text(text: str) -> None:
    """Raises UserError for bytes that are no text in the system's encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{text!r}: its bytes are not UTF-8") from None


def name_of_output(path: Path, taken: Collection[str]) -> str:
    """The image's name without its suffix, shorter where a file system could not take the names
    that are made of it, and numbered where another image has it (taken: in lower case)."""
    name = path.stem
    # 255 bytes at most, among them .score-255.png, and what a file is called until it is whole.
    if len(os.fsencode(name)) > 200:
        checksum = zlib.crc32(os.fsencode(name))
        name = f"{os.fsencode(name)[:180].decode(errors='ignore')}-{checksum:08x}"
    found, number = name, 1
    while found.lower() in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def queries(words: Sequence[str], config: SegmentConfig, settings: MaskConfig) -> list[str]:
    """The words, the lines of --names, or the nouns of the caption. Raises UserError."""
    sources = {"words": words, "--names": settings.names, "--caption": config.caption is not None}
    if len(given := [name for name, value in sources.items() if value]) > 1:
        raise UserError(f"{given[0]} and {given[1]}: give one of them")
    if settings.names is not None:
        lines = read_names(settings.names)
        first = [first_name(line).lower() for line in lines]
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


def first_name(line: str) -> str:
    """What a query is called: the first of its alternatives."""
    return line.split(",")[0].strip()


def load_segmenter(words: Sequence[str], preset: str = "thesis", **options) -> Segmenter:
    """From Python: a segmenter of these words, to be called with PIL images.

    preset: "shapes" for checkpoints of the built-in world; options: fields of `config.MaskConfig`,
    such as checkpoint="code_released.pth"; without one of `training_free.TrainingFreeConfig`:
    NACLIP on CLIP's own weights, which are fetched the first time. Raises UserError.
    """
    if isinstance(words, str) or not words or "names" in options:
        raise UserError("words: a list of at least one, and no file of names beside it")
    if preset not in ("thesis", "shapes"):
        raise UserError(f"preset {preset!r}: 'thesis' or 'shapes'")
    trained = options.get("checkpoint") is not None
    kind = MaskConfig if trained else TrainingFreeConfig
    known = {f.name for f in fields(kind)}
    if unknown := options.keys() - known:
        raise UserError(f"{', '.join(sorted(unknown))}: not one of {', '.join(sorted(known))}")
    given = {name: value for name, value in options.items() if value is not None}
    settings = kind(**presets(trained).get(preset, {}) | given)
    check_ranges(settings)
    return make_segmenter(words, settings, preset)


def presets(trained: bool) -> dict[str, dict]:
    """Defaults by --preset. The built-in CLIP was pretrained for the features MaskCLIP reads."""
    shapes = MASK_PRESETS["shapes"]
    return {"shapes": shapes if trained else shapes | {"method": "maskclip"}}


def make_segmenter(words: Sequence[str], settings: MaskConfig, preset: str) -> Segmenter:
    """A segmenter of words in any image: with a checkpoint by section 4.1, without one by the
    protocol of methods without training, in which the things that may surround the words are the
    background's. Raises UserError."""
    check_method(settings)
    if settings.checkpoint is not None and settings.method not in ("code", "maskclip"):
        raise UserError(f"--method {settings.method} and --checkpoint: give one of them")
    clip, model = load_method(settings, choose_device(settings.device))
    if is_of_shapes(clip) != (preset == "shapes"):
        of_shapes = is_of_shapes(clip)
        change = "add --preset shapes" if of_shapes else "leave --preset shapes out"
        change += ' (from Python: preset="shapes")'
        raise UserError(f"this CLIP is {'' if of_shapes else 'not '}the shapes world's: {change}")
    if settings.checkpoint is not None:
        return Segmenter(clip, model, words, settings)
    if settings.background_words is None:
        settings = replace(settings, background_words=surroundings(words, preset))
    return TrainingFree(clip, model, words, settings)


def surroundings(words: Sequence[str], preset: str) -> str:
    """The things that commonly surround what is looked for, but for what is looked for."""
    common = training_free_names("shapes" if preset == "shapes" else "voc")[0].split(",")
    asked = {name.lower() for line in words for name in alternatives(line, "query")}
    return ",".join(word for word in common if word not in asked)


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


def measure_shares(result: Result, names: Sequence[str]) -> dict:
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
        if config.no_background and name in given_options():
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--no-background and {flag}: give one of them")
    if config.no_background:
        settings.background_words = ""
    for name in filter(None, (config.json, config.html)):
        refuse_folder(name)  # not after all the images


def main() -> None:
    trained = "checkpoint" in given_options()
    kind = MaskConfig if trained else TrainingFreeConfig
    config, settings = parse(__doc__, SegmentConfig, kind, presets=presets(trained))
    check_options(config, settings)
    paths, words = images_and_words(config.inputs, config.words or ())
    if config.caption is not None:
        refuse_broken_text(config.caption)
        config.caption = " ".join(word for word in config.caption.split() if tokens_of(word))
    names = queries(words, config, settings)
    if len(names) > 255:
        raise UserError(f"{len(names)} queries: an indexed PNG holds 255 at most")
    if not (trained or "method" in given_options()):
        print(announcement(settings), flush=True)
    segmenter = make_segmenter(names, settings, config.preset)
    model, masks = segmenter.model, None
    threshold = -torch.inf if config.no_background else settings.threshold
    if config.caption is not None:
        if model is None or not model.decomposes_text:
            raise UserError("--caption: this method has no text segmenter; name words instead")
        masks = word_masks(model, config.caption, names)
    asked = settings.names and printable(settings.names)
    asked = asked or f"{len(names)} quer{'y' if len(names) == 1 else 'ies'}"
    print(segmenter.description(asked), flush=True)
    names = [first_name(line) for line in names]
    flat_palette = [0, 0, 0, *(value for colour in palette(len(names)) for value in colour)]

    out, taken, found, items, bad = Path(config.out), set(), {}, [], 0
    try:
        out.mkdir(parents=True, exist_ok=True)  # before the first image is segmented
    except OSError as error:
        raise UserError(f"--out {out} could not be written ({error.strerror})") from error
    for path in paths:
        name = name_of_output(path, taken)
        try:
            image = read_image(path, whole=True)
            scores, size = segmenter.scores(image), (image.height, image.width)
            best, labels = (value.cpu().numpy() for value in scores.label_map(size, threshold))
            result = Result(name, image, best, labels)
            save_png(figure_of(result, names, config.caption, masks), out / f"{name}.overlay.png")
            save_png(indexed(result.labels, flat_palette), out / f"{name}.labels.png")
            if config.show_scores:
                for i, score in enumerate(scores.classes, start=1):
                    score = resize(score[None, None], size)[0, 0].cpu().numpy()
                    save_png(heat(image, score), out / f"{name}.score-{i}.png")
        except (BadSample, UserError, OSError) as cause:
            unread = isinstance(cause, BadSample) and path.suffix.lower() not in readable_suffixes()
            hint = "; Pillow reads no such files here: convert it to PNG" if unread else ""
            print(f"{sys.argv[0]}: error: {path}: {cause}{hint}", file=sys.stderr)
            bad += 1
            continue
        taken.add(name.lower())
        found[str(path)] = measure_shares(result, names)
        if config.html:
            _, likeliest = scores.label_map(size, -torch.inf)  # the page has a threshold to move
            index, shown = likeliest.cpu().numpy() - 1, max(threshold, 0.0)
            here = page_item(name, image, best, index, names, shown)
            items.append(here | word_content(config.caption, masks))
        print(f"{path}: {summary(found[str(path)])}; {out / name}.overlay.png", flush=True)
    if config.json:
        save_text(json.dumps(found, indent=1), config.json)
    if config.html and items:
        write_page(items, config.html)
    if bad:
        print(f"{bad} of {len(paths)} images could not be read or written", file=sys.stderr)
        sys.exit(2)


def announcement(settings: MaskConfig) -> str:
    """What is done without a checkpoint, with which weights, and how much is fetched."""
    if settings.clip == "shapes":
        return "no --checkpoint: MaskCLIP, without training, on the built-in CLIP"
    named = settings.clip_weights or "openai"
    weights = {
        "none": "random weights, so the masks mean nothing",
        "openai": "openai's weights, fetched the first time",
    }.get(named, named)
    if (settings.clip, named) == (MaskConfig.clip, "openai"):
        weights += ": 600 MB"
    return f"no --checkpoint: NACLIP, without training, on {settings.clip} ({weights})"


def summary(found: dict) -> str:
    return ", ".join(f"{name} {100 * value['share']:.1f} %" for name, value in found.items())


if __name__ == "__main__":
    run_script(main)
