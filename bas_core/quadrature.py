"""Quadrature rules on [0, 1] as validated data (arXiv 2601.21542, section 3: bi-anchor velocity integration)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

TOLERANCE = 1e-12


@dataclass(frozen=True)
class Rule:
    """Nodes and weights of a quadrature rule on [0, 1].

    Attributes:
        name: what users call it.
        nodes: ascending, in [0, 1]; 0 is the start of an interval and 1 its end.
        weights: one a node.
        exactness: the highest degree of a polynomial that the rule integrates exactly; checked at construction.

    Raises:
        ValueError: the nodes do not ascend within [0, 1], or the weights do not have the stated exactness.
    """

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]
    exactness: int

    def __post_init__(self) -> None:
        if len(self.nodes) != len(self.weights) or not self.nodes:
            raise ValueError(
                f"Rule {self.name!r} must have one weight a node; got {len(self.nodes)} nodes and "
                f"{len(self.weights)} weights."
            )
        if not all(0 <= c <= 1 for c in self.nodes) or any(a >= b for a, b in pairwise(self.nodes)):
            raise ValueError(f"The nodes of rule {self.name!r} must ascend within [0, 1]; got {self.nodes}.")
        for degree in range(self.exactness + 1):
            moment = sum(w * c**degree for c, w in zip(self.nodes, self.weights, strict=True))
            if not abs(moment * (degree + 1) - 1) <= TOLERANCE:  # so that NaN is refused too
                raise ValueError(f"Rule {self.name!r} is not exact for degree {degree}, as it claims to be.")

    @property
    def has_both_ends(self) -> bool:
        """Whether both anchors of an interval are nodes, as bi-anchor integration requires."""
        return self.nodes[0] == 0 and self.nodes[-1] == 1


def symmetric_four_point(alpha: float, name: str | None = None) -> Rule:
    """The four-point rule with nodes 0, alpha, 1 - alpha, 1 that is exact for cubics.

    alpha = 1/3 is Simpson's 3/8 rule, alpha = 1/4 a Chebyshev-like one, alpha = (1 - 1/sqrt 5)/2 Gauss-Lobatto.

    Raises:
        ValueError: alpha is not inside (0, 1/2).
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie inside (0, 0.5); got {alpha}.")
    s = 1 - 2 * alpha
    inner = 1 / (3 * (1 - s * s))
    weights = (0.5 - inner, inner, inner, 0.5 - inner)
    return Rule(name or f"symmetric4({alpha:g})", (0.0, alpha, 1 - alpha, 1.0), weights, 3)


def _lobatto4() -> Rule:
    alpha = (1 - 1 / math.sqrt(5)) / 2
    return Rule("lobatto4", (0.0, alpha, 1 - alpha, 1.0), (1 / 12, 5 / 12, 5 / 12, 1 / 12), 5)


def _lobatto5() -> Rule:
    c = (1 - math.sqrt(3 / 7)) / 2
    return Rule("lobatto5", (0.0, c, 0.5, 1 - c, 1.0), (1 / 20, 49 / 180, 16 / 45, 49 / 180, 1 / 20), 7)


def _legendre(count: int, positive: tuple[tuple[float, float], ...]) -> Rule:
    """From the non-negative abscissae and their weights on [-1, 1]."""
    points = sorted({(sign * x, w) for x, w in positive for sign in (-1.0, 1.0) if x or sign > 0})
    nodes = tuple((1 + x) / 2 for x, _ in points)
    return Rule(f"legendre{count}", nodes, tuple(w / 2 for _, w in points), 2 * count - 1)


_r4, _r5 = math.sqrt(6 / 5), math.sqrt(10 / 7)
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("lobatto2", (0.0, 1.0), (1 / 2, 1 / 2), 1),
        Rule("lobatto3", (0.0, 0.5, 1.0), (1 / 6, 2 / 3, 1 / 6), 3),
        _lobatto4(),
        _lobatto5(),
        symmetric_four_point(1 / 3, "simpson38"),
        symmetric_four_point(1 / 4, "chebyshev4"),
        _legendre(1, ((0.0, 2.0),)),
        _legendre(2, ((math.sqrt(1 / 3), 1.0),)),
        _legendre(3, ((0.0, 8 / 9), (math.sqrt(3 / 5), 5 / 9))),
        _legendre(
            4,
            (
                (math.sqrt((3 - 2 * _r4) / 7), (18 + math.sqrt(30)) / 36),
                (math.sqrt((3 + 2 * _r4) / 7), (18 - math.sqrt(30)) / 36),
            ),
        ),
        _legendre(
            5,
            (
                (0.0, 128 / 225),
                (math.sqrt(5 - 2 * _r5) / 3, (322 + 13 * math.sqrt(70)) / 900),
                (math.sqrt(5 + 2 * _r5) / 3, (322 - 13 * math.sqrt(70)) / 900),
            ),
        ),
    )
}


def get_rule(rule: Rule | str) -> Rule:
    """A rule by name; a `Rule` is returned as it is.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"Unknown quadrature rule {rule!r}. Valid rules: {', '.join(RULES)}.")
    return RULES[rule]
