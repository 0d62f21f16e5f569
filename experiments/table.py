"""The thesis's table 4.1 as a page: its rows as reported, and below them rows measured here.

    python -m experiments.table                                   # the reported rows alone
    python -m experiments.table --json code=code.json tcl=tcl.json

A row is NAME=FILE, where FILE is what evaluate.py or training_free.py wrote with --json, of one
benchmark or of all six. It writes --out.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from config import MaskConfig, UserError, option, parse, run_script
from datasets import THESIS_DATASETS
from evaluate import COLUMNS, REPORTED, average, markdown_table, one_decimal
from support.files import printable, refuse_folder, save_text

# Options that choose a model or a machine, not how it is evaluated.
NOT_PROTOCOL = ("checkpoint", "method", "clip", "clip_weights", "device")


@dataclass
class TableConfig:
    """What the page holds."""

    json: tuple[str, ...] = option((), "rows measured here, NAME=FILE each")
    out: str = option("results/table_4_1.md", "file for the page")


@dataclass
class Row:
    """A row measured here."""

    name: str
    results: dict[str, dict]  # metrics of a benchmark, as evaluate.py writes them, by its name


# --- what was measured ----------------------------------------------------------------------------


def read_rows(given: Sequence[str]) -> list[Row]:
    """The rows of --json. Raises UserError."""
    rows: list[Row] = []
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UserError(f"--json {text}: NAME=FILE is needed, such as code=metrics.json")
        if name in [row.name for row in rows]:
            raise UserError(f"--json {text}: there are two rows named {name}")
        rows.append(Row(name, read_results(path)))
    return rows


def read_results(path: str) -> dict[str, dict]:
    """The metrics in a file of --json, by benchmark. Raises UserError for what is no such file."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: no JSON; evaluate.py --json writes it") from error
    several = isinstance(content, dict) and isinstance(content.get("datasets"), list)
    found = content["datasets"] if several else [content]
    results: dict[str, dict] = {}
    for metrics in found:
        check_metrics(metrics, path)
        dataset = metrics["dataset"]
        if dataset not in THESIS_DATASETS:
            raise UserError(
                f"{path}: of {dataset}, which is not in table 4.1 ({', '.join(THESIS_DATASETS)})"
            )
        if dataset in results:
            raise UserError(f"{path}: {dataset} stands in it twice")
        results[dataset] = metrics
    if not results:
        raise UserError(f"{path}: it holds no benchmark")
    return results


def check_metrics(metrics: object, path: str) -> None:
    """Whether this is what `evaluate.evaluate` returns. Raises UserError."""
    kinds = {"dataset": str, "method": str, "partial": bool, "images": int, "settings": dict}
    wrong = not isinstance(metrics, dict) or "mIoU" not in metrics
    wrong = wrong or any(not isinstance(metrics.get(k), kind) for k, kind in kinds.items())
    if not wrong and metrics["mIoU"] is not None:  # None: no pixel was labelled
        miou = metrics["mIoU"]
        wrong = not isinstance(miou, int | float) or not math.isfinite(miou)
        wrong = wrong or not 0 <= miou <= 100
    if wrong:
        raise UserError(f"{path}: not the metrics that evaluate.py --json writes")


def deviation(settings: dict) -> str:
    """How settings differ from the thesis's protocol, "" where they do not."""
    if "protocol" not in settings:
        return "label maps of an unknown protocol"
    if settings["protocol"] != "thesis":
        return f"{settings['protocol']} protocol"
    thesis, changed = MaskConfig(), []
    for f in fields(MaskConfig):
        value = settings.get(f.name)
        usual = thesis.threshold if f.name == "background" else getattr(thesis, f.name)
        if isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        if f.name not in NOT_PROTOCOL and value != usual:
            changed.append(f"{f.name} {value}, not {usual}")
    return f"options changed: {'; '.join(changed)}" if changed else ""


# --- the page -------------------------------------------------------------------------------------


def text_of(given: str) -> str:
    """A name that may stand in a cell."""
    return printable(given).replace("|", "\\|")


def training_of(row: Row) -> str:
    """What a row's method was trained on, as far as its settings tell."""
    settings = [metrics["settings"] for metrics in row.results.values()]
    methods = {s.get("method") for s in settings if "protocol" in s}
    if methods and "code" not in methods:
        return "none but CLIP's"
    return "not recorded"


def reported_cells(name: str) -> list[str]:
    """A row of the thesis's table."""
    training, values = REPORTED[name]
    return [name, "as reported", training, *map(one_decimal, values)]


def measured_cells(row: Row) -> list[str]:
    """A row measured here; an average only of all six benchmarks."""
    found = [row.results.get(dataset) for dataset in THESIS_DATASETS]
    cells = []
    for metrics in found:
        value = None if metrics is None else metrics["mIoU"]
        partial = metrics is not None and metrics["partial"]
        cells.append(one_decimal(value) + (" (partial)" if partial else ""))
    whole = None if None in found else average(found)
    partial = whole is not None and any(metrics["partial"] for metrics in found)
    cells.append(one_decimal(whole) + (" (partial)" if partial else ""))
    mark = "measured here"
    if any(deviation(metrics["settings"]) for metrics in row.results.values()):
        mark += ", another protocol"
    return [text_of(row.name), mark, training_of(row), *cells]


def explain(row: Row) -> list[str]:
    """How a row was measured, a line for every way in which its benchmarks were."""
    ways: dict[str, list[str]] = {}
    for dataset, metrics in row.results.items():
        way = text_of(metrics["method"])
        if other := deviation(metrics["settings"]):
            way += f" (another protocol than the thesis's: {text_of(other)})"
        count = f"the first {metrics['images']} images" if metrics["partial"] else ""
        ways.setdefault(way, []).append(f"{dataset} ({count})" if count else dataset)
    return [f"- {text_of(row.name)}, {', '.join(on)}: {way}" for way, on in ways.items()]


def page(rows: Sequence[Row]) -> str:
    """results/table_4_1.md."""
    table = [["Method", "", "Training data", *COLUMNS]]
    table += [reported_cells(name) for name in REPORTED]
    table += [measured_cells(row) for row in rows]
    lines = [
        "# Table 4.1",
        "",
        "Made by `python -m experiments.table`. mIoU in percent; -: no figure. Rows *as reported* "
        "are copied from the thesis, which took those of other methods from their papers.",
        "",
        markdown_table(table),
        "",
    ]
    if not rows:
        lines.append("No row was measured with the code in this repository yet.")
    else:
        lines += ["Measured here:", ""]
        for row in rows:
            lines += explain(row)
    return "\n".join(lines)


def main() -> None:
    (config,) = parse(__doc__, TableConfig)
    refuse_folder(config.out)
    text = page(read_rows(config.json))
    save_text(text, config.out)
    print(f"{text}\n\n{config.out}")


if __name__ == "__main__":
    run_script(main)
