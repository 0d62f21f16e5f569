"""The built-in demonstration: train CoDe on the shapes world and see it beside its image segmenter
alone and MaskCLIP.

    python -m experiments.demo            # or `make demo`; four minutes on two cores, no download

Writes into --out: last.pt (the checkpoint), alone/ with that of the image segmenter alone,
step-N.pt (the model after some of the steps, for `make read`), sheet.png, metrics.json, metrics.md,
scenes/ with some held-out images and captions for segment.py, and page.html with these scenes to be
explored.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from config import TRAIN_PRESETS, EvalConfig, UserError, option, parse, run_script
from data import select_nouns, shapes_tagger
from datasets import Benchmark, shapes
from evaluate import Segmenter, evaluate
from experiments.measure import region_and_word_accuracy, segmenter_of, start_training
from segment import noun_in, page_of, search_caption
from support.draw import below, coloured_text, contact_sheet, legend, overlay, palette, save_png
from support.files import save_text
from support.page import write_page

CAPTIONS = 200  # of so many held-out scenes words are looked for
SCALE = 3  # scenes are shown so many times as large as the network sees them


@dataclass
class DemoConfig:
    """The demonstration."""

    out: str = option("out/demo", "folder for everything it writes")
    steps: int = option(TRAIN_PRESETS["shapes"]["steps"], "training steps", low=1)
    scenes: int = option(500, "held-out scenes that the metrics are measured on", low=1)
    rows: int = option(8, "scenes shown in the sheet", low=1)


def kept_steps(steps: int) -> list[int]:
    """After which steps the model is kept: a sixteenth, a quarter, a half and all of them."""
    sixteenth = max(1, steps // 16)
    return [step for step in (sixteenth, 4 * sixteenth, 8 * sixteenth) if step < steps] + [steps]


def train_both(out: Path, steps: int) -> None:
    """CoDe, and the image segmenter alone beside it (without a progress bar). Raises UserError."""
    for folder in (out, out / "alone"):
        for old in (folder / "last.pt", folder / "log.jsonl", *folder.glob("step-*.pt")):
            old.unlink(missing_ok=True)
    length, kept = ("--steps", str(steps)), map(str, kept_steps(steps))
    code = start_training(out, *length, "--keep-steps", *kept, show=True)
    alone = start_training(out / "alone", *length, "--no-co-decomposition")
    try:
        if code.wait():
            raise UserError(f"training ended with exit code {code.returncode}")
        message = alone.communicate()[1].strip().splitlines() or ["no message"]
        if alone.returncode:
            raise UserError(f"training the image segmenter alone: {message[-1]}")
    finally:
        for training in (code, alone):
            training.kill()
            training.wait()


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
    train_both(out, config.steps)
    trained = time.time() - start

    benchmark = shapes.load("", count=config.scenes)
    shown = {
        "MaskCLIP": None,
        "image segmenter alone": out / "alone" / "last.pt",
        "CoDe": out / "last.pt",
    }
    segmenters = {title: segmenter_of(path) for title, path in shown.items()}
    unrefined = {"CoDe, not refined": segmenter_of(out / "last.pt", pamr=False)}
    metrics = {
        name: evaluate(segmenter, benchmark, EvalConfig())
        for name, segmenter in (segmenters | unrefined).items()
    }
    save_png(sheet(segmenters, config.rows), out / "sheet.png")
    code = segmenters["CoDe"]
    # Only CoDe finds words: the others have no such figure.
    captions = min(config.scenes, CAPTIONS)
    metrics["CoDe"]["objects"] = region_and_word_accuracy(code, captions)
    scenes = [explore(code, benchmark, i) for i in range(config.rows)]
    write_page(scenes, out / "page.html")
    for i in range(config.rows):
        save_png(benchmark.image(i), out / "scenes" / f"{i}.png")
        save_text(shapes.scene("test", i).caption, out / "scenes" / f"{i}.txt")

    table = ["| method | mIoU | pixel accuracy | objects with region and words right |"]
    table.append("|---|---|---|---|")
    for name, found in metrics.items():
        both = f"{found['objects']['both']:.0f} %" if "objects" in found else "finds no words"
        both = "" if name.endswith("not refined") else both
        table.append(f"| {name} | {found['mIoU']:.1f} | {found['pixel_accuracy']:.1f} | {both} |")
    save_text("\n".join(table), out / "metrics.md")
    save_text(json.dumps(metrics, indent=1), out / "metrics.json")
    print(f"\n{metrics['CoDe']['images']} held-out scenes, mIoU with background in percent.")
    print(
        f"{captions} captions: a region is right from an IoU of 50 %, words if no noun or adjective"
    )
    print("is missing or another object's:\n")
    print("\n".join(table))
    print(f"\ntrained in {trained:.0f} s, everything in {time.time() - start:.0f} s")
    print(f"the sheet: {out / 'sheet.png'}; the metrics: {out / 'metrics.md'}")
    print(f"the same scenes, to be explored in a browser: {out / 'page.html'}")


if __name__ == "__main__":
    run_script(main)
