"""What the experiments measure on the shapes world: of a run its regions, words and prompts; of a
CLIP what it knows of this world."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor

from checkpoints import load_method
from clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    PRIOR_TEMPLATES,
    embed_texts,
    end_of_text,
    image_embedding,
    noun_prompts,
    template_embedding,
    text_embedding,
    tokenize,
    visual_hidden,
)
from config import MASK_PRESETS, MaskConfig
from data import select_nouns, shapes_tagger
from datasets import load_benchmark, shapes
from datasets.protocols import completed
from dense import dense_embedding
from evaluate import IoU, make_segmenter
from model import CoDe, highlight_image, highlight_text
from segmenter import Segmenter, arg_max, with_background

THRESHOLDS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)  # of the background; 0.4 is the thesis's


def segmenter_of(checkpoint: Path | None, **options) -> Segmenter:
    """The segmenter of a run on the held-out scenes; without a checkpoint MaskCLIP's, or that of
    another --method. options: fields of MaskConfig."""
    options = {"method": "code" if checkpoint else "maskclip"} | options
    path = str(checkpoint) if checkpoint else None
    settings = MaskConfig(**MASK_PRESETS["shapes"] | {"checkpoint": path} | options)
    clip, model = load_method(completed(settings), torch.device("cpu"))
    return make_segmenter(clip, model, load_benchmark("shapes", ""), settings)


def mean_ious(
    segmenter: Segmenter,
    scenes: int,
    thresholds: Sequence[float] = THRESHOLDS,
    split: str = "test",
) -> dict[str, float]:
    """mIoU on held-out scenes at every threshold of the background, masks being made once."""
    benchmark = shapes.load("", split, scenes)
    sums = {threshold: IoU(len(benchmark.class_names)) for threshold in thresholds}
    for i in range(scenes):
        image = benchmark.image(i)
        best, index = arg_max(segmenter.scores(image), image.size[::-1])
        for threshold, iou in sums.items():
            labels = with_background(best, index - segmenter.first_class, threshold)
            iou.add(labels.numpy(), benchmark.label(i))
    return {str(threshold): iou.mean() for threshold, iou in sums.items()}


def training_seconds(folder: Path) -> float:
    """Of a run's training, by its log's median speed: interruptions do not count."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    settings = json.loads((folder / "config.json").read_text())["train"]
    speed = statistics.median(line["pairs_per_second"] for line in lines)
    return settings["steps"] * settings["batch_size"] / speed


def mean_and_deviation(values: Sequence[float]) -> str:
    """Of the seeds of a run, as it is printed; of one seed the mean alone."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def nouns_of_words(words: Sequence[str]) -> list[str | None]:
    """The noun that each word of a shapes caption speaks of: itself, or an adjective's noun.

    Adjectives stand before their noun, or after "is" and then speak of the caption's first noun.
    """
    first = next((word for word in words if word in shapes.NOUNS), None)
    nouns: list[str | None] = []
    for i, word in enumerate(words):
        if word in shapes.NOUNS:
            nouns.append(word)
        elif word not in shapes.ADJECTIVES:
            nouns.append(None)
        elif words[i - 1] == "is":
            nouns.append(first)
        else:
            nouns.append(next((w for w in words[i:] if w in shapes.NOUNS), None))
    return nouns


@torch.no_grad()
def word_assignment_accuracy(model: CoDe, scenes: int) -> dict[str, float]:
    """Percent of noun words, and of adjectives, whose likeliest segment is that of their noun.

    Two nouns of each held-out caption are asked for, as in training.
    """
    found: dict[str, list[bool]] = {"nouns": [], "adjectives": []}
    for i in range(scenes):
        words = shapes.scene("test", i).caption.replace(",", "").split()
        asked = select_nouns(" ".join(words), shapes_tagger())
        if len(asked) < 2:
            continue
        asked = [asked[k] for k in np.random.default_rng(i).permutation(len(asked))[:2]]
        tokens = tokenize([" ".join(words)])  # every word of this world is one token
        x_t = model.word_features(tokens)
        n = model.noun_embedding(noun_prompts(asked, len(model.context)))[:, None]
        classes = model.text_segmenter.word_logits(x_t, n)[:, 0].argmax(0)
        for word, noun, found_class in zip(words, nouns_of_words(words), classes[1:-1].tolist()):
            if noun in asked:
                kind = "nouns" if word == noun else "adjectives"
                found[kind].append(found_class == 1 + asked.index(noun))
    return {kind: 100 * statistics.mean(values or [0]) for kind, values in found.items()}


@torch.no_grad()
def true_mask_accuracy(model: CoDe, scenes: int) -> dict[str, float]:
    """Zero-shot accuracy (percent, twelve objects) of CLIP on highlighted true regions, and on the
    highlighted true words: with true masks, only what fills the rest (P^v, P^t or zeros) can harm.
    """
    clip, names = model.clip, list(shapes.OBJECTS)
    texts = template_embedding(clip, names, PRIOR_TEMPLATES)
    right: dict[str, list[bool]] = {"regions": [], "words": []}
    for i in range(scenes):
        scene = shapes.scene("test", i)
        image = to_input(scene.image[None])
        words = scene.caption.replace(",", "").split()
        tokens = tokenize([" ".join(words)])
        embeddings, eot = clip.token_embedding(tokens), end_of_text(tokens)
        for thing in scene.things:
            number = names.index(thing.noun)
            region = torch.from_numpy(scene.label == number + 1).float()[None, None]
            e_v = image_embedding(clip, highlight_image(image, region, model.region_prompt)[0])
            own = [noun == thing.noun for noun in nouns_of_words(words)]
            mask = torch.tensor([False, *own, False]).float()[None, None]
            highlighted = highlight_text(embeddings, mask, model.word_prompt, eot)[0]
            e_t = text_embedding(clip, highlighted, eot)
            for kind, embedding in (("regions", e_v), ("words", e_t)):
                right[kind].append(int((embedding @ texts.T).argmax()) == number)
    return {kind: 100 * statistics.mean(values) for kind, values in right.items()}


# --- of a CLIP alone ----------------------------------------------------------------------------


def to_input(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> normalised float (B, 3, H, W)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


@torch.no_grad()
def zero_shot_accuracy(clip: open_clip.CLIP, split: str, count: int = 500) -> float:
    """Percent of single-object scenes whose object noun is found among the twelve."""
    clip.eval()
    scenes = [shapes.scene(split, i, objects=1) for i in range(count)]
    names = list(shapes.OBJECTS)
    texts = template_embedding(clip, names, PRIOR_TEMPLATES)
    images = image_embedding(clip, to_input(np.stack([s.image for s in scenes])))
    found = (images @ texts.T).argmax(1)
    return 100 * float(np.mean([names[i] == s.things[0].noun for i, s in zip(found, scenes)]))


@torch.no_grad()
def retrieval_accuracy(clip: open_clip.CLIP, split: str, groups: int = 5) -> float:
    """Percent of images whose own caption is the nearest among 100."""
    clip.eval()
    right = []
    for group in range(groups):
        scenes = [shapes.scene(split, 100 * group + i) for i in range(100)]
        images = image_embedding(clip, to_input(np.stack([s.image for s in scenes])))
        texts = embed_texts(clip, tokenize([s.caption for s in scenes]))
        right.append((images @ texts.T).argmax(1) == torch.arange(100))
    return 100 * float(torch.cat(right).float().mean())


@torch.no_grad()
def dense_accuracy(clip: open_clip.CLIP, split: str, count: int = 200) -> float:
    """Percent of patches mostly inside one object whose dense feature finds it among 18 nouns."""
    clip.eval()
    scenes = [shapes.scene(split, i) for i in range(count)]
    texts = template_embedding(clip, shapes.NOUNS, PRIOR_TEMPLATES)
    images = to_input(np.stack([s.image for s in scenes]))
    features = dense_embedding(clip, visual_hidden(clip, images), clip.visual.grid_size)
    found = (features @ texts.T).argmax(-1).numpy()
    grid, patch = clip.visual.grid_size[0], clip.visual.patch_size[0]
    labels = np.stack([s.label for s in scenes]).reshape(count, grid, patch, grid, patch)
    labels = labels.swapaxes(2, 3).reshape(count, grid**2, patch**2)  # scene, patch, pixel
    values = np.median(labels, axis=-1)
    sure = (labels == values[..., None]).mean(-1) > 0.6
    sure &= values > 0
    return 100 * float((found + 1 == values)[sure].mean())
