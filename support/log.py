"""What a training run reports: log.jsonl, the progress bar, and TensorBoard if it is asked for.

A line of log.jsonl holds `step`; `total` and, as weighted in it, the terms of Eq. 3.8: `kg`,
`image_contrast`, `region_contrast`, `area`, `area_others`, `smooth_features`, `smooth_masks` (these
six are L_seg^v), `seg_t`, `hcl`; `lr`; `grad_norm` before clipping; `mask_area`, the mean of the
soft masks of the pairs' own nouns; `image_temperature`, `region_temperature`, `hcl_temperature`,
tau of the three contrasts; since the line before, `pairs_per_second` and `data_wait`, the share of
time spent waiting for data; `memory_mb`, the peak so far (the GPU's, or the process's); since the
start or the last resume, `skipped`, bad pairs by cause (these five are process 0's), and
`updates_left_out`, those whose gradient was not finite. null stands for what is not finite.
"""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import TrainConfig, UserError
from support.files import save_text


class Log:
    """Records every step in every process; process 0 writes.

    Lines from after the checkpoint that a run goes on from are dropped.
    """

    def __init__(self, out: Path, config: TrainConfig, step: int, writes: bool):
        self.path, self.config, self.writes = out / "log.jsonl", config, writes
        out.mkdir(parents=True, exist_ok=True)
        if writes and self.path.exists():
            self.keep_lines_up_to(step)
        self.bar = tqdm(
            total=config.steps,
            initial=step,
            desc="training",
            file=sys.stderr,
            disable=not writes,
        )
        self.board = None
        if writes and config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard: `pip install tensorboard` is missing") from None
            self.board = SummaryWriter(str(out))
        self.skipped: Counter[str] = Counter()  # bad pairs by cause, since the start or resuming
        self.waited = 0.0  # seconds without data since the last line
        self.recent: list[Tensor] = []  # loss terms and gradient norm of the steps since then
        self.left_out = self.left_out_in_a_row = 0  # updates whose gradient was not finite
        self.start, self.step = time.perf_counter(), step

    def wait_for(self, batches: Iterator) -> Any:
        """The next batch, with the time until it comes and what was skipped on the way noted.

        Raises the UserError that a reader sends instead where the data is unusable, and
        RuntimeError where a loader worker has ended.
        """
        asked = time.perf_counter()
        try:
            batch = next(batches)
        except (ConnectionError, EOFError) as error:
            if self.config.workers == 0:
                raise
            # A worker was killed while it sent a batch. torch would notice a moment later and
            # raise a RuntimeError that begins like this one.
            reason = str(error) or "the connection is closed"
            raise RuntimeError(f"DataLoader worker ended while sending: {reason}") from error
        self.waited += time.perf_counter() - asked
        if isinstance(batch, UserError):
            raise batch
        self.skipped += batch.skipped
        return batch

    def keep_lines_up_to(self, step: int) -> None:
        """Drop what came after the checkpoint, and what is no line of a log: one cut off by a kill
        or written by somebody else."""
        kept = []
        for line in self.path.read_text("utf-8", "replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                pass
        save_text("\n".join(kept), self.path) if kept else self.path.unlink()

    def record(self, terms: dict[str, Tensor], norm: Tensor) -> None:
        """A step's loss terms and gradient norm, left on the device: reading them would wait for
        all of its work."""
        self.recent.append(torch.stack([*terms.values(), norm]).detach())

    def check_finite(self, terms: dict[str, Tensor], step: int) -> None:
        """Count the updates since the last line that were left out because a gradient was not
        finite. Raises UserError where a loss was not finite, or fifty updates in a row."""
        nonfinite = ~torch.isfinite(torch.stack(self.recent)).cpu()  # (steps, terms + 1)
        for (*losses, norm), before in zip(nonfinite, range(step - len(self.recent), step)):
            self.left_out += bool(norm)
            self.left_out_in_a_row = self.left_out_in_a_row + 1 if norm else 0
            names = ", ".join(name for name, bad in zip(terms, losses) if bad)
            if self.left_out_in_a_row == 50:
                names = names or "the gradients of fifty steps in a row"
            if names:
                raise UserError(
                    f"step {before}: {names} not finite; the weights were not changed by it; "
                    f"--resume goes on from {self.path.parent}/last.pt if there is one"
                )

    def write(
        self,
        step: int,
        lr: float,
        terms: dict[str, Tensor],
        more: dict[str, Tensor],
    ) -> None:
        """A line: the last step's terms and whatever else is given, read off the device."""
        self.check_finite(terms, step)
        seconds, steps = time.perf_counter() - self.start, step - self.step
        line = {"step": step, "lr": lr}
        values = {name: value.item() for name, value in (terms | more).items()}
        # JSON has no word for what is not finite: the norm of an update that was left out.
        line |= {name: v if math.isfinite(v) else None for name, v in values.items()}
        line |= {
            "pairs_per_second": steps * self.config.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory_mb": memory_mb(terms["total"].device),
            "skipped": dict(self.skipped),
            "updates_left_out": self.left_out,
        }
        if self.writes:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # a full disk, a folder that has gone
                raise UserError(f"{self.path} could not be written ({error.strerror})") from error
        if self.board:
            for name, value in line.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)
        shown = {"loss": f"{line['total']:.3f}", "lr": f"{line['lr']:.1e}"}
        shown |= {"pairs/s": f"{line['pairs_per_second']:.0f}", "wait": f"{line['data_wait']:.0%}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(steps)
        self.recent, self.waited = [], 0.0
        self.start, self.step = time.perf_counter(), step

    def close(self) -> None:
        self.bar.close()
        if self.board:
            self.board.close()


def memory_mb(device: torch.device) -> float | None:
    """Peak memory so far: the GPU's if there is one, otherwise this process's. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:
        return None
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
