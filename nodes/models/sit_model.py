"""SiT as a ComfyUI MODEL: the network in ComfyUI's layers, in one of ComfyUI's model classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from torch import Tensor

from ...bas_core.checkpoint import load_sit
from ...bas_core.files import fingerprint
from ...bas_core.guidance import check_labels
from ...bas_core.sit import SiT as SiTNetwork
from ...bas_core.sit import SiTConfig
from .attention import ComfyAttention
from .identity import SIT_RECORD
from .labels import KEY


class DiffusionSiT(SiTNetwork):
    """The network, called as ComfyUI calls a diffusion model."""

    def __init__(self, config: SiTConfig, dtype: torch.dtype, device: Any = None, operations: Any = None) -> None:
        self.attention = ComfyAttention()
        super().__init__(config, operations, device, dtype, self.attention)
        self.dtype = dtype

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor | None = None,
        transformer_options: dict[str, Any] | None = None,
        **_: Any,
    ) -> Tensor:
        """Velocity [B, C, H, W] at x, flow times [B] and class indices y [B].

        Raises:
            ValueError: no class, or a latent of another size than the SiT's.
        """
        if y is None:
            raise ValueError("SiT takes a class, and the conditioning has none. Connect Class Label to the sampler.")
        c = self.config
        if tuple(x.shape[1:]) != (c.in_channels, c.input_size, c.input_size):
            pixels = c.input_size * (1 if c.in_channels == 3 else 8)
            raise ValueError(
                f"This SiT draws {pixels}x{pixels} pixels only, from latents of {c.in_channels} channels; got a latent "
                f"of {tuple(x.shape[1:])}. Set Empty Latent Image to {pixels}x{pixels}."
            )
        self.attention.options = transformer_options or {}
        return super().forward(x, timestep, y.flatten())


class PixelSpace(comfy.latent_formats.LatentFormat):
    """Images in [-1, 1] instead of latents; goes with the VAE `pixel_space`."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class SiTModelConfig(comfy.supported_models_base.BASE):
    """ComfyUI's configuration of the model class. The network takes the flow time, which is sigma."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012, ComfyUI reads it off the class
    sampling_settings: dict[str, Any] = {"shift": 1.0, "multiplier": 1.0}  # noqa: RUF012
    memory_usage_factor = 1.0
    supported_inference_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012

    def __init__(self, config: SiTConfig) -> None:
        self.latent_format = PixelSpace if config.in_channels == 3 else comfy.latent_formats.SD15
        super().__init__({"config": config})


class SiT(comfy.model_base.BaseModel):
    """ComfyUI's model class; its name is the kind that SideNets are checked against."""

    def __init__(self, model_config: SiTModelConfig, device: Any = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=DiffusionSiT)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The class indices, as the network takes them.

        Raises:
            ValueError: the SiT has no such class.
        """
        labels = kwargs.get(KEY)
        if labels is None:
            return {}
        check_labels(labels, self.diffusion_model.null_class)
        return {"y": comfy.conds.CONDRegular(labels.to(kwargs["device"]))}


def read_sit(
    path: Path, convention: str | None = None, dtype: torch.dtype = torch.float32, disable_dynamic: bool = False
) -> Any:
    """A SiT file as a ComfyUI model patcher.

    Args:
        path: our safetensors, or a public SiT or REPA checkpoint (`.pt` files are read without running anything).
        convention: see `bas_core.load_sit`.
        dtype: of the weights and, where the device has it, of the computation.
        disable_dynamic: without ComfyUI's dynamic memory; ComfyUI asks for such copies.

    Raises:
        FileNotFoundError, CheckpointError: see `bas_core.load_sit`.
    """
    stored = load_sit(path, convention)
    state = stored.state_dict()
    management = comfy.model_management
    config = SiTModelConfig(stored.config)
    device, offload = management.get_torch_device(), management.unet_offload_device()
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, config.supported_inference_dtypes))
    mark = fingerprint(state)
    model = SiT(config, device=offload)
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=offload)
    model.load_model_weights({name: value.to(dtype) for name, value in state.items()}, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (read_sit, (path, convention, dtype))
    patcher.set_attachments(SIT_RECORD, mark)
    return patcher


def find_sit_config(model: Any) -> SiTConfig | None:
    """The configuration of a SiT MODEL; None for other MODELs."""
    network = getattr(model.model, "diffusion_model", None)
    return network.config if isinstance(network, SiTNetwork) else None


def sit_config(model: Any) -> SiTConfig:
    """The configuration of a SiT MODEL.

    Raises:
        ValueError: the MODEL is no SiT.
    """
    config = find_sit_config(model)
    if config is None:
        raise ValueError(
            f"Class Label names classes of a SiT; this MODEL is a {type(model.model).__name__}. Use its own text "
            "encoder, or connect Load SiT."
        )
    return config
