"""Habits of people's code: passes with gradients in them, pruned and hooked layers, momentum copies, odd outputs, odd inputs."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.own_modules import EXPERTS, FEATURES, TOKENS, VOCAB, Case, Net, features, inside, net

HEAD = {"head__weight": "unembedding[1] head", "head__bias": "bias after_head"}
STEM = {"stem__weight": "embedding first_sum", "stem__bias": "bias first_sum"}
MIX = {"mix__weight": "hidden[1]", "mix__bias": "bias"}


def _plain(width: int) -> dict[str, Any]:
    return {"stem": nn.Linear(FEATURES, width), "mix": nn.Linear(width, width), "head": nn.Linear(width, 3)}


def _forward(m: Any, x: Tensor) -> Tensor:
    return m.head(m.mix(m.stem(x).tanh()).tanh())


def passes() -> Iterator[Case]:
    """What a user's own pass may hold, and what a model may return."""
    plain = {**STEM, **MIX, **HEAD}

    def trained(model: Any) -> Tensor:
        loss = _forward(model, torch.randn(4, FEATURES)).square().mean()
        loss.backward()
        return loss

    def stepped(model: Any) -> float:
        optimizer = torch.optim.AdamW(model.parameters())
        loss = _forward(model, torch.randn(4, FEATURES)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    def penalised(model: Any) -> Tensor:
        loss = _forward(model, torch.randn(4, FEATURES)).square().mean()
        return loss + 1e-4 * sum(parameter.square().sum() for parameter in model.parameters())

    runs = {"a backward pass": trained, "a whole training step": stepped, "a penalty on weights": penalised}
    for name, run in runs.items():
        yield net(f"a pass with {name}", _plain, _forward, options={"run": run, "example": None}, **plain)

    def derivative(m: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = _forward(m, x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope.square().sum() + u.square().sum()

    yield net("a derivative by the inputs in the loss", _plain, derivative, features, **plain)
    Pair = namedtuple("Pair", "first second")
    outputs = {
        "a dict": lambda y: {"logits": y, "none": None},
        "a named tuple": lambda y: Pair([y], 3),
        "an object": lambda y: SimpleNamespace(logits=y),
        "a loss alone": lambda y: y.square().mean(),
    }
    for name, wrap in outputs.items():
        yield net(f"returns {name}", _plain, lambda m, x, wrap=wrap: wrap(_forward(m, x)), features, **plain)
    keywords = lambda model: {"x": torch.randn(4, FEATURES)}  # noqa: E731
    yield net("takes keywords", _plain, _forward, keywords, **plain)
    for name, kind in {"bfloat16": torch.bfloat16, "double": torch.float64}.items():
        yield Case(
            f"in {name}",
            lambda width, kind=kind: Net(_forward, **_plain(width)).to(kind),
            lambda model, kind=kind: (torch.randn(4, FEATURES).to(kind),),
            {key.replace("__", "."): text for key, text in plain.items()},
        )
    yield net(
        "no head",
        lambda width: {"stem": nn.Linear(FEATURES, width), "mix": nn.Linear(width, width)},
        lambda m, x: m.mix(m.stem(x).tanh()),
        features,
        **STEM,
        **MIX,
    )
    yield net(
        "a frozen teacher that does not grow",
        lambda width: {**_plain(width), "teacher": nn.Linear(FEATURES, 3).requires_grad_(False)},
        lambda m, x: (_forward(m, x) - m.teacher(x)).square().mean(),
        features,
        teacher__weight="embedding,norm,bias * | unembedding *",
        teacher__bias="bias *",
        **plain,
    )

    def one_hot(m: Any, x: Tensor) -> Tensor:
        return m.head(F.one_hot(x, VOCAB).float() @ m.table + m.where(torch.arange(TOKENS)[:, None] / TOKENS))

    yield net(
        "one-hot rows times a table, places by a product",
        lambda width: {"table": (VOCAB, width), "where": nn.Linear(1, width), "head": nn.Linear(width, 3)},
        one_hot,
        table="embedding first_sum",
        where__weight="embedding first_sum",
        where__bias="bias first_sum",
        **HEAD,
    )
    yield net(
        "bags of words",
        lambda width: {"table": nn.EmbeddingBag(VOCAB, width), "head": nn.Linear(width, 3)},
        lambda m, x: m.head(m.table(x)),
        table__weight="embedding first_sum",
        **HEAD,
    )


def layers() -> Iterator[Case]:
    """Layers that hooks and containers change."""
    yield inside(
        "pruned by torch",
        lambda width: {"mix": prune.random_unstructured(nn.Linear(width, width), "weight", 0.5)},
        lambda m, h, x: m.mix(h).tanh(),
        mix__weight_orig="hidden[1]",
        mix__bias="bias",
    )
    yield inside(
        "weight norm by the old hook",
        lambda width: {"mix": nn.utils.weight_norm(nn.Linear(width, width))},
        lambda m, h, x: m.mix(h).tanh(),
        mix__weight_g="norm | ask",
        mix__weight_v="hidden[1]",
        mix__bias="bias",
        answers={"mix.weight_g": "norm"},
    )
    yield inside(
        "weight norm of a convolution",
        lambda width: {"mix": nn.utils.parametrizations.weight_norm(nn.Conv1d(width, width, 3, padding=1))},
        lambda m, h, x: m.mix(h.mT).mT.tanh(),
        mix__parametrizations__weight__original0="norm | ask",
        mix__parametrizations__weight__original1="hidden[1,2]",
        mix__bias="bias",
        answers={"mix.parametrizations.weight.original0": "norm"},
    )
    yield inside(
        "lists and dicts of parameters",
        lambda width: {
            "several": nn.ParameterList([torch.randn(width, width) for _ in range(2)]),
            "named": nn.ParameterDict({"gain": torch.ones(width), "shift": torch.zeros(width)}),
        },
        lambda m, h, x: (h @ m.several[0]).tanh() @ m.several[1] * m.named["gain"] + m.named["shift"],
        several__0="hidden[0]",
        several__1="hidden[0]",
        named__gain="norm",
        named__shift="bias",
    )
    yield inside(
        "compiled",
        lambda width: {"mix": torch.compile(nn.Linear(width, width))},
        lambda m, h, x: m.mix(h).tanh(),
        mix___orig_mod__weight="hidden[1]",
        mix___orig_mod__bias="bias",
    )
    yield inside(
        "an ensemble by vmap",
        lambda width: {"weights": (EXPERTS, width, width)},
        lambda m, h, x: torch.vmap(lambda w: (h @ w).tanh())(m.weights).mean(0),
        weights="hidden[1] | hidden[0,1]",
    )
    yield inside(
        "skips an expert that gets no token",
        lambda width: {"experts": nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(8))},
        _routed,
        **{f"experts__{i}__weight": "hidden[1] | refuse" for i in range(8)},
    )
    yield inside(
        "heads in a list, put together",
        lambda width: {
            "heads": nn.ModuleList(nn.Linear(width, 3 * width // 4, bias=False) for _ in range(4)),
            "mix": nn.Linear(width, width),
        },
        lambda m, h, x: m.mix(torch.cat([F.scaled_dot_product_attention(*one(h).chunk(3, -1)) for one in m.heads], -1)),
        **{f"heads__{i}__weight": "hidden[1]" for i in range(4)},
        **MIX,
    )
    yield inside(
        "added biases of keys and values",
        lambda width: {"attention": nn.MultiheadAttention(width, 4, add_bias_kv=True, batch_first=True, bias=False)},
        lambda m, h, x: m.attention(h, h, h)[0],
        attention__in_proj_weight="hidden[1]",
        attention__out_proj__weight="hidden[1]",
        attention__bias_k="bias,embedding",
        attention__bias_v="bias,embedding",
    )
    yield inside(
        "talking heads",
        lambda width: {"q": nn.Linear(width, width), "talk": (width // 4, width // 4)},
        lambda m, h, x: (
            (lambda q: torch.einsum("bhij,hg->bgij", q @ q.mT, m.talk).softmax(-1) @ q)(
                m.q(h).unflatten(-1, (-1, 4)).transpose(1, 2)
            )
            .transpose(1, 2)
            .flatten(2)
        ),
        q__weight="hidden[1]",
        q__bias="bias",
        talk="hidden[0]",
    )
    yield inside(
        "splines with scales of their own",
        lambda width: {"splines": (width, width, 4), "scales": (width, width)},
        lambda m, h, x: F.linear(
            torch.stack([(k * h).sin() for k in range(1, 5)], -1).flatten(-2),
            (m.splines * m.scales[..., None]).flatten(1),
        ),
        splines="hidden[1,2]",
        scales="hidden[1] | ask",
        answers={"scales": "hidden"},
    )
    yield inside(
        "inputs put beside the stream",
        lambda width: {"mix": nn.Linear(width + 5, width)},
        lambda m, h, x: m.mix(torch.cat([h, torch.randn(*h.shape[:2], 5)], -1)).tanh(),
        **MIX,
    )
    yield inside(
        "squeezed and excited, both growing",
        lambda width: {"squeeze": nn.Linear(width, width // 4), "mix": nn.Linear(width // 4, width)},
        lambda m, h, x: h * m.mix(m.squeeze(h.mean(1, keepdim=True)).relu()).sigmoid(),
        squeeze__weight="hidden[1]",
        squeeze__bias="bias",
        **MIX,
    )
    yield inside(
        "memory slots by soft addresses",
        lambda width: {"keys": (EXPERTS, width), "values": (EXPERTS, width)},
        lambda m, h, x: (h.tanh() @ m.keys.t()).softmax(-1) @ m.values,
        keys="ask",
        values="embedding | embedding first_sum",
        answers={"keys": "unembedding"},
    )
    yield inside(
        "slots drawn around a learned mean",
        lambda width: {"mean": (1, 1, width), "spread": (1, 1, width), "mix": nn.Linear(width, width)},
        lambda m, h, x: (m.mean + m.spread.exp() * torch.randn(2, 3, h.shape[-1])).tanh() + m.mix(h[:, :3]),
        mean="bias,embedding | bias,embedding first_sum",
        spread="norm,bias,embedding | norm,bias,embedding first_sum derived",  # no factor goes through exp
        **MIX,
    )


def _routed(m: Any, h: Tensor, x: Tensor) -> Tensor:
    tokens, out = h.flatten(0, 1), torch.zeros_like(h.flatten(0, 1))
    for number, expert in enumerate(m.experts):
        (mine,) = torch.where(x.flatten() % 8 == number)
        if len(mine) == 0:
            continue
        out[mine] = expert(tokens[mine])
    return out.view_as(h)


def copies() -> Iterator[Case]:
    """Momentum encoders, updated within the pass."""

    def make(width: int) -> dict[str, Any]:
        online = nn.Sequential(
            nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
        return {"online": online, "momentum": copy.deepcopy(online).requires_grad_(False)}

    def contrasted(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(m.momentum.parameters(), m.online.parameters(), strict=True):
                slow.data = slow.data * 0.999 + fast.data * 0.001
            keys = m.momentum(x)
        return F.cross_entropy(m.online(x).flatten(0, 1) @ keys.flatten(0, 1).t(), torch.arange(10))

    def averaged(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(m.momentum.parameters(), m.online.parameters(), strict=True):
                slow.lerp_(fast, 0.001)
            aim = m.momentum(x)
        return (m.online(x) - aim).square().mean()

    rows = {
        "0__weight": "embedding first_sum",
        "0__bias": "bias first_sum",
        "2__weight": "hidden[1]",
        "2__bias": "bias",
    }
    rows |= {"4__weight": "unembedding[1] head", "4__bias": "bias after_head"}
    both = {f"{part}__{name}": text for part in ("online", "momentum") for name, text in rows.items()}
    yield net("a momentum encoder, by new data", make, contrasted, features, **both)
    yield net("a momentum encoder, in place", make, averaged, features, **both)


def several_inputs() -> Iterator[Case]:
    """Nets whose first activations are several, and terms beside them."""
    critic = lambda width: nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, 1))  # noqa: E731
    rows = {"0__weight": "embedding first_sum", "0__bias": "bias first_sum"}
    rows |= {"2__weight": "unembedding[1] head", "2__bias": "bias after_head"}
    yield net(
        "two critics of one input",
        lambda width: {"a": critic(width), "b": critic(width)},
        lambda m, x: (lambda z: torch.min(m.a(z), m.b(z)))(torch.cat([x[..., :3], x[..., 3:].tanh()], -1)),
        features,
        **{f"{part}__{name}": text for part in "ab" for name, text in rows.items()},
    )
    yield net(
        "terms of single words beside a net",
        lambda width: {
            "table": nn.Embedding(VOCAB, width),
            "single": nn.Embedding(VOCAB, 1),
            "head": nn.Linear(width, 1),
        },
        lambda m, x: m.single(x).sum(1) + m.head(m.table(x).sum(1).relu()),
        table__weight="embedding first_sum",
        single__weight="embedding,bias | embedding,bias after_head",
        head__weight="unembedding[1] head",
        head__bias="bias after_head",
    )
    yield inside(
        "kernels of complex numbers",
        lambda width: {"decay": (width,), "wave": (width, 2)},
        lambda m, h, x: (
            lambda k: torch.fft.irfft(torch.fft.rfft(h.mT, n=16) * torch.fft.rfft(k, n=16), n=16)[..., :5].mT
        )((torch.view_as_complex(m.wave)[:, None] * torch.exp(m.decay[:, None] * 1j * torch.arange(5))).real),
        decay="norm,bias,embedding | ask | refuse",
        wave="norm,bias,embedding | ask | refuse",
        unread=frozenset(),
    )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (passes, layers, copies, several_inputs):
        yield from group()
