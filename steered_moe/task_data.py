"""Items of evaluation tasks, from the Hub or from a folder, with the prompts of lm-eval 0.4.13.

Prompts were compared with the task files in the wheel of lm-eval 0.4.13, word by word. Not seen:
the Hub's own rows, so that what is said here of their columns and order is from dataset cards.

A folder is laid out as ``mgsm/mgsm_{code}.tsv``, ``mgsm/exemplars_8shot.jsonl``,
``belebele/{flores}.jsonl``, ``mmlu_medicine/{flores}.jsonl``, ``mmlu_clinical/{flores}.jsonl``,
``xquad/{code}.contexts.jsonl``, ``xquad/{code}.questions.jsonl``,
``flores200/devtest/{flores}.txt`` and ``ntrex/{code}.txt``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

from steered_moe.corpora import KNOWN, HubDataset, hub_rows, read_texts
from steered_moe.errors import CorpusError
from steered_moe.task_languages import MGSM_WORDS, NTREX, XQUAD_WORDS, flores
from steered_moe.task_rows import embedded_corpus, embedded_draw, folder_rows

MEDICINE = (
    *("clinical_knowledge", "college_medicine", "human_aging", "medical_genetics", "nutrition"),
    *("professional_medicine", "virology"),
)
"""The subjects of Global-MMLU that arXiv 2510.04694 counts as medicine."""
LETTERS = "ABCD"
_CHOICES = tuple(f" {letter}" for letter in LETTERS)  # lm-eval's target_delimiter is a blank
REPEATING, REPEATS = "college_medicine/test", "clinical_knowledge/test"
_REPEATED = (
    "3:194 5:9 8:174 9:47 13:198 16:248 19:229 21:49 22:178 24:38 33:144 35:37 37:125 39:51 "
    "41:161 45:226 51:104 52:240 53:246 54:24 55:78 59:217 60:184 62:1 64:39 65:46 68:247 70:108 "
    "71:141 75:190 76:218 79:191 83:97 84:130 85:133 86:81 87:126 91:152 94:74 99:142 100:145 "
    "101:230 102:253 103:163 104:201 106:192 107:188 108:60 109:200 113:7 115:117 118:203 119:8 "
    "120:28 122:215 123:12 124:233 128:13 131:179 132:58 135:169 136:199 137:160 139:29 144:34 "
    "145:232 146:98 147:48 149:87 154:263 159:239 160:167 163:5 165:129 166:202 167:106 168:235 "
    "170:41 "
)
REPEATED = MappingProxyType(dict(pair.split(":") for pair in _REPEATED.split()))
"""Questions of the one subject of MMLU that stand in the other one, word for word: number there ->
number here. Found by comparing the texts."""
_MGSM_SHOTS = replace(KNOWN["mgsm"], split="train", files=None)
XQUAD = HubDataset("google/xquad", "xquad.{language}", "validation", licence="CC BY-SA 4.0")
_EMBEDDED_SEED = 1  # the problems that its card counts


@dataclass(frozen=True)
class Item:
    """One example.

    Args:
        id: The same for the same example in all languages. What stands before a "#" names the text
            that several examples are about.
        prompt: What the model reads, before any chat template.
        target: The right answer: a number; the index of the right choice; of XQuAD the answer's
            text, the only one that counts; or the text whose probability is measured.
        choices: Continuations whose log-likelihoods are compared.
    """

    id: str
    prompt: str
    target: str
    choices: tuple[str, ...] = ()


def about(name: str) -> str:
    """What an item is about, by its id: a text that it shares with others, or the question itself,
    which stands in two subjects of MMLU in some cases."""
    subject, _, number = name.rpartition("/")
    if subject == REPEATING and (same := REPEATED.get(number)):
        return f"{REPEATS}/{same}"
    return name.rpartition("#")[0] or name


def mgsm_stops(language: str) -> tuple[str, ...]:
    """What ends an answer: the word before the next question, and two marks of chats."""
    return (MGSM_WORDS[language][0].rstrip(), "</s>", "<|im_end|>")


def mgsm_direct(language: str, data: Path | None) -> list[Item]:
    """MGSM as lm-eval's mgsm_direct, 0-shot."""
    before, after, _, _ = MGSM_WORDS[language]
    return [
        Item(str(i), f"{before}{row['question']}\n{after}", _mgsm_number(row))
        for i, row in enumerate(_mgsm(language, data))
    ]


def mgsm_cot(language: str, data: Path | None) -> list[Item]:
    """MGSM as lm-eval's mgsm_native_cot with all 8 examples in the order of the data.

    lm-eval with ``--num_fewshot 8`` draws their order anew for each item, unless its task says
    ``fewshot_config: {sampler: first_n}``. As there, an example loses a fixed number of characters
    at its front; in ja and zh this is one too many, and in ru two blanks remain.
    """
    before, _, after, cut = MGSM_WORDS[language]
    shots = [
        f"{row['question']}\n{after} {row['answer'][cut:]}\n\n"
        for row in _mgsm_shots(language, data)
    ]
    shown = "".join(shots)
    return [
        Item(str(i), f"{shown}{before}{row['question']}\n{after}", _mgsm_number(row))
        for i, row in enumerate(_mgsm(language, data))
    ]


def medicine(language: str, data: Path | None) -> list[Item]:
    """The medical subjects as lm-eval's global_mmlu_full, 0-shot, the subjects taking turns.

    In turns, so that the first n items are of all subjects alike. A folder has fewer subjects in
    most languages, and its professional_medicine (282) is not Global-MMLU's (272).
    """
    by_subject: dict[str, list[Item]] = {subject: [] for subject in MEDICINE}
    for row in _medicine(language, data):
        if row["subject"] in by_subject and row.get("split", "test") == "test":
            by_subject[row["subject"]].append(_medicine_item(row))
    turns = chain.from_iterable(zip_longest(*by_subject.values()))
    return [item for item in turns if item is not None]


def belebele(language: str, data: Path | None) -> list[Item]:
    """Belebele as lm-eval's, 0-shot, in an order that follows no topic."""
    if data is None:
        rows = hub_rows(KNOWN["belebele"], flores(language))
    else:
        rows = folder_rows(data / "belebele" / "{language}.jsonl", flores(language))
    return _shuffled([_belebele_item(row) for row in rows])


def xquad(language: str, data: Path | None) -> list[Item]:
    """XQuAD as lm-eval's, 0-shot, in an order that follows no topic."""
    context, question, answer = XQUAD_WORDS[language]
    return _shuffled(
        [
            Item(
                f"{number}#{row['id']}",
                f"{context}: {text}\n\n{question}: {row['question']}\n\n{answer}:",
                row["answers"]["text"][0] if data is None else row["answer"],
            )
            for number, text, row in _xquad(language, data)
        ]
    )


def flores_text(language: str, data: Path | None) -> list[Item]:
    """Sentences of FLORES devtest.

    FLORES+ on the Hub has new codes for some languages; those are not known here, and it says which
    it has.
    """
    code = flores(language)
    if data is None:
        return _texts(read_texts("flores_plus", [code])[code])
    rows = folder_rows(data / "flores200" / "devtest" / "{language}.txt", code)
    return _texts([row["text"] for row in rows])


def ntrex_text(language: str, data: Path | None) -> list[Item]:
    """Sentences of NTREX."""
    if data is None:
        raise CorpusError("NTREX is read from a folder with ntrex in it; name it (--data)")
    rows = folder_rows(data / "ntrex" / "{language}.txt", NTREX[language])
    return _texts([row["text"] for row in rows])


def embedded_problems(
    language: str, part: str, count: int, seed: int = _EMBEDDED_SEED
) -> list[Item]:
    """Problems of the embedded model's corpus, of its own dev or test part.

    Args:
        language: One of the corpus.
        part: "dev" or "test".
        count: How many; fewer are the first of more.
        seed: Of the draw.

    Raises:
        CorpusError: The library was installed without the examples.
    """
    words = embedded_corpus().Language(language)
    return [
        Item(f"{part}/{seed}/{i}", problem.prompt(words).rstrip("\n"), str(problem.answer))
        for i, problem in enumerate(embedded_draw(part, count, seed))
    ]


def order(text: str) -> int:
    """A number that follows from the text alone, the same in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _shuffled(items: Sequence[Item]) -> list[Item]:
    return sorted(items, key=lambda item: order(item.id))


def _texts(rows: Sequence[str]) -> list[Item]:
    return [Item(str(i), "", text) for i, text in enumerate(rows)]


def _mgsm(language: str, data: Path | None) -> list[Any]:
    if data is None:
        return hub_rows(KNOWN["mgsm"], language)
    return folder_rows(data / "mgsm" / "mgsm_{language}.tsv", language, ("question", "answer"))


def _mgsm_number(row: Any) -> str:
    """The answer without commas; converted to tables, the Hub has it in another column."""
    return str(row.get("answer_number", row["answer"])).replace(",", "")


def _mgsm_shots(language: str, data: Path | None) -> list[Any]:
    if data is None:
        return hub_rows(_MGSM_SHOTS, language)
    rows = folder_rows(data / "mgsm" / "{language}.jsonl", "exemplars_8shot")
    return sorted((row for row in rows if row["lang"] == language), key=lambda row: row["shot"])


def _medicine(language: str, data: Path | None) -> list[Any]:
    if data is None:
        code = "fil" if language == "tl" else language
        return hub_rows(KNOWN["global_mmlu"], code)
    code = flores(language)
    folders = [data / name for name in ("mmlu_medicine", "mmlu_clinical")]
    holding = [folder for folder in folders if (folder / f"{code}.jsonl").is_file()]
    return folder_rows((holding or folders)[0] / "{language}.jsonl", code)


def _medicine_item(row: Any) -> Item:
    subject, number = row["subject"], row.get("sample_id")
    name = f"{subject}/test/{row['idx']}" if number is None else str(number)
    options = row.get("choices") or [row[f"option_{letter.lower()}"] for letter in LETTERS]
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True)]
    return Item(
        name if name.startswith(f"{subject}/") else f"{subject}/{name}",
        "\n".join([row["question"].strip(), *lines, "Answer:"]),
        str(LETTERS.index(row["answer"])),
        _CHOICES,
    )


def _belebele_item(row: Any) -> Item:
    texts = row.get("choices") or [row[f"mc_answer{i}"] for i in range(1, 5)]
    passage = row["passage"] if "passage" in row else row["flores_passage"]
    right = row["answer"] if "answer" in row else row["correct_answer_num"]
    lines = [f"{letter}: {text}" for letter, text in zip(LETTERS, texts, strict=True)]
    return Item(
        f"{row['link']}#{row['question_number']}",
        "\n".join([f"P: {passage}", f"Q: {row['question'].strip()}", *lines, "Answer:"]),
        str(int(right) - 1),
        _CHOICES,
    )


def _xquad(language: str, data: Path | None) -> Iterator[tuple[int, str, Any]]:
    """Number of the paragraph, its text, and the row of each question."""
    if data is None:
        numbers: dict[str, int] = {}
        for row in hub_rows(XQUAD, language):
            yield numbers.setdefault(row["context"], len(numbers)), row["context"], row
        return
    contexts = folder_rows(data / "xquad" / "{language}.contexts.jsonl", language)
    texts = {row["context_id"]: row["context"] for row in contexts}
    for row in folder_rows(data / "xquad" / "{language}.questions.jsonl", language):
        yield row["context_id"], texts[row["context_id"]], row
