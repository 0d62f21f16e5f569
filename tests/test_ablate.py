"""The ablations: their tables follow from the runs, and the runs survive being stopped."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from conftest import ROOT, model_config
from PIL import Image
from runs import ENVIRONMENT, processes_of

from checkpoint import read_checkpoint
from clip import (
    PRIOR_TEMPLATES,
    SHAPES_WEIGHTS,
    image_embedding,
    load_clip,
    noun_prompts,
    template_embedding,
    text_embedding,
    tokenize,
)
from config import (
    MASK_PRESETS,
    TRAIN_PRESETS,
    EvalConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    parse,
)
from datasets import THESIS_DATASETS, shapes
from evaluate import Segmenter, evaluate
from experiments.ablate import (
    ROWS,
    TABLES,
    benchmark_table,
    claimed,
    main,
    mean_and_deviation,
    shapes_table,
    verdict,
)
from experiments.measure import (
    mean_ious,
    nouns_of_words,
    region_and_word_accuracy,
    segmenter_of,
    to_input,
    true_mask_accuracy,
    word_assignment_accuracy,
)
from model import CoDe
from segment import word_masks

pytestmark = pytest.mark.slow

ABLATE = (sys.executable, "-m", "experiments.ablate")


def metrics(mious: tuple[float, ...]) -> list[dict]:
    every = ("0.3", "0.35", "0.4", "0.45", "0.5", "0.55", "0.6")
    return [{"mIoU": {t: m + (t == "0.35") for t in every}, "seconds": 90.0} for m in mious]


def test_mean_and_verdict():
    assert mean_and_deviation([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert mean_and_deviation([2.04]) == "2.0"
    assert verdict([5.0, 6.0, 7.0], [1.0, 2.0, 3.0]) == "+4.0 ± 0.8, **beyond** the noise"
    assert verdict([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]) == "+1.0 ± 0.8, inside the noise"
    assert verdict([1.0, 2.0, 3.0], [5.0, 6.0, 7.0]).startswith("-4.0 ± 0.8, **beyond**")
    five = [1.0, 2.0, 3.0, 4.0, 5.0]  # five seeds need fewer standard errors than three
    assert verdict([x + 2.4 for x in five], five).endswith("**beyond** the noise")
    assert verdict([3.4, 4.4, 5.4], [1.0, 2.0, 3.0]).endswith("**beyond** the noise")
    assert verdict([4.2, 4.4, 5.2, 5.4, 6.4], five).startswith("+2.1 ± 0.8, **beyond**")
    assert verdict([2.0], [1.0]) == "+1.0 (one seed)"


def test_rows_of_the_tables():
    rows = {"baseline": metrics((50.0, 51.0, 52.0)), "c": metrics((54.0, 55.0, 56.0))}
    lines = shapes_table(("baseline", "c"), rows)
    assert len(lines) == 4
    assert lines[2].split(" | ")[1:4] == ["51.0 ± 1.0", "52.0 ± 1.0 (0.35)", ""]
    assert "+4.0 ± 0.8, **beyond** the noise (to image segmenter only)" in lines[3]
    assert "| 1.5 | 31.0 |" in lines[3]
    named = [name for names in TABLES.values() for name in names]
    assert set(named) == set(ROWS)


def test_rows_of_benchmarks():
    """Means by hand, and under each row what the thesis reports."""

    def runs(*mious: tuple[float, float]) -> list[dict]:
        return [{"mIoU": {"voc": v, "ade20k": a}, "seconds": 7200.0} for v, a in mious]

    rows = {"baseline": runs((50.0, 10.0), (52.0, 12.0)), "cwr": runs((60.0, 20.0), (62.0, 24.0))}
    head, _, *lines = benchmark_table(("baseline", "cwr"), rows)
    assert head == "|  | voc | ade20k | average | difference of the averages | hours |"
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert lines[0] == "| image segmenter only | 51.0 ± 1.4 | 11.0 ± 1.4 | 31.0 ± 1.4 |  | 2.0 |"
    assert lines[1] == "| *reported in the thesis* | 54.4 | 16.6 | - |  | 8 |"  # not of all six
    # (40 + 43) / 2 = 41.5; the standard error is sqrt(4.5 / 2 + 2 / 2) = 1.8, and 4.30 of them 7.8
    assert cells[2][3:5] == [
        "41.5 ± 2.1",
        "+10.5 ± 1.8, **beyond** the noise (to image segmenter only)",
    ]
    assert lines[3] == "| *reported in the thesis* | 57.7 | 17.7 | - |  | 12 |"
    six = [{"mIoU": dict.fromkeys(THESIS_DATASETS, 30.0), "seconds": 3600.0}]
    assert benchmark_table(("cwr",), {"cwr": six})[-1].endswith("| 17.7 | 31.8 |  | 12 |")


def test_mean_ious_are_those_of_an_evaluation():
    segmenter, benchmark = segmenter_of(None), shapes.load("", count=3)
    found = mean_ious(segmenter, 3)
    for threshold in (0.3, 0.4):
        segmenter.config.background = threshold
        assert found[str(threshold)] == evaluate(segmenter, benchmark, EvalConfig())["mIoU"]
    assert found["0.3"] != found["0.4"]


def test_which_noun_a_word_speaks_of():
    words = ["the", "star", "is", "golden", "and", "near", "it", "is", "a", "box"]
    nouns = [None, "star", None, "star", None, None, None, None, None, "box"]
    assert nouns_of_words(words) == nouns
    words = ["a", "small", "red", "bug", "on", "sand"]
    assert nouns_of_words(words) == [None, "bug", "bug", "bug", None, "sand"]


@torch.no_grad()
def test_true_regions_and_words_stand_among_the_prompts():
    """Every highlight put together pixel by pixel and word by word."""
    clip, names = load_clip("shapes"), list(shapes.OBJECTS)
    model = CoDe(clip, model_config())
    model.region_prompt.normal_(std=0.3)
    model.word_prompt[6:8] = clip.token_embedding(tokenize(["kite"]))[0, 1]  # misleads some
    texts = template_embedding(clip, names, PRIOR_TEMPLATES)
    right = {"regions": [], "words": []}
    for i in range(6):
        scene = shapes.scene("test", i)
        x, words = to_input(scene.image[None])[0], scene.caption.replace(",", "").split()
        tokens = tokenize([" ".join(words)])
        for thing in scene.things:
            picture, rows = model.region_prompt.clone(), model.word_prompt.clone()
            for y, x0 in np.argwhere(scene.label == 1 + names.index(thing.noun)):
                picture[:, y, x0] = x[:, y, x0]
            kept = [k + 1 for k, n in enumerate(nouns_of_words(words)) if n == thing.noun]
            for k in (0, *kept, len(words) + 1):  # SOS and EOT stay as well
                rows[k] = clip.token_embedding(tokens)[0, k]
            e_v = image_embedding(clip, picture[None])
            e_t = text_embedding(clip, rows[None], torch.tensor([len(words) + 1]))
            for kind, e in (("regions", e_v), ("words", e_t)):
                right[kind].append(names[(e @ texts.T).argmax()] == thing.noun)
    want = {kind: 100 * np.mean(values) for kind, values in right.items()}
    assert 0 < want["words"] < 100 and 0 < want["regions"] < 100
    assert true_mask_accuracy(model, 6) == pytest.approx(want)


def with_commas(monkeypatch, first: int) -> None:
    """Let the scenes that are measured begin at `first`, where captions have commas."""
    drawn = shapes.scene
    monkeypatch.setattr(shapes, "scene", lambda split, i: drawn(split, first + i))
    assert "," in shapes.scene("test", 0).caption


@torch.no_grad()
def test_words_assigned_against_a_loop(monkeypatch):
    """Two nouns of each caption, commas and all: the likeliest class of every token."""
    with_commas(monkeypatch, 19)
    torch.manual_seed(3)
    model, right = CoDe(load_clip("shapes"), model_config()), {"nouns": [], "adjectives": []}
    for i in range(5):
        words = shapes.scene("test", i).caption.replace(",", " ,").split()
        nouns = [w for w in words if w in shapes.NOUNS]
        nouns = sorted(set(nouns), key=nouns.index)
        if len(nouns) < 2:
            continue
        asked = [nouns[k] for k in np.random.default_rng(i).permutation(len(nouns))[:2]]
        tokens = tokenize([" ".join(words)])
        n = model.noun_embedding(noun_prompts(asked, len(model.context)))[:, None]
        logits = model.text_segmenter.word_logits(model.word_features(tokens), n)[:, 0]
        share = logits.softmax(0)[:, 1:-1].T.numpy()  # (tokens, "none" and two nouns)
        owners = nouns_of_words([word for word in words if word != ","])
        place = 0
        for owner in owners:
            own = [share[place]]
            word, place = words[place], place + 1
            if words[place : place + 1] == [","]:  # a word between spaces has its comma
                own, place = [*own, share[place]], place + 1
            if owner in asked:
                found = np.mean(own, axis=0).argmax() == 1 + asked.index(owner)
                right["nouns" if word == owner else "adjectives"].append(found)
    got = word_assignment_accuracy(model, 5)
    assert got == pytest.approx({kind: 100 * np.mean(found) for kind, found in right.items()})
    assert 0 < got["adjectives"] < 100


@torch.no_grad()
def test_regions_and_words_together_against_loops(monkeypatch):
    """Every object of a caption: its region pixel by pixel, its words one by one."""
    with_commas(monkeypatch, 19)
    torch.manual_seed(0)
    model = CoDe(load_clip("shapes"), model_config())
    settings, names = MaskConfig(**MASK_PRESETS["shapes"], background=0.3), list(shapes.OBJECTS)
    segmenter, scenes = Segmenter(model.clip, model, names, settings), 5
    ious, regions, exact, hits, found, true = [], [], [], 0, 0, 0
    for i in range(scenes):
        scene = shapes.scene("test", i)
        words = scene.caption.replace(",", "").split()
        nouns = [w for w in words if w in shapes.NOUNS]
        nouns = sorted(set(nouns), key=nouns.index)
        labels = Segmenter(model.clip, model, nouns, settings).label_map(
            Image.fromarray(scene.image), True
        )
        masks = word_masks(model, scene.caption, nouns)
        for k, noun in enumerate(nouns):
            if noun not in [thing.noun for thing in scene.things]:
                continue
            inside = joined = 0
            for y, x in np.ndindex(scene.label.shape):
                here, there = labels[y, x] == k + 1, scene.label[y, x] == names.index(noun) + 1
                inside += int(here and there)
                joined += int(here or there)
            ious.append(inside / joined)
            regions.append(inside / joined >= 0.5)
            own = [m[k] > max([1 - m.sum(), *np.delete(m, k)]) for m in masks.T]
            want = [owner == noun for owner in nouns_of_words(words)]
            owners = nouns_of_words(words)
            exact.append(all(a == b for a, b, owner in zip(own, want, owners) if owner))
            hits += sum(a and b for a, b in zip(own, want))
            found, true = found + sum(own), true + sum(want)
    both = [a and b for a, b in zip(regions, exact)]
    want = {"iou": np.mean(ious), "precision": hits / found, "recall": hits / true}
    want |= {"regions": np.mean(regions), "words": np.mean(exact), "both": np.mean(both)}
    got = region_and_word_accuracy(segmenter, scenes)
    assert got == pytest.approx({name: 100 * value for name, value in want.items()})
    assert 0 < got["precision"] < 100 and 0 < got["recall"] < 100 and got["iou"] > 0


SHORT = ("--steps", "3", "--batch-size", "4")


def ablate(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [*ABLATE, "--out", str(folder), "--results", str(folder / "r")]
    command += ["--scenes", "3", *arguments, "--", *SHORT]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_it_trains_measures_draws_and_skips_what_is_done(tmp_path, mistake, monkeypatch):
    """Real runs of three steps; slow because each is a process of its own."""
    done = ablate(tmp_path, "--rows", "baseline", "cwr", "--seeds", "0")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "r" / "ablation.md").read_text()
    assert "0 of 2 runs are done" in done.stdout
    found = json.loads((tmp_path / "cwr" / "0" / "metrics.json").read_text())
    assert found["mIoU"]["0.4"] >= 0 and set(found["words"]) == {"nouns", "adjectives"}
    model = segmenter_of(tmp_path / "cwr" / "0" / "last.pt").model
    assert found["true_masks"] == true_mask_accuracy(model, 3)  # see the test above
    assert f"| + C + W + R (CoDe) | {found['mIoU']['0.4']:.1f} |" in text  # one seed: no "±"
    assert "29.8" in text and "not measured here" in text
    assert "table 4.2" in text and "table 4.3" not in text  # of which only CoDe was trained
    with Image.open(tmp_path / "r" / "ablation.png") as sheet:
        assert sheet.width > 5 * 160

    before = (tmp_path / "cwr" / "0" / "metrics.json").stat().st_mtime_ns
    again = ablate(tmp_path, "--rows", "baseline", "cwr", "--seeds", "0")
    assert again.returncode == 0 and "2 of 2 runs are done" in again.stdout, again.stderr
    assert (tmp_path / "cwr" / "0" / "metrics.json").stat().st_mtime_ns == before

    options = ("--rows", "baseline", "--seeds", "0", "--out", tmp_path)
    other, shared = "of other options", ("--", *SHORT)
    assert f"{other} (--scenes)" in mistake(main, *options, "--scenes", "4", *shared)
    options = (*options, "--scenes", "3")
    assert f"{other} (the row baseline, steps)" in mistake(main, *options)  # the preset's
    monkeypatch.setitem(TRAIN_PRESETS["shapes"], "lr", 1.0)
    assert f"{other} (the row baseline, lr)" in mistake(main, *options, *shared)
    monkeypatch.undo()
    monkeypatch.setattr("experiments.ablate.fingerprint", lambda clip: 1)
    assert f"{other} (the CLIP or --init)" in mistake(main, *options, *shared)
    monkeypatch.undo()
    monkeypatch.setattr(ROWS["baseline"], "options", ("--lambda-hcl", "2"))
    assert f"{other} (the row baseline, co_decomposition)" in mistake(main, *options, *shared)


def test_it_can_be_stopped_and_given_again(tmp_path):
    """Here with another CLIP, whose MaskCLIP the page compares with."""
    other = torch.load(SHAPES_WEIGHTS, weights_only=True)
    other["state"]["visual.proj"] = other["state"]["visual.proj"].flip(0)
    torch.save(other, tmp_path / "clip.pt")
    command = [*ABLATE, "--out", str(tmp_path), "--rows", "c", "--seeds", "0"]
    command += ["--scenes", "2", "--results", str(tmp_path / "r"), "--", "--steps", "20"]
    command += ["--batch-size", "4", "--log-every", "1"]
    command += ["--clip-weights", str(tmp_path / "clip.pt")]
    first, log = subprocess.Popen(command, cwd=ROOT), tmp_path / "c" / "0" / "log.jsonl"
    while not log.exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130
    stopped = read_checkpoint(log.with_name("last.pt"))["step"]  # its training saved and ended
    assert 1 <= stopped < 20 and not log.with_name("metrics.json").exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps[-1] == 20 and read_checkpoint(log.with_name("last.pt"))["step"] == 20
    page = (tmp_path / "r" / "ablation.md").read_text()
    maskclip = mean_ious(segmenter_of(None, tmp_path / "clip.pt"), 2)["0.4"]
    assert "| + C |" in page and f"(MaskCLIP): {maskclip:.1f}." in page
    assert f"{mean_ious(segmenter_of(None), 2)['0.4']:.1f}" != f"{maskclip:.1f}"


def test_what_is_checked_before_anything_is_trained(tmp_path, mistake):
    assert "--rows cd: not one of baseline, r, c," in mistake(main, "--rows", "cd")
    assert "--rows c c: one of them stands twice" in mistake(main, "--rows", "c", "c")
    assert "--seeds 0 0: one of them stands twice" in mistake(main, "--seeds", "0", "0")
    assert "--root: only with --datasets" in mistake(main, "--root", "data")
    out = ("--out", tmp_path / "out")
    here = ("--datasets", "voc", "--root", golden.folder() / "raw", *out)
    assert "--scenes: not with --datasets" in mistake(main, *here, "--scenes", "3")
    assert "--datasets vac: not one of" in mistake(main, "--datasets", "vac", *out)
    assert "--root nowhere should hold" in mistake(main, "--datasets", "voc", "--root", "nowhere")
    assert "--launch turborun -x: no such program" in mistake(
        main, *here, "--launch", "turborun -x"
    )
    assert "--pairs nowhere: no such folder" in mistake(main, *here, "--", "--pairs", "nowhere")
    assert "unrecognized arguments: --colour" in mistake(main, *out, "--", "--colour")
    assert "-- --seed: every run has its own" in mistake(main, *out, "--", "--seed", "3")
    contrary = ("--rows", "baseline", *out, "--", "--lambda-hcl", "1")
    assert "the row baseline: --lambda-hcl asks for what --no-co" in mistake(main, *contrary)
    start = ("--rows", "c", *out, "--", "--init", "code.pth")
    assert "the row c: --init code.pth: its network is taken: leave out --no-" in mistake(
        main, *start
    )
    assert "--init code.pth: no such file" in mistake(main, "--rows", "cwr", *start[2:])
    assert not (tmp_path / "out").exists()


# --- on benchmarks --------------------------------------------------------------------------------


def every(folder: Path) -> list[int]:
    """The processes of an ablation whose runs lie in a folder."""
    found = set(processes_of(str(folder)))
    for run in [path.parent for path in folder.glob("*/*/lock")]:
        found |= {*processes_of(str(run)), *processes_of(str(run / "last.pt"))}
    return sorted(found)


TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
WHOLE = pytest.mark.skipif("CODE_LONG_TESTS" not in os.environ, reason="takes twenty minutes")


@pytest.mark.parametrize(
    "rows, seeds, datasets, launcher",
    [
        (("cwr",), ("0",), ("voc",), ""),
        pytest.param(("r", "cwr"), ("0", "1"), ("all",), TORCHRUN, marks=WHOLE),
    ],
)
def test_killed_and_given_again_the_tables_are_the_same(rows, seeds, datasets, launcher, tmp_path):
    """Killed in the first training and in the first evaluation of the last run.

    Slow, as real runs of three programs are: the networks are tiny, the benchmarks miniatures.
    """
    state = {k: torch.tensor(v) for k, v in golden.load("tiny_code_checkpoint").items()}
    torch.save({"model": state}, tmp_path / "code.pth")
    pairs, random = tmp_path / "pairs", np.random.default_rng(0)
    pairs.mkdir()
    for i in range(16):
        Image.fromarray(random.integers(0, 255, (64, 70, 3), np.uint8)).save(pairs / f"{i}.jpg")
        (pairs / f"{i}.txt").write_text("a dog and a red ball")

    def command(out: Path) -> list[str]:
        words = [*ABLATE, "--rows", *rows, "--seeds", *seeds, "--datasets", *datasets]
        words += ["--root", golden.folder() / "raw", "--launch", launcher, "--out", out]
        words += ["--results", out, "--", "--init", tmp_path / "code.pth", "--pairs", pairs]
        words += ["--steps", "10", "--batch-size", "4", "--checkpoint-every", "2"]
        return list(map(str, [*words, "--workers", "0", "--lr", "1e-3"]))

    settings = {"cwd": ROOT, "env": ENVIRONMENT}
    whole = subprocess.run(command(tmp_path / "whole"), capture_output=True, text=True, **settings)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"

    def kill_when(reached: Callable[[], bool]) -> None:
        running = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, **settings)
        while not reached():
            assert running.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
        for pid in [running.pid, *every(out)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.wait()

    first = out / rows[0] / seeds[0] / "last.pt"
    last = out / rows[-1] / seeds[-1] / "last.pt"
    kill_when(first.exists)
    assert read_checkpoint(first)["step"] < 10  # in its training
    kill_when(lambda: processes_of(str(last)))  # which alone evaluate.py is given
    assert read_checkpoint(last)["step"] == 10 and not list(last.parent.glob("metrics-*.json"))
    done = subprocess.run(command(out), capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stderr
    runs = len(rows) * len(seeds)
    assert f"{runs - 1} of {runs} runs are done" in done.stdout
    tables = (out / "benchmarks.md").read_bytes()
    assert tables == (tmp_path / "whole" / "benchmarks.md").read_bytes()
    assert b"| + C + W + R (CoDe) |" in tables and b"*reported in the thesis*" in tables
    for path in (tmp_path / "whole").glob("*/*/metrics-*.json"):  # tables round
        ours, theirs = (
            json.loads((tmp_path / k / path.relative_to(tmp_path / "whole")).read_text())
            for k in ("whole", "killed")
        )
        assert ours["IoU"] == theirs["IoU"] and ours["mIoU"] == theirs["mIoU"]


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    """A folder where a file should be written makes the first of two runs fail."""
    (tmp_path / "c" / "0" / "config.json").mkdir(parents=True)
    options = ("--rows", "c", "baseline", "--seeds", "0", "--jobs", "1")
    done = ablate(tmp_path, *options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert f"1 runs failed, {tmp_path}/c/0: train.py ended with exit code 2" in last
    assert "a folder, not a file to write" in last
    text = (tmp_path / "r" / "ablation.md").read_text()
    assert "| image segmenter only |" in text and "| + C |" not in text
    assert "Not all runs are done of: c." in text


def test_a_run_at_work_is_not_joined(tmp_path):
    """The lock is held by whatever process of the run lives."""
    with claimed(tmp_path) as inherited:
        sleeper = subprocess.Popen(["sleep", "60"], pass_fds=inherited)
    try:
        at_work = pytest.raises(UserError, match="another process is still at work in it")
        with at_work, claimed(tmp_path):
            pass
    finally:
        sleeper.kill()
        sleeper.wait()
    with claimed(tmp_path):
        pass


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_a_command_line_that_train_takes(row, monkeypatch):
    def parsed(*options: str) -> tuple:
        monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "shapes", *options])
        return parse("", TrainConfig, ModelConfig, LossConfig, presets=TRAIN_PRESETS)

    train, model, loss = parsed(*ROWS[row].options)
    assert replace(train, decay_prompts=False) == parsed()[0]
    assert train.decay_prompts == (row == "release")
    changed = {"baseline": not model.co_decomposition, "nouns": not model.word_segments}
    changed |= {"c": not model.word_prompt and not model.region_prompt}
    changed |= {"cw": model.word_prompt and not model.region_prompt}
    changed |= {"cr": model.region_prompt and not model.word_prompt}
    without_text = loss.lambda_hcl == loss.lambda_seg_t == 0 and model == parsed()[1]
    changed |= {"r": without_text}
    changed |= {"cwr": (model, loss) == parsed()[1:], "labels": loss.pseudo_labels == "release"}
    changed |= {"release": model.text_attention == "all" and loss.lambda_kg == 4}
    contrasts = loss.image_contrast == loss.region_contrast == 0.1
    changed |= {"alone_0.1": contrasts and not model.co_decomposition, "cwr_0.1": contrasts}
    changed |= {"r_0.1": contrasts and without_text}
    changed |= {"nouns_0.1": contrasts and not model.word_segments}
    changed |= {f"hcl_{value}": loss.lambda_hcl == value for value in (0.05, 0.1, 0.25, 0.75, 1.0)}
    assert changed[row]
