"""The thesis's ablations (sections 4.4, 4.5) on the shapes world: a table and a contact sheet.

    python -m experiments.ablate                             # every row, three or five seeds: hours
    python -m experiments.ablate --rows baseline c cw cwr    # table 4.2 alone

Every run is a `train.py` of its own under --out, one core each. What is done is skipped and what
was interrupted goes on, so the command can be stopped at any time and given again. It writes
ablation.md and ablation.png, of the rows that it was given, into --results.
"""

import concurrent.futures
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from PIL import Image

from checkpoints.ours import fingerprint, read_checkpoint
from clip import load_clip
from config import MASK_PRESETS, TRAIN_PRESETS, UserError, option, parse, run_script
from datasets import load_benchmark, shapes
from experiments.measure import (
    THRESHOLDS,
    mean_and_deviation,
    mean_ious,
    segmenter_of,
    training_seconds,
    true_mask_accuracy,
    word_assignment_accuracy,
)
from support.draw import below, contact_sheet, legend, overlay, palette, save_png
from support.files import save_text

TRAIN = Path(__file__).parents[1] / "train.py"


@dataclass
class AblateConfig:
    """Which rows, over which seeds."""

    rows: tuple[str, ...] = option((), "rows to train and to show (default: all)")
    seeds: tuple[int, ...] = option(
        (), "training seeds (default: 0 to 4 in table 4.2, 0 to 2 in the others)"
    )
    steps: int | None = option(None, "training steps (default: the preset's)", low=1)
    scenes: int = option(500, "held-out scenes that the metrics are measured on", low=1)
    jobs: int = option(os.cpu_count() or 1, "runs at the same time, one thread each", low=1)
    out: str = option("out/ablation", "folder for the runs, ROW/SEED")
    results: str = option("results", "folder for ablation.md and ablation.png")


@dataclass
class Row:
    """One variant: the options of `train.py`, the row it is compared with, the thesis's average."""

    title: str
    options: tuple[str, ...]
    against: str | None
    thesis: float | None = None  # mIoU over six benchmarks


CONTRASTS = ("--image-contrast", "0.1", "--region-contrast", "0.1")  # the thesis's

ROWS = {
    "baseline": Row("image segmenter only", ("--no-co-decomposition",), None, 29.8),
    "c": Row("+ C", ("--no-word-prompt", "--no-region-prompt"), "baseline", 31.0),
    "cw": Row("+ C + W", ("--no-region-prompt",), "c", 31.3),
    "cr": Row("+ C + R", ("--no-word-prompt",), "c"),
    "cwr": Row("+ C + W + R (CoDe)", (), "cw", 31.8),
    "hcl_0.05": Row("λ_hcl = 0.05", ("--lambda-hcl", "0.05"), "cwr", 30.6),
    "hcl_0.1": Row("λ_hcl = 0.1", ("--lambda-hcl", "0.1"), "cwr", 31.2),
    "hcl_0.25": Row("λ_hcl = 0.25", ("--lambda-hcl", "0.25"), "cwr", 31.7),
    "hcl_0.75": Row("λ_hcl = 0.75", ("--lambda-hcl", "0.75"), "cwr", 31.5),
    "hcl_1.0": Row("λ_hcl = 1.0", ("--lambda-hcl", "1.0"), "cwr", 30.8),
    "nouns": Row("bare noun embeddings", ("--no-word-segments",), "cwr", 30.2),
    "release": Row("released pseudo-labels", ("--pseudo-labels", "release"), "cwr"),
    "alone_0.1": Row("image segmenter only, at 0.1", ("--no-co-decomposition", *CONTRASTS), None),
    "cwr_0.1": Row("CoDe, at 0.1", CONTRASTS, "alone_0.1"),
}
TABLES = {
    "The parts of the method (the thesis's table 4.2)": ("baseline", "c", "cw", "cr", "cwr"),
    "The weight of L_hcl (table 4.3)": (
        *("hcl_0.05", "hcl_0.1", "hcl_0.25", "cwr", "hcl_0.75", "hcl_1.0"),
    ),
    "What a region is aligned with (section 4.4), and the pseudo-labels of L_seg^t": (
        *("cwr", "nouns", "release"),
    ),
    "The contrasts at the thesis's 0.1 (here: 0.5)": ("baseline", "cwr", "alone_0.1", "cwr_0.1"),
}


PARTS = next(iter(TABLES.values()))
# Student's t at 95 % for two rows of so many seeds: how many standard errors are no noise.
NOISE = {2: 4.30, 3: 2.78, 4: 2.45, 5: 2.31}

CHILDREN: set[subprocess.Popen] = set()  # the trainings that run now


# --- one run --------------------------------------------------------------------------------------


def train(row: Row, seed: int, folder: Path, config: AblateConfig) -> None:
    """Train to the end in a process of its own, going on from its last checkpoint if it has one."""
    command = [sys.executable, str(TRAIN), "--preset", "shapes"]
    command += ["--seed", str(seed), "--out", str(folder), "--workers", "0", *row.options]
    command += ["--checkpoint-every", "100"]
    command += ["--steps", str(config.steps)] if config.steps else []
    command += ["--resume"] if (folder / "last.pt").exists() else []
    settings = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    child = subprocess.Popen(
        command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    CHILDREN.add(child)
    line = (child.communicate()[1].strip().splitlines() or ["no message"])[-1]
    CHILDREN.remove(child)
    if child.returncode:
        raise UserError(f"{folder}: training ended with exit code {child.returncode}: {line}")
    if read_checkpoint(folder / "last.pt")["step"] < planned_steps(config):
        raise KeyboardInterrupt  # it was asked to stop, and saved


def planned_steps(config: AblateConfig) -> int:
    return config.steps or TRAIN_PRESETS["shapes"]["steps"]


def seeds_of(name: str, config: AblateConfig) -> Sequence[int]:
    return config.seeds or range(5 if name in PARTS else 3)


def run_folder(name: str, seed: int, config: AblateConfig) -> Path:
    return Path(config.out) / name / str(seed)


def what_was_asked(name: str, config: AblateConfig, clip: open_clip.CLIP) -> dict:
    """What metrics depend on besides the seed, as JSON reads it back; kept with them."""
    asked = {"options": ROWS[name].options, "steps": planned_steps(config)}
    asked["presets"] = [TRAIN_PRESETS["shapes"], MASK_PRESETS["shapes"]]
    asked |= {"clip": fingerprint(clip), "scenes": config.scenes}
    return json.loads(json.dumps(asked))


def run_once(name: str, seed: int, config: AblateConfig) -> None:
    """Train and measure one row with one seed, unless its metrics are there."""
    folder = run_folder(name, seed, config)
    train(ROWS[name], seed, folder, config)
    segmenter = segmenter_of(folder / "last.pt")
    metrics = {"mIoU": mean_ious(segmenter, config.scenes)}
    metrics["true_masks"] = true_mask_accuracy(segmenter.model, config.scenes)
    if segmenter.model.decomposes_text:
        metrics["words"] = word_assignment_accuracy(segmenter.model, config.scenes)
    metrics["seconds"] = training_seconds(folder)
    metrics["asked"] = what_was_asked(name, config, segmenter.model.clip)
    save_text(json.dumps(metrics, indent=1, allow_nan=False), folder / "metrics.json")


def run_all(names: Sequence[str], config: AblateConfig) -> None:
    """All runs that are missing, `jobs` at a time."""
    wanted = [(name, seed) for name in names for seed in seeds_of(name, config)]
    wanted.sort(key=lambda job: job[1])  # one seed of every row after the other
    folders = {job: run_folder(*job, config) for job in wanted}
    missing = [job for job, folder in folders.items() if not (folder / "metrics.json").exists()]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are done", flush=True)
    torch.set_num_threads(1)
    start = time.time()
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        futures = {pool.submit(run_once, *job, config): job for job in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                print(f"{folders[futures[future]]}: done, {time.time() - start:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(CHILDREN):
                child.terminate()  # finishes its step and saves
            raise


# --- what is written ------------------------------------------------------------------------------


def finished(names: Sequence[str], config: AblateConfig) -> dict[str, list[dict]]:
    """Metrics of every row that has all its seeds. Raises UserError for one of other options."""
    rows: dict[str, list[dict]] = {name: [] for name in names}
    clip = load_clip("shapes")
    for name in names:
        asked = what_was_asked(name, config, clip)
        for seed in seeds_of(name, config):
            path = run_folder(name, seed, config) / "metrics.json"
            if path.exists():
                metrics = json.loads(path.read_text())
                if metrics["asked"] != asked:
                    raise UserError(
                        f"{path}: of other options; remove its folder, or name another --out"
                    )
                rows[name].append(metrics)
    return {n: runs for n, runs in rows.items() if len(runs) == len(seeds_of(n, config))}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def verdict(values: Sequence[float], others: Sequence[float]) -> str:
    """The difference of two rows' means, and whether it exceeds the noise of their seeds.

    Beyond: by more standard errors than Student's t at 95 % for the smaller number of seeds.
    """
    (mean, deviation), (other, other_deviation) = spread(values), spread(others)
    error = math.sqrt(deviation**2 / len(values) + other_deviation**2 / len(others))
    if math.isnan(error):
        return f"{mean - other:+.1f} (one seed)"
    limit = NOISE[min(len(values), len(others), 5)] * error
    side = "**beyond** the noise" if abs(mean - other) > limit else "inside the noise"
    return f"{mean - other:+.1f} ± {error:.1f}, {side}"


def table(names: Sequence[str], rows: dict[str, list[dict]]) -> list[str]:
    """Markdown lines of one table."""
    lines = [
        "| | mIoU | at its best threshold | difference | words assigned: nouns / adjectives "
        "| zero-shot on true regions / words | minutes a run | thesis (avg. of six) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = [name for name in names if name in rows]
    for name in names:
        at = {t: [f["mIoU"][str(t)] for f in rows[name]] for t in THRESHOLDS}
        best = max(THRESHOLDS, key=lambda t: statistics.mean(at[t]))
        other, difference = ROWS[name].against, ""
        if other in names:
            difference = verdict(at[0.4], [f["mIoU"]["0.4"] for f in rows[other]])
            difference += f" (to {ROWS[other].title})"
        shares = {}
        for kind, parts in (
            ("words", ("nouns", "adjectives")),
            ("true_masks", ("regions", "words")),
        ):
            if kind in rows[name][0]:
                means = (statistics.mean(f[kind][part] for f in rows[name]) for part in parts)
                shares[kind] = " / ".join(f"{mean:.0f} %" for mean in means)
        thesis = ROWS[name].thesis
        cells = [
            ROWS[name].title,
            mean_and_deviation(at[0.4]),
            f"{mean_and_deviation(at[best])} ({best})",
            difference,
            shares.get("words", ""),
            shares.get("true_masks", ""),
            f"{statistics.median(f['seconds'] for f in rows[name]) / 60:.1f}",
            "" if thesis is None else f"{thesis:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(rows: dict[str, list[dict]], maskclip: dict, config: AblateConfig) -> str:
    """results/ablation.md."""
    lines = [
        "# Ablations on the shapes world",
        "",
        f"Made by `python -m experiments.ablate`: {planned_steps(config)} steps a run; mIoU with "
        f"background in percent on {config.scenes} held-out scenes, refined, threshold 0.4: mean "
        "± standard deviation of the seeds. A difference is beyond the noise when it exceeds "
        "Student's t at 95 % times its standard error. *Words assigned*: words whose likeliest "
        "class (Eq. 3.3) is their noun. *Zero-shot*: accuracy of the frozen CLIP, twelve objects, "
        "on highlighted true regions and on highlighted true words, with the row's prompt "
        "everywhere else. The last column is the thesis's own, ViT-B/16 on six benchmarks, not "
        "measured here.",
        "",
        f"Without any training (MaskCLIP): {maskclip['0.4']:.1f}.",
    ]
    for title, names in TABLES.items():
        # Rows of the first table stand in others too, where they alone compare nothing.
        if any(name in rows for name in names if name not in PARTS or names == PARTS):
            seeds = ", ".join(f"{len(rows[n])} of {ROWS[n].title}" for n in names if n in rows)
            lines += ["", f"## {title}", "", f"Seeds: {seeds}.", "", *table(names, rows)]
    lines += ["", "![Scenes, ground truth and what each row of the first table makes of them]"]
    lines[-1] += "(ablation.png)"
    return "\n".join(lines)


def sheet(rows: dict[str, list[dict]], config: AblateConfig, scenes: int = 6) -> Image.Image:
    """The thesis's figure 4.3: image, ground truth and every variant of table 4.2."""
    names = [name for name in PARTS if name in rows]
    paths = [run_folder(name, seeds_of(name, config)[0], config) / "last.pt" for name in names]
    segmenters = [segmenter_of(path) for path in (None, *paths)]
    benchmark, colours = load_benchmark("shapes", ""), palette(len(shapes.OBJECTS))
    lines = []
    for i in range(scenes):
        large = shapes.scene("test", i, scale=2)
        image, small, size = Image.fromarray(large.image), benchmark.image(i), large.label.shape
        maps = [large.label.astype(int)]
        maps += [segmenter.label_map(small, True, size).numpy() for segmenter in segmenters]
        lines.append([image, *(overlay(image, labels - 1, colours) for labels in maps)])
    titles = ["image", "ground truth", "MaskCLIP", *(ROWS[name].title for name in names)]
    titles = ["baseline" if title == "image segmenter only" else title for title in titles]
    grid = contact_sheet(lines, titles, 2 * shapes.SIDE)
    return below(grid, legend(list(shapes.OBJECTS), colours, grid.width))


def main() -> None:
    (config,) = parse(__doc__, AblateConfig)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways of stopping are one
    names = config.rows or tuple(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise UserError(f"--rows {unknown[0]}: not one of {', '.join(ROWS)}")
    for given, values in (("--rows", names), ("--seeds", config.seeds)):
        if len(set(values)) < len(values):
            raise UserError(f"{given} {' '.join(map(str, values))}: one of them stands twice")
    finished(names, config)  # metrics of other options, before the hours
    run_all(names, config)
    rows, results = finished(names, config), Path(config.results)
    text = report(rows, mean_ious(segmenter_of(None), config.scenes), config)
    save_png(sheet(rows, config), results / "ablation.png")
    save_text(text, results / "ablation.md")
    print(f"{text}\n\n{results / 'ablation.md'}, {results / 'ablation.png'}")


if __name__ == "__main__":
    run_script(main)
