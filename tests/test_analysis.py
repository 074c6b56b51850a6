"""Middle layers, correlation and similarity, against scipy and by hand, and on the real model."""

from __future__ import annotations

import pytest
import torch
from conftest import real_data
from scipy import stats
from scipy.spatial.distance import cosine

from steered_moe import RoutingProfile
from steered_moe.correlation import correlation
from steered_moe.divergence import divergence
from steered_moe.errors import SteeredMoEError
from steered_moe.layers import middle_layers
from steered_moe.similarity import linkage, nearest, similarity


def curve(*values: float) -> dict[str, torch.Tensor]:
    return {"xx": torch.tensor(values)}


def test_the_middle_is_the_longest_low_run():
    found = middle_layers(curve(9, 5, 1, 1, 1, 6, 8, 1, 9), tuple(range(9)))
    assert (found.first, found.last, found.u_shaped) == (2, 4, True)
    assert list(found.layers) == [2, 3, 4]
    assert "1.000 in layers 2-4, 7.000 before and 6.000 after" in found.reason


def test_one_high_layer_does_not_end_a_run_but_two_do():
    assert list(middle_layers(curve(9, 1, 1, 9, 1, 9, 9), tuple(range(7))).layers) == [1, 2, 3, 4]
    assert list(middle_layers(curve(9, 1, 1, 9, 9, 1, 9), tuple(range(7))).layers) == [1, 2]


def test_layers_keep_their_numbers_and_a_slope_is_no_u():
    found = middle_layers(curve(9, 1, 1, 9), (3, 5, 7, 9))
    assert (found.first, found.last) == (5, 7)
    slope = middle_layers(curve(9, 6, 3, 1), (0, 1, 2, 3))
    assert not slope.u_shaped
    assert "choose the layers yourself" in slope.reason
    assert slope.reason.startswith("mean divergence 2.000 in layers 2-3, 7.500 before and no ")
    rise = middle_layers(curve(1, 3, 6, 9), (0, 1, 2, 3))
    assert "in layers 0-1, no layers before and 7.500 after, over 1 languages" in rise.reason
    assert not rise.u_shaped
    with pytest.raises(SteeredMoEError, match="not defined"):
        middle_layers(curve(1, 2), (0, 1))
    with pytest.raises(SteeredMoEError, match="0 curves"):
        middle_layers({}, (0, 1, 2))


def test_correlations_equal_scipy():
    torch.manual_seed(0)
    languages = [f"l{i}" for i in range(9)]
    curves = {language: torch.rand(5, dtype=torch.float64) for language in languages}
    scores = {language: round(float(torch.rand(1)), 1) for language in languages}  # with ties
    pearson, spearman = correlation(curves, scores), correlation(curves, scores, ranks=True)
    points = list(scores.values())
    for layer in range(5):
        values = [float(curves[language][layer]) for language in languages]
        expected = stats.pearsonr(values, points)
        interval = expected.confidence_interval(0.95)
        assert pearson.value[layer].item() == pytest.approx(expected.statistic, abs=1e-12)
        assert pearson.low[layer].item() == pytest.approx(interval.low, abs=1e-6)
        assert pearson.high[layer].item() == pytest.approx(interval.high, abs=1e-6)
        ranked = stats.spearmanr(values, points).statistic
        assert spearman.value[layer].item() == pytest.approx(ranked, abs=1e-12)
        assert spearman.value[layer].item() != pytest.approx(expected.statistic, abs=1e-6)


def test_correlation_takes_what_both_sides_have():
    curves = {c: torch.tensor([float(i)]) for i, c in enumerate("abcdef")}
    scores = {c: -float(i) for i, c in enumerate("abcdexyz")}
    found = correlation(curves, scores)
    assert (found.languages, found.value.item()) == (5, pytest.approx(-1.0))
    with pytest.raises(SteeredMoEError, match="3 languages have both"):
        correlation(curves, dict.fromkeys("abc", 1.0))
    with pytest.raises(SteeredMoEError, match="level is 2"):
        correlation(curves, scores, level=2)


def test_a_perfect_correlation_has_no_interval():
    """Four languages in order by chance would otherwise be certain."""
    curves = {c: torch.tensor([float(i), float(i**3), 1.0 + i % 3]) for i, c in enumerate("abcd")}
    scores = {c: 0.1 * i for i, c in enumerate("abcd")}
    for ranks in (False, True):
        found = correlation(curves, scores, ranks=ranks)
        assert found.value[0].item() == pytest.approx(1)
        assert found.low.isnan().tolist() == found.high.isnan().tolist() == [True, ranks, False]
        assert found.low[2] < found.value[2] < found.high[2]
    falling = correlation(curves, {c: -score for c, score in scores.items()})
    assert falling.value[0].item() == pytest.approx(-1)
    assert falling.high[0].isnan()


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 10**400, True, "high", None])
def test_scores_that_are_no_finite_numbers_are_refused(score: object):
    curves = {c: torch.tensor([float(i)]) for i, c in enumerate("abcde")}
    with pytest.raises(SteeredMoEError, match=r"the score of c is .*must be a finite number"):
        correlation(curves, {"a": 1, "b": 2, "c": score, "d": 4, "e": 3})
    with pytest.raises(SteeredMoEError, match="there are no scores"):
        correlation(curves, {})


def random_profile(languages: int = 5, layers: int = 3, experts: int = 8) -> RoutingProfile:
    torch.manual_seed(1)
    counts = torch.randint(0, 50, (languages, layers, experts)).double()
    names = tuple("abcdefgh"[:languages])
    return RoutingProfile(names, tuple(range(layers)), counts, counts.sum(-1) / 2)


def test_similarity_equals_scipy_and_its_bounds_hold():
    profile = random_profile()
    found = similarity(profile, layers=[0, 2])
    for a in range(5):
        for b in range(5):
            each = [1 - cosine(profile.frequency[a, la], profile.frequency[b, la]) for la in (0, 2)]
            assert found[a, b].item() == pytest.approx(sum(each) / 2, abs=1e-9)
    assert torch.allclose(found, found.T)
    assert torch.allclose(found.diagonal(), torch.ones(5).double())
    assert not torch.allclose(found, similarity(profile))
    order = torch.randperm(8)
    permuted = RoutingProfile(
        profile.languages, profile.layers, profile.counts[..., order], profile.tokens
    )  # fmt: skip
    assert torch.allclose(similarity(permuted), similarity(profile))
    with pytest.raises(SteeredMoEError, match="two languages"):
        similarity(profile.of(["a"]))
    with pytest.raises(SteeredMoEError, match="layers 9, 30-99 was profiled; there are 0-2"):
        similarity(profile, layers=[9, *range(30, 100)])


def test_clusters_and_neighbours():
    block = torch.tensor([[1.0, 0.9, 0.2, 0.1], [0.9, 1, 0.3, 0.2], [0.2, 0.3, 1, 0.8],
                          [0.1, 0.2, 0.8, 1]], dtype=torch.float64)  # fmt: skip
    merged = linkage(block)
    assert [sorted(pair) for pair in merged[:, :2].int().tolist()] == [[0, 1], [2, 3], [4, 5]]
    assert torch.allclose(merged[:, 2], torch.tensor([0.1, 0.2, 0.8]).double())
    names = nearest(random_profile(4), block)
    assert names == {"a": "b", "b": "a", "c": "d", "d": "c"}


def test_the_real_model():
    profile = RoutingProfile.from_recorder(real_data("real_routing/qwen3_30b_a3b_mgsm"))
    found = middle_layers(divergence(profile), profile.layers)
    assert (found.first, found.last, found.u_shaped) == (5, 39, True)
    near = nearest(profile, similarity(profile))
    assert {near[c] for c in ("es", "fr", "de")} <= {"es", "fr", "de", "en"}
    table = similarity(profile)
    at = {language: i for i, language in enumerate(profile.languages)}
    romance = table[at["es"], at["fr"]]
    assert romance > table[at["es"], at["zh"]]
    assert all(table[at["zh"], at["ja"]] > table[at["zh"], at[c]] for c in ("es", "fr", "de"))
