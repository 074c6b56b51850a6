"""Which tokens are counted: chat templates, padding, context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from conftest import ROOT
from observe import observe
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from steered_moe.collection import profile_generation, profile_texts
from steered_moe.encoding import as_chats, encode_rows, input_device
from steered_moe.errors import FormatError

BASE = ROOT / "examples" / "tiny_multilingual_moe" / "base"
TEMPLATE = "<|u|>{{ messages[0]['content'] | trim }}<|e|>"
ROWS = ["A router sends ", "un"]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path):
    return AutoTokenizer.from_pretrained(tiny / "base")


@pytest.fixture(scope="module")
def chat_tokenizer(tiny: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def model(tiny: Path):
    return AutoModelForCausalLM.from_pretrained(tiny / "base").eval()


def counted(model, tokenizer, rows: list[str], **options) -> list[str]:
    """The text of the tokens that count, row by row."""
    inputs, mask = encode_rows(model, tokenizer, rows, **options)
    return [
        tokenizer.decode(ids[kept]) for ids, kept in zip(inputs["input_ids"], mask, strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_template_tokens_count_only_if_asked(model, chat_tokenizer, side: str):
    options = {"chat": True, "padding_side": side}
    assert counted(model, chat_tokenizer, ROWS) == ROWS
    whole = [f"<|u|>{row.strip()}<|e|>" for row in ROWS]
    assert counted(model, chat_tokenizer, ROWS, **options) == whole
    own = counted(model, chat_tokenizer, ROWS, template_tokens=False, **options)
    for text, row in zip(own, ROWS, strict=True):
        assert row.strip() in text  # a token may hold a character of both
        assert "<|u" not in text
        assert "e|>" not in text


def test_profiles_count_these_tokens(model, chat_tokenizer):
    texts = {"en": ROWS}
    tokens = {}
    for own_only in (False, True):
        profile = profile_texts(
            model, chat_tokenizer, texts, chat=True, template_tokens=not own_only
        )
        _, mask = encode_rows(model, chat_tokenizer, ROWS, chat=True, template_tokens=not own_only)
        tokens[own_only] = int(mask.sum())
        assert profile.tokens[0].tolist() == [tokens[own_only]] * len(profile.layers)
    assert tokens[True] < tokens[False]


def test_the_embedded_models_turns(model):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    embedded = AutoModelForCausalLM.from_pretrained(BASE).eval()
    assert as_chats(tokenizer, ["Tom has 2 apples."]) == ["<s>Tom has 2 apples.\n"]
    own = counted(embedded, tokenizer, ["Tom has 2 apples."], chat=True, template_tokens=False)
    assert own == ["Tom has 2 apples."]
    inputs, _ = encode_rows(embedded, tokenizer, ["Tom has 2 apples."], chat=True)
    assert inputs["input_ids"][0].tolist().count(tokenizer.bos_token_id) == 1


def test_generation_is_profiled_from_the_chat(model, chat_tokenizer):
    plain, chat = (
        profile_generation(model, chat_tokenizer, {"en": ROWS}, chat=chat, max_new_tokens=3)[0]
        for chat in (False, True)
    )
    assert chat.tokens[0, 0] > plain.tokens[0, 0]


def test_no_template_and_a_template_that_changes_the_text_are_errors(model, tokenizer):
    with pytest.raises(FormatError, match="has no chat template; give texts as they are"):
        encode_rows(model, tokenizer, ROWS, chat=True)
    loud = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    loud.chat_template = "{{ messages[0]['content'] | upper }}"
    encode_rows(model, loud, ROWS, chat=True)  # all tokens: nothing to find
    with pytest.raises(FormatError, match="the chat template changes 'A router sends '"):
        encode_rows(model, loud, ROWS, chat=True, template_tokens=False)


def test_a_text_longer_than_the_context_is_named(model, tokenizer):
    model.config.max_position_embeddings = 12
    with pytest.raises(FormatError, match=r"'A router.* has \d+ tokens, but .* context is 12"):
        profile_texts(model, tokenizer, {"en": ["un", "A router sends a word " * 3]})
    profile_texts(model, tokenizer, {"en": ["un"]})  # short: no error


def test_a_tokenizer_without_padding_token_pads(model, tiny: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "base")
    expected = counted(model, tokenizer, ROWS)
    tokenizer.pad_token = None
    assert counted(model, tokenizer, ROWS) == expected


def test_an_offloaded_model_has_the_same_profile(model, tokenizer, tiny: Path):
    texts = {"en": ["A router sends each token", "experts"], "fr": ["Un routeur", "du texte"]}
    expected = profile_texts(model, tokenizer, texts, keep_sequences=True)
    offloaded = AutoModelForCausalLM.from_pretrained(tiny / "base").eval()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert input_device(offloaded) == torch.device("cpu")
    found = profile_texts(offloaded, tokenizer, texts, keep_sequences=True)
    assert torch.equal(found.counts, expected.counts)
    assert torch.allclose(found.probabilities, expected.probabilities, atol=1e-6)


def test_a_4_bit_model_is_profiled_as_it_routes(tokenizer, tiny: Path):
    quantized = AutoModelForCausalLM.from_pretrained(
        tiny / "base",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
        ),
        device_map="cpu",
    ).eval()
    assert any(type(module).__name__ == "Linear4bit" for module in quantized.modules())
    text = "A router sends each token"
    found = profile_texts(quantized, tokenizer, {"en": [text]})
    seen = observe(quantized, **tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    counts = torch.stack([seen[layer].selected.double().sum(dim=0) for layer in found.layers])
    assert torch.equal(found.counts[0], counts)
    plain = AutoModelForCausalLM.from_pretrained(tiny / "base").eval()
    assert not torch.equal(
        profile_texts(plain, tokenizer, {"en": [text]}).weight_sums, found.weight_sums
    )
