"""Modules that show which products leave a model and which stay inside, and what writes the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.own_modules import EXPERTS, FEATURES, TOKENS, VOCAB, Case, features, inside, net


def _head(width: int) -> nn.Linear:
    return nn.Linear(width, VOCAB + 2, bias=False)


HEAD = {"head__weight": "unembedding[1] head"}


def heads() -> Iterator[Case]:
    """α_output belongs to products that leave the model alone."""
    tied = lambda width: {"table": nn.Embedding(VOCAB, width), "mix": nn.Linear(width, width, bias=False)}  # noqa: E731
    both = {"table__weight": "embedding first_sum head", "mix__weight": "hidden[1]"}
    norm = {"norm__weight": "norm before_head", "norm__bias": "bias before_head"}
    body = lambda m, x: m.mix(m.table(x)).tanh()  # noqa: E731
    normed = lambda width: {**tied(width), "norm": nn.LayerNorm(width)}  # noqa: E731
    yield net("a tied head behind a norm", normed, lambda m, x: m.norm(body(m, x)) @ m.table.weight.t(), **both, **norm)
    yield net(
        "a tied head behind a norm and dropout",
        normed,
        lambda m, x: F.linear(F.dropout(m.norm(body(m, x)), 0.1)[:, -1:], m.table.weight),
        **both,
        **norm,
    )
    plain = {"norm__weight": "norm", "norm__bias": "bias"}
    yield net(
        "a tied head, a gain and a product between",
        lambda width: {**normed(width), "out": nn.Linear(width, width, bias=False)},
        lambda m, x: F.linear(m.out(m.norm(body(m, x))), m.table.weight),
        out__weight="hidden[1]",
        multiply_at={"table.weight": None},
        **both,
        **plain,
    )
    yield net(
        "a tied head without a norm", tied, lambda m, x: body(m, x) @ m.table.weight.t(), multiply_at={"table.weight": None}, **both
    )  # fmt: skip
    yield net(
        "a tied head of a module",
        _tied_module,
        lambda m, x: m.out(body(m, x)),
        multiply_at={"table.weight": "out"},
        **both,
    )
    yield net(
        "a norm read by a tied head and a second head",
        lambda width: {**normed(width), "value": nn.Linear(width, 1)},
        lambda m, x: (lambda h: (F.linear(h, m.table.weight), m.value(h)))(m.norm(body(m, x))),
        value__weight="unembedding[1] head",
        value__bias="bias after_head",
        **both,
        **plain,
    )
    yield net(
        "a norm that is returned too",
        normed,
        lambda m, x: (lambda h: (F.linear(h, m.table.weight), h))(m.norm(body(m, x))),
        table__weight=both["table__weight"],
        mix__weight="hidden[1]",
        norm__weight="norm | norm before_head",
        norm__bias="bias | bias before_head",
    )
    yield net(
        "a norm used in two places",
        normed,
        lambda m, x: F.linear(m.norm(m.mix(m.norm(m.table(x)))), m.table.weight),
        table__weight="embedding head | ask",  # the norm undoes a fold into the table, and its own gain is used twice
        mix__weight="hidden[1]",
        norm__weight="norm | norm first_sum before_head",
        norm__bias="bias | bias first_sum before_head",
        answers={"table.weight": "embedding"},
    )
    yield net(
        "a norm of 1 + g",
        lambda width: {**tied(width), "g": nn.Parameter(torch.zeros(width))},
        lambda m, x: F.linear(F.rms_norm(body(m, x), m.g.shape) * (1 + m.g), m.table.weight),
        g="norm before_head derived",
        **both,
    )
    yield net(
        "a gain that multiplies, by hand",
        lambda width: {**tied(width), "g": nn.Parameter(torch.ones(width))},
        lambda m, x: F.linear(m.g * F.rms_norm(body(m, x), m.g.shape), m.table.weight),
        g="norm before_head",
        **both,
    )
    yield net(
        "a tied head with a bias",
        lambda width: {**normed(width), "bias": nn.Parameter(torch.zeros(VOCAB))},
        lambda m, x: F.linear(m.norm(body(m, x)), m.table.weight, m.bias),
        bias="bias after_head",
        **both,
        **norm,
    )
    stem = {"stem__weight": "embedding first_sum", "stem__bias": "bias first_sum"}
    actor = lambda width: {"stem": nn.Linear(FEATURES, width)}  # noqa: E731
    yield net(
        "several heads",
        lambda width: {**actor(width), "policy": nn.Linear(width, 2), "value": nn.Linear(width, 1), "spread": (2,)},
        lambda m, x: (lambda h: (m.policy(h), m.spread.exp(), m.value(h)))(m.stem(x).tanh()),
        features,
        policy__weight="unembedding[1] head",
        policy__bias="bias after_head",
        value__weight="unembedding[1] head",
        value__bias="bias after_head",
        spread="bias,norm,embedding *",
        **stem,
    )
    yield net(
        "a spread that is expanded to the mean",
        lambda width: {**actor(width), "policy": nn.Linear(width, 2), "spread": (1, 2)},
        lambda m, x: (lambda mean: (mean, m.spread.expand_as(mean)))(m.policy(m.stem(x).tanh())),
        features,
        policy__weight="unembedding[1] head",
        policy__bias="bias after_head",
        spread="bias,norm,embedding *",
        **stem,
    )
    yield net(
        "a dueling head",
        lambda width: {**actor(width), "value": nn.Linear(width, 1), "advantage": nn.Linear(width, 3)},
        lambda m, x: (lambda h, a: m.value(h) + a(h) - a(h).mean(-1, keepdim=True))(m.stem(x).relu(), m.advantage),
        features,
        value__weight="unembedding[1] head",
        value__bias="bias after_head",
        advantage__weight="unembedding[1] head",
        advantage__bias="bias after_head",
        **stem,
    )
    yield net(
        "a learned temperature",
        lambda width: {**actor(width), "head": _head(width), "temperature": ()},
        lambda m, x: m.head(m.stem(x).tanh()) * m.temperature.exp(),
        features,
        temperature="norm,bias after_head derived | norm,bias after_head",
        **stem,
        **HEAD,
    )
    yield net(
        "a loss inside the model",
        lambda width: {**actor(width), "head": _head(width)},
        lambda m, x: F.cross_entropy(
            30 * torch.tanh(m.head(m.stem(x).tanh()) / 30).flatten(0, 1), torch.zeros(10).long()
        ),
        features,
        **stem,
        **HEAD,
    )
    yield net(
        "a head of normalised weights",
        lambda width: {**actor(width), "weight": (VOCAB, width)},
        lambda m, x: F.linear(F.normalize(m.stem(x).tanh(), dim=-1), F.normalize(m.weight, dim=-1)),
        features,
        weight="unembedding[1] head derived | unembedding[1] | ask | refuse",
        answers={"weight": "unembedding"},
        **stem,
    )
    yield net(
        "a head behind which a norm stands",
        lambda width: {**actor(width), "head": _head(width), "norm": nn.BatchNorm1d(VOCAB + 2)},
        lambda m, x: m.norm(m.head(m.stem(x).tanh()).flatten(0, 1)),
        features,
        head__weight="unembedding[1] | unembedding[1] head derived | ask",
        norm__weight="norm *",
        norm__bias="bias *",
        answers={"head.weight": "unembedding"},
        **stem,
    )


def _tied_module(width: int) -> dict[str, Any]:
    table, out = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB, bias=False)
    out.weight = table.weight
    return {"table": table, "mix": nn.Linear(width, width, bias=False), "out": out}


def inner() -> Iterator[Case]:
    """Readouts whose results stay inside."""
    yield inside(
        "a router",
        lambda width: {"router": nn.Linear(width, EXPERTS, bias=False), "experts": (EXPERTS, width, width)},
        lambda m, h, x: torch.einsum("bte,btej->btj", m.router(h).softmax(-1), torch.einsum("bti,eij->btej", h, m.experts)),
        router__weight="ask",
        experts="hidden[1] | hidden[0,1]",
        answers={"router.weight": "unembedding"},
    )  # fmt: skip
    yield inside(
        "a narrow projection",
        lambda width: {"down": nn.Linear(width, 4), "up": nn.Linear(4, width)},
        lambda m, h, x: h.tanh() + m.up(m.down(h).relu()),
        down__weight="ask",
        down__bias="bias",
        up__weight="embedding",
        up__bias="bias",
        answers={"down.weight": "unembedding"},
    )
    yield inside(
        "two fixed kv heads",
        lambda width: {"q": nn.Linear(width, width), "k": nn.Linear(width, 8), "v": nn.Linear(width, 8)},
        lambda m, h, x: (
            F.scaled_dot_product_attention(
                *(part(h).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (m.q, m.k, m.v)), enable_gqa=True
            )
            .transpose(1, 2)
            .flatten(2)
        ),
        q__weight="hidden[1]",
        q__bias="bias",
        k__weight="ask",
        k__bias="bias",
        v__weight="ask",
        v__bias="bias",
        answers={"k.weight": "hidden", "v.weight": "hidden"},
    )
    yield inside(
        "mixing of tokens over a hidden extent",
        lambda width: {"a": nn.Linear(TOKENS, width), "b": nn.Linear(width, TOKENS)},
        lambda m, h, x: h.tanh() + m.b(m.a(h.mT).relu()).mT,
        a__weight="embedding",
        a__bias="bias",
        b__weight="ask",
        b__bias="bias,embedding",
        answers={"b.weight": "hidden"},
    )
    yield inside(
        "mixing of tokens, all finite",
        lambda width: {"mix": nn.Linear(TOKENS, TOKENS)},
        lambda m, h, x: h.tanh() + m.mix(h.mT).mT.tanh(),
        mix__weight="bias,norm,embedding",
        mix__bias="bias",
    )
    yield inside(
        "additive attention",
        lambda width: {"q": nn.Linear(width, width), "k": nn.Linear(width, width), "v": (width,)},
        lambda m, h, x: ((torch.tanh(m.q(h)[:, :, None] + m.k(h)[:, None]) * m.v).sum(-1).softmax(-1) @ h).tanh(),
        q__weight="hidden[1]",
        q__bias="bias",
        k__weight="hidden[1]",
        k__bias="bias",
        v="ask | unembedding[0]",
        answers={"v": "unembedding"},
    )
    yield inside(
        "a gate of one number, and a gated mix",
        lambda width: {"gate": nn.Linear(width, width), "mix": nn.Linear(width, width), "alpha": ()},
        lambda m, h, x: (lambda z: z * h.tanh() + (1 - z) * m.mix(h))(m.gate(h).sigmoid() * m.alpha.sigmoid()),
        gate__weight="hidden[1]",
        gate__bias="bias",
        mix__weight="hidden[1]",
        mix__bias="bias",
        alpha="norm,bias",
    )
    yield inside(
        "layers mixed by weights that are learned",
        lambda width: {"a": nn.Linear(width, width, bias=False), "mix": (2,)},
        lambda m, h, x: torch.einsum("l,lbtd->btd", m.mix.softmax(0), torch.stack([h, m.a(h).tanh()])),
        a__weight="hidden[1]",
        mix="norm,bias,embedding",
    )
    yield net(
        "an average over the width",
        lambda width: {"stem": nn.Linear(FEATURES, width), "a": (width,)},
        lambda m, x: (m.stem(x).tanh() * m.a).mean(-1),
        features,
        stem__weight="embedding first_sum",
        stem__bias="bias first_sum",
        a="ask",  # the average divides by the width already
        answers={"a": "norm"},
    )


def residuals() -> Iterator[Case]:
    """Which tensors write the residual stream."""
    yield inside(
        "a branch",
        lambda width: {
            "norm": nn.LayerNorm(width),
            "up": nn.Linear(width, 2 * width),
            "down": nn.Linear(2 * width, width),
        },
        lambda m, h, x: h + m.down(m.up(m.norm(h)).relu()),
        residual=True,
        norm__weight="norm",
        norm__bias="bias",
        up__weight="hidden[1]",
        up__bias="bias",
        down__weight="hidden[1] writes",
        down__bias="bias writes",
    )
    yield inside(
        "a branch with dropout, added in place",
        lambda width: {"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)},
        lambda m, h, x: F.dropout(m.down(m.up(h).relu()), 0.1).add_(h),
        residual=True,
        up__weight="hidden[1]",
        up__bias="bias",
        down__weight="hidden[1] writes",
        down__bias="bias writes",
    )
    yield inside(
        "two branches at once",
        lambda width: {name: nn.Linear(width, width, bias=False) for name in ("a", "b", "c", "d")},
        lambda m, h, x: h + m.b(m.a(h).relu()) + m.d(m.c(h).relu()),
        residual=True,
        a__weight="hidden[1]",
        b__weight="hidden[1] writes",
        c__weight="hidden[1]",
        d__weight="hidden[1] writes",
    )
    yield inside(
        "a branch behind a norm of its own",
        lambda width: {"o": nn.Linear(width, width, bias=False), "norm": nn.RMSNorm(width)},
        lambda m, h, x: h + m.norm(m.o(h.tanh())),
        residual=True,
        o__weight="hidden[1]",
        norm__weight="norm | norm writes",
    )
    yield inside(
        "a branch with layer scale",
        lambda width: {"o": nn.Linear(width, width, bias=False), "g": nn.Parameter(torch.full((width,), 1e-2))},
        lambda m, h, x: h + m.g * m.o(h.tanh()),
        residual=True,
        o__weight="hidden[1] | hidden[1] writes",
        g="norm | norm writes",
    )
    yield inside(
        "two products summed are no branch",
        lambda width: {"a": nn.Linear(width, width, bias=False), "b": nn.Linear(width, width, bias=False)},
        lambda m, h, x: (m.a(h) + m.b(h.roll(1, 1))).tanh(),
        residual=True,
        a__weight="hidden[1]",
        b__weight="hidden[1]",
    )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (heads, inner, residuals):
        yield from group()
