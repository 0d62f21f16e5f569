"""What the page shows: the `Decomposition` of held-out pairs after some steps of a training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor

from checkpoint import load_model, read_checkpoint
from clip import load_clip
from config import ModelConfig, TrainConfig, UserError
from data import Batch, PairStream, ShapesWorld, collate, shapes_tagger
from datasets import shapes
from model import CoDe, Decomposition
from train import logistic_noise

PAIRS, NOUNS = 8, 2  # in the batch; the first pair is the one that the page follows
CPU = torch.device("cpu")


@dataclass
class Pairs:
    """Held-out pairs, cropped and flipped as in training, with two nouns each drawn."""

    captions: list[str]
    nouns: list[list[str]]  # each pair's two drawn nouns
    batch: Batch

    def tokens(self) -> list[str]:
        """The first caption's tokens as text, from SOS to EOT."""
        decoder = open_clip.get_tokenizer("ViT-B-16-quickgelu").decoder
        ids = self.batch.caption_tokens[0]
        ids = ids[: int(ids.argmax()) + 1].tolist()
        return ["SOS", *(decoder[i].removesuffix("</w>") for i in ids[1:-1]), "EOT"]


@dataclass
class Observation:
    """The network after some steps, and what it makes of the pairs."""

    step: int
    pairs: Pairs
    d: Decomposition
    region_prompt: Tensor  # P^v
    temperature: float  # tau of Eq. 3.7
    log: Path  # of the whole training


Observations = Sequence[Observation]


def small_batch(first: int, config: TrainConfig, context_length: int) -> Pairs:
    """The pair and the held-out scenes after it."""
    source = ShapesWorld(500, "test")
    stream = PairStream(
        source,
        shapes_tagger(),
        pairs=PAIRS,
        nouns=NOUNS,
        context_length=context_length,
        size=shapes.SIDE,
        min_crop=config.min_crop,
        seed=config.seed,
    )
    items = [(first + i) % source.count for i in range(PAIRS)]
    samples = [stream.prepare(i, np.random.default_rng((config.seed, i))) for i in items]
    _, captions, drawn, _, _ = zip(*samples)
    return Pairs(list(captions), list(drawn), collate(*zip(*samples), context_length))


def first_model(config: ModelConfig, seed: int) -> CoDe:
    """The model before its first step, which follows from the seed as in `train.main`."""
    torch.manual_seed(seed)
    return CoDe(load_clip(config.clip, config.clip_weights), config).eval()


@torch.no_grad()
def observe(run: Path, pair: int) -> list[Observation]:
    """The pairs before the training and after every step of which it kept a file.

    run: a training's folder, with last.pt, log.jsonl and step-N.pt. Raises UserError.
    """
    kept = {int(path.stem.removeprefix("step-")): path for path in run.glob("step-*.pt")}
    if not kept:
        raise UserError(
            f"{run} holds no step-N.pt to show: `make model` leaves some in out/shapes_model, "
            "`make demo` in out/demo"
        )
    content = read_checkpoint(run / "last.pt")
    config = TrainConfig(**content["train_config"])
    models = {0: first_model(ModelConfig(**content["model_config"]), config.seed)}
    models |= {step: load_model(kept[step], CPU) for step in sorted(kept)}

    pairs = small_batch(pair, config, len(models[0].context))
    noise = logistic_noise(models[0], pairs.batch, config.seed, 0)
    seen = []
    for step, model in models.items():
        d = model(pairs.batch, noise)
        tau = 1 / model.logit_scales()["hcl"].item()
        seen.append(Observation(step, pairs, d, model.region_prompt, tau, run / "log.jsonl"))
    return seen
