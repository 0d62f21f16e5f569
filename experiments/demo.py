"""The built-in demonstration: the trained model that comes with the shapes world, and a training of
minutes from the start, to be compared with it and with MaskCLIP.

    python -m experiments.demo            # or `make demo`; minutes on two cores, no download

Writes into --out: sheet.png, metrics.json, metrics.md, page.html with some held-out scenes to be
explored, as the shipped model sees them, and scenes/ with these images and captions for segment.py;
of the training last.pt (the checkpoint) and step-N.pt (the model after some of the steps).
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from checkpoint import SHAPES_MODEL
from config import EvalConfig, option, parse, run_script
from data import select_nouns, shapes_tagger
from datasets import Benchmark, shapes
from evaluate import Segmenter, evaluate, markdown_table
from experiments.measure import (
    ROOT,
    kept_steps,
    region_and_word_accuracy,
    run_training,
    segmenter_of,
)
from segment import noun_in, page_of, search_caption
from support.draw import below, coloured_text, contact_sheet, legend, overlay, palette, save_png
from support.files import save_text
from support.page import write_page

SCALE = 3  # scenes are shown so many times as large as the network sees them


@dataclass
class DemoConfig:
    """The demonstration."""

    out: str = option("out/demo", "folder for everything it writes")
    steps: int = option(200, "training steps of 16 pairs", low=1)
    scenes: int = option(200, "held-out scenes that the metrics are measured on", low=1)
    rows: int = option(8, "scenes shown in the sheet", low=1)


def train(out: Path, steps: int) -> None:
    """CoDe, from the start. Raises UserError."""
    for old in (out / "last.pt", out / "log.jsonl", *out.glob("step-*.pt")):
        old.unlink(missing_ok=True)
    options = ["--preset", "shapes", "--steps", str(steps), "--out", str(out), "--device", "cpu"]
    options += ["--keep-steps", *map(str, kept_steps(steps))]
    run_training([sys.executable, str(ROOT / "train.py"), *options])


def measure(segmenter: Segmenter, scenes: int) -> dict:
    """mIoU of an evaluation and, of a model that finds words, regions and words together."""
    metrics = evaluate(segmenter, shapes.load("", count=scenes), EvalConfig())
    if segmenter.model is not None:
        metrics["objects"] = region_and_word_accuracy(segmenter, scenes)
    return metrics


def table(metrics: dict[str, dict]) -> str:
    """In percent, a method a row. What a method cannot have stays empty."""
    rows = [["", "mIoU", "objects: region right", "words right", "both"]]
    for name, found in metrics.items():
        shares = [found.get("objects", {}).get(kind) for kind in ("regions", "words", "both")]
        rows.append([name, f"{found['mIoU']:.1f}"])
        rows[-1] += ["" if share is None else f"{share:.0f}" for share in shares]
    return markdown_table(rows)


def caption_image(caption: str, colours: dict[str, tuple], side: int) -> Image.Image:
    """The caption with its nouns underlined, the objects' in the colours of their regions."""
    nouns = select_nouns(caption, shapes_tagger())
    words = []
    for word in caption.split():
        noun = noun_in(word, nouns)
        words.append((word, colours.get(noun, (150, 150, 150)) if noun else None))
    return coloured_text(words, side, 22, height=side)


def sheet(segmenters: dict[str, Segmenter], rows: int) -> Image.Image:
    """Image, caption, ground truth and every segmenter's regions, one held-out scene a row."""
    benchmark, colours = shapes.load("", count=rows), palette(len(shapes.OBJECTS))
    by_noun = dict(zip(shapes.OBJECTS, colours))
    lines = []
    for i in range(rows):
        scene, side = shapes.scene("test", i, scale=SCALE), SCALE * shapes.SIDE
        image, maps = Image.fromarray(scene.image), [scene.label.astype(int)]
        seen = benchmark.image(i)  # in as many pixels as the network has
        maps += [s.label_map(seen, True, (side, side)).numpy() for s in segmenters.values()]
        tinted = [overlay(image, labels - 1, colours) for labels in maps]
        lines.append([image, caption_image(scene.caption, by_noun, side), *tinted])
    titles = ["image", "caption", "ground truth", *segmenters]
    grid = contact_sheet(lines, titles, SCALE * shapes.SIDE)
    return below(grid, legend(list(by_noun), colours, grid.width))


def explore(code: Segmenter, benchmark: Benchmark, i: int) -> dict:
    """What the page shows of a scene: its caption's nouns, their regions and words."""
    caption = shapes.scene("test", i).caption
    nouns = select_nouns(caption, shapes_tagger())
    search = search_caption(code.clip, code.model, caption, nouns, code.config)
    image = Image.fromarray(shapes.scene("test", i, scale=SCALE).image)
    scores = search.segmenter.scores(benchmark.image(i))
    return page_of(f"scene {i}", image, scores, search, code.config.threshold)


def main() -> None:
    (config,) = parse(__doc__, DemoConfig)
    out, start = Path(config.out), time.time()
    shipped = "CoDe, as it comes"
    shown = {"MaskCLIP": segmenter_of(None), shipped: segmenter_of(SHAPES_MODEL)}
    code, benchmark = shown[shipped], shapes.load("", count=config.rows)
    save_png(sheet(shown, config.rows), out / "sheet.png")
    write_page([explore(code, benchmark, i) for i in range(config.rows)], out / "page.html")
    for i in range(config.rows):
        save_png(benchmark.image(i), out / "scenes" / f"{i}.png")
        save_text(shapes.scene("test", i).caption, out / "scenes" / f"{i}.txt")
    print("The model that comes with the shapes world, and MaskCLIP, its CLIP without training:")
    print(f"{out / 'sheet.png'}; to be explored in a browser: {out / 'page.html'}\n", flush=True)
    metrics = {name: measure(segmenter, config.scenes) for name, segmenter in shown.items()}

    print(f"\nNow {config.steps} steps of 16 pairs from the start, in minutes:", flush=True)
    begin = time.time()
    train(out, config.steps)
    trained = time.time() - begin
    here = f"CoDe, {config.steps} steps"
    shown = {"MaskCLIP": shown["MaskCLIP"], here: segmenter_of(out / "last.pt"), shipped: code}
    metrics[here] = measure(shown[here], config.scenes)
    metrics = {name: metrics[name] for name in shown}
    save_png(sheet(shown, config.rows), out / "sheet.png")
    save_text(table(metrics), out / "metrics.md")
    save_text(json.dumps(metrics, indent=1), out / "metrics.json")
    print(f"\n{config.scenes} held-out scenes, in percent. Of the objects that captions name: a")
    print("region is right from an IoU of 50 %, words if no noun or adjective is missing or")
    print(f"another object's. MaskCLIP finds no words.\n\n{table(metrics)}")
    print(f"\ntrained in {trained:.0f} s, everything in {time.time() - start:.0f} s")
    print(f"the sheet: {out / 'sheet.png'}; the metrics: {out / 'metrics.md'}")
    print(f"the shipped model's scenes, to be explored in a browser: {out / 'page.html'}")


if __name__ == "__main__":
    run_script(main)
