"""What the shapes world and its CLIP allow: the image segmenter trained with the true masks.

    python -m experiments.bound                       # the shipped CLIP, 500 steps
    python -m experiments.bound --weights FILE        # another of the same architecture

No method that learns from captions alone will do better with this segmenter on this CLIP, so this
is measured before hours are spent on either. The network and its start are those of training; the
loss is the binary cross-entropy of every class's mask, under the fixed embeddings of the class
names, and the optimizer AdamW at a constant rate for all of it, without augmentation. mIoU is that
of held-out `val` scenes without the prior branch, each at the best of a few thresholds.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clip import SHAPES_WEIGHTS, load_clip, visual_hidden
from config import MASK_PRESETS, TRAIN_PRESETS, MaskConfig, ModelConfig, option, parse, run_script
from datasets import shapes
from evaluate import make_segmenter
from experiments.measure import mean_ious, to_input
from model import CoDe

THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)  # of the background


@dataclass
class BoundConfig:
    """Training with true masks."""

    weights: str = option(str(SHAPES_WEIGHTS), "the CLIP, a file of experiments.pretrain")
    steps: int = option(500, "optimizer steps of 16 scenes", low=1)
    scenes: int = option(8000, "scenes of `train` to draw the batches from", low=16)
    held_out: int = option(200, "scenes of `val` that are measured", low=1)
    lr: float = option(2e-3, "AdamW's learning rate, constant", low=0.0)
    seed: int = option(0, "of the batches and of the segmenter's start", low=0)


def class_masks(labels: np.ndarray, cells: int) -> Tensor:
    """Share of every cell that each object covers: (B, 12, cells, cells)."""
    one_hot = F.one_hot(torch.from_numpy(labels).long(), len(shapes.CLASS_NAMES))[..., 1:]
    return F.adaptive_avg_pool2d(one_hot.movedim(-1, 1).float(), cells)


def main() -> None:
    (config,) = parse(__doc__, BoundConfig)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    names = {name: TRAIN_PRESETS["shapes"][name] for name in ("mask_scale", "mask_bias")}
    settings = ModelConfig(clip="shapes", context_init="a photo of a", **names)
    model = CoDe(load_clip("shapes", config.weights), settings)
    segmenter, nouns = model.image_segmenter, model.class_embedding(list(shapes.OBJECTS))
    cells = settings.cells_per_patch * model.clip.visual.grid_size[0]

    drawn = [shapes.scene("train", i) for i in tqdm(range(config.scenes), "drawing scenes")]
    images, labels = (np.stack([getattr(s, part) for s in drawn]) for part in ("image", "label"))
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=config.lr, weight_decay=0.01)
    bar = tqdm(range(config.steps), "training with true masks")
    for _ in bar:
        chosen = rng.choice(config.scenes, 16, replace=False)
        x, target = to_input(images[chosen]), class_masks(labels[chosen], cells)
        with torch.no_grad():
            hidden = visual_hidden(model.clip, x)
        logits = segmenter.mask_logits(segmenter(hidden, tuple(x.shape[-2:])), nouns)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    refined = MaskConfig(**MASK_PRESETS["shapes"], prior_weight=0.0)
    for name, mask_config in (("unrefined", replace(refined, pamr=False)), ("refined", refined)):
        found = make_segmenter(model.clip, model, shapes.load(""), mask_config)
        at = mean_ious(found, config.held_out, THRESHOLDS, "val")
        miou, threshold = max((miou, threshold) for threshold, miou in at.items())
        print(f"{name}: {miou:.1f} mIoU at threshold {threshold}")


if __name__ == "__main__":
    run_script(main)
