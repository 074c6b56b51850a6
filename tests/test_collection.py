"""Profiles of texts, against the routing seen at the experts' door and plain loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from observe import observe
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_moe import RouterSteering, RoutingProfile, attach, collection
from steered_moe.collection import profile_texts
from steered_moe.errors import FormatError
from steered_moe.recording import watch_routing

TEXTS = {
    "en": ["A router sends each token", "experts", "of its many experts to a few words of a text"],
    "fr": ["Un routeur envoie chaque mot", "experts", "du texte"],
}


@pytest.fixture(scope="module")
def tokenizer(tiny: Path):
    return AutoTokenizer.from_pretrained(tiny / "base")


@pytest.fixture
def model(tiny: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny / "base").eval()


def one_by_one(model: nn.Module, tokenizer, texts: list[str]):
    """Sums over texts by plain loops: counts, weight sums, frequency sums, tokens."""
    counts, weights, frequencies, tokens = 0.0, 0.0, 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        seen = observe(model, input_ids=ids)
        selected = torch.stack([seen[layer].selected.double().sum(0) for layer in sorted(seen)])
        counts, tokens = counts + selected, tokens + ids.shape[1]
        weights += torch.stack([seen[layer].weights.double().sum(0) for layer in sorted(seen)])
        frequencies += selected / ids.shape[1]
    return counts, weights, frequencies, tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_sums_equal_what_the_experts_got(model: nn.Module, tokenizer, side: str, batch_size: int):
    tokenizer.padding_side = side
    profile = profile_texts(model, tokenizer, TEXTS, batch_size=batch_size)
    for row, language in enumerate(TEXTS):
        counts, weights, frequencies, tokens = one_by_one(model, tokenizer, TEXTS[language])
        assert torch.equal(profile.counts[row], counts)
        assert torch.allclose(profile.weight_sums[row], weights, atol=1e-4)
        assert torch.allclose(profile.frequency_sums[row], frequencies, atol=1e-5)
        assert profile.tokens[row].tolist() == [tokens] * len(profile.layers)
        assert torch.allclose(profile.counts[row].sum(-1), 4.0 * profile.tokens[row])
    assert not torch.equal(profile.counts[0], profile.counts[1])  # languages do differ


def test_padding_would_change_the_sums(model: nn.Module, tokenizer, monkeypatch):
    right = profile_texts(model, tokenizer, TEXTS, batch_size=3)
    begin = collection._Sums.begin
    monkeypatch.setattr(
        collection._Sums, "begin", lambda sums, mask: begin(sums, torch.ones_like(mask))
    )
    wrong = profile_texts(model, tokenizer, TEXTS, batch_size=3)
    assert not torch.equal(right.counts, wrong.counts)


def test_sequences_are_mean_softmax_vectors(model: nn.Module, tokenizer):
    profile = profile_texts(model, tokenizer, TEXTS, batch_size=2, keep_sequences=True)
    assert profile.probabilities.shape == (2, 3, len(profile.layers), 16)
    ids = tokenizer(TEXTS["en"][2], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    expected = torch.stack([torch.softmax(layer, dim=-1).mean(0) for layer in logits])
    assert torch.allclose(profile.probabilities[0, 2], expected, atol=1e-6)
    assert not torch.allclose(profile.probabilities[0, 1], expected, atol=1e-3)


def test_a_steered_model_is_profiled_as_steered(model: nn.Module, tokenizer):
    force = torch.zeros(1, 16)
    force[0, 5] = -1
    steering = RouterSteering("ban", [2], torch.zeros(1, 16), force=force)
    before = profile_texts(model, tokenizer, TEXTS, keep_sequences=True)
    attach(model, steering)
    after = profile_texts(model, tokenizer, TEXTS, keep_sequences=True)
    assert after.counts[:, 2, 5].sum() == 0 < before.counts[:, 2, 5].sum()
    lowest = after.probabilities[:, :, 2].argmin(dim=-1)
    assert (lowest == 5).all()
    assert not (before.probabilities[:, :, 2].argmin(dim=-1) == 5).all()


@pytest.mark.parametrize("steered_first", [True, False])
def test_logits_are_seen_after_the_edit_whoever_comes_first(
    model: nn.Module, tokenizer, steered_first: bool
):
    weights = torch.zeros(1, 16)
    weights[0, 3] = 2.0
    steering = RouterSteering("up", [2], weights)
    ids = tokenizer("A router sends", return_tensors="pt")["input_ids"]
    seen = []

    def see(router, routing):
        if router.layer == 2:
            seen.append(routing)

    with torch.no_grad():
        with watch_routing(model, see):
            model(ids)
        if steered_first:
            attach(model, steering)
        with watch_routing(model, see):
            if not steered_first:
                attach(model, steering)
                seen[1:] = []  # what the probe of attaching ran
            model(ids)
    raw, steered = (routing.probabilities.log() for routing in seen)
    rise = (steered - steered.logsumexp(-1, keepdim=True)) - raw
    expected = 2.0 * raw.std(dim=-1, correction=0)  # softmax shifts every logit of a token alike
    assert torch.allclose(rise[:, 3] - rise[:, 4], expected, atol=1e-4)


def test_save_and_load_keep_everything(model: nn.Module, tokenizer, tmp_path: Path):
    profile = profile_texts(model, tokenizer, TEXTS, keep_sequences=True)
    profile.save(tmp_path)
    again = RoutingProfile.load(tmp_path)
    for name in ("counts", "weight_sums", "sequences", "frequency_sums", "probabilities"):
        assert torch.equal(getattr(again, name), getattr(profile, name))
    fewer = again.of(["fr"])
    assert torch.equal(fewer.probabilities, profile.probabilities[1:])


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({}, "no texts"),
        ({"en": ["a"], "fr": []}, "no texts in fr"),
        ({"en": ["a", "b"], "fr": ["c"]}, "as many rows"),
        ({"en": ["a", ""]}, "has no token"),
    ],
)
def test_bad_texts_are_refused(model: nn.Module, tokenizer, texts: dict, says: str):
    with pytest.raises(FormatError, match=says):
        profile_texts(model, tokenizer, texts, keep_sequences=True)
