"""The trained model that comes with the shapes world: its file, and how it is made and found."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import CPU, ROOT
from PIL import Image

import checkpoint
from checkpoint import SHAPES_MODEL, fingerprint, load_model, read_checkpoint
from clip import load_clip
from config import UserError
from datasets import shapes
from experiments.measure import (
    kept_steps,
    mean_ious,
    region_and_word_accuracy,
    segmenter_of,
    word_assignment_accuracy,
)
from experiments.shapes_model import STEPS
from segment import load_segmenter


def test_the_file_is_small_and_of_the_shipped_clip():
    content = read_checkpoint(SHAPES_MODEL)
    assert SHAPES_MODEL.stat().st_size < 1e6
    assert {v.dtype for v in content["model"].values()} == {torch.float16}
    assert content["clip"] == fingerprint(load_clip("shapes"))
    model = load_model(SHAPES_MODEL, CPU)
    for name, value in model.learned_state().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, content["model"][name].float()), name


def test_its_log_lies_beside_it():
    lines = SHAPES_MODEL.with_suffix(".jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == STEPS
    assert json.loads(lines[-1])["skipped"].keys() == {"fewer than 3 nouns"}


def test_it_finds_regions_and_words():
    """What docs/shapes.md says of 500 scenes, on a few, with room for chance."""
    segmenter, scenes = segmenter_of(SHAPES_MODEL), 20
    assert mean_ious(segmenter, scenes)["0.4"] > 70
    words = word_assignment_accuracy(segmenter.model, scenes)
    assert words["nouns"] > 97 and words["adjectives"] > 90
    assert region_and_word_accuracy(segmenter, scenes)["both"] > 65


def test_from_python_without_a_checkpoint():
    scene = shapes.scene("test", 1)
    segmenter = load_segmenter(["bug"], preset="shapes")
    labels = segmenter.label_map(Image.fromarray(scene.image), background=True).numpy()
    truth = scene.label == shapes.CLASS_NAMES.index("bug")
    assert (truth & (labels == 1)).sum() / (truth | (labels == 1)).sum() > 0.8


def test_a_missing_file_is_named(monkeypatch, tmp_path):
    missing = tmp_path / "shapes_code.pt"
    monkeypatch.setattr(checkpoint, "SHAPES_MODEL", missing)
    with pytest.raises(UserError, match="shapes_code.pt is missing: `make model` trains it again"):
        read_checkpoint(str(missing))
    with pytest.raises(UserError, match="is missing: `make model`"):
        read_checkpoint(missing)


def test_more_steps_are_kept_where_more_happens():
    assert kept_steps(STEPS) == [22, 55, 110, 220, 440, 770, 1100]
    assert kept_steps(16) == [1, 2, 3, 6, 11, 16] and kept_steps(5) == [1, 2, 4, 5]
    assert kept_steps(2) == [1, 2] and kept_steps(1) == [1]


TRAINING = """
import signal, sys, time
received = []
signal.signal(signal.SIGTERM, lambda *_: received.append("TERM"))
signal.signal(signal.SIGINT, lambda *_: received.append("INT"))
print("started", flush=True)
while not received:
    time.sleep(0.05)
time.sleep(0.3)  # saves, while a second signal would end it
print(received, flush=True)
"""


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
def test_a_stopped_training_saves_first(how):
    """To one process as `kill` sends it, to all of the terminal's as Ctrl-C does."""
    code = "import sys; from config import run_script; from experiments.measure import run_training"
    code += "\nrun_script(lambda: run_training([sys.executable, '-c', sys.argv[1]]))"
    running = subprocess.Popen(
        [sys.executable, "-c", code, TRAINING],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout.readline() == "started\n"
    send = os.kill if how == "SIGTERM" else os.killpg
    send(running.pid, getattr(signal, how))
    assert running.communicate(timeout=20)[0] == "['TERM']\n"  # one signal, and it was waited for
    assert running.returncode == 130


@pytest.mark.slow
def test_the_same_command_makes_the_same_file(tmp_path):
    """Two processes train a step, twice: bit for bit the same."""

    def make(run: str) -> bytes:
        command = [sys.executable, "-m", "experiments.shapes_model", "--scenes", "2", "--steps"]
        command += ["1", "--run", str(tmp_path / run), "--out", str(tmp_path / f"{run}.pt")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "2 held-out scenes, in percent:" in done.stdout
        return (tmp_path / f"{run}.pt").read_bytes()

    assert make("first") == make("second")
    line = json.loads((tmp_path / "first.jsonl").read_text("utf-8"))
    assert line["step"] == 1 and line["skipped"].keys() == {"fewer than 3 nouns"}
    assert (tmp_path / "first" / "step-1.pt").exists()
