"""The table of methods without training and of CoDe's priors."""

import re
import shutil
import sys

import pytest

from datasets.protocols import PROTOCOLS
from dense import DENSE
from experiments.measure import mean_and_deviation, mean_ious, segmenter_of
from experiments.methods import main

pytestmark = pytest.mark.slow


def test_mean_and_deviation():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert mean_and_deviation([2.04]) == "2.0"


def test_the_table_holds_what_is_measured(world, tmp_path, monkeypatch):
    """On two scenes, of a run that was not trained, with one template instead of 80."""
    monkeypatch.setattr("segmenter.IMAGENET_TEMPLATES", ["a photo of a {}."])
    (tmp_path / "runs" / "0").mkdir(parents=True)
    checkpoint = tmp_path / "runs" / "0" / "last.pt"
    shutil.copy(world / "code.pt", checkpoint)
    arguments = ("--runs", tmp_path / "runs", "--scenes", "2", "--results", tmp_path)
    monkeypatch.setattr(sys, "argv", ["methods.py", *map(str, arguments)])
    main()
    text = (tmp_path / "methods.md").read_text()
    rows = re.findall(r"^\| ([a-zC].*?) \| (\S+) \| (\S+) \((\S+)\) \| (\S+) \| ", text, re.M)
    titles = [*DENSE, *(f"CoDe, {name} as its prior" for name in DENSE)]
    assert [row[0] for row in rows] == titles * len(PROTOCOLS)
    for i, path, options in (
        (1, None, {"method": "sclip", "protocol": "thesis"}),
        (7, checkpoint, {"prior": "naclip", "protocol": "thesis"}),
        (8, None, {"method": "maskclip", "protocol": "training-free"}),
    ):
        for pamr, column, own in ((True, 1, 0.4), (False, 4, 0.5)):
            own = 0.1 if i == 8 else own
            want = mean_ious(segmenter_of(path, pamr=pamr, **options), 2, [own])[str(own)]
            assert rows[i][column] == f"{want:.1f}", (rows[i], pamr)


def test_without_runs(mistake, tmp_path):
    assert "no */last.pt in it" in mistake(main, "--runs", tmp_path)
