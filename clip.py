"""What the thesis takes for granted of CLIP: E^v, E^t, and dense features. Nothing here is learned.

Every function takes an `open_clip.CLIP` with a plain ViT, be it the tiny one of the shapes world
or ViT-B/16. Shapes: B images or texts (in chapter 3 it counts triplets), L text positions, h x w
patches, C the embedding width.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from config import UserError
from support.weights import read_weights

# The input statistics are ImageNet's, as in both released programs, not CLIP's own.
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# TCL's templates for the prior branch's class embeddings (section 4.1).
PRIOR_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "a photo of many {}.",
    "a photo of {}s.",
)

# CLIP's own 80: for n'_j in training, and under the training-free protocol.
IMAGENET_TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]

SHAPES_WEIGHTS = Path(__file__).parent / "datasets" / "shapes_clip.pt"
SHAPES_ARCHITECTURE = dict(
    embed_dim=64,
    vision_cfg=dict(
        image_size=96,
        patch_size=8,
        width=96,
        layers=4,
        head_width=32,
        pos_embed_type="sin_cos_2d",
    ),
    text_cfg=dict(width=64, heads=4, layers=2),
)


def load_clip(name: str, weights: str = "openai") -> open_clip.CLIP:
    """Create a frozen CLIP in evaluation mode.

    name: an open_clip architecture with a plain ViT, or "shapes" for the shapes world's own.
    weights: an open_clip tag, a local file (of safetensors, torch.save, or OpenAI's own), or "none"
    for random weights. For "shapes", "openai" means the file that comes with it.
    Raises UserError for an unknown name and for a tag trained with another activation, both before
    anything is downloaded; for another architecture, and for weights that cannot be had or do not
    fit.
    """
    if name == "shapes":
        clip = _load_shapes_clip(SHAPES_WEIGHTS if weights == "openai" else weights)
    else:
        clip = _create_open_clip(name, weights)
    visual = getattr(clip, "visual", None)
    plain = (
        isinstance(clip, open_clip.CLIP)
        and isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and isinstance(visual.transformer.resblocks[0], ResidualAttentionBlock)
        and isinstance(visual.transformer.resblocks[0].ls_1, nn.Identity)  # no LayerScale
        and clip.text_pool_type == "argmax"
        and clip.text_projection.shape[0] == clip.text_projection.shape[1]  # x^t meets n_j
    )
    if not plain:
        raise UserError(
            f"--clip {name}: only plain ViTs with CLIP's own text tower are supported "
            "(for example ViT-B-16-quickgelu, ViT-B-32-quickgelu or ViT-L-14-quickgelu)"
        )
    if name != "shapes" and weights != "none" and weights not in _tags(name):
        _load_file(clip, name, weights)
    clip.of_shapes = name == "shapes"
    return clip.eval().requires_grad_(False)


def is_of_shapes(clip: open_clip.CLIP) -> bool:
    """Whether it is the shapes world's own, whose sizes and constants are none for photos."""
    return getattr(clip, "of_shapes", False)


def _load_shapes_clip(weights: str | Path) -> open_clip.CLIP:
    clip = open_clip.CLIP(**SHAPES_ARCHITECTURE)
    if weights == "none":
        return clip
    if not Path(weights).is_file():
        raise UserError(
            f"{weights} is missing: `python -m experiments.pretrain` makes it"
            if weights == SHAPES_WEIGHTS
            else f"--clip-weights {weights}: no such file (--clip shapes has weights of its own)"
        )
    try:
        stored = torch.load(weights, weights_only=True)
        state = {name: value.float() for name, value in stored["state"].items()}
        # Only the rows of tokens that the shapes world and CLIP's templates use are stored.
        table = torch.zeros_like(clip.token_embedding.weight)
        table[stored["tokens"]] = state["token_embedding.weight"]
        clip.load_state_dict(state | {"token_embedding.weight": table})
    except Exception as error:  # of another program, another architecture, or damaged
        raise UserError(f"{weights} is not the shapes world's CLIP of now") from error
    return clip


def _tags(name: str) -> list[str]:
    return open_clip.list_pretrained_tags_by_model(name)


def _has_quick_gelu(name: str) -> bool:
    return bool(open_clip.get_model_config(name).get("quick_gelu"))


def _with_other_activation(name: str) -> str:
    """ViT-B-16 for ViT-B-16-quickgelu, and the reverse."""
    plain = name.removesuffix("-quickgelu")
    return f"{name}-quickgelu" if name == plain else plain


def _refuse_activation(name: str, weights: str, quick: bool) -> None:
    """The same tensors fit both activations, and with the wrong one all features are wrong."""
    trained = "QuickGELU" if quick else "GELU"
    raise UserError(
        f"--clip {name} --clip-weights {weights}: these weights were trained with {trained}, "
        f"which {name} does not have: take --clip {_with_other_activation(name)}"
    )


def _create_open_clip(name: str, weights: str) -> nn.Module:
    """A network with the weights of a tag, or with random ones. Raises UserError."""
    if name not in open_clip.list_models():
        known = ", ".join(n for n in open_clip.list_models() if n.startswith("ViT-B-"))
        raise UserError(f"--clip {name}: open_clip has no such model; 'shapes', {known}, ...")
    tags, other = _tags(name), _with_other_activation(name)
    if weights in tags:
        quick = bool(open_clip.get_pretrained_cfg(name, weights).get("quick_gelu"))
        if quick != _has_quick_gelu(name):
            _refuse_activation(name, weights, quick)
    elif weights != "none" and not Path(weights).is_file():
        if weights in _tags(other):  # those of a -quickgelu model are listed there alone
            _refuse_activation(name, weights, _has_quick_gelu(other))
        if Path(weights).is_dir():
            raise UserError(f"--clip-weights {weights}: a folder; name the file of weights in it")
        raise UserError(
            f"--clip-weights {weights}: neither a file nor one of {name}'s tags ({', '.join(tags)})"
        )
    try:
        with _quiet():
            return open_clip.create_model(name, pretrained=weights if weights in tags else None)
    except Exception as error:  # downloads fail in many ways
        source = open_clip.get_pretrained_cfg(name, weights)
        where = source.get("url")  # OpenAI's own are TorchScript; the hub has plain tensors
        if hub := source.get("hf_hub"):
            where = f"open_clip_model.safetensors of https://huggingface.co/{hub.rstrip('/')}"
        raise UserError(
            f"the weights {weights!r} of {name} could not be downloaded; fetch {where} by "
            "hand, put the file anywhere and name it with --clip-weights FILE"
        ) from error


# In files, but no weights: OpenAI's archives hold numbers, and some hold the causal mask.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def _load_file(clip: open_clip.CLIP, name: str, path: str) -> None:
    """Load a local file of weights into a network. Raises UserError saying what does not fit."""
    try:
        state, classes = read_weights(path)
    except UserError as error:
        raise UserError(f"--clip-weights {path}: {error}") from error
    if any(key.startswith(("vision_model.", "text_model.")) for key in state):
        raise UserError(
            f"--clip-weights {path}: keys of transformers; take the open_clip_model.safetensors "
            "of the same weights (https://huggingface.co/timm has OpenAI's)"
        )
    # TorchScript names its modules' classes: the only files that tell their activation.
    quick = any("QuickGELU" in one for one in classes)
    if (quick or "GELU" in classes) and quick != _has_quick_gelu(name):
        _refuse_activation(name, path, quick)
    expected = clip.state_dict()
    state = {key: value for key, value in state.items() if key not in _NO_WEIGHTS}
    problems = [
        f"{key} of shape {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems += [f"no {key}" for key in expected if key not in state]
    problems += [f"unknown {key}" for key in state if key not in expected]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"--clip-weights {path}: not weights of {name} ({'; '.join(problems[:3])}{more})"
        )
    clip.load_state_dict(state)


@contextlib.contextmanager
def _quiet():
    """Keep open_clip's and the hub's retries off the terminal: our error says it in a line."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# --- blocks of both towers ------------------------------------------------------------------------


def transformer_block(
    block: ResidualAttentionBlock,
    x: Tensor,
    mask: Tensor | None = None,
    at: Tensor | None = None,
) -> Tensor:
    """x + attention(ln_1(x)), then + MLP(ln_2(x)): (B, N, width) -> (B, N, width).

    mask: True where a position may look, broadcast to (B, heads, N, N). at: the one position of
    every sequence whose output is wanted, (B,); then (B, 1, width), and the mask (B, heads, 1, N).
    The block's own forward pass is the same, but nn.MultiheadAttention makes copies that
    nothing needs: a training step took a sixth longer with it.
    """
    q, k, v = split_heads(block, x, at)
    if at is not None:
        x = x[torch.arange(len(x), device=x.device), at][:, None]
    x = x + merge_heads(block, attend(q, k, v, mask))
    return x + block.mlp(block.ln_2(x))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of every head: (B, heads, N, d). bfloat16 is computed in float32
    on a CPU, whose bfloat16 kernel is several times as slow."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), mask).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def split_heads(
    block: ResidualAttentionBlock, x: Tensor, at: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of ln_1(x): (B, N, width) -> (B, heads, N, width / heads) each; q of one position
    of every sequence alone if `at` (B,) names it."""
    attention, y = block.attn, block.ln_1(x)
    if at is None:
        qkv = F.linear(y, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.chunk(3, dim=-1)
    else:
        sizes = [y.shape[-1], 2 * y.shape[-1]]  # of q, and of k and v together
        (w_q, w_kv), (b_q, b_kv) = (
            p.split(sizes) for p in (attention.in_proj_weight, attention.in_proj_bias)
        )
        q = F.linear(y[torch.arange(len(y), device=y.device), at][:, None], w_q, b_q)
        k, v = F.linear(y, w_kv, b_kv).chunk(2, dim=-1)
    return tuple(z.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for z in (q, k, v))


def merge_heads(block: ResidualAttentionBlock, y: Tensor) -> Tensor:
    """The block's output projection of all heads: (B, heads, N, width / heads) -> (B, N, width)."""
    return block.attn.out_proj(y.transpose(1, 2).flatten(2))


def project(x: Tensor, projection: Tensor) -> Tensor:
    """Into the space that images and texts share: x @ projection, normalised, (..., C).

    In full precision even under autocast, as `cosines` are: in bfloat16 masks would move in steps
    of 0.004, and the smoothness of x^v would measure rounding.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(x.to(projection.dtype) @ projection, dim=-1, eps=1e-6)


def cosines(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """Dot products of unit vectors: einsum in full precision, even under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return torch.einsum(equation, a, b)


# --- the visual tower -----------------------------------------------------------------------------


def visual_hidden(clip: open_clip.CLIP, images: Tensor) -> Tensor:
    """Token sequence before the last visual block: (B, 3, H, W) -> (B, 1 + h*w, width).

    H and W are any multiples of the patch: the positional embedding is resized bicubically, with
    the class token's kept apart. These hidden states are what the frozen last block (MaskCLIP) and
    its trainable copy (the image segmenter) share.
    """
    visual = clip.visual
    x = visual.conv1(images)  # (B, width, h, w)
    h, w = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)  # (B, h*w, width)
    first, grid = visual.positional_embedding.split([1, visual.positional_embedding.shape[0] - 1])
    if (h, w) != visual.grid_size:
        grid = grid.T.reshape(1, -1, *visual.grid_size)
        grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)
        grid = grid.flatten(2)[0].T  # (h*w, width)
    class_token = (visual.class_embedding + first).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat([class_token, x + grid], dim=1))
    for block in visual.transformer.resblocks[:-1]:
        x = transformer_block(block, x)
    return x


def image_embedding(clip: open_clip.CLIP, images: Tensor) -> Tensor:
    """E^v, CLIP's image embedding read at the class token, normalised: (B, 3, S, S) -> (B, C)."""
    visual, hidden = clip.visual, visual_hidden(clip, images)
    class_token = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    x = transformer_block(visual.transformer.resblocks[-1], hidden, at=class_token)  # (B, 1, width)
    return project(visual.ln_post(x[:, 0]), visual.proj)


def maskclip(block: ResidualAttentionBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A = 1: every token attends to itself alone; residual and MLP kept, as TCL does (MaskCLIP,
    Zhou et al., ECCV 2022). Token by token, so the class token may be missing.
    grid: for the signature of `training_free.DENSE` alone."""
    _, _, v = split_heads(block, x)
    x = x + merge_heads(block, v)
    return x + block.mlp(block.ln_2(x))


def dense_embedding(
    clip: open_clip.CLIP, hidden: Tensor, grid: tuple[int, int], features: Callable = maskclip
) -> Tensor:
    """Dense features from `visual_hidden` of a grid of patches, projected and normalised:
    (B, h*w, C).

    features: what the last visual block does, `maskclip` or one of `training_free.DENSE`.
    """
    visual = clip.visual
    x = features(visual.transformer.resblocks[-1], hidden, grid)
    return project(visual.ln_post(x[:, 1:]), visual.proj)


# --- the text tower -------------------------------------------------------------------------------


def tokenize(texts: Sequence[str]) -> Tensor:
    """BPE token ids [SOS] ... [EOT], zero-padded to the longest text: (B, L) int64.

    The text tower is causal and read at EOT, so positions beyond the longest EOT change nothing
    and are never computed. Longer texts than the context are cut, EOT kept.
    """
    tokens = open_clip.tokenize(list(texts))
    return tokens[:, : int(end_of_text(tokens).max()) + 1]


def tokens_of(text: str) -> list[int]:
    """All BPE token ids of a text, without SOS and EOT; none of what is no text, such as a BOM."""
    row = open_clip.tokenize([text], context_length=4 * len(text) + 8)[0]
    return row[1 : int(end_of_text(row))].tolist()


def check_lengths(words: Sequence[str], context_length: int, templates: Sequence[str]) -> None:
    """The text tower holds 75 tokens beside SOS and EOT: the learned context and a word, or a
    hand-written template and the word. Raises UserError."""
    room = 75 - max(context_length, *(len(tokens_of(form.format(""))) for form in templates))
    for word in words:
        count = len(tokens_of(word))
        if count == 0:
            raise UserError("an empty query: name words to look for")
        if count > room:
            raise UserError(f"{word[:40]!r}...: {count} tokens, a query holds {room} at most")


def noun_prompts(nouns: Sequence[str], context_length: int) -> Tensor:
    """Token ids of "[SOS] x ... x noun [EOT]": (N, L), each x a place for learned context."""
    return tokenize([" ".join(["x"] * context_length + [noun]) for noun in nouns])


def end_of_text(tokens: Tensor) -> Tensor:
    """Position of EOT, the largest token id: (B, L) -> (B,)."""
    return tokens.argmax(dim=-1)


def text_hidden(clip: open_clip.CLIP, embeddings: Tensor, eot: Tensor | None = None) -> Tensor:
    """Last hidden states of the causal text tower, before ln_final.

    embeddings: token embeddings without positions (B, L, C_t), L <= 77. Returns the same shape, or
    (B, 1, C_t) of the positions `eot` (B,) alone.
    """
    length = embeddings.shape[1]
    x = embeddings + clip.positional_embedding[:length]
    position = torch.arange(length, device=x.device)
    causal = position <= position[:, None]  # (L, L)
    *blocks, last = clip.transformer.resblocks
    for block in blocks:
        x = transformer_block(block, x, causal)
    if eot is None:
        return transformer_block(last, x, causal)
    return transformer_block(last, x, causal[eot][:, None, None], at=eot)


def text_embedding(clip: open_clip.CLIP, embeddings: Tensor, eot: Tensor) -> Tensor:
    """E^t, CLIP's text embedding read at EOT, normalised: (B, L, C_t), (B,) -> (B, C).

    It starts from token embeddings, so that learned vectors may stand among them.
    """
    hidden = text_hidden(clip, embeddings, eot)[:, 0]
    return project(clip.ln_final(hidden), clip.text_projection)


def embed_texts(clip: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """E^t of tokenised texts: (B, L) -> (B, C)."""
    return text_embedding(clip, clip.token_embedding(tokens), end_of_text(tokens))


@torch.no_grad()
def template_embedding(
    clip: open_clip.CLIP, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """One embedding per name, ensembled over templates with a {}: normalise, mean, normalise.

    Returns (N, C). One name at a time bounds memory, whatever the number of classes.
    """
    device = clip.text_projection.device
    rows = []
    for name in tqdm(names, "class embeddings", delay=2, leave=False):
        texts = tokenize([template.format(name) for template in templates]).to(device)
        rows.append(embed_texts(clip, texts).mean(0))
    return F.normalize(torch.stack(rows), dim=-1, eps=1e-6)
