"""Modules whose parameters are picked by index or stand in the place of an input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.own_modules import BATCH, EXPERTS, FEATURES, TOKENS, VOCAB, Case, features, inside, net

_PICK = torch.arange(BATCH * TOKENS).remainder(EXPERTS)  # an expert for each token
_ONE_HOT = F.one_hot(_PICK, EXPERTS).float()
_GATE = torch.full((BATCH * TOKENS, EXPERTS), 1 / EXPERTS)


def _flat(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A body that hands (tokens, width) and the experts' weights (experts, in, out) to a product."""
    return lambda model, h, x: product(h.flatten(0, 1), model.experts).view(BATCH, TOKENS, -1).tanh()


def _rows(t: Tensor, w: Tensor) -> Tensor:
    out = t.new_zeros(len(t), w.shape[2])
    for expert in range(EXPERTS):
        (mine,) = torch.where(expert == _PICK)
        out.index_add_(0, mine, t[mine] @ w[expert])
    return out


def _grouped(t: Tensor, w: Tensor) -> Tensor:
    order = _PICK.argsort(stable=True)
    parts = t[order].split(_PICK.bincount(minlength=EXPERTS).tolist())
    return torch.cat([part @ one for part, one in zip(parts, w.unbind(), strict=True)])[order.argsort()]


_BOTH = "hidden[1] | hidden[0,1]"  # the number of experts is the same at every size
EXPERT_PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "bmm with picked weights": (lambda t, w: torch.bmm(t[:, None], w[_PICK])[:, 0], "hidden[1]"),
    "index_select": (lambda t, w: (t[:, None] @ w.index_select(0, _PICK))[:, 0], "hidden[1]"),
    "F.embedding of flattened weights": (
        lambda t, w: (t[:, None] @ F.embedding(_PICK, w.flatten(1)).view(-1, *w.shape[1:]))[:, 0],
        "hidden[1]",
    ),
    "gather": (
        lambda t, w: (t[:, None] @ w.gather(0, _PICK[:, None, None].expand(-1, *w.shape[1:])))[:, 0],
        "hidden[1]",
    ),
    "einsum with picked weights": (lambda t, w: torch.einsum("ni,nij->nj", t, w[_PICK]), "hidden[1]"),
    "picked, multiplied, summed": (lambda t, w: (t[..., None] * w[_PICK]).sum(1), "hidden[1]"),
    "a loop over experts": (_rows, "hidden[1]"),
    "sorted groups": (_grouped, "hidden[1]"),
    "all experts, gated": (lambda t, w: (torch.einsum("ni,eij->nej", t, w) * _GATE[..., None]).sum(1), _BOTH),
    "all experts by bmm": (lambda t, w: torch.bmm(t.expand(EXPERTS, *t.shape), w).mean(0), _BOTH),
    "all experts, one chosen": (lambda t, w: (t @ w)[_PICK, torch.arange(len(t))], "hidden[1]"),
    "one einsum with gates": (lambda t, w: torch.einsum("ni,eij,ne->nj", t, w, _GATE), _BOTH),
    "a weight mixed of experts": (
        lambda t, w: torch.bmm(t[:, None], torch.einsum("ne,eij->nij", _GATE, w))[:, 0],
        _BOTH + " | ask",
    ),
    "one-hot rows times flattened weights": (
        lambda t, w: torch.bmm(t[:, None], (_ONE_HOT @ w.flatten(1)).view(-1, *w.shape[1:]))[:, 0],
        _BOTH + " | ask",
    ),
}


def experts() -> Iterator[Case]:
    """Stacked weights, one of which each token meets; and what is picked by index in no product."""
    for name, (product, answer) in EXPERT_PRODUCTS.items():
        yield inside(
            f"experts: {name}",
            lambda width: {"experts": (EXPERTS, width, 2 * width)},
            _flat(product),
            outputs=2,
            experts=answer,
        )
    picks: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], str]] = {
        "a shift of each expert": ((EXPERTS, 0), lambda t, w: t.tanh() + w[_PICK], "bias,embedding"),
        "a gain of each expert": ((EXPERTS, 0), lambda t, w: t * w[_PICK], "norm,embedding"),
        "a number of each expert, added": ((EXPERTS,), lambda t, w: t.tanh() + w[_PICK, None], "bias"),
        "a number of each expert, multiplied": ((EXPERTS,), lambda t, w: t * w[_PICK, None], "norm,bias"),
    }
    for name, (shape, apply, answer) in picks.items():
        yield inside(
            f"picked: {name}",
            lambda width, shape=shape: {"weight": (width, width), "w": tuple(extent or width for extent in shape)},
            lambda model, h, x, apply=apply: (
                apply((h @ model.weight).flatten(0, 1), model.w).view(BATCH, TOKENS, -1).tanh()
            ),
            weight="hidden[0]",
            w=answer,
        )


def _relation(product: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda model, h, x: product(model, h.tanh().flatten(0, 1), _PICK).view(BATCH, TOKENS, -1)


def lookups() -> Iterator[Case]:
    """Tables: what is looked up and then meets a product as a weight, and what does so as activations."""
    yield inside(
        "relation matrices in a flat table",
        lambda width: {"relation": nn.Embedding(EXPERTS, width * width)},
        _relation(lambda m, t, r: (t[:, None] @ m.relation(r).view(len(t), t.shape[1], -1))[:, 0]),
        options={"third": None},
        relation__weight="ask | refuse",  # its fan-in is no axis of it
    )
    yield inside(
        "relations by basis",
        lambda width: {"mix": (EXPERTS, 2), "basis": (2, width, width)},
        _relation(lambda m, t, r: (t[:, None] @ torch.einsum("rb,bij->rij", m.mix, m.basis)[r])[:, 0]),
        mix="embedding,norm,bias | ask",
        basis="hidden[1] | hidden[0,1] | ask",
        answers={"mix": "embedding", "basis": "hidden"},
    )
    yield inside(
        "relations in a loop",
        lambda width: {"relation": (EXPERTS, width, width)},
        lambda model, h, x: sum((h.roll(r, 1) @ model.relation[r]).tanh() for r in range(EXPERTS)),
        relation="hidden[1]",
    )
    yield inside(
        "a table looked up, then a product",
        lambda width: {"types": nn.Embedding(EXPERTS, width), "mix": nn.Linear(width, width)},
        _relation(lambda m, t, r: (t + m.mix(m.types(r)).tanh()).tanh()),
        types__weight="embedding | embedding first_sum",
        mix__weight="hidden[1]",
        mix__bias="bias",
    )
    yield inside(
        "a square table looked up and added",
        lambda width: {"codes": nn.Embedding(width, width)},
        lambda model, h, x: (h.tanh() + model.codes(x)).tanh(),
        codes__weight="ask | refuse",
    )
    yield inside(
        "a square matrix whose rows are picked and added",
        lambda width: {"codes": (width, width)},
        lambda model, h, x: (h.tanh() + model.codes[x]).tanh(),
        codes="ask | refuse",
    )
    yield net(
        "a table that grows both ways",
        lambda width: {"table": nn.Embedding(2 * width, width), "head": nn.Linear(width, VOCAB)},
        lambda model, x: model.head(model.table(x).tanh()),
        table__weight="ask | refuse",
        head__weight="unembedding[1] head",
        head__bias="bias after_head",
    )
    yield net(
        "prototypes by squared distance",
        lambda width: {"stem": nn.Linear(FEATURES, width), "prototypes": (VOCAB, width)},
        lambda model, x: -(model.stem(x)[..., None, :] - model.prototypes).pow(2).sum(-1),
        features,
        stem__weight="embedding first_sum",
        stem__bias="bias first_sum",
        prototypes="ask | refuse",  # a sum of squares over the width grows with it, whatever a fold does
        answers={"prototypes": "unembedding"},
    )
    yield inside(
        "a codebook, nearest by distance, then looked up",
        lambda width: {"codes": (EXPERTS, width), "mix": (width, width)},
        lambda model, h, x: model.codes[torch.cdist(h @ model.mix, model.codes[None]).argmin(-1)].tanh(),
        table__weight="embedding *",  # the choice of a code has no gradient
        codes="ask | refuse | embedding *",
        mix="hidden[0]",
        answers={"codes": "embedding"},
    )
    for name, score in {
        "product summed": lambda a, b: (a * b).sum(-1),
        "einsum": lambda a, b: torch.einsum("btd,btd->bt", a, b),
        "bmm": lambda a, b: torch.bmm(a.flatten(0, 1)[:, None], b.flatten(0, 1)[..., None])[:, 0, 0],
    }.items():
        yield net(
            f"two tables looked up and scored: {name}",
            lambda width: {"words": nn.Embedding(VOCAB, width), "contexts": nn.Embedding(VOCAB, width)},
            lambda model, x, score=score: score(model.words(x), model.contexts(x.roll(1, 1))),
            words__weight="ask | embedding first_sum | unembedding[1] head",
            contexts__weight="ask | embedding first_sum | unembedding[1] head",
            answers={"words.weight": "embedding", "contexts.weight": "unembedding"},
            first_sums=(frozenset({"words.weight"}), frozenset({"contexts.weight"})),
        )


def _attend(model: nn.Module, queries: Tensor, h: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(model.q(queries), model.k(h), model.v(h))


QUERIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "expanded": lambda q, h: q.expand(BATCH, -1, -1),
    "repeated": lambda q, h: q.repeat(BATCH, 1, 1),
    "tiled": lambda q, h: torch.tile(q, (BATCH, 1, 1)),
    "stacked": lambda q, h: torch.stack([q] * BATCH),
    "concatenated": lambda q, h: torch.cat([q[None]] * BATCH),
    "repeat_interleave": lambda q, h: q[None].repeat_interleave(BATCH, 0),
    "without a batch": lambda q, h: q[None],
    "added to zeros": lambda q, h: h.new_zeros(BATCH, *q.shape) + q,
    "picked by index": lambda q, h: q[torch.arange(len(q)).expand(BATCH, -1)],
}


def queries() -> Iterator[Case]:
    """Learned queries: a parameter in the place of activations; the weight is what multiplies it."""
    for name, spread in QUERIES.items():
        yield inside(
            f"learned queries, one weight of all: {name}",
            lambda width: {"queries": (EXPERTS, width), "weight": (width, width)},
            lambda model, h, x, spread=spread: F.scaled_dot_product_attention(
                spread(model.queries, h) @ model.weight, h @ model.weight, h
            ),
            queries="embedding | embedding first_sum",
            weight="hidden[0]",
        )
        yield inside(
            f"learned queries: {name}",
            lambda width: {"queries": (EXPERTS, width), **{n: nn.Linear(width, width, bias=False) for n in "qkv"}},
            lambda model, h, x, spread=spread: _attend(model, spread(model.queries, h), h),
            queries="embedding | embedding first_sum | ask",
            q__weight="hidden[1] | ask",
            k__weight="hidden[1]",
            v__weight="hidden[1]",
            answers={"queries": "embedding", "q.weight": "hidden"},
        )
    yield inside(
        "queries that meet the keys themselves",
        lambda width: {"queries": (EXPERTS, width), "v": nn.Linear(width, width, bias=False)},
        lambda model, h, x: F.scaled_dot_product_attention(model.queries.expand(BATCH, -1, -1), h, model.v(h)),
        queries="ask | unembedding[1]",
        v__weight="hidden[1]",
        answers={"queries": "unembedding"},
    )
    yield inside(
        "a whole table as activations",
        lambda width: {"nodes": nn.Embedding(TOKENS, width), "weight": (width, width)},
        lambda model, h, x: h.tanh() + (torch.eye(TOKENS) @ (model.nodes.weight @ model.weight)).tanh(),
        nodes__weight="embedding | embedding first_sum | ask",
        weight="hidden[0] | ask",
        answers={"nodes.weight": "embedding", "weight": "hidden"},
    )
    yield inside(
        "a whole table mixed by neighbours, then a product that activations meet",
        lambda width: {"nodes": nn.Embedding(TOKENS, width), "weight": (width, width)},
        lambda model, h, x: (h @ model.weight).tanh() + (torch.eye(TOKENS) @ model.nodes.weight) @ model.weight,
        nodes__weight="embedding | embedding first_sum",
        weight="hidden[0]",
    )
    yield inside(
        "memory that is normalised, then multiplied",
        lambda width: {"memory": (EXPERTS, width), "norm": nn.LayerNorm(width), "weight": (width, width)},
        lambda model, h, x: F.scaled_dot_product_attention(
            h.tanh(), model.norm(model.memory).expand(BATCH, -1, -1) @ model.weight, h[:, :EXPERTS].tanh()
        ),
        memory="embedding | embedding first_sum",
        norm__weight="norm | norm first_sum",
        norm__bias="bias | bias first_sum",
        weight="hidden[0]",
    )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (experts, lookups, queries):
        yield from group()
