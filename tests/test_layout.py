"""Layouts as documents, and plans of models that supar did not make: fan-in by axes, sizes that follow from two others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.errors import InputError
from supar_cli.planning import document, estimate, layout
from supar_cli.planning.advice import plan_rows, warnings
from supar_cli.planning.explain import explain
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.plan import Plan, with_steps
from supar_cli.planning.problems import parse

LAYOUT = """\
kind: supar.layout/v1
base: {width: 256, heads: 4}
wider: {width: 512, heads: 8}
third: {width: 768, heads: 12}
tensors:
- {name: wte.weight, site: wte.weight, role: embedding, base: [50257, 256], wider: [50257, 512], third: [50257, 768],
   fan_in_axes: [], scales: [1], own: {mean: 0.0, std: 0.02}, read_by: [embedding], module: Embedding}
- {name: h.0.attn.c_attn.weight, site: h.*.attn.c_attn.weight, role: hidden, block: 0, base: [256, 768],
   wider: [512, 1536], third: [768, 2304], fan_in_axes: [0], scales: [0, 1], own: {mean: 0.0, std: 0.02},
   read_by: [addmm], module: Conv1D}
- {name: stem.weight, site: stem.weight, role: hidden, base: [80, 32, 3, 3], wider: [144, 64, 3, 3],
   third: [208, 96, 3, 3], fan_in_axes: [1, 2, 3], scales: [0, 1]}
- {name: lm_head.weight, site: lm_head.weight, role: unembedding, base: [50257, 256], wider: [50257, 512],
   third: [50257, 768], fan_in_axes: [1], scales: [1], tied_to: wte.weight}
notes: [the head reads the table]
"""


def read(text: str = LAYOUT) -> Layout:
    return parse(Layout, document.read(text, "layout.yaml")[0])


def edited(**row: Any) -> str:
    """The layout with keys of its second row changed."""
    data = copy.deepcopy(yaml.safe_load(LAYOUT))
    data["tensors"][1] |= row
    return document.write([data])


class TestLayout:
    def test_every_size_follows_from_two(self) -> None:
        tensors = {tensor.name: tensor for tensor in read().at({"width": 4096, "heads": 64})}
        assert tensors["h.0.attn.c_attn.weight"].shape == (4096, 12288)
        assert tensors["stem.weight"].shape == (1040, 512, 3, 3)  # affine: 16 + width / 4 outputs
        assert tensors["wte.weight"].shape == (50257, 4096)

    def test_fan_in_is_the_product_along_its_axes(self) -> None:
        tensors = {tensor.name: tensor for tensor in read().at({"width": 256, "heads": 4})}
        fans = {name: (tensor.fan_in, tensor.fan_out) for name, tensor in tensors.items()}
        assert fans["h.0.attn.c_attn.weight"] == (256, 768)  # Conv1D is (in, out): the last extent is not the fan-in
        assert fans["stem.weight"] == (32 * 9, 80)
        assert fans["wte.weight"] == (1, 50257 * 256)

    def test_survives_its_document(self) -> None:
        assert parse(Layout, document.read(document.write([read().model_dump()]), "again")[0]) == read()

    @pytest.mark.parametrize(
        ("size", "what"),
        [
            ({"width": 4096}, "expected the same names as base: width, heads"),
            ({"width": 4096, "heads": 32}, "is not on the line through base"),
            ({"width": 258, "heads": 4}, "is not on the line through base"),
        ],
    )
    def test_a_size_off_the_line_is_refused(self, size: dict[str, int], what: str) -> None:
        with pytest.raises(InputError, match=what):
            read().at(size)

    def test_a_size_without_whole_extents_is_refused(self) -> None:
        text = LAYOUT.replace(", heads: 4", "").replace(", heads: 8", "").replace(", heads: 12", "")
        with pytest.raises(InputError, match=r"stem\.weight: its shape would be \[321/4, 257/8, 3, 3\]"):
            read(text).at({"width": 257})

    @pytest.mark.parametrize(
        ("row", "what"),
        [
            (
                {"third": [768, 2305]},
                r"h\.0\.attn\.c_attn\.weight: third is \[768, 2305\]; expected \[768, 2304\]",
            ),
            ({"scales": [0]}, r"scales: \[0\]; expected \[0, 1\], where base and wider differ"),
            ({"fan_in_axes": []}, "expected the axes that a hidden weight's product sums over"),
            ({"fan_in_axes": [2]}, r"fan_in_axes: \[2\]; expected rising numbers from 0 to 1"),
            ({"wider": [512]}, "expected 2 extents of 1 or more, as base has"),
            ({"tied_to": "nothing"}, "is tied to nothing; expected the name of another tensor"),
            ({"name": "wte.weight"}, r"wte\.weight appears twice"),
            ({"rolle": "hidden"}, "did you mean 'role'"),
            ({"uses": ["head"]}, "uses: head on a tensor of role hidden; expected an unembedding, or a tied embedding"),
        ],
    )
    def test_what_contradicts_itself_is_named(self, row: dict[str, Any], what: str) -> None:
        with pytest.raises(InputError, match=what):
            read(edited(**row))

    def test_nothing_that_scales_is_refused(self) -> None:
        with pytest.raises(InputError, match="nothing shows what scales"):
            read(LAYOUT.replace("wider: {width: 512, heads: 8}", "wider: {width: 256, heads: 4}"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_fan_in_times_fan_out_is_the_size(shape: list[int], data: Any) -> None:
    axes = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1)))))
    tensor = layout.Tensor("w", "hidden", "w", tuple(shape), axes)
    assert tensor.fan_in * tensor.fan_out == tensor.size


def own_plan(**changes: Any) -> dict[str, Any]:
    """Data of a plan without width, context or tokens: a convolution and a head of a user's model."""
    row = {"lr": 0.01, "weight_decay": 0.0, "eps": 1e-8}
    data: dict[str, Any] = {
        "kind": "supar.plan/v2",
        "model": {
            "family": "own",
            "layout": "sha256:0",
            "factory": "mymodel:make",
            "base": {"width": 32},
            "target": {"width": 128},
        },
        "parameterization": {"name": "supar", "base": {"steps": 10, "batch_size": 4}, "edition": 2},
        "hyperparameters": {"lr": 0.01, "init_std": 0.1, "alpha_input": 1.0, "alpha_output": 1.0, "weight_decay": 0.0},
        "sparsity": {
            "density": 0.25,
            "sparsity": 0.75,
            "pattern": "exact",
            "distribution": "uniform",
        },
        "tensors": [
            {
                **row,
                "name": "stem.weight",
                "role": "hidden",
                "site": "stem",
                "shape": [128, 64, 3, 3],
                "fan_in_axes": [1, 2, 3],
                "fan_in": 576,
                "base_fan_in": 144,
                "density": 0.25,
                "kept": 18432,
                "init_std": 0.05,
                "because": {"m_d": 4.0, "m_rho": 0.25},
            },
            {
                **row,
                "name": "head.weight",
                "role": "unembedding",
                "site": "head",
                "shape": [10, 128],
                "fan_in_axes": [1],
                "fan_in": 128,
                "base_fan_in": 32,
                "density": 1.0,
                "kept": 1280,
                "init_std": 0.1,
                "fold": 0.25,
                "because": {"m_d": 4.0},
            },
        ],
        "data": {"source": "images", "hash": "sha256:1"},
        "train": {"steps": 10, "batch_size": 4, "warmup_steps": 1},
    }
    return {**data, **changes}


TUNED_OUTPUT = {"ranges": {"alpha_output": [1.0, 4.0, 8.0, 16.0]}}  # of a proxy, as of nets of convolutions


class TestOwnModels:
    made = parse(Plan, document.Document(own_plan(), "plan.yaml"))

    def test_is_valid_and_survives_its_document(self) -> None:
        (again,) = document.read(document.write([self.made.model_dump()]), "again")
        assert parse(Plan, again) == self.made and parse(Plan, again).hash() == self.made.hash()
        assert self.made.model_dump()["tensors"][1]["fold"] == 0.25

    def test_nothing_asks_for_a_width(self) -> None:
        assert self.made.name.startswith("supar-own-width128-s0.75-")
        assert self.made.flops_per_token == 6.0 * (128 * 576 + 1280)
        assert self.made.tensors[0].wpn == 144.0 and warnings(self.made, evidence=TUNED_OUTPUT) == []
        assert estimate.state_bytes(self.made, "sparse", 4) > 0 and len(estimate.lines(self.made)) == 4
        assert len(plan_rows(self.made)) == 2 and with_steps(self.made, 5).train.tokens is None
        assert "0.05" in explain(self.made).text("plan.yaml")
        assert self.made.engine(self.made.tensors[0]) == "auto"

    def test_what_needs_a_decoder_says_so(self) -> None:
        with pytest.raises(InputError, match="needs one of supar's own families"):
            _ = self.made.decoder

    def test_a_low_count_of_weights_names_a_fan_in(self) -> None:
        rows = own_plan()["tensors"]
        rows[0] |= {"density": 0.015625, "kept": 1152}
        level = {**own_plan()["sparsity"], "density": 0.015625, "sparsity": 0.984375}
        message, *_ = warnings(parse(Plan, document.Document(own_plan(tensors=rows, sparsity=level), "plan.yaml")))
        assert "stem.weight: 9 weights per neuron" in message and "a fan-in of 1024 or a sparsity" in message

    @pytest.mark.parametrize(
        ("edit", "what"),
        [
            ({"fan_in": 64}, r"fan_in: 64; expected the product of .* at axes \[1, 2, 3\]"),
            ({"fan_in_axes": [0, 2, 3]}, r"fan_in: 576; expected the product"),
            ({"shape": [128, 64, 3, 3, 1, 1]}, r"tensors\[0\]\.shape"),
            ({"init_constant": 1.0}, "expected either init_std or init_constant"),
        ],
    )
    def test_a_row_that_contradicts_itself_is_refused(self, edit: dict[str, Any], what: str) -> None:
        rows = own_plan()["tensors"]
        rows[0] |= edit
        with pytest.raises(InputError, match=what):
            parse(Plan, document.Document(own_plan(tensors=rows), "plan.yaml"))

    def test_another_family_is_named_with_those_there_are(self) -> None:
        model = {**own_plan()["model"], "family": "mine"}
        with pytest.raises(InputError, match=r"model\.family: should be one of gpt2, llama, vit, own, not 'mine'"):
            parse(Plan, document.Document(own_plan(model=model), "plan.yaml"))

    @pytest.mark.parametrize("model", [None, [], "x", 3, {}, {"family": None}, {"family": ["own"]}])
    def test_a_model_that_is_none_is_refused_in_its_place(self, model: Any) -> None:
        with pytest.raises(InputError, match=r"^plan\.yaml: model(: not a mapping|\.family: should be one of)"):
            parse(Plan, document.Document(own_plan(model=model), "plan.yaml"))

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"name": "head.weight"}, "head.weight appears twice"),
            ({"tied_to": "nothing"}, "stem.weight is tied to nothing; expected the name of another tensor"),
            ({"tied_to": "stem.weight"}, "tied_to: stem.weight, the tensor itself; expected another tensor"),
        ],
    )
    def test_names_that_contradict_each_other(self, changes: dict[str, Any], what: str) -> None:
        rows = own_plan()["tensors"]
        rows[0] |= changes
        with pytest.raises(InputError, match=what):
            parse(Plan, document.Document(own_plan(tensors=rows), "plan.yaml"))

    @pytest.mark.parametrize("target", [{}, {"width": -1}, {"depth": 3}, {"width": 1, "a/b": 2}])
    def test_a_size_that_names_no_folder_is_refused(self, target: dict[str, int]) -> None:
        with pytest.raises(InputError, match=r"model\.target"):
            parse(Plan, document.Document(own_plan(model={**own_plan()["model"], "target": target}), "plan.yaml"))

    def test_rows_that_start_elsewhere_are_shown_apart(self) -> None:
        rows = own_plan()["tensors"]
        base = {**rows[1], "role": "norm", "fan_in_axes": [], "fan_in": 1, "base_fan_in": 1, "fold": None}
        del base["init_std"]
        norms = [{**base, "name": f"norm{start}", "init_constant": start} for start in (0.5, 1.0, -1.0)]
        made = parse(Plan, document.Document(own_plan(tensors=[rows[0], *norms]), "plan.yaml"))
        assert len(plan_rows(made)) == 4

    def test_a_gain_that_starts_at_zero_is_another_experiment(self) -> None:
        rows = own_plan()["tensors"]
        rows[1] |= {"role": "norm", "fan_in_axes": [], "fan_in": 1, "base_fan_in": 1}
        with pytest.raises(InputError, match="expected init_constant: a gain starts at a number"):
            parse(Plan, document.Document(own_plan(tensors=rows), "plan.yaml"))

    def test_warnings_need_no_hidden_row(self) -> None:
        made = parse(Plan, document.Document(own_plan(tensors=own_plan()["tensors"][1:]), "plan.yaml"))
        assert warnings(made) == []

    def test_problems_of_its_section_have_their_place(self) -> None:
        model = {**own_plan()["model"], "facttory": "x"}
        with pytest.raises(InputError, match=r"model\.facttory: unknown key 'facttory'; did you mean 'factory'\?"):
            parse(Plan, document.Document(own_plan(model=model), "plan.yaml"))
