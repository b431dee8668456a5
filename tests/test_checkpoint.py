"""SideNet files: what is written is read bit for bit, and what does not fit is refused in words, unexecuted."""

import json
import os
import pickle

import pytest
import torch
from ba_solver.bas_core import (
    CheckpointError,
    Schedule,
    SideNet,
    SideNetCard,
    SideNetConfig,
    files,
    load_official_sidenet,
    load_sidenet,
    load_sit,
    save_sidenet,
)
from problems import NULL, labels, noise, randomise, small_sidenet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

CARD = SideNetCard(
    cfg_mode="combined",
    cfg_range=(1.0, 4.5),
    backbone={"name": "demo", "kind": "SiT", "fingerprint": "0123abcd"},
    schedules={2.0: {5: Schedule([1.0, 0.9, 0.75, 0.5, 0.25, 0.0]), 1: Schedule([1.0, 0.0])}},
    part=(0.9, 0.25),
    training={"objective": "pairs", "steps": 1500, "seed": 0, "versions": {"torch": "2"}},
    evaluation={"5": {"ba_solver": 0.0375}, "note": "größer"},
    license="MIT",
)


def stored(tmp_path, **changes):
    """A good file, and what is in it."""
    path = tmp_path / "net.safetensors"
    save_sidenet(path, small_sidenet(dtype=torch.float32, **changes), CARD)
    with safe_open(path, framework="pt") as file:
        return path, load_file(path), dict(file.metadata())


# --- what is written is read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "changes",
    [{}, {"anchors": 2, "cfg_input": True, "patch_size": 2, "num_classes": 0, "architecture": "transformer"}],
    ids=str,
)
def test_round_trip_is_exact_bit_for_bit(tmp_path, changes, dtype):
    net = small_sidenet(dtype=dtype, **changes)
    with torch.no_grad():
        net.output_conv.bias[0] = -0.0
    save_sidenet(tmp_path / "net.safetensors", net, CARD)
    again, card = load_sidenet(tmp_path / "net.safetensors")
    assert (again.config, card) == (net.config, CARD)
    assert again.state_dict().keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_a_loaded_network_computes_the_same_and_may_be_cast(tmp_path):
    path, _, _ = stored(tmp_path, anchors=2)
    net = small_sidenet(dtype=torch.float32, anchors=2)
    x, t = noise(2, 2, 4, 4, dtype=torch.float32), torch.tensor([0.5, 0.8])
    given = {"x": x, "v": x * 2, "t": t, "h": t / 3, "cond": labels(2)[0]}
    torch.testing.assert_close(load_sidenet(path)[0](**given), net(**given))
    assert {p.dtype for p in load_sidenet(path, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_the_metadata_are_what_the_design_says(tmp_path):
    _, _, metadata = stored(tmp_path)
    assert metadata["format"] == "ba-solver-sidenet" and metadata["format_version"] == "4"
    assert metadata["latent_channels"] == "2" and metadata["cfg_mode"] == "combined"
    assert json.loads(metadata["config"])["base_channels"] == 8
    run = {
        "times": [1.0, 0.0],
        "coefficients": [],
        "cfg_coefficients": [],
        "analytic_first_step": False,
        "rule": "lobatto4",
    }
    assert json.loads(metadata["schedules"])["2.0"]["1"] == run
    assert json.loads(metadata["backbone"])["fingerprint"] == "0123abcd" and metadata["license"] == "MIT"


def test_a_card_is_not_needed(tmp_path):
    save_sidenet(tmp_path / "net.safetensors", small_sidenet())
    assert load_sidenet(tmp_path / "net.safetensors")[1] == SideNetCard()


def test_fingerprints_follow_the_weights_alone():
    state = small_sidenet().state_dict()
    same = files.fingerprint(dict(reversed(state.items())))
    changed = files.fingerprint(state | {"output_conv.bias": state["output_conv.bias"] + 1e-3})
    assert same == files.fingerprint(state) != changed


# --- the official files -----------------------------------------------------------------------------------------------

OFFICIAL = randomise(SideNet(SideNetConfig(4, 8, 8, 3, NULL)), seed=1)
OTHER = randomise(SideNet(SideNetConfig(4, 8, 8, 3, NULL)), seed=2)
ema, raw = OFFICIAL.state_dict(), OTHER.state_dict()
prefixed = {f"module.{name}": tensor for name, tensor in ema.items()}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"side_model": raw, "ema_side_model": ema, "optimizer": {"state": {}, "param_groups": []}, "step": 250},
            OFFICIAL,
        ),
        ({"side_model": raw, "step": 1}, OTHER),
        ({"ema_side_model": prefixed, "side_model": raw}, OFFICIAL),
        (ema, OFFICIAL),
        (prefixed, OFFICIAL),
    ],
    ids=["ema is preferred", "side_model", "ema, module.", "bare", "bare, module."],
)
def test_official_forms_load_and_compute_the_same(tmp_path, content, expected):
    torch.save(content, tmp_path / "official.pt")
    net = load_official_sidenet(tmp_path / "official.pt")
    assert net.config == expected.config
    x, t = noise(2, 4, 4, 4, dtype=torch.float32), torch.tensor([0.5, 0.8])
    for y in labels(2):
        torch.testing.assert_close(net(x, x * 2, t, t / 3, y), expected(x, x * 2, t, t / 3, y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_conv.weight": None}, "no official SideNet: tensor 'input_conv.weight' is missing"),
        ({"blocks.0.conv1_dw.weight": None}, r"1 missing \(first 'blocks.0.conv1_dw.weight'\)"),
        ({"d_embedder.mlp.0.weight": torch.zeros(8, 256)}, r"1 unknown \(first 'd_embedder.mlp.0.weight'\)"),
        ({"output_conv.bias": torch.zeros(3)}, r"'output_conv.bias'.*must be \(4,\); got \(3,\)"),
        ({"output_conv.bias": torch.full((4,), torch.inf)}, "'output_conv.bias'.*not finite"),
        ({"input_conv.weight": torch.zeros(6, 8, 3, 3)}, "official.pt.*num_heads 4; got 6"),
        ({"input_conv.weight": torch.zeros(8)}, "official.pt"),
        ({"blocks.one.bias": torch.zeros(1)}, "official.pt"),
    ],
    ids=["no input", "missing", "unknown", "shape", "infinite", "width", "rank", "name"],
)
def test_what_is_no_official_sidenet_is_refused(tmp_path, change, message):
    state = {name: tensor for name, tensor in (ema | change).items() if tensor is not None}
    torch.save({"ema_side_model": state}, tmp_path / "official.pt")
    with pytest.raises(CheckpointError, match=message):
        load_official_sidenet(tmp_path / "official.pt")


class Bomb:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("load", [load_official_sidenet, load_sit])
@pytest.mark.parametrize(
    "save",
    [torch.save, lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
     lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))],
    ids=["zip", "legacy", "plain pickle"],
)  # fmt: skip
def test_a_pickle_that_wants_to_run_code_is_refused_unexecuted(tmp_path, load, save):
    live = tmp_path / "live"
    pickle.loads(pickle.dumps(Bomb(live)))
    assert live.is_dir(), "the bomb must work, or this shows nothing"
    marker = tmp_path / "marker"
    save({"ema_side_model": ema, "ema": ema, "step": Bomb(marker)}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil.pt is refused.*Nothing of it was executed"):
        load(tmp_path / "evil.pt")
    assert not marker.exists()


@pytest.mark.parametrize("load", [load_official_sidenet, load_sit])
@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b".", b"\x80\x02.", b"garbage\n", b"PK\x03\x04" + bytes(64), b"<html>not found</html>"],
    ids=repr,
)
def test_garbage_is_refused_in_words(tmp_path, load, content):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad.pt"):
        load(path)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.99])
def test_truncated_pickles_are_refused(tmp_path, share):
    torch.save({"ema_side_model": ema}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"cut.pt is refused: it is damaged"):
        load_official_sidenet(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("content", "message"), [([1, 2], "dictionary of tensors; got list"), ({"step": 3}, "holds no tensors")]
)
def test_pickles_of_other_things_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=message):
        load_official_sidenet(tmp_path / "other.pt")


# --- files that are not what they should be ---------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 0.5, 0.99], ids=str)
def test_truncated_safetensors_are_refused(tmp_path, keep):
    path, _, _ = stored(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"net.safetensors cannot be read.*truncated.*download it again"):
        load_sidenet(path)


def test_a_pickle_given_as_a_sidenet_is_refused(tmp_path):
    torch.save({"ema_side_model": ema}, tmp_path / "official.pt")
    with pytest.raises(CheckpointError, match=r"official.pt cannot be read as safetensors.*converter"):
        load_sidenet(tmp_path / "official.pt")


@pytest.mark.parametrize("load", [load_sidenet, load_official_sidenet, load_sit])
@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pt", "."])
def test_a_missing_file_is_named(tmp_path, load, name):
    path = tmp_path / name
    with pytest.raises(FileNotFoundError, match="There is no file") as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "no ba-solver-sidenet file: it has no 'format'"),
        ({"format": "pt"}, "no ba-solver-sidenet file: its format is 'pt'"),
        ({"format": "ba-solver-sit"}, "its format is 'ba-solver-sit'"),
        ({"format_version": "5"}, "format version '5'; this code reads 4. Update ba-solver"),
        ({"format_version": "3"}, "format version '3'; this code reads 4. Make the file anew"),
        ({"format_version": "one"}, "format version 'one'"),
        ({"format_version": "²"}, "format version '²'"),
        ({"format_version": None}, "format version ''"),
        ({"config": None}, "lacks 'config'"),
        ({"config": "{"}, "damaged 'config'"),
        ({"config": "[]"}, "do not describe a SideNet"),
        ({"config": "7"}, "do not describe a SideNet"),
        ({"config": '{"in_channels": "four"}'}, "do not describe a SideNet"),
        ({"config": '{"in_channels": null}'}, "do not describe a SideNet"),
        ({"config": '{"in_channels": 2, "embedding_dim": 8.5}'}, "net.safetensors"),
        ({"config": '{"anchors": 3}'}, "do not describe a SideNet.*anchors must be 1 or 2; got 3"),
        ({"config": '{"colour": 3}'}, "do not describe a SideNet.*colour"),
        ({"config": '{"in_channels": 16}'}, "latent_channels and config name different channels"),
        ({"latent_channels": "16"}, "latent_channels and config name different channels"),
        ({"cfg_mode": "sideways"}, "cfg_mode must be one of per_branch, combined; got 'sideways'"),
        ({"cfg_mode": None}, "cfg_mode must be one of per_branch, combined; got None"),
        ({"cfg_range": "[1]"}, "do not describe a SideNet"),
        ({"cfg_range": "1"}, "do not describe a SideNet"),
        ({"part": "[1]"}, "part must be two flow times; got"),
        ({"part": "[0.2, 0.4]"}, "A part of the path needs 1 >= start > end >= 0; got 0.2 and 0.4"),
        ({"schedules": "[]"}, "'schedules' in its metadata must be an object"),
        ({"schedules": '{"2": {"five": {"times": [1, 0]}}}'}, "do not describe a SideNet"),
        ({"schedules": '{"2": {"1": {"times": [1, 0], "colour": 3}}}'}, "do not describe a SideNet"),
        ({"schedules": '{"2": {"1": {"times": [1, 1]}}}'}, "do not describe a SideNet.*strictly descend"),
        ({"schedules": '{"2": {"2": {"times": [1, 0]}}}'}, "listed under 2 model calls takes 1"),
        (
            {"schedules": '{"2": {"1": {"times": [0.9, 0.5, 0], "analytic_first_step": true}}}'},
            "starts from pure noise",
        ),
        ({"schedules": None}, "lacks 'schedules'"),
        ({"schedules": '{"4": []}'}, "do not describe a SideNet"),
        ({"schedules": '{"four": {}}'}, "do not describe a SideNet"),
        ({"schedules": '{"-4": {}}'}, "for a CFG scale above 0; some are listed under -4"),
        ({"training": "{"}, "damaged 'training'"),
    ],
    ids=str,
)
def test_damaged_metadata_are_refused(tmp_path, change, message):
    path, tensors, metadata = stored(tmp_path)
    save_file(tensors, path, {name: value for name, value in (metadata | change).items() if value is not None})
    with pytest.raises(CheckpointError, match=message) as caught:
        load_sidenet(path)
    assert "net.safetensors" in str(caught.value)


def test_safetensors_without_metadata_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=r"lora.safetensors is no ba-solver-sidenet file"):
        load_sidenet(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_conv.bias": None}, r"1 missing \(first 'output_conv.bias'\)"),
        ({"zebra": torch.zeros(1)}, r"1 unknown \(first 'zebra'\)"),
        ({"output_conv.bias": None, "zebra": torch.zeros(1)}, "1 missing.*1 unknown"),
        ({"output_conv.bias": torch.zeros(5)}, r"'output_conv.bias'.*must be \(2,\); got \(5,\)"),
        ({"output_conv.bias": torch.tensor([0.0, torch.nan])}, "'output_conv.bias'.*not finite"),
    ],
    ids=["missing", "unknown", "both", "shape", "nan"],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    path, tensors, metadata = stored(tmp_path)
    save_file({name: t for name, t in (tensors | change).items() if t is not None}, path, metadata)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_sidenet(path)
    assert str(path) in str(caught.value)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_path_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path):
    """A regular file where a folder should be, and a folder where the file should be."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "net.safetensors").mkdir()
    for path in (tmp_path / "file" / "net.safetensors", tmp_path / "net.safetensors"):
        with pytest.raises(OSError, match=r"Cannot write .*net.safetensors.*Choose a folder"):
            save_sidenet(path, small_sidenet())
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "net.safetensors"]
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failure_midway_leaves_the_old_file_whole(tmp_path, monkeypatch, fault):
    path, _, _ = stored(tmp_path)
    before = path.read_bytes()

    def half(tensors, filename, metadata):
        save_file(tensors, filename, metadata)
        os.truncate(filename, os.path.getsize(filename) // 2)
        raise fault

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(type(fault)):
        save_sidenet(path, small_sidenet(1), CARD)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before
    monkeypatch.undo()
    save_sidenet(path, small_sidenet(1, torch.float32), CARD)
    assert path.read_bytes() != before and load_sidenet(path)[1] == CARD


def test_folders_are_made_on_the_way(tmp_path):
    save_sidenet(tmp_path / "a" / "b" / "net.safetensors", small_sidenet())
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["net.safetensors"]


def test_written_files_are_as_readable_as_any_other(tmp_path):
    """A models folder is often shared: the owner alone being able to read would hide a SideNet from the server."""
    save_sidenet(tmp_path / "net.safetensors", small_sidenet())
    (tmp_path / "other").touch()
    assert (tmp_path / "net.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_loaded_network_does_not_depend_on_its_file(tmp_path):
    """Overwritten in place, as a careless download does; tensors that are mapped to the file would change."""
    path, _, _ = stored(tmp_path)
    loaded = load_sidenet(path)[0]
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\x11" * (size - size // 2))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name]), name
