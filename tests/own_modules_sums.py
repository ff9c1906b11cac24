"""Modules that show which tensors are summands of the first activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.own_modules import BATCH, EXPERTS, FEATURES, TOKENS, VOCAB, Case, features, net

PIXELS = 8  # edge of the images, of four patches


def images(model: nn.Module) -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, 3, PIXELS, PIXELS),)


def _head(width: int) -> nn.Linear:
    return nn.Linear(width, VOCAB + 2, bias=False)


HEAD = {"head__weight": "unembedding[1] head"}


def first_sums() -> Iterator[Case]:
    """α_input belongs to all summands of the first activations, and to nothing else."""
    table = {"table__weight": "embedding first_sum"}
    token = lambda width: {"table": nn.Embedding(VOCAB, width), "head": _head(width)}  # noqa: E731
    yield net(
        "positions and token types",
        lambda width: {**token(width), "types": nn.Embedding(2, width), "positions": (1, TOKENS, width)},
        lambda m, x: m.head((m.table(x) + m.types(x % 2) + m.positions).tanh()),
        types__weight="embedding first_sum",
        positions="embedding first_sum",
        **table,
        **HEAD,
    )
    yield net(
        "positions looked up, dropout, a constant",
        lambda width: {**token(width), "positions": nn.Embedding(TOKENS, width)},
        lambda m, x: m.head(F.dropout(m.table(x) + m.positions(torch.arange(TOKENS)), 0.1).mul(3.0).tanh()),
        positions__weight="embedding first_sum",
        **table,
        **HEAD,
    )
    yield net("tokens scaled by a constant", token, lambda m, x: m.head((m.table(x) * 4.0).tanh()), **table, **HEAD)
    yield net(
        "tokens, then fixed positions",
        lambda width: {**token(width), "waves": torch.randn(TOKENS, width)},
        lambda m, x: m.head((m.table(x) + m.waves).tanh()),
        table__weight="embedding",  # the fixed positions can take no factor: all summands or none
        **HEAD,
    )
    norms: dict[str, Callable[[int], nn.Module]] = {
        "layer norm": nn.LayerNorm,
        "RMS norm": nn.RMSNorm,
    }
    for name, norm in norms.items():
        shift = {"norm__bias": "bias first_sum"} if name == "layer norm" else {}
        yield net(
            f"a {name} on the sum",
            lambda width, norm=norm: {**token(width), "positions": nn.Embedding(TOKENS, width), "norm": norm(width)},
            lambda m, x: m.head(m.norm(m.table(x) + m.positions(torch.arange(TOKENS))).tanh()),
            table__weight="embedding",
            positions__weight="embedding",
            norm__weight="norm first_sum",
            **shift,
            **HEAD,
        )
    yield net(
        "a norm without a gain on the sum",
        token,
        lambda m, x: m.head(F.rms_norm(m.table(x), m.table.weight.shape[1:]).tanh()),
        table__weight="embedding",
        **HEAD,
    )
    yield net(
        "a norm by hand, with a gain",
        lambda width: {**token(width), "g": nn.Parameter(torch.ones(width)), "b": nn.Parameter(torch.zeros(width))},
        lambda m, x: m.head((_normalised(m.table(x)) * m.g + m.b).tanh()),
        table__weight="embedding",
        g="norm first_sum",
        b="bias first_sum",
        **HEAD,
    )
    yield net(
        "a mask token",
        lambda width: {**token(width), "mask": nn.Parameter(torch.zeros(width)), "positions": (TOKENS, width)},
        lambda m, x: m.head((torch.where((x == 0)[..., None], m.mask, m.table(x)) + m.positions).tanh()),
        mask="bias,embedding first_sum",
        positions="embedding first_sum",
        **table,
        **HEAD,
    )
    yield net(
        "continuous input",
        lambda width: {"stem": nn.Linear(FEATURES, width), "mix": nn.Linear(width, width), "head": _head(width)},
        lambda m, x: m.head(m.mix(m.stem(x).relu()).relu()),
        features,
        stem__weight="embedding first_sum",
        stem__bias="bias first_sum",
        mix__weight="hidden[1]",
        mix__bias="bias",
        **HEAD,
    )
    yield net(
        "positions in every block",
        lambda width: {**token(width), "positions": (TOKENS, width), "mix": nn.Linear(width, width, bias=False)},
        lambda m, x: m.head(m.mix((m.table(x) + m.positions).tanh() + m.positions).tanh()),
        table__weight="embedding | ask",
        positions="embedding | ask",
        mix__weight="hidden[1]",
        answers={"table.weight": "embedding", "positions": "embedding"},
        **HEAD,
    )
    attention = lambda width: {n: nn.Linear(width, width, bias=False) for n in "qkv"}  # noqa: E731
    qkv = {f"{name}__weight": "hidden[1]" for name in "qkv"}
    yield net(
        "positions added to keys and queries alone",
        lambda width: {**token(width), **attention(width), "positions": nn.Embedding(TOKENS, width)},
        lambda m, x: m.head(_attention_with_positions(m, m.table(x), m.positions(torch.arange(TOKENS)))),
        positions__weight="embedding",
        **table,
        **qkv,
        **HEAD,
    )
    yield net(
        "relative positions added to scores",
        lambda width: {**token(width), **attention(width), "bias": nn.Embedding(2 * TOKENS, width // 4)},
        lambda m, x: m.head(_attention_with_bias(m, m.table(x), m.bias(_distances()).permute(2, 0, 1))),
        bias__weight="embedding",
        **table,
        **qkv,
        **HEAD,
    )
    yield net(
        "a table picked by index and added to scores",
        lambda width: {**token(width), **attention(width), "bias": (2 * TOKENS, width // 4)},
        lambda m, x: m.head(_attention_with_bias(m, m.table(x), m.bias[_distances()].permute(2, 0, 1))),
        bias="embedding",
        **table,
        **qkv,
        **HEAD,
    )
    yield net(
        "conditioning of every block",
        lambda width: {**token(width), "label": nn.Embedding(EXPERTS, width), "mix": nn.Linear(width, width, bias=False)},
        lambda m, x: m.head((m.table(x) * (1 + m.mix(m.label(x[:, :1] % EXPERTS)).tanh())).tanh()),
        label__weight="embedding",
        mix__weight="hidden[1]",
        **table,
        **HEAD,
    )  # fmt: skip
    yield net(
        "a table bent and added in the middle",
        lambda width: {**token(width), "late": nn.Embedding(VOCAB, width), "mix": nn.Linear(width, width, bias=False)},
        lambda m, x: m.head(m.mix(m.table(x)).tanh() + m.late(x).tanh()),
        late__weight="embedding",
        mix__weight="hidden[1]",
        **table,
        **HEAD,
    )
    yield net(
        "an encoder and a decoder with tables of their own",
        lambda width: {**token(width), "memory": nn.Embedding(VOCAB, width), **attention(width)},
        lambda m, x: m.head(
            m.table(x) + F.scaled_dot_product_attention(m.q(m.table(x)), m.k(m.memory(x)), m.v(m.memory(x)))
        ),
        memory__weight="embedding first_sum",
        **table,
        **qkv,
        **HEAD,
    )
    yield net(
        "a narrow table, projected",
        lambda width: {"table": nn.Embedding(VOCAB, 4), "up": nn.Linear(4, width), "head": _head(width)},
        lambda m, x: m.head(m.up(m.table(x)).tanh()),
        table__weight="embedding *",
        up__weight="embedding *",
        up__bias="bias *",
        first_sums=(frozenset({"table.weight"}), frozenset({"up.weight", "up.bias"})),
        **HEAD,
    )
    narrow = lambda width: {"table": nn.Embedding(VOCAB, 4), "up": nn.Linear(4, width), "head": _head(width)}  # noqa: E731
    yield net(
        "a narrow table, normalised, projected",
        lambda width: {**narrow(width), "norm": nn.LayerNorm(4)},
        lambda m, x: m.head(m.up(m.norm(m.table(x))).tanh()),
        table__weight="embedding",
        norm__weight="norm *",
        norm__bias="bias *",
        up__weight="embedding *",
        up__bias="bias *",
        first_sums=(frozenset({"norm.weight", "norm.bias"}), frozenset({"up.weight", "up.bias"})),
        **HEAD,
    )
    yield net(
        "a norm on the sum, a norm before a branch, neighbours mixed",
        lambda width: {
            **token(width),
            "first": nn.LayerNorm(width),
            "norm": nn.LayerNorm(width),
            "mix": (width,),
            "o": (width, width),
        },
        lambda m, x: m.head(_shifted(m, m.first(m.table(x)))),
        table__weight="embedding",
        first__weight="norm first_sum",
        first__bias="bias first_sum",
        norm__weight="norm",
        norm__bias="bias",
        mix="norm",
        o="hidden[0]",
        **HEAD,
    )


def _shifted(m: Any, h: Tensor) -> Tensor:
    y = m.norm(h)
    return h + (y * m.mix + F.pad(y, (0, 0, 1, -1)) * (1 - m.mix)) @ m.o


def _normalised(h: Tensor) -> Tensor:
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-5).sqrt()


def _distances() -> Tensor:
    places = torch.arange(TOKENS)
    return places[:, None] - places[None] + TOKENS


def _attention_with_positions(m: Any, h: Tensor, positions: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.q(h + positions), m.k(h + positions), m.v(h))


def _attention_with_bias(m: Any, h: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (part(h).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (m.q, m.k, m.v))
    return ((q @ k.mT / 4 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


def patches() -> Iterator[Case]:
    """The first sums of vision transformers and convolutional nets."""
    conv = lambda width: nn.Conv2d(3, width, PIXELS // 2, PIXELS // 2)  # noqa: E731
    extra = {"token": (1, 1, 1), "positions": (1, 5, 1)}

    def vit(width: int) -> dict[str, Any]:
        wide = {
            name: tuple(extent if axis < 2 else width for axis, extent in enumerate(s)) for name, s in extra.items()
        }
        return {"patch": conv(width), **wide, "head": _head(width)}

    def embedded(m: Any, x: Tensor) -> Tensor:
        h = m.patch(x).flatten(2).mT
        return torch.cat([m.token.expand(len(h), -1, -1), h], 1) + m.positions

    summed = {"patch__weight": "embedding first_sum", "patch__bias": "bias first_sum"}
    summed |= {"token": "embedding,bias first_sum", "positions": "embedding first_sum"}
    yield net(
        "patches, class token, positions",
        vit,
        lambda m, x: m.head(embedded(m, x)[:, 0].tanh()),
        images,
        **summed,
        **HEAD,
    )
    yield net(
        "patches, class token, positions, then a norm",
        lambda width: {**vit(width), "norm": nn.LayerNorm(width)},
        lambda m, x: m.head(m.norm(embedded(m, x))[:, 0].tanh()),
        images,
        patch__weight="embedding",
        patch__bias="bias",
        token="embedding,bias",
        positions="embedding",
        norm__weight="norm first_sum",
        norm__bias="bias first_sum",
        **HEAD,
    )

    def unfolded(m: Any, x: Tensor) -> Tensor:
        h = F.unfold(x, PIXELS // 2, stride=PIXELS // 2).mT
        return m.after(m.patch(m.before(h)))

    pixels = 3 * (PIXELS // 2) ** 2
    yield net(
        "patches between two norms, then positions",
        lambda width: {
            "before": nn.LayerNorm(pixels),
            "patch": nn.Linear(pixels, width),
            "after": nn.LayerNorm(width),
            "positions": (1, 4, width),
            "head": _head(width),
        },
        lambda m, x: m.head((unfolded(m, x) + m.positions).mean(1)),
        images,
        before__weight="norm",
        before__bias="bias",
        patch__weight="embedding",
        patch__bias="bias",
        after__weight="norm first_sum",
        after__bias="bias first_sum",
        positions="embedding first_sum",
        **HEAD,
    )
    yield net(
        "a stem with batch norm",
        lambda width: {
            "stem": nn.Conv2d(3, width, 3, padding=1, bias=False),
            "norm": nn.BatchNorm2d(width),
            "conv": nn.Conv2d(width, 2 * width, 3, 2, 1),
            "head": _head(2 * width),
        },
        lambda m, x: m.head(m.conv(m.norm(m.stem(x)).relu()).relu().mean((2, 3))),
        images,
        stem__weight="embedding",
        norm__weight="norm first_sum",
        norm__bias="bias first_sum",
        conv__weight="hidden[1,2,3]",
        conv__bias="bias",
        **HEAD,
    )
    yield net(
        "depthwise and grouped convolutions",
        lambda width: {
            "stem": nn.Conv2d(3, width, 3, padding=1),
            "depth": nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            "point": nn.Conv2d(width, width, 1, bias=False),
            "wide": nn.Conv2d(width, width, 3, padding=1, groups=4, bias=False),
            "many": nn.Conv2d(width, width, 3, padding=1, groups=width // 4, bias=False),
            "head": _head(width),
        },
        lambda m, x: m.head(m.many(m.wide(m.point(m.depth(m.stem(x).relu())).relu()).relu()).relu().mean((2, 3))),
        images,
        stem__weight="embedding first_sum",
        stem__bias="bias first_sum",
        depth__weight="embedding,norm",
        point__weight="hidden[1,2,3]",
        wide__weight="hidden[1,2,3]",
        many__weight="embedding",
        **HEAD,
    )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (first_sums, patches):
        yield from group()
