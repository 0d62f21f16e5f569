"""What `evaluate.py` prints."""

from statistics import fmean


def printable(name: str) -> str:
    """A file's name as text that every terminal takes: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def print_table(metrics: dict) -> None:
    """IoU by class, then the line that counts."""
    width = max(map(len, metrics["IoU"]))
    for name, value in metrics["IoU"].items():
        print(f"{name:{width}}  {'     -' if value is None else f'{value:6.2f}'}")
    partial = "  (partial: not all images)" if metrics["partial"] else ""
    result = "no pixel of any image is labelled, so there is no mIoU"
    if metrics["mIoU"] is not None:
        result = f"mIoU {metrics['mIoU']:.2f}, pixel accuracy {metrics['pixel_accuracy']:.2f}"
    print(
        f"{metrics['dataset']}: {result}, {metrics['images']} images{partial}; {metrics['method']}"
    )


def average(results: list[dict]) -> float | None:
    """The mean of the mIoUs; None if a benchmark has none."""
    values = [result["mIoU"] for result in results]
    return None if None in values else fmean(values)


def table_4_1(results: list[dict]) -> str:
    """The row of the thesis's table 4.1 for our metrics, above the thesis's own."""
    header = ["", "VOC", "Context", "Object", "Stuff", "City", "ADE", "Avg."]
    ours = [*(result["mIoU"] for result in results), average(results)]
    partial = " (partial)" if any(result["partial"] for result in results) else ""
    rows = [
        header,
        ["---"] * len(header),
        [f"{results[0]['method']}{partial}", *("-" if f is None else f"{f:.1f}" for f in ours)],
        ["CoDe, as the thesis reports it", "57.7", "30.5", "32.3", "23.9", "28.9", "17.7", "31.8"],
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
