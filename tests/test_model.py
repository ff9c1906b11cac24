"""The model against a plain numpy forward pass of its own, and against what must hold of any causal transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from supar_cli.models.transformer import Transformer, alibi_bias, named_tensors, rope_tables, rotate
from supar_cli.planning import layout
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import Values
from supar_cli.sparse.masks import Mask
from supar_cli.streams import stream
from supar_cli.training import prepare

MakePlan = Callable[..., Plan]
Array = NDArray[np.float64]

T, SHAPE = 11, {"width": 24, "layers": 2, "heads": 4, "context": 12, "vocab": 29, "ffn_width": 40}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "gpt2 with biases, untied": {"family": "gpt2", "bias": True, "tied": False},
    "llama": {"family": "llama", "kv_heads": 2},
    "llama of one kv head, untied, other base": {"family": "llama", "kv_heads": 1, "tied": False, "rope_theta": 500.0},
    "alibi": {"family": "llama", "positions": "alibi"},
    "gpt2 as Hugging Face has it": {"family": "gpt2", "activation": "gelu_tanh", "bias": True},
    "heads wider than width / heads": {"family": "llama", "kv_heads": 2, "head_width": 10, "bias": True},
    "heads that don't divide the width": {"family": "gpt2", "heads": 5, "head_width": 3},
    "alibi of 6 heads": {"family": "gpt2", "positions": "alibi", "heads": 6, "bias": True},
}


@pytest.fixture(params=MODELS)
def plan(request: Any, plan_of: MakePlan) -> Plan:
    """A plan of each kind of model whose every multiplier differs from 1 and whose target is deeper than the proxy."""
    model = {**SHAPE, **MODELS[request.param]}
    target = {"width": None, "layers": 4, "sparsity": {"density": 0.5}}
    return plan_of(model=model, target=target, parameterization={"depth_rule": "completep"})


def filled(plan: Plan, dtype: torch.dtype = torch.float64) -> tuple[Transformer, dict[str, Array]]:
    """A model with random values everywhere, gains and biases too, and the values by plan name."""
    model = Transformer(plan.model)
    draws = np.random.default_rng(0)
    values = {name: draws.normal(0.5, 0.4, tuple(tensor.shape)) for name, tensor in named_tensors(model).items()}
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(torch.from_numpy(values[name]))
    model.to(dtype)
    exact = {name: tensor.detach().double().numpy() for name, tensor in named_tensors(model).items()}
    return model, exact


def tokens(plan: Plan, rows: int = 3) -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, plan.model.vocab, (rows, T))


def reference(plan: Plan, weights: dict[str, Array], index_BT: NDArray[np.int64]) -> Array:
    """Logits (B, T, V) in float64, one sequence, head and position at a time, from the published definitions."""
    config, factors = plan.model, plan.model.multipliers
    d_head = config.head_width

    def norm(name: str, x: Array) -> Array:
        if config.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weights[name]
        return scaled + weights.get(f"{name}.bias", 0.0)

    def linear(name: str, x: Array) -> Array:
        return x @ weights[name].T + weights.get(f"{name}.bias", 0.0)

    def turned(x: Array, t: int) -> Array:
        """Pairs (i, i + d/2) turned by t·theta^(-2i/d), as complex numbers."""
        half = d_head // 2
        angle = t * config.rope_theta ** (-2 * np.arange(half) / d_head)
        pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    def slope(head: int) -> float:
        """Press et al. 2022: 2^(-8/n) and its powers; for other counts every second one of the next power of two."""
        power = 2 ** int(math.log2(config.heads))
        if head < power:
            return float(2 ** (-8 * (head + 1) / power))
        return float(2 ** (-8 * (2 * (head - power) + 1) / (2 * power)))

    def attention(block: str, x_TD: Array) -> Array:
        q, k, v = (linear(f"{block}.attn.{part}", x_TD) for part in "qkv")
        mixed = np.zeros((T, config.heads * d_head))
        for head in range(config.heads):
            kv_head = head * config.kv_heads // config.heads
            own, shared = slice(head * d_head, (head + 1) * d_head), slice(kv_head * d_head, (kv_head + 1) * d_head)
            for t in range(T):
                scores = np.empty(t + 1)
                for s in range(t + 1):
                    a, b = q[t, own], k[s, shared]
                    if config.positions == "rope":
                        a, b = turned(a, t), turned(b, s)
                    scores[s] = a @ b * factors.attention
                    if config.positions == "alibi":
                        scores[s] -= slope(head) * (t - s)
                shares = np.exp(scores - scores.max())
                mixed[t, own] = shares / shares.sum() @ v[: t + 1, shared]
        return linear(f"{block}.attn.o", mixed)

    def feed_forward(block: str, x: Array) -> Array:
        up = linear(f"{block}.mlp.up", x)
        if config.activation == "swiglu":
            gate = linear(f"{block}.mlp.gate", x)
            return linear(f"{block}.mlp.down", gate / (1 + np.exp(-gate)) * up)
        if config.activation == "gelu_tanh":  # Hendrycks and Gimpel 2016, arXiv 1606.08415, eq. 2
            share = (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))) / 2
        else:
            share = (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2
        return linear(f"{block}.mlp.down", up * share)

    logits = []
    for index_T in index_BT:
        x = weights["embedding"][index_T]
        if config.positions == "learned":
            x = x + weights["positions"][:T]
        x = x * factors.input
        for i in range(config.layers):
            x = x + factors.residual * attention(f"blocks.{i}", norm(f"blocks.{i}.attn_norm", x))
            x = x + factors.residual * feed_forward(f"blocks.{i}", norm(f"blocks.{i}.mlp_norm", x))
        head = weights["embedding" if config.tied else "unembedding"]
        logits.append(norm("final_norm", x) @ head.T * factors.output)
    return np.stack(logits)


def worst(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_the_forward_pass_is_numpys(plan: Plan) -> None:
    model, weights = filled(plan)
    index_BT = tokens(plan)
    found = model(torch.from_numpy(index_BT)).detach().numpy()
    wanted = reference(plan, weights, index_BT)
    assert worst(found, wanted) < 1e-6  # rope's and ALiBi's tables are float32: 6e-8 relative, at angles up to 11
    low, low_weights = filled(plan, torch.float32)
    assert (
        worst(low(torch.from_numpy(index_BT)).detach().double().numpy(), reference(plan, low_weights, index_BT)) < 1e-5
    )


def test_the_comparison_tells_the_two_gelus_apart(plan_of: MakePlan) -> None:
    exact, tanh = (
        plan_of(model={**SHAPE, "activation": kind}, target={"width": None}) for kind in ("gelu", "gelu_tanh")
    )
    model, weights = filled(exact)
    index_BT = tokens(exact, 1)
    assert worst(model(torch.from_numpy(index_BT)).detach().numpy(), reference(tanh, weights, index_BT)) > 1e-4


@pytest.mark.parametrize("factor", ["input", "output", "attention", "residual"])
def test_the_comparison_sees_each_multiplier(plan_of: MakePlan, factor: str) -> None:
    plan = plan_of(model=SHAPE, target={"width": None, "layers": 4}, parameterization={"depth_rule": "completep"})
    own = plan.model.multipliers
    assert all(getattr(own, name) != 1 for name in ("input", "output", "attention", "residual"))
    changed = own.model_copy(update={factor: getattr(own, factor) * 1.01})
    other = plan.model_copy(update={"model": plan.model.model_copy(update={"multipliers": changed})})
    model, weights = filled(plan)
    index_BT = tokens(plan, 1)
    assert worst(model(torch.from_numpy(index_BT)).detach().numpy(), reference(other, weights, index_BT)) > 1e-4


def test_no_position_sees_what_comes_after_it(plan: Plan) -> None:
    """The gradient of position t's logits by the embedded inputs is exactly zero beyond t, and not before."""
    model, _ = filled(plan)
    x_BTD: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda _, __, out: x_BTD.append(out) or out.retain_grad())
    logits_BTV = model(torch.from_numpy(tokens(plan, 1)))
    for t in (0, 4, T - 1):
        x_BTD[0].grad = None
        logits_BTV[0, t].square().sum().backward(retain_graph=True)
        gradient = x_BTD[0].grad
        assert gradient is not None
        size_T = gradient[0].abs().sum(-1)
        assert (size_T[t + 1 :] == 0).all() and (size_T[: t + 1] > 0).all()


def test_sequences_of_a_batch_and_lengths_do_not_mix(plan: Plan) -> None:
    model, _ = filled(plan)
    index_BT = torch.from_numpy(tokens(plan))
    together, alone, shorter = model(index_BT), model(index_BT[1:2]), model(index_BT[:, :5])
    assert torch.allclose(together[1:2], alone, rtol=1e-10) and torch.allclose(together[:, :5], shorter, rtol=1e-10)


def test_shared_key_heads_are_repeated_ones(plan_of: MakePlan) -> None:
    """Grouped queries equal full attention whose key and value weights are written out once for each query head."""
    shape = {**SHAPE, "family": "llama"}
    shared = plan_of(model={**shape, "kv_heads": 2}, target={"width": None})
    full = plan_of(model={**shape, "kv_heads": 4}, target={"width": None})
    grouped, weights = filled(shared)
    written_out, _ = filled(full)
    with torch.no_grad():
        for name, tensor in named_tensors(written_out).items():
            value = torch.from_numpy(weights[name])
            if name.endswith((".k", ".v")):
                value = value.view(2, 6, 24).repeat_interleave(2, dim=0).reshape(24, 24)
            tensor.copy_(value)
    index_BT = torch.from_numpy(tokens(shared))
    assert torch.allclose(grouped(index_BT), written_out(index_BT), rtol=1e-10)


def test_rotated_products_depend_on_distance_only() -> None:
    cos_TE, sin_TE = rope_tables(64, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 64, 8)
    product_TT = (rotate(q, cos_TE, sin_TE) @ rotate(k, cos_TE, sin_TE).transpose(-1, -2))[0, 0]
    for distance in (0, 1, 17):
        band = product_TT.diagonal(-distance)
        assert torch.allclose(band, band[:1].expand_as(band), atol=1e-5)
    assert not torch.allclose(product_TT.diagonal(-1)[0], product_TT.diagonal(-17)[0], atol=1e-2)


def test_alibi_by_hand() -> None:
    """Two heads: slopes 2^-4 and 2^-8."""
    inf = -math.inf
    wanted = [[0, inf, inf], [-1, 0, inf], [-2, -1, 0]]
    assert alibi_bias(3, 2).tolist() == [
        [[x / 16 for x in row] for row in wanted],
        [[x / 256 for x in row] for row in wanted],
    ]


class Casts(TorchDispatchMode):
    """Counts the bytes of copies of a bias (H, T, T) in another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and made.ndim == 3 and made.shape[-1] == made.shape[-2]:
            self.copies.append(made.nbytes)
        return made


@pytest.mark.parametrize("in_each_block", [False, True], ids=["", "control"])
def test_alibis_bias_is_rounded_once(plan_of: MakePlan, monkeypatch: pytest.MonkeyPatch, in_each_block: bool) -> None:
    plan = plan_of(model={"positions": "alibi", "layers": 3}, target={"width": None})
    model, index_BT = prepare.prepare(plan, torch.device("cpu")).model, torch.zeros(1, 16, dtype=torch.long)
    assert isinstance(model, Transformer)
    if in_each_block:  # as it was
        monkeypatch.setattr(Transformer, "bias_in", lambda self, _: alibi_bias(16, 2))
    with Casts() as found, torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            model(index_BT)
    assert found.copies == [2 * 2 * 16**2] * (6 if in_each_block else 1)
    if not in_each_block:
        assert torch.equal(model.bias_HTT, alibi_bias(16, 2).bfloat16())
        model(index_BT)
        assert torch.equal(model.bias_HTT, alibi_bias(16, 2))  # float32 has lost nothing to bfloat16


@pytest.mark.parametrize("name", ["supar", "mup", "sp"])
def test_the_plan_sets_the_attention_multiplier(plan_of: MakePlan, name: str) -> None:
    plan = plan_of(name, model=SHAPE, target={"width": None})
    assert plan.model.multipliers.attention == pytest.approx(6**-0.5 if name == "sp" else 1 / 6)
    assert Transformer(plan.model).blocks[0].attn.scale == plan.model.multipliers.attention


def test_names_shapes_and_counts_are_the_layouts(plan: Plan) -> None:
    built = {name: tuple(tensor.shape) for name, tensor in named_tensors(Transformer(plan.model)).items()}
    assert built == {tensor.name: tensor.shape for tensor in layout.tensors(plan.model)}
    assert plan.parameters == sum(math.prod(shape) for shape in built.values())


def test_initial_values_are_normal_of_the_planned_deviation(plan_of: MakePlan) -> None:
    """Per tensor n live values: the deviation has the relative standard error 1/√(2n), 6 of them allowed; fourth moment 3 ± 6·√(96/n)."""
    plan = plan_of(model={**SHAPE, "width": 48, "vocab": 256, "ffn_width": 96, "bias": True}, target={"width": 192})
    prepared = prepare.prepare(plan, torch.device("cpu"))
    for row in plan.tensors:
        value = prepared.tensors[row.name].detach().double().numpy()
        if row.role in ("norm", "bias"):
            assert (value == (1 if row.role == "norm" else 0)).all()
            continue
        live = value.ravel()
        assert live.size == row.kept == np.count_nonzero(value)
        assert abs(live.std() / row.init_std - 1) < 6 / math.sqrt(2 * live.size), row.name
        assert abs(live.mean() / row.init_std) < 6 / math.sqrt(live.size)
        assert abs(np.mean((live / row.init_std) ** 4) - 3) < 6 * math.sqrt(96 / live.size)


@pytest.mark.parametrize("shape", [(300, 70), (5, 4, 3, 3), (2, 100_000), (100_000, 3), (1, 7)])
def test_first_values_are_one_stream_by_position_or_by_live_weight(plan_of: MakePlan, shape: tuple[int, ...]) -> None:
    """By position, a live weight's does not depend on the mask; however many are drawn at once. Live weights alone: in order."""
    alive = np.random.default_rng(0).random(shape) < 0.3
    update = {"name": "w", "shape": list(shape), "init_std": 0.3, "kept": int(alive.sum())}
    made = plan_of(target={"seed": 5})
    plan = made.model_copy(update={"values": Values(draw="positions")})
    row = made.tensors[3].model_copy(update=update)
    whole = np.random.Generator(stream(5, "init:w")).standard_normal(alive.size, np.float32) * np.float32(0.3)
    for one in (made, plan):  # where all weights live the two draws are the same
        assert np.array_equal(prepare.initial_values(one, row, None).numpy(), whole.reshape(shape))
        assert np.array_equal(prepare.initial_values(one, row, Mask.of(np.ones(shape, bool))).numpy(), whole)
    assert np.array_equal(prepare.initial_values(plan, row, Mask.of(alive)).numpy(), whole.reshape(shape)[alive])
    assert np.array_equal(prepare.initial_values(made, row, Mask.of(alive)).numpy(), whole[: alive.sum()])


@pytest.mark.parametrize("what", ["std", "count"])
def test_the_check_at_start_sees_a_wrong_tensor(plan_of: MakePlan, what: str) -> None:
    plan = plan_of(target={"width": 128, "sparsity": {"density": 0.25}})
    prepared = prepare.prepare(plan, torch.device("cpu"))
    row = next(row for row in plan.tensors if row.name == "blocks.1.mlp.down")
    tensor, mask = prepared.tensors[row.name], prepared.masks[row.name]
    prepare.check_init(row, tensor, "exact", mask)
    if what == "std":
        tensor = tensor.detach() * 1.1
    else:
        alive = mask.alive()
        alive.flat[int(np.argmax(alive))] = False
        mask = Mask.of(alive)
    with pytest.raises(Exception, match=r"blocks\.1\.mlp\.down: (measured init std|16383 weights are alive)"):
        prepare.check_init(row, tensor, "exact", mask)
