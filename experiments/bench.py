"""Time and memory of every piece beside its plain form, at ViT-B/16 with random weights.

Examples:
    python -m experiments.bench --json bench.json
    python -m experiments.bench --only window      # pieces whose name holds this
    python -m experiments.bench --device cuda --precision bfloat16

Each piece has a process of its own, in which its plain form (`textbook.py`: PAMR and upsampling
from their definitions, open_clip's own blocks, texts of 77 tokens) and ours run in turn, several
times. The table gives medians of the time, and peaks of memory: the tensors of a form beyond those
that were there before, and the whole process while ours runs. The floor is a bare forward pass of
the frozen visual tower at 448 pixels, measured beside every window.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image

from clip import embed_texts, load_clip, tokenize, visual_hidden
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
from data import Batch, PairStream, collate, make_loader, nltk_tagger
from datasets import ade20k, coco_stuff, voc
from dense import DENSE
from experiments.textbook import padded, plain_forms, plain_pamr
from experiments.timing import compare, on_gpu, peak_memory
from losses import code_loss
from model import CoDe, UpsamplingBlock
from pamr import pamr
from segmenter import Segmenter
from sources import Shards
from support.device import autocast, choose_device, choose_precision
from support.files import save_text
from train import make_optimizer


@dataclass
class BenchConfig:
    """What is measured."""

    repeats: int = option(5, "runs of every form; the median counts", low=1)
    only: str | None = option(None, "only pieces whose name holds this")
    json: str | None = option(None, "file to write the measurements to")
    device: str = option("cpu", "where it is measured: cpu, cuda, cuda:1, ...")
    precision: str = option("float32", "of a training step and a window's matrix products")


# --- the pieces -----------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
BATCH_SIZES = (4, 8, 16, 32, 64)
NAMES = [*ade20k.CLASS_NAMES, *coco_stuff.CLASS_NAMES]


def make_model() -> CoDe:
    torch.manual_seed(0)
    return CoDe(load_clip("ViT-B-16-quickgelu", "none"), ModelConfig(clip_weights="none"))


def noise_image(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def refinement(config: BenchConfig) -> dict:
    """PAMR of 171 masks of 112 x 112: 8.6 MB of masks."""
    image, masks = torch.rand(1, 3, 448, 448), torch.rand(1, 171, 112, 112)
    assert torch.allclose(plain_pamr(image, masks), pamr(image, masks), atol=1e-4)
    forms = {"plain": lambda: plain_pamr(image, masks), "ours": lambda: pamr(image, masks)}
    return compare("refinement, 171 masks of 112 x 112", forms, config.repeats)


def upsampling(config: BenchConfig) -> dict:
    block, x = UpsamplingBlock(768), torch.randn(1, 56, 56, 768).movedim(-1, 1)

    @torch.no_grad()
    def plain():
        with plain_forms():
            block(x)

    forms = {"plain": plain, "ours": torch.no_grad()(lambda: block(x))}
    return compare("upsampling block, 56 to 112", forms, config.repeats)


def text(config: BenchConfig) -> dict:
    clip = make_model().clip
    tokens = tokenize([f"a photo of a {name}." for name in voc.CLASS_NAMES])

    @torch.no_grad()
    def plain():
        with plain_forms():
            embed_texts(clip, F.pad(tokens, (0, 77 - tokens.shape[1])))

    ours = torch.no_grad()(lambda: embed_texts(clip, tokens))
    return compare("text tower, 21 texts", {"plain": plain, "ours": ours}, config.repeats)


def window(classes: int, config: BenchConfig) -> dict:
    """One 448-pixel image to its label map."""
    model = make_model()
    clip, x = model.clip, torch.randn(1, 3, 448, 448)
    segmenter = Segmenter(clip, model, NAMES[:classes], MaskConfig(precision=config.precision))
    image = noise_image(448, 448)

    def ours():
        segmenter.label_map(image, background=False)

    def plain():
        with plain_forms():
            ours()

    forms = {"plain": plain, "ours": ours, "bare": partial(bare_tower, clip, x)}
    return compare(f"window of 448, {classes} classes", forms, config.repeats)


@torch.no_grad()
def bare_tower(clip: open_clip.CLIP, images: torch.Tensor) -> None:
    with plain_forms():
        clip.visual.transformer.resblocks[-1](visual_hidden(clip, images))


def dense_window(method: str, config: BenchConfig) -> dict:
    """One 448-pixel window of a method without training, to the cosines with 20 words."""
    clip, x = make_model().clip, torch.randn(1, 3, 448, 448)
    settings = MaskConfig(method=method, protocol="training-free", precision=config.precision)
    segmenter = Segmenter(clip, None, NAMES[:20], settings)
    forms = {"ours": partial(segmenter.masks, x), "bare": partial(bare_tower, clip, x)}
    return compare(f"window of 448, {method}", forms, config.repeats)


def make_batch(pairs: int, context_length: int) -> Batch:
    captions = ["a man in a red jacket rides a brown horse on the beach near the sea"] * pairs
    nouns, forms = [("horse", "beach")] * pairs, [["a photo of a {}.", "art of the {}."]] * pairs
    images = torch.randn(pairs, 3, 224, 224).unbind()
    return collate(images, captions, nouns, [()] * pairs, forms, context_length)


def make_step(model: CoDe, config: BenchConfig) -> Callable[[Batch], None]:
    """Forward, losses, backward and update of a batch, everything trained."""
    optimizer = make_optimizer(model, TrainConfig(lr=1e-9))
    device = model.context.device
    amp = autocast(device, choose_precision(config.precision, device))

    def step(batch: Batch) -> None:
        with amp:
            d = model(batch, torch.zeros(2, len(batch.images), 56, 56))
        terms = code_loss(d, model, LossConfig(), batch.noun_labels)
        optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        optimizer.step()

    return step


def training_step(config: BenchConfig) -> dict:
    """plain: texts of 77 tokens, convolution of upsampled features, open_clip's own blocks."""
    model = make_model()
    step, batch = make_step(model, config), make_batch(8, len(model.context))
    longer = padded(batch)

    def plain():
        with plain_forms():
            step(longer)

    both = {"plain": plain, "ours": lambda: step(batch)}
    return compare("training step, 8 pairs", both, config.repeats)


def batch_sizes(config: BenchConfig) -> dict:
    """Pairs a second and memory of a training step by batch size, as far as the memory goes."""
    model = make_model()
    step, found = make_step(model, config), {}
    for pairs in BATCH_SIZES if on_gpu() else BATCH_SIZES[:2]:
        batch = make_batch(pairs, len(model.context))
        try:
            result = compare(f"step of {pairs} pairs", {"ours": partial(step, batch)}, 1)
        except torch.OutOfMemoryError:
            break
        found[pairs] = (pairs / result["ours_s"], result["ours_mb"])
    return {"piece": "batch sizes", "by_pairs": found}


def growth(config: BenchConfig) -> dict:
    """What one more class, one more window and one more image cost."""
    model = make_model()

    def seconds(classes: int, width: int) -> float:
        segmenter = Segmenter(model.clip, model, NAMES[:classes], MaskConfig())
        image = noise_image(width, 448)
        forms = {"ours": lambda: segmenter.label_map(image, background=False)}
        return compare(f"{classes} classes, {width} pixels", forms, config.repeats)["ours_s"]

    by_class = {classes: seconds(classes, 448) for classes in (20, 120, 220, 320)}
    by_window = {1 + (width - 448) // 224: seconds(20, width) for width in (448, 672, 896, 1120)}
    segmenter = Segmenter(model.clip, model, NAMES[:20], MaskConfig())

    def one_image():  # as evaluate.py does: one label map after the other
        segmenter.label_map(noise_image(448, 448), background=False)

    peaks = {image: peak_memory(one_image) for image in range(1, 9)}
    result = {"piece": "growth"}
    for name, values in (("class", by_class), ("window", by_window)):
        slope, start = np.polyfit(list(values), list(values.values()), 1)
        worst = max(abs(start + slope * n - s) / s for n, s in values.items())
        result |= {f"by_{name}": values, f"s_per_{name}": slope, f"off_the_line_by_{name}": worst}
    return result | {"process_mb_by_images": peaks}


def write_shards(folder: str, shards: int = 4, pairs: int = 128) -> None:
    """Webdataset tars of photograph-like JPEGs of 512 pixels with captions of ten words."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(f"{folder}/{shard}.tar", "w") as tar:
            for i in range(pairs):
                coarse = rng.integers(0, 255, (32, 32, 3), np.uint8)
                file = io.BytesIO()
                image = Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC)
                image.save(file, "JPEG", quality=90)
                caption = b"a man in a red jacket rides a brown horse near the sea"
                for suffix, content in (("jpg", file.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def loader(config: BenchConfig) -> dict:
    """512 pairs of 512-pixel JPEGs from shards: decoding, tagging, cropping, tokenising."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder)
        source = Shards([f"{folder}/*.tar"])
        stream = PairStream(source, nltk_tagger(), 16, 2, 16, 224, 0.9, 0)

        def ours():
            batches = iter(make_loader(stream, 2, False))
            for _ in range(32):
                next(batches)

        name = "loader, 512 pairs of 512 pixels, 2 workers"
        result = compare(name, {"ours": ours}, config.repeats)
    return result | {"pairs_per_second": 512 / result["ours_s"]}


PIECES = {
    "refinement": refinement,
    "upsampling": upsampling,
    "text": text,
    "window20": partial(window, 20),
    "window171": partial(window, 171),
    **{f"window_{method}": partial(dense_window, method) for method in DENSE},
    "step": training_step,
    "batches": batch_sizes,
    "growth": growth,
    "loader": loader,
}


def print_table(results: list[dict]) -> None:
    columns = ("piece", "plain", "ours", "plain / ours", "ours / bare tower")
    print("| " + " | ".join([*columns, "plain MB", "ours MB", "process MB"]) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for r in results:
        if "ours_s" not in r:
            continue
        plain, ours, bare = r.get("plain_s"), r["ours_s"], r.get("bare_s")
        cells = [
            r["piece"],
            f"{plain:.3f} s" if plain else "",
            f"{ours:.3f} s",
            f"{plain / ours:.2f}" if plain else "",
            f"{ours / bare:.2f} ({bare:.3f} s)" if bare else "",
            f"{r['plain_mb']:.0f}" if plain else "",
            f"{r['ours_mb']:.0f}",
            f"{r['process_mb']:.0f}",
        ]
        print("| " + " | ".join(cells) + " |")
    for r in results:
        for pairs, (speed, memory) in r.get("by_pairs", {}).items():
            print(f"\nstep of {pairs} pairs: {speed:.1f} pairs per second, {memory:.0f} MB")
        if "pairs_per_second" in r:
            print(f"\n{r['piece']}: {r['pairs_per_second']:.0f} pairs per second")
        if r["piece"] == "growth":
            print(
                f"\na class more: {1000 * r['s_per_class']:.2f} ms (off the line by "
                f"{100 * r['off_the_line_by_class']:.0f} % at most); a window more: "
                f"{1000 * r['s_per_window']:.0f} ms ({100 * r['off_the_line_by_window']:.0f} %); "
                "process at images 1 to 8: "
                + ", ".join(f"{mb:.0f}" for mb in r["process_mb_by_images"].values())
                + " MB"
            )


def main() -> None:
    (config,) = parse(__doc__, BenchConfig)
    names = [name for name in PIECES if not config.only or config.only in name]
    if not names:
        raise UserError(f"--only {config.only}: none of {', '.join(PIECES)}")
    if len(names) == 1:
        if names[0] != "loader":  # whose workers must not touch a GPU
            torch.set_default_device(choose_device(config.device))
        results = [PIECES[names[0]](config)]
    else:
        results = []
        for name in names:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, "-m", "experiments.bench", "--only", name]
                command += ["--json", file.name, "--repeats", str(config.repeats)]
                command += ["--device", config.device]
                command += ["--precision", config.precision]
                if code := subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
                    raise UserError(f"{name}: ended with exit code {code}")
                results += json.loads(Path(file.name).read_text())
    print_table(results)
    if config.json:
        save_text(json.dumps(results, indent=1), config.json)


if __name__ == "__main__":
    run_script(main)
