"""Our checkpoints: plain tensors and values, written atomically, read without executing."""

import io
import os
import pickle
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist

from clip import load_clip
from config import LossConfig, ModelConfig, TrainConfig, UserError
from model import CoDe
from released import is_released, load_exactly, read_tensors, rebuild_released
from support.distributed import process_count, process_rank
from support.files import whole_file

# The trained model that comes with the shapes world.
SHAPES_MODEL = Path(__file__).parent / "datasets" / "shapes_code.pt"


def save_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """torch.save by way of a temporary name, on the disk before it is renamed. Raises UserError."""
    buffer = io.BytesIO()  # on a full disk torch's own writer would hide the reason
    torch.save(content, buffer)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def model_content(model: CoDe) -> dict[str, Any]:
    """What a checkpoint must hold to rebuild a model: the learned tensors and the configuration.

    CLIP's frozen weights are named, not stored; a checksum distinguishes others of the same name.
    """
    config, weights = asdict(model.config), model.config.clip_weights
    if os.path.isfile(weights):  # found from another working directory as well
        config["clip_weights"] = os.path.abspath(weights)
    return {
        "model": model.learned_state(),
        "model_config": config,
        "clip": fingerprint(model.clip),
    }


def fingerprint(clip: open_clip.CLIP) -> int:
    """A checksum of both projections: weights of another training have another one."""
    weights = torch.cat([clip.visual.proj.flatten(), clip.text_projection.flatten()])
    return zlib.crc32(weights.detach().cpu().numpy().tobytes())


def check_clip(content: dict[str, Any], model: CoDe, path: str | Path) -> None:
    """Raises UserError where a checkpoint was trained with other weights than the model's CLIP."""
    if content.get("clip", fingerprint(model.clip)) != fingerprint(model.clip):
        weights = f"{model.config.clip} ({model.config.clip_weights})"
        raise UserError(
            f"{path}: trained with other weights of CLIP than {weights} now has; --clip-weights "
            "names the file or the tag it was trained with"
        )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read one of our checkpoints, or the tensors of a released one under "model".

    Nothing in the file is executed. Raises UserError.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # it names things beyond tensors, as the released files do
            content = {"model": read_tensors(path)}
    except UserError:
        raise
    except FileNotFoundError:
        if Path(path) == SHAPES_MODEL:
            raise UserError(f"{path} is missing: `make model` trains it again") from None
        raise UserError(f"{path}: no such checkpoint; train.py writes one") from None
    except Exception as error:  # torch, zipfile and pickle raise many kinds for a damaged file
        reason = getattr(error, "strerror", None) or "no file of torch.save, or a damaged one"
        raise UserError(f"{path} is not a readable checkpoint: {reason}") from error
    known = isinstance(content, dict) and isinstance(content.get("model"), dict)
    if not known or not ("model_config" in content or is_released(content["model"])):
        raise UserError(f"{path}: neither a checkpoint of train.py nor a released one")
    return content


def load_model(path: str | Path, device: torch.device, clip_weights: str | None = None) -> CoDe:
    """Rebuild a trained model in evaluation mode, from our checkpoint or a released one.

    clip_weights: where CLIP's weights are now, if not where they were in training; a released file
    holds its own. Raises UserError naming what does not fit.
    """
    content = read_checkpoint(path)
    if is_released(content["model"]):
        if clip_weights is not None:
            raise UserError(f"--clip-weights {clip_weights}: {path} holds CLIP's weights itself")
        return rebuild_released(content["model"], path).to(device).eval()
    try:
        config = ModelConfig(**content["model_config"])
    except TypeError as error:  # a field that this version does not have
        raise UserError(f"{path} is of another version of this program ({error})") from None
    if clip_weights is not None:
        config.clip_weights = clip_weights
    elif os.path.isabs(config.clip_weights) and not os.path.exists(config.clip_weights):
        raise UserError(
            f"{path} was trained with CLIP's weights in {config.clip_weights}, which is not there: "
            "--clip-weights FILE names where it is now"
        )
    model = CoDe(load_clip_of(config), config)
    check_clip(content, model, path)
    load_learned(model, content["model"], path)
    return model.to(device).eval()


def load_clip_of(config: ModelConfig) -> open_clip.CLIP:
    """The CLIP that a configuration names. That of a training which started from the authors' file
    (`--init`) is called "released" and lies in that file. Raises UserError."""
    if config.clip != "released":
        return load_clip(config.clip, config.clip_weights)
    path = config.clip_weights
    state = read_checkpoint(path)["model"] if os.path.isfile(path) else {}
    if not is_released(state):
        raise UserError(
            f"--clip-weights {path}: the training started from a released file of the authors, "
            "whose CLIP is needed: name that file"
        )
    return rebuild_released(state, path).clip


def is_released_file(path: str | Path) -> bool:
    """Whether a checkpoint is the authors', which holds CLIP's weights too. Raises UserError."""
    return is_released(read_checkpoint(path)["model"])


def load_learned(model: CoDe, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load every learned tensor into a model; unknown, missing and misshapen ones are named."""
    load_exactly(model, state, model.learned_state(), path)


# --- a training run -------------------------------------------------------------------------------


@dataclass
class Run:
    """A training run: what it consists of, its options, and how far it is.

    There is no random state among it: a step's noise follows from the seed and the step, a pair's
    nouns and crop from the seed, the epoch, the reader and the offset.
    """

    model: CoDe
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: TrainConfig
    loss_config: LossConfig
    precision: torch.dtype = torch.float32
    step: int = 0
    best: float = -1.0  # the highest mIoU of its evaluations
    offsets: dict[int, tuple[int, ...]] = field(default_factory=dict)  # reader: epoch, offset
    next_worker: int = 0  # which loader worker delivers the next batch
    data: int = 0  # checksum of the file names of its data, wherever these lie

    def follow(self, position: tuple[int, ...]) -> None:
        """Note where the reader was behind this batch (it reads ahead), and whose turn is next."""
        reader, *offset = position
        self.offsets[reader] = tuple(offset)
        self.next_worker = (self.next_worker + 1) % max(1, self.config.workers)


PROGRESS = ("step", "best", "next_worker", "data")
# Options that may differ when a run goes on. With other `workers` the next epoch begins.
FREE = (
    *("out", "init", "device", "workers", "timeout", "resume", "log_every", "checkpoint_every"),
    *("keep_steps", "tensorboard", "eval_dataset", "eval_root", "eval_every", "eval_limit"),
    *("pairs", "shards", "clip_weights"),  # may have moved
)


def save_run(run: Run, path: str | Path) -> None:
    """Write all that a run needs to go on; process 0 gathers the offsets of everybody's readers."""
    offsets = run.offsets
    if process_count() > 1:
        parts: list = [None] * process_count()
        dist.all_gather_object(parts, offsets)
        offsets = {}
        for part in parts:  # others' are known from the last resume only: the latest counts
            for reader, offset in part.items():
                offsets[reader] = max(offsets.get(reader, offset), offset)
    if process_rank() == 0:
        content = model_content(run.model) | {
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.scaler.state_dict(),
            "train_config": asdict(run.config),
            "loss_config": asdict(run.loss_config),
            "processes": process_count(),
            "offsets": offsets,
        }
        save_checkpoint(content | {name: getattr(run, name) for name in PROGRESS}, path)


def resume_run(run: Run, path: str | Path) -> None:
    """Load a run to go on with. Raises UserError naming the fields in which it was another one.

    With other readers than before (more or fewer processes or workers) the shares of the data are
    others too: everybody starts with the next epoch.
    """
    content = read_checkpoint(path)
    if "step" not in content:
        raise UserError(f"--resume: {path} is a model, not a run that can go on")
    if missing := {*PROGRESS, "offsets"} - content.keys():
        raise UserError(
            f"--resume: {path} is of another version of this program (it has no "
            f"{', '.join(sorted(missing))})"
        )
    given = {
        "train_config": run.config,
        "model_config": run.model.config,
        "loss_config": run.loss_config,
    }
    differing = [
        f"{name} was {content[part].get(name)}, is {value}"
        for part, now in given.items()
        for name, value in asdict(now).items()
        if content[part].get(name) != value and name not in FREE
    ]
    if content["data"] != run.data:
        differing.append("the data has other files")
    if differing:
        raise UserError(f"--resume: {path} is of another configuration: {'; '.join(differing)}")
    check_clip(content, run.model, path)
    load_learned(run.model, content["model"], path)
    run.optimizer.load_state_dict(content["optimizer"])
    run.scaler.load_state_dict(content["scaler"])
    run.offsets = content["offsets"]
    for name in PROGRESS:
        setattr(run, name, content[name])

    before = content["processes"] * max(1, content["train_config"]["workers"])
    if before != (readers := process_count() * max(1, run.config.workers)):
        latest = max((epoch for epoch, *_ in run.offsets.values()), default=-1)
        run.offsets = {reader: (latest + 1,) for reader in range(readers)}
        run.next_worker = 0
        if process_rank() == 0:
            now = f"{process_count()} now, or other workers"
            print(f"{content['processes']} processes before, {now}: next epoch of the data")
