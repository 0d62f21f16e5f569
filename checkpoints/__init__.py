"""Checkpoints: ours (`ours.py`), the authors' released ones (`released.py`), or none at all."""

import open_clip
import torch

from checkpoints.ours import load_model
from clip import load_clip
from config import MaskConfig, UserError
from dense import DENSE
from model import CoDe


def load_method(config: MaskConfig, device: torch.device) -> tuple[open_clip.CLIP, CoDe | None]:
    """The CLIP and the model (None without training) of `completed` options. Raises UserError."""
    if config.stride > config.window:
        raise UserError(
            f"--stride {config.stride} beyond --window {config.window}: gaps would stay"
        )
    if config.method not in ("code", *DENSE):
        raise UserError(f"--method {config.method}: 'code' or one of {', '.join(DENSE)}")
    if config.prior not in DENSE:
        raise UserError(f"--prior {config.prior}: not one of {', '.join(DENSE)}")
    if config.checkpoint is None:
        if config.method == "code":
            raise UserError(
                "--method code needs --checkpoint FILE: one that train.py wrote, or the authors'; "
                f"without any, --method {', '.join(DENSE)}"
            )
        return load_clip(config.clip, config.clip_weights or "openai").to(device), None
    model = load_model(config.checkpoint, device, config.clip_weights)
    return model.clip, model if config.method == "code" else None
