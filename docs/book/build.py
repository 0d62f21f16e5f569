"""Build docs/read.html: chapter 3 of the thesis with its equations, the code that does them, and
what that code does to one pair of the shapes world while training goes on.

    python -m docs.book.build        # or `make read`; shows the training of `make model`

Each section of the thesis has two files here, its prose (NAME.html, equations in LaTeX) and its
figures (NAME.py, of the `Decomposition`s that `observe.py` keeps); page.* is what stands around
them.
"""

import html
import importlib
import inspect
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from latex2mathml.converter import convert
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from config import option, parse, run_script
from docs.book import alignment, highlighting, overview, segmentation
from docs.book.draw import at
from docs.book.observe import Observations, observe
from support.files import save_text

SECTIONS = (overview, segmentation, highlighting, alignment)  # 3.1 to 3.4
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass
class BookConfig:
    """The page."""

    run: str = option(
        "out/shapes_model", "folder of the training that is shown, with its step-N.pt"
    )
    out: str = option("docs/read.html", "the page to write")
    pair: int = option(15, "held-out scene that the page follows", low=0, high=499)


def code_block(name: str, is_open: bool = True) -> str:
    """The source of "module.name" or "module.Class.name"; a line with an equation is marked."""
    module, *path = name.split(".")
    found = importlib.import_module(module)
    for part in path:
        found = getattr(found, part)
    found = inspect.unwrap(found)
    text = textwrap.dedent(inspect.getsource(found))
    coloured = highlight(text, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    lines = "".join(
        f'<span class="line{" eq" if "Eq." in plain else ""}">{line}\n</span>'
        for plain, line in zip(text.splitlines(), coloured.splitlines())
    )
    file, short = Path(inspect.getsourcefile(found)).relative_to(ROOT), ".".join(path)
    return (
        f'<details class="code" data-object="{name}"{" open" if is_open else ""}>'
        f"<summary><code>{short}</code><span>{file}</span></summary>"
        f'<pre role="group" aria-label="{short}"><code>{lines}</code></pre></details>'
    )


def code_blocks(names: str) -> str:
    """Several of them, the first one open."""
    return "".join(code_block(name, i == 0) for i, name in enumerate(names.split()))


def formula(latex: str, display: str = "inline") -> str:
    return convert(html.unescape(latex), display=display)


def equation(match: re.Match) -> str:
    """A block between $$: one line of mathematics a line of text, with or without a number."""
    number, lines = match[1], match[2].strip().splitlines()
    anchor = f"eq-{number.replace('.', '-')}" if number else ""
    link = f'<a class="number" href="#{anchor}" aria-label="Equation {number}">({number})</a>'
    maths = "".join(formula(line, "block") for line in lines)
    return f'<div class="equation">{maths}{link if number else ""}</div>'


def figure(name: str, figures: dict[str, str]) -> str:
    """A figure; one that changes with the steps says which step it shows."""
    moving = 'class="at ' in figures[name]
    return f"{figures['when'] if moving else ''}{figures[name]}"


def contents(page: str) -> str:
    """The table of contents: every section with a data-toc."""
    entries = re.findall(r'<section id="([\w-]+)" class="(\w+)" data-toc="([^"]+)"', page)
    return "".join(f'<li class="{k}"><a href="#{a}">{title}</a></li>' for a, k, title in entries)


def build(seen: Observations) -> str:
    """The whole page."""
    steps = [o.step for o in seen]
    figures = {"when": f'<p class="when">{at([after(step) for step in steps])}</p>'}
    for section in SECTIONS:
        figures |= section.figures(seen)
    prose = [Path(section.__file__).with_suffix(".html").read_text("utf-8") for section in SECTIONS]

    page = (HERE / "page.html").read_text("utf-8").replace("<!--sections-->", "\n".join(prose))
    page = re.sub(r"^\$\$ ?([\d.]*)\n(.*?)^\$\$$", equation, page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"\$([^$]+)\$", lambda m: formula(m[1]), page)
    page = re.sub(r"<!--code (.+?)-->", lambda m: code_blocks(m[1]), page, flags=re.DOTALL)
    page = re.sub(r"<!--figure ([\w-]+)-->", lambda m: figure(m[1], figures), page)
    page = page.replace("<!--contents-->", contents(page))
    page = page.replace("<!--ticks-->", "".join(f"<span>{step}</span>" for step in steps))
    page = page.replace("<!--last-->", str(len(steps) - 1))
    shown = [
        f'[data-at="{i}"] .at-{i} {{ display: contents; }}\n[data-at="{i}"] g.at-{i} '
        "{ display: inline; }"
        for i in range(len(steps))
    ]
    style = (HERE / "page.css").read_text("utf-8") + "\n".join(shown)
    page = page.replace("/*css*/", style)
    return page.replace("/*js*/", (HERE / "page.js").read_text("utf-8"))


def after(step: int) -> str:
    return f"after {step} steps" if step else "before training"


def main() -> None:
    (config,) = parse(__doc__, BookConfig)
    page = build(observe(Path(config.run), config.pair))
    save_text(page.rstrip("\n"), Path(config.out))
    print(f"{config.out}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    run_script(main)
