"""Files of masks: what is written is read, and whatever is not what a plan says is refused by the tensor's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import supar_cli
from supar_cli.errors import InputError, SetupError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, read_plan
from supar_cli.planning.plan_sections import MaskSource
from supar_cli.sparse import masks as masks_of
from supar_cli.sparse.mask_files import read_masks, write_masks
from supar_cli.sparse.masks import Mask, WantedMask, draw
from supar_cli.training import prepare
from supar_cli.training.trainer import Trainer

MakePlan = Callable[..., Plan]
SHAPES = {"a": (24, 40), "b": (7, 3), "c": (6, 4, 3, 3)}


def some_masks(seed: int = 0) -> dict[str, Mask]:
    random = np.random.default_rng(seed)
    return {name: Mask.of(random.random(shape) < 0.3) for name, shape in SHAPES.items()}


def wanted(masks: dict[str, Mask], **changes: Any) -> dict[str, WantedMask]:
    found = {name: WantedMask(mask.shape, mask.count, (len(mask.shape) - 1,)) for name, mask in masks.items()}
    return found | changes


class TestFormats:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        masks, path = some_masks(), tmp_path / "masks.safetensors"
        written = write_masks(path, masks)
        assert written == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        assert read_masks(path, written, wanted(masks)) == masks
        backwards = dict(reversed(masks.items()))
        assert write_masks(tmp_path / "again.safetensors", backwards) == written
        assert path.stat().st_size < 600 + sum(mask.bits.nbytes for mask in masks.values())
        assert {file.name for file in tmp_path.iterdir()} == {"masks.safetensors", "again.safetensors"}

    @pytest.mark.parametrize("dtype", [np.bool_, np.uint8])
    def test_plain_arrays_are_read(self, tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        masks, path = some_masks(), tmp_path / "masks.safetensors"
        save_file({name: mask.alive().astype(dtype) for name, mask in masks.items()}, path)
        assert read_masks(path, None, wanted(masks)) == masks
        monkeypatch.setattr(masks_of, "CHUNK_KEYS", 64)
        assert read_masks(path, None, wanted(masks)) == masks

    def test_torchs_too(self, tmp_path: Path) -> None:
        masks, path = some_masks(), tmp_path / "masks.safetensors"
        alive = {name: torch.from_numpy(mask.alive()) for name, mask in masks.items()}
        save_torch(alive, path, metadata={"format": "pt"})
        assert read_masks(path, None, wanted(masks)) == masks

    def test_a_dense_tensors_mask_may_be_there(self, tmp_path: Path) -> None:
        masks = some_masks()
        written = write_masks(tmp_path / "m", {**masks, "dense": Mask.of(np.ones((3, 3), bool))})
        assert read_masks(tmp_path / "m", written, wanted(masks)) == masks

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(SetupError, match="can't be written"):
            write_masks(tmp_path / "none/masks.safetensors", some_masks())


class TestRefusals:
    def test_all_at_once_and_by_name(self, tmp_path: Path) -> None:
        masks, path = some_masks(), tmp_path / "masks.safetensors"
        stored = {**masks, "extra": Mask.of(np.eye(3, dtype=bool))}
        asked = wanted(
            masks,
            a=WantedMask((40, 24), masks["a"].count, (1,)),
            b=WantedMask((7, 3), masks["b"].count + 1, (1,)),
            d=WantedMask((2, 2), 1, (1,)),
        )
        with pytest.raises(InputError) as found:
            read_masks(path, write_masks(path, stored), asked)
        assert [str(problem).removeprefix(f"{path}: ") for problem in found.value.problems] == [
            "has no mask of d",
            "a: has the shape [24, 40]; the plan's is [40, 24]",
            f"b: {masks['b'].count} weights live; the plan keeps {masks['b'].count + 1}",
            "extra: has a mask here; the plan has no such sparse tensor",
        ]

    def test_another_content(self, tmp_path: Path) -> None:
        """As many live weights in the same shapes: only the hash can tell."""
        masks, path = some_masks(), tmp_path / "masks.safetensors"
        other = {name: Mask.of(mask.alive()[::-1]) for name, mask in masks.items()}
        written = write_masks(path, masks)
        write_masks(path, other)
        with pytest.raises(InputError, match=rf"is not the plan's mask file \(sha256:.*\); expected {written[:19]}"):
            read_masks(path, written, wanted(masks))
        assert read_masks(path, None, wanted(masks)) == other

    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.full((2, 4), 2, np.uint8), "a: holds the value 2; expected 0 and 1"),
            (np.ones((2, 4), np.float32), r"a: holds F32 of shape \(2, 4\); expected booleans, or bytes 0 and 1"),
            (np.ones((2, 4), np.int8), "a: holds I8"),
        ],
    )
    def test_values_that_are_not_0_and_1(self, tmp_path: Path, array: Any, message: str) -> None:
        save_file({"a": array}, tmp_path / "m")
        with pytest.raises(InputError, match=message):
            read_masks(tmp_path / "m", None, {"a": WantedMask((2, 4), 8, (1,))})

    def test_packed_bits_of_another_shape(self, tmp_path: Path) -> None:
        bits = np.array([0xF0], np.uint8)
        for shapes, message in (
            ([3, 3], "a: .* not the packed bits of shape"),
            ([2, 3], None),
            ([1, 3], "a: .*beyond"),
        ):
            save_file({"a": bits}, tmp_path / "m", metadata={"shapes": json.dumps({"a": shapes})})
            asked = {"a": WantedMask(tuple(shapes), 4, (1,))}
            if message is None:
                assert read_masks(tmp_path / "m", None, asked)["a"].count == 4
            else:
                with pytest.raises(InputError, match=message):
                    read_masks(tmp_path / "m", None, asked)

    @pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 64, None])
    def test_what_is_no_such_file(self, tmp_path: Path, content: bytes | None) -> None:
        if content is not None:
            (tmp_path / "m").write_bytes(content)
        with pytest.raises(SetupError, match=r"m: (is not an intact safetensors file|can't be read)"):
            read_masks(tmp_path / "m", None, {})

    @pytest.mark.parametrize("stated", ["[1]", "{", '{"a": "x"}', '{"b": [2, 2]}'])
    def test_metadata_that_is_none(self, tmp_path: Path, stated: str) -> None:
        save_file({"a": np.zeros(1, np.uint8)}, tmp_path / "m", metadata={"shapes": stated})
        with pytest.raises(SetupError, match="m: is not "):
            read_masks(tmp_path / "m", None, {})

    @pytest.mark.parametrize(
        ("pattern", "axes"),
        [("fixed_fan_in", (1,)), ("2:4", (1,)), ("block", (1,)), ("fixed_fan_in", (0,)), ("2:4", (0,))],
    )
    def test_a_mask_that_is_not_the_patterns(self, tmp_path: Path, pattern: str, axes: tuple[int]) -> None:
        """As many live weights as the pattern has, one of them elsewhere; and along the other axis."""
        block = 16 if pattern == "block" else None
        asked = {"w": WantedMask((32, 64), 1024, axes, pattern, block)}
        right = draw("w", asked["w"], 0.5, 0)
        assert read_masks(tmp_path / "m", write_masks(tmp_path / "m", {"w": right}), asked) == {"w": right}
        moved = right.alive()
        line = int(np.flatnonzero(moved.any(1) & ~moved.all(1))[0])
        live, dead = np.flatnonzero(moved[line])[0], np.flatnonzero(~moved[line])[-1]
        if axes == (0,) or pattern != "fixed_fan_in":
            moved[line, [live, dead]] = False, True
        else:
            moved[line, live], moved[line - 1, np.flatnonzero(~moved[line - 1])[0]] = False, True
        write_masks(tmp_path / "m", {"w": Mask.of(moved)})
        text = "blocks of 16" if block else pattern
        with pytest.raises(InputError, match=f"w: is not {text} along the fan-in, as the plan says"):
            read_masks(tmp_path / "m", None, asked)
        if pattern == "block":  # whole blocks, but not of even rows
            uneven = next(m for seed in range(9) if (m := draw("w", asked["w"], 0.5, seed)).alive()[:16].sum() != 512)
            even = {"w": WantedMask((32, 64), 1024, axes, pattern, block, even_rows=True)}
            right = draw("w", even["w"], 0.5, 0)
            assert read_masks(tmp_path / "m", write_masks(tmp_path / "m", {"w": right}), even) == {"w": right}
            write_masks(tmp_path / "m", {"w": uneven})
            with pytest.raises(InputError, match=f"w: is not {text} in even rows along the fan-in, as the plan says"):
                read_masks(tmp_path / "m", None, even)
        if pattern != "block":
            with pytest.raises(InputError, match="along the fan-in"):
                read_masks(tmp_path / "m", None, {"w": WantedMask((32, 64), 1024, (1 - axes[0],), pattern)})


class TestAPlansSource:
    def plan(self, plan_of: MakePlan, path: Path, hash: str, **sparsity: Any) -> Plan:
        plan = plan_of(target={"width": 64, "sparsity": {"density": 0.25, **sparsity}}, train={"steps": 4})
        source = MaskSource(kind="file", path=str(path), hash=hash)
        return plan.model_copy(update={"sparsity": plan.sparsity.model_copy(update={"source": source})})

    def test_training_has_the_files_masks(self, plan_of: MakePlan, tmp_path: Path) -> None:
        drawn = prepare.make_masks(plan_of(target={"width": 64, "sparsity": {"density": 0.25}}, train={"seed": 9}))
        path = tmp_path / "masks.safetensors"
        trainer = Trainer(self.plan(plan_of, path, write_masks(path, drawn)))
        trainer.step()
        assert trainer.sparse_model.masks == drawn
        for name, mask in drawn.items():
            assert np.array_equal((trainer.sparse_model.weight(name) != 0).numpy(), mask.alive())

    def test_a_file_of_the_plans_own_masks_changes_nothing(self, plan_of: MakePlan, tmp_path: Path) -> None:
        random = plan_of(target={"width": 64, "sparsity": {"density": 0.25}}, train={"steps": 4})
        path = tmp_path / "masks.safetensors"
        same = self.plan(plan_of, path, write_masks(path, prepare.make_masks(random)))
        one, other = Trainer(random), Trainer(same)
        assert [one.step() for _ in range(4)] == [other.step() for _ in range(4)]

    def test_a_file_for_another_plan_is_refused(self, plan_of: MakePlan, tmp_path: Path) -> None:
        drawn = prepare.make_masks(plan_of(target={"width": 32, "sparsity": {"density": 0.25}}))
        path = tmp_path / "masks.safetensors"
        with pytest.raises(InputError, match=r"blocks\.0\.attn\.q: has the shape \[32, 32\]; the plan's is \[64, 64\]"):
            Trainer(self.plan(plan_of, path, write_masks(path, drawn)))
        with pytest.raises(InputError, match="is not the plan's mask file"):
            Trainer(self.plan(plan_of, path, "sha256:" + 64 * "0"))

    def test_is_sought_beside_the_plans_document(
        self, plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = plan_of(train={"steps": 1})
        (tmp_path / "plans").mkdir()
        written = write_masks(tmp_path / "plans" / "masks.safetensors", prepare.draw_masks(plan))
        source = MaskSource(kind="file", path="masks.safetensors", hash=written)
        plan = plan.model_copy(update={"sparsity": plan.sparsity.model_copy(update={"source": source})})
        (tmp_path / "plans" / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
        monkeypatch.chdir(tmp_path)
        read = read_plan(Path("plans/plan.yaml"))
        assert read.sparsity.source.path == str((tmp_path / "plans" / "masks.safetensors").resolve())
        assert read.hash() == plan.hash()  # which says what is in the file, not where it lies
        supar_cli.train(read, "run")
        assert supar_cli.train(read_plan(Path("run/plan.yaml")), "run")["steps"] == 1
