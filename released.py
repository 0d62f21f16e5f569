"""The authors' released checkpoints, CoDe's and TCL's, read without executing anything in them.

A released file pickles, beside the tensors under "model", an OmegaConf configuration, an optimizer
and a scheduler. Here only tensors are rebuilt; every other name in the file is ignored.
"""

import collections
import math
import os
import pickle
import re
import types
from pathlib import Path

import open_clip
import torch
from torch import nn

from config import ModelConfig, UserError
from model import CoDe

# Their names for our learned tensors. A {} stands for the same thing on both sides.
_RELEASED_NAMES = {
    "learnable_image_bg": "region_prompt",
    "bg_text": "word_prompt",
    "text_mask_w": "text_segmenter.word_scale",
    "text_mask_b": "text_segmenter.word_bias",
    "clip_text_encoder.prompt_learner.ctx": "context",
    "masker.sim2mask.w": "image_segmenter.mask_scale",
    "masker.sim2mask.b": "image_segmenter.mask_bias",
    "masker.image_encoder.decoder.image_proj.proj": "image_segmenter.proj",
    "tcli_loss.logit_scale": "image_log_scale",
    "tclf_loss.logit_scale": "region_log_scale",
    "hcl_loss.logit_scale": "hcl_log_scale",
}
_RELEASED_PATTERNS = [
    (
        r"masker\.image_encoder\.backbone\.transformer\.resblocks\.\d+\.(.+)",
        r"image_segmenter.block.\1",
    ),
    (r"masker\.image_encoder\.decoder\.image_proj\.ln\.(.+)", r"image_segmenter.ln_post.\1"),
    (r"text_decoder\.transformer\.resblocks\.(\d+)\.(.+)", r"text_segmenter.blocks.\1.\2"),
]
for _ours, _theirs in enumerate(("conv", "conv2")):
    _net, _block = (
        rf"masker\.image_encoder\.decoder\.decoder\.net\.(\d+)\.{_theirs}",
        r"image_segmenter.upsampling.\1",
    )
    _RELEASED_PATTERNS += [
        (rf"{_net}\.norm\.(.+)", rf"{_block}.norms.{_ours}.\2"),
        (rf"{_net}\.conv\.(.+)", rf"{_block}.convs.{_ours}.\2"),
        (rf"{_net}\.gate\.gate", rf"{_block}.gates.{_ours}"),
    ]
# Where the one CLIP that we keep lies in a released file, and what may be skipped: further copies
# of it, PAMR's constant kernels, SOS's embedding.
_VISUAL_PATTERNS = [
    (r"clip_image_encoder\.clip_visual\.(.+)", r"visual.\1"),
    (r"clip_image_encoder\.clip_proj\.ln\.(.+)", r"visual.ln_post.\1"),
    (r"clip_image_encoder\.clip_proj\.proj", r"visual.proj"),
]
_CODE_TEXT = (r"clip_text_encoder\.prompt_learner\.clip_model\.(.+)", r"\1")
_TCL_TEXT = (r"clip_text_encoder\.(.+)", r"\1")
_SKIPPED = r"frozen_clip\.|pamr\.|clip_text_encoder\.text_encoder\.|.*\.token_prefix$"


class _Ignored:
    """Stands in for whatever else a released file pickles: accepts everything, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


class _TensorUnpickler(pickle.Unpickler):
    """Knows how to rebuild tensors and nothing else: no name in the file is imported or called."""

    _KNOWN = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("torch", "Size"): torch.Size,
    }

    def find_class(self, module: str, name: str):
        return self._KNOWN.get((module, name), _Ignored)


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors under "model" in a released file, without executing anything that it names.

    Raises UserError where there are none.
    """
    reader = types.SimpleNamespace(
        __name__="tensors_only", Unpickler=_TensorUnpickler, load=None, loads=None
    )
    content = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path}: it holds no state under 'model'")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def is_released(state: dict) -> bool:
    return any(name.startswith("masker.") for name in state)


def rename_released(state: dict[str, torch.Tensor], tcl: bool) -> dict[str, dict]:
    """Sort a released file's tensors into "clip" and "learned", under our names, and "unknown"."""
    names = [(re.escape(theirs), ours) for theirs, ours in _RELEASED_NAMES.items()]
    patterns = {
        "clip": [*_VISUAL_PATTERNS, _TCL_TEXT if tcl else _CODE_TEXT],
        "learned": names + _RELEASED_PATTERNS,
        "unknown": [(r"(.*)", r"\1")],
    }
    parts: dict[str, dict] = {part: {} for part in patterns}
    for name, value in state.items():
        if re.match(_SKIPPED, name):
            continue
        part, pattern, ours = next(
            (part, pattern, ours)
            for part, rows in patterns.items()
            for pattern, ours in rows
            if re.fullmatch(pattern, name)
        )
        parts[part][re.sub(f"^{pattern}$", ours, name)] = value.float()
    return parts


def rebuild_released(state: dict[str, torch.Tensor], path: str | Path) -> CoDe:
    """A model from the tensors of the authors' released CoDe file, or of TCL's.

    All sizes are read off the tensors (heads are 64 wide). TCL's file has no learned context: the
    model then has none, and class names go into hand-written templates.
    Raises UserError naming unknown, missing and misshapen tensors.
    """
    tcl = "clip_text_encoder.token_embedding.weight" in state
    parts = rename_released(state, tcl)
    if unknown := sorted(parts["unknown"]):
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise UserError(f"{path}: unknown tensors {', '.join(unknown[:5])}{more}")

    clip_state, learned = parts["clip"], parts["learned"]
    try:
        patches, width = clip_state["visual.positional_embedding"].shape
        patch = clip_state["visual.conv1.weight"].shape[-1]
        context_length, text_width = clip_state["positional_embedding"].shape
        embed_dim = clip_state["text_projection"].shape[1]
        vocabulary = len(clip_state["token_embedding.weight"])
        start = "x " * len(learned.get("context", ()))
    except KeyError as error:
        raise UserError(f"{path}: missing tensor {error.args[0]}") from None

    def count(pattern: str, names: dict) -> int:
        return len({m[1] for m in (re.match(pattern, name) for name in names) if m})

    clip = open_clip.CLIP(
        embed_dim,
        dict(
            image_size=patch * math.isqrt(patches - 1),
            patch_size=patch,
            width=width,
            layers=count(r"visual\.transformer\.resblocks\.(\d+)\.", clip_state),
        ),
        dict(
            width=text_width,
            heads=max(1, text_width // 64),
            layers=count(r"transformer\.resblocks\.(\d+)\.", clip_state),
            context_length=context_length,
            vocab_size=vocabulary,
        ),
        quick_gelu=True,
    )
    clip_state.setdefault("logit_scale", clip.logit_scale.detach())
    load_exactly(clip, clip_state, clip.state_dict(), path)
    config = ModelConfig(
        clip="released",
        clip_weights=os.path.abspath(path),
        context_init=start.strip(),
        upsampling_blocks=count(r"image_segmenter\.upsampling\.(\d+)\.", learned),
        convs_per_block=count(r"image_segmenter\.upsampling\.\d+\.gates\.(\d+)", learned),
        text_layers=count(r"text_segmenter\.blocks\.(\d+)\.", learned),
        co_decomposition=not tcl,
        text_attention="all",
    )
    model = CoDe(clip.eval().requires_grad_(False), config)
    if tcl:
        learned["context"] = model.context.detach()
    else:
        for name in ("word_prompt", "region_prompt"):  # theirs have a further axis of size one
            if name in learned:
                learned[name] = learned[name].squeeze()
    load_exactly(model, learned, model.learned_state(), path)
    return model


def load_exactly(module: nn.Module, state: dict, expected: dict, path: str | Path) -> None:
    """Load tensors into a module; missing, unknown and misshapen ones are named in a UserError."""
    problems = [f"missing {name}" for name in expected.keys() - state.keys()]
    problems += [f"unknown {name}" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} of shape {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path} does not fit the model: {', '.join(sorted(problems)[:5])}{more}")
    module.load_state_dict(state, strict=False)
