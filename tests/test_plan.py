"""Plans: golden files byte for byte, numbers worked out by hand, and what a plan's hash does and does not see.

`python -m tests.test_plan` writes the golden files anew; nothing else does.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, PlanTensor, with_steps
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy
from supar_cli.planning.transfer import as_trial, transfer

GOLDEN = Path(__file__).parent / "golden"

TUNED = {"lr": 0.015625, "init_std": 0.08, "alpha_input": 9.0, "alpha_output": 1.1, "weight_decay": 0.1, "eps": 1e-8}
GPT2 = {"family": "gpt2", "width": 128, "layers": 2, "heads": 4, "context": 64, "vocab": 256}
LLAMA = {**GPT2, "family": "llama", "heads": 4, "kv_heads": 2, "ffn_width": 352, "tied": False}
VIT = {"family": "vit", "width": 64, "layers": 1, "heads": 2, "image": [8, 4], "channels": 3, "patch": 4, "classes": 5}
TRAIN = {"steps": 400, "batch_size": 16}
SGD = {**TRAIN, "optimizer": "sgd"}


def proxy(**sections: Any) -> Proxy:
    fields = {"kind": "supar.proxy/v1", "model": GPT2, "hyperparameters": TUNED, "train": TRAIN, **sections}
    return parse(Proxy, document.Document(fields, "proxy.yaml"))


def plan(name: Any = "supar", allow_low_wpn: bool = False, **sections: Any) -> Plan:
    """The plan of a proxy for its own `target`."""
    made = proxy(**sections)
    return transfer(made, made.target, name, allow_low_wpn=allow_low_wpn)


def row(plan: Plan, name: str) -> PlanTensor:
    return next(tensor for tensor in plan.tensors if tensor.name == name)


def hidden(plan: Plan) -> list[PlanTensor]:
    return [tensor for tensor in plan.tensors if tensor.role == "hidden"]


CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-supar-uniform": ("supar", {"target": {"width": 2048, "sparsity": {"sparsity": 0.992}}}),
    "llama-gqa-erk-overrides": (
        "supar",
        {
            "model": LLAMA,
            "parameterization": {"weight_decay_rule": "sqrt", "unembedding_init": "zero"},
            "target": {
                "width": 512,
                "layers": 3,
                "tokens": 5_000_000,
                "sparsity": {
                    "sparsity": 0.9,
                    "distribution": "erk",
                    "overrides": {"attn.q": 0.5, "blocks.1.mlp.up": 0.25},
                },
            },
        },
    ),
    "gpt2-mup-residual-init": (
        "mup",
        {
            "model": {**GPT2, "bias": True},
            "parameterization": {"weight_decay_rule": "coupled", "residual_init": "gpt2"},
            "target": {"width": 512, "sparsity": {"sparsity": 0.75, "pattern": "bernoulli"}},
        },
    ),
    "gpt2-sp-sgd": ("sp", {"train": SGD, "target": {"width": 512, "sparsity": {"density": 0.5}}}),
    "gpt2-supar-sgd": ("supar", {"train": SGD, "target": {"width": 512, "sparsity": {"density": 0.5}}}),
    "llama-completep-tokens-per-parameter": (
        "supar",
        {
            "model": {**LLAMA, "kv_heads": 4},
            "parameterization": {"depth_rule": "completep"},
            "target": {
                "width": 256,
                "layers": 8,
                "tokens_per_parameter": 20.0,
                "batch_size": 32,
                "seed": 7,
                "sparsity": {"density": 0.125},
            },
        },
    ),
    "llama-head-width-wsd": (
        "supar",
        {
            "model": {**LLAMA, "heads": 6, "head_width": 48, "activation": "gelu_tanh"},
            "train": {**TRAIN, "schedule": "wsd", "final_lr_fraction": 0.0},
            "target": {"width": 512, "context": 32, "sparsity": {"density": 0.25}},
        },
    ),
    "vit-supar": ("supar", {"model": VIT, "target": {"width": 256, "sparsity": {"density": 0.0625}}}),
    "vit-supar-sgd": (
        "supar",
        {"model": {**VIT, "pooling": "mean"}, "train": SGD, "target": {"width": 256, "sparsity": {"density": 0.0625}}},
    ),
    "gpt2-fixed-fan-in": (
        "supar",
        {"target": {"width": 640, "sparsity": {"sparsity": 0.97, "pattern": "fixed_fan_in"}}},
    ),
}


def golden_text(name: str) -> str:
    parameterization, sections = CONFIGURATIONS[name]
    return document.write([plan(parameterization, **sections).model_dump()])


class TestGolden:
    @pytest.mark.parametrize("name", CONFIGURATIONS)
    def test_is_met_byte_for_byte(self, name: str) -> None:
        assert golden_text(name).encode() == (GOLDEN / f"{name}.yaml").read_bytes()

    @pytest.mark.parametrize("name", CONFIGURATIONS)
    def test_reads_back_as_the_plan(self, name: str) -> None:
        parameterization, sections = CONFIGURATIONS[name]
        (read,) = document.read_file(str(GOLDEN / f"{name}.yaml"))
        assert parse(Plan, read) == plan(parameterization, **sections)

    def test_files_are_those_of_the_configurations(self) -> None:
        assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CONFIGURATIONS)

    def test_the_comparison_sees_one_changed_digit(self) -> None:
        target = {"sparsity": {"density": 0.5}}
        one, other = (
            plan(hyperparameters={**TUNED, "lr": lr}, target=target) for lr in (0.015625, 0.015625000000000003)
        )
        assert document.write([one.model_dump()]) != document.write([other.model_dump()])


class TestByHand:
    """Width 128 → 2048 at sparsity .992: m_d = 16, m_rho = .008, m_d·m_rho = .128."""

    made = plan(target={"width": 2048, "sparsity": {"sparsity": 0.992}})

    def test_density_is_the_decimal_one(self) -> None:
        assert self.made.sparsity.density == 0.008 != 1 - 0.992
        assert {tensor.density for tensor in hidden(self.made)} == {0.008}

    def test_kept_counts(self) -> None:
        assert row(self.made, "blocks.0.attn.q").kept == 33554  # 2048² · .008 = 33554.432
        assert row(self.made, "blocks.1.mlp.up").kept == 134218  # 8192 · 2048 · .008 = 134217.728
        assert row(self.made, "blocks.1.mlp.down").shape == [2048, 8192]

    def test_numbers_of_a_hidden_weight(self) -> None:
        weight = row(self.made, "blocks.0.mlp.down")
        assert weight.because == {"m_d": 16.0, "m_rho": 0.008}
        assert weight.init_std == pytest.approx(sqrt(0.05), rel=1e-15)  # .08² / .128 = .05
        assert weight.lr == 0.1220703125  # .015625 / .128
        assert weight.weight_decay == pytest.approx(0.0128, rel=1e-15)
        assert weight.eps == 6.25e-10

    def test_numbers_elsewhere(self) -> None:
        embedding, gain = row(self.made, "embedding"), row(self.made, "final_norm")
        assert (embedding.init_std, embedding.lr, embedding.weight_decay, embedding.eps) == (
            0.08,
            0.015625,
            0.1,
            6.25e-10,
        )
        assert (gain.lr, gain.weight_decay, gain.density, gain.kept) == (0.015625, 0.0, 1.0, 2048)
        factors = self.made.model.multipliers
        assert (factors.input, factors.output, factors.attention, factors.residual) == (9.0, 1.1 / 16, 1 / 32, 1.0)

    def test_shape_and_length(self) -> None:
        model, train = self.made.model, self.made.train
        assert (model.heads, model.kv_heads, model.ffn_width, model.layers) == (64, 64, 8192, 2)
        assert (train.steps, train.warmup_steps, train.tokens) == (400, 40, 400 * 16 * 64)

    def test_mup_corrects_for_width_only_and_sp_for_nothing(self) -> None:
        target = {"width": 512, "sparsity": {"density": 0.25}}
        mup, sp = (row(plan(name, target=target), "blocks.0.mlp.up") for name in ("mup", "sp"))
        assert (mup.init_std, mup.lr) == (0.04, 0.00390625)  # .08/√4, .015625/4
        assert mup.weight_decay == 0.4
        assert (sp.init_std, sp.lr, sp.weight_decay, sp.eps) == (0.08, 0.015625, 0.1, 1e-8)
        assert plan("sp", target=target).model.multipliers.attention == 1 / sqrt(32)

    def test_sgd(self) -> None:
        sections = {"train": {**TRAIN, "optimizer": "sgd"}, "target": {"width": 512, "sparsity": {"density": 0.25}}}
        made = plan("supar", **sections)
        assert row(made, "blocks.0.mlp.up").lr == 0.0625  # η / m_rho, without m_d
        assert row(made, "embedding").lr == 0.0625  # η · m_d
        assert row(made, "blocks.0.mlp.up").weight_decay == 0.025 and row(made, "embedding").weight_decay == 0.025

    def test_every_hidden_tensor_uses_its_own_fan_in(self) -> None:
        target = {"width": 256, "ffn_width": 2048, "sparsity": {"density": 0.5}}  # FFN ratio 4 → 8
        made = plan(target=target)
        assert {t.name.rpartition(".")[2]: t.because["m_d"] for t in hidden(made)} == {
            "q": 2.0,
            "k": 2.0,
            "v": 2.0,
            "o": 2.0,
            "up": 2.0,
            "down": 4.0,
        }
        assert row(made, "blocks.0.mlp.down").lr == 0.0078125  # .015625 / (4 · .5)

    CHANGED_FFN = {"width": 256, "ffn_width": 2048, "sparsity": {"density": 0.5}}  # noqa: RUF012

    def test_epsilon_follows_the_models_width_at_a_changed_ffn_ratio_too(self) -> None:
        made = plan(model={**GPT2, "bias": True}, target=self.CHANGED_FFN)
        assert {tensor.eps for tensor in made.tensors} == {5e-9}  # 1e-8 / 2
        assert row(made, "blocks.0.mlp.down").because == {"m_d": 4.0, "m_out": 2.0, "m_rho": 0.5}
        assert row(made, "blocks.0.mlp.up").because == {"m_d": 2.0, "m_rho": 0.5}

    def test_sgd_at_a_changed_ffn_ratio(self) -> None:
        sections = {"model": {**GPT2, "bias": True}, "train": {**TRAIN, "optimizer": "sgd"}}
        made = plan(**sections, target=self.CHANGED_FFN)
        # η · m_fan_out/(m_d · m_rho): up 4/(2·½), down 2/(4·½), q 2/(2·½); vectors η · their own extent's ratio
        factors = {"mlp.up": 4.0, "mlp.down": 1.0, "attn.q": 2.0, "mlp.up.bias": 4.0, "mlp.down.bias": 2.0}
        for site, factor in factors.items():
            found = row(made, f"blocks.1.{site}")
            assert found.lr == 0.015625 * factor and found.weight_decay in (0.1 / factor, 0.0)
        assert row(made, "blocks.1.mlp.up").because == {"m_d": 2.0, "m_fan_out": 4.0, "m_rho": 0.5}

    def test_sgd_at_another_share_of_keys(self) -> None:
        target = {"width": 128, "kv_heads": 4, "sparsity": {"density": 1.0}}  # of 4 heads, the proxy's 2
        made = plan(model=LLAMA, train={**TRAIN, "optimizer": "sgd"}, target=target)
        assert {site: row(made, f"blocks.0.attn.{site}").lr / 0.015625 for site in "qkvo"} == {
            **dict.fromkeys("qo", 1.0),
            **dict.fromkeys("kv", 2.0),
        }

    def test_a_sparse_proxy_divides_its_own_density_out(self) -> None:
        made = plan(sparsity={"density": 0.5}, target={"width": 128, "sparsity": {"density": 0.125}})
        weight = row(made, "blocks.0.attn.k")
        assert (weight.density, weight.because["m_rho"], weight.lr) == (0.125, 0.25, 0.0625)

    def test_a_trial_is_the_plan_with_multipliers_of_one(self) -> None:
        for density in (1.0, 0.5):
            made = as_trial(proxy(sparsity={"density": density}))
            assert all(set(tensor.because.values()) == {1.0} for tensor in made.tensors)
            assert {t.lr for t in made.tensors} == {0.015625} and made.sparsity.density == density


class TestLength:
    def test_tokens_become_steps_rounded_up(self) -> None:
        target = {"width": 128, "tokens": 1_000_001, "sparsity": {"density": 0.5}}
        assert plan(target=target).train.steps == 977  # 1 000 001 / 1024 = 976.56…
        assert plan(target={**target, "tokens": 1024}).train.steps == 1
        assert plan(target={**target, "tokens": 1025}).train.steps == 2

    def test_tokens_per_live_parameter(self) -> None:
        made = plan(target={"width": 128, "tokens_per_parameter": 2.5, "sparsity": {"density": 0.5}})
        live = 256 * 128 + 64 * 128 + 5 * 128 + 2 * 12 * 128 * 128 // 2
        assert made.live == live == 238_208
        assert made.train.steps == 582  # 2.5 · 238208 / 1024 = 581.56…

    def test_other_steps_keep_the_warm_ups_share(self) -> None:
        made = with_steps(plan(target={"sparsity": {"density": 0.5}}), 50)
        assert (made.train.steps, made.train.warmup_steps, made.train.tokens) == (50, 5, 50 * 1024)

    def test_one_length_only(self) -> None:
        with pytest.raises(InputError, match=r"target\.tokens: steps is given too"):
            proxy(target={"steps": 3, "tokens": 5})


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["supar", "mup", "sp"]),
    st.sampled_from([GPT2, LLAMA]),
    st.sampled_from(["exact", "fixed_fan_in", "bernoulli"]),
    st.sampled_from(["uniform", "erk"]),
    st.integers(20, 999),
    st.integers(1, 12),
    st.integers(1, 4),
    st.floats(1e-6, 10.0),
    st.floats(1e-4, 1.0),
)
def test_a_plan_survives_its_document(
    name: str, model: Any, pattern: str, spread: str, mille: int, heads: int, layers: int, lr: float, std: float
) -> None:
    level = {"density": mille / 1000, "pattern": pattern, "distribution": spread}
    made = plan(
        name,
        allow_low_wpn=True,
        model={**model, "ffn_width": 384},
        hyperparameters={**TUNED, "lr": lr, "init_std": std},
        target={"width": 32 * heads, "layers": layers, "sparsity": level},
    )
    (read,) = document.read(document.write([made.model_dump()]), "plan.yaml")
    assert parse(Plan, read) == made
    assert parse(Plan, read).hash() == made.hash()


class TestHash:
    CHANGES: dict[str, Any] = {  # noqa: RUF012
        "parents": {"proxy": "sha256:0"},
        "meta": {"note": "x"},
    }

    @pytest.mark.parametrize("key", sorted(set(Plan.keys()) - {"kind"}))
    def test_ignores_run_and_meta_only(self, key: str) -> None:
        made = plan(target={"sparsity": {"density": 0.5}})
        section = getattr(made, key)
        nested: dict[str, Any] = {
            "model": {"norm_eps": 2e-5},
            "parameterization": {"residual_init": "gpt2"},
            "hyperparameters": {"alpha_input": 3.0},
            "sparsity": {"pattern": "bernoulli"},
            "data": {"hash": "sha256:0"},
            "train": {"grad_clip": 2.0},
            "run": {"micro_batch_size": 2},
            "values": {"draw": "positions"},
            "task": {"kind": "other"},
        }
        if key == "tensors":
            changed: Any = [*section[:-1], section[-1].model_copy(update={"lr": 1.0})]
        else:
            changed = section.model_copy(update=nested[key]) if key in nested else self.CHANGES[key]
        other = made.model_copy(update={key: changed})
        assert other != made
        assert (other.hash() == made.hash()) is (key in ("run", "meta"))

    def test_a_proxys_identity_is_that_of_what_was_tuned(self) -> None:
        one = proxy(target={"width": 256}).hash()
        assert one == proxy(target={"width": 512}, run={"device": "cpu"}, meta={"note": 1}).hash()
        others = [proxy(hyperparameters={**TUNED, "lr": 1.0}), proxy(train={**TRAIN, "seed": 1}), proxy(model=LLAMA)]
        assert len({one, *(other.hash() for other in others)}) == 4

    def test_the_parent_of_a_plan_is_its_proxy_whatever_the_target(self) -> None:
        for density in (0.5, 0.25):
            made = proxy(target={"sparsity": {"density": density}})
            assert transfer(made, made.target).parents == {"proxy": proxy().hash()}


def write_golden_files() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name in CONFIGURATIONS:
        (GOLDEN / f"{name}.yaml").write_text(golden_text(name), "utf-8")


if __name__ == "__main__":
    write_golden_files()
