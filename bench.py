"""Time and memory of every piece beside its textbook form, at ViT-B/16 with random weights.

Examples:
    python bench.py --json bench.json
    python bench.py --only window      # pieces whose name holds this

Each piece has a process of its own, in which its plain form (`textbook.py`, from the definition)
and ours run in turn, several times. The table gives medians of the time, and peaks of memory: the
tensors of a form beyond those that were there before, and the whole process while ours runs. The
floor is a bare forward pass of the frozen visual tower at 448 pixels, measured beside every window.
"""

import copy
import ctypes
import gc
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import evaluate as evaluation
import model as method
from clip import embed_texts, load_clip, tokenize, visual_hidden
from config import LossConfig, MaskConfig, ModelConfig, UserError, option, parse, run, save_text
from data import PairStream, collate, make_loader, nltk_tagger
from datasets import ade20k, coco_stuff, voc
from losses import code_losses
from model import CoDe
from pamr import pamr
from sources import Shards
from textbook import padded, plain_pamr, textbook


@dataclass
class BenchConfig:
    """What is measured."""

    repeats: int = option(5, "runs of every form; the median counts", low=1)
    only: str | None = option(None, "only pieces whose name holds this")
    json: str | None = option(None, "file to write the figures to")


# --- measuring ------------------------------------------------------------------------------------


def resident() -> float:
    """Memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def timed(function: Callable) -> float:
    """Seconds."""
    tick = time.perf_counter()
    function()
    return time.perf_counter() - tick


def allocated(function: Callable, held: Callable | None) -> float:
    """MB of tensors at the peak of a function, beyond those that were there before it.

    held: makes what the function's form holds in memory besides.
    """
    with torch.profiler.profile(profile_memory=True) as profiler:
        kept = held() if held else None
        function()
        del kept
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0)) / 1e6


def peak_memory(function: Callable) -> float:
    """MB of this process at its peak, freed memory having been given back before.

    Not measured together with the time: watching slows down what is watched.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak[0]


def compare(
    name: str, forms: dict[str, Callable], repeats: int, held: dict[str, Callable] | None = None
) -> dict:
    """Medians of the forms' times, run in turn, and their peaks of memory.

    held: what a form holds in memory besides; made before its time is taken.
    """
    seconds: dict[str, list] = {form: [] for form in forms}
    result: dict = {"piece": name}
    held = held or {}
    for form, function in forms.items():  # also warms up
        result[f"{form}_mb"] = allocated(function, held.get(form))
    result["process_mb"] = peak_memory(forms["ours"])
    for _ in tqdm(range(repeats), name):
        for form, function in forms.items():
            kept = held[form]() if form in held else None
            seconds[form].append(timed(function))
            del kept
    return result | {f"{form}_s": statistics.median(values) for form, values in seconds.items()}


# --- the pieces -----------------------------------------------------------------------------------

CPU = torch.device("cpu")
NAMES = [*ade20k.CLASS_NAMES, *coco_stuff.CLASS_NAMES]


def make_model() -> CoDe:
    torch.manual_seed(0)
    return CoDe(load_clip("ViT-B-16-quickgelu", "none"), ModelConfig(clip_weights="none"))


def noise_picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def refinement(repeats: int) -> dict:
    """PAMR of 171 planes of 112 x 112: 8.6 MB of masks."""
    image, masks = torch.rand(1, 3, 448, 448), torch.rand(1, 171, 112, 112)
    assert torch.allclose(plain_pamr(image, masks), pamr(image, masks), atol=1e-4)
    forms = {"plain": lambda: plain_pamr(image, masks), "ours": lambda: pamr(image, masks)}
    return compare("refinement, 171 planes of 112 x 112", forms, repeats)


def upsampling(repeats: int) -> dict:
    block, x = method.UpsamplingBlock(768), torch.randn(1, 56, 56, 768)

    @torch.no_grad()
    def plain():
        with textbook():
            block(x)

    forms = {"plain": plain, "ours": torch.no_grad()(lambda: block(x))}
    return compare("upsampling block, 56 to 112", forms, repeats)


def text(repeats: int) -> dict:
    clip = make_model().clip
    tokens = tokenize([f"a photo of a {name}." for name in voc.CLASS_NAMES])

    @torch.no_grad()
    def plain():
        with textbook():
            embed_texts(clip, F.pad(tokens, (0, 77 - tokens.shape[1])))

    ours = torch.no_grad()(lambda: embed_texts(clip, tokens))
    return compare("text tower, 21 texts", {"plain": plain, "ours": ours}, repeats)


def window(classes: int, repeats: int) -> dict:
    """One 448-pixel picture to its label map; the plain form has a tower for each branch."""
    model = make_model()
    clip, x = model.clip, torch.randn(1, 3, 448, 448)
    segmenter = evaluation.Segmenter(clip, model, NAMES[:classes], MaskConfig())
    picture = noise_picture(448, 448)

    def ours():
        segmenter.label_map(picture, CPU, background=False)

    def plain():
        with textbook(), torch.no_grad():
            visual_hidden(clip, x)  # the other branch's own tower
            ours()

    @torch.no_grad()
    def bare():
        with textbook():
            clip.visual.transformer.resblocks[-1](visual_hidden(clip, x))

    forms = {"plain": plain, "ours": ours, "bare": bare}
    return compare(f"window of 448, {classes} classes", forms, repeats)


def training_step(repeats: int) -> dict:
    """Forward, losses, backward and update of 8 pairs with two nouns each, everything trained.

    plain: texts of 77 tokens, convolution of upsampled features, three copies of CLIP, whose
    blocks run as open_clip writes them.
    """
    model = make_model()
    captions = ["a man in a red jacket rides a brown horse on the beach near the sea"] * 8
    forms = ["a photo of a {}.", "art of the {}."]
    images = torch.randn(8, 3, 224, 224).unbind()
    context = len(model.context)
    batch = collate(images, captions, [("horse", "beach")] * 8, [()] * 8, [forms] * 8, context)
    longer = padded(batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    model.train()

    def step(batch):
        d = model(batch, torch.zeros(16, 56, 56))
        terms = code_losses(d, model, batch.caption_tokens, batch.noun_labels, LossConfig())
        optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        optimizer.step()

    def plain():
        with textbook():
            step(longer)

    def copies():
        return [copy.deepcopy(model.clip) for _ in range(2)]

    both = {"plain": plain, "ours": lambda: step(batch)}
    return compare("training step, 8 pairs", both, repeats, held={"plain": copies})


def growth(repeats: int) -> dict:
    """What one more class, one more window and one more image cost."""
    model = make_model()

    def seconds(classes: int, width: int) -> float:
        segmenter = evaluation.Segmenter(model.clip, model, NAMES[:classes], MaskConfig())
        picture = noise_picture(width, 448)
        forms = {"ours": lambda: segmenter.label_map(picture, CPU, background=False)}
        return compare(f"{classes} classes, {width} pixels", forms, repeats)["ours_s"]

    by_class = {classes: seconds(classes, 448) for classes in (20, 120, 220, 320)}
    by_window = {1 + (width - 448) // 224: seconds(20, width) for width in (448, 672, 896, 1120)}
    segmenter = evaluation.Segmenter(model.clip, model, NAMES[:20], MaskConfig())

    def one_image():  # as evaluate.py does: one label map after the other
        segmenter.label_map(noise_picture(448, 448), CPU, background=False)

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
                picture = Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC)
                picture.save(file, "JPEG", quality=90)
                caption = b"a man in a red jacket rides a brown horse near the sea"
                for suffix, content in (("jpg", file.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def loader(repeats: int) -> dict:
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
        result = compare(name, {"ours": ours}, repeats)
    return result | {"pairs_per_second": 512 / result["ours_s"]}


PIECES = {
    "refinement": refinement,
    "upsampling": upsampling,
    "text": text,
    "window20": lambda repeats: window(20, repeats),
    "window171": lambda repeats: window(171, repeats),
    "step": training_step,
    "growth": growth,
    "loader": loader,
}


def print_table(results: list[dict]) -> None:
    columns = ("piece", "plain", "ours", "plain / ours", "ours / bare tower")
    print("| " + " | ".join([*columns, "plain MB", "ours MB", "process MB"]) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for r in results:
        if r["piece"] == "growth":
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
        results = [PIECES[names[0]](config.repeats)]
    else:
        results = []
        for name in names:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, __file__, "--only", name, "--json", file.name]
                command += ["--repeats", str(config.repeats)]
                if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                    raise UserError(f"{name}: ended with exit code {code}")
                results += json.loads(Path(file.name).read_text())
    print_table(results)
    if config.json:
        save_text(json.dumps(results, indent=1), config.json)


if __name__ == "__main__":
    run(main)
