"""Files of people who do not know this project: each is loaded, or refused with the reason and what to do."""

import builtins
import importlib
import json
import logging
import os
import re
import resource
import struct
import subprocess
import sys
import time
import types

import pytest
import torch
from ba_solver.bas_core import (
    CheckpointError,
    SideNet,
    SideNetCard,
    SideNetConfig,
    load_official_sidenet,
    load_sidenet,
    load_sit,
    save_sidenet,
)
from problems import NULL, labels, noise, randomise, small_sidenet, small_sit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

OFFICIAL = randomise(SideNet(SideNetConfig(4, 8, 8, 3, NULL)), seed=1).requires_grad_(False)
SIT = small_sit(1, torch.float32)
LOADERS = {"sidenet": load_sidenet, "official": load_official_sidenet, "sit": load_sit}
SUFFIX = {"sidenet": ".safetensors", "official": ".pt", "sit": ".pt"}
GIGABYTES = 2 << 30


def evaluated(net, dtype=torch.float32):
    channels = net.config.in_channels
    x, t = noise(2, channels, 4, 4, dtype=dtype), torch.tensor([0.5, 0.8])
    return net(x, x * 2, t, t / 3, labels(2)[0])


def write_good(kind, path):
    if kind == "sidenet":
        save_sidenet(path, small_sidenet(dtype=torch.float32))
    else:
        torch.save({"ema_side_model": OFFICIAL.state_dict()} if kind == "official" else {"ema": SIT.state_dict()}, path)


def load_good(kind, path):
    loaded = load_sit(path, num_heads=2) if kind == "sit" else LOADERS[kind](path)
    return (loaded[0] if kind == "sidenet" else loaded).state_dict()


# --- names and types of tensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: re.sub(r"^(blocks\.\d+)\.", r"\1._orig_mod.", name),
        lambda name: re.sub(r"^(blocks\.\d+)\.", r"module.\1._checkpoint_wrapped_module.", name),
    ],
    ids=["compiled", "parallel", "both", "both, the other way round", "twice", "sharded", "compiled blocks", "blocks"],
)
def test_names_that_wrappers_leave_are_understood(wrapped, tmp_path):
    """`torch.compile`, DataParallel and the like, around the whole network or its blocks."""
    state = {wrapped(name): value for name, value in OFFICIAL.state_dict().items()}
    assert state.keys() != OFFICIAL.state_dict().keys()
    torch.save({"ema_side_model": state}, tmp_path / "official.pt")
    torch.testing.assert_close(evaluated(load_official_sidenet(tmp_path / "official.pt")), evaluated(OFFICIAL))
    sit = {wrapped(name): value for name, value in SIT.state_dict().items()}
    torch.save({"ema": sit}, tmp_path / "sit.pt")
    assert load_good("sit", tmp_path / "sit.pt").keys() == SIT.state_dict().keys()
    save_file(sit, tmp_path / "sit.safetensors")
    assert load_good("sit", tmp_path / "sit.safetensors").keys() == SIT.state_dict().keys()


def test_an_averaged_models_own_state_is_read(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(OFFICIAL)
    torch.save({"ema_side_model": average.state_dict()}, tmp_path / "official.pt")
    torch.testing.assert_close(evaluated(load_official_sidenet(tmp_path / "official.pt")), evaluated(OFFICIAL))


def test_two_tensors_that_come_to_one_name_are_refused(tmp_path):
    state = OFFICIAL.state_dict() | {"module.output_conv.bias": torch.zeros(4)}
    torch.save({"ema_side_model": state}, tmp_path / "official.pt")
    with pytest.raises(CheckpointError, match=r"two tensors 'output_conv.bias', one of them as 'module.output_conv"):
        load_official_sidenet(tmp_path / "official.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_compute(dtype, tmp_path):
    """As stored, or in the precision that is asked for."""
    torch.save({"ema_side_model": {k: v.to(dtype) for k, v in OFFICIAL.state_dict().items()}}, tmp_path / "o.pt")
    save_sidenet(tmp_path / "ours.safetensors", small_sidenet(dtype=dtype))
    torch.save({"ema": {k: v.to(dtype) for k, v in SIT.state_dict().items()}}, tmp_path / "sit.pt")
    ours, same = load_sidenet(tmp_path / "ours.safetensors")[0], small_sidenet(dtype=torch.float32)
    for net, expected in ((load_official_sidenet(tmp_path / "o.pt"), OFFICIAL), (ours, same)):
        assert {p.dtype for p in net.parameters()} == {dtype}
        torch.testing.assert_close(evaluated(net), evaluated(expected), rtol=0.05, atol=0.05)
    single = load_sidenet(tmp_path / "ours.safetensors", dtype=torch.float32)[0]
    torch.testing.assert_close(evaluated(single), evaluated(same), rtol=0.05, atol=0.05)
    assert {p.dtype for p in load_sit(tmp_path / "sit.pt", num_heads=2).parameters()} == {torch.float32}


def test_weights_of_mixed_precision_compute(tmp_path):
    """Some tools keep a few tensors in full precision; layers of two types would stop at the first call."""
    state = {k: v.half() if "conv" in k else v for k, v in OFFICIAL.state_dict().items()}
    assert len({v.dtype for v in state.values()}) == 2
    torch.save({"ema_side_model": state}, tmp_path / "official.pt")
    net = load_official_sidenet(tmp_path / "official.pt")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    torch.testing.assert_close(evaluated(net), evaluated(OFFICIAL), rtol=0.01, atol=0.01)


def test_weights_in_eight_bits_are_refused_by_name(tmp_path):
    save_sidenet(tmp_path / "net.safetensors", small_sidenet(dtype=torch.float32))
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        metadata = dict(file.metadata())
    state = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(tmp_path / "net.safetensors").items()}
    save_file(state, tmp_path / "net.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"is torch.float8_e4m3fn.*must be one of float64, float32"):
        load_sidenet(tmp_path / "net.safetensors")


# --- other files ------------------------------------------------------------------------------------------------------


def one(name):
    return {name: torch.ones(2)}


OTHERS = {
    "LoRA of kohya": (one("lora_unet_down_blocks_0.lora_up.weight"), {"ss_network_module": "networks.lora"}),
    "LoRA of kohya, alpha": (one("lora_unet_input_blocks_1.alpha"), {}),
    "LoRA of diffusers": (one("unet.up_blocks.0.to_q.lora.up.weight"), {"format": "pt"}),
    "LoRA of PEFT": (one("base_model.model.layers.0.q_proj.lora_A.weight"), {"format": "pt"}),
    "LoRA of our own layers": (one("blocks.0.emb_proj.alpha"), {}),
    "LoHa": (one("lycoris_blocks_0.hada_w1_a"), {}),
}
NOT_OURS = {
    "a SiT": (one("x_embedder.proj.weight"), {}, "It is a SiT: put it into models/sit"),
    "a checkpoint": (one("model.diffusion_model.out.2.bias"), {}, "whole checkpoint: put it into models/checkpoints"),
    "a VAE": (one("decoder.conv_in.bias"), {"format": "pt"}, "It is a VAE: put it into models/vae"),
    "anything": (one("a"), {}, "it has no 'format' in its metadata. Choose another file"),
    "ours, of another kind": (one("a"), {"format": "ba-solver-chains"}, "its format is 'ba-solver-chains'. Choose"),
}


@pytest.mark.parametrize(("tensors", "metadata"), OTHERS.values(), ids=OTHERS)
def test_a_lora_is_sent_where_it_belongs(tensors, metadata, tmp_path):
    """Renamed, or put into the wrong folder."""
    save_file(tensors, tmp_path / "style.safetensors", metadata)
    for load in (load_sidenet, load_sit):
        with pytest.raises(CheckpointError, match=r"style.safetensors.*It is a LoRA: put it into models/loras"):
            load(tmp_path / "style.safetensors")
    torch.save(tensors, tmp_path / "style.pt")
    for load in (load_official_sidenet, load_sit):
        with pytest.raises(CheckpointError, match=r"style.pt.*It is a LoRA: put it into models/loras"):
            load(tmp_path / "style.pt")


@pytest.mark.parametrize(("tensors", "metadata", "message"), NOT_OURS.values(), ids=NOT_OURS)
def test_other_models_are_named_where_they_are_known(tensors, metadata, message, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"model.safetensors is no ba-solver-sidenet file.*{message}"):
        load_sidenet(tmp_path / "model.safetensors")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"modelspec.title": "merged"}], ids=str)
def test_a_sidenet_without_its_metadata_is_known_and_refused(metadata, tmp_path):
    save_file(small_sidenet().state_dict(), tmp_path / "merged.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"a SideNet's, so its metadata were removed.*get the original file"):
        load_sidenet(tmp_path / "merged.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "pointer of Git LFS.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "It is a web page. Download the file itself"),
    ],
    ids=["lfs", "page"],
)
@pytest.mark.parametrize("kind", LOADERS)
def test_what_was_downloaded_in_a_files_place_is_named(kind, content, message, tmp_path):
    path = tmp_path / f"net{SUFFIX[kind]}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        LOADERS[kind](path)


def test_a_sidenet_given_as_a_sit_is_sent_where_it_belongs(tmp_path):
    save_sidenet(tmp_path / "net.safetensors", small_sidenet())
    with pytest.raises(CheckpointError, match=r"no SiT checkpoint.*It is a SideNet: put it into models/sidenets"):
        load_sit(tmp_path / "net.safetensors")


def test_files_under_each_others_names_are_named(tmp_path):
    save_sidenet(tmp_path / "net.pt", small_sidenet())
    torch.save({"ema_side_model": OFFICIAL.state_dict()}, tmp_path / "official.safetensors")
    for load in (load_official_sidenet, load_sit):
        with pytest.raises(CheckpointError, match=r"net.pt is refused: It is a safetensors file.*\.safetensors"):
            load(tmp_path / "net.pt")
    for load in (load_sidenet, load_sit):
        with pytest.raises(CheckpointError, match=r"official.safetensors.*PyTorch file.*ba-solver convert"):
            load(tmp_path / "official.safetensors")


def test_a_suffix_in_capitals_is_the_same(tmp_path):
    save_file(SIT.state_dict(), tmp_path / "SIT.SAFETENSORS")
    assert load_good("sit", tmp_path / "SIT.SAFETENSORS").keys() == SIT.state_dict().keys()


# --- where files are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOADERS)
def test_links_and_names_in_any_script_are_followed(kind, tmp_path):
    folder = tmp_path / "モデル"
    folder.mkdir()
    path = folder / f"側面ネット ёж 🦔{SUFFIX[kind]}"
    write_good(kind, path)
    link = tmp_path / f"link{SUFFIX[kind]}"
    link.symlink_to(path)
    chain = tmp_path / f"chain{SUFFIX[kind]}"
    chain.symlink_to(link)
    expected = load_good(kind, path)
    for other in (link, chain):
        state = load_good(kind, other)
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_no_file_is_named(kind, tmp_path):
    suffix = SUFFIX[kind]
    for name, message in {
        "missing": "Check the path",
        "broken": "It is a link to .*gone.*, which is not there",
        "loop": "It is a link that leads in a circle",
        "folder": "It is a folder",
        "pipe": "It is something else",
        "file/below": "Not a directory",
        "zero\0byte": "null byte",
        "long" * 100: "File name too long",
    }.items():
        path = tmp_path / f"{name}{suffix}"
        if name == "broken":
            path.symlink_to(tmp_path / f"gone{suffix}")
        elif name == "loop":
            path.symlink_to(path)
        elif name == "folder":
            path.mkdir()
        elif name == "pipe":
            os.mkfifo(path)
        elif name == "file/below":
            (tmp_path / "file").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=f"There is no file .*{message}") as caught:
            LOADERS[kind](path)
        assert str(path) in str(caught.value)
        if path.parent != tmp_path:
            (tmp_path / "file").unlink()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_file_that_may_not_be_read_is_refused_in_words(kind, what, tmp_path, monkeypatch):
    """Simulated, for tests may run as root, whom nothing is forbidden."""
    path = tmp_path / f"net{SUFFIX[kind]}"
    write_good(kind, path)
    if what == "file":
        real = builtins.open

        def forbidden(name, *arguments, **options):
            if str(name) == str(path):
                raise PermissionError(13, "Permission denied", str(path))
            return real(name, *arguments, **options)

        monkeypatch.setattr(builtins, "open", forbidden)
    else:

        def stat(self, **options):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(type(path), "stat", stat)
    with pytest.raises(PermissionError, match=r"may not be read. Let the user that runs this read the file and its"):
        LOADERS[kind](path)


def test_a_folder_that_may_not_be_listed_leaves_the_nodes_their_demo(monkeypatch, caplog):
    """ComfyUI asks every node for its lists at once: one that raises takes all of them away."""

    def forbidden(key):
        raise PermissionError(13, "Permission denied", "/models/sidenets")

    folder_paths = types.SimpleNamespace(get_filename_list=forbidden)
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
    monkeypatch.delitem(sys.modules, "ba_solver.nodes.folders", raising=False)
    folders = importlib.import_module("ba_solver.nodes.folders")
    with caplog.at_level(logging.WARNING):
        assert folders.SIDENETS.names() == [folders.DEMO]
    assert "SideNet files cannot be listed" in caplog.text and "/models/sidenets" in caplog.text
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda key: ["名前.safetensors"])
    assert folders.SIDENETS.names() == [folders.DEMO, "名前.safetensors"]
    sys.modules.pop("ba_solver.nodes.folders")


def test_a_name_that_the_terminal_cannot_write_does_not_end_the_work(tmp_path):
    pytest.importorskip("tyro")
    torch.save({"ema_side_model": OFFICIAL.state_dict()}, tmp_path / "official.pt")
    code = "import sys; from ba_solver.training.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:0] = {sys.path!r}; {code}",
            "convert",
            "official.pt",
            "側.safetensors",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert r"Written: \u5074.safetensors" in done.stdout
    assert load_sidenet(tmp_path / "側.safetensors")[1] != SideNetCard()


# --- large files ------------------------------------------------------------------------------------------------------


def sparse_zeros(path):
    path.touch()
    os.truncate(path, GIGABYTES)


def sparse_safetensors(path):
    header = {"model.norm": {"dtype": "F32", "shape": [GIGABYTES // 4], "data_offsets": [0, GIGABYTES]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + GIGABYTES)


def sparse_pytorch(path):
    with torch.serialization.skip_data():
        torch.save({"model": {"norm": torch.empty(GIGABYTES // 4)}}, path)


@pytest.mark.parametrize(
    ("write", "name", "loaders"),
    [
        (sparse_zeros, "big.safetensors", (load_sidenet, load_sit)),
        (sparse_zeros, "big.pt", (load_official_sidenet, load_sit)),
        (sparse_safetensors, "big.safetensors", (load_sidenet, load_sit)),
        (sparse_pytorch, "big.pt", (load_official_sidenet, load_sit)),
    ],
    ids=["zeros as safetensors", "zeros as pt", "safetensors", "pt"],
)
def test_a_large_file_of_something_else_is_refused_before_it_is_read(write, name, loaders, tmp_path):
    """2 GB of another model (sparse, so that it takes no room): in a moment, and without its memory."""
    path = tmp_path / name
    write(path)
    assert path.stat().st_size >= GIGABYTES
    if path.stat().st_blocks * 512 > 1 << 26:
        pytest.skip("the file system keeps no sparse files")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for load in loaders:
        with pytest.raises(CheckpointError, match=name):
            load(path)
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes of memory"


def test_what_stays_on_disk_until_it_is_used_is_read_rightly(tmp_path):
    """Also from a `.pt` that was compressed afterwards, which cannot stay there."""
    import zipfile

    torch.save({"ema_side_model": OFFICIAL.state_dict()}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as archive,
        zipfile.ZipFile(tmp_path / "compressed.pt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for entry in archive.namelist():
            compressed.writestr(entry, archive.read(entry))
    for name in ("stored.pt", "compressed.pt"):
        torch.testing.assert_close(evaluated(load_official_sidenet(tmp_path / name)), evaluated(OFFICIAL))
