"""Labelled images in training: their hash, batches by (seed, step), normalisation, evaluations, what commands say."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from supar_cli.data import image_files, image_readers
from supar_cli.data.images import Images, Split
from supar_cli.errors import InputError
from supar_cli.planning.plan import Data, Plan
from supar_cli.training import tasks
from supar_cli.training.distributed import Ranks
from supar_cli.training.trainer import Trainer
from tests.plans import plan_from

from .test_cli import Supar
from .test_image_sources import HEIGHT, WIDTH, Pixels, as_folders, as_idx, as_npz, drawn, encoded, hashes, load

# of the first edition: where it changes, runs of older plans are others
DIGEST = "adaf3b67f11e96634ac4650ff0f4ac52a6618f9267db2a6ffccedcbef9980edf"


class TestHash:
    def test_a_test_split_is_read_only_to_score(self, tmp_path: Path) -> None:
        pixels, labels = drawn(40)
        as_idx(tmp_path, pixels[:30], labels[:30], packed=True)
        as_idx(tmp_path, pixels[30:], labels[30:], "t10k", packed=True)
        found, data = load(tmp_path), Data(kind="images", source=str(tmp_path))
        assert len(found.train) + len(found.held_out) == 30 and "the last tenth of each class" in found.lines[0]
        ((scored, own, _),), _ = image_readers.read(files := image_files.find(data, to_score=True), data, print)
        assert (scored[:, 0] == pixels[30:, :, :, 0]).all() and (own == labels[30:]).all()
        before = image_files.identify(data, files).hash
        as_idx(tmp_path, pixels[30:], labels[30:][::-1], "t10k", packed=True)
        assert before not in (found.hash, image_files.identify(data, files).hash) and load(tmp_path).hash == found.hash

    def test_a_file_called_as_a_test_split_is_said_to_be_one(self, tmp_path: Path) -> None:
        for name, end in (("test", "by its name test.npz is a test split"), ("set", "the last tenth of each class")):
            file = as_npz(tmp_path, *drawn(30)).rename(tmp_path / f"{name}.npz")
            assert load(file).lines[0].endswith(end)

    def test_it_covers_pixels_labels_and_how_they_are_read(self, tmp_path: Path) -> None:
        pixels, labels = drawn(30)
        found = [hashes(as_npz(tmp_path, pixels, labels))]
        for change in ("pixel", "label", None):
            pixels[3, 2, 1] += change == "pixel"
            labels[4] = (labels[4] + (change == "label")) % 3
            found.append(hashes(as_npz(tmp_path, pixels, labels)))
        assert len(set(found[:3])) == 3 and found[2] == found[3]
        assert hashes(tmp_path / "set.npz", size=[3, 3]) not in found
        assert hashes(tmp_path / "set.npz", flip=True, shift=2) == found[3]  # a plan has them itself
        with pytest.raises(InputError, match=r"^data\.hash: .* is not the data this document was made with"):
            load(tmp_path / "set.npz", hash=found[0])

    def test_another_folder_is_another_label_and_a_test_split_counts_for_nothing(self, tmp_path: Path) -> None:
        folder = as_folders(tmp_path, *drawn(30), "train")
        before = hashes(folder)
        as_folders(tmp_path, *drawn(6, seed=2), "test")
        assert hashes(folder) == before
        one = next((folder / "train" / "class0").iterdir())
        one.rename(folder / "train" / "class1" / one.name)
        assert hashes(folder) != before


def numbered(count: int, flip: bool = False, shift: int = 0, edge: int = 5) -> Images:
    """Images of which each is all its number + 1, with a mark at its upper left; none is held out but the first seven."""
    pixels = np.broadcast_to(
        np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None], (count, 1, edge, edge)
    ).copy()
    labels = np.arange(count)
    return Images(
        Split(pixels, labels, labels), Split(pixels, labels, labels[:7]), [*map(str, labels)], "sha256:0", flip, shift
    )


def labels_of(found: Images, seed: int, steps: range, rows: int) -> list[int]:
    return list(chain.from_iterable(found.batch(seed, step, rows)[1].tolist() for step in steps))


def is_once_an_epoch(labels: list[int], count: int) -> bool:
    epochs = [labels[start : start + count] for start in range(0, len(labels), count)]
    return all(sorted(epoch) == list(range(count)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1


class TestBatches:
    @pytest.mark.parametrize("count", [5, 12, 31])
    @pytest.mark.parametrize("rows", [1, 4, 12, 70])
    def test_every_image_is_seen_once_an_epoch(self, count: int, rows: int) -> None:
        """Also where a batch crosses epochs, or holds several."""
        steps = range(count * math.ceil(5 * 70 / count) // rows + 1)
        labels = labels_of(numbered(count), 3, steps, rows)
        assert is_once_an_epoch(labels[: 5 * count], count)
        assert labels != labels_of(numbered(count), 4, steps, rows)

    def test_draws_with_replacement_would_be_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def with_replacement(self: Images) -> Any:
            return lambda seed, epoch: np.random.default_rng((seed, epoch)).integers(
                0, len(self.train), len(self.train)
            )

        monkeypatch.setattr(Images, "_order", property(with_replacement))
        assert not is_once_an_epoch(labels_of(numbered(12), 3, range(15), 4), 12)

    @pytest.mark.parametrize("size", [2, 3, 4])
    def test_shares_of_ranks_are_parts_of_one_batch(self, size: int) -> None:
        found, rows = numbered(31, flip=True, shift=2), 12
        for step in (0, 2, 7):
            whole = found.batch(5, step, rows)
            own = rows // size
            parts = [found.batch(5, step, rows, slice(rank * own, (rank + 1) * own)) for rank in range(size)]
            assert all(
                torch.equal(torch.cat(part), one) for part, one in zip(zip(*parts, strict=True), whole, strict=True)
            )

    def test_a_global_generator_would_be_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        augment = Images._augment

        def globally(self: Images, pixels: Pixels, draws: Any) -> Pixels:
            return augment(self, pixels, np.random.default_rng().integers(0, 2**63, len(draws)).astype(np.uint64))

        monkeypatch.setattr(Images, "_augment", globally)
        with pytest.raises(AssertionError):
            self.test_shares_of_ranks_are_parts_of_one_batch(2)

    def test_another_process_makes_the_same_batches(self) -> None:
        program = (
            "import hashlib, sys; from supar_cli.data.images import load; from supar_cli.planning.plan import Data\n"
            "found = load(Data(kind='images', flip=True, shift=1))\n"
            "total = hashlib.sha256()\n"
            "for step in (0, 20, 500):\n    [total.update(t.numpy().tobytes()) for t in found.batch(9, step, 96)]\n"
            "print(total.hexdigest())"
        )
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == DIGEST

    def test_mirrored_and_moved_images(self) -> None:
        """Each as its draw says, the pixels from outside black; about half mirrored, all moves alike often."""
        pixels, _ = drawn(1)
        found = replace(
            numbered(1, flip=True, shift=2),
            train=Split(pixels.transpose(0, 3, 1, 2), np.zeros(1, int), np.zeros(1, int)),
        )
        raw = found.train.pixels(slice(None))[0, 0]
        seen: Counter[tuple[bool, int, int]] = Counter()
        known = {}
        for flip in (False, True):
            for down in range(5):
                for across in range(5):
                    wide = np.pad(raw[:, ::-1] if flip else raw, 2)
                    known[wide[down : down + HEIGHT, across : across + WIDTH].tobytes()] = (flip, down, across)
        assert len(known) == 50
        draws = np.random.default_rng(0).integers(0, 2**64, 5000, np.uint64)
        for one in found._augment(np.repeat(found.train.pixels(slice(None)), 5000, 0), draws):
            seen[known[one[0].tobytes()]] += 1
        assert len(seen) == 50 and min(seen.values()) > 50 and max(seen.values()) < 160  # 100 each, 10 about it
        mean, _ = found.scale
        black = -mean[0] / found.scale[1][0]
        batch, _ = found.batch(0, 0, 64)
        assert float(batch.min()) >= black - 1e-5 and any(float(one[0, 0, 0]) == pytest.approx(black) for one in batch)

    def test_evaluations_are_never_augmented(self) -> None:
        plain, augmented = numbered(31), numbered(31, flip=True, shift=2)
        assert all(
            torch.equal(a, b) for a, b in zip(plain.evaluation(0, 7, 7), augmented.evaluation(0, 7, 7), strict=True)
        )
        assert not torch.equal(plain.batch(0, 0, 31)[0], augmented.batch(0, 0, 31)[0])


class TestNormalised:
    def test_training_images_have_mean_0_and_variance_1_in_each_channel(self, tmp_path: Path) -> None:
        pixels, labels = drawn(200, channels=3)
        pixels[..., 1] //= 4
        pixels[..., 2] = 77
        found = load(as_npz(tmp_path, pixels, labels))
        batch = found.batch(0, 0, len(found.train))[0].double().numpy()
        assert batch.mean((0, 2, 3)) == pytest.approx([0, 0, 0], abs=1e-6)
        assert batch.std((0, 2, 3)) == pytest.approx([1, 1, 0], abs=1e-6)  # the last is constant
        own = found.train.pixels(slice(None)) / 255
        assert found.described["mean"] == pytest.approx(own.mean((0, 2, 3)))
        assert found.described["std"] == pytest.approx(own.std((0, 2, 3)))


FIELDS: dict[str, Any] = {
    "kind": "supar.proxy/v1",
    "model": {
        "family": "vit",
        "width": 8,
        "layers": 1,
        "heads": 2,
        "image": [8, 8],
        "channels": 1,
        "patch": 4,
        "classes": 10,
    },
    "hyperparameters": {"lr": 0.01, "init_std": 0.1, "alpha_input": 1.0, "alpha_output": 1.0, "weight_decay": 0.1},
    "train": {"steps": 4, "batch_size": 8, "eval_every": 2, "eval_batches": 3},
    "target": {"sparsity": {"density": 0.5}},
    "run": {"device": "cpu"},
}


def vit_plan(**changes: dict[str, Any]) -> Plan:
    return plan_from({**FIELDS, **{name: {**FIELDS.get(name, {}), **own} for name, own in changes.items()}})


class TestEvaluations:
    @pytest.mark.parametrize(
        ("size", "batches", "rows"), [(8, 1, 8), (9, 3, 27), (8, 22, 176), (9, 20, 176), (9, 500, 176)]
    )
    def test_every_held_out_image_once_or_evenly_spaced_ones(self, size: int, batches: int, rows: int) -> None:
        trainer = Trainer(vit_plan(train={"batch_size": size, "eval_batches": batches}))
        task, found = trainer.task, load("digits")
        assert task.scored_rows == rows and task.held_out_rows % size == 0
        count = task.held_out_rows // size
        seen = torch.cat([task.held_out(at, count, size)[0] for at in range(count)])[:rows]
        known = found._normalise(found.held_out.pixels(slice(None)))
        wanted = known if rows == 176 else known[torch.arange(rows) * 176 // rows]
        assert torch.equal(seen, wanted)
        record = trainer.evaluate()
        with torch.no_grad():
            values = task.evaluate(
                trainer.model,
                (seen, torch.cat([task.held_out(at, count, size)[1] for at in range(count)])[:rows]),
                None,
            )
        assert record["validation_loss"] == pytest.approx(float(values["validation_loss"].mean()), rel=1e-6)
        assert record["validation_loss_se"] == pytest.approx(
            float(values["validation_loss"].std(correction=0)) / rows**0.5, rel=1e-5
        )
        share = record["accuracy"]
        assert share == pytest.approx(float(values["accuracy"].mean())) and (rows < 100 or 0 < share < 1)
        assert record["accuracy_se"] == pytest.approx(math.sqrt(share * (1 - share) / rows), rel=1e-5)

    def test_ranks_together_score_what_one_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each rank's own sums, added up by hand; as many passes in each."""
        trainer = Trainer(vit_plan(train={"eval_batches": 500}))
        whole, make = trainer.evaluate(), tasks.Classification.held_out
        made, sums = list[int](), list[float]()

        def held_out(self: tasks.Classification, index: int, count: int, rows: int) -> tasks.Batch:
            made.append(index)
            return make(self, index, count, rows)

        monkeypatch.setattr(tasks.Classification, "held_out", held_out)
        monkeypatch.setattr(Ranks, "sum", lambda self, value: (sums.append(float(value)), value)[1])
        for rank in range(2):
            monkeypatch.setattr(trainer.parallel, "ranks", Ranks(rank, 2))
            tasks.evaluate(trainer.task, trainer.parallel, trainer.runtime)
        assert made == [*range(0, 22, 2), *range(1, 22, 2)]
        loss, _, accuracy, _ = np.reshape(sums, (2, 4)).sum(0)  # each with its squares, which need the whole mean
        assert (loss, accuracy) == pytest.approx((whole["validation_loss"], whole["accuracy"]), rel=1e-6)

    def test_the_result_and_its_views_say_accuracy_and_normalisation(self, supar_here: Supar, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text(json.dumps(vit_plan().model_dump()))
        ran = supar_here("train", str(tmp_path / "plan.json"), "-o", str(tmp_path / "run"))
        assert ran.status == 0 and "accuracy 0." in ran.err and "normalised by mean 0.3036" in ran.err
        result = json.loads((tmp_path / "run/result.json").read_text())
        assert 0 <= result["accuracy_se"] < 0.2 and result["environment"]["images"]["mean"] == [
            pytest.approx(0.30359, abs=1e-5)
        ]
        assert "accuracy" in supar_here("runs", str(tmp_path)).err
        shown = f", {result['accuracy']:.4f} ± {result['accuracy_se']:.4f} at 4\n"
        assert shown in supar_here("show", str(tmp_path / "run")).err


class TestDocuments:
    def test_images_that_the_model_does_not_read_are_refused_by_its_keys(self, tmp_path: Path) -> None:
        source = as_npz(tmp_path, *drawn(60, channels=3))
        with pytest.raises(InputError) as found:
            tasks.load(vit_plan(data={"kind": "images", "source": str(source), "shift": 4}))
        assert [str(problem) for problem in found.value.problems] == [
            f"model.image: [8, 8], yet {source} has [6, 4]; expected [6, 4] (or data.size: [8, 8])",
            f"model.channels: 1, yet {source} has 3; expected 3",
            f"model.classes: 10, yet {source} has 3; expected 3",
            "data.shift: 4 moves images of [6, 4] out of sight; expected less than 4",
        ]

    def test_the_command_says_what_to_write(self, supar_here: Supar, tmp_path: Path) -> None:
        source = as_npz(tmp_path, *drawn(60, channels=3))
        ran = supar_here("data", "images", str(source), "--size", "4,4", "--json")
        told = json.loads(ran.out)
        assert told["model"] == {"image": [4, 4], "channels": 3, "classes": 3}
        assert told["data"] == {
            "kind": "images",
            "source": str(source),
            "size": [4, 4],
            "hash": hashes(source, size=[4, 4]),
        }
        assert told["classes"] == {name: [18, 2] for name in "012"} and len(told["mean"]) == 3
        refused = supar_here("data", "images", str(tmp_path / "none"))
        assert refused.status == 2 and refused.err.startswith("error: ") and "no such file or folder" in refused.err

    def test_text_for_images_and_images_for_text_are_named(self, supar_here: Supar, tmp_path: Path) -> None:
        (tmp_path / "text.txt").write_text("words " * 100)
        (tmp_path / "proxy.yaml").write_text(json.dumps(FIELDS))
        ran = supar_here("transfer", str(tmp_path / "proxy.yaml"), "--data", str(tmp_path / "text.txt"))
        assert ran.status == 2 and "text.txt: is text; expected digits, a folder of classes" in ran.err
        ran = supar_here("transfer", str(tmp_path / "proxy.yaml"), "-s", "data.kind=tokens")
        assert ran.status == 2 and "data.kind=tokens: tokens; expected images, which the family vit reads" in ran.err
        (tmp_path / "one.png").write_bytes(encoded(drawn(1)[0][0]))
        ran = supar_here("data", "inspect", str(tmp_path / "one.png"))
        assert ran.status == 2 and "is a PNG image; expected text, or data.kind: images" in ran.err

    def test_one_class_and_several_sizes_are_refused(self, supar_here: Supar, tmp_path: Path) -> None:
        pixels, labels = drawn(30)
        source = as_folders(tmp_path / "one", pixels, 0 * labels)
        ran = supar_here("data", "images", str(source))
        assert ran.status == 2 and "all of one class, class0; expected two classes or more" in ran.err
        (source / "class1").mkdir()
        (source / "class1/x.png").write_bytes(encoded(pixels[0, :-1]))
        ran = supar_here("data", "images", str(source))
        assert ran.status == 2 and "--size none, yet " in ran.err and "expected a height and a width" in ran.err
