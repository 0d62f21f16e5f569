"""Files of training: what they hold, and what is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import CPU, ROOT
from runs import ENVIRONMENT, TINY, train

from checkpoint import (
    SHAPES_MODEL,
    Run,
    load_model,
    model_content,
    read_checkpoint,
    resume_run,
    save_checkpoint,
    save_run,
)
from clip import load_clip
from config import LossConfig, MaskConfig, ModelConfig, TrainConfig, UserError
from evaluate import Segmenter
from model import CoDe
from segment import load_segmenter
from support.device import make_scaler
from train import make_optimizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def last(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(*TINY, "--steps", "2", "--out", out)
    return out / "last.pt"


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_loading_a_checkpoint_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"masker.x": torch.zeros(1)}, "cfg": Bomb()}, "bomb.pt")
    with pytest.raises(UserError):
        load_model("bomb.pt", CPU)
    assert not Path("exploded").exists()


def test_a_checkpoint_of_another_clip_of_the_same_name_is_refused(tmp_path):
    config = ModelConfig(clip="shapes", context_init="a photo of a")
    content = model_content(CoDe(load_clip("shapes"), config))
    save_checkpoint(content, tmp_path / "same.pt")
    assert load_model(tmp_path / "same.pt", CPU).config == config
    save_checkpoint(content | {"clip": 1}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match=r"other\.pt: trained with other weights of CLIP than shapes"
    ):
        load_model(tmp_path / "other.pt", CPU)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"hello"])
def test_an_unreadable_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt is not a readable checkpoint"):
        read_checkpoint(path)


def test_missing_and_unknown_tensors_are_named(last, tmp_path):
    content = read_checkpoint(last)
    content["model"]["surprise"] = content["model"].pop("context")
    save_checkpoint(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="missing context, unknown surprise"):
        load_model(tmp_path / "x.pt", CPU)


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint({"step": 1}, path)

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_evaluation_takes_the_model_that_train_py_wrote_last(last, tmp_path):
    """Without --checkpoint, and it says so; on the shapes world else the one that comes along.
    Other benchmarks ask for one (test_evaluate)."""
    command = [sys.executable, ROOT / "evaluate.py", "--dataset", "shapes", "--limit", "2"]
    found = tmp_path / "out" / "train" / "last.pt"
    found.parent.mkdir(parents=True)
    shutil.copy(last, found)
    options = dict(cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        "no --checkpoint given: out/train/last.pt, where train.py writes"
    )
    found.unlink()
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        f"no --checkpoint given: {SHAPES_MODEL}, which comes with the shapes world"
    )
    command[1] = ROOT / "training_free.py"
    done = subprocess.run([*command, "--method", "code"], **options)
    assert done.returncode == 0, done.stderr
    assert str(SHAPES_MODEL) in done.stdout.splitlines()[0]


def test_evaluation_of_a_training_checkpoint(last):
    """Our checkpoint, loaded, segments like the model it was saved from: embeddings match."""
    model = load_model(last, CPU)
    segmenter = Segmenter(model.clip, model, ["kite", "ball"], MaskConfig())
    assert segmenter.class_embedding.shape == (2, 64)
    assert segmenter.window_scores(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def clip_file(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    clip = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    torch.save(clip.state_dict(), path)
    return path


def test_a_checkpoint_follows_its_clip_wherever_the_file_is(tmp_path, monkeypatch):
    """Trained with --clip-weights FILE: from another folder, and with the file elsewhere."""
    monkeypatch.chdir(tmp_path)
    clip_file(tmp_path / "clip.pt", 0)
    clip_file(tmp_path / "other.pt", 1)
    config = ModelConfig(clip="ViT-S-32-alt", clip_weights="clip.pt", context_init="a")
    save_checkpoint(model_content(CoDe(load_clip(config.clip, "clip.pt"), config)), "code.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = load_model("../code.pt", CPU)

    shutil.move(tmp_path / "clip.pt", "moved.pt")
    with pytest.raises(UserError, match=r"clip\.pt, which is not there: --clip-weights FILE"):
        load_model("../code.pt", CPU)
    with pytest.raises(UserError, match="other weights of CLIP than ViT-S-32-alt"):
        load_model("../code.pt", CPU, "../other.pt")
    found = load_model("../code.pt", CPU, "moved.pt")
    segmenter = load_segmenter(["dog"], checkpoint="../code.pt", clip_weights="moved.pt")
    for clip in (found.clip, segmenter.clip):
        assert torch.equal(clip.visual.proj, before.clip.visual.proj)
    with pytest.raises(UserError, match="which is not there"):
        load_segmenter(["dog"], checkpoint="../code.pt")


def test_a_run_goes_on_with_clips_weights_elsewhere(tmp_path):
    clip_file(tmp_path / "clip.pt", 0)
    clip_file(tmp_path / "other.pt", 1)

    def run_with(weights: Path) -> Run:
        config = ModelConfig(clip="ViT-S-32-alt", clip_weights=str(weights), context_init="a")
        model = CoDe(load_clip(config.clip, config.clip_weights), config)
        optimizer = make_optimizer(model, TrainConfig())
        scaler = make_scaler(CPU, torch.float32)
        return Run(model, optimizer, scaler, TrainConfig(), LossConfig(), step=3)

    save_run(run_with(tmp_path / "clip.pt"), tmp_path / "last.pt")
    (tmp_path / "clip.pt").rename(tmp_path / "moved.pt")
    again = run_with(tmp_path / "moved.pt")
    again.step = 0
    resume_run(again, tmp_path / "last.pt")
    assert again.step == 3
    with pytest.raises(UserError, match="trained with other weights of CLIP"):
        resume_run(run_with(tmp_path / "other.pt"), tmp_path / "last.pt")
