"""This process's device and the precision of its matrix products."""

import contextlib
from collections.abc import Iterator

import torch

from config import UserError
from support.distributed import launched_processes, local_rank


def choose_device(name: str) -> torch.device:
    """The device of --device. "cuda" is this process's GPU, "auto" too if there is one, else the
    CPU. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank()}"
    elif name.startswith("cuda") and launched_processes() > 1:
        raise UserError(
            f"--device {name}: the {launched_processes()} processes would share one GPU; with "
            "--device cuda every process has its own (CUDA_VISIBLE_DEVICES chooses which)"
        )
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {name}: only 'cpu' and 'cuda' are supported")
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


def make_scaler(device: torch.device, precision: torch.dtype) -> torch.amp.GradScaler:
    """Loss scaling for float16. In every precision the scaler leaves out an update whose gradient
    is not finite, without waiting for the GPU."""
    start = 2.0**16 if precision == torch.float16 else 1.0
    return torch.amp.GradScaler(device.type, init_scale=start, growth_interval=200)


def update_scale(
    scaler: torch.amp.GradScaler, device: torch.device, precision: torch.dtype
) -> None:
    """Choose the scale of the next step: 1, or in float16 what the gradients allow.

    GradScaler halves its scale with every update that is left out. Batches that are bad at any
    scale, scattered over a long run, would so wear it down to zero: it never goes below 1.
    """
    if precision == torch.float16:
        scaler.update()
        scaler.update(scaler.scale(torch.ones((), device=device)).clamp(min=1.0))
    else:
        scaler.update(1.0)


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turns running out of memory, on a GPU or a CPU, into a UserError with advice."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise UserError(f"out of memory: {advice}") from error
        raise
    except MemoryError as error:
        raise UserError(f"out of memory: {advice}") from error
