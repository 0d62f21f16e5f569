"""Training that starts from a checkpoint, and training as the released program does."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, model_config, random_model
from PIL import Image
from runs import ENVIRONMENT, log, preempt, same_state, to_group, train

from checkpoint import (
    Run,
    load_model,
    model_content,
    read_checkpoint,
    resume_run,
    save_checkpoint,
    save_run,
)
from clip import load_clip
from config import TRAIN_PRESETS, LossConfig, ModelConfig, TrainConfig, parse
from data import Folder, PairStream, make_loader, nltk_tagger
from losses import code_loss
from model import CoDe
from released import is_released, rename_released
from support.device import make_scaler
from train import logistic_noise, main, make_optimizer

CAPTIONS = ("a dog and a ball", "a red ball on the grass", "a man with a horse", "a cat on a table")


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The authors' file of a tiny network."""
    state = {k: torch.tensor(v) for k, v in golden.load("tiny_code_checkpoint").items()}
    path = tmp_path_factory.mktemp("released") / "code.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for i in range(24):
        pixels = random.integers(0, 255, (80, 90, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.jpg")
        (folder / f"{i:02}.txt").write_text(CAPTIONS[i % len(CAPTIONS)])
    return folder


def options(pairs: Path, start: Path, *more) -> tuple:
    return (
        *("--pairs", pairs, "--init", start, "--steps", "10", "--batch-size", "4"),
        *("--log-every", "1", "--checkpoint-every", "100", "--workers", "1", *more),
    )


@pytest.mark.slow
def test_a_released_file_is_trained_on_saved_resumed_and_evaluated(released, pairs, tmp_path):
    """Real runs; slow because each is a process of its own."""
    given = options(pairs, released)
    train(*given, "--out", tmp_path / "whole")
    first = log(tmp_path / "whole")[0]

    # The first step's losses are those of the released network on that batch.
    model, config = load_model(released, CPU), TrainConfig(batch_size=4)
    sizes = dict(pairs=4, nouns=2, context_length=len(model.context), min_crop=0.9, seed=0)
    size = model.clip.visual.image_size[0]
    stream = PairStream(Folder(str(pairs)), nltk_tagger(), size=size, **sizes)
    batch = next(iter(make_loader(stream, 0, False)))
    d = model.train()(batch, logistic_noise(model, batch, config.seed, 0))
    terms = code_loss(d, model, LossConfig())
    assert {name: first[name] for name in terms} == pytest.approx(
        {name: term.item() for name, term in terms.items()}, rel=1e-5, abs=1e-7
    )

    # Stopped and resumed it goes on bit for bit, also from where the file is now.
    preempt(tmp_path / "stopped", given, (4,), to_group)
    moved = tmp_path / "moved.pth"
    moved.write_bytes(released.read_bytes())
    train(*options(pairs, moved), "--out", tmp_path / "stopped", "--resume")
    assert same_state(tmp_path / "whole", tmp_path / "stopped")
    content = read_checkpoint(tmp_path / "stopped" / "last.pt")
    assert content["model_config"]["clip_weights"] == str(moved)
    done = train(*given[:2], *given[4:], "--out", tmp_path / "stopped", "--resume")  # without
    assert "step 10 of 10" in done.stdout
    last = tmp_path / "whole" / "last.pt"
    content = read_checkpoint(last)
    assert content["model_config"]["clip"] == "released"
    assert content["model_config"]["clip_weights"] == str(released)
    assert json.loads((last.parent / "config.json").read_text())["model"]["clip"] == "released"

    # It names the CLIP that it needs, wherever the file is now, and is evaluated as any other.
    trained = load_model(last, CPU)
    assert not torch.equal(trained.context, model.context)
    assert torch.equal(trained.clip.visual.proj, model.clip.visual.proj)
    assert torch.equal(load_model(last, CPU, str(moved)).context, trained.context)
    voc = ("--dataset", "voc", "--root", str(golden.folder() / "raw"), "--limit", "1")
    command = [sys.executable, "evaluate.py", *voc, "--checkpoint", str(last)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and "voc: mIoU" in done.stdout, done.stderr

    # And it can be started from in turn, stopped, and gone on with.
    preempt(tmp_path / "next", (*options(pairs, last), "--lr", "0"), (4,), to_group)
    train(*options(pairs, last), "--out", tmp_path / "next", "--lr", "0", "--resume")
    following = load_model(tmp_path / "next" / "last.pt", CPU)
    assert all(
        torch.equal(trained.learned_state()[k], v) for k, v in following.learned_state().items()
    )


def test_what_init_refuses(released, pairs, tmp_path, mistake):
    def said(start, *more) -> str:
        return mistake(
            main, *options(pairs, start, "--workers", "0", *more, "--out", tmp_path / "o")
        )

    assert "nowhere.pt: no such checkpoint" in said("nowhere.pt")
    for more in (("--no-region-prompt",), ("--upsampling-blocks", "1"), ("--clip", "ViT-B-32")):
        assert f"its network is taken: leave out {more[0]}" in said(released, *more)
    tcl = {k: torch.tensor(v) for k, v in golden.load("tiny_tcl_checkpoint").items()}
    torch.save({"model": tcl}, tmp_path / "tcl.pth")
    assert "TCL's network has no learned context to train" in said(tmp_path / "tcl.pth")

    assert "not of the shapes world: leave --preset shapes out" in mistake(
        main, "--preset", "shapes", "--init", released, "--out", tmp_path / "o"
    )
    shapes_model = CoDe(load_clip("shapes"), model_config())
    save_checkpoint(model_content(shapes_model), tmp_path / "shapes.pt")
    assert "of the shapes world: add --preset shapes" in said(tmp_path / "shapes.pt")

    # A model that started from the authors' file needs that file, and no other.
    model = load_model(released, CPU)
    save_checkpoint(model_content(model), tmp_path / "own.pt")
    save_checkpoint(model_content(random_model()), tmp_path / "other.pt")
    weights = ("--clip-weights", str(tmp_path / "other.pt"))
    assert "whose CLIP is needed: name that file" in said(tmp_path / "own.pt", *weights)
    named = said(tmp_path / "own.pt", "--clip-weights", "openai")
    assert "--clip-weights openai: the training started from a released file" in named
    assert "trained with other weights of CLIP" in said(
        tmp_path / "own.pt", "--clip-weights", str(another(released, tmp_path))
    )


def another(released: Path, folder: Path) -> Path:
    """The authors' file with another CLIP in it."""
    content = torch.load(released, weights_only=True)
    name = next(k for k in content["model"] if k.endswith("clip_proj.proj"))
    content["model"][name] = content["model"][name] + 1
    torch.save(content, folder / "another.pth")
    return folder / "another.pth"


def test_a_run_goes_on_from_another_place_of_the_init_file(released, tmp_path):
    model = load_model(released, CPU)
    config = TrainConfig(init=str(released), out=str(tmp_path))

    def run(config: TrainConfig) -> Run:
        optimizer = make_optimizer(model, config)
        return Run(model, optimizer, make_scaler(CPU, torch.float32), config, LossConfig())

    save_run(run(config), tmp_path / "last.pt")
    resume_run(run(replace(config, init="elsewhere.pth")), tmp_path / "last.pt")


# --- as the released program ----------------------------------------------------------------------


def release() -> tuple[TrainConfig, ModelConfig, LossConfig]:
    configs = (TrainConfig, ModelConfig, LossConfig)
    return parse("", *configs, presets=TRAIN_PRESETS, words=["--preset", "release"])


def test_preset_release_changes_what_the_differences_say():
    train, model, loss = release()
    assert asdict(train) == asdict(TrainConfig(preset="release", decay_prompts=True))
    assert asdict(model) == asdict(ModelConfig(text_attention="all"))
    assert asdict(loss) == asdict(LossConfig(lambda_kg=4.0, pseudo_labels="release"))


def test_weight_decay_as_the_release():
    """Its list: all but biases and LayerNorms, by the names of a released file."""
    state = {k: torch.tensor(v) for k, v in golden.load("tiny_code_checkpoint").items()}
    assert is_released(state)
    ours = {}  # our name -> whether the release decays it
    for name, value in state.items():
        for own in rename_released({name: value}, tcl=False)["learned"]:
            norm = ".ln_" in name or ".norm." in name or ".ln." in name
            ours[own] = not (norm or name.endswith("bias"))
    model = random_model(text_attention="all")
    for config, prompts in ((release()[0], True), (TrainConfig(), False)):
        decayed, plain = make_optimizer(model, config).param_groups
        assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0.0
        in_group = {id(p) for p in decayed["params"]}
        found = {n: id(p) in in_group for n, p in model.named_parameters() if n[:5] != "clip."}
        assert found.keys() == ours.keys()
        for name, decays in ours.items():
            scalar = model.get_parameter(name).ndim == 0
            special = scalar or name in ("context", "region_prompt", "word_prompt")
            assert found[name] == (decays and (prompts or not special)), name
        assert any(found[n] for n in ("region_prompt", "hcl_log_scale")) == prompts
