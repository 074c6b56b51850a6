"""An interrupted profile goes on and ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_moe import RoutingProfile
from steered_moe.errors import FormatError
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
def run(tiny: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")

    def run(folder: Path, about=ABOUT, texts=TEXTS, **options) -> RoutingProfile:
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
    assert saved.about == ABOUT
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
