"""`transfer --masks`: densities and kept counts from a file of masks or from the zeros of a pruned model's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import supar_cli
from supar_cli.errors import InputError
from supar_cli.planning import advice
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy
from supar_cli.training.prepare import make_masks
from supar_cli.training.trainer import Trainer
from tests.conftest import Called, proxy_fields

pytestmark = pytest.mark.filterwarnings("ignore::supar_cli.errors.TransferWarning")


@pytest.fixture
def proxy(text_file: Path) -> Proxy:
    return validate(Proxy, {**proxy_fields(str(text_file)), "target": {}}, "proxy")


def pruned(proxy: Proxy, dtype: torch.dtype = torch.float32, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of the proxy with half of the first block's and none of the second block's hidden weights pruned."""
    weights = {}
    for row in supar_cli.transfer(proxy, density=1).tensors:
        drawn = torch.randn(row.shape, generator=torch.Generator().manual_seed(len(weights))).to(dtype)
        if row.role == "hidden" and row.block == 0:
            drawn[drawn < drawn.median()] *= -0.0  # a dead weight may be -0
        weights[row.name] = drawn
    return weights | changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_zeros_of_weights_are_the_dead_ones(proxy: Proxy, tmp_path: Path, dtype: torch.dtype) -> None:
    weights = pruned(proxy, torch.float32 if dtype is torch.bool else dtype)
    stored = {name: (weight != 0) if dtype is torch.bool else weight for name, weight in weights.items()}
    names = list(stored)
    (tmp_path / "pruned").mkdir()
    for part, some in enumerate((names[::2], names[1::2])):  # sharded, as checkpoints of the Hub are
        save_file({name: stored[name] for name in some}, tmp_path / "pruned" / f"model-{part}.safetensors")
    plan = supar_cli.transfer(proxy, masks=tmp_path / "pruned", masks_out=tmp_path / "masks.safetensors")
    assert "masks: 6 of 12 hidden tensors have none and stay dense: blocks.1.attn.q, …" in advice.warnings(plan)
    rows = {row.name: row for row in plan.tensors}
    live = {name: int((weights[name] != 0).sum()) for name in rows}
    hidden = [row for row in plan.tensors if row.role == "hidden"]
    assert all(row.kept == live[row.name] for row in hidden) and rows["blocks.1.mlp.up"].kept == 32 * 128
    one = rows["blocks.0.mlp.up"]
    assert one.because["m_rho"] == one.density == one.kept / one.size and one.lr == pytest.approx(0.01 / one.density)
    masks = make_masks(plan)
    assert {name for name in masks if name.startswith("blocks.1")} == set()
    assert all(torch.equal(torch.from_numpy(masks[name].alive()), weights[name] != 0) for name in masks)


def test_such_a_plan_trains(proxy: Proxy, tmp_path: Path) -> None:
    save_file(pruned(proxy), tmp_path / "pruned.safetensors")
    plan = supar_cli.transfer(proxy, masks=tmp_path / "pruned.safetensors", masks_out=tmp_path / "m.safetensors")
    trainer = Trainer(plan)
    losses = [trainer.step().loss for _ in range(3)]
    assert losses[2] < losses[0] and len(trainer.sparse_model.masks) == 6


WHOLE_COLUMNS = torch.zeros(128, 32)
WHOLE_COLUMNS[:, :8] = 1.0


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"blocks.0.mlp.up": WHOLE_COLUMNS}, r"blocks\.0\.mlp\.up: only 128 of 128 rows and 8 of 32 columns have"),
        ({"blocks.0.mlp.down": WHOLE_COLUMNS.T.contiguous()}, r"only 8 of 32 rows and 128 of 128 columns"),
        ({"blocks.0.mlp.up": torch.zeros(128, 32)}, "has no live weight"),
        ({"blocks.0.mlp.up": torch.ones(32, 128)}, r"has the shape \[32, 128\]; the target's is \[128, 32\]"),
    ],
)
def test_what_the_rules_do_not_hold_for_is_refused(
    proxy: Proxy, tmp_path: Path, changed: dict[str, Any], what: str
) -> None:
    save_file(pruned(proxy, **changed), tmp_path / "pruned.safetensors")
    with pytest.raises(InputError, match=what):
        supar_cli.transfer(proxy, masks=tmp_path / "pruned.safetensors", masks_out=tmp_path / "m.safetensors")


def test_what_masks_are_read_from_is_not_replaced(proxy: Proxy, tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    save_file(pruned(proxy), path)
    for source in (path, tmp_path):
        with pytest.raises(InputError, match="would replace what masks are read from"):
            supar_cli.transfer(proxy, masks=source, masks_out=path)


@pytest.mark.parametrize("said", [{"density": 0.5}, {"sparsity": 0.5}, {"pattern": "fixed_fan_in"}])
def test_another_density_beside_masks_is_refused(proxy: Proxy, tmp_path: Path, said: dict[str, Any]) -> None:
    save_file(pruned(proxy), tmp_path / "pruned.safetensors")
    with pytest.raises(InputError, match=f"{next(iter(said))}: cannot be combined with masks"):
        supar_cli.transfer(proxy, masks=tmp_path / "pruned.safetensors", masks_out=tmp_path / "m.safetensors", **said)


def test_other_names_are_refused(proxy: Proxy, tmp_path: Path) -> None:
    save_file({"other": torch.ones(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="has none of the target's 12 hidden tensors"):
        supar_cli.transfer(proxy, masks=tmp_path / "other.safetensors")


def test_the_command_writes_masks_beside_the_plan(
    proxy: Proxy, proxy_file: Path, tmp_path: Path, supar_here: Callable[..., Called]
) -> None:
    own = supar_cli.load(proxy_file)
    assert isinstance(own, Proxy)
    save_file(pruned(own), tmp_path / "pruned.safetensors")
    call = ("transfer", "proxy.yaml", "--masks", "pruned.safetensors")
    assert supar_here(*call, "--dry-run").status == 0 and not list(tmp_path.rglob("*masks.safetensors"))
    assert supar_here(*call, "-o", "plans/a.yaml").status == 0
    plan = supar_cli.load(tmp_path / "plans" / "a.yaml")
    assert plan.sparsity.source.path == str(tmp_path / "plans" / "a.masks.safetensors") and make_masks(plan)  # type: ignore
    assert supar_here(*call, "-o", "plans/a.yaml").status == 0  # the same again
    (tmp_path / "plans" / "a.masks.safetensors").write_bytes(b"another file")
    refused = supar_here(*call, "-o", "plans/a.yaml")
    assert refused.status == 2 and "a.masks.safetensors: exists and differs" in refused.err
    assert supar_here(*call, "-o", "plans/b.yaml").status == 0  # a second plan in the folder has masks of its own
    both = supar_here(*call, "--sparsity", "0.5")
    assert both.status == 2 and "--masks: cannot be combined with --sparsity" in both.err
