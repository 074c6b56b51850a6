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
from steered_moe.encoding import as_chats, encode, encode_rows, input_device
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
    assert encode(tokenizer, ROWS)["input_ids"].shape[0] == 2
    assert tokenizer.pad_token is None  # it is the caller's


def test_padding_is_that_of_the_tokenizer(model, tokenizer):
    for side in ("left", "right"):
        inputs, _ = encode_rows(model, tokenizer, ROWS, padding_side=side)
        expected = tokenizer(
            ROWS, return_tensors="pt", padding=True, padding_side=side, return_token_type_ids=False
        )
        assert set(inputs) == set(expected)
        for name, tensor in inputs.items():
            assert torch.equal(tensor, expected[name])
        assert (inputs["attention_mask"] == 0).any()


TAIL = "<|u|>{{ messages[0]['content'] | trim }}<|a|> assistant: a router sends an answer"


@pytest.mark.parametrize("row", ["answer", "a router", "a", "|", "router sends an answer"])
def test_a_row_that_the_template_also_says_is_found_in_its_place(model, tokenizer, row: str):
    chat = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chat.chat_template = TAIL
    inputs, mask = encode_rows(model, chat, [row], chat=True, template_tokens=False)
    whole = TAIL.replace("{{ messages[0]['content'] | trim }}", row)
    encoded = chat(whole, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    start, end = len("<|u|>"), len("<|u|>") + len(row)
    expected = [a < end and b > start for a, b in offsets]
    assert len(offsets) == inputs["input_ids"].shape[1]
    assert mask[0].tolist() == expected
    assert any(expected)
    assert not all(expected)


THINK = (
    "<{{ messages[0]['content'] }}>{% if add_generation_prompt %}A:{% if enable_thinking is "
    "defined and not enable_thinking %}[no thoughts]{% endif %}{% endif %}"
)


def test_what_a_template_puts_before_an_answer(model, tokenizer):
    chat = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chat.chat_template = THINK
    quiet = {"enable_thinking": False}
    for options, whole in (
        ({}, "<un>A:"),
        ({"generation_prompt": False}, "<un>"),
        ({"template_kwargs": quiet}, "<un>A:[no thoughts]"),
        ({"template_kwargs": quiet, "generation_prompt": False}, "<un>"),
    ):
        assert counted(model, chat, ["un"], chat=True, **options) == [whole]
        assert chat.decode(encode(chat, ["un"], **options)["input_ids"][0]) == whole
        profile = profile_texts(model, chat, {"en": ["un"]}, chat=True, **options)
        assert profile.tokens[0, 0] == len(chat(whole, add_special_tokens=False)["input_ids"])
    prompt, _ = profile_generation(
        model, chat, {"en": ["un"]}, chat=True, template_kwargs=quiet, max_new_tokens=2
    )
    whole = chat("<un>A:[no thoughts]", add_special_tokens=False)["input_ids"]
    assert prompt.tokens[0, 0] == len(whole)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template_tokens": False}, r"template_tokens say how .* set chat=True \(--chat\)"),
        ({"generation_prompt": False}, "generation_prompt say how"),
        ({"template_kwargs": {"a": 1}}, "template_kwargs say how"),
        ({"chat": True, "template_kwargs": {"tokenize": True}}, "cannot set tokenize"),
        ({"chat": True, "template_kwargs": {"a": {1}}}, "are not JSON values"),
    ],
)
def test_settings_of_a_template_that_cannot_be_met(model, chat_tokenizer, options, says: str):
    with pytest.raises(FormatError, match=says):
        encode_rows(model, chat_tokenizer, ROWS, **options)


def test_a_template_that_refuses_and_a_slow_tokenizer(model, tokenizer):
    chat = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chat.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(FormatError, match=r"refuses 'A router sends ': no system turn"):
        encode_rows(model, chat, ROWS, chat=True)
    chat.chat_template = "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"
    with pytest.raises(FormatError, match="the chat template changes"):
        encode_rows(model, chat, ROWS, chat=True, template_tokens=False)

    class Slow:
        chat_template = TEMPLATE
        is_fast = False
        apply_chat_template = chat.apply_chat_template

    with pytest.raises(FormatError, match="Slow does not say where in a text its tokens are"):
        encode_rows(model, Slow(), ROWS, chat=True, template_tokens=False)


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
