"""Processes: torchrun's ranks, this process's device, and gathering with gradients."""

import os

import torch
import torch.distributed as dist
from torch import Tensor

from config import UserError


def choose_device(name: str) -> torch.device:
    """The device of --device; "auto" is this process's GPU if there is one. Raises UserError."""
    if name == "auto":
        local = os.environ.get("LOCAL_RANK", "0")
        name = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def start_processes(device: torch.device) -> None:
    """Join the other processes if torchrun started this one."""
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def process_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; the same answer in all of them."""
    if process_count() == 1:
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(process_count())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(process_count())[process_rank()]


def all_gather(x: Tensor, dim: int = 0) -> Tensor:
    """Concatenate every process's x along `dim`, in rank order, with gradients to all of them.

    All processes must hold the same shape. With one process this is the identity.
    """
    if process_count() == 1:
        return x
    return _AllGather.apply(x.movedim(dim, 0).contiguous()).movedim(0, dim)


def gather_triplets(x: Tensor) -> Tensor:
    """Every process's (J, b, ...) as the T = J * B triplets of the global batch: (T, ...).

    Noun-major: the first noun of all B pairs, then the second of all.
    """
    return all_gather(x, dim=1).flatten(0, 1)
