"""Methods without training, and CoDe with each of them as its prior branch, on the shapes world.

    python -m experiments.methods        # after `python -m experiments.ablate --rows cwr`

Every trained run is evaluated four ways; nothing is trained here. It writes methods.md into
--results.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from config import UserError, option, parse, run_script
from datasets.protocols import PROTOCOLS
from dense import DENSE
from experiments.measure import mean_and_deviation, mean_ious, segmenter_of
from support.files import save_text

# Of the background: of a mask under the thesis's protocol, of a probability under the other.
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass
class MethodsConfig:
    """What is compared."""

    runs: str = option("out/ablation/cwr", "folder of trained runs, SEED/last.pt")
    scenes: int = option(500, "held-out scenes that the metrics are measured on", low=1)
    results: str = option("results", "folder for methods.md")


def cells(segmenters: Sequence, scenes: int) -> list[str]:
    """mIoU of some segmenters (seeds) at the protocol's threshold, and at the best one."""
    own = segmenters[0].config.background
    thresholds = sorted({own, *THRESHOLDS})
    found = [mean_ious(segmenter, scenes, thresholds) for segmenter in segmenters]
    best = max(map(str, thresholds), key=lambda t: statistics.mean(f[t] for f in found))
    at_own, at_best = ([metrics[t] for metrics in found] for t in (str(own), best))
    return [mean_and_deviation(at_own), f"{mean_and_deviation(at_best)} ({best})"]


def row(title: str, checkpoints: Sequence[Path | None], scenes: int, **options) -> str:
    """Refined and not refined, under one protocol."""
    columns = [title]
    for pamr in (True, False):
        segmenters = [segmenter_of(path, pamr=pamr, **options) for path in checkpoints]
        columns += cells(segmenters, scenes)
    line = "| " + " | ".join(columns) + " |"
    print(line, flush=True)
    return line


def main() -> None:
    (config,) = parse(__doc__, MethodsConfig)
    checkpoints = sorted(Path(config.runs).glob("*/last.pt"))
    if not checkpoints:
        raise UserError(f"--runs {config.runs}: no */last.pt in it; `python -m experiments.ablate`")
    seeds = ", ".join(path.parent.name for path in checkpoints)
    torch.set_num_threads(1)
    lines = [
        "# Methods without training on the shapes world",
        "",
        "Made by `python -m experiments.methods`: mIoU with background in percent on "
        f"{config.scenes} held-out scenes; CoDe's runs are those of `experiments/ablate.py`, seeds "
        f"{seeds}, trained once and evaluated with each prior branch. Of every pair of columns the "
        "first is at the protocol's own threshold of the background, the second at the best one.",
        "",
        "NACLIP's σ is five patches: at 14 to 21 patches a side, where it was chosen, a quarter to "
        "a third of the side. Here, at 12 patches a side, it is five twelfths of it, so that the "
        "nearness of patches hardly tells them apart.",
    ]
    for protocol in PROTOCOLS:
        lines += ["", f"## The {protocol} protocol", ""]
        lines += ["| | refined | | not refined | |", "|---|---|---|---|---|"]
        options = {"scenes": config.scenes, "protocol": protocol}
        lines += [row(name, [None], method=name, **options) for name in DENSE]
        lines += [
            row(f"CoDe, {name} as its prior", checkpoints, prior=name, **options) for name in DENSE
        ]
    save_text("\n".join(lines) + "\n", Path(config.results, "methods.md"))
    print(f"\n{config.results}/methods.md")


if __name__ == "__main__":
    run_script(main)
