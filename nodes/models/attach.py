"""A SideNet in ComfyUI: read from a file, put on a MODEL, and found there by the sampler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch

from ...bas_core.checkpoint import SideNetCard, load_sidenet
from ...bas_core.sidenet import SideNet
from .attention import ComfyAttention

KEY = "sidenet"
RECORD = "ba_solver_sidenet"


@dataclass(frozen=True)
class LoadedSideNet:
    """A SideNet on a SIDENET link or on a MODEL.

    Attributes:
        patcher: ComfyUI's handle of the network, so that ComfyUI loads and offloads it.
        card: the file's metadata.
        name: of the file, for messages.
        strength: 1 = as trained, 0 = the multistep method.
    """

    patcher: Any
    card: SideNetCard
    name: str
    strength: float = 1.0

    @property
    def network(self) -> SideNet:
        return self.patcher.model

    @property
    def has_data_mean(self) -> bool:
        """Whether it can take the first step analytically."""
        return self.network.has_data_mean


def read_sidenet(path: Path, name: str, dtype: torch.dtype | None = None) -> LoadedSideNet:
    """Read a SideNet file into a network of ComfyUI's layers.

    Args:
        path: a safetensors file in the project's format.
        name: of the file, for messages.
        dtype: of the weights; None = as stored.

    Raises:
        FileNotFoundError, CheckpointError: see `bas_core.load_sidenet`.
    """
    stored, card = load_sidenet(path, dtype=dtype)
    weights = stored.state_dict()
    offload = comfy.model_management.unet_offload_device()
    network = SideNet(
        stored.config, comfy.ops.manual_cast, offload, next(iter(weights.values())).dtype, ComfyAttention()
    ).eval()
    patcher = comfy.model_patcher.CoreModelPatcher(
        network, load_device=comfy.model_management.get_torch_device(), offload_device=offload
    )
    network.load_state_dict(weights, assign=patcher.is_dynamic())
    network.requires_grad_(False)
    # Lets ComfyUI make a second copy of the network, for another device or without dynamic memory.
    patcher.cached_patcher_init = (_read_patcher, (path, name, dtype))
    return LoadedSideNet(patcher, card, name)


def _read_patcher(path: Path, name: str, dtype: torch.dtype | None, disable_dynamic: bool = False) -> Any:
    loaded = read_sidenet(path, name, dtype)
    if not disable_dynamic:
        return loaded.patcher
    network = loaded.network
    plain = comfy.model_patcher.ModelPatcher(network, loaded.patcher.load_device, loaded.patcher.offload_device)
    plain.cached_patcher_init = loaded.patcher.cached_patcher_init
    return plain


def apply_sidenet(model: Any, sidenet: LoadedSideNet, strength: float) -> Any:
    """A clone of the MODEL with the SideNet on it, in place of any other; the given MODEL stays as it is.

    The SideNet is loaded where the MODEL is, which a node may have moved to another GPU (Select Model Device).
    """
    clone = model.clone()
    patcher = sidenet.patcher.clone()
    patcher.load_device = clone.load_device
    if hasattr(patcher, "register_load_device"):  # newer ComfyUI's dynamic memory has an arena a device
        patcher.register_load_device(patcher.load_device)
    patcher.set_attachments(RECORD, replace(sidenet, patcher=None, strength=strength))
    clone.set_additional_models(KEY, [patcher])
    return clone


def applied_sidenet(model: Any) -> LoadedSideNet | None:
    """The SideNet on a MODEL, or None."""
    patchers = model.get_additional_models_with_key(KEY)
    if not patchers:
        return None
    # Cloning a MODEL clones its SideNet's patcher; the clone is what ComfyUI has loaded.
    return replace(patchers[0].get_attachment(RECORD), patcher=patchers[0])
