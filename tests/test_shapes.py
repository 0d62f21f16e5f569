"""The shapes world: what is drawn, said and labelled belongs together."""

import re

import numpy as np
import open_clip
import pytest
from conftest import ROOT

from clip import SHAPES_WEIGHTS, load_clip
from datasets import shapes
from experiments.bound import class_masks
from experiments.pretrain import retrieval_accuracy, zero_shot_accuracy


def test_a_scene_is_the_same_every_time_and_splits_differ():
    a, b = shapes.scene("train", 5), shapes.scene("train", 5)
    assert np.array_equal(a.image, b.image) and a.caption == b.caption
    assert not np.array_equal(a.image, shapes.scene("test", 5).image)
    assert a.image.shape == (64, 64, 3) and a.image.dtype == np.uint8


def test_the_caption_speaks_of_what_is_there():
    for i in range(200):
        scene = shapes.scene("val", i)
        words = scene.caption.replace(",", "").split()
        drawn = {thing.noun for thing in scene.things}
        said = {word for word in words if word in shapes.OBJECTS}
        assert said == drawn
        assert {word for word in words if word in shapes.SURFACES} <= {scene.surface}
        colours = {thing.colour for thing in scene.things}
        assert {word for word in words if word in shapes.COLOURS} <= colours
        patterns = {thing.pattern for thing in scene.things}
        assert {word for word in words if word in shapes.PATTERNS} <= patterns


def test_labels_are_the_silhouettes():
    counts = np.zeros(13)
    for i in range(200):
        scene = shapes.scene("val", i)
        labels = set(np.unique(scene.label)) - {0}
        drawn = {shapes.CLASS_NAMES.index(thing.noun) for thing in scene.things}
        assert labels <= drawn
        counts += np.bincount(scene.label.ravel(), minlength=13)
    assert 0.12 < counts[1:].sum() / counts.sum() < 0.3
    assert (counts > 0).all()


def test_one_to_three_objects_on_request_or_by_chance():
    numbers = [len(shapes.scene("val", i).things) for i in range(300)]
    for number, share in ((1, 0.25), (2, 0.45), (3, 0.30)):
        assert numbers.count(number) / 300 == pytest.approx(share, abs=0.08)
    assert all(len(shapes.scene("val", i, objects=2).things) == 2 for i in range(5))


def test_adjectives_and_word_order_vary():
    captions = [shapes.scene("val", i).caption for i in range(300)]
    assert len(set(captions)) > 290
    adjectives = {*shapes.COLOURS, *shapes.PATTERNS, *shapes.SMALL, *shapes.LARGE}
    assert adjectives <= set(" ".join(captions).replace(",", "").split())
    assert len({caption.split()[0] for caption in captions}) >= 8


def test_every_word_is_a_single_token():
    for word in (*shapes.NOUNS, *shapes.COLOURS, *shapes.PATTERNS, *shapes.SMALL, *shapes.LARGE):
        assert (open_clip.tokenize([word]) > 0).sum() == 3, word  # SOS, the word, EOT


def test_the_shipped_clip_knows_its_world():
    """As well as the README says, on the same scenes."""
    assert SHAPES_WEIGHTS.stat().st_size < 3e6
    clip, readme = load_clip("shapes"), (ROOT / "README.md").read_text().replace("\n", " ")
    objects = float(re.search(r"zero-shot accuracy is ([\d.]+) %", readme)[1])
    retrieval = float(re.search(r"([\d.]+) % of the images retrieve", readme)[1])
    assert zero_shot_accuracy(clip, "test") == pytest.approx(objects, abs=0.25)
    assert retrieval_accuracy(clip, "test") == pytest.approx(retrieval, abs=0.25)


def test_masks_of_the_bound_are_shares_of_the_cells():
    label = np.zeros((1, 64, 64), np.uint8)
    label[0, :4, :6], label[0, 59:, 62:] = 3, 12
    masks = class_masks(label, 32)
    assert masks.shape == (1, 12, 32, 32)
    assert masks[0, 2, :2, :3].eq(1).all() and masks[0, 11, 30:, 31].eq(1).all()
    assert masks[0, 11, 29, 31] == 0.5 and masks.sum() == 6 + 2.5
