"""The decoder-only transformer of both families, `gpt2` and `llama`: pre-norm blocks built from the plan's model section.

Shape suffixes: B batch, T tokens, S tokens with those of the cache before them, D width, F FFN width, H heads, K key/value
heads, E head width, V vocabulary.
A parameter's name without `.weight` is its name in the plan.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_cli.planning.plan import PlanModel
from supar_cli.sparse.linear import Linear, compute_dtype


def norm(config: PlanModel) -> nn.Module:
    """RMSNorm (gain) or LayerNorm (gain, bias if the model has biases) over D."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, config.norm_eps, bias=config.bias)


def embedding(rows: int, width: int) -> nn.Embedding:
    """An embedding (rows, D) without initial values: torch's own would draw some and move its random stream."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)  # type: ignore[no-any-return,no-untyped-call]


def rope_tables(context: int, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, E/2). Su et al. 2021, arXiv 2104.09864, eq. 34."""
    frequency_E = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle_TE = torch.arange(context, dtype=torch.float64)[:, None] * frequency_E[None, :]
    return angle_TE.cos().float(), angle_TE.sin().float()


def rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2), the layout of Llama's published weights."""
    first, second = x_BHTE.chunk(2, dim=-1)
    cos_TE, sin_TE = cos_TE.to(x_BHTE.dtype), sin_TE.to(x_BHTE.dtype)
    return torch.cat((first * cos_TE - second * sin_TE, second * cos_TE + first * sin_TE), dim=-1)


def alibi_bias(context: int, heads: int) -> Tensor:
    """Causal bias (H, T, T): -slope · distance. Press et al. 2022, arXiv 2108.12409: slopes 2^(-8i/n), i = 1…n.

    For a head count that is not a power of two the paper's code takes every other slope of the next power; so do we.
    """
    power = 1 << (heads.bit_length() - 1)
    exponents = [8.0 * (i + 1) / power for i in range(power)]
    exponents += [4.0 * (2 * i + 1) / power for i in range(heads - power)]
    slope_H = 2.0 ** -torch.tensor(exponents)
    position_T = torch.arange(context)
    distance_TT = (position_T[:, None] - position_T[None, :]).float()
    bias_HTT = -slope_H[:, None, None] * distance_TT
    return bias_HTT.masked_fill_(distance_TT < 0, float("-inf"))


def causal_bias(tokens: int, before: int, device: torch.device) -> Tensor:
    """Bias (T, S) of tokens that follow others, `before` them: each sees those, itself and what lies between."""
    return torch.full((tokens, before + tokens), float("-inf"), device=device).triu(before + 1)


class KeyValues:
    """The keys and values (B, K, S, E) that a block has made of the tokens read so far; none at first."""

    def __init__(self) -> None:
        self.tokens = 0
        self._parts: tuple[Tensor, Tensor] | None = None

    def extend(self, k_BKTE: Tensor, v_BKTE: Tensor) -> tuple[Tensor, Tensor]:
        """Take over the keys and values of the tokens that follow, and return those of all."""
        both = (k_BKTE, v_BKTE)
        if self._parts is not None:
            both = torch.cat((self._parts[0], k_BKTE), dim=2), torch.cat((self._parts[1], v_BKTE), dim=2)
        self._parts, self.tokens = both, self.tokens + k_BKTE.shape[2]
        return both


class Attention(nn.Module):
    """Self-attention (B, T, D) → (B, T, D), causal but in a vision transformer, with the plan's factor on q·k."""

    def __init__(self, config: PlanModel) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = config.heads, config.kv_heads, config.head_width
        self.scale, self.is_causal = config.multipliers.attention, config.is_causal
        inner, kv_inner = self.heads * self.head_width, self.kv_heads * self.head_width
        self.q = Linear(config.width, inner, config.bias)
        self.k = Linear(config.width, kv_inner, config.bias)
        self.v = Linear(config.width, kv_inner, config.bias)
        self.o = Linear(inner, config.width, config.bias)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        bias_HTS: Tensor | None,
        past: KeyValues | None = None,
    ) -> Tensor:
        B, T, _ = x_BTD.shape
        q_BHTE, k_BKTE, v_BKTE = (
            project(x_BTD).view(B, T, -1, self.head_width).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        if rope is not None:
            q_BHTE, k_BKTE = rotate(q_BHTE, *rope), rotate(k_BKTE, *rope)
        if past is not None:
            k_BKTE, v_BKTE = past.extend(k_BKTE, v_BKTE)  # (B, K, S, E)
        mask = None if bias_HTS is None else bias_HTS.to(q_BHTE.dtype)
        is_causal, is_grouped = self.is_causal and mask is None, self.kv_heads != self.heads
        mixed_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, attn_mask=mask, is_causal=is_causal, scale=self.scale, enable_gqa=is_grouped
        )
        return self.o(mixed_BHTE.transpose(1, 2).reshape(B, T, self.heads * self.head_width))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """GELU (exact, or GPT-2's approximation by tanh) or SwiGLU feed-forward (B, T, D) → (B, T, D)."""

    def __init__(self, config: PlanModel) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.gate = Linear(config.width, config.ffn_width, config.bias) if config.activation == "swiglu" else None
        self.up = Linear(config.width, config.ffn_width, config.bias)
        self.down = Linear(config.ffn_width, config.width, config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up_BTF = self.up(x_BTD)
        if self.gate is not None:
            return self.down(F.silu(self.gate(x_BTD)) * up_BTF)  # type: ignore[no-any-return]
        if self.down.applies_gelu:
            return self.down(up_BTF, self.approximate)  # type: ignore[no-any-return]
        return self.down(F.gelu(up_BTF, approximate=self.approximate))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: PlanModel) -> None:
        super().__init__()
        self.residual = config.multipliers.residual
        self.attn_norm, self.attn = norm(config), Attention(config)
        self.mlp_norm, self.mlp = norm(config), FeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        bias_HTS: Tensor | None,
        past: KeyValues | None = None,
    ) -> Tensor:
        # add's own factor is free; a separate product would be one more pass over memory
        x_BTD = torch.add(x_BTD, self.attn(self.attn_norm(x_BTD), rope, bias_HTS, past), alpha=self.residual)
        return torch.add(x_BTD, self.mlp(self.mlp_norm(x_BTD)), alpha=self.residual)


class Transformer(nn.Module):
    """Tokens (B, T) → logits (B, T, V), the output multiplier included so that every use of the model has it.

    With targets (B, T) it returns their mean cross-entropy () in nats instead, in float32 whatever the logits' precision.
    It is made of `chunk` tokens at a time, so that no more logits than (chunk, V) are ever held; None: of all at once.

    With a `cache`, which `new_cache` makes, tokens follow those that were read with it before, and are added to it.
    """

    compiled_methods = ("embed", "head")  # all but the blocks, which are compiled by themselves
    bias_HTT: Tensor  # None unless positions are alibi

    def __init__(self, config: PlanModel) -> None:
        super().__init__()
        self.config = config
        self.embedding = embedding(config.vocab, config.width)
        self.positions = embedding(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = norm(config)
        self.unembedding = None if config.tied else Linear(config.width, config.vocab, bias=False)
        cos_TE, sin_TE = rope_tables(config.context, config.head_width, config.rope_theta)
        self.register_buffer("cos_TE", cos_TE if config.positions == "rope" else None, persistent=False)
        self.register_buffer("sin_TE", sin_TE if config.positions == "rope" else None, persistent=False)
        bias_HTT = alibi_bias(config.context, config.heads) if config.positions == "alibi" else None
        self.register_buffer("bias_HTT", bias_HTT, persistent=False)

    def new_cache(self) -> list[KeyValues]:
        """A cache of no tokens yet, for each block."""
        return [KeyValues() for _ in self.blocks]

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        chunk: int | None = None,
        cache: list[KeyValues] | None = None,
    ) -> Tensor:
        T, before = tokens_BT.shape[1], 0 if cache is None else cache[0].tokens
        now, so_far = slice(before, before + T), slice(before + T)
        x_BTD = self.embed(tokens_BT, now)
        rope = (self.cos_TE[now], self.sin_TE[now]) if self.config.positions == "rope" else None  # type: ignore[index]
        bias_HTS = None if cache is None else causal_bias(T, before, tokens_BT.device)
        if self.config.positions == "alibi":
            bias_HTS = self.bias_in(compute_dtype(x_BTD))[:, now, so_far]
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rope, bias_HTS, None if cache is None else cache[i])
        return self.head(x_BTD, targets_BT, chunk)

    def embed(self, tokens_BT: Tensor, now: slice) -> Tensor:
        """The first block's inputs (B, T, D) of tokens whose positions are `now`."""
        x_BTD = self.embedding(tokens_BT)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[now]
        return x_BTD * self.config.multipliers.input  # type: ignore[no-any-return]

    def head(self, x_BTD: Tensor, targets_BT: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """The logits (B, T, V) of the last block's outputs, or the loss () of targets."""
        x_BTD = self.final_norm(x_BTD)
        weight_VD = self.embedding.weight if self.unembedding is None else self.unembedding.weight
        if targets_BT is not None and chunk is not None:
            return chunked_loss(x_BTD, weight_VD, targets_BT, self.config.multipliers.output, chunk)
        logits_BTV = F.linear(x_BTD, weight_VD) * self.config.multipliers.output
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    def bias_in(self, dtype: torch.dtype) -> Tensor:
        """ALiBi's bias (H, T, T), held in the precision of the last products: it is rounded once, not in each block."""
        if self.bias_HTT.dtype != dtype:
            with torch.inference_mode(False):  # else no pass that trains could keep it
                self.bias_HTT = alibi_bias(self.config.context, self.config.heads).to(self.bias_HTT.device, dtype)
        return self.bias_HTT


def chunked_loss(
    x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, multiplier: float, chunk: int | None = None
) -> Tensor:
    """Mean cross-entropy () in nats of the logits multiplier · X·Wᵀ, `chunk` tokens at a time in both passes.

    A chunk's gradients are made with its logits, which are then given up: no product is made twice, and memory doesn't grow
    with tokens · V.
    """
    x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
    arguments = (x_ND, weight_VD, targets_N, multiplier, chunk or len(targets_N), torch.is_grad_enabled())
    return _HeadLoss.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]


class _HeadLoss(torch.autograd.Function):
    """The mean cross-entropy of multiplier · X·Wᵀ, `chunk` tokens at a time; its gradients are made in the forward pass.

    None are made unless `is_training`: under no_grad torch still says that they are needed.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, multiplier: float, chunk: int, is_training: bool
    ) -> Tensor:
        tokens, needs_gradients = len(targets_N), is_training and any(ctx.needs_input_grad[:2])
        losses, by_x, by_weight_VD = [], [], torch.zeros_like(weight_VD) if needs_gradients else None
        for first in range(0, tokens, chunk):
            x_CD, targets_C = x_ND[first : first + chunk], targets_N[first : first + chunk]
            logits_CV = F.linear(x_CD, weight_VD) * multiplier
            loss, slope_CV = _loss_and_slope(logits_CV, targets_C)
            losses.append(loss)
            if by_weight_VD is not None:
                slope_CV = slope_CV.mul_(multiplier / tokens).to(logits_CV.dtype)
                by_x.append((slope_CV @ weight_VD).to(x_ND.dtype))
                by_weight_VD += slope_CV.t() @ x_CD
        if by_weight_VD is not None:
            ctx.save_for_backward(torch.cat(by_x), by_weight_VD)
        return torch.stack(losses).sum() / tokens

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        by_x_ND, by_weight_VD = ctx.saved_tensors
        # in place, as no weight's gradient is held twice; a second backward pass is refused by autograd
        return by_x_ND.mul_(gradient), by_weight_VD.mul_(gradient), None, None, None, None


def _loss_and_slope(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropies' sum () and its gradient by the logits (C, V), in float32."""
    log_chance_CV = logits_CV.float().log_softmax(1)
    loss = F.nll_loss(log_chance_CV, targets_C, reduction="sum")
    minus_one_C1 = log_chance_CV.new_full((len(targets_C), 1), -1.0)
    return loss, log_chance_CV.exp_().scatter_add_(1, targets_C[:, None], minus_one_C1)


def named_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by their names in the plan."""
    return {name.removesuffix(".weight"): parameter for name, parameter in model.named_parameters()}
