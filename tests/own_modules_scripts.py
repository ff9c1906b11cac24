"""Nets of the shapes that public training scripts have, small, with what their layouts must say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.own_modules import BATCH, FEATURES, TOKENS, VOCAB, Case, Net, features, net

HEAD = {"head__weight": "unembedding[1] head", "head__bias": "bias after_head"}
LOSE = {"bias": False}


def images(model: nn.Module) -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, 3, 16, 16),)


def policies() -> Iterator[Case]:
    """A policy-gradient agent of continuous actions: no forward pass, a spread beside the nets, a sampled action."""

    def make(width: int) -> dict[str, Any]:
        def mlp(outputs: int) -> nn.Module:
            hidden = nn.Linear(width, width)
            return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), hidden, nn.Tanh(), nn.Linear(width, outputs))

        return {"critic": mlp(1), "actor": mlp(3), "logstd": nn.Parameter(torch.zeros(1, 3))}

    def act(model: Any) -> tuple[Tensor, ...]:
        x = torch.randn(4, FEATURES)
        mean = model.actor(x)
        spread = torch.exp(model.logstd.expand_as(mean))
        chances = torch.distributions.Normal(mean, spread)
        action = chances.sample()
        return action, chances.log_prob(action).sum(1), chances.entropy().sum(1), model.critic(x)

    rows = {
        "0__weight": "embedding first_sum",
        "0__bias": "bias first_sum",
        "2__weight": "hidden[1]",
        "2__bias": "bias",
    }
    rows |= {"4__weight": "unembedding[1] head", "4__bias": "bias after_head"}
    yield net(
        "a policy of continuous actions",
        make,
        act,
        None,
        options={"run": act, "example": None},
        logstd="bias,norm,embedding *",
        **{f"{part}__{name}": text for part in ("critic", "actor") for name, text in rows.items()},
    )


def images_made() -> Iterator[Case]:
    """Generators and critics of images, a diffusion U-Net, a diffusion transformer."""
    yield net(
        "a convolutional generator",
        lambda width: {
            "a": nn.ConvTranspose2d(6, 2 * width, 4, 1, 0, **LOSE),
            "an": nn.BatchNorm2d(2 * width),
            "b": nn.ConvTranspose2d(2 * width, width, 4, 2, 1, **LOSE),
            "bn": nn.BatchNorm2d(width),
            "c": nn.ConvTranspose2d(width, 3, 4, 2, 1, **LOSE),
        },
        lambda m, z: torch.tanh(m.c(m.bn(m.b(m.an(m.a(z)).relu())).relu())),
        lambda model: (torch.randn(BATCH, 6, 1, 1),),
        a__weight="embedding",
        an__weight="norm first_sum",
        an__bias="bias first_sum",
        b__weight="hidden[0,2,3]",
        bn__weight="norm",
        bn__bias="bias",
        c__weight="unembedding[0,2,3] head",
    )
    yield net(
        "a convolutional critic",
        lambda width: {
            "a": nn.Conv2d(3, width, 4, 2, 1, **LOSE),
            "b": nn.Conv2d(width, 2 * width, 4, 2, 1, **LOSE),
            "bn": nn.BatchNorm2d(2 * width),
            "c": nn.Conv2d(2 * width, 1, 4, 1, 0, **LOSE),
        },
        lambda m, x: torch.sigmoid(m.c(F.leaky_relu(m.bn(m.b(F.leaky_relu(m.a(x), 0.2))), 0.2))),
        images,
        a__weight="embedding first_sum",
        b__weight="hidden[1,2,3]",
        bn__weight="norm",
        bn__bias="bias",
        c__weight="unembedding[1,2,3] head",
    )

    def unet(m: Any, x: Tensor) -> Tensor:
        waves = torch.cat([torch.outer(torch.arange(1.0, 3.0), m.frequencies).sin()] * 2, -1)
        time = m.time(waves)
        first = m.enter(x)
        h = m.down(F.silu(m.norm(first))) + m.shift(F.silu(time))[..., None, None]
        h = h + m.mix(F.silu(m.mid_norm(h)))
        h = torch.cat([F.interpolate(h, scale_factor=2.0, mode="nearest"), first], 1)
        return m.leave(F.silu(m.last_norm(m.up(h))))

    yield net(
        "a diffusion U-Net",
        lambda width: {
            "frequencies": torch.rand(width // 2),
            "time": nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)),
            "shift": nn.Linear(width, 2 * width),
            "enter": nn.Conv2d(3, width, 3, padding=1),
            "norm": nn.GroupNorm(4, width),
            "down": nn.Conv2d(width, 2 * width, 3, 2, 1),
            "mid_norm": nn.GroupNorm(4, 2 * width),
            "mix": nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            "up": nn.Conv2d(3 * width, width, 3, padding=1),
            "last_norm": nn.GroupNorm(4, width),
            "leave": nn.Conv2d(width, 3, 3, padding=1),
        },
        unet,
        images,
        enter__weight="embedding first_sum",
        enter__bias="bias first_sum",
        leave__weight="unembedding[1,2,3] head",
        leave__bias="bias after_head",
        **{f"{name}__weight": "hidden[1,2,3]" for name in ("down", "mix", "up")},
        **{f"{name}__weight": "hidden[1]" for name in ("time__0", "time__2", "shift")},
        **{f"{name}__bias": "bias" for name in ("down", "mix", "up", "time__0", "time__2", "shift")},
        **{f"{name}__weight": "norm" for name in ("norm", "mid_norm", "last_norm")},
        **{f"{name}__bias": "bias" for name in ("norm", "mid_norm", "last_norm")},
    )

    def diffusion_transformer(m: Any, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        h = m.patch(x).flatten(2).mT + m.positions
        waves = torch.outer(t.float(), torch.arange(1.0, 5.0))
        condition = F.silu(m.time(torch.cat([waves.sin(), waves.cos()], -1)) + m.labels(label))
        for block in m.blocks:
            h = block(h, condition)
        shift, scale = m.last(condition).chunk(2, 1)
        return m.head(F.layer_norm(h, h.shape[-1:]) * (1 + scale[:, None]) + shift[:, None])

    def block(m: Any, h: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = m.modulation(condition)[:, None].chunk(3, -1)
        x = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        q, k, v = m.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        return h + gate * m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    parts = ("modulation", "qkv", "proj")
    yield net(
        "a diffusion transformer",
        lambda width: {
            "patch": nn.Conv2d(3, width, 8, 8),
            "positions": nn.Parameter(torch.randn(1, 4, width), requires_grad=False),
            "time": nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width)),
            "labels": nn.Embedding(5, width),
            "blocks": nn.ModuleList(
                Net(
                    block,
                    modulation=nn.Linear(width, 3 * width),
                    qkv=nn.Linear(width, 3 * width),
                    proj=nn.Linear(width, width),
                )
                for _ in range(2)
            ),
            "last": nn.Linear(width, 2 * width),
            "head": nn.Linear(width, 3 * 64),
        },
        diffusion_transformer,
        lambda model: (*images(model), torch.tensor([1, 2]), torch.tensor([3, 4])),
        patch__weight="embedding first_sum",
        patch__bias="bias first_sum",
        positions="embedding first_sum",
        time__0__weight="embedding",
        time__0__bias="bias",
        time__2__weight="hidden[1]",
        time__2__bias="bias",
        labels__weight="embedding",
        last__weight="hidden[1]",
        last__bias="bias",
        **{f"blocks__{index}__{part}__weight": "hidden[1]" for index in (0, 1) for part in parts},
        **{f"blocks__{index}__{part}__bias": "bias" for index in (0, 1) for part in parts},
        **HEAD,
    )


def graphs() -> Iterator[Case]:
    """Graph convolutions over a dense and a sparse neighbourhood; attention over neighbours."""
    near = torch.eye(TOKENS) + torch.eye(TOKENS).roll(1, 0)
    sparse = near.to_sparse()
    rows = {"a__weight": "embedding first_sum", "a__bias": "bias first_sum"}
    rows |= {"b__weight": "hidden[1]", "b__bias": "bias"}
    parts = lambda width: {  # noqa: E731
        "a": nn.Linear(FEATURES, width),
        "b": nn.Linear(width, width),
        "head": nn.Linear(width, 3),
    }
    node_features = lambda model: (torch.randn(TOKENS, FEATURES),)  # noqa: E731
    for name, spread in {"dense": lambda h: near @ h, "sparse": lambda h: torch.sparse.mm(sparse, h)}.items():
        yield net(
            f"graph convolutions, {name}",
            parts,
            lambda m, x, spread=spread: spread(m.head(spread(m.b(spread(m.a(x)).relu())).relu())).log_softmax(-1),
            node_features,
            **rows,
            **HEAD,
        )
    yield net(
        "graph convolutions, sparse, biases behind the neighbours",
        lambda width: {"a": (FEATURES, width), "b": (width,), "c": (width, 3), "d": (3,)},
        lambda m, x: torch.sparse.mm(sparse, (torch.sparse.mm(sparse, x @ m.a) + m.b).relu() @ m.c) + m.d,
        node_features,
        a="embedding first_sum",
        b="bias first_sum",
        c="unembedding[0] head",
        d="bias after_head",
    )
    edges = near.nonzero().t()

    def scattered(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        sums = torch.zeros_like(h).index_add_(0, edges[0], m.b(h)[edges[1]])
        return m.head(torch.zeros_like(h).scatter_add_(0, edges[0][:, None].expand(-1, h.shape[1]), sums[edges[1]]))

    yield net("graph convolutions by scattering", parts, scattered, node_features, **rows, **HEAD)

    def attentive(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        scores = F.leaky_relu((h * m.source).sum(-1)[:, None] + (h * m.target).sum(-1)[None], 0.2)
        return m.head((scores.masked_fill(near == 0, -1e9).softmax(-1) @ m.b(h)).relu())

    yield net(
        "graph attention",
        lambda width: {**parts(width), "source": (1, width), "target": (1, width)},
        attentive,
        node_features,
        source="ask | unembedding[1]",
        target="ask | unembedding[1]",
        answers={"source": "unembedding", "target": "unembedding"},
        **rows,
        **HEAD,
    )


def sequences() -> Iterator[Case]:
    """Sequence models: an attentive decoder, dilated convolutions, a pre-normalised GPT without gains."""

    def translated(m: Any, x: Tensor) -> Tensor:
        memory, state = m.encoder(m.source(x))
        words, state, out = m.target(x), state[0], []
        for word in words.unbind(1):
            query = state[:, None].expand(-1, memory.shape[1], -1)
            weights = m.score(torch.tanh(m.attend(torch.cat([query, memory], -1)))).softmax(1)
            state = m.decoder(torch.cat([word, (weights * memory).sum(1)], -1), state)
            out.append(m.head(state))
        return torch.stack(out, 1)

    yield net(
        "a translator with additive attention",
        lambda width: {
            "source": nn.Embedding(VOCAB, width),
            "target": nn.Embedding(VOCAB, width),
            "encoder": nn.GRU(width, width, batch_first=True),
            "attend": nn.Linear(2 * width, width),
            "score": nn.Linear(width, 1, **LOSE),
            "decoder": nn.GRUCell(2 * width, width),
            "head": nn.Linear(width, VOCAB),
        },
        translated,
        source__weight="embedding first_sum",
        target__weight="embedding first_sum | embedding",
        attend__weight="hidden[1]",
        attend__bias="bias",
        score__weight="ask",
        answers={"score.weight": "unembedding"},
        **{f"encoder__weight_{side}_l0": "hidden[1]" for side in ("ih", "hh")},
        **{f"encoder__bias_{side}_l0": "bias" for side in ("ih", "hh")},
        **{f"decoder__weight_{side}": "hidden[1]" for side in ("ih", "hh")},
        **{f"decoder__bias_{side}": "bias" for side in ("ih", "hh")},
        **HEAD,
    )

    def waves(m: Any, x: Tensor) -> Tensor:
        h, skips = m.enter(F.pad(x.mT, (1, 0))), 0
        for layer in range(2):
            padded = F.pad(h, (2**layer, 0))
            z = torch.tanh(m.filters[layer](padded)) * torch.sigmoid(m.gates[layer](padded))
            skips = skips + m.skips[layer](z)
            h = h + m.residuals[layer](z)
        return m.head(m.mix(skips.relu()).relu())

    conv = lambda width, tap, dilation: nn.Conv1d(width, width, tap, dilation=dilation)  # noqa: E731
    stacks = ("filters", "gates", "skips", "residuals")
    rows = {f"{name}__{layer}__weight": "hidden[1,2]" for name in stacks for layer in (0, 1)}
    rows |= {f"{name}__{layer}__bias": "bias" for name in stacks for layer in (0, 1)}
    # nothing reads the last residual but the stream that is thrown away
    yield net(
        "dilated convolutions with skips",
        lambda width: {
            "enter": nn.Conv1d(FEATURES, width, 2),
            **{name: nn.ModuleList(conv(width, 2, 2**i) for i in (0, 1)) for name in ("filters", "gates")},
            **{name: nn.ModuleList(conv(width, 1, 1) for _ in (0, 1)) for name in ("skips", "residuals")},
            "mix": nn.Conv1d(width, width, 1),
            "head": nn.Conv1d(width, VOCAB, 1),
        },
        waves,
        features,
        enter__weight="embedding first_sum",
        enter__bias="bias first_sum",
        mix__weight="hidden[1,2]",
        mix__bias="bias",
        head__weight="unembedding[1,2] head",
        head__bias="bias after_head",
        **rows,
    )

    def bare(m: Any, x: Tensor) -> Tensor:
        h = first = F.rms_norm(m.table(x), m.table.weight.shape[1:])
        for layer, mix in enumerate(m.mix):
            h = m.keep[layer] * h + m.again[layer] * first
            values = m.values(x) * 2 * torch.sigmoid(m.gate(h[..., :4])) + mix(h)
            h = h + m.out[layer](values.relu().square())
        return 15 * torch.tanh(m.head(F.rms_norm(h, h.shape[-1:])) / 15)

    yield net(
        "a GPT without gains, values from a table, streams mixed by numbers",
        lambda width: {
            "table": nn.Embedding(VOCAB, width),
            "values": nn.Embedding(VOCAB, width),
            "gate": nn.Linear(4, 1, **LOSE),
            "keep": nn.Parameter(torch.ones(2)),
            "again": nn.Parameter(torch.zeros(2)),
            "mix": nn.ModuleList(nn.Linear(width, width, **LOSE) for _ in (0, 1)),
            "out": nn.ModuleList(nn.Linear(width, width, **LOSE) for _ in (0, 1)),
            "head": nn.Linear(width, VOCAB),
        },
        bare,
        table__weight="embedding",
        values__weight="embedding | embedding first_sum",
        gate__weight="norm,bias,embedding",
        keep="norm,bias",
        again="norm,bias",
        **{f"{name}__{layer}__weight": "hidden[1]" for name in ("mix", "out") for layer in (0, 1)},
        **HEAD,
    )


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (policies, images_made, graphs, sequences):
        yield from group()
