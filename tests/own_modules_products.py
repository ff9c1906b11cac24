"""Every way in which a weight enters a product, as modules with known layouts: the same answer whatever the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.own_modules import BATCH, FEATURES, TOKENS, VOCAB, Case, features, inside, net


@dataclass(frozen=True)
class Form:
    """A way to multiply h (batch, tokens, in) with a stored weight. `axes`: those of the weight that are summed over."""

    shape: Callable[[int, int], tuple[int, ...]]
    apply: Callable[[Tensor, Tensor], Tensor]
    axes: str


def in_out(inputs: int, outputs: int) -> tuple[int, ...]:
    return inputs, outputs


def out_in(inputs: int, outputs: int) -> tuple[int, ...]:
    return outputs, inputs


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight):
        ctx.save_for_backward(h, weight)
        return h @ weight

    @staticmethod
    def backward(ctx, gradient):
        h, weight = ctx.saved_tensors
        return gradient @ weight.t(), h.flatten(0, 1).t() @ gradient.flatten(0, 1)


def permutation(extent: int) -> Tensor:
    return torch.arange(extent).flip(0)


def _autocast(h: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return F.linear(h, weight).float()


def _written(h: Tensor, weight: Tensor) -> Tensor:
    out = h.new_zeros(*h.shape[:-1], weight.shape[1])
    for token in range(h.shape[1]):
        out[:, token] = h[:, token] @ weight
    return out


def _straight_through(weight: Tensor) -> Tensor:
    return weight + (weight.sign() * weight.abs().mean() - weight).detach()


FORMS = {
    "matmul": Form(in_out, lambda h, w: h @ w, "0"),
    "matmul .t()": Form(out_in, lambda h, w: h @ w.t(), "1"),
    "matmul .mT": Form(out_in, lambda h, w: torch.matmul(h, w.mT), "1"),
    "matmul transpose": Form(out_in, lambda h, w: h @ w.transpose(0, 1).contiguous(), "1"),
    "weight first": Form(out_in, lambda h, w: (w @ h.mT).mT, "1"),
    "weight first, stored (in, out)": Form(in_out, lambda h, w: (w.T @ h.mT).mT, "0"),
    "linear": Form(out_in, F.linear, "1"),
    "linear of a transposed view": Form(in_out, lambda h, w: F.linear(h, w.t()), "0"),
    "linear on two dimensions": Form(out_in, lambda h, w: F.linear(h.flatten(0, 1), w).view(BATCH, TOKENS, -1), "1"),
    "addmm": Form(in_out, lambda h, w: torch.addmm(h.new_zeros(1), h.flatten(0, 1), w).view(BATCH, TOKENS, -1), "0"),
    "mv": Form(out_in, lambda h, w: torch.stack([torch.stack([torch.mv(w, t) for t in row]) for row in h]), "1"),
    "einsum": Form(in_out, lambda h, w: torch.einsum("btd,de->bte", h, w), "0"),
    "einsum, stored (out, in)": Form(out_in, lambda h, w: torch.einsum("...d,ed->...e", h, w), "1"),
    "einsum, weight first": Form(in_out, lambda h, w: torch.einsum("de,btd->bte", w, h), "0"),
    "tensordot": Form(in_out, lambda h, w: torch.tensordot(h, w, dims=1), "0"),
    "inner": Form(out_in, torch.inner, "1"),
    "bmm of an expanded weight": Form(in_out, lambda h, w: torch.bmm(h, w.expand(BATCH, *w.shape)), "0"),
    "bmm of a repeated weight": Form(in_out, lambda h, w: torch.bmm(h, w.repeat(BATCH, 1, 1)), "0"),
    "bmm of a stacked weight": Form(in_out, lambda h, w: torch.bmm(h, torch.stack([w] * BATCH)), "0"),
    "baddbmm": Form(in_out, lambda h, w: torch.baddbmm(h.new_zeros(1), h, w.expand(BATCH, *w.shape)), "0"),
    "convolution of one tap": Form(lambda i, o: (o, i, 1), lambda h, w: F.conv1d(h.mT, w).mT, "1,2"),
    "convolution": Form(lambda i, o: (o, i, 3), lambda h, w: F.conv1d(h.mT, w, padding=1).mT, "1,2"),
    "two-dimensional convolution": Form(
        lambda i, o: (o, i, 3, 3), lambda h, w: F.conv2d(h.mT[..., None], w, padding=1)[..., 0].mT, "1,2,3"
    ),
    "transposed convolution": Form(lambda i, o: (i, o, 3), lambda h, w: F.conv_transpose1d(h.mT, w, padding=1).mT, "0,2"),
    "elementwise, then summed": Form(in_out, lambda h, w: (h[..., None] * w).sum(-2), "0"),
    "elementwise, then summed, stored (out, in)": Form(out_in, lambda h, w: (w * h[..., None, :]).sum(dim=-1), "1"),
    "elementwise, then summed at once": Form(
        in_out, lambda h, w: h.unsqueeze(-1).mul(w.unsqueeze(0)).sum(dim=2, keepdim=True).squeeze(2), "0"
    ),
    "vmap": Form(in_out, lambda h, w: torch.vmap(lambda row: row @ w)(h), "0"),
    "checkpoint": Form(in_out, lambda h, w: checkpoint(torch.matmul, h, w, use_reentrant=False), "0"),
    "own function": Form(in_out, lambda h, w: _Product.apply(h, w), "0"),
    "written into a buffer": Form(in_out, _written, "0"),
    "autocast": Form(out_in, _autocast, "1"),
    # behind views, casts and copies
    "double": Form(in_out, lambda h, w: (h.double() @ w.double()).float(), "0"),
    "half and back": Form(in_out, lambda h, w: h @ w.to(torch.bfloat16).to(torch.float32), "0"),
    "clone": Form(in_out, lambda h, w: h @ w.clone(), "0"),
    "new_empty().copy_()": Form(in_out, lambda h, w: h @ torch.empty_like(w).copy_(w), "0"),
    "flattened and viewed": Form(in_out, lambda h, w: h @ w.flatten().view(w.shape), "0"),
    "transposed, copied, flattened": Form(
        out_in, lambda h, w: h @ w.t().contiguous().flatten().view(w.shape[1], w.shape[0]), "1"
    ),
    "unsqueezed": Form(in_out, lambda h, w: h @ w[None], "0"),
    "permuted rows": Form(in_out, lambda h, w: h @ w[permutation(len(w))], "0"),
    "permuted columns": Form(in_out, lambda h, w: h @ w[:, permutation(w.shape[1])], "0"),
    "index_select": Form(in_out, lambda h, w: h @ w.index_select(1, permutation(w.shape[1])), "0"),
    "rows looked up by F.embedding": Form(out_in, lambda h, w: F.linear(h, F.embedding(permutation(len(w)), w)), "1"),
    "gather": Form(in_out, lambda h, w: h @ w.gather(0, permutation(len(w))[:, None].expand(w.shape)), "0"),
    "flip": Form(in_out, lambda h, w: h @ w.flip(1), "0"),
    "halves put together": Form(out_in, lambda h, w: F.linear(h, torch.cat([w[:2], w[2:]])), "1"),
    "halves apart": Form(out_in, lambda h, w: torch.cat([F.linear(h, w[:3]), F.linear(h, w[3:])], -1), "1"),
    "split outputs": Form(out_in, lambda h, w: torch.cat([F.linear(h, part) for part in w.split([1, len(w) - 1])], -1), "1"),
    # times another tensor
    "mask multiplied": Form(in_out, lambda h, w: h @ (w * torch.ones_like(w).tril()), "0"),
    "mask first": Form(out_in, lambda h, w: F.linear(h, (torch.rand(w.shape) < 0.5) * w), "1"),
    "mask by where": Form(in_out, lambda h, w: h @ torch.where(torch.rand(w.shape) < 0.5, w, 0.0), "0"),
    "mask by masked_fill": Form(in_out, lambda h, w: h @ w.masked_fill(torch.rand(w.shape) < 0.5, 0.0), "0"),
    "tril": Form(in_out, lambda h, w: h @ w.tril(), "0"),
    "dropout of weights": Form(in_out, lambda h, w: h @ F.dropout(w, 0.5), "0"),
    "noise multiplied": Form(in_out, lambda h, w: h @ (w * (1 + 0.1 * torch.randn_like(w))), "0"),
    "noise added": Form(in_out, lambda h, w: h @ (w + 0.1 * torch.randn_like(w)), "0"),
    "a mask broadcast over outputs": Form(in_out, lambda h, w: h @ (w * torch.ones(len(w), 1)), "0"),
    "a constant": Form(in_out, lambda h, w: h @ (w * 0.5), "0"),
    "negated": Form(in_out, lambda h, w: h @ -w, "0"),
    "tanh": Form(in_out, lambda h, w: h @ w.tanh(), "0"),
    "clamped": Form(in_out, lambda h, w: h @ w.clamp(-1, 1), "0"),
    "rounded straight through": Form(out_in, lambda h, w: F.linear(h, _straight_through(w)), "1"),
    "weight norm without a gain": Form(out_in, lambda h, w: F.linear(h, w / w.norm(dim=1, keepdim=True)), "1"),
    "standardized": Form(out_in, lambda h, w: F.linear(h, (w - w.mean(1, keepdim=True)) / (w.std(1, keepdim=True) + 1e-5)), "1"),
}  # fmt: skip

# where a·w in place of w does not give a times the product: no multiplier can be folded into such a weight
_NOT_LINEAR = ("tanh", "clamped", "noise added", "weight norm without a gain", "standardized")
# linear, or linear in its size, which an operation at a time may not show
_EITHER = (
    "rounded straight through",
    "mask multiplied",
    "mask first",
    "dropout of weights",
    "noise multiplied",
    "negated",
)
_EITHER += ("a mask broadcast over outputs", "a constant")


def products() -> Iterator[Case]:
    """Each form as a hidden weight, as the first product and as the head."""
    for name, form in FORMS.items():
        first, last = "embedding first_sum", f"unembedding[{form.axes}] head"
        if name in _NOT_LINEAR + _EITHER:
            plain = (f"{first} | ", f"{last} | ") if name in _EITHER else ("", "")
            first, last = (
                plain[0] + "embedding | embedding first_sum derived",
                plain[1] + f"{last} derived | ask | refuse",
            )
        yield inside(
            f"hidden: {name}",
            lambda width, form=form: {"weight": form.shape(width, 2 * width)},
            lambda model, h, x, form=form: form.apply(h, model.weight),
            outputs=2,
            weight=f"hidden[{form.axes}]",
        )
        yield net(
            f"input: {name}",
            lambda width, form=form: {"weight": form.shape(FEATURES, width), "head": (VOCAB, width)},
            lambda model, x, form=form: F.linear(form.apply(x, model.weight).tanh(), model.head),
            features,
            weight=first,
            head="unembedding[1] head",
        )
        yield net(
            f"head: {name}",
            lambda width, form=form: {"stem": (width, FEATURES), "weight": form.shape(width, VOCAB)},
            lambda model, x, form=form: form.apply(F.linear(x, model.stem).tanh(), model.weight),
            features,
            stem="embedding first_sum",
            weight=last,
        )


VECTORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda h, a: h @ a,
    "mv": lambda h, a: torch.mv(h.flatten(0, 1), a).view(BATCH, TOKENS),
    "einsum": lambda h, a: torch.einsum("btd,d->bt", h, a),
    "linear": lambda h, a: F.linear(h, a[None])[..., 0],
    "inner": lambda h, a: torch.inner(h, a),
    "vecdot": lambda h, a: torch.linalg.vecdot(h, a),
    "multiplied, then summed": lambda h, a: (h * a).sum(-1),
    "multiplied first, then summed": lambda h, a: torch.sum(a * h, dim=2),
    "multiplied, copied, then summed": lambda h, a: (h * a).contiguous().clone().float().sum(-1),
    "multiplied, halved, then summed": lambda h, a: ((h * a) * 0.5).sum(-1),
    "multiplied, split in heads, then summed twice": lambda h, a: (h * a).unflatten(-1, (4, -1)).sum(-1).sum(-1),
    "multiplied in heads, then summed": lambda h, a: (h.unflatten(-1, (4, -1)) * a.view(4, -1)).sum((-1, -2)),
    "multiplied in place": lambda h, a: h.clone().mul_(a).sum(-1),
    "summed with a product with ones": lambda h, a: (h * a) @ torch.ones_like(a),
}


def vectors() -> Iterator[Case]:
    """A vector whose product with the stream is one number: a readout, whatever the way; inside of a model it is asked."""
    for name, apply in VECTORS.items():
        yield net(
            f"scalar head: {name}",
            lambda width: {"stem": (width, FEATURES), "a": (width,)},
            lambda model, x, apply=apply: apply(F.linear(x, model.stem).tanh(), model.a),
            features,
            stem="embedding first_sum",
            a="unembedding[0] head" + (" | ask" if "with ones" in name else ""),
        )
        yield inside(
            f"pooling score: {name}",
            lambda width: {"a": (width,)},
            lambda model, h, x, apply=apply: (apply(h, model.a).softmax(1)[..., None] * h).sum(1),
            a="ask | unembedding[0]",
            answers={"a": "unembedding"},
        )


GAINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "times": lambda h, g: h * g,
    "times, then summed over tokens": lambda h, g: (h * g).sum(1),
    "times, then averaged over tokens": lambda h, g: torch.mean(h * g, dim=1),
    "times, then a softmax over tokens": lambda h, g: (h * g).softmax(1),
    "in place": lambda h, g: h.clone().mul_(g),
    "copied": lambda h, g: h * g.clone().to(torch.float64).to(torch.float32),
    "in heads": lambda h, g: (h.unflatten(-1, (4, -1)) * g.view(4, -1)).flatten(2),
    "expanded": lambda h, g: h * g.expand(BATCH, TOKENS, -1),
    "repeated": lambda h, g: h * g.repeat(BATCH, TOKENS, 1),
    "divided": lambda h, g: h / (g + 2),
    "1 - m": lambda h, g: h * g + h.roll(1, 1) * (1 - g),
    "lerp": lambda h, g: torch.lerp(h, h.roll(1, 1), g),
    "addcmul": lambda h, g: torch.addcmul(h, h.roll(1, 1), g),
    "1 + g": lambda h, g: h * (1 + g),
    "squared": lambda h, g: h * g**2,
    "power": lambda h, g: h * 0.9 ** g.abs(),
    "sigmoid": lambda h, g: h * g.sigmoid(),
    "decay exp(-exp)": lambda h, g: h * torch.exp(-torch.exp(g)),
    "softplus": lambda h, g: h * F.softplus(g),
    "decay times a step": lambda h, g: h * torch.exp(-h.abs() * g.exp()),
    "tanh(a·x)": lambda h, g: torch.tanh(h * g),
    "snake": lambda h, g: h + torch.sin(g * h).square() / (g + 2),
    "prelu": lambda h, g: F.prelu(h.mT, g).mT,
    "prelu by where": lambda h, g: torch.where(h > 0, h, g * h),
    "layer norm": lambda h, g: F.layer_norm(h, h.shape[-1:], g),
    "RMS norm": lambda h, g: F.rms_norm(h, h.shape[-1:], g),
    "RMS norm by hand": lambda h, g: g * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "batch norm": lambda h, g: F.batch_norm(h.mT, None, None, g, training=True).mT,
    "group norm": lambda h, g: F.group_norm(h.mT, 4, g).mT,
    "instance norm": lambda h, g: F.instance_norm(h.mT, weight=g).mT,
    "then an RMS norm by hand": lambda h, g: (h * g) * torch.rsqrt((h * g).pow(2).mean(-1, keepdim=True) + 1e-6),
    "then a layer norm by hand": lambda h, g: (h * g - (h * g).mean(-1, keepdim=True)) / ((h * g).std(-1, keepdim=True) + 1),
    "then a layer norm": lambda h, g: F.layer_norm(h * g, h.shape[-1:]),
    "then l2": lambda h, g: F.normalize(h * g, dim=-1),
    "then a softmax over channels": lambda h, g: (h * g).softmax(-1),
    "then a mask": lambda h, g: (h * g).masked_fill(h > 0, 0.0),
    "then a difference of tokens": lambda h, g: (h * g)[:, 1:] - (h * g)[:, :-1],
    "then a cumulative sum over tokens": lambda h, g: (h * g).cumsum(1),
    "then scores": lambda h, g: F.scaled_dot_product_attention(h * g, h, h),
}  # fmt: skip

SHIFTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plus": lambda h, b: (h.tanh() + b).tanh(),
    "minus": lambda h, b: (h.tanh() - b).tanh(),
    "in place": lambda h, b: h.clone().add_(b, alpha=2.0).tanh(),
    "expanded": lambda h, b: (h.tanh() + b.expand(BATCH, TOKENS, -1)).tanh(),
    "picked by index": lambda h, b: (h.tanh() + b[permutation(len(b))]).tanh(),
    "in heads": lambda h, b: (h.tanh().unflatten(-1, (4, -1)) + b.view(4, -1)).flatten(2).tanh(),
    "layer norm": lambda h, b: F.layer_norm(h.tanh(), h.shape[-1:], None, b),
    "then a layer norm by hand": lambda h, b: (h.tanh() + b) - (h.tanh() + b).mean(-1, keepdim=True),
    "then a sum over tokens": lambda h, b: (h.tanh() + b).sum(1),
    "exp": lambda h, b: h.tanh() + b.exp(),
}


def vectors_beside_products() -> Iterator[Case]:
    """The harmless twins: gains and shifts, and functions of them, which enter no product."""
    for name, apply in GAINS.items():
        yield inside(
            f"gain: {name}",
            lambda width: {"weight": (width, width), "g": (width,)},
            lambda model, h, x, apply=apply: apply((h @ model.weight).tanh(), model.g),
            weight="hidden[0]",
            g="norm",
        )
    for name, apply in SHIFTS.items():
        yield inside(
            f"shift: {name}",
            lambda width: {"weight": (width, width), "b": (width,)},
            lambda model, h, x, apply=apply: apply(h @ model.weight, model.b),
            weight="hidden[0]",
            b="bias",
        )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (products, vectors, vectors_beside_products):
        yield from group()
