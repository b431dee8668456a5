"""The SideNet: predicts how the velocity changes along the path, from what one or two backbone calls have shown.

One anchor (the paper): v(t - h) = v + h S(x, v, t, h). Two anchors: with v_b known at t - d,

    v(t - h) = v + slope h + h (h - d) / (|h| + |d|) S(x, v, slope, t, h, d),   slope = (v_b - v) / d,

exact at both anchors, and with S = 0 the straight line through them, so that the solver is then a multistep method.

The default network is the official one (github.com/HKUST-LongGroup/BA-solver, `models/side_net.py`), made
configurable; with the default configuration official weights load by name. `architecture="transformer"` replaces its
convolutions by transformer blocks, which see the whole image from the first block on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .flow import per_sample
from .sit import AttentionFunction, LabelEmbedder, TimestepEmbedder, sincos_position_table

NORM_EPSILON = 1e-5
ARCHITECTURES = ("conv", "transformer", "local")
FEED_FORWARD_RATIO = 2


@dataclass(frozen=True)
class SideNetConfig:
    """What a SideNet looks like; the defaults are the official network's.

    Attributes:
        in_channels: latent channels.
        base_channels: width.
        embedding_dim: width of the time, step, class and scale embeddings.
        num_layers: blocks.
        num_classes: 0 = takes no class; index `num_classes` is the null class.
        num_heads: attention heads.
        patch_size: the network works on a grid this much coarser (pixel-unshuffle).
        kernel_size: of the first and the last convolution.
        anchors: 1 (the paper) or 2.
        cfg_input: takes the CFG scale as an input.
        architecture: "conv" (the official network: block number `num_layers // 2` is attention, the others are
            separable convolutions), "local" (convolutions alone) or "transformer".
        data_mean_size: side of the square grid on which the network keeps the mean of the model's data, for an analytic
            first step (`schedule.Schedule`); 0 = no mean.
    """

    in_channels: int = 4
    base_channels: int = 256
    embedding_dim: int = 256
    num_layers: int = 4
    num_classes: int = 1000
    num_heads: int = 4
    patch_size: int = 1
    kernel_size: int = 3
    anchors: int = 1
    cfg_input: bool = False
    architecture: str = "conv"
    data_mean_size: int = 0

    def __post_init__(self) -> None:
        for name in ("in_channels", "base_channels", "embedding_dim", "num_layers", "num_heads", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"SideNetConfig.{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("num_classes", "data_mean_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"SideNetConfig.{name} must not be negative; got {getattr(self, name)}.")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"SideNetConfig.architecture must be one of {', '.join(ARCHITECTURES)}; got {self.architecture!r}."
            )
        if self.architecture == "transformer" and self.base_channels % 4:
            raise ValueError(f"SideNetConfig.base_channels must be a multiple of 4; got {self.base_channels}.")
        if self.anchors not in (1, 2):
            raise ValueError(f"SideNetConfig.anchors must be 1 or 2; got {self.anchors}.")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"SideNetConfig.kernel_size must be odd and positive; got {self.kernel_size}.")
        if self.base_channels % self.num_heads:
            raise ValueError(
                f"SideNetConfig.base_channels must be a multiple of num_heads {self.num_heads}; "
                f"got {self.base_channels}."
            )


def channel_norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the channels of [B, C, H, W], without parameters; in float32, as squares overflow
    float16 from 256 on."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + NORM_EPSILON)).to(x.dtype)


def modulate(x: Tensor, style: Tensor) -> Tensor:
    """x [B, C, H, W] times 1 + scale, plus shift, from style [B, 2 C]."""
    scale, shift = style[..., None, None].chunk(2, dim=1)
    return torch.addcmul(shift, x, 1 + scale)


class ResidualBlock(nn.Module):
    """Two depth-wise separable convolutions with modulation between them: [B, C, H, W], embedding [B, E]."""

    def __init__(self, config: SideNetConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        c = config.base_channels
        self.conv1_dw = operations.Conv2d(c, c, 3, padding=1, groups=c, bias=False, **factory)
        self.conv1_pw = operations.Conv2d(c, c, 1, bias=False, **factory)
        self.conv2_dw = operations.Conv2d(c, c, 3, padding=1, groups=c, bias=False, **factory)
        self.conv2_pw = operations.Conv2d(c, c, 1, **factory)
        self.emb_proj = operations.Linear(config.embedding_dim, 2 * c, **factory)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1_pw(self.conv1_dw(channel_norm(x)))
        h = F.silu(modulate(channel_norm(h), self.emb_proj(embedding)))
        return x + self.conv2_pw(self.conv2_dw(h))


class LocalBlock(nn.Module):
    """Two convolutions after modulation: [B, C, H, W], embedding [B, E]."""

    def __init__(self, config: SideNetConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        c = config.base_channels
        self.emb_proj = operations.Linear(config.embedding_dim, 2 * c, **factory)
        self.conv1 = operations.Conv2d(c, c, 3, padding=1, bias=False, **factory)
        self.conv2 = operations.Conv2d(c, c, 3, padding=1, **factory)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(modulate(channel_norm(x), self.emb_proj(embedding))))
        return x + self.conv2(F.silu(channel_norm(h)))


class AttentionBlock(nn.Module):
    """Modulated self-attention over all positions: [B, C, H, W], embedding [B, E]."""

    def __init__(self, config: SideNetConfig, operations: Any, attention: AttentionFunction, **factory: Any) -> None:
        super().__init__()
        c = config.base_channels
        self.num_heads, self.attention = config.num_heads, attention
        self.emb_proj = operations.Linear(config.embedding_dim, 2 * c, **factory)
        self.qkv = operations.Conv2d(c, 3 * c, 1, bias=False, **factory)
        self.proj = operations.Conv2d(c, c, 1, bias=False, **factory)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.qkv(modulate(channel_norm(x), self.emb_proj(embedding)))
        # Contiguous: fused kernels take no other last dimension, and without them memory grows with the square.
        q, k, v = rearrange(h, "b (three n d) y x -> three b n (y x) d", three=3, n=self.num_heads).contiguous()
        h = self.attention(q, k, v)
        return x + self.proj(rearrange(h, "b n (y x) d -> b (n d) y x", y=x.shape[2]))


def positions(feature: Tensor) -> Tensor:
    """Fixed sine-cosine positions [1, C, H, W] for features [B, C, H, W] of any size, in their dtype and place."""
    channels, height, width = feature.shape[1:]
    with torch.inference_mode(False):  # an inference tensor that is kept would break a later training
        table = sincos_position_table(channels, height, width)
        return rearrange(table, "b (y x) c -> b c y x", y=height).to(feature.device, feature.dtype)


class TokenBlock(nn.Module):
    """A modulated transformer block over all positions: [B, C, H, W], embedding [B, E]."""

    def __init__(self, config: SideNetConfig, operations: Any, attention: AttentionFunction, **factory: Any) -> None:
        super().__init__()
        c = config.base_channels
        self.num_heads, self.attention = config.num_heads, attention
        self.emb_proj = operations.Linear(config.embedding_dim, 4 * c, **factory)
        self.qkv = operations.Linear(c, 3 * c, bias=False, **factory)
        self.proj = operations.Linear(c, c, **factory)
        self.fc1 = operations.Linear(c, FEED_FORWARD_RATIO * c, **factory)
        self.fc2 = operations.Linear(FEED_FORWARD_RATIO * c, c, **factory)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        height = x.shape[2]
        for_attention, for_mlp = self.emb_proj(embedding).chunk(2, dim=1)
        tokens = rearrange(modulate(channel_norm(x), for_attention), "b c y x -> b (y x) c")
        q, k, v = rearrange(self.qkv(tokens), "b p (three n d) -> three b n p d", three=3, n=self.num_heads)
        mixed = rearrange(self.attention(q, k, v), "b n p d -> b p (n d)")
        x = x + rearrange(self.proj(mixed), "b (y x) c -> b c y x", y=height)
        tokens = rearrange(modulate(channel_norm(x), for_mlp), "b c y x -> b (y x) c")
        hidden = F.gelu(self.fc1(tokens), approximate="tanh")
        return x + rearrange(self.fc2(hidden), "b (y x) c -> b c y x", y=height)


def spread_mean(mean: Tensor, shape: Sequence[int]) -> Tensor:
    """A mean [C, S, S] on the grid of states [C, *spatial]: a video's is that of all its frames."""
    spread = F.interpolate(mean[None], size=tuple(shape[-2:]), mode="bilinear")[0]
    return spread[:, None].expand(tuple(shape)) if len(shape) == 4 else spread


def make_blocks(config: SideNetConfig, operations: Any, attention: AttentionFunction, **factory: Any) -> nn.ModuleList:
    """The blocks of the configured architecture."""
    if config.architecture == "transformer":
        return nn.ModuleList(TokenBlock(config, operations, attention, **factory) for _ in range(config.num_layers))
    if config.architecture == "local":
        return nn.ModuleList(LocalBlock(config, operations, **factory) for _ in range(config.num_layers))
    blocks: list[nn.Module] = [ResidualBlock(config, operations, **factory) for _ in range(config.num_layers)]
    blocks[config.num_layers // 2] = AttentionBlock(config, operations, attention, **factory)
    return nn.ModuleList(blocks)


class SideNet(nn.Module):
    """The network of the module's docstring.

    Args:
        config: see `SideNetConfig`.
        operations: namespace of layer classes (`torch.nn`, or ComfyUI's `comfy.ops` classes).
        device, dtype: where and in what the parameters are made.
        attention: see `sit.AttentionFunction`.
    """

    def __init__(
        self,
        config: SideNetConfig,
        operations: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        attention: AttentionFunction = F.scaled_dot_product_attention,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        c, e, p = config.base_channels, config.embedding_dim, config.patch_size
        self.config, self.attention = config, attention
        self.table: Tensor | None = None  # the positions of the last size, where they were used
        self.h_embedder = TimestepEmbedder(e, operations, **factory)
        self.t_embedder = TimestepEmbedder(e, operations, **factory)
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config.num_classes, e, operations, **factory)
        if config.anchors == 2:
            self.d_embedder = TimestepEmbedder(e, operations, **factory)
        if config.cfg_input:
            self.g_embedder = TimestepEmbedder(e, operations, **factory)
        embeddings = 2 + bool(config.num_classes) + (config.anchors == 2) + config.cfg_input
        self.emb_fusion = nn.Sequential(
            operations.Linear(embeddings * e, e, **factory), nn.SiLU(), operations.Linear(e, e, **factory)
        )
        inputs = (1 + config.anchors) * config.in_channels * p * p
        k = config.kernel_size
        self.input_conv = operations.Conv2d(inputs, c, k, padding=k // 2, bias=False, **factory)
        self.blocks = make_blocks(config, operations, attention, **factory)
        self.output_conv = operations.Conv2d(c, config.in_channels * p * p, k, padding=k // 2, **factory)
        if config.data_mean_size:
            size = (config.in_channels, config.data_mean_size, config.data_mean_size)
            self.data_mean: Tensor
            self.register_buffer("data_mean", torch.zeros(size, device=device, dtype=dtype))

    @property
    def anchors(self) -> int:
        return self.config.anchors

    @property
    def cfg_input(self) -> bool:
        return self.config.cfg_input

    @property
    def has_data_mean(self) -> bool:
        return self.config.data_mean_size > 0

    def analytic_velocity(self, x: Tensor, t: float) -> Tensor:
        """The velocity at pure noise without a model call: straight to the data mean.

        Args:
            x: [B, C, *spatial] noise, of any size.
            t: the time, 1 or just below.

        Returns:
            Like x.

        Raises:
            ValueError: x has other channels than the network takes, or the network keeps no data mean.
        """
        if not self.has_data_mean:
            raise ValueError("This SideNet keeps no data mean, so its first step is not analytic.")
        self._check_state(x)
        return (x - spread_mean(self.data_mean.to(x), x.shape[1:])) / t

    def zero_output(self) -> SideNet:
        """Zero the last layer, so that an untrained SideNet adds nothing (the published initialisation)."""
        nn.init.zeros_(self.output_conv.weight)
        nn.init.zeros_(self.output_conv.bias)
        return self

    def forward(
        self,
        x: Tensor,
        v: Tensor,
        t: Tensor,
        h: Tensor,
        cond: Tensor | None = None,
        *,
        slope: Tensor | None = None,
        span: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """What to add to `v`, the velocity at (x, t), to get the velocity at t - h on the same path.

        Args:
            x, v: [B, C, H, W] images or [B, C, T, H, W] videos (frame by frame); sizes that `patch_size` does not
                divide are padded.
            t: [B] times in [0, 1].
            h: [B] steps, positive toward the data.
            cond: [B] class indices; a network without classes ignores them.
            slope: like x, two anchors only: (v_b - v) / d.
            span: [B], two anchors only: d = t - t_b. None or 0 where there is no second anchor.
            scale: [B] CFG scales, for a network with `cfg_input`.

        Returns:
            The change of velocity, like x and in its dtype; it carries the factor h.

        Raises:
            ValueError: channels, batch sizes or the condition do not fit the configuration.
        """
        self._check(x, v, t, h, cond, scale)
        if self.config.anchors == 2:
            slope = torch.zeros_like(x) if slope is None else slope
            span = torch.zeros_like(h) if span is None else span
        planes = [x, v, slope] if slope is not None and self.config.anchors == 2 else [x, v]
        net = self._network(planes, self._embedding(t, h, cond, span, scale))
        if self.config.anchors == 1 or span is None or slope is None:
            return net * per_sample(h, x)
        # No second anchor (d = 0): the one-anchor form, factor h; else vanishing at both anchors, smooth between.
        both = h * (h - span) / (h.abs() + span.abs()).clamp_min(torch.finfo(h.dtype).tiny)
        return slope * per_sample(h, x) + net * per_sample(torch.where(span == 0, h, both), x)

    def _embedding(
        self, t: Tensor, h: Tensor, cond: Tensor | None, span: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        dtype = self.input_conv.weight.dtype
        parts = [self.t_embedder(t, dtype), self.h_embedder(h, dtype)]
        if self.config.num_classes and cond is not None:
            parts.append(self.y_embedder(cond).to(dtype))
        if self.config.anchors == 2 and span is not None:
            parts.append(self.d_embedder(span, dtype))
        if self.config.cfg_input and scale is not None:
            parts.append(self.g_embedder(scale, dtype))
        return self.emb_fusion(torch.cat(parts, dim=-1))

    def _network(self, planes: list[Tensor], embedding: Tensor) -> Tensor:
        like = planes[0]
        frames = like.shape[2] if like.ndim == 5 else 1
        stacked = torch.cat(planes, dim=1)
        if like.ndim == 5:
            stacked = rearrange(stacked, "b c t y x -> (b t) c y x")
            embedding = embedding.repeat_interleave(frames, dim=0)
        p = self.config.patch_size
        height, width = stacked.shape[-2:]
        padding = (0, -width % p, 0, -height % p)
        if any(padding):
            stacked = F.pad(stacked, padding, mode="replicate")
        feature = self.input_conv(F.pixel_unshuffle(stacked.to(self.input_conv.weight.dtype), p))
        if self.config.architecture == "transformer":
            feature = feature + self._positions(feature)
        for block in self.blocks:
            feature = block(feature, embedding)
        out = F.pixel_shuffle(self.output_conv(F.silu(channel_norm(feature))), p)[..., :height, :width]
        if like.ndim == 5:
            out = rearrange(out, "(b t) c y x -> b c t y x", t=frames)
        return out.to(like.dtype)

    def _positions(self, feature: Tensor) -> Tensor:
        """The table for a feature, sent to its device once."""
        table = self.table
        wanted = feature.shape[1:], feature.dtype, feature.device
        if table is None or (table.shape[1:], table.dtype, table.device) != wanted:
            self.table = table = positions(feature)
        return table

    def _check_state(self, x: Tensor) -> None:
        channels = self.config.in_channels
        if x.ndim not in (4, 5) or x.shape[1] != channels:
            raise ValueError(
                f"This SideNet takes x of [B, {channels}, H, W] or [B, {channels}, T, H, W]; got {tuple(x.shape)}. "
                "Use a SideNet made for this model."
            )

    def _check(self, x: Tensor, v: Tensor, t: Tensor, h: Tensor, cond: Tensor | None, scale: Tensor | None) -> None:
        c = self.config
        self._check_state(x)
        if v.shape != x.shape:
            raise ValueError(f"v must have x's shape {tuple(x.shape)}; got {tuple(v.shape)}.")
        if c.num_classes and cond is None:
            raise ValueError(f"This SideNet takes class indices up to {c.num_classes} (the null class); got none.")
        if c.cfg_input and scale is None:
            raise ValueError("This SideNet takes the guidance scale as an input; got none.")
        for name, value in (("t", t), ("h", h), ("cond", cond), ("scale", scale)):
            if value is not None and value.shape[:1] != x.shape[:1]:
                raise ValueError(f"{name} must be [{x.shape[0]}], one value a sample; got {tuple(value.shape)}.")
