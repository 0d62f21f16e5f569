"""Time and memory of functions that are run in turn."""

import ctypes
import gc
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable

import torch
from tqdm import tqdm


def resident() -> float:
    """Memory of this process in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def on_gpu() -> bool:
    """Whether tensors are made on a GPU (torch.set_default_device)."""
    return torch.get_default_device().type == "cuda"


def timed(function: Callable) -> float:
    """Seconds, until the GPU is done too."""
    if on_gpu():
        torch.cuda.synchronize()
    tick = time.perf_counter()
    function()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - tick


def allocated(function: Callable) -> float:
    """MB of tensors at the peak of a function, beyond those that were there before it."""
    if on_gpu():
        function()  # what libraries keep for good is not the function's
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0)) / 1e6


def peak_memory(function: Callable) -> float:
    """MB of this process at its peak, freed memory having been given back before.

    Not measured together with the time: watching slows down what is watched.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    peak, done = [resident()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak[0]


def compare(name: str, forms: dict[str, Callable], repeats: int) -> dict:
    """Medians of the forms' times, run in turn, and their peaks of memory."""
    seconds: dict[str, list] = {form: [] for form in forms}
    result: dict = {"piece": name}
    for form, function in forms.items():  # also warms up
        result[f"{form}_mb"] = allocated(function)
    result["process_mb"] = peak_memory(forms["ours"])
    for _ in tqdm(range(repeats), name):
        for form, function in forms.items():
            seconds[form].append(timed(function))
    return result | {f"{form}_s": statistics.median(values) for form, values in seconds.items()}
