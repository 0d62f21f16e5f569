"""make demo, shortened."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from checkpoint import read_checkpoint
from datasets import shapes


@pytest.mark.slow
def test_the_demo_writes_what_it_says(tmp_path):
    arguments = ["--steps", "16", "--scenes", "4", "--rows", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.demo", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics) == ["MaskCLIP", "CoDe, 16 steps", "CoDe, as it comes"]
    for name, value in metrics.items():
        assert f"| {name} | {value['mIoU']:.1f} |" in done.stdout
        assert value["images"] == 4
    both = [metrics[name]["objects"]["both"] for name in list(metrics)[1:]]
    lines = [line.split(" | ") for line in (tmp_path / "metrics.md").read_text().splitlines()]
    found = [line[-1].strip(" |") for line in lines[2:]]
    assert found == ["", *(f"{share:.0f}" for share in both)]
    caption = shapes.scene("test", 1).caption
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 6 * 288 and sheet.height > 2 * 288
    with Image.open(tmp_path / "scenes" / "1.png") as scene:
        assert scene.size == (96, 96)
    assert (tmp_path / "scenes" / "1.txt").read_text() == caption + "\n"
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 16
    kept = {path.name for path in tmp_path.glob("step-*.pt")}  # for `make read`
    names = {f"step-{step}.pt" for step in (1, 2, 3, 6, 11, 16)}
    assert kept == names
    page = (tmp_path / "page.html").read_text()
    assert caption in page and "scene 1" in page
    assert done.stdout.rstrip().endswith(str(tmp_path / "page.html"))
