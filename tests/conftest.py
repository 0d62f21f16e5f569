import os
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# Two test files run at a time, each with one thread, which must not spin while it waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nltk  # noqa: E402
import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from checkpoint import model_content, save_checkpoint  # noqa: E402
from clip import load_clip  # noqa: E402
from config import TRAIN_PRESETS, ModelConfig, run_script  # noqa: E402
from data import Batch, collate  # noqa: E402
from datasets import shapes  # noqa: E402
from model import CoDe  # noqa: E402

try:
    nltk.data.find("taggers/averaged_perceptron_tagger_eng/")
    nltk.data.find("tokenizers/punkt_tab/english/")
except LookupError:  # the small data of tests/make_tagger.py, for the processes of tests as well
    nltk.data.path.append(str(ROOT / "tests" / "nltk_data"))
    os.environ["NLTK_DATA"] = os.pathsep.join(nltk.data.path)

CPU = torch.device("cpu")
# Files that take minutes begin first, or one process would be left with them at the end.
LONGEST = ("test_ablate", "test_resume", "test_preemption", "test_failures", "test_demo")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST)

    items.sort(key=rank)  # what is equal keeps its order


CAPTIONS = ["a red kite and a ball on the grass", "the tiny bug near a house", "a moon with a star"]
NOUNS = [("kite", "ball"), ("bug", "house"), ("moon", "star")]


def random_clip(seed: int = 0) -> open_clip.CLIP:
    """A tiny CLIP with random weights and 64-wide heads, as ViT-B/16 has them."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(
        64,
        dict(image_size=32, patch_size=8, width=64, layers=3, head_width=64),
        dict(width=64, heads=1, layers=2),
        quick_gelu=True,
    )
    return clip.eval().requires_grad_(False)


def random_model(seed: int = 0, **changes) -> CoDe:
    """CoDe around it, its gates, prompts and blocks moved away from their neutral start."""
    model = CoDe(random_clip(seed), ModelConfig(**{"context_init": "a photo of a"} | changes))
    with torch.no_grad():
        for block in model.image_segmenter.upsampling:
            for gate in block.gates:
                gate.fill_(0.3)
        model.region_prompt.normal_()
        model.word_prompt.normal_(std=0.02)
    return model


def some_batch(
    model: CoDe,
    captions: Sequence[str] = CAPTIONS,
    nouns: Sequence[Sequence[str]] = NOUNS,
    seed: int = 1,
) -> Batch:
    """A batch of random images with captions, released labels included."""
    torch.manual_seed(seed)
    size = model.clip.visual.image_size[0]
    images = torch.randn(len(captions), 3, size, size)
    forms = [["a photo of a {}.", "art of the {}."]] * len(captions)
    others = [()] * len(nouns)
    context = len(model.context)
    return collate(images.unbind(), captions, nouns, others, forms, context, True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws depends on no other test."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def model() -> CoDe:
    return random_model()


@pytest.fixture
def mistake(monkeypatch, capsys) -> Callable:
    """Run a script's main on arguments that are wrong: one line on stderr, exit code 2."""

    def said(main: Callable, *arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_script(main)
        line = capsys.readouterr().err
        assert left.value.code == 2 and len(line.strip().splitlines()) == 1, line
        return line

    return said


def listened(page):
    """A page of the browser that keeps what it says and what it asks for."""
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    return page


def model_config(**changes) -> ModelConfig:
    names = ModelConfig.__dataclass_fields__
    preset = {k: v for k, v in TRAIN_PRESETS["shapes"].items() if k in names}
    return ModelConfig(**preset | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with an untrained checkpoint and a scene: regions are MaskCLIP's, words random."""
    folder = tmp_path_factory.mktemp("segment")
    torch.manual_seed(0)
    for name, changes in (("code.pt", {}), ("baseline.pt", {"co_decomposition": False})):
        model = CoDe(load_clip("shapes"), model_config(**changes))
        save_checkpoint(model_content(model), folder / name)
    Image.fromarray(shapes.scene("test", 1).image).save(folder / "scene.png")
    return folder


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-gpu", *quiet]
        )
        yield browser
        browser.close()
