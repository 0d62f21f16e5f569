"""Something is learned: the one thing that no equation's test says."""

from pathlib import Path

import pytest
from conftest import CPU
from runs import train

from config import MASK_PRESETS, EvalConfig, MaskConfig
from datasets import load_benchmark
from evaluate import Segmenter, benchmark_words, evaluate, load_method


def mean_iou(method: str, checkpoint: Path) -> float:
    """On 60 held-out scenes."""
    options = MASK_PRESETS["shapes"] | {"method": method, "checkpoint": str(checkpoint)}
    settings, benchmark = MaskConfig(**options), load_benchmark("shapes", "")
    clip, model = load_method(settings, CPU)
    segmenter = Segmenter(clip, model, benchmark_words(benchmark, settings), settings)
    return evaluate(segmenter, benchmark, EvalConfig(limit=60))["mIoU"]


@pytest.mark.slow
def test_60_steps_beat_maskclip_by_fifteen_points(tmp_path):
    """Without any mask. In three seeds it was 27 points."""
    train("--preset", "shapes", "--steps", "60", "--workers", "0", "--out", tmp_path)
    found = {method: mean_iou(method, tmp_path / "last.pt") for method in ("code", "maskclip")}
    assert found["code"] > found["maskclip"] + 15, found
