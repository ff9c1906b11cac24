"""Model families at three widths, tiny: of transformers, of torch, and by hand; and passes that run them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, TOKENS = 96, 16


@dataclass(frozen=True)
class Family:
    """A model of a width, what it is run on, and what a person says when asked."""

    make: Callable[[int], nn.Module]
    example: Callable[[nn.Module], Any]
    said: dict[str, str] | None = None
    widths: tuple[int, int, int] = (64, 128, 192)


def ids(model: nn.Module) -> dict[str, Tensor]:
    """Token numbers, as transformers takes them."""
    return {"input_ids": torch.randint(0, VOCAB, (2, TOKENS))}


def tokens(model: nn.Module) -> tuple[Tensor, ...]:
    return (torch.randint(0, VOCAB, (2, TOKENS)),)


def images(model: nn.Module) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 16, 16),)


def texts(model: nn.Module) -> dict[str, Tensor]:
    """Token numbers of a text and of the one to be written."""
    return {**ids(model), "labels": torch.randint(0, VOCAB, (2, TOKENS))}


def sound(model: nn.Module) -> dict[str, Tensor]:
    """Sound, and token numbers of its transcript."""
    return {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": torch.randint(0, VOCAB, (2, 8))}


class Encoder(nn.Module):
    """Tokens with learned positions through torch's own encoder."""

    def __init__(self, width: int, norm_first: bool) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(VOCAB, width), nn.Parameter(torch.randn(1, TOKENS, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, width // 16, 4 * width, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.table(x) + self.positions))


class ActorCritic(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.policy, self.value, self.log_std = nn.Linear(width, 2), nn.Linear(width, 1), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x)
        return self.policy(hidden) + self.log_std.exp() * torch.randn(len(x), 2), self.value(hidden)


class Recurrent(nn.Module):
    def __init__(self, width: int, kind: type[nn.Module]) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB)
        self.body = kind(width, width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.table(x))[0])


class ByHand(nn.Module):
    """Raw parameters, einsum, and the table as the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.gain = nn.Parameter(torch.randn(VOCAB, width)), nn.Parameter(torch.ones(width))
        self.up = nn.Parameter(torch.randn(width, 4, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(4 * width, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.table[x]
        branch = torch.einsum("btd,dke->btke", hidden * self.gain, self.up).flatten(-2).relu() @ self.down
        return (hidden + branch) @ self.table.t()


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.short(x) + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


class ResNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(Residual(width, width), Residual(width, width))
        self.stage2 = nn.Sequential(Residual(width, 2 * width), Residual(2 * width, 2 * width))
        self.out = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stage2(self.stage1(self.norm(self.stem(x)).relu())).mean((2, 3)))


class Mixing(nn.Module):
    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.places1, self.places2 = nn.Linear(places, width // 2), nn.Linear(width // 2, places)
        self.channels1, self.channels2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places2(self.places1(self.norm1(x).mT).relu()).mT
        return x + self.channels2(self.channels1(self.norm2(x)).relu())


class Mixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.norm, self.out = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Mixing(width, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x).mean(1))


def of_torch() -> dict[str, Family]:
    """Families that need no package but torch."""
    numbers = lambda model: (torch.randn(4, 8),)  # noqa: E731
    return {
        "encoder, norm first": Family(lambda width: Encoder(width, True), tokens),
        "encoder, norm last": Family(lambda width: Encoder(width, False), tokens),
        "actor and critic": Family(ActorCritic, numbers),
        "LSTM": Family(lambda width: Recurrent(width, nn.LSTM), tokens),
        "GRU": Family(lambda width: Recurrent(width, nn.GRU), tokens),
        "einsum by hand": Family(ByHand, tokens),
        "ResNet": Family(ResNet, images, None, (16, 32, 48)),
        "MLP-Mixer": Family(Mixer, images, {"blocks.*.places2.weight": "hidden"}),
    }


def of_transformers() -> dict[str, Family]:
    """Families of Hugging Face's transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type] # one that does not import would fail them all
    import transformers as hf

    hf.logging.set_verbosity_error()
    llama: dict[str, Any] = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": TOKENS}

    def decoder(name: str, said: dict[str, str] | None = None, **more: Any) -> Family:
        def make(width: int) -> nn.Module:
            size = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 16}
            config = getattr(hf, f"{name}Config")(**{**llama, **size, "num_key_value_heads": width // 32, **more})
            return getattr(hf, f"{name}ForCausalLM")(config)

        return Family(make, ids, said)

    def other(model: str, sizes: Callable[[int], dict[str, Any]], example: Any = ids, **more: Any) -> Family:
        config = getattr(hf, getattr(hf, model).config_class.__name__)
        return Family(lambda width: getattr(hf, model)(config(**sizes(width), **more)), example)

    gpt2 = lambda width: {"n_embd": width, "n_head": width // 16}  # noqa: E731
    heads = lambda width: {"hidden_size": width, "num_attention_heads": width // 16, "intermediate_size": 4 * width}  # noqa: E731
    whisper = {"num_mel_bins": 16, "encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 16}
    whisper |= {"max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    fixed = {f"model.layers.*.self_attn.{letter}_proj.weight": "hidden" for letter in "kv"}

    def whisper_sizes(width: int) -> dict[str, Any]:
        stacks = ("encoder", "decoder")
        found = {f"{stack}_attention_heads": width // 16 for stack in stacks} | {"d_model": width}
        return found | {f"{stack}_ffn_dim": 2 * width for stack in stacks}

    return {
        "GPT-2": other("GPT2LMHeadModel", gpt2, vocab_size=VOCAB, n_positions=TOKENS, n_layer=2),
        "GPT-2, untied": other(
            "GPT2LMHeadModel", gpt2, vocab_size=VOCAB, n_positions=TOKENS, n_layer=2, tie_word_embeddings=False
        ),
        "Llama": decoder("Llama"),
        "Llama, tied": decoder("Llama", tie_word_embeddings=True),
        "Llama, two key heads": decoder("Llama", fixed, num_key_value_heads=2, head_dim=16),
        "Mistral": decoder("Mistral"),
        "Granite": decoder("Granite"),
        "Qwen2": decoder("Qwen2", tie_word_embeddings=True),
        "Qwen3": decoder("Qwen3", head_dim=16),
        "Gemma2": decoder("Gemma2", head_dim=16),
        "Mixtral": decoder("Mixtral", {"model.layers.*.mlp.gate.weight": "unembedding"}, num_local_experts=4),
        "GPT-NeoX": other("GPTNeoXForCausalLM", heads, **llama),
        "OPT": other(
            "OPTForCausalLM",
            lambda width: heads(width) | {"word_embed_proj_dim": width, "ffn_dim": 4 * width},
            **llama,
        ),
        "BERT": other("BertForMaskedLM", heads, **llama),
        "T5": other(
            "T5ForConditionalGeneration",
            lambda width: {"d_model": width, "d_ff": 2 * width, "num_heads": width // 16},
            texts,
            **{"vocab_size": VOCAB, "d_kv": 16, "num_layers": 2, "decoder_start_token_id": 0},
        ),
        "Mamba": other(
            "MambaForCausalLM",
            lambda width: {"hidden_size": width, "time_step_rank": width // 16},
            **{"vocab_size": VOCAB, "num_hidden_layers": 2, "state_size": 8},
        ),
        "ViT": other(
            "ViTForImageClassification",
            heads,
            lambda model: {"pixel_values": torch.randn(2, 3, 16, 16)},
            **{"num_hidden_layers": 2, "image_size": 16, "patch_size": 8, "num_labels": 10},
        ),
        "Whisper": other(
            "WhisperForConditionalGeneration",
            whisper_sizes,
            sound,
            **whisper,
            vocab_size=VOCAB,
            decoder_start_token_id=1,
        ),
    }
