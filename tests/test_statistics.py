"""Intervals, tests and corrections: by hand, against SciPy, and by whether they cover the truth."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from steered_moe import statistics
from steered_moe.errors import SteeredMoEError
from steered_moe.statistics import aligned_items, holm, mcnemar, paired_gain, sign_flips

NORMAL = torch.distributions.Normal(0, 1)
LANGUAGES, PROBLEMS = 5, 250


def test_centre_and_width_are_those_of_the_mean():
    torch.manual_seed(0)
    old = torch.rand(2000) < 0.5
    new = old | (torch.rand(2000) < 0.1)
    gain = paired_gain(old, new, resamples=4000)
    difference = new.double() - old.double()
    error = float(difference.std() / 2000**0.5)
    assert gain.mean == pytest.approx(float(difference.mean()))
    assert gain.high - gain.mean == pytest.approx(1.96 * error, rel=0.1)
    assert gain.mean - gain.low == pytest.approx(1.96 * error, rel=0.1)
    shuffled = paired_gain(old, new[torch.randperm(2000)], resamples=4000)
    assert shuffled.high - shuffled.low > 1.5 * (gain.high - gain.low)  # unpaired is wider


def test_what_languages_share_is_kept():
    """Two languages that move together are no more certain than one."""
    torch.manual_seed(1)
    old, new = torch.rand(1000) < 0.5, torch.rand(1000) < 0.55
    one = paired_gain(old, new, resamples=2000)
    twice = paired_gain(old.expand(2, -1), new.expand(2, -1), resamples=2000)
    assert twice == one
    as_problems = paired_gain(torch.cat([old, old]), torch.cat([new, new]), resamples=2000)
    assert as_problems.high - as_problems.low < 0.8 * (one.high - one.low)


def test_no_difference_is_exactly_zero_and_bad_input_is_refused():
    same = torch.rand(3, 50) < 0.5
    gain = paired_gain(same, same, resamples=100)
    assert (gain.mean, gain.low, gain.high) == (0, 0, 0)
    with pytest.raises(SteeredMoEError, match="same problems"):
        paired_gain(torch.ones(3), torch.ones(4))
    with pytest.raises(SteeredMoEError, match="level is 95"):
        paired_gain(torch.ones(3), torch.ones(3), level=95)


def test_drawing_in_parts_changes_nothing(monkeypatch):
    """What bounds the memory; another seed, in contrast, changes the interval."""
    old, new = torch.rand(2, 30) < 0.5, torch.rand(2, 30) < 0.5
    at_once = paired_gain(old, new, resamples=101)
    for drawn in (1, 70, 900):
        monkeypatch.setattr(statistics, "_DRAWN_AT_ONCE", drawn)
        assert paired_gain(old, new, resamples=101) == at_once
    assert paired_gain(old, new, resamples=101, seed=1) != at_once


def runs(gain: float, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Right or wrong in correlated languages, of a model and of one that is better by ``gain``.

    What decides is a problem's difficulty, shared by languages and systems, and luck: the systems
    differ on 14 % of the items, languages are solved by 35 to 65 %.
    """
    generator = torch.Generator().manual_seed(0)
    bar = NORMAL.icdf(torch.linspace(0.35, 0.65, LANGUAGES)[:, None])
    better = NORMAL.icdf(torch.linspace(0.35, 0.65, LANGUAGES)[:, None] + gain)
    for _ in range(number):
        parts = [torch.randn(n, PROBLEMS, generator=generator) for n in (1, LANGUAGES) * 2]
        first, second = ((parts[i] + parts[i + 1]) / 2**0.5 for i in (0, 2))
        yield first < bar, 0.9 * first + (1 - 0.9**2) ** 0.5 * second < better


def coverage(gain: float, number: int, how: str = "paired") -> float:
    """Percentage of runs whose 95 % interval holds the true gain."""
    hits = 0
    for seed, (old, new) in enumerate(runs(gain, number)):
        if how == "unpaired":
            new = new[:, torch.randperm(PROBLEMS)]
        if how == "languages as problems":
            old, new = old.flatten(), new.flatten()
        found = paired_gain(old, new, resamples=1000, seed=seed)
        hits += found.low <= gain <= found.high
    return 100 * hits / number


@pytest.mark.parametrize("gain", [0.0, 0.02])
def test_intervals_cover_the_truth(gain: float):
    assert 93 <= coverage(gain, 2000) <= 97


@pytest.mark.parametrize(
    ("how", "low", "high"), [("unpaired", 97.5, 100), ("languages as problems", 80, 92)]
)
def test_other_intervals_do_not_cover_as_they_should(how: str, low: float, high: float):
    assert low <= coverage(0.02, 300, how) <= high


def outcomes(gained: int, lost: int, both: int = 3, neither: int = 2) -> tuple[Tensor, Tensor]:
    old = [0] * gained + [1] * lost + [1] * both + [0] * neither
    new = [1] * gained + [0] * lost + [1] * both + [0] * neither
    return torch.tensor(old), torch.tensor(new)


def test_mcnemar_by_hand_and_against_scipy():
    assert mcnemar(*outcomes(6, 0)) == 2 / 64
    assert mcnemar(*outcomes(9, 1)) == 2 * (1 + 10) / 1024
    assert mcnemar(*outcomes(4, 4)) == mcnemar(*outcomes(0, 0)) == 1
    draw = random.Random(0)
    for _ in range(200):
        gained, lost = draw.randrange(40), draw.randrange(1, 40)
        p = mcnemar(*outcomes(gained, lost))
        assert p == pytest.approx(binomtest(gained, gained + lost).pvalue, rel=1e-9)
        assert (
            p
            == mcnemar(*outcomes(gained, lost, both=500, neither=0))
            == mcnemar(*outcomes(lost, gained))
        )
        if abs(gained - lost) > 2:  # the twin: the test without pairs, or with one tail, is another
            assert p != pytest.approx(binomtest(gained, gained + lost, alternative="less").pvalue)
    p = mcnemar(*outcomes(10_300, 9_700))
    assert p == pytest.approx(binomtest(9_700, 20_000).pvalue, rel=1e-9)


def test_mcnemar_takes_bool_and_refuses_what_is_not_right_or_wrong():
    old, new = outcomes(6, 1)
    assert mcnemar(old.bool(), new.bool()) == mcnemar(old.double(), new.double()) == 16 / 128
    for bad in (old / 2, old * float("nan"), old[None]):
        with pytest.raises(SteeredMoEError, match="0 or 1"):
            mcnemar(bad, bad)
    with pytest.raises(SteeredMoEError, match="same problems"):
        mcnemar(old, new[1:])


def test_holm_by_hand():
    adjusted = holm({"bn": 0.01, "sw": 0.04, "te": 0.03, "th": 0.005})
    assert list(adjusted) == ["bn", "sw", "te", "th"]
    assert adjusted == pytest.approx({"bn": 0.03, "sw": 0.06, "te": 0.06, "th": 0.02})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.2}) == {"a": 0.2}
    assert holm({}) == {}
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(SteeredMoEError, match="p value of a"):
            holm({"a": bad})


def rejected(p_values: dict[str, float], level: float) -> set[str]:
    """Holm's procedure as he wrote it: smallest first, until one is too large."""
    found: set[str] = set()
    for name in sorted(p_values, key=p_values.__getitem__):
        if p_values[name] > level / (len(p_values) - len(found)):
            break
        found.add(name)
    return found


def test_holm_is_the_stepwise_procedure_and_keeps_the_error_rate():
    draw, false, uncorrected = random.Random(0), 0, 0
    for _ in range(2000):
        p = {str(i): draw.random() for i in range(11)}
        false += min(holm(p).values()) <= 0.05
        uncorrected += min(p.values()) <= 0.05
        mixed = {name: value ** draw.randint(1, 6) for name, value in p.items()}
        for level in (0.01, 0.05, 0.3):
            assert {n for n, value in holm(mixed).items() if value <= level} == rejected(
                mixed, level
            )
    assert false / 2000 < 0.065
    assert uncorrected / 2000 > 0.35  # 1 - 0.95**11 is 0.43


def test_items_are_aligned_whatever_their_order():
    languages, problems = ["sw", "bn", "bn", "sw"], ["b", "a", "b", "a"]
    assert aligned_items(languages, problems) == {"sw": [0, 3], "bn": [2, 1]}
    assert aligned_items(languages) == {"sw": [0, 3], "bn": [1, 2]}
    for wrong, message in [
        (["b", "a", "a", "a"], "twice in bn"),
        (["b", "a", "c", "a"], "not those"),
    ]:
        with pytest.raises(SteeredMoEError, match=message):
            aligned_items(languages, wrong)
    with pytest.raises(SteeredMoEError, match="4 languages and 1 problems"):
        aligned_items(languages, ["a"])


def of_texts(
    number: int, texts: int = 120, each: int = 4
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Right or wrong by two equally good systems; what they find hard goes by the text."""
    generator = torch.Generator().manual_seed(0)
    groups = [text for text in range(texts) for _ in range(each)]
    for _ in range(number):
        by_text = torch.randn(2, texts, 1, generator=generator)
        luck = torch.randn(2, texts, each, generator=generator)
        old, new = (0.75 * by_text + 0.66 * luck).flatten(1) < 0
        yield old, new, groups


def test_questions_on_one_text_are_drawn_together():
    """Belebele and XQuAD ask several questions on a text; without its groups intervals are too
    narrow and McNemar's test finds too much."""
    hits = {"groups": 0, "alone": 0}
    false = {"groups": 0, "alone": 0}
    number = 400
    for seed, (old, new, groups) in enumerate(of_texts(number)):
        for how, given in (("groups", groups), ("alone", None)):
            found = paired_gain(old, new, groups=given, resamples=800, seed=seed)
            hits[how] += found.low <= 0 <= found.high
        false["groups"] += sign_flips(old, new, groups, flips=800, seed=seed) < 0.05
        false["alone"] += mcnemar(old, new) < 0.05
    assert 92 <= 100 * hits["groups"] / number <= 98
    assert 100 * hits["alone"] / number < 90
    assert 100 * false["groups"] / number <= 8
    assert 100 * false["alone"] / number > 10


def test_groups_of_one_change_nothing_and_flips_are_exact_in_the_limit():
    old, new, groups = next(of_texts(1))
    alone = list(range(len(old)))
    assert paired_gain(old, new, groups=alone) == paired_gain(old, new)
    assert paired_gain(old, new, groups=groups) != paired_gain(old, new)
    few_old, few_new = torch.tensor([0, 0, 0, 1, 1, 0, 0]), torch.tensor([1, 1, 1, 1, 0, 1, 1])
    flips = sign_flips(few_old, few_new, range(7), flips=40_000)
    assert flips == pytest.approx(mcnemar(few_old, few_new), abs=0.02)
    assert sign_flips(few_old, few_old, range(7)) == 1
    with pytest.raises(SteeredMoEError, match="3 groups for 7 problems"):
        sign_flips(few_old, few_new, range(3))


def test_groups_of_unequal_size_are_weighed_by_their_problems():
    """One text of nine problems gains all, nine of one problem nothing: half of all problems."""
    old = torch.zeros(18)
    new = torch.tensor([1.0] * 9 + [0.0] * 9)
    groups = [0] * 9 + list(range(1, 10))
    found = paired_gain(old, new, groups=groups, resamples=20_000)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(10, (20_000, 10), generator=generator)
    sums, sizes = torch.tensor([9.0] + [0.0] * 9), torch.tensor([9.0] + [1.0] * 9)
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    assert found.mean == 0.5
    assert found.high == pytest.approx(float(means.quantile(0.975)), abs=0.02)
    assert found.high > 0.7  # a mean of group means stays at 0.3
    least = sign_flips(torch.zeros(40), torch.ones(40), range(40), flips=99)
    assert least == 1 / 100  # the observed signs count as one of the flips
