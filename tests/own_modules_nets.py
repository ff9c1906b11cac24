"""Whole small nets: recurrent cells, convolutions, agents, generators, two networks in one module, random paths."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.own_modules import FEATURES, TOKENS, VOCAB, Case, features, inside, net

HEAD = {"head__weight": "unembedding[1] head", "head__bias": "bias after_head"}


def recurrent() -> Iterator[Case]:
    """Recurrent layers, fused and by cell. Whether what goes in is a first sum is open where it is added to the state."""
    for kind in ("RNN", "GRU", "LSTM"):
        layers = {
            f"{part}_{side}_l{layer}": "bias *" for part in ("bias",) for side in ("ih", "hh") for layer in (0, 1)
        }
        yield inside(
            f"nn.{kind}",
            lambda width, kind=kind: {"cell": getattr(nn, kind)(width, width, 2, batch_first=True)},
            lambda m, h, x: m.cell(h)[0],
            **{f"cell__{name}": text for name, text in layers.items()},
            **{f"cell__weight_{side}_l{layer}": "hidden[1]" for side in ("ih", "hh") for layer in (0, 1)},
        )
        yield net(
            f"nn.{kind} on numbers",
            lambda width, kind=kind: {"cell": getattr(nn, kind)(FEATURES, width), "head": nn.Linear(width, 2)},
            lambda m, x: m.head(m.cell(x)[0][-1]),
            features,
            cell__weight_ih_l0="embedding *",
            cell__weight_hh_l0="hidden[1]",
            cell__bias_ih_l0="bias *",
            cell__bias_hh_l0="bias *",
            **HEAD,
        )
        yield inside(
            f"nn.{kind}Cell",
            lambda width, kind=kind: {"cell": getattr(nn, f"{kind}Cell")(width, width)},
            lambda m, h, x: _unrolled(m.cell, h),
            **{f"cell__bias_{side}": "bias" for side in ("ih", "hh")},
            **{f"cell__weight_{side}": "hidden[1]" for side in ("ih", "hh")},
        )
    yield inside(
        "a cell by hand, from zeros",
        lambda width: {"enter": (width, width), "again": (width, width), "shift": (width,)},
        lambda m, h, x: _from_zeros(lambda one, state: one @ m.enter + state @ m.again + m.shift, h),
        enter="hidden[0]",
        again="hidden[0]",
        shift="bias",
    )
    yield inside(
        "nn.LSTM with a projection, both ways",
        lambda width: {"cell": nn.LSTM(width, width, bidirectional=True, proj_size=width // 2, bias=False)},
        lambda m, h, x: m.cell(h)[0],
        **{
            f"cell__weight_{side}_l0{way}": "hidden[1]" for side in ("ih", "hh", "hr") for way in ("", "_reverse")
        },
    )  # fmt: skip
    yield net(
        "a learned initial state",
        lambda width: {
            "table": nn.Embedding(VOCAB, width),
            "cell": nn.GRU(width, width, batch_first=True),
            "state": (1, 1, width),
            "head": nn.Linear(width, VOCAB),
        },
        lambda m, x: m.head(m.cell(m.table(x), m.state.expand(-1, len(x), -1).contiguous())[0]),
        table__weight="embedding first_sum",
        cell__weight_ih_l0="hidden[1]",
        cell__weight_hh_l0="hidden[1]",
        cell__bias_ih_l0="bias",
        cell__bias_hh_l0="bias",
        state="bias,embedding | bias,embedding first_sum",
        **HEAD,
    )


def _from_zeros(step: Any, h: Tensor) -> Tensor:
    state = torch.zeros_like(h[:, 0])
    for token in h.unbind(1):
        state = torch.tanh(step(token, state))
    return state


def _unrolled(cell: nn.Module, h: Tensor) -> Tensor:
    state: Any = None
    for token in h.unbind(1):
        state = cell(token, state)
    return state[0] if isinstance(state, tuple) else state


class _Branch(nn.Module):
    def __init__(self, width: int, skip: float) -> None:
        super().__init__()
        self.up, self.down, self.skip = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), skip

    def forward(self, h: Tensor) -> Tensor:
        if self.training and torch.rand(()) < self.skip:
            return h
        return h + self.down(self.up(h).relu())


def _branches(prefix: str, number: int) -> dict[str, str]:
    rows = {"up__weight": "hidden[1]", "up__bias": "bias", "down__weight": "hidden[1]", "down__bias": "bias"}
    return {f"{prefix}__{index}__{name}": text for index in range(number) for name, text in rows.items()}


def random_paths() -> Iterator[Case]:
    """Paths that a pass takes or not: a parameter that some pass reads was read."""
    for skip in (0.5, 0.9):
        yield inside(
            f"blocks skipped with probability {skip}",
            lambda width, skip=skip: {"blocks": nn.ModuleList(_Branch(width, skip) for _ in range(4))},
            lambda m, h, x: _through(m.blocks, h),
            **_branches("blocks", 4),
        )
    yield inside(
        "a path that evaluation alone takes",
        lambda width: {"late": nn.Linear(width, width, bias=False), "blocks": nn.ModuleList([_Branch(width, 0.0)])},
        lambda m, h, x: _through(m.blocks, h) if m.training else m.late(_through(m.blocks, h)),
        late__weight="hidden[1] | refuse",
        **_branches("blocks", 1),
    )
    yield inside(
        "an expert that gets no token",
        lambda width: {"experts": nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))},
        lambda m, h, x: m.experts[0](h[:, :3]).tanh() + m.experts[1](h[:, TOKENS:]).sum(1, keepdim=True),
        experts__0__weight="hidden[1]",
        experts__1__weight="hidden[1]",
    )
    yield inside(
        "a parameter that nothing reads",
        lambda width: {"unused": nn.Linear(width, width, bias=False)},
        lambda m, h, x: h,
        unused__weight="refuse",
    )
    yield inside(
        "a parameter that nothing reads, ignored",
        lambda width: {"unused": nn.Linear(width, width, bias=False)},
        lambda m, h, x: h,
        options={"ignore": ("unused.weight",)},
        unused__weight="none",
    )
    yield inside(
        "a parameter of a penalty alone",
        lambda width: {"weight": (width, width)},
        lambda m, h, x: h + 0.0 * torch.linalg.matrix_norm(m.weight),
        weight="refuse | ask",
    )


def _through(blocks: Any, h: Tensor) -> Tensor:
    for block in blocks:
        h = block(h)
    return h


def _two_networks(width: int) -> dict[str, Any]:
    online = nn.Sequential(
        nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
    )
    return {"online": online, "target": copy.deepcopy(online).requires_grad_(False)}


_AGENT = {"0__weight": "embedding first_sum", "0__bias": "bias first_sum", "2__weight": "hidden[1]", "2__bias": "bias"}
_AGENT |= {"4__weight": "unembedding[1] head", "4__bias": "bias after_head"}


def _difference(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        aim = 0.99 * model.target(x).max(-1).values
    return (model.online(x)[..., 0] - aim).pow(2).mean()


def agents() -> Iterator[Case]:
    """Two networks in one module, and nets that have no forward pass of their own."""
    both = {f"{name}__{part}": text for name in ("online", "target") for part, text in _AGENT.items()}
    yield net("a Q net and its target", _two_networks, _difference, features, **both)
    passed = {"run": lambda model: _difference(model, torch.randn(4, FEATURES)), "example": None}
    yield net("a Q net and its target, by a pass of one's own", _two_networks, None, features, options=passed, **both)
    online = {f"online__{part}": text for part, text in _AGENT.items()}
    target = {f"target__{part}": "refuse" for part in _AGENT}
    yield net("a target that no pass reads", _two_networks, lambda m, x: m.online(x), features, **online, **target)
    names = [name for name, _ in nn.ModuleDict(_two_networks(4)).named_parameters() if name.startswith("target")]
    ignored = {f"target__{part}": "none" for part in _AGENT}
    yield net(
        "a target that is ignored",
        _two_networks,
        lambda m, x: m.online(x),
        features,
        options={"ignore": names},
        **online,
        **ignored,
    )
    yield net(
        "a variational autoencoder",
        lambda width: {
            "enter": nn.Linear(FEATURES, width),
            "mean": nn.Linear(width, 4),
            "spread": nn.Linear(width, 4),
            "grow": nn.Linear(4, width),
            "leave": nn.Linear(width, FEATURES),
        },
        _autoencoded,
        features,
        enter__weight="embedding first_sum",
        enter__bias="bias first_sum",
        mean__weight="ask | unembedding[1] *",
        mean__bias="bias *",
        spread__weight="ask | unembedding[1] *",
        spread__bias="bias *",
        grow__weight="embedding | embedding first_sum",
        grow__bias="bias | bias first_sum",
        leave__weight="unembedding[1] head",
        leave__bias="bias after_head",
        answers={"mean.weight": "unembedding", "spread.weight": "unembedding"},
    )
    yield net(
        "a generator and its critic",
        lambda width: {
            "grow": nn.ConvTranspose2d(4, width, 4),
            "norm": nn.BatchNorm2d(width),
            "paint": nn.ConvTranspose2d(width, 3, 4, 2, 1),
            "see": nn.Conv2d(3, width, 4, 2, 1),
            "judge": nn.Conv2d(width, 1, 4),
        },
        lambda m, x: m.judge(F.leaky_relu(m.see(torch.tanh(m.paint(m.norm(m.grow(x[:, :4, :1, None])).relu()))), 0.2)),
        features,
        grow__weight="embedding",
        grow__bias="bias",
        norm__weight="norm first_sum",
        norm__bias="bias first_sum",
        paint__weight="ask",
        paint__bias="bias",
        see__weight="embedding | embedding first_sum",
        see__bias="bias | bias first_sum",
        judge__weight="unembedding[1,2,3] head",
        judge__bias="bias after_head",
        answers={"paint.weight": "unembedding"},
    )


def _autoencoded(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    h = m.enter(x).relu()
    mean, spread = m.mean(h), m.spread(h)
    z = mean + torch.randn_like(mean) * torch.exp(0.5 * spread)
    return m.leave(m.grow(z).relu()), mean, spread


class _Block(nn.Module):
    """A pre-norm block as in most public GPTs, attention of fixed head width 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.ln_1(x)).split(x.shape[-1], -1)
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in (q, k, v))
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


def _gpt(width: int) -> dict[str, Any]:
    table = nn.Embedding(VOCAB, width)
    head = nn.Linear(width, VOCAB, bias=False)
    table.weight = head.weight
    blocks = nn.ModuleList(_Block(width) for _ in range(2))
    return {"wte": table, "wpe": nn.Embedding(TOKENS, width), "h": blocks, "ln_f": nn.LayerNorm(width), "lm_head": head}


_GPT_BLOCK = {"ln_1__weight": "norm", "ln_1__bias": "bias", "ln_2__weight": "norm", "ln_2__bias": "bias"}
_GPT_BLOCK |= {"c_attn__weight": "hidden[1]", "c_attn__bias": "bias"}
_GPT_BLOCK |= {"c_proj__weight": "hidden[1] writes", "c_proj__bias": "bias writes"}
_GPT_BLOCK |= {"mlp__0__weight": "hidden[1]", "mlp__0__bias": "bias"}
_GPT_BLOCK |= {"mlp__2__weight": "hidden[1] writes", "mlp__2__bias": "bias writes"}


def decoders() -> Iterator[Case]:
    """A tied GPT, and the same where every extent that is finite equals the width of the base."""
    rows = {f"h__{block}__{name}": text for block in range(2) for name, text in _GPT_BLOCK.items()}
    yield net(
        "a tied GPT",
        _gpt,
        lambda m, x: m.lm_head(m.ln_f(_through(m.h, m.wte(x) + m.wpe(torch.arange(x.shape[1]))))),
        residual=True,
        wte__weight="embedding first_sum head",
        wpe__weight="embedding first_sum",
        ln_f__weight="norm before_head",
        ln_f__bias="bias before_head",
        **rows,
    )
    yield net(
        "every extent is 16",
        lambda width: {
            "table": nn.Embedding(16, width),
            "positions": (16, width),
            "a": (width, width),
            "b": (width, width),
            "head": nn.Linear(width, 16),
        },
        lambda m, x: m.head((m.table(x) + m.positions) @ m.a @ m.b.t()),
        lambda model: (torch.randint(0, 16, (16, 16)),),
        table__weight="embedding first_sum",
        positions="embedding first_sum",
        a="hidden[0]",
        b="hidden[1]",
        **HEAD,
    )
    yield inside(
        "nn.MultiheadAttention",
        lambda width: {"attention": nn.MultiheadAttention(width, 4, batch_first=True)},
        lambda m, h, x: m.attention(h, h, h)[0],
        attention__in_proj_weight="hidden[1]",
        attention__in_proj_bias="bias",
        attention__out_proj__weight="hidden[1]",
        attention__out_proj__bias="bias",
    )
    layer = {
        "linear1__weight": "hidden[1]",
        "linear1__bias": "bias",
        "linear2__weight": "hidden[1]",
        "linear2__bias": "bias",
    }
    layer |= {f"norm{n}__{part}": role for n in (1, 2) for part, role in (("weight", "norm"), ("bias", "bias"))}
    layer |= {"self_attn__in_proj_weight": "hidden[1]", "self_attn__in_proj_bias": "bias"}
    layer |= {"self_attn__out_proj__weight": "hidden[1]", "self_attn__out_proj__bias": "bias"}
    for first in (True, False):
        yield inside(
            f"nn.TransformerEncoderLayer, norm_first={first}",
            lambda width, first=first: {
                "layer": nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=first)
            },
            lambda m, h, x: m.layer(h),
            **{f"layer__{name}": text for name, text in layer.items()},
        )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (recurrent, random_paths, agents, decoders):
        yield from group()
