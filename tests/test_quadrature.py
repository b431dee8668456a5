"""Quadrature rules: exact to the degree they claim and no further, and damaged ones refused."""

import math

import numpy as np
import pytest
from ba_solver.bas_core import RULES, Rule, get_rule, symmetric_four_point


def moment_error(rule: Rule, degree: int) -> float:
    """Error of the integral of x^degree over [0, 1], relative to its value 1/(degree + 1)."""
    return abs((degree + 1) * math.fsum(w * c**degree for c, w in zip(rule.nodes, rule.weights, strict=True)) - 1)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_exactness_is_as_stated(rule):
    assert max(moment_error(rule, degree) for degree in range(rule.exactness + 1)) < 1e-14
    assert moment_error(rule, rule.exactness + 1) > 1e-6


@pytest.mark.parametrize(
    ("name", "exactness"),
    [("lobatto2", 1), ("lobatto3", 3), ("lobatto4", 5), ("lobatto5", 7), ("simpson38", 3), ("chebyshev4", 3)]
    + [(f"legendre{k}", 2 * k - 1) for k in range(1, 6)],
)
def test_every_promised_rule_is_there(name, exactness):
    assert get_rule(name).exactness == exactness
    assert get_rule(name).has_both_ends == (not name.startswith("legendre"))


@pytest.mark.parametrize("count", range(1, 6))
def test_gauss_legendre_matches_numpy(count):
    nodes, weights = np.polynomial.legendre.leggauss(count)
    rule = get_rule(f"legendre{count}")
    np.testing.assert_allclose(rule.nodes, (1 + nodes) / 2, atol=1e-15)
    np.testing.assert_allclose(rule.weights, weights / 2, atol=1e-15)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_gauss_lobatto_nodes_are_the_roots_of_the_legendre_derivative(count):
    inner = np.polynomial.legendre.Legendre.basis(count - 1).deriv().roots()
    rule = get_rule(f"lobatto{count}")
    np.testing.assert_allclose(rule.nodes, [0, *(1 + np.sort(inner)) / 2, 1], atol=1e-14)


@pytest.mark.parametrize(
    ("alpha", "weights", "degree"),
    [
        (1 / 3, (1 / 8, 3 / 8, 3 / 8, 1 / 8), 3),
        (1 / 4, (1 / 18, 4 / 9, 4 / 9, 1 / 18), 3),
        ((1 - 1 / math.sqrt(5)) / 2, (1 / 12, 5 / 12, 5 / 12, 1 / 12), 5),
        (0.1, (0.5 - 1 / 1.08, 1 / 1.08, 1 / 1.08, 0.5 - 1 / 1.08), 3),
    ],
    ids=["simpson38", "chebyshev4", "lobatto4", "0.1"],
)
def test_symmetric_four_point_rules(alpha, weights, degree):
    rule = symmetric_four_point(alpha)
    assert rule.nodes == (0, alpha, 1 - alpha, 1)
    np.testing.assert_allclose(rule.weights, weights, atol=1e-15)
    assert moment_error(rule, degree) < 1e-14 < 1e-4 < moment_error(rule, degree + 1)


NAN = float("nan")


@pytest.mark.parametrize(
    ("nodes", "weights", "exactness", "message"),
    [
        ((0.0, 1.0), (0.5,), 1, "one weight a node; got 2 nodes and 1 weights"),
        ((), (), 0, "one weight a node; got 0 nodes"),
        ((0.0, 1.5), (0.5, 0.5), 0, r"ascend within \[0, 1\]; got \(0.0, 1.5\)"),
        ((1.0, 0.0), (0.5, 0.5), 1, "must ascend"),
        ((0.5, 0.5), (0.5, 0.5), 0, "must ascend"),
        ((0.0, NAN), (0.5, 0.5), 0, "must ascend"),
        ((0.0, 1.0), (0.5, 0.6), 0, "not exact for degree 0"),
        ((0.0, 1.0), (0.4, 0.6), 1, "not exact for degree 1"),
        ((0.0, 1.0), (0.5, 0.5), 2, "not exact for degree 2"),
        ((0.0, 1.0), (0.5, NAN), 1, "not exact"),
        ((0.0, 1 / 3 + 1e-9, 2 / 3, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 3, "not exact"),
    ],
)
def test_damaged_rules_are_refused(nodes, weights, exactness, message):
    with pytest.raises(ValueError, match=message):
        Rule("damaged", nodes, weights, exactness)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.1, 0.7, NAN])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must lie inside \(0, 0.5\); got"):
        symmetric_four_point(alpha)


def test_an_unknown_rule_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'gauss'") as caught:
        get_rule("gauss")
    assert all(name in str(caught.value) for name in RULES)


def test_a_rule_of_ones_own_is_taken_as_it_is():
    rule = symmetric_four_point(0.2)
    assert get_rule(rule) is rule
