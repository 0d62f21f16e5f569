"""Real runs of train.py and segment.py, for several tests."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from checkpoint import read_checkpoint
from config import MASK_PRESETS

TINY = ("--preset", "shapes", "--batch-size", "4", "--log-every", "1", "--warmup", "0.2")


SUMS = ("exp_avg", "exp_avg_sq")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )


def processes_of(marker: str) -> list[int]:
    """The processes whose command line holds a marker: torchrun's agent, the processes that it
    starts in sessions of their own, and their loaders' workers. Needs /proc."""
    if not Path("/proc/self/cmdline").exists():
        pytest.skip("needs /proc")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if marker in words:
            found.append(int(folder.name))
    return found


def kill_all(marker: str) -> None:
    """SIGKILL all of them."""
    for pid in processes_of(marker):
        os.kill(pid, signal.SIGKILL)


def command(*arguments: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, "train.py", *map(str, arguments)]


def train(*arguments: str, processes: int = 1, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments, processes=processes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == code, done.stderr
    return done


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_state(a: Path, b: Path) -> bool:
    """Weights and optimizer state bit for bit, step and offsets of two runs."""
    a, b = (read_checkpoint(path / "last.pt") for path in (a, b))
    moments = [content["optimizer"]["state"] for content in (a, b)]
    assert moments[0].keys() == moments[1].keys() and len(moments[0]) > 20
    return (
        all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
        and all(torch.equal(moments[0][i][k], moments[1][i][k]) for i in moments[0] for k in SUMS)
        and (a["step"], a["offsets"]) == (b["step"], b["offsets"])
    )


def preempt(out: Path, options: tuple, moments, send: Callable, processes: int = 1) -> int:
    """Start a run and send it a signal as soon as its log has so many lines, once for each of the
    moments (0: before the first step); go on each time. Returns the last exit code.

    Each time last.pt is there, with every step that was logged in it, before the end of the run.
    """
    for attempt, moment in enumerate(moments):
        again = ("--resume",) if attempt else ()
        running = subprocess.Popen(
            command(*options, "--out", out, *again, processes=processes),
            cwd=ROOT,
            env=ENVIRONMENT,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a process group of its own, as a shell gives every job
        )
        sign = out / ("log.jsonl" if moment else "config.json")
        while not sign.exists() or moment and len(log(out)) < moment:
            assert running.poll() is None, "it ended before it was preempted"
            time.sleep(0.02)
        send(running)
        code = running.wait(timeout=60)
        saved = read_checkpoint(out / "last.pt")
        assert saved["step"] == log(out)[-1]["step"] < saved["train_config"]["steps"]
    return code


def to_launcher(running: subprocess.Popen) -> None:
    running.send_signal(signal.SIGTERM)


def to_group(running: subprocess.Popen) -> None:
    os.killpg(running.pid, signal.SIGTERM)


def ctrl_c(running: subprocess.Popen) -> None:
    os.killpg(running.pid, signal.SIGINT)


# --- segment.py -----------------------------------------------------------------------------------


def segment(*arguments, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "segment.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


# Without training the masks of objects are low: a threshold that leaves something of every word.
SETTINGS = MASK_PRESETS["shapes"] | {"background": 0.3}
OPTIONS = ("--preset", "shapes", "--checkpoint", "code.pt", "--background", "0.3")
