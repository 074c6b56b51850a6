"""An interrupted profile goes on and ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_moe import RouterSteering, RoutingProfile, attach, find_routers
from steered_moe.errors import FormatError
from steered_moe.identity import model_sha256, tokenizer_sha256
from steered_moe.shards import profile_in_shards

TEXTS = {
    "en": [f"A router sends {i} tokens" for i in range(7)],
    "fr": [f"Un routeur envoie {i} mots" for i in range(7)],
}
ABOUT = {"model": "tiny"}


class InterruptedRunError(Exception):
    pass


def interrupt_after(rows: int):
    done = []

    def tick(count: int) -> None:
        done.append(count)
        if sum(done) >= rows:
            raise InterruptedRunError

    return tick


@pytest.fixture
def model(tiny: Path):
    return AutoModelForCausalLM.from_pretrained(tiny / "base").eval()


@pytest.fixture
def tokenizer(tiny: Path):
    return AutoTokenizer.from_pretrained(tiny / "base")


@pytest.fixture
def run(model, tokenizer):
    def run(
        folder: Path, about=ABOUT, texts=TEXTS, model=model, tokenizer=tokenizer, **options
    ) -> RoutingProfile:
        settings = {"batch_size": 2, "rows_per_shard": 3, "keep_sequences": True}
        return profile_in_shards(
            model, tokenizer, texts, folder, about=about, **{**settings, **options}
        )

    return run


@pytest.mark.parametrize("rows", [1, 5, 9, 13])
def test_it_ends_with_the_same_profile(run, tmp_path: Path, rows: int):
    whole = run(tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "cut", tick=interrupt_after(rows))
    assert not (tmp_path / "cut" / "profile.json").exists()
    seen = []
    resumed = run(tmp_path / "cut", tick=seen.append)
    assert sum(seen) == 14
    for name, tensor in whole.tensors().items():
        assert torch.equal(getattr(resumed, name), tensor), name
    saved = RoutingProfile.load(tmp_path / "cut")
    assert torch.equal(saved.counts, whole.counts)
    assert saved.about.items() >= ABOUT.items()
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        *("profile.json", "profile.safetensors")
    ]


def test_what_was_done_is_not_done_again(run, tmp_path: Path, monkeypatch):
    with pytest.raises(InterruptedRunError):
        run(tmp_path, tick=interrupt_after(9))
    calls = []
    import steered_moe.shards as shards

    original = shards.profile_texts
    monkeypatch.setattr(
        shards, "profile_texts", lambda *a, **k: calls.append(a[2]) or original(*a, **k)
    )
    run(tmp_path)
    assert [list(part) for part in calls] == [["fr"], ["fr"], ["fr"]]


def test_parts_of_another_run_are_refused(run, tmp_path: Path):
    with pytest.raises(InterruptedRunError):
        run(tmp_path, tick=interrupt_after(9))
    with pytest.raises(FormatError, match="another run"):
        run(tmp_path, about={"model": "other"})
    for changed in ({"rows_per_shard": 2}, {"keep_sequences": False}):
        with pytest.raises(FormatError, match="another run"):
            run(tmp_path, **changed)
    other = {language: rows[::-1] for language, rows in TEXTS.items()}
    with pytest.raises(FormatError, match="texts_sha256"):
        run(tmp_path, texts=other)
    run(tmp_path, batch_size=5)  # it changes no number, so the run goes on


def with_other_routers(model, tiny: Path):
    other = AutoModelForCausalLM.from_pretrained(tiny / "base").eval()
    with torch.no_grad():
        find_routers(other)[-1].module.weight[0, 0] += 1
    return other


def variants(tiny: Path, model, tokenizer) -> dict[str, dict]:
    """What a later call may say otherwise -> its arguments."""
    chat, other = (AutoTokenizer.from_pretrained(tiny / "base") for _ in range(2))
    chat.chat_template = "{{ messages[0]['content'] }}!"
    other.add_tokens(["router"])
    half = AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.bfloat16).eval()
    steered = AutoModelForCausalLM.from_pretrained(tiny / "base").eval()
    attach(steered, RouterSteering("s", [2], torch.ones(1, 16)))
    return {
        "dtype": {"model": half},
        "model_sha256": {"model": with_other_routers(model, tiny)},
        "model_sha256 ": {"model": steered},
        "tokenizer_sha256": {"tokenizer": other},
        "chat": {"tokenizer": chat, "chat": True},
        "texts_sha256": {"texts": {"fr": TEXTS["fr"], "en": TEXTS["en"]}},
        "keep_sequences": {"keep_sequences": False},
        "model": {"about": {"model": "other"}},
    }


def test_what_differs_is_named_and_nothing_is_mixed(
    run, tmp_path: Path, tiny: Path, model, tokenizer
):
    with pytest.raises(InterruptedRunError):
        run(tmp_path / "cut", tick=interrupt_after(9))
    whole = run(tmp_path / "whole")
    for name, options in variants(tiny, model, tokenizer).items():
        with pytest.raises(FormatError, match=rf"parts of another run: .*\b{name.strip()} is"):
            run(tmp_path / "cut", **options)
        with pytest.raises(FormatError, match=rf"finished profile .*\b{name.strip()} is .*--out"):
            run(tmp_path / "whole", **options)
    assert RoutingProfile.load(tmp_path / "whole").fingerprint == whole.fingerprint
    assert run(tmp_path / "cut").fingerprint == whole.fingerprint


def test_a_finished_profile_is_returned_at_once(run, tmp_path: Path, monkeypatch):
    first, seen = run(tmp_path), []
    monkeypatch.setattr("steered_moe.shards.profile_texts", None)
    again = run(tmp_path, tick=seen.append, batch_size=7)
    assert (again.fingerprint, again.about, sum(seen)) == (first.fingerprint, first.about, 14)


def test_padding_does_not_change_who_the_tokenizer_is(tokenizer, tiny: Path):
    before = tokenizer_sha256(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_sha256(tokenizer) == before
    tokenizer.chat_template = "x"
    assert tokenizer_sha256(tokenizer) != before


def test_an_offloaded_model_is_the_same_model(model, tiny: Path):
    offloaded = AutoModelForCausalLM.from_pretrained(tiny / "base").eval()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert model_sha256(offloaded) == model_sha256(model)
    assert all(parameter.is_meta for parameter in offloaded.parameters())


@pytest.mark.parametrize("content", ["", "[]", None])
def test_settings_that_cannot_be_read(run, tmp_path: Path, content: str | None):
    with pytest.raises(InterruptedRunError):
        run(tmp_path, tick=interrupt_after(9))
    settings = tmp_path / "unfinished" / "settings.json"
    settings.unlink()
    if content is not None:
        settings.write_text(content)
    with pytest.raises(FormatError, match=r"settings\.json .* Delete .*unfinished to start again"):
        run(tmp_path)


def test_settings_appear_whole_or_not_at_all(run, tmp_path: Path, monkeypatch):
    def cut(self: Path, text: str, **options) -> None:
        self.write_bytes(text.encode()[:9])
        raise InterruptedRunError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", cut)
        with pytest.raises(InterruptedRunError):
            run(tmp_path)
    assert list((tmp_path / "unfinished").iterdir()) == []
    assert run(tmp_path).sequences.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rows_per_shard": 0}, "rows_per_shard is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"texts": {"en": "text"}}, "one text instead of a list"),
        ({"template_tokens": False}, "template_tokens say how the chat template is used"),
        ({"texts": {"en": ["a"] * 6 + ["a b " * 500]}}, r"en, row 6: .*context is"),
        ({"texts": {"en": ["a"] * 6 + ["\ud800"]}}, "en, row 6 is not valid Unicode"),
    ],
)
def test_what_cannot_be_profiled_leaves_nothing_behind(
    run, model, tmp_path: Path, options, says: str
):
    model.config.max_position_embeddings = 64
    with pytest.raises(FormatError, match=says):
        run(tmp_path / "out", **{"keep_sequences": False} | options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file(run, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FormatError, match=r"/file is a file; give a folder"):
            run(place)
