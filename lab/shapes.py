"""The demo's data: anti-aliased coloured shapes on shaded grounds, RGB, drawn from signed distances.

Every image is drawn afresh from a random generator, so there is no data set to store and none to memorise:
`draw_shapes(torch.Generator().manual_seed(0), 64)` is the same everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLASS_NAMES = ("disc", "ring", "square", "triangle", "star", "cross", "heart", "crescent", "hourglass", "arrow")
IMAGE_SIZE = 32


@dataclass(frozen=True)
class ShapeBatch:
    """Images and the truth about them.

    Attributes:
        images: [B, 3, 32, 32] in [-1, 1].
        labels: [B] indices into `CLASS_NAMES`.
        centres: [B, 2] shape centre (x, y) in [-1, 1], x to the right and y down.
        colours: [B, 3] mean shape colour in [-1, 1].
        grounds: [B, 2, 3] the ground's two end colours in [-1, 1].
        ground: [B, 3, 32, 32] in [-1, 1], without the shape.
    """

    images: Tensor
    labels: Tensor
    centres: Tensor
    colours: Tensor
    grounds: Tensor
    ground: Tensor


def _polygon(x: Tensor, y: Tensor, corners: list[tuple[float, float]]) -> Tensor:
    """Signed distance to a simple polygon, negative inside."""
    squared = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = torch.minimum(squared, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ey != 0:
            inside ^= ((y >= ay) != (y >= by)) & (px < ex * py / ey)
    return torch.where(inside, -squared.sqrt(), squared.sqrt())


def _regular_star(points: int, outer: float, inner: float) -> list[tuple[float, float]]:
    radii = [outer, inner] * points
    return [
        (radius * math.sin(math.pi * i / points), -radius * math.cos(math.pi * i / points))
        for i, radius in enumerate(radii)
    ]


def _disc(x: Tensor, y: Tensor, radius: float = 0.9) -> Tensor:
    return torch.hypot(x, y) - radius


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.68).abs() - 0.28


def _cross(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.abs(), y.abs()
    return torch.minimum(torch.maximum(a - 0.95, b - 0.36), torch.maximum(a - 0.36, b - 0.95))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    lobes = torch.hypot(x.abs() - 0.45, y + 0.3) - 0.5
    return torch.minimum(lobes, _polygon(x, y, [(-0.86, -0.02), (0.0, -0.35), (0.86, -0.02), (0.0, 0.98)]))


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x + 0.1, y) - 0.95, 0.72 - torch.hypot(x - 0.38, y))


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.78


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(x, y, [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)])


def _star(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(x, y, _regular_star(5, 1.1, 0.55))


def _hourglass(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(x, y, [(-0.8, -0.9), (0.8, -0.9), (0.2, 0.0), (0.8, 0.9), (-0.8, 0.9), (-0.2, 0.0)])


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    return _polygon(
        x, y, [(0.0, -1.0), (0.85, -0.1), (0.32, -0.1), (0.32, 0.95), (-0.32, 0.95), (-0.32, -0.1), (-0.85, -0.1)]
    )


_DISTANCES = (_disc, _ring, _square, _triangle, _star, _cross, _heart, _crescent, _hourglass, _arrow)


def _saturated_colours(generator: torch.Generator, count: int) -> Tensor:
    """[count, 3] colours in [0, 1] of random hue, rather saturated and bright."""
    hue, saturation, value = torch.rand(3, count, 1, generator=generator).unbind(0)
    phase = (hue * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    pure = ((phase - 3).abs() - 1).clamp(0, 1)
    return (0.45 + 0.55 * value) * (1 - (0.35 + 0.65 * saturation) * (1 - pure))


def _paint(
    ground: Tensor, labels: Tensor, x: Tensor, y: Tensor, scale: Tensor, colours: Tensor, light: Tensor
) -> Tensor:
    """Pictures [B, 3, S, S] in [0, 1]: shapes at the places (x, y) [B, S, S] of their own axes, before the ground."""
    coverage = torch.empty_like(x)
    for index, distance in enumerate(_DISTANCES):
        rows = labels == index
        if rows.any():
            pixels = distance(x[rows], y[rows]) * scale[rows] * IMAGE_SIZE / 2
            coverage[rows] = (0.5 - pixels).clamp(0, 1)
    shade = (1 - light[:, None, None] * (x + y)).clamp(0.5, 1.5)
    shape = (colours[:, :, None, None] * shade[:, None]).clamp(0, 1)
    return torch.lerp(ground, shape, coverage[:, None])


def draw_shapes(generator: torch.Generator, count: int, labels: Tensor | None = None) -> ShapeBatch:
    """Draw `count` images.

    Args:
        generator: the only source of randomness (a CPU generator).
        count: number of images.
        labels: [count] classes to draw; None draws them at random.
    """
    if labels is None:
        labels = torch.randint(len(CLASS_NAMES), (count,), generator=generator)
    radius = 0.56 + 0.2 * torch.rand(count, generator=generator)
    centres = (torch.rand(count, 2, generator=generator) * 2 - 1) * (0.94 - radius)[:, None]
    angle = (torch.rand(count, generator=generator) * 2 - 1) * 0.2
    colours = _saturated_colours(generator, count)
    grounds = torch.stack([0.85 * _saturated_colours(generator, count) for _ in range(2)], dim=1)
    # A shape of its ground's colour cannot be seen: move such a one half the range away in every channel.
    ground_colour = grounds.mean(1)
    close = (colours - ground_colour).abs().amax(1) < 0.5
    colours = torch.where(close[:, None], (ground_colour + 0.5) % 1, colours)
    direction = torch.rand(count, generator=generator) * 2 * math.pi
    light = 0.12 + 0.18 * torch.rand(count, generator=generator)

    axis = (torch.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    ramp = (u * direction.cos()[:, None, None] + v * direction.sin()[:, None, None]) / (2 * math.sqrt(2)) + 0.5
    ground = torch.lerp(grounds[:, 0, :, None, None], grounds[:, 1, :, None, None], ramp[:, None])
    du, dv = u - centres[:, 0, None, None], v - centres[:, 1, None, None]
    cos, sin, scale = (part[:, None, None] for part in (angle.cos(), angle.sin(), radius))
    x, y = (cos * du + sin * dv) / scale, (-sin * du + cos * dv) / scale
    images = _paint(ground, labels, x, y, scale, colours, light)
    return ShapeBatch(images * 2 - 1, labels, centres, colours * 2 - 1, grounds * 2 - 1, ground * 2 - 1)
