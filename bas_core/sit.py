"""SiT, the class-conditional transformer that the paper samples (arXiv 2601.21542, section 4).

Module names are those of the public SiT (github.com/willisma/SiT, `models.py`) and REPA
(github.com/sihyun-yu/REPA, `models/sit.py`) repositories, so that their checkpoints load by name. Times and
velocities follow `flow.py` whatever the checkpoint was trained with: `SiTConfig.convention` says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .files import count_blocks

SIT_SIZES = {
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}
CONVENTIONS = ("noise_at_one", "data_at_one")
FREQUENCY_FEATURES = 256
# Queries, keys and values [B, heads, N, D] to their attention, of that shape. A program may have one of its own.
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SiTConfig:
    """Sizes and conventions of a SiT.

    Attributes:
        input_size: height and width of the (square) latent.
        convention: `noise_at_one` is REPA's and ours (t = 1 noise, v = noise - data); `data_at_one` is the
            original SiT's (t = 1 data, v = data - noise).
        learn_sigma: the network's output has twice the channels and only the first half is the velocity.
        qk_norm: queries and keys of each head are normalised (REPA's `--qk-norm`).
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    learn_sigma: bool = False
    convention: str = "noise_at_one"
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"SiTConfig.{name} must be at least 1; got {getattr(self, name)}.")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"SiTConfig.input_size must be a multiple of patch_size {self.patch_size}; got {self.input_size}."
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"SiTConfig.hidden_size must be a multiple of 4 and of num_heads {self.num_heads}; "
                f"got {self.hidden_size}."
            )
        if self.convention not in CONVENTIONS:
            raise ValueError(f"SiTConfig.convention must be one of {', '.join(CONVENTIONS)}; got {self.convention!r}.")

    @staticmethod
    def named(name: str, **changes: Any) -> SiTConfig:
        """The configuration of a published size, e.g. `SiTConfig.named("XL/2", input_size=64)`."""
        size, _, patch = name.removeprefix("SiT-").partition("/")
        if size not in SIT_SIZES or patch not in ("2", "4", "8"):
            raise ValueError(f"SiT name must be S, B, L or XL, a slash and patch 2, 4 or 8, e.g. 'XL/2'; got {name!r}.")
        sizes: dict[str, Any] = {**SIT_SIZES[size], "patch_size": int(patch), **changes}
        return SiTConfig(**sizes)


def sinusoidal_features(t: Tensor, count: int = FREQUENCY_FEATURES) -> Tensor:
    """`[cos(t f), sin(t f)]` with f = 10000^(-i / (count/2)): [B] -> [B, count], in float32 at least."""
    half = count // 2
    dtype = torch.promote_types(t.dtype, torch.float32)
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angles = t.to(dtype)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_position_table(hidden_size: int, height: int, width: int) -> Tensor:
    """The fixed two-dimensional sine-cosine table of MAE: [1, height * width, hidden_size]; columns vary fastest."""
    omega = 1.0 / 10000 ** (torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [position.reshape(-1, 1).double() * omega for position in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's second half: x [B, N, D] scaled and shifted by [B, D]."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of a scalar through a two-layer perceptron: [B] -> [B, D]. Also the SideNet's."""

    def __init__(self, hidden_size: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            operations.Linear(FREQUENCY_FEATURES, hidden_size, **factory),
            nn.SiLU(),
            operations.Linear(hidden_size, hidden_size, **factory),
        )

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoidal_features(t).to(dtype))


class LabelEmbedder(nn.Module):
    """Class embedding; index `num_classes` is the null class: [B] -> [B, D]. Also the SideNet's."""

    def __init__(self, num_classes: int, hidden_size: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.embedding_table = operations.Embedding(num_classes + 1, hidden_size, **factory)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: [B, C, H, W] -> [B, N, D]."""

    def __init__(self, config: SiTConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = operations.Conv2d(config.in_channels, config.hidden_size, p, stride=p, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, N, D], as timm has it."""

    def __init__(self, config: SiTConfig, operations: Any, attention: AttentionFunction, **factory: Any) -> None:
        super().__init__()
        d = config.hidden_size
        self.config, self.attention = config, attention
        self.qkv = operations.Linear(d, 3 * d, **factory)
        self.proj = operations.Linear(d, d, **factory)
        if config.qk_norm:
            self.q_norm = operations.LayerNorm(d // config.num_heads, **factory)
            self.k_norm = operations.LayerNorm(d // config.num_heads, **factory)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.config.num_heads)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(rearrange(self.attention(q, k, v), "b h n d -> b n (h d)"))


class Block(nn.Module):
    """A transformer block with adaptive layer norm (adaLN-Zero): tokens [B, N, D], condition [B, D]."""

    def __init__(self, config: SiTConfig, operations: Any, attention: AttentionFunction, **factory: Any) -> None:
        super().__init__()
        d = config.hidden_size
        inner = int(d * config.mlp_ratio)
        self.norm = operations.LayerNorm(d, elementwise_affine=False, eps=1e-6, **factory)
        self.attn = Attention(config, operations, attention, **factory)
        self.mlp = nn.ModuleDict(
            {"fc1": operations.Linear(d, inner, **factory), "fc2": operations.Linear(inner, d, **factory)}
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(d, 6 * d, **factory))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a[:, None], self.attn(modulate(self.norm(x), shift_a, scale_a)))
        hidden = F.gelu(self.mlp["fc1"](modulate(self.norm(x), shift_m, scale_m)), approximate="tanh")
        return torch.addcmul(x, gate_m[:, None], self.mlp["fc2"](hidden))


class FinalLayer(nn.Module):
    """Tokens [B, N, D] to patches [B, N, patch * patch * channels]."""

    def __init__(self, config: SiTConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        d = config.hidden_size
        channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.norm_final = operations.LayerNorm(d, elementwise_affine=False, eps=1e-6, **factory)
        self.linear = operations.Linear(d, config.patch_size**2 * channels, **factory)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(d, 2 * d, **factory))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """The SiT transformer as a velocity field in the convention of `flow.py`.

    Args:
        config: sizes and the checkpoint's own convention.
        operations: namespace of layer classes (`torch.nn`, or ComfyUI's `comfy.ops` classes).
        device, dtype: where and in what the parameters are made.
        attention: see `AttentionFunction`.
    """

    def __init__(
        self,
        config: SiTConfig,
        operations: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: AttentionFunction = F.scaled_dot_product_attention,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.x_embedder = PatchEmbed(config, operations, **factory)
        self.t_embedder = TimestepEmbedder(config.hidden_size, operations, **factory)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size, operations, **factory)
        side = config.input_size // config.patch_size
        table = sincos_position_table(config.hidden_size, side, side)
        self.pos_embed = nn.Parameter(table.to(device=device, dtype=dtype), requires_grad=False)
        self.blocks = nn.ModuleList([Block(config, operations, attention, **factory) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config, operations, **factory)

    @property
    def null_class(self) -> int:
        return self.config.num_classes

    def initialize_weights(self) -> SiT:
        """The published initialisation: Xavier linears, zero modulation and output (so v = 0 at the start)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
        nn.init.zeros_(patches.bias)
        embedders: list[Any] = [self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        for layer in embedders:
            nn.init.normal_(layer.weight, std=0.02)
        for block in [*self.blocks, self.final_layer]:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        return self

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity dx/dt.

        Args:
            x: [B, C, H, W] states, H = W = `config.input_size`.
            t: [B] times in [0, 1], 1 = noise.
            y: [B] class indices, `config.num_classes` = the null class.

        Raises:
            ValueError: x has another shape, or t and y are not [B].
        """
        c = self.config
        self._check(x, t, y)
        reverse = c.convention == "data_at_one"
        dtype = self.x_embedder.proj.weight.dtype
        tokens = self.x_embedder(x.to(dtype)) + self.pos_embed.to(device=x.device, dtype=dtype)
        condition = self.t_embedder(1 - t if reverse else t, dtype) + self.y_embedder(y).to(dtype)
        for block in self.blocks:
            tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition)
        side = c.input_size // c.patch_size
        v = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=side, w=side, p=c.patch_size, q=c.patch_size)[
            :, : c.in_channels
        ].to(x.dtype)
        return -v if reverse else v

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        expected = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must be [B, {', '.join(map(str, expected))}] for this SiT; got {tuple(x.shape)}.")
        for name, value in (("t", t), ("y", y)):
            if value.shape != x.shape[:1]:
                raise ValueError(f"{name} must be [{x.shape[0]}], one value a sample; got {tuple(value.shape)}.")


def sit_config_from_state_dict(
    state: dict[str, Tensor], convention: str | None = None, num_heads: int | None = None
) -> SiTConfig:
    """Read a SiT's sizes off its tensors.

    Args:
        state: cleaned tensor names (no `module.` prefix).
        convention: see `SiTConfig`; None takes the original SiT's where the output channels are doubled, and
            REPA's otherwise, for weights alone cannot tell.
        num_heads: None takes what normalised queries tell, the published number for the width, or one head per 64
            channels.

    Raises:
        ValueError: tensors are missing, blocks are not numbered in turn, or the token grid is not square.
    """
    needed = ("x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"This is no SiT checkpoint: tensor {missing[0]!r} is missing.")
    hidden, channels, patch = state["x_embedder.proj.weight"].shape[:3]
    side = math.isqrt(state["pos_embed"].shape[1])
    if side * side != state["pos_embed"].shape[1]:
        raise ValueError(f"pos_embed must hold a square number of tokens; got {state['pos_embed'].shape[1]}.")
    learn_sigma = state["final_layer.linear.weight"].shape[0] == 2 * channels * patch**2
    published = {size["hidden_size"]: size["num_heads"] for size in SIT_SIZES.values()}
    norm = state.get("blocks.0.attn.q_norm.weight")
    if norm is not None and hidden % len(norm) == 0:
        published[hidden] = hidden // len(norm)
    return SiTConfig(
        input_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=hidden,
        depth=count_blocks(state),
        num_heads=num_heads or published.get(hidden, max(1, hidden // 64)),
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / hidden if "blocks.0.mlp.fc1.weight" in state else 4.0,
        learn_sigma=learn_sigma,
        convention=convention or ("data_at_one" if learn_sigma else "noise_at_one"),
        qk_norm=norm is not None,
    )
