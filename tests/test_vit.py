"""The family vit: its forward pass against numpy, its plans by hand, and whole runs on digits.

Shape suffixes: B images, C channels, H height, W width, T positions, D width, E width of a head, V classes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.experiments import check_plans, coordinates
from supar_cli.models.transformer import Attention
from supar_cli.models.vit import VisionTransformer
from supar_cli.planning import estimate
from supar_cli.planning.advice import warnings
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy
from supar_cli.planning.transfer import transfer
from supar_cli.training.train import train
from supar_cli.training.trainer import Trainer
from tests.conftest import Called
from tests.test_train_resume import assert_same_run, cut_at, losses

Array = NDArray[np.float64]

MODEL = {
    "family": "vit",
    "width": 32,
    "layers": 2,
    "heads": 2,
    "image": [8, 8],
    "channels": 1,
    "patch": 4,
    "classes": 10,
}
COLOUR = {**MODEL, "image": [4, 6], "channels": 3, "patch": 2, "classes": 5}
TUNED = {"lr": 0.01, "init_std": 0.08, "alpha_input": 3.0, "alpha_output": 2.0, "weight_decay": 0.1}
TRAIN = {"steps": 6, "batch_size": 8, "eval_every": 2, "eval_batches": 2}
TARGET = {"width": 128, "sparsity": {"density": 0.25}}
FAULTS = ("patches by column", "channels last", "causal", "input", "output", "attention", "other pooling")


def proxy(**sections: Any) -> Proxy:
    fields = {"kind": "supar.proxy/v1", "model": MODEL, "hyperparameters": TUNED, "train": TRAIN, **sections}
    return parse(Proxy, Document(fields, "proxy.yaml"))


def plan(target: dict[str, Any] = TARGET, with_data: bool = False, **sections: Any) -> Plan:
    made = proxy(target=target, **sections)
    return transfer(corpus.with_hash(made) if with_data else made, made.target, allow_low_wpn=True)


def model(made: Plan) -> VisionTransformer:
    """A plan's model with random values everywhere, gains and biases too."""
    built, random = VisionTransformer(made.decoder), torch.Generator().manual_seed(0)  # type: ignore[arg-type]
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=random)
    return built


def numpy_logits(built: VisionTransformer, images_BCHW: Array, fault: str = "") -> Array:
    """The logits (B, V) by loops over images, patches and heads, in float64, with one of FAULTS."""
    config, factors = built.config, built.config.multipliers
    w = {name.removesuffix(".weight"): value.detach().double().numpy() for name, value in built.state_dict().items()}

    def normed(x_TD: Array, name: str) -> Array:
        centred = x_TD - x_TD.mean(1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(1, keepdims=True) + config.norm_eps) * w[name] + w[f"{name}.bias"]

    def linear(x_TD: Array, name: str) -> Array:
        return x_TD @ w[name].T + w[f"{name}.bias"]

    def attended(x_TD: Array, name: str) -> Array:
        q, k, v = (np.split(linear(x_TD, f"{name}.{part}"), config.heads, axis=1) for part in "qkv")
        mixed = []
        for q_TE, k_TE, v_TE in zip(q, k, v, strict=True):
            scores = np.exp(q_TE @ k_TE.T * (1.0 if fault == "attention" else factors.attention))
            scores = np.tril(scores) if fault == "causal" else scores
            mixed.append(scores / scores.sum(1, keepdims=True) @ v_TE)
        return linear(np.concatenate(mixed, axis=1), f"{name}.o")

    def gelu(x: Array) -> Array:
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def logits(image_CHW: Array) -> Array:
        edge, (height, width) = config.patch, config.image
        corners = [(row, column) for row in range(0, height, edge) for column in range(0, width, edge)]
        corners = sorted(corners, key=lambda at: at[::-1]) if fault == "patches by column" else corners
        cut = [image_CHW[:, row : row + edge, column : column + edge] for row, column in corners]
        flat = [(one.transpose(1, 2, 0) if fault == "channels last" else one).reshape(-1) for one in cut]
        x_TD = linear(np.stack(flat), "patches")
        x_TD = np.concatenate([w["class_token"], x_TD]) if "class_token" in w else x_TD
        x_TD = (x_TD + w["positions"]) * (1.0 if fault == "input" else factors.input)
        for at in range(config.layers):
            block = f"blocks.{at}"
            x_TD = x_TD + attended(normed(x_TD, f"{block}.attn_norm"), f"{block}.attn")
            up = gelu(linear(normed(x_TD, f"{block}.mlp_norm"), f"{block}.mlp.up"))
            x_TD = x_TD + linear(up, f"{block}.mlp.down")
        x_TD = normed(x_TD, "final_norm")
        reads_class = ("class_token" in w) != (fault == "other pooling")
        read_D = x_TD[0] if reads_class else x_TD.mean(0)
        return w["unembedding"] @ read_D * (1.0 if fault == "output" else factors.output)

    return np.stack([logits(image) for image in images_BCHW])


class TestModel:
    @pytest.mark.parametrize("pooling", ["class", "mean"])
    def test_is_numpys_and_no_faulty_one(self, pooling: str) -> None:
        built = model(plan(model={**COLOUR, "pooling": pooling}))
        images = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(1))
        found, double = built(images).detach().double().numpy(), images.double().numpy()
        np.testing.assert_allclose(found, numpy_logits(built, double), rtol=1e-3, atol=1e-4)
        for fault in FAULTS:
            assert np.abs(found - numpy_logits(built, double, fault)).max() > 0.02, fault

    def test_the_loss_is_that_of_the_logits(self) -> None:
        built, images, labels = model(plan()), torch.randn(4, 1, 8, 8), torch.tensor([0, 9, 3, 3])
        by_hand = -built(images).log_softmax(1)[range(4), labels].mean()
        torch.testing.assert_close(built(images, labels), by_hand)
        with pytest.raises(ValueError, match=r"images of \(1, 4, 16\); expected \(channels"):
            built(images.view(4, 1, 4, 16))  # as many patches

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_every_position_sees_every_other(self, is_causal: bool) -> None:
        built = model(plan(model={**MODEL, "pooling": "mean"}))
        for module in built.modules():
            if isinstance(module, Attention):
                module.is_causal = is_causal
        image = torch.randn(1, 1, 8, 8, requires_grad=True)
        x_BTD = built.blocks[0](built.embed(image), None, None)
        reached = [torch.autograd.grad(x_BTD[0, at].sum(), image, retain_graph=True)[0].ne(0).all() for at in range(4)]
        assert reached == ([False, False, False, True] if is_causal else [True] * 4)

    @pytest.mark.parametrize("pooling", ["class", "mean"])
    def test_its_flops_are_torchs_count(self, pooling: str) -> None:
        made = plan(model={**COLOUR, "pooling": pooling})
        images = torch.randn(2, 3, 4, 6, requires_grad=True)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention isn't counted
            model(made)(images).sum().backward()
        assert counter.get_total_flops() == 2 * made.flops_per_row
        by_token = made.flops_per_token * made.decoder.context  # the control: every weight at every position
        assert by_token - made.flops_per_row > 0.001 * by_token


class TestPlan:
    def test_rows_by_hand(self) -> None:
        """Width × 4: SPEC's formulas with m_d 4, m_ρ 1/4; the fan-in of a patch doesn't move."""
        numbers = ("init_std", "init_constant", "lr", "weight_decay", "eps", "density", "fan_in", "base_fan_in")
        eps, found = 1e-8, {row.name: [vars(row)[name] for name in numbers] for row in plan().tensors}
        assert found["patches"] == [0.08, None, 0.01, 0.1, eps / 4, 1.0, 16, 16]
        assert found["patches.bias"] == [None, 0.0, 0.01, 0.0, eps / 4, 1.0, 1, 1]
        assert found["class_token"] == found["positions"] == [0.08, None, 0.01, 0.1, eps / 4, 1.0, 1, 1]
        assert found["unembedding"] == [0.08, None, 0.01, 0.1, eps / 4, 1.0, 128, 32]
        assert found["blocks.1.mlp.up"] == [0.08, None, 0.01, 0.1, eps / 4, 0.25, 128, 32]  # m_d·m_ρ is 1
        assert plan().decoder.multipliers.model_dump() == {
            **{"input": 3.0, "output": 2.0 / 4, "attention": 1 / 16, "residual": 1.0}
        }

    def test_rates_of_sgd_by_hand(self) -> None:
        made = plan(train={**TRAIN, "optimizer": "sgd"})
        by_name = {row.name: (row.lr, row.weight_decay) for row in made.tensors}
        for name in ("patches", "class_token", "positions", "unembedding"):
            assert by_name[name] == (0.01 * 4, 0.1 / 4), name
        assert by_name["patches.bias"] == (0.01 * 4, 0.0)
        assert by_name["blocks.0.attn.q"] == (0.01 * 4, 0.1 / 4)  # η/m_ρ, λ·m_ρ

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            ({"model": {**MODEL, "patch": 3}}, "patch: patches of 3 don't divide the image [8, 8]"),
            ({"model": {**MODEL, "tied": True}}, "tied: True; expected False of a vision transformer"),
            ({"model": {**MODEL, "positions": "rope"}}, "positions: rope; expected learned"),
            ({"model": {**MODEL, "norm": "rmsnorm"}}, "norm: rmsnorm; expected layernorm"),
            ({"model": {**MODEL, "context": 9}}, "context: 9; expected 5"),
            ({"model": {**MODEL, "vocab": 9}}, "vocab: 9; expected 10"),
            ({"model": {**MODEL, "pooling": "max"}}, "pooling"),
            ({"model": {key: MODEL[key] for key in MODEL if key != "classes"}}, "'classes' is missing"),
            ({"data": {"kind": "tokens"}}, "data.kind: tokens; expected images, which the family vit reads"),
            ({"data": {"kind": "images", "tokenizer": "gpt2"}}, "tokenizer: 'gpt2' with the kind images"),
            ({"target": {"context": 64}}, "target.context: is for text"),
            ({"target": {"tokens": 1000}}, "target.tokens: is for text"),
        ],
    )
    def test_what_no_image_has_is_refused(self, sections: dict[str, Any], message: str) -> None:
        assert plan().train.tokens is None  # the control: without the change it is a plan
        with pytest.raises(InputError) as refused:
            plan(**{"target": TARGET, **sections})
        assert message.replace("; expected", "") in str(refused.value).replace("; expected", "")

    def test_a_plan_with_tokens_is_refused(self) -> None:
        fields = plan().model_dump()
        assert parse(Plan, Document(fields, "plan.yaml")) == plan()
        fields["train"]["tokens"] = 48
        with pytest.raises(InputError, match=r"train.tokens: 48; expected none, as images have no tokens"):
            parse(Plan, Document(fields, "plan.yaml"))
        fields = {**plan().model_dump(), "task": {"kind": "next_token"}}
        with pytest.raises(InputError, match=r"task.kind: next_token; expected classification"):
            parse(Plan, Document(fields, "plan.yaml"))

    def test_sizes_and_warnings_are_in_images(self) -> None:
        made = plan({**TARGET, "batch_size": 16})
        text = "\n".join([*estimate.lines(made), *estimate.times([made]), *warnings(made)])
        assert "6 steps, 96 images, " in text and "a micro-batch of 16 images" in text
        assert "a batch has 16 images, but 8 in the proxy" in text and "2 CPU cores" in text
        assert "tokens" not in text and "sequences" not in text


class TestRuns:
    def test_a_resumed_run_is_the_same(self, tmp_path: Path) -> None:
        made = plan(with_data=True, run={"checkpoint_every": 2})
        whole = train(made, tmp_path / "whole")
        assert whole["accuracy"] > 0 and whole["accuracy_se"] >= 0
        cut_at(made, tmp_path / "cut", 4)
        train(made, tmp_path / "cut", resume=True)
        assert_same_run(tmp_path / "whole", tmp_path / "cut")
        # the control: another seed is another run
        train(plan({**TARGET, "seed": 1}, with_data=True), tmp_path / "other")
        with pytest.raises(AssertionError):
            assert_same_run(tmp_path / "whole", tmp_path / "other")

    def test_micro_batches_and_processes_train_the_same(self, tmp_path: Path, supar: Callable[..., Called]) -> None:
        train(plan(with_data=True), tmp_path / "whole")
        train(plan(with_data=True, run={"micro_batch_size": 2}), tmp_path / "parts")
        (tmp_path / "plan.yaml").write_text(json.dumps(plan(with_data=True).model_dump()))
        done = supar("train", "plan.yaml", "-o", "ranks", "-q", "--nproc", "2")
        assert done.status == 0, done.stderr
        expected = losses(tmp_path / "whole")
        for name in ("parts", "ranks"):
            for one, other in zip(expected, losses(tmp_path / name), strict=True):
                assert one == pytest.approx(other, abs=2e-5), name
        assert expected != losses(tmp_path / "parts")  # the control: sums in another order are seen

    def test_a_check_measures_what_the_head_reads(self) -> None:
        (over_density,) = check_plans.sweeps_of(
            proxy(), densities=[1.0, 0.5], widths=[64], seeds=1, steps=1, batch_size=16
        )[:1]
        made = over_density.plans[0][1]
        trainer = Trainer(made)
        (images,) = trainer.task.inputs(trainer.task.batch(0, slice(0, 16)))
        with torch.no_grad():
            logits = trainer.sparse_model.model(images)
        sizes = coordinates.measure(made)["steps"][0]
        assert sizes["logits"]["logits"] == pytest.approx(float(logits.abs().mean()), rel=1e-5)
        assert len(sizes["attention"]) == 2 and set(sizes[coordinates.SHARE]) == {"unembedding", "final_norm"}
        # the control: with one logit of each image left out, as of text's own token, it would be another number
        assert sizes["logits"]["logits"] != pytest.approx(float(logits[:, 1:].abs().mean()), rel=1e-3)
