"""What a plan warns of and refuses, and how densities are spread: limits worked out by hand and by property."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import supar_cli
from supar_cli.errors import InputError
from supar_cli.planning import density as sparsity
from supar_cli.planning import document, estimate
from supar_cli.planning.advice import warnings
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.transfer import transfer
from supar_cli.training.prepare import draw_masks
from tests.test_plan import GPT2, LLAMA, TRAIN, TUNED, hidden, plan, proxy, row


class TestLowWpn:
    TARGET = {"width": 128, "sparsity": {"sparsity": 0.95}}  # noqa: RUF012

    @pytest.mark.parametrize(("sparsity_", "warned"), [(0.875, False), (0.876, True), (0.0, False)])
    def test_the_warning_begins_below_16(self, sparsity_: float, warned: bool) -> None:
        found = warnings(plan(target={"width": 128, "sparsity": {"sparsity": sparsity_}}))
        assert any("weights per neuron" in message for message in found) is warned

    def test_the_remedys_width_and_sparsity_give_16(self) -> None:
        (message,) = warnings(plan(target=self.TARGET))
        assert "blocks.0.attn.q: 6.4 weights per neuron, fewer than the 16 that the paper trained; " in message
        assert message.endswith("a width of 320 or a sparsity of at most 0.875 gives 16")
        for target in ({**self.TARGET, "width": 320}, {**self.TARGET, "sparsity": {"sparsity": 0.875}}):
            assert min(tensor.wpn for tensor in hidden(plan(target=target))) >= 16
        below = plan(target={**self.TARGET, "width": 320 - 32})  # one head less is too little
        assert min(tensor.wpn for tensor in hidden(below)) < 16

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 40),
        st.floats(1.0, 15.9),
        # without ERK on grouped queries: there the densities shift a little with the width's number of key heads
        st.sampled_from([("uniform", GPT2), ("uniform", LLAMA), ("erk", GPT2)]),
        st.sampled_from(["exact", "fixed_fan_in"]),
    )
    def test_the_remedys_width_always_does(
        self, heads: int, wpn: float, spread: tuple[str, dict[str, Any]], pattern: str
    ) -> None:
        distribution, model = spread
        level = {"density": round(wpn / (32 * heads), 6), "distribution": distribution, "pattern": pattern}
        target = {"width": 32 * heads, "sparsity": level}
        made = plan(allow_low_wpn=True, model=model, target=target)
        if min(tensor.wpn for tensor in hidden(made)) >= 16:
            return
        (message,) = (m for m in warnings(made) if "weights per neuron" in m)
        width = int(message.rpartition("a width of ")[2].split()[0])
        assert width > 32 * heads
        better = plan(model=model, target={**target, "width": width})
        assert min(tensor.wpn for tensor in hidden(better)) >= 16 - 1e-9

    def test_empty_rows_are_named_below_4(self) -> None:
        (message,) = warnings(plan(target={"width": 128, "sparsity": {"density": 0.03}}))
        assert "about 2.1 % of rows have no weight at all" in message  # e^-3.84 = .0215
        (message,) = warnings(plan(target={"width": 128, "sparsity": {"density": 0.03125, "pattern": "fixed_fan_in"}}))
        assert "rows with no weight" not in message  # each row has exactly four

    def test_below_one_is_refused_unless_allowed(self) -> None:
        target = {"width": 128, "sparsity": {"sparsity": 0.993}}
        with pytest.raises(
            InputError, match=r"attn\.q: 0\.896 weights per neuron .* a width of 2304 .*--allow-low-wpn"
        ):
            plan(target=target)
        assert hidden(plan(allow_low_wpn=True, target=target))[0].kept == 115  # 128² · .007 = 114.688


def test_a_micro_batch_that_a_run_would_refuse_is_refused_in_the_plan() -> None:
    run = {"run": {"micro_batch_size": 4}}
    assert plan(**run, target={"batch_size": 12, "sparsity": {"density": 0.5}}).run.micro_batch_size == 4
    with pytest.raises(InputError, match=r"4 does not divide the batch size 6; .* -s run\.micro_batch_size=2"):
        plan(**run, target={"batch_size": 6, "sparsity": {"density": 0.5}})


class TestDistribution:
    @pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
    @pytest.mark.parametrize("percent", [2, 10, 35, 60, 90])
    def test_erk_sums_to_the_target_and_caps_at_1(self, model: dict[str, Any], percent: int) -> None:
        target = {"width": 256, "sparsity": {"density": percent / 100, "distribution": "erk"}}
        rows = hidden(plan(model=model, allow_low_wpn=True, target=target))
        total = sum(tensor.size for tensor in rows)
        assert abs(sum(tensor.kept for tensor in rows) - total * percent / 100) <= len(rows) / 2
        assert max(tensor.density for tensor in rows) <= 1
        open_ = [tensor for tensor in rows if tensor.density < 1]
        shares = [tensor.density * tensor.size / sum(tensor.shape) for tensor in open_]  # ∝ (in + out) by ERK
        assert max(shares) == pytest.approx(min(shares), rel=1e-12)
        assert len({tensor.density for tensor in rows}) > 1

    def test_erk_really_caps_somewhere(self) -> None:
        target = {"width": 256, "sparsity": {"density": 0.9, "distribution": "erk"}}
        assert any(tensor.density == 1 for tensor in hidden(plan(model=LLAMA, target=target)))

    def test_the_most_specific_override_wins(self) -> None:
        overrides = {"hidden": 0.6, "attn": 0.5, "attn.q": 0.4, "blocks.1.attn.q": 0.3}
        made = plan(target={"width": 128, "sparsity": {"density": 0.2, "overrides": overrides}})
        wanted = {"blocks.0.attn.q": 0.4, "blocks.1.attn.q": 0.3, "blocks.1.attn.o": 0.5, "blocks.0.mlp.up": 0.6}
        assert {name: row(made, name).density for name in wanted} == wanted
        assert row(made, "blocks.1.attn.q").because["m_rho"] == 0.3

    def test_the_others_share_the_target(self) -> None:
        made = plan(target={"width": 128, "sparsity": {"density": 0.2, "overrides": {"mlp": 1.0}}})
        assert {(t.name.split(".")[2], t.density) for t in hidden(made)} == {("attn", 0.2), ("mlp", 1.0)}

    def test_an_override_that_names_nothing_is_named(self) -> None:
        with pytest.raises(
            InputError,
            match=r"target\.sparsity\.overrides: attn\.x matches no hidden tensor; expected a site .*mlp\.up",
        ):
            plan(target={"sparsity": {"density": 0.5, "overrides": {"attn.x": 0.5}}})

    def test_fixed_fan_in_keeps_whole_rows_and_its_own_density(self) -> None:
        made = plan(target={"width": 640, "sparsity": {"sparsity": 0.97, "pattern": "fixed_fan_in"}})
        query, down = row(made, "blocks.0.attn.q"), row(made, "blocks.0.mlp.down")
        assert (query.kept, query.density) == (19 * 640, 19 / 640)  # 640 · .03 = 19.2
        assert (down.kept, down.density) == (77 * 640, 77 / 2560)  # 2560 · .03 = 76.8
        assert query.because["m_rho"] == 19 / 640

    def test_blocks_are_whole_and_theirs_is_the_density(self) -> None:
        made = plan(target={"width": 640, "sparsity": {"sparsity": 0.97, "pattern": "block", "block": 32}})
        query, down = row(made, "blocks.0.attn.q"), row(made, "blocks.0.mlp.down")
        assert (query.kept, query.density) == (12 * 1024, 12 / 400)  # 400 blocks · .03
        assert (down.kept, down.density) == (48 * 1024, 48 / 1600)
        assert query.because["m_rho"] == query.density
        text = document.write([made.model_dump()])
        assert "pattern: block\n  block: 32\n" in text
        (found,) = document.read(text, "plan.yaml")
        assert parse(Plan, found) == made
        uneven = plan(target={"width": 128, "sparsity": {"density": 0.3, "pattern": "block", "block": 32}})
        assert row(uneven, "blocks.0.attn.q").because["m_rho"] == 5 / 16
        assert any(
            "its density is 0.3125, not 0.3: rounded to a whole number of blocks" in message
            for message in warnings(uneven)
        )

    def test_rows_of_blocks_are_even_in_new_plans_and_older_ones_keep_their_hash(self) -> None:
        changes: dict[str, Any] = {
            "target": {"width": 128, "sparsity": {"density": 0.3, "pattern": "block", "block": 16}}
        }
        made, own = plan(**changes), proxy(**changes)
        written = made.model_dump()
        assert written["sparsity"].pop("block_rows") == "even"
        older = parse(Plan, document.read(document.write([written]), "plan.yaml")[0])
        assert older.sparsity.block_rows == "random" and "block_rows" not in document.write([older.model_dump()])
        assert older.hash() != made.hash() and older.tensors == made.tensors
        assert transfer(own, own.target, edition=1).sparsity == older.sparsity  # what check compares an older plan with
        even, random = (draw_masks(one) for one in (made, older))
        for name, mask in even.items():
            per_row = [found[name].alive()[::16, ::16].sum(axis=1) for found in (even, random)]
            assert np.ptp(per_row[0]) <= 1 and mask.count == random[name].count and mask != random[name]
        written["sparsity"] |= {"pattern": "exact", "block": None, "block_rows": "even"}
        with pytest.raises(
            InputError, match=r"sparsity\.block_rows: even with the pattern exact; expected the pattern block"
        ):
            parse(Plan, document.read(document.write([written]), "plan.yaml")[0])

    @pytest.mark.parametrize("pattern", ["exact", "fixed_fan_in", "bernoulli", "block", "2:4"])
    def test_masks_of_new_plans_are_drawn_live_and_older_ones_keep_theirs(self, pattern: str) -> None:
        drawn = {"pattern": pattern, "density": 0.5, "block": 16 if pattern == "block" else None}
        made = plan(target={"width": 128, "sparsity": drawn})
        written = made.model_dump()
        is_live = pattern in ("exact", "fixed_fan_in", "bernoulli")
        assert written["sparsity"].pop("draw", None) == ("live" if is_live else None)
        older = parse(Plan, document.read(document.write([written]), "plan.yaml")[0])
        assert older.sparsity.draw == "positions" and (older.hash() != made.hash()) == is_live
        found, before = draw_masks(made), draw_masks(older)
        assert found.keys() == before.keys() and all((found[name] != before[name]) == is_live for name in found)
        if not is_live:
            written["sparsity"]["draw"] = "live"
            with pytest.raises(
                InputError, match=rf"sparsity\.draw: live with the pattern {pattern}; expected one of ex"
            ):
                parse(Plan, document.read(document.write([written]), "plan.yaml")[0])

    def test_without_blocks_nothing_says_block(self) -> None:
        made = plan(target={"width": 128, "sparsity": {"density": 0.25}})
        assert "block" not in made.model_dump()["sparsity"]

    def test_rows_of_blocks_that_are_empty_are_warned_of(self) -> None:
        """16 weights per neuron in blocks of 32 are half a block a row: half of the rows have none, of older plans e^-.5."""
        made = plan(target={"width": 512, "sparsity": {"density": 1 / 32, "pattern": "block", "block": 32}})
        few = "0.5 blocks per row of blocks, fewer than the 4 from which the rules hold"
        helps = "a width of 4096 or a sparsity of at most 0.75 gives 4"
        assert any(f"{few}; 50 % of rows have no weight at all; {helps}" in message for message in warnings(made))
        sparsity = made.sparsity.model_copy(update={"block_rows": "random"})
        older = warnings(made.model_copy(update={"sparsity": sparsity}))
        assert any(f"{few}; about 61 % of rows have no weight at all; {helps}" in message for message in older)

    @pytest.mark.parametrize(
        ("width", "block", "said"),
        [
            (512, 16, None),  # 512 / 8 are 64 weights, 4 blocks
            (
                512,
                32,
                "2 blocks per row of blocks, fewer than the 4 from which the rules hold; `--block 16` has as many",
            ),
            (
                1024,
                128,
                "1 blocks per row of blocks, fewer than the 4 from which the rules hold; `--block 32` has as many",
            ),
            (256, 16, "2 blocks per row of blocks, fewer than the 4 from which the rules hold; a width of 512 or a"),
        ],
    )
    def test_fewer_than_four_blocks_a_row_are_warned_of(self, width: int, block: int, said: str | None) -> None:
        made = plan(target={"width": width, "sparsity": {"density": 1 / 8, "pattern": "block", "block": block}})
        found = [message for message in warnings(made) if "blocks per row" in message]
        assert found == [] if said is None else said in found[0]

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            ({"pattern": "block"}, r"block: is missing; expected one of 16, 32, 64, 128 with the pattern block"),
            ({"block": 32}, r"block: can't be combined with the pattern exact; expected the pattern block"),
            ({"pattern": "block", "block": 24}, r"block"),
            (
                {"pattern": "block", "block": 128},
                r"blocks\.0\.attn\.q: 128×128 blocks don't divide the shape 192×192",
            ),
            ({"pattern": "block", "block": 64, "density": 0.01}, r"attn\.q: density 0\.01 keeps none of its 9 blocks"),
        ],
    )
    def test_what_cannot_be_blocks_is_refused(self, wanted: dict[str, Any], message: str) -> None:
        with pytest.raises((InputError, ValueError), match=message):
            plan(target={"width": 192, "sparsity": {"density": 0.25, **wanted}})


@pytest.mark.parametrize(
    ("word", "value", "density"),
    [
        ("sparsity", 0.992, "0.008"),
        ("sparsity", "0.9921875", "0.0078125"),
        ("sparsity", 0.1, "0.9"),
        ("sparsity", 0, "1"),
        ("density", 1e-3, "0.001"),
    ],
)
def test_densities_are_decimal(word: str, value: Any, density: str) -> None:
    assert sparsity.density_from(word, value) == Decimal(density)


@pytest.mark.parametrize(
    ("word", "value"), [("sparsity", 1.0), ("sparsity", -0.1), ("density", 0), ("density", 1.5), ("density", "x")]
)
def test_no_density_at_all_is_refused(word: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{word}: .*; expected"):
        sparsity.density_from(word, value)


class TestWarnings:
    def test_key_value_share(self) -> None:
        target = {"width": 256, "sparsity": {"density": 0.5}}
        (message,) = warnings(plan(model=LLAMA, target={**target, "kv_heads": 8}))
        assert message.startswith("kv_heads/heads is 1, but 0.5 in the proxy")
        assert warnings(plan(model=LLAMA, target=target)) == []

    @staticmethod
    def decay(steps: int, **parameterization: str) -> list[str]:
        target = {"width": 256, "steps": steps, "sparsity": {"density": 0.125}}
        made = plan(parameterization=parameterization, target=target)
        return [message for message in warnings(made) if "weight decay has a timescale" in message]

    def test_decay_timescale(self) -> None:
        # coupled: 1/(lr·λ) = m_d·m_rho / (η·λ) = .25 / .0015625 = 160 steps; independent leaves the proxy's 640
        (message,) = self.decay(1601, weight_decay_rule="coupled")
        assert message.startswith(
            "all hidden weights: weight decay has a timescale of 160 steps, under a tenth of the run's 1601"
        )
        assert self.decay(1601) == self.decay(1600, weight_decay_rule="coupled") == []

    @pytest.mark.parametrize("rule", ["coupled", "independent", "sqrt"])
    def test_the_remedys_decay_always_does(self, rule: str) -> None:
        (message,) = self.decay(100_000, weight_decay_rule=rule)
        found = float(message.partition("hyperparameters.weight_decay=")[2].partition("`")[0])
        for factor, is_warned in ((1.0, False), (1.2, True)):
            target = {"width": 256, "steps": 100_000, "sparsity": {"density": 0.125}}
            tuned = {**TUNED, "weight_decay": found * factor}
            made = plan(hyperparameters=tuned, parameterization={"weight_decay_rule": rule}, target=target)
            assert any("weight decay has a timescale" in one for one in warnings(made)) is is_warned


class TestRefusals:
    @pytest.mark.parametrize(
        ("target", "what"),
        [
            (
                {"width": 100},
                r"target\.width: 100 is not a multiple of the proxy's head width 32",
            ),
            ({"width": 256, "heads": 5}, r"target\.heads: 5 heads don't divide the width 256"),
            ({"width": 256, "kv_heads": 3}, r"target\.kv_heads: 3 don't divide the 8 heads"),
        ],
    )
    def test_a_target_that_fits_no_model(self, target: dict[str, Any], what: str) -> None:
        with pytest.raises(InputError, match=what):
            plan(target={**target, "sparsity": {"density": 0.5}})

    def test_no_level(self) -> None:
        with pytest.raises(InputError, match=r"^target\.sparsity: is missing"):
            plan(target={"width": 256})

    def test_completep_with_sgd(self) -> None:
        with pytest.raises(InputError, match=r"parameterization\.depth_rule"):
            plan(
                parameterization={"depth_rule": "completep"},
                train={**TRAIN, "optimizer": "sgd"},
                target={"sparsity": {"density": 1.0}},
            )

    @pytest.mark.parametrize(
        ("edit", "what"),
        [
            ({"kept": 9}, r"tensors\[3\]\.kept: 9; expected 8192, density 0\.5 of 16384 weights"),
            ({"density": 0.25}, r"tensors\[3\]\.kept: 8192; expected 4096, density"),
            ({"role": "norm"}, r"only hidden weights are sparse"),
            ({"shape": [128, 128, 1, 1, 1, 1]}, r"tensors\[3\]\.shape"),
            (
                {"fan_in_axes": [0]},
                r"tensors\[3\]\.fan_in_axes: \[0\]; the model's shape gives \[1\] to blocks\.0\.attn\.q",
            ),
            ({"lr": 0.0}, r"tensors\[3\]\.lr: should be greater than 0"),
            ({"init_std": "wide"}, r"tensors\[3\]\.init_std: should be a number, not 'wide'"),
        ],
    )
    def test_an_edited_tensor_that_contradicts_itself(self, edit: dict[str, Any], what: str) -> None:
        data = plan(target={"sparsity": {"density": 0.5}}).model_dump()
        data["tensors"][3].update(edit)
        with pytest.raises(InputError, match=what):
            parse(Plan, document.Document(data, "plan.yaml"))

    @pytest.mark.parametrize(
        "level", [{"sparsity": 1.0}, {"density": 0.0}, {"sparsity": "half"}, {"density": 0.5, "width": -3}]
    )
    def test_the_python_api_raises_the_same_kind_of_error(self, level: dict[str, Any]) -> None:
        with pytest.raises(InputError):
            supar_cli.transfer(proxy(), **level)


def test_a_chunked_loss_counts_fewer_logits() -> None:
    made = plan(target={"sparsity": {"density": 0.5}})
    chunked = made.model_copy(update={"run": made.run.model_copy(update={"loss_chunk_tokens": 16})})
    spared = estimate.activation_bytes(made, 4, 2) - estimate.activation_bytes(chunked, 4, 2)
    assert spared == (4 * 64 - 16) * 256 * 8
