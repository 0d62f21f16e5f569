"""docs/read.html and its builder: its values are the code's, and the page can be read."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, listened, model_config
from runs import train

from checkpoint import model_content, read_checkpoint, save_checkpoint
from clip import embed_texts, load_clip
from config import TRAIN_PRESETS, LossConfig, TrainConfig, UserError
from docs.book.alignment import TERMS
from docs.book.build import SECTIONS, BookConfig, build, code_block, formula
from docs.book.observe import first_model, observe, small_batch
from model import CoDe
from train import logistic_noise

COMMITTED = ROOT / "docs" / "read.html"
EQUATIONS = [f"eq-3-{i}" for i in range(1, 9)]
STEPS = [0, 1, 4, 8]
PROSE = "".join(
    (ROOT / f"docs/book/{s.__name__.split('.')[-1]}.html").read_text() for s in SECTIONS
)


def sections(page: str) -> dict[str, str]:
    return dict(re.findall(r'<section id="([\w-]+)"(.*?)</section>', page, re.DOTALL))


def numbers(page: str, name: str) -> list[float]:
    """All values of a name on a page, in the order of the steps."""
    return [float(v) for v in re.findall(rf'data-name="{name}" value="(.*?)"', page)]


def run_content() -> dict:
    """What a checkpoint of the shapes world says of its run."""
    preset = TRAIN_PRESETS["shapes"] | {"nouns": 3}  # the page draws two nevertheless
    training, losses = (
        kind(**{k: v for k, v in preset.items() if k in kind.__dataclass_fields__})
        for kind in (TrainConfig, LossConfig)
    )
    return {
        "model_config": asdict(model_config()),
        "train_config": asdict(training),
        "loss_config": asdict(losses),
    }


@pytest.fixture(scope="module")
def trained():
    """The model of the last step; those before it differ in its context and some scalars."""
    return CoDe(load_clip("shapes"), model_config()).eval()


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A folder as a training leaves it."""
    folder = tmp_path_factory.mktemp("run")
    for step in STEPS[1:]:
        with torch.no_grad():
            trained.text_segmenter.word_scale.fill_(10 + step)
            trained.hcl_log_scale.fill_(2 + step / 16)
            trained.image_segmenter.mask_bias.add_(0.5)
            trained.context.add_(0.01)
            trained.region_prompt.add_(0.1)
        save_checkpoint(model_content(trained), folder / f"step-{step}.pt")
    save_checkpoint(run_content() | model_content(trained) | {"step": 8}, folder / "last.pt")
    lines = [{"step": n, "total": 9.0} | dict.fromkeys(TERMS, 1.0) for n in (3, 8)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def page(folder) -> str:
    return build(observe(folder, BookConfig.pair))


# --- what is on it --------------------------------------------------------------------------------


def test_every_equation_has_its_section_formula_code_and_figure(page):
    found = sections(page)
    assert [name for name in found if name in EQUATIONS] == EQUATIONS
    for anchor in EQUATIONS:
        text, number = found[anchor], anchor[3:].replace("-", ".")
        assert re.search(r'<math [^>]*display="block">.*</math>', text)
        assert f'href="#{anchor}" aria-label="Equation {number}">({number})</a>' in text
        code = re.search(r'<details class="code".*?</details>', text, re.DOTALL)[0]
        assert f"Eq. {number}" in re.sub("<.*?>", "", code), "its first function does it"
        figure = re.search(r"<figure>.*?</figure>", text, re.DOTALL)[0]
        assert all(f'class="at at-{i}"' in figure for i in range(len(STEPS)))
    assert "<!--" not in page and "$" not in "".join(found.values())


def test_the_code_that_it_names_exists():
    names = " ".join(re.findall(r"<!--code (.+?)-->", PROSE)).split()
    assert len(names) > 15
    for name in names:
        assert f'data-object="{name}"' in code_block(name)


def test_formulas_are_mathml():
    assert "<msup><mi>X</mi><mi>v</mi></msup>" in formula("X^v")
    assert "&gt;" in formula("a > b") or "&#x0003E;" in formula("a > b")


def test_a_bar_is_as_wide_as_its_steps(page):
    """Stopped at step 3, a run has logged it, whatever --log-every is."""
    assert re.findall(r'flex-grow:(\d+)" title="step (\d+):', page) == [("3", "3"), ("5", "8")]


def test_a_folder_without_kept_steps_is_named(tmp_path):
    with pytest.raises(UserError, match="make demo"):
        observe(tmp_path, 0)


def test_the_readme_leads_to_sections_that_exist():
    for anchor in re.findall(r"docs/read\.html#([\w-]+)", (ROOT / "README.md").read_text()):
        assert f'id="{anchor}"' in COMMITTED.read_text()


def test_it_is_one_small_file_that_asks_for_nothing(page):
    for text in (page, COMMITTED.read_text()):
        assert len(text.encode()) <= 2e6
        assert not re.search(
            r'(src|srcset)="(?!data:)|url\(|@import|<link(?! rel="icon")|fetch\(', text
        )
        assert "default-src 'none'" in text


def test_images_speak(page):
    for image in re.findall(r"<img [^>]*>", page):
        assert re.search(r'alt="[^"]', image)
    for drawing in re.findall(r"<svg [^>]*>", page):
        assert 'role="img"' in drawing and re.search(r'aria-label="[^"]', drawing)


# --- values ---------------------------------------------------------------------------------------


def cross_entropy(scores: np.ndarray) -> float:
    return float(np.mean([-s[i] + np.log(np.exp(s).sum()) for i, s in enumerate(scores)]))


@pytest.mark.parametrize("which", (0, 3))
def test_values_are_those_of_plain_numpy(page, trained, which):
    """L_kg, L_hcl and the first pair's word masks, before training and after it."""
    model = trained if which else first_model(model_config(), 0)
    pairs = small_batch(BookConfig.pair, TrainConfig(min_crop=0.9), len(model.context))
    with torch.no_grad():
        d = model(pairs.batch, logistic_noise(model, pairs.batch, 0, 0))
        written = embed_texts(model.clip, pairs.batch.knowledge_tokens)
    n, written, e_v, e_t, logits = (
        x.double().numpy() for x in (d.n.flatten(0, 1), written, d.e_v, d.e_t, d.word_logits[:, 0])
    )
    squares = [sum((a - b) ** 2 for a, b in zip(*rows)) for rows in zip(n, written)]
    assert numbers(page, "l_kg")[which] == pytest.approx(np.mean(squares), abs=1e-5)

    s = e_v.reshape(16, -1) @ e_t.reshape(16, -1).T * model.logit_scales()["hcl"].item()
    both = (cross_entropy(s) + cross_entropy(s.T)) / 2
    assert numbers(page, "l_hcl")[which] == pytest.approx(both, abs=1e-4)

    for i in range(1, len(pairs.captions[0].split()) + 1):
        first, second = np.exp(logits[1:, i])
        assert numbers(page, f"logit-1-{i}")[which] == pytest.approx(logits[1, i], abs=1e-4)
        want = first / (1 + first + second)
        assert numbers(page, f"mask-0-{i}")[which] == pytest.approx(want, abs=1e-5)


def test_words_of_every_step_follow_from_their_logits(page):
    masks = [numbers(page, f"mask-{j}-3") for j in (0, 1)]
    logits = np.exp([numbers(page, f"logit-{j}-3") for j in (1, 2)])
    assert np.allclose(masks, logits / (1 + logits.sum(0)), atol=1e-6)
    assert len(set(masks[0])) == len(STEPS)
    assert numbers(page, "tau")[1:] == pytest.approx(np.exp([-2 - s / 16 for s in STEPS[1:]]))


@pytest.mark.slow
def test_a_training_starts_from_the_model_of_step_0_and_can_be_shown(tmp_path):
    options = ("--preset", "shapes", "--steps", "1", "--lr", "0", "--batch-size", "4")
    train(*options, "--log-every", "1", "--out", tmp_path)
    content = read_checkpoint(tmp_path / "last.pt")
    first = first_model(model_config(), content["train_config"]["seed"]).learned_state()
    assert all(torch.equal(first[name], value) for name, value in content["model"].items())
    (tmp_path / "step-1.pt").write_bytes((tmp_path / "last.pt").read_bytes())
    assert len(sections(build(observe(tmp_path, 0)))) > 10


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(page, folder):
    (folder / "read.html").write_text(page)
    return folder / "read.html"


@pytest.fixture(scope="module")
def opened(browser, path):
    opened = listened(browser.new_page(viewport={"width": 1400, "height": 1000}))
    opened.goto(path.as_uri())
    opened.wait_for_selector("body[data-ready=yes]", timeout=30_000)
    return opened


@pytest.mark.slow
def test_the_slider_moves_the_figures_through_the_training(opened, page):
    slider, masks = opened.locator("#at"), set()
    for at, step in enumerate(STEPS):
        slider.fill(str(at))
        shown = opened.locator("#region-mask img").filter(visible=True)
        assert shown.count() == 6  # X^v, x^v, and two masks of two nouns
        masks.add(shown.nth(2).get_attribute("src"))
        assert opened.locator(".ticks .now").inner_text() == str(step)
        loss = opened.locator('[data-name="l_hcl"]').filter(visible=True)
        assert float(loss.get_attribute("value")) == numbers(page, "l_hcl")[at]
    assert len(masks) == len(STEPS)
    opened.locator("#play").click()  # from the end it starts anew
    opened.wait_for_selector(':root[data-at="1"]')
    opened.locator("#play").click()
    assert opened.locator("#play").inner_text() == "play"


@pytest.mark.slow
def test_keys_move_it_too(opened):
    opened.locator("#at").fill("3")
    opened.evaluate("document.activeElement.blur()")
    opened.keyboard.press("ArrowLeft")
    opened.keyboard.press("ArrowLeft")
    assert opened.evaluate("document.documentElement.dataset.at") == "1"
    opened.locator(".skip").focus()
    opened.keyboard.press("Tab")
    opened.keyboard.press("Tab")  # "play", then the slider, before the contents and the text
    assert opened.evaluate("document.activeElement.id") == "at"
    opened.keyboard.press("End")
    assert opened.evaluate("document.documentElement.dataset.at") == "3"
    summary = opened.locator("#eq-3-7 summary").nth(1)
    summary.focus()
    opened.keyboard.press("Enter")
    assert opened.locator("#eq-3-7 pre").nth(1).is_visible()


@pytest.mark.slow
def test_nothing_is_said_or_asked_for(opened, path):
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [path.as_uri()]


@pytest.mark.slow
def test_contents_lead_to_sections(opened, page):
    links = opened.locator("nav a").evaluate_all("links => links.map((a) => a.hash.slice(1))")
    assert links == list(sections(page))
    opened.locator("nav a").last.focus()
    bottom = opened.locator("nav a").last.bounding_box()
    assert bottom["y"] + bottom["height"] < opened.locator("#training-slider").bounding_box()["y"]
    opened.locator("nav a[href='#eq-3-4']").click()
    opened.wait_for_selector("nav a[href='#eq-3-4'][aria-current=true]")


@pytest.mark.slow
def test_on_a_phone_in_the_dark(browser, path):
    phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    phone.goto(path.as_uri())
    phone.wait_for_selector("body[data-ready=yes]")
    assert phone.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
    for at in range(len(STEPS)):
        phone.locator("#at").fill(str(at))
        assert phone.evaluate("document.documentElement.scrollWidth") == 390
        beyond = phone.evaluate(
            """() => [...document.querySelectorAll("body *")].filter((e) =>
            e.getBoundingClientRect().right > 391 && !e.closest(".scroll, pre"))
            .map((e) => e.outerHTML.slice(0, 80))"""
        )
        assert beyond == []
        # Words and equations fit; only code is moved sideways.
        assert phone.evaluate(
            """() => [...document.querySelectorAll(".scroll, .equation")]
            .every((e) => e.scrollWidth <= e.clientWidth + 1)"""
        )
    assert not phone.locator("nav ol").is_visible()  # folded, above the text
    phone.close()


@pytest.mark.slow
def test_print_leaves_the_controls_out(opened):
    opened.locator("#at").fill("3")
    opened.emulate_media(media="print")
    for part in ("#training-slider", "nav", ".screen"):
        assert not opened.locator(part).first.is_visible(), part
    assert opened.locator("#eq-3-4 .equation math").is_visible()
    assert opened.locator("#eq-3-4 pre").first.is_visible()
    assert opened.locator("#eq-3-4 .when").inner_text() == "after 8 steps"
    opened.emulate_media(media="screen")
    assert opened.locator("#training-slider").is_visible()
