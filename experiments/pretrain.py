"""Pretrain the shapes world's CLIP from scratch, on drawn images and their captions alone.

    python -m experiments.pretrain            # writes datasets/shapes_clip.pt

No class label and no mask is used. Half of the drawings hold a single object, and close-ups of
them are framed around it (the drawing program knows where it is), as photographs are around their
subject. A CLIP of 400 million web pairs needs none of the help given here; one that sees 40,000
drawings on a laptop needs two kinds:

- A *word head* on the class token predicts which words the caption holds (and is thrown away at
  the end). A contrastive loss alone solves colours and surfaces and never starts on objects.
- *Mosaics*: four close-ups of single objects make one image, and the tokens of each before the
  last block, averaged, must predict the words of its own caption (through another head that is
  thrown away). Without it the transformer parks an object's identity in background patches.

The dense value features that MaskCLIP reads are left to themselves, as in CLIPs of the web. At the
end a new text tower is trained for the finished image tower, which takes two minutes: it starts
with long embeddings, which keep words and their places visible in the last hidden states, where
the text segmenter looks for them. The whole residual stream is then scaled down.
"""

import math
import multiprocessing
import sys
import time
from dataclasses import dataclass

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import save_checkpoint
from clip import (
    IMAGENET_TEMPLATES,
    PRIOR_TEMPLATES,
    SHAPES_ARCHITECTURE,
    SHAPES_WEIGHTS,
    embed_texts,
    image_embedding,
    tokenize,
    visual_hidden,
)
from config import TrainConfig, option, parse, run_script
from datasets import shapes
from experiments.measure import retrieval_accuracy, to_input, zero_shot_accuracy
from losses import info_nce
from support.files import refuse_folder
from train import make_optimizer

WORDS = (*shapes.NOUNS, *shapes.ADJECTIVES)  # what the word head predicts


@dataclass
class PretrainConfig:
    """The three stages; their images are drawn with repetition from the drawn scenes."""

    scenes: int = option(40_000, "drawn, half of them with a single object", low=2)
    batch_size: int = option(64, "pairs in a step", low=1)
    word_steps: int = option(1500, "stage 1: word head and mosaics, close-ups alone", low=0)
    contrast_steps: int = option(
        3000, "stage 2: InfoNCE and word head on whole scenes, mosaics", low=1
    )
    text_steps: int = option(
        1800, "stage 3: InfoNCE of a new text tower, of the first 10,000 scenes", low=1
    )
    seed: int = option(0, "of weights and batches", low=0)
    out: str = option(str(SHAPES_WEIGHTS), "file to write")


def draw_scene(job: tuple[int, int | None]) -> shapes.Scene:
    return shapes.scene("pretrain", *job)


def caption_for(rng: np.random.Generator, scene: shapes.Scene, coloured: float) -> str:
    """A new caption of a scene; a single object is sometimes named by one of CLIP's templates, six
    of which hold an adjective of their own ("a photo of the large {}.").

    coloured: how often at least an object's colour is named. Captions that always do are told
    apart by colours, and the objects come late.
    """
    if len(scene.things) == 1 and rng.random() < 0.4:
        phrase = shapes.describe(rng, scene.things[0], article=False, coloured=coloured)
        return IMAGENET_TEMPLATES[rng.integers(80)].format(phrase)
    return shapes.caption_of(rng, scene.things, scene.surfaces, coloured)


def words_in(captions: list[str]) -> Tensor:
    """1 where a caption holds one of WORDS: (B, len(WORDS)) float."""
    split = [set(caption.replace(",", " ").replace(".", " ").split()) for caption in captions]
    return torch.tensor([[float(word in s) for word in WORDS] for s in split])


def close_up(rng: np.random.Generator, scene: shapes.Scene) -> np.ndarray:
    """A quarter of a single-object scene, framed around the object: (SIDE / 2, SIDE / 2, 3)."""
    side = shapes.SIDE // 2
    middle = np.array([scene.things[0].y, scene.things[0].x]) * shapes.SIDE
    top, left = np.clip(middle - side / 2 + rng.uniform(-9, 9, 2), 0, side).astype(int)
    return scene.image[top : top + side, left : left + side]


def mosaic(images: Tensor, rng: np.random.Generator, patch: int) -> tuple[Tensor, Tensor]:
    """Four close-ups in one image, moved around by whole patches: (4 B, 3, s, s).

    Returns (B, 3, 2s, 2s) and the share of each close-up that a patch is: (B, 4, h*w), a sum of 1
    over the patches. Close-up 4 i + k is the k-th of image i.
    """
    side, half = images.shape[-1], images.shape[-1] // patch
    rows = images.view(-1, 2, 2, 3, side, side).permute(0, 3, 1, 4, 2, 5)
    mixed = rows.reshape(-1, 3, 2 * side, 2 * side)
    quarters = torch.eye(4).view(4, 2, 2).repeat_interleave(half, 1).repeat_interleave(half, 2)
    share = (quarters / half**2).repeat(len(mixed), 1, 1, 1)
    for i in range(len(mixed)):
        y, x = rng.integers(2 * half, size=2).tolist()
        mixed[i] = mixed[i].roll((patch * y, patch * x), (1, 2))
        share[i] = share[i].roll((y, x), (1, 2))
    return mixed, share.flatten(2)


class Helpers(nn.Module):
    """What predicts words from CLIP's tokens during pretraining, and is thrown away afterwards."""

    def __init__(self):
        super().__init__()
        width = SHAPES_ARCHITECTURE["vision_cfg"]["width"]
        self.word_head = nn.Linear(SHAPES_ARCHITECTURE["embed_dim"], len(WORDS))
        self.region_norm, self.region_head = nn.LayerNorm(width), nn.Linear(width, len(WORDS))


def contrastive_loss(clip: open_clip.CLIP, images: Tensor, captions: list[str]) -> Tensor:
    """CLIP's InfoNCE, the sum of both directions, of image embeddings (B, C) and captions."""
    texts = embed_texts(clip, tokenize(captions))
    return 2 * info_nce(images, texts, clip.logit_scale.exp().clamp(max=100))


def word_loss(
    clip: open_clip.CLIP, helpers: Helpers, x: Tensor, captions: list[str], contrast: bool
) -> Tensor:
    """The words of each caption from the class token; with `contrast`, CLIP's InfoNCE too."""
    pooled, words = image_embedding(clip, x), words_in(captions)
    loss = 10 * F.binary_cross_entropy_with_logits(helpers.word_head(10 * pooled), words)
    return loss + contrastive_loss(clip, pooled, captions) if contrast else loss


def mosaic_loss(
    clip: open_clip.CLIP,
    helpers: Helpers,
    x: Tensor,
    captions: list[str],
    rng: np.random.Generator,
) -> Tensor:
    """The words of each close-up of a mosaic, from the tokens where it lies.

    x: 4 B close-ups, captions: theirs.
    """
    x, share = mosaic(x, rng, clip.visual.patch_size[0])
    tokens = helpers.region_norm(visual_hidden(clip, x)[:, 1:])
    logits = helpers.region_head((share @ tokens).flatten(0, 1))  # (4 B, len(WORDS))
    return 20 * F.binary_cross_entropy_with_logits(logits, words_in(captions))


def clip_optimizer(learned: nn.Module) -> torch.optim.AdamW:
    """That of CoDe's training, with CLIP's own constants."""
    optimizer = make_optimizer(learned, TrainConfig(weight_decay=0.05))
    for group in optimizer.param_groups:
        group |= {"betas": (0.9, 0.98), "eps": 1e-8}
    return optimizer


def set_learning_rate(
    optimizer: torch.optim.Optimizer,
    step: int,
    constant: int,
    falling: int,
    peak: float = 1e-3,
    warmup: int = 100,
) -> None:
    """`constant` steps at the peak, then `falling` ones to zero by a cosine; in the first of them
    a linear warm-up."""
    cosine = math.cos(math.pi * max(0, step - constant) / falling)
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (step + 1) / warmup) * (1 + cosine) / 2


def update(optimizer: torch.optim.Optimizer, learned: nn.Module, loss: Tensor) -> None:
    """A step down the loss's gradient, whose norm is at most 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def lengthen_embeddings(clip: open_clip.CLIP) -> None:
    """Start the text tower with embeddings of words and positions several times as long as
    open_clip's, the positions as sines and cosines (wavelengths of 2 to 173 words).

    So its last hidden states still tell which word stands where: the text segmenter needs both.
    """
    nn.init.normal_(clip.token_embedding.weight, std=0.1)
    count, width = clip.positional_embedding.shape
    turns = math.pi * 100 ** -torch.linspace(0, 1, width // 2 + 1)[:-1]
    angles = torch.arange(count)[:, None] * turns
    clip.positional_embedding[:, 0::2] = 0.07 * angles.sin()
    clip.positional_embedding[:, 1::2] = 0.07 * angles.cos()


def with_new_text_tower(
    clip: open_clip.CLIP, scenes: list[shapes.Scene], drawn: np.ndarray, config: PretrainConfig
) -> open_clip.CLIP:
    """Stage 3: a new CLIP with this one's image tower, as it is stored, and a text tower that
    learns to name its embeddings of the scenes, whose images are `drawn` (N, H, W, 3)."""
    torch.manual_seed(config.seed)
    rng = np.random.default_rng((config.seed, 3))
    new = open_clip.CLIP(**SHAPES_ARCHITECTURE)
    lengthen_embeddings(new)
    new.visual.load_state_dict({k: v.half() for k, v in clip.visual.state_dict().items()})
    with torch.no_grad():
        parts = (drawn[i : i + 100] for i in range(0, len(drawn), 100))
        images = torch.cat([image_embedding(new, to_input(part)) for part in parts])

    optimizer = clip_optimizer(new)  # without gradients the image tower stays
    for step in tqdm(range(config.text_steps), "text tower"):
        set_learning_rate(optimizer, step, 0, config.text_steps)
        chosen = rng.choice(len(scenes), config.batch_size)
        captions = [caption_for(rng, scenes[i], coloured=0.9) for i in chosen]
        update(optimizer, new, contrastive_loss(new, images[chosen], captions))
    return new


@torch.no_grad()
def shorten_text_states(clip: open_clip.CLIP, factor: float) -> None:
    """Make the text tower's hidden states `factor` times as long, without changing E^t.

    Whatever is added to its residual stream is scaled, and every LayerNorm takes the scale out
    again. The text segmenter's fresh blocks stand on these states: short ones they can turn in a
    few hundred steps, long ones they cannot.
    """
    added = [clip.token_embedding.weight, clip.positional_embedding]
    for block in clip.transformer.resblocks:
        for last in (block.attn.out_proj, block.mlp.c_proj):
            added += [last.weight, last.bias]
    for parameter in added:
        parameter.mul_(factor)


def store(clip: open_clip.CLIP, scenes: list[shapes.Scene], path: str, made: str) -> None:
    """Write the weights in half precision, of the token embeddings only those that are used."""
    texts = [t.format(n) for t in (*IMAGENET_TEMPLATES, *PRIOR_TEMPLATES) for n in shapes.NOUNS]
    texts += [" ".join(WORDS), "A photo of x", *(scene.caption for scene in scenes)]
    tokens = open_clip.tokenize(texts).unique()
    state = {name: value.half() for name, value in clip.state_dict().items()}
    state["token_embedding.weight"] = state["token_embedding.weight"][tokens].clone()
    save_checkpoint({"state": state, "tokens": tokens, "made": made}, path)


def main() -> None:
    (config,) = parse(__doc__, PretrainConfig)
    refuse_folder(config.out)  # not after half an hour
    start = time.time()
    torch.set_num_threads(1)  # a network this small gains a quarter from a second one
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)

    jobs = [(i, 1 if i % 2 else None) for i in range(config.scenes)]
    with multiprocessing.Pool() as pool:
        drawn = pool.imap(draw_scene, jobs, chunksize=100)
        scenes = list(tqdm(drawn, "drawing scenes", config.scenes))
    images = np.stack([scene.image for scene in scenes])
    single = np.arange(1, config.scenes, 2)

    clip, helpers = open_clip.CLIP(**SHAPES_ARCHITECTURE), Helpers()
    learned = nn.ModuleList([clip, helpers]).train()
    optimizer = clip_optimizer(learned)

    bar = tqdm(range(config.word_steps + config.contrast_steps), "pretraining")
    for step in bar:
        contrast = step >= config.word_steps
        set_learning_rate(optimizer, step, config.word_steps, config.contrast_steps)

        whole = contrast and step % 2 == 0
        count = config.batch_size if step % 2 == 0 else 4 * config.batch_size
        chosen = rng.choice(config.scenes if whole else single, count)
        captions = [caption_for(rng, scenes[i], coloured=0.6) for i in chosen]
        if whole:
            x = to_input(images[chosen])
        else:
            x = to_input(np.stack([close_up(rng, scenes[i]) for i in chosen]))
        flipped = torch.from_numpy(rng.random(len(x)) < 0.5)
        x[flipped] = x[flipped].flip(-1)

        with torch.autocast("cpu", torch.bfloat16):
            if step % 2:
                loss = mosaic_loss(clip, helpers, x, captions, rng)
            else:
                loss = word_loss(clip, helpers, x, captions, contrast)
        update(optimizer, learned, loss)
        bar.set_postfix(stage=1 + contrast, loss=f"{loss.item():.3f}", refresh=False)

    clip = with_new_text_tower(clip, scenes[:10_000], images[:10_000], config).eval()
    shorten_text_states(clip, 0.25)
    made = " ".join(["python -m experiments.pretrain", *sys.argv[1:]])
    made += f": {time.time() - start:.0f} s"
    store(clip, scenes, config.out, made)
    print(
        f"held-out scenes: {zero_shot_accuracy(clip):.1f} % of the objects, "
        f"{retrieval_accuracy(clip):.1f} % retrieval among 100"
    )
    print(f"{config.out}: {made}")


if __name__ == "__main__":
    run_script(main)
