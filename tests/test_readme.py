"""What the README names exists."""

import re
from dataclasses import fields

from test_released import ROOT

from config import DATASETS, EvalConfig, LossConfig, MaskConfig, ModelConfig, TrainConfig

README = (ROOT / "README.md").read_text()


def test_every_option_exists():
    known = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    known |= {"--help"}
    for config in (TrainConfig, ModelConfig, LossConfig, EvalConfig, MaskConfig):
        for f in fields(config):
            name = f.name.replace("_", "-")
            known |= {f"--{name}", f"--no-{name}"}
    used = set(re.findall(r"--[a-z][a-z_-]+[a-z]", README))
    assert len(used) > 15
    assert used <= known, used - known


def test_every_file_and_benchmark_exists():
    for name in re.findall(r"`((?:datasets/|tests/|docs/)?[a-z_]+\.(?:py|pt|png))`", README):
        assert (ROOT / name).exists() or name in ("last.pt", "best.pt", "sheet.png"), name
    for name in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / name).exists(), name
    for name in DATASETS:
        assert f"`{name}`" in README


def test_every_logged_name_is_explained():
    import json

    source = (ROOT / "train.py").read_text() + (ROOT / "losses.py").read_text()
    section = README.split("## What `log.jsonl` holds")[1]
    names = ["total", "kg", "seg_t", "hcl", "lr", "grad_norm", "mask_area", "pairs_per_second"]
    names += ["data_wait", "memory_mb", "skipped", "image_contrast", "region_contrast", "area"]
    names += ["area_others", "smooth_features", "smooth_masks"]
    for name in names:
        assert f"`{name}`" in section and json.dumps(name) in source, name
