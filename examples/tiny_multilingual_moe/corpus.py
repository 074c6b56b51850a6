"""Documents of the corpus, and which problems belong to training, dev and test.

A problem's part of the corpus follows from its templates and numbers alone, so a problem with
other names or objects, or in another language, is in the same part.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from grammar import Language, codes
from rows import Problem, Sentence, draw_lookup, draw_problem, draw_sentence

SHARES = {"train": range(2, 10), "dev": range(1, 2), "test": range(0, 1)}  # of key modulo 10
PARALLEL = 0.5  # of translations: the share that has English first


@dataclass(frozen=True)
class Mixture:
    """How many documents of which kind and language training sees in one epoch.

    ``task`` counts problems per language, ``general`` general rows in every language,
    ``translations`` pairs of a row in English and the same row in each other language, ``sums``
    documents of three sums without words, ``lookups`` questions in every language whose answer
    stands in the text.
    """

    task: dict[str, int]
    general: int
    translations: int = 0
    general_english: int = 0  # more general rows in English
    sums: int = 0
    lookups: int = 0
    languages: list[str] = field(default_factory=codes)


def problems(part: str, count: int, seed: int) -> Iterator[Problem]:
    """``count`` problems of one part of the corpus."""
    random_state = random.Random(f"{part} {seed}")
    while count:
        problem = draw_problem(random_state)
        if problem.key % 10 in SHARES[part]:
            count -= 1
            yield problem


def lookups(count: int, seed: int) -> Iterator[Problem]:
    """Questions whose answer stands in the text."""
    random_state = random.Random(f"lookups {seed}")
    return (draw_lookup(random_state) for _ in range(count))


def sentences(part: str, count: int, seed: int) -> Iterator[Sentence]:
    """``count`` rows of general text of one part; what has no slot is in the training part."""
    random_state = random.Random(f"general {part} {seed}")
    english = Language("en")
    while count:
        row = draw_sentence(random_state, english)
        key = int.from_bytes(hashlib.sha256(row.text(english).encode()).digest()[:4], "big")
        if key % 10 in SHARES[part] if row.is_open(english) else part == "train":
            count -= 1
            yield row


def documents(mixture: Mixture, seed: int) -> list[str]:
    """Every training document of one epoch, in random order."""
    texts: list[str] = []
    for number, code in enumerate(mixture.languages):
        language = Language(code)
        drawn = problems("train", mixture.task.get(code, 0), seed * 100 + number)
        texts += [problem.prompt(language) + problem.solution for problem in drawn]
        rows = sentences("train", mixture.general, seed)
        texts += [row.text(language) for row in rows]
        looked_up = lookups(mixture.lookups, seed)
        texts += [problem.prompt(language) + problem.solution for problem in looked_up]
        if code == "en":
            rows = sentences("train", mixture.general_english, seed + 1000)
            texts += [row.text(language) for row in rows]
        else:
            texts += _translations(language, mixture.translations, seed * 100 + number)
    texts += _sums(mixture.sums, seed)
    random.Random(seed).shuffle(texts)
    return texts


def _sums(count: int, seed: int) -> Iterator[str]:
    rows = problems("train", 2 * count, seed + 3000)
    for first, second in zip(rows, rows, strict=True):
        yield ", ".join([*first.steps, *second.steps][:3])


def _translations(language: Language, count: int, seed: int) -> Iterator[str]:
    random_state = random.Random(seed)
    english = Language("en")
    for row in sentences("train", count, seed + 2000):
        pair = [row.text(english), row.text(language)]
        yield "\n".join(pair if random_state.random() < PARALLEL else pair[::-1])
