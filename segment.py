"""Segment any words in any image, or an image and its caption together (figures 4.2 and 4.4).

Examples:
    python segment.py --captions docs/scenes/pairs.txt --preset shapes       # drawn scenes
    python segment.py photo.jpg "a red balloon" grass             # CLIP's own weights: NACLIP
    python segment.py photo.jpg "a red balloon" grass --checkpoint code_released.pth
    python segment.py photo.jpg --caption "a dog and a red ball" --checkpoint code_released.pth
    python segment.py --captions pairs.txt --checkpoint code_released.pth     # figure 4.2
    python segment.py photos/ person bicycle --html out/page.html
    python segment.py photos --words person photos                # what is a word and a folder too

What exists on disk is an image or a folder of images, everything else a word. Where a word is also
the name of a folder, --words says what the words are; all else then is images and folders. Of a
folder every file with the suffix of an image is taken, those of its subfolders are not.

For every image NAME it writes NAME.overlay.png (regions and a legend; with a caption also its
words, shaded by every noun's word mask) and NAME.labels.png (an indexed PNG of the image's size:
0 is background, i the i-th query), with --show-scores NAME.score-I.png. An image that cannot be
read, or whose files cannot be written, is named, the others are done, and the exit code is 2.

A line of --captions is an image, a tab and its caption. Instead of overlays all pairs come into one
sheet, captions.png.
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
import open_clip
import torch
from nltk.tokenize import NLTKWordTokenizer
from PIL import Image

from checkpoint import SHAPES_MODEL
from clip import is_of_shapes, noun_prompts, tokenize, tokens_of
from config import (
    MASK_PRESETS,
    MaskConfig,
    UserError,
    check_ranges,
    chosen,
    given_options,
    option,
    parse,
    run_script,
)
from data import (
    BadSample,
    Tagger,
    nltk_tagger,
    read_image,
    select_nouns,
    several,
    shapes_tagger,
)
from datasets import reason
from evaluate import Scores, Segmenter, alternatives, load_method, read_names, resize
from model import CoDe, word_mask
from support.device import choose_device
from support.draw import (
    Colour,
    below,
    coloured_text,
    enlargement,
    heat,
    in_bands,
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
# In the sheet of --captions: pairs side by side, and the pixels that a pair and its letters take.
IN_A_BAND, COLUMN, LETTERS = 4, 360, 17
ON_A_SHEET = 200  # pairs; they take a megabyte or two each
NO_WORDS = "this method has no text segmenter; name a --checkpoint of CoDe"


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
    captions: str | None = option(
        None, "file of pairs, a line each: an image, a tab, its caption; they come into one sheet"
    )
    no_background: bool = option(False, "every pixel gets the likeliest of the words")
    preset: str = option(
        "thesis", "sizes and constants: thesis, or shapes for drawn scenes and their model"
    )
    out: str = option("out/segment", "folder for the PNGs")
    show_scores: bool = option(False, "write a heat map of every query")
    json: str | None = option(None, "file for every query's share of the image and score")
    html: str | None = option(None, "file for a page with everything in it, to be explored")


@dataclass
class Pair:
    """A line of --captions."""

    where: str  # what a message about it begins with
    path: Path
    caption: str
    nouns: list[str]


@dataclass
class Search:
    """What is looked for in an image: words, or the nouns of its caption."""

    segmenter: Segmenter
    names: list[str]  # what the queries are called
    caption: str | None = None
    masks: np.ndarray | None = None  # (J, words): m^t of the caption's words


@dataclass
class Result:
    """One image and what was found in it."""

    name: str
    image: Image.Image
    best: np.ndarray  # (H, W): the highest mask
    labels: np.ndarray  # (H, W): 0 is background, i the i-th query


@dataclass
class Done:
    """What the files about all images hold of one."""

    path: Path
    search: Search
    found: dict  # of --json
    item: dict | None  # of --html
    column: list[Image.Image] | None  # of the sheet of --captions


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


def clean_caption(text: str, where: str) -> str:
    """A caption without words that are nothing to CLIP. Raises UserError for one that is empty, or
    longer than CLIP's text tower; where: what the message begins with."""
    refuse_broken_text(text)
    pieces = {word: len(tokens_of(word)) for word in text.split()}
    words = [word for word in text.split() if pieces[word]]
    if not words:
        raise UserError(f"{where}: it is empty")
    if (count := sum(pieces[word] for word in words)) > 75:
        raise UserError(f"{where}: {count} tokens, but CLIP's text tower holds 75")
    return " ".join(words)


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
    nouns = select_nouns(config.caption, tagger_of(config.preset))
    if not nouns:
        raise UserError(f"--caption {config.caption!r}: no nouns found in it; name words instead")
    return nouns


def read_pairs(file: str, preset: str) -> list[Pair]:
    """The pairs of --captions, images' paths being relative to the file's folder.

    Raises UserError for what is wrong in any line.
    """
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--captions {file}: cannot be read ({reason(error)})") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"--captions {file}, line {number}"
        given, tab, caption = line.partition("\t")
        if not tab:
            raise UserError(f"{where}: no tab between an image and its caption")
        if not given.strip():
            raise UserError(f"{where}: no image before the tab")
        path = Path(file).parent / given.strip()
        if not os.path.isfile(path):
            raise UserError(f"{where}: {path}: no such image")
        pairs.append(Pair(where, path, clean_caption(caption, f"{where}, caption"), []))
    if not pairs:
        raise UserError(f"--captions {file}: it is empty")
    if len(pairs) > ON_A_SHEET:
        raise UserError(
            f"--captions {file}: {len(pairs)} pairs, a sheet holds {ON_A_SHEET}: split the file"
        )
    tagger = tagger_of(preset)
    for pair in pairs:
        pair.nouns = select_nouns(pair.caption, tagger)
        if not pair.nouns:
            raise UserError(f"{pair.where}: no nouns found in {pair.caption!r}")
    return pairs


def tagger_of(preset: str) -> Tagger:
    """Raises UserError where NLTK's data cannot be fetched."""
    return shapes_tagger() if preset == "shapes" else nltk_tagger()


def first_name(line: str) -> str:
    """What a query is called: the first of its alternatives."""
    return line.split(",")[0].strip()


def load_segmenter(words: Sequence[str], preset: str = "thesis", **options) -> Segmenter:
    """From Python: a segmenter of these words, to be called with PIL images.

    preset: "shapes" for the built-in world, whose trained model is taken where neither a
    checkpoint nor a method is named; options: fields of `config.MaskConfig`, such as
    checkpoint="code_released.pth"; without a trained model of `training_free.TrainingFreeConfig`:
    NACLIP on CLIP's own weights, which are fetched the first time. Raises UserError.
    """
    if isinstance(words, str) or not words or "names" in options:
        raise UserError("words: a list of at least one, and no file of names beside it")
    if preset not in ("thesis", "shapes"):
        raise UserError(f"preset {preset!r}: 'thesis' or 'shapes'")
    trained = has_model(options.get("checkpoint"), preset, options.get("method"))
    kind = MaskConfig if trained else TrainingFreeConfig
    known = {f.name for f in fields(kind)}
    if unknown := options.keys() - known:
        raise UserError(f"{', '.join(sorted(unknown))}: not one of {', '.join(sorted(known))}")
    given = {name: value for name, value in options.items() if value is not None}
    settings = kind(**presets(trained).get(preset, {}) | given)
    check_ranges(settings)
    return make_segmenter(words, settings, preset)


def has_model(checkpoint: str | None, preset: str | None, method: str | None) -> bool:
    """Whether a trained model segments: the named one, or the one that comes with the built-in
    world if no other method is asked for."""
    return checkpoint is not None or (preset == "shapes" and method in (None, "code"))


def presets(trained: bool) -> dict[str, dict]:
    """Defaults by --preset."""
    more = {"checkpoint": str(SHAPES_MODEL)} if trained else {}
    return {"shapes": MASK_PRESETS["shapes"] | more}


def make_segmenter(words: Sequence[str], settings: MaskConfig, preset: str) -> Segmenter:
    """A segmenter of words in any image: with a checkpoint by section 4.1, without one by the
    protocol of methods without training, in which the things that may surround the words are the
    background's. Raises UserError."""
    clip, model = load_networks(settings, preset)
    if settings.checkpoint is not None:
        return Segmenter(clip, model, words, settings)
    if settings.background_words is None:
        settings = replace(settings, background_words=surroundings(words, preset))
    return TrainingFree(clip, model, words, settings)


def load_networks(settings: MaskConfig, preset: str) -> tuple[open_clip.CLIP, CoDe | None]:
    """CLIP and the trained model, if the method has one. Raises UserError."""
    check_method(settings)
    if settings.checkpoint is not None and settings.method not in ("code", "maskclip"):
        raise UserError(f"--method {settings.method} and --checkpoint: give one of them")
    clip, model = load_method(settings, choose_device(settings.device))
    if is_of_shapes(clip) != (preset == "shapes"):
        of_shapes = is_of_shapes(clip)
        change = "add --preset shapes" if of_shapes else "leave --preset shapes out"
        change += ' (from Python: preset="shapes")'
        raise UserError(f"this CLIP is {'' if of_shapes else 'not '}the shapes world's: {change}")
    return clip, model


def load_code(settings: MaskConfig, preset: str, option: str) -> tuple[open_clip.CLIP, CoDe]:
    """CLIP and a model that segments text too. Raises UserError; option: whose message it is."""
    message = f"{option}: {NO_WORDS}"
    if settings.checkpoint is None:  # before CLIP's weights are fetched
        raise UserError(message)
    clip, model = load_networks(settings, preset)
    if model is None or not model.decomposes_text:
        raise UserError(message)
    return clip, model


def search_caption(
    clip: open_clip.CLIP, model: CoDe, caption: str, nouns: list[str], settings: MaskConfig
) -> Search:
    """A search for the nouns of a caption of 75 tokens at most, its words segmented.

    Raises UserError.
    """
    segmenter = Segmenter(clip, model, nouns, settings)
    return Search(segmenter, nouns, caption, word_masks(model, caption, nouns))


def surroundings(words: Sequence[str], preset: str) -> str:
    """The things that commonly surround what is looked for, but for what is looked for."""
    common = training_free_names("shapes" if preset == "shapes" else "voc")[0].split(",")
    asked = {name.lower() for line in words for name in alternatives(line, "query")}
    return ",".join(word for word in common if word not in asked)


@torch.no_grad()
def word_masks(model: CoDe, caption: str, nouns: Sequence[str]) -> np.ndarray:
    """m^t of every word between spaces: (J, words), the mean of a word's tokens.

    caption: of `clean_caption`, so that every word has a token and CLIP's text tower holds them.
    """
    pieces = [tokens_of(word) for word in caption.split()]
    device = model.context.device
    start, end = tokenize([""])[0].tolist()
    tokens = torch.tensor([[start, *(t for piece in pieces for t in piece), end]], device=device)
    x_t = model.word_features(tokens)
    n = model.noun_embedding(noun_prompts(nouns, len(model.context)).to(device))[:, None]
    masks = word_mask(model.text_segmenter.word_logits(x_t, n))[:, 0, 1:-1]  # (J, tokens)
    parts = masks.cpu().split([len(piece) for piece in pieces], dim=1)
    return torch.stack([part.mean(1) for part in parts], dim=1).numpy()


def likeliest_nouns(masks: np.ndarray) -> np.ndarray:
    """Which noun's word segment a word is in: (J, words) of Eq. 3.3 -> (words,), -1 for "none"."""
    none = 1 - masks.sum(axis=0)
    return np.stack([none, *masks]).argmax(axis=0) - 1


def noun_in(word: str, nouns: Sequence[str]) -> str | None:
    """The noun that a word between spaces is, as the noun selector reads it: "dog" of "Dog's,"."""

    def tag(text: str) -> list[tuple[str, str]]:
        return [(part, "NN") for part in NLTKWordTokenizer().tokenize(text)]

    return next((part for part in select_nouns(word, tag) if part in nouns), None)


def figure_of(result: Result, search: Search) -> Image.Image:
    """Overlay and legend; with a caption, its words shaded by every noun's mask: figure 4.2."""
    colours = palette(len(search.names))
    tinted = overlay(result.image, result.labels - 1, colours)
    size = [side * enlargement(result.image) for side in tinted.size]
    tinted = tinted.resize(size, Image.Resampling.NEAREST)
    width = max(tinted.width, 400)  # of the text, also below a narrow image
    letters = max(14, width // 60)
    rows = [tinted, legend(search.names, colours, width, letters)]
    if search.caption is not None:
        for colour, mask in zip(colours, search.masks):
            shades = [tuple(round(255 + m * (c - 255)) for c in colour) for m in mask]
            words = list(zip(search.caption.split(), shades))
            rows.append(coloured_text(words, width, letters, behind=True))
    return below(*rows)


def column_of(result: Result, search: Search) -> list[Image.Image]:
    """A pair in figure 4.2, from above: its text with the nouns underlined, the image, its regions,
    its word segments. Everything of a noun has one colour."""
    words, colours = search.caption.split(), palette(len(search.names))
    colour_of: dict[str | None, Colour] = dict(zip(search.names, colours))
    nouns = [colour_of.get(noun_in(word, search.names)) for word in words]
    segments = [colours[i] if i >= 0 else None for i in likeliest_nouns(search.masks)]
    scale = COLUMN / max(result.image.size)
    size = [max(1, round(scale * side)) for side in result.image.size]
    image = result.image.resize(size, Image.Resampling.LANCZOS)
    labels = Image.fromarray(result.labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return [
        coloured_text(list(zip(words, nouns)), COLUMN, LETTERS),
        image,
        overlay(image, np.asarray(labels, int) - 1, colours),
        coloured_text(list(zip(words, segments)), COLUMN, LETTERS, behind=True),
    ]


def measure_shares(result: Result, names: Sequence[str]) -> dict:
    """Share of the image that each query takes, and the mean mask inside its region."""
    found = {}
    for i, name in enumerate(names, start=1):
        region = result.labels == i
        mean = float(result.best[region].mean()) if region.any() else None
        found[name] = {"share": float(region.mean()), "score": mean}
    return found


def page_of(
    name: str, image: Image.Image, scores: Scores, search: Search, threshold: float
) -> dict:
    """What the page shows of an image: at first the regions above the threshold, with its words."""
    size = (image.height, image.width)
    best, labels = scores.label_map(size, -torch.inf)  # the page has a threshold to move
    index = labels.cpu().numpy() - 1
    item = page_item(name, image, best.cpu().numpy(), index, search.names, max(threshold, 0.0))
    return item | word_content(search.caption, search.masks)


def sheet_of(config: SegmentConfig) -> Path:
    return Path(config.out) / "captions.png"


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
    if config.captions is not None:
        others = {"--caption": config.caption, "--words": config.words, "--names": settings.names}
        beside = [*config.inputs, *(name for name, value in others.items() if value is not None)]
        if beside:
            raise UserError(f"--captions and {beside[0]}: give one of them")
        if settings.checkpoint is None:
            raise UserError(f"--captions: {NO_WORDS}")  # before NLTK's data is fetched
        refuse_folder(sheet_of(config))
    for name in filter(None, (config.json, config.html)):
        refuse_folder(name)  # not after all the images


def search_images(config: SegmentConfig, settings: MaskConfig) -> list[tuple[Path, Search]]:
    """The same words in every image, or the nouns of one caption. Raises UserError."""
    paths, words = images_and_words(config.inputs, config.words or ())
    if config.caption is not None:
        config.caption = clean_caption(config.caption, "--caption")
    lines = queries(words, config, settings)
    if len(lines) > 255:
        raise UserError(f"{len(lines)} queries: an indexed PNG holds 255 at most")
    if config.caption is None or settings.checkpoint is not None:
        announce(settings)
    if config.caption is not None:
        networks = load_code(settings, config.preset, "--caption")
        search = search_caption(*networks, config.caption, lines, settings)
    else:
        segmenter = make_segmenter(lines, settings, config.preset)
        search = Search(segmenter, [first_name(line) for line in lines])
    asked = settings.names and printable(settings.names)
    asked = asked or f"{len(lines)} quer{'y' if len(lines) == 1 else 'ies'}"
    print(search.segmenter.description(asked), flush=True)
    return [(path, search) for path in paths]


def search_pairs(config: SegmentConfig, settings: MaskConfig) -> list[tuple[Path, Search]]:
    """In the image of every pair the nouns of its caption. Raises UserError."""
    pairs = read_pairs(config.captions, config.preset)
    announce(settings)
    clip, model = load_code(settings, config.preset, "--captions")
    searches = []
    for pair in pairs:
        try:
            search = search_caption(clip, model, pair.caption, pair.nouns, settings)
        except UserError as error:  # a noun of very many tokens
            raise UserError(f"{pair.where}: {error}") from error
        searches.append((pair.path, search))
    asked = f"the nouns of {several(len(pairs), 'caption')}"
    print(searches[0][1].segmenter.description(asked), flush=True)
    return searches


def segment_all(
    searches: Sequence[tuple[Path, Search]], config: SegmentConfig, threshold: float
) -> list[Done]:
    """Every image, but for those that could not be read or written, which are named."""
    taken: set[str] = set()
    done = []
    for path, search in searches:
        name = name_of_output(path, taken)
        try:
            done.append(segment_one(path, name, search, config, threshold))
        except (BadSample, UserError, OSError) as cause:
            unread = isinstance(cause, BadSample) and path.suffix.lower() not in readable_suffixes()
            hint = "; Pillow reads no such files here: convert it to PNG" if unread else ""
            print(f"{sys.argv[0]}: error: {path}: {cause}{hint}", file=sys.stderr)
            continue
        taken.add(name.lower())
        kind = "overlay" if config.captions is None else "labels"
        shown = Path(config.out) / f"{name}.{kind}.png"
        print(f"{path}: {summary(done[-1].found)}; {shown}", flush=True)
    return done


def segment_one(
    path: Path, name: str, search: Search, config: SegmentConfig, threshold: float
) -> Done:
    """Read and segment an image, and write its files. Raises BadSample, UserError and OSError."""
    out, image = Path(config.out), read_image(path, whole=True)
    scores, size = search.segmenter.scores(image), (image.height, image.width)
    best, labels = (value.cpu().numpy() for value in scores.label_map(size, threshold))
    result, column = Result(name, image, best, labels), None
    if config.captions is None:
        save_png(figure_of(result, search), out / f"{name}.overlay.png")
    else:
        column = column_of(result, search)
    flat = [0, 0, 0, *(value for colour in palette(len(search.names)) for value in colour)]
    save_png(indexed(labels, flat), out / f"{name}.labels.png")
    if config.show_scores:
        for i, score in enumerate(scores.classes, start=1):
            score = resize(score[None, None], size)[0, 0].cpu().numpy()
            save_png(heat(image, score), out / f"{name}.score-{i}.png")
    found = measure_shares(result, search.names)
    item = page_of(name, image, scores, search, threshold) if config.html else None
    return Done(path, search, found, item, column)


def found_in_pair(done: Done) -> dict:
    """What --json holds of a pair: of every noun also the words of its segment."""
    words, likeliest = done.search.caption.split(), likeliest_nouns(done.search.masks)
    nouns = {
        noun: values | {"words": [word for word, k in zip(words, likeliest) if k == i]}
        for i, (noun, values) in enumerate(done.found.items())
    }
    return {"image": str(done.path), "caption": done.search.caption, "nouns": nouns}


def main() -> None:
    trained = has_model(*map(chosen, ("checkpoint", "preset", "method")))
    kind = MaskConfig if trained else TrainingFreeConfig
    config, settings = parse(__doc__, SegmentConfig, kind, presets=presets(trained))
    check_options(config, settings)
    of_pairs = config.captions is not None
    searches = search_pairs(config, settings) if of_pairs else search_images(config, settings)
    try:
        Path(config.out).mkdir(parents=True, exist_ok=True)  # before the first image is segmented
    except OSError as error:
        raise UserError(f"--out {config.out} could not be written ({error.strerror})") from error
    threshold = -torch.inf if config.no_background else settings.threshold
    done = segment_all(searches, config, threshold)
    if config.json:
        of_images = {str(one.path): one.found for one in done}
        found = [found_in_pair(one) for one in done] if of_pairs else of_images
        save_text(json.dumps(found, indent=1), config.json)
    if config.html and done:
        write_page([one.item for one in done], config.html)
    if of_pairs and done:
        columns = [one.column for one in done]
        save_png(in_bands(columns, IN_A_BAND), sheet_of(config))
        print(f"{sheet_of(config)}: {several(len(done), 'pair')}")
    if bad := len(searches) - len(done):
        print(f"{bad} of {len(searches)} images could not be read or written", file=sys.stderr)
        sys.exit(2)


def announce(settings: MaskConfig) -> None:
    """Say what is done where it was not asked for, with which weights, and how much is fetched."""
    given = given_options()
    if settings.checkpoint is not None and "checkpoint" not in given:
        print("no --checkpoint: the trained model that comes with the shapes world", flush=True)
    if settings.checkpoint is not None or "method" in given or settings.clip == "shapes":
        return
    named = settings.clip_weights or "openai"
    weights = {
        "none": "random weights, so the masks mean nothing",
        "openai": "openai's weights, fetched the first time",
    }.get(named, named)
    if (settings.clip, named) == (MaskConfig.clip, "openai"):
        weights += ": 600 MB"
    how = f"NACLIP, without training, on {settings.clip} ({weights})"
    print(f"no --checkpoint: {how}", flush=True)


def summary(found: dict) -> str:
    return ", ".join(f"{name} {100 * value['share']:.1f} %" for name, value in found.items())


if __name__ == "__main__":
    run_script(main)
