"""`transfer --values`: a plan that starts from a model's weights computes what the model does, whatever the multipliers of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import supar_cli
from supar_cli.errors import InputError, TransferWarning
from supar_cli.exporting import plan_start
from supar_cli.exporting.stored_model import StoredModel, open_run
from supar_cli.models.transformer import Transformer, named_tensors
from supar_cli.planning.folding import standard_factors
from supar_cli.planning.plan import Plan, PlanModel, read_plan
from supar_cli.planning.plan_sections import Multipliers
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy
from supar_cli.sparse.masks import Mask
from supar_cli.training.prepare import make_masks, prepare, start_rows
from tests.conftest import CHECKOUT, proxy_fields, real_text

pytestmark = pytest.mark.filterwarnings("ignore::supar_cli.errors.TransferWarning")
Tensors = dict[str, torch.Tensor]
CPU = torch.device("cpu")
GPT2 = {"family": "gpt2", "context": 12, "vocab": 256}
LLAMA = {"family": "llama", "context": 12, "vocab": 256}
COMPLETEP = {"depth_rule": "completep"}
HYPER = {"lr": 0.01, "init_std": 0.08, "weight_decay": 0.1}
# the model's keys, and the rules of the run that it is of and of the target that starts from it
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gpt2 tied": (GPT2, {}, {}),
    "gpt2 untied with biases": ({**GPT2, "tied": False, "bias": True}, COMPLETEP, {}),
    "gpt2 with wide heads and ALiBi": ({**GPT2, "head_width": 24, "positions": "alibi", "bias": True}, {}, COMPLETEP),
    "llama tied, grouped queries": ({**LLAMA, "kv_heads": 1}, COMPLETEP, COMPLETEP),
    "llama untied with biases": ({**LLAMA, "tied": False, "bias": True}, {}, COMPLETEP),
}


def proxy_of(text: Path, model: dict[str, Any], rules: dict[str, Any], alphas: tuple[float, float]) -> Proxy:
    hyper = {**HYPER, "alpha_input": alphas[0], "alpha_output": alphas[1]}
    changes = {"model": model, "hyperparameters": hyper, "parameterization": rules, "target": {"width": None}}
    return validate(Proxy, proxy_fields(str(text), **changes), "proxy")


def trained_like(plan: Plan, density: float) -> Tensors:
    """Values of a plan's tensors with the sizes of trained ones, hidden weights zero but for a share of them."""
    made, source = Tensors(), torch.Generator().manual_seed(7)
    for row in plan.tensors:
        drawn = torch.randn(row.shape, generator=source) * {"hidden": 0.3, "embedding": 0.2}.get(row.role, 0.15)
        alive = torch.rand(row.shape, generator=source) < (density if row.role == "hidden" else 1)
        made[row.name] = torch.where(alive, drawn, 0.0) + (row.role == "norm")
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(real_text(20_000))
    return path


@dataclass
class Made:
    """A run's model that is read in place of any run: its shape and multipliers, and its values."""

    decoder: PlanModel
    values: Tensors


@pytest.fixture
def run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """`run("gpt2 tied", density)`: a run of that shape, planned from a narrower and shallower proxy."""

    def make(shape: str, density: float = 1.0, **changed: torch.Tensor) -> Made:
        keys, rules, _ = SHAPES[shape]
        narrow = proxy_of(text, {**keys, "width": 16, "layers": 1, "heads": 1}, rules, (1.75, 0.3))
        plan = supar_cli.transfer(narrow, density=1, width=32, heads=2, layers=2, kv_heads=keys.get("kv_heads", 2))
        model, values = plan.decoder, trained_like(plan, density) | changed
        found = StoredModel(tmp_path / "run", model, values.__getitem__)
        (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(plan_start, "open_model", lambda _: found)
        return Made(model, values)

    return make


@pytest.fixture
def start(text: Path, tmp_path: Path) -> Callable[..., Plan]:
    """`start("gpt2 tied", density=…)`: the plan that starts from the run, of a proxy of its shape with other multipliers."""

    def make(shape: str, alphas: tuple[float, float] = (0.6, 3.0), **options: Any) -> Plan:
        keys, _, rules = SHAPES[shape]
        proxy = proxy_of(text, {**keys, "width": 32, "layers": 1, "heads": 2}, rules, alphas)
        files = {f"{key}_out": tmp_path / f"{key}.safetensors" for key in ("masks", "values")}
        options = {"layers": 2, "values": tmp_path / "run", "allow_low_wpn": True, **files, **options}
        return supar_cli.transfer(proxy, **options)

    return make


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).double()  # type: ignore[no-any-return]


def distance(made: Made, plan: Plan) -> float:
    """The largest difference between the logits of a run and of a plan at step 0, relative to the largest logit."""
    model = Transformer(made.decoder)
    with torch.no_grad():
        for name, tensor in named_tensors(model).items():
            tensor.copy_(made.values[name])
    wanted = logits(model)
    return float((logits(prepare(plan, CPU).model) - wanted).abs().max() / wanted.abs().max())


MASKED = {"masks": True}


@pytest.mark.parametrize("case", [{}, MASKED, {**MASKED, "parameterization": "sp"}], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plan_computes_what_the_model_does(
    run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path, shape: str, case: dict[str, Any]
) -> None:
    made = run(shape, density=0.25 if case else 1)
    plan = start(shape, **{**case, **({"masks": tmp_path / "run"} if case else {"density": 1})})
    own, other = plan.decoder.multipliers, made.decoder.multipliers
    assert own.input != other.input and own.output != other.output
    assert distance(made, plan) < 1e-5
    for row in plan.tensors:
        assert row.init == "file" and row.init_constant is None
        live = made.values[row.name][made.values[row.name] != 0]
        assert row.kept == (live.numel() if row.role == "hidden" else row.size)


FAULTS: dict[str, Callable[[Multipliers], dict[str, float]]] = {
    "input left out": lambda one: {"input": 1.0},
    "α_input²": lambda one: {"input": one.input**2},
    "output left out": lambda one: {"output": 1.0},
    "residual left out": lambda one: {"residual": 1.0},
    "attention left out": lambda one: {"attention": one.attention * 4},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("shape", ["llama tied, grouped queries", "llama untied with biases"])
def test_a_wrong_factor_is_seen(
    run: Callable[..., Made], start: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, shape: str, fault: str
) -> None:
    def faulty(model: PlanModel) -> dict[str, float]:
        wrong = model.multipliers.model_copy(update=FAULTS[fault](model.multipliers))
        return standard_factors(model.model_copy(update={"multipliers": wrong}))

    made = run(shape)
    monkeypatch.setattr(plan_start, "standard_factors", faulty)
    assert distance(made, start(shape, density=1)) > 1e-3


WRONG_ORDERS: dict[str, Callable[[torch.Tensor, Mask], torch.Tensor]] = {
    "dead weights not taken out": lambda whole, mask: whole.flatten()[: mask.count].clone(),
    "column by column": lambda whole, mask: whole.T[torch.from_numpy(mask.alive()).T],
    "backwards": lambda whole, mask: whole[torch.from_numpy(mask.alive())].flip(0),
}


@pytest.mark.parametrize("fault", WRONG_ORDERS)
def test_a_wrong_order_is_seen(
    run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    made = run("gpt2 tied", density=0.25)
    monkeypatch.setattr(plan_start, "live_values", WRONG_ORDERS[fault])
    assert distance(made, start("gpt2 tied", masks=tmp_path / "run")) > 1e-3


@pytest.mark.parametrize(
    "sparsity",
    [
        {"density": 0.25},
        {"density": 0.25, "updates": "gmp"},
        {"density": 0.5, "updates": {"method": "topk", "start": 0.75}},
        {"masks": True},
        {"masks": True, "updates": "set"},
    ],
    ids=str,
)
def test_what_lives_at_step_0_is_in_the_file(
    run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path, sparsity: dict[str, Any]
) -> None:
    made = run("gpt2 tied", density=0.5)
    plan = start("gpt2 tied", **sparsity | ({"masks": tmp_path / "run"} if "masks" in sparsity else {}))
    rows, stored, masks = (
        {row.name: row for row in start_rows(plan)},
        load_file(tmp_path / "values.safetensors"),
        make_masks(plan),
    )
    started, found = prepare(plan, CPU), standard_factors(made.decoder)
    for name, factor in standard_factors(plan.decoder).items():
        alive = masks[name].alive() if name in masks else np.ones(rows[name].shape, bool)
        wanted = np.where(
            alive, (made.values[name].numpy().astype(np.float64) * (found[name] / factor)).astype(np.float32), 0
        )
        assert np.array_equal(started.weight(name).numpy(), wanted) and stored[name].numel() == rows[name].kept
        size = np.sqrt(np.mean(np.square(wanted[alive], dtype=np.float64)))
        assert rows[name].init_std == pytest.approx(size, rel=1e-12)
        if "masks" in sparsity and name in masks:
            assert np.array_equal(alive, made.values[name].numpy() != 0)


def test_equal_multipliers_keep_every_bit(run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path) -> None:
    made = run("gpt2 tied")
    own = made.decoder.multipliers
    for exponents in ((0, 0), (3, -2)):  # a power of two moves no bit but those of the exponent
        alphas = own.input * 2.0 ** exponents[0], own.output * 2.0 ** exponents[1]
        plan = start("gpt2 tied", alphas, density=1)
        stored, own_factors = load_file(tmp_path / "values.safetensors"), standard_factors(plan.decoder)
        for name, factor in standard_factors(made.decoder).items():
            assert torch.equal(stored[name] * own_factors[name], made.values[name] * factor)
            if exponents == (0, 0):
                assert torch.equal(stored[name].view(torch.int32), made.values[name].view(torch.int32))


def changed_model(run: Callable[..., Made], shape: str, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> None:
    """Have the run's model section say something else."""
    run(shape)
    stored = plan_start.open_model(Path())
    other = replace(stored, decoder=stored.decoder.model_copy(update=keys))
    monkeypatch.setattr(plan_start, "open_model", lambda _: other)


OTHERS = {"norm": "rmsnorm", "vocab": 999, "activation": "gelu_tanh", "bias": True, "tied": False, "norm_eps": 1e-6}
SIZES = {"width": 48, "layers": 3, "heads": 6, "kv_heads": 3, "head_width": 8, "ffn_width": 100}


def test_every_difference_is_named_with_what_mends_it(
    run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_model(run, "gpt2 tied", monkeypatch, **OTHERS, **SIZES, context=24)
    with pytest.raises(InputError) as caught:
        start("gpt2 tied", density=1)
    of_sizes, of_proxy = map(str, caught.value.problems)
    flags = "--width 48 --layers 3 --heads 6 --kv-heads 3 --head-width 8 --ffn-width 100 --context 24"
    assert of_sizes.startswith(f"values: {tmp_path / 'run'} has width 48, not 32, ") and of_sizes.endswith(flags)
    assert all(f"{key} {value}, not " in of_sizes for key, value in SIZES.items())
    wanted = "model.vocab: 999, model.norm: rmsnorm, model.norm_eps: 1e-06, model.activation: gelu_tanh"
    assert of_proxy.endswith(f"expected a proxy with {wanted}, model.bias: true, model.tied: false")
    with pytest.raises(InputError, match=rf"values: \S* fits with {flags}"):
        start("gpt2 tied", density=1, width=40)  # has no whole number of heads
    for key in (*SIZES, *OTHERS):  # one alone
        changed_model(run, "gpt2 tied", monkeypatch, **{key: {**OTHERS, **SIZES}[key]})
        with pytest.raises(InputError, match=f"has {key} [^,]*, not [^,]*; expected"):
            start("gpt2 tied", density=1)


def test_biases_start_at_0_where_the_model_has_none(
    run: Callable[..., Made], start: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run("gpt2 untied with biases")
    made.decoder = made.decoder.model_copy(update={"bias": False})
    values = {name: value for name, value in made.values.items() if not name.endswith(".bias")}
    changed = StoredModel(Path("none"), made.decoder, values.__getitem__)
    monkeypatch.setattr(plan_start, "open_model", lambda _: changed)
    with pytest.warns(TransferWarning, match="none has no biases but 0, with which those of the target start"):
        plan = start("gpt2 untied with biases", density=1)
    model = prepare(plan, torch.device("cpu")).model
    assert all(not value.any() for name, value in model.named_parameters() if name.endswith("bias"))


def test_a_context_differs_but_for_learned_positions(
    run: Callable[..., Made], start: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape in ("llama untied with biases", "gpt2 with wide heads and ALiBi"):
        changed_model(run, shape, monkeypatch, context=24)
        with pytest.warns(TransferWarning, match=r"the context of .* is 24, that of the target 12"):
            start(shape, density=1)
    changed_model(run, "llama untied with biases", monkeypatch, rope_theta=5e5)
    with pytest.raises(InputError, match=r"rope_theta 500000.0, not 10000.0"):
        start("llama untied with biases", density=1)
    changed_model(run, "gpt2 tied", monkeypatch, rope_theta=5e5)
    start("gpt2 tied", density=1)  # has no such positions


ZEROS = torch.zeros(32, 32)


@pytest.mark.parametrize(
    ("density", "options", "what"),
    [
        (0.5, {"density": 1}, "start as live weights, 5[0-9.]* % of blocks.*; `--masks PATH` keeps them dead"),
        (1, {"density": 0.25}, "drawn at random, so that 75 % of what lives of .* is dropped; `supar prune`"),
        (1, {"density": 1, "zero": "blocks.1.attn.o"}, "values: blocks.1.attn.o: all values are 0"),
    ],
)
def test_what_is_hardly_meant_is_warned_of(
    run: Callable[..., Made], start: Callable[..., Plan], density: float, options: dict[str, Any], what: str
) -> None:
    run("gpt2 tied", density, **{options.pop("zero", "none"): ZEROS})
    with pytest.warns(TransferWarning, match=what):
        start("gpt2 tied", **options)


def test_a_live_weight_of_a_run_that_is_0_stays_live(
    run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that started at 0: a run says what lives, where a folder of weights has nothing but its zeros."""
    made, name = run("gpt2 tied", 0.5), "blocks.0.attn.q"
    stored = plan_start.open_model(Path())
    hidden = {key: value for key, value in made.values.items() if bool((value == 0).any()) and value.ndim == 2}
    masks = {key: Mask.of((value != 0).numpy()) for key, value in hidden.items()}
    made.values[name].view(-1)[masks[name].live()[0]] = 0.0
    kept = {}
    for known in (masks, None):
        monkeypatch.setattr(plan_start, "open_model", lambda _, known=known: replace(stored, masks=known))
        plan = start("gpt2 tied", masks=tmp_path / "run")
        kept[known is not None] = {row.name: row.kept for row in plan.tensors}[name]
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
    assert kept[True] == masks[name].count == kept[False] + 1
    finished = CHECKOUT / "tests/released/v0.1.0/runs/finished"
    own, drawn = open_run(finished).masks, make_masks(read_plan(finished / "plan.yaml"))
    assert own and {key: mask.fingerprint for key, mask in own.items()} == {
        key: mask.fingerprint for key, mask in drawn.items()
    }


def test_masks_of_the_model_need_no_warning(
    run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path
) -> None:
    run("gpt2 tied", 0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start("gpt2 tied", masks=tmp_path / "run")
    assert not [one for one in caught if str(one.message).startswith("values")]


@pytest.mark.parametrize(
    ("changed", "density", "what"),
    [
        ({"blocks.0.attn.q": torch.full((32, 32), torch.inf)}, 1, "blocks.0.attn.q: holds values that are not finite"),
        ({"blocks.0.attn.q": ZEROS}, 0.5, "blocks.0.attn.q: all live weights would start at 0"),
        ({"embedding": torch.full((256, 32), 3e38)}, 1, "embedding: holds values that are not finite in float32"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path, changed: Tensors, density: float, what: str
) -> None:
    run("gpt2 tied", **changed)
    with pytest.raises(InputError, match=what):
        start("gpt2 tied", density=density, parameterization="sp")
    assert not (tmp_path / "values.safetensors").exists()


def test_files_are_not_mixed_up(run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path) -> None:
    run("gpt2 tied", 0.5)
    path = tmp_path / "run" / "values.safetensors"
    path.touch()
    with pytest.raises(InputError, match=r"values_out: .* would replace what values are read from"):
        start("gpt2 tied", density=1, values_out=path)
    with pytest.raises(InputError, match=r"values_out: .* holds the plan's masks"):
        start("gpt2 tied", masks=tmp_path / "run", values_out=tmp_path / "masks.safetensors")


def test_masks_of_a_run_of_another_shape_are_refused_with_flags(
    run: Callable[..., Made], start: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_model(run, "gpt2 tied", monkeypatch, ffn_width=96, norm="rmsnorm", activation="gelu_tanh")
    with pytest.raises(InputError, match=r"masks: .* has ffn_width 96, not 128; expected .*--ffn-width 96$"):
        start("gpt2 tied", values=None, masks=tmp_path / "run")
    changed_model(run, "gpt2 tied", monkeypatch, activation="swiglu")
    with pytest.raises(
        InputError, match=r"activation swiglu, not gelu; expected a proxy with model.activation: swiglu"
    ):
        start("gpt2 tied", values=None, masks=tmp_path / "run")


def test_a_model_of_ones_own_is_refused_with_the_remedy(here: Path) -> None:
    fields = proxy_fields("") | {"model": {"family": "own", "layout": "layout.yaml"}}
    proxy = validate(Proxy, {key: value for key, value in fields.items() if key != "data"}, "proxy")
    with pytest.raises(InputError, match=r"values: .*`prepare\(model, plan, initialise=False\)`"):
        supar_cli.transfer(proxy, density=1, values=here)
