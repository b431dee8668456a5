"""How far two sets of images are apart as distributions, by no network's eyes.

The endpoint error asks whether an image is the exact one of its noise. These distances ask whether images look like
exact ones, of whatever noises.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

COMPONENTS = 64
# Larger images are averaged to so many pixels a side first: the leading components do not see finer detail.
LARGEST_SIDE = 64
# Of the light: what the radii of the concentration hold (Conselice 2003, equation 6).
INNER, OUTER = 0.2, 0.8


class Components:
    """The leading principal components of some images.

    Args:
        images: [N, C, *spatial], N at least 2.
        count: of components, if there are as many.
    """

    def __init__(self, images: Tensor, count: int = COMPONENTS) -> None:
        numbers = _flat(images)
        self.mean = numbers.mean(0)
        _, _, directions = torch.linalg.svd(numbers - self.mean, full_matrices=False)
        self.directions = directions[:count]

    def of(self, images: Tensor) -> Tensor:
        """[N, K] for images [N, C, *spatial]."""
        return (_flat(images) - self.mean) @ self.directions.T


def _flat(images: Tensor) -> Tensor:
    """[N, D] in double precision."""
    frames = images.flatten(1, -3)
    height, width = (min(side, LARGEST_SIDE) for side in frames.shape[-2:])
    if frames.shape[-2:] != (height, width):
        frames = F.adaptive_avg_pool2d(frames, (height, width))
    return frames.flatten(1).double()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """The squared Frechet distance of the Gaussians with the means and covariances of points [N, K] and [M, K].

    As in FID (Heusel et al. 2017, arXiv 1706.08500, equation 6), in the square of the points' unit.
    """
    means = one.mean(0) - other.mean(0)
    covariances = [torch.atleast_2d(torch.cov(points.T)) for points in (one, other)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # The trace of the square root of C1 C2, by the symmetric matrix that has the same eigenvalues.
    common = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    return float(means.square().sum() + sum(each.trace() for each in covariances) - 2 * common)


def number_distance(one: Tensor, other: Tensor) -> float:
    """The mean distance by which numbers [N] have to move to be distributed like others [M] (Wasserstein 1)."""
    ranks = torch.linspace(0, 1, min(len(one), len(other)), dtype=torch.float64)
    return float((torch.quantile(one.double(), ranks) - torch.quantile(other.double(), ranks)).abs().mean())


def photometry(images: Tensor) -> dict[str, Tensor]:
    """Total light, half-light radius in pixels and concentration, each [N], of images [N, 1, H, W].

    The radii are those of circles around the light's centroid. Concentration is 5 log10 of the radius that holds 80 %
    of the light over that with 20 % (Conselice 2003, equation 6). Pixels below 0, noise of the sky, count as dark.
    """
    light = images[:, 0].double().clamp_min(0)
    total = light.sum((1, 2)).clamp_min(1e-12)
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in light.shape[1:])
    y, x = (light.sum(2) @ rows / total)[:, None, None], (light.sum(1) @ columns / total)[:, None, None]
    order = torch.hypot(rows[:, None] - y, columns - x).flatten(1).argsort(1)
    growth = light.flatten(1).gather(1, order).cumsum(1) / total[:, None]
    inner, half, outer = (_radius(growth, share) for share in (INNER, 0.5, OUTER))
    return {"light": total, "size": half, "concentration": 5 * (outer / inner).log10()}


def _radius(growth: Tensor, share: float) -> Tensor:
    """[N] of the circles of as many pixels as hold a share of the light, by its sums [N, H W] from the centre on."""
    after = (growth < share).sum(1, keepdim=True).clamp_max(growth.shape[1] - 1)
    there = growth.gather(1, after)
    before = torch.where(after > 0, growth.gather(1, (after - 1).clamp_min(0)), 0.0)
    pixels = after + (share - before) / (there - before).clamp_min(1e-12)
    return (pixels[:, 0] / math.pi).sqrt()


def distances(images: Tensor, exact: Tensor, components: Components) -> dict[str, float]:
    """How far images are from exact ones, both [N, C, *spatial], over how far exact ones are spread.

    Returns:
        `frechet`: the squared Frechet distance in the components, over their variance. For images of one channel also
        `light`, `size` and `concentration`: the distance of these numbers, over the exact ones' mean distance from
        their median.
    """
    of_exact = components.of(exact)
    found = {"frechet": frechet_distance(components.of(images), of_exact) / float(of_exact.var(0).sum())}
    if exact.shape[1] == 1 and exact.ndim == 4:
        ours, theirs = photometry(images), photometry(exact)
        for name, numbers in theirs.items():
            spread = float((numbers - numbers.median()).abs().mean())
            found[name] = number_distance(ours[name], numbers) / max(spread, 1e-12)
    return found
