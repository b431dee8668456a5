"""How a MODEL is stored, compiled and placed, in real ComfyUI: Make, Compare, editing and sampling follow."""

import comfyui
import pytest
import torch

comfyui.require()

import comfy.model_patcher
import comfy.sample
import comfy.supported_models
import comfy_models as models
from ba_solver.bas_core import SideNetCard
from ba_solver.bas_core.schedule import Schedule
from ba_solver.nodes.edit_nodes import BAEdit
from ba_solver.nodes.making.comfy_backbone import open_model
from ba_solver.nodes.models.attach import applied_sidenet
from ba_solver.nodes.sampling.start import Latent
from test_comfy_make import as_in_comfyui, made  # noqa: F401
from test_comfy_order import compared

pytestmark = pytest.mark.comfyui
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture
def sidenet(tmp_path):
    rows = [[], [0.7, -0.2], [], [0.4, 0.3, 0.1, -0.2, 0.2]]
    card = SideNetCard(schedules={3.0: {3: Schedule([1.0, 0.8, 0.5, 0.25, 0.0], cfg_coefficients=rows)}})
    return models.make_sidenet(tmp_path / "net.safetensors", 16, card, anchors=2)


def sampled(model, steps=3):
    z, texts = models.noise("sd3"), (models.text("sd3", 1), models.text("sd3", 2))
    return comfy.sample.sample(model, z, steps, 3.0, "ba_solver", "simple", *texts, torch.zeros_like(z))


def edited(model):
    latent = {"samples": 0.5 * models.noise("sd3", seed=4)}
    texts = [models.text("sd3", seed) for seed in range(3)]
    return BAEdit.execute(model, latent, texts[0], texts[1], 4, texts[2], cfg=2.0).result[0]["samples"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_comfyuis_compile_node_changes_nothing(backend, sidenet):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    plain = models.with_sidenet(models.make_model("sd3"), sidenet)
    compiled = TorchCompileModel.execute(plain, backend).result[0]
    torch.testing.assert_close(sampled(compiled), sampled(plain), **CLOSE)
    torch.testing.assert_close(edited(compiled), edited(plain), **CLOSE)
    tables = [
        compared(model, models.text("sd3", 1), models.text("sd3", 2), torch.zeros(1, 16, 8, 8), model_calls="3")[0]
        for model in (plain, compiled)
    ]
    errors = [
        {line.split("(")[0][10:]: float(line.split()[0]) for line in t.splitlines() if "  0." in line} for t in tables
    ]
    assert errors[0].keys() == errors[1].keys() and len(errors[0]) >= 3
    assert all(errors[1][name] == pytest.approx(value, rel=0.02, abs=2e-3) for name, value in errors[0].items())


def fp8_model():
    """As UNETLoader makes a MODEL with the weight_dtype fp8_e4m3fn: all weights of it, cast at each call."""
    config = comfy.supported_models.SD3(dict(models.TINY["sd3"].unet))
    config.set_inference_dtype(torch.float8_e4m3fn, torch.float32)
    model = config.get_model({}, "")
    whole = models.make_model("sd3")
    model.diffusion_model.load_state_dict(whole.model.diffusion_model.state_dict())
    return comfy.model_patcher.CoreModelPatcher(model, whole.load_device, torch.device("cpu")), whole


def test_fp8_weights_are_sampled_made_and_edited(sidenet):
    fp8, whole = fp8_model()
    assert fp8.model.diffusion_model.joint_blocks[0].x_block.attn.qkv.weight.dtype == torch.float8_e4m3fn
    ends = [sampled(models.with_sidenet(model, sidenet)) for model in (fp8, whole)]
    assert 0 < (ends[0] - ends[1]).std() < 0.25 * ends[1].std()
    assert made(fp8, [models.text("sd3", 0)], torch.zeros(1, 16, 8, 8))[0].card.backbone["precision"].count("float8")
    assert edited(fp8).isfinite().all()


def test_the_models_device_is_everyones(sidenet):
    """Two GPUs as far as a processor can show: Select Model Device gives a MODEL another device's name."""
    model, second = models.make_model("sd3").clone(), torch.device("cpu", 1)
    model.load_device = second
    applied = models.with_sidenet(model, sidenet)
    assert applied_sidenet(applied).patcher.load_device == second != sidenet.patcher.load_device
    first = models.with_sidenet(models.make_model("sd3"), sidenet)
    torch.testing.assert_close(sampled(applied), sampled(first), **CLOSE)
    backbone = open_model(model, [models.text("sd3", 0)], None, 1.0, Latent(torch.zeros(1, 16, 8, 8)), lambda n: None)
    assert backbone.device == second
    assert made(model, [models.text("sd3", 0)], torch.zeros(1, 16, 8, 8))[0].card.own_schedules
    assert "euler" in compared(model, models.text("sd3", 0), None, torch.zeros(1, 16, 8, 8), cfg=1.0)[0]
