"""Does co-decomposition fail because CLIP has never seen blanked images? Show it some, and see.

    python -m experiments.blanks                 # minutes of one core; writes out/blanks/clip.pt
    python -m experiments.blanks --no-blank --out out/blanks/control.pt
    python -m experiments.ablate --rows baseline c --seeds 0 1 --out out/blanks/runs \\
        --results out/blanks -- --clip-weights out/blanks/clip.pt

Section 3.3 says that CLIP, trained on whole images, misreads highlighted ones, whose blanks it has
never seen. So the shipped image tower is trained on with single objects on plain ground among whole
scenes. The control sees the same objects on their own ground. A penalty keeps the dense features of
whole scenes, which masks are made of, as the shipped tower has them.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import save_checkpoint
from clip import (
    IMAGENET_TEMPLATES,
    SHAPES_WEIGHTS,
    dense_embedding,
    image_embedding,
    load_clip,
    visual_hidden,
)
from config import ModelConfig, UserError, option, parse, run_script
from datasets import shapes
from experiments.measure import (
    mean_ious,
    retrieval_accuracy,
    segmenter_of,
    to_input,
    true_mask_accuracy,
    zero_shot_accuracy,
)
from experiments.pretrain import clip_optimizer, contrastive_loss, set_learning_rate, update
from model import CoDe
from support.files import refuse_folder

HALF = 32  # whole scenes in a batch, and as many single objects
PEAK_RATE, WARMUP_STEPS = 2e-4, 40
HOLD = 10  # weight of the dense features' cosine distance


@dataclass
class BlanksConfig:
    """The image tower's further training."""

    steps: int = option(200, "training steps of 64 images", low=1)
    scenes: int = option(6000, "drawn, half of them with a single object", low=2)
    blank: bool = option(True, "single objects on plain ground; otherwise on their own ground")
    seed: int = option(0, "of the batches", low=0)
    held_out: int = option(300, "held-out scenes that both towers are measured on", low=1)
    out: str = option("out/blanks/clip.pt", "file to write")


def name_of(rng: np.random.Generator, thing: shapes.Thing) -> str:
    """One of CLIP's templates, which speak of no ground: "a photo of the large striped kite."."""
    template = IMAGENET_TEMPLATES[rng.integers(len(IMAGENET_TEMPLATES))]
    return template.format(shapes.describe(rng, thing, article=False))


def draw_batch(
    rng: np.random.Generator, whole: list[shapes.Scene], single: list[shapes.Scene], blank: bool
) -> tuple[Tensor, list[str]]:
    """Whole scenes, then single objects, half of all mirrored: (64, 3, SIDE, SIDE), captions.

    blank: the objects' ground is 0, CLIP's mean colour, as where Eq. 3.4 has no P^v.
    """
    some = [whole[i] for i in rng.choice(len(whole), HALF)]
    alone = [single[i] for i in rng.choice(len(single), HALF)]
    captions = [shapes.caption_of(rng, scene.things, scene.surfaces) for scene in some]
    captions += [name_of(rng, scene.things[0]) for scene in alone]
    objects = to_input(np.stack([scene.image for scene in alone]))
    if blank:
        objects *= torch.from_numpy(np.stack([scene.label > 0 for scene in alone]))[:, None]
    x = torch.cat([to_input(np.stack([scene.image for scene in some])), objects])
    mirrored = torch.from_numpy(rng.random(len(x)) < 0.5)
    x[mirrored] = x[mirrored].flip(-1)
    return x, captions


def dense(clip: open_clip.CLIP, x: Tensor) -> Tensor:
    """The features that masks are made of, of every patch: (B, h*w, C), normalised."""
    return dense_embedding(clip, visual_hidden(clip, x), clip.visual.grid_size)


def train_on(clip: open_clip.CLIP, config: BlanksConfig) -> None:
    """CLIP's InfoNCE with a frozen text tower, and HOLD times the cosine distance of the whole
    scenes' dense features from those of before."""
    before, rng = copy.deepcopy(clip), np.random.default_rng(config.seed)
    whole = [shapes.scene("pretrain", i) for i in range(0, config.scenes, 2)]
    single = [shapes.scene("pretrain", i, objects=1) for i in range(1, config.scenes, 2)]
    learned = nn.ModuleList([clip.visual.requires_grad_(True)])
    optimizer = clip_optimizer(learned)
    for step in tqdm(range(config.steps), "image tower"):
        set_learning_rate(optimizer, step, 0, config.steps, PEAK_RATE, WARMUP_STEPS)
        x, captions = draw_batch(rng, whole, single, config.blank)
        with torch.no_grad():
            held = dense(before, x[:HALF])
        distance = 1 - (dense(clip, x[:HALF]) * held).sum(-1).mean()
        loss = contrastive_loss(clip, image_embedding(clip, x), captions)
        update(optimizer, learned, loss + HOLD * distance)


def store(clip: open_clip.CLIP, out: str) -> None:
    """The shipped file with this image tower, in half precision."""
    content = torch.load(SHAPES_WEIGHTS, weights_only=True)
    tower = {f"visual.{name}": value.half() for name, value in clip.visual.state_dict().items()}
    save_checkpoint(content | {"state": content["state"] | tower}, out)


def main() -> None:
    (config,) = parse(__doc__, BlanksConfig)
    refuse_folder(config.out)
    if Path(config.out).resolve() == SHAPES_WEIGHTS.resolve():
        raise UserError(f"--out {config.out}: the shipped CLIP; name another file")
    torch.set_num_threads(1)
    clip = load_clip("shapes")
    train_on(clip, config)
    store(clip, config.out)
    for path in (SHAPES_WEIGHTS, Path(config.out)):
        clip = load_clip("shapes", str(path))
        untrained = CoDe(clip, ModelConfig())  # its P^v is zeros: blanks
        regions = true_mask_accuracy(untrained, config.held_out)["regions"]
        miou = mean_ious(segmenter_of(None, path), config.held_out)["0.4"]
        objects = zero_shot_accuracy(clip, config.held_out)
        retrieval = retrieval_accuracy(clip, max(1, config.held_out // 100))
        print(f"{path}: true regions on blanks named rightly {regions:.1f} %; ", end="")
        print(f"objects {objects:.1f} %, retrieval {retrieval:.1f} %, MaskCLIP {miou:.1f}")


if __name__ == "__main__":
    run_script(main)
