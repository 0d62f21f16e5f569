"""Build docs/read.html: chapter 3 of the thesis with its equations, the code that does them, and
what that code does to one pair of the shapes world.

    python -m experiments.read                  # or `make read`; shows the demonstration's training
    python -m experiments.read --keep-figures   # text and code anew, the figures as they are

It takes the snapshots that `make demo` leaves in out/demo; without them it trains first. The words
and equations stand in read.html, functions are taken from the sources as they stand.
"""

import inspect
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from checkpoints.ours import read_checkpoint
from config import (
    MASK_PRESETS,
    TRAIN_PRESETS,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    option,
    parse,
    run,
)
from datasets.protocols import completed
from experiments import read_figures as drawn
from experiments import read_results as results
from experiments.demo import snapshot_steps, train_with_snapshots
from experiments.read_draw import at, readable
from experiments.read_pair import ROOT, branches, find, large_scene, models, observe, small_batch
from support.files import save_text

# What each place of the page shows: the functions that do it, the first one open.
CODE = {
    "nouns": ("data.select_nouns", "data.PairStream.prepare"),
    "image-segmenter": (
        "model.ImageSegmenter",
        "model.UpsamplingBlock",
        "model.upsample_and_convolve",
        "dense.maskclip",
    ),
    "region-mask": ("model.hard_mask", "train.logistic_noise"),
    "seg-v": (
        "losses.region_cosines",
        "losses.area_losses",
        "losses.total_variation",
        "losses.region_statistics",
    ),
    "eq-3-1": ("losses.knowledge_loss", "model.CoDe.noun_embedding", "clip.noun_prompts"),
    "eq-3-2": ("model.TextSegmenter", "model.CoDe.word_features"),
    "eq-3-3": ("model.word_mask",),
    "seg-t": (
        "losses.pseudo_labels",
        "losses.word_statistics",
        "losses.word_mask_loss",
        "data.released_labels",
    ),
    "eq-3-4": ("model.highlight_image",),
    "eq-3-5": ("model.highlight_text",),
    "eq-3-6": ("model.CoDe.forward", "clip.image_embedding", "clip.text_embedding"),
    "eq-3-7": ("losses.info_nce", "losses.symmetric_cross_entropy"),
    "eq-3-8": ("losses.code_losses", "train.global_losses"),
    "training": ("train.learning_rate", "train.make_optimizer", "train.train"),
    "windows": ("segmenter.Segmenter.scores", "segmenter.window_starts"),
    "branches": (
        "segmenter.Segmenter.masks",
        "dense.word_similarity",
        "clip.template_embedding",
    ),
    "refinement": ("pamr.pamr", "pamr.affinity", "pamr.neighbours"),
    "background": (
        "segmenter.with_background",
        "datasets.protocols.completed",
        "segmenter.arg_max",
        "evaluate.IoU",
    ),
}
SHAPES = TRAIN_PRESETS["shapes"] | MASK_PRESETS["shapes"]
SETTINGS = {  # what <!--set NAME.FIELD--> reads
    "train": vars(TrainConfig()),
    "model": vars(ModelConfig()),
    "loss": vars(LossConfig()),
    "mask": vars(completed(MaskConfig())),
    "unrefined": vars(completed(MaskConfig(pamr=False))),
    "shapes": SHAPES,
}
TEMPLATE = Path(__file__).with_name("read.html")
FIGURE = r"<!--figure ([\w-]+)-->"


@dataclass
class ReadConfig:
    """The page."""

    demo: str = option("out/demo", "folder of the demonstration whose training is shown")
    out: str = option("docs/read.html", "the page to write")
    pair: int = option(15, "held-out scene that the page follows", low=0, high=499)
    surface: str = option("grass", "what the large scene of section 4.1 stands on")
    keep_figures: bool = option(
        False, "take the figures from the page as it is: text and code only"
    )


# --- code and lines -------------------------------------------------------------------------------


def source(name: str) -> tuple[str, int, str]:
    """File, first line and source text of "module.name" or "module.Class.name", as they stand."""
    found = inspect.unwrap(find(name)[2])
    lines, start = inspect.getsourcelines(found)
    return str(Path(inspect.getsourcefile(found)).relative_to(ROOT)), start, "".join(lines)


def code_block(name: str, shown: bool) -> str:
    """A function with its file and line; lines that name an equation are marked."""
    file, start, text = source(name)
    coloured = highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    lines = []
    for plain, line in zip(text.splitlines(), coloured.splitlines()):
        mark = " eq" if "Eq." in plain else ""
        lines.append(f'<span class="line{mark}">{line}\n</span>')
    short = name.split(".", 1)[1]
    return (
        f'<details class="code" data-object="{name}" data-file="{file}" data-line="{start}"'
        f"{' open' if shown else ''}><summary><code>{short}</code>"
        f"<span>{file}:{start}</span></summary>"
        f'<pre role="group" aria-label="{short}" style="counter-reset: line {start - 1}">'
        f"<code>{''.join(lines)}</code></pre></details>"
    )


def place(name: str, text: str | None) -> str:
    """FILE:LINE of a function, or of the first line in it that holds a text."""
    file, start, code = source(name)
    if text is not None:
        lines = [i for i, line in enumerate(code.splitlines()) if text in line]
        if not lines:
            raise UserError(f"read.html: no line of {name} holds {text!r}")
        start += lines[0]
    return f"<code>{file}:{start}</code>"


def setting(value: Any) -> str:
    """A setting as a reader writes it: 50,000, 5 × 10⁻⁶, 1 2 4."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(setting, value))
    if isinstance(value, str):
        return f"“{value}”"
    return readable(value)


def preset_table() -> str:
    """The options that the shapes world sets otherwise, with their defaults."""
    head = "".join(f"<th scope=col>{title}</th>" for title in ("", "default", "shapes world"))
    rows = [f"<tr>{head}</tr>"]
    configs = (TrainConfig(), ModelConfig(), LossConfig(), completed(MaskConfig()))
    for config in configs:
        for name in (f.name for f in fields(config) if f.name in SHAPES):
            cells = [setting(v) for v in (getattr(config, name), SHAPES[name])]
            kind = type(config).__name__
            if (kind, name) != ("MaskConfig", "clip"):  # ModelConfig's
                title = f"<th scope=row><code>{kind}.{name}</code></th>"
                rows.append(f"<tr>{title}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f'<table class="settings">{"".join(rows)}</table>'


# --- the page -------------------------------------------------------------------------------------


def contents(page: str) -> str:
    """The table of contents: every section with a data-toc, the chapters' ones outdented."""
    entries = re.findall(r'<section id="([\w-]+)" class="(\w+)" data-toc="([^"]+)"', page)
    return "".join(
        f'<li class="{kind}"><a href="#{anchor}">{title}</a></li>'
        for anchor, kind, title in entries
    )


def symbols(text: str) -> str:
    """$X^v_k$ and the like as MathML: letters with super- and subscripts, and operators."""

    def part(token: str) -> str:
        base, marks = re.match(r"[^^_]+", token)[0], dict(re.findall(r"([_^])(\{.*?\}|.)", token))
        if re.fullmatch(r"[=·×∗]", base):
            return f"<mo>{base}</mo>"
        found = [
            f"<mi>{base}</mi>",
            *(f"<mi>{marks[m].strip('{}')}</mi>" for m in "_^" if m in marks),
        ]
        kind = {"": "mrow", "_": "msub", "^": "msup", "^_": "msubsup"}["".join(sorted(marks))]
        return f"<{kind}>{''.join(found)}</{kind}>"

    def formula(match: re.Match) -> str:
        return f"<math>{''.join(map(part, match[1].split()))}</math>"

    return re.sub(r"\$([^$\n]+)\$", formula, text)


def fill(template: str, figures: dict[str, str]) -> str:
    """The template with its styles, script, code, lines, figures and contents."""

    def figure(match: re.Match) -> str:
        if match[1] not in figures:
            raise UserError(f"no figure {match[1]!r}: build the page without --keep-figures")
        return f"{match[0]}{figures[match[1]]}<!--/figure-->"

    blocks = {
        key: "".join(code_block(name, i == 0) for i, name in enumerate(names))
        for key, names in CODE.items()
    }
    page = symbols(template)
    for kind in ("css", "js"):
        page = page.replace(f"/*{kind}*/", TEMPLATE.with_suffix(f".{kind}").read_text())
    page = re.sub(r"<!--code ([\w-]+)-->", lambda m: blocks[m[1]], page)
    page = re.sub(r'<!--line ([\w.]+)(?: "(.+?)")?-->', lambda m: place(m[1], m[2]), page)
    page = re.sub(r"<!--set (\w+)\.(\w+)-->", lambda m: setting(SETTINGS[m[1]][m[2]]), page)
    page = page.replace("<!--presets-->", preset_table())
    page = page.replace("<!--contents-->", contents(page))
    return re.sub(FIGURE, figure, page)


def kept_figures(page: Path) -> dict[str, str]:
    """The figures of a page that exists."""
    if not page.exists():
        raise UserError(f"--keep-figures: {page} does not exist")
    return dict(re.findall(FIGURE + r"(.*?)<!--/figure-->", page.read_text(), re.DOTALL))


def new_figures(config: ReadConfig) -> dict[str, str]:
    """Every figure, from the snapshots of a training on the shapes world."""
    demo = Path(config.demo)
    if not (demo / "last.pt").exists() or len(list(demo.glob("snapshots/*.pt"))) < 3:
        print(f"no snapshots in {demo}: training first", flush=True)
        train_with_snapshots(demo, None)
    content = read_checkpoint(demo / "last.pt")
    training, losses = TrainConfig(**content["train_config"]), LossConfig(**content["loss_config"])
    steps = [0, *snapshot_steps(training.steps), training.steps]
    trained = models(demo, steps)
    pairs = small_batch(config.pair, training, len(trained[0].context))
    seen = [observe(model, pairs, training, losses) for model in trained]
    large = large_scene(config.surface)
    found = [branches(model, large) for model in trained]
    log = [json.loads(line) for line in (demo / "log.jsonl").read_text().splitlines()]
    figures = {
        "ticks": "".join(f"<span>{step}</span>" for step in steps),
        "pair": drawn.the_pair(pairs),
        "pipeline": drawn.pipeline(pairs, seen),
        "eq-3-1": drawn.knowledge(pairs, seen),
        "image-segmenter": drawn.features(pairs, seen),
        "region-mask": drawn.masks(pairs, seen),
        "seg-v": drawn.seg_v(pairs, seen, losses.area_prior),
        "eq-3-2": drawn.logits(pairs, seen),
        "eq-3-3": drawn.word_masks(pairs, seen),
        "seg-t": drawn.labels(pairs, seen),
        "eq-3-4": drawn.highlighted_image(pairs, seen),
        "eq-3-5": drawn.highlighted_text(pairs, seen),
        "eq-3-6": results.embeddings(pairs, seen),
        "eq-3-7": results.similarities(pairs, seen, steps),
        "eq-3-8": results.loss_bars(log, steps),
        "training": results.schedule(TrainConfig()),
        "windows": results.windows(large),
        "branches": results.branch_masks(large, found),
        "background": results.threshold(large, found),
    }
    when = at([f"after {step} steps" if step else "before training" for step in steps])
    moving = {key for key, figure in figures.items() if 'class="at' in figure}
    label = f'<p class="when">{when}</p>'
    return {key: label * (key in moving) + figure for key, figure in figures.items()}


def main() -> None:
    (config,) = parse(__doc__, ReadConfig)
    out = Path(config.out)
    figures = kept_figures(out) if config.keep_figures else new_figures(config)
    page = fill(TEMPLATE.read_text(), figures)
    save_text(page.rstrip("\n"), out)
    print(f"{out}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
