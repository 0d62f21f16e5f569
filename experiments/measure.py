"""How trainings on the shapes world are started, and what is measured of them: regions, words,
prompts.

What a CLIP knows of this world without any of it is measured at the end.
"""

import json
import signal
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from clip import (
    IMAGE_MEAN,
    IMAGE_STD,
    PRIOR_TEMPLATES,
    embed_texts,
    end_of_text,
    image_embedding,
    template_embedding,
    text_embedding,
    tokenize,
)
from config import MASK_PRESETS, MaskConfig, UserError
from data import select_nouns, shapes_tagger
from datasets import load_benchmark, shapes
from evaluate import IoU, Segmenter, benchmark_words, load_method
from model import CoDe, highlight_image, highlight_text
from segment import likeliest_nouns, search_caption, word_masks
from support.distributed import heard_signals

ROOT = Path(__file__).parents[1]
# Trainings on the CPU, where they are measured too, with one thread each: of such small ones two
# side by side are faster than one after the other, and on a GPU they would share it.
ON_SHAPES = ("--preset", "shapes", "--workers", "0", "--device", "cpu")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
THRESHOLDS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)  # of the background; 0.4 is the thesis's


def run_training(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    """Run `train.py` to its end. Stopped before, let it save and end first. Raises UserError."""
    # Every way of stopping is one, Ctrl-C, which a shell lets its background jobs ignore.
    for number in heard_signals():
        signal.signal(number, signal.default_int_handler)
    # In a session of its own: a terminal's Ctrl-C would be the first of two signals, and the second
    # ends a training without saving.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if code:
        raise UserError(f"training ended with exit code {code}")


def kept_steps(steps: int) -> list[int]:
    """After which steps a training keeps the model for `make read`: more of them at the beginning,
    where more happens."""
    shares = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1)
    return sorted({max(1, round(share * steps)) for share in shares})


def training_seconds(folder: Path) -> float:
    """Of a run's training, by its log's median speed: interruptions do not count."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text("utf-8").splitlines()]
    settings = json.loads((folder / "config.json").read_text("utf-8"))["train"]
    speed = statistics.median(line["pairs_per_second"] for line in lines)
    return settings["steps"] * settings["batch_size"] / speed


# --- of a trained model ---------------------------------------------------------------------------


def segmenter_of(checkpoint: Path | None, weights: str | Path = "openai") -> Segmenter:
    """The segmenter of a run on the held-out scenes; without a checkpoint MaskCLIP's.

    weights: a file with MaskCLIP's CLIP, the shipped one by default.
    """
    without = {"method": "maskclip", "clip_weights": str(weights)}
    options = {"checkpoint": str(checkpoint)} if checkpoint else without
    settings = MaskConfig(**MASK_PRESETS["shapes"], **options)
    clip, model = load_method(settings, torch.device("cpu"))
    words = benchmark_words(load_benchmark("shapes", ""), settings)
    return Segmenter(clip, model, words, settings)


def mean_ious(segmenter: Segmenter, scenes: int) -> dict[str, float]:
    """mIoU on held-out scenes at every threshold of the background, masks being made once."""
    benchmark = shapes.load("", count=scenes)
    sums = {threshold: IoU(len(benchmark.class_names)) for threshold in THRESHOLDS}
    for i in range(scenes):
        image = benchmark.image(i)
        scores = segmenter.scores(image)
        for threshold, iou in sums.items():
            _, labels = scores.label_map(image.size[::-1], threshold)
            iou.add(labels.numpy(), benchmark.label(i))
    return {str(threshold): iou.mean() for threshold, iou in sums.items()}


def bare_words(caption: str) -> list[str]:
    """Its words between spaces, without commas."""
    return caption.replace(",", "").split()


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

    Two nouns of each held-out caption are asked for, whatever the training drew.
    """
    found: dict[str, list[bool]] = {"nouns": [], "adjectives": []}
    for i in range(scenes):
        caption = shapes.scene("test", i).caption
        words, asked = bare_words(caption), select_nouns(caption, shapes_tagger())
        if len(asked) < 2:
            continue
        asked = [asked[k] for k in np.random.default_rng(i).permutation(len(asked))[:2]]
        likeliest = likeliest_nouns(word_masks(model, caption, asked)).tolist()
        for word, noun, index in zip(words, nouns_of_words(words), likeliest):
            if noun in asked:
                kind = "nouns" if word == noun else "adjectives"
                found[kind].append(index == asked.index(noun))
    return {kind: 100 * statistics.mean(values or [0]) for kind, values in found.items()}


def region_and_word_accuracy(segmenter: Segmenter, scenes: int) -> dict[str, float]:
    """Regions and words together: of every object that a held-out caption names, in percent.

    All nouns of the caption are asked for. An object's region is that of its noun; its words are
    those whose likeliest class (Eq. 3.3) is its noun, and should be the noun and its adjectives.
    "iou": mean IoU of the regions; "precision", "recall": of all words. "regions": share of the
    objects with an IoU of at least 50 %; "words": with exactly their own among all nouns and
    adjectives (what an article belongs to is a matter of taste); "both": with both.
    """
    ious, right, counts = [], [], np.zeros(3)  # counts: words right, found, true
    for i in range(scenes):
        scene = shapes.scene("test", i)
        words, nouns = bare_words(scene.caption), select_nouns(scene.caption, shapes_tagger())
        networks = segmenter.clip, segmenter.model
        search = search_caption(*networks, scene.caption, nouns, segmenter.config)
        labels = search.segmenter.label_map(Image.fromarray(scene.image), True).numpy()
        owners, likeliest = nouns_of_words(words), likeliest_nouns(search.masks)
        for k, noun in enumerate(nouns):
            if noun not in (thing.noun for thing in scene.things):
                continue  # a surface, which has no label
            region, truth = labels == k + 1, scene.label == 1 + list(shapes.OBJECTS).index(noun)
            ious.append((region & truth).sum() / max(1, (region | truth).sum()))
            found = {place for place, index in enumerate(likeliest) if index == k}
            true = {place for place, owner in enumerate(owners) if owner == noun}
            counts += len(found & true), len(found), len(true)
            telling = {place for place, owner in enumerate(owners) if owner is not None}
            right.append((ious[-1] >= 0.5, found & telling == true))
    regions, exact = np.array(right).T
    shares = {"iou": np.mean(ious), "precision": counts[0] / max(1, counts[1])}
    shares |= {"recall": counts[0] / counts[2], "regions": regions.mean(), "words": exact.mean()}
    shares["both"] = (regions & exact).mean()
    return {name: 100 * float(share) for name, share in shares.items()}


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
        words = bare_words(scene.caption)
        # Every word of this world is one token; commas are nobody's, and are left out here.
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


# --- of a CLIP alone ------------------------------------------------------------------------------


def to_input(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> normalised float (B, 3, H, W)."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


@torch.no_grad()
def zero_shot_accuracy(clip: open_clip.CLIP, scenes: int = 500) -> float:
    """Percent of held-out scenes of a single object whose noun is found among the twelve."""
    drawn, names = [shapes.scene("test", i, objects=1) for i in range(scenes)], list(shapes.OBJECTS)
    texts = template_embedding(clip, names, PRIOR_TEMPLATES)
    images = image_embedding(clip, to_input(np.stack([scene.image for scene in drawn])))
    found = (images @ texts.T).argmax(1)
    return 100 * float(np.mean([names[i] == s.things[0].noun for i, s in zip(found, drawn)]))


@torch.no_grad()
def retrieval_accuracy(clip: open_clip.CLIP, groups: int = 5) -> float:
    """Percent of held-out images whose own caption is the nearest among 100."""
    right = []
    for group in range(groups):
        drawn = [shapes.scene("test", 100 * group + i) for i in range(100)]
        images = image_embedding(clip, to_input(np.stack([scene.image for scene in drawn])))
        texts = embed_texts(clip, tokenize([scene.caption for scene in drawn]))
        right.append((images @ texts.T).argmax(1) == torch.arange(100))
    return 100 * float(torch.cat(right).float().mean())
