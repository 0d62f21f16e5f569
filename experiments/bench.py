"""Time and memory at ViT-B/16 with random weights, alone or beside another checkout.

    python -m experiments.bench                         # this checkout
    python -m experiments.bench --against ../before     # and another one of this repository
    python -m experiments.bench --only step --device cuda --precision bfloat16

Every piece runs in a process of its own, one for each checkout, which imports its own code. They
take turns, so that whatever else the machine does meets both alike. The table gives medians of the
time, and peaks of the memory: of the whole process, or on a GPU of its tensors.
"""

import contextlib
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clip import load_clip
from config import (
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    option,
    parse,
    run_script,
)
from data import collate
from datasets.coco_stuff import CLASS_NAMES
from evaluate import Segmenter
from losses import code_loss
from model import CoDe
from support.device import autocast, choose_device, choose_precision
from train import make_optimizer

HERE = Path(__file__).parents[1]


@dataclass
class BenchConfig:
    """What is measured."""

    against: str | None = option(None, "another checkout of this repository")
    only: str | None = option(None, "one piece: window20, window171, step or classes")
    repeats: int = option(5, "turns of every checkout, after one that is not counted", low=1)
    device: str = option("cpu", "where it is measured: cpu, cuda, cuda:1, ...")
    precision: str = option("float32", "of a training step and a window's matrix products")
    worker: bool = option(False, "(of its own use) measure --only, once for every line of stdin")


# --- the pieces -----------------------------------------------------------------------------------


def window(model: CoDe, config: BenchConfig, classes: int) -> Callable:
    """One image of 448 x 448 to its label map."""
    settings = MaskConfig(precision=config.precision)
    segmenter = Segmenter(model.clip, model, CLASS_NAMES[:classes], settings)
    pixels = np.random.default_rng(0).integers(0, 255, (448, 448, 3), np.uint8)
    return lambda: segmenter.label_map(Image.fromarray(pixels), background=False)


def training_step(model: CoDe, config: BenchConfig, pairs: int = 8) -> Callable:
    """Forward pass, losses, backward pass and update, with everything trained."""
    device = model.context.device
    captions = ["a man in a red jacket rides a brown horse on the beach near the sea"] * pairs
    nouns, forms = [("horse", "beach")] * pairs, [["a photo of a {}.", "art of the {}."]] * pairs
    images = torch.randn(pairs, 3, 224, 224).unbind()
    batch = collate(images, captions, nouns, [()] * pairs, forms, len(model.context)).to(device)
    noise = torch.zeros(2, pairs, 56, 56, device=device)
    optimizer = make_optimizer(model, TrainConfig(lr=1e-9))
    amp = autocast(device, choose_precision(config.precision, device))

    def step() -> None:
        with amp:
            d = model(batch, noise)
        optimizer.zero_grad()
        code_loss(d, model, LossConfig(), batch.noun_labels)["total"].backward()
        optimizer.step()

    return step


def class_embeddings(model: CoDe, config: BenchConfig) -> Callable:
    """Of the 171 names of COCO-Stuff."""
    return torch.no_grad()(lambda: model.class_embedding(CLASS_NAMES))


PIECES = {
    "window20": ("window of 448, 20 classes", lambda *given: window(*given, classes=20)),
    "window171": ("window of 448, 171 classes", lambda *given: window(*given, classes=171)),
    "step": ("training step of 8 pairs", training_step),
    "classes": ("class embeddings of 171 names", class_embeddings),
}


# --- the processes --------------------------------------------------------------------------------


def work(config: BenchConfig) -> None:
    """For every line of stdin run the piece and print its seconds; at the end the peak in MB."""
    device = choose_device(config.device)
    torch.manual_seed(0)
    clip = load_clip("ViT-B-16-quickgelu", "none")
    model = CoDe(clip, ModelConfig(clip_weights="none")).to(device)
    function = PIECES[config.only][1](model, config)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in sys.stdin:
        start = time.perf_counter()
        function()
        wait()
        print(time.perf_counter() - start, flush=True)
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)  # KB on Linux


def start_worker(piece: str, checkout: Path, config: BenchConfig) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.bench", "--worker", "--only", piece]
    command += ["--device", config.device, "--precision", config.precision]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=checkout, env=quiet, **pipes)


def take_turn(worker: subprocess.Popen) -> float:
    """Seconds of one run. Raises UserError if the worker has ended."""
    with contextlib.suppress(BrokenPipeError):
        print(file=worker.stdin, flush=True)
    line = worker.stdout.readline()
    if not line:
        raise UserError(f"{' '.join(worker.args)}: ended with exit code {worker.wait()}")
    return float(line)


def compare(piece: str, checkouts: list[Path], config: BenchConfig) -> list[tuple[float, float]]:
    """Median of the seconds, and peak in MB, of a piece in every checkout."""
    workers = [start_worker(piece, checkout, config) for checkout in checkouts]
    try:
        turns = [[take_turn(worker) for worker in workers] for _ in range(1 + config.repeats)]
        medians = [statistics.median(seconds) for seconds in zip(*turns[1:])]
        return [(s, float(worker.communicate()[0])) for s, worker in zip(medians, workers)]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def main() -> None:
    (config,) = parse(__doc__, BenchConfig)
    if config.only is not None and config.only not in PIECES:
        raise UserError(f"--only {config.only}: not one of {', '.join(PIECES)}")
    if config.worker:
        return work(config)
    checkouts = [HERE]
    if config.against:
        checkouts.append(Path(config.against))
        if not (checkouts[-1] / "experiments" / "bench.py").exists():
            raise UserError(f"--against {config.against}: holds no experiments/bench.py")
    print("| | seconds | there | there / here | MB | there |")
    print("|---|---|---|---|---|---|", flush=True)
    for piece in [config.only] if config.only else PIECES:
        (seconds, mb), *there = compare(piece, checkouts, config)
        cells = [PIECES[piece][0], f"{seconds:.3f}", "", "", f"{mb:.0f}", ""]
        for other, other_mb in there:
            cells[2:4] = [f"{other:.3f}", f"{other / seconds:.2f}"]
            cells[5] = f"{other_mb:.0f}"
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    run_script(main)
