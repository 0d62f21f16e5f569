"""Something is learned: the one thing that no equation's test says."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import ENVIRONMENT, train


@pytest.mark.slow
def test_150_steps_beat_maskclip_by_five_points(tmp_path):
    """Without any mask. On 60 held-out scenes."""
    train("--preset", "shapes", "--steps", "150", "--workers", "0", "--out", tmp_path)
    found = {}
    for method, options in (("code", ("--checkpoint", tmp_path / "last.pt")), ("maskclip", ())):
        path = tmp_path / f"{method}.json"
        command = [sys.executable, "evaluate.py", "--dataset", "shapes", "--method", method]
        command += ["--limit", "60", "--json", path, *options]
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
        found[method] = json.loads(path.read_text())["mIoU"]
    assert found["code"] > found["maskclip"] + 5, found
