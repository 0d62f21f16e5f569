"""Processes: torchrun's ranks, waiting for each other, and signals that ask to stop."""

import contextlib
import multiprocessing.queues
import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from config import UserError

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGHUP"):  # not on Windows
    STOP_SIGNALS.append(signal.SIGHUP)


def start_processes(device: torch.device, timeout: int) -> None:
    """Join the other processes if torchrun started this one.

    timeout: minutes that the processes wait for each other: for a slow first shard, a download, an
    evaluation that one of them finishes later.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"the variable RANK is set but {name} is not: start several processes with "
                    "torchrun, or unset RANK"
                )
        # Tensors on the CPU travel without waiting for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=timeout))
        except (ValueError, RuntimeError) as error:  # an address in use, a process that is missing
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"the processes could not meet each other: {reason}") from error


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Which of the processes on this machine it is: torchrun's LOCAL_RANK."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launched_processes() -> int:
    """How many processes torchrun started on this machine, known before they have met."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; the same answer in all of them.

    It travels by way of the CPU: reading it does not wait for the GPU.
    """
    if process_count() == 1:
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """What is inside runs in each machine's first process before it runs in the others there: it
    downloads, they find what it has downloaded. Raises UserError in these if it failed there."""
    # All meet once: the first ones behind what is inside, the others before it.
    if local_rank() > 0 and any_process(False):
        raise UserError("another process ended: its message says why")
    failed = True
    try:
        yield
        failed = False
    finally:
        if local_rank() == 0:
            any_process(failed)


def heard_signals() -> list[int]:
    """Those that ask a program to stop, without SIGHUP where nohup lets it be ignored."""
    hangup = getattr(signal, "SIGHUP", None)
    deaf = hangup is not None and signal.getsignal(hangup) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (deaf and number == hangup)]


def stop_signals() -> list[float]:
    """When this process received SIGTERM, SIGINT or SIGHUP, from now on; a second one ends it at
    once.

    Clusters preempt with SIGTERM; a terminal that goes away, as over ssh, sends SIGHUP, which nohup
    lets a program ignore. Whoever holds the list looks into it where it can stop in good
    order. Within a second two signals are one: torchrun passes on what its group receives anyway.
    """
    received: list[float] = []

    def receive(number: int, frame) -> None:
        if received and time.monotonic() - received[0] > 1:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(128 + number)
        received.append(time.monotonic())

    for number in heard_signals():
        signal.signal(number, receive)
    return received


def start_worker(worker: int) -> None:
    """What a loader worker does first.

    It ignores the signals of its process group: the main process decides. And it ends if a batch
    cannot be sent (no shared memory left); multiprocessing would print that, drop the batch and
    leave the main process waiting for it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end(error: Exception, batch) -> None:
        print(f"a data loading process could not send a batch: {error}", file=sys.stderr)
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)


@contextlib.contextmanager
def lost_processes(advice: str = "") -> Iterator[None]:
    """Turns what torch raises when a loader worker or another process of torchrun's has ended into
    a UserError; advice: what to do if it was a worker."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        # On a GPU a thread of the main process takes the batches, and may end with the worker.
        if "DataLoader worker" in reason or "Pin memory thread" in reason:
            raise UserError(f"a data loading process ended ({reason}): {advice}") from error
        if any(words in str(error) for words in ("by peer", "remote process exited")):
            raise UserError("another process ended: its message says why") from error
        if "Timed out waiting" in str(error):
            raise UserError("waited too long for another process: --timeout MINUTES") from error
        raise


def end_workers() -> None:
    """Kill the loader workers that an error left behind. At exit multiprocessing would send them
    SIGTERM, which they ignore, and wait for them for ever."""
    if hasattr(signal, "SIGCHLD"):  # torch's handler would raise for every one of them
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
