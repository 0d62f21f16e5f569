"""What the code returns while it runs on one pair and a small batch around it, for read.py.

Nothing is computed a second time for the page: `watched` keeps the arguments and results of the
functions of chapter 3 while `CoDe.forward` and `train.global_losses` call them.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoints.ours import load_learned, read_checkpoint
from clip import IMAGENET_TEMPLATES, embed_texts, load_clip, tokenize, visual_hidden
from config import MASK_PRESETS, LossConfig, MaskConfig, ModelConfig, TrainConfig
from data import Batch, PairStream, collate, shapes_tagger
from datasets import shapes
from datasets.protocols import completed
from dense import dense_embedding
from model import CoDe, hard_mask
from segmenter import Segmenter
from sources import ShapesWorld
from train import global_losses, logistic_noise

ROOT = Path(__file__).parents[1]
PAIRS = 8  # in the small batch; the first is the one that the page follows
WATCHED = (
    "model.ImageSegmenter.forward",
    "model.word_mask",
    "model.highlight_image",
    "losses.knowledge_loss",
    "losses.region_cosines",
    "losses.total_variation",
    "losses.pseudo_labels",
    "losses.word_mask_loss",
    "losses.info_nce",
)


@dataclass
class Pairs:
    """A small batch of held-out pairs, prepared as training prepares its own."""

    scenes: list[Image.Image]  # before augmentation
    captions: list[str]
    drawn: list[list[str]]  # each pair's J nouns
    others: list[list[str]]  # its remaining nouns
    batch: Batch


def find(name: str) -> tuple[Any, str, Any]:
    """What holds an object, its name there and the object, of "module.name" or
    "module.Class.name"."""
    module, *path = name.split(".")
    holder = importlib.import_module(module)
    for part in path[:-1]:
        holder = getattr(holder, part)
    return holder, path[-1], getattr(holder, path[-1])


@contextlib.contextmanager
def watched(names: Sequence[str]) -> Iterator[dict[str, list]]:
    """Keep the result of every call of these functions, by name, until the end of the block."""
    seen: dict[str, list] = {name: [] for name in names}

    def watching(name: str, function):
        @functools.wraps(function)
        def wrapper(*arguments, **named):
            seen[name].append(function(*arguments, **named))
            return seen[name][-1]

        return wrapper

    ours = [
        m for m in sys.modules.values() if str(getattr(m, "__file__", "")).startswith(str(ROOT))
    ]
    with contextlib.ExitStack() as stack:
        for name in names:
            holder, attribute, function = find(name)
            # A function is known under its name in every file that imports it.
            users = [m for m in ours if vars(m).get(attribute) is function]
            for user in users if holder in ours else [holder]:
                stack.enter_context(mock.patch.object(user, attribute, watching(name, function)))
        yield seen


def small_batch(pair: int, config: TrainConfig, context_length: int) -> Pairs:
    """The pair and the held-out scenes after it, each cropped, flipped and described at random."""
    source = ShapesWorld(500, "test")
    stream = PairStream(
        source,
        shapes_tagger(),
        PAIRS,
        config.nouns,
        context_length,
        shapes.SIDE,
        config.min_crop,
        0,
    )
    items = [(pair + i) % source.count for i in range(PAIRS)]
    samples = [stream.prepare(i, np.random.default_rng((config.seed, i))) for i in items]
    _, captions, drawn, others, _ = zip(*samples)
    batch = collate(*zip(*samples), context_length, with_released_labels=True)
    scenes = [Image.fromarray(source.scene(i).image) for i in items]
    return Pairs(scenes, list(captions), list(drawn), list(others), batch)


def first_model(content: dict) -> CoDe:
    """The model before its first step, which follows from the seed as in `train.main`."""
    torch.manual_seed(content["train_config"]["seed"])
    config = ModelConfig(**content["model_config"])
    return CoDe(load_clip(config.clip, config.clip_weights), config).eval()


def models(folder: Path, steps: Sequence[int]) -> list[CoDe]:
    """The model after each of these steps; the first is 0, and the last one's is last.pt."""
    found = []
    for step in steps:
        path = folder / ("last.pt" if step == steps[-1] else f"snapshots/{step}.pt")
        content = read_checkpoint(folder / "last.pt" if step == 0 else path)
        model = first_model(content)
        if step:
            load_learned(model, content["model"], path)
        found.append(model)
    return found


@torch.no_grad()
def observe(
    model: CoDe, pairs: Pairs, config: TrainConfig, loss_config: LossConfig
) -> SimpleNamespace:
    """Run the model and the losses on the small batch: what they returned on the way.

    seen: the results of WATCHED by name; d: the `Decomposition`; scales: 1 / tau; n: (J, b, C). Of
    the first pair alone: soft masks (J, H, W), the hard ones of three draws of noise, templates
    (`template_cosines`), and MaskCLIP's features `dense` (h, w, C).
    """
    batch = pairs.batch
    grid = tuple(model.config.cells_per_patch * side for side in model.clip.visual.grid_size)
    size, cpu = (config.nouns, len(batch.images), grid), torch.device("cpu")
    noises = [logistic_noise(*size, config.seed, step, cpu) for step in range(3)]
    with watched(WATCHED) as seen:
        d = model(batch, noises[0])
        global_losses(d, model, batch, loss_config)
    n = d.n.unflatten(0, (config.nouns, -1))
    own = model.image_segmenter.mask_logits(d.x_v, n.transpose(0, 1))[0]  # (J, H, W)
    return SimpleNamespace(
        seen=seen,
        d=d,
        scales={name: value.item() for name, value in model.logit_scales().items()},
        n=n,
        soft=own.sigmoid(),
        hard=[hard_mask(own, noise[:, 0]).round() for noise in noises],
        templates=template_cosines(model, pairs.drawn[0], n[:, 0]),
        dense=maskclip_features(model, batch.images[:1]),
        region_prompt=model.region_prompt.detach(),
    )


def template_cosines(model: CoDe, nouns: Sequence[str], n: Tensor) -> Tensor:
    """Cosines of n_j with every noun in CLIP's 80 hand-written prompts: (J, C) -> (J, J, 80)."""
    written = [
        embed_texts(model.clip, tokenize([form.format(noun) for form in IMAGENET_TEMPLATES]))
        for noun in nouns
    ]
    return torch.einsum("jc,ktc->jkt", n, torch.stack(written))


def maskclip_features(model: CoDe, image: Tensor) -> Tensor:
    """The frozen prior's features of one image: (1, 3, S, S) -> (h, w, C)."""
    grid = model.clip.visual.grid_size
    return dense_embedding(model.clip, visual_hidden(model.clip, image), grid)[0].unflatten(0, grid)


# --- section 4.1 ----------------------------------------------------------------------------------


@dataclass
class Large:
    """A large scene and its masks: of the mask branch alone, of the prior, refined, and mixed."""

    image: Image.Image
    names: list[str]
    settings: MaskConfig
    labels: np.ndarray  # (H, W): 0 is the surface, i the i-th name


def large_scene(surface: str, columns: int = 3, rows: int = 2) -> Large:
    """Held-out scenes on one surface side by side; the words are the objects in it. The stride is
    no divisor of the sides, so that the last windows are pulled back."""
    found = (shapes.scene("test", i) for i in range(500))
    scenes = [s for s in found if s.surfaces == (surface,) and len(s.things) > 1][: columns * rows]
    block = [scenes[i * columns : (i + 1) * columns] for i in range(rows)]
    image = np.block([[[s.image] for s in row] for row in block])
    label = np.block([[s.label for s in row] for row in block])
    names = sorted({thing.noun for s in scenes for thing in s.things})
    labels = np.zeros_like(label)
    for i, name in enumerate(names, start=1):
        labels[label == shapes.CLASS_NAMES.index(name)] = i
    preset = MASK_PRESETS["shapes"]
    settings = MaskConfig(**preset | {"short_side": rows * shapes.SIDE, "stride": 40})
    return Large(Image.fromarray(image), names, completed(settings), labels)


def branches(model: CoDe, large: Large) -> dict[str, Tensor]:
    """Masks of the large scene by what is switched off: {name: (N, H, W)}."""
    alone = replace(large.settings, prior_weight=0.0)
    kinds = {
        "prior": (None, replace(large.settings, method="maskclip", pamr=False)),
        "mask": (model, replace(alone, pamr=False)),
        "refined": (model, alone),
        "mixed": (model, large.settings),
    }
    return {
        name: Segmenter(model.clip, which, large.names, settings).scores(large.image)
        for name, (which, settings) in kinds.items()
    }
