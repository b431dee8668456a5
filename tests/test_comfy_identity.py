"""Whose SideNet is this? Fingerprints of MODELs in real ComfyUI: by their weights, at any time and any precision."""

from types import SimpleNamespace

import comfyui
import pytest
import torch

comfyui.require()

import comfy.model_management
import comfy.sample
import comfy_models as models
import pack_stand_ins as packs
from ba_solver.bas_core import SideNetCard
from ba_solver.nodes.models import compatibility
from ba_solver.nodes.models.compatibility import facts_of
from ba_solver.nodes.models.identity import identity_of
from test_comfy_make import as_in_comfyui, made, with_lora  # noqa: F401

pytestmark = pytest.mark.comfyui


def stored(model, change=lambda value: value, seed=None):
    """A MODEL whose matrices are stored in another way."""
    model = models.make_model(model, seed or 0)
    for parameter in model.model.diffusion_model.parameters():
        if parameter.ndim == 2:
            parameter.data = change(parameter.data)
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    return model


def in_blocks_of_four_bits(weight):
    """GGUF's Q4_0, unpacked to float16 again as some loaders do."""
    blocks = weight.reshape(-1, 16)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).reshape(weight.shape).to(torch.float16)


def tuned(weight):
    """A fine-tune's weights differ by little from its base's."""
    return weight + 0.01 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


PRECISIONS = {
    "bfloat16": lambda weight: weight.to(torch.bfloat16),
    "float8_e4m3fn": lambda weight: weight.to(torch.float8_e4m3fn),
    "float8_e5m2": lambda weight: weight.to(torch.float8_e5m2),
    "float16": in_blocks_of_four_bits,
}


def card_of(identity):
    return {"fingerprint": identity.whole, "precision": identity.precision, "sketch": identity.sketch}


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan", "sdxl"])
def test_one_model_at_two_precisions_is_no_stranger(kind):
    whole = identity_of(models.make_model(kind))
    for name, change in PRECISIONS.items():
        other, stranger = identity_of(stored(kind, change)), identity_of(stored(kind, change, seed=1))
        assert name in other.precision and other.weights != whole.weights
        assert whole.relation(card_of(other)) == other.relation(card_of(whole)) == "precision"
        assert whole.relation(card_of(stranger)) == stranger.relation(card_of(whole)) == "other"
    assert whole.relation(card_of(identity_of(stored(kind, tuned)))) == "other", "a relative at the same precision"
    assert whole.relation(card_of(identity_of(models.make_model(kind)))) == "same"


def test_a_sidenet_made_at_one_precision_is_taken_at_another_and_that_is_said(caplog):
    texts, latent = [models.text("sd3", seed) for seed in (0, 1)], torch.zeros(1, 16, 8, 8)
    model, half = models.make_model("sd3"), stored("sd3", PRECISIONS["float8_e4m3fn"])
    sidenet = made(model, texts, latent)[0]
    (said,) = compatibility.warnings(sidenet, facts_of(half))
    assert "at another precision (float32; this MODEL is float32, float8_e4m3fn)" in said
    again = made(half, texts, latent)[0]
    assert again.card.own_schedules == sidenet.card.own_schedules and "stored in another way" in caplog.text
    for other in (stored("sd3", PRECISIONS["float8_e4m3fn"], seed=1), stored("sd3", tuned)):
        with pytest.raises(ValueError, match="made for another model"):
            made(other, texts, latent)
    with pytest.raises(ValueError, match="made for other LoRAs"):
        made(with_lora(model), texts, latent)


def test_gguf_weights_tell_models_apart_and_what_they_cannot_tell_is_said(caplog):
    """ComfyUI-GGUF shows empty tensors in the state dictionary; the quantised bytes are in the parameters."""
    first, again, tuned_, other = (
        packs.gguf(model)
        for model in (
            models.make_model("sd3"),
            models.make_model("sd3"),
            stored("sd3", tuned),
            models.make_model("sd3", 1),
        )
    )
    state = first.model.diffusion_model.state_dict()
    assert sum(value.is_meta for value in state.values()) > 20
    identities = [identity_of(model) for model in (first, again, tuned_, other)]
    assert identities[0] == identities[1]
    assert len({identity.weights for identity in identities}) == 3
    texts, latent = [models.text("sd3", seed) for seed in (0, 1)], torch.zeros(1, 16, 8, 8)
    sidenet = made(first, texts, latent)[0]
    assert compatibility.warnings(sidenet, facts_of(again)) == []
    assert "other weights" in compatibility.warnings(sidenet, facts_of(tuned_))[0]
    with pytest.raises(ValueError, match="made for another model"):
        made(tuned_, texts, latent)
    plain = models.make_model("sd3")
    (said,) = compatibility.warnings(sidenet, facts_of(plain))
    assert "whether it was this one cannot be told" in said and "GGMLTensor uint8" in said
    assert made(plain, texts, latent)[0].card.own_schedules and "cannot be told for certain" in caplog.text


def test_gguf_models_are_sampled_as_whole_ones():
    z, texts = models.noise("sd3"), (models.text("sd3", 1), models.text("sd3", 2))
    ends = [
        comfy.sample.sample(model, z, 4, 3.0, "ba_solver", "simple", *texts, torch.zeros_like(z))
        for model in (models.make_model("sd3"), packs.gguf(models.make_model("sd3")))
    ]
    assert 0 < (ends[0] - ends[1]).std() < 0.1 * ends[0].std()


def test_quantised_tensors_of_comfyui_are_read():
    quant_ops = pytest.importorskip("comfy.quant_ops")
    if not hasattr(quant_ops.QuantizedTensor, "from_float"):
        pytest.skip("this ComfyUI makes no quantised tensors")
    found = []
    for seed in (0, 1):
        model = models.make_model("sd3", seed)
        for module in model.model.diffusion_model.modules():
            if isinstance(module, torch.nn.Linear):
                packed = quant_ops.QuantizedTensor.from_float(
                    module.weight.data.to(torch.bfloat16), "TensorCoreFP8Layout"
                )
                module.weight = torch.nn.Parameter(packed, requires_grad=False)
        found.append(identity_of(model))
    whole = identity_of(models.make_model("sd3"))
    assert found[0].weights != found[1].weights and "QuantizedTensor" in found[0].precision
    assert [whole.relation(card_of(identity)) for identity in found] == ["precision", "other"]


def test_a_fingerprint_is_the_same_at_any_time():
    """Before a sampling, in the midst of one, after it, and where ComfyUI has unloaded the model; with a LoRA, which
    lies in the weights meanwhile."""
    plain = models.make_model("sd3")
    model, during = with_lora(plain), []
    before = identity_of(model)
    z, texts = models.noise("sd3"), (models.text("sd3", 1), models.text("sd3", 2))
    model.set_model_sampler_post_cfg_function(lambda a: during.append(identity_of(model)) or a["denoised"])
    comfy.sample.sample(model, z, 2, 3.0, "euler", "simple", *texts, torch.zeros_like(z))
    after = identity_of(model)
    comfy.model_management.unload_all_models()
    assert {*during, after, identity_of(model)} == {before} and identity_of(plain).weights == before.weights
    merged = plain.clone()
    for key, patch in models.make_model("sd3", 8).get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 0.5, 0.5)  # ModelMergeSimple
    assert identity_of(merged) == identity_of(merged.clone()) != identity_of(plain)


class Sealed(torch.Tensor):
    """A loader's tensor that has a shape and lets no number be read."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), named=None):
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].shape)
        raise NotImplementedError("sealed")


def test_weights_that_cannot_be_read_are_said_to_be_unknown():
    """Equal fingerprints are then no proof."""
    model = models.make_model("sd3")
    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(Sealed(layer.weight.shape), requires_grad=False)
    identity = identity_of(model)
    assert identity.relation(card_of(identity)) == "unknown"
    card = SideNetCard(backbone={"name": "SD3", "kind": "sd3", **card_of(identity)})
    sidenet = SimpleNamespace(name="mine", card=card)
    (said,) = compatibility.warnings(sidenet, facts_of(model))
    assert "made for SD3; whether it was this one cannot be told" in said


@pytest.mark.parametrize("part", ["diffusion_model", "diffusion_model.joint_blocks.0"])
def test_a_compiled_network_keeps_its_fingerprint(part):
    """Old nodes put `torch.compile`'s result in the network's place, or a block's, while the model is loaded."""
    model = models.make_model("sd3")
    before = identity_of(model)
    parent, _, name = f"model.{part}".rpartition(".")
    holder = model
    for step in parent.split("."):
        holder = holder[int(step)] if step.isdigit() else getattr(holder, step)
    whole = holder[int(name)] if name.isdigit() else getattr(holder, name)
    compiled = torch.compile(whole, backend="eager")
    if name.isdigit():
        holder[int(name)] = compiled
    else:
        setattr(holder, name, compiled)
    assert identity_of(model) == before
