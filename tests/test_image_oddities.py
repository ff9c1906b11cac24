"""Sets of images as they come: what would be read wrong without a word, or end in a traceback, is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from supar_cli.errors import InputError

from .test_image_sources import as_folders, as_idx, as_npz, as_parquet, drawn, encoded, load


class TestOddSources:
    def test_files_of_a_table_agree(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pixels, labels = drawn(30)
        folder = as_parquet(tmp_path / "set", pixels, labels)
        as_parquet(folder, pixels, labels, "validation")
        assert load(folder).classes == ["a", "b", "c"]
        path = folder / "validation-00001-of-00002.parquet"
        table = pq.read_table(path)
        for values in (pa.array(np.arange(15) / 15), pa.array([str(number % 3) for number in range(15)])):
            pq.write_table(table.set_column(1, "label", values), path)
            with pytest.raises(InputError, match=f"^{path}: label: holds .*; expected integers, as other files hold"):
                load(folder)
        pq.write_table(table.set_column(1, "label", pa.array([2**64 - 1] * 15, pa.uint64())), path)
        with pytest.raises(InputError, match=f"^{path}: row 0: the label 18446744073709551615"):
            load(folder)
        names = {key: value.replace(b'"a", "b"', b'"b", "a"') for key, value in table.schema.metadata.items()}
        pq.write_table(table.replace_schema_metadata(names), path)
        with pytest.raises(InputError, match=f"^{path}: the class b is where the first file has a"):
            load(folder)

    def test_folders_and_files(self, tmp_path: Path) -> None:
        pixels, labels = drawn(30)
        folder = as_folders(tmp_path / "set", pixels, labels, "train_set")
        as_folders(folder, pixels, labels, "test_set")
        with pytest.raises(InputError, match="test_set, train_set look like splits; expected them called train"):
            load(folder)
        folder = as_folders(tmp_path / "other", pixels, labels)
        name = os.fsdecode(b"\xff")
        (folder / "class0" / f"{name}.png").write_bytes(encoded(pixels[0]))
        assert len(load(folder).train) == 28
        deep = folder / "class0" / "deep.ppm"
        deep.write_bytes(b"P6 4 6 65535 " + bytes(144))
        with pytest.raises(InputError, match=f"^{deep}: has 16 bits or more"):
            load(folder)
        deep.unlink()
        (folder / "class0").rename(folder / name)
        with pytest.raises(InputError, match=r"the name of this class is not in UTF-8"):
            load(folder)
        with pytest.raises(InputError, match=r"expected the folder that holds those of images and of labels"):
            load(as_idx(tmp_path / "idx", pixels, labels) / "train-images-idx3-ubyte")
        with pytest.raises(InputError, match=r"images of \(1, 0, 4\); expected channels and pixels"):
            load(as_npz(tmp_path, pixels[:, :0], labels))

    def test_a_label_far_from_the_others_is_no_class(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the label 7 of 3 images"):
            load(as_npz(tmp_path, drawn(3)[0], np.array([7, 7, 2])))

    def test_arrays_that_say_a_split_twice_or_by_half(self, tmp_path: Path) -> None:
        pixels, labels = drawn(12)
        arrays = {"x": pixels, "y": labels, "x_val": pixels[:4], "y_val": labels[:4]}
        for others, what in (
            ({"x_train": pixels}, "x and x_train are both"),
            ({"x_test": pixels}, "x_test is there alone"),
        ):
            np.savez(tmp_path / "set.npz", **arrays, **others)
            with pytest.raises(InputError, match=what):
                load(tmp_path / "set.npz")
        np.savez(tmp_path / "set.npz", **arrays, meta=labels)
        assert len(load(tmp_path / "set.npz").held_out) == 4

    def test_one_class_alone(self, tmp_path: Path) -> None:
        """As of images/train and images/val, one folder too many."""
        with pytest.raises(InputError, match="all of one class, 0; expected two classes or more"):
            load(as_npz(tmp_path, drawn(3)[0], np.zeros(3, int)))
