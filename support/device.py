"""This process's device and the precision of its matrix products."""

import contextlib
from collections.abc import Iterator

import torch

from config import UserError
from support.distributed import local_rank


def choose_device(name: str) -> torch.device:
    """The device of --device. "cuda" is this process's GPU, "auto" too if there is one, else the
    CPU. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank()}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of --precision. "auto" is float32 on a CPU, on a GPU bfloat16 where it computes in
    it and float16 elsewhere. Raises UserError."""
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if name not in ("auto", *types):
        raise UserError(f"--precision {name}: not one of auto, {', '.join(types)}")
    return types.get(name, torch.float32)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Matrix products in that precision; with float32 it changes nothing."""
    half = precision != torch.float32
    return torch.autocast(device.type, precision if half else None, enabled=half)


def make_scaler(device: torch.device, scaled: bool) -> torch.amp.GradScaler:
    """Loss scaling for float16. Elsewhere a scale that starts at 1 and never grows, for what else
    the scaler does: an update with a gradient that is not finite is left out."""
    if scaled:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turns running out of memory, on a GPU or a CPU, into a UserError with advice."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise UserError(f"out of memory: {advice}") from error
        raise
