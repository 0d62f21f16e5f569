"""Webdataset shards: every good sample arrives, every damage is counted under its cause."""

import collections
import io
import itertools
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from config import UserError
from data import BadSample, Shards, expand_braces, index_shard


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
    monkeypatch.setattr(data, "index_shard", lambda path: opened.append(path) or index_shard(path))
    offset, _ = every[12]  # in the third of this reader's four shards
    assert list(shards.order(3, 1, 0, 2, offset))[:2] == every[13:15]
    going_on = shards.order(3, 1, 0, 2, offset)
    opened.clear()
    next(going_on)
    assert opened == [every[12][1].path]


def test_patterns(tmp_path):
    assert expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand_braces("{0..1}/{2..3}") == ["0/2", "0/3", "1/2", "1/3"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    assert expand_braces("{b,a}{1,2}") == ["b1", "b2", "a1", "a2"]
    assert expand_braces("{a,b{2..0}}/x") == ["a/x", "b2/x", "b1/x", "b0/x"]
    with pytest.raises(UserError, match=r"looked for --shards nowhere/\{0\.\.3\}\.tar"):
        Shards(["nowhere/{0..3}.tar"])


def test_shards_are_found_as_they_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    files = ("d [v1]/0.tar", "d [v1]/1.tar", "a/b/0.tar", "c/b/0.tar", "c/b/1.tar", "c/b/1.txt",
             "home/0.tar", "{x,y}/{0..1}.tar", "__MACOSX/a/0.tar", "a/b/._0.tar")  # fmt: skip
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / name, good("a"))

    def found(*patterns: str) -> list[str]:
        return [os.path.relpath(path) for path in Shards(patterns).paths]

    assert found("d [v1]/0.tar") == ["d [v1]/0.tar"]  # it exists: no glob
    assert found("d [v1]/*.tar") == found("d [v1]") == ["d [v1]/0.tar", "d [v1]/1.tar"]
    assert found("d [v1]/{0..1}.tar") == found(str(tmp_path / "d [v1]" / "[01].tar"))
    assert found("{x,y}/{0..1}.tar") == ["{x,y}/{0..1}.tar"]
    assert found("{a,c}/b/*.tar") == ["a/b/0.tar", "c/b/0.tar", "c/b/1.tar"]
    assert found("{a,c}/b") == found("*/b") == found("{a,c}/**/*.tar") == found("{a,c}/b/*.tar")
    assert found("c/**/0.tar", "a/b") == ["c/b/0.tar", "a/b/0.tar"]
    assert "__MACOSX/a/0.tar" not in found("**/0.tar") and len(found("**/0.tar")) == 4
    assert found("~/0.tar") == found("~/*.tar") == ["home/0.tar"]


def test_shards_that_are_missing_are_counted_with_a_reason(tmp_path):
    write_tar(tmp_path / "0.tar", good("a"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    shards = Shards([f"{tmp_path}/{{0..3}}.tar", f"{tmp_path}/empty"])
    first = f"{tmp_path}/1.tar: no such file"
    assert shards.found == ["1 shard", f"4 of the named ones missing ({first})"]
    for pattern, why in (
        ("empty", "empty: a folder without .tar files"),
        ("*.zip", "nothing of that name"),
        ("0.tar/1.tar", "0.tar is no folder"),
        ("long" * 2000, "no such file"),
    ):
        with pytest.raises(UserError, match=f"looked for --shards .*; .*{why}"):
            Shards([f"{tmp_path}/{pattern}"])


def members_of(key: str, image: str = "jpg", text: str = "txt") -> list[tuple[str, bytes]]:
    return [(f"{key}.{image}", jpeg()), (f"{key}.{text}", f"kite ball {key}".encode())]


def read(path: Path) -> tuple[list[str], dict]:
    captions, causes = read_all(Shards([str(path)]))
    return sorted(caption.removeprefix("kite ball ") for caption in captions), dict(causes)


def test_what_systems_add_to_a_tar_is_no_data(tmp_path):
    members = [m for key in "abc" for m in [*members_of(f"./._{key}"), *members_of(f"./{key}")]]
    members += members_of("__MACOSX/x/a")
    assert read(write_tar(tmp_path / "0.tar", members)) == (["./a", "./b", "./c"], {})


def test_keys_with_dots(tmp_path):
    keys = ["000", "v1.0 001", "002", "v1.0 003", "v1.0 004", "a.b/c", "a.b/d.e"]
    members = [m for key in keys for m in members_of(key)]
    assert read(write_tar(tmp_path / "0.tar", members)) == (sorted(keys), {})
    # Further members of a sample are none of their own; half a sample is counted.
    more = [("x.jpg", jpeg()), ("x.mask.png", jpeg(kind="PNG")), ("x.txt", b"kite ball x")]
    more += [("y.input.jpg", jpeg()), ("y.output.txt", b"kite"), ("v1.0 005.jpg", jpeg())]
    causes = {"image without caption": 2, "caption without image": 1}
    assert read(write_tar(tmp_path / "0.tar", more)) == (["x"], causes)


def test_a_key_that_comes_twice_is_two_samples(tmp_path):
    members = [*members_of("a"), *members_of("a"), ("b.jpg", jpeg()), *members_of("b")]
    captions, causes = read(write_tar(tmp_path / "0.tar", [*members, *members_of("a")]))
    assert captions == ["a", "a", "a", "b"] and causes == {"image without caption": 1}


def test_unsorted_members(tmp_path):
    members = [m for key in "abcd" for m in members_of(key)]
    unsorted = members[::2] + members[1::2]
    assert read(write_tar(tmp_path / "0.tar", unsorted)) == (list("abcd"), {})
    with tarfile.open(tmp_path / "0.tar") as tar:
        third = tar.getmember("c.txt").offset
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: third + 100])
    causes = {"damaged shard": 1, "image without caption": 2}
    assert read(tmp_path / "0.tar") == (["a", "b"], causes)


def test_tars_one_after_another(tmp_path):
    parts = [write_tar(tmp_path / f"{i}.tar", good(key)) for i, key in enumerate("abc")]
    content = b"".join(part.read_bytes() for part in parts)
    path = tmp_path / "catted.tar"
    path.write_bytes(content)
    assert read(path) == (list("abc"), {})
    path.write_bytes(content + bytes(1_000_000))
    assert read(path) == (list("abc"), {})
    path.write_bytes(content + b"no tar at all" * 100)
    assert read(path) == (list("abc"), {"damaged shard": 1})
    # Half a sample does not find the other half in another tar.
    halves = [
        write_tar(tmp_path / f"{i}.tar", [member]) for i, member in enumerate(members_of("a"))
    ]
    path.write_bytes(b"".join(half.read_bytes() for half in halves))
    assert read(path) == ([], {"image without caption": 1, "caption without image": 1})


def test_links_in_a_tar(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, target, kind in (
            ("./x/0.jpg", None, None),
            ("./x/0.txt", None, None),
            ("./x/1.jpg", None, None),
            ("./x/1.txt", "./x/0.txt", tarfile.LNKTYPE),
            ("./x/2.jpg", "../later/2.jpg", tarfile.SYMTYPE),
            ("./x/2.txt", "1.txt", tarfile.SYMTYPE),
            ("./x/3.jpg", None, None),
            ("./x/3.txt", "../elsewhere.txt", tarfile.SYMTYPE),
            ("./x/4.jpg", None, None),
            ("./x/4.txt", "4.txt", tarfile.SYMTYPE),  # to itself
            ("later/2.jpg", None, None),
            ("later/2.txt", None, None),
        ):
            info = tarfile.TarInfo(name)
            content = jpeg() if name.endswith("jpg") else f"kite ball {name}".encode()
            if kind:
                info.type, info.linkname = kind, target
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    captions = ["./x/0.txt"] * 3 + ["later/2.txt"]
    assert read(path) == (captions, {"link to a file that is not in the shard": 2})


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_shards_are_called_so(kind, tmp_path):
    path = tmp_path / f"0.tar.{kind}"
    with tarfile.open(path, f"w:{kind}") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    captions, causes = read(path)
    assert not captions and [*causes.values()] == [1]
    assert re.match("compressed shard: unpack it", *causes)
    # A name that begins like such a file makes no compressed one.
    members = [*members_of("BZh"), *members_of("PK\x03\x04")]
    assert len(read(write_tar(tmp_path / "1.tar", members))[0]) == 2


@pytest.mark.parametrize("size", [-1, -512, -(2**40), 2**40, 2**62, 2**63, 2**90])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, b"Z"])
def test_impossible_sizes_in_a_header(kind, size, tmp_path):
    header = bytearray(tarfile.TarInfo("b.jpg").tobuf(tarfile.GNU_FORMAT))
    number = size.to_bytes(12, "big", signed=True)
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + number[1:]  # GNU's base 256
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = write_tar(tmp_path / "0.tar", good("a"))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmember("a.txt").offset_data + 512
    path.write_bytes(content[:end] + header + jpeg().ljust(1024, b"\0") + bytes(1024))
    assert read(path) == (["a"], {"damaged shard": 1})


def test_sizes_in_pax_headers(tmp_path):
    for size in ("-5", "99999999999999999999", "many"):
        with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in good("a"):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            info = tarfile.TarInfo("b.jpg")
            info.pax_headers = {"size": size}
            tar.addfile(info)
        captions, causes = read(tmp_path / "0.tar")
        assert captions == ["a"] and causes, size


def test_a_shard_without_pairs_or_that_cannot_be_opened(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "0.tar", [("a.npy", b"x"), ("a.caption", b"kite ball")])
    assert read(path) == ([], {"shard without images and captions": 1})
    shards = Shards([str(path)])
    path.unlink()
    reason = "unreadable shard: no such file or directory"
    assert read_all(shards) == ([], {reason: 1})
    write_tar(path, good("a"))
    (item,) = index_shard(str(path))
    path.unlink()
    with pytest.raises(BadSample, match="shard: no such file or directory"):
        shards.read(item, None)


def test_the_index_of_a_shard_stays_the_same(tmp_path):
    """A checkpoint goes on at an offset: samples, bad ones too, keep their places in the order."""
    members = [*good("a"), ("b.jpg", jpeg()), ("b.mask.png", b""), ("c.txt", b"kite"), *good("d")]
    members += [("e.png", jpeg(kind="PNG")), ("e.jpg", jpeg()), ("e.txt", b"kite"), ("f.json", b"")]
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path) as tar:
        at = {member.name: member.offset_data for member in tar}
    found = [item if isinstance(item, BadSample) else item.image[0] for item in index_shard(path)]
    assert found[::3] == [at["a.jpg"], at["d.jpg"]] and found[4:] == [at["e.jpg"]]
    assert [str(bad) for bad in found[1:3]] == ["image without caption", "caption without image"]


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
