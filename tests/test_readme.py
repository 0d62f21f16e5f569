"""What README.md and docs/*.md name exists: files, functions, links, options, benchmarks; and the
commands that they show are understood by the programs."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import config
from config import MASK_PRESETS, TRAIN_PRESETS
from datasets import DATASETS
from experiments.demo import DemoConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# What the programs write, and what data of a reader's holds.
NOT_HERE = {"last.pt", "best.pt", "config.json", "log.jsonl", "data/", "__MACOSX/"}
NOT_HERE |= {"best-before.pt", "pairs.txt", "results/benchmarks.md", "sheet.png", "sheet.json"}
NOT_HERE |= {"trainval_merged.json", "ImageSets/SegmentationContext/val.txt"}
SCRIPTS = ("train", "evaluate", "training_free", "segment")


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks in a language."""
    text = page.read_text("utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return list(found)


def commands(page: Path) -> list[list[str]]:
    """The lines of all shell blocks, and of the prose in backticks, as words."""
    lines = []
    for block in blocks(page, "bash"):
        lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|torchrun|make) [^`]+)`", prose(page))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def anchors(page: Path) -> set[str]:
    """What links may lead to: headings as GitHub writes them, or the ids of an HTML page."""
    text = page.read_text("utf-8")
    if page.suffix == ".html":
        return set(re.findall(r'\bid="([^"]+)"', text))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def sources(path: Path) -> dict[str, str]:
    """The source of a file's functions, classes and variables, methods as Class.method."""
    text = path.read_text("utf-8")
    found = {}
    for node in ast.parse(text).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets:  # a = b = 1, or a, b = 1, 2
            for name in getattr(target, "elts", [target]):
                if isinstance(name, ast.Name):
                    found[name.id] = ast.get_source_segment(text, node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.get_source_segment(text, node)
        for part in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(part, ast.FunctionDef):
                found[f"{node.name}.{part.name}"] = ast.get_source_segment(text, part)
    return found


def program_options(monkeypatch, module_name: str, arguments: list[str]) -> None:
    """Let a script parse a command line, and go no further. Fails if it does not understand it."""
    module = importlib.import_module(module_name)

    class Parsed(Exception):
        pass

    def parse(*args, **kwargs):
        config.parse(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr(module, "parse", parse)
    monkeypatch.setattr(sys, "argv", [module_name, *arguments])
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert targets
    for target in targets:
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("name", NAMES)
def test_linked_names_exist_in_the_file_that_is_linked(name):
    page = ROOT / name
    for names, target in re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", page.read_text("utf-8")):
        assert names in sources(page.parent / target), (names, target)


def test_every_equation_leads_to_its_function():
    page = ROOT / "docs" / "reading.md"
    _, *sections = re.split(r"^## ", page.read_text("utf-8"), flags=re.MULTILINE)
    for number in range(1, 9):
        equation = f"3.{number}"
        (section,) = (s for s in sections if re.search(rf"Eqs?\..*{equation}", s.split("\n")[0]))
        linked = re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", section)
        code = [sources(page.parent / target)[function] for function, target in linked]
        assert any(f"Eq. {equation}" in text for text in code), equation
    headings = [section.split()[0] for section in sections]
    assert {f"3.{i}" for i in range(1, 6)} | {f"4.{i}" for i in range(1, 8)} <= set(headings)


@pytest.mark.parametrize("name", NAMES)
def test_files_exist(name):
    page, suffixes = ROOT / name, "py|pt|png|html|json|jsonl|md|txt"
    for path in re.findall(rf"`([\w./]+\.(?:{suffixes})|\w+/)`", prose(page)):
        written = path.startswith("out/") or path in NOT_HERE or re.match("[A-Z]+[./]", path)
        assert written or (ROOT / path).exists() or (page.parent / path).exists(), path


def test_options_in_the_prose_exist(monkeypatch, capsys):
    experiments = [f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("[a-z]*.py")]
    experiments.remove("experiments.measure")  # no program
    for script in [*SCRIPTS, *experiments]:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(script).main()
    known = {"--help", "--nproc_per_node", "--standalone"}  # the last two are torchrun's
    known |= set(re.findall(r"--[a-z-]+[a-z]", capsys.readouterr().out))
    for page in PAGES:
        used = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+[a-z]", prose(page)))
        assert used <= known, (page.name, used - known)


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_understood(name, monkeypatch):
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(ROOT / name):
        if words[0] == "make":
            assert all(word in targets for word in words[1:] if word not in ("&&", "make")), words
        elif words[:2] == ["python", "-m"] and words[2].startswith("experiments."):
            program_options(monkeypatch, words[2], words[3:])
        elif words[0] in ("python", "torchrun"):
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if not scripts:
                # A program of somebody else, or torchrun alone.
                assert words[:2] in (["python", "-m"], ["torchrun", "--standalone"]), words
                continue
            script, *arguments = words[scripts[0] :]
            assert script.removesuffix(".py") in SCRIPTS, words
            arguments = ["1" if word == "N" else word for word in arguments if word != "--help"]
            program_options(monkeypatch, script.removesuffix(".py"), arguments)
            if "--dataset" in arguments:
                dataset = arguments[arguments.index("--dataset") + 1]
                assert dataset in (*DATASETS, "all", "NAME"), words


def test_python_examples_import_what_exists():
    for page in PAGES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_benchmark_has_a_row_with_its_classes():
    data = (ROOT / "docs" / "data.md").read_text("utf-8")
    for name in DATASETS:
        row = re.search(rf"^\| `{name}` \| (\d+)( \+ background)? \|", data, re.MULTILINE)
        module = importlib.import_module(f"datasets.{name.rstrip('0123456789')}")  # voc of voc20
        without = [class_name for class_name in module.CLASS_NAMES if class_name != "background"]
        assert int(row[1]) == len(without), name


def test_the_demo_takes_as_many_steps_as_it_says():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f"({DemoConfig().steps:,} steps of {TRAIN_PRESETS['shapes']['batch_size']}" in readme


def test_the_recipe_of_the_shapes_world_is_the_presets():
    text = (ROOT / "docs" / "shapes.md").read_text("utf-8")
    section = text.split("## The recipe")[1].split("\n## ")[0]
    shown = {}
    for options, values in re.findall(r"^\| (`--.*`) \| .* \| (.*) \|$", section, re.MULTILINE):
        names = [name.strip("-`").replace("-", "_") for name in options.split(", ")]
        values = values.replace("−", "-").split(", ")
        shown |= dict(zip(names, values * len(names) if len(values) == 1 else values))
    changed = TRAIN_PRESETS["shapes"] | MASK_PRESETS["shapes"]
    assert shown.keys() == changed.keys()
    for name, value in changed.items():
        if isinstance(value, int | float):
            assert float(shown[name]) == value, name
        else:
            assert shown[name] == (value if isinstance(value, str) else " ".join(map(str, value)))
