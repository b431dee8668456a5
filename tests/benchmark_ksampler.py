"""KSampler with `ba_solver` and a SideNet against ComfyUI's own samplers, at the same number of steps.

    COMFYUI_PATH=... python tests/benchmark_ksampler.py demo [--sidenet FILE]
    COMFYUI_PATH=... python tests/benchmark_ksampler.py hsc32 --sidenet hsc32.safetensors

The error is the RMS distance from the end of a fine sampling of the same noise, the mean over noises. Each rival stands
with the best of its schedulers, found on the noises that are reported. Needs no network but for a galaxy model's first
download (`lab/galaxies.py`).
"""

import argparse
from pathlib import Path

import comfyui

comfyui.require()

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models_base
import torch
from ba_solver.lab import galaxies
from ba_solver.nodes import ksampler
from ba_solver.nodes.folders import DEMO, SIDENETS, SITS
from ba_solver.nodes.models.attach import apply_sidenet, read_sidenet
from ba_solver.nodes.models.labels import conditioning_of
from ba_solver.nodes.models.sit_model import read_sit
from ba_solver.nodes.sampling.sampler import MULTISTEP, Options, sample_ba_solver

RIVALS = ("dpmpp_2m", "uni_pc", "ipndm")
SCHEDULERS = ("simple", "beta", "normal", "kl_optimal")
OURS = ("simple", "beta")
NOISES, FINE = 16, 200


class Galaxies(torch.nn.Module):
    """A galaxy model's velocity, called as ComfyUI calls a diffusion model."""

    def __init__(self, velocity, dtype=torch.float32):
        super().__init__()
        self.velocity, self.dtype = velocity, dtype

    def forward(self, x, timestep, **_):
        return self.velocity(x, timestep, None, 1.0)


class OneChannel(comfy.latent_formats.LatentFormat):
    latent_channels = 1


class GalaxyConfig(comfy.supported_models_base.BASE):
    """ComfyUI's configuration of a flow model whose network takes the flow time."""

    unet_extra_config = {}  # noqa: RUF012
    sampling_settings = {"shift": 1.0, "multiplier": 1.0}  # noqa: RUF012
    latent_format = OneChannel


def galaxy_model(name):
    """A galaxy model as a MODEL that starts where its diffusion does."""
    backbone = getattr(galaxies, name)(torch.device("cpu"), torch.float32)
    config = GalaxyConfig({})
    config.set_inference_dtype(torch.float32, None)

    def network(device=None, operations=None, **_):
        return Galaxies(backbone.velocity)

    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.FLOW, unet_model=network)
    model.model_sampling.sigmas.mul_(backbone.start)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def case(name):
    """A MODEL, positive, negative, CFG and the shape of a batch."""
    if name == "demo":
        labels = torch.arange(NOISES) % 10
        positive, negative = conditioning_of(labels), conditioning_of(torch.full_like(labels, 10))
        return read_sit(SITS.demo), positive, negative, 2.0, (NOISES, 3, 32, 32)
    empty = [[torch.zeros(1, 1, 1), {}]]
    size = galaxies.MODELS[name][1]
    return galaxy_model(name), empty, empty, 1.0, (NOISES, 1, size, size)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("demo", *galaxies.MODELS))
    parser.add_argument("--sidenet", type=Path, default=SIDENETS.path(DEMO))
    parser.add_argument("--steps", type=int, nargs="+", default=list(range(4, 13)))
    arguments = parser.parse_args()
    ksampler.register()
    torch.set_num_threads(1)
    model, positive, negative, cfg, shape = case(arguments.model)
    applied = apply_sidenet(model, read_sidenet(arguments.sidenet, arguments.sidenet.name), 1.0)
    noise, latent = torch.randn(shape, generator=torch.Generator().manual_seed(4321)), torch.zeros(shape)
    process = model.model.process_latent_in

    def end(which, sampler, scheduler, steps):
        return process(comfy.sample.sample(
            which, noise, steps, cfg, sampler, scheduler, positive, negative, latent, disable_pbar=True
        ))  # fmt: skip

    def fine(steps):
        sampler = comfy.samplers.KSAMPLER(sample_ba_solver, {"options": Options(MULTISTEP)})
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "beta", steps)
        arguments = (model, noise, cfg, sampler, sigmas, positive, negative, latent)
        return process(comfy.sample.sample_custom(*arguments, disable_pbar=True))

    with torch.inference_mode():
        exact = fine(FINE)

        def error(x):
            return (x - exact).square().flatten(1).mean(1).sqrt().mean().item()

        print(f"{arguments.model}, {arguments.sidenet.name}, {NOISES} noises; own error {error(fine(FINE // 2)):.4f}")
        print(f"{'steps':>5}" + "".join(f"{name:>14}" for name in (*OURS, *RIVALS)) + "  ours over the best")
        for steps in arguments.steps:
            ours = [error(end(applied, "ba_solver", scheduler, steps)) for scheduler in OURS]
            rivals = [min(error(end(model, name, each, steps)) for each in SCHEDULERS) for name in RIVALS]
            row = "".join(f"{value:14.4f}" for value in (*ours, *rivals))
            print(f"{steps:5}{row}  {max(ours) / min(rivals):.2f}", flush=True)


if __name__ == "__main__":
    main()
