"""Feature caching as ComfyUI has it, EasyCache and LazyCache, beside BA-solver on the demo at equal model calls.

    COMFYUI_PATH=... python tests/benchmark_easycache.py

Sampler, number of steps, shift and threshold are searched for each number of calls on noises of their own. A step that
the cache skips costs no call; what is counted is what the model did evaluate. Prints the distance from the exact end.
"""

import itertools
import math

import comfyui

comfyui.require()

import comfy.samplers
import torch
from ba_solver.bas_core.grids import time_grid
from ba_solver.lab.benchmark import REPORT_SEED, SEARCH_SEED
from ba_solver.nodes.folders import DEMO
from ba_solver.nodes.sampling.guider import guider_for
from ba_solver.nodes.sampling_nodes import BAScheduler
from ba_solver.nodes.sidenet_nodes import ApplySideNet
from ba_solver.nodes.sit_nodes import ClassLabel, LoadSiT
from ba_solver.training.demo.assets import DEMO_CFG, demo_noise
from ba_solver.training.schedules.solvers import endpoint_errors
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

CALLS = (5, 7, 10)
SAMPLERS = ("euler", "dpmpp_2m", "ipndm")
STEPS, SHIFTS = (8, 12, 20), (1.0, 2.0, 4.0)
THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5)
CACHES = {"EasyCache": EasyCacheNode, "LazyCache": LazyCacheNode}
REFERENCE_STEPS = 120
SEARCHED, REPORTED = 10, 96


class Rig:
    """The demo in ComfyUI, with its model calls counted."""

    def __init__(self):
        self.demo = LoadSiT.execute(DEMO).result[0]
        self.texts = ClassLabel.execute(self.demo, "all classes, one a picture").result
        self.evaluated = 0
        # A cache answers in the network's place; what it does not skip goes through the first block.
        self.demo.model.diffusion_model.blocks[0].register_forward_hook(self._count)

    def _count(self, block, inputs, output):
        self.evaluated += len(inputs[0])

    def sample(self, model, sampler, sigmas, noise):
        """The end, and how many guided calls a sample it took."""
        self.evaluated = 0
        guider = guider_for(model, *self.texts, DEMO_CFG)
        drawn = guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=1
        )
        return drawn, self.evaluated / (2 * len(noise))

    def cached(self, cache, threshold):
        return CACHES[cache].execute(self.demo.clone(), threshold, 0.0, 1.0, False).result[0]


def main():
    torch.set_num_threads(1)
    with torch.inference_mode():
        rig = Rig()
        # All classes in turn, as Class Label has them.
        parts = {seed: demo_noise(seed, n)[0] for seed, n in ((SEARCH_SEED, SEARCHED), (REPORT_SEED, REPORTED))}
        exact = torch.cat([torch.linspace(1, 0.01, REFERENCE_STEPS), torch.zeros(1)])
        ends = {seed: rig.sample(rig.demo, "heun", exact, noise)[0] for seed, noise in parts.items()}

        def tried(model, sampler, steps, shift, seed):
            drawn, calls = rig.sample(model, sampler, time_grid(steps, shift), parts[seed])
            return endpoint_errors(drawn, ends[seed]).mean().item(), calls

        found = {}
        for setting in itertools.product(CACHES, SAMPLERS, STEPS, SHIFTS, THRESHOLDS):
            cache, sampler, steps, shift, threshold = setting
            error, calls = tried(rig.cached(cache, threshold), sampler, steps, shift, SEARCH_SEED)
            for n in CALLS:
                if calls <= n and error < found.get((n, cache), (math.inf,))[0]:
                    found[n, cache] = error, setting
        for n, cache in itertools.product(CALLS, CACHES):
            if (n, cache) not in found:
                print(f"{n:2d} calls  {cache}  no setting spends so few")
                continue
            _, sampler, steps, shift, threshold = found[n, cache][1]
            error, calls = tried(rig.cached(cache, threshold), sampler, steps, shift, REPORT_SEED)
            where = f"{sampler}, {steps} steps, shift {shift:g}, threshold {threshold:g}"
            print(f"{n:2d} calls  {cache}  {error:.4f}  ({where}: {calls:.2f} calls)", flush=True)
        applied = ApplySideNet.execute(rig.demo).result[0]
        for n in CALLS:
            drawn, calls = rig.sample(
                applied, "ba_solver", BAScheduler.execute(applied, n, 1.0).result[0], parts[REPORT_SEED]
            )
            print(
                f"{n:2d} calls  BA-solver  {endpoint_errors(drawn, ends[REPORT_SEED]).mean():.4f}  ({calls:.2f} calls)"
            )


if __name__ == "__main__":
    main()
