"""Something is learned: the one thing that no equation's test says."""

from pathlib import Path

import pytest
from conftest import CPU
from runs import train

from checkpoints import load_method
from config import MASK_PRESETS, EvalConfig, MaskConfig
from datasets import load_benchmark
from datasets.protocols import completed
from evaluate import evaluate, make_segmenter


def mean_iou(method: str, checkpoint: Path) -> float:
    """On 60 held-out scenes."""
    options = MASK_PRESETS["shapes"] | {"method": method, "checkpoint": str(checkpoint)}
    settings, benchmark = MaskConfig(**options), load_benchmark("shapes", "")
    clip, model = load_method(completed(settings), CPU)
    segmenter = make_segmenter(clip, model, benchmark, settings)
    return evaluate(segmenter, benchmark, EvalConfig(limit=60))["mIoU"]


@pytest.mark.slow
def test_150_steps_beat_maskclip_by_five_points(tmp_path):
    """Without any mask."""
    train("--preset", "shapes", "--steps", "150", "--workers", "0", "--out", tmp_path)
    found = {method: mean_iou(method, tmp_path / "last.pt") for method in ("code", "maskclip")}
    assert found["code"] > found["maskclip"] + 5, found
