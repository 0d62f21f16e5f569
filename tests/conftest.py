import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads must not spin beside other tests

import open_clip  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from config import ModelConfig, run  # noqa: E402
from model import CoDe  # noqa: E402


def random_clip(seed: int = 0) -> open_clip.CLIP:
    """A tiny CLIP with random weights and 64-wide heads, as ViT-B/16 has them."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(
        64,
        dict(image_size=32, patch_size=8, width=64, layers=3, head_width=64),
        dict(width=64, heads=1, layers=2),
        quick_gelu=True,
    )
    return clip.eval().requires_grad_(False)


def random_model(seed: int = 0, **changes) -> CoDe:
    """CoDe around it, its gates, prompts and blocks moved away from their neutral start."""
    model = CoDe(random_clip(seed), ModelConfig(**{"context_init": "a photo of a"} | changes))
    with torch.no_grad():
        for block in model.image_segmenter.upsampling:
            for gate in block.gates:
                gate.fill_(0.3)
        model.region_prompt.normal_()
        model.word_prompt.normal_(std=0.02)
    return model


@pytest.fixture
def model() -> CoDe:
    return random_model()


@pytest.fixture
def mistake(monkeypatch, capsys) -> Callable:
    """Run a script's main on arguments that are wrong: one line on stderr, exit code 2."""

    def said(main: Callable, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run(main)
        line = capsys.readouterr().err
        assert left.value.code == 2 and len(line.strip().splitlines()) == 1, line
        return line

    return said
