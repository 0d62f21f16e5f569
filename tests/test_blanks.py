"""The shapes world's CLIP after it has seen objects on plain ground."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from clip import SHAPES_WEIGHTS, load_clip
from datasets import shapes
from experiments import blanks
from experiments.measure import to_input


def test_the_control_sees_the_same_batch_on_its_own_ground():
    whole = [shapes.scene("pretrain", i) for i in range(0, 12, 2)]
    single = [shapes.scene("pretrain", i, objects=1) for i in range(1, 13, 2)]
    plain, names = blanks.draw_batch(np.random.default_rng(5), whole, single, blank=True)
    ground, same = blanks.draw_batch(np.random.default_rng(5), whole, single, blank=False)
    half = blanks.HALF
    assert names == same and len(names) == len(plain) == 2 * half
    assert torch.equal(plain[:half], ground[:half])
    blank = (plain[half:] == 0).all(1)  # (half, SIDE, SIDE)
    assert torch.equal(plain[half:] * ~blank[:, None], ground[half:] * ~blank[:, None])
    # An object on blanks is one of the scenes' or its mirror image, and its caption has its noun.
    shown = {}
    for scene in single:
        object_alone = to_input(scene.image[None])[0] * torch.from_numpy(scene.label > 0)
        shown[scene.things[0].noun] = shown.get(scene.things[0].noun, []) + [object_alone]
    for image, name in zip(plain[half:], names[half:]):
        (noun,) = [noun for noun in shapes.OBJECTS if noun in re.findall(r"\w+", name)]
        views = [view for alone in shown[noun] for view in (alone, alone.flip(-1))]
        assert any(torch.equal(image, view) for view in views), name


@pytest.mark.slow
def test_a_step_and_the_file_that_it_leaves(tmp_path):
    """In a process of its own, since it takes one thread for good."""
    out = tmp_path / "clip.pt"
    command = [sys.executable, "-m", "experiments.blanks", "--steps", "1", "--scenes", "20"]
    done = subprocess.run(
        [*command, "--held-out", "10", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    shipped, new = done.stdout.splitlines()
    assert shipped.startswith(str(SHAPES_WEIGHTS)) and new.startswith(str(out))
    assert "true regions on blanks named rightly" in new and "MaskCLIP" in new
    before, after = load_clip("shapes").state_dict(), load_clip("shapes", str(out)).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("visual.") for name in changed)


def test_files_that_are_not_written(tmp_path, mistake):
    assert "a folder, not a file to write" in mistake(blanks.main, "--out", tmp_path)
    assert "the shipped CLIP; name another file" in mistake(blanks.main, "--out", SHAPES_WEIGHTS)
