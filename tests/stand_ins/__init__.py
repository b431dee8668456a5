"""A pack for a ComfyUI that has no model files: its loaders give tiny random models of ComfyUI's own classes.

`.ci/official_templates.py` puts it beside this project's pack. Where a loader asks for a file, the name of a kind
(`comfy_models.TINY`) is to stand.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import comfy_models
import torch

import nodes

KINDS = list(comfy_models.TINY)


class Clip:
    """Text of a kind, random and the same for the same words."""

    def __init__(self, kind):
        self.kind = kind

    def tokenize(self, text, **_):
        return dict.fromkeys(("l", "g", "h", "t5xxl", "umt5xxl", "gemma2_2b"), text)

    def encode_from_tokens_scheduled(self, tokens, **_):
        return comfy_models.text(self.kind, len(str(tokens)) % 7)

    def clone(self):
        return self

    def clip_layer(self, layer):
        pass


class Vae:
    """Latents to grey pictures of the right size, and pictures to latents."""

    def __init__(self, kind):
        self.latent = comfy_models.TINY[kind].latent

    def decode(self, samples):
        frames = samples.movedim(2, 1).flatten(0, 1) if samples.ndim == 5 else samples
        grey = frames.mean(1, keepdim=True).sigmoid().repeat_interleave(8, 2).repeat_interleave(8, 3)
        return grey.movedim(1, -1).expand(-1, -1, -1, 3)

    def decode_tiled(self, samples, **_):
        return self.decode(samples)

    def encode(self, pixels):
        height, width = (math.ceil(side / 8) for side in pixels.shape[-3:-1])
        frames = (pixels.shape[0],) if len(self.latent) == 4 else ()
        shape = (1, self.latent[0], *frames, height, width) if frames else (len(pixels), self.latent[0], height, width)
        return torch.zeros(shape)


def loader(returned, made, names):
    """A loader in the place of ComfyUI's, with the same inputs except that files are kinds."""

    def replace(original):
        class StandIn(original):
            @classmethod
            def INPUT_TYPES(cls):
                known = original.INPUT_TYPES()
                return {
                    group: {name: (KINDS,) if name in names else spec for name, spec in inputs.items()}
                    for group, inputs in known.items()
                }

            FUNCTION = "stand_in"

            def stand_in(self, **given):
                return tuple(make(given) for make in made)

        StandIn.RETURN_TYPES = returned
        StandIn.__name__ = original.__name__
        return StandIn

    return replace


def model(name):
    return lambda given: comfy_models.make_model(given[name])


REPLACED = {
    "UNETLoader": loader(("MODEL",), [model("unet_name")], ["unet_name"]),
    "CheckpointLoaderSimple": loader(
        ("MODEL", "CLIP", "VAE"),
        [model("ckpt_name"), lambda given: Clip(given["ckpt_name"]), lambda given: Vae(given["ckpt_name"])],
        ["ckpt_name"],
    ),
    "CLIPLoader": loader(("CLIP",), [lambda given: Clip(given["clip_name"])], ["clip_name"]),
    "DualCLIPLoader": loader(("CLIP",), [lambda given: Clip(given["clip_name1"])], ["clip_name1", "clip_name2"]),
    "VAELoader": loader(("VAE",), [lambda given: Vae(given["vae_name"])], ["vae_name"]),
    "LoraLoaderModelOnly": loader(("MODEL",), [lambda given: given["model"]], ["lora_name"]),
    "LoraLoader": loader(("MODEL", "CLIP"), [lambda given: given["model"], lambda given: given["clip"]], ["lora_name"]),
}
NODE_CLASS_MAPPINGS = {}
for _name, _replace in REPLACED.items():
    nodes.NODE_CLASS_MAPPINGS[_name] = _replace(nodes.NODE_CLASS_MAPPINGS[_name])
