"""Runs that are killed and resumed."""

import signal
import subprocess
import time

import pytest
from conftest import ROOT
from runs import (
    ENVIRONMENT,
    TINY,
    command,
    kill_all,
    same_state,
    start,
    train,
)

from checkpoint import read_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(tmp_path, workers):
    options = (*TINY, "--steps", "10", "--checkpoint-every", "3", "--workers", workers)
    train(*options, "--out", tmp_path / "whole")
    killed = start(*options, "--out", tmp_path / "killed")
    while not (tmp_path / "killed/last.pt").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL  # it came before the end
    train(*options, "--out", tmp_path / "killed", "--resume")
    assert same_state(tmp_path / "whole", tmp_path / "killed")


def test_two_processes_killed_and_resumed_then_one_goes_on(tmp_path):
    options = (*TINY, "--steps", "8", "--checkpoint-every", "2", "--workers", "1")
    train(*options, "--out", tmp_path / "whole", processes=2)
    out, before = tmp_path / "killed", -1.0
    for attempt in range(2):  # killed in the run itself, and again after resuming
        again = ("--resume",) if attempt else ()
        killed = subprocess.Popen(
            command(*options, "--out", out, *again, processes=2),
            cwd=ROOT,
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
        )
        saved_at = before
        while killed.poll() is None and saved_at == before:
            time.sleep(0.02)
            if (out / "last.pt").exists():
                saved_at = (out / "last.pt").stat().st_mtime
        before = saved_at
        kill_all(str(out))
        killed.wait()
    assert read_checkpoint(out / "last.pt")["step"] < 8  # the kills came before the end
    saved = (tmp_path / "killed/last.pt").read_bytes()
    train(*options, "--out", tmp_path / "killed", "--resume", processes=2)
    assert same_state(tmp_path / "whole", tmp_path / "killed")

    (tmp_path / "killed/last.pt").write_bytes(saved)
    done = train(*options, "--out", out, "--resume")
    assert "2 processes before, 1 now" in done.stdout
    assert read_checkpoint(out / "last.pt")["step"] == 8
