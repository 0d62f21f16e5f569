"""The training loop on batches of our own: its optimizer, and gradients that are not finite."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, random_model, some_batch

import train
from checkpoint import Run, read_checkpoint
from config import LossConfig, TrainConfig, UserError
from support.device import make_scaler, update_scale


def new_run(model, config: TrainConfig, precision: torch.dtype = torch.float32) -> Run:
    parts = (train.make_optimizer(model, config), make_scaler(CPU, precision))
    return Run(model, *parts, config, LossConfig(), precision)


def run_loop(
    out, steps: int, broken: set[int], monkeypatch, precision: torch.dtype = torch.float32
) -> list:
    """A real loop; in the broken steps the loss is finite and its gradient is not.

    Returns the weights of the mask's scale after every step.
    """
    model = random_model()
    batch = replace(some_batch(model), position=(0, 0, 1))
    values, done, losses = [], [], train.code_loss

    def with_broken_gradients(d, model, *arguments):
        values.append(model.image_segmenter.mask_scale.item())
        terms = losses(d, model, *arguments)
        if len(done) in broken:
            root = (0 * model.image_segmenter.mask_scale).sqrt()  # 0, its derivative infinite
            terms["total"] = terms["total"] + root
        done.append(None)
        return terms

    monkeypatch.setattr(train, "code_loss", with_broken_gradients)
    config = TrainConfig(out=str(out), steps=steps, batch_size=3, lr=1e-2, log_every=2, warmup=0.0)
    train.train(new_run(model, config, precision), [batch] * steps)
    return [*values, model.image_segmenter.mask_scale.item()]


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_updates_without_a_finite_gradient_are_left_out_and_counted(
    tmp_path, monkeypatch, precision
):
    values = run_loop(tmp_path, 8, {1, 2, 5}, monkeypatch, precision)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["updates_left_out"] for line in lines] == [1, 2, 3, 3]
    moved = [a != b for a, b in zip(values, values[1:])]
    assert moved == [True, False, False, True, True, False, True, True]
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 8


def test_fifty_in_a_row_stop_the_run(tmp_path, monkeypatch):
    run_loop(tmp_path / "49", 51, set(range(1, 50)), monkeypatch)
    with pytest.raises(UserError, match="step 50: the gradients of fifty steps in a row not fin"):
        run_loop(tmp_path / "50", 60, set(range(1, 51)), monkeypatch)


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(tmp_path):
    model = random_model()
    batch = replace(some_batch(model), position=(0, 0, 1))
    config = TrainConfig(
        out=str(tmp_path), steps=1, batch_size=3, max_grad_norm=0.01, unfreeze=0.0, warmup=0.0
    )
    train.train(new_run(model, config), [batch])
    left = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    (line,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert left.item() == pytest.approx(0.01, rel=1e-3) and line["grad_norm"] > 0.1


@pytest.mark.parametrize("options, frozen", [({}, 6), ({"unfreeze": 0.3}, 3)])
def test_the_second_phase_begins_at_its_step(tmp_path, monkeypatch, options, frozen):
    """Section 3.5: at 60 % of the steps the copy of the last visual block joins."""
    trains, losses = [], train.code_loss

    def watched(d, model, *arguments):
        trains.append(all(p.requires_grad for p in model.image_segmenter.block.parameters()))
        return losses(d, model, *arguments)

    monkeypatch.setattr(train, "code_loss", watched)
    model = random_model()
    batch = replace(some_batch(model), position=(0, 0, 1))
    config = TrainConfig(out=str(tmp_path), steps=10, batch_size=3, **options)
    train.train(new_run(model, config), [batch] * 10)
    assert trains == [False] * frozen + [True] * (10 - frozen)


def test_noise_follows_from_seed_and_step():
    model = random_model()

    def noise(pairs: int = 3, seed: int = 1, step: int = 5) -> torch.Tensor:
        batch = SimpleNamespace(images=[None] * pairs, noun_tokens=[None] * 2 * pairs)
        return train.logistic_noise(model, batch, seed, step)

    assert noise().shape == (2, 3, 16, 16) and torch.equal(noise(), noise())
    for other in (noise(step=6), noise(seed=2)):
        assert not torch.equal(noise(), other)
    many = noise(pairs=200)  # logistic: mean 0, standard deviation pi / sqrt(3)
    assert many.mean().abs() < 0.02 and many.std().item() == pytest.approx(1.8138, rel=0.02)


def test_the_optimizer_is_section_3_5s():
    """AdamW; decay on matrices and kernels, none on biases, LayerNorms, prompts and scalars."""
    model = random_model()
    optimizer = train.make_optimizer(model, TrainConfig())
    names = {p: name for name, p in model.named_parameters()}
    decayed, plain = ({names[p] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (5e-6, (0.9, 0.999), 1e-6)
    learned = {name for name in names.values() if not name.startswith("clip.")}
    assert decayed | plain == learned and not decayed & plain
    assert {"context", "region_prompt", "word_prompt", "hcl_log_scale"} < plain
    assert all(name.endswith("weight") or name == "image_segmenter.proj" for name in decayed)
    assert "image_segmenter.upsampling.1.convs.0.weight" in decayed
    assert not any("norm" in name or "ln_" in name for name in decayed)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_scattered_bad_steps_do_not_wear_the_guard_out(precision):
    """The update after them is the one of a fresh optimizer: the scale has not gone to zero."""

    def updated(bad: int) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = torch.optim.AdamW([weight], lr=1e-2, eps=1e-6)
        scaler = make_scaler(CPU, precision)
        for step in range(bad + 1):
            # A gradient of 1e-4: in float16 a scale below 1e-3 would round it to zero.
            loss = weight.to(precision).float().sum() * (float("inf") if step < bad else 1e-4)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            update_scale(scaler, CPU, precision)
        return weight.detach()

    assert torch.allclose(updated(1000), updated(0), atol=1e-6)
    assert not torch.equal(updated(1000), torch.linspace(-1, 1, 50))


def test_best_pt_is_the_best_evaluation_not_the_last_one(tmp_path, monkeypatch):
    """Each evaluation comes after the checkpoint of its step: what it breaks loses no step."""
    found, saved = iter([20.0, 30.0, 10.0]), []

    def scripted(run) -> float:
        saved.append(read_checkpoint(tmp_path / "last.pt")["step"])
        return next(found)

    monkeypatch.setattr(train, "evaluate_model", scripted)
    model = random_model()
    batch = replace(some_batch(model), position=(0, 0, 1))
    config = TrainConfig(
        out=str(tmp_path), steps=6, batch_size=3, lr=1e-2, eval_dataset=("shapes",), eval_every=2
    )
    weights = [model.learned_state()["context"].clone()]
    record = train.Log.record

    def remembered(*arguments):
        record(*arguments)
        weights.append(model.learned_state()["context"].clone())

    monkeypatch.setattr(train.Log, "record", remembered)
    train.train(new_run(model, config), [batch] * 6)
    best, last = (read_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert saved == [2, 4, 6]
    assert best["mIoU"] == last["best"] == 30.0 and last["step"] == 6
    assert torch.equal(best["model"]["context"], weights[4])
    assert not torch.equal(best["model"]["context"], last["model"]["context"])
