"""The shapes world: what is drawn, said and labelled belongs together."""

import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT, random_clip

from clip import (
    SHAPES_WEIGHTS,
    embed_texts,
    image_embedding,
    load_clip,
    text_hidden,
    tokenize,
)
from config import UserError
from datasets import shapes
from experiments.measure import retrieval_accuracy, to_input, zero_shot_accuracy
from experiments.pretrain import (
    WORDS,
    PretrainConfig,
    close_up,
    lengthen_embeddings,
    mosaic,
    set_learning_rate,
    shorten_text_states,
    with_new_text_tower,
    words_in,
)
from experiments.pretrain import main as pretrain


def test_a_scene_is_the_same_every_time_and_splits_differ():
    a, b = shapes.scene("train", 5), shapes.scene("train", 5)
    assert np.array_equal(a.image, b.image) and a.caption == b.caption
    assert not np.array_equal(a.image, shapes.scene("test", 5).image)
    assert a.image.shape == (96, 96, 3) and a.image.dtype == np.uint8


def test_a_larger_drawing_is_the_same_scene():
    small, large = shapes.scene("test", 3), shapes.scene("test", 3, scale=3)
    assert large.things == small.things and large.caption == small.caption
    assert large.image.shape == (288, 288, 3) and large.label.shape == (288, 288)
    assert (large.label[1::3, 1::3] == small.label).mean() > 0.98
    shrunk = large.image.reshape(96, 3, 96, 3, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 4


def test_objects_may_hide_parts_of_each_other():
    left = []
    for i in range(40):
        scene = shapes.scene("val", i)
        for thing in scene.things:
            alone = np.zeros((96, 96), np.uint8)
            shapes._paint(np.zeros((96, 96, 3), np.float32), alone, thing)
            left.append((scene.label == alone)[alone > 0].mean())
    assert min(left) > 0.4 and np.mean(np.array(left) < 0.98) > 0.1


def test_the_caption_speaks_of_what_is_there():
    for i in range(200):
        scene = shapes.scene("val", i)
        words = scene.caption.replace(",", "").split()
        drawn = {thing.noun for thing in scene.things}
        said = {word for word in words if word in shapes.OBJECTS}
        assert said == drawn
        assert {word for word in words if word in shapes.SURFACES} <= set(scene.surfaces)
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
    assert 0.18 < counts[1:].sum() / counts.sum() < 0.3
    assert (counts > 0).all()


def test_one_to_three_objects_on_request_or_by_chance():
    numbers = [len(shapes.scene("val", i).things) for i in range(300)]
    for number, share in ((1, 0.25), (2, 0.45), (3, 0.30)):
        assert numbers.count(number) / 300 == pytest.approx(share, abs=0.08)
    assert all(len(shapes.scene("val", i, objects=2).things) == 2 for i in range(5))


def test_adjectives_and_word_order_vary():
    captions = [shapes.scene("val", i).caption for i in range(300)]
    assert len(set(captions)) > 290
    assert set(shapes.ADJECTIVES) <= set(" ".join(captions).replace(",", "").split())
    assert len({caption.split()[0] for caption in captions}) >= 8


def test_every_word_is_a_single_token():
    for word in (*shapes.NOUNS, *shapes.ADJECTIVES):
        assert (open_clip.tokenize([word]) > 0).sum() == 3, word  # SOS, the word, EOT


def test_the_shipped_clip_knows_its_world():
    """As well as docs/shapes.md says, on the same scenes."""
    assert SHAPES_WEIGHTS.stat().st_size < 3e6
    clip, page = load_clip("shapes"), (ROOT / "docs" / "shapes.md").read_text("utf-8")
    objects = float(re.search(r"zero-shot accuracy is ([\d.]+) %", page)[1])
    retrieval = float(re.search(r"([\d.]+) % of the images retrieve", page)[1])
    assert zero_shot_accuracy(clip) == pytest.approx(objects, abs=0.25)
    assert retrieval_accuracy(clip) == pytest.approx(retrieval, abs=0.25)


def test_words_and_learning_rate_of_the_pretraining():
    found = words_in(["the red bug, small.", "a redder ball"])
    assert [WORDS[k] for k in found[0].nonzero()[:, 0]] == ["bug", "red", "small"]
    assert [WORDS[k] for k in found[1].nonzero()[:, 0]] == ["ball"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0)

    def rate(step: int) -> float:
        set_learning_rate(optimizer, step, constant=200, falling=100)
        return optimizer.param_groups[0]["lr"]

    assert [rate(step) for step in (0, 49, 99, 200)] == [1e-5, 5e-4, 1e-3, 1e-3]
    assert rate(250) == pytest.approx(5e-4) and rate(300) == pytest.approx(0.0)


@pytest.mark.slow
def test_a_short_pretraining_and_the_file_that_it_leaves(tmp_path, monkeypatch):
    """All three stages in a process of their own, since it takes one thread for good."""
    command = [sys.executable, "-m", "experiments.pretrain", "--scenes", "40", "--batch-size", "4"]
    command += ["--word-steps", "2", "--contrast-steps", "2", "--text-steps", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "c.pt")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "held-out scenes: " in done.stdout and "--word-steps 2" in done.stdout  # how it was made
    monkeypatch.setattr("clip.SHAPES_WEIGHTS", tmp_path / "c.pt")
    clip, shipped = load_clip("shapes"), torch.load(SHAPES_WEIGHTS, weights_only=True)
    stored = torch.load(tmp_path / "c.pt", weights_only=True)
    assert {name: value.shape for name, value in stored["state"].items()} == {
        name: value.shape for name, value in shipped["state"].items()
    }
    tokens = tokenize([shapes.scene("test", 0).caption])
    with torch.no_grad():
        assert embed_texts(clip, tokens).norm() == pytest.approx(1, abs=1e-5)
    assert (clip.token_embedding(tokens)[0, 1:4].abs().sum(1) > 0).all()  # its words are stored
    (tmp_path / "c.pt").write_text("no weights")
    with pytest.raises(UserError, match=r"c\.pt is not the shapes world's CLIP"):
        load_clip("shapes")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--scenes", "1"), "--scenes 1: must be at least 2"),
        (("--seed", "-1"), "--seed -1: must be at least 0"),
        (("--out", "/tmp"), "/tmp: a folder, not a file to write"),
    ],
)
def test_mistakes_of_a_pretraining(arguments, message, mistake):
    assert message in mistake(pretrain, *arguments)


def test_close_ups_hold_their_object():
    rng = np.random.default_rng(0)
    for i in range(30):
        scene = shapes.scene("val", i, objects=1)
        view = close_up(rng, scene)
        assert view.shape == (48, 48, 3)
        # Where it lies in the scene, and that it shows half of the object or fills itself with it.
        inside = close_up(np.random.default_rng(i), replace(scene, image=scene.label[..., None]))
        assert (inside > 0).sum() > min(0.5 * (scene.label > 0).sum(), 0.4 * 48**2), i


def test_a_mosaic_and_the_places_of_its_close_ups():
    views = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)  # number k is all k
    images, share = mosaic(views, np.random.default_rng(0), 4)
    assert images.shape == (2, 3, 32, 32) and share.shape == (2, 4, 64)
    assert torch.allclose(share.sum(2), torch.ones(2, 4))
    patches = torch.nn.functional.avg_pool2d(images, 4)[:, 0].flatten(1)  # (2, 64)
    for i in range(2):
        for k in range(4):
            assert patches[i][share[i, k] > 0].eq(4 * i + k).all()
    assert not torch.equal(images[0, :, :16, :16], views[0])  # it was moved


def test_positions_of_the_text_tower_tell_distances():
    """Of sines and cosines: how alike two positions are depends on their distance alone."""
    clip = random_clip()
    lengthen_embeddings(clip)
    position = clip.positional_embedding.double()
    alike = position @ position.T / 0.07**2
    width = position.shape[1]
    for distance in (0, 1, 5, 40):
        waves = [math.cos(distance * math.pi / 100 ** (i / (width / 2))) for i in range(width // 2)]
        assert torch.allclose(
            alike.diagonal(distance), torch.tensor(sum(waves)).double(), atol=1e-4
        )
    assert clip.token_embedding.weight.std() == pytest.approx(0.1, rel=0.01)


def test_a_new_text_tower_learns_what_the_image_tower_sees():
    old, scenes = load_clip("shapes"), [shapes.scene("pretrain", i) for i in range(50)]
    drawn = np.stack([scene.image for scene in scenes])
    new, *short = (
        with_new_text_tower(old, scenes, drawn, PretrainConfig(text_steps=steps)).eval()
        for steps in (100, 2, 2)
    )
    for name, value in short[0].state_dict().items():  # it follows from the seed
        assert torch.equal(short[1].state_dict()[name], value), name
    for name, value in old.visual.state_dict().items():
        assert torch.equal(new.visual.state_dict()[name], value), name
    with torch.no_grad():
        images = image_embedding(old, to_input(drawn))
        texts = embed_texts(new, tokenize([scene.caption for scene in scenes]))
    right = (images @ texts.T).argmax(1) == torch.arange(len(scenes))
    assert right.float().mean() > 0.5  # chance: 0.02


def test_shorter_text_states_give_the_same_embeddings():
    clip, tokens = random_clip(), tokenize(["a red kite on sand", "one bug"])
    with torch.no_grad():  # as long as trained ones: LayerNorm adds 1e-5 to the variance
        clip.token_embedding.weight.mul_(50)
        states, before = text_hidden(clip, clip.token_embedding(tokens)), embed_texts(clip, tokens)
        shorten_text_states(clip, 0.2)
        shorter, after = text_hidden(clip, clip.token_embedding(tokens)), embed_texts(clip, tokens)
    assert torch.allclose(shorter, 0.2 * states, atol=2e-3 * shorter.abs().max().item())
    assert torch.allclose(before, after, atol=1e-3)
