"""The house: what stands where, and what may import what."""

import ast

from conftest import ROOT

SHELF = ("model", "losses", "clip", "pamr", "data", "checkpoint", "released", "config")
SCRIPTS = ("train", "evaluate", "training_free", "segment")
# From the ground up: a file imports from lower floors, or from its own folder.
FLOORS = (
    ("config", "pamr"),
    ("support",),
    ("clip", "datasets"),
    ("model", "data"),
    ("losses", "released"),
    ("checkpoint",),
    ("evaluate",),
    ("training_free", "train"),
    ("segment",),
    ("experiments", "docs"),
)
SOURCES = [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts and "out" not in p.parts]


def room(path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path) -> set[str]:
    """The rooms of this house that a file imports from, at its top or inside a function."""
    known = {name for floor in FLOORS for name in floor}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & known


def test_the_shelf_holds_the_thesis_alone():
    assert {p.stem for p in ROOT.glob("*.py")} == {*SHELF, *SCRIPTS}


def test_imports_point_downward():
    floor_of = {name: i for i, floor in enumerate(FLOORS) for name in floor}
    arrows = 0
    for path in SOURCES:
        here = room(path)
        if here == "tests":
            continue
        for there in imported(path) - {here}:
            arrows += 1
            assert floor_of[there] < floor_of[here], f"{path.relative_to(ROOT)} imports {there}"
    assert arrows > 50
    support = {name for p in (ROOT / "support").glob("*.py") for name in imported(p)}
    assert support == {"config", "support"}
    assert imported(ROOT / "losses.py") == {"config", "model"}  # tensors in, tensors out
    assert imported(ROOT / "model.py") == {"config", "clip"}
