"""From dataclasses to a command line."""

import sys
from dataclasses import dataclass, fields

import pytest

from config import (
    TRAIN_PRESETS,
    EvalConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    option,
    parse,
)
from support.device import choose_device


@dataclass
class Example:
    """An example."""

    preset: str = option("none", "named defaults")
    steps: int = option(3, "how many")
    rate: float = option(0.5, "how fast")
    name: str | None = option(None, "what for")
    sizes: tuple[int, ...] = option((1, 2), "how large")
    loud: bool = option(True, "how")


def parsed(monkeypatch, *arguments: str) -> Example:
    monkeypatch.setattr(sys, "argv", ["example.py", *arguments])
    return parse("", Example, presets={"fast": {"rate": 2.0, "steps": 9}})[0]


def test_defaults_presets_and_the_command_line(monkeypatch):
    assert parsed(monkeypatch) == Example()
    assert parsed(monkeypatch, "--preset", "fast") == Example("fast", 9, 2.0)
    # What is typed counts more than the preset, wherever it stands.
    assert parsed(monkeypatch, "--steps", "4", "--preset", "fast") == Example("fast", 4, 2.0)
    got = parsed(monkeypatch, "--no-loud", "--sizes", "7", "8", "9", "--name", "x")
    assert got == Example(name="x", sizes=(7, 8, 9), loud=False)


@pytest.mark.parametrize("arguments", [("--steps", "x"), ("--stepz", "3"), ("--sizes", "1", "b")])
def test_mistakes_are_one_line_and_exit_code_2(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        parsed(monkeypatch, *arguments)
    assert error.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_every_field_has_an_explanation_and_presets_name_fields():
    names = set()
    for config in (TrainConfig, ModelConfig, LossConfig, EvalConfig, MaskConfig):
        for f in fields(config):
            assert f.metadata["help"]
    for config in (TrainConfig, ModelConfig, LossConfig):
        names |= {f.name for f in fields(config)}
    assert TRAIN_PRESETS["shapes"].keys() <= names


def test_the_defaults_are_the_thesis():
    """Section 3.5."""
    train, loss = TrainConfig(), LossConfig()
    assert (train.steps, train.batch_size, train.lr, train.nouns) == (50_000, 64, 5e-6, 2)
    assert train.warmup * train.steps == 15_000 and train.weight_decay == 0.05
    assert (loss.lambda_kg, loss.lambda_seg_v, loss.lambda_seg_t, loss.lambda_hcl) == (8, 1, 1, 0.5)
    assert ModelConfig().clip == "ViT-B-16-quickgelu" and loss.pseudo_labels == "thesis"


def test_an_unknown_device():
    with pytest.raises(UserError, match="--device gpu"):
        choose_device("gpu")
