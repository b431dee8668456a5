"""What the nodes cost: the sampler in ComfyUI against `bas_core.solve` on the same model, and a graph without us.

    COMFYUI_PATH=... python tests/benchmark_comfyui.py [--width 768 --depth 12 --repeats 7]

Prints the medians and the share that the adapter adds, in processor time, which other work on the machine does not
change. The runs alternate, and the networks run on one thread of the CPU.
"""

import argparse
import statistics
import time

import comfyui

comfyui.require()

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import torch
from ba_solver.bas_core import Field, SideNet, SideNetCard, SideNetConfig, SiT, SiTConfig, save_sidenet, save_sit, solve
from ba_solver.bas_core.flow import x0_to_velocity
from ba_solver.nodes.models.attach import apply_sidenet, read_sidenet
from ba_solver.nodes.models.labels import conditioning_of
from ba_solver.nodes.models.sit_model import read_sit
from ba_solver.nodes.sampling_nodes import BASampler


def build(arguments, folder):
    """A SiT of the given size and a SideNet for it, as MODEL and as plain networks."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig(hidden_size=arguments.width, depth=arguments.depth, num_heads=arguments.width // 64))
    save_sit(folder / "sit.safetensors", sit.state_dict(), sit.config)
    sidenet = SideNet(SideNetConfig(base_channels=64, embedding_dim=64, num_classes=0, anchors=2, patch_size=2))
    save_sidenet(folder / "sidenet.safetensors", sidenet, SideNetCard(cfg_mode="combined", cfg_range=(1.0, 10.0)))
    model = read_sit(folder / "sit.safetensors")
    return model, apply_sidenet(model, read_sidenet(folder / "sidenet.safetensors", "bench"), 1.0)


def seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


def core_only(applied, z, sigmas, texts):
    """Seconds inside `solve` alone, on ComfyUI's own model function: what the adapter is compared with."""
    spent = []

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None):
        network = applied.get_additional_models_with_key("sidenet")[0].model

        def velocity(y, t, count):
            return x0_to_velocity(y, model(y, t, **extra_args), t)[None]

        spent.append(seconds(lambda: solve(Field(velocity), network, x, sigmas.cpu())))
        return x

    comfy.sample.sample_custom(applied, z, 2.0, comfy.samplers.KSAMPLER(sample), sigmas, *texts, torch.zeros_like(z))
    return spent[0]


def adapter(applied, z, sigmas, texts):
    """Seconds inside our sampler function."""
    sampler = BASampler.execute("bi_anchor").result[0]
    inner, spent = sampler.sampler_function, []

    def timed(*positional, **named):
        start = time.process_time()
        out = inner(*positional, **named)
        spent.append(time.process_time() - start)
        return out

    sampler.sampler_function = timed
    comfy.sample.sample_custom(applied, z, 2.0, sampler, sigmas, *texts, torch.zeros_like(z), callback=lambda *_: None)
    return spent[0]


def euler(model, z, sigmas, texts):
    """Seconds of a graph that does not use us, on a MODEL with or without a SideNet."""
    solver = comfy.samplers.ksampler("euler")
    return seconds(lambda: comfy.sample.sample_custom(model, z, 2.0, solver, sigmas, *texts, torch.zeros_like(z)))


def main():
    import tempfile
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calls", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model, applied = build(arguments, Path(folder))
        z, sigmas = torch.randn(1, 4, 32, 32), torch.linspace(1, 0, arguments.calls + 1)
        texts = [conditioning_of(torch.tensor([label])) for label in (1, 1000)]
        runs = {
            "solve": lambda: core_only(applied, z, sigmas, texts),
            "sampler": lambda: adapter(applied, z, sigmas, texts),
            "euler, bare MODEL": lambda: euler(model, z, sigmas, texts),
            "euler, MODEL with SideNet": lambda: euler(applied, z, sigmas, texts),
        }
        for run in runs.values():
            run()  # warm up
        times = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                times[name].append(run())
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:28s} {1000 * value:9.2f} ms")
    print(f"the sampler adds {100 * (medians['sampler'] / medians['solve'] - 1):.2f} % to solve")


if __name__ == "__main__":
    main()
