"""What trainings must reach, as functions: `test_fit.py` asks it of the trainer, `test_power.py` of damaged ones.

Trained numbers differ from processor to processor. Each effect asked for here is large: with seeds 1 to 5 and 1, 2 and
4 threads every bound is more than three standard deviations away from the mean.
"""

import torch
from ba_solver.bas_core import Schedule, load_sidenet, solve, time_grid
from ba_solver.training.backbones import BackboneChoice, open_backbone
from ba_solver.training.cli import main
from ba_solver.training.recording.replay import Replay
from ba_solver.training.recording.trajectories import open_trajectories
from ba_solver.training.schedules.linear_form import linear_form
from ba_solver.training.schedules.search import Candidate, Search, SearchData
from ba_solver.training.schedules.solvers import endpoint_errors
from ba_solver.training.schedules.surrogate import mean_error
from training_problems import BACKBONE, swirl, swirl_backbone, trajectories_of

SMALL = ("--base-channels", "16", "--embedding-dim", "16", "--num-layers", "2", "--patch-size", "1", "--batch", "16")
SMALL += ("--architecture", "conv", "--kernel-size", "3", "--no-muon")
QUICK = (*SMALL, "--warmup", "10", "--learning-rate", "1e-2", "--ema", "0.95")


TRANSFORMER = ("--base-channels", "16", "--num-heads", "2", "--embedding-dim", "16", "--num-layers", "1")
TRANSFORMER += ("--patch-size", "1", "--architecture", "transformer", "--kernel-size", "1")


def record(out, *more):
    command = ["record", "--backbone", BACKBONE, "--points", "40", "--record-batch", "16", "--prefixes", "0"]
    assert main([*command, "--out", str(out), *more]) == 0


def run(folder, out, *more, status=0):
    assert main(["train", "--recordings", str(folder), "--out", str(out), *map(str, more)]) == status
    return load_sidenet(out) if status == 0 else None


def rollout_error(sidenet, folder, over=None):
    """Mean end-point error on the recording's validation trajectories."""
    trajectories, metadata = open_trajectories([folder])
    backbone = open_backbone(BackboneChoice(backbone=BACKBONE))
    validation = trajectories.split(12)[1]
    replay = Replay(backbone, validation, metadata)
    rows = torch.arange(0, len(validation), validation.branches)
    with torch.no_grad():
        over = Schedule(time_grid(5)) if over is None else over
        field = replay.field_of(rows)
        x = solve(field, sidenet, replay.noise(rows), over)
        assert field.nfe == over.nfe
    return endpoint_errors(x, replay.truth(rows, torch.tensor(0.0))).mean().item()


def train_on_pairs(folder, out):
    """A small SideNet from a recording: its file, the network, the card."""
    sidenet, card = run(folder, out, *QUICK, "--batch", "64", "--steps", "400", "--save-every", "100")
    return out, sidenet, card


def check_pairs(folder, trained, tmp_path):
    """It learns all kinds of query, and its solver ends nearer than the one without a network."""
    _, sidenet, card = train_on_pairs(folder, tmp_path / "pairs.safetensors")
    kinds = card.evaluation["variance_unexplained"]["kind"]
    assert max(kinds[kind] for kind in ("between", "beyond", "last")) < 0.85, kinds
    assert rollout_error(sidenet, folder) < 0.8 * rollout_error(None, folder)


def fit_data(count):
    """Trajectories of the swirl beside it and a surrogate."""
    metadata = {"guidance": [1.0, 1.0], "guidance_interval": [0.0, 1.0], "cfg_mode": "combined", "record_batch": 8}
    trajectories = trajectories_of(swirl, torch.arange(count) % 2, 48)
    return SearchData(Replay(swirl_backbone(None, None), trajectories, metadata), count)


def check_end_fit(folder, trained, tmp_path):
    """Rollouts and fits in turn find times and weights that end far nearer than the method they began with."""
    data = fit_data(12)
    search = Search(data, [5], (2, 1))
    search.run()
    rows = torch.arange(12)
    begun = Candidate("", linear_form("predictor_corrector", time_grid(5, dtype=torch.float64)))
    errors = [
        mean_error(data.roll_out(each, rows).ends - data.data.ends(), data.size)
        for each in (search.stages[5][-1], begun)
    ]
    assert errors[0] < 0.5 * errors[1], errors
