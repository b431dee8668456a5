"""`ba-solver sample`: what it draws is the solver's, whatever the batch, the processes and the interruptions."""

import json
import os
import shutil
import time

import numpy as np
import pipelines
import pytest
import torch
from ba_solver.bas_core import (
    Guidance,
    SideNet,
    SideNetConfig,
    SiT,
    SiTConfig,
    load_official_sidenet,
    load_sit,
    model_field,
    solve,
    time_grid,
)
from ba_solver.bas_core.files import CheckpointError
from ba_solver.lab.classifier import load_classifier
from ba_solver.training.backbones import Backbone
from ba_solver.training.cli import main
from ba_solver.training.demo.assets import CLASSIFIER_FILE, SIDENET_FILE, SIT_FILE
from ba_solver.training.drawing.folder import Folder, read_pngs, write_npz
from ba_solver.training.drawing.named_solvers import PRESETS
from ba_solver.training.drawing.scores import WEIGHTS, scores
from PIL import Image
from safetensors.torch import load_file
from training_problems import in_two_processes

DEMO = ("--sit", str(SIT_FILE), "--sidenet", str(SIDENET_FILE), "--nfe", "5")


def draw(out, *more, status=0):
    assert main(["sample", "--out", str(out), *map(str, more)]) == status
    return sorted((out / "images").glob("*.png"))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "images").glob("*.png"))}


def assert_same_images(one, other):
    """At most one level apart, in few pixels: libraries round by batch, threads and processor.

    Other noises, classes or steps are apart by tens of levels.
    """
    asked = [json.loads((folder / "settings.json").read_text()) for folder in (one, other)]
    assert asked[0] == asked[1]
    names = [sorted(path.name for path in (folder / "images").glob("*.png")) for folder in (one, other)]
    assert names[0] and names[0] == names[1]
    for name in names[0]:
        apart = [next(read_pngs([folder / "images" / name])).astype(int) for folder in (one, other)]
        apart = np.abs(apart[0] - apart[1])
        assert apart.max() <= 1 and (apart > 0).mean() < 0.01


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Fourteen images of the demo, drawn in one go."""
    out = tmp_path_factory.mktemp("whole") / "images"
    draw(out, *DEMO, "--count", 14, "--batch", 7)
    return out


def test_demo_images_are_what_was_asked_for(tmp_path):
    images = draw(tmp_path / "out", *DEMO, "--count", 60, "--npz")
    stack = np.stack(list(read_pngs(images)))
    states = torch.from_numpy(stack).movedim(-1, 1).float() / 127.5 - 1
    with torch.inference_mode():
        seen = load_classifier(CLASSIFIER_FILE)(states).argmax(1)
    # Over ten seeds of a hundred it is 98.6 ± 1.2 %, as of the converged ends.
    assert (seen == torch.arange(60) % 10).float().mean() >= 0.93
    with np.load(tmp_path / "out" / "images.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8 and np.array_equal(file["arr_0"], stack)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calls_per_image"] == 5 and report["drawn"] == 60 and report["peak_memory_bytes"] > 0
    assert report["settings"]["nfe"] == 5 and report["calls_per_second"] > 0


def test_the_batch_does_not_matter(whole, tmp_path):
    draw(tmp_path / "one", *DEMO, "--count", 14, "--batch", 1)
    assert_same_images(tmp_path / "one", whole)
    assert len(contents(whole)) == 14


def test_two_processes_draw_what_one_draws(whole, tmp_path):
    command = ["sample", *DEMO, "--count", "14", "--batch", "4", "--out", str(tmp_path / "two"), "--npz"]
    said = in_two_processes(command, tmp_path)
    assert_same_images(tmp_path / "two", whole)
    assert "14 images are in" in said[0] and not said[1]
    assert (tmp_path / "two" / "images.npz").exists()


def test_two_processes_start_from_the_noises_and_classes_of_one(tmp_path):
    """To the bit: the one step of this model is exact, and its end says both. All are drawn, though one comes late."""
    options = ("--backbone", "python:test_sample:inputs_model", "--method", "euler", "--nfe", "1", "--latents")
    command = ["sample", *options, "--count", "14"]
    assert main([*command, "--batch", "7", "--out", str(tmp_path / "one")]) == 0
    in_two_processes([*command, "--batch", "4", "--out", str(tmp_path / "two")], tmp_path)
    for index in range(14):
        noise = np.random.Generator(np.random.Philox(key=[0, index])).standard_normal((3, 8, 8), dtype=np.float32)
        expected = torch.from_numpy(noise) + (1.0 + index % 4)
        for out in (tmp_path / "one", tmp_path / "two"):
            assert torch.equal(load_file(out / "latents" / f"{index:06d}.safetensors")["latent"], expected)


def test_an_interrupted_drawing_goes_on(whole, tmp_path, monkeypatch, capsys):
    """To the same images; what had been drawn is kept, and more can be asked for."""
    written, write = [], Folder.write

    def interrupt(self, index, *images):
        if index == 5:
            raise KeyboardInterrupt
        write(self, index, *images)

    out, options = tmp_path / "out", (*DEMO, "--batch", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", interrupt)
        draw(out, *options, "--count", 9, status=130)
    assert list(contents(out)) == [f"{index:06d}.png" for index in range(5)]
    monkeypatch.setattr(Folder, "write", lambda self, index, *i: (written.append(index), write(self, index, *i))[1])
    draw(out, *options, "--count", 14)
    assert "5 of 14 images are already drawn" in capsys.readouterr().out
    assert_same_images(out, whole)
    assert written == list(range(3, 14)), "the cut batch is drawn whole"
    assert not list(out.rglob("*.tmp"))


def test_a_full_disk_and_nan_lose_nothing(tmp_path, monkeypatch, capsys):
    out, save = tmp_path / "out", Image.Image.save

    def full(self, target, *arguments, **named):
        if "000003" in str(target):
            raise OSError(28, "No space left on device")
        save(self, target, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        draw(out, *DEMO, "--count", 5, "--batch", 1, status=1)
    assert "No space left on device" in capsys.readouterr().err
    assert len(contents(out)) == 3 and not list(out.rglob("*.tmp"))

    breaks = "python:test_sample:broken_model"
    draw(tmp_path / "nan", "--backbone", breaks, "--method", "euler", "--count", 3, status=1)
    assert "The backbone returned NaN or infinity" in capsys.readouterr().err
    assert len(contents(tmp_path / "nan")) == 0


def broken_model(device, dtype):
    return Backbone("broken", "python", "1", (3, 8, 8), lambda x, t, c, s: x / 0, decode=lambda x: x)


def inputs_model(device, dtype):
    """Its velocity is the condition alone, so that one step of Euler ends at noise + 1 + condition.

    A second process gets it when the first has long begun.
    """
    time.sleep(2 * int(os.environ.get("RANK", "0")))

    def velocity(x, t, conditions, scale):
        return -(1.0 + conditions).view(-1, 1, 1, 1).expand_as(x)

    return Backbone("inputs", "python", "inputs-1", (3, 8, 8), velocity, conditions=4)


def plain_model(device, dtype):
    """Its velocity is the state's distance from a constant; images in [0, 1]."""
    return Backbone(
        "plain", "python", "plain-1", (3, 8, 8), lambda x, t, c, s: x - 0.5, conditions=4, decode=lambda x: x
    )


def test_models_of_ones_own_and_pairs(tmp_path):
    out = tmp_path / "out"
    options = ("--backbone", "python:test_sample:plain_model", "--method", "multistep", "--nfe", 4)
    images = draw(out, *options, "--count", 3, "--classes", "2,0", "--compare", "euler:50")
    backbone = plain_model(None, None)
    for index, (image, pair) in enumerate(
        zip(read_pngs(images), read_pngs(sorted((out / "pairs").iterdir())), strict=True)
    ):
        noise = np.random.Generator(np.random.Philox(key=[0, index])).standard_normal((3, 8, 8), dtype=np.float32)
        field = backbone.field(torch.tensor([0]), 1.0)
        drawn = solve(field, None, torch.from_numpy(noise)[None], time_grid(4))[0]
        expected = (drawn.clamp(0, 1) * 255).round().movedim(0, -1).numpy()
        assert np.abs(image - expected).max() <= 1 and np.array_equal(pair[:, :8], image) and pair.shape == (8, 16, 3)
        exact = 0.5 + (noise - 0.5) * np.exp(-1)
        beside = pair[:, 8:].transpose(2, 0, 1) / 255
        assert np.abs(beside - exact.clip(0, 1)).max() < 0.03, "Euler in 50 steps is near the exact end"


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A tiny SiT of latents and a SideNet, as the authors' files are, and an autoencoder."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    sit = SiT(SiTConfig(input_size=8, hidden_size=64, depth=2, num_heads=1, num_classes=5))
    sidenet = SideNet(SideNetConfig(base_channels=16, embedding_dim=16, num_heads=4, num_layers=3, num_classes=5))
    for module in (sit, sidenet):
        for parameter in module.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    torch.save({"ema": sit.state_dict()}, folder / "sit.pt")
    torch.save({"ema_side_model": sidenet.state_dict(), "step": 250}, folder / "sidenet.pt")
    vae = pipelines.autoencoder(4, 4, scaling_factor=0.18215)
    vae.save_pretrained(folder / "vae")
    return folder, vae.eval()


def test_the_papers_protocol(official, tmp_path):
    """The authors' files and a preset: the published solver, guidance and grid, decoded at the VAE's own scale."""
    folder, vae = official
    options = ("--sit", folder / "sit.pt", "--sidenet", folder / "sidenet.pt", "--preset", "paper-5")
    images = draw(tmp_path / "out", *options, "--vae", folder / "vae", "--count", 6)
    sit, sidenet = load_sit(folder / "sit.pt"), load_official_sidenet(folder / "sidenet.pt")
    for index, image in enumerate(read_pngs(images)):
        noise = np.random.Generator(np.random.Philox(key=[0, index])).standard_normal((4, 8, 8), dtype=np.float32)
        label = torch.tensor([index % 5])
        field = model_field(sit, label, torch.tensor([5]), Guidance(1.5, (0.0, 0.7)), "per_branch")
        with torch.inference_mode():
            x = solve(field, sidenet, torch.from_numpy(noise)[None], time_grid(5))
            decoded = vae.decode(x / 0.18215).sample[0].clamp(-1, 1) / 2 + 0.5
        assert field.calls == 5 and image.shape == (64, 64, 3)
        assert np.abs(image / 255 - decoded.movedim(0, -1).numpy()).max() < 0.5 / 255 + 1e-5
    assert set(PRESETS) == {"paper-5", "paper-7", "paper-8", "paper-10", "paper-15"}
    assert {(preset.guidance, preset.interval) for preset in PRESETS.values()} == {(1.5, (0.0, 0.7))}


def test_latents_are_kept_on_request_and_refused_without_a_decoder(official, tmp_path, capsys):
    folder, _ = official
    options = ("--sit", folder / "sit.pt", "--sidenet", folder / "sidenet.pt", "--preset", "paper-5", "--count", 2)
    draw(tmp_path / "no", *options, status=2)
    assert "Give the folder of its autoencoder with --vae" in capsys.readouterr().err
    draw(tmp_path / "latents", *options, "--latents")
    assert sorted(path.name for path in (tmp_path / "latents" / "latents").iterdir()) == [
        "000000.safetensors",
        "000001.safetensors",
    ]


REFUSED = [
    ((*DEMO, "--classes", "3,10"), "--classes must be numbers from 0 to 9"),
    ((*DEMO, "--method", "best"), "There is no solver 'best'. Valid ones: bi_anchor"),
    ((*DEMO, "--preset", "paper-6"), "There is no preset 'paper-6'"),
    ((*DEMO, "--compare", "euler"), "such as euler:50"),
    ((*DEMO, "--backbone", "sit:x"), "Give the model, once"),
    ((), "Give the model, once"),
    (("--sit", str(SIT_FILE)), "needs a SideNet. Give --sidenet FILE, or --method multistep"),
    ((*DEMO, "--vae", "nowhere"), "is no folder"),
    ((*DEMO, "--guidance", "1", "2"), "takes one scale"),
    ((*DEMO, "--latents", "--npz"), "--latents keeps no images"),
    ((*DEMO, "--count", "0"), "--count must be at least 1"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_be_drawn_is_refused_in_words(options, said, tmp_path, capsys):
    draw(tmp_path / "out", *options, status=2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "images").exists()


def test_a_sidenet_of_another_model_is_refused(official, tmp_path, capsys):
    folder, _ = official
    draw(tmp_path / "a", "--sit", folder / "sit.pt", "--sidenet", SIDENET_FILE, "--latents", status=1)
    assert "belongs to 'demo SiT'" in capsys.readouterr().err
    draw(tmp_path / "b", "--sit", SIT_FILE, "--sidenet", folder / "sidenet.pt", status=1)
    assert "4 channels and 5 classes; 'demo_sit' has 3 and 10" in capsys.readouterr().err


def test_folders_of_other_settings_and_things_are_refused(whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = contents(out)
    draw(out, *DEMO, "--seed", 1, status=2)
    assert "drawn with other settings (seed was 0, now 1)" in capsys.readouterr().err
    (out / "settings.json").write_text('{"seed": ')
    draw(out, *DEMO, status=2)
    assert "settings.json is damaged" in capsys.readouterr().err and contents(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    draw(tmp_path / "full", *DEMO, status=2)
    assert "holds other things (diary.txt)" in capsys.readouterr().err


def test_pipelines_draw_prompts(tmp_path):
    """A `diffusers` folder and prompts, with no SideNet: other prompts give other images."""
    pipelines.save(pipelines.sd3, tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    where = ("--backbone", f"diffusers:{tmp_path / 'pipeline'}", "--prompts", tmp_path / "prompts.txt")
    images = draw(
        tmp_path / "out",
        *where,
        "--method",
        "multistep",
        "--guidance",
        2.5,
        "--count",
        2,
        "--height",
        32,
        "--width",
        32,
    )
    cat, dog = read_pngs(images)
    assert cat.shape == (32, 32, 3) and not np.array_equal(cat, dog)


def test_scores_say_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    draw(tmp_path / "out", *DEMO, "--fid", "reference.npz", status=2)
    said = capsys.readouterr().err
    assert "--fid needs torch-fidelity: pip install" in said or "weights-inception" in said


@pytest.fixture
def fidelity():
    return pytest.importorskip("torch_fidelity", reason="torch-fidelity, which computes FID, is not installed")


def test_scores_tell_images_from_others(fidelity, whole, tmp_path, monkeypatch):
    """By the library, with random weights: from themselves images are at no distance, from noise they are far."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        torch.save(FeatureExtractorInceptionV3("made", ["2048"]).state_dict(), tmp_path / "weights.pth")
    images = sorted((whole / "images").glob("*.png"))
    write_npz(tmp_path / "same.npz", images)
    noise = np.random.default_rng(0).integers(0, 256, (14, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", noise)
    network = torch.device("cpu"), tmp_path / "weights.pth"
    found = [scores(images, tmp_path / name, *network) for name in ("same.npz", "noise.npz")]
    assert set(found[0]) == {"FID", "IS", "precision", "recall"}
    assert abs(found[0]["FID"]) < 1e-3 * found[1]["FID"] and found[0]["precision"] == 1
    with pytest.raises(CheckpointError, match="no array file of images"):
        scores(images, images[0], *network)


def test_weights_that_are_not_the_published_ones_are_not_read(fidelity, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / WEIGHTS).write_bytes(b"something else")
    draw(tmp_path / "out", *DEMO, "--fid", "reference.npz", status=2)
    assert "is not the published file" in capsys.readouterr().err
