"""Parallel texts from files and from datasets on a Hub server; each refusal next to what works."""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import real_data
from hub_server import HubServer

from steered_moe import corpora
from steered_moe.corpora import KNOWN, check_parallel, read_texts
from steered_moe.errors import CorpusError, SteeredMoEError

LANGUAGES = ("arb_Arab", "arb_Latn", "eng_Latn")


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return folder


def jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def card(configs: Mapping[str, Mapping[str, str]]) -> bytes:
    """A dataset card: config -> split -> path."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", "# A dataset"]).encode()


@pytest.fixture
def server(hub: HubServer) -> Iterator[HubServer]:
    yield hub
    hub.gated.clear()
    for name in [name for name in hub.repos if name.startswith("datasets/")]:
        del hub.repos[name]


@pytest.fixture
def flores(server: HubServer) -> HubServer:
    server.commit("datasets/openlanguagedata/flores_plus", flores_files("old"))
    return server


def flores_files(word: str) -> dict[str, bytes]:
    """As in the real repo: one file per split and language, and a config "default" of them all."""
    paths = {config: config for config in LANGUAGES} | {"default": "*"}
    files = {
        "README.md": card(
            {c: {s: f"{s}/{p}.parquet" for s in ("dev", "devtest")} for c, p in paths.items()}
        )
    }
    for language in LANGUAGES:
        for split in ("dev", "devtest"):
            rows = [{"id": i, "text": f"{word} {language} {split} {i}"} for i in range(3)]
            files[f"{split}/{language}.parquet"] = parquet(rows)
    return files


# Local files


def test_pattern_reads_every_language_that_fits(tmp_path: Path) -> None:
    files = {f"devtest/{language}.txt": f"{language} 1\n{language} 2\n" for language in LANGUAGES}
    write(tmp_path, files | {"devtest/notes.md": "no", "dev/fra_Latn.txt": "no", ".x.txt": "no"})
    texts = read_texts(tmp_path / "devtest" / "{language}.txt")
    assert list(texts) == list(LANGUAGES)
    assert texts["arb_Arab"] == ["arb_Arab 1", "arb_Arab 2"]
    assert texts["arb_Latn"] == ["arb_Latn 1", "arb_Latn 2"]
    some = read_texts(f"{tmp_path}/devtest/{{language}}.txt", ["eng_Latn", "arb_Arab"])
    assert list(some) == ["eng_Latn", "arb_Arab"]
    assert read_texts(f"{tmp_path}/devtest/{{language}}.txt", "eng_Latn") == {
        "eng_Latn": texts["eng_Latn"]
    }


def test_folder_reads_the_three_kinds(tmp_path: Path) -> None:
    lines = {"text": "eins", "id": 1}, {"text": "zwei", "id": 2}
    write(
        tmp_path, {"en.txt": "one\ntwo\n", "fr.tsv": "un\t1\ndeux\t2\n", "de.jsonl": jsonl(lines)}
    )
    write(tmp_path, {"README.md": "not a text", ".hidden.txt": "no"})
    expected = {"de": ["eins", "zwei"], "en": ["one", "two"], "fr": ["un", "deux"]}
    assert read_texts(tmp_path) == expected
    assert list(read_texts(tmp_path)) == sorted(expected)
    write(tmp_path, {"en.tsv": "one\ntwo\n"})
    with pytest.raises(CorpusError, match=r"en has two files: .*en\.txt and .*en\.tsv"):
        read_texts(tmp_path)


def test_the_language_may_be_anywhere_in_the_path(tmp_path: Path) -> None:
    odd = tmp_path / "odd [1]*"
    files = {f"{code}/[x]{code}.txt": code for code in ("en", "de")}
    write(odd, files | {"en/[x]de.txt": "wrong", "fr/xfr.txt": "wrong"})
    expected = {"de": ["de"], "en": ["en"]}
    assert read_texts(odd / "{language}" / "[x]{language}.txt") == expected


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"mgsm/en.txt": "here\n"})
    monkeypatch.chdir(tmp_path)
    for source in ("mgsm", "./mgsm/{language}.txt", "mgsm/../mgsm/{language}.txt"):
        assert read_texts(source) == {"en": ["here"]}  # a folder here goes before a known name


def test_a_row_ends_where_its_line_ends_and_nowhere_else(tmp_path: Path) -> None:
    content = "\ufeff one \u2028 still one\x0c\r\ntwo\x85 two\t\r\nthree"
    write(tmp_path, {"en.txt": content})
    assert read_texts(tmp_path)["en"] == [" one \u2028 still one\x0c", "two\x85 two\t", "three"]


def test_columns(tmp_path: Path) -> None:
    write(tmp_path, {"tsv/en.tsv": "q1\ta1\tx\nq2\ta2\ty\n"})
    write(tmp_path, {"json/en.jsonl": jsonl([{"q": "q1", "a": "a1\n"}, {"q": "q2", "a": "a2"}])})
    write(tmp_path, {"crlf/en.tsv": "q1\ta1\r\nq2\ta2\r\n"})
    write(tmp_path, {"one/en.jsonl": jsonl([{"sentence": "only"}])})
    cases: list[tuple[str, Any, list[str]]] = [
        ("tsv", None, ["q1", "q2"]),
        ("tsv", 1, ["a1", "a2"]),
        ("tsv", "1", ["a1", "a2"]),
        ("tsv", [2, 0], ["x\nq1", "y\nq2"]),
        ("crlf", [1, 0], ["a1\nq1", "a2\nq2"]),
        ("json", "q", ["q1", "q2"]),
        ("json", ["q", "a"], ["q1\na1", "q2\na2"]),
        ("one", None, ["only"]),
    ]
    for folder, columns, rows in cases:
        assert read_texts(tmp_path / folder, columns=columns) == {"en": rows}
    write(tmp_path, {"txt/en.txt": "a\n"})
    with pytest.raises(CorpusError, match="line 1 has no column 1; it has text"):
        read_texts(tmp_path / "txt", columns=1)


def test_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    write(tmp_path, {"en.txt": "a\nb\nc\n", "de.txt": "d\ne\nf\n"})
    assert read_texts(tmp_path, limit=2) == {"de": ["d", "e"], "en": ["a", "b"]}
    assert read_texts(tmp_path, limit=9) == read_texts(tmp_path)
    with pytest.raises(CorpusError, match="a limit of 0"):
        read_texts(tmp_path, limit=0)
    write(tmp_path, {"de.txt": "d\ne\nf\ng\n"})
    with pytest.raises(CorpusError, match="4 in de, 3 in en"):
        read_texts(tmp_path, limit=2)


TWO = '{"text": "a"}\n{"text": "b"}\n'
REFUSED: dict[str, tuple[str, str | bytes, str | bytes, dict[str, Any], str]] = {
    "empty file": ("en.txt", "", "a\n", {}, r"en\.txt is empty"),
    "blank row": ("en.txt", "a\n \t\nb\n", "a\nb\n", {}, r"en\.txt, line 2 is blank"),
    "blank last row": ("en.txt", "a\nb\n\n", "a\nb\n", {}, r"en\.txt, line 3 is blank"),
    "blank column": ("en.tsv", "a\tb\n \tb\n", "a\tb\n", {}, r"en\.tsv, line 2 is blank"),
    "not UTF-8": ("en.txt", b"a\xff\n", b"a\xc3\xbf\n", {}, r"en\.txt is not UTF-8: .*byte 1"),
    "UTF-16": ("en.txt", "a\n".encode("utf-16"), "a\n", {}, r"en\.txt is not UTF-8"),
    "no such column": (
        "en.tsv", "a\tb\n", "a\tb\tc\n", {"columns": 2}, "line 1 has no column 2; it has 0, 1"
    ),
    "a tab too many": ("en.tsv", "a\tb\nc\t\td\n", "a\tb\nc\td\n", {}, "line 2 has 3 columns"),
    "broken JSON": ("en.jsonl", TWO + '{"text"\n', TWO, {}, r"en\.jsonl, line 3 is not JSON"),
    "no object": ("en.jsonl", TWO + "[1]\n", TWO, {}, r"en\.jsonl, line 3 is no JSON object"),
    "no such field": (
        "en.jsonl", TWO + '{"txt": "c"}\n', TWO, {}, "line 3 has no column text; it has txt"
    ),
    "no text": ("en.jsonl", '{"text": 5}', '{"text": "5"}', {}, "column text is no text but 5"),
    "half a character": (
        "en.jsonl", '{"text": "a \\ud800"}', '{"text": "\\ud83d\\ude00"}', {},
        "line 1: column text has half a character",
    ),
    "null": ("en.jsonl", '{"text": null}', TWO, {}, "column text is no text but None"),
    "which field": (
        "en.jsonl", '{"a": "x", "b": "y"}', '{"a": "x"}', {}, "say which columns .* it has a, b"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_next_to_what_is_read(case: str, tmp_path: Path) -> None:
    name, bad, good, options, message = REFUSED[case]
    with pytest.raises(CorpusError, match=message):
        read_texts(write(tmp_path / "bad", {name: bad}), **options)
    texts = read_texts(write(tmp_path / "good", {name: good}), **options)
    assert texts["en"]


def test_languages_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, {"arb_Arab.txt": "a\n", "eng_Latn.txt": "b\n"})
    with pytest.raises(CorpusError, match="has no arb, deu_Latn; it has arb_Arab, eng_Latn"):
        read_texts(tmp_path, ["arb", "eng_Latn", "deu_Latn"])
    with pytest.raises(CorpusError, match="no language"):
        read_texts(tmp_path, [])
    assert set(read_texts(tmp_path, ["arb_Arab", "eng_Latn"])) == {"arb_Arab", "eng_Latn"}


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, {"en.txt": "a\n", "en.csv": "a\n"})
    with pytest.raises(CorpusError, match=r"no file fits .*x_\{language\}\.txt"):
        read_texts(tmp_path / "x_{language}.txt")
    with pytest.raises(CorpusError, match=r"does not end in one of \.txt, \.tsv, \.jsonl"):
        read_texts(tmp_path / "{language}.csv")
    with pytest.raises(CorpusError, match=r"en\.txt is no folder .* flores_plus, belebele, mgsm"):
        read_texts(tmp_path / "en.txt")
    for options in ({"split": "test"}, {"revision": "main"}):
        with pytest.raises(CorpusError, match="has no split or revision"):
            read_texts(tmp_path, **options)
    assert read_texts(tmp_path / "{language}.txt") == {"en": ["a"]}


def test_check_parallel() -> None:
    check_parallel({"en": ["a", "b"], "de": ["c", "d"]})
    with pytest.raises(CorpusError, match="not 2 in en, 1 in de"):
        check_parallel({"en": ["a", "b"], "de": ["c"]})
    with pytest.raises(CorpusError, match="no rows in de"):
        check_parallel({"en": ["a", "b"], "de": []})
    with pytest.raises(CorpusError, match="no language"):
        check_parallel({})
    assert issubclass(CorpusError, SteeredMoEError)


def test_files_that_are_not_read_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    codes = ("en", "yue", "zh-CN", "pt_br", "es-419", "arb_Arab", "sr-Latn-RS")
    write(tmp_path, {f"{code}.txt": "a\n" for code in codes})
    with caplog.at_level("WARNING"):
        assert set(read_texts(tmp_path)) == set(codes)
    assert caplog.text == ""
    odd = ("fr.TXT", "es.csv", "README.txt", "LICENSE", "NOTES.jsonl", "english.txt")
    write(tmp_path, dict.fromkeys((*odd, ".hidden.txt"), "a\n"))
    with caplog.at_level("WARNING"):
        assert set(read_texts(tmp_path)) == set(codes)
    for name in odd:
        assert name in caplog.text
    assert "hidden" not in caplog.text
    assert "en.txt" not in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert set(read_texts(f"{tmp_path}/{{language}}.txt")) == set(codes)
    assert "README.txt, english.txt" in caplog.text
    caplog.clear()
    assert set(read_texts(tmp_path, ["english", "en"])) == {"english", "en"}
    assert caplog.text == ""  # others were not asked for


def test_a_folder_without_a_language(tmp_path: Path) -> None:
    write(tmp_path, {"README.txt": "a\n", "x.md": "b"})
    with pytest.raises(CorpusError, match=r"language code, not README\.txt, x\.md"):
        read_texts(tmp_path)
    assert read_texts(tmp_path, "README") == {"README": ["a"]}


# The real data beside the project


def test_real_flores() -> None:
    texts = read_texts(real_data("flores200") / "devtest" / "{language}.txt")
    assert {len(rows) for rows in texts.values()} == {1012}
    assert {"eng_Latn", "min_Arab", "min_Latn", "zho_Hans", "zho_Hant"} <= set(texts)
    assert texts["min_Arab"] != texts["min_Latn"]


def test_real_mgsm() -> None:
    texts = read_texts(real_data("mgsm") / "mgsm_{language}.tsv")
    assert {language: len(rows) for language, rows in texts.items()} == dict.fromkeys(
        ["bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh"], 250
    )
    assert texts["en"][0].startswith("Janet")
    answers = read_texts(real_data("mgsm") / "mgsm_{language}.tsv", ["en", "sw"], columns=1)
    assert answers["en"][:3] == answers["sw"][:3] == ["18", "3", "70000"]


def test_real_belebele() -> None:
    folder = real_data("belebele")
    texts = read_texts(folder, ["eng_Latn", "zul_Latn"], columns=["passage", "question"], limit=5)
    assert [len(rows) for rows in texts.values()] == [5, 5]
    assert texts["eng_Latn"][0].startswith("Make sure")
    assert "\nAccording" in texts["eng_Latn"][0]
    with pytest.raises(CorpusError, match=r"say which columns .* passage, question, choices"):
        read_texts(folder)
    with pytest.raises(CorpusError, match="column choices is no text"):
        read_texts(folder, columns="choices")


def test_real_belebele_as_the_hub_has_it(server: HubServer) -> None:
    """488 passages of 900 questions, in one order in each language."""
    folder, languages = real_data("belebele"), ("eng_Latn", "zul_Latn")
    files = {"README.md": card({c: {"test": f"data/{c}.jsonl"} for c in languages})}
    for language in languages:
        rows = [json.loads(line) for line in (folder / f"{language}.jsonl").open(encoding="utf-8")]
        kept = [{"link": row["link"], "flores_passage": row["passage"]} for row in rows]
        files[f"data/{language}.jsonl"] = jsonl(kept)
    server.commit("datasets/facebook/belebele", files)
    texts = read_texts("belebele")
    passages = [json.loads(line) for line in files["data/eng_Latn.jsonl"].splitlines()]
    ordered = {row["link"]: row["flores_passage"] for row in passages}
    assert texts["eng_Latn"] == [ordered[link] for link in sorted(ordered)]
    assert {len(rows) for rows in texts.values()} == {488}


# Datasets on the Hub


def test_flores_plus(flores: HubServer) -> None:
    texts = read_texts("flores_plus")
    assert list(texts) == sorted(LANGUAGES)  # and not the config "default"
    assert texts["arb_Latn"] == [f"old arb_Latn devtest {i}" for i in range(3)]
    some = read_texts("flores_plus", ["eng_Latn"], split="dev", limit=1)
    assert some == {"eng_Latn": ["old eng_Latn dev 0"]}


def test_languages_columns_and_splits_that_a_dataset_lacks(flores: HubServer) -> None:
    with pytest.raises(CorpusError, match="has no arb; it has arb_Arab, arb_Latn, eng_Latn"):
        read_texts("flores_plus", ["arb"])
    with pytest.raises(CorpusError, match="row 0 has no column sentence; it has id, text"):
        read_texts("flores_plus", ["eng_Latn"], columns="sentence")
    with pytest.raises(CorpusError, match="column id is no text but 0"):
        read_texts("flores_plus", ["eng_Latn"], columns="id")
    with pytest.raises(CorpusError, match=r"Unknown split .*'dev', 'devtest'"):
        read_texts("flores_plus", ["eng_Latn"], split="test")
    assert read_texts("flores_plus", ["eng_Latn"], columns="text")


def test_revision_pins_a_dataset(flores: HubServer) -> None:
    name = "openlanguagedata/flores_plus"
    first = flores.repos[f"datasets/{name}"].find("main").oid
    flores.commit(f"datasets/{name}", flores_files("new"))
    assert read_texts("flores_plus", ["eng_Latn"])["eng_Latn"][0].startswith("new")
    pinned = read_texts("flores_plus", ["eng_Latn"], revision=first)
    assert pinned["eng_Latn"][0].startswith("old")
    with pytest.raises(CorpusError, match=r"(?s)openlanguagedata/flores_plus .*no-such-tag"):
        read_texts("flores_plus", ["eng_Latn"], revision="no-such-tag")


def test_one_call_reads_one_commit(flores: HubServer) -> None:
    read_texts("flores_plus", ["eng_Latn", "arb_Latn"])
    commit = flores.repos["datasets/openlanguagedata/flores_plus"].find("main").oid
    resolved = {line.split("/resolve/")[1].split("/")[0] for line in flores.requests[1:]
                if "/resolve/" in line}  # fmt: skip
    assert resolved == {commit}
    assert flores.requests[0] == "GET /api/datasets/openlanguagedata/flores_plus"


def test_rows_of_another_commit_are_not_taken_for_those_asked_for(server: HubServer) -> None:
    """When something fails, ``datasets`` itself returns what it has in its cache."""
    name = "datasets/openai/gsm8k"
    files = {"README.md": card({"main": {"train": "train.jsonl"}})}
    for word in ("old", "new"):
        server.commit(name, files | {"train.jsonl": jsonl([{"question": word, "answer": "1"}])})
        if word == "old":
            assert read_texts("gsm8k", columns="question") == {"en": ["old"]}
    server.fail_next("GET /api/datasets/openai/gsm8k/tree")
    with pytest.raises(CorpusError, match="openai/gsm8k cannot be read: no rows of commit"):
        read_texts("gsm8k", columns="question")
    assert read_texts("gsm8k", columns="question") == {"en": ["new"]}


def test_damaged_files_and_errors_of_the_hub(flores: HubServer) -> None:
    name = "datasets/openlanguagedata/flores_plus"
    flores.fail_next("GET /api/datasets/openlanguagedata/flores_plus")
    with pytest.raises(CorpusError, match=r"flores_plus cannot be read: .*501"):
        read_texts("flores_plus", ["eng_Latn"])
    flores.commit(name, {"devtest/eng_Latn.parquet": b"damaged"})
    with pytest.raises(CorpusError, match=r"flores_plus cannot be read: .*generating the dataset"):
        read_texts("flores_plus", ["eng_Latn"])
    assert read_texts("flores_plus", ["arb_Latn"])


def test_gated_private_and_missing_datasets(
    flores: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "datasets/openlanguagedata/flores_plus"
    flores.gated.add(name)
    with pytest.raises(CorpusError, match=r"flores_plus is gated: accept .* log in .* HF_TOKEN"):
        read_texts("flores_plus", ["eng_Latn"])
    assert not [line for line in flores.requests if "/resolve/" in line]
    flores.gated.clear()
    assert read_texts("flores_plus", ["eng_Latn"])
    flores.repos[name].private = True
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    with pytest.raises(CorpusError, match=r"no dataset openlanguagedata/flores_plus: .* private"):
        read_texts("flores_plus", ["eng_Latn"])
    monkeypatch.undo()
    assert read_texts("flores_plus", ["eng_Latn"])
    with pytest.raises(CorpusError, match=r"no dataset openai/gsm8k: correct the name .* log in"):
        read_texts("gsm8k")


def test_belebele_keeps_one_row_per_link_in_one_order(server: HubServer) -> None:
    questions = [("b", 1), ("a", 1), ("b", 2), ("c", 1)]
    orders = {"arb_Arab": questions, "arb_Latn": questions[::-1]}
    files = {"README.md": card({c: {"test": f"data/{c}.jsonl"} for c in orders})}
    for language, order in orders.items():
        rows = [{"link": link, "question_number": n, "flores_passage": f"{link} {language}"}
                for link, n in order]  # fmt: skip
        files[f"data/{language}.jsonl"] = jsonl(rows)
    server.commit("datasets/facebook/belebele", files)
    assert read_texts("belebele") == {
        language: [f"{link} {language}" for link in "abc"] for language in orders
    }
    plain = read_texts("hub:facebook/belebele/{language}", columns="flores_passage")
    assert [row[0] for row in plain["arb_Arab"]] == ["b", "a", "b", "c"]  # as they come
    assert read_texts("belebele", columns="flores_passage") == read_texts("belebele")
    with pytest.raises(CorpusError, match=r"one row per link; .* hub:facebook/belebele/\{language"):
        read_texts("belebele", columns=["flores_passage", "link"])


MGSM = {"en": [("How many?", "18"), ('"A" quote', "3")], "bn": [("কত?", "18"), ("কয়টি?", "3")]}


def mgsm_files() -> dict[str, bytes]:
    """As the repo was with its script: files without a header."""
    return {"README.md": b"# MGSM", "mgsm.py": b"raise SystemExit"} | {
        f"mgsm_{language}.tsv": "".join(f"{q}\t{a}\n" for q, a in rows).encode()
        for language, rows in MGSM.items()
    }


def mgsm_tables() -> dict[str, bytes]:
    """As the repo is when converted: a config per language."""
    paths = {c: {s: f"{c}/{s}-*" for s in ("train", "test")} for c in MGSM}
    files = {"README.md": card(paths)}
    for language, pairs in MGSM.items():
        rows = [{"question": q, "answer": None, "answer_number": int(a)} for q, a in pairs]
        shots = [{"question": f"Question: {language}", "answer": "42", "answer_number": 42}]
        files[f"{language}/test-00000-of-00001.parquet"] = parquet(rows)
        files[f"{language}/train-00000-of-00001.parquet"] = parquet(shots)
    return files


def test_mgsm_with_its_script_and_without(server: HubServer) -> None:
    expected = {"bn": ["কত?", "কয়টি?"], "en": ["How many?", '"A" quote']}
    old = server.commit("datasets/juletxara/mgsm", mgsm_files())
    assert read_texts("mgsm") == expected
    assert read_texts("mgsm", ["en"], columns=["question", "answer"]) == {
        "en": ["How many?\n18", '"A" quote\n3']
    }
    with pytest.raises(CorpusError, match="no column sum; it has question, answer"):
        read_texts("mgsm", columns="sum")
    with pytest.raises(CorpusError, match=r"mgsm cannot be read: .*scripts .* mgsm\.py"):
        read_texts("mgsm", split="train")
    del server.repos["datasets/juletxara/mgsm"]
    new = server.commit("datasets/juletxara/mgsm", mgsm_tables())
    assert old != new
    assert read_texts("mgsm") == expected
    assert read_texts("mgsm", ["bn"], split="train") == {"bn": ["Question: bn"]}
    with pytest.raises(CorpusError, match="column answer is no text but None"):
        read_texts("mgsm", columns="answer")


def test_gsm8k_is_english_only(server: HubServer) -> None:
    files = {"README.md": card({c: {"train": f"{c}/train-*"} for c in ("main", "socratic")})}
    files["main/train-00000-of-00001.parquet"] = parquet([{"question": "1+1?", "answer": "#### 2"}])
    files["socratic/train-00000-of-00001.parquet"] = parquet([{"question": "no", "answer": "no"}])
    server.commit("datasets/openai/gsm8k", files)
    assert read_texts("gsm8k") == {"en": ["1+1?\n#### 2"]}
    assert read_texts("gsm8k", ["en"], columns="question") == {"en": ["1+1?"]}
    with pytest.raises(CorpusError, match="openai/gsm8k has no de; it has en"):
        read_texts("gsm8k", ["de"])


def test_global_mmlu(server: HubServer) -> None:
    columns = KNOWN["global_mmlu"].columns
    files = {
        "README.md": card({c: {s: f"{c}/{s}-*" for s in ("test", "dev")} for c in ("en", "de")})
    }
    for language in ("en", "de"):
        for split in ("test", "dev"):
            row = {c: f"{language} {split} {c}" for c in columns} | {"answer": "A"}
            files[f"{language}/{split}-00000-of-00001.parquet"] = parquet([row])
    server.commit("datasets/CohereLabs/Global-MMLU", files)
    assert columns == ("question", "option_a", "option_b", "option_c", "option_d")
    assert read_texts("global_mmlu") == {
        language: ["\n".join(f"{language} test {c}" for c in columns)] for language in ("de", "en")
    }


@pytest.fixture
def other(server: HubServer) -> HubServer:
    splits = {"train": "x/train.jsonl", "test": "x/test.jsonl"}
    rows = [{"q": "one", "a": "1"}, {"q": "two", "a": " "}]
    files = {"README.md": card({"v-en": splits, "v-de": splits, "x": {"test": splits["test"]}})}
    files |= {"x/train.jsonl": jsonl(rows[:1]), "x/test.jsonl": jsonl(rows)}
    server.commit("datasets/user/some.data-set", files)
    server.commit("datasets/user/plain", {"train.jsonl": jsonl(rows)})
    return server


def test_any_other_dataset(other: HubServer) -> None:
    source = "hub:user/some.data-set/v-{language}"
    expected = {"de": ["one", "two"], "en": ["one", "two"]}
    assert read_texts(source, columns="q", split="test") == expected
    assert read_texts(source, ["en"], columns=["q", "a"], split="test") == {
        "en": ["one\n1", "two\n "]
    }
    assert read_texts("hub:user/some.data-set/x", "fr", columns="q") == {"fr": ["one", "two"]}
    assert read_texts("hub:user/plain", "fr", columns="q") == {"fr": ["one", "two"]}


def test_any_other_dataset_refused(other: HubServer) -> None:
    source = "hub:user/some.data-set"
    with pytest.raises(CorpusError, match="needs columns"):
        read_texts(f"{source}/v-{{language}}")
    with pytest.raises(CorpusError, match="say which split to read; it has train, test"):
        read_texts(f"{source}/v-{{language}}", columns="q")
    with pytest.raises(CorpusError, match=r"row 1 is blank"):
        read_texts(f"{source}/v-{{language}}", columns="a", split="test")
    with pytest.raises(CorpusError, match=r"no config w-\{language\}; it has .*'v-en', 'v-de'"):
        read_texts(f"{source}/w-{{language}}", columns="q")
    with pytest.raises(CorpusError, match=r"available configs: .*'v-en'"):
        read_texts(source, "en", columns="q")
    for languages in (None, ["en", "de"]):
        with pytest.raises(CorpusError, match="name the one language"):
            read_texts(f"{source}/x", languages, columns="q")
    for wrong in ("hub:{language}", "hub:user/a/b/c", "hub:plain"):
        with pytest.raises(CorpusError, match="is not hub:owner/name"):
            read_texts(wrong, "en", columns="q")
    with pytest.raises(CorpusError, match="shows no dataset user/missing"):
        read_texts("hub:user/missing", "en", columns="q")


def test_without_the_datasets_library(
    flores: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flores.commit("datasets/juletxara/mgsm", mgsm_files())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r'pip install "steered-moe\[data\]"'):
        read_texts("flores_plus", ["eng_Latn"])
    read = runpy.run_path(str(corpora.__file__))["read_texts"]  # the import needs it not, nor files
    assert read(write(tmp_path, {"en.txt": "one\n"})) == {"en": ["one"]}
    assert set(read("mgsm")) == {"bn", "en"}
    monkeypatch.undo()
    assert read_texts("flores_plus", ["eng_Latn"])
