"""Every selection, restated in numpy with plain loops, on random routing and on the real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import real_data
from numpy.typing import NDArray

from steered_moe import RouterSteering, RoutingProfile
from steered_moe.divergence import divergence
from steered_moe.selection import (
    exclusive_experts,
    language_shares,
    multilingual_experts,
    preferred,
    risk_difference,
    shared_experts,
    task_experts,
)

LANGUAGES, LAYERS, EXPERTS, TOP_K = ("en", "zh", "de", "sw"), 5, 12, 3
Table = NDArray[np.float64]  # layers x experts


def random_profile(seed: int) -> RoutingProfile:
    """Counts of real selections of 3 of 12 experts by 8 texts of different lengths."""
    draw = np.random.default_rng(seed)
    counts = np.zeros((len(LANGUAGES), LAYERS, EXPERTS))
    shares = np.zeros_like(counts)
    lengths = draw.integers(2, 30, size=(len(LANGUAGES), 8))
    for i, texts in enumerate(lengths):
        taste = draw.normal(size=(LAYERS, EXPERTS)) * 1.5
        for length in texts:
            for layer in range(LAYERS):
                scores = taste[layer] + draw.gumbel(size=(length, EXPERTS))
                chosen = np.argsort(-scores, axis=1)[:, :TOP_K]
                hits = np.bincount(chosen.ravel(), minlength=EXPERTS)
                counts[i, layer] += hits
                shares[i, layer] += hits / length
    tokens = np.repeat(lengths.sum(axis=1)[:, None], LAYERS, axis=1)
    return RoutingProfile(
        LANGUAGES,
        tuple(range(LAYERS)),
        torch.tensor(counts),
        torch.tensor(tokens),
        sequences=torch.full((len(LANGUAGES),), 8.0),
        frequency_sums=torch.tensor(shares),
    )


def real_profile() -> RoutingProfile:
    return RoutingProfile.from_recorder(real_data("real_routing/qwen3_30b_a3b_mgsm"))


@pytest.fixture(params=["random 0", "random 1", "real"])
def profile(request: pytest.FixtureRequest) -> RoutingProfile:
    kind, _, seed = request.param.partition(" ")
    return real_profile() if kind == "real" else random_profile(int(seed))


def dense(steering: RouterSteering, part: str, layers: int) -> Table:
    grid = np.zeros((layers, steering.num_experts))
    value = getattr(steering, part)
    grid[steering.layers.numpy()] = 0.0 if value is None else value.numpy()
    return grid


def rate(profile: RoutingProfile, language: str) -> Table:
    i = profile.languages.index(language)
    return np.array(
        [
            [count / total for count in row]
            for row, total in zip(
                profile.counts[i].tolist(), profile.tokens[i].tolist(), strict=True
            )
        ]
    )


def shares_by_loops(profile: RoutingProfile, languages: tuple[str, ...], top: int) -> Table:
    tables = []
    for language in languages:
        kept = rate(profile, language)
        for row in kept:
            row[np.argsort(-row, kind="stable")[top:]] = 0.0
        tables.append(kept)
    grid = np.stack(tables)
    return grid / (grid.sum(axis=0) + 1e-10)


def test_shared_experts(profile: RoutingProfile):
    inside = range(1, len(profile.layers) - 1)
    top = max(4, profile.num_experts // 6)
    steering = shared_experts(profile, ("en", "zh"), top=top, threshold=0.7, layers=inside)
    share = shares_by_loops(profile, ("en", "zh"), top)
    expected = np.zeros(share.shape[1:])
    for layer in inside:
        for expert in range(profile.num_experts):
            en, zh = share[:, layer, expert]
            if (en > 0 or zh > 0) and en < 0.7 and zh < 0.7:
                expected[layer, expert] = en
    np.testing.assert_allclose(dense(steering, "weights", len(profile.layers)), expected, atol=1e-6)
    assert expected.any()
    assert not expected.all()


def test_exclusive_experts(profile: RoutingProfile):
    top = max(2, profile.num_experts // 8)
    steering = exclusive_experts(profile, "zh", top=top, threshold=0.3, layers=profile.layers)
    share = shares_by_loops(profile, profile.languages, top)
    expected = share[profile.languages.index("zh")] > 0.3
    found = dense(steering, "force", len(profile.layers))
    assert np.array_equal(found == -1, expected)
    assert expected.any()


def test_preferred(profile: RoutingProfile):
    steering = preferred(profile, "sw", threshold=0.02, layers=profile.layers)
    difference = rate(profile, "en") - rate(profile, "sw")
    expected = np.where(difference > 0.02, difference, 0.0)
    found = dense(steering, "weights", len(profile.layers))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.allclose(found, np.where(difference < -0.02, -difference, 0.0))


def test_risk_difference(profile: RoutingProfile):
    other = replace(profile.of(["de"]), languages=("en",))
    steering = risk_difference(profile, other, activate=4, deactivate=6)
    difference = rate(profile, "en") - rate(profile, "de")
    order = np.argsort(difference.ravel())
    found = dense(steering, "force", len(profile.layers)).ravel()
    assert set(np.flatnonzero(found == -1)) == set(order[:6])
    assert set(np.flatnonzero(found == 1)) == set(order[-4:])  # no layer has more than top-k


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_task_and_multilingual_experts(seed: int, mode: str):
    task, general = random_profile(seed), random_profile(seed + 10)
    steering = task_experts(task, general, threshold=0.2, layers=range(1, 4), mode=mode)
    sums = [p.frequency_sums.numpy() / 8.0 for p in (task, general)]
    part = "weights" if mode == "soft" else "force"
    expected = np.zeros((LAYERS, EXPERTS))
    expected[1:4] = (sums[0][0] - sums[1][0] > 0.2)[1:4]
    assert np.array_equal(dense(steering, part, LAYERS), expected)
    by_token = rate(task, "en") - rate(general, "en")
    assert not np.allclose(by_token, sums[0][0] - sums[1][0], atol=0.01)  # texts weigh the same
    many = multilingual_experts(general, threshold=0.2, layers=range(LAYERS), mode=mode)
    several = [sums[1][i] - sums[1][0] > 0.2 for i in range(1, len(LANGUAGES))]
    assert np.array_equal(dense(many, part, LAYERS), np.logical_or.reduce(several))


def test_of_equally_frequent_experts_the_first_are_kept():
    counts = torch.tensor([[[5.0, 9.0, 5.0, 5.0, 5.0]], [[9.0, 0.0, 0.0, 0.0, 0.0]]])
    profile = RoutingProfile(("en", "zh"), (0,), counts, torch.full((2, 1), 10.0))
    kept = language_shares(profile, 3)[0, 0] > 0
    assert kept.tolist() == [True, True, True, False, False]


METHODS: dict[str, Callable[[RoutingProfile], RouterSteering]] = {
    "shared": lambda p: shared_experts(p, ("en", "zh"), top=4, threshold=0.7, layers=p.layers),
    "exclusive": lambda p: exclusive_experts(p, "zh", top=4, threshold=0.3, layers=p.layers),
    "preferred": lambda p: preferred(p, "sw", layers=p.layers),
    "multilingual": lambda p: multilingual_experts(p, threshold=0.2, layers=p.layers),
}


@pytest.mark.parametrize("method", METHODS)
def test_experts_in_another_order_are_selected_in_that_order(method: str):
    profile = random_profile(3)
    apart = torch.arange(EXPERTS) * 1e-4  # no two experts are equally frequent
    profile = replace(profile, counts=profile.counts + apart)
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(4))
    permuted = replace(
        profile,
        counts=profile.counts[..., order],
        frequency_sums=profile.frequency_sums[..., order],
    )
    one, other = METHODS[method](profile), METHODS[method](permuted)
    for part in ("weights", "force"):
        found = dense(other, part, LAYERS)
        assert np.array_equal(found, dense(one, part, LAYERS)[:, order.numpy()])
    assert one.fingerprint != other.fingerprint
    for language, curve in divergence(profile).items():
        torch.testing.assert_close(divergence(permuted)[language], curve)
