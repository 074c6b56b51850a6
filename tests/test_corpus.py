"""The embedded model's corpus: row-parallel, complete in every language, right answers."""

from __future__ import annotations

import re
import unicodedata

import pytest
import torch
from corpus import Mixture, documents, problems, sentences
from grammar import Language, codes, plural_category
from packing import PackedRows, pack
from rows import WEEKDAYS, Sentence, draw_slots
from tokenizer import build_tokenizer

ENGLISH = Language("en")
LANGUAGES = [Language(code) for code in codes()]


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))


def scripts(text: str) -> set[str]:
    return {unicodedata.name(c).split()[0] for c in text if c.isalpha()}


def test_twelve_languages_of_seven_scripts():
    assert len(LANGUAGES) == 12
    rows = list(problems("train", 200, 0))
    found = set()
    for language in LANGUAGES:
        text = " ".join(language.task(row.parts, row.slots) for row in rows)
        used = {s: sum(s in unicodedata.name(c, "") for c in text) for s in scripts(text)}
        found.add(max(used, key=used.get))
    assert {"LATIN", "CYRILLIC", "BENGALI", "DEVANAGARI", "CJK", "HIRAGANA", "THAI"} <= found


@pytest.mark.parametrize("language", LANGUAGES, ids=codes())
def test_every_row_is_there_with_the_same_numbers(language: Language):
    for section in ("words", "task", "general", "quiz"):
        assert set(language.data[section]) == set(ENGLISH.data[section])
    for row in problems("train", 3000, 1):
        text = language.task(row.parts, row.slots)
        assert "{" not in text
        assert numbers(text) == numbers(ENGLISH.task(row.parts, row.slots))
    for row in sentences("train", 3000, 2):
        text = row.text(language)
        assert "{" not in text
        assert text.strip() == text


@pytest.mark.parametrize("language", LANGUAGES[1:], ids=codes()[1:])
def test_rows_are_translated(language: Language):
    """Twin of the test above: the texts themselves are not the English ones."""
    rows = list(problems("train", 300, 1))
    same = sum(
        language.task(row.parts, row.slots) == ENGLISH.task(row.parts, row.slots) for row in rows
    )
    assert same == 0


def test_steps_and_answers_follow_from_the_text():
    counts = {1: 0, 2: 0, 3: 0}
    for row in problems("train", 3000, 3):
        for step in row.steps:
            calculation, result = step.split("=")
            assert eval(calculation) == int(result)
        assert row.answer == int(row.steps[-1].split("=")[1])
        used = {n for step in row.steps for n in numbers(step.split("=")[0])}
        known = set(numbers(ENGLISH.task(row.parts, row.slots)))
        results = {step.split("=")[1] for step in row.steps}
        assert used <= known | results | {"2"}  # half is by 2
        counts[len(row.steps)] += 1
    assert min(counts.values()) > 200


def test_parts_never_share_a_problem():
    parts = {p: {r.key for r in problems(p, 4000, 5)} for p in ("train", "dev", "test")}
    assert not parts["train"] & parts["test"]
    assert not parts["train"] & parts["dev"]
    assert not parts["dev"] & parts["test"]
    again = {r.key for r in problems("train", 4000, 6)}
    assert again & parts["train"]  # the check can fail: within a part, problems do repeat
    texts = {p: {r.text(ENGLISH) for r in sentences(p, 2000, 0)} for p in ("train", "dev", "test")}
    assert not texts["train"] & (texts["test"] | texts["dev"])


def test_names_and_things_do_not_make_another_problem():
    row = next(problems("train", 1, 0))
    other = [{**slots, "a": "anna", "obj": "book"} for slots in row.slots]
    assert type(row)(row.parts, other, row.steps, row.answer).key == row.key
    more = [{k: v + 1 if isinstance(v, int) else v for k, v in s.items()} for s in row.slots]
    assert type(row)(row.parts, more, row.steps, row.answer).key != row.key


def test_agreement_by_number_and_gender():
    assert [plural_category("east_slavic", n) for n in (1, 2, 5, 11, 21, 22, 25)] == [
        *("one", "few", "many", "many", "one", "few", "many")
    ]
    assert [plural_category("one_many", n) for n in (1, 2, 21)] == ["one", "many", "many"]
    russian = Language("ru")
    forms = {russian.fill("{page.acc:n}", {"n": n}) for n in (21, 22, 25)}
    assert len(forms) == 3
    assert russian.fill("{a|f=она|m=он}", {"a": "anna"}) == "она"
    assert russian.fill("{a|f=она|m=он}", {"a": "tom"}) == "он"
    with pytest.raises(KeyError):
        russian.fill("{nothing}", {})


def test_a_swahili_hour_is_counted_from_dawn():
    import random

    slots = draw_slots(random.Random(0)) | {"h": 9, "dawn": 3}
    assert "3" in Sentence("clock", slots).text(Language("sw"))
    assert "9" in Sentence("clock", slots).text(ENGLISH)
    drawn = [draw_slots(random.Random(i)) for i in range(50)]
    assert all((s["h"] - s["dawn"]) % 12 == 6 for s in drawn)
    assert all(WEEKDAYS.index(s["next"]) == (WEEKDAYS.index(s["weekday"]) + 1) % 7 for s in drawn)


def test_english_has_most_of_the_task_and_others_have_general_text():
    mixture = Mixture({"en": 300, "de": 20}, general=100, languages=["en", "de"])
    texts = documents(mixture, seed=0)
    asked = [text for text in texts if re.search(r"=\d+$", text)]
    assert sum("How " in t for t in asked) == 300
    assert sum("Wie " in t for t in asked) == 20
    assert len(texts) == 300 + 20 + 200
    assert texts == documents(mixture, seed=0)
    assert texts != documents(mixture, seed=1)


def test_packing_keeps_documents_whole_and_apart():
    texts = documents(Mixture({"en": 80}, general=80, languages=["en"]), seed=0)
    tokenizer = build_tokenizer(texts, 400)
    rows = PackedRows(texts, tokenizer, 256)
    assert rows.tokens == sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
    row = rows[0]
    starts = (row["position_ids"] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    assert (row["input_ids"][starts[:-1]] == tokenizer.bos_token_id).all()
    assert (row["labels"][starts] == -100).all()
    kept = row["labels"] != -100
    assert torch.equal(row["labels"][kept], row["input_ids"][kept])
    packed = pack([[1] * n for n in (60, 70, 60, 200, 50)], 128)
    assert all(sum(map(len, row)) <= 128 for row in packed)
    assert sum(len(row) for row in packed) == 4  # the one of 200 does not fit
