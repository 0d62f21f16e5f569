"""Files of network weights, read without executing anything in them; others are told by name."""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from config import UserError


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors by name, of a file of safetensors, of torch.save, or of TorchScript.

    The second value holds the names of a TorchScript archive's module classes; it is empty for
    other files. Raises UserError saying what else the file is; the message does not name it.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"it cannot be read ({error.strerror})") from error
    if not start:
        raise UserError("an empty file")
    if start.startswith(b"version https://git-lfs"):
        raise UserError("a git-lfs pointer, not the weights: `git lfs pull` fetches them")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError("a web page, not the weights: download the file itself")
    try:
        if start[8:9] == b"{":  # safetensors: the header's length in 8 bytes, and JSON
            return load_file(path), set()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if script := next((n for n in names if n.endswith("/constants.pkl")), None):
                    return _read_torchscript(archive, script.removesuffix("constants.pkl"))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            "it pickles more than tensors, or is damaged: only a state_dict is read"
        ) from None
    except Exception as error:  # torch, zipfile and safetensors raise many kinds
        raise UserError("no file of torch.save or safetensors, or a damaged one") from error
    if isinstance(content, dict) and "model_config" in content:
        raise UserError("a checkpoint of train.py: name it with --checkpoint")
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # of open_clip's training
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError("it holds no state_dict")
    return {name.removeprefix("module."): value for name, value in content.items()}, set()


# --- TorchScript ----------------------------------------------------------------------------------

_DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


class _Module:
    """Stands for a module of any class: what it holds, by name."""

    def __setstate__(self, state):
        self.held = state


class _ArchiveUnpickler(pickle.Unpickler):
    """Rebuilds modules as `_Module` and their tensors; nothing that the file names is imported."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(archive.open(folder + "data.pkl"))
        self.archive, self.folder = archive, folder
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: torch.as_strided(
                storage, size, stride, offset
            )
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module.startswith("torch.jit._pickle"):  # lists of one type, as they are
            return lambda values, *_: values
        self.classes.add(name)
        return _Module

    def persistent_load(self, storage: tuple) -> Tensor:
        _, dtype, key, *_ = storage
        content = bytearray(self.archive.read(f"{self.folder}data/{key}"))
        return torch.frombuffer(content, dtype=dtype)


def _read_torchscript(archive: zipfile.ZipFile, folder: str) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors in an archive of torch.jit.save, as OpenAI publishes CLIP."""
    reader = _ArchiveUnpickler(archive, folder)
    state: dict[str, Tensor] = {}
    remaining = [("", reader.load())]
    while remaining:
        prefix, module = remaining.pop()
        for name, value in module.held.items():
            if isinstance(value, Tensor):
                state[prefix + name] = value
            elif isinstance(value, _Module):
                remaining.append((f"{prefix}{name}.", value))
    return state, reader.classes
