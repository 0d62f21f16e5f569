"""A sheet of comparisons (figures 4.1, 4.3 and 4.5): images, their ground truth, several methods.

    python -m experiments.compare --dataset voc --of code=last.pt tcl=tcl.pth simseg=maps/ naclip
    python -m experiments.compare --dataset voc --of code=last.pt naclip --worst code
    python -m experiments.compare --dataset voc --of code=last.pt tcl=tcl.pth --gain code tcl

A method is NAME=WHAT. WHAT is one of
    a checkpoint      of train.py or a released one, by section 4.1
    a folder          of label maps of any program, DIR/STEM.png with raw ids
    maskclip          without training, by section 4.1
    sclip, clearclip, naclip    without training, by the protocol of training_free.py
A bare word such as naclip means naclip=naclip. For a method with other options than there are here,
let evaluate.py or training_free.py --save-predictions write its label maps, and give the folder.

Without --images, --worst and --gain the first --count images are shown. The IoU of an image is the
mean over the classes in its ground truth or its label map, in percent: no mIoU, which sums over the
whole set. It writes sheet.png and sheet.json into --out.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from checkpoint import fingerprint, read_checkpoint
from config import (
    MASK_PRESETS,
    MaskConfig,
    UserError,
    given_options,
    option,
    parse,
    run_script,
)
from datasets import DATASETS, IGNORED, Benchmark, load_benchmark, read_ahead, spread
from evaluate import (
    IoU,
    Segmenter,
    benchmark_words,
    check_world,
    load_method,
    none_for_nan,
    read_prediction,
    refuse_missing_maps,
)
from released import is_released
from support.device import choose_device
from support.draw import PAPER, Colour, below, beside, coloured_text, legend, overlay, save_png
from support.files import printable, refuse_folder, save_text
from training_free import DENSE, TrainingFreeConfig, segmenter_of

WIDTH = 280  # pixels: every image of the sheet is drawn so wide
MARGIN = 3  # around it


@dataclass
class CompareConfig:
    """What is compared, and on which images."""

    dataset: str | None = option(None, "a benchmark; needed")
    root: str = option("data", "folder with the raw benchmark folders")
    of: tuple[str, ...] = option((), "the methods, NAME=WHAT each; needed")
    images: tuple[str, ...] = option((), "show these images: their files' names without suffix")
    worst: str | None = option(None, "show the images on which this method has the lowest IoU")
    gain: tuple[str, ...] = option((), "A B: show the images on which A's IoU exceeds B's most")
    count: int = option(4, "how many images to show", low=1)
    limit: int | None = option(None, "choose among the first N images only", low=1)
    clip: str = option("ViT-B-16-quickgelu", "CLIP of methods without training")
    clip_weights: str | None = option(
        None, "CLIP's weights, as evaluate.py takes them; released checkpoints keep their own"
    )
    device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: a GPU if there is one)")
    precision: str = option("float32", "of the matrix products: float32, bfloat16 or float16")
    pamr: bool = option(True, "refine the masks with PAMR")
    out: str = option("out/compare", "folder for sheet.png and sheet.json")


@dataclass
class Method:
    """A column of the sheet."""

    name: str
    what: str
    kind: str  # "checkpoint", "maps" (a folder) or "untrained"


@dataclass
class Result:
    """What a method did."""

    description: str
    ious: dict[int, float | None]  # of every image that it was asked for, by its index
    maps: dict[int, np.ndarray]  # (H, W) class indices of the images that are shown


# --- what was asked for ---------------------------------------------------------------------------


def read_methods(given: Sequence[str]) -> list[Method]:
    """The methods of --of. Raises UserError."""
    if not given:
        raise UserError("--of is needed: NAME=WHAT ..., such as code=out/train/last.pt naclip")
    known = ", ".join(DENSE)
    methods: list[Method] = []
    for text in given:
        name, equals, what = text.partition("=")
        if not equals and text in DENSE:
            what = name
        elif not equals:
            raise UserError(
                f"--of {text}: not one of {known}; a checkpoint or a folder needs a name, as in "
                f"--of code={text}"
            )
        if not name or not what:
            raise UserError(f"--of {text}: NAME=WHAT is needed, such as code=out/train/last.pt")
        if what in DENSE:
            kind = "untrained"
        elif os.path.isdir(what):
            kind = "maps"
        elif os.path.isfile(what):
            kind = "checkpoint"
        else:
            raise UserError(f"--of {text}: {what} is no file, no folder and none of {known}")
        if name in [method.name for method in methods]:
            raise UserError(f"--of {text}: there are two methods named {name}")
        methods.append(Method(name, what, kind))
    return methods


def check_choice(methods: Sequence[Method], config: CompareConfig) -> None:
    """Whether the options that choose images fit together. Raises UserError."""
    ways = {
        "--images": bool(config.images),
        "--worst": config.worst is not None,
        "--gain": bool(config.gain),
        "--count": "count" in given_options(),
    }
    given = [flag for flag, used in ways.items() if used]
    if len(given) > 1 and given not in (["--worst", "--count"], ["--gain", "--count"]):
        raise UserError(f"{given[0]} and {given[1]}: give one of them")
    if config.gain and (len(config.gain) != 2 or config.gain[0] == config.gain[1]):
        raise UserError(f"--gain {' '.join(config.gain)}: two methods are needed")
    names = [method.name for method in methods]
    named = [("--gain", name) for name in config.gain]
    if config.worst is not None:
        named.append(("--worst", config.worst))
    for flag, name in named:
        if name not in names:
            raise UserError(f"{flag} {name}: not one of the methods of --of: {', '.join(names)}")


def check_options(methods: Sequence[Method], config: CompareConfig) -> None:
    """Raises UserError for an option that none of the methods would use."""
    given, kinds = given_options(), {method.kind for method in methods}
    if kinds == {"maps"}:
        for name in ("clip", "clip_weights", "device", "precision", "pamr", "no_pamr"):
            if name in given:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag}: --of names label maps alone, which are as they are")
    if "clip" in given and "untrained" not in kinds:
        raise UserError(
            f"--clip {config.clip}: that of methods without training, and --of names none"
        )
    if config.clip_weights is not None and all(holds_clip(method) for method in methods):
        raise UserError(
            f"--clip-weights {config.clip_weights}: the released files of --of hold CLIP's weights "
            "themselves"
        )


def holds_clip(method: Method) -> bool:
    """Whether a method has no use for --clip-weights. Raises UserError."""
    if method.kind == "checkpoint":
        return is_released(read_checkpoint(method.what)["model"])
    return method.kind == "maps"


def images_to_look_at(benchmark: Benchmark, config: CompareConfig) -> list[int]:
    """Indices of the images that every method segments: all, where the choice needs their IoU.

    Raises UserError for a name in --images that is none of the benchmark's, or stands twice.
    """
    stems = benchmark.stems[: config.limit]
    for stem in config.images:
        if stem not in stems:
            among = benchmark.name
            if stem in benchmark.stems:
                among = f"the first {config.limit} images of {benchmark.name} (--limit)"
            raise UserError(
                f"--images {stem}: not in {among}; a name without folder and suffix is needed, "
                f"such as {stems[0]}"
            )
        if config.images.count(stem) > 1:
            raise UserError(f"--images {stem}: it stands twice")
    if config.images:
        return [stems.index(stem) for stem in config.images]
    if chosen_by_iou(config):
        return list(range(len(stems)))
    return list(range(min(config.count, len(stems))))


def chosen_by_iou(config: CompareConfig) -> bool:
    return config.worst is not None or bool(config.gain)


# --- the methods ----------------------------------------------------------------------------------


def settings_of(method: Method, config: CompareConfig) -> MaskConfig:
    """The options of a method that has a CLIP, under its own protocol."""
    options = MASK_PRESETS.get(config.dataset, {}) | {
        "clip": config.clip,
        "clip_weights": config.clip_weights,
        "device": config.device,
        "precision": config.precision,
        "pamr": config.pamr,
    }
    if method.kind == "checkpoint":
        if config.clip_weights is not None and holds_clip(method):
            options["clip_weights"] = None
        return MaskConfig(**options, checkpoint=method.what)
    if method.what == "maskclip":
        return MaskConfig(**options, method="maskclip")
    return TrainingFreeConfig(**options, method=method.what)


def make_segmenter(method: Method, benchmark: Benchmark, config: CompareConfig) -> Segmenter | None:
    """The segmenter of a benchmark's classes, None for label maps. Raises UserError."""
    if method.kind == "maps":
        return None
    settings = settings_of(method, config)
    clip, model = load_method(settings, choose_device(settings.device))
    if isinstance(settings, TrainingFreeConfig):
        return segmenter_of(benchmark, clip, model, settings, set())
    return Segmenter(clip, model, benchmark_words(benchmark, settings), settings)


def check_maps(method: Method, benchmark: Benchmark, indices: Sequence[int]) -> None:
    """Whether a folder holds label maps of these images, and the benchmark's ids: some of them,
    spread over the set, are read. Raises UserError."""
    folder, stems = Path(method.what), [benchmark.stems[i] for i in indices]
    refuse_missing_maps(folder, stems, benchmark.name, f"--of {method.name}={method.what}")
    for place in spread(len(indices)):
        i = indices[place]
        read_prediction(folder, benchmark, i, benchmark.image(i).size)


def check_clips(methods: Sequence[Method], benchmark: Benchmark, config: CompareConfig) -> None:
    """Whether all methods have the same CLIP, and of the benchmark's world. Raises UserError."""
    marks: dict[str, int] = {}
    for method in methods:
        if method.kind == "maps":
            continue
        marks[method.name] = clip_fingerprint(method, benchmark, config)
        first = next(iter(marks))
        if marks[method.name] != marks[first]:
            by_thesis = method.kind == "checkpoint" or method.what == "maskclip"
            script = "evaluate.py" if by_thesis else "training_free.py"
            raise UserError(
                f"--of {method.name}: its CLIP is another than that of {first}; save its label "
                f"maps with {script} --save-predictions DIR, and give --of {method.name}=DIR"
            )


def clip_fingerprint(method: Method, benchmark: Benchmark, config: CompareConfig) -> int:
    """Of a method's CLIP, which is loaded for it and let go. Raises UserError."""
    clip, _ = load_method(settings_of(method, config), choose_device(config.device))
    source = f"--of {method.name}={method.what}"
    if method.kind == "untrained":
        source = f"--clip {config.clip}"
    check_world(clip, [benchmark.name], source)
    return fingerprint(clip)


def segment_images(
    method: Method,
    benchmark: Benchmark,
    indices: Sequence[int],
    config: CompareConfig,
    keep_maps: bool,
) -> Result:
    """Segment some images by a method, which is loaded for it and let go."""
    segmenter = make_segmenter(method, benchmark, config)
    description = f"label maps in {printable(method.what)}"
    if segmenter is not None:
        description = segmenter.description()
    result = Result(description, {}, {})
    bar = tqdm(indices, f"{benchmark.name} ({printable(method.name)})", file=sys.stderr)
    for i, (image, label) in zip(bar, read_ahead(benchmark, indices)):
        if segmenter is None:
            predicted = read_prediction(Path(method.what), benchmark, i, image.size)
        else:
            predicted = segmenter.label_map(image, benchmark.background).cpu().numpy()
        result.ious[i] = image_iou(predicted, label, len(benchmark.class_names))
        if keep_maps:
            result.maps[i] = predicted.astype(np.uint8)
    return result


def image_iou(predicted: np.ndarray, label: np.ndarray, classes: int) -> float | None:
    """IoU of one image in percent: the mean over the classes in either of two (H, W) maps.

    Pixels labelled IGNORED do not count; None where no pixel counts.
    """
    iou = IoU(classes)
    iou.add(predicted, label)
    return none_for_nan(iou.mean())


def choose(results: dict[str, Result], config: CompareConfig) -> list[int]:
    """Indices of the images of --worst or --gain, the most extreme first; of equal ones that which
    comes first in the benchmark. Raises UserError where no image has an IoU."""
    if config.worst is not None:
        ranks = results[config.worst].ious
    else:
        better, worse = (results[name].ious for name in config.gain)
        ranks = {
            i: None if better[i] is None or worse[i] is None else worse[i] - better[i]
            for i in better
        }
    ranked = [i for i, rank in ranks.items() if rank is not None]
    if not ranked:
        raise UserError(f"no pixel of the {len(ranks)} images is labelled: there is no IoU")
    return sorted(ranked, key=lambda i: ranks[i])[: config.count]


# --- what is written ------------------------------------------------------------------------------


def how_chosen(benchmark: Benchmark, shown: int, config: CompareConfig) -> str:
    """Which images are shown, for whoever sees the sheet alone."""
    whole = len(benchmark.stems)
    among = f"{whole} images"
    if config.limit is not None and config.limit < whole:
        among = f"the first {config.limit} of {whole} images"
    which = "the first ones"
    if config.images:
        which = "named by hand"
    elif config.worst is not None:
        which = f"those with the lowest IoU of {config.worst}"
    elif config.gain:
        which = "those with the largest IoU of {} minus IoU of {}".format(*config.gain)
    return f"{benchmark.name}, {shown} of {among}: {which}"


def line_of(text: str, width: int, letters: int = 14) -> Image.Image:
    """Text in as many lines as the width needs."""
    return coloured_text([(word, None) for word in printable(text).split()], width, letters)


def cell(picture: Image.Image, caption: str) -> Image.Image:
    """A picture with a line below it and a margin around both."""
    return ImageOps.expand(below(picture, line_of(caption, WIDTH)), MARGIN, PAPER)


def class_colours(benchmark: Benchmark) -> list[Colour]:
    """The benchmark's own colour of every class."""
    by_id = np.array(benchmark.palette, int).reshape(-1, 3)
    return [tuple(by_id[raw].tolist()) for raw in benchmark.raw_ids]


def regions(image: Image.Image, labels: np.ndarray, benchmark: Benchmark) -> Image.Image:
    """An image tinted by its classes, at its own size; background and ignored pixels are not.

    labels: (H, W) class indices, IGNORED where there is none.
    """
    shown = labels.astype(int)
    shown[labels == IGNORED] = -1
    if benchmark.background:
        shown[labels == 0] = -1
    return overlay(image, shown, class_colours(benchmark), opacity=0.7)


def at_width(image: Image.Image, labels: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """An image and a label map of it as wide as the sheet draws them."""
    size = (WIDTH, max(1, round(WIDTH * image.height / image.width)))
    smaller = Image.fromarray(labels).resize(size, Image.Resampling.NEAREST)
    return image.resize(size, Image.Resampling.LANCZOS), np.asarray(smaller)


def classes_shown(maps: Sequence[np.ndarray], benchmark: Benchmark) -> list[int]:
    """The classes of the legend: those in any of the maps but the background."""
    present = {int(index) for labels in maps for index in np.unique(labels)} - {IGNORED}
    if benchmark.background:
        present -= {0}
    return sorted(present)


def draw_sheet(
    benchmark: Benchmark, chosen: Sequence[int], results: dict[str, Result], note: str
) -> Image.Image:
    """A row an image: the image, the ground truth and every method's regions with their IoU; below
    them one legend, what every method is, and the note."""
    titles = [line_of(title, WIDTH, 17) for title in ("image", "ground truth", *results)]
    rows = [beside(*(ImageOps.expand(title, MARGIN, PAPER) for title in titles))]
    maps: list[np.ndarray] = []
    for i in chosen:
        image, label = benchmark.image(i), benchmark.label(i)
        columns = [(label, "")]
        for result in results.values():
            iou = result.ious[i]
            said = "no labelled pixel" if iou is None else f"IoU {iou:.1f}"
            columns.append((result.maps[i], said))
        small, _ = at_width(image, label)
        cells = [cell(small, benchmark.stems[i])]
        for labels, said in columns:
            cells.append(cell(regions(*at_width(image, labels), benchmark), said))
            maps.append(labels)
        rows.append(beside(*cells))
    grid, shown, colours = below(*rows), classes_shown(maps, benchmark), class_colours(benchmark)
    names = [benchmark.class_names[index] for index in shown]
    lines = [f"{name}: {result.description}" for name, result in results.items()]
    lines.append(f"{note}. IoU: of an image, in percent, the mean over the classes in it.")
    return below(
        grid,
        legend(names, [colours[index] for index in shown], grid.width),
        *(line_of(line, grid.width, 12) for line in lines),
    )


def content_of(
    benchmark: Benchmark,
    methods: Sequence[Method],
    chosen: Sequence[int],
    results: dict[str, Result],
    note: str,
    config: CompareConfig,
) -> dict:
    """sheet.json: the IoU of every image that was looked at, not of those in the sheet alone."""
    content: dict = {"settings": asdict(config), "chosen": note}
    content["images"] = [benchmark.stems[i] for i in chosen]
    content["methods"] = {}
    for method in methods:
        result = results[method.name]
        counted = [iou for iou in result.ious.values() if iou is not None]
        content["methods"][method.name] = {
            "what": method.what,
            "description": result.description,
            "mean_of_images": fmean(counted) if counted else None,
            "IoU": {benchmark.stems[i]: iou for i, iou in result.ious.items()},
        }
    return content


def main() -> None:
    (config,) = parse(__doc__, CompareConfig, presets=MASK_PRESETS)
    if config.dataset is None:
        raise UserError(f"--dataset is needed: one of {', '.join(DATASETS)}")
    if "RANK" in os.environ:
        raise UserError("torchrun: a sheet is made by one process, python -m experiments.compare")
    methods = read_methods(config.of)
    check_choice(methods, config)
    check_options(methods, config)
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: a file, and a folder is needed")
    for name in ("sheet.png", "sheet.json"):
        refuse_folder(out / name)
    benchmark = load_benchmark(config.dataset, config.root)
    looked_at = images_to_look_at(benchmark, config)
    for method in methods:
        if method.kind == "maps":
            check_maps(method, benchmark, looked_at)
    check_clips(methods, benchmark, config)

    keep_maps = not chosen_by_iou(config)
    results = {
        method.name: segment_images(method, benchmark, looked_at, config, keep_maps)
        for method in methods
    }
    chosen = looked_at
    if chosen_by_iou(config):
        chosen = choose(results, config)
        for method in methods:  # once more: the label maps of a whole set may not fit the memory
            again = segment_images(method, benchmark, chosen, config, keep_maps=True)
            results[method.name].maps = again.maps
    note = how_chosen(benchmark, len(chosen), config)
    content = content_of(benchmark, methods, chosen, results, note, config)
    save_png(draw_sheet(benchmark, chosen, results, note), out / "sheet.png")
    save_text(json.dumps(content, indent=1, allow_nan=False), out / "sheet.json")
    print(f"{note}\n{out / 'sheet.png'}, {out / 'sheet.json'}")


if __name__ == "__main__":
    run_script(main)
