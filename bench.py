"""Time and memory of every piece beside its textbook form, at ViT-B/16 with random weights.

Example:
    python bench.py --json bench.json

Each piece runs in turn in its plain form (written here from the definition) and in ours, several
times; the table gives medians and the peak of memory above what was held before. The floor is a
bare forward pass of the frozen visual tower at 448 pixels.
"""

import contextlib
import copy
import io
import json
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import evaluate as evaluation
import model as method
from clip import embed_texts, load_clip, tokenize, visual_hidden
from config import LossConfig, MaskConfig, ModelConfig, option, parse, run, save_text
from data import PairStream, collate, make_loader, nltk_tagger
from datasets import ade20k, coco_stuff, voc
from losses import code_losses
from model import CoDe
from pamr import pamr
from sources import Shards


@dataclass
class BenchConfig:
    """What is measured."""

    repeats: int = option(5, "runs of every form; the median counts")
    only: str | None = option(None, "only pieces whose name holds this")
    json: str | None = option(None, "file to write the figures to")


# --- the textbook forms ---------------------------------------------------------------------------


def plain_pamr(
    image: Tensor,
    masks: Tensor,
    iterations: int = 10,
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
) -> Tensor:
    """PAMR as it is defined: all neighbours of all masks are formed in every step."""
    height, width = masks.shape[-2:]
    image = F.interpolate(image, (height, width), mode="bilinear", align_corners=True)

    def neighbours(x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 8 * len(dilations), H, W)
        shifted = []
        for d in dilations:
            padded = F.pad(x, (d, d, d, d), mode="replicate")
            for y in (0, d, 2 * d):
                for left in (0, d, 2 * d):
                    if (y, left) != (d, d):
                        shifted.append(padded[..., y : y + height, left : left + width])
        return torch.stack(shifted, dim=2)

    around, centre = neighbours(image), image[:, :, None]
    sampled = torch.cat([around, *[centre] * len(dilations)], dim=2)
    spread = 1e-8 + 0.1 * sampled.std(dim=2, keepdim=True)
    weights = (-(around - centre).abs() / spread).mean(1, keepdim=True).softmax(dim=2)
    for _ in range(iterations):
        masks = (neighbours(masks) * weights).sum(dim=2)
    return masks


def plain_upsample_and_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def plain_embed_texts(clip: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """All 77 positions of every text."""
    return embed_texts(clip, F.pad(tokens, (0, 77 - tokens.shape[1])))


@contextlib.contextmanager
def textbook():
    """Ours with every piece replaced by its textbook form."""
    ours = method.upsample_and_convolve, evaluation.pamr
    method.upsample_and_convolve, evaluation.pamr = plain_upsample_and_convolve, plain_pamr
    try:
        yield
    finally:
        method.upsample_and_convolve, evaluation.pamr = ours


# --- measuring ------------------------------------------------------------------------------------


def resident() -> float:
    """Memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def measure(function: Callable) -> tuple[float, float]:
    """Seconds, and the peak of memory above its start in MB."""
    start, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            peak[0] = max(peak[0], resident() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    tick = time.perf_counter()
    function()
    seconds = time.perf_counter() - tick
    done.set()
    watcher.join()
    return seconds, peak[0]


def compare(name: str, plain: Callable | None, ours: Callable, repeats: int) -> dict:
    """Run both forms in turn; medians of time, and the highest peak of memory."""
    forms = {"plain": plain, "ours": ours} if plain else {"ours": ours}
    runs: dict[str, list] = {form: [] for form in forms}
    ours()  # warm up
    for _ in tqdm(range(repeats), name):
        for form, function in forms.items():
            runs[form].append(measure(function))
    result = {"piece": name}
    for form, values in runs.items():
        result[f"{form}_s"] = statistics.median(seconds for seconds, _ in values)
        result[f"{form}_mb"] = max(peak for _, peak in values)
    return result


# --- the pieces -----------------------------------------------------------------------------------


def refinement(repeats: int) -> dict:
    image, masks = torch.rand(1, 3, 448, 448), torch.rand(1, 171, 112, 112)
    a, b = plain_pamr(image, masks), pamr(image, masks)
    assert torch.allclose(a, b, atol=1e-4)
    name = "refinement, 171 planes of 112 x 112"
    return compare(name, lambda: plain_pamr(image, masks), lambda: pamr(image, masks), repeats)


def upsampling_block(repeats: int) -> dict:
    block, x = method.UpsamplingBlock(768), torch.randn(1, 56, 56, 768)

    @torch.no_grad()
    def plain():
        with textbook():
            block(x)

    return compare("upsampling block, 56 to 112", plain, torch.no_grad()(lambda: block(x)), repeats)


def text_tower(clip: open_clip.CLIP, repeats: int) -> dict:
    tokens = tokenize([f"a photo of a {name}." for name in voc.CLASS_NAMES])
    plain = torch.no_grad()(lambda: plain_embed_texts(clip, tokens))
    ours = torch.no_grad()(lambda: embed_texts(clip, tokens))
    return compare("text tower, 21 texts", plain, ours, repeats)


def bare_forward(clip: open_clip.CLIP, repeats: int) -> dict:
    """The floor: the frozen visual tower, last block included."""
    x = torch.randn(1, 3, 448, 448)

    @torch.no_grad()
    def forward():
        clip.visual.transformer.resblocks[-1](visual_hidden(clip, x))

    return compare("bare visual tower at 448", None, forward, repeats)


def window(model: CoDe, names: Sequence[str], repeats: int) -> dict:
    """One 448-pixel picture to its label map; the plain form has a tower for each branch."""
    segmenter = evaluation.Segmenter(model.clip, model, names, MaskConfig())
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (448, 448, 3), np.uint8))
    cpu = torch.device("cpu")

    def ours():
        segmenter.label_map(picture, cpu, background=False)

    def plain():
        with textbook(), torch.no_grad():
            visual_hidden(model.clip, torch.randn(1, 3, 448, 448))  # the other branch's own tower
            ours()

    return compare(f"window, {len(names)} classes", plain, ours, repeats)


def training_step(model: CoDe, repeats: int) -> dict:
    """Forward, losses, backward and update of 8 pairs, all parameters trained."""
    captions = ["a man in a red jacket rides a brown horse on the beach near the sea"] * 8
    nouns, forms = [("horse", "beach")] * 8, [["a photo of a {}.", "art of the {}."]] * 8
    images = torch.randn(8, 3, 224, 224).unbind()
    batch = collate(images, captions, nouns, [()] * 8, forms, len(model.context))
    padded = replace(
        batch,
        **{
            name: F.pad(value, (0, 77 - value.shape[1]), value=-1 if name == "noun_labels" else 0)
            for name, value in vars(batch).items()
            if name in ("caption_tokens", "noun_tokens", "knowledge_tokens", "noun_labels")
        },
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    model.train()

    def step(batch):
        d = model(batch, torch.zeros(16, 56, 56))
        terms = code_losses(d, model, batch.caption_tokens, batch.noun_labels, LossConfig())
        optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        optimizer.step()

    def plain():
        if not held:
            held.extend(copy.deepcopy(model.clip) for _ in range(2))
        with textbook():
            step(padded)

    held: list = []
    result = compare("training step, 8 pairs", plain, lambda: step(batch), repeats)
    held.clear()
    return result


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

        result = compare("loader, 512 pairs of 512 pixels, 2 workers", None, ours, repeats)
    result["pairs_per_second"] = 512 / result["ours_s"]
    return result


def main() -> None:
    (config,) = parse(__doc__, BenchConfig)
    torch.manual_seed(0)
    clip = load_clip("ViT-B-16-quickgelu", "none")
    model = CoDe(clip, ModelConfig(clip_weights="none"))
    names_171 = [*ade20k.CLASS_NAMES, *coco_stuff.CLASS_NAMES][:171]
    pieces = {
        "refinement": lambda: refinement(config.repeats),
        "upsampling": lambda: upsampling_block(config.repeats),
        "text": lambda: text_tower(clip, config.repeats),
        "bare": lambda: bare_forward(clip, config.repeats),
        "window20": lambda: window(model, voc.CLASS_NAMES[1:], config.repeats),
        "window171": lambda: window(model, names_171, config.repeats),
        "step": lambda: training_step(model, config.repeats),
        "loader": lambda: loader(config.repeats),
    }
    results = [piece() for name, piece in pieces.items() if not config.only or config.only in name]
    bare = next((r["ours_s"] for r in results if r["piece"].startswith("bare")), None)
    lines = ["| piece | plain | ours | ratio | of the bare tower | plain MB | ours MB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in results:
        plain, ours = r.get("plain_s"), r["ours_s"]
        cells = [
            r["piece"],
            f"{plain:.3f} s" if plain else "",
            f"{ours:.3f} s",
            f"{plain / ours:.2f}" if plain else "",
            f"{ours / bare:.2f}" if bare and r["piece"].startswith("window") else "",
            f"{r['plain_mb']:.0f}" if plain else "",
            f"{r['ours_mb']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if config.json:
        save_text(json.dumps(results, indent=1), config.json)


if __name__ == "__main__":
    run(main)
