"""The thesis's ablations (sections 4.4, 4.5): tables 4.2 and 4.3, here or on real benchmarks.

    python -m experiments.ablate                               # the shapes world, every row: hours
    python -m experiments.ablate --rows baseline r c cw cr cwr # table 4.2 alone
    python -m experiments.ablate --rows baseline c cw cwr --datasets all --root data \\
        --launch "torchrun --nproc_per_node=4" -- --shards 'data/cc3m-wds/*.tar'

Every row and seed is a run of `train.py` under --out. What stands behind " -- " are options of all
of them. Without --datasets they train on the shapes world, one core each, and are measured there;
with it `evaluate.py` follows each training. What is done is skipped and what was interrupted goes
on, so the command can be stopped at any time and given again. A run that fails is named, and the
others go on. What train.py and evaluate.py say is in ROW/SEED/output.txt. The tables of the rows
that were given go into --results: ablation.md and ablation.png of the shapes world, benchmarks.md
of benchmarks.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from checkpoint import FREE, fingerprint, is_released_file, read_checkpoint
from clip import load_clip
from config import (
    MASK_PRESETS,
    TRAIN_PRESETS,
    LossConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    given_options,
    option,
    parse,
    run_script,
    settle,
)
from data import data_checksum, open_source
from datasets import DATASETS, THESIS_DATASETS, load_benchmark
from evaluate import one_decimal
from experiments.demo import sheet
from experiments.measure import (
    ON_SHAPES,
    ONE_THREAD,
    ROOT,
    THRESHOLDS,
    mean_ious,
    region_and_word_accuracy,
    segmenter_of,
    training_seconds,
    true_mask_accuracy,
    word_assignment_accuracy,
)
from support.draw import save_png
from support.files import save_text
from train import refuse_beside_init

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass
class AblateConfig:
    """Which rows, over which seeds, measured on what."""

    rows: tuple[str, ...] = option((), "rows to train and to show (default: all)")
    seeds: tuple[int, ...] = option(
        (), "training seeds (default: 0; on the shapes world 0 to 4 in table 4.2, else 0 to 2)"
    )
    datasets: tuple[str, ...] = option(
        (), "benchmarks, or 'all' for the six of the thesis (default: the shapes world)"
    )
    root: str = option("data", "folder with the raw benchmark folders")
    launch: str = option("", "what starts train.py and evaluate.py, such as torchrun with options")
    scenes: int = option(500, "held-out scenes of the shapes world that are measured on", low=1)
    jobs: int | None = option(
        None, "runs at the same time (default: 1; on the shapes world one a core)", low=1
    )
    out: str = option("out/ablation", "folder for the runs, ROW/SEED")
    results: str = option("results", "folder for the tables; those of benchmarks: benchmarks.md")

    @property
    def on_shapes(self) -> bool:
        return not self.datasets


@dataclass
class Row:
    """One variant: its options of `train.py`, the rows it is compared with where they stand in the
    same table, and what the thesis reports: mIoU of the six benchmarks, average, hours."""

    title: str
    options: tuple[str, ...]
    against: tuple[str, ...] = ()
    thesis: tuple[float, ...] = ()
    average: float | None = None
    hours: int | None = None


def as_options(values: dict) -> tuple[str, ...]:
    """Values of fields as options: {"lr": 0.1, "resume": True} -> --lr 0.1 --resume."""
    words = []
    for name, value in values.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return tuple(words)


WITHOUT_TEXT = ("--lambda-hcl", "0", "--lambda-seg-t", "0")
CONTRASTS = ("--image-contrast", "0.1", "--region-contrast", "0.1")  # the thesis's

ROWS = {
    "baseline": Row(
        "image segmenter only",
        ("--no-co-decomposition",),
        thesis=(54.4, 27.6, 32.7, 22.5, 25.0, 16.6),
        average=29.8,
        hours=8,
    ),
    # L_seg^v looks at regions on P^v, as CoDe's does: the control for what the text adds.
    "r": Row("image segmenter + R", WITHOUT_TEXT, ("baseline",)),
    "c": Row(
        "+ C",
        ("--no-word-prompt", "--no-region-prompt"),
        ("baseline",),
        thesis=(56.2, 29.2, 32.9, 23.3, 27.5, 17.0),
        average=31.0,
    ),
    "cw": Row(
        "+ C + W",
        ("--no-region-prompt",),
        ("c",),
        thesis=(56.1, 29.3, 32.6, 23.6, 29.0, 17.3),
        average=31.3,
    ),
    "cr": Row("+ C + R", ("--no-word-prompt",), ("c", "r")),
    "cwr": Row(
        "+ C + W + R (CoDe)",
        (),
        ("baseline", "r", "cw", "cr"),
        thesis=(57.7, 30.5, 32.3, 23.9, 28.9, 17.7),
        average=31.8,
        hours=12,
    ),
    "hcl_0.05": Row("λ_hcl = 0.05", ("--lambda-hcl", "0.05"), ("baseline", "cwr"), average=30.6),
    "hcl_0.1": Row("λ_hcl = 0.1", ("--lambda-hcl", "0.1"), ("baseline", "cwr"), average=31.2),
    "hcl_0.25": Row("λ_hcl = 0.25", ("--lambda-hcl", "0.25"), ("baseline", "cwr"), average=31.7),
    "hcl_0.75": Row("λ_hcl = 0.75", ("--lambda-hcl", "0.75"), ("baseline", "cwr"), average=31.5),
    "hcl_1.0": Row("λ_hcl = 1.0", ("--lambda-hcl", "1.0"), ("baseline", "cwr"), average=30.8),
    "nouns": Row("bare noun embeddings", ("--no-word-segments",), ("cwr",), average=30.2),
    "labels": Row("released pseudo-labels", ("--pseudo-labels", "release"), ("cwr",)),
    "release": Row(
        "trained as the release (--preset release)",
        as_options(TRAIN_PRESETS["release"]),
        ("cwr",),
    ),
    "alone_0.1": Row("image segmenter only, at 0.1", ("--no-co-decomposition", *CONTRASTS)),
    "r_0.1": Row("image segmenter + R, at 0.1", (*WITHOUT_TEXT, *CONTRASTS), ("alone_0.1",)),
    "nouns_0.1": Row(
        "bare noun embeddings, at 0.1", ("--no-word-segments", *CONTRASTS), ("r_0.1",)
    ),
    "cwr_0.1": Row("CoDe, at 0.1", CONTRASTS, ("alone_0.1", "r_0.1", "nouns_0.1")),
}
PARTS = ("baseline", "r", "c", "cw", "cr", "cwr")
TABLES = {
    "The parts of the method (the thesis's table 4.2)": PARTS,
    "The weight of L_hcl (table 4.3)": (
        *("baseline", "hcl_0.05", "hcl_0.1", "hcl_0.25", "cwr", "hcl_0.75", "hcl_1.0"),
    ),
    "What a region is aligned with (section 4.4), and what the release does otherwise": (
        *("cwr", "nouns", "labels", "release"),
    ),
    "The contrasts at the thesis's 0.1 (the preset of the shapes world: 0.5)": (
        *("baseline", "r", "cwr", "alone_0.1", "r_0.1", "nouns_0.1", "cwr_0.1"),
    ),
}
SHAPES_ALONE = ("alone_0.1", "r_0.1", "nouns_0.1", "cwr_0.1")  # elsewhere 0.1 is the default

# Student's t at 95 % for two rows of so many seeds: how many standard errors are no noise.
NOISE = {2: 4.30, 3: 2.78, 4: 2.45, 5: 2.31}


# --- what is checked first ------------------------------------------------------------------------


def rows_of(config: AblateConfig) -> tuple[str, ...]:
    """The rows that are asked for. Raises UserError."""
    if unknown := [name for name in config.rows if name not in ROWS]:
        raise UserError(f"--rows {unknown[0]}: not one of {', '.join(ROWS)}")
    for flag in ("rows", "seeds", "datasets"):
        values = getattr(config, flag)
        if len(set(values)) < len(values):
            raise UserError(f"--{flag} {' '.join(map(str, values))}: one of them stands twice")
    known = [name for name in ROWS if config.on_shapes or name not in SHAPES_ALONE]
    return config.rows or tuple(known)


def seeds_of(name: str, config: AblateConfig) -> Sequence[int]:
    default = 1 if not config.on_shapes else 5 if name in PARTS else 3
    return config.seeds or range(default)


def benchmarks_of(config: AblateConfig) -> tuple[str, ...]:
    return THESIS_DATASETS if config.datasets == ("all",) else config.datasets


def training_options(name: str, seed: int, config: AblateConfig, shared: Sequence[str]) -> list:
    """Options of `train.py` for one run: the shared ones, then the row's own."""
    world = (*ON_SHAPES, "--checkpoint-every", "100") if config.on_shapes else ()
    options = [*world, *shared, *ROWS[name].options]
    return [*options, "--seed", str(seed), "--out", str(run_folder(name, seed, config))]


def configs_of(name: str, config: AblateConfig, shared: Sequence[str]) -> tuple:
    """What `train.py` reads in the options of a row: TrainConfig, ModelConfig and LossConfig."""
    words = training_options(name, 0, config, shared)
    kinds = (TrainConfig, ModelConfig, LossConfig)
    return parse("", *kinds, presets=TRAIN_PRESETS, words=words)


def check_training(name: str, config: AblateConfig, shared: Sequence[str]) -> dict:
    """What a row trains with, but for the seed and what may change. Raises UserError."""
    train, model, loss = configs_of(name, config, shared)
    given = given_options(training_options(name, 0, config, shared))
    try:
        settle(model, loss, given)
        refuse_beside_init(train, given)
    except UserError as error:
        raise UserError(f"the row {name}: {error}") from error
    values = asdict(train) | asdict(model) | asdict(loss)
    return {k: v for k, v in values.items() if k not in (*FREE, "seed")}


def check_data(name: str, config: AblateConfig, shared: Sequence[str]) -> dict:
    """What all rows train on and start from, as checksums: paths may change. Raises UserError."""
    train, model, _ = configs_of(name, config, shared)
    found = {}
    if not config.on_shapes:
        found["the data"] = data_checksum(open_source(train))
    if train.init is None:
        start = fingerprint(load_clip(model.clip, model.clip_weights))
    elif Path(train.init).is_file():
        start = zlib.crc32(Path(train.init).read_bytes())
    else:
        raise UserError(f"--init {train.init}: no such file")
    found["the CLIP or --init"] = start
    return found


def check_all(names: Sequence[str], config: AblateConfig, shared: Sequence[str]) -> None:
    """Look at everything before anything is trained, and note in --out what its runs are made with.

    Raises UserError, also if the runs in --out were made with something else.
    """
    asked = given_options(shared)
    for flag in ("seed", "out", "resume"):
        if flag in asked:
            raise UserError(f"-- --{flag}: every run has its own: --seeds and --out say which")
    for flag in ("preset", "pairs", "shards"):
        if config.on_shapes and flag in asked:
            raise UserError(f"-- --{flag}: only with --datasets; without it is the shapes world")
    results = Path(config.results)
    if results.exists() and not results.is_dir():
        raise UserError(f"--results {results}: a file, and a folder is needed")
    given = given_options()
    for flag in ("root", "launch") if config.on_shapes else ("scenes",):
        if flag in given:
            raise UserError(f"--{flag}: {'only' if config.on_shapes else 'not'} with --datasets")
    try:
        launcher = shlex.split(config.launch)
    except ValueError as error:  # a quotation mark too few
        raise UserError(f"--launch {config.launch}: {error}") from error
    if launcher and shutil.which(launcher[0]) is None:
        raise UserError(f"--launch {config.launch}: no such program")
    for dataset in benchmarks_of(config):
        if dataset not in DATASETS:
            raise UserError(f"--datasets {dataset}: not one of {', '.join(DATASETS)}, or 'all'")
        load_benchmark(dataset, config.root)
    settings = {f"the row {name}": check_training(name, config, shared) for name in names}
    settings |= check_data(names[0], config, shared)
    if config.on_shapes:
        settings |= {"--scenes": config.scenes, "the masks' preset": MASK_PRESETS["shapes"]}
    settings = json.loads(json.dumps(settings))  # as they are read back
    path = Path(config.out) / "settings.json"
    try:
        before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged: remove it if the runs beside it are these") from error
    for name, value in settings.items():
        if before.get(name, value) != value:
            was = before[name]
            if isinstance(value, dict):  # the first field that differs is enough
                name += f", {next(k for k in value | was if value.get(k) != was.get(k))}"
            raise UserError(
                f"{config.out}: its runs are of other options ({name}); remove it, or name another "
                "--out"
            )
    save_text(json.dumps(before | settings, indent=1), path)


# --- the runs -------------------------------------------------------------------------------------


def run_folder(name: str, seed: int, config: AblateConfig) -> Path:
    return Path(config.out) / name / str(seed)


@dataclass
class Running:
    """The processes of all runs that are at work, to be stopped together."""

    processes: set[subprocess.Popen] = field(default_factory=set)
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in list(self.processes):
                process.terminate()  # a training finishes its step and saves


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[tuple[int, ...]]:
    """A lock on the folder of a run: the file that its processes must inherit to hold it.

    It is free again when the last of them has ended. So a training that outlived a killed ablation
    is not joined by a second one. Raises UserError while another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        if fcntl is None:
            yield ()
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is still at work in it") from None
        except OSError:  # a file system without locks
            pass
        yield (lock.fileno(),)


def run_program(
    program: str,
    options: Sequence[str],
    folder: Path,
    config: AblateConfig,
    inherited: tuple[int, ...],
    running: Running,
) -> None:
    """A program of this repository in processes of its own, to its end; what it says goes to
    output.txt. Raises UserError if it fails."""
    command = [*(shlex.split(config.launch) or [sys.executable]), str(ROOT / program), *options]
    settings = os.environ | (ONE_THREAD if config.on_shapes else {})
    with open(folder / "output.txt", "a+", encoding="utf-8", errors="replace") as output:
        start = output.tell()
        with running.lock:  # either it is stopped with the others, or not started
            if running.stopped:
                raise UserError("stopped")
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=settings, pass_fds=inherited
            )
            running.processes.add(process)
        code = process.wait()
        running.processes.discard(process)
        if code:
            output.seek(start)
            lines = [line for line in output.read().splitlines() if line.strip()] or ["no message"]
            # torchrun's report follows what the process itself said.
            line = next((line for line in lines if ": error: " in line), lines[-1])
            raise UserError(f"{program} ended with exit code {code}: {line}")


def is_trained(folder: Path) -> bool:
    """Whether a run is at its last step."""
    if not (folder / "last.pt").exists():
        return False
    content = read_checkpoint(folder / "last.pt")
    return content["step"] == content["train_config"]["steps"]


def run_once(
    name: str,
    seed: int,
    config: AblateConfig,
    shared: Sequence[str],
    running: Running,
) -> None:
    """Train one row with one seed, going on from its last checkpoint if it has one; measure it."""
    folder = run_folder(name, seed, config)
    with claimed(folder) as inherited:
        started = (folder / "last.pt").exists()
        if not is_trained(folder):
            options = training_options(name, seed, config, shared)
            options += ["--resume"] if started else []
            run_program("train.py", options, folder, config, inherited, running)
            if not is_trained(folder):
                raise UserError("its training was stopped")  # by a signal, and it saved
        if config.on_shapes:
            measure_on_shapes(folder, config.scenes)
        missing = [d for d in benchmarks_of(config) if not metrics_file(folder, d).exists()]
        common = ["--root", config.root, "--checkpoint", str(folder / "last.pt")]
        common += evaluation_options(shared) if missing else []
        for dataset in missing:
            options = ["--dataset", dataset, "--json", str(metrics_file(folder, dataset)), *common]
            run_program("evaluate.py", options, folder, config, inherited, running)


def evaluation_options(shared: Sequence[str]) -> list[str]:
    """Of `evaluate.py`: the device of the trainings, and where CLIP's weights are now."""
    train, model, _ = parse("", TrainConfig, ModelConfig, LossConfig, words=shared)
    options = ["--device", train.device]
    if "clip_weights" in given_options(shared):
        options += ["--clip-weights", model.clip_weights]
    elif train.init and is_released_file(train.init):
        options += ["--clip-weights", train.init]
    return options


def metrics_file(folder: Path, dataset: str = "") -> Path:
    """Of a benchmark, or of the shapes world. It exists when the measurement is complete."""
    return folder / f"metrics{dataset and '-' + dataset}.json"


def measure_on_shapes(folder: Path, scenes: int) -> None:
    segmenter = segmenter_of(folder / "last.pt")
    metrics = {"mIoU": mean_ious(segmenter, scenes)}
    metrics["true_masks"] = true_mask_accuracy(segmenter.model, scenes)
    if segmenter.model.decomposes_text:
        metrics["words"] = word_assignment_accuracy(segmenter.model, scenes)
        metrics["objects"] = region_and_word_accuracy(segmenter, scenes)
    metrics["seconds"] = training_seconds(folder)
    save_text(json.dumps(metrics, indent=1), metrics_file(folder))


def is_done(name: str, seed: int, config: AblateConfig) -> bool:
    folder = run_folder(name, seed, config)
    return all(metrics_file(folder, d).exists() for d in benchmarks_of(config) or ("",))


def run_all(names: Sequence[str], config: AblateConfig, shared: Sequence[str]) -> list[str]:
    """All runs that are missing, `jobs` at a time; returns what failed and why.

    The page of benchmarks is written anew after every run: the last may be days away.
    """
    wanted = [(name, seed) for name in names for seed in seeds_of(name, config)]
    wanted.sort(key=lambda job: job[1])  # one seed of every row after the other
    missing = [job for job in wanted if not is_done(*job, config)]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are done", flush=True)
    jobs = config.jobs or (cores() if config.on_shapes else 1)
    if config.on_shapes:
        torch.set_num_threads(1)
    running, failed = Running(), []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run_once, *job, config, shared, running): job for job in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                folder = run_folder(*futures[future], config)
                try:
                    future.result()
                    print(f"{folder}: done", flush=True)
                except Exception as error:  # a full disk, a damaged file: the others go on
                    reason = str(error) or type(error).__name__
                    failed.append(f"{folder}: {reason}")
                    print(f"{failed[-1]} (see output.txt there)", file=sys.stderr, flush=True)
                if not config.on_shapes:
                    write_early(names, config)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            raise
    return failed


def cores() -> int:
    """How many this process may use: a container has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_metrics(name: str, config: AblateConfig) -> list[dict]:
    """Of every seed of a row: the shapes world's, or mIoU by benchmark and seconds."""
    found = []
    for seed in seeds_of(name, config):
        folder = run_folder(name, seed, config)
        if config.on_shapes:
            found.append(json.loads(metrics_file(folder).read_text("utf-8")))
            continue
        files = {d: metrics_file(folder, d).read_text("utf-8") for d in benchmarks_of(config)}
        mious = {dataset: json.loads(text)["mIoU"] for dataset, text in files.items()}
        found.append({"mIoU": mious, "seconds": training_seconds(folder)})
    return found


# --- what is written ------------------------------------------------------------------------------


def mean_and_deviation(values: Sequence[float]) -> str:
    """Of the seeds of a run, as it is printed; of one seed the mean alone."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def percentages(runs: list[dict], kind: str, parts: Sequence[str]) -> str:
    """Means over the seeds, where the row has this kind of metrics."""
    if not all(kind in run for run in runs):
        return ""
    return " / ".join(f"{statistics.mean(run[kind][part] for run in runs):.0f} %" for part in parts)


def verdict(values: Sequence[float], others: Sequence[float]) -> str:
    """The difference of two rows' means, and whether it exceeds the noise of their seeds.

    Beyond: by more standard errors than Student's t at 95 % for the smaller number of seeds.
    """
    difference, seeds = statistics.mean(values) - statistics.mean(others), (values, others)
    if min(map(len, seeds)) == 1:
        return f"{difference:+.1f} (one seed)"
    error = math.sqrt(sum(statistics.variance(found) / len(found) for found in seeds))
    limit = NOISE[min(5, *map(len, seeds))] * error
    side = "**beyond** the noise" if abs(difference) > limit else "inside the noise"
    return f"{difference:+.1f} ± {error:.1f}, {side}"


def differences(name: str, mious: dict[str, list[float]]) -> str:
    """A row beside the rows of its table that it is compared with."""
    return "; ".join(
        f"{verdict(mious[name], mious[other])} (to {ROWS[other].title})"
        for other in ROWS[name].against
        if other in mious
    )


def shapes_table(names: Sequence[str], rows: dict[str, list[dict]]) -> list[str]:
    """Markdown lines of one table, measured on the shapes world."""
    lines = [
        "| | mIoU | at its best threshold | difference | words assigned: nouns / adjectives "
        "| objects right: region / words / both | zero-shot on true regions / words "
        "| minutes a run | thesis (avg. of six) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    mious = {name: [run["mIoU"]["0.4"] for run in rows[name]] for name in names}
    for name in names:
        at = {t: [run["mIoU"][str(t)] for run in rows[name]] for t in THRESHOLDS}
        best = max(THRESHOLDS, key=lambda t: statistics.mean(at[t]))
        cells = [
            ROWS[name].title,
            mean_and_deviation(mious[name]),
            f"{mean_and_deviation(at[best])} ({best})",
            differences(name, mious),
            percentages(rows[name], "words", ("nouns", "adjectives")),
            percentages(rows[name], "objects", ("regions", "words", "both")),
            percentages(rows[name], "true_masks", ("regions", "words")),
            f"{statistics.median(run['seconds'] for run in rows[name]) / 60:.1f}",
            one_decimal(ROWS[name].average),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def benchmark_table(names: Sequence[str], rows: dict[str, list[dict]]) -> list[str]:
    """The same, measured on benchmarks: under each row what the thesis reports of it."""
    datasets = list(rows[names[0]][0]["mIoU"])
    head = ["", *datasets, "average", "difference of the averages", "hours"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    averages = {n: [statistics.mean(run["mIoU"].values()) for run in rows[n]] for n in names}
    for name in names:
        row, runs = ROWS[name], rows[name]
        cells = [row.title]
        cells += [
            mean_and_deviation([run["mIoU"][dataset] for run in runs]) for dataset in datasets
        ]
        cells += [mean_and_deviation(averages[name]), differences(name, averages)]
        cells += [f"{statistics.median(run['seconds'] for run in runs) / 3600:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
        if row.average is not None:
            reported = dict(zip(THESIS_DATASETS, row.thesis))
            cells = ["*reported in the thesis*", *(one_decimal(reported.get(d)) for d in datasets)]
            whole = datasets == list(THESIS_DATASETS)  # its average is that of all six
            cells += [one_decimal(row.average if whole else None), "", str(row.hours or "-")]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


NOISE_TEXT = (
    "A difference is beyond the noise when it exceeds Student's t at 95 % times its standard error."
)
SHAPES_TEXT = f"""\
# Ablations on the shapes world

Made by `python -m experiments.ablate`: {{steps}} steps of {{pairs}} pairs a run; mIoU with
background in percent on {{scenes}} held-out scenes, refined, threshold 0.4: mean ± standard
deviation of the seeds.
{NOISE_TEXT} *Words assigned*: words whose likeliest class (Eq. 3.3) is their noun, two nouns being
asked for. *Objects right*: of the objects that captions name, all nouns being asked for, those with
a region of IoU 50 % or more, those with exactly their own nouns and adjectives, those with both.
*Zero-shot*: accuracy of the frozen CLIP, twelve objects, on highlighted true regions and on
highlighted true words, with the row's prompt everywhere else. The last column is the thesis's own,
ViT-B/16 on six benchmarks, not measured here.

Without any training (MaskCLIP): {{maskclip:.1f}}."""
BENCHMARKS_TEXT = f"""\
# Ablations on benchmarks

Made by `python -m experiments.ablate`: {{steps}} steps of {{pairs}} pairs a run; mIoU in percent by
section 4.1, with several seeds mean ± standard deviation. {NOISE_TEXT}
Hours are those of training, by the median of its speed. The thesis reports one run a row, on four
2080 Ti."""


def report(
    asked: Sequence[str], rows: dict[str, list[dict]], text: str, config: AblateConfig
) -> str:
    """The page of all tables in which a row was trained; asked: rows that should be in it."""
    lines = [text]
    for title, names in TABLES.items():
        # A table that only rows of the first one would fill is left out.
        if any(name in rows for name in names if name not in PARTS or names == PARTS):
            names = [name for name in names if name in rows]
            seeds = ", ".join(f"{len(rows[name])} of {ROWS[name].title}" for name in names)
            table = shapes_table if config.on_shapes else benchmark_table
            lines += ["", f"## {title}", "", f"Seeds: {seeds}.", "", *table(names, rows)]
    if missing := [name for name in asked if name not in rows]:
        lines += ["", f"Not all runs are done of: {', '.join(missing)}."]
    return "\n".join(lines)


def write_early(names: Sequence[str], config: AblateConfig) -> None:
    """Write the tables so far; what is wrong with them stops no training."""
    try:
        write_results(names, config)
    except Exception as error:
        print(f"no tables yet: {str(error) or type(error).__name__}", file=sys.stderr, flush=True)


def write_results(names: Sequence[str], config: AblateConfig) -> str:
    """Write the tables of the rows whose runs are all done, and on the shapes world their sheet;
    returns what to print."""
    complete = [n for n in names if all(is_done(n, seed, config) for seed in seeds_of(n, config))]
    if not complete:
        return "no row has all its runs yet"
    results, rows = Path(config.results), {name: read_metrics(name, config) for name in complete}
    first = run_folder(complete[0], seeds_of(complete[0], config)[0], config)
    settings = json.loads((first / "config.json").read_text("utf-8"))
    facts = {"steps": settings["train"]["steps"], "pairs": settings["train"]["batch_size"]}
    if config.on_shapes:
        maskclip = segmenter_of(None, settings["model"]["clip_weights"])
        facts |= {"scenes": config.scenes, "maskclip": mean_ious(maskclip, config.scenes)["0.4"]}
        segmenters = {"MaskCLIP": maskclip}
        for name in (name for name in PARTS if name in complete):
            folder = run_folder(name, seeds_of(name, config)[0], config)
            segmenters[ROWS[name].title] = segmenter_of(folder / "last.pt")
        save_png(sheet(segmenters, rows=6), results / "ablation.png")
        text = report(names, rows, SHAPES_TEXT.format(**facts), config)
        text += "\n\n![Scenes, and the regions of every row of the first table](ablation.png)"
        written = results / "ablation.md"
    else:
        text = report(names, rows, BENCHMARKS_TEXT.format(**facts), config)
        written = results / "benchmarks.md"
    save_text(text, written)
    return f"{text}\n\n{written}"


def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    shared = words[cut + 1 :]
    (config,) = parse(__doc__, AblateConfig, words=words[:cut])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways of stopping are one
    names = rows_of(config)
    check_all(names, config, shared)
    failed = run_all(names, config, shared)
    print(write_results(names, config))
    if failed:
        raise UserError(f"{len(failed)} runs failed, {failed[0]}; give the command again")


if __name__ == "__main__":
    run_script(main)
