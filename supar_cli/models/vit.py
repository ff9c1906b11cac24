"""The vision transformer: the blocks of the decoders over patches of an image, each of which sees all others.

Shape suffixes: B batch, C channels, H height, W width in pixels, P numbers of a patch, T positions, D width, V classes.
A parameter's name without `.weight` is its name in the plan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supar_cli.models.transformer import Block, embedding, norm
from supar_cli.planning.plan import PlanViT
from supar_cli.sparse.linear import Linear


class VisionTransformer(nn.Module):
    """Images (B, C, H, W) → logits (B, V), the output multiplier included; with targets (B,) their mean cross-entropy ()."""

    compiled_methods = ("embed", "head")  # all but the blocks, which are compiled by themselves

    def __init__(self, config: PlanViT) -> None:
        super().__init__()
        self.config = config
        self.patches = Linear(config.patch_inputs, config.width, config.bias)
        self.class_token = nn.Parameter(torch.empty(1, config.width)) if config.has_class_token else None
        self.positions = embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = norm(config)
        self.unembedding = Linear(config.width, config.classes, bias=False)

    def forward(self, images_BCHW: Tensor, targets_B: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """`chunk` is what text needs; there are too few logits here to hold them in parts."""
        x_BTD = self.embed(images_BCHW)
        for block in self.blocks:
            x_BTD = block(x_BTD, None, None)
        return self.head(x_BTD, targets_B)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """The first block's inputs (B, T, D): patches row by row, each with its channels one after another."""
        edge, (C, H, W) = self.config.patch, (self.config.channels, *self.config.image)
        if (found := tuple(images_BCHW.shape[1:])) != (C, H, W):
            raise ValueError(f"images of {found}; expected (channels, height, width) of {(C, H, W)}")
        B = len(images_BCHW)
        cut = images_BCHW.reshape(B, C, H // edge, edge, W // edge, edge).permute(0, 2, 4, 1, 3, 5)
        x_BTD = self.patches(cut.reshape(B, self.config.patches, self.config.patch_inputs))
        if self.class_token is not None:
            x_BTD = torch.cat((self.class_token.to(x_BTD.dtype).expand(B, 1, -1), x_BTD), dim=1)
        return (x_BTD + self.positions.weight) * self.config.multipliers.input  # type: ignore[no-any-return]

    def pool(self, x_BTD: Tensor) -> Tensor:
        """What the head reads (B, D): the class token, or the mean over patches."""
        return x_BTD.mean(1) if self.class_token is None else x_BTD[:, 0]

    def head(self, x_BTD: Tensor, targets_B: Tensor | None = None) -> Tensor:
        """The logits (B, V) of the class token, or of the mean over patches; or the loss () of targets."""
        logits_BV = self.unembedding(self.pool(self.final_norm(x_BTD))) * self.config.multipliers.output
        if targets_B is None:
            return logits_BV  # type: ignore[no-any-return]
        return F.cross_entropy(logits_BV.float(), targets_B)
