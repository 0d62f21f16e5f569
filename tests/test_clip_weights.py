"""Files of CLIP's weights: OpenAI's archives, what others save, what is no file of weights."""

import json
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from clip import SHAPES_WEIGHTS, load_clip
from config import UserError

SIZES = dict(
    embed_dim=64,
    vision_cfg=dict(image_size=32, layers=2, width=64, patch_size=16, head_width=64),
    text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=2),
)


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    """Small ones under open_clip's kind of names, with both activations."""
    folder = tmp_path_factory.mktemp("models")
    wide = SIZES | {"vision_cfg": SIZES["vision_cfg"] | {"patch_size": 8}}
    for name, config in (
        ("tiny", SIZES),
        ("tiny-quickgelu", SIZES | {"quick_gelu": True}),
        ("tiny-8-quickgelu", wide | {"quick_gelu": True}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def network(quick: bool = True) -> open_clip.CLIP:
    torch.manual_seed(3)
    return open_clip.CLIP(**SIZES, quick_gelu=quick).eval()


def torchscript(path, quick: bool = True, half: bool = True) -> dict:
    """An archive as OpenAI's are: traced, in float16, with three numbers among the tensors."""
    source = network(quick)
    for name in ("input_resolution", "context_length", "vocab_size"):
        vars(source).pop(name, None)
        source.register_buffer(name, torch.tensor(77))
    inputs = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long))
    traced = torch.jit.trace(source, inputs, check_trace=False)
    traced = traced.half() if half else traced
    torch.jit.save(traced, str(path))
    return traced.state_dict()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("quick", [True, False])
def test_an_archive_of_torchscript_is_read_without_running_it(quick, half, tmp_path, monkeypatch):
    want = torchscript(tmp_path / "ViT-B-16.pt", quick, half)

    def executed(*_, **__):
        raise AssertionError("the archive was executed")

    monkeypatch.setattr(torch.jit, "load", executed)
    loaded = load_clip("tiny-quickgelu" if quick else "tiny", str(tmp_path / "ViT-B-16.pt"))
    state = loaded.state_dict()
    assert len(state) > 50 and state.keys() < want.keys() and not loaded.training
    for name, value in state.items():
        assert value.dtype == torch.float32 and torch.equal(value, want[name].float()), name


@pytest.mark.filterwarnings("ignore")
def test_an_archive_tells_its_activation(tmp_path):
    for quick, wrong, right in (
        (True, "tiny", "tiny-quickgelu"),
        (False, "tiny-quickgelu", "tiny"),
    ):
        torchscript(tmp_path / "a.pt", quick)
        trained = "QuickGELU" if quick else "GELU"
        with pytest.raises(UserError, match=f"trained with {trained}, .*take --clip {right}$"):
            load_clip(wrong, str(tmp_path / "a.pt"))


def test_names_in_an_archive_are_not_imported(tmp_path):
    """A pickle that names something to call gets an empty module instead."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr(
            "x/data.pkl", b"cos\nsystem\n(S'touch " + bytes(tmp_path / "run") + b"'\ntR."
        )
    with pytest.raises(UserError, match="no file of torch.save or safetensors, or a damaged one"):
        load_clip("tiny", str(tmp_path / "x.pt"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["pt", "safetensors", "safetensors.pt", "training", "old"])
def test_what_others_save_is_read(kind, tmp_path):
    state, path = network().state_dict(), tmp_path / f"weights.{kind}"
    if kind.startswith("safetensors"):
        save_file(state, path)
    elif kind == "training":  # open_clip's, of several processes
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "pt")
    loaded = load_clip("tiny-quickgelu", str(path)).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


TRANSFORMERS = {"vision_model.embeddings.class_embedding": torch.zeros(4)}
NO_WEIGHTS = {
    "transformers.bin": (TRANSFORMERS, "keys of transformers; take the open_clip_model.saf"),
    "transformers.safetensors": (TRANSFORMERS, "keys of transformers; take the open_clip_mod"),
    "pointer.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 598641023\n",
        "a git-lfs pointer, not the weights: `git lfs pull`",
    ),
    "page.pt": (
        b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
        "a web page, not the weights",
    ),
    "xml.pt": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    "empty.pt": (b"", "an empty file"),
    "noise.pt": (bytes(range(256)) * 8, "damaged"),
    "cut.safetensors": (b"\x40\0\0\0\0\0\0\0{", "no file of torch.save or safetensors, or a dam"),
    "list.pt": ([torch.zeros(2)], "it holds no state_dict"),
    "whole.pt": (torch.nn.Linear(2, 2), "only a state_dict is read"),
    "ours.pt": ({"model": {}, "model_config": {}}, "a checkpoint of train.py: name it with --ch"),
    "vision.pt": ({"conv1.weight": torch.zeros(2)}, "(no positional_embedding; no text_projecti"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_what_is_no_file_of_weights_is_told_by_name(name, tmp_path):
    content, message = NO_WEIGHTS[name]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith("safetensors"):
        save_file(content, path)
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as said:
        load_clip("tiny", str(path))
    line = str(said.value)
    assert message in line and line.startswith(f"--clip-weights {path}: ") and "\n" not in line


def test_a_damaged_archive_is_told(tmp_path):
    torch.save(network().state_dict(), tmp_path / "cut.pt")
    content = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut\.pt: .*damaged"):
        load_clip("tiny-quickgelu", str(tmp_path / "cut.pt"))


def test_another_architecture_is_told_by_its_shapes(tmp_path):
    torch.save(network().state_dict(), tmp_path / "other.pt")
    with pytest.raises(UserError) as said:
        load_clip("tiny-8-quickgelu", str(tmp_path / "other.pt"))
    line = str(said.value)
    assert "visual.conv1.weight of shape (64, 3, 16, 16) instead of (64, 3, 8, 8)" in line
    assert "visual.positional_embedding of shape (5, 64) instead of (17, 64)" in line
    assert line.endswith("not weights of tiny-8-quickgelu (" + line.split("(", 1)[1])


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="a folder; name the file of weights in it"):
        load_clip("tiny", str(tmp_path))
    with pytest.raises(UserError, match="neither a file nor one of tiny's tags"):
        load_clip("tiny", str(tmp_path / "none.pt"))


# --- the activation of a tag ----------------------------------------------------------------------


@pytest.fixture
def no_download(monkeypatch):
    """What is refused is refused before a network is even made."""

    def asked(*arguments, **options):
        raise AssertionError("it went on to make the network and to fetch the weights")

    monkeypatch.setattr(open_clip, "create_model", asked)


@pytest.mark.parametrize(
    "name, tag, trained, right",
    [
        ("ViT-B-16", "openai", "QuickGELU", "ViT-B-16-quickgelu"),
        ("ViT-L-14", "openai", "QuickGELU", "ViT-L-14-quickgelu"),
        ("ViT-B-16", "metaclip_400m", "QuickGELU", "ViT-B-16-quickgelu"),
        ("ViT-L-14", "dfn2b", "QuickGELU", "ViT-L-14-quickgelu"),
        ("ViT-B-32", "laion400m_e32", "QuickGELU", "ViT-B-32-quickgelu"),
        ("ViT-B-16-quickgelu", "laion2b_s34b_b88k", "GELU", "ViT-B-16"),
        ("ViT-L-14-quickgelu", "laion2b_s32b_b82k", "GELU", "ViT-L-14"),
    ],
)
def test_weights_of_another_activation_are_refused(name, tag, trained, right, no_download):
    with pytest.raises(UserError) as said:
        load_clip(name, tag)
    assert str(said.value) == (
        f"--clip {name} --clip-weights {tag}: these weights were trained with {trained}, which "
        f"{name} does not have: take --clip {right}"
    )
    assert right in open_clip.list_models()
    assert tag in open_clip.list_pretrained_tags_by_model(right)


@pytest.mark.parametrize(
    "name, tag", [("ViT-B-16-quickgelu", "openai"), ("ViT-B-16", "laion2b_s34b_b88k")]
)
def test_weights_of_the_same_activation_are_fetched(name, tag, monkeypatch):
    asked = []
    monkeypatch.setattr(
        open_clip, "create_model", lambda *a, **k: asked.append((a, k)) or network()
    )
    load_clip(name, tag)
    assert asked == [((name,), {"pretrained": tag})]


def test_training_is_refused_too(no_download, mistake, tmp_path):
    from train import main

    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("a dog")
        (tmp_path / f"{i}.jpg").write_text("")
    options = ("--pairs", tmp_path, "--clip", "ViT-B-16", "--out", tmp_path / "out")
    assert "take --clip ViT-B-16-quickgelu" in mistake(main, *options)


# --- the shapes world's own -----------------------------------------------------------------------


def test_the_shapes_world_takes_a_file_of_its_own(tmp_path):
    stored = torch.load(SHAPES_WEIGHTS, weights_only=True)
    stored["state"]["text_projection"] = stored["state"]["text_projection"] * 2
    torch.save(stored, tmp_path / "mine.pt")
    mine, shipped = load_clip("shapes", str(tmp_path / "mine.pt")), load_clip("shapes")
    assert torch.equal(mine.text_projection, shipped.text_projection * 2)
    assert torch.equal(mine.visual.proj, shipped.visual.proj)
    assert not torch.equal(load_clip("shapes", "none").visual.proj, shipped.visual.proj)
    with pytest.raises(UserError, match="--clip-weights none.pt: no such file"):
        load_clip("shapes", "none.pt")
    (tmp_path / "mine.pt").write_text("no weights")
    with pytest.raises(UserError, match=r"mine\.pt is not the shapes world's CLIP of now"):
        load_clip("shapes", str(tmp_path / "mine.pt"))
