"""The table of the classes that supar exports to and imports from, by the names of `supar export --to`."""

from __future__ import annotations

from typing import Any

from supar_cli.errors import InputError, suggestion
from supar_cli.exporting.stock_class import StockClass

_SHARED = {"vocab": "vocab_size", "tied": "tie_word_embeddings"}
_HIDDEN = {
    **_SHARED,
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
    "context": "max_position_embeddings",
}
_ROPE_TYPE: Any = {"rope_parameters.rope_type": (("default",), "default")}
_ALL = ("attn_norm", "attn", "mlp_norm", "mlp", "final_norm")
_GELU = {"gelu": "gelu", "gelu_python": "gelu"}
_GELU_TANH = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_LLAMA: Any = {
    "norm": "rmsnorm",
    "positions": "rope",
    "activation_key": "hidden_act",
    "activations": {"silu": "swiglu", "swish": "swiglu"},
    "keys": {
        **_HIDDEN,
        "kv_heads": "num_key_value_heads",
        "head_width": "head_dim",
        "norm_eps": "rms_norm_eps",
        "rope_theta": "rope_parameters.rope_theta rope_theta",
    },
    "defaults": {
        "tied": False,
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "activation": "silu",
        "kv_heads": None,
        "head_width": None,
    },
    "prefix": "model.",
    "heads": "lm_head",
    "modules": {
        "embed_tokens": "embedding",
        "layers.{}.input_layernorm": "attn_norm",
        "layers.{}.self_attn.q_proj": "attn.q",
        "layers.{}.self_attn.k_proj": "attn.k",
        "layers.{}.self_attn.v_proj": "attn.v",
        "layers.{}.self_attn.o_proj": "attn.o",
        "layers.{}.post_attention_layernorm": "mlp_norm",
        "layers.{}.mlp.gate_proj": "mlp.gate",
        "layers.{}.mlp.up_proj": "mlp.up",
        "layers.{}.mlp.down_proj": "mlp.down",
        "norm": "final_norm",
    },
    "biases": {"attn": ("attention_bias", False), "mlp": ("mlp_bias", False)},
    "required": _ROPE_TYPE,
    "dropouts": "attention_dropout",
    "buffers": "layers.{}.self_attn.rotary_emb.inv_freq",
}

STOCK_CLASSES = {
    "gpt2": StockClass(
        architecture="GPT2LMHeadModel",
        model_type="gpt2",
        norm="layernorm",
        positions="learned",
        activation_key="activation_function",
        activations=_GELU | _GELU_TANH,
        keys={
            **_SHARED,
            "width": "n_embd",
            "layers": "n_layer",
            "heads": "n_head",
            "ffn_width": "n_inner",
            "context": "n_positions",
            "norm_eps": "layer_norm_epsilon",
        },
        defaults={"tied": True, "norm_eps": 1e-5, "activation": "gelu_new", "ffn_width": None},
        prefix="transformer.",
        heads="lm_head",
        modules={
            "wte": "embedding",
            "wpe": "positions",
            "h.{}.ln_1": "attn_norm",
            "h.{}.attn.c_attn": "attn.q attn.k attn.v",
            "h.{}.attn.c_proj": "attn.o",
            "h.{}.ln_2": "mlp_norm",
            "h.{}.mlp.c_fc": "mlp.up",
            "h.{}.mlp.c_proj": "mlp.down",
            "ln_f": "final_norm",
        },
        biases=dict.fromkeys(_ALL),
        required={"scale_attn_weights": ((True,), True), "scale_attn_by_inverse_layer_idx": ((False,), False)},
        dropouts="resid_pdrop embd_pdrop attn_pdrop",
        buffers="h.{}.attn.bias h.{}.attn.masked_bias",
        is_transposed=True,
    ),
    "llama": StockClass(architecture="LlamaForCausalLM", model_type="llama", **_LLAMA),
    "granite": StockClass(
        architecture="GraniteForCausalLM",
        model_type="granite",
        multipliers={
            "input": ("embedding_multiplier", 1.0),
            "output": ("logits_scaling", 1.0),
            "attention": ("attention_multiplier", 1.0),
            "residual": ("residual_multiplier", 1.0),
        },
        **_LLAMA,
    ),
    "gpt-neox": StockClass(
        architecture="GPTNeoXForCausalLM",
        model_type="gpt_neox",
        norm="layernorm",
        positions="rope",
        activation_key="hidden_act",
        activations=_GELU | _GELU_TANH,
        keys={
            **_HIDDEN,
            "norm_eps": "layer_norm_eps",
            "rope_theta": "rope_parameters.rope_theta rotary_emb_base rope_theta",
        },
        defaults={"tied": False, "norm_eps": 1e-5, "rope_theta": 10000.0, "activation": "gelu"},
        prefix="gpt_neox.",
        heads="embed_out lm_head",
        modules={
            "embed_in": "embedding",
            "layers.{}.input_layernorm": "attn_norm",
            "layers.{}.attention.query_key_value": "attn.q attn.k attn.v",
            "layers.{}.attention.dense": "attn.o",
            "layers.{}.post_attention_layernorm": "mlp_norm",
            "layers.{}.mlp.dense_h_to_4h": "mlp.up",
            "layers.{}.mlp.dense_4h_to_h": "mlp.down",
            "final_layer_norm": "final_norm",
        },
        biases=dict.fromkeys(_ALL) | {"attn": ("attention_bias", True)},
        required={
            **_ROPE_TYPE,
            "use_parallel_residual": ((False,), True),
            "rope_parameters.partial_rotary_factor rotary_pct": ((1.0,), 0.25),
        },
        dropouts="attention_dropout hidden_dropout",
        buffers="layers.{}.attention.bias layers.{}.attention.masked_bias layers.{}.attention.rotary_emb.inv_freq",
        is_interleaved=True,
    ),
    "mpt": StockClass(
        architecture="MptForCausalLM",
        model_type="mpt",
        norm="layernorm",
        positions="alibi",
        activation_key=None,
        activations={"gelu": "gelu"},
        keys={
            **_SHARED,
            "width": "d_model",
            "layers": "n_layers",
            "heads": "n_heads",
            "ffn_ratio": "expansion_ratio",
            "context": "max_seq_len",
            "norm_eps": "layer_norm_epsilon",
        },
        defaults={"tied": True, "norm_eps": 1e-5, "ffn_ratio": 4},
        prefix="transformer.",
        heads="lm_head",
        modules={
            "wte": "embedding",
            "blocks.{}.norm_1": "attn_norm",
            "blocks.{}.attn.Wqkv": "attn.q attn.k attn.v",
            "blocks.{}.attn.out_proj": "attn.o",
            "blocks.{}.norm_2": "mlp_norm",
            "blocks.{}.ffn.up_proj": "mlp.up",
            "blocks.{}.ffn.down_proj": "mlp.down",
            "norm_f": "final_norm",
        },
        biases={},
        multipliers={"attention": ("attn_config.softmax_scale", None)},
        required={
            "no_bias": ((True,), True),
            "norm_type": (("low_precision_layernorm", "layernorm"), "low_precision_layernorm"),
            "attn_config.alibi": ((True,), True),
            "attn_config.alibi_bias_max": ((8,), 8),
            "attn_config.attn_type": (("multihead_attention",), "multihead_attention"),
            "attn_config.qk_ln": ((False,), False),
            "attn_config.prefix_lm": ((False,), False),
            "attn_config.clip_qkv": ((None,), None),
        },
        dropouts="emb_pdrop resid_pdrop attn_config.attn_pdrop",
    ),
}


def find_class(config: dict[str, Any]) -> StockClass:
    """The class of a config. Raises InputError for one that is none of these."""
    given = config.get("model_type")
    for one in STOCK_CLASSES.values():
        if one.model_type == given:
            return one
    expected = suggestion(given, [one.model_type for one in STOCK_CLASSES.values()])
    raise InputError(f"model_type: {given!r}, which none of supar's families can hold; {expected}")
