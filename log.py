"""What a training run tells: log.jsonl, the progress bar, and TensorBoard if it is asked for."""

import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import TrainConfig, UserError, save_text
from losses import Decomposition, capped_scale
from model import CoDe


class Log:
    """Process 0's. Lines from after the checkpoint that a run goes on from are dropped."""

    def __init__(self, out: Path, config: TrainConfig, step: int):
        self.path, self.config = out / "log.jsonl", config
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # not one cut off by a kill
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            save_text("".join(kept).rstrip("\n"), self.path) if kept else self.path.unlink()
        self.bar = tqdm(total=config.steps, initial=step, desc="training", file=sys.stderr)
        self.board = None
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: `pip install tensorboard` is missing") from None
            self.board = SummaryWriter(str(out))
        self.tick, self.step = time.perf_counter(), step

    def write(
        self,
        step: int,
        lr: float,
        model: CoDe,
        terms: dict[str, Tensor],
        norm: Tensor,
        d: Decomposition,
        waited: float,
        skipped: Counter[str],
    ) -> None:
        """Read the values off the device and tell them. waited: seconds without data."""
        seconds, steps = time.perf_counter() - self.tick, step - self.step
        line = {"step": step, "lr": lr}
        line |= {name: value.item() for name, value in terms.items()}
        line |= {
            "grad_norm": norm.item(),
            "mask_area": d.masks.mean().item(),
            "pairs_per_second": steps * self.config.batch_size / seconds,
            "data_wait": waited / seconds,
            "memory_mb": memory_mb(norm.device),
            "skipped": dict(skipped),
        }
        for name, value in model.named_parameters():
            if name.endswith("_log_scale"):
                temperature = 1 / capped_scale(value).item()
                line[name.replace("log_scale", "temperature")] = temperature
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                if name != "skipped":
                    self.board.add_scalar(name, value, step)
        shown = {"loss": f"{line['total']:.3f}", "lr": f"{line['lr']:.1e}"}
        shown |= {"pairs/s": f"{line['pairs_per_second']:.0f}", "wait": f"{line['data_wait']:.0%}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(steps)
        self.tick, self.step = time.perf_counter(), step

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()


def memory_mb(device: torch.device) -> float:
    """Peak memory so far: the GPU's if there is one, otherwise this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
