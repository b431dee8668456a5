"""ComfyUI's own model classes, tiny and randomly initialised, with conditioning, latents and SideNets to go with them.

Import after `comfyui.require()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from ba_solver.bas_core import SideNet, SideNetCard, SideNetConfig, save_sidenet
from ba_solver.nodes.folders import SIDENETS
from ba_solver.nodes.models.attach import LoadedSideNet, apply_sidenet, read_sidenet
from torch import Tensor


@dataclass(frozen=True)
class Tiny:
    """One kind of model.

    Attributes:
        config: ComfyUI's class that describes the kind.
        unet: the network's sizes.
        latent: [C, *spatial] that it draws.
        context: [tokens, width] of the text.
        extras: what its conditioning holds beside the text.
    """

    config: str
    unet: dict[str, Any]
    latent: tuple[int, ...]
    context: tuple[int, int]
    extras: Callable[[torch.Generator], dict[str, Any]] = lambda generator: {}
    setup: Callable[[Any], None] = lambda config: None


def _pooled(width: int) -> Callable[[torch.Generator], dict[str, Any]]:
    return lambda generator: {"pooled_output": torch.randn(1, width, generator=generator)}


TINY: dict[str, Tiny] = {
    "flux": Tiny(
        "Flux",
        {
            "image_model": "flux", "guidance_embed": True, "in_channels": 16, "out_channels": 16, "vec_in_dim": 24,
            "context_in_dim": 32, "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
            "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True,
            "txt_ids_dims": [],
        },
        (16, 8, 8), (6, 32), _pooled(24),
    ),
    "sd3": Tiny(
        "SD3",
        {
            "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "num_patches": 256,
            "pos_embed_max_size": 16, "pos_embed_scaling_factor": None, "adm_in_channels": 40, "qkv_bias": True,
            "context_embedder_config": {
                "target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128},
            },
        },
        (16, 8, 8), (5, 32), _pooled(40),
    ),
    "wan": Tiny(
        "WAN21_T2V",
        {
            "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": 32,
            "num_heads": 2, "num_layers": 2, "in_dim": 16, "out_dim": 16, "text_len": 16,
        },
        (16, 3, 8, 8), (5, 32),
    ),
    "lumina2": Tiny(
        "Lumina2",
        {
            "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 64, "n_layers": 2,
            "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "cap_feat_dim": 32,
            "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512], "multiple_of": 16,
        },
        (16, 8, 8), (5, 32),
    ),
    "sdxl": Tiny(
        "SDXL",
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1],
            "channel_mult": [1, 2], "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
            "transformer_depth_middle": 1, "use_spatial_transformer": True, "use_linear_in_transformer": True,
            "context_dim": 32, "adm_in_channels": 2816, "num_classes": "sequential", "legacy": False,
            "use_checkpoint": False, "use_temporal_attention": False,
        },
        (4, 8, 8), (5, 32), _pooled(1280),
    ),
}  # fmt: skip
# v-prediction with a terminal signal-to-noise ratio of zero: the longest and steepest path there is.
TINY["sdxl_v"] = replace(TINY["sdxl"], setup=lambda config: config.sampling_settings.update(zsnr=True))
NAMES = tuple(TINY)
# Video models that are told of a latent's mask; only what concerns masks is tried on them.
MASKED: dict[str, Tiny] = {
    "wan22": Tiny(
        "WAN22_T2V",
        {
            "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "freq_dim": 32, "text_dim": 32,
            "num_heads": 2, "num_layers": 2, "in_dim": 48, "out_dim": 48, "text_len": 16,
        },
        (48, 3, 8, 8), (5, 32),
    ),
    "ltxv": Tiny(
        "LTXV",
        {
            "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 64, "attention_head_dim": 32,
            "num_attention_heads": 2, "caption_channels": 32, "num_layers": 2,
        },
        (128, 3, 4, 4), (5, 32), lambda generator: {"attention_mask": torch.ones(1, 5, dtype=torch.long)},
    ),
}  # fmt: skip
TINY |= MASKED
TINY["sdxl_inpaint"] = replace(TINY["sdxl"], unet={**TINY["sdxl"].unet, "in_channels": 9})


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights such that every layer passes something on; ComfyUI's layers leave theirs uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = noise / math.sqrt(parameter[0].numel())
        else:
            value = (1.0 if "norm" in name and name.endswith(("weight", "scale")) else 0.0) + 0.1 * noise
        parameter.data.copy_(value)
    for name, buffer in module.named_buffers():
        if name.endswith("pos_embed"):  # read from the checkpoint, and so not initialised either
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def make_model(name: str, seed: int = 0) -> Any:
    """A fresh MODEL of a kind."""
    tiny = TINY[name]
    config = getattr(comfy.supported_models, tiny.config)(dict(tiny.unet))
    tiny.setup(config)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({"v_pred": 0} if name == "sdxl_v" else {}, "")
    randomise(model.diffusion_model, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def text(name: str, seed: int) -> list[list[Any]]:
    """A CONDITIONING of random text."""
    tiny, generator = TINY[name], torch.Generator().manual_seed(seed)
    return [[torch.randn(1, *tiny.context, generator=generator), tiny.extras(generator)]]


def noise(name: str, batch: int = 1, seed: int = 0, latent: tuple[int, ...] | None = None) -> Tensor:
    return torch.randn(batch, *(latent or TINY[name].latent), generator=torch.Generator().manual_seed(seed))


def make_sidenet(path: Any, channels: int, card: SideNetCard | None = None, seed: int = 0, **config: Any) -> Any:
    """A small SideNet with random weights, written to a file and read back as the nodes do."""
    sizes = {"base_channels": 16, "embedding_dim": 16, "num_heads": 2, "num_layers": 3, "num_classes": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SideNet(SideNetConfig(in_channels=channels, **{**sizes, **config}))
        if network.config.data_mean_size:
            network.data_mean.normal_()
    if network.config.cfg_input:  # random weights hear little of their inputs; this one is to be heard
        for parameter in network.g_embedder.parameters():
            parameter.data *= 10
    save_sidenet(path, network, card)
    return read_sidenet(path, path.name)


def file_sidenet(name: str) -> LoadedSideNet:
    """A SideNet by its name in the node's list."""
    return read_sidenet(SIDENETS.path(name), name)


def with_sidenet(model: Any, sidenet: LoadedSideNet, strength: float = 1.0) -> Any:
    return apply_sidenet(model, sidenet, strength)
