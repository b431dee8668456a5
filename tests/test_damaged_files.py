"""Thousands of damaged files of every kind: each is read to finite numbers or refused in words, and nothing else."""

import argparse
import json
import random
import warnings

import pytest
import torch
from ba_solver.bas_core import (
    CheckpointError,
    Schedule,
    SideNet,
    SideNetCard,
    SideNetConfig,
    load_official_sidenet,
    load_sidenet,
    load_sit,
    save_sidenet,
    save_sit,
)
from ba_solver.bas_core.files import read_pickled_tensors
from ba_solver.training.interrupted import Account, rebuilt
from ba_solver.training.recording.shards import open_shard, save_shard
from ba_solver.training.schedules.rollouts import Rollout
from problems import NULL, noise, randomise, small_sidenet, small_sit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SEED, MUTATIONS = 20, 150
OFFICIAL = randomise(SideNet(SideNetConfig(4, 4, 4, 3, NULL)), seed=1).state_dict()
SIT = small_sit(1, torch.float32, hidden_size=8, depth=1, input_size=4)
CARD = SideNetCard(
    cfg_mode="combined",
    cfg_range=(1.0, 4.5),
    backbone={"name": "demo", "kind": "sit", "fingerprint": "0123abcd"},
    schedules={
        2.0: {
            2: Schedule([1.0, 0.5, 0.0], [[0.1, 0.1], [0.1, 0.2, 0.3, 0.1], [0.1, 0.2, 0.1]]),
            1: Schedule([1.0, 0.0]),
        }
    },
    training={
        "objective": "all_pairs",
        "trajectories": 3,
        "recorded": {"points": 4, "shape": [2, 4, 4], "reference_error": 0.1},
        "settings": {"rule": "lobatto4"},
        "seconds": 9,
    },
    evaluation={
        "guidance": 2.0,
        "noises": 3,
        "endpoint_error": [{"label": "Euler", "grid": "best", "nfe": calls, "error": 1 / calls} for calls in (2, 3)],
        "variance_unexplained": {"kind": {"first": 0.4}},
    },
    license="MIT",
)
METADATA = {
    "backbone": {"name": "demo", "kind": "sit", "fingerprint": "0123abcd"},
    "shape": [2, 2, 2],
    "cfg_mode": "combined",
    "guidance": [1.0, 1.0],
    "guidance_interval": [0.0, 1.0],
    "points": 4,
    "shift": 1.0,
    "start": 1.0,
    "end": 0.0,
    "part": [1.0, 0.0],
    "num_classes": 3,
    "patch_size": 2,
    "record_batch": 3,
    "null": 3,
}


def save_sidenet_here(path):
    save_sidenet(path, small_sidenet(dtype=torch.float32, base_channels=4, embedding_dim=4), CARD)


def save_shard_here(path):
    tensors = {
        "states": noise(3, 4, 2, 2, 2),
        "velocities": noise(3, 4, 2, 2, 2),
        "labels": torch.arange(3),
        "scales": torch.ones(3),
    }
    save_shard(path, {"times": torch.linspace(1, 0, 4).expand(3, -1), **tensors}, METADATA)


def save_state_here(path):
    """As the training loop does."""
    weights = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(weights.parameters())
    weights(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"step": 3, "history": [{"step": 3, "loss": 0.5}], "best": None}
    torch.save({**state, "model": weights.state_dict(), "optimizer0": optimizer.state_dict()}, path)


def load_and_describe(path):
    """As `ba-solver info` and the node SideNet Info do."""
    pytest.importorskip("tyro")
    from ba_solver.training.sidenet_files import describe_sidenet

    sidenet, card = load_sidenet(path)
    assert describe_sidenet(sidenet, card)
    node_report(sidenet, card)
    return sidenet.state_dict()


def node_report(sidenet, card):
    pytest.importorskip("PIL")
    from ba_solver.nodes.report import error_curves, error_plot, report

    assert report("net", sidenet.config, card)
    curves = error_curves(card.evaluation)
    if curves != error_curves(CARD.evaluation):  # drawing takes longer than all the rest
        assert error_plot(curves).isfinite().all()


def shard_tensors(path):
    tensors, metadata = open_shard(path)
    assert metadata.keys() >= METADATA.keys()
    return tensors


def save_rollouts_here(path):
    """As a search of schedules does."""
    parts = {name: noise(4, 3, 5) for name in ("states", "velocities", "extra", "predictions")}
    rollout = Rollout(times=torch.linspace(1, 0.1, 4), ends=noise(3, 5), cfg_coefficients=[[], [0.1]], **parts)
    torch.save({"first 4 0": vars(rollout), "0 4": vars(rollout)}, path)


def rollouts(path):
    saved = read_pickled_tensors(path)
    return {name: vars(rebuilt(Rollout, values, path))["ends"] for name, values in saved.items()}


def save_account_here(path):
    path.with_name("state.pt").write_bytes(b"an unfinished training")
    account = Account(path)
    account["rollouts"] += 96
    account["validation"] += 12


def account_read(path):
    return {"calls": torch.tensor(float(Account(path).total()))}


def state_tensors(path):
    return {name: value for name, value in read_pickled_tensors(path).items() if isinstance(value, torch.Tensor)}


KINDS = {
    "official.pt": (
        lambda path: torch.save({"ema_side_model": OFFICIAL, "step": 3}, path),
        lambda path: load_official_sidenet(path).state_dict(),
    ),
    "official_legacy.pt": (
        lambda path: torch.save({"ema_side_model": OFFICIAL}, path, _use_new_zipfile_serialization=False),
        lambda path: load_official_sidenet(path).state_dict(),
    ),
    "sidenet.safetensors": (save_sidenet_here, load_and_describe),
    "sit.pt": (
        lambda path: torch.save({"ema": SIT.state_dict(), "args": argparse.Namespace(cfg=1.5)}, path),
        lambda path: load_sit(path, num_heads=2).state_dict(),
    ),
    "sit.safetensors": (
        lambda path: save_sit(path, SIT.state_dict(), SIT.config),
        lambda path: load_sit(path).state_dict(),
    ),
    "public_sit.safetensors": (
        lambda path: save_file(SIT.state_dict(), path),
        lambda path: load_sit(path, num_heads=2).state_dict(),
    ),
    "trajectories.safetensors": (save_shard_here, shard_tensors),
    "state.pt": (save_state_here, state_tensors),
    "rollouts.pt": (save_rollouts_here, rollouts),
    "nfe.json": (save_account_here, account_read),
}


def mutated(whole: bytes, chance: random.Random) -> bytes:
    """One fault: a bit, a byte, a cut, something inserted, taken away or moved; most of them where headers are."""
    content, reach = bytearray(whole), min(len(whole), 3000)
    places = [chance.randrange(len(whole)), chance.randrange(reach), len(whole) - 1 - chance.randrange(reach)]
    i, j = chance.choices(places, k=2)
    match chance.randrange(6):
        case 0:
            content[i] ^= 1 << chance.randrange(8)
        case 1:
            content[i] = chance.randrange(256)
        case 2:
            del content[i:]
        case 3:
            content[i:i] = chance.randbytes(chance.randrange(1, 9))
        case 4:
            del content[i : i + chance.randrange(1, 20)]
        case _:
            content[i : i + 4] = content[j : j + 4]
    return bytes(content)


def read(load, path) -> bool:
    """Whether the file is read; every other end but a refusal that names it fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders at the protocols of damaged pickles
            state = load(path)
    except CheckpointError as error:
        assert path.name in str(error)
        return False
    assert all(tensor.isfinite().all() for tensor in state.values())
    return True


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused(name, tmp_path):
    save, load = KINDS[name]
    path = tmp_path / name
    save(path)
    whole, chance = path.read_bytes(), random.Random(SEED)
    assert read(load, path)
    faults = [mutated(whole, chance) for _ in range(MUTATIONS)]
    outcomes = []
    for fault in faults:
        path.write_bytes(fault)
        outcomes.append(read(load, path))
    assert outcomes.count(False) > 0.3 * MUTATIONS, "most faults must be such that there is something to refuse"


@pytest.mark.parametrize("name", ["official_legacy.pt", "official.pt", "sit.pt"])
def test_every_byte_of_a_pickle_may_be_wrong(name, tmp_path):
    """Every fifth byte of the part that says what the tensors are; a legacy file has it in the open."""
    save, load = KINDS[name]
    path = tmp_path / name
    save(path)
    whole = path.read_bytes()
    start = whole.index(b"ccollections\nOrderedDict")
    outcomes = []
    for i in range(start, start + 1500, 5):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 2]) + whole[i + 1 :])
        outcomes.append(read(load, path))
    assert outcomes.count(False) > 100


# --- metadata ---------------------------------------------------------------------------------------------------------

RUN = CARD.schedules[2.0][1]
NUMBERS = ["NaN", "-Infinity", "1e400", "-1", "0", "9" * 400, "9" * 5000, "2.5", "2.0", "true", "null", '"2"', "[]"]
NUMBERS += [
    "{}",
    "[[1]]",
    "[1, [2]]",
    '{"a": {"b": NaN}}',
    "[" * 100_000,
    '"\\ud800"',
    '"\\u0000"',
    '"10"',
    "[1.0, 0.0]",
]
PLACES = {
    "config": [
        "in_channels",
        "num_heads",
        "num_layers",
        "patch_size",
        "cfg_input",
        "architecture",
        "data_mean_size",
        "colour",
    ],
    "cfg_range": [0, 1],
    "schedules": ["2.0", "0", "-1", "x", "1e0"],
    "backbone": ["name", "kind", "fingerprint", "new"],
    "training": ["objective", "trajectories", "recorded", "settings", "started_from", "backbone_calls", "seconds"],
    "evaluation": ["guidance", "noises", "endpoint_error", "variance_unexplained", "new"],
}
DEEPER = {
    "schedules": [("2.0", key) for key in ("1", "0", "-1", "x", "1e0")]
    + [("2.0", "1", part) for part in ("times", "coefficients", "cfg_coefficients", "analytic_first_step")]
    + [("2.0", "2", "coefficients", 1)],
    "training": [("recorded", part) for part in ("points", "shape", "reference_error")],
    "evaluation": [
        ("variance_unexplained", "kind"),
        ("variance_unexplained", "kind", "first"),
        ("endpoint_error", 0),
        *(("endpoint_error", 0, part) for part in ("label", "grid", "nfe", "error")),
    ],
}


def with_value(text: str, place: tuple, value: str) -> str:
    """A JSON text with another value (JSON too, but for numbers that Python cannot write) at a place within."""
    whole = here = json.loads(text)
    for step in place[:-1]:
        here = here[step]
    here[place[-1]] = "@"
    return json.dumps(whole).replace('"@"', value)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "net.safetensors"
    save_sidenet_here(path)
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata())


@pytest.mark.parametrize("key", PLACES)
def test_strange_values_in_the_metadata_are_refused_or_harmless(key, stored, tmp_path):
    """Also in what is only shown, which the card's two descriptions must survive."""
    tensors, metadata = stored
    places = [(place,) for place in PLACES[key]] + DEEPER.get(key, [])
    texts = [*NUMBERS, *(with_value(metadata[key], place, value) for place in places for value in NUMBERS)]
    path, outcomes = tmp_path / "net.safetensors", []
    for text in texts:
        save_file(tensors, path, metadata | {key: text})
        outcomes.append(read(load_and_describe, path))
    assert outcomes.count(False) > len(NUMBERS) / 2


@pytest.mark.parametrize(
    ("key", "place", "value", "message"),
    [
        ("cfg_range", (0,), "NaN", "cfg_range must be two scales"),
        ("cfg_range", (1,), "1e400", "cfg_range must be two scales"),
        ("cfg_range", (0,), "5", "cfg_range must be two scales, the lower first; got 5 and 4.5"),
        ("cfg_range", (0,), "-1", "cfg_range must be two scales"),
        ("cfg_range", (0,), '"1"', "cfg_range must be two scales"),
        ("config", ("num_heads",), "2.0", "num_heads must be int; got 2.0"),
        ("config", ("num_layers",), "1000000000", "must have 1000000000 blocks; got 3"),
        ("config", ("cfg_input",), '"no"', "cfg_input must be bool; got 'no'"),
        ("config", ("in_channels",), "9" * 40, "net.safetensors"),
        (
            "schedules",
            ("2.0", "1", "analytic_first_step"),
            "0",
            "analytic_first_step of a schedule must be true or false",
        ),
        ("schedules", ("2.0", "1", "times"), "[1.0, 1e400]", "net.safetensors"),
        ("schedules", ("2.0", "1", "times"), f"[{'9' * 400}, 0]", "net.safetensors"),
        ("backbone", ("kind",), "5", "backbone must hold texts alone"),
        ("backbone", ("fingerprint",), "null", "backbone must hold texts alone"),
        ("training", ("recorded",), "[]", "recorded in training must be an object"),
        ("training", ("objective",), "9" * 5000, "damaged 'training'"),
        ("training", ("objective",), '"\\ud800"', "damaged 'training'"),
        ("training", ("objective",), "[" * 100_000, "damaged 'training'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_would_pass_until_it_is_used_is_refused_when_it_is_read(key, place, value, message, stored, tmp_path):
    tensors, metadata = stored
    path = tmp_path / "net.safetensors"
    save_file(tensors, path, metadata | {key: with_value(metadata[key], place, value)})
    with pytest.raises(CheckpointError, match=message):
        load_sidenet(path)


@pytest.mark.parametrize("key", ["backbone", "training", "evaluation", "schedules", "config"])
def test_metadata_that_are_no_objects_are_refused(key, stored, tmp_path):
    tensors, metadata = stored
    save_file(tensors, tmp_path / "net.safetensors", metadata | {key: "[1]"})
    with pytest.raises(CheckpointError, match=f"'{key}' in its metadata must be an object; got list"):
        load_sidenet(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("name", "value"),
    [("mlp_ratio", "Infinity"), ("mlp_ratio", "1e400"), ("mlp_ratio", "NaN"), ("depth", "1000000000"),
     ("num_heads", "2.0"), ("input_size", "4" + "0" * 30), ("input_size", "4" + "0" * 8), ("learn_sigma", "1"),
     ("convention", "[]"), ("hidden_size", "null")],
)  # fmt: skip
def test_strange_sizes_of_a_sit_are_refused(name, value, tmp_path):
    path = tmp_path / "sit.safetensors"
    save_sit(path, SIT.state_dict(), SIT.config)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = load_file(path), dict(file.metadata())
    save_file(tensors, path, metadata | {"config": with_value(metadata["config"], (name,), value)})
    with pytest.raises(CheckpointError, match=r"sit.safetensors"):
        load_sit(path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("pos_embed", torch.zeros(16)), ("pos_embed", torch.zeros(())), ("blocks.0.mlp.fc1.weight", torch.zeros(())),
     ("x_embedder.proj.weight", torch.zeros(0, 3, 2, 2)), ("x_embedder.proj.weight", torch.zeros(8, 0, 0, 0)),
     ("final_layer.linear.weight", torch.zeros(())), ("y_embedder.embedding_table.weight", torch.zeros(0, 8)),
     ("blocks.1000000000.attn.qkv.weight", torch.zeros(1)), ("blocks..x", torch.zeros(1)),
     ("blocks.0.mlp.fc1.bias", torch.zeros(32, dtype=torch.int32)), ("blocks.0.mlp.fc1.bias", torch.zeros(32).bool()),
     ("blocks.0.mlp.fc1.bias", torch.zeros(32).to_sparse()), ("blocks.0.mlp.fc1.bias", torch.zeros(32) + 0j),
     ("blocks.0.mlp.fc1.bias", torch.zeros(32, dtype=torch.float8_e4m3fn)),
     ("blocks.0.attn.q_norm.weight", torch.ones(())), ("blocks.0.attn.q_norm.weight", torch.ones(0))],
    ids=lambda value: f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else value,
)  # fmt: skip
def test_strange_tensors_are_refused(name, tensor, tmp_path):
    torch.save({"ema": SIT.state_dict() | {name: tensor}}, tmp_path / "sit.pt")
    with pytest.raises(CheckpointError, match=r"sit.pt"):
        load_sit(tmp_path / "sit.pt", num_heads=2)


def test_what_a_shard_does_not_say_is_named(tmp_path):
    save_shard_here(tmp_path / "trajectories.safetensors")
    with safe_open(tmp_path / "trajectories.safetensors", framework="pt") as file:
        tensors, metadata = load_file(tmp_path / "trajectories.safetensors"), dict(file.metadata())
    for key in METADATA:
        text = metadata["metadata"].replace(f'"{key}"', '"other"', 1)
        save_file(tensors, tmp_path / "trajectories.safetensors", metadata | {"metadata": text})
        with pytest.raises(CheckpointError, match=f"trajectories.safetensors lacks its {key}"):
            open_shard(tmp_path / "trajectories.safetensors")


@pytest.mark.parametrize("fault", ["a text", None, 3, [], {"param_groups": [], "state": 3}], ids=str)
@pytest.mark.parametrize("part", ["model", "average", "optimizer0", "schedule0"])
def test_a_state_of_other_things_is_refused(part, fault, tmp_path):
    """A file that torch reads, and that is not what the loop wrote."""
    pytest.importorskip("accelerate")
    from ba_solver.training.network.loop import LoopSettings, TrainingState

    settings, path = LoopSettings(steps=2, batch=1, learning_rate=1e-3), tmp_path / "state.pt"
    TrainingState(torch.nn.Linear(2, 2), settings, path).save()
    torch.save(read_pickled_tensors(path) | {part: fault}, path)
    with pytest.raises(CheckpointError, match=r"state.pt is the state of another training"):
        TrainingState(torch.nn.Linear(2, 2), settings, path)
