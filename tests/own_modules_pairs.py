"""Modules with products of two parameters, weights used more than once, and products over heads and their width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.own_modules import BATCH, EXPERTS, FEATURES, TOKENS, Case, inside


def _lora(model: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    return F.linear(h, model.weight) + h @ model.a.t() @ model.b.t()


def pairs() -> Iterator[Case]:
    """Products of two parameters, and parameters that make weights."""
    settings = {"outputs": 2, "weight": "hidden[1]", "a": "ask", "b": "embedding", "answers": {"a": "hidden"}}
    parts = lambda width: {"weight": (2 * width, width), "a": (4, width), "b": (2 * width, 4)}  # noqa: E731
    yield inside("a low-rank pair", parts, _lora, **settings)
    yield inside(
        "a low-rank pair, scaled",
        parts,
        lambda m, h, x: F.linear(h, m.weight) + F.linear(F.linear(F.dropout(h, 0.1), m.a), m.b) * 2.0,
        **settings,
    )
    merged = {**settings, "a": "ask", "b": "embedding | ask", "answers": {"a": "hidden", "b": "embedding"}}
    yield inside("a low-rank pair, merged", parts, lambda m, h, x: F.linear(h, m.weight + m.b @ m.a), **merged)
    yield inside(
        "a pair whose rank grows",
        lambda width: {"a": (width // 4, width), "b": (2 * width, width // 4)},
        lambda m, h, x: F.linear(F.linear(h, m.a), m.b),
        outputs=2,
        a="hidden[1]",
        b="hidden[1]",
    )
    yield inside(
        "a pair whose rank grows, merged",
        lambda width: {"a": (width // 4, width), "b": (2 * width, width // 4)},
        lambda m, h, x: F.linear(h, m.b @ m.a),
        outputs=2,
        a="hidden[1] | ask | refuse",
        b="hidden[1] | ask | refuse",
        answers={"a": "hidden", "b": "hidden"},
    )
    yield inside(
        "weight norm by hand",
        lambda width: {"g": (width, 1), "v": (width, width)},
        lambda m, h, x: F.linear(h, m.g * m.v / m.v.norm(dim=1, keepdim=True)).tanh(),
        g="norm",
        v="hidden[1]",
    )
    yield inside(
        "weight norm by torch",
        lambda width: {"linear": nn.utils.parametrizations.weight_norm(nn.Linear(width, width))},
        lambda m, h, x: m.linear(h).tanh(),
        linear__parametrizations__weight__original0="norm | ask",
        linear__parametrizations__weight__original1="hidden[1]",
        linear__bias="bias",
        answers={"linear.parametrizations.weight.original0": "norm"},
    )
    yield inside(
        "spectral norm",
        lambda width: {"linear": nn.utils.parametrizations.spectral_norm(nn.Linear(width, width))},
        lambda m, h, x: m.linear(h).tanh(),
        linear__parametrizations__weight__original="hidden[1] | ask | refuse",
        linear__bias="bias",
        answers={"linear.parametrizations.weight.original": "hidden"},
    )
    yield inside(
        "noisy weights",
        lambda width: {"mean": (2 * width, width), "spread": (2 * width, width)},
        lambda m, h, x: F.linear(h, m.mean + m.spread * torch.randn_like(m.spread)),
        outputs=2,
        mean="hidden[1]",
        spread="hidden[1]",
    )
    yield inside(
        "a weight times a number that is learned",
        lambda width: {"weight": (2 * width, width), "size": (1,)},
        lambda m, h, x: F.linear(h, m.weight * m.size),
        outputs=2,
        weight="hidden[1]",
        size="norm,bias | ask",
        answers={"size": "norm"},
    )
    yield inside(
        "a gain on the weight's inputs",
        lambda width: {"weight": (2 * width, width), "gain": (width,)},
        lambda m, h, x: F.linear(h, m.weight * m.gain),
        outputs=2,
        weight="hidden[1]",
        gain="norm | ask",
        answers={"gain": "norm"},
    )
    yield inside(
        "weights put together before their product",
        lambda width: {name: (width, width) for name in "qkv"},
        lambda m, h, x: F.scaled_dot_product_attention(*F.linear(h, torch.cat([m.q, m.k, m.v])).chunk(3, -1)),
        q="hidden[1]",
        k="hidden[1]",
        v="hidden[1]",
    )
    for name, factor, answer in (("gain", lambda h, a: h * a, "norm"), ("weight", lambda h, a: h @ a, "hidden[0]")):
        yield inside(
            f"a {name}, then a product by sums",
            lambda width, name=name: {"a": (width,) if name == "gain" else (width, width), "b": (width, width)},
            lambda m, h, x, factor=factor: (factor(h.tanh(), m.a)[..., None] * m.b).sum(-2),
            a=answer,
            b="hidden[0]",
        )
    yield inside(
        "three factors in one einsum",
        lambda width: {"a": (width, width), "b": (width, 2 * width)},
        lambda m, h, x: torch.einsum("btd,de,ef->btf", h, m.a, m.b),
        outputs=2,
        a="hidden[0]",
        b="hidden[0]",
    )
    yield inside(
        "two weights mixed by a gate that is learned",
        lambda width: {"a": (width, width), "b": (width, width), "gate": ()},
        lambda m, h, x: h @ (m.gate.sigmoid() * m.a + (1 - m.gate.sigmoid()) * m.b),
        a="hidden[0]",
        b="hidden[0]",
        gate="norm,bias | ask",
        answers={"gate": "norm"},
    )
    yield inside(
        "a hypernetwork",
        lambda width: {
            "code": nn.Embedding(EXPERTS, FEATURES),
            "maker": nn.Linear(FEATURES, width * width, bias=False),
        },
        lambda m, h, x: torch.bmm(h.tanh(), m.maker(m.code(torch.arange(BATCH))).view(BATCH, h.shape[-1], -1)),
        options={"third": None},
        code__weight="embedding * | ask",
        maker__weight="ask | refuse",
    )
    yield inside(
        "a bilinear form",
        lambda width: {"form": nn.Bilinear(width, width, width, bias=False)},
        lambda m, h, x: m.form(h.tanh(), h.roll(1, 1).tanh()),
        form__weight="hidden[1,2] | refuse | ask",
    )
    yield inside(
        "a bilinear form by einsum",
        lambda width: {"form": (width, width, width)},
        lambda m, h, x: torch.einsum("bti,kij,btj->btk", h.tanh(), m.form, h.roll(1, 1).tanh()),
        form="hidden[1] | hidden[1,2] | refuse | ask",  # as h·(W h) of attention, where the second sum is over activations
    )
    yield inside(
        "used both ways round",
        lambda width: {"weight": (width, width)},
        lambda m, h, x: (h @ m.weight).tanh() @ m.weight.t(),
        weight="refuse",
    )
    yield inside(
        "used both ways round, oblong",
        lambda width: {"weight": (width, 2 * width)},
        lambda m, h, x: F.linear(F.linear(h, m.weight.t()).tanh(), m.weight),
        weight="refuse",
    )
    yield inside(
        "used twice, the same way",
        lambda width: {"weight": (width, width)},
        lambda m, h, x: F.linear((h @ m.weight).tanh(), m.weight.t()),
        weight="hidden[0]",
    )


def merged() -> Iterator[Case]:
    """A product over heads and head width has both as its fan-in, whichever of them scales."""
    sizes: dict[str, Callable[[int], tuple[int, int]]] = {
        "more heads": lambda width: (width // 4, 4),
        "wider heads": lambda width: (4, width // 4),
    }
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "einsum": lambda a, w: torch.einsum("bthd,hdm->btm", a, w),
        "tensordot": lambda a, w: torch.tensordot(a, w, dims=2),
        "flattened": lambda a, w: a.flatten(-2) @ w.flatten(0, 1),
        "viewed": lambda a, w: F.linear(a.flatten(-2), w.view(-1, w.shape[-1]).t()),
        "a head at a time, summed": lambda a, w: torch.stack([a[:, :, h] @ w[h] for h in range(len(w))]).sum(0),
        "a head at a time, added": lambda a, w: sum(a[:, :, h] @ w[h] for h in range(1, len(w))) + a[:, :, 0] @ w[0],
        "bmm over heads, summed": lambda a, w: (a.flatten(0, 1).transpose(0, 1) @ w).sum(0).view(BATCH, TOKENS, -1),
        "multiplied and summed": lambda a, w: (a[..., None] * w).sum((2, 3)),
        "multiplied and summed twice": lambda a, w: (a[..., None] * w).sum(-2).sum(2),
    }
    for size, heads in sizes.items():
        for way, product in ways.items():
            yield inside(
                f"merged heads: {size}, {way}",
                lambda width, heads=heads: {"o": (*heads(width), width)},
                lambda model, h, x, product=product: product(h.unflatten(-1, model.o.shape[:2]), model.o),
                o="hidden[0,1]",
            )
        yield inside(
            f"split heads: {size}",
            lambda width, heads=heads: {"q": (width, *heads(width)), "b": heads(width)},
            lambda model, h, x: (torch.einsum("btm,mhd->bthd", h, model.q) + model.b).tanh().flatten(2),
            q="hidden[0]",
            b="bias",
        )
        yield inside(
            f"block-diagonal heads: {size}",
            lambda width, heads=heads: {"w": (*heads(width), heads(width)[1])},
            lambda model, h, x: torch.einsum("bthd,hde->bthe", h.unflatten(-1, model.w.shape[:2]), model.w).flatten(2),
            w="embedding" if size == "more heads" else "hidden[1]",
        )
        yield inside(
            f"a score for each head: {size}",
            lambda width, heads=heads: {"a": heads(width)},
            lambda model, h, x: (
                h
                * (h.unflatten(-1, model.a.shape) * model.a).sum(-1).softmax(1).repeat_interleave(model.a.shape[1], -1)
            ),
            a="embedding,norm" if size == "more heads" else "ask | unembedding[1]",
            answers={"a": "unembedding"},
        )


def rotations() -> Iterator[Case]:
    """Activations that are taken for complex numbers, as rotary positions are."""

    def turned(m: Any, h: Tensor, x: Tensor) -> Tensor:
        q = torch.view_as_complex(m.q(h).unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones(8), torch.ones(8)
        ).repeat(h.shape[-1] // 16)
        return F.scaled_dot_product_attention(torch.view_as_real(q).flatten(-2), m.q(h), m.v(h))

    yield inside(
        "positions by complex rotation",
        lambda width: {"q": nn.Linear(width, width), "v": nn.Linear(width, width)},
        turned,
        q__weight="hidden[1]",
        q__bias="bias",
        v__weight="hidden[1]",
        v__bias="bias",
    )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (pairs, merged, rotations):
        yield from group()
