"""Models of stock classes that transformers itself makes, saves and runs, against supar's own model of their folders."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from supar_cli.errors import InputError, SetupError
from supar_cli.exporting.stored_model import open_model
from supar_cli.models.transformer import Transformer, named_tensors
from supar_cli.planning.plan import PlanModel
from supar_cli.planning.plan_sections import Multipliers

hf = pytest.importorskip("transformers", reason="transformers makes the models that are read here")

SIZE = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SIZE, "max_position_embeddings": 24}
NEOX = {**LLAMA, "use_parallel_residual": False, "rotary_pct": 1.0}
GPT2 = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
MPT = {"vocab_size": 67, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 24}
GRANITE = {"embedding_multiplier": 3.3, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 5.0}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "llama": ("LlamaConfig", LLAMA),
    "granite": ("GraniteConfig", {**LLAMA, **GRANITE}),
    "gpt-neox": ("GPTNeoXConfig", NEOX),
    "mpt": ("MptConfig", MPT),
}


def drawn(base: str, seed: int) -> dict[str, Any]:
    """Keys of a config of a class, drawn; the first of each is the class with its own defaults."""
    draw = random.Random(f"{base} {seed}")
    if not seed:
        return {}
    heads, width = draw.choice([1, 2, 3, 4, 6]), 48
    size = {"tie_word_embeddings": draw.random() < 0.5, "vocab_size": draw.randint(2, 99)}
    eps, gelu = draw.choice([1e-6, 1e-5, 1e-2]), draw.choice(["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"])
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([20.0, 1e4, 5e5])}}
    if base == "gpt2":
        size |= {"n_embd": width, "n_head": heads, "n_inner": draw.choice([None, 24, 100])}
        return size | {"activation_function": gelu, "layer_norm_epsilon": eps}
    if base == "mpt":
        attention = {"softmax_scale": draw.choice([None, 0.05, 1.0])}
        return size | {"d_model": width, "n_heads": heads, "layer_norm_epsilon": eps, "attn_config": attention}
    size |= {"hidden_size": width, "num_attention_heads": heads, "attention_bias": draw.random() < 0.5, **rope}
    if base == "gpt-neox":
        size["num_attention_heads"] = min(heads, 4)  # an even head width
        size["rope_parameters"]["partial_rotary_factor"] = 1.0
        return size | {"hidden_act": gelu, "layer_norm_eps": eps}
    groups = draw.choice([one for one in range(1, heads + 1) if heads % one == 0])
    size |= {"num_key_value_heads": groups, "head_dim": draw.choice([4, 10, 16]), "mlp_bias": draw.random() < 0.5}
    factors = {key: value * draw.uniform(0.5, 2.0) for key, value in GRANITE.items() if base == "granite"}
    return size | {"rms_norm_eps": eps, "intermediate_size": draw.choice([24, 100])} | factors


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """`saved(base, seed)`: a model that transformers made with random values, and the folder that it wrote."""

    def save(base: str, seed: int = 0) -> tuple[Any, Path]:
        name, keys = BASES[base][0], BASES[base][1] | drawn(base, seed)
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(getattr(hf, name)(**keys)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(tmp_path / "stock")
        return model, tmp_path / "stock"

    return save


def logits_of(decoder: PlanModel, read: Callable[[str], Tensor], tokens: Tensor) -> Tensor:
    """supar's own model of a folder."""
    model = Transformer(decoder)
    with torch.no_grad():
        for name, parameter in named_tensors(model).items():
            parameter.copy_(read(name))
        return model(tokens)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("base", BASES)
def test_a_folder_read_is_the_model_that_transformers_runs(base: str, seed: int, saved: Any) -> None:
    """With the multipliers that its config has, and without any, each tensor times its factor."""
    model, folder = saved(base, seed)
    stored = open_model(folder)
    decoder, tokens = stored.decoder, torch.randint(0, stored.decoder.vocab, (2, 24))
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
    assert relative(logits_of(decoder, stored.read, tokens), wanted) < 1e-5
    none = Multipliers(input=1.0, output=1.0, attention=decoder.head_width**-0.5, residual=1.0)
    plain = decoder.model_copy(update={"multipliers": none})
    folded = logits_of(plain, lambda name: stored.read(name) * stored.factors[name], tokens)
    assert relative(folded, wanted) < 1e-5
    swap = {f"blocks.0.attn.{one}": f"blocks.0.attn.{other}" for one, other in ("qk", "kq")}
    if decoder.kv_heads == decoder.heads:  # a fault that shapes don't show
        assert relative(logits_of(decoder, lambda name: stored.read(swap.get(name, name)), tokens), wanted) > 1e-3
    if base == "granite":
        assert relative(logits_of(plain, stored.read, tokens), wanted) > 1e-3


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value.contiguous() for name, value in change(tensors).items()}, folder / "model.safetensors")


def test_names_without_the_prefix_old_buffers_and_a_tied_head_that_is_there(saved: Any) -> None:
    _, folder = saved("gpt2")
    wanted = {name: open_model(folder).read(name) for name in open_model(folder).factors}

    def openai(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        found |= {f"h.{block}.attn.bias": torch.ones(1, 1, 24, 24) for block in range(2)}
        return found | {"lm_head.weight": found["wte.weight"].clone()}

    rewrite(folder, openai)
    stored = open_model(folder)
    assert all(torch.equal(stored.read(name), value) for name, value in wanted.items())
    rewrite(folder, lambda tensors: {name: value for name, value in tensors.items() if name != "wte.weight"})
    assert torch.equal(open_model(folder).read("embedding"), wanted["embedding"])
    rewrite(folder, lambda tensors: tensors | {"wte.weight": tensors["lm_head.weight"] + 1})
    with pytest.raises(InputError, match=r"lm_head.weight: differs from the embedding, although config.json ties them"):
        open_model(folder)


def test_shards_and_other_precisions(saved: Any) -> None:
    model, folder = saved("gpt-neox")
    model.to(torch.bfloat16).save_pretrained(folder / "shards", max_shard_size="12KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    stored = open_model(folder / "shards")
    value = stored.read("embedding")
    assert value.dtype == torch.float32 and torch.equal(value, model.gpt_neox.embed_in.weight.float())
    next((folder / "shards").glob("model-00002*")).unlink()
    with pytest.raises(SetupError, match=r"model-00002\S*: is not an intact safetensors file"):
        open_model(folder / "shards")


def test_biases_that_are_zero_are_none(saved: Any) -> None:
    _, folder = saved("gpt2")
    assert open_model(folder).decoder.bias
    rewrite(folder, lambda found: {name: value * (not name.endswith("bias")) for name, value in found.items()})
    stored = open_model(folder)
    assert not stored.decoder.bias and "blocks.0.attn.q.bias" not in stored.factors


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "parallel residual": ("gpt-neox", {"use_parallel_residual": True}, "use_parallel_residual: True"),
    "parallel residual, as the class has it": (
        "gpt-neox",
        {"use_parallel_residual": None},
        "use_parallel_residual: True",
    ),
    "partial rotary, the class's default": (
        "gpt-neox",
        {"rope_parameters": {"rope_type": "default"}, "rotary_pct": None},
        "partial_rotary_factor: 0.25",
    ),
    "rope scaling of transformers 4": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type: 'linear'"),
    "both ways to write it": (
        "llama",
        {"rope_scaling": {"type": "default"}},
        "rope_scaling: is given beside rope_parameters",
    ),
    "a base of rope that one reader takes": (
        "llama",
        {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "rope_theta": 99.0}},
        "rope_scaling.rope_theta: 99.0",
    ),
    "rope scaling of transformers 5": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}},
        "rope_parameters.rope_type: 'llama3'",
    ),
    "sliding window": ("llama", {"sliding_window": 512}, "sliding_window: 512"),
    "softcapping": ("granite", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0"),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "relu": ("gpt2", {"activation_function": "relu"}, "activation_function: 'relu'"),
    "inverse layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
    "no alibi": ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi: False"),
    "clipped": ("mpt", {"attn_config": {"clip_qkv": 6}}, "attn_config.clip_qkv: 6"),
    "a size of text": ("llama", {"hidden_size": "32"}, "config.json: hidden_size: "),
    "a size that is missing": ("llama", {"hidden_size": None}, "hidden_size: is missing"),
    "a multiplier of 0": ("granite", {"logits_scaling": 0}, "logits_scaling: 0"),
    "another class": ("llama", {"model_type": "mistral"}, "model_type: 'mistral'"),
    "another shape": ("llama", {"vocab_size": 99}, "lm_head.weight: has the shape [67, 32]; expected [99, 32]"),
    "biases that are not there": ("llama", {"mlp_bias": True}, "has no tensor model.layers.1.mlp.down_proj.bias"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_no_family_expresses_is_refused_by_name(case: str, saved: Any) -> None:
    base, changes, message = REFUSALS[case]
    _, folder = saved(base)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError) as raised:
        open_model(folder)
    assert message in str(raised.value) and str(folder) in str(raised.value)


def test_a_config_of_numbers_that_are_none_is_refused(saved: Any) -> None:
    _, folder = saved("granite")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"residual_multiplier": math.inf}))
    with pytest.raises(SetupError, match=r"config.json: is corrupt: Infinity"):
        open_model(folder)


def test_every_reason_at_once_and_notes_on_the_rest(saved: Any) -> None:
    _, folder = saved("gpt2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_magic": 1}))
    (note,) = open_model(folder).notes
    dropouts = "resid_pdrop 0.1, attn_pdrop 0.1, embd_pdrop 0.1"
    assert sorted(note.partition(": ")[0].split(", ")) == sorted(f"{dropouts}, use_magic 1".split(", "))
    (folder / "config.json").write_text(
        json.dumps(config | {"activation_function": "relu", "scale_attn_weights": False})
    )
    with pytest.raises(InputError) as raised:
        open_model(folder)
    assert len(raised.value.problems) == 2


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers' own words and bars, which would hide those of a failing test."""
    level = hf.logging.get_verbosity()
    hf.logging.set_verbosity_error()
    yield
    hf.logging.set_verbosity(level)


def test_pickled_weights_unknown_tensors_and_broken_files_are_refused(saved: Any) -> None:
    _, folder = saved("llama")
    rewrite(folder, lambda tensors: tensors | {"score.weight": torch.ones(2)})
    with pytest.raises(InputError, match=r"score.weight: is no tensor of this model"):
        open_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SetupError, match="not an intact safetensors file"):
        open_model(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin is pickled"):
        open_model(folder)
    with pytest.raises(InputError, match="no such folder"):
        open_model(folder / "nothing")
