"""Vision transformers taken away: Hugging Face's class and image processor against supar's own model; planted faults; scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import supar_cli
from supar_cli.errors import CheckViolated, InputError
from supar_cli.exporting import comparison, evaluate_images, export
from supar_cli.exporting.stock_models import StockClass
from supar_cli.exporting.stored_model import open_model, open_run
from supar_cli.models.vit import VisionTransformer
from supar_cli.planning.plan import Plan, PlanViT
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy
from supar_cli.planning.transfer import transfer
from supar_cli.training.prepare import prepare
from tests.plans import proxy_fields
from tests.test_export import assert_comes_back, factor_of, hf, swapped, values_of, write_run

CLASSES = ("ant", "bee", "cow")
DIGITS = {"image": [8, 8], "channels": 1, "patch": 2}
WIDE = {"image": [8, 12], "channels": 3, "patch": 4, "activation": "gelu_tanh", "norm_eps": 0.01}
COMPLETE = {"depth_rule": "completep"}
# the model section, the rules and the density
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "digits": (DIGITS, {}, 0.25),
    "three channels, not square, tanh, depth rule": (WIDE, COMPLETE, 0.25),
    "no biases, one head, dense": ({**DIGITS, "patch": 4, "bias": False, "heads": 1, "ffn_width": 48}, COMPLETE, 1.0),
}
DEFAULT = "three channels, not square, tanh, depth rule"
Runs = Callable[..., Path]


def proxy_of(model: dict[str, Any], rules: dict[str, Any] | None = None, density: float = 0.25) -> dict[str, Any]:
    return {
        "kind": "supar.proxy/v1",
        "model": {"family": "vit", "width": 16, "layers": 1, "heads": 2, "classes": len(CLASSES), **model},
        "hyperparameters": {"lr": 0.01, "init_std": 0.2, "alpha_input": 3.3, "alpha_output": 1.7, "weight_decay": 0.1},
        "parameterization": rules or {},
        "train": {"steps": 12, "batch_size": 4, "eval_every": 6, "eval_batches": 2},
        "target": {"width": 32, "layers": 2, "sparsity": {"density": density}},
        "run": {"device": "cpu"},
    }


def write_images(folder: Path, model: dict[str, Any], classes: tuple[str, ...] = CLASSES) -> Path:
    """A folder of a few images for each split and class, each channel of its own brightness."""
    draw, channels = np.random.default_rng(len(classes)), model["channels"]
    for place in (folder / split / name for split in ("train", "val") for name in classes):
        place.mkdir(parents=True)
        for number in range(3):
            pixels = draw.integers(256, size=(*model["image"], channels)) * (1 + np.arange(channels)) // channels
            Image.fromarray(pixels.astype(np.uint8).squeeze()).save(place / f"{number}.png")
    return folder


def pictures(folder: Path) -> list[tuple[Any, str]]:
    """The images of a folder, and their classes."""
    return [(Image.open(path), path.parent.name) for path in sorted(folder.glob("*/*.png"))]


def normalised(found: list[tuple[Any, str]], train: list[tuple[Any, str]]) -> Tensor:
    """Images (N, C, H, W), each channel scaled by its mean and deviation over the training images."""
    values, of_train = (np.stack([np.atleast_3d(image) for image, _ in one]) / 255 for one in (found, train))
    scaled = (values - of_train.mean((0, 1, 2))) / of_train.std((0, 1, 2))
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))


@pytest.fixture
def run_of(tmp_path: Path) -> Runs:
    """`run_of(model, rules, density)`: a run as if trained on the images in a folder beside it."""

    def make(model: dict[str, Any], rules: dict[str, Any] | None = None, density: float = 0.25) -> Path:
        data = {"data": {"kind": "images", "source": str(write_images(tmp_path / "images", model))}}
        return write_run(plan_of(proxy_of(model, rules, density) | data), tmp_path / "run")

    return make


def plan_of(fields: dict[str, Any]) -> Plan:
    proxy = validate(Proxy, fields, "proxy")
    return transfer(proxy, proxy.target.override(), allow_low_wpn=True)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_class_computes_the_runs_logits_from_raw_pixels(case: str, run_of: Runs, tmp_path: Path) -> None:
    """The folder's own processor scales them; with a deviation a tenth too large the logits are others."""
    model, rules, density = CASES[case]
    run, folder = run_of(model, rules, density), tmp_path / "out"
    hf()
    done = supar_cli.export(run, folder)
    assert (done.to, done.architecture) == ("vit", "ViTForImageClassification")
    assert done.difference is not None and done.difference <= 1e-5
    assert done.files == ["config.json", "model.safetensors", "preprocessor_config.json", "supar.json"]
    theirs, report = hf().AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()) and tuple(theirs.config.id2label.values()) == CLASSES
    held_out, train = (pictures(tmp_path / "images" / split) for split in ("val", "train"))
    wanted = supar_cli.model(run)(normalised(held_out, train))

    def pixels_of(found: list[tuple[Any, str]]) -> Tensor:
        processor = hf().AutoImageProcessor.from_pretrained(folder)
        return processor([image for image, _ in found], return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]

    assert relative(theirs(pixels_of(held_out)).logits, wanted) <= 1e-5
    larger = [(image.resize((31, 23)), name) for image, name in held_out]
    resized = [(image.resize(held_out[0][0].size, Image.Resampling.BILINEAR), name) for image, name in larger]
    torch.testing.assert_close(pixels_of(larger), normalised(resized, train), rtol=0, atol=1e-6)
    assert_comes_back(run, folder)
    file = folder / "preprocessor_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "image_std": [1.1 * value for value in config["image_std"]]}))
    assert relative(theirs(pixels_of(held_out)).logits, wanted) > 1e-3


def channels_last(values: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = values["patches"]
    return {"patches": weight.view(-1, 3, 4, 4).permute(0, 2, 3, 1).reshape(weight.shape)}


def wrong_key(**keys: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in the config."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        of = StockClass.config
        patch.setattr(StockClass, "config", lambda *given: of(*given) | keys)

    return plant


def wrong_contents(fault: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """A fault in factors or values."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        of = export._Contents.of
        patch.setattr(export._Contents, "of", lambda *given: fault(of(*given)))

    return plant


def one(_: float) -> float:
    return 1.0


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "input not folded into patches": wrong_contents(factor_of(one, "patches")),
    "input not folded into their bias": wrong_contents(factor_of(one, "patches.bias")),
    "input not folded into the class token": wrong_contents(factor_of(one, "class_token")),
    "input not folded into positions": wrong_contents(factor_of(one, "positions")),
    "attention not folded": wrong_contents(factor_of(one, "attn.q")),
    "attention not folded into the bias": wrong_contents(factor_of(one, "attn.q.bias")),
    "output not folded": wrong_contents(factor_of(one, "unembedding")),
    "residual not folded": wrong_contents(factor_of(one, "attn.o", "mlp.down")),
    "residual not folded into biases": wrong_contents(factor_of(one, "o.bias", "down.bias")),
    "channels last": wrong_contents(values_of(channels_last)),
    "positions turned": wrong_contents(values_of(lambda values: {"positions": values["positions"].flip(0)})),
    "keys for queries": wrong_contents(values_of(swapped("attn.k", "attn.q"))),
    "another activation": wrong_key(hidden_act="gelu"),
    "another epsilon": wrong_key(layer_norm_eps=1e-12),
    "other heads": wrong_key(num_attention_heads=8),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_nothing_is_written(
    fault: str, run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rules, density = CASES[DEFAULT]
    run, seen = run_of(model, rules, density), list[float]()
    hf()
    FAULTS[fault](monkeypatch)
    judge = comparison.require_equal
    monkeypatch.setattr(comparison, "require_equal", lambda found, *given: (seen.append(found), judge(found, *given)))
    with pytest.raises(CheckViolated, match=r"logits differ from supar's by \S+ of the largest"):
        supar_cli.export(run, tmp_path / "out")
    assert seen[0] > 1e-4, seen
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "to", "reason"),
    [
        (
            {"pooling": "mean"},
            "auto",
            r"ViTForImageClassification can't hold pooling mean \(it has class\); expected safetensors or npz$",
        ),
        ({"activation": "swiglu"}, "vit", r"can't hold activation swiglu \(it has gelu or gelu_tanh\)"),
        ({"kv_heads": 1}, "vit", r"can't hold kv_heads \d \(it has \d\)"),
        ({"head_width": 6}, "auto", r"can't hold head_width 6 \(it has width / heads\)"),
        ({}, "gpt2", r"GPT2LMHeadModel can't hold family vit \(it reads tokens\); expected vit, safetensors or npz$"),
    ],
)
def test_what_a_class_cannot_hold_is_named(
    model: dict[str, Any], to: str, reason: str, run_of: Runs, tmp_path: Path
) -> None:
    run = run_of(DIGITS | model)
    with pytest.raises(InputError, match=reason):
        supar_cli.export(run, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    done = supar_cli.export(run, tmp_path / "out", to="safetensors")
    assert "preprocessor_config.json" in done.files
    ours, again = open_run(run), open_model(tmp_path / "out")
    assert all(torch.equal(again.read(name), ours.read(name)) for name in ours.factors)


def stock_model(folder: Path, seed: int, **keys: Any) -> Any:
    """A model that transformers made with random values and no bias in its head, and wrote to a folder."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 40, "image_size": 8, "patch_size": 4}
    model = hf().ViTForImageClassification(hf().ViTConfig(**{**shape, "num_attention_heads": 4, **keys})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.classifier.bias.zero_()
    model.save_pretrained(folder)
    return model


STOCK: list[dict[str, Any]] = [
    {"num_labels": 2},
    {"num_labels": 7, "image_size": [8, 12], "num_channels": 1, "hidden_act": "gelu_new", "layer_norm_eps": 0.01},
]


@pytest.mark.parametrize("seed", range(len(STOCK)))
@torch.no_grad()
def test_a_model_that_transformers_made_fills_a_plan(seed: int, tmp_path: Path) -> None:
    """A target with multipliers of its own has its logits before the first step; with other factors it has not."""
    theirs, folder = stock_model(tmp_path / "stock", seed, **STOCK[seed]), tmp_path / "stock"
    stored = open_model(folder)
    found = stored.decoder
    assert isinstance(found, PlanViT) and found.classes == STOCK[seed]["num_labels"]
    keys = ("image", "channels", "patch", "classes", "activation", "norm_eps", "heads", "ffn_width")
    fields = proxy_of({key: vars(found)[key] for key in keys} | {"width": 48, "layers": 2})
    fields["target"] = {"width": 48, "layers": 2, "sparsity": {"density": 1.0}}
    proxy = validate(Proxy, fields, "proxy")
    plan = supar_cli.transfer(proxy, values=folder, values_out=tmp_path / "values.safetensors")
    model = prepare(plan, torch.device("cpu")).model
    images = torch.randn((4, found.channels, *found.image))
    wanted = theirs(images).logits
    assert relative(model(images), wanted) < 1e-5
    assert isinstance(model, VisionTransformer)
    model.patches.bias.mul_(1.1)
    assert relative(model(images), wanted) > 1e-3


def test_a_head_with_a_bias_and_models_that_read_something_else_are_refused(tmp_path: Path) -> None:
    model = stock_model(tmp_path / "stock", 0, **STOCK[0])
    torch.nn.init.ones_(model.classifier.bias)
    model.save_pretrained(tmp_path / "biased")
    with pytest.raises(InputError, match=r"classifier.bias: is not 0; supar's families have a head without a bias"):
        open_model(tmp_path / "biased")
    file = tmp_path / "stock" / "config.json"
    config = json.loads(file.read_text())
    for change, message in (({"qkv_bias": False}, "qkv_bias: False"), ({"image_size": 9}, "don't divide the image")):
        file.write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            open_model(tmp_path / "stock")
    file.write_text(json.dumps(config))
    text = validate(Proxy, proxy_fields("stdlib"), "proxy")
    for what in ("values", "masks"):
        with pytest.raises(InputError, match=rf"{what}: \S+ reads images; expected a model of tokens"):
            supar_cli.transfer(text, **{what: tmp_path / "stock"})


def by_hand(run: Path, found: list[tuple[Any, str]], classes: tuple[str, ...] = CLASSES) -> dict[str, float]:
    """Figures of images one by one."""
    images, model = normalised(found, pictures(run.parent / "images" / "train")), supar_cli.model(run).double()
    losses, right = [], []
    for image, (_, name) in zip(images.double(), found, strict=True):
        with torch.no_grad():
            chances = model(image[None])[0].softmax(0)
        losses.append(-float(chances[classes.index(name)].log()))
        right.append(int(chances.argmax()) == classes.index(name))
    count, share = len(found), sum(right) / len(found)
    errors = {"loss_se": np.std(losses, ddof=1) / count**0.5, "accuracy_se": (share * (1 - share) / count) ** 0.5}
    return {"loss": float(np.mean(losses)), "accuracy": share, **errors}


def test_every_held_out_image_is_scored_once(run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of four, of which the last is not full; classes of other data go by their names."""
    run, held_out = run_of(DIGITS), pictures(tmp_path / "images" / "val")
    monkeypatch.setattr(evaluate_images, "POSITIONS_AT_ONCE", 4 * 17)
    other = write_images(tmp_path / "other", DIGITS, CLASSES[1:])
    for data, found in ((None, held_out), (other, pictures(other / "val")), (other / "val", pictures(other / "val"))):
        record = supar_cli.evaluate(run, data)
        wanted = by_hand(run, found)
        assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        assert record["images"] == len(found) == sum(one["images"] for one in record["classes"].values())
        right = sum(one["images"] * one["accuracy"] for one in record["classes"].values())
        assert right == pytest.approx(record["accuracy"] * len(found))
    # a last image that fills a batch up, and classes numbered as the folder has them
    for fault in (by_hand(run, [*held_out, *held_out[-1:] * 3]), by_hand(run, found, CLASSES[1:] + CLASSES[:1])):
        assert all(abs(fault["loss"] - one) > 1e-3 for one in (wanted["loss"], by_hand(run, held_out)["loss"]))


def test_data_to_score_need_no_training_split(run_of: Runs, tmp_path: Path) -> None:
    """A split alone, a folder with one image a class, one with some of the classes."""
    run = run_of(DIGITS)
    found = pictures(write_images(tmp_path / "other", DIGITS, CLASSES[1:]) / "val")
    shutil.rmtree(tmp_path / "other" / "train")
    record = supar_cli.evaluate(run, tmp_path / "other")
    wanted = by_hand(run, found)
    assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert record["data"][0]["part"] == "its validation split" and record["images"] == len(found)
    for name in CLASSES[1:]:
        for extra in sorted((tmp_path / "other" / "val" / name).iterdir())[1:]:
            extra.unlink()
    record = supar_cli.evaluate(run, tmp_path / "other" / "val")
    assert record["images"] == 2 and record["data"][0]["part"] == "all of it"
    for labels, message in ([2, 1], "the class 1 is none"), ([-1], "the class -1 is none"), ([], "holds no image"):
        pixels = np.zeros((len(labels), 8, 8), np.uint8)
        np.savez(tmp_path / "some.npz", x_test=pixels, y_test=np.array(labels, np.int64))
        with pytest.raises(InputError, match=message):
            supar_cli.evaluate(run, tmp_path / "some.npz")


def test_what_images_cannot_be_scored_with_is_named(run_of: Runs, tmp_path: Path, supar_here: Any) -> None:
    run_of(DIGITS)
    write_images(tmp_path / "large", {**DIGITS, "image": [8, 9]})
    write_images(tmp_path / "more", DIGITS, ("ant", "elk"))
    for flags, message in {
        ("evaluate", "run", "--tokens", "5"): "--tokens 5: 5; the run's model reads images",
        ("evaluate", "run", "--data", "large"): "large: its images are [1, 8, 9] (channels, height, width)",
        ("evaluate", "run", "--data", "more"): "the class elk is none of the run's; expected ant, bee, cow",
        ("evaluate", "run", "--data", "more", "--field", "x"): "'x' with the kind images",
        ("generate", "run", "def "): "run: its model reads images and makes no text",
    }.items():
        done = supar_here(*flags)
        assert done.status == 2 and message in done.err, done.err
    done = supar_here("evaluate", "run", "-o", "scores.yaml")
    assert done.status == 0 and "9 images (± a standard error)" in done.err
    assert "accuracy by class: ant " in done.err and ", cow " in done.err
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    done = supar_here("export", "run", "--to", "npz")
    assert done.status == 0 and "no preprocessor_config.json is written: data.source: " in done.err
