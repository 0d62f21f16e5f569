"""The method: chapter 3 of the thesis, in its order and with its names.

Shapes: b pairs in this process, B in the global batch, J nouns per pair; T = J * B triplets
(image, text, noun) in noun-major order (every pair's first noun, then every pair's second).
C: CLIP's embedding width; C_t: its text width; h x w: patches; L: positions of the longest caption.
"""

import copy
from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from clip import (
    embed_texts,
    end_of_text,
    image_embedding,
    maskclip_block,
    noun_prompts,
    text_embedding,
    text_hidden,
    tokenize,
    transformer_block,
    visual_hidden,
)
from config import ModelConfig, UserError
from losses import Decomposition, gather, local_rows

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
        """(B, h, w, width) -> (B, 2h, 2w, width); channels last suits LayerNorm and convolution."""
        h, w = x.shape[1:3]
        for i, (norm, conv, gate) in enumerate(zip(self.norms, self.convs, self.gates)):
            y = F.gelu(norm(x))
            if i == 0:  # x as (B, h, 1, w, 1, width) stands for its nearest upsampling
                y = upsample_and_convolve(y, conv).unflatten(2, (w, 2)).unflatten(1, (h, 2))
                x = torch.addcmul(x[:, :, None, :, None], gate.tanh(), y)
                x = x.flatten(3, 4).flatten(1, 2)
            else:
                x = torch.addcmul(x, gate.tanh(), conv(y.movedim(-1, 1)).movedim(1, -1))
        return x


def upsample_and_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(nearest x2 (x)) for a zero-padded 3x3 convolution, without ever upsampling its input.

    After nearest upsampling a 3x3 window covers only 2x2 different cells, so each of the four
    output phases (even or odd row, even or odd column) is a 2x2 convolution at the low resolution,
    whose weights are sums of the 3x3 ones: 2.25 times fewer multiplications.
    (B, h, w, C) -> (B, 2h, 2w, C), equal up to rounding, borders included.
    """
    # Which of the three taps fall on the first and on the second of the two cells.
    even, odd = [[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]
    taps = torch.tensor([even, odd], dtype=conv.weight.dtype, device=x.device)  # (phase, cell, tap)
    sums = torch.einsum("pak,qbl->klpqab", taps, taps).reshape(9, 16)
    kernels = (conv.weight.flatten(2) @ sums).unflatten(-1, (2, 2, 2, 2))  # (C, C, p, q, a, b)
    h, w = x.shape[1:3]
    x = F.pad(x.movedim(-1, 1), (1, 1, 1, 1))
    rows = []
    for p in (0, 1):  # output row 2y + p sees the cells y - 1 + p and y + p
        phases = [
            F.conv2d(x[..., p : p + h + 1, q : q + w + 1], kernels[:, :, p, q], conv.bias)
            for q in (0, 1)
        ]
        rows.append(torch.stack([phase.movedim(1, -1) for phase in phases], dim=3))
    return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2)  # rows and columns interleaved


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
        """x^v from `clip.visual_hidden` of images of that size: (b, 4h, 4w, C), normalised."""
        h, w = image_size[0] // self.patch, image_size[1] // self.patch
        x = maskclip_block(self.block, hidden[:, 1:]).unflatten(1, (h, w))
        for block in self.upsampling:
            x = block(x)
        return F.normalize(self.ln_post(x) @ self.proj, dim=-1, eps=1e-6)

    def mask_logits(self, x_v: Tensor, nouns: Tensor) -> Tensor:
        """w s + b with s = x^v . n: (b, H, W, C) and nouns (N, C) -> (b, N, H, W)."""
        similarity = torch.einsum("bhwc,nc->bnhw", x_v, nouns)
        return self.mask_scale * similarity + self.mask_bias


def hard_mask(logits: Tensor, noise: Tensor | None) -> Tensor:
    """M^v for training: Gumbel-sigmoid at temperature 1 with a straight-through gradient.

    The value is 1 where sigmoid(logits + noise) > 0.5 and 0 elsewhere; the gradient is the
    sigmoid's. noise: logistic noise of the logits' shape, or None for the bare soft mask.
    """
    soft = torch.sigmoid(logits if noise is None else logits + noise)
    hard = (soft > 0.5).to(soft.dtype)
    return hard + soft - soft.detach()


# --- 3.2 word masks -------------------------------------------------------------------------------


class TextSegmenter(nn.Module):
    """F^t (section 3.2): word-wise features x^t, and w and b of the word logits.

    Two learned residual blocks on the frozen text tower's last hidden states. Unlike the tower they
    look both ways, and at the caption's own tokens only, from SOS to EOT.
    """

    def __init__(self, clip: open_clip.CLIP, config: ModelConfig):
        super().__init__()
        width = clip.token_embedding.embedding_dim
        heads = clip.transformer.resblocks[0].attn.num_heads
        self.blocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, act_layer=QuickGELU)
            for _ in range(config.text_layers)
        )
        self.word_scale = nn.Parameter(torch.tensor(config.word_scale))
        self.word_bias = nn.Parameter(torch.tensor(config.word_bias))

    def forward(self, hidden: Tensor, eot: Tensor) -> Tensor:
        """x^t from `clip.text_hidden`: (b, L, C_t), (b,) -> (b, L, C), normalised."""
        position = torch.arange(hidden.shape[1], device=eot.device)
        mask = (position <= eot[:, None])[:, None, None]  # (b, 1, 1, L)
        x = hidden
        for block in self.blocks:
            x = transformer_block(block, x, mask)
        return F.normalize(x, dim=-1, eps=1e-6)

    def word_logits(self, x_t: Tensor, nouns: Tensor) -> Tensor:
        """Eq. 3.2: l_j,i = w x^t_i . n_j + b.

        x_t: (b, L, C); nouns: the J nouns of every caption, (J, b, C). Returns (b, J, L).
        """
        return self.word_scale * torch.einsum("blc,jbc->bjl", x_t, nouns) + self.word_bias

    def word_cases(self, hidden: Tensor, eot: Tensor, nouns: Tensor) -> Tensor:
        """`word_mask` of captions under their nouns, from `clip.text_hidden`: (b, J + 1, L)."""
        return word_mask(self.word_logits(self(hidden, eot), nouns))


def word_mask(logits: Tensor) -> Tensor:
    """Eq. 3.3: log-probability of every word over "none" and the J nouns.

    The 1 in the denominator is exp of a constant logit 0, so this is a softmax over J + 1 cases.
    (b, J, L) -> (b, J + 1, L), case 0 being "none"; the exponential of cases 1..J is m^t.
    """
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1).log_softmax(dim=1)


# --- 3.3 region-word highlighting -----------------------------------------------------------------


def highlight_image(image: Tensor, mask: Tensor, region_prompt: Tensor) -> Tensor:
    """Eq. 3.4: H^v = X^v M^v + P^v (1 - M^v).

    image: (T, 3, H, W); mask: (T, h, w), resized to the image (nearest); prompt: (3, H, W).
    """
    mask = F.interpolate(mask[:, None], image.shape[-2:], mode="nearest")
    return image * mask + region_prompt * (1 - mask)


def highlight_text(embeddings: Tensor, mask: Tensor, word_prompt: Tensor, eot: Tensor) -> Tensor:
    """Eq. 3.5: H^t = X^t M^t + P^t (1 - M^t) on token embeddings, before the positions are added.

    embeddings: (b, L, C_t); mask: m^t of every noun (J, b, L), taken as 1 at SOS and EOT, which so
    stay as they are; prompt: one vector per position (77, C_t); eot: (b,). Returns (J, b, L, C_t).
    """
    position = torch.arange(embeddings.shape[1], device=eot.device)
    mask = mask.masked_fill((position == 0) | (position == eot[:, None]), 1.0)[..., None]
    return embeddings * mask + word_prompt[: len(position)] * (1 - mask)


# --- the whole ------------------------------------------------------------------------------------


class CoDe(nn.Module):
    """Image-text co-decomposition: everything learned, around one frozen CLIP."""

    def __init__(self, clip: open_clip.CLIP, config: ModelConfig):
        super().__init__()
        self.config = config
        self.clip = clip  # frozen; the one copy of its weights that everything uses
        width = clip.token_embedding.embedding_dim
        start = tokenize([config.context_init])[0, 1:-1]  # none at all in TCL's released model
        if len(start) > 70:
            raise UserError("--context-init: at most 70 tokens, the noun needs the rest of 77")
        self.context = nn.Parameter(clip.token_embedding(start).detach().clone())
        self.image_segmenter = ImageSegmenter(clip, config)
        # Temperatures of the contrastive losses, as log scales; CLIP's start of 0.07.
        log_scale = torch.tensor(1 / 0.07).log()
        self.image_log_scale = nn.Parameter(log_scale.clone())
        self.region_log_scale = nn.Parameter(log_scale.clone())
        if config.co_decomposition:
            self.hcl_log_scale = nn.Parameter(log_scale.clone())
        if self.decomposes_text:
            self.text_segmenter = TextSegmenter(clip, config)
        size = clip.visual.image_size
        prompts = {"region_prompt": torch.zeros(3, *size), "word_prompt": torch.zeros(77, width)}
        learned = {
            "region_prompt": config.co_decomposition and config.region_prompt,
            "word_prompt": self.decomposes_text and config.word_prompt,
        }
        for name, zeros in prompts.items():
            if learned[name]:
                self.register_parameter(name, nn.Parameter(zeros))
            else:
                self.register_buffer(name, zeros, persistent=False)

    @property
    def decomposes_text(self) -> bool:
        return self.config.co_decomposition and self.config.word_segments

    def train(self, mode: bool = True) -> "CoDe":
        super().train(mode)
        self.clip.eval()
        return self

    def learned_state(self) -> dict[str, Tensor]:
        """Every learned tensor by name: the state without the frozen CLIP."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("clip.")}

    def noun_embedding(self, tokens: Tensor) -> Tensor:
        """n_j (KgCoOp, section 3.2): learned context and noun through the frozen text tower.

        tokens: `clip.noun_prompts` of N nouns, (N, L). Returns (N, C), normalised.
        """
        embeddings = self.clip.token_embedding(tokens)
        context = self.context.expand(len(tokens), -1, -1)
        after = embeddings[:, 1 + len(self.context) :]
        embeddings = torch.cat([embeddings[:, :1], context.to(after.dtype), after], dim=1)
        return text_embedding(self.clip, embeddings, end_of_text(tokens))

    def forward(self, batch, noise: Tensor | None = None) -> Decomposition:
        """Decompose b pairs (a `data.Batch`) into regions and word segments.

        Eq. 3.6: e^v = E^v(H^v), e^t = E^t(H^t), of every highlighted region and word segment.

        noise: logistic noise for the hard masks (T_local, 4h, 4w), None for none.
        """
        clip, images = self.clip, batch.images
        pairs, nouns_per_pair = len(images), len(batch.noun_tokens) // len(images)
        size = tuple(images.shape[-2:])

        # 3.1, 3.2: noun embeddings, and what hand-written prompts say of the same nouns.
        n = self.noun_embedding(batch.noun_tokens)  # (J*b, C)
        with torch.no_grad():
            n_knowledge = embed_texts(clip, batch.knowledge_tokens)
        n = n.unflatten(0, (nouns_per_pair, pairs))  # (J, b, C)
        every_noun = gather(n, dim=1).flatten(0, 1)  # (T, C), the global batch's

        # 3.2: region masks, of these images under the nouns of all images.
        with torch.no_grad():
            hidden = visual_hidden(clip, images)
        x_v = self.image_segmenter(hidden, size)  # (b, 4h, 4w, C)
        logits = self.image_segmenter.mask_logits(x_v, every_noun)  # (b, T, 4h, 4w)
        own = own_nouns(logits, nouns_per_pair)  # (J*b, 4h, 4w)
        mask = hard_mask(own, noise)

        # 3.3, 3.4: highlighted regions and their embeddings.
        repeated = images.expand(nouns_per_pair, *images.shape).flatten(0, 1)
        e_v = image_embedding(clip, highlight_image(repeated, mask, self.region_prompt))

        masks = logits.sigmoid().to(x_v.dtype)  # autocast keeps logits in half, x_v in full
        result = Decomposition(n.flatten(0, 1), n_knowledge, x_v, masks, e_v)
        if not self.decomposes_text:
            result.e_t = n.flatten(0, 1) if self.config.co_decomposition else None
            return result

        # 3.2: word masks, of these captions under their own nouns.
        eot = end_of_text(batch.caption_tokens)
        with torch.no_grad():
            embeddings = clip.token_embedding(batch.caption_tokens)
            hidden = text_hidden(clip, embeddings)
        cases = self.text_segmenter.word_cases(hidden, eot, n)  # (b, J + 1, L)
        m_t = cases[:, 1:].exp().movedim(1, 0)  # (J, b, L)

        # 3.3, 3.4: highlighted word segments and their embeddings.
        highlighted = highlight_text(embeddings, m_t, self.word_prompt, eot)
        result.e_t = text_embedding(clip, highlighted.flatten(0, 1), eot.repeat(nouns_per_pair))
        result.word_cases = cases
        return result

    @torch.no_grad()
    def class_embedding(self, names: Sequence[str]) -> Tensor:
        """n_c of class names, for evaluation: (N, C)."""
        tokens = noun_prompts(names, len(self.context)).to(self.context.device)
        return torch.cat([self.noun_embedding(chunk) for chunk in tokens.split(64)])


def own_nouns(logits: Tensor, nouns_per_pair: int) -> Tensor:
    """Each local image's planes under its own nouns: (b, T, H, W) -> (J*b, H, W), noun-major."""
    pairs = logits.shape[1] // nouns_per_pair  # B
    rows = local_rows(len(logits), logits.device)  # which of the B pairs are here
    planes = logits.unflatten(1, (nouns_per_pair, pairs))  # (b, J, B, H, W)
    here = torch.arange(len(logits), device=logits.device)
    return planes[here, :, rows].movedim(1, 0).flatten(0, 1)
