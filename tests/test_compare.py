"""Distances of distributions: their values where they are known, and `ba-solver compare` on drawn images."""

import json
import math

import pytest
import torch
from ba_solver.lab.galaxies import stretched
from ba_solver.training.cli import main
from ba_solver.training.demo.assets import SIT_FILE
from ba_solver.training.drawing.distribution import (
    Components,
    distances,
    frechet_distance,
    number_distance,
    photometry,
)


def normal(count, *shape, seed):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(points):
    """The same points with mean 0 and covariance 1."""
    points = points - points.mean(0)
    return points @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(points.T))).T


def test_the_frechet_distance_of_gaussians():
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); the covariances do not commute."""
    turn = torch.linalg.qr(normal(5, 5, seed=1))[0]
    wide, narrow = torch.diag(torch.tensor([3.0, 2, 1, 1, 0.5])).double(), torch.diag(torch.arange(1.0, 6)).double()
    one = exactly(normal(50, 5, seed=2)) @ wide
    other = exactly(normal(70, 5, seed=3)) @ narrow @ turn + 0.7
    product = (wide @ wide) @ (turn.T @ narrow @ narrow @ turn)
    roots = torch.linalg.eigvals(product).real.sqrt().sum()
    expected = 5 * 0.49 + wide.square().sum() + narrow.square().sum() - 2 * roots
    assert math.isclose(frechet_distance(one, other), expected, rel_tol=1e-9)
    assert abs(frechet_distance(one, one)) < 1e-9
    assert math.isclose(frechet_distance(one[:, :1], one[:, :1] + 2), 4, rel_tol=1e-9)


def test_the_distance_of_numbers_is_how_far_they_move():
    numbers = normal(101, seed=4)
    assert math.isclose(number_distance(numbers + 3, numbers[torch.randperm(101)]), 3)
    assert math.isclose(number_distance(torch.zeros(10), torch.tensor([-1.0, 1] * 5)), 1)


@pytest.mark.parametrize("centre", [(31.5, 31.5), (20.0, 40.25)])
def test_the_light_of_a_disc(centre):
    """Half of an even disc's light lies within its radius over the root of two, wherever it is; the sky is dark."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    inside = torch.hypot(rows - centre[0], columns - centre[1]) < 15
    found = photometry(torch.where(inside, 2.0, -0.1)[None, None])
    assert math.isclose(found["light"].item(), 2 * inside.sum().item())
    assert math.isclose(found["size"].item(), 15 / 2**0.5, rel_tol=0.02)
    assert math.isclose(found["concentration"].item(), 5 * math.log10(2), rel_tol=0.03)
    dot = photometry(torch.where(inside, 2.0, -0.1)[None, None] * (rows == 20) * (columns == 40))
    assert dot["concentration"].isfinite().all() and dot["size"] < 1


def test_components_are_those_of_the_largest_variance():
    directions = torch.linalg.qr(normal(3 * 4 * 4, 5, seed=5))[0].T
    images = (normal(400, 5, seed=6) * torch.tensor([5.0, 4, 3, 0.1, 0.1])) @ directions
    found = Components(images.unflatten(1, (3, 4, 4)), 3)
    explained = (found.directions @ directions[:3].T).square().sum()
    assert explained > 2.99
    # Large images are seen from afar, and a video is its frames.
    assert Components(torch.rand(8, 3, 100, 80), 4).directions.shape == (4, 3 * 64 * 64)
    assert Components(torch.rand(8, 2, 3, 8, 8), 4).directions.shape == (4, 2 * 3 * 8 * 8)


def test_galaxies_are_measured_and_pictures_are_not():
    exact = normal(60, 1, 8, 8, seed=7) + 2
    others, dark = normal(60, 1, 8, 8, seed=8) + 2, normal(60, 1, 8, 8, seed=8) + 1
    components = Components(exact)
    near, far = (distances(images, exact, components) for images in (others, dark))
    assert list(near) == ["frechet", "light", "size", "concentration"]
    assert near["light"] < 0.5 < 5 < far["light"] and near["frechet"] < far["frechet"]
    assert list(
        distances(exact.expand(-1, 3, -1, -1), exact.expand(-1, 3, -1, -1), Components(exact.expand(-1, 3, -1, -1)))
    ) == ["frechet"]


def test_the_stretch_shows_faint_parts_on_the_scale_of_the_exact_galaxy():
    exact = torch.tensor([[0.0, 0.05, 5.0]]).view(1, 1, 1, 3)
    shown = stretched(torch.cat([exact, exact - 1, 2 * exact]), exact.expand(3, -1, -1, -1)).flatten(1)
    assert shown[0, 2] == 1 and 0.1 < shown[0, 1] < 0.3 and (shown[1, :2] == 0).all() and shown[2, 2] == 1


def draw(out, *more):
    command = ["sample", "--sit", str(SIT_FILE), "--guidance", "2", "--count", "30", "--classes", "0,3"]
    assert main([*command, "--out", str(out), *map(str, more)]) == 0
    return str(out)


def test_drawn_folders_are_compared_with_exact_ones_of_other_noises(tmp_path, capsys):
    exact = draw(tmp_path / "exact", "--method", "adams_pec", "--nfe", 20, "--seed", 1)
    alike = draw(tmp_path / "alike", "--method", "adams_pec", "--nfe", 20)
    coarse = draw(tmp_path / "coarse", "--method", "euler", "--nfe", 3, "--grid", 1.5, 0.3)
    out = tmp_path / "distances.json"
    capsys.readouterr()
    assert main(["compare", "--exact", exact, "--drawn", alike, coarse, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["folder"] for row in rows] == ["alike", "coarse"] and "coarse" in printed
    assert rows[0]["images"] == 30 and 0 < rows[0]["frechet"] < 0.7 * rows[1]["frechet"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return [draw(folder / str(seed), "--method", "euler", "--nfe", 1, "--seed", seed) for seed in (0, 1)]


def test_folders_that_cannot_be_compared_are_refused_in_words(pair, tmp_path, capsys):
    one, other = pair
    same = draw(tmp_path / "same", "--method", "euler", "--nfe", 2)
    scale = draw(tmp_path / "scale", "--method", "euler", "--nfe", 1, "--guidance", 1)
    for drawn, more, message in (
        (same, (), "are of the same noises, seed 0"),
        (scale, (), "guidance is 2.0, here 1.0"),
        (other, ("--count", "31"), "holds 30 images; 31 are needed"),
        (str(tmp_path), (), "is no folder that `ba-solver sample` wrote"),
    ):
        assert main(["compare", "--exact", one, "--drawn", drawn, *more]) == 2
        assert message in capsys.readouterr().err
