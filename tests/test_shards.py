"""Webdataset shards: every good sample arrives, every damage is counted under its cause."""

import collections
import io
import itertools
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import sources
from config import UserError
from sources import BadSample, Shards, expand_braces, index_shard


def jpeg(size=(40, 30), kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def good(key: str) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.jpg", jpeg()),
        (f"{key}.json", b"{}"),
        (f"{key}.txt", f"kite ball {key}".encode()),
    ]


def read_all(
    source: Shards, readers: int = 1, reader: int = 0
) -> tuple[list[str], collections.Counter]:
    captions, causes = [], collections.Counter()
    for _, item in source.order(0, 0, reader, readers, source.START):
        try:
            if isinstance(item, BadSample):
                raise item
            image, caption = source.read(item, None)
            assert image.mode == "RGB"
            captions.append(caption)
        except BadSample as cause:
            causes[str(cause)] += 1
    return captions, causes


DAMAGES = {
    "corrupt image": [("b.jpg", jpeg()[:200]), ("b.txt", b"kite and ball")],
    "not an image": [("b.jpg", b"no picture at all"), ("b.txt", b"kite and ball")],
    "image too small": [("b.png", jpeg((1, 1), "PNG")), ("b.txt", b"kite and ball")],
    "image too large": [("b.png", jpeg((20_000, 20_000), "PNG")), ("b.txt", b"kite and ball")],
    "caption empty": [("b.jpg", jpeg()), ("b.txt", b"  \n")],
    "caption too long": [("b.jpg", jpeg()), ("b.txt", b"kite " * 9000)],
    "caption not UTF-8": [("b.jpg", jpeg()), ("b.txt", b"caf\xe9 and ball")],
    "image without caption": [("b.jpg", jpeg()), ("b.json", b"{}")],
    "caption without image": [("b.txt", b"kite and ball")],
}


@pytest.mark.parametrize("cause", DAMAGES)
def test_a_bad_sample_between_good_ones(cause, tmp_path):
    write_tar(tmp_path / "0.tar", [*good("a"), *DAMAGES[cause], *good("c")])
    captions, causes = read_all(Shards([str(tmp_path / "0.tar")]))
    assert sorted(captions) == ["kite ball a", "kite ball c"]
    assert causes == {cause: 1}


@pytest.mark.parametrize(
    "cut",
    [
        "inside the last picture",
        "inside the last header",
        "a header overwritten",
        "no tar at all",
        "empty file",
    ],
)
def test_a_damaged_tar_gives_what_is_before_the_damage(cut, tmp_path):
    path = write_tar(tmp_path / "0.tar", [*good("a"), *good("b")])
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        last = [member for member in tar if member.name == "b.jpg"][0]
    if cut == "inside the last picture":
        content = content[: last.offset_data + 100]
    elif cut == "inside the last header":
        content = content[: last.offset + 100]
    elif cut == "a header overwritten":
        content = content[: last.offset] + b"\xff" * 512 + content[last.offset + 512 :]
    else:
        content = b"" if cut == "empty file" else b"hello " * 500
    path.write_bytes(content)
    write_tar(tmp_path / "1.tar", good("z"))
    captions, found = read_all(Shards([str(tmp_path / "*.tar")]))
    before = [] if cut in ("no tar at all", "empty file") else ["kite ball a"]
    assert sorted(captions) == [*before, "kite ball z"]
    assert found == {"damaged shard": 1}


def test_too_few_nouns_are_counted_by_the_stream(tmp_path):
    write_tar(tmp_path / "0.tar", [*good("a"), ("b.jpg", jpeg()), ("b.txt", b"red"), *good("c")])
    shards = Shards([str(tmp_path / "0.tar")])
    stream = data.PairStream(shards, data.shapes_tagger(), 2, 2, 4, 32, 0.9, 0)
    batches = list(itertools.islice(iter(stream), 4))  # four passes, all but the end of the last
    skipped = sum((batch.skipped for batch in batches), collections.Counter())
    assert skipped.keys() == {"fewer than 2 nouns"} and 3 <= skipped.total() <= 4


@pytest.mark.parametrize("shards, readers", [(8, 1), (8, 3), (8, 8), (2, 5), (1, 4)])
def test_every_sample_is_read_by_one_reader_once(shards, readers, tmp_path):
    for i in range(shards):
        write_tar(tmp_path / f"{i:03d}.tar", [m for j in range(5) for m in good(f"{i}-{j}")])
    source = Shards([str(tmp_path / f"{{000..{shards - 1:03d}}}.tar")])
    read = [read_all(source, readers, reader)[0] for reader in range(readers)]
    together = sorted(itertools.chain(*read))
    assert together == sorted(f"kite ball {i}-{j}" for i in range(shards) for j in range(5))


def test_epochs_differ_and_a_seed_repeats_them(tmp_path):
    write_tar(tmp_path / "0.tar", [m for j in range(50) for m in good(str(j))])
    source = Shards([str(tmp_path / "0.tar")])
    orders = [
        [item.image for _, item in source.order(seed, epoch, 0, 1, source.START)]
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] == orders[1] and orders[0] != orders[2] and orders[0] != orders[3]
    assert sorted(orders[0]) == sorted(orders[2]) and orders[0] != sorted(orders[0])


def test_a_stream_of_shards_goes_on_inside_an_epoch(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", [m for j in range(9) for m in good(f"{i}-{j}")])
    make = lambda **more: iter(  # noqa: E731
        data.PairStream(
            Shards([str(tmp_path / "*.tar")]), data.shapes_tagger(), 4, 2, 4, 32, 0.9, 0, **more
        )
    )
    whole = list(itertools.islice(make(), 9))
    reader, *offset = whole[3].position
    rest = list(itertools.islice(make(start={reader: tuple(offset)}), 5))
    for a, b in zip(whole[4:], rest):
        assert np.array_equal(a.images, b.images) and np.array_equal(a.noun_tokens, b.noun_tokens)


def test_going_on_reads_one_shard_again(tmp_path, monkeypatch):
    """Whatever lies before: an offset names the shard, so none of the others is opened."""
    for i in range(8):
        write_tar(tmp_path / f"{i}.tar", [m for j in range(5) for m in good(f"{i}-{j}")])
    shards = Shards([str(tmp_path / "*.tar")])
    every = list(shards.order(3, 1, 0, 2, shards.START))
    assert len(every) == 4 * 5
    opened = []
    monkeypatch.setattr(
        sources, "index_shard", lambda path: opened.append(path) or index_shard(path)
    )
    offset, _ = every[12]  # in the third of this reader's four shards
    assert list(shards.order(3, 1, 0, 2, offset))[:2] == every[13:15]
    going_on = shards.order(3, 1, 0, 2, offset)
    opened.clear()
    next(going_on)
    assert opened == [every[12][1].path]
    # An earlier version counted samples: the epoch is read again.
    assert next(shards.order(3, 1, 0, 2, (12,))) == every[0]


def test_patterns(tmp_path):
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{0..1}/{2..3}") == ["0/2", "0/3", "1/2", "1/3"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    with pytest.raises(UserError, match=r"looked for --shards nowhere/\{0\.\.3\}\.tar"):
        Shards(["nowhere/{0..3}.tar"])


def test_members_in_folders_and_capitals_and_dots(tmp_path):
    members = [
        ("./x/a.JPG", jpeg()),
        ("./x/a.txt", b"one"),
        ("./y/a.txt", b"two"),
        ("./y/a.png", jpeg(kind="PNG")),
    ]
    write_tar(tmp_path / "0.tar", members)
    captions, causes = read_all(Shards([str(tmp_path / "0.tar")]))
    assert sorted(captions) == ["one", "two"] and not causes


def test_an_index_holds_no_pictures(tmp_path):
    path = write_tar(tmp_path / "0.tar", good("a"))
    (item,) = index_shard(str(path))
    assert item.path == str(path) and item.image[1] == len(jpeg())
