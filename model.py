"""The method: chapter 3 of the thesis, in its order and with its names.

The network knows nothing of processes, files or devices: it decomposes the b pairs it is given.

Shapes: b pairs with J nouns each. What belongs to a triplet (image, text, noun) is (J, b, ...): the
first noun of all pairs, then the second. C: CLIP's embedding width; C_t: its text width, which
`load_clip` wants to be C; H x W: mask grid (in the thesis: the image); S: side of an image; L: text
positions, with SOS, EOT and padding.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from clip import (
    cosines,
    embed_texts,
    end_of_text,
    image_embedding,
    maskclip,
    noun_prompts,
    project,
    text_embedding,
    text_hidden,
    tokenize,
    transformer_block,
    visual_hidden,
)
from config import ModelConfig, UserError

# --- 3.2 region masks -----------------------------------------------------------------------------


class UpsamplingBlock(nn.Module):
    """Double the resolution, then add gated residual convolutions (TCL's decoder, section 3.2).

    x <- nearest x2 (x); then `convs` times x <- x + tanh(g) conv3x3(GELU(LayerNorm(x))), g from 0.
    """

    def __init__(self, width: int, convs: int = 1):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(convs))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(convs))
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(convs))

    def forward(self, x: Tensor) -> Tensor:
        """(b, width, h, w) -> (b, width, 2h, 2w), in memory channels last as LayerNorm wants."""
        for norm, conv, gate in zip(self.norms, self.convs, self.gates):
            # LayerNorm and GELU act on each cell alone, so they may come before the upsampling.
            y = F.gelu(norm(x.movedim(1, -1)).movedim(-1, 1))
            if conv is self.convs[0]:
                x, y = F.interpolate(x, scale_factor=2), upsample_and_convolve(y, conv)
            else:
                y = conv(y)
            x = torch.addcmul(x, gate.tanh(), y)
        return x


def upsample_and_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(nearest x2 (x)) of a zero-padded 3x3 convolution.

    (b, width, h, w) -> (b, width, 2h, 2w).
    It is one transposed convolution, of 16 products a cell instead of 36: a cell reaches the 4x4
    outputs around its own 2x2, each through the sum of those taps that fall on its copies.
    """
    kernel = 4 * F.avg_pool2d(
        conv.weight.flip(2, 3), 2, stride=1, padding=1
    )  # (width, width, 4, 4)
    return F.conv_transpose2d(x, kernel.transpose(0, 1), conv.bias, stride=2, padding=1)


class ImageSegmenter(nn.Module):
    """F^v (section 3.2): pixel-wise embedding x^v, and the scale and bias of its masks.

    A trainable copy of the last visual block with MaskCLIP's trick, upsampling blocks, and
    trainable copies of CLIP's final LayerNorm and projection.
    """

    def __init__(self, clip: open_clip.CLIP, config: ModelConfig):
        super().__init__()
        visual = clip.visual
        width = visual.conv1.out_channels
        self.patch = visual.patch_size[0]
        self.block = copy.deepcopy(visual.transformer.resblocks[-1])
        self.upsampling = nn.ModuleList(
            UpsamplingBlock(width, config.convs_per_block) for _ in range(config.upsampling_blocks)
        )
        self.ln_post = copy.deepcopy(visual.ln_post)
        self.proj = nn.Parameter(visual.proj.detach().clone())
        self.mask_scale = nn.Parameter(torch.tensor(config.mask_scale))
        self.mask_bias = nn.Parameter(torch.tensor(config.mask_bias))
        self.requires_grad_(True)

    def forward(self, hidden: Tensor, image_size: tuple[int, int]) -> Tensor:
        """x^v from `clip.visual_hidden` of images of that size: (b, H, W, C), normalised."""
        patches = image_size[0] // self.patch, image_size[1] // self.patch
        x = maskclip(self.block, hidden[:, 1:], patches).unflatten(1, patches).movedim(-1, 1)
        for block in self.upsampling:
            x = block(x)  # (b, width, H, W)
        return project(self.ln_post(x.movedim(1, -1)), self.proj)

    def mask_logits(self, x_v: Tensor, nouns: Tensor) -> Tensor:
        """w s + b with s = x^v . n for words that are the same for all images, (N, C).

        Its sigmoid is the soft mask. (b, H, W, C) -> (b, N, H, W).
        """
        return self.mask_scale * cosines("bhwc,nc->bnhw", x_v, nouns) + self.mask_bias

    def own_mask_logits(self, x_v: Tensor, n: Tensor) -> Tensor:
        """The same for every image's own nouns: (b, H, W, C), (J, b, C) -> (J, b, H, W)."""
        return self.mask_scale * cosines("bhwc,jbc->jbhw", x_v, n) + self.mask_bias


def hard_mask(logits: Tensor, noise: Tensor | None) -> Tensor:
    """M^v for training: Gumbel-sigmoid at temperature 1 with a straight-through gradient.

    The value is 1 where sigmoid(logits + noise) > 0.5 and 0 elsewhere; the gradient is the
    sigmoid's. noise: logistic noise of the logits' shape; None: the logits alone decide.
    """
    soft = torch.sigmoid(logits if noise is None else logits + noise)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())  # exactly 0 or 1


# --- 3.2 word masks -------------------------------------------------------------------------------


class TextSegmenter(nn.Module):
    """F^t (section 3.2): word-wise features x^t, and w and b of the word logits.

    Two learned residual attention blocks, MLPs included, on the frozen text tower's last hidden
    states. They look both ways, and from SOS to EOT only (the release: at all 77 positions).
    """

    def __init__(self, clip: open_clip.CLIP, config: ModelConfig):
        super().__init__()
        width = clip.token_embedding.embedding_dim
        heads = clip.transformer.resblocks[0].attn.num_heads
        self.attends_to_all = config.text_attention == "all"
        self.blocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, act_layer=QuickGELU)
            for _ in range(config.text_layers)
        )
        self.word_scale = nn.Parameter(torch.tensor(config.word_scale))
        self.word_bias = nn.Parameter(torch.tensor(config.word_bias))

    def forward(self, hidden: Tensor, eot: Tensor) -> Tensor:
        """x^t from `clip.text_hidden`: (b, L, C_t), (b,) -> (b, L, C), normalised.

        Without a projection: C_t = C, which `clip.load_clip` asks of every CLIP.
        """
        position = torch.arange(hidden.shape[1], device=eot.device)
        mask = (position <= eot[:, None])[:, None, None] | self.attends_to_all  # (b, 1, 1, L)
        for block in self.blocks:
            hidden = transformer_block(block, hidden, mask)
        return F.normalize(hidden, dim=-1, eps=1e-6)

    def word_logits(self, x_t: Tensor, n: Tensor) -> Tensor:
        """Eq. 3.2: l_j,i = w x^t_i . n_j + b, behind a constant logit 0 for "none" of the nouns.

        x_t: (b, L, C); n: the J nouns of every caption, (J, b, C). Returns (J + 1, b, L).
        """
        logits = self.word_scale * cosines("blc,jbc->jbl", x_t, n) + self.word_bias
        return F.pad(logits, (0, 0, 0, 0, 1, 0))


def word_mask(word_logits: Tensor) -> Tensor:
    """Eq. 3.3: m^t_j,i = exp(l_j,i) / (1 + sum_k exp(l_k,i)), the 1 being exp(0) of "none".

    A softmax over "none" and the J nouns: (J + 1, b, L) -> (J, b, L).
    """
    return word_logits.softmax(dim=0)[1:]


# --- 3.3 region-word highlighting -----------------------------------------------------------------


def highlight_image(images: Tensor, mask: Tensor, region_prompt: Tensor) -> Tensor:
    """Eq. 3.4: H^v = X^v M^v + P^v (1 - M^v).

    images: (b, 3, S, S); mask: M^v of every noun (J, b, H, W), resized to the images (nearest);
    region_prompt: (3, S, S). Returns (J, b, 3, S, S).
    """
    mask = F.interpolate(mask, images.shape[-2:], mode="nearest")[:, :, None]
    return images * mask + region_prompt * (1 - mask)


def highlight_text(embeddings: Tensor, mask: Tensor, word_prompt: Tensor, eot: Tensor) -> Tensor:
    """Eq. 3.5: H^t = X^t M^t + P^t (1 - M^t) on token embeddings, before the positions are added.

    embeddings: (b, L, C_t); mask: m^t of every noun (J, b, L), taken as 1 at SOS and EOT, which so
    stay as they are; word_prompt: one vector per position (77, C_t); eot: (b,). Returns
    (J, b, L, C_t).
    """
    position = torch.arange(embeddings.shape[1], device=eot.device)
    mask = mask.masked_fill((position == 0) | (position == eot[:, None]), 1.0)[..., None]
    return embeddings * mask + word_prompt[: len(position)] * (1 - mask)


# --- the whole ------------------------------------------------------------------------------------


@dataclass
class Decomposition:
    """Every tensor of chapter 3 for b pairs, under its letter; None where an ablation has none."""

    n: Tensor  # n_j, the nouns' embeddings (J, b, C)
    n_prime: Tensor  # n'_j of Eq. 3.1, from hand-written prompts, without gradient (J, b, C)
    x_v: Tensor  # x^v, pixel-wise image embedding (b, H, W, C)
    soft_v: Tensor  # soft region masks of the pairs' own nouns, in (0, 1): (J, b, H, W)
    m_v: Tensor  # M^v, hard region masks, 0 or 1: (J, b, H, W)
    h_v: Tensor  # H^v of Eq. 3.4, highlighted images (J, b, 3, S, S)
    e_v: Tensor  # e^v of Eq. 3.6, region embeddings (J, b, C)
    e_t: Tensor | None = None  # e^t of Eq. 3.6, word segment embeddings (J, b, C)
    x_t: Tensor | None = None  # x^t, word-wise features (b, L, C)
    is_word: Tensor | None = None  # which positions are words: not SOS, EOT or padding (b, L)
    word_logits: Tensor | None = None  # Eq. 3.2, "none" first (J + 1, b, L)
    m_t: Tensor | None = None  # m^t of Eq. 3.3, word masks (J, b, L)
    h_t: Tensor | None = None  # H^t of Eq. 3.5, highlighted texts (J, b, L, C_t)


class CoDe(nn.Module):
    """Image-text co-decomposition: everything learned, around one frozen CLIP."""

    def __init__(self, clip: open_clip.CLIP, config: ModelConfig):
        super().__init__()
        self.config = config
        self.clip = clip  # frozen; the one copy of its weights that everything uses
        width, size = clip.token_embedding.embedding_dim, clip.visual.image_size
        start = tokenize([config.context_init])[0, 1:-1]  # none at all in TCL's released model
        if len(start) > 70:
            raise UserError("--context-init: at most 70 tokens, the noun needs the rest of 77")
        self.context = nn.Parameter(clip.token_embedding(start).detach().clone())
        self.image_segmenter = ImageSegmenter(clip, config)
        if self.decomposes_text:
            self.text_segmenter = TextSegmenter(clip, config)
        # log(1 / tau) of the contrastive losses, tau = 0.07 at the start.
        self.image_log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.region_log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        if config.co_decomposition:
            self.hcl_log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        # P^v and P^t start as zeros; where an ablation does not learn them, they stay so.
        p_v, learned = torch.zeros(3, *size), config.co_decomposition and config.region_prompt
        self.region_prompt = nn.Parameter(p_v) if learned else nn.Buffer(p_v, persistent=False)
        p_t, learned = torch.zeros(77, width), self.decomposes_text and config.word_prompt
        self.word_prompt = nn.Parameter(p_t) if learned else nn.Buffer(p_t, persistent=False)

    @property
    def decomposes_text(self) -> bool:
        return self.config.co_decomposition and self.config.word_segments

    def learned_state(self) -> dict[str, Tensor]:
        """Every learned tensor by name: the state without the frozen CLIP."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}

    def logit_scales(self) -> dict[str, Tensor]:
        """1 / tau of the contrasts "image", "region" and "hcl", at most 100."""
        found = {k: getattr(self, f"{k}_log_scale", None) for k in ("image", "region", "hcl")}
        return {k: p.exp().clamp(max=100) for k, p in found.items() if p is not None}

    def noun_embedding(self, tokens: Tensor) -> Tensor:
        """n_j (KgCoOp, section 3.2): learned context and noun through the frozen text tower.

        tokens: `clip.noun_prompts` of N nouns, (N, L). Returns (N, C), normalised.
        """
        embeddings = self.clip.token_embedding(tokens)
        context = self.context.expand(len(tokens), -1, -1)
        after = embeddings[:, 1 + len(self.context) :]
        embeddings = torch.cat([embeddings[:, :1], context, after], dim=1)
        return text_embedding(self.clip, embeddings, end_of_text(tokens))

    def word_features(self, tokens: Tensor) -> Tensor:
        """x^t (section 3.2) of captions: (b, L) -> (b, L, C), normalised."""
        length, positions = tokens.shape[1], len(self.word_prompt)
        if self.text_segmenter.attends_to_all:
            tokens = F.pad(tokens, (0, positions - length))
        with torch.no_grad():
            hidden = text_hidden(self.clip, self.clip.token_embedding(tokens))
        return self.text_segmenter(hidden, end_of_text(tokens))[:, :length]

    def forward(self, batch, noise: Tensor | None = None) -> Decomposition:
        """Decompose b pairs (a `data.Batch`) into regions and word segments.

        noise: logistic, for the hard masks (J, b, H, W); None: the logits alone decide.
        """
        clip, images = self.clip, batch.images  # (b, 3, S, S)
        with torch.no_grad():  # what only the frozen CLIP has to say
            n_prime = embed_texts(clip, batch.knowledge_tokens)  # (J b, C)
            hidden = visual_hidden(clip, images)  # (b, 1 + patches, width)
        n = self.noun_embedding(batch.noun_tokens).unflatten(0, (-1, len(images)))  # (J, b, C)

        # 3.2: region masks of every image's own nouns.
        x_v = self.image_segmenter(hidden, tuple(images.shape[-2:]))  # (b, H, W, C)
        logits = self.image_segmenter.own_mask_logits(x_v, n)  # (J, b, H, W)
        m_v = hard_mask(logits, noise)

        h_v = highlight_image(images, m_v, self.region_prompt)  # Eq. 3.4: (J, b, 3, S, S)
        e_v = image_embedding(clip, h_v.flatten(0, 1)).view_as(n)  # Eq. 3.6: e^v = E^v(H^v)
        d = Decomposition(n, n_prime.view_as(n), x_v, logits.sigmoid(), m_v, h_v, e_v)
        if not self.decomposes_text:
            d.e_t = n if self.config.co_decomposition else None  # section 4.4: bare nouns
            return d

        # 3.2: word masks of every caption under its own nouns.
        tokens, eot = batch.caption_tokens, end_of_text(batch.caption_tokens)  # (b, L), (b,)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        d.is_word = (position > 0) & (position < eot[:, None])
        d.x_t = self.word_features(tokens)  # (b, L, C)
        d.word_logits = self.text_segmenter.word_logits(d.x_t, n)  # Eq. 3.2: (J + 1, b, L)
        d.m_t = word_mask(d.word_logits)  # Eq. 3.3: (J, b, L)

        words = clip.token_embedding(tokens)  # X^t (b, L, C_t)
        d.h_t = highlight_text(words, d.m_t, self.word_prompt, eot)  # Eq. 3.5: (J, b, L, C_t)
        e_t = text_embedding(clip, d.h_t.flatten(0, 1), eot.repeat(len(n)))  # Eq. 3.6: E^t(H^t)
        d.e_t = e_t.view_as(n)
        return d

    @torch.no_grad()
    def class_embedding(self, names: Sequence[str]) -> Tensor:
        """n_c of class names, for evaluation: (N, C)."""
        tokens = noun_prompts(names, len(self.context)).to(self.context.device)
        return torch.cat([self.noun_embedding(chunk) for chunk in tokens.split(64)])
