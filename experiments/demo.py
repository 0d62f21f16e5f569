"""The built-in demonstration: train CoDe on the shapes world and see it beside MaskCLIP.

    python -m experiments.demo            # or `make demo`; a few minutes on two cores, no download

Writes into --out: last.pt (the checkpoint), snapshots/ of the training for `make read`, sheet.png,
metrics.json, metrics.md, scenes/ with some held-out images and captions for segment.py, and
page.html with these scenes to be explored.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from checkpoints import load_method
from checkpoints.ours import read_checkpoint
from config import (
    MASK_PRESETS,
    TRAIN_PRESETS,
    EvalConfig,
    MaskConfig,
    UserError,
    option,
    parse,
    run,
)
from data import select_nouns, shapes_tagger
from datasets import Benchmark, shapes
from datasets.protocols import completed
from evaluate import evaluate, make_segmenter
from model import CoDe
from segment import word_masks
from segmenter import Segmenter, arg_max
from support.draw import below, coloured_text, contact_sheet, legend, overlay, palette, save_png
from support.files import save_text
from support.page import page_item, word_content, write_page

TRAIN = Path(__file__).parents[1] / "train.py"
SNAPSHOT_SHARES = (1 / 16, 1 / 4, 1 / 2)  # of the steps: 50, 200 and 400 of 800


@dataclass
class DemoConfig:
    """The demonstration."""

    out: str = option("out/demo", "folder for everything it writes")
    steps: int | None = option(None, "training steps (default: the preset's)")
    scenes: int = option(500, "held-out scenes that the metrics are measured on")
    rows: int = option(8, "scenes shown in the sheet")


def caption_image(caption: str, colours: dict[str, tuple]) -> Image.Image:
    """The caption with its nouns underlined, the objects' in the colours of their regions."""
    nouns = select_nouns(caption, shapes_tagger())
    words = [
        (word, colours.get(word.strip(","), (150, 150, 150)) if word.strip(",") in nouns else None)
        for word in caption.split()
    ]
    return coloured_text(words, 160, 15, height=160)


def sheet(segmenters: dict[str, Segmenter], benchmark: Benchmark, rows: int) -> Image.Image:
    """Image, caption, ground truth and every method's regions, one scene a row."""
    colours = palette(len(shapes.OBJECTS))
    by_noun = dict(zip(shapes.OBJECTS, colours))
    lines = []
    for i in range(rows):
        image, scene = benchmark.image(i), shapes.scene("test", i)
        maps = [benchmark.label(i).astype(int)]
        for segmenter in segmenters.values():
            maps.append(segmenter.label_map(image, True).numpy())
        tinted = [overlay(image, labels - 1, colours) for labels in maps]
        lines.append([image, caption_image(scene.caption, by_noun), *tinted])
    titles = ["image", "caption", "ground truth", *segmenters]
    grid = contact_sheet(lines, titles)
    return below(grid, legend(list(by_noun), colours, grid.width))


def explored(model: CoDe, benchmark: Benchmark, i: int, settings: MaskConfig) -> dict:
    """What the page shows of a scene: its caption's nouns, their regions and words."""
    caption = shapes.scene("test", i).caption
    nouns, image = select_nouns(caption, shapes_tagger()), benchmark.image(i)
    segmenter, size = Segmenter(model.clip, model, nouns, settings), (image.height, image.width)
    best, index = (value.numpy() for value in arg_max(segmenter.scores(image), size))
    item = page_item(f"scene {i}", image, best, index, nouns, segmenter.config.background)
    return item | word_content(caption, word_masks(model, caption, nouns))


def train_with_snapshots(out: Path, steps: int | None) -> None:
    """Run train.py anew on the shapes world and keep copies of last.pt in snapshots/STEP.pt.

    train.py writes last.pt whole every sixteenth of the steps, which takes seconds: whoever looks
    twenty times a second misses none. Raises UserError.
    """
    last, kept = out / "last.pt", out / "snapshots"
    shutil.rmtree(kept, ignore_errors=True)
    for name in ("last.pt", "log.jsonl"):  # an earlier demonstration's
        (out / name).unlink(missing_ok=True)
    kept.mkdir(parents=True)
    steps = steps or TRAIN_PRESETS["shapes"]["steps"]
    wanted, newest = [int(steps * share) for share in SNAPSHOT_SHARES], None
    command = [sys.executable, str(TRAIN), "--preset", "shapes", "--out", str(out)]
    command += ["--steps", str(steps), "--checkpoint-every", str(max(1, steps // 16))]
    with subprocess.Popen(command) as training:
        while training.poll() is None:
            time.sleep(0.05)
            if last.exists() and (written := last.stat().st_mtime_ns) != newest:
                newest, copy = written, shutil.copyfile(last, kept / "newest")
                if (step := read_checkpoint(copy)["step"]) in wanted:
                    copy.rename(kept / f"{step}.pt")
    (kept / "newest").unlink(missing_ok=True)
    if training.returncode:
        raise UserError(f"training ended with exit code {training.returncode}")


def main() -> None:
    (config,) = parse(__doc__, DemoConfig)
    out, start = Path(config.out), time.time()
    train_with_snapshots(out, config.steps)
    trained = time.time() - start

    base = MaskConfig(**MASK_PRESETS["shapes"], checkpoint=str(out / "last.pt"))
    benchmark = shapes.load("", count=config.scenes)
    segmenters, metrics = {}, {}
    for title, method in (("MaskCLIP", "maskclip"), ("CoDe", "code")):
        for pamr in (True, False):
            settings = replace(base, method=method, pamr=pamr)
            clip, model = load_method(completed(settings), torch.device("cpu"))
            segmenter = make_segmenter(clip, model, benchmark, settings)
            name = title if pamr else f"{title}, not refined"
            metrics[name] = evaluate(segmenter, benchmark, EvalConfig())
            if pamr:
                segmenters[title] = segmenter
    save_png(sheet(segmenters, benchmark, config.rows), out / "sheet.png")
    model = segmenters["CoDe"].model
    scenes = [explored(model, benchmark, i, base) for i in range(config.rows)]
    write_page(scenes, out / "page.html")
    for i in range(config.rows):
        save_png(benchmark.image(i), out / "scenes" / f"{i}.png")
        save_text(shapes.scene("test", i).caption, out / "scenes" / f"{i}.txt")

    table = ["| method | mIoU | pixel accuracy |", "|---|---|---|"]
    table += [f"| {n} | {f['mIoU']:.1f} | {f['pixel_accuracy']:.1f} |" for n, f in metrics.items()]
    save_text("\n".join(table), out / "metrics.md")
    save_text(json.dumps(metrics, indent=1), out / "metrics.json")
    print(f"\n{metrics['CoDe']['images']} held-out scenes, mIoU with background in percent:\n")
    print("\n".join(table))
    print(f"\ntrained in {trained:.0f} s, everything in {time.time() - start:.0f} s")
    print(f"the sheet: {out / 'sheet.png'}; the metrics: {out / 'metrics.md'}")
    print(f"the same scenes, to be explored in a browser: {out / 'page.html'}")


if __name__ == "__main__":
    run(main)
