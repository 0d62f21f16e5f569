"""From dataclasses to a command line."""

import inspect
import sys
from dataclasses import dataclass, fields

import pytest

import train
from config import (
    TRAIN_PRESETS,
    EvalConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    chosen,
    option,
    parse,
    settle,
)
from datasets import THESIS_DATASETS
from evaluate import Segmenter
from pamr import pamr
from support.device import choose_device
from training_free import TrainingFreeConfig, for_benchmark


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
            assert not f.metadata or f.metadata["help"]  # without any: a constant
    for config in (TrainConfig, ModelConfig, LossConfig):
        names |= {f.name for f in fields(config)}
    assert TRAIN_PRESETS["shapes"].keys() <= names


def test_the_defaults_are_the_thesis_and_else_the_release():
    """Section 3.5 and what it leaves to TCL's and CoDe's released programs."""
    train, loss, model = TrainConfig(), LossConfig(), ModelConfig()
    assert (train.steps, train.batch_size, train.lr, train.nouns) == (50_000, 64, 5e-6, 2)
    assert train.warmup * train.steps == 15_000 and train.weight_decay == 0.05
    assert (loss.lambda_kg, loss.lambda_seg_v, loss.lambda_seg_t, loss.lambda_hcl) == (8, 1, 1, 0.5)
    assert model.clip == "ViT-B-16-quickgelu" and model.clip_weights == "openai"
    assert loss.pseudo_labels == "thesis" and model.text_attention == "words"
    assert train.final_lr * train.lr == 6.25e-7 and train.unfreeze * train.steps == 30_000
    assert (train.max_grad_norm, train.min_crop) == (5.0, 0.9)
    assert (loss.image_contrast, loss.region_contrast) == (0.1, 0.1)
    assert (loss.area, loss.area_prior, loss.area_others) == (0.5, 0.25, 0.05)
    assert (loss.smooth_features, loss.smooth_masks, loss.none_weight) == (1.0, 1.0, 0.5)
    assert (model.upsampling_blocks, model.convs_per_block, model.text_layers) == (2, 1, 2)
    assert (model.mask_scale, model.mask_bias) == (10.0, -2.5)
    assert (model.word_scale, model.word_bias) == (10.0, 0.0)
    assert model.context_init.split() == ["A", "photo", "of"] + ["x"] * 13
    assert model.co_decomposition and model.word_segments
    assert model.word_prompt and model.region_prompt


def test_the_defaults_of_section_4_1():
    masks = MaskConfig()
    assert masks.method == "code" and Segmenter.protocol == "thesis"
    assert (masks.short_side, masks.long_side) == (448, 2048)
    assert (masks.window, masks.stride) == (448, 224)
    assert (masks.prior_weight, masks.prior_scale, masks.prior_bias) == (0.3, 10.0, 0.25)
    assert masks.precision == "float32"
    assert masks.pamr and inspect.signature(pamr).parameters["iterations"].default == 10
    assert masks.pamr_dilations == (1, 2, 4, 8, 12, 24)
    assert masks.threshold == 0.4 and masks.background_words is None
    assert MaskConfig(pamr=False).threshold == 0.5
    assert MaskConfig(background=0.0).threshold == 0.0


def test_the_defaults_of_methods_without_training():
    """Sizes, windows, scales and thresholds that they publish with."""

    def of(method: str, dataset: str, given=(), **more) -> TrainingFreeConfig:
        return for_benchmark(TrainingFreeConfig(method=method, **more), dataset, given)

    for method in ("maskclip", "sclip", "clearclip", "naclip"):
        for dataset in THESIS_DATASETS:
            config = of(method, dataset)
            whole = method == "naclip" and dataset == "voc"
            assert config.short_side == (560 if dataset == "cityscapes" else 336)
            assert (config.window, config.stride) == (2048 if whole else 224, 112)
            assert config.threshold == 0.1 and config.pamr_dilations == (8, 16)
            scales = {"voc": 65, "context": 50, "coco_object": 50} if method == "sclip" else {}
            assert config.softmax_scale == scales.get(dataset, 40)
    assert of("naclip", "voc", pamr=False).threshold == 0.1
    given = {"softmax_scale": 10.0, "window": 64, "background": 0.0, "short_side": 100}
    changed = of("sclip", "voc", given, **given)
    assert (changed.softmax_scale, changed.window, changed.threshold) == (10.0, 64, 0.0)
    assert of("naclip", "voc", given, **given).window == 64
    assert of("sclip", "cityscapes", given, **given).short_side == 100


def test_an_unknown_device():
    with pytest.raises(UserError, match="--device gpu"):
        choose_device("gpu")


def test_a_configuration_says_what_was_done():
    model, loss = ModelConfig(co_decomposition=False), LossConfig()
    settle(model, loss)
    assert not (model.word_prompt or model.region_prompt or model.word_segments)
    assert loss.lambda_hcl == loss.lambda_seg_t == 0 and loss.lambda_seg_v == 1
    model, loss = ModelConfig(word_segments=False), LossConfig()
    settle(model, loss)
    assert model.region_prompt and not model.word_prompt
    assert loss.lambda_hcl == 0.5 and loss.lambda_seg_t == 0
    model, loss = ModelConfig(), LossConfig()
    settle(model, loss)
    assert (model, loss) == (ModelConfig(), LossConfig())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ("--no-co-decomposition", "--region-prompt"),
            "--region-prompt asks for what --no-co-decomposition leaves out",
        ),
        (
            ("--no-word-segments", "--lambda-seg-t=3"),
            "--lambda-seg-t asks for what --no-word-segments leaves out",
        ),
    ],
)
def test_contradictions_are_refused(options, message, mistake, tmp_path):
    said = mistake(train.main, "--preset", "shapes", "--out", tmp_path / "out", *options)
    assert message in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, value",
    [
        (["a", "--preset", "shapes", "b"], "shapes"),
        (["--preset=shapes"], "shapes"),
        (["--preset", "thesis", "--preset", "shapes"], "shapes"),
        (["--", "--preset", "shapes"], None),
        (["--prior-bias", "-1", "shapes"], None),
        (["a", "--preset"], None),  # `parse` says that a value is missing
    ],
)
def test_an_option_that_is_known_before_the_others(words, value):
    assert chosen("preset", words) == value


def test_options_are_not_abbreviated(mistake):
    assert "unrecognized arguments: --eval" in mistake(train.main, "--eval", "voc")
