"""Zero-shot segmentation of a benchmark (section 4.1): every image's label map, IoU, mIoU.

Examples:
    python evaluate.py --dataset voc                             # the model in out/train/last.pt
    python evaluate.py --dataset voc --checkpoint code_released.pth
    python evaluate.py --dataset shapes --method maskclip        # the training-free prior branch
    torchrun --nproc_per_node=4 evaluate.py --dataset all --checkpoint code_released.pth
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import open_clip
import torch.distributed as dist
from tqdm import tqdm

from checkpoints import load_method
from clip import SHAPES_ARCHITECTURE
from config import MASK_PRESETS, EvalConfig, MaskConfig, TrainConfig, UserError, parse, run_script
from datasets import DATASETS, IGNORED, THESIS_DATASETS, Benchmark, load_benchmark, read_ahead
from datasets.predictions import check_predictions, folder_of, read_prediction
from datasets.protocols import completed, described, with_words
from model import CoDe
from segmenter import Segmenter
from support.device import choose_device
from support.distributed import (
    first_process_first,
    process_count,
    process_rank,
    start_processes,
    stop_processes,
)
from support.draw import indexed, label_maps, save_png
from support.files import refuse_folder, save_text
from support.tables import average, print_table, printable, table_4_1


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


def make_segmenter(
    clip: open_clip.CLIP, model: CoDe | None, benchmark: Benchmark, config: MaskConfig
) -> Segmenter:
    """A segmenter of the benchmark's classes; "background" is no word to look for."""
    names, config = with_words(completed(config, benchmark.name), benchmark)
    return Segmenter(clip, model, names, config)


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
        what = described(segmenter.config)
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
        "settings": asdict(segmenter.config if segmenter else config),
    }


def none_for_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else float(value)


def check_world(clip: open_clip.CLIP, datasets: Sequence[str], source: str) -> None:
    """Whether CLIP and benchmarks are both of the shapes world, or neither. Raises UserError.

    source: where the CLIP comes from. The sizes and constants of one world are none for the other.
    """
    side, shapes_side = clip.visual.image_size[0], SHAPES_ARCHITECTURE["vision_cfg"]["image_size"]
    if side == shapes_side and any(name != "shapes" for name in datasets):
        raise UserError(f"{source}: of the shapes world, see --dataset shapes")
    if side != shapes_side and "shapes" in datasets:
        others = ", ".join(name for name in DATASETS if name != "shapes")
        raise UserError(
            f"--dataset shapes: {source} is not of the shapes world, it sees images of {side} "
            f"pixels, not of {shapes_side}: name another benchmark ({others}, all)"
        )


def main() -> None:
    config, settings = parse(__doc__, EvalConfig, MaskConfig, presets=MASK_PRESETS)
    if config.json:
        refuse_folder(config.json)  # not after an hour
    if config.dataset is None:
        raise UserError(f"--dataset is needed: one of {', '.join(DATASETS)}, or 'all'")
    names = THESIS_DATASETS if config.dataset == "all" else [config.dataset]
    benchmarks = [load_benchmark(name, config.root) for name in names]
    if config.predictions:
        check_predictions(config, settings, benchmarks)
    else:
        for benchmark in benchmarks:  # mistakes in words, before CLIP's weights are fetched
            with_words(completed(settings, benchmark.name), benchmark)
    device = choose_device(settings.device)
    start_processes(device, config.timeout)
    trained = Path(TrainConfig().out, "last.pt")
    wanted = settings.checkpoint is None and settings.method in (None, "code")
    if wanted and not config.predictions and trained.exists():
        settings.checkpoint = str(trained)
        if process_rank() == 0:
            print(f"no --checkpoint given: {trained}, where train.py writes", flush=True)
    clip = model = None
    if not config.predictions:
        with first_process_first():  # which fetches CLIP's weights
            clip, model = load_method(completed(settings), device)
        check_world(clip, names, settings.checkpoint or f"--clip {settings.clip}")
    results = []
    for benchmark in benchmarks:
        segmenter = make_segmenter(clip, model, benchmark, settings) if clip else None
        results.append(evaluate(segmenter, benchmark, config))
        if process_rank() == 0:
            print_table(results[-1])
    if process_rank() == 0:
        content = results[0]
        if config.dataset == "all":
            print(table_4_1(results))
            content = {"average": average(results)}
            content |= {"partial": any(r["partial"] for r in results), "datasets": results}
        if config.json:
            save_text(json.dumps(content, indent=1, allow_nan=False), config.json)
    stop_processes()


if __name__ == "__main__":
    run_script(main)
