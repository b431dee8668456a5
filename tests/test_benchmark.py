"""The benchmark: every solver at its best grid, on any backbone, in tables that anyone can make again."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from ba_solver.bas_core import SideNet, SideNetCard, SideNetConfig, save_sidenet
from ba_solver.lab import benchmark, own_cost
from ba_solver.lab.benchmark import BEST, GRIDS, NO_NETWORK, OURS, BenchmarkSettings, Noises, rival, run_benchmark
from ba_solver.training.backbones import open_backbone
from ba_solver.training.settings import UsageError
from training_problems import BACKBONE

SOLVERS = ("adams_bashforth2", "heun")


def settings(tmp_path, **changes):
    usual = {"nfe": "3,5", "noises": 6, "search_noises": 2, "batch": 4, "solvers": SOLVERS, "guidance": (2.0,)}
    return BenchmarkSettings(backbone=BACKBONE, out=tmp_path / "out", **{**usual, **changes})


def sidenet_file(path, fingerprint="swirl-1", seed=0):
    """A SideNet without schedules, whose output is random."""
    torch.manual_seed(seed)
    sidenet = SideNet(SideNetConfig(in_channels=2, base_channels=8, embedding_dim=8, num_layers=1, num_classes=2))
    backbone = {"name": "swirl", "kind": "python", "fingerprint": fingerprint}
    save_sidenet(path, sidenet, SideNetCard(cfg_mode="combined", cfg_range=(2.0, 2.0), backbone=backbone))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two SideNets and two rivals, measured."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = tuple(sidenet_file(folder / f"seed{seed}.safetensors", seed=seed) for seed in (1, 2))
    return settings(folder, sidenet=files), run_benchmark(settings(folder, sidenet=files))


def test_rivals_have_the_best_of_all_grids(measured):
    """Of the search noises; so a grid that is tried again ends no nearer."""
    chosen, _ = measured
    found = json.loads((chosen.out / "grids.json").read_text())
    assert (found["backbone"], found["cfg"]) == ("swirl-1", 2.0)
    search = Noises.draw(chosen, open_backbone(chosen), benchmark.SEARCH_SEED, 2)
    for name in SOLVERS:
        sampler = rival(name, 1.0)
        best = search.errors(sampler, 5, tuple(found["grids"][name]["5"])).mean()
        assert best <= min(search.errors(sampler, 5, shape).mean() for shape in GRIDS) + 1e-7


def test_tables_say_the_same_in_every_format(measured):
    chosen, rows = measured
    kept = json.loads((chosen.out / "benchmark.json").read_text())
    assert len(kept["rows"]) == len(rows) and kept["reference_error"] < 1e-3
    with (chosen.out / "benchmark.csv").open() as file:
        assert [float(row["error"]) for row in csv.DictReader(file)] == [row.error for row in rows]
    best, ordinary = (chosen.out / "benchmark.md").read_text().split("### shift 3")
    # Its file has no schedules, so that it is measured under the ordinary one alone, with a spread over both files.
    assert OURS not in best and f"| {OURS} |" in ordinary and f"| {NO_NETWORK} |" in ordinary and "±" in ordinary
    assert "| Heun |" in best and "| Heun |" in ordinary and "±" not in best


def test_rivals_are_measured_as_they_are_where_no_sidenet_is(measured, tmp_path):
    """On the same noises, with the grids that a file keeps, which are not searched again."""
    chosen, rows = measured
    alone = run_benchmark(settings(tmp_path, grids=chosen.out / "grids.json"))
    assert not (tmp_path / "out" / "grids.json").exists()
    pick = [row for row in rows if not row.sidenet]
    assert [row.error for row in alone] == pytest.approx([row.error for row in pick], abs=1e-6)
    assert {row.schedule for row in alone} == {BEST, "shift 3"}


def test_without_its_network_it_is_the_multistep_method(measured, tmp_path):
    """Which the rival "AB2 + trapezoid" is, on the same grid; and the network is not nothing."""
    _, rows = measured
    ours = {(row.solver, row.nfe): row.error for row in rows if row.sidenet == "seed1.safetensors"}
    plain = run_benchmark(settings(tmp_path, solvers=("predictor_corrector",)))
    errors = {row.nfe: row.error for row in plain if row.schedule == "shift 3"}
    for nfe in (3, 5):
        assert ours[NO_NETWORK, nfe] == pytest.approx(errors[nfe], abs=1e-6)
        assert abs(ours[OURS, nfe] - errors[nfe]) > 1e-3


def test_what_cannot_be_measured_is_refused_in_words(measured, tmp_path):
    chosen, _ = measured
    other = sidenet_file(tmp_path / "other.safetensors", "other-1")
    grids = chosen.out / "grids.json"
    for changes, message in (
        ({"sidenet": (other,), "grids": grids}, "belongs to"),
        ({"grids": grids, "guidance": (3.0,)}, "another model or CFG scale"),
        ({"solvers": ("euler", "magic")}, "magic"),
        ({"solvers": ()}, "needs a --sidenet"),
        ({"cost": True}, "needs a --sidenet"),
    ):
        with pytest.raises(UsageError, match=message):
            run_benchmark(replace(settings(tmp_path), **changes))


def test_the_solvers_own_cost_is_measured():
    """Hardly a transfer a step, and memory that does not grow with the steps where no coefficients do."""
    table = own_cost.run(own_cost.OwnCostSettings(shape="1,2,8,8", steps=8, memory_steps="4,12", repeats=1))
    rows = {cells[1].strip(): [float(cell) for cell in cells[2:-1]] for cells in
            (line.split("|") for line in table.splitlines()[2:])}  # fmt: skip
    assert set(rows) == set(own_cost.samplings(own_cost.small_network(2)))
    for name, (*_, to_host, to_device, few, many) in rows.items():
        assert (to_host, to_device) == ((0, 0.12) if "k-diffusion" in name else (0.12, 0)), name  # once in 8 steps
        assert many < 1.02 * few + 1 or "coefficients" in name or "conditional-only" in name, name


def test_k_diffusions_formulas_are_as_there():
    """On x_0 + sigma noise: Euler to order 1, and DPM-Solver++(2M) to order 2 of the exact end."""
    x = 2 * torch.randn(1, 1, 4, 4, dtype=torch.float64)

    def end(sample, steps):  # of the flow to unit normal data
        return sample(lambda x, sigma: x / (1 + sigma[:, None, None, None] ** 2), x, torch.linspace(2, 0.1, steps + 1))

    exact = x * ((1 + 0.1**2) / (1 + 2.0**2)) ** 0.5
    for sample, order in ((own_cost.sample_euler, 1), (own_cost.sample_dpmpp_2m, 2)):
        coarse, fine = ((end(sample, n) - exact).abs().max() for n in (80, 160))
        assert abs(torch.log2(coarse / fine) - order) < 0.2
