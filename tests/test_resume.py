"""Runs that are stopped, killed and resumed."""

import signal
import subprocess
import time

import pytest
from conftest import ROOT
from runs import ENVIRONMENT, TINY, command, kill_all, log, same_state, start, train

from checkpoints.ours import read_checkpoint


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(tmp_path, workers):
    options = (*TINY, "--steps", "10", "--checkpoint-every", "3", "--workers", workers)
    train(*options, "--out", tmp_path / "whole")
    killed = start(*options, "--out", tmp_path / "killed")
    while not (tmp_path / "killed/last.pt").exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    train(*options, "--out", tmp_path / "killed", "--resume")
    assert same_state(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_finishes_the_step_saves_and_exits_0(tmp_path):
    options = (*TINY, "--steps", "4000", "--out", tmp_path)
    running = start(*options)
    while not (tmp_path / "log.jsonl").exists() and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 0
    assert read_checkpoint(tmp_path / "last.pt")["step"] == log(tmp_path)[-1]["step"]


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
    saved = (tmp_path / "killed/last.pt").read_bytes()
    train(*options, "--out", tmp_path / "killed", "--resume", processes=2)
    assert same_state(tmp_path / "whole", tmp_path / "killed")

    (tmp_path / "killed/last.pt").write_bytes(saved)
    if read_checkpoint(out / "last.pt")["step"] < 8:
        done = train(*options, "--out", out, "--resume")
        assert "2 processes before, 1 now" in done.stdout
        assert read_checkpoint(out / "last.pt")["step"] == 8
