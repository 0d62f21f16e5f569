"""Train CoDe (section 3.5) from pairs of image and caption.

Examples:
    python train.py --preset shapes                     # the built-in world, no download
    python train.py --pairs DIR                         # images with same-named .txt captions
    torchrun --nproc_per_node=4 train.py --pairs DIR    # the same on four GPUs
    python train.py --pairs DIR --init code_released.pth --lr 1e-6      # go on from there
"""

import json
import math
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    Run,
    is_released_file,
    load_model,
    model_content,
    read_checkpoint,
    resume_run,
    save_checkpoint,
    save_run,
)
from clip import is_of_shapes, load_clip
from config import (
    MASK_PRESETS,
    TRAIN_PRESETS,
    EvalConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    given_options,
    parse,
    run_script,
    settle,
)
from data import (
    Batch,
    PairStream,
    data_checksum,
    make_loader,
    nltk_tagger,
    open_source,
    shapes_tagger,
)
from datasets import DATASETS, THESIS_DATASETS, load_benchmark
from evaluate import Segmenter, average, benchmark_words, check_world, evaluate
from losses import code_loss
from model import CoDe
from support.device import (
    autocast,
    choose_device,
    choose_precision,
    enough_memory,
    make_scaler,
    update_scale,
)
from support.distributed import (
    any_process,
    end_workers,
    first_process_first,
    lost_processes,
    process_count,
    process_rank,
    start_processes,
    stop_processes,
    stop_signals,
)
from support.files import save_text
from support.log import Log

# torch 2.14 renames this option of DistributedDataParallel; 2.5 does not know the new name.
warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)

# --- what a step is made of -----------------------------------------------------------------------


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up from 1e-4 of the peak, then a cosine down to `final_lr` of it."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (1e-4 + (1 - 1e-4) * step / warmup)
    done = (step - warmup) / max(1, config.steps - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over everything learned; weight decay on matrices and kernels only.

    With `decay_prompts`, as in the release, on all but biases and LayerNorms.
    """

    def decays(name: str, p: nn.Parameter) -> bool:
        if config.decay_prompts:
            return p.ndim != 1  # scalars have no dimension
        return p.ndim > 1 and name not in ("context", "region_prompt", "word_prompt")

    learned = [(name, p) for name, p in model.named_parameters() if not name.startswith("clip.")]
    decayed = [p for name, p in learned if decays(name, p)]
    plain = [p for name, p in learned if not decays(name, p)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain}]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, fused=fused
    )


def logistic_noise(model: CoDe, batch: Batch, seed: int, step: int) -> Tensor:
    """Noise of the Gumbel-sigmoid for the hard masks of this process's batch: (J, b, H, W).

    It is drawn for the global batch from the seed and the step, so that it depends neither on how
    many processes share the batch nor on whether the run was interrupted before this step.
    """
    pairs, device = len(batch.images), model.context.device
    nouns = len(batch.noun_tokens) // pairs
    grid = [model.config.cells_per_patch * side for side in model.clip.visual.grid_size]
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
    shape = (nouns, pairs * process_count(), *grid)
    uniform = torch.rand(shape, generator=generator, device=device).clamp(1e-6, 1 - 1e-6)
    return torch.logit(uniform).chunk(process_count(), dim=1)[process_rank()]


def evaluated_on(config: TrainConfig) -> tuple[str, ...]:
    """The benchmarks of --eval-dataset."""
    return THESIS_DATASETS if config.eval_dataset == ("all",) else config.eval_dataset


def evaluate_model(run: Run) -> float:
    """Average mIoU on --eval-dataset, the images being shared by all processes.

    eval-STEP.json is written after every benchmark; "average" is null until all are done.
    """
    config, model, results = run.config, run.model, []
    precision = str(run.precision).removeprefix("torch.")
    model.eval()
    for name in evaluated_on(config):
        settings = MaskConfig(**MASK_PRESETS.get(name, {}), precision=precision)
        benchmark = load_benchmark(name, config.eval_root)
        segmenter = Segmenter(model.clip, model, benchmark_words(benchmark, settings), settings)
        limited = EvalConfig(name, limit=config.eval_limit)
        try:
            results.append(evaluate(segmenter, benchmark, limited))
        except UserError as error:  # a bad file, too little memory
            raise UserError(
                f"{error} (evaluating step {run.step}; it is in last.pt: --resume goes on, without "
                "--eval-dataset if need be)"
            ) from error
        if results[-1]["mIoU"] is None:
            raise UserError(f"--eval-dataset {name}: no pixel is labelled")
        whole = len(results) == len(evaluated_on(config))
        reached = average(results) if whole else None
        if process_rank() == 0:
            content = {"step": run.step, "measured_on": measured_on(config)}
            content |= {"average": reached, "datasets": results}
            save_text(json.dumps(content, indent=1), Path(config.out, f"eval-{run.step}.json"))
    model.train()
    return reached


def keep_best(run: Run) -> None:
    """Evaluate; best.pt is the model of the highest average so far, and last.pt remembers it."""
    reached, out = evaluate_model(run), Path(run.config.out)
    if reached > run.best and process_rank() == 0:
        more = {"mIoU": reached, "measured_on": measured_on(run.config)}
        save_checkpoint(model_content(run.model) | more, out / "best.pt")
    run.best = max(run.best, reached)
    save_run(run, out / "last.pt")


def measured_on(config: TrainConfig) -> list:
    """What an average is of: those of other benchmarks or images are no comparison."""
    return [*evaluated_on(config), config.eval_limit]


def find_best(run: Run) -> None:
    """Set run.best as a run goes on: the average of best.pt, of which last.pt may not know yet.

    A best.pt of other benchmarks or images is renamed: the best of these is another model.
    """
    best = Path(run.config.out, "best.pt")
    content = read_checkpoint(best) if best.exists() else {}
    if "measured_on" not in content:
        return
    if content["measured_on"] == measured_on(run.config):
        run.best = max(run.best, content["mIoU"])
    elif run.config.eval_dataset:
        run.best = -1.0
        any_process(False)  # all have read it
        if process_rank() == 0:
            best.replace(best.with_name("best-before.pt"))
            print(f"{best} is of other benchmarks or images: now best-before.pt", flush=True)


def is_evaluated(run: Run) -> bool:
    """Whether this step was evaluated to the end and best.pt kept; a kill may have cut it off."""
    try:
        content = json.loads(Path(run.config.out, f"eval-{run.step}.json").read_text("utf-8"))
        same = content["measured_on"] == measured_on(run.config)
        return same and content["average"] is not None and content["average"] <= run.best
    except (OSError, ValueError, KeyError):  # not written, or not to its end
        return False


# --- the run --------------------------------------------------------------------------------------


def check_options(config: TrainConfig, model_config: ModelConfig, loss_config: LossConfig) -> None:
    """What the dataclasses cannot say. Raises UserError."""
    if config.preset not in TRAIN_PRESETS:
        raise UserError(f"--preset {config.preset}: not one of {', '.join(TRAIN_PRESETS)}")
    if loss_config.pseudo_labels not in ("thesis", "release"):
        raise UserError(f"--pseudo-labels {loss_config.pseudo_labels}: 'thesis' or 'release'")
    if model_config.text_attention not in ("words", "all"):
        raise UserError(f"--text-attention {model_config.text_attention}: 'words' or 'all'")
    sources = {"--pairs": config.pairs, "--preset shapes": config.preset == "shapes"}
    sources["--shards"] = config.shards != TrainConfig().shards
    if len(asked := [name for name, given in sources.items() if given]) > 1:
        raise UserError(f"{asked[0]} and {asked[1]} are two sources of pairs: give one of them")
    if config.batch_size % process_count():
        raise UserError(
            f"--batch-size {config.batch_size}: must be a multiple of the {process_count()} "
            "processes that share it"
        )
    if not config.resume and any(Path(config.out, f"{k}.pt").exists() for k in ("last", "best")):
        raise UserError(
            f"{config.out} holds a run: --resume goes on with it, or name another --out"
        )
    if beyond := [step for step in config.keep_steps if not 1 <= step <= config.steps]:
        raise UserError(f"--keep-steps {beyond[0]}: not among the {config.steps} steps of the run")
    for name in evaluated_on(config):
        if name not in DATASETS:
            known = ", ".join(DATASETS)
            raise UserError(f"--eval-dataset {name}: not one of {known}; or 'all' alone")
        try:
            load_benchmark(name, config.eval_root)  # told now, not after an hour
        except UserError as error:
            raise UserError(str(error).replace("--root", "--eval-root")) from None


def refuse_beside_init(config: TrainConfig, given: Collection[str]) -> None:
    """Raises UserError where --init stands beside an option of the network, which it brings."""
    network = {f.name for f in fields(ModelConfig)} - {"clip_weights"}
    for name in given:
        if config.init and name.removeprefix("no_") in network:
            flag = name.replace("_", "-")
            raise UserError(f"--init {config.init}: its network is taken: leave out --{flag}")


def build_model(config: TrainConfig, model_config: ModelConfig, device: torch.device) -> CoDe:
    """The network that is trained: a new one, or with --init that of a checkpoint.

    A run that started so and goes on has its network from last.pt. If this needs CLIP's weights
    from the authors' file, --init says where that is now. Raises UserError.
    """
    last = Path(config.out, "last.pt")
    before = read_checkpoint(last) if config.resume else {}
    init = config.init or before.get("train_config", {}).get("init")
    if init is None:
        clip = load_clip(model_config.clip, model_config.clip_weights)
        return CoDe(clip, model_config).to(device)
    weights = model_config.clip_weights if "clip_weights" in given_options() else None
    if config.init and config.resume and weights is None and is_released_file(config.init):
        weights = config.init
    config.init = init
    model = load_model(last if config.resume else init, device, weights)
    if len(model.context) == 0:
        raise UserError(f"--init {init}: TCL's network has no learned context to train")
    if is_of_shapes(model.clip) != (config.preset == "shapes"):
        of_shapes = is_of_shapes(model.clip)
        change = "add --preset shapes" if of_shapes else "leave --preset shapes out"
        raise UserError(
            f"--init {init}: {'' if of_shapes else 'not '}of the shapes world: {change}"
        )
    return model


def main() -> None:
    config, model_config, loss_config = parse(
        __doc__, TrainConfig, ModelConfig, LossConfig, presets=TRAIN_PRESETS
    )
    settle(model_config, loss_config, given_options())
    refuse_beside_init(config, given_options())
    stopping = stop_signals()
    device = choose_device(config.device)
    start_processes(device, config.timeout)
    smaller = "a smaller --batch-size, or more processes that share it"
    fewer = (
        "often memory or shared memory ran out; fewer --workers need less, --workers 0 no shared "
        f"memory; --resume goes on from {config.out}/last.pt if there is one"
    )
    try:
        with enough_memory(smaller), lost_processes(fewer):
            run, stream = prepare_run(config, model_config, loss_config, device)
            train(run, make_loader(stream, config.workers, device.type == "cuda"), stopping)
    finally:
        end_workers()
    stop_processes()


def prepare_run(
    config: TrainConfig, model_config: ModelConfig, loss_config: LossConfig, device: torch.device
) -> tuple[Run, PairStream]:
    """A new run or, with --resume, the one in --out, and where its pairs come from.

    It writes config.json. Raises UserError.
    """
    check_options(config, model_config, loss_config)
    precision = choose_precision(config.precision, device)
    source = open_source(config)
    torch.manual_seed(config.seed)
    with first_process_first():  # which fetches NLTK's data and CLIP's weights
        tagger = shapes_tagger() if config.preset == "shapes" else nltk_tagger()
        model = build_model(config, model_config, device)
    refuse_beside_init(config, given_options())  # also where last.pt says that it began so
    settle(model.config, loss_config)  # that of --init may be an ablation's
    if config.eval_dataset:
        named = config.init or f"--clip {model_config.clip}"
        check_world(model.clip, evaluated_on(config), named, "--eval-dataset")

    parts = (make_optimizer(model, config), make_scaler(device, precision))
    run = Run(model, *parts, config, loss_config, precision, data=data_checksum(source))
    if config.resume:
        resume_run(run, Path(config.out, "last.pt"))
        find_best(run)
    if process_rank() == 0:
        configs = {"train": config, "model": model.config, "loss": loss_config}
        configs = {name: asdict(value) for name, value in configs.items()}
        save_text(json.dumps(configs, indent=1), Path(config.out, "config.json"))
    stream = PairStream(
        source,
        tagger,
        pairs=config.batch_size // process_count(),
        nouns=config.nouns,
        context_length=len(model.context),
        size=model.clip.visual.image_size[0],
        min_crop=config.min_crop,
        seed=config.seed,
        rank=process_rank(),
        processes=process_count(),
        with_released_labels=loss_config.pseudo_labels == "release",
        start=run.offsets,
        next_worker=run.next_worker,
    )
    return run, stream


def train(run: Run, loader: Iterable[Batch | UserError], stopping: Sequence[float] = ()) -> None:
    """The loop of section 3.5, from `run.step` to the last step or until a signal asks to stop."""
    model, optimizer, scaler, config = run.model, run.optimizer, run.scaler, run.config
    out, device, batches = Path(config.out), model.context.device, iter(loader)
    learned = [p for name, p in model.named_parameters() if not name.startswith("clip.")]
    unfreeze_step = round(config.unfreeze * config.steps)
    log, ddp = Log(out, config, run.step, writes=process_rank() == 0), None
    model.train()

    def every(steps: int) -> bool:
        return run.step % steps == 0 or run.step == config.steps

    evaluates = len(config.eval_dataset) > 0
    due = evaluates and run.step > 0 and every(config.eval_every)
    if any_process(due and not is_evaluated(run)):  # the same answer in all of them
        keep_best(run)
    while run.step < config.steps:
        # Two phases: the copy of the last visual block joins in the second.
        if ddp is None or run.step == unfreeze_step:
            model.image_segmenter.block.requires_grad_(run.step >= unfreeze_step)
            ddp = model
            if process_count() > 1:  # CLIP's buffers are constant: nothing to broadcast
                ddp = DistributedDataParallel(model, broadcast_buffers=False)
        rate = learning_rate(run.step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate

        batch = log.wait_for(batches)
        run.follow(batch.position)
        batch = batch.to(device)
        noise = logistic_noise(model, batch, config.seed, run.step)
        with autocast(device, run.precision):
            d = ddp(batch, noise)
        terms = code_loss(d, model, run.loss_config, batch.noun_labels)  # Eq. 3.8
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(terms["total"]).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(learned, config.max_grad_norm)
        scaler.step(optimizer)  # leaves the weights alone if a gradient is not finite
        update_scale(scaler, device, run.precision)
        log.record(terms, norm)
        run.step += 1

        stop = any_process(bool(stopping))
        if every(config.log_every) or stop:
            more = {"grad_norm": norm, "mask_area": d.soft_v.mean()}
            more |= {f"{k}_temperature": 1 / scale for k, scale in model.logit_scales().items()}
            log.write(run.step, rate, terms, more)
        if run.step in config.keep_steps and process_rank() == 0:  # again, if killed before last.pt
            save_checkpoint(model_content(model), out / f"step-{run.step}.pt")
        due = evaluates and every(config.eval_every)
        if every(config.checkpoint_every) or due or stop:
            save_run(run, out / "last.pt")
        if stop:
            break
        if due:  # after saving: whatever happens in it, the steps are kept
            keep_best(run)
    log.close()
    if process_rank() == 0:
        print(f"{out}/last.pt: step {run.step} of {config.steps}")


if __name__ == "__main__":
    run_script(main)
