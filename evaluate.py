"""Zero-shot segmentation by section 4.1: from words and an image to masks, from masks to mIoU.

Examples:
    python evaluate.py --dataset voc                             # the model in out/train/last.pt
    python evaluate.py --dataset voc --checkpoint code_released.pth
    python evaluate.py --dataset shapes --method maskclip        # the frozen prior branch alone
    python evaluate.py --dataset voc --predictions maps/         # label maps of any other program
    torchrun --nproc_per_node=4 evaluate.py --dataset all --checkpoint code_released.pth

`training_free.py` evaluates methods without training by the protocol that they publish with.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoint import SHAPES_MODEL, load_model
from clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    PRIOR_TEMPLATES,
    check_lengths,
    cosines,
    dense_embedding,
    is_of_shapes,
    load_clip,
    template_embedding,
    visual_hidden,
)
from config import (
    MASK_PRESETS,
    EvalConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    given_options,
    parse,
    run_script,
)
from data import to_rgb
from datasets import (
    DATASETS,
    IGNORED,
    THESIS_DATASETS,
    Benchmark,
    check_palette,
    ids_in,
    load_benchmark,
    lookup,
    missing_files,
    read_ahead,
    read_label,
    reason,
    unknown_ids,
)
from model import CoDe
from pamr import pamr
from support.device import autocast, choose_device, choose_precision, enough_memory
from support.distributed import (
    first_process_first,
    lost_processes,
    process_count,
    process_rank,
    start_processes,
    stop_processes,
)
from support.draw import indexed, label_maps, save_png
from support.files import printable, refuse_folder, save_text

# --- from words and an image to masks -------------------------------------------------------------


@dataclass
class Scores:
    """What every pixel scores, at the size that `Segmenter.scores` works at."""

    classes: Tensor  # (N, h, w): of the best of each class's words
    background: Tensor | None = None  # (h, w): of the best of the background's own words

    def label_map(self, size: tuple[int, int], threshold: float) -> tuple[Tensor, Tensor]:
        """The best score of every pixel and its label, (H, W) each, at an image's own size.

        Labels (int64): i + 1 for classes[i]; 0, the background, where no score exceeds the
        threshold or a word of the background scores best.
        """
        best = torch.zeros(size, device=self.classes.device)
        if self.background is not None:
            best = resize(self.background[None, None], size)[0, 0]
        label = torch.zeros(size, dtype=torch.int64, device=best.device)
        # A few at a time: all classes at the image's own size could fill the memory.
        for start in range(0, len(self.classes), 16):
            value, index = resize(self.classes[None, start : start + 16], size)[0].max(0)
            label = torch.where(value > best, index + start + 1, label)
            best = torch.maximum(best, value)
        return best, torch.where(best > threshold, label, 0)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinearly, with half-pixel centres: (B, N, h, w) -> (B, N, *size)."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class Segmenter:
    """Section 4.1: masks of N words in any image; what depends on the words alone is computed once.

    From words and an image to a label map, with the defaults of `config.MaskConfig` at ViT-B/16:

    1. `slide`: the image is resized to a short side of 448 (the long one at most 2048), normalised
       by ImageNet's statistics and cut into windows of 448, one every 224 pixels. A window is
       28 x 28 patches.
    2. `patch_scores`: the image segmenter gives x^v on 112 x 112 cells, and the soft masks are
       sigmoid(w x^v . n_c + b). n_c is the embedding of the learned context and the class name; w
       and b are learned.
    3. `pamr.pamr` refines the masks on these cells by the colours of the window, in 10 iterations
       over neighbours at distances 1, 2, 4, 8, 12 and 24.
    4. The frozen prior branch (MaskCLIP) is mixed in: 0.7 mask + 0.3 sigmoid(10 (s - 0.25)). s is
       the cosine of a patch with the mean embedding of the class name in nine templates ("itap of
       a ...": `clip.PRIOR_TEMPLATES`). A patch's feature is CLIP's, with A = 1 in the last block:
       each token attends to itself alone, residual and MLP are kept.
    5. Windows are averaged where they overlap.
    6. `by_class`: of the alternatives of a class the best counts.
    7. `Scores.label_map`: resized to the image's own size, the arg-max over classes; background
       where no mask exceeds 0.4 (0.5 without PAMR). Benchmarks without background: the arg-max.

    model: a trained CoDe, or None for the frozen prior branch alone (MaskCLIP).
    words: a line for each class; of alternatives in it, separated by commas, the best counts.
    `config.background_words` is such a line for the background.
    """

    protocol, templates, usual_names = "thesis", PRIOR_TEMPLATES, "class names"

    def __init__(
        self, clip: open_clip.CLIP, model: CoDe | None, words: Sequence[str], config: MaskConfig
    ):
        if config.stride > config.window:
            raise UserError(
                f"--stride {config.stride} beyond --window {config.window}: gaps would stay"
            )
        self.clip, self.model, self.config = clip, model, config
        self.device = clip.text_projection.device
        self.precision = choose_precision(config.precision, self.device)
        self.patch = clip.visual.patch_size[0]
        self.cells_per_patch = (model.config if model else ModelConfig()).cells_per_patch
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(3, 1, 1) for values in self.statistics()
        )
        lines = [alternatives(line, "query") for line in words]
        if config.background_words:
            lines.append(alternatives(config.background_words, "--background-words"))
        self.counts, flat = [len(line) for line in lines], sum(lines, [])
        check_lengths(flat, len(model.context) if model else 0, self.templates)
        self.prior_embedding = template_embedding(clip, flat, self.templates)  # (words, C)
        if model is not None:  # n_c; TCL's released model has no learned context
            learned = len(model.context) > 0
            self.class_embedding = model.class_embedding(flat) if learned else self.prior_embedding

    def statistics(self) -> tuple:
        """Mean and standard deviation of the input's channels."""
        return IMAGE_MEAN, IMAGE_STD

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Boolean masks of the words and their scores in [0, 1]: (N, H, W) each, the image's size.

        image: of any mode, taken as it stands (EXIF's orientation is the caller's to apply).
        A pixel is in at most one mask: in none where it is background.
        """
        size, scores = (image.height, image.width), self.scores(to_rgb(image))
        _, labels = scores.label_map(size, self.config.threshold)
        masks = torch.stack([labels == i + 1 for i in range(len(scores.classes))])
        return masks, resize(scores.classes[None], size)[0]

    def label_map(
        self, image: Image.Image, background: bool, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Class index of every pixel, (H, W) int64, at the image's own size or another one. With
        background, 0 is "none of the words"."""
        size = size or (image.height, image.width)
        if background:
            return self.scores(image).label_map(size, self.config.threshold)[1]
        return self.scores(image).label_map(size, -torch.inf)[1].clamp(min=1) - 1

    def scores(self, image: Image.Image) -> Scores:
        """Scores of a whole RGB image, averaged over sliding windows. Raises UserError."""
        with enough_memory("use --no-pamr, fewer words, or a smaller --long-side"):
            return self.by_class(self.word_scores(self.pixels(image)))

    def word_scores(self, pixels: Tensor) -> Tensor:
        """Of every word, at the size that the windows see: (1, 3, H, W) -> (words, h, w)."""
        return self.slide(pixels)

    def pixels(self, image: Image.Image) -> Tensor:
        """(1, 3, H, W) in [0, 255]."""
        return torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1)[None].float()

    def slide(self, pixels: Tensor) -> Tensor:
        """Scores of every word, averaged over windows of the resized image: (words, h, w)."""
        config, sides = self.config, pixels.shape[-2:]
        scale = min(config.short_side / min(sides), config.long_side / max(sides))
        size = [max(1, int(side * scale + 0.5)) for side in sides]
        x = resize(pixels, size)
        x = (x.round().clamp(0, 255) / 255 - self.mean) / self.std

        rows, columns = (window_starts(side, config.window, config.stride) for side in size)
        total = torch.zeros(1, sum(self.counts), *size, device=self.device)
        count = torch.zeros(size, device=self.device)
        for top in rows:
            for left in columns:
                here = ..., slice(top, top + config.window), slice(left, left + config.window)
                total[here] += self.window_scores(x[here])
                count[here] += 1
        return (total / count)[0]

    def by_class(self, scores: Tensor) -> Scores:
        """Of words to classes: the best of each one's alternatives. (words, h, w)."""
        best = torch.stack([some.amax(0) for some in scores.split(self.counts)])
        if self.config.background_words:
            return Scores(best[:-1], best[-1])
        return Scores(best)

    @torch.no_grad()
    def window_scores(self, images: Tensor) -> Tensor:
        """Scores of normalised images, a window each: (B, 3, H, W) -> (B, words, H, W).

        Sizes that are no multiple of the patch are padded with zeros on all sides (the odd pixel
        right and below); all of it runs on the padded image and only the result is cut back.
        """
        height, width = images.shape[-2:]
        extra_h, extra_w = -height % self.patch, -width % self.patch
        top, left = extra_h // 2, extra_w // 2
        images = F.pad(images, (left, extra_w - left, top, extra_h - top))
        masks = resize(self.patch_scores(images), images.shape[-2:])
        return masks[..., top : top + height, left : left + width]

    def patch_scores(self, images: Tensor) -> Tensor:
        """Soft masks of images that whole patches fill, on the mask grid: in [0, 1].

        The mask branch, refined, mixed with the frozen prior branch.
        """
        config, size = self.config, tuple(images.shape[-2:])
        patches = tuple(side // self.patch for side in size)
        grid = tuple(self.cells_per_patch * side for side in patches)
        masks = prior = None
        with autocast(self.device, self.precision):
            hidden = visual_hidden(self.clip, images)
            if self.model is None or config.prior_weight > 0:
                dense = dense_embedding(self.clip, hidden, patches)
                s = cosines("bpc,nc->bnp", dense, self.prior_embedding).unflatten(2, patches)
                s = (config.prior_scale * (s - config.prior_bias)).sigmoid()
                masks = prior = resize(s, grid)
            if self.model is not None:
                segmenter = self.model.image_segmenter
                x_v = segmenter(hidden, size)
                masks = segmenter.mask_logits(x_v, self.class_embedding).sigmoid()
        if config.pamr:
            masks = pamr(images, masks, dilations=config.pamr_dilations)
        if self.model is not None and prior is not None:
            masks = (1 - config.prior_weight) * masks + config.prior_weight * prior
        return masks

    def description(self, names: str | None = None) -> str:
        """What metrics depend on, in a line: protocol, method, prior, refinement and names.

        names: what is looked for, if not `usual_names`.
        """
        names = names or self.usual_names
        config, method = self.config, self.config.method if self.model is None else "code"
        if self.model is not None and config.prior_weight > 0:
            method += f" with {config.prior_weight:.0%} maskclip prior"
        refined = "refined" if config.pamr else "not refined"
        if config.background_words:
            names += f" and {self.counts[-1]} of the background"
        return f"{self.protocol} protocol, {method}, {refined}, {names}"


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, the last one pulled back inside."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(count)]


# --- words ----------------------------------------------------------------------------------------


def alternatives(line: str, where: str) -> list[str]:
    """The names in a line, between commas. Raises UserError for an empty one."""
    names = [" ".join(name.split()) for name in line.split(",")]
    if not all(names):
        raise UserError(f"{where}: an empty name in {line.strip()!r}: name words to look for")
    return names


def read_names(path: str) -> list[str]:
    """A file of --names: a class a line, its alternatives separated by commas."""
    try:
        text = Path(path).read_text("utf-8-sig").rstrip()
    except (OSError, ValueError) as error:
        raise UserError(f"--names {path}: cannot be read ({reason(error)})") from error
    if not text:
        raise UserError(f"--names {path}: it is empty")
    lines = text.split("\n")
    for i, line in enumerate(lines, start=1):
        alternatives(line, f"--names {path}, line {i}")
    return lines


def words_of(class_names: Sequence[str], benchmark: Benchmark, config: MaskConfig) -> list[str]:
    """A line of words for every class: the given ones, or those of --names.

    Raises UserError for names of another number, or background words where there is none.
    """
    if config.background_words is not None and not benchmark.background:
        raise UserError(f"--background-words: {benchmark.name} has no background")
    if config.names is None:
        return list(class_names)
    given = read_names(config.names)
    if len(given) != len(class_names):
        rest = " (the background is none of them)" if benchmark.background else ""
        raise UserError(
            f"--names {config.names}: {len(given)} lines, but {benchmark.name} has "
            f"{len(class_names)} classes{rest}"
        )
    return given


def benchmark_words(benchmark: Benchmark, config: MaskConfig) -> list[str]:
    """What section 4.1 looks for: the class names; "background" is none of them."""
    return words_of(benchmark.class_names[int(benchmark.background) :], benchmark, config)


# --- from label maps to mIoU ----------------------------------------------------------------------


class IoU:
    """Sums over a whole set of images, from which IoU and accuracy follow."""

    def __init__(self, classes: int):
        self.counts = np.zeros((3, classes), np.int64)  # intersection, predicted, labelled

    def add(self, predicted: np.ndarray, label: np.ndarray) -> None:
        """Two (H, W) maps of class indices; pixels labelled IGNORED do not count."""
        classes, counted = self.counts.shape[1], label != IGNORED
        predicted, label = predicted[counted], label[counted]
        for row, values in enumerate((label[predicted == label], predicted, label)):
            self.counts[row] += np.bincount(values, minlength=classes)

    def per_class(self) -> np.ndarray:
        """IoU in percent; NaN where a class was neither predicted nor labelled."""
        intersection, predicted, labelled = self.counts
        union = predicted + labelled - intersection
        return np.where(union > 0, 100 * intersection / np.maximum(union, 1), np.nan)

    def mean(self) -> float:
        """mIoU in percent over the classes whose union is not empty."""
        iou = self.per_class()
        return float(np.nanmean(iou)) if (~np.isnan(iou)).any() else float("nan")

    def pixel_accuracy(self) -> float:
        """In percent; NaN if no pixel was labelled."""
        labelled = self.counts[2].sum()
        return float(100 * self.counts[0].sum() / labelled) if labelled else float("nan")


def evaluate(segmenter: Segmenter | None, benchmark: Benchmark, config: EvalConfig) -> dict:
    """Metrics of a benchmark: mIoU, IoU by class and pixel accuracy, in percent.

    They are the segmenter's or, without one, those of the label maps in --predictions. Started by
    torchrun, every process takes its share of the images, and all get the same metrics. What would
    be NaN is None: the IoU of a class that is nowhere, and everything if no pixel is labelled.
    """
    images = len(benchmark.stems)
    if segmenter is None:
        what = f"predictions of {printable(config.predictions)}"
    else:
        names = segmenter.config.names
        what = segmenter.description(names and printable(names))
    count = images if config.limit is None else min(config.limit, images)
    rank = process_rank()
    iou = IoU(len(benchmark.class_names))
    mine = range(rank, count, process_count())
    bar = tqdm(mine, f"{benchmark.name} ({what})", disable=rank > 0, file=sys.stderr)
    for i, (image, label) in zip(bar, read_ahead(benchmark, mine)):
        if segmenter is None:
            folder = folder_of(config.predictions, benchmark, config)
            predicted = read_prediction(folder, benchmark, i, image.size)
        else:
            predicted = segmenter.label_map(image, benchmark.background).cpu().numpy()
        iou.add(predicted, label)
        bar.set_postfix(mIoU=f"{iou.mean():.2f}", refresh=False)
        name = f"{benchmark.stems[i]}.png"
        if config.save_predictions:
            raw = np.array(benchmark.raw_ids, np.uint8)[predicted]
            folder = folder_of(config.save_predictions, benchmark, config)
            save_png(indexed(raw, benchmark.palette), folder / name)
        if i < config.show:
            hidden = (IGNORED, 0) if benchmark.background else (IGNORED,)
            note = "(partial run: --limit)" if count < images else ""
            shown = label_maps(image, [label, predicted], benchmark.class_names, hidden, note)
            save_png(shown, folder_of(config.show_dir, benchmark, config) / name)
    if process_count() > 1:
        every: list = [None] * process_count()
        dist.all_gather_object(every, iou.counts)
        iou.counts = sum(every)  # of integers: the same in any order
    per_class = map(none_for_nan, iou.per_class())
    return {
        "dataset": benchmark.name,
        "partial": count < images,
        "images": count,
        "mIoU": none_for_nan(iou.mean()),
        "pixel_accuracy": none_for_nan(iou.pixel_accuracy()),
        "IoU": dict(zip(benchmark.class_names, per_class)),
        "method": what,
        "settings": asdict(config) if segmenter is None else settings_of(segmenter),
    }


def settings_of(segmenter: Segmenter) -> dict:
    """The options as they were used."""
    config = segmenter.config
    used = {"protocol": segmenter.protocol, "background": config.threshold}
    return asdict(config) | used


def none_for_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)


# --- label maps of other programs -----------------------------------------------------------------


def folder_of(folder: str, benchmark: Benchmark, config: EvalConfig) -> Path:
    """With --dataset all, every benchmark has a folder of its own."""
    return Path(folder) / benchmark.name if config.dataset == "all" else Path(folder)


def check_predictions(config: EvalConfig, benchmarks: Sequence[Benchmark]) -> None:
    """Whether --predictions holds a label map of every image. Raises UserError."""
    for benchmark in benchmarks:
        folder = folder_of(config.predictions, benchmark, config)
        stems = benchmark.stems[: config.limit]
        refuse_missing_maps(folder, stems, benchmark.name, f"--predictions {folder}")


def refuse_missing_maps(folder: Path, stems: Sequence[str], dataset: str, option: str) -> None:
    """Raises UserError, naming the option, where a folder lacks the label map of an image."""
    if missing := missing_files(folder / f"{stem}.png" for stem in stems):
        raise UserError(
            f"{option}: {len(missing)} of the {len(stems)} label maps of {dataset} are missing, "
            f"{missing[0].name} first"
        )


def read_prediction(
    folder: Path, benchmark: Benchmark, i: int, size: tuple[int, int]
) -> np.ndarray:
    """Class indices (H, W) of the i-th image, whose size (width, height) the map must have.

    The file holds raw label ids, as --save-predictions writes them. Raises UserError naming it.
    """
    path = folder / f"{benchmark.stems[i]}.png"
    raw, palette = read_label(path)
    if raw.shape != (size[1], size[0]):
        height, width = raw.shape
        raise UserError(f"label map {path} is {width} x {height}, its image {size[0]} x {size[1]}")
    table = lookup((raw_id, index) for index, raw_id in enumerate(benchmark.raw_ids))
    check_palette(path, raw, palette, benchmark.palette, table, strict=False)
    present = ids_in(raw)
    if unknown := unknown_ids(present, table):
        ids = ", ".join(map(str, sorted(unknown)[:5]))
        own, count = benchmark.raw_ids, len(benchmark.raw_ids)
        hint = f"; its own are {own[0]} to {own[-1]}"
        if own != tuple(range(count)) and max(present - {255}, default=count) < count:
            hint += f"; these seem to be class indices, 0 to {count - 1}"
        raise UserError(
            f"label map {path} holds ids that {benchmark.name} does not have: {ids}{hint}"
        )
    return table[raw]


# --- what is printed ------------------------------------------------------------------------------


def print_table(metrics: dict) -> None:
    """IoU by class, then the line that counts."""
    width = max(map(len, metrics["IoU"]))
    for name, value in metrics["IoU"].items():
        print(f"{name:{width}}  {'     -' if value is None else f'{value:6.2f}'}")
    partial = "  (partial: not all images)" if metrics["partial"] else ""
    result = "no pixel of any image is labelled, so there is no mIoU"
    if metrics["mIoU"] is not None:
        result = f"mIoU {metrics['mIoU']:.2f}, pixel accuracy {metrics['pixel_accuracy']:.2f}"
    print(
        f"{metrics['dataset']}: {result}, {metrics['images']} images{partial}; {metrics['method']}"
    )


def average(results: list[dict]) -> float | None:
    """The mean of the mIoUs; None if a benchmark has none."""
    values = [result["mIoU"] for result in results]
    return None if None in values else fmean(values)


# The thesis's table 4.1, in its order: what a method was trained on, its mIoU on THESIS_DATASETS,
# and the average of the six. None: not reported.
REPORTED: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "GroupViT": ("CC3M+CC12M+YFCC14M", (49.5, 19.0, 24.3, 12.6, 6.9, 8.7, 20.2)),
    "ViL-Seg": ("CC12M", (37.3, 18.9, 18.1, None, None, None, None)),
    "ViewCo": ("CC12M+YFCC14M", (52.4, 23.0, 23.5, None, None, None, None)),
    "OVSegmentor": ("CC12M", (53.8, 20.4, 25.1, None, None, None, None)),
    "SimSeg": ("CC3M+CC12M", (57.4, 26.2, 29.7, None, None, None, None)),
    "TCL": ("CC3M+CC12M", (55.0, 30.4, 31.6, 22.4, 24.0, 17.1, 30.1)),
    "SegCLIP": ("CC3M+COCO", (52.6, 24.7, 26.5, None, None, None, None)),
    "CoCu": ("CC3M+CC12M+YFCC14M", (51.4, 23.6, 22.7, 15.2, 22.1, 12.3, 24.6)),
    "PGSeg": ("CC12M+RedCaps12M", (53.2, 23.8, 28.7, None, None, None, None)),
    "CoDe": ("CC3M+CC12M", (57.7, 30.5, 32.3, 23.9, 28.9, 17.7, 31.8)),
}
COLUMNS = ("VOC", "Context", "Object", "Stuff", "City", "ADE", "Avg.")  # of table 4.1


def table_4_1(results: list[dict]) -> str:
    """The row of the thesis's table 4.1 for our metrics, above CoDe's in the thesis."""
    ours = [*(result["mIoU"] for result in results), average(results)]
    partial = " (partial)" if any(result["partial"] for result in results) else ""
    _, reported = REPORTED["CoDe"]
    rows = [
        ["", *COLUMNS],
        [f"{results[0]['method']}{partial}", *map(one_decimal, ours)],
        ["CoDe, as the thesis reports it", *map(one_decimal, reported)],
    ]
    return markdown_table(rows)


def one_decimal(value: float | None) -> str:
    """A metric as tables show it."""
    return "-" if value is None else f"{value:.1f}"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first, as lines of Markdown."""
    header, *others = rows
    lines = [header, ["---"] * len(header), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- the script -----------------------------------------------------------------------------------


def choose_checkpoint(config: MaskConfig, dataset: str) -> None:
    """Where CoDe is asked for without a checkpoint, it is the one that train.py writes by default;
    if there is none, on the shapes world the one that comes along."""
    if config.checkpoint is not None or config.method != "code":
        return
    trained, where = Path(TrainConfig().out, "last.pt"), "where train.py writes"
    if not trained.exists():
        if dataset != "shapes":
            return
        trained, where = SHAPES_MODEL, "which comes with the shapes world"
    config.checkpoint = str(trained)
    if process_rank() == 0:
        print(f"no --checkpoint given: {trained}, {where}", flush=True)


def load_method(config: MaskConfig, device: torch.device) -> tuple[open_clip.CLIP, CoDe | None]:
    """The CLIP of a segmenter and its model, None for a method without training.

    Raises UserError.
    """
    if config.checkpoint is None:
        if config.method == "code":
            raise UserError(
                "--method code needs --checkpoint FILE: one that train.py wrote, or the authors'; "
                "--method maskclip and training_free.py need none"
            )
        return load_clip(config.clip, config.clip_weights or "openai").to(device), None
    model = load_model(config.checkpoint, device, config.clip_weights)
    return model.clip, model if config.method == "code" else None


def check_world(
    clip: open_clip.CLIP, datasets: Sequence[str], source: str, option: str = "--dataset"
) -> None:
    """Whether CLIP and benchmarks are both of the shapes world, or neither. Raises UserError.

    source: where the CLIP comes from. The sizes and constants of one world are none for the other.
    """
    if is_of_shapes(clip) and any(name != "shapes" for name in datasets):
        raise UserError(f"{source}: of the shapes world, see {option} shapes")
    if not is_of_shapes(clip) and "shapes" in datasets:
        others = ", ".join(name for name in DATASETS if name != "shapes")
        raise UserError(
            f"{option} shapes: {source} is not of the shapes world: name another benchmark "
            f"({others}, all)"
        )


def load_benchmarks(config: EvalConfig) -> list[Benchmark]:
    """Those of --dataset. Raises UserError."""
    if config.json:
        refuse_folder(config.json)  # a mistake is told now, not after an hour
    if config.dataset is None:
        raise UserError(f"--dataset is needed: one of {', '.join(DATASETS)}, or 'all'")
    names = THESIS_DATASETS if config.dataset == "all" else [config.dataset]
    return [load_benchmark(name, config.root) for name in names]


def evaluate_all(
    make: Callable[[Benchmark], Segmenter | None],
    benchmarks: Sequence[Benchmark],
    config: EvalConfig,
) -> None:
    """Evaluate a segmenter of each benchmark, print its metrics and write --json after each."""
    results = []
    for benchmark in benchmarks:
        results.append(evaluate(make(benchmark), benchmark, config))
        if process_rank() == 0:
            print_table(results[-1])
            content = results[0]
            if config.dataset == "all":
                whole = len(results) == len(benchmarks)
                content = {"average": average(results) if whole else None}
                content |= {"partial": not whole or any(r["partial"] for r in results)}
                content |= {"datasets": results}
            if config.json:
                save_text(json.dumps(content, indent=1, allow_nan=False), config.json)
    if process_rank() == 0 and config.dataset == "all":
        print(table_4_1(results))


def main() -> None:
    config, settings = parse(__doc__, EvalConfig, MaskConfig, presets=MASK_PRESETS)
    benchmarks = load_benchmarks(config)
    if settings.method not in ("code", "maskclip"):
        raise UserError(
            f"--method {settings.method}: 'code' or 'maskclip'; see training_free.py for others"
        )
    if config.predictions:
        refuse_beside_predictions()
        check_predictions(config, benchmarks)
    for benchmark in benchmarks:  # mistakes in words, before CLIP's weights are fetched
        benchmark_words(benchmark, settings)
    device = choose_device(settings.device)
    start_processes(device, config.timeout)
    if config.predictions:
        with lost_processes():
            evaluate_all(lambda benchmark: None, benchmarks, config)
        stop_processes()
        return
    choose_checkpoint(settings, config.dataset)
    with lost_processes():
        with first_process_first():  # which fetches CLIP's weights
            clip, model = load_method(settings, device)
        names = [benchmark.name for benchmark in benchmarks]
        check_world(clip, names, settings.checkpoint or f"--clip {settings.clip}")

        def make(benchmark: Benchmark) -> Segmenter:
            return Segmenter(clip, model, benchmark_words(benchmark, settings), settings)

        evaluate_all(make, benchmarks, config)
    stop_processes()


def refuse_beside_predictions() -> None:
    """Raises UserError for an option that asks for masks of ours."""
    for name in ("checkpoint", "method", "names", "background_words"):
        if name in given_options():
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--predictions and {flag}: give one of them")


if __name__ == "__main__":
    run_script(main)
