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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import fingerprint, read_checkpoint
from clip import load_clip
from config import MASK_PRESETS, TRAIN_PRESETS, UserError, option, parse, run_script
from experiments.demo import sheet
from experiments.measure import (
    THRESHOLDS,
    mean_ious,
    segmenter_of,
    start_training,
    training_seconds,
    true_mask_accuracy,
    word_assignment_accuracy,
)
from support.draw import save_png
from support.files import save_text


@dataclass
class AblateConfig:
    """Which rows, over which seeds."""

    rows: tuple[str, ...] = option((), "rows to train and to show (default: all)")
    seeds: tuple[int, ...] = option(
        (), "training seeds (default: 0 to 4 in table 4.2, 0 to 2 in the others)"
    )
    steps: int = option(TRAIN_PRESETS["shapes"]["steps"], "training steps", low=1)
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


# --- the runs -------------------------------------------------------------------------------------


def seeds_of(name: str, config: AblateConfig) -> Sequence[int]:
    return config.seeds or range(5 if name in PARTS else 3)


def run_folder(name: str, seed: int, config: AblateConfig) -> Path:
    return Path(config.out) / name / str(seed)


def check_settings(names: Sequence[str], config: AblateConfig) -> None:
    """Note in --out what all its runs were made with. Raises UserError if that was another."""
    settings = {"--steps": config.steps, "--scenes": config.scenes}
    settings |= {"the preset": TRAIN_PRESETS["shapes"], "the masks' preset": MASK_PRESETS["shapes"]}
    settings["the CLIP"] = fingerprint(load_clip("shapes"))
    settings |= {f"the row {name}": ROWS[name].options for name in names}
    settings = json.loads(json.dumps(settings))  # as they are read back
    path = Path(config.out) / "settings.json"
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise UserError(
                f"{config.out}: its runs are of other options ({name}); remove it, or name another "
                "--out"
            )
    save_text(json.dumps(before | settings, indent=1), path)


def run_once(name: str, seed: int, config: AblateConfig, trainings: set[subprocess.Popen]) -> None:
    """Train one row with one seed, going on from its last checkpoint if it has one; measure it."""
    folder = run_folder(name, seed, config)
    options = [*ROWS[name].options, "--seed", str(seed), "--steps", str(config.steps)]
    options += ["--checkpoint-every", "100"]
    options += ["--resume"] if (folder / "last.pt").exists() else []
    training = start_training(folder, *options)
    trainings.add(training)
    line = (training.communicate()[1].strip().splitlines() or ["no message"])[-1]
    trainings.remove(training)
    if training.returncode:
        raise UserError(f"{folder}: training ended with exit code {training.returncode}: {line}")
    if read_checkpoint(folder / "last.pt")["step"] < config.steps:
        raise KeyboardInterrupt  # it was asked to stop, and saved

    segmenter = segmenter_of(folder / "last.pt")
    metrics = {"mIoU": mean_ious(segmenter, config.scenes)}
    metrics["true_masks"] = true_mask_accuracy(segmenter.model, config.scenes)
    if segmenter.model.decomposes_text:
        metrics["words"] = word_assignment_accuracy(segmenter.model, config.scenes)
    metrics["seconds"] = training_seconds(folder)
    save_text(json.dumps(metrics, indent=1), folder / "metrics.json")


def run_all(names: Sequence[str], config: AblateConfig) -> None:
    """All runs that are missing, `jobs` at a time."""
    wanted = [(name, seed) for name in names for seed in seeds_of(name, config)]
    wanted.sort(key=lambda job: job[1])  # one seed of every row after the other
    missing = [job for job in wanted if not (run_folder(*job, config) / "metrics.json").exists()]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are done", flush=True)
    torch.set_num_threads(1)
    trainings: set[subprocess.Popen] = set()  # those that run now
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        futures = {pool.submit(run_once, *job, config, trainings): job for job in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                print(f"{run_folder(*futures[future], config)}: done", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for training in list(trainings):
                training.terminate()  # finishes its step and saves
            raise


def read_metrics(name: str, config: AblateConfig) -> list[dict]:
    """Of every seed of a row."""
    folders = [run_folder(name, seed, config) for seed in seeds_of(name, config)]
    return [json.loads((folder / "metrics.json").read_text("utf-8")) for folder in folders]


# --- what is written ------------------------------------------------------------------------------


def mean_and_deviation(values: Sequence[float]) -> str:
    """Of the seeds of a run, as it is printed; of one seed the mean alone."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def percentages(runs: list[dict], kind: str, parts: tuple[str, str]) -> str:
    """Means over the seeds, where the row has this kind of metrics."""
    if kind not in runs[0]:
        return ""
    return " / ".join(f"{statistics.mean(run[kind][part] for run in runs):.0f} %" for part in parts)


def verdict(values: Sequence[float], others: Sequence[float]) -> str:
    """The difference of two rows' means, and whether it exceeds the noise of their seeds.

    Beyond: by more standard errors than Student's t at 95 % for the smaller number of seeds.
    """
    difference, seeds = statistics.mean(values) - statistics.mean(others), (values, others)
    if min(map(len, seeds)) == 1:
        return f"{difference:+.1f} (one seed)"
    error = math.sqrt(sum(statistics.variance(found) / len(found) for found in seeds))
    limit = NOISE[min(5, *map(len, seeds))] * error
    side = "**beyond** the noise" if abs(difference) > limit else "inside the noise"
    return f"{difference:+.1f} ± {error:.1f}, {side}"


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
        thesis = ROWS[name].thesis
        cells = [
            ROWS[name].title,
            mean_and_deviation(at[0.4]),
            f"{mean_and_deviation(at[best])} ({best})",
            difference,
            percentages(rows[name], "words", ("nouns", "adjectives")),
            percentages(rows[name], "true_masks", ("regions", "words")),
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
        f"Made by `python -m experiments.ablate`: {config.steps} steps a run; mIoU with "
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
    lines += ["", "![Scenes, and the regions of every row of the first table](ablation.png)"]
    return "\n".join(lines)


def main() -> None:
    (config,) = parse(__doc__, AblateConfig)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways of stopping are one
    names = config.rows or tuple(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        raise UserError(f"--rows {unknown[0]}: not one of {', '.join(ROWS)}")
    for given, values in (("--rows", names), ("--seeds", config.seeds)):
        if len(set(values)) < len(values):
            raise UserError(f"{given} {' '.join(map(str, values))}: one of them stands twice")
    check_settings(names, config)
    run_all(names, config)

    results, rows = Path(config.results), {name: read_metrics(name, config) for name in names}
    text = report(rows, mean_ious(segmenter_of(None), config.scenes), config)
    shown = {"MaskCLIP": None}
    for name in (name for name in PARTS if name in names):
        shown[ROWS[name].title] = run_folder(name, seeds_of(name, config)[0], config) / "last.pt"
    segmenters = {title: segmenter_of(path) for title, path in shown.items()}
    save_png(sheet(segmenters, rows=6), results / "ablation.png")
    save_text(text, results / "ablation.md")
    print(f"{text}\n\n{results / 'ablation.md'}, {results / 'ablation.png'}")


if __name__ == "__main__":
    run_script(main)
