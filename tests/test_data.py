"""Noun selection, reading pairs, and the order of the stream."""

import collections
import pickle
import re

import numpy as np
import pytest
import torch
from PIL import Image

import data
from clip import tokenize
from config import UserError
from datasets import shapes


@pytest.fixture(scope="module")
def ordinary_tagger():
    return data.nltk_tagger()


# --- nouns ----------------------------------------------------------------------------------------


def tagged(*pairs):
    return lambda words: list(pairs)


def test_nouns_are_the_four_noun_tags_in_order_without_repeats():
    tagger = tagged(
        ("Dogs", "NNS"), ("run", "VB"), ("Paris", "NNP"), ("big", "JJ"), ("dogs", "NNS"),
        ("Alps", "NNPS"), ("tree.", "NN"), ("x", "NN"), ("3", "NN"), ("...", "NN"),
    )  # fmt: skip
    assert data.select_nouns("whatever", tagger) == ["dogs", "paris", "alps", "tree"]


def test_ordinary_nouns(ordinary_tagger):
    caption = "A man in a red jacket is riding a horse on the beach. The dog's ball is near."
    nouns = data.select_nouns(caption, ordinary_tagger)
    assert {"man", "jacket", "horse", "beach", "dog", "ball"} <= set(nouns)
    assert not {"red", "riding", "is", "the"} & set(nouns)


def test_both_taggers_agree_on_the_shapes_world(ordinary_tagger):
    """The closed vocabulary stands in for the ordinary tagger only to spare a download."""
    found = extra = expected = 0
    for i in range(300):
        caption = shapes.scene("val", i).caption
        ours = set(data.select_nouns(caption, data.shapes_tagger()))
        theirs = set(data.select_nouns(caption, ordinary_tagger))
        expected, found, extra = (
            expected + len(ours),
            found + len(ours & theirs),
            extra + len(theirs - ours),
        )
    assert found > 0.97 * expected and extra < 0.1 * expected, (found, extra, expected)


# --- pseudo-labels --------------------------------------------------------------------------------


def test_released_labels():
    caption = tokenize(["a traffic light and a light near a car"])[0]
    labels = data.released_labels(caption, ["traffic light", "car"], ["light"]).tolist()
    # SOS a traffic light and a light near a car EOT
    assert labels == [-1, -1, 1, 1, -1, -1, 0, -1, -1, 2, -1]


# --- pictures and captions ------------------------------------------------------------------------


def gradient(mode: str) -> Image.Image:
    array = np.arange(40 * 30).reshape(30, 40)
    if mode == "I;16":
        return Image.fromarray((array * 50).astype(np.uint16))
    image = Image.fromarray((array // 5).astype(np.uint8))
    return image.convert("RGB").convert(mode) if mode != "L" else image


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_any_mode(mode, tmp_path):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    gradient(mode).save(path)
    image = data.read_image(path)
    assert image.mode == "RGB" and image.size == (40, 30)
    values = np.asarray(image)
    assert values[0, 0].mean() < 60 and values[-1, -1].mean() > 200


def test_exif_orientation_is_applied(tmp_path):
    image, exif = gradient("RGB"), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert data.read_image(tmp_path / "x.jpg").size == (30, 40)


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert np.asarray(data.read_image(tmp_path / "x.png")).min() == 255


def damaged(tmp_path, cause: str):
    path = tmp_path / "x.jpg"
    gradient("RGB").save(path)
    if cause == "corrupt image":
        path.write_bytes(path.read_bytes()[:300])
    elif cause == "not an image":
        path.write_text("hello")
    elif cause == "image too small":
        Image.new("RGB", (1, 1)).save(path)
    elif cause == "image too large":
        Image.new("L", (20_000, 20_000)).save(tmp_path / "x.png")
        return tmp_path / "x.png"
    return path


@pytest.mark.parametrize(
    "cause", ["corrupt image", "not an image", "image too small", "image too large"]
)
def test_bad_pictures(cause, tmp_path):
    with pytest.raises(data.BadSample, match=cause):
        data.read_image(damaged(tmp_path, cause))


@pytest.mark.parametrize(
    "content, cause",
    [
        (b"", "caption empty"),
        (b"  \n", "caption empty"),
        (b"\xff\xfe\x00", "caption not UTF-8"),
        (b"kite " * 10_000, "caption too long"),
    ],
)
def test_bad_captions(content, cause):
    with pytest.raises(data.BadSample, match=cause):
        data.read_caption(content)


# --- streams --------------------------------------------------------------------------------------


def make_stream(source, **changes) -> data.PairStream:
    defaults = dict(
        with_released_labels=True, pairs=4, nouns=2, context_length=4, size=32, min_crop=0.9, seed=3
    )
    return data.PairStream(source, data.shapes_tagger(), **defaults | changes)


def take(stream, count: int) -> list[data.Batch]:
    iterator = iter(stream)
    return [next(iterator) for _ in range(count)]


def same(a: data.Batch, b: data.Batch) -> bool:
    names = ("images", "caption_tokens", "noun_tokens", "knowledge_tokens", "noun_labels")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


def test_a_seed_gives_an_order_and_another_seed_another():
    world = data.ShapesWorld(50)
    a, b = take(make_stream(world), 3), take(make_stream(world), 3)
    assert all(map(same, a, b))
    assert not same(a[0], take(make_stream(world, seed=4), 1)[0])


def test_batches_do_not_depend_on_torch_or_numpy_global_state():
    world = data.ShapesWorld(50)
    torch.manual_seed(1)
    a = take(make_stream(world), 2)
    torch.manual_seed(2)
    np.random.seed(2)
    assert all(map(same, a, take(make_stream(world), 2)))


class Counted:
    """A source that only counts what is read."""

    def __init__(self, count: int, bad: tuple = ()):
        self.count, self.bad, self.read_indices = count, bad, []

    START = (0,)

    def order(self, seed, epoch, reader, readers, offset):
        for after, i in data.share(self.count, (seed, epoch), reader, readers, *offset):
            yield (after,), i

    def read(self, index, rng):
        self.read_indices.append(int(index))
        if index in self.bad:
            raise data.BadSample("corrupt image")
        return Image.new("RGB", (32, 32)), "a kite and a ball"


def test_no_pair_is_read_twice_in_an_epoch_of_all_processes():
    read = collections.Counter()
    for rank in range(3):
        source = Counted(24)
        take(make_stream(source, rank=rank, processes=3, pairs=2), 4)
        read.update(source.read_indices)
    assert read == dict.fromkeys(range(24), 1)


def test_a_stream_goes_on_where_a_batch_ended():
    world = data.ShapesWorld(30)
    batches = take(make_stream(world), 9)  # more than one epoch
    reader, *offset = batches[3].position
    rest = take(make_stream(world, start={reader: tuple(offset)}), 5)
    assert all(map(same, batches[4:], rest))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_it_was(workers):
    world = data.ShapesWorld(40)

    def batches(count, **changes):
        loader = iter(data.make_loader(make_stream(world, **changes), workers, False))
        return [next(loader) for _ in range(count)]

    whole = batches(9)
    start = {b.position[0]: b.position[1:] for b in whole[:3]}
    rest = batches(6, start=start, next_worker=3 % max(1, workers))
    assert all(map(same, whole[3:], rest))


def test_a_stream_can_be_given_to_a_process_that_is_spawned():
    """As macOS and Windows start loader workers: by pickling all that they need."""
    stream = make_stream(data.ShapesWorld(30))
    loader = data.DataLoader(
        stream, batch_size=None, num_workers=1, multiprocessing_context="spawn"
    )
    batches = iter(loader)
    assert all(same(expected, next(batches)) for expected in take(stream, 2))


def test_what_a_worker_says_can_be_sent():
    (answer,) = take(make_stream(Counted(10, bad=tuple(range(10)))), 1)
    for said in (answer, data.BadSample("corrupt image")):
        received = pickle.loads(pickle.dumps(said))
        assert type(received) is type(said) and str(received) == str(said)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_platform_says_how_workers_start(workers):
    loader = data.make_loader(make_stream(Counted(8)), workers, False)
    assert loader.multiprocessing_context is None


@pytest.mark.parametrize("readers", [1, 2])
def test_an_epoch_may_be_smaller_than_a_batch(readers):
    """Ten pairs fill a batch of 16: every pair comes once in an epoch, in a way of its own."""
    read = []
    for rank in range(readers):
        source = Counted(10, bad=(3,))
        batches = take(make_stream(source, rank=rank, processes=readers, pairs=16), 3)
        assert all(len(batch.images) == 16 for batch in batches)
        read.append(source.read_indices)
    share = 10 // readers
    for epoch in range(3):
        here = [i for indices in read for i in indices[epoch * share : (epoch + 1) * share]]
        assert sorted(here) == list(range(10))


def test_a_stream_of_small_epochs_goes_on_where_a_batch_ended():
    world = data.ShapesWorld(5)
    batches = take(make_stream(world, pairs=12), 5)
    reader, *offset = batches[1].position
    assert offset[0] > 3
    rest = take(make_stream(world, pairs=12, start={reader: tuple(offset)}), 3)
    assert all(map(same, batches[2:], rest))


def test_a_share_without_a_usable_pair_is_no_error_while_others_have_some():
    """In an epoch each of four readers has one pair of four, and half of these are bad."""
    for rank in range(4):
        stream = make_stream(Counted(4, bad=(0, 1)), rank=rank, processes=4, pairs=100)
        (batch,) = take(stream, 1)
        assert len(batch.images) == 100 and batch.skipped["corrupt image"] > 50


@pytest.mark.parametrize("count, readers", [(1, 1), (4, 4), (10, 1), (10, 4)])
def test_a_whole_epoch_without_a_usable_pair_names_the_causes(count, readers):
    for rank in range(readers):
        source = Counted(count, bad=tuple(range(count)))
        (answer,) = take(make_stream(source, rank=rank, processes=readers), 1)
        assert isinstance(answer, UserError)
        assert re.search(r"a whole epoch gave 0 usable pairs \(\d+ corrupt image\)", str(answer))


def test_fewer_pairs_than_readers():
    for rank in range(4):
        (answer,) = take(make_stream(Counted(2), rank=rank, processes=4), 1)
        assert isinstance(answer, data.Batch) == (rank < 2)
    assert "fewer pairs than the 4 loader workers" in str(answer) and "--workers" in str(answer)


def test_bad_pairs_are_skipped_and_counted():
    source = Counted(12, bad=(2, 5, 7))
    skipped = collections.Counter()
    for batch in take(make_stream(source, pairs=3), 3):
        skipped += batch.skipped
    assert skipped == {"corrupt image": 3}


def test_mostly_bad_data_stops():
    stream = make_stream(Counted(2000, bad=tuple(range(0, 2000, 3)) + tuple(range(1, 2000, 3))))
    said = [str(batch) for batch in take(stream, 300) if isinstance(batch, UserError)]
    assert said and "of the last" in said[0] and "corrupt image" in said[0]


def test_nothing_but_bad_data_stops():
    (answer,) = take(make_stream(Counted(10, bad=tuple(range(10)))), 1)
    assert isinstance(answer, UserError) and "10 corrupt image" in str(answer)


def test_the_causes_are_those_of_the_pairs_that_are_counted():
    """Of 1,000 pairs 501 are bad for two causes, however many batches there were between them."""

    class TwoCauses(Counted):
        def read(self, index, rng):
            bad = super().read(index, rng)  # corrupt image
            if index % 4 == 0:
                raise data.BadSample("caption empty")
            return bad

    bad = {i for i in range(4000) if i % 3 == 0}
    stream = make_stream(TwoCauses(4000, bad=tuple(bad)), pairs=2)
    said = next(str(batch) for batch in iter(stream) if isinstance(batch, UserError))
    found = re.match(
        r"501 of the last (\d+) pairs .*\((\d+) corrupt image, (\d+) caption empty\)", said
    )
    assert found, said
    assert int(found[1]) <= 1000 and int(found[2]) + int(found[3]) == 501
    assert int(found[3]) > 100


def test_a_batch_has_what_its_pairs_say():
    (batch,) = take(make_stream(Counted(8), pairs=2), 1)
    assert batch.images.shape == (2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    black = (-mean / std)[:, None, None].expand(3, 32, 32)  # ImageNet's statistics
    assert torch.allclose(batch.images[0], black) and torch.allclose(batch.images[1], black)
    assert len(batch.noun_tokens) == len(batch.knowledge_tokens) == 4
    # Noun-major: rows 0, 1 are the first nouns, rows 2, 3 the second ones of the same pairs.
    kite, ball = tokenize(["kite", "ball"])[:, 1].tolist()
    nouns = batch.noun_tokens[:, 5].tolist()
    assert {nouns[0], nouns[2]} == {nouns[1], nouns[3]} == {kite, ball}


class Ramp(Counted):
    """The same image for every pair: red grows to the right, green downwards."""

    def read(self, index, rng):
        ramp = np.linspace(0, 255, 64).astype(np.uint8)
        red, green = np.broadcast_arrays(ramp[None], ramp[:, None])
        return Image.fromarray(np.stack([red, green, 0 * red], -1)), "a kite and a ball"


def test_a_crop_keeps_as_much_of_the_image_as_it_should():
    spans = {}
    for least in (1.0, 0.3):
        (batch,) = take(make_stream(Ramp(64), pairs=64, min_crop=least), 1)
        red, green = (batch.images[:, c] * std for c, std in ((0, 0.229), (1, 0.224)))
        across = (red[:, 0, -1] - red[:, 0, 0]).abs()
        down = (green[:, -1, 0] - green[:, 0, 0]).abs()
        spans[least] = across * down  # share of the image
    assert spans[1.0].min() > 0.85  # whole images, but for half a cell at each border
    assert spans[0.3].min() < 0.5 and spans[0.3].min() > 0.25


def test_about_half_of_the_images_are_flipped():
    (batch,) = take(make_stream(Ramp(64), pairs=64, min_crop=1.0), 1)
    grows = batch.images[:, 0, 0, -1] > batch.images[:, 0, 0, 0]  # red, to the right
    assert 16 < grows.sum() < 48
    assert (batch.images[:, 1, -1, 0] > batch.images[:, 1, 0, 0]).all()  # green, downwards


def test_the_nouns_of_a_pair_are_drawn_at_random_among_those_of_its_caption():
    class Crowd(Counted):
        def read(self, index, rng):
            return Image.new("RGB", (32, 32)), "a kite, a ball, a house, a tree and a fish"

    (batch,) = take(make_stream(Crowd(200), pairs=200), 1)
    nouns = tokenize(["kite", "ball", "house", "tree", "fish"])[:, 1].tolist()
    first, second = batch.noun_tokens[:, 5].view(2, 200).tolist()
    drawn = collections.Counter(zip(first, second))
    assert set(first) == set(second) == set(nouns)
    assert len(drawn) == 5 * 4 and all(a != b for a, b in drawn)  # every ordered pair of two
    assert max(collections.Counter(first).values()) < 80  # 40 expected


def test_every_pair_of_an_epoch_is_augmented_in_its_own_way():
    (batch,) = take(make_stream(Ramp(16), pairs=16, min_crop=0.3), 1)
    assert len({image.sum().item() for image in batch.images}) > 12
    assert len({tuple(row.tolist()) for row in batch.knowledge_tokens}) > 12


def test_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        data.Folder(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="none of its 0 images"):
        data.Folder(str(tmp_path))
    (tmp_path / "deep").mkdir()
    for name in ("a.jpg", "b.png", "deep/c.webp", "lonely.jpg"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    for name in ("a", "b", "deep/c"):
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}")
    folder = data.Folder(str(tmp_path))
    captions = [folder.read(item, None)[1] for _, item in folder.order(0, 0, 0, 1, folder.START)]
    assert sorted(captions) == ["caption of a", "caption of b", "caption of deep/c"]
