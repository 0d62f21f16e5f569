"""train.py as it is used: a subprocess, torchrun with two processes and with two nodes. Mistakes,
and going on with a run that has all its steps, in this process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CPU, ROOT, free_port
from PIL import Image
from runs import ENVIRONMENT, TINY, log, train

import support.log
from checkpoint import load_model, read_checkpoint
from config import TrainConfig, UserError
from datasets import load_benchmark
from support.device import make_scaler, update_scale
from train import learning_rate, main

pytestmark = pytest.mark.slow

ALWAYS = {"last.pt", "config.json", "log.jsonl"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A run of ten steps that keeps two of them and evaluates itself twice."""
    out = tmp_path_factory.mktemp("whole")
    evaluation = ("--eval-dataset", "shapes", "--eval-every", "5", "--eval-limit", "5")
    train(*TINY, "--steps", "10", "--keep-steps", "6", "10", *evaluation, "--out", out)
    return out


def test_a_run_writes_what_the_readme_says_and_what_was_asked_for(uninterrupted):
    asked = {"step-6.pt", "step-10.pt", "best.pt", "eval-5.json", "eval-10.json"}
    assert {path.name for path in uninterrupted.iterdir()} == ALWAYS | asked
    lines = log(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 11))
    terms = ("kg", "image_contrast", "region_contrast", "area", "area_others", "smooth_features")
    terms += ("smooth_masks", "seg_t", "hcl")
    for line in lines:
        assert line["total"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
    assert json.loads((uninterrupted / "config.json").read_text())["model"]["clip"] == "shapes"


@pytest.fixture
def resumed(monkeypatch, capsys):
    """Go on, in this process, with a run that has all its steps; returns what is printed."""

    def said(*options) -> str:
        monkeypatch.setattr(
            sys, "argv", ["train.py", *map(str, options), "--workers", "0", "--resume"]
        )
        main()
        return capsys.readouterr().out

    return said


def test_every_name_in_the_log_is_explained(uninterrupted):
    explained = support.log.__doc__
    names = {name for line in log(uninterrupted) for name in line}
    assert {"step", "total", "skipped"} < names
    assert [name for name in names if f"`{name}`" not in explained] == []


def test_the_last_block_is_frozen_first_and_trains_later(uninterrupted):
    """After 60 % of the steps the copy of CLIP's last block starts to move."""
    frozen, trained = (load_model(uninterrupted / f, CPU) for f in ("step-6.pt", "last.pt"))
    original = frozen.clip.visual.transformer.resblocks[-1]
    for name, value in original.named_parameters():
        assert torch.equal(value, frozen.image_segmenter.block.get_parameter(name))
    moved = [
        not torch.equal(value, trained.image_segmenter.block.get_parameter(name))
        for name, value in original.named_parameters()
    ]
    assert sum(moved) > 8  # not the keys and queries, which MaskCLIP's trick never uses


def test_two_processes_under_torchrun(tmp_path):
    done = train(*TINY, "--steps", "5", "--out", tmp_path, processes=2)
    assert len(log(tmp_path)) == 5 and "broadcast_buffers" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == ALWAYS
    offsets = read_checkpoint(tmp_path / "last.pt")["offsets"]
    assert set(offsets) == {0, 1}  # each process read its own share


def test_two_nodes(tmp_path):
    """The line of docs/training.md for two machines, as two torchrun agents on this one."""
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
    assert last["processes"] == 2 and set(last["offsets"]) == {0, 1}


def test_the_best_checkpoint_is_kept(uninterrupted):
    best, last = (read_checkpoint(uninterrupted / name) for name in ("best.pt", "last.pt"))
    texts = [(uninterrupted / f"eval-{step}.json").read_text() for step in (5, 10)]
    found = [json.loads(text)["average"] for text in texts]
    assert best["mIoU"] == last["best"] == max(found) > 0
    load_model(uninterrupted / "best.pt", CPU)


def test_several_benchmarks_and_an_evaluation_that_was_cut_off(tmp_path, monkeypatch):
    """The best is that of the average; what a kill left out is made up when the run goes on."""
    values = {"shapes": iter([30.0, 20.0, 60.0]), "other": iter([40.0, 70.0, 20.0])}
    broken = iter([False, False, False, True, False, False, False, False])

    def scripted(segmenter, benchmark, config) -> dict:
        if next(broken):
            raise KeyboardInterrupt  # as a kill would, between two benchmarks
        assert segmenter.precision == torch.bfloat16 and config.limit == limit
        return {"dataset": config.dataset, "mIoU": next(values[config.dataset])}

    limit = 5
    names, shapes_world = ("shapes", "other"), load_benchmark("shapes", "")
    monkeypatch.setattr("train.evaluated_on", lambda config: names)
    monkeypatch.setattr("train.load_benchmark", lambda name, root: shapes_world)
    monkeypatch.setattr("train.evaluate", scripted)
    given = [*TINY, "--steps", "6", "--out", tmp_path, "--workers", "0", "--precision", "bfloat16"]
    given += ["--eval-dataset", *names, "--eval-every", "2", "--eval-limit", "5"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, given)])
    monkeypatch.setattr("train.check_world", lambda *arguments: None)
    monkeypatch.setattr("train.DATASETS", names)
    with pytest.raises(KeyboardInterrupt):
        main()
    cut_off = json.loads((tmp_path / "eval-4.json").read_text())
    assert cut_off["average"] is None and [r["mIoU"] for r in cut_off["datasets"]] == [20.0]
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 4
    assert read_checkpoint(tmp_path / "best.pt")["mIoU"] == 35.0
    values["shapes"] = iter([20.0, 60.0])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    main()
    found = [json.loads((tmp_path / f"eval-{step}.json").read_text()) for step in (2, 4, 6)]
    assert [content["average"] for content in found] == [35.0, 45.0, 40.0]
    assert read_checkpoint(tmp_path / "best.pt")["mIoU"] == 45.0
    assert read_checkpoint(tmp_path / "last.pt")["best"] == 45.0

    # An average of other images is none to compare with: the run is evaluated again.
    best = tmp_path / "best.pt"
    values |= {"shapes": iter([10.0]), "other": iter([20.0])}
    broken = iter([False] * 19)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-2], "6", "--resume"])  # --eval-limit
    limit = 6
    main()
    assert read_checkpoint(best)["mIoU"] == 15.0
    assert read_checkpoint(tmp_path / "best-before.pt")["mIoU"] == 45.0

    # A full disk, between eval-6.json and best.pt: the evaluation is made again.
    def full(content, path) -> None:
        raise UserError(f"{path} could not be written (No space left on device)")

    monkeypatch.setattr(sys, "argv", [*sys.argv[:-2], "7", "--resume"])
    limit = 7
    with monkeypatch.context() as context, pytest.raises(UserError, match="No space left"):
        context.setattr("train.save_checkpoint", full)
        values |= {"shapes": iter([10.0]), "other": iter([30.0])}
        main()
    assert json.loads((tmp_path / "eval-6.json").read_text())["average"] == 20.0
    values |= {"shapes": iter([10.0]), "other": iter([30.0])}
    main()
    assert read_checkpoint(best)["mIoU"] == 20.0
    main()  # nothing is left to do: `values` has no more


def test_named_steps_are_kept(uninterrupted, resumed):
    sixth, tenth, last = (
        load_model(uninterrupted / name, CPU).learned_state()
        for name in ("step-6.pt", "step-10.pt", "last.pt")
    )
    assert all(torch.equal(tenth[name], value) for name, value in last.items())
    assert not torch.equal(sixth["context"], last["context"])
    # Other steps are no other run.
    options = (*TINY, "--steps", "10", "--keep-steps", "3", "--out", uninterrupted)
    assert "step 10 of 10" in resumed(*options)


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    done = train(
        *(*TINY, "--steps", "4", "--checkpoint-every", "1", "--out", tmp_path),
        *("--lambda-hcl", "1e39"),  # infinite in single precision
        code=2,
    )
    assert "step 0: total, " in done.stderr and "not finite" in done.stderr
    assert not (tmp_path / "last.pt").exists()


def test_an_update_that_is_not_finite_is_left_out():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scaler = make_scaler(CPU, torch.float32)
    for factor, moved in ((float("nan"), False), (1.0, True), (float("inf"), False)):
        before = weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        scaler.step(optimizer)
        update_scale(scaler, CPU, torch.float32)
        assert torch.equal(weight, before) != moved


def test_real_pairs_and_where_they_have_moved(tmp_path, resumed, mistake):
    """A folder of photograph-sized images with free-form captions, on a CLIP of its own."""
    pairs, moved = tmp_path / "pairs", tmp_path / "moved"
    pairs.mkdir()
    captions = [
        "A man in a red jacket rides a horse along the beach.",
        "Two children with a kite, and a dog, on wet grass!",
        "old wooden boat near the harbour wall",
        "The cat sleeps on a sofa beside the window",
        "nothing here",
    ]
    for i, caption in enumerate(captions):
        name = "caf\udce9" if i == 1 else str(i)  # not UTF-8, as old disks have names
        Image.radial_gradient("L").convert("RGB").resize((640, 480)).save(pairs / f"{name}.jpg")
        (pairs / f"{name}.txt").write_text(caption)
    (pairs / "5.jpg").write_bytes(b"broken")
    (pairs / "5.txt").write_text("a house with a garden")
    options = ("--clip", "shapes", "--context-init", "a photo of a", "--out", tmp_path / "out")
    options += ("--steps", "6", "--batch-size", "4", "--workers", "1", "--log-every", "1")
    train(*options, "--pairs", pairs)
    lines = log(tmp_path / "out")
    assert len(lines) == 6
    assert lines[-1]["skipped"].keys() == {"fewer than 2 nouns", "not an image"}

    pairs.rename(moved)
    assert "step 6 of 6" in resumed(*options, "--pairs", moved)
    (moved / "0.txt").unlink()
    message = mistake(main, *options, "--pairs", moved, "--resume")
    assert "of another configuration: the data has other files" in message


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
        ((), "data/cc3m-wds/*.tar data/cc12m-wds/*.tar"),
        ((), "--preset shapes needs no data"),
        (("--preset", "shape"), "--preset shape: not one of thesis, release, shapes"),
        (("--steps", "many"), "invalid int value: 'many'"),
        (("--lr", "nan"), "--lr nan: must be a finite number"),
        (("--lambda-hcl", "inf"), "--lambda-hcl inf: must be a finite number"),
        (("--precision", "half", "--preset", "shapes"), "--precision half: not one of auto"),
        (("--text-attention", "none", "--preset", "shapes"), "'words' or 'all'"),
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
        (("--preset", "shapes", "--keep-steps", "9", "401"), "--keep-steps 401: not among the 400"),
        (("--preset", "shapes", "--eval-dataset", "voc"), "--eval-root data should hold"),
        (("--preset", "shapes", "--eval-dataset", "vac"), "--eval-dataset vac: not one of"),
        (("--preset", "shapes", "--pseudo-labels", "best"), "'thesis' or 'release'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words, mistake):
    assert words in mistake(main, *arguments)


def test_help_lists_every_field(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    text = capsys.readouterr().out
    for name in ("--lambda-hcl", "--no-word-prompt", "--context-init", "--checkpoint-every"):
        assert name in text


def test_resuming_another_configuration_names_the_difference(uninterrupted, mistake):
    options = (*TINY, "--steps", "10", "--lr", "0.5", "--out", uninterrupted, "--resume")
    assert "lr was 0.003, is 0.5" in mistake(main, *options)


def test_a_run_is_not_overwritten(uninterrupted, mistake):
    message = mistake(main, *TINY, "--steps", "10", "--out", uninterrupted)
    assert "holds a run: --resume goes on with it" in message
    assert len(log(uninterrupted)) == 10
