"""Divergence against scipy-free plain Python and against figures of the real model."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import real_data

from steered_moe import RoutingProfile
from steered_moe.divergence import divergence, entropy, normalised_divergence

REAL = {  # mean over layers 0-7, 8-35 and 36-47
    "bn": (0.241, 0.152, 0.254),
    "sw": (0.272, 0.152, 0.228),
    "ja": (0.185, 0.108, 0.258),
    "zh": (0.180, 0.074, 0.275),
    "de": (0.107, 0.057, 0.131),
    "fr": (0.105, 0.049, 0.122),
    "es": (0.095, 0.045, 0.119),
}


def plain(p: list[float], q: list[float]) -> float:
    """2510.04694 Eqs. 6-8, term by term."""
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]

    def kl(x):
        return sum(a * math.log(a / c) for a, c in zip(x, m, strict=True) if a > 0)

    def h(x):
        return -sum(a * math.log(a) for a in x if a > 0)

    return (kl(p) + kl(q)) / 2 / (math.log(len(p)) - (h(p) + h(q)) / 2)


def test_equals_the_formula_term_by_term():
    torch.manual_seed(0)
    for sharpness in (0.5, 2.0, 6.0):
        rows = torch.softmax(sharpness * torch.randn(2, 16, dtype=torch.float64), dim=-1)
        expected = plain(*rows.tolist())
        assert normalised_divergence(rows[0], rows[1]).item() == pytest.approx(expected, abs=1e-9)
        unnormalised = expected * (math.log(16) - entropy(rows).mean().item())
        assert unnormalised != pytest.approx(expected, abs=1e-3)


def test_bounds_and_symmetry():
    one, other = torch.eye(4)[0], torch.eye(4)[1]
    assert normalised_divergence(one, one).item() == 0
    assert normalised_divergence(one, other).item() == pytest.approx(math.log(2) / math.log(4))
    rows = torch.softmax(torch.randn(2, 100, 8, dtype=torch.float64), dim=-1)
    there, back = normalised_divergence(*rows), normalised_divergence(*rows.flip(0))
    assert torch.allclose(there, back)
    assert (there > 0).all()
    assert (there <= 1).all()
    uniform = torch.full((8,), 1 / 8)
    assert normalised_divergence(uniform, uniform).item() == 0  # the bound is 0 here


def test_sequences_are_compared_one_by_one():
    torch.manual_seed(1)
    probabilities = torch.softmax(3 * torch.randn(2, 5, 3, 8), dim=-1)
    flat = torch.ones(2, 3, 8)
    profile = RoutingProfile(
        ("en", "xx"), (0, 1, 2), flat, flat[..., 0], probabilities=probabilities
    )
    found = divergence(profile)["xx"]
    for layer in range(3):
        each = [plain(*probabilities[:, i, layer].double().tolist()) for i in range(5)]
        assert found[layer].item() == pytest.approx(sum(each) / 5, abs=1e-6)
        pooled = plain(*probabilities[:, :, layer].double().mean(1).tolist())
        assert found[layer].item() != pytest.approx(pooled, abs=1e-3)


def test_the_real_model_is_u_shaped():
    folder = real_data("real_routing/qwen3_30b_a3b_mgsm")
    found = divergence(RoutingProfile.from_recorder(folder))
    for language, expected in REAL.items():
        curve = found[language]
        parts = [curve[:8].mean(), curve[8:36].mean(), curve[36:].mean()]
        assert [round(float(part), 3) for part in parts] == list(expected)
        assert parts[1] < min(parts[0], parts[2])
