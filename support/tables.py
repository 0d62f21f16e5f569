"""What `evaluate.py` prints."""

import numpy as np


def print_table(metrics: dict) -> None:
    """IoU by class, then the line that counts."""
    width = max(map(len, metrics["IoU"]))
    for name, value in metrics["IoU"].items():
        print(f"{name:{width}}  {'     -' if value is None else f'{value:6.2f}'}")
    partial = "  (partial: not all images)" if metrics["partial"] else ""
    print(
        f"{metrics['dataset']}: mIoU {metrics['mIoU']:.2f}, pixel accuracy "
        f"{metrics['pixel_accuracy']:.2f}, {metrics['images']} images{partial}; {metrics['method']}"
    )


def table_4_1(results: list[dict]) -> str:
    """The row of the thesis's table 4.1 for our metrics, above the thesis's own."""
    header = ["", "VOC", "Context", "Object", "Stuff", "City", "ADE", "Avg."]
    ours = [result["mIoU"] for result in results]
    partial = " (partial)" if any(result["partial"] for result in results) else ""
    rows = [
        header,
        ["---"] * len(header),
        [f"{results[0]['method']}{partial}", *(f"{f:.1f}" for f in [*ours, np.mean(ours)])],
        ["CoDe, as the thesis reports it", "57.7", "30.5", "32.3", "23.9", "28.9", "17.7", "31.8"],
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
