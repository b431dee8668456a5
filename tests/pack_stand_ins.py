"""What nodes of public packs do to a MODEL or a CONDITIONING, in a few lines each, named for the pack.

Import after `comfyui.require()`.
"""

from __future__ import annotations

from typing import Any

import comfy.hooks
import comfy.patcher_extension
import torch
from test_comfy_sampling import ControlStub

# --- what moves forward with a sampling ---------------------------------------------------------------------------


def hooked_lora(model: Any, strengths: list[tuple[float, float]]) -> tuple[Any, Any, Any]:
    """ComfyUI's Create Hook LoRA with keyframes (strength, start_percent) and Set Hook Keyframes.

    Returns:
        The MODEL, the hooks for a CONDITIONING, and a function that reads the strength off the weights.
    """
    changed, hook, group = model.clone(), comfy.hooks.WeightHook(), comfy.hooks.HookGroup()
    group.add(hook)
    state = model.model.state_dict()
    key = next(name for name in state if name.endswith("weight") and "block" in name and state[name].ndim == 2)
    change = 0.3 * torch.randn(state[key].shape, generator=torch.Generator().manual_seed(5))
    changed.add_hook_patches(hook=hook, patches={key: ("diff", (change,))}, strength_patch=1.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in strengths:  # as Create Hook Keyframes Interp. makes them: the first is held for a call
        keyframes.add(comfy.hooks.HookKeyframe(strength, start, guarantee_steps=int(start == 0)))
    group.set_keyframes_on_hooks(keyframes)
    plain = state[key].clone()

    def strength() -> float:
        return float((model.model.state_dict()[key] - plain).flatten()[0] / change.flatten()[0])

    return changed, group, strength


def with_hooks(conditioning: Any, group: Any) -> Any:
    """Cond Set Props' hooks."""
    return comfy.hooks.set_hooks_for_conditioning(conditioning, group)


class AdvancedControlNet(ControlStub):
    """Kosinkadink/ComfyUI-Advanced-ControlNet (`adv_control/utils.py`): keyframes of strength that only go on, each
    held for a call, until `pre_run`."""

    def __init__(self, keyframes: list[tuple[float, float]], seen: list[tuple[float, float]]) -> None:
        super().__init__()
        self.keyframes, self.seen = keyframes, seen
        self.starts: list[float] = []
        self.restart()

    def restart(self) -> None:
        self.index, self.used, self.last = -1, 0, None

    def pre_run(self, model: Any, percent_to_timestep_function: Any) -> None:
        super().pre_run(model, percent_to_timestep_function)
        self.starts = [percent_to_timestep_function(start) for _, start in self.keyframes]
        self.restart()

    def prepare_current_timestep(self, t: torch.Tensor, transformer_options: dict[str, Any]) -> None:
        now = float(t[0])
        if now == self.last:
            return
        if self.index < 0 or self.used >= 1:
            for index in range(self.index + 1, len(self.starts)):
                if self.starts[index] < now:
                    break
                self.index, self.used = index, 0
                if self.starts[index] <= float(transformer_options["sample_sigmas"].max()):
                    break
        self.last, self.used = now, self.used + 1

    def get_control(self, x_noisy: Any, t: Any, cond: Any, batched_number: int, transformer_options: Any) -> Any:
        self.prepare_current_timestep(t, transformer_options)
        strength = self.keyframes[self.index][0]
        self.seen.append((float(t[0]), strength))
        control = super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        return {name: [part * strength for part in parts] for name, parts in control.items()}

    def copy(self) -> Any:
        made = AdvancedControlNet(self.keyframes, self.seen)
        self.copy_to(made)
        return made


def animatediff_evolved(model: Any, seen: list[tuple[float, float]]) -> Any:
    """Kosinkadink/ComfyUI-AnimateDiff-Evolved: motion keyframes that go on in `ON_PREPARE_STATE`-like order and start
    anew in callbacks before a sampling and after it; here the effect falls from 1 to .5 past half of the noise."""
    changed, state = model.clone(), {"index": 0}
    kinds = comfy.patcher_extension.CallbacksMP
    changed.add_callback_with_key(kinds.ON_PRE_RUN, "ADE", lambda patcher: state.update(index=0))
    changed.add_callback_with_key(kinds.ON_CLEANUP, "ADE", lambda patcher: state.update(index=0))

    def motion(apply: Any, arguments: dict[str, Any]) -> Any:
        sigma = float(arguments["timestep"][0])
        state["index"] = max(state["index"], int(sigma <= 0.5))
        effect = (1.0, 0.5)[state["index"]]
        seen.append((sigma, effect))
        return apply(arguments["input"], arguments["timestep"], **arguments["c"]) * (0.9 + 0.1 * effect)

    changed.set_model_unet_function_wrapper(motion)
    return changed


# --- caches, and what remembers earlier calls -----------------------------------------------------------------------


def _wrapped(model: Any, answer: Any) -> Any:
    changed = model.clone()

    def wrapper(apply: Any, a: dict[str, Any]) -> Any:
        return answer(lambda: apply(a["input"], a["timestep"], **a["c"]), a["input"], float(a["timestep"][0]))

    changed.set_model_unet_function_wrapper(wrapper)
    return changed


def teacache(model: Any, threshold: float = 0.25) -> Any:
    """welltop-cn/ComfyUI-TeaCache: while the input has changed little since, the last residual is added to it."""
    state: dict[str, Any] = {}

    def answer(run: Any, x: Any, t: float) -> Any:
        if state.get("x") is not None and state["x"].shape == x.shape:
            state["moved"] += float((x - state["x"]).abs().mean() / state["x"].abs().mean())
            state["x"] = x.clone()
            if state["moved"] < threshold:
                return x + state["residual"]
        out = run()
        state.update(x=x.clone(), moved=0.0, residual=out - x)
        return out

    return _wrapped(model, answer)


def magcache(model: Any) -> Any:
    """Zehong-Ma/ComfyUI-MagCache: counts calls; after some, every second one answers with the last residual."""
    state: dict[str, Any] = {"calls": 0}

    def answer(run: Any, x: Any, t: float) -> Any:
        state["calls"] += 1
        known = state.get("residual")
        if state["calls"] > 8 and state["calls"] % 2 and known is not None and known.shape == x.shape:
            return x + known
        out = run()
        state["residual"] = out - x
        return out

    return _wrapped(model, answer)


def first_block_cache(model: Any, threshold: float = 0.12) -> Any:
    """chengzeyi/Comfy-WaveSpeed: like TeaCache, but by a call's distance from the last computed one."""
    state: dict[str, Any] = {}

    def answer(run: Any, x: Any, t: float) -> Any:
        near = state.get("x")
        if near is not None and near.shape == x.shape and (x - near).abs().mean() < threshold * near.abs().mean():
            return x + state["residual"]
        out = run()
        state.update(x=x.clone(), residual=out - x)
        return out

    return _wrapped(model, answer)


def deepcache(model: Any, interval: int = 3) -> Any:
    """styler00dollar/ComfyUI-deepcache: only every third call is computed; those between keep the deep layers' part."""
    state: dict[str, Any] = {"calls": 0}

    def answer(run: Any, x: Any, t: float) -> Any:
        state["calls"] += 1
        known = state.get("out")
        if state["calls"] % interval != 1 and known is not None and known.shape == x.shape:
            return 0.9 * known + 0.1 * run()
        state["out"] = run()
        return state["out"]

    return _wrapped(model, answer)


def taylorseer(model: Any) -> Any:
    """philipy1219/ComfyUI-TaylorSeer: every second answer is extrapolated from the last two computed ones."""
    known: list[tuple[float, Any]] = []
    state = {"calls": 0}

    def answer(run: Any, x: Any, t: float) -> Any:
        state["calls"] += 1
        usable = len(known) == 2 and known[0][1].shape == known[1][1].shape == x.shape and known[0][0] != known[1][0]
        if state["calls"] % 2 and usable:
            (t0, v0), (t1, v1) = known
            return v1 + (v1 - v0) * (t - t1) / (t1 - t0)
        out = run()
        known[:] = [*known, (t, out)][-2:]
        return out

    return _wrapped(model, answer)


def momentum_guidance(model: Any) -> Any:
    """ComfyUI's APG with momentum: each call's guidance carries that of the calls before it."""
    from comfy_extras.nodes_apg import APG

    return APG.execute(model, 1.0, 0.0, 0.5).result[0]


def noise_injection(model: Any) -> Any:
    """BlenderNeko/ComfyUI_Noise and others: noise is added to each answer."""
    return _wrapped(model, lambda run, x, t: run() + 0.05 * torch.randn_like(x))


CACHES = {
    "TeaCache": teacache,
    "MagCache": magcache,
    "First Block Cache": first_block_cache,
    "DeepCache": deepcache,
    "TaylorSeer": taylorseer,
    "APG with momentum": momentum_guidance,
    "noise injection": noise_injection,
}


# --- loaders --------------------------------------------------------------------------------------------------------


class GGMLTensor(torch.Tensor):
    """city96/ComfyUI-GGUF (`ops.py`): quantised bytes that say they have the weight's shape."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, tensor_shape: torch.Size) -> Any:
        return super().__new__(cls, data)

    def __init__(self, data: torch.Tensor, tensor_shape: torch.Size) -> None:
        super().__init__()
        self.tensor_shape = tensor_shape

    def to(self, *args: Any, **named: Any) -> Any:
        moved = super().to(*args, **named)
        moved.tensor_shape = self.tensor_shape
        return moved

    def detach(self) -> Any:
        return self

    @property
    def shape(self) -> torch.Size:
        return self.tensor_shape


class GGMLLinear(torch.nn.Module):
    """A layer of the same pack with Q8_0 blocks: 32 whole numbers and their float16 scale; its entry in the state
    dictionary is an empty tensor."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        blocks = layer.weight.detach().reshape(-1, 32)
        scale = (blocks.abs().amax(1, keepdim=True) / 127).to(torch.float16)
        numbers = (blocks / scale.float().clamp_min(1e-12)).round().clamp(-127, 127).to(torch.int8)
        packed = torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], 1)
        self.weight = torch.nn.Parameter(GGMLTensor(packed, layer.weight.shape), requires_grad=False)
        self.bias = layer.bias

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = torch.empty(self.weight.shape, device="meta")
        destination[f"{prefix}bias"] = torch.empty(self.bias.shape, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.weight.as_subclass(torch.Tensor)
        scale, numbers = packed[:, :2].contiguous().view(torch.float16), packed[:, 2:].contiguous().view(torch.int8)
        weight = (scale.to(x.dtype) * numbers.to(x.dtype)).reshape(self.weight.shape)
        return torch.nn.functional.linear(x, weight, self.bias)


def gguf(model: Any) -> Any:
    """UnetLoaderGGUF: every linear layer whose rows are whole blocks is quantised."""
    network = model.model.diffusion_model
    found = [(module, name, layer) for module in network.modules() for name, layer in module.named_children()]
    for module, name, layer in found:
        if isinstance(layer, torch.nn.Linear) and layer.in_features % 32 == 0 and layer.bias is not None:
            setattr(module, name, GGMLLinear(layer))
    return model
