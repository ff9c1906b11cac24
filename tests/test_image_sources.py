"""Sources of labelled images: each to the same pixels, and what is refused, by name."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from supar_cli.data import image_files, image_readers, images
from supar_cli.data.images import Images, Split
from supar_cli.errors import InputError, SetupError, SuparError
from supar_cli.planning.plan import Data

Pixels = NDArray[np.uint8]
HEIGHT, WIDTH = 6, 4


def drawn(count: int, classes: int = 3, channels: int = 1, seed: int = 0) -> tuple[Pixels, NDArray[np.int64]]:
    """Images (N, H, W, C) and labels (N,), as many of each class as possible, in an order of their own."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, HEIGHT, WIDTH, channels), np.uint8)
    return pixels, random.permutation(np.arange(count) % classes)


def load(path: Path | str, **keys: Any) -> Images:
    return images.load(Data(kind="images", source=str(path), **keys))


def encoded(pixels: Pixels, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, kind, **options)
    return file.getvalue()


def as_npz(path: Path, pixels: Pixels, labels: NDArray[Any], **more: Any) -> Path:
    np.savez(path / "set.npz", x=pixels, y=labels, **more)
    return path / "set.npz"


def as_idx(path: Path, pixels: Pixels, labels: NDArray[Any], split: str = "train", packed: bool = False) -> Path:
    path.mkdir(exist_ok=True)
    write = gzip.compress if packed else bytes
    suffix = ".gz" if packed else ""
    grey = pixels[..., 0]
    for name, values in ((f"{split}-images-idx3-ubyte", grey), (f"{split}-labels-idx1-ubyte", labels.astype(np.uint8))):
        head = bytes([0, 0, 8, values.ndim]) + b"".join(extent.to_bytes(4, "big") for extent in values.shape)
        (path / (name + suffix)).write_bytes(write(head + values.tobytes()))
    return path


def as_folders(path: Path, pixels: Pixels, labels: NDArray[Any], split: str = "") -> Path:
    for at, (one, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = path / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{at:04}.png").write_bytes(encoded(one))
    return path


def as_parquet(path: Path, pixels: Pixels, labels: NDArray[Any], split: str = "train", names: bool = True) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir(exist_ok=True)
    shards = np.array_split(np.arange(len(labels)), 2)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}
    for number, index in enumerate(shards):
        rows = [{"bytes": encoded(pixels[at]), "path": None} for at in index]
        table = pa.table({"image": rows, "label": [int(labels[at]) for at in index]})
        known = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
        pq.write_table(table.replace_schema_metadata(known), path / f"{split}-{number:05}-of-00002.parquet")
    return path


SOURCES: dict[str, Callable[[Path, Pixels, NDArray[Any]], Path]] = {
    "npz": as_npz,
    "idx": as_idx,
    "folders": as_folders,
    "parquet": as_parquet,
}


def contents(split: Split) -> list[tuple[int, bytes]]:
    """Label and pixels of every image, sorted."""
    return sorted(
        (int(label), one.tobytes()) for label, one in zip(split.labels, split.pixels(slice(None)), strict=True)
    )


def expected(pixels: Pixels, labels: NDArray[Any]) -> list[tuple[int, bytes]]:
    return sorted((int(label), one.transpose(2, 0, 1).tobytes()) for label, one in zip(labels, pixels, strict=True))


class TestSources:
    @pytest.mark.parametrize(("kind", "channels"), [*((kind, 1) for kind in SOURCES), ("npz", 3), ("folders", 3)])
    def test_every_source_holds_the_same_images(self, kind: str, channels: int, tmp_path: Path) -> None:
        pixels, labels = drawn(60, channels=channels)
        found = load(SOURCES[kind](tmp_path, pixels, labels))
        assert sorted(contents(found.train) + contents(found.held_out)) == expected(pixels, labels)
        assert sorted(found.held_out.labels.tolist()) == [0, 0, 1, 1, 2, 2]
        assert found.shape == (channels, HEIGHT, WIDTH) and len(found.classes) == 3
        pixels[7, 0, 0] ^= 1  # the control
        assert sorted(contents(found.train) + contents(found.held_out)) != expected(pixels, labels)

    def test_a_validation_split_is_held_out_and_a_test_split_is_never_read(self, tmp_path: Path) -> None:
        (pixels, labels), (others, other_labels) = drawn(30), drawn(9, seed=1)
        as_npz(tmp_path, pixels, labels, x_val=others, y_val=other_labels, x_test=others[:3], y_test=other_labels[:3])
        for kind in ("idx", "folders", "parquet"):
            for split, part in (("train", slice(None)), ("val", slice(9)), ("test", slice(3))):
                chosen = (pixels, labels) if split == "train" else (others[part], other_labels[part])
                {"idx": as_idx, "folders": as_folders, "parquet": as_parquet}[kind](tmp_path / kind, *chosen, split)
        for source in ("set.npz", "idx", "folders", "parquet"):
            found = load(tmp_path / source)
            assert contents(found.train) == expected(pixels, labels), source
            assert contents(found.held_out) == expected(others, other_labels)
            assert any("the test split (it is never trained on)" in line for line in found.lines)

    def test_class_names_are_those_of_folders_and_of_the_hub(self, tmp_path: Path) -> None:
        pixels, labels = drawn(30)
        assert load(as_folders(tmp_path / "f", pixels, labels)).classes == ["class0", "class1", "class2"]
        assert load(as_parquet(tmp_path / "p", pixels, labels)).classes == ["a", "b", "c"]
        assert load(as_parquet(tmp_path / "q", pixels, labels, names=False)).classes == ["0", "1", "2"]

    def test_what_is_no_data_is_left_out_and_said(self, tmp_path: Path) -> None:
        as_folders(tmp_path, *drawn(30), "train")
        for name in (
            "README.md",
            "train/class0/.DS_Store",
            "train/class0/Thumbs.db",
            "train/class1/LICENSE",
            "notes.csv",
        ):
            (tmp_path / name).write_text("about")
        (tmp_path / "__pycache__").mkdir()
        said = "\n".join(load(tmp_path).lines)
        assert all(Path(name).name in said for name in ("README.md", ".DS_Store", "Thumbs.db", "LICENSE", "notes.csv"))

    def test_digits_are_there(self) -> None:
        found = load("digits")
        assert (len(found.train), len(found.held_out), found.shape) == (1621, 176, (1, 8, 8))
        assert found.train.pixels(slice(None)).max() == 255 and found.train.pixels(slice(None)).min() == 0


class TestPictures:
    """What Pillow reads, as a user sees it: upright, in 8 bits, without hidden colours."""

    def read(self, content: bytes, **keys: Any) -> Pixels:
        grey = image_readers._header("x", content).is_grey
        size = keys.get("size") or image_readers._header("x", content)[:2]
        return image_readers._decode("x", content, size, grey)

    def test_a_turned_photograph_stands_upright(self) -> None:
        pixels, _ = drawn(1, channels=3)
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        found = self.read(encoded(pixels[0], exif=exif))
        assert found.shape == (3, WIDTH, HEIGHT)
        assert np.array_equal(found.transpose(1, 2, 0), np.rot90(pixels[0], -1))

    def test_palettes_bilevel_and_opaque_images_keep_their_colours(self) -> None:
        pixels, _ = drawn(1, channels=3)
        picture = Image.fromarray(pixels[0])
        for mode, channels in (("P", 3), ("RGBA", 3), ("L", 1), ("LA", 1), ("1", 1)):
            file, made = io.BytesIO(), picture.convert("L").convert(mode) if channels == 1 else picture.convert(mode)
            made.save(file, "PNG")
            wanted = np.asarray(made.convert("L" if channels == 1 else "RGB")).reshape(HEIGHT, WIDTH, channels)
            assert np.array_equal(self.read(file.getvalue()), wanted.transpose(2, 0, 1)), mode

    def test_grey_among_colours_is_read_in_three_channels(self, tmp_path: Path) -> None:
        pixels, labels = drawn(20, classes=2, channels=3)
        grey, own = drawn(20, classes=2)
        as_folders(tmp_path, pixels, labels, "train")
        as_folders(tmp_path, grey, own, "val")
        assert contents(load(tmp_path).held_out) == expected(np.repeat(grey, 3, 3), own)

    @pytest.mark.parametrize(
        ("made", "what"),
        [
            (lambda: encoded(np.full((4, 4, 4), 128, np.uint8)), "has transparent pixels"),
            (lambda: animated(), "is animated or has 2 pages"),
            (lambda: deep(), "has 16 bits or more a channel"),
            (lambda: b"<!DOCTYPE html><html></html>", "is text; expected a PNG"),
            (lambda: b"%PDF-1.7 ...", "is a PDF"),
            (lambda: b"", "is empty"),
        ],
    )
    def test_what_has_no_one_meaning_is_refused(self, made: Callable[[], bytes], what: str) -> None:
        with pytest.raises(InputError, match=f"^x: {what}"):
            self.read(made())

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
    def test_every_cut_file_is_named(self, kind: str) -> None:
        content = encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), kind)
        assert self.read(content).shape == (3, 32, 32)
        for share in (0.3, 0.6, 0.9):
            with pytest.raises(SuparError, match=r"^x: "):
                self.read(content[: int(share * len(content))])


def animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def deep() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(file, "PNG")
    return file.getvalue()


class TestRefused:
    """Every mistake by the name of its file, and what is expected."""

    def test_arrays(self, tmp_path: Path) -> None:
        pixels, labels = drawn(30)
        for more, what in (
            ({"x": pixels / 255}, "x: holds float64 .* expected uint8"),
            ({"x": pixels[:, :, :, [0, 0]]}, r"x: holds uint8 of the shape .*with 1 or 3 channels"),
            ({"x": np.zeros((30, 3, 5, 1), np.uint8)}, r"x: holds uint8 of the shape .*with 1 or 3 channels"),
            ({"y": labels[:29]}, "30 images, yet y holds 29 labels; expected as many"),
            ({"y": labels / 2}, "y: holds float64 .*expected an integer for each image"),
            ({"y": np.eye(3)[labels]}, "y: holds float64 of the shape .*expected an integer"),
            ({"y": labels - 1}, "the label -1 is of no class"),
            ({"y": labels * 10**9}, "the label 2000000000 of 30 images; expected 0, 1"),
            ({"x": pixels[:0], "y": labels[:0]}, "no image is held out"),
            ({"y": labels * 2}, "no training image of the class 1, 3; expected one or more of each"),
            ({"x_val": pixels, "y_val": labels + 5}, "x_val: the label [567] is of no class"),
            (
                {"x_val": pixels[:, 1:], "y_val": labels},
                "x_val: channels 1, height 5, width 4; expected channels 1, height 6",
            ),
            ({"y": labels.astype(object)}, "holds Python objects; expected arrays"),
        ):
            source = tmp_path / "set.npz"
            np.savez(source, **{"x": pixels, "y": labels, **more})
            with pytest.raises(SuparError, match=f"^{source}: .*{what}|^{source}: {what}"):
                load(source)
        np.savez(tmp_path / "other.npz", images=pixels)
        with pytest.raises(InputError, match=r"other\.npz: holds images\.npy; expected the arrays x and y"):
            load(tmp_path / "other.npz")

    def test_files_that_are_others_than_their_names_say(self, tmp_path: Path) -> None:
        (tmp_path / "set.npz").write_text("x,y\n1,2\n")
        with pytest.raises(InputError, match=r"set\.npz: is text; expected digits, a folder of classes"):
            load(tmp_path / "set.npz")
        folder = as_folders(tmp_path / "folders", *drawn(30))
        (folder / "class1" / "page.png").write_text("<!DOCTYPE html>")
        with pytest.raises(InputError, match=r"class1/page\.png: is text; expected a PNG"):
            load(folder)
        with pytest.raises(InputError, match=r"no-such: no such file or folder"):
            load(tmp_path / "no-such")
        table = as_parquet(tmp_path / "table", *drawn(30))
        (table / "train-00001-of-00002.parquet").write_text("{}")
        with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet: is text; expected Parquet"):
            load(table)
        idx = as_idx(tmp_path / "idx", *drawn(30))
        (idx / "train-labels-idx1-ubyte").write_bytes((idx / "train-images-idx3-ubyte").read_bytes())
        with pytest.raises(
            InputError, match=r"train-labels-idx1-ubyte: is an idx file of images; expected .* of labels"
        ):
            load(idx)
        (idx / "train-labels-idx1-ubyte").unlink()
        with pytest.raises(InputError, match=r"the train split has no labels; expected an idx file of each"):
            load(idx)

    @pytest.mark.parametrize("kind", ["npz", "idx", "parquet", "folders"])
    def test_a_cut_file_is_named(self, kind: str, tmp_path: Path) -> None:
        source = SOURCES[kind](tmp_path / "s" if kind != "npz" else tmp_path, *drawn(30))
        assert len(load(source).train) == 27
        file = source if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(SetupError, match=f"^{file}: is damaged: .*; expected it whole"):
            load(source)

    def test_folders(self, tmp_path: Path) -> None:
        pixels, labels = drawn(30)
        folder = as_folders(tmp_path, pixels, labels, "train")
        as_folders(tmp_path, pixels[:4], labels[:4] + 7, "val")
        with pytest.raises(InputError, match=r"val/class\d/\d+\.png: the class class\d is not one that is trained on"):
            load(folder)
        (tmp_path / "val").rename(tmp_path / "other")
        assert "in the folder of no split" in "\n".join(load(folder).lines)
        (tmp_path / "train" / "class9").mkdir()
        with pytest.raises(InputError, match=r"train/class9: no image of this class"):
            load(folder)
        (tmp_path / "train" / "class9" / "one.png").write_bytes(encoded(pixels[0][:3]))
        with pytest.raises(InputError, match=r"^data\.size: .*one\.png is 3 × 4 pixels, .* is 6 × 4; expected"):
            load(folder)
        with pytest.raises(InputError, match=r"no training image of the class class9"):  # its only one is held out
            load(folder, size=[5, 5])
        (tmp_path / "train").rename(tmp_path / "test")
        with pytest.raises(InputError, match=r"no training split \(test\)"):
            load(folder)

    def test_columns(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pixels, labels = drawn(20, classes=2)
        rows = [{"bytes": encoded(one), "path": "x"} for one in pixels]
        path, numbers = tmp_path / "t.parquet", labels.tolist()
        pq.write_table(pa.table({"picture": rows, "fine": numbers, "coarse": [0, 1] * 10}), path)
        with pytest.raises(
            InputError, match=r"^data\.label: .*2 columns may hold it; expected one of these: fine, coarse"
        ):
            load(path)
        assert load(path, label="coarse").train.labels.sum() == 9
        with pytest.raises(InputError, match=r"^data\.image: .*no column fine; expected one of these: picture"):
            load(path, label="fine", image="fine")
        rows[3]["bytes"] = None
        pq.write_table(pa.table({"picture": rows, "fine": numbers}), path)
        with pytest.raises(InputError, match=r"t\.parquet: row 3: no image; expected the bytes"):
            load(path)
        with pytest.raises(InputError, match=r"^data\.image: is a column of Parquet files, not of npz"):
            load(as_npz(tmp_path, pixels, labels), image="x")

    @pytest.mark.parametrize(("kind", "package"), [("folders", "PIL"), ("parquet", "pyarrow"), ("parquet", "PIL")])
    def test_missing_packages(self, kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = SOURCES[kind](tmp_path / "s", *drawn(9))
        monkeypatch.setitem(sys.modules, package, None)
        name = {"PIL": "pillow"}.get(package, package)
        with pytest.raises(SetupError, match=f"pip install {name}$"):
            load(source)

    def test_more_pixels_than_memory(self) -> None:
        with pytest.raises(SetupError, match=r"out of memory: ten images need 1024\.0 GiB"):
            image_readers.require_memory(2**40, "ten images")


def hashes(source: Path, **keys: Any) -> str | None:
    return image_files.identify(Data(kind="images", source=str(source), **keys)).hash
