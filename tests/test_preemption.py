"""Runs that a cluster or Ctrl-C stops: what they save, and that they go on bit for bit."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from runs import (
    ENVIRONMENT,
    TINY,
    command,
    ctrl_c,
    preempt,
    same_state,
    to_group,
    to_launcher,
    train,
)

pytestmark = pytest.mark.slow

PREEMPTED = (*TINY, "--steps", "24", "--checkpoint-every", "1000", "--workers", "1")


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory) -> tuple[Path, int]:
    """An undisturbed run of so many processes, and how many."""
    out = tmp_path_factory.mktemp("whole")
    train(*PREEMPTED, "--out", out, processes=request.param)
    return out, request.param


@pytest.mark.parametrize(
    "whole, send, moments",
    [(2, to_launcher, (0, 12)), (2, to_group, (6,)), (1, ctrl_c, (9,))],
    indirect=["whole"],
)
def test_a_preempted_run_saves_and_goes_on_bit_for_bit(whole, send, moments, tmp_path):
    """Slow: every moment starts processes anew. Loader workers get the group's signals too."""
    undisturbed, processes = whole
    code = preempt(tmp_path, PREEMPTED, moments, send, processes)
    assert code == 0 or processes > 1  # torchrun reports a failure of its own
    train(*PREEMPTED, "--out", tmp_path, "--resume", processes=processes)
    assert same_state(undisturbed, tmp_path)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """The first one waits for an evaluation of half a minute, the second does not."""
    evaluation = ("--eval-dataset", "shapes", "--eval-every", "1")
    running = subprocess.Popen(
        command(*TINY, "--steps", "9", "--workers", "1", "--out", tmp_path, *evaluation),
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (tmp_path / "log.jsonl").exists():
        assert running.poll() is None
        time.sleep(0.05)
    ctrl_c(running)
    time.sleep(1.2)
    assert running.poll() is None  # still evaluating
    ctrl_c(running)
    assert running.wait(timeout=2) == 130


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
@pytest.mark.parametrize("ignored, received", [(False, 1), (True, 0)])
def test_a_terminal_that_goes_away_asks_to_stop_but_for_nohup(ignored, received):
    """In a process of its own, since handlers belong to a process."""
    code = (
        "import os, signal, support.distributed as d\n"
        f"signal.signal(signal.SIGHUP, signal.{'SIG_IGN' if ignored else 'SIG_DFL'})\n"
        "found = d.stop_signals()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "print(len(found))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.stdout.strip() == str(received), done.stderr
