"""The ablations: their tables follow from the runs, and the runs survive being stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, model_config
from PIL import Image

from checkpoint import read_checkpoint
from clip import (
    PRIOR_TEMPLATES,
    image_embedding,
    load_clip,
    template_embedding,
    text_embedding,
    tokenize,
)
from config import TRAIN_PRESETS, EvalConfig, LossConfig, ModelConfig, TrainConfig, parse
from datasets import shapes
from evaluate import evaluate
from experiments.ablate import ROWS, TABLES, main, mean_and_deviation, table, verdict
from experiments.measure import (
    mean_ious,
    nouns_of_words,
    segmenter_of,
    to_input,
    true_mask_accuracy,
)
from model import CoDe

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
    lines = table(("baseline", "c", "cw"), rows)
    assert len(lines) == 4  # cw is not done
    assert lines[2].split(" | ")[1:4] == ["51.0 ± 1.0", "52.0 ± 1.0 (0.35)", ""]
    assert "+4.0 ± 0.8, **beyond** the noise (to image segmenter only)" in lines[3]
    assert "| 1.5 | 31.0 |" in lines[3]
    named = [name for names in TABLES.values() for name in names]
    assert set(named) == set(ROWS)


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


def ablate(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [*ABLATE, "--out", str(folder), "--results", str(folder / "r")]
    command += ["--steps", "3", "--scenes", "3", *arguments]
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
    other = "of other options"
    assert f"{other} (--scenes)" in mistake(main, *options, "--steps", "3", "--scenes", "4")
    assert f"{other} (--steps)" in mistake(main, *options, "--scenes", "3")  # the preset's
    options = (*options, "--steps", "3", "--scenes", "3")
    monkeypatch.setitem(TRAIN_PRESETS["shapes"], "lr", 1.0)
    assert f"{other} (the preset)" in mistake(main, *options)
    monkeypatch.undo()
    monkeypatch.setattr("experiments.ablate.fingerprint", lambda clip: 1)
    assert f"{other} (the CLIP)" in mistake(main, *options)
    monkeypatch.undo()
    monkeypatch.setattr(ROWS["baseline"], "options", ())
    assert f"{other} (the row baseline)" in mistake(main, *options)
    monkeypatch.undo()
    options = ("--rows", "cwr", "--seeds", "1", "0", "--out", tmp_path)  # one of them is done
    assert f"{other} (--steps)" in mistake(main, *options, "--steps", "4", "--scenes", "3")


def test_it_can_be_stopped_and_given_again(tmp_path):
    command = [*ABLATE, "--out", str(tmp_path), "--rows", "c", "--seeds", "0"]
    command += ["--steps", "30", "--scenes", "2", "--results", str(tmp_path / "r")]
    first, log = subprocess.Popen(command, cwd=ROOT), tmp_path / "c" / "0" / "log.jsonl"
    while not log.exists():
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130
    stopped = read_checkpoint(log.with_name("last.pt"))["step"]  # its training saved and ended
    assert 10 <= stopped < 30 and not log.with_name("metrics.json").exists()
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps[-1] == 30 and read_checkpoint(log.with_name("last.pt"))["step"] == 30
    assert "| + C |" in (tmp_path / "r" / "ablation.md").read_text()


def test_rows_and_seeds_are_checked(mistake):
    assert "--rows cd: not one of baseline, c," in mistake(main, "--rows", "cd")
    assert "--rows c c: one of them stands twice" in mistake(main, "--rows", "c", "c")
    assert "--seeds 0 0: one of them stands twice" in mistake(main, "--seeds", "0", "0")


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_a_command_line_that_train_takes(row, monkeypatch):
    def parsed(*options: str) -> tuple:
        monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "shapes", *options])
        return parse("", TrainConfig, ModelConfig, LossConfig, presets=TRAIN_PRESETS)

    train, model, loss = parsed(*ROWS[row].options)
    assert train == parsed()[0]
    changed = {"baseline": not model.co_decomposition, "nouns": not model.word_segments}
    changed |= {"c": not model.word_prompt and not model.region_prompt}
    changed |= {"cw": model.word_prompt and not model.region_prompt}
    changed |= {"cr": model.region_prompt and not model.word_prompt}
    changed |= {"cwr": (model, loss) == parsed()[1:], "release": loss.pseudo_labels == "release"}
    contrasts = loss.image_contrast == loss.region_contrast == 0.1
    changed |= {"alone_0.1": contrasts and not model.co_decomposition, "cwr_0.1": contrasts}
    changed |= {f"hcl_{value}": loss.lambda_hcl == value for value in (0.05, 0.1, 0.25, 0.75, 1.0)}
    assert changed[row]
