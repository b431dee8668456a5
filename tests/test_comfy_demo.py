"""The demo in ComfyUI: SiT as a MODEL, class labels, the file lists, and the nodes around them."""

import asyncio
import logging
import re
import shutil
from pathlib import Path

import comfyui
import pytest
import torch

comfyui.require()

import ba_solver
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import comfy_models as models
import folder_paths
from ba_solver.bas_core import (
    CheckpointError,
    Guidance,
    SideNetCard,
    SiT,
    SiTConfig,
    load_sidenet,
    load_sit,
    model_field,
    save_sit,
    solve,
)
from ba_solver.lab.classifier import load_classifier
from ba_solver.lab.shapes import CLASS_NAMES
from ba_solver.nodes.compare_nodes import CompareSolvers
from ba_solver.nodes.edit_nodes import BAEdit, BAInvert
from ba_solver.nodes.folders import DEMO, SIDENETS, SITS, WEIGHTS
from ba_solver.nodes.make_nodes import MakeSideNet
from ba_solver.nodes.models import compatibility
from ba_solver.nodes.models.classes import CLASSES, DEMO_CLASSES
from ba_solver.nodes.models.labels import labels_of
from ba_solver.nodes.sampling_nodes import BASampler, BAScheduler
from ba_solver.nodes.sidenet_nodes import ApplySideNet, SideNetInfo
from ba_solver.nodes.sit_nodes import ClassLabel, LoadSiT

import nodes

pytestmark = pytest.mark.comfyui
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo():
    """MODEL and SIDENET of the shipped demo, and the MODEL with it."""
    with torch.inference_mode():
        model, sidenet = LoadSiT.execute(DEMO).result[0], models.file_sidenet(DEMO)
        return model, sidenet, ApplySideNet.execute(model, sidenet=sidenet).result[0]


def label(model, name, index=-1):
    return ClassLabel.execute(model, name, index).result


def sample(model, conditioning, z, sampler="ba_solver", cfg=2.0, steps=5, **more):
    sigmas = more.pop("sigmas", None)
    sigmas = BAScheduler.execute(model, steps).result[0] if sigmas is None else sigmas
    solver = BASampler.execute(**more.pop("options", {"method": "bi_anchor"})).result[0]
    solver = solver if sampler == "ba_solver" else comfy.samplers.ksampler(sampler)
    return comfy.sample.sample_custom(
        model, z, cfg, solver, sigmas, *conditioning, more.pop("latent", torch.zeros_like(z)), **more
    )


def noise(batch=2, seed=7):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_demo_equals_the_core_on_plain_torch(demo):
    _, _, model = demo
    z, labels = noise(), torch.full((2,), 4)
    ours = sample(model, label(model, "demo 4: star"), z)
    sit, (net, card) = load_sit(SITS.demo), load_sidenet(SIDENETS.demo)
    field = model_field(sit, labels, torch.full_like(labels, sit.null_class), Guidance(2.0), mode=card.cfg_mode)
    theirs = solve(field, net, z, card.own_schedules[5])
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert field.nfe == 5 and field.calls == 6


def test_demo_draws_the_class_that_is_asked_for(demo):
    _, _, model = demo
    classifier = load_classifier(WEIGHTS / "demo_classifier.safetensors")
    right = 0
    for index, name in enumerate(DEMO_CLASSES):
        images = sample(model, label(model, f"demo {index}: {name}"), noise(4, seed=index), steps=7)
        right += int((classifier(images).argmax(1) == index).sum())
    assert right >= 34  # of 40


def test_stock_ksampler_draws_with_the_sit(demo):
    model, _, _ = demo
    positive, negative = label(model, "demo 0: disc")
    latent = nodes.EmptyLatentImage().generate(32, 32, 1)[0]
    out = nodes.common_ksampler(model, 3, 20, 2.0, "euler", "simple", positive, negative, latent)[0]["samples"]
    assert out.shape == (1, 3, 32, 32)
    vae = nodes.VAELoader().load_vae("pixel_space")[0]
    image = nodes.VAEDecode().decode(vae, {"samples": out})[0]
    assert image.shape == (1, 32, 32, 3) and image.min() >= 0 and image.max() <= 1 and image.std() > 0.05


def test_negative_is_the_null_class_and_guidance_uses_it(demo):
    _, _, model = demo
    positive, negative = label(model, "demo 2: square")
    assert [c[0][1]["class_label"].tolist() for c in (positive, negative)] == [[2], [10]]
    z = noise(1)
    plain, guided = (sample(model, (positive, negative), z, cfg=cfg) for cfg in (1.0, 2.0))
    assert (plain - guided).abs().max() > 0.05


def test_labels_of_a_batch(demo):
    """Each image of a batch may have its own class, as any condition with a batch of its own."""
    _, _, model = demo
    positive, negative = label(model, "demo 1: ring")
    both = [[positive[0][0], {"class_label": torch.tensor([1, 4])}]]
    z = noise()
    together = sample(model, (both, negative), z)
    for i, name in enumerate(("demo 1: ring", "demo 4: star")):
        torch.testing.assert_close(together[i : i + 1], sample(model, label(model, name), z[i : i + 1]), **CLOSE)
    assert labels_of([{"class_label": torch.tensor([1, 4])}], 3).tolist() == [1, 4, 1]
    assert labels_of([{}], 2) is None and labels_of(None, 2) is None


def test_several_classes_in_one_conditioning_are_refused_in_words(demo):
    _, _, model = demo
    combined = label(model, "demo 1: ring")[0] + label(model, "demo 4: star")[0]
    negative = label(model, "demo 1: ring")[1]
    with pytest.raises(ValueError, match="combines several classes"):
        sample(model, (combined, negative), noise(1))
    out = sample(model, (combined, negative), noise(1), options={"method": "multistep"})
    assert out.isfinite().all()
    twice = label(model, "demo 1: ring")[0] * 2
    assert sample(model, (twice, negative), noise(1)).isfinite().all()


def test_class_lists_and_bad_classes(demo):
    model, _, _ = demo
    assert DEMO_CLASSES == CLASS_NAMES
    assert len(CLASSES) == 1010 and CLASSES["ImageNet 207: golden retriever"] == (207, 1000)
    with pytest.raises(ValueError, match=r"classes 0 to 9; index is 10"):
        label(model, "demo 1: ring", 10)
    with pytest.raises(ValueError, match=r"one of 1000 classes, and this model has 10"):
        label(model, "ImageNet 207: golden retriever")
    with pytest.raises(ValueError, match="no class 'dog'"):
        label(model, "dog")
    assert label(model, "demo 1: ring", 3)[0][0][1]["class_label"].tolist() == [3]
    with torch.inference_mode(False):
        other = models.make_model("sd3")
    with pytest.raises(ValueError, match="names classes of a SiT; this MODEL is a SD3"):
        label(other, "demo 1: ring")


def test_sit_says_what_it_needs(demo):
    _, _, model = demo
    text = [[torch.zeros(1, 1, 1), {}]]
    with pytest.raises(ValueError, match="Connect Class Label"):
        sample(model, (text, text), noise(1), options={"method": "multistep"})
    with pytest.raises(ValueError, match=r"draws 32x32 pixels only.*Set Empty Latent Image to 32x32"):
        sample(model, label(model, "demo 1: ring"), torch.randn(1, 3, 48, 48), options={"method": "multistep"})


def test_a_class_of_another_sit_is_refused_before_the_model_meets_it(demo):
    _, _, model = demo
    other = [[torch.zeros(1, 1, 1), {"class_label": torch.tensor([207])}]]
    with pytest.raises(ValueError, match="Classes must be from 0 to 10; got 207"):
        sample(model, (other, label(model, "demo 1: ring")[1]), noise(1), options={"method": "multistep"})


def test_lora_on_the_sit(demo):
    model, sidenet, applied = demo
    key = "diffusion_model.blocks.1.attn.qkv.weight"
    patched = model.clone()
    change = 0.05 * torch.randn(576, 192, generator=torch.Generator().manual_seed(1))
    assert patched.add_patches({key: ("diff", (change,))}) == [key]
    patched = ApplySideNet.execute(patched, sidenet=sidenet).result[0]
    z, label_ = noise(1), label(model, "demo 1: ring")
    before = sample(applied, label_, z)
    assert (sample(patched, label_, z) - before).abs().max() > 0.01
    torch.testing.assert_close(sample(applied, label_, z), before, **CLOSE)


def test_public_sit_checkpoints(tmp_path):
    """A REPA-like file (`ema`, projectors, 1000 classes, VAE latents), read as a MODEL and sampled as the core does."""
    from ba_solver.nodes.models.sit_model import read_sit

    with torch.inference_mode(False):
        plain = SiT(SiTConfig(input_size=8, hidden_size=384, num_heads=6, depth=2))
        models.randomise(plain)
        content = {"ema": {**plain.state_dict(), "projectors.0.weight": torch.zeros(2, 2)}, "steps": 4_000_000}
        torch.save(content, tmp_path / "repa.pt")
    model = read_sit(tmp_path / "repa.pt")
    assert model.model.latent_format.scale_factor == 0.18215
    positive, negative = label(model, "ImageNet 207: golden retriever")
    z, labels = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([207])
    ours = sample(model, (positive, negative), z, cfg=1.5, options={"method": "multistep", "start_percent": 0.3})
    field = model_field(plain, labels, torch.tensor([1000]), Guidance(1.5, (0.0, 0.7)), mode="combined")
    theirs = solve(field, None, z, BAScheduler.execute(model, 5).result[0])
    torch.testing.assert_close(ours * 0.18215, theirs, **CLOSE)
    reverse = read_sit(tmp_path / "repa.pt", "data_at_one")
    other = sample(reverse, (positive, negative), z, options={"method": "multistep"})
    assert (other * 0.18215 - theirs).abs().max() > 0.1


def test_other_weights_of_the_same_kind_are_pointed_out(demo, tmp_path, caplog):
    from ba_solver.nodes.models.sit_model import read_sit

    model, sidenet, _ = demo
    assert compatibility.warnings(sidenet, compatibility.facts_of(model)) == []
    sit = load_sit(SITS.demo)
    state = {name: value.clone() for name, value in sit.state_dict().items()}
    state["final_layer.linear.bias"] += 0.1
    save_sit(tmp_path / "other.safetensors", state, sit.config)
    other = read_sit(tmp_path / "other.safetensors")
    with caplog.at_level(logging.WARNING):
        applied = ApplySideNet.execute(other, sidenet=sidenet).result[0]
    assert "made for demo SiT, and this MODEL has other weights" in caplog.text
    assert sample(applied, label(model, "demo 3: triangle"), noise(1)).isfinite().all()


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ({"name": "demo SiT", "kind": "sit"}, None),
        ({"name": "tuned", "kind": "sit", "fingerprint": "ab"}, "made for tuned, and this MODEL has other weights"),
        ({"name": "a-pipeline", "kind": "diffusers", "fingerprint": "ab"}, "made for a-pipeline outside ComfyUI"),
        ({"name": "mine", "kind": "python", "fingerprint": "ab"}, "made for mine outside ComfyUI.*of kind 'sit'"),
        ({}, "does not say which model it was made for"),
    ],
)
def test_every_kind_of_backbone_that_the_trainer_writes_is_spoken_of(backbone, message, demo, tmp_path):
    """`training/backbones`: sit, diffusers and python; a fingerprint counts where the same code made both."""
    model, _, _ = demo
    sidenet = models.make_sidenet(tmp_path / "any.safetensors", 3, SideNetCard(backbone=backbone))
    found = compatibility.warnings(sidenet, compatibility.facts_of(model))
    assert len(found) == (message is not None) and all(re.search(message, warning) for warning in found), found


def test_bfloat16_sit(demo):
    model, _, _ = demo
    half = LoadSiT.execute(DEMO, "auto", "bfloat16").result[0]
    z, label_ = noise(1), label(model, "demo 3: triangle")
    euler = {"sampler": "euler", "options": {"method": "multistep"}}
    difference = (sample(half, label_, z, **euler) - sample(model, label_, z, **euler)).abs().mean()
    assert 0 < difference < 0.05


def test_inpainting_an_image_with_alpha(demo):
    """The alpha channel is dropped by ComfyUI's encoder, and the part outside the mask comes back as it was."""
    _, _, model = demo
    image = torch.rand(1, 32, 32, 4, generator=torch.Generator().manual_seed(2))
    vae = nodes.VAELoader().load_vae("pixel_space")[0]
    latent = nodes.VAEEncode().encode(vae, image)[0]
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:24, 8:24] = 1.0
    latent = nodes.SetLatentNoiseMask().set_mask(latent, mask)[0]
    given = (model, 5, 7, 2.0, "ba_solver", "simple", *label(model, "demo 6: heart"), latent)
    decoded = nodes.VAEDecode().decode(vae, nodes.common_ksampler(*given)[0])[0]
    assert decoded.shape == (1, 32, 32, 3)
    assert (decoded - image[..., :3])[:, :8].abs().max() < 2e-3
    assert (decoded - image[..., :3])[:, 8:24, 8:24].abs().mean() > 0.05


def test_previews_are_made_of_the_demo(demo):
    import latent_preview

    model, _, applied = demo
    previewer = latent_preview.Latent2RGBPreviewer(model.model.latent_format.latent_rgb_factors)
    pictures = []
    sample(
        applied,
        label(model, "demo 0: disc"),
        noise(1),
        callback=lambda i, x0, x, n: pictures.append(previewer.decode_latent_to_preview(x0)),
    )
    assert [p.size for p in pictures] == [(32, 32)] * 7  # five calls, one saved and two of them halves


# --- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sidenet_folder(tmp_path, monkeypatch):
    """An extra path of the user's, as extra_model_paths.yaml adds one: it is read before packs are loaded."""
    folder = tmp_path / "extra"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "sidenets", ([str(folder)], set()))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    folder_paths.filename_list_cache.clear()
    SIDENETS.register()
    yield folder
    folder_paths.filename_list_cache.clear()


def test_folders_are_added_to_the_users_own(sidenet_folder, tmp_path):
    paths, extensions = folder_paths.folder_names_and_paths["sidenets"]
    assert paths == [str(sidenet_folder), str(tmp_path / "models/sidenets"), str(tmp_path / "output/sidenets")]
    assert extensions == {".safetensors"} and (tmp_path / "models/sidenets").is_dir()
    SIDENETS.register()
    assert len(folder_paths.folder_names_and_paths["sidenets"][0]) == 3
    for name in ("mine.safetensors", "notes.txt", "old.pt"):
        shutil.copy(SIDENETS.demo, sidenet_folder / name)
    assert SIDENETS.names() == [DEMO, "mine.safetensors"]
    assert models.file_sidenet("mine.safetensors").name == "mine.safetensors"


def test_bad_sidenet_files_are_refused_in_words(sidenet_folder):
    whole = SIDENETS.demo.read_bytes()
    (sidenet_folder / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    shutil.copy(SITS.demo, sidenet_folder / "renamed.safetensors")
    (sidenet_folder / "text.safetensors").write_text("a download page")
    with pytest.raises(CheckpointError, match=r"half.safetensors cannot be read.*truncated"):
        models.file_sidenet("half.safetensors")
    with pytest.raises(CheckpointError, match=r"renamed.safetensors is no ba-solver-sidenet file"):
        models.file_sidenet("renamed.safetensors")
    with pytest.raises(CheckpointError, match=r"text.safetensors cannot be read"):
        models.file_sidenet("text.safetensors")


def test_removed_and_replaced_files(sidenet_folder):
    path = sidenet_folder / "mine.safetensors"
    shutil.copy(SIDENETS.demo, path)
    first = ApplySideNet.fingerprint_inputs("mine.safetensors")
    path.touch()
    assert ApplySideNet.fingerprint_inputs("mine.safetensors") != first
    assert "mine.safetensors" in SIDENETS.names()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"'mine.safetensors' is not there \(any more\).*refresh the lists"):
        models.file_sidenet("mine.safetensors")
    ApplySideNet.fingerprint_inputs("mine.safetensors")


# --- SideNet Info -------------------------------------------------------------------------------------------------


def test_info_says_what_the_file_says(demo, tmp_path):
    _, sidenet, _ = demo
    text, plot = SideNetInfo.execute(sidenet=sidenet).result
    run = "5 model calls (7 steps, the first one analytic, 2 conditional-only calls, multistep coefficients)"
    for part in ("demo SiT", "3 channels", "the guided velocity, CFG 2", "anchors: 2", run, "MIT"):
        assert part in text
    assert plot.shape[0] == 1 and plot.shape[3] == 3
    rows = [{"label": "BA-solver", "grid": "best", "nfe": n, "error": e} for n, e in ((5, 0.08), (7, 0.04))]
    card = SideNetCard(evaluation={"endpoint_error": rows, "other": {"a": 1}})
    known = models.make_sidenet(tmp_path / "known.safetensors", 3, card)
    text, plotted = SideNetInfo.execute(sidenet=known).result
    assert "BA-solver error: 0.08 at 5 model calls, 0.04 at 7 model calls" in text
    empty = models.make_sidenet(tmp_path / "empty.safetensors", 3)
    assert (plotted - SideNetInfo.execute(sidenet=empty).result[1]).abs().max() > 0.5


# --- audio and video ----------------------------------------------------------------------------------------------


def check_refused_by_nodes(model, latent, text):
    """Every node that takes a latent refuses one of two parts."""
    two = {"samples": latent}
    listed = {"model": [model], "positive": [text], "latent_image": [two]}
    with pytest.raises(ValueError, match="BA Invert takes images and videos; this latent holds audio"):
        BAInvert.execute(model, text, two, 4)
    with pytest.raises(ValueError, match="BA Edit takes"):
        BAEdit.execute(model, two, text, text, 4)
    with pytest.raises(ValueError, match="Make SideNet takes"):
        MakeSideNet.execute(**listed)
    with pytest.raises(ValueError, match="Compare Solvers takes"):
        CompareSolvers.execute(**listed)


def test_packed_audio_and_video_is_sampled_without_a_sidenet_and_refused_with_one(tmp_path, monkeypatch):
    """LTX's audio-video latents arrive as one [B, 1, N]; the multistep method takes them, a SideNet cannot. With one it
    is refused before ComfyUI loads anything."""
    import comfy.nested_tensor
    from comfy.supported_models import LTXAV

    unet = {
        "image_model": "ltxav", "in_channels": 128, "audio_in_channels": 128, "cross_attention_dim": 64,
        "audio_cross_attention_dim": 64, "attention_head_dim": 32, "audio_attention_head_dim": 32,
        "num_attention_heads": 2, "audio_num_attention_heads": 2, "caption_channels": 32, "num_layers": 1,
    }  # fmt: skip
    config = LTXAV(unet)
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        network = config.get_model({}, "")
        models.randomise(network.diffusion_model)
        kind = comfy.model_patcher.CoreModelPatcher
        model = kind(network, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 128, 2, 4, 4, generator=generator), torch.randn(1, 8, 6, 16, generator=generator)]
    z, latent = (comfy.nested_tensor.NestedTensor(x) for x in (parts, [torch.zeros_like(p) for p in parts]))
    text = [[torch.randn(1, 4, 64, generator=generator), {}]]
    sigmas = torch.linspace(1, 0, 13)
    outcomes = []
    for options in ({"method": "multistep"}, {"method": "bi_anchor"}):
        solver = BASampler.execute(**options).result[0]
        sidenet = models.make_sidenet(tmp_path / "video.safetensors", 128)
        applied = models.with_sidenet(model, sidenet)
        if options["method"] == "bi_anchor":
            with pytest.raises(ValueError, match="audio and video packed into one"):
                comfy.sample.sample_custom(applied, z, 1.0, solver, sigmas, text, text, latent)
            applied = ApplySideNet.execute(model, sidenet=sidenet).result[0]
            with monkeypatch.context() as patched:
                patched.setattr(comfy.model_management, "load_models_gpu", lambda *_, **__: pytest.fail("loaded"))
                with pytest.raises(ValueError, match="audio and video packed into one"):
                    comfy.sample.sample_custom(applied, z, 1.0, solver, sigmas, text, text, latent)
                check_refused_by_nodes(applied, latent, text)
        else:
            outcomes.append(comfy.sample.sample_custom(applied, z, 1.0, solver, sigmas, text, text, latent))
    fine = torch.linspace(1, 0, 40)
    euler = comfy.sample.sample_custom(model, z, 1.0, comfy.samplers.ksampler("euler"), fine, text, text, latent)
    for ours, exact, start in zip(outcomes[0].unbind(), euler.unbind(), parts, strict=True):
        assert ours.shape == start.shape and ours.isfinite().all()
        assert (ours - exact).abs().mean() < 0.2 * (ours - start).abs().mean()


# --- the extension --------------------------------------------------------------------------------------------------


def test_every_input_has_a_tooltip_every_node_an_alias_a_help_page_and_a_locale_entry():
    import json

    root = Path(ba_solver.__file__).parent
    locale = json.loads((root / "locales/en/nodeDefs.json").read_text())
    listed = asyncio.run(asyncio.run(ba_solver.comfy_entrypoint()).get_node_list())
    assert len(listed) == 12
    for node in listed:
        schema = node.GET_SCHEMA()
        assert re.match("BA-Solver|.*sampl.*/(samplers|schedulers)$", schema.category), schema.category
        assert schema.search_aliases and schema.description
        assert all(i.tooltip for i in (*schema.inputs, *schema.outputs)), schema.node_id
        help_page = (root / "web/docs" / f"{schema.node_id}.md").read_text()
        entry = locale[schema.node_id]
        assert entry["display_name"] == schema.display_name
        assert set(entry["inputs"]) == {i.id for i in schema.inputs}
        assert set(entry["outputs"]) == {str(i) for i in range(len(schema.outputs))}
        for known in schema.inputs:
            assert entry["inputs"][known.id]["tooltip"] == known.tooltip
            assert f"`{known.id}`" in help_page, f"{schema.node_id}'s help page says nothing of {known.id}"


def test_registering_twice_adds_the_sampler_once_and_keeps_the_list():
    from ba_solver.nodes import ksampler

    before = comfy.samplers.KSampler.SAMPLERS
    ksampler.register()
    assert comfy.samplers.KSampler.SAMPLERS is before is comfy.samplers.SAMPLER_NAMES
    assert before.count("ba_solver") == 1


def test_older_comfyui_is_told_so(monkeypatch, caplog):
    import comfyui_version

    monkeypatch.setattr(comfyui_version, "__version__", "0.3.64")
    with pytest.raises(RuntimeError, match=r"needs ComfyUI 0.14.0 or newer; this is 0.3.64"):
        asyncio.run(ba_solver.comfy_entrypoint())
    assert "Traceback" in caplog.text
