"""A head width of its own: heads × head_width need not be the width, and every number follows from the tensors' own extents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from supar_cli.errors import InputError
from supar_cli.experiments.check_plans import _proxy_of, sweeps_of
from supar_cli.planning import advice, document, estimate
from supar_cli.planning.explain import explain
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Model, Sparsity, Target
from supar_cli.planning.transfer import target_model, transfer
from supar_cli.training.trainer import Trainer
from tests import oracle
from tests.conftest import plan_from, proxy_fields
from tests.test_check import changed, judge_plan
from tests.test_plan import GPT2, LLAMA, TRAIN, TUNED, hidden, plan, proxy, row

# as Qwen3-0.6B, an eighth as wide: 16 heads of 128 over a width of 1024
QWEN = {**LLAMA, "width": 128, "heads": 2, "kv_heads": 1, "head_width": 128, "ffn_width": 384}


def shape_of(model: dict[str, Any], **changes: Any) -> tuple[int, int, int, int]:
    """Width, heads, key/value heads and head width of a target."""
    found = target_model(Model.model_validate(model), Target(**changes))
    return found.width, found.heads, found.kv_heads, found.head_width


class TestShapes:
    def test_of_the_projections(self) -> None:
        made = plan(model={**QWEN, "bias": True}, target={"width": 512, "sparsity": {"density": 0.5}})
        shapes = {name: row(made, f"blocks.0.attn.{name}").shape for name in ("q", "k", "v", "o", "q.bias", "o.bias")}
        wide, narrow = 8 * 128, 4 * 128
        assert shapes == {
            "q": [wide, 512],
            "k": [narrow, 512],
            "v": [narrow, 512],
            "o": [512, wide],
            "q.bias": [wide],
            "o.bias": [512],
        }
        o = row(made, "blocks.0.attn.o")
        assert (o.fan_in, o.base_fan_in, o.because["m_d"]) == (wide, 256, 4.0)
        assert made.model.multipliers.attention == 1 / 128
        sp = plan("sp", model=QWEN, target={"width": 512, "sparsity": {"density": 0.5}})
        assert sp.model.multipliers.attention == pytest.approx(128**-0.5)

    def test_head_width_and_heads_per_width_are_kept(self) -> None:
        assert shape_of(QWEN, width=512) == (512, 8, 4, 128)
        assert shape_of(QWEN, width=512, heads=6, kv_heads=2) == (512, 6, 2, 128)
        assert shape_of(QWEN, width=512, head_width=64) == (512, 16, 8, 64)  # as many numbers in all heads
        assert shape_of(GPT2, width=256) == (256, 8, 8, 32)
        assert shape_of(GPT2, width=256, heads=4) == (256, 4, 4, 64)  # the usual head width is width / heads
        assert shape_of(GPT2, width=256, head_width=64) == (256, 4, 4, 64)
        assert shape_of(GPT2, width=256, heads=4, head_width=48) == (256, 4, 4, 48)

    @pytest.mark.parametrize(
        ("model", "changes", "step"),
        [(QWEN, {"width": 96}, 64), (QWEN, {"width": 96, "head_width": 512}, 256), (GPT2, {"width": 100}, 32)],
    )
    def test_a_width_without_whole_heads_names_one_that_has_them(
        self, model: dict[str, Any], changes: dict[str, int], step: int
    ) -> None:
        with pytest.raises(
            InputError, match=rf"is not a multiple of the .* {step}; expected a multiple of it, or other heads"
        ):
            shape_of(model, **changes)
        assert shape_of(model, **{**changes, "width": 3 * step})[0] == 3 * step

    def test_heads_that_divide_no_width_need_it(self) -> None:
        with pytest.raises(
            InputError,
            match=r"model\.heads: 3 heads don't divide the width 128; expected a divisor of it, or head_width",
        ):
            proxy(model={**GPT2, "heads": 3})
        assert proxy(model={**GPT2, "heads": 3, "head_width": 40}).model.attention_width == 120
        with pytest.raises(InputError, match=r"an even head width, not 5"):
            proxy(model={**QWEN, "head_width": 5})
        with pytest.raises(InputError, match=r"model\.head_width: 4 heads of 2147483648 are wider than 2147483648"):
            proxy(model={**GPT2, "head_width": 2**31})
        for wrong in (0, -8, 1.5, "wide"):
            with pytest.raises(InputError, match=r"model\.head_width: should be "):
                proxy(model={**QWEN, "head_width": wrong})


class TestDocuments:
    def test_the_usual_one_is_left_out_and_changes_no_hash(self) -> None:
        written, usual = proxy(model={**GPT2, "head_width": 32}), proxy(model=GPT2)
        assert written == usual and written.hash() == usual.hash() and "head_width" not in usual.model.model_dump()
        assert proxy(model={**GPT2, "head_width": None}) == usual
        assert proxy(model={**GPT2, "head_width": 48}).hash() != usual.hash()

    def test_its_own_survives_its_document(self) -> None:
        made = plan(model=QWEN, target={"width": 256, "sparsity": {"density": 0.25}})
        text = document.write([made.model_dump()])
        assert "head_width: 128" in text and "attention_width: 256" in text
        (read,) = document.read(text, "plan.yaml")
        assert parse(Plan, read) == made and parse(Plan, read).hash() == made.hash()
        read.data["parameterization"]["base"].pop("attention_width")
        with pytest.raises(InputError, match=r"base_fan_in: 256; the model's shape gives 128 to blocks\.0\.attn\.o"):
            parse(Plan, read)

    @pytest.mark.parametrize("name", ["supar", "mup", "sp"])
    def test_explanations_find_the_plans_own_numbers(self, name: str) -> None:
        for optimizer in ("adamw", "sgd"):
            train = {**TRAIN, "optimizer": optimizer}
            made = plan(
                name,
                model=QWEN,
                train=train,
                target={"width": 256, "heads": 3, "kv_heads": 3, "sparsity": {"density": 0.5}},
            )
            found = explain(made)
            assert not [number for one in found.rows for number in one.numbers if number.is_edited]
            assert not [number for number in found.factors if number.is_edited] and not any(
                one.remarks for one in found.rows
            )
            assert "attention width 256" in found.text("plan.yaml")

    def test_size_and_flops(self) -> None:
        made = plan(model={**QWEN, "tied": True}, target={"width": 256, "sparsity": {"density": 0.5}})
        block = 2 * 512 * 256 + 2 * 256 * 256 + 3 * 768 * 256  # 4 heads of 128; 2 for keys and values
        assert made.parameters == 256 * 256 + 2 * (block + 2 * 256) + 256
        assert made.flops_per_token == 6 * (2 * block + 256 * 256) + 12 * 2 * 64 * 512
        usual = plan(model={**QWEN, "head_width": 64}, target={"width": 256, "sparsity": {"density": 0.5}})
        assert estimate.numbers_between(usual.decoder) == 2 * (8 * 256 + 3 * 768)
        assert estimate.numbers_between(made.decoder) == 2 * (8 * 256 + 3 * 768) + 2 * 4 * 256

    def test_the_remedys_width_has_whole_heads(self) -> None:
        few = {"width": 128, "sparsity": {"density": 0.05}}
        (message,) = (m for m in advice.warnings(plan(model=QWEN, target=few)) if "weights per neuron" in m)
        width = int(message.rpartition("a width of ")[2].split()[0])
        better = plan(model=QWEN, target={**few, "width": width})
        assert width % 64 == 0 and min(tensor.wpn for tensor in hidden(better)) >= 16


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(["supar", "mup", "sp"]),
    st.sampled_from(["adamw", "sgd"]),
    st.tuples(st.sampled_from([64, 96]), st.integers(1, 5), st.sampled_from([8, 24, 80])),
    st.tuples(st.sampled_from([1, 2, 3]), st.integers(1, 6), st.sampled_from([None, 16, 40])),
    st.booleans(),
)
def test_every_number_is_the_tables_at_the_extents(
    name: Any, optimizer: Any, small: tuple[int, int, int], large: tuple[int, int, int | None], bias: bool
) -> None:
    """Ratios worked out here from heads and widths; the exponents are the oracle's, which knows no supar."""
    (width, heads, head_width), (times, target_heads, target_head_width) = small, large
    model = {**GPT2, "width": width, "heads": heads, "head_width": head_width, "ffn_width": 4 * width, "bias": bias}
    target = {"width": width * times, "heads": target_heads, "head_width": target_head_width}
    is_usual = target_head_width is None and heads * head_width == width
    assume(not is_usual)
    made = plan(
        name,
        True,
        model=model,
        train={**TRAIN, "optimizer": optimizer},
        target={**target, "sparsity": {"density": 0.5}},
    )
    own = target_heads * (target_head_width or head_width)
    fans = {"q": ("w", "a"), "k": ("w", "a"), "v": ("w", "a"), "o": ("a", "w"), "up": ("w", "w"), "down": ("w", "w")}
    ratio = {"w": times, "a": own / (heads * head_width)}
    options = {
        "weight_decay_rule": "independent",
        "depth_rule": "none",
        "residual_init": "none",
        "unembedding_init": "normal",
    }
    tuned = {"sigma": TUNED["init_std"], "eta": TUNED["lr"], "lam": TUNED["weight_decay"], "eps": TUNED["eps"]}
    for tensor in made.tensors:
        letter = tensor.site.partition(".")[2].partition(".")[0]
        into, out = (ratio[one] for one in fans.get(letter, ("w", "w")))
        wanted = oracle.numbers(
            name=name, optimizer=optimizer, **options, density_exponent=1.0, edition=2, role=tensor.role,
            m_d=into if tensor.role == "hidden" else out, m_fan_out=out if tensor.role == "hidden" else None, m_out=times,
            m_rho=tensor.density, m_L=1.0, layers=2, in_block=tensor.block is not None, writes_residual=letter in ("o", "down"),
            after_head=False, m_rho_start=None, first_sum=False, ratio=1.0, head=False, head_ratio=1.0, **tuned,
        )  # fmt: skip
        for key, value in wanted.items():
            if key != "init_std" or tensor.init_std is not None:
                assert getattr(tensor, key) == pytest.approx(value, rel=1e-12), (tensor.name, key)
    assert made.model.multipliers.attention == pytest.approx((own / target_heads) ** (-0.5 if name == "sp" else -1))


class TestTraining:
    SHAPE = {**QWEN, "width": 64, "head_width": 64, "ffn_width": 192, "layers": 1, "context": 32}  # noqa: RUF012

    @pytest.fixture
    def made(self) -> Plan:
        torch.set_num_threads(1)
        tuned = {"lr": 2**-8, "init_std": 0.08, "alpha_input": 8.0, "alpha_output": 1.0, "weight_decay": 0.0}
        fields = proxy_fields("stdlib", model=self.SHAPE, hyperparameters=tuned)
        return plan_from({**fields, "target": {"width": 256, "sparsity": {"density": 0.25}}})

    def test_the_loss_falls(self, made: Plan) -> None:
        history = Trainer(made).run()
        assert history.losses[-1] < history.losses[0]

    def test_the_coordinate_check_passes_and_its_control_fails(self, made: Plan) -> None:
        found = judge_plan(made)
        assert {name for name, one in found.items() if one.passed} == {"the plan over density", "the plan over scale"}
        assert "sp over density" in found

    def test_the_check_sees_a_rate_by_the_wrong_width(self, made: Plan) -> None:
        """The output projection's fan-in is all heads': by the width's ratio alone the rate is off where the heads' differs."""
        shape = {"width": 128, "heads": 16, "kv_heads": 8}  # 8 times the proxy's heads at twice its width
        other = transfer(_proxy_of(made, {}, None), Target(**shape, sparsity=Sparsity(density=0.25)))
        o = row(other, "blocks.0.attn.o")
        assert o.because["m_d"] == 8.0
        finding = judge_plan(changed(other, o.name, lr=o.lr * 4))["the plan over density"].violations[0]
        assert (finding.quantity, finding.tensor) == ("update", o.name)

    def test_the_check_knows_the_plans_proxy(self, made: Plan) -> None:
        sizes = {
            one.model.attention_width for sweep in sweeps_of(made, seeds=1) for plans in sweep.plans for one in plans
        }
        assert sizes == {512, 128}
