"""Items and prompts: small folders against literal text, the Hub against folders, the real data."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DATA, real_data
from hub_server import HubServer
from test_corpora import card, jsonl, parquet, write

from steered_moe import embedded
from steered_moe.errors import CorpusError
from steered_moe.task_data import MEDICINE, REPEATED, Item, about, embedded_problems
from steered_moe.task_languages import FLORES, MGSM_WORDS, MMLU_CLINICAL, NTREX, flores, usual
from steered_moe.task_rows import embedded_corpus
from steered_moe.tasks import TASKS, part_of

SHOT = {"question": "Question: 1+1?", "answer": "Step-by-Step Answer: It is 2. The answer is 2."}
BELEBELE = [
    {"link": "https://b.org/#x", "question_number": 1, "passage": "P one.", "question": " Q one? ",
     "choices": ["a", "b", "c", "d"], "answer": 3},
    {"link": "https://b.org/#x", "question_number": 2, "passage": "P one.", "question": "Q two?",
     "choices": ["e", "f", "g", "h"], "answer": 1},
]  # fmt: skip
MMLU = [
    {"subject": subject, "split": "test", "idx": i, "question": f" {subject} {i}?\n",
     "choices": ["w", "x ", "y", "z"], "answer": "D"}
    for subject in (*MEDICINE, "anatomy") for i in range(2)
]  # fmt: skip
MMLU.append(MMLU[0] | {"split": "dev", "idx": 9})
CONTEXTS = [{"context_id": 0, "context": "\ufeffC zero."}, {"context_id": 1, "context": "C one."}]
QUESTIONS = [{"id": f"q{i}", "context_id": i // 2, "question": f"Q{i}?", "answer": f"A{i}"}
             for i in range(3)]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a little of each benchmark, in English."""
    shots = [{"lang": "en", "shot": n, **SHOT} for n in (2, 1)]
    shots[0] = shots[0] | {"question": "Question: second?"}
    return write(
        tmp_path / "data",
        {
            "mgsm/mgsm_en.tsv": 'How "many"?\t18\nAnd now?\t2,125\n',
            "mgsm/exemplars_8shot.jsonl": jsonl([{"lang": "de", "shot": 1}, *shots]),
            "belebele/eng_Latn.jsonl": jsonl(BELEBELE),
            "mmlu_medicine/eng_Latn.jsonl": jsonl(MMLU),
            "xquad/en.contexts.jsonl": jsonl(CONTEXTS),
            "xquad/en.questions.jsonl": jsonl(QUESTIONS),
            "flores200/devtest/eng_Latn.txt": "One.\nTwo – 2.\n",
            "ntrex/eng-US.txt": "News.\n",
        },
    )


def items(name: str, language: str = "en", data: Path | None = None, **options: Any) -> list[Item]:
    return TASKS[name].items(language, data, part="all", **options)


# Prompts, letter by letter


STEPS = "\nStep-by-Step Answer:"
LITERAL = {
    "mgsm_direct": [
        Item("0", 'Question: How "many"?\nAnswer:', "18"),
        Item("1", "Question: And now?\nAnswer:", "2125"),
    ],
    "mgsm_cot": [
        Item(str(i), f"Question: 1+1?{STEPS} It is 2. The answer is 2.\n\n"
                     f"Question: second?{STEPS} It is 2. The answer is 2.\n\n"
                     f"Question: {question}{STEPS}", target)
        for i, (question, target) in enumerate([('How "many"?', "18"), ("And now?", "2125")])
    ],
    "belebele": [
        Item("https://b.org/#x#1", "P: P one.\nQ: Q one?\nA: a\nB: b\nC: c\nD: d\nAnswer:", "2",
             (" A", " B", " C", " D")),
        Item("https://b.org/#x#2", "P: P one.\nQ: Q two?\nA: e\nB: f\nC: g\nD: h\nAnswer:", "0",
             (" A", " B", " C", " D")),
    ],
    "global_mmlu_medicine": [
        Item(f"{subject}/test/{i}", f"{subject} {i}?\nA. w\nB. x \nC. y\nD. z\nAnswer:", "3",
             (" A", " B", " C", " D"))
        for i in range(2) for subject in MEDICINE
    ],
    "xquad": [
        Item("0#q0", "Context: \ufeffC zero.\n\nQuestion: Q0?\n\nAnswer:", "A0"),
        Item("0#q1", "Context: \ufeffC zero.\n\nQuestion: Q1?\n\nAnswer:", "A1"),
        Item("1#q2", "Context: C one.\n\nQuestion: Q2?\n\nAnswer:", "A2"),
    ],
    "perplexity": [Item("0", "", "One."), Item("1", "", "Two – 2.")],
    "perplexity_ntrex": [Item("0", "", "News.")],
}  # fmt: skip
SHUFFLED = ("belebele", "xquad")


def in_order(name: str, found: list[Item]) -> list[Item]:
    return sorted(found, key=lambda item: item.id) if name in SHUFFLED else found


@pytest.mark.parametrize("name", LITERAL)
def test_prompts(name: str, folder: Path) -> None:
    assert in_order(name, items(name, data=folder)) == LITERAL[name]


WORDS = {  # language: mgsm_direct, what steps begin with, what stops; for a question "7?"
    "bn": ("প্রশ্ন: 7?\nAnswer:", "ধাপে ধাপে উত্তর:", "প্রশ্ন:"),
    "de": ("Frage: 7?\nAntwort:", "Schritt-für-Schritt-Antwort:", "Frage:"),
    "en": ("Question: 7?\nAnswer:", "Step-by-Step Answer:", "Question:"),
    "es": ("Pregunta: 7?\nRespuesta:", "Respuesta paso a paso:", "Pregunta:"),
    "fr": ("Question : 7?\nRéponse :", "Réponse étape par étape :", "Question :"),
    "ja": ("問題： 7?\nAnswer:", "ステップごとの答え:", "問題："),
    "ru": ("Задача: 7?\nAnswer:", "Пошаговоерешение:", "Задача:"),
    "sw": ("Swali: 7?\nAnswer:", "Jibu la Hatua kwa Hatua:", "Swali:"),
    "te": ("ప్రశ్న: 7?\nAnswer:", "దశలవారీగా సమాధానం:", "ప్రశ్న:"),
    "th": ("โจทย์: 7?\nAnswer:", "คำตอบทีละขั้นตอน:", "โจทย์:"),
    "zh": ("问题： 7?\nAnswer:", "逐步解答:", "问题："),
}


@pytest.mark.parametrize("language", WORDS)
def test_words_of_mgsm(language: str, tmp_path: Path) -> None:
    direct, steps, stop = WORDS[language]
    shot = {"lang": language, "shot": 1, "question": "q", "answer": "x" * 30}
    data = write(tmp_path, {f"mgsm/mgsm_{language}.tsv": "7?\t7\n"})
    write(data, {"mgsm/exemplars_8shot.jsonl": jsonl([shot])})
    assert items("mgsm_direct", language, data)[0].prompt == direct
    question = direct.partition("\n")[0]
    rest = "x" * (30 - MGSM_WORDS[language][3])
    prompt = f"q\n{steps} {rest}\n\n{question}\n{steps}"
    assert items("mgsm_cot", language, data)[0].prompt == prompt
    for name in ("mgsm_direct", "mgsm_cot"):
        assert TASKS[name].stops(language) == (stop, "</s>", "<|im_end|>")


XQUAD = {
    "ar": "سيا: c\n\nسؤال: q\n\nإجابة:",
    "de": "Kontext: c\n\nFrage: q\n\nAntwort:",
    "el": "Συμφραζόμενα: c\n\nΕρώτηση: q\n\nΑπάντηση:",
    "en": "Context: c\n\nQuestion: q\n\nAnswer:",
    "es": "Contexto: c\n\nPregunta: q\n\nRespuesta:",
    "hi": "प्रसंग: c\n\nसवाल: q\n\nउत्तर:",
    "ro": "Context: c\n\nÎntrebare: q\n\nRăspuns:",
    "ru": "Контекст: c\n\nВопрос: q\n\nОтвет:",
    "th": "บริบท: c\n\nคำถาม: q\n\nคำตอบ:",
    "tr": "Bağlam: c\n\nSoru: q\n\nCevap:",
    "vi": "Bối cảnh: c\n\nCâu hỏi: q\n\nTrả lời:",
    "zh": "语境: c\n\n问题: q\n\n回答:",
}


@pytest.mark.parametrize("language", XQUAD)
def test_words_of_xquad(language: str, tmp_path: Path) -> None:
    row = {"id": "i", "context_id": 0, "question": "q", "answer": "a"}
    write(
        tmp_path, {f"xquad/{language}.contexts.jsonl": jsonl([{"context_id": 0, "context": "c"}])}
    )
    write(tmp_path, {f"xquad/{language}.questions.jsonl": jsonl([row])})
    assert items("xquad", language, tmp_path)[0].prompt == XQUAD[language]
    assert TASKS["xquad"].stops(language) == ("\n",)


# The Hub


def served(name: str) -> tuple[str, dict[str, bytes]]:
    """A dataset as the Hub has it, with the rows of `folder`; question_number is a number there."""
    if name.startswith("mgsm"):
        rows: list[dict[str, Any]] = [
            {"question": question, "answer": None, "answer_number": number}
            for question, number in [('How "many"?', 18), ("And now?", 2125)]
        ]
        shots = [{**SHOT, "question": q, "answer_number": 2}
                 for q in ("Question: 1+1?", "Question: second?")]  # fmt: skip
        return "juletxara/mgsm", tables("en", train=shots, test=rows)
    if name == "belebele":
        rows = [
            {"link": row["link"], "question_number": row["question_number"],
             "flores_passage": row["passage"], "question": row["question"],
             **{f"mc_answer{i + 1}": text for i, text in enumerate(row["choices"])},
             "correct_answer_num": str(row["answer"])}
            for row in BELEBELE[::-1]  # each language may have its own order
        ]  # fmt: skip
        return "facebook/belebele", tables("eng_Latn", test=rows)
    if name == "global_mmlu_medicine":
        rows = [
            {"sample_id": f"{row['subject']}/test/{row['idx']}", "subject": row["subject"],
             "question": row["question"], "answer": row["answer"],
             **{f"option_{x}": text for x, text in zip("abcd", row["choices"], strict=True)}}
            for row in MMLU if row["split"] == "test"
        ]  # fmt: skip
        return "CohereLabs/Global-MMLU", tables("en", test=rows)
    if name == "xquad":
        rows = [
            {"id": row["id"], "context": CONTEXTS[row["context_id"]]["context"],
             "question": row["question"], "answers": {"text": [row["answer"]], "answer_start": [0]}}
            for row in QUESTIONS
        ]  # fmt: skip
        return "google/xquad", tables("xquad.en", validation=rows)
    rows = [{"text": item.target} for item in LITERAL["perplexity"]]
    return "openlanguagedata/flores_plus", tables("eng_Latn", devtest=rows)


def tables(config: str, **splits: list[dict[str, Any]]) -> dict[str, bytes]:
    paths = {split: f"{config}/{split}-*" for split in splits}
    files = {f"{config}/{s}-00000-of-00001.parquet": parquet(rows) for s, rows in splits.items()}
    return {"README.md": card({config: paths}), **files}


@pytest.fixture
def server(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub without datasets, and a cache of its own, on which ``datasets`` would fall back."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield hub
    for name in [name for name in hub.repos if name.startswith("datasets/")]:
        del hub.repos[name]


@pytest.mark.parametrize("name", [name for name in LITERAL if name != "perplexity_ntrex"])
def test_the_hub_gives_the_same_items(name: str, server: HubServer, folder: Path) -> None:
    repo, files = served(name)
    assert TASKS[name].dataset == repo
    with pytest.raises(CorpusError, match=f"shows no dataset {repo}"):
        items(name)
    server.commit(f"datasets/{repo}", files)
    assert in_order(name, items(name)) == LITERAL[name]
    assert items(name) == items(name, data=folder)  # and in one order
    other = next(code for code in TASKS[name].languages if code not in ("en", "af"))
    with pytest.raises(CorpusError, match=r"has no .*; it has "):
        items(name, other)


def test_mgsm_from_the_hub_as_it_was_with_its_script(server: HubServer) -> None:
    files = {"README.md": b"# MGSM", "mgsm.py": b"raise SystemExit"}
    tsv = {"mgsm_en.tsv": b'How "many"?\t18\nAnd now?\t2,125\n'}
    server.commit("datasets/juletxara/mgsm", files | tsv)
    assert items("mgsm_direct") == LITERAL["mgsm_direct"]
    with pytest.raises(CorpusError, match=r"mgsm cannot be read: .*scripts"):
        items("mgsm_cot")


def test_a_column_that_is_missing_on_the_hub(server: HubServer) -> None:
    repo, files = served("xquad")
    row = {"id": "q", "context": "c", "question": "q"}
    server.commit(f"datasets/{repo}", files | tables("xquad.en", validation=[row]))
    with pytest.raises(CorpusError, match="xquad in en: a row without 'answers'"):
        items("xquad")
    server.commit(f"datasets/{repo}", files)
    assert items("xquad")


# The real data


COUNTS = {
    "mgsm_direct": (dict.fromkeys(MGSM_WORDS, 250), 50),
    "mgsm_cot": (dict.fromkeys(MGSM_WORDS, 250), 50),
    "belebele": (dict.fromkeys(["en", "de", *MMLU_CLINICAL], 900), 177),
    "xquad": (dict.fromkeys(XQUAD, 1190), 266),
    "perplexity": (dict.fromkeys(["en", "sw", "bn", "min_Arab", "min_Latn", "zh"], 1012), 200),
    "perplexity_ntrex": (dict.fromkeys(NTREX, 1997), 393),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_counts_and_parallel_ids(name: str) -> None:
    real_data({"mgsm": "mgsm", "perp": "ntrex" if "ntrex" in name else "flores200"}.get(
        name[:4], name))  # fmt: skip
    counts, dev = COUNTS[name]
    found = {code: items(name, code, DATA) for code in counts}
    assert {code: len(rows) for code, rows in found.items()} == counts
    ids = [[item.id for item in rows] for rows in found.values()]
    assert all(one == ids[0] for one in ids)
    assert len(set(ids[0])) == len(ids[0])
    assert len({item.prompt + item.target for item in found["en"]}) > 0.99 * len(ids[0])
    for code in list(counts)[:3]:
        assert len(TASKS[name].items(code, DATA, part="dev")) == dev
        assert len(TASKS[name].items(code, DATA)) == counts[code] - dev


def test_real_targets_are_parallel() -> None:
    real_data("mgsm")
    for name in ("mgsm_direct", "mgsm_cot"):
        targets = [[item.target for item in items(name, code, DATA)] for code in MGSM_WORDS]
        assert all(one == targets[0] for one in targets)
        assert all(text.isdigit() for text in targets[0])
    choices = [[i.target for i in items("belebele", code, DATA)] for code in ("en", "zu", "am")]
    assert choices[0] == choices[1] == choices[2]
    assert Counter(choices[0]) == {"0": 206, "1": 251, "2": 246, "3": 197}


def test_real_examples_of_mgsm() -> None:
    """Eight, each with its steps; in ja and zh a character is cut too many, as by lm-eval."""
    real_data("mgsm")
    for code, (before, _, steps, _) in MGSM_WORDS.items():
        parts = items("mgsm_cot", code, DATA)[0].prompt.split("\n\n")
        assert len(parts) == 9
        assert all(f"\n{steps} " in part for part in parts[:8])
        assert parts[8].endswith(f"\n{steps}")
        assert all(part.startswith(before.rstrip()) for part in parts)
    first = {code: items("mgsm_cot", code, DATA)[0].prompt.split(MGSM_WORDS[code][2])[1]
             for code in ("en", "ja", "ru", "zh")}  # fmt: skip
    assert first["en"].startswith(" Roger started with 5 balls.")
    assert first["ja"].startswith(" ジャーは最初")
    assert first["ru"].startswith("  в начале")
    assert first["zh"].startswith(" 杰一开始")


def test_real_medicine() -> None:
    real_data("mmlu_medicine")
    real_data("mmlu_clinical")
    found = {code: items("global_mmlu_medicine", code, DATA) for code in ("en", "hi", "am", "zu")}
    subjects = {
        code: Counter(item.id.partition("/")[0] for item in rows) for code, rows in found.items()
    }
    three = {"clinical_knowledge": 265, "college_medicine": 173}
    assert subjects["hi"] == three | {"medical_genetics": 100}
    assert subjects["am"] == subjects["zu"] == three | {"virology": 166}
    assert subjects["en"] == three | {
        "medical_genetics": 100, "virology": 166, "human_aging": 223, "nutrition": 306,
        "professional_medicine": 282,
    }  # fmt: skip
    english = {item.id: item.target for item in found["en"]}
    for rows in found.values():
        assert all(english[item.id] == item.target for item in rows)
    some = items("global_mmlu_medicine", "en", DATA, limit=420)
    assert set(Counter(item.id.partition("/")[0] for item in some).values()) == {60}


# Languages


def test_codes() -> None:
    assert (usual("swh_Latn"), usual("fil"), usual("zho_Hans"), usual("zho_Hant")) == (
        "sw", "tl", "zh", "zho_Hant",
    )  # fmt: skip
    assert (flores("sw"), flores("fil"), flores("swh_Latn"), flores("min_Arab")) == (
        "swh_Latn", "tgl_Latn", "swh_Latn", "min_Arab",
    )  # fmt: skip
    assert len(set(FLORES.values())) == len(FLORES)
    assert (len(TASKS["belebele"].languages), len(TASKS["perplexity"].languages)) == (122, 204)
    for task in TASKS.values():
        assert len(set(task.languages)) == len(task.languages)
        assert all(task.code(code) == code for code in task.languages)


def test_real_folders_hold_known_languages() -> None:
    for folder, name in (("belebele", "belebele"), ("flores200/devtest", "perplexity")):
        there = {
            path.stem for path in real_data(folder).iterdir() if path.suffix in (".jsonl", ".txt")
        }
        assert there
        assert all(TASKS[name].code(code) for code in there - {"LICENSE_CC-BY-SA4.0"})
    ntrex = {path.stem for path in real_data("ntrex").glob("*.txt")}
    assert ntrex == set(NTREX.values())


# The embedded model's problems


def test_embedded_problems_are_those_of_its_corpus() -> None:
    import corpus

    drawn = list(corpus.problems("test", 40, 1))
    for code in TASKS["embedded"].languages:
        words = corpus.Language(code)
        assert [(i.prompt + "\n", i.target) for i in embedded_problems(code, "test", 40)] == [
            (problem.prompt(words), str(problem.answer)) for problem in drawn
        ]
    assert list(TASKS["embedded"].languages) == sorted(corpus.codes())
    assert embedded_problems("sw", "test", 5) == embedded_problems("sw", "test", 40)[:5]
    assert embedded_problems("sw", "test", 5, seed=2) != embedded_problems("sw", "test", 5)


def test_importing_the_corpus_leaves_other_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own modules may be called rows and grammar, too."""
    mine = object()
    monkeypatch.setitem(sys.modules, "rows", mine)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "grammar", raising=False)
    embedded_corpus.cache_clear()
    before = list(sys.path)
    assert embedded_corpus().problems
    assert sys.modules["rows"] is mine
    assert "grammar" not in sys.modules
    assert sys.path == before


def test_a_wheel_has_no_embedded_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    embedded_corpus.cache_clear()
    with pytest.raises(CorpusError, match="checkout of steered-moe"):
        items("embedded", "sw", limit=1)
    monkeypatch.undo()
    assert items("embedded", "sw", limit=1)


def test_a_damaged_file_is_named(folder: Path) -> None:
    file = folder / "mgsm" / "mgsm_en.tsv"
    file.write_text("only a question\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"mgsm_en\.tsv, line 1 has 1 columns, not 2"):
        items("mgsm_direct", data=folder)
    lines = folder / "belebele" / "eng_Latn.jsonl"
    row = {key: value for key, value in BELEBELE[0].items() if key != "passage"}
    lines.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(CorpusError, match="belebele in en: a row without 'flores_passage'"):
        items("belebele", data=folder)


def test_questions_of_two_subjects_are_one_and_the_same():
    """MMLU has 78 questions in two of its medical subjects; both are in one part, and one draw."""
    folder = real_data("mmlu_medicine").parent
    items = TASKS["global_mmlu_medicine"].items("en", folder, part="all")
    by_text: dict[str, set[str]] = {}
    for item in items:
        by_text.setdefault(item.prompt, set()).add(about(item.id))
    assert all(len(names) == 1 for names in by_text.values())
    assert len(items) - len(by_text) == len(REPEATED) == 78
    assert len({about(item.id) for item in items}) == len(by_text)  # and nothing else is
    dev, test = (
        {item.prompt for item in items if part_of(item.id) == part} for part in ("dev", "test")
    )
    assert not dev & test
    assert about("passage 7#1") == about("passage 7#2") == "passage 7"
    assert about("0") == "0"
