"""Errors in the middle of a training: one line, exit code 2, and no process is left behind."""

import os
import resource
import signal
import subprocess
import time
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from runs import ENVIRONMENT, TINY, command, log, processes_of
from torch.utils.data import DataLoader

from checkpoint import read_checkpoint
from config import TrainConfig, UserError
from support.distributed import end_workers, lost_processes
from support.log import Log

pytestmark = pytest.mark.slow

SECONDS = 30  # for torchrun to notice; without the mend they never end


def fail(out: Path, *options, processes: int = 1, when=None, **popen) -> tuple[int, str, float]:
    """Run until it ends by itself: exit code, stderr, and seconds from `when` on to its end.

    when(out) waits for its moment and breaks something. Every process must be gone then.
    """
    running = subprocess.Popen(
        command(*TINY, "--out", out, *options, processes=processes),
        cwd=ROOT,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        **popen,
    )
    try:
        if when:
            when(out)
        began = time.perf_counter()
        _, said = running.communicate(timeout=150)
        seconds = time.perf_counter() - began
        time.sleep(0.5)
        assert not processes_of(str(out))
    finally:
        for pid in processes_of(str(out)):
            os.kill(pid, signal.SIGKILL)
    return running.returncode, said, seconds


def first_line(out: Path) -> None:
    while not (out / "log.jsonl").exists():
        time.sleep(0.05)


@pytest.fixture
def no_images(tmp_path) -> Path:
    folder = tmp_path / "bad"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.jpg").write_text("x")
        (folder / f"{i}.txt").write_text("a dog and a ball")
    return folder


def own(pairs: Path) -> tuple:
    """Options for pairs of one's own on the built-in CLIP."""
    return ("--preset", "thesis", "--clip", "shapes", "--context-init", "a", "--pairs", pairs)


@pytest.mark.parametrize("processes", [1, 2])
def test_unusable_data(no_images, tmp_path, processes):
    code, said, _ = fail(tmp_path / "out", *own(no_images), "--workers", "1", processes=processes)
    assert code == (2 if processes == 1 else 1)  # torchrun's own
    assert "0 usable pairs" in said and "not an image" in said


def kill_a_worker(out: Path) -> None:
    """The kernel's way when memory runs out."""
    while not (out / "last.pt").exists():
        time.sleep(0.05)
    os.kill(max(processes_of(str(out))), signal.SIGKILL)  # the youngest


def test_a_killed_loader_worker(tmp_path):
    options = ("--workers", "2", "--steps", "500", "--checkpoint-every", "1")
    code, said, seconds = fail(tmp_path, *options, when=kill_a_worker)
    assert code == 2 and seconds < SECONDS, said
    assert "a data loading process ended" in said and "fewer --workers" in said
    assert read_checkpoint(tmp_path / "last.pt")["step"] >= 1


def die_while_sending(worker: int) -> None:
    """worker_init_fn: it ends as the main process comes for its batch. As where the kernel kills
    it: first its connections are closed, then its parent is told."""

    def end(connected, key) -> None:
        connected.close()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    connection.deliver_challenge = end


def test_a_loader_worker_killed_while_it_hands_over_a_batch(tmp_path):
    loader = DataLoader(
        [torch.zeros(9)] * 8, batch_size=None, num_workers=1, worker_init_fn=die_while_sending
    )
    handler, log = signal.getsignal(signal.SIGCHLD), Log(tmp_path, TrainConfig(), 0, writes=False)
    ended = "a data loading process ended .*: fewer"
    try:
        with pytest.raises(UserError, match=ended), lost_processes("fewer"):
            log.wait_for(iter(loader))
        # On a GPU torch has a thread that takes the batches, which ends with the worker.
        with pytest.raises(UserError, match=ended), lost_processes("fewer"):
            raise RuntimeError("Pin memory thread exited unexpectedly")
    finally:
        end_workers()
        signal.signal(signal.SIGCHLD, handler)


def kill_a_process(out: Path) -> None:
    """One of torchrun's two, not one of their loaders'."""
    first_line(out)
    loaders = {pid for pid in processes_of(str(out)) if parent(pid) in processes_of(str(out))}
    agents = [p for p in loaders if any(parent(q) == p for q in loaders)]
    os.kill(max(agents), signal.SIGKILL)


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[1])
    except OSError:
        return 0


def test_a_killed_process_of_two_takes_the_other_along(tmp_path):
    code, said, seconds = fail(
        tmp_path, "--workers", "1", "--steps", "500", processes=2, when=kill_a_process
    )
    assert code == 1 and seconds < SECONDS, said
    assert "another process ended: its message says why" in said


def remove_the_folder(out: Path) -> None:
    first_line(out)
    out.rename(out.with_name("elsewhere"))


@pytest.mark.parametrize("processes", [1, 2])
def test_an_output_folder_that_disappears(tmp_path, processes):
    code, said, seconds = fail(
        tmp_path / "out",
        "--workers",
        "1",
        "--steps",
        "500",
        processes=processes,
        when=remove_the_folder,
    )
    assert code == (2 if processes == 1 else 1) and seconds < SECONDS, said
    assert "log.jsonl could not be written (No such file or directory)" in said
    assert len(log(tmp_path / "elsewhere")) >= 1


def small_files() -> None:
    """A full disk, as far as one process can have it: no file may grow beyond 300 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))


def test_a_full_disk(tmp_path):
    options = ("--workers", "0", "--steps", "3", "--checkpoint-every", "1")
    code, said, _ = fail(tmp_path, *options, preexec_fn=small_files)
    assert code == 2 and "last.pt could not be written (File too large)" in said
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "last.pt").exists()


def test_full_shared_memory(tmp_path):
    """Workers send their batches through it; containers often have 64 MB."""
    code, said, _ = fail(tmp_path, "--workers", "1", "--steps", "3", preexec_fn=small_files)
    assert code == 2 and "--workers 0 no shared memory" in said


def little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))


def test_too_little_memory(tmp_path):
    """Masks of 1,536 cells a side: their features alone are 3.6 GB."""
    options = ("--workers", "1", "--upsampling-blocks", "7", "--steps", "2")
    code, said, _ = fail(tmp_path, *options, preexec_fn=little_memory)
    assert code == 2 and "out of memory: a smaller --batch-size" in said


def test_a_bad_label_of_an_evaluation(tmp_path):
    """Damaged after the start: labels that are damaged before are noticed at once."""
    voc = tmp_path / "data/VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(voc / "JPEGImages/0.jpg")
    Image.new("L", (64, 48), 1).save(voc / "SegmentationClass/0.png")
    (voc / "ImageSets/Segmentation/val.txt").write_text("0\n")
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i, 0, 0)).save(pairs / f"{i}.png")
        (pairs / f"{i}.txt").write_text("a man and a horse")

    def damage(out: Path) -> None:
        while not (out / "config.json").exists():  # written after the benchmark is looked at
            time.sleep(0.05)
        (voc / "SegmentationClass/0.png").write_text("no PNG")

    options = (*own(pairs), "--clip", "ViT-S-32-alt", "--clip-weights", "none", "--workers", "1")
    options += ("--batch-size", "2", "--steps", "10", "--eval-every", "5")
    options += ("--eval-dataset", "voc", "--eval-root", tmp_path / "data")
    out = tmp_path / "out"
    code, said, seconds = fail(out, *options, when=damage)
    assert code == 2 and "SegmentationClass/0.png cannot be read" in said
    assert read_checkpoint(out / "last.pt")["step"] == 5  # saved before it was evaluated
