"""What the README names exists."""

import ast
import collections
import re
from dataclasses import fields

from conftest import ROOT

from config import (
    TRAIN_PRESETS,
    EvalConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
)
from datasets import DATASETS
from docs.book.build import BookConfig
from segment import SegmentConfig

README = (ROOT / "README.md").read_text()


def test_every_option_exists():
    known = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    known |= {"--help", "--signal"}  # the last one is SLURM's
    img2dataset = "url_list input_format url_col caption_col output_format output_folder image_size"
    known |= {f"--{name}" for name in f"{img2dataset} resize_mode".split()}
    configs = (TrainConfig, ModelConfig, LossConfig, EvalConfig, MaskConfig, SegmentConfig)
    for config in (*configs, BookConfig):
        for f in fields(config):
            name = f.name.replace("_", "-")
            known |= {f"--{name}", f"--no-{name}"} if f.type is bool else {f"--{name}"}
    used = set(re.findall(r"--[a-z][a-z_-]+[a-z]", README))
    assert len(used) > 15
    assert used <= known, used - known


def test_every_file_and_benchmark_exists():
    made = ("last.pt", "best.pt", "sheet.png", "page.html")
    for name in re.findall(r"`((?:datasets/|tests/|docs/)?[a-z_]+\.(?:py|pt|png|html))`", README):
        assert (ROOT / name).exists() or name in made, name
    for name in re.findall(r"\]\((docs/[^)#]+)[^)]*\)", README):
        assert (ROOT / name).exists(), name
    for name in DATASETS:
        assert f"`{name}`" in README


def test_the_demo_takes_as_many_steps_as_it_says():
    assert f"({TRAIN_PRESETS['shapes']['steps']:,} steps" in README


def documented(path) -> dict[str, str | None]:
    """Docstrings of a file's public names, methods as Class.method; None for plain variables."""
    found: dict[str, str | None] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {target.id: None for target in node.targets if isinstance(target, ast.Name)}
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        found[node.name] = ast.get_docstring(node)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef):
                found[f"{node.name}.{method.name}"] = ast.get_docstring(method)
    return {name: text for name, text in found.items() if not name.startswith("_")}


def test_every_equation_has_one_docstring_and_the_readme_leads_there():
    homes = collections.defaultdict(list)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[cds]*/*.py")]:
        for name, text in documented(path).items():
            for equation in set(re.findall(r"Eq\. (3\.\d)", text or "")):
                homes[equation].append((path.name, name))
    assert sorted(homes) == [f"3.{i}" for i in range(1, 9)]
    for equation, places in homes.items():
        ((file, name),) = places
        row = re.search(rf"\| \[Eq\. {equation}\]\(.*?\) \| (.*?) \|", README).group(1)
        assert f"`{file}`" in row and f"`{name}`" in row, (equation, row)


def test_what_reading_along_names_exists():
    section = README.split("## Reading along")[1].split("\n## ")[0]
    rows = re.findall(r"^\| .* \| (`.*`) \| .* \|$", section, re.MULTILINE)
    assert len(rows) >= 18
    for row in rows:
        for part in row.split("; "):
            file, names = part.split(": ")
            known = documented(ROOT / file.strip("`"))
            for name in names.split(", "):
                assert name.strip("`") in known, (file, name)
