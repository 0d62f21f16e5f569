"""Table 4.1 as a page: the thesis's rows, rows measured here, and what is refused."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT

from config import MASK_PRESETS, EvalConfig, MaskConfig
from datasets import THESIS_DATASETS
from evaluate import COLUMNS, REPORTED
from experiments.table import main, page, read_rows
from training_free import TrainingFreeConfig


def metrics(dataset: str, miou: float | None = 20.0, partial: bool = False, **changes) -> dict:
    """What evaluate.py writes of a benchmark; changes: options of MaskConfig."""
    config = MaskConfig(method=changes.pop("method", "code"), **changes)
    settings = asdict(config) | {"protocol": "thesis", "background": config.threshold}
    return {
        "dataset": dataset,
        "partial": partial,
        "images": 10,
        "mIoU": miou,
        "pixel_accuracy": 50.0,
        "IoU": {},
        "method": "thesis protocol, code",
        "settings": settings,
    }


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def row_of(text: str, name: str) -> list[str]:
    """The cells of a row, by its first one."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def shown(path: Path) -> str:
    """The page with one row, named x."""
    return page(read_rows([f"x={path}"]))


def test_the_reported_rows_are_the_theses():
    """An average where all six are there, and it is theirs to one decimal."""
    assert len(REPORTED) == 10 and len(COLUMNS) == 7
    for _, values in REPORTED.values():
        *six, mean = values
        assert len(six) == 6 and (mean is None) == (None in six)
        assert mean is None or mean == pytest.approx(sum(six) / 6, abs=0.051)
    text = page([])
    assert row_of(text, "CoCu")[1:3] == ["as reported", "CC3M+CC12M+YFCC14M"]
    assert row_of(text, "ViL-Seg")[3:] == ["37.3", "18.9", "18.1", "-", "-", "-", "-"]
    assert "No row was measured" in text and "measured here" not in text.lower()


def test_the_page_in_the_repository_has_the_reported_rows():
    lines = (ROOT / "results" / "table_4_1.md").read_text("utf-8").splitlines()
    rows = [line for line in page([]).splitlines() if line.startswith("|")]
    assert len(rows) == 12 and set(rows) <= set(lines)


def test_a_whole_evaluation(tmp_path):
    content = [metrics(name, 10.0 + i) for i, name in enumerate(THESIS_DATASETS)]
    text = shown(write(tmp_path / "m.json", {"average": 1, "partial": False, "datasets": content}))
    cells = ["measured here", "not recorded", "10.0", "11.0", "12.0", "13.0", "14.0", "15.0"]
    assert row_of(text, "x")[1:] == [*cells, "12.5"]
    assert f"- x, {', '.join(THESIS_DATASETS)}: thesis protocol, code" in text.splitlines()
    assert "No row was measured" not in text


def test_one_benchmark_and_a_part_of_it(tmp_path):
    text = shown(write(tmp_path / "m.json", metrics("ade20k", 7.26, partial=True)))
    assert row_of(text, "x")[3:] == ["-", "-", "-", "-", "-", "7.3 (partial)", "-"]
    assert "ade20k (the first 10 images)" in text
    content = [metrics(name, partial=name == "voc") for name in THESIS_DATASETS]
    text = shown(write(tmp_path / "m.json", {"datasets": content}))
    assert row_of(text, "x")[3] == row_of(text, "x")[9] == "20.0 (partial)"
    assert row_of(text, "x")[4] == "20.0"
    content = [metrics(name, None if name == "voc" else 3.0) for name in THESIS_DATASETS]
    text = shown(write(tmp_path / "m.json", {"datasets": content}))
    assert row_of(text, "x")[3:] == ["-", *["3.0"] * 5, "-"]


def test_another_protocol_is_marked(tmp_path):
    path = tmp_path / "m.json"
    assert row_of(shown(write(path, metrics("voc"))), "x")[1] == "measured here"
    text = shown(write(path, metrics("voc", pamr=False, stride=112)))
    assert row_of(text, "x")[1] == "measured here, another protocol"
    assert "options changed: background 0.5, not 0.4; pamr False, not True; stride 112" in text
    settings = asdict(TrainingFreeConfig()) | {"protocol": "training-free"}
    text = shown(write(path, metrics("voc") | {"settings": settings}))
    assert row_of(text, "x")[1:3] == ["measured here, another protocol", "none but CLIP's"]
    assert "thesis's: training-free protocol)" in text
    text = shown(write(path, metrics("voc") | {"settings": asdict(EvalConfig())}))
    assert row_of(text, "x")[1:3] == ["measured here, another protocol", "not recorded"]
    assert "label maps of an unknown protocol" in text
    assert row_of(shown(write(path, metrics("voc", method="maskclip"))), "x")[2] == (
        "none but CLIP's"
    )


@pytest.mark.parametrize(
    "content, words",
    [
        ([], "not the metrics that evaluate.py --json writes"),
        ({}, "not the metrics that evaluate.py --json writes"),
        ({"datasets": []}, "it holds no benchmark"),
        ({"datasets": [1]}, "not the metrics"),
        ({"datasets": [metrics("voc"), metrics("voc")]}, "voc stands in it twice"),
        (metrics("shapes", **MASK_PRESETS["shapes"]), "of shapes, which is not in table 4.1"),
        (metrics("voc20"), "of voc20, which is not in table 4.1 (voc, context,"),
        (metrics("voc", 120.0), "not the metrics"),
        (metrics("voc") | {"mIoU": "high"}, "not the metrics"),
        ({k: v for k, v in metrics("voc").items() if k != "settings"}, "not the metrics"),
        ({k: v for k, v in metrics("voc").items() if k != "mIoU"}, "not the metrics"),
    ],
)
def test_files_that_are_not_ours_are_refused(content, words, mistake, tmp_path):
    path = write(tmp_path / "m.json", content)
    said = mistake(main, "--json", f"x={path}", "--out", tmp_path / "page.md")
    assert f"{path}: " in said and words in said
    assert not (tmp_path / "page.md").exists()


def test_mistakes_on_the_command_line(mistake, tmp_path):
    path, out = write(tmp_path / "m.json", metrics("voc")), ("--out", tmp_path / "page.md")
    assert "NAME=FILE is needed" in mistake(main, "--json", path, *out)
    assert "two rows named x" in mistake(main, "--json", f"x={path}", f"x={path}", *out)
    assert "cannot be read (No such file" in mistake(main, "--json", "x=nowhere.json", *out)
    path.write_text("mIoU 57.7")
    assert "m.json: no JSON; evaluate.py --json writes it" in mistake(
        main, "--json", f"x={path}", *out
    )
    assert "a folder, not a file" in mistake(main, "--out", tmp_path)
