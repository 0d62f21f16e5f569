"""Zero-shot segmentation of a benchmark (section 4.1): sliding windows, refinement, IoU.

Examples:
    python evaluate.py --dataset shapes --checkpoint out/train/last.pt
    python evaluate.py --dataset shapes --method maskclip
    python evaluate.py --dataset voc --checkpoint code_released.pth
    torchrun --nproc_per_node=4 evaluate.py --dataset all --checkpoint code_released.pth
"""

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_model
from clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    dense_embedding,
    load_clip,
    template_embedding,
    visual_hidden,
)
from config import (
    DATASETS,
    MASK_PRESETS,
    PRIOR_TEMPLATES,
    THESIS_DATASETS,
    EvalConfig,
    MaskConfig,
    UserError,
    choose_device,
    parse,
    process_count,
    process_rank,
    refuse_folder,
    run,
    save_text,
    start_processes,
    stop_processes,
)
from datasets import IGNORED, Benchmark
from draw import below, beside, legend, overlay, palette, save_png
from model import CoDe
from pamr import pamr


class Segmenter:
    """Masks of given words in any picture; what depends on the words alone is computed once.

    model: a trained CoDe, or None for MaskCLIP, the prior branch alone.
    """

    def __init__(
        self, clip: open_clip.CLIP, model: CoDe | None, names: Sequence[str], config: MaskConfig
    ):
        self.clip, self.model, self.config = clip, model, config
        self.patch = clip.visual.patch_size[0]
        self.prior_embedding = template_embedding(clip, names, PRIOR_TEMPLATES)  # (N, C)
        if model is not None:  # n_c; TCL's released model has no learned context
            learned = len(model.context) > 0
            self.class_embedding = model.class_embedding(names) if learned else self.prior_embedding

    @torch.no_grad()
    def masks(self, images: Tensor) -> Tensor:
        """Soft masks of normalised images: (B, 3, H, W) -> (B, N, H, W) in [0, 1].

        Sizes that are no multiple of the patch are padded with zeros on all sides (the odd pixel
        right and below); all of it runs on the padded image and only the result is cut back.
        """
        config, (height, width) = self.config, images.shape[-2:]
        extra_h, extra_w = -height % self.patch, -width % self.patch
        top, left = extra_h // 2, extra_w // 2
        images = F.pad(images, (left, extra_w - left, top, extra_h - top))
        size = tuple(images.shape[-2:])
        h, w = size[0] // self.patch, size[1] // self.patch

        hidden = visual_hidden(self.clip, images)
        grid = (4 * h, 4 * w)
        if self.model is not None:
            segmenter = self.model.image_segmenter
            masks = segmenter.mask_logits(segmenter(hidden, size), self.class_embedding).sigmoid()
            grid = masks.shape[-2:]
        if self.model is None or config.prior_weight > 0:
            dense = dense_embedding(self.clip, hidden)  # (B, h*w, C)
            similarity = (dense @ self.prior_embedding.T).transpose(1, 2).unflatten(2, (h, w))
            prior = (config.prior_scale * (similarity - config.prior_bias)).sigmoid()
            prior = F.interpolate(prior, grid, mode="bilinear", align_corners=False)
        if self.model is None:
            masks = prior
        if config.pamr:
            masks = pamr(images, masks, config.pamr_iterations, config.pamr_dilations)
        if self.model is not None and config.prior_weight > 0:
            masks = (1 - config.prior_weight) * masks + config.prior_weight * prior
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        return masks[..., top : top + height, left : left + width]

    def planes(self, image: Image.Image, device: torch.device) -> Tensor:
        """Masks of a whole RGB picture by sliding windows, at the size these see: (N, h, w)."""
        config = self.config
        x = torch.from_numpy(np.asarray(image).copy()).to(device).permute(2, 0, 1)[None].float()
        scale = min(config.short_side / min(image.size), config.long_side / max(image.size))
        size = [max(1, int(side * scale + 0.5)) for side in (image.height, image.width)]
        x = F.interpolate(x, size, mode="bilinear", align_corners=False).round().clamp(0, 255) / 255
        mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        x = (x - mean) / std

        rows, columns = (window_starts(side, config.window, config.stride) for side in size)
        total = torch.zeros(1, len(self.prior_embedding), *size, device=device)
        count = torch.zeros(size, device=device)
        for top in rows:
            for left in columns:
                here = ..., slice(top, top + config.window), slice(left, left + config.window)
                total[here] += self.masks(x[here])
                count[here] += 1
        return (total / count)[0]

    def label_map(self, image: Image.Image, device: torch.device, background: bool) -> Tensor:
        """Class index of every pixel: (H, W) int64. With background, 0 is "none of the words"."""
        best, index = winners(self.planes(image, device), (image.height, image.width))
        if not background:
            return index
        return with_background(best, index, background_threshold(self.config))


def winners(planes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The highest mask of every pixel, and whose it is, of planes (N, h, w) resized to a picture.

    Returns (H, W) in [0, 1] and (H, W) int64. A few classes are resized at a time: all of them at
    the picture's own size could fill the memory.
    """
    best = torch.zeros(size, device=planes.device)
    index = torch.zeros(size, dtype=torch.int64, device=planes.device)
    for start in range(0, len(planes), 16):
        some = planes[None, start : start + 16]
        some = F.interpolate(some, size, mode="bilinear", align_corners=False)[0]
        value, which = some.max(0)
        index = torch.where(value > best, which + start, index)
        best = torch.maximum(best, value)
    return best, index


def with_background(best: Tensor, index: Tensor, threshold: float) -> Tensor:
    """Labels of `winners` behind a constant plane at the threshold: 0 where no mask exceeds it."""
    return torch.where(best > threshold, index + 1, 0)


def background_threshold(config: MaskConfig) -> float:
    """The given threshold, or TCL's: 0.4 on refined masks, 0.5 on unrefined ones."""
    if config.background is not None:
        return config.background
    return 0.4 if config.pamr else 0.5


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every `stride`, the last one pulled back inside."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride, side - window), 0) for i in range(count)]


# --- figures --------------------------------------------------------------------------------------


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
        return float(100 * self.counts[0].sum() / max(self.counts[2].sum(), 1))


def load_benchmark(name: str, root: str) -> Benchmark:
    """A benchmark by its name. Raises UserError for an unknown name or a wrong folder."""
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: not one of {', '.join(DATASETS)}")
    return importlib.import_module(f"datasets.{name}").load(root)


def make_segmenter(
    clip: open_clip.CLIP, model: CoDe | None, benchmark: Benchmark, config: MaskConfig
) -> Segmenter:
    """A segmenter of the benchmark's classes; "background" is no word to look for."""
    return Segmenter(clip, model, benchmark.class_names[int(benchmark.background) :], config)


def evaluate(
    segmenter: Segmenter, benchmark: Benchmark, config: EvalConfig, device: torch.device
) -> dict:
    """Figures of a benchmark: mIoU, IoU by class and pixel accuracy, in percent.

    Started by torchrun, every process takes its share of the images, and all get the same figures.
    """
    settings, images = segmenter.config, len(benchmark.stems)
    count = images if config.limit is None else min(config.limit, images)
    rank = process_rank()
    iou = IoU(len(benchmark.class_names))
    mine = range(rank, count, process_count())
    bar = tqdm(mine, f"{benchmark.name} ({settings.method})", disable=rank > 0, file=sys.stderr)
    for i in bar:
        image, label = benchmark.image(i), benchmark.label(i)
        predicted = segmenter.label_map(image, device, benchmark.background).cpu().numpy()
        iou.add(predicted, label)
        bar.set_postfix(mIoU=f"{iou.mean():.2f}", refresh=False)
        if config.save_predictions:
            raw = np.array(benchmark.raw_ids, np.uint8)[predicted]
            indexed = Image.fromarray(raw).convert("P")
            indexed.putpalette(benchmark.palette)
            folder = config.save_predictions
            save_png(indexed, folder_of(folder, benchmark, config) / f"{benchmark.stems[i]}.png")
        if i < config.show:
            picture = show(benchmark, image, label, predicted, partial=count < images)
            folder = folder_of(config.show_dir, benchmark, config)
            save_png(picture, folder / f"{benchmark.stems[i]}.png")
    if process_count() > 1:
        counts = torch.from_numpy(iou.counts).to(device)
        dist.all_reduce(counts)  # integers: the sum is the same in any order
        iou.counts = counts.cpu().numpy()
    per_class = {
        name: None if np.isnan(value) else float(value)
        for name, value in zip(benchmark.class_names, iou.per_class())
    }
    return {
        "dataset": benchmark.name,
        "partial": count < images,
        "images": count,
        "mIoU": iou.mean(),
        "pixel_accuracy": iou.pixel_accuracy(),
        "IoU": per_class,
        "settings": asdict(settings) | {"background": background_threshold(settings)},
    }


def folder_of(folder: str, benchmark: Benchmark, config: EvalConfig) -> Path:
    """With --dataset all, every benchmark has a folder of its own."""
    return Path(folder) / benchmark.name if config.dataset == "all" else Path(folder)


def show(
    benchmark: Benchmark,
    image: Image.Image,
    label: np.ndarray,
    predicted: np.ndarray,
    partial: bool,
) -> Image.Image:
    """Image, ground truth and prediction side by side above a legend of the classes in them."""
    present = np.union1d(label[label != IGNORED], predicted)
    if benchmark.background:
        present = present[present > 0]  # background stays untinted
    colours = palette(len(present))
    row_of = np.full(256, -1)
    row_of[present] = np.arange(len(present))
    tinted = [overlay(image, row_of[labels], colours) for labels in (label, predicted)]
    pictures = beside(image, *tinted)
    names = [benchmark.class_names[i] for i in present]
    if partial:
        names.append("(partial run: --limit)")
    return below(pictures, legend(names, [*colours, (255, 255, 255)], pictures.width))


def print_table(figures: dict) -> None:
    """IoU by class, then the line that counts."""
    width = max(map(len, figures["IoU"]))
    for name, value in figures["IoU"].items():
        print(f"{name:{width}}  {'     -' if value is None else f'{value:6.2f}'}")
    partial = "  (partial: not all images)" if figures["partial"] else ""
    print(
        f"{figures['dataset']}: mIoU {figures['mIoU']:.2f}, pixel accuracy "
        f"{figures['pixel_accuracy']:.2f}, {figures['images']} images{partial}"
    )


def table_4_1(results: list[dict], method: str) -> str:
    """The row of the thesis's table 4.1 for our figures, above the thesis's own."""
    header = ["", "VOC", "Context", "Object", "Stuff", "City", "ADE", "Avg."]
    figures = [result["mIoU"] for result in results]
    partial = " (partial)" if any(result["partial"] for result in results) else ""
    rows = [
        header,
        ["---"] * len(header),
        [f"{method}, here{partial}", *(f"{f:.1f}" for f in [*figures, np.mean(figures)])],
        ["CoDe, the thesis's figures", "57.7", "30.5", "32.3", "23.9", "28.9", "17.7", "31.8"],
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def load_method(config: MaskConfig, device: torch.device) -> tuple[open_clip.CLIP, CoDe | None]:
    """The CLIP and the model (None for MaskCLIP) that an evaluation asks for."""
    if config.stride > config.window:
        raise UserError(
            f"--stride {config.stride}: beyond --window {config.window}, gaps would stay"
        )
    if config.method not in ("code", "maskclip"):
        raise UserError(f"--method {config.method}: 'code' or 'maskclip'")
    if config.checkpoint is None:
        if config.method == "code":
            raise UserError("--method code needs --checkpoint FILE (train.py writes one)")
        return load_clip(config.clip, config.clip_weights).to(device), None
    model = load_model(config.checkpoint, device)
    return model.clip, model if config.method == "code" else None


def main() -> None:
    config, settings = parse(__doc__, EvalConfig, MaskConfig, presets=MASK_PRESETS)
    if config.json:
        refuse_folder(config.json)  # not after an hour
    names = THESIS_DATASETS if config.dataset == "all" else [config.dataset]
    benchmarks = [load_benchmark(name, config.root) for name in names]
    device = choose_device(settings.device)
    start_processes(device)
    clip, model = load_method(settings, device)
    results = []
    for benchmark in benchmarks:
        segmenter = make_segmenter(clip, model, benchmark, settings)
        results.append(evaluate(segmenter, benchmark, config, device))
        if process_rank() == 0:
            print_table(results[-1])
    if process_rank() == 0:
        content = results[0]
        if config.dataset == "all":
            print(table_4_1(results, settings.method))
            average = float(np.mean([result["mIoU"] for result in results]))
            partial = any(result["partial"] for result in results)
            content = {"average": average, "partial": partial, "datasets": results}
        if config.json:
            save_text(json.dumps(content, indent=1), config.json)
    stop_processes()


if __name__ == "__main__":
    run(main)
