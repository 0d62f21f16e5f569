"""Train the model that comes with the shapes world: CoDe, on eleven times the preset's pairs.

    make model        # 1.5 hours of two slow cores; writes datasets/shapes_code.pt
    python -m experiments.shapes_model --run out/trial --out out/trial/model.pt --steps 100

One training of train.py in two processes, which leaves in --run what every training leaves, and the
model after some of the steps for `make read`. What it learned is then stored in half precision,
with the training's log beside it: segment.py and evaluate.py take it where no other is named. The
same command makes the same file, bit for bit, on the same kind of machine. Cut off, it goes on with
--resume.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import read_checkpoint, save_checkpoint
from config import UserError, option, parse, run_script
from experiments.measure import (
    ON_SHAPES,
    ONE_THREAD,
    ROOT,
    kept_steps,
    mean_ious,
    region_and_word_accuracy,
    run_training,
    segmenter_of,
    word_assignment_accuracy,
)
from support.files import refuse_folder, save_text

# Words need more triplets of image, noun and words than regions do. With three nouns a step has 192
# of them instead of 128, and takes 1.2 times as long. In probes batches of 64, and labels of half
# the preset's weight, brought adjectives a little further too (results/log.md).
LONGER = ("--batch-size", "64", "--nouns", "3", "--lambda-seg-t", "0.25")
STEPS, PROCESSES = 1100, 2


@dataclass
class ShapesModelConfig:
    """The shipped model's training."""

    run: str = option("out/shapes_model", "folder of the training")
    steps: int = option(STEPS, "training steps of 64 pairs", low=1)
    resume: bool = option(False, "go on with the training in --run")
    scenes: int = option(500, "held-out scenes that it is measured on", low=1)
    out: str = option(
        "out/shapes_model/shapes_code.pt", "file to write; the log becomes a .jsonl beside it"
    )


def train(config: ShapesModelConfig) -> None:
    """The training, in processes of one thread each. Raises UserError."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    options = [*ON_SHAPES, *LONGER, "--steps", str(config.steps), "--checkpoint-every", "50"]
    options += ["--out", config.run]
    options += ["--keep-steps", *map(str, kept_steps(config.steps))]
    options += ["--resume"] * config.resume
    command = [sys.executable, *launch, str(ROOT / "train.py"), *options]
    run_training(command, os.environ | ONE_THREAD)


def store(run: Path, out: Path) -> None:
    """What was learned, in half precision, and how, without what a training needs to go on."""
    content = read_checkpoint(run / "last.pt")
    state = {k: v.half() if v.is_floating_point() else v for k, v in content["model"].items()}
    save_checkpoint({key: content[key] for key in ("model_config", "clip")} | {"model": state}, out)
    save_text((run / "log.jsonl").read_text("utf-8").rstrip(), out.with_suffix(".jsonl"))


def main() -> None:
    (config,) = parse(__doc__, ShapesModelConfig)
    refuse_folder(config.out)  # told now, not after hours
    if Path(config.run, "last.pt").exists() and not config.resume:
        raise UserError(f"{config.run} holds a training: --resume goes on, or name another --run")
    train(config)
    out = Path(config.out)
    store(Path(config.run), out)
    torch.set_num_threads(1)  # a network this small gains little from more
    segmenter = segmenter_of(out)
    miou = mean_ious(segmenter, config.scenes)[str(segmenter.config.threshold)]
    words = word_assignment_accuracy(segmenter.model, config.scenes)
    objects = region_and_word_accuracy(segmenter, config.scenes)
    print(f"{out}: {out.stat().st_size:,} bytes; {config.scenes} held-out scenes, in percent:")
    print(f"mIoU {miou:.1f}; assigned: nouns {words['nouns']:.1f}, ", end="")
    print(f"adjectives {words['adjectives']:.1f};")
    print("objects: " + ", ".join(f"{name} {value:.1f}" for name, value in objects.items()))


if __name__ == "__main__":
    run_script(main)
