"""From captions of the web to their nouns, and NLTK's data: missing, damaged, real."""

import json
import pickle
import shutil
from pathlib import Path

import nltk
import pytest
from conftest import ROOT

import data
from config import UserError
from datasets import shapes

SMALL = ROOT / "tests" / "nltk_data"
TAGGER, PUNKT = "taggers/averaged_perceptron_tagger_eng", "tokenizers/punkt_tab"
# NLTK's own data, where a machine has it; that of the tests is far smaller.
REAL = [
    folder
    for folder in (ROOT.parent / "shared" / "nltk_data", *map(Path, nltk.data.path))
    if (folder / PUNKT).is_dir()
    and (weights := folder / TAGGER / "averaged_perceptron_tagger_eng.weights.json").is_file()
    and weights.stat().st_size > 1_000_000
]


@pytest.fixture
def read_from(monkeypatch):
    """Let NLTK look into one folder alone, with nothing of another one kept, and no internet."""
    kept = (nltk.tokenize._get_punkt_tokenizer, nltk.tag._get_tagger)

    def read(folder):
        monkeypatch.setattr(nltk.data, "path", [str(folder)])
        for function in kept:
            function.cache_clear()

    monkeypatch.setattr(nltk, "download", lambda *a, **k: False)
    yield read
    for function in kept:
        function.cache_clear()


@pytest.mark.skipif(not REAL, reason="NLTK's own data is not here")
def test_nouns_are_those_of_the_authors_tools(read_from):
    """Twenty captions, most of them of several sentences."""
    read_from(REAL[0])
    tagger = data.nltk_tagger()
    rows = json.loads((ROOT / "tests" / "golden" / "nouns.json").read_text("utf-8"))["rows"]
    assert len(rows) == 20
    for row in rows:
        theirs = dict.fromkeys(noun.strip(".").lower() for noun in row["tagged_nouns"])
        assert data.select_nouns(row["caption"], tagger) == list(theirs), row["caption"]


def test_every_sentence_gives_its_nouns(read_from):
    read_from(SMALL)
    caption = "a man with a red jacket. Two children on the beach. A boat. Dr. Smith has a dog"
    nouns = data.select_nouns(caption, data.nltk_tagger())
    assert {"man", "jacket", "children", "beach", "boat", "dog"} <= set(nouns)
    words = [word for word, _ in data.tag_english("a man. A boat, by Dr. Smith")]
    assert words == ["a", "man", ".", "A", "boat", ",", "by", "Dr.", "Smith"]


@pytest.mark.parametrize(
    "caption, nouns",
    [
        ("a dog&nbsp;on the beach", ["dog", "beach"]),
        ("a dog&amp;nbsp;on&amp;#160;the beach", ["dog", "beach"]),
        ("a dog &amp; a horse", ["dog", "horse"]),
        ("&quot;a dog&quot; on the beach", ["dog", "beach"]),
        ("&ldquo;dog&rdquo; &mdash; horse &hellip;", ["dog", "horse"]),
        ("the boy&#39;s dog", ["boy", "dog"]),
        ("a\u00a0dog\u2003on\u200bthe\nbeach", ["dog", "beach"]),
        ("a ho\u00adrse on the be&shy;ach", ["horse", "beach"]),
        ("&lt;PERSON&gt; rides a horse", ["person", "horse"]),
    ],
)
def test_entities_and_odd_spaces_are_no_nouns(caption, nouns):
    assert data.select_nouns(caption, tag_words) == nouns


def tag_words(caption: str) -> list[tuple[str, str]]:
    """Every word but the small ones is a noun."""
    others = {"a", "on", "the", "rides", "'s"}
    words = nltk.tokenize.NLTKWordTokenizer().tokenize(caption)
    return [(word, "DT" if word in others else "NN") for word in words]


def test_the_built_in_world_needs_no_data(read_from, tmp_path):
    read_from(tmp_path)
    for i in range(200):
        caption = shapes.scene("val", i).caption
        words = caption.replace(",", "").split()
        named = dict.fromkeys(word for word in words if word in shapes.NOUNS)
        assert data.select_nouns(caption, data.shapes_tagger()) == list(named)
    of_a_user = "A big bug. Kite on the sand. A house."
    nouns = data.select_nouns(of_a_user, data.shapes_tagger())
    assert nouns == ["bug", "kite", "sand", "house"]


@pytest.mark.parametrize("make", [data.shapes_tagger, data.nltk_tagger])
def test_taggers_go_to_workers_that_are_spawned(make):
    tagger = make()
    again = pickle.loads(pickle.dumps(tagger))
    assert again("a bug on the sand") == tagger("a bug on the sand")


# --- NLTK's data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [TAGGER, PUNKT])
def test_missing_data_says_how_to_get_it(left_out, read_from, tmp_path):
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / left_out)
    read_from(tmp_path)
    with pytest.raises(UserError, match=left_out) as said:
        data.nltk_tagger()
    line = str(said.value)
    assert "NLTK_DATA" in line and "\n" not in line
    assert "nltk.downloader punkt_tab averaged_perceptron_tagger_eng`" in line  # both at once


def random_zip(folder):
    shutil.rmtree(folder)
    folder.with_suffix(".zip").write_bytes(bytes(range(256)) * 16)
    return folder.with_suffix(".zip")


def truncated_zip(folder):
    name = shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    shutil.rmtree(folder)
    Path(name).write_bytes(Path(name).read_bytes()[:-300])
    return Path(name)


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


def changed(pattern, content=None):
    """Every file of a pattern with other content, or gone."""

    def change(folder):
        paths = list(folder.rglob(pattern))
        assert paths
        for path in paths:
            path.unlink() if content is None else path.write_bytes(content)
        return folder

    return change


@pytest.mark.parametrize(
    "package, damage",
    [
        (TAGGER, random_zip),
        (TAGGER, truncated_zip),
        (TAGGER, empty_folder),
        (TAGGER, changed("*tagdict.json")),
        (TAGGER, changed("*weights.json", b"")),
        (TAGGER, changed("*weights.json", b"{}")),
        (TAGGER, changed("*weights.json", b"[1, 2]")),
        (TAGGER, changed("*weights.json", b'{"bias": 3}')),
        (TAGGER, changed("*classes.json", b'{"a": ')),
        (TAGGER, changed("*classes.json", b"3")),
        (TAGGER, changed("*tagdict.json", b"\xff\xfe\x00")),
        (TAGGER, changed("*tagdict.json", b"[]")),
        (PUNKT, random_zip),
        (PUNKT, truncated_zip),
        (PUNKT, empty_folder),
        (PUNKT, changed("abbrev_types.txt")),
        (PUNKT, changed("abbrev_types.txt", b"")),
        (PUNKT, changed("abbrev_types.txt", b"\xff\xfe\x00")),
        (PUNKT, changed("ortho_context.tab", b"word\tmany\n")),
        (PUNKT, changed("collocations.tab", b"\x80\x81")),
    ],
)
def test_damaged_data_is_named_in_a_line(package, damage, read_from, tmp_path):
    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    named = damage(tmp_path / package)
    read_from(tmp_path)
    with pytest.raises(UserError, match="cannot be read or is incomplete") as said:
        data.nltk_tagger()
    line = str(said.value)
    assert str(named) in line and "delete it" in line and "\n" not in line
    assert f"nltk.downloader {package.split('/')[1]}`" in line
    # Also where the other package is missing and cannot be fetched.
    other = PUNKT if package == TAGGER else TAGGER
    shutil.rmtree(tmp_path / other)
    with pytest.raises(UserError, match="cannot be read or is incomplete"):
        data.nltk_tagger()
    shutil.copytree(SMALL / other, tmp_path / other)
    # Deleted, it is fetched anew.
    shutil.rmtree(named) if named.is_dir() else named.unlink()
    with pytest.raises(UserError, match="missing and could not be fetched"):
        data.nltk_tagger()


def test_data_that_cannot_be_read_says_why(read_from, tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied", "weights.json")

    shutil.copytree(SMALL, tmp_path, dirs_exist_ok=True)
    read_from(tmp_path)
    monkeypatch.setattr(nltk, "pos_tag", denied)
    with pytest.raises(UserError, match=r"incomplete \(Permission denied\): delete it"):
        data.nltk_tagger()


def test_data_as_a_zip_is_read(read_from, tmp_path):
    """As NLTK's own downloader leaves Punkt's on some machines."""
    for package in (TAGGER, PUNKT):
        source = SMALL / package
        shutil.make_archive(str(tmp_path / package), "zip", source.parent, source.name)
    read_from(tmp_path)
    assert "dog" in data.select_nouns("a dog on the beach", data.nltk_tagger())
