"""The benchmark of speed, shortened."""

import re
import sys

import pytest
from conftest import ROOT

from experiments.bench import main


@pytest.mark.slow
def test_two_checkouts_take_turns(monkeypatch, capsys):
    """This one beside itself, one turn each."""
    options = ["--only", "window20", "--repeats", "1", "--against", str(ROOT)]
    monkeypatch.setattr(sys, "argv", ["bench.py", *options])
    main()
    row = capsys.readouterr().out.splitlines()[-1]
    title, *cells = row.strip("| ").split(" | ")
    seconds, there, times, mb, mb_there = map(float, cells)
    assert title == "window of 448, 20 classes"
    assert times == pytest.approx(there / seconds, abs=0.02) and seconds > 0.01
    assert 500 < mb < 5000 and mb == pytest.approx(mb_there, rel=0.1)


def test_mistakes(mistake, tmp_path):
    assert "--only windows: not one of window20" in mistake(main, "--only", "windows")
    assert "holds no experiments/bench.py" in mistake(main, "--against", tmp_path)


@pytest.mark.slow
def test_a_worker_that_ends_is_named(mistake):
    message = mistake(main, "--only", "step", "--device", "gpu")
    assert re.search("--only step .* ended with exit code 2", message)
