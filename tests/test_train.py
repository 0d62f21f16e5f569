"""train.py as it is used: a subprocess, torchrun with two processes, killed runs resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_data import NLTK_DATA
from test_parallel import free_port
from test_released import ROOT

from checkpoint import load_model, model_content, read_checkpoint, save_atomically
from clip import load_clip
from config import MaskConfig, ModelConfig, TrainConfig, UserError
from model import CoDe
from train import learning_rate, main, make_scaler

TINY = ("--preset", "shapes", "--batch-size", "4", "--log-every", "1", "--warmup", "0.2")


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NLTK_DATA": str(NLTK_DATA)}


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )


def kill_all(marker: str) -> None:
    """SIGKILL every process whose command line holds a marker: torchrun's agent and its workers,
    which are in sessions of their own."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if marker in words:
            os.kill(int(folder.name), signal.SIGKILL)


def command(*arguments: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, "train.py", *map(str, arguments)]


def train(*arguments: str, processes: int = 1, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments, processes=processes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == code, done.stderr
    return done


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_state(a: Path, b: Path) -> bool:
    a, b = (read_checkpoint(path / "last.pt") for path in (a, b))
    equal = all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    return equal and a["step"] == b["step"] and a["places"] == b["places"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(*TINY, "--steps", "10", "--out", out)
    return out


def test_a_run_writes_what_the_readme_says(uninterrupted):
    assert {path.name for path in uninterrupted.iterdir()} == {
        "last.pt",
        "config.json",
        "log.jsonl",
    }
    lines = log(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 11))
    terms = ("kg", "image_contrast", "region_contrast", "area", "area_others", "smooth_features")
    terms += ("smooth_masks", "seg_t", "hcl")
    for line in lines:
        assert line["total"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
    assert json.loads((uninterrupted / "config.json").read_text())["model"]["clip"] == "shapes"


def test_the_last_block_is_frozen_first_and_trains_later(tmp_path, uninterrupted):
    """At 60 % of the steps the copy of CLIP's last block starts to move."""
    train(*TINY, "--steps", "10", "--unfreeze", "1.0", "--out", tmp_path)
    frozen, trained = (
        load_model(p / "last.pt", torch.device("cpu")) for p in (tmp_path, uninterrupted)
    )
    original = frozen.clip.visual.transformer.resblocks[-1]
    for name, value in original.named_parameters():
        assert torch.equal(value, frozen.image_segmenter.block.get_parameter(name))
    moved = [
        not torch.equal(value, trained.image_segmenter.block.get_parameter(name))
        for name, value in original.named_parameters()
    ]
    assert sum(moved) > 8  # not the keys and queries, which MaskCLIP's trick never uses


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(tmp_path, workers):
    options = (*TINY, "--steps", "10", "--checkpoint-every", "3", "--workers", workers)
    train(*options, "--out", tmp_path / "whole")
    killed = start(*options, "--out", tmp_path / "killed")
    while not (tmp_path / "killed/last.pt").exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    train(*options, "--out", tmp_path / "killed", "--resume")
    assert same_state(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_finishes_the_step_saves_and_exits_0(tmp_path):
    options = (*TINY, "--steps", "4000", "--out", tmp_path)
    running = start(*options)
    while not (tmp_path / "log.jsonl").exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 0
    assert read_checkpoint(tmp_path / "last.pt")["step"] == log(tmp_path)[-1]["step"]


def test_two_processes_under_torchrun(tmp_path):
    train(*TINY, "--steps", "5", "--out", tmp_path, processes=2)
    assert len(log(tmp_path)) == 5
    places = read_checkpoint(tmp_path / "last.pt")["places"]
    assert set(places) == {0, 1}  # each process read its own share


def test_two_nodes(tmp_path):
    """The README's line for two machines, as two torchrun agents on this one."""
    rendezvous = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1")
    rendezvous += (f"--master_port={free_port()}",)
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--node_rank={node}"]
            + ["train.py", *TINY, "--steps", "3", "--out", str(tmp_path)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    for agent in agents:
        _, errors = agent.communicate(timeout=120)
        assert agent.returncode == 0, errors
    last = read_checkpoint(tmp_path / "last.pt")
    assert last["processes"] == 2 and set(last["places"]) == {0, 1}


def test_two_processes_killed_and_resumed_then_one_goes_on(tmp_path):
    options = (*TINY, "--steps", "8", "--checkpoint-every", "2", "--workers", "1")
    train(*options, "--out", tmp_path / "whole", processes=2)
    out, before = tmp_path / "killed", -1.0
    for attempt in range(2):  # killed in the run itself, and again after resuming
        again = ("--resume",) if attempt else ()
        killed = subprocess.Popen(
            command(*options, "--out", out, *again, processes=2),
            cwd=ROOT,
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
        )
        saved_at = before
        while killed.poll() is None and saved_at == before:
            time.sleep(0.02)
            if (out / "last.pt").exists():
                saved_at = (out / "last.pt").stat().st_mtime
        before = saved_at
        kill_all(str(out))
        killed.wait()
    saved = (tmp_path / "killed/last.pt").read_bytes()
    train(*options, "--out", tmp_path / "killed", "--resume", processes=2)
    assert same_state(tmp_path / "whole", tmp_path / "killed")

    (tmp_path / "killed/last.pt").write_bytes(saved)
    if read_checkpoint(out / "last.pt")["step"] < 8:
        done = train(*options, "--out", out, "--resume")
        assert "2 processes before, 1 now" in done.stdout
        assert read_checkpoint(out / "last.pt")["step"] == 8


def test_the_best_checkpoint_is_kept(tmp_path):
    evaluation = ("--eval-dataset", "shapes", "--eval-every", "2", "--eval-limit", "5")
    train(*TINY, "--steps", "4", "--out", tmp_path, *evaluation)
    best, last = (read_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert best["mIoU"] == last["best"] > 0
    load_model(tmp_path / "best.pt", torch.device("cpu"))


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    done = train(
        *(*TINY, "--steps", "4", "--checkpoint-every", "1", "--out", tmp_path),
        *("--mask-bias", "nan"),
        code=2,
    )
    assert "step 0: total, " in done.stderr and "not finite" in done.stderr
    assert not (tmp_path / "last.pt").exists()


def test_an_update_that_is_not_finite_is_left_out():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scaler = make_scaler(torch.device("cpu"), scaled=False)
    for factor, moved in ((float("nan"), False), (1.0, True), (float("inf"), False)):
        before = weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, before) != moved


def test_real_pairs(tmp_path):
    """A folder of photographs-sized pictures with free-form captions, on a CLIP of its own."""
    if not NLTK_DATA.is_dir():
        pytest.skip("NLTK's tagger data is not here")
    captions = [
        "A man in a red jacket rides a horse along the beach.",
        "Two children with a kite, and a dog, on wet grass!",
        "old wooden boat near the harbour wall",
        "The cat sleeps on a sofa beside the window",
        "nothing here",
    ]
    for i, caption in enumerate(captions):
        Image.radial_gradient("L").convert("RGB").resize((640, 480)).save(tmp_path / f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text(caption)
    (tmp_path / "5.jpg").write_bytes(b"broken")
    (tmp_path / "5.txt").write_text("a house with a garden")
    train(
        *("--pairs", tmp_path, "--clip", "shapes", "--context-init", "a photo of a"),
        *("--steps", "6", "--batch-size", "4", "--workers", "1", "--log-every", "1"),
        *("--out", tmp_path / "out"),
    )
    lines = log(tmp_path / "out")
    assert len(lines) == 6
    assert lines[-1]["skipped"].keys() == {"fewer than 2 nouns", "not a picture"}


def test_learning_rate():
    """Section 3.5: linear warm-up from 1e-4 of the peak, then a cosine to its final share."""
    config = TrainConfig()
    assert learning_rate(0, config) == pytest.approx(5e-6 * 1e-4)
    assert learning_rate(7500, config) == pytest.approx(5e-6 / 2, rel=1e-3)
    assert learning_rate(15_000, config) == pytest.approx(5e-6)
    assert learning_rate(32_500, config) == pytest.approx((5e-6 + 6.25e-7) / 2)
    assert learning_rate(50_000, config) == pytest.approx(6.25e-7)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "data/gcc3m/gcc-train-{000000..000331}.tar data/gcc12m"),
        ((), "--preset shapes needs no data"),
        (("--preset", "shape"), "--preset shape: not one of thesis, shapes"),
        (("--steps", "many"), "invalid int value: 'many'"),
        (("--nouns", "0"), "--nouns 0: must be at least 1"),
        (("--warmup", "15000"), "--warmup 15000.0: must be at most 1"),
        (("--stepz", "3"), "unrecognized arguments: --stepz"),
        (("--pairs", "nowhere"), "--pairs nowhere: no such folder"),
        (("--shards", "nowhere/{00..12}.tar"), "nowhere/{00..12}.tar"),
        (("--preset", "shapes", "--clip", "RN50", "--clip-weights", "none"), "only plain ViTs"),
        (("--clip", "ViT-M-16-alt", "--clip-weights", "none", "--preset", "shapes"), "only plain"),
        (("--preset", "shapes", "--clip", "ViT-Z"), "open_clip has no such model"),
        (("--preset", "shapes", "--resume", "--out", "nowhere"), "nowhere/last.pt: no such"),
        (("--preset", "shapes", "--pairs", "."), "--pairs and --preset shapes are two sources"),
        (("--pairs", ".", "--shards", "a.tar"), "--pairs and --shards are two sources"),
        (("--preset", "shapes", "--eval-dataset", "voc"), "--eval-root data should hold"),
        (("--preset", "shapes", "--eval-dataset", "vac"), "--eval-dataset vac: not one of"),
        (("--preset", "shapes", "--pseudo-labels", "best"), "'thesis' or 'release'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words, mistake):
    assert words in mistake(main, *arguments)


def test_resuming_another_configuration_names_the_difference(uninterrupted):
    done = train(*TINY, "--steps", "10", "--lr", "0.5", "--out", uninterrupted, "--resume", code=2)
    assert "lr was 0.002, is 0.5" in done.stderr


def test_a_run_is_not_overwritten(uninterrupted):
    done = train(*TINY, "--steps", "10", "--out", uninterrupted, code=2)
    assert "holds a run: --resume goes on with it" in done.stderr
    assert len(log(uninterrupted)) == 10


def test_help_lists_every_field():
    text = train("--help").stdout
    for name in ("--lambda-hcl", "--no-word-prompt", "--context-init", "--checkpoint-every"):
        assert name in text


# --- checkpoint files -----------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_loading_a_checkpoint_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"masker.x": torch.zeros(1)}, "cfg": Bomb()}, "bomb.pt")
    with pytest.raises(UserError):
        load_model("bomb.pt", torch.device("cpu"))
    assert not Path("exploded").exists()


def test_a_checkpoint_of_another_clip_of_the_same_name_is_refused(tmp_path):
    config = ModelConfig(clip="shapes", context_init="a photo of a")
    content = model_content(CoDe(load_clip("shapes"), config))
    save_atomically(content, tmp_path / "same.pt")
    assert load_model(tmp_path / "same.pt", torch.device("cpu")).config == config
    save_atomically(content | {"clip": 1}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match=r"other\.pt: trained with other weights of CLIP than shapes"
    ):
        load_model(tmp_path / "other.pt", torch.device("cpu"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"hello"])
def test_an_unreadable_checkpoint_is_named(content, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt is not a readable checkpoint"):
        read_checkpoint(path)


def test_missing_and_unknown_tensors_are_named(uninterrupted, tmp_path):
    content = read_checkpoint(uninterrupted / "last.pt")
    content["model"]["surprise"] = content["model"].pop("context")
    save_atomically(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="missing context, unknown surprise"):
        load_model(tmp_path / "x.pt", torch.device("cpu"))


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_atomically({"step": 1}, path)

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save_atomically({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_evaluation_of_a_training_checkpoint(uninterrupted):
    """Our checkpoint, loaded, segments like the model it was saved from: embeddings match."""
    from evaluate import Segmenter

    model = load_model(uninterrupted / "last.pt", torch.device("cpu"))
    segmenter = Segmenter(model.clip, model, ["kite", "ball"], MaskConfig())
    assert segmenter.class_embedding.shape == (2, 64)
    assert segmenter.masks(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)
