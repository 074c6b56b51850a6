"""Records to numbers: corrected tests, weighted subjects, bits per byte, and the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from steered_moe.controls import BASE
from steered_moe.records import Record
from steered_moe.summary import Line, summarise
from steered_moe.tasks import task

OTHER = "steered"


def rows(
    name: str, language: str, base: Mapping[str, float], own: Mapping[str, float]
) -> list[Record]:
    """Records of scores by item."""
    return [
        {"task": name, "language": language, "system": system, "seed": 0, "id": item, "score": one}
        for system, scores in ((BASE, base), (OTHER, own))
        for item, one in scores.items()
    ]


def gained(language: str, count: int, first: int = 0) -> list[Record]:
    """Ten items that the base model has wrong; so many of them get right."""
    items = [f"{first + i}" for i in range(10)]
    right = {item: float(i < count) for i, item in enumerate(items)}
    return rows("embedded", language, dict.fromkeys(items, 0.0), right)


def by_language(records: list[Record]) -> dict[str, Line]:
    return {line.language: line for line in summarise(records)}


def test_p_is_corrected_for_the_number_of_languages():
    found = by_language([*gained("es", 8), *gained("sw", 6), *gained("zh", 1)])
    own = {code: 2 / 2**count for code, count in (("es", 8), ("sw", 6), ("zh", 1))}
    assert {code: found[code].p for code in own} == own
    adjusted = {code: found[code].p_adjusted for code in own}
    assert adjusted == {"es": 3 * own["es"], "sw": 2 * own["sw"], "zh": 1.0}
    assert found["mean of 3 languages"].p_adjusted is None


def test_each_subject_counts_the_same_where_the_task_has_subjects():
    """One of five answers becomes right, the only one of its subject: half of the score."""
    items = [*(f"virology/{i}" for i in range(4)), "nutrition/0"]
    before = dict.fromkeys(items, 0.0)
    after = {**before, "nutrition/0": 1.0}
    medicine = task("global_mmlu_medicine")
    [line] = summarise(rows(medicine.name, "es", before, after))
    assert (line.score, line.gain.mean) == pytest.approx((0.5, 50))
    assert line.score == pytest.approx(medicine.mean(after))
    [line] = summarise(rows("embedded", "es", before, after))
    assert (line.score, line.gain.mean) == pytest.approx((0.2, 20))


def test_bits_per_byte_are_bits_and_gains_are_in_thousandths():
    """A text of n bytes at 3 bits per byte has a probability of 1 in 2 to the 3 n."""
    records = [
        {"task": "perplexity", "language": "es", "system": system, "seed": 0, "id": f"{size}",
         "bytes": size, "log_likelihood": -bits * size * math.log(2)}
        for system, bits in ((BASE, 3.0), (OTHER, 2.75))
        for size in (40, 200)
    ]  # fmt: skip
    [line] = summarise(records)
    assert (line.base, line.score) == pytest.approx((-3.0, -2.75))
    assert line.gain.mean == pytest.approx(250)
    assert line.gain.low <= 250 <= line.gain.high
    assert line.p is None


def test_languages_with_other_items_have_no_common_mean():
    """As many items, but not the same: a bootstrap would draw together what is not parallel."""
    same = [*gained("es", 8), *gained("sw", 6)]
    assert by_language(same)["mean of 2 languages"].gain.mean == pytest.approx(70)
    other = [*gained("es", 8), *gained("sw", 6, first=5)]
    assert set(by_language(other)) == {"es", "sw"}
    english = [*same, *gained("en", 0, first=5)]  # is not in the mean, so may have others
    assert by_language(english)["mean of 2 languages"].items == 10


def test_questions_on_one_text_count_as_one_draw_in_the_mean_too():
    """Six texts of four questions each, all of which change alike."""
    items = [f"text {i // 4}#{i % 4}" for i in range(24)]
    before = dict.fromkeys(items, 0.0)
    after = {item: float(i // 4 < 3) for i, item in enumerate(items)}
    records = [row for la in ("es", "sw") for row in rows("belebele", la, before, after)]
    found = by_language(records)
    apart = {item: item.replace("#", "/") for item in items}
    alone = by_language([{**row, "id": apart[row["id"]]} for row in records])
    for language in ("es", "mean of 2 languages"):
        wide, narrow = (one[language].gain for one in (found, alone))
        assert wide.mean == narrow.mean == 50
        assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    assert found["es"].p > 0.1 > 0.001 > alone["es"].p


def test_a_task_of_ones_own_needs_no_entry_in_the_table_of_tasks():
    [line] = summarise(rows("mine", "es", {"0": 0.0, "1": 1.0}, {"0": 1.0, "1": 1.0}))
    assert line.gain.mean == 50
