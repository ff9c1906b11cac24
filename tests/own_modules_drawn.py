"""Nets drawn at random from steps whose roles are known, so that a rule has to hold in every company."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.own_modules import EXPERTS, FEATURES, TOKENS, VOCAB, Case, Net, features, ids
from tests.own_modules_products import _NOT_LINEAR, FORMS, GAINS, SHIFTS, VECTORS

Step = Callable[[Any, Tensor], Tensor]
# h of one token is enough for all steps but these, which change the number of tokens or read it
_NO_STEPS = {"times, then summed over tokens", "times, then averaged over tokens", "then a difference of tokens"}
_NO_STEPS |= {"then a sum over tokens", "group norm", "in heads"}  # the last two need a width that 4 divides
SCORES = [name for name in VECTORS if "ones" not in name and "heads" not in name]


@dataclass
class Draw:
    """A net as it is drawn: parameters (shape from the width), what they must be read as, and its steps."""

    random: random.Random
    parts: dict[str, Callable[[int], Any]] = field(default_factory=dict)
    expected: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)

    def add(self, made: Callable[[int], Any], answer: str, said: str | None = None) -> str:
        """A parameter of a name that says nothing; its name."""
        name = f"p{len(self.parts)}"
        self.parts[name], self.expected[name] = made, answer
        if said:
            self.answers[name] = said
        return name

    def one_of(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def product(self, inputs: int, outputs: int) -> Step:
        """A hidden weight in any form; extents in units of the width."""
        form = FORMS[self.one_of(*FORMS)]
        name = self.add(lambda w: form.shape(inputs * w, outputs * w), f"hidden[{form.axes}]")
        return lambda m, h: form.apply(h, getattr(m, name))

    def gain(self, size: int) -> Step:
        apply = GAINS[self.one_of(*sorted(set(GAINS) - _NO_STEPS))]
        name = self.add(lambda w: (size * w,), "norm")
        return lambda m, h: apply(h, getattr(m, name))

    def shift(self, size: int) -> Step:
        apply = SHIFTS[self.one_of(*sorted(set(SHIFTS) - _NO_STEPS))]
        name = self.add(lambda w: (size * w,), "bias")
        return lambda m, h: apply(h, getattr(m, name))

    def narrow(self, size: int) -> Step:
        """Down to a few numbers and up again: the first is asked about, the second looks like a first product."""
        down, up = (FORMS[self.one_of(*FORMS)] for _ in "du")
        a = self.add(lambda w: down.shape(size * w, 4), "ask", "unembedding")
        b = self.add(lambda w: up.shape(4, size * w), "embedding")
        return lambda m, h: up.apply(down.apply(h, getattr(m, a)).tanh(), getattr(m, b))

    def pooled(self, size: int) -> Step:
        apply = VECTORS[self.one_of(*SCORES)]
        name = self.add(lambda w: (size * w,), "ask", "unembedding")
        return lambda m, h: h * apply(h, getattr(m, name)).softmax(1)[..., None]

    def experts(self, size: int) -> Step:
        name = self.add(lambda w: (EXPERTS, size * w, size * w), "hidden[1] | hidden[0,1]")
        ways: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda h, w: torch.einsum("btd,bde->bte", h, w[torch.arange(len(h)) % EXPERTS]),
            lambda h, w: torch.stack([h @ one for one in w]).mean(0),
            lambda h, w: (h[:, :, None, None] @ w)[..., 0, :].amax(2),
            lambda h, w: torch.stack([row @ w[number % EXPERTS] for number, row in enumerate(h)]),
        ]
        way = self.one_of(*ways)
        return lambda m, h: way(h, getattr(m, name))

    def attention(self, size: int) -> Step:
        q, k, v = (self.product(size, size) for _ in "qkv")
        return lambda m, h: F.scaled_dot_product_attention(q(m, h), k(m, h), v(m, h))

    def gated(self, size: int) -> Step:
        wide = self.product(size, 2 * size)

        def run(m: Any, h: Tensor) -> Tensor:
            a, b = wide(m, h).chunk(2, -1)
            return a * b.sigmoid()

        return run

    def merged(self, size: int) -> Step:
        """A product over heads of four channels and their width."""
        name = self.add(lambda w: (size * w // 4, 4, size * w), "hidden[0,1]")
        ways: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda h, w: torch.einsum("bthd,hdm->btm", h, w),
            lambda h, w: h.flatten(2) @ w.flatten(0, 1),
            lambda h, w: torch.stack([h[:, :, number] @ one for number, one in enumerate(w)]).sum(0),
            lambda h, w: (h[..., None] * w).sum((2, 3)),
        ]
        way = self.one_of(*ways)
        return lambda m, h: way(h.unflatten(-1, (-1, 4)), getattr(m, name))

    def told(self, size: int) -> Step:
        """A table that is looked up in the middle: added, a gain for each word, or projected first."""
        kind = self.random.randrange(3)
        answers = ("embedding", "norm,embedding", "embedding | embedding first_sum")
        name = self.add(lambda w: (VOCAB, size * w), answers[kind])
        if kind == 2:
            mix = self.product(size, size)
            return lambda m, h: h + mix(m, getattr(m, name)[_words(h)].tanh()).tanh()
        return lambda m, h: h * getattr(m, name)[_words(h)] if kind else h + getattr(m, name)[_words(h)].tanh()

    def recurrent(self, size: int) -> Step:
        """One layer over the tokens, its weights used once for each of them."""
        enter, again = self.product(size, size), self.product(size, size)
        shift = self.add(lambda w: (size * w,), "bias")

        def run(m: Any, h: Tensor) -> Tensor:
            made, state = enter(m, h), torch.zeros_like(h)
            for _ in range(2):
                state = torch.tanh(made + again(m, state) + getattr(m, shift))
            return state

        return run

    def mixed(self, size: int) -> Step:
        """The stream and a product of it, mixed by a vector or a number that is learned."""
        mix, extent = self.product(size, size), self.one_of("w", "1")
        name = self.add(lambda w: (size * w if extent == "w" else 1,), "norm" if extent == "w" else "norm,bias")
        ways: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
            lambda a, b, g: g * a + (1 - g) * b,
            lambda a, b, g: torch.lerp(a, b, g.sigmoid()),
            lambda a, b, g: a + g * b,
            lambda a, b, g: torch.addcmul(a, b, g.tanh()),
            lambda a, b, g: a * torch.exp(-g.exp()) + b,
        ]
        way = self.one_of(*ways)
        return lambda m, h: way(h, mix(m, h).tanh(), getattr(m, name))

    def branch(self, size: int, depth: int) -> Step:
        inner = [self.step(size, depth + 1) for _ in range(self.random.randint(1, 2))]
        return lambda m, h: h + _chain(m, h, inner)

    def step(self, size: int, depth: int = 0) -> Step:
        """A step that keeps the width, with a bend in front, so that no two products are one."""
        plain = (self.gain, self.shift, self.narrow, self.pooled, self.experts, self.attention)
        plain += (self.gated, self.merged, self.told, self.recurrent, self.mixed)
        kind = self.random.randrange(len(plain) + (4 if depth < 2 else 2))
        if kind >= len(plain) + 2:
            return self.branch(size, depth)
        if kind >= len(plain):
            wide = self.one_of(1, 2, 3)
            a, b = self.product(size, wide), self.product(wide, size)
            return lambda m, h: b(m, F.gelu(a(m, h)))
        made = plain[kind](size)
        return lambda m, h: made(m, h.tanh())

    def norm(self, size: int, use: str = "") -> Step:
        """A norm with a gain, and with a shift or without."""
        gain = self.add(lambda w: nn.Parameter(torch.ones(size * w)), f"norm{use}")
        shift = self.one_of(None, "shift") and self.add(lambda w: nn.Parameter(torch.zeros(size * w)), f"bias{use}")
        ways: list[Callable[[Tensor], Tensor]] = [
            lambda h: F.layer_norm(h, h.shape[-1:]),
            lambda h: F.rms_norm(h, h.shape[-1:]),
            lambda h: h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6),
            lambda h: (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-6),
        ]
        way = self.one_of(*ways)
        return lambda m, h: _shifted(m, way(h) * getattr(m, gain), shift)

    def start(self) -> tuple[Step, str | None]:
        """What makes the first activations, of the width; the table that token numbers are looked up in, or None for numbers."""
        kind = self.random.randrange(3)
        if kind == 0:
            names = [self.add(lambda w: (VOCAB, w), "embedding first_sum")]
            names += [self.add(lambda w: (TOKENS, w), "embedding first_sum") for _ in range(self.random.randint(0, 1))]
            return lambda m, x: sum((getattr(m, n) for n in names[1:]), getattr(m, names[0])[x]), names[0]
        if kind == 1:
            table = self.add(lambda w: (VOCAB, w), "embedding")
            norm = self.norm(1, " first_sum")
            return lambda m, x: norm(m, F.embedding(x, getattr(m, table))), table
        linear = [name for name in FORMS if name not in _NOT_LINEAR and "convolution" not in name]
        form = FORMS[self.one_of(*linear)]
        weight = self.add(lambda w: form.shape(FEATURES, w), "embedding first_sum | embedding first_sum derived")
        shift = self.add(lambda w: (w,), "bias first_sum")
        return lambda m, x: form.apply(x, getattr(m, weight)) + getattr(m, shift), None

    def end(self, table: str | None) -> Step:
        """The head behind a norm: the table again, if it is given, or a weight of its own; with a bias or without."""
        norm = self.norm(1, " before_head" if table else "")
        if table:
            head, apply, shift = table, F.linear, None
            self.expected[table] += " head"
        else:
            form = FORMS[self.one_of(*(name for name in FORMS if name not in _NOT_LINEAR))]
            answer, apply = f"unembedding[{form.axes}] head", form.apply
            head = self.add(lambda w: form.shape(w, VOCAB), f"{answer} | {answer} derived")
            shift = self.one_of(None, "shift") and self.add(lambda w: (VOCAB,), "bias after_head")
        return lambda m, h: _shifted(m, apply(norm(m, h), getattr(m, head)), shift)


def _shifted(m: Any, h: Tensor, shift: str | None) -> Tensor:
    return h + getattr(m, shift) if shift else h


def _words(h: Tensor) -> Tensor:
    """Token numbers, of a batch's shape, that do not depend on the stream."""
    return torch.arange(h.shape[0] * h.shape[1]).view(h.shape[:2]) % VOCAB


def _chain(m: Any, h: Tensor, steps: list[Step]) -> Tensor:
    for step in steps:
        h = step(m, h)
    return h


def draw(seed: int) -> Case:
    """The net of a seed: steps in a row, or branches of a stream, each behind a norm."""
    drawn = Draw(random.Random(seed))
    start, table = drawn.start()
    in_stream = drawn.one_of(False, True)
    steps = list[Step]()
    for _ in range(drawn.random.randint(1, 4)):
        steps.append(_behind(drawn.norm(1), drawn.step(1)) if in_stream else drawn.step(1))
    end = drawn.end(drawn.one_of(None, table))

    def run(m: Any, x: Tensor) -> Tensor:
        h = start(m, x)
        return end(m, _chain(m, h if in_stream else h.tanh(), steps))

    def make(width: int) -> nn.Module:
        return Net(run, **{name: made(width) for name, made in drawn.parts.items()})

    return Case(f"drawn {seed}", make, ids if table else features, drawn.expected, drawn.answers)


def _behind(norm: Step, step: Step) -> Step:
    return lambda m, h: h + step(m, norm(m, h))
