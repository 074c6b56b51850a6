"""Profiles of texts, against the routing seen at the experts' door and plain loops."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from observe import observe
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from steered_moe import RouterSteering, RoutingProfile, attach
from steered_moe.collection import RoutingCollector, profile_generation, profile_texts
from steered_moe.consistency import consistency_of, token_pairs
from steered_moe.errors import FormatError
from steered_moe.recording import record_selections, watch_routing

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


def test_padding_would_change_the_sums(model: nn.Module, tokenizer):
    """Twin of the test above: counting the padding too gives other numbers."""
    inputs = tokenizer(TEXTS["en"], return_tensors="pt", padding=True)
    masks = inputs["attention_mask"], torch.ones_like(inputs["attention_mask"])
    profiles = []
    for mask in masks:
        collector = RoutingCollector(model)
        with collector.batch(mask), torch.no_grad():
            model(**inputs)
        profiles.append(collector.profile("en"))
    assert profiles[0].tokens[0, 0] < profiles[1].tokens[0, 0]
    assert not torch.allclose(profiles[0].frequency, profiles[1].frequency)


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
    replace(profile, about={"model": "x"}).save(tmp_path)
    again = RoutingProfile.load(tmp_path)
    assert again.about == {"model": "x"}
    assert len(again.tensors()) == 8
    for name, tensor in profile.tensors().items():
        assert torch.equal(getattr(again, name), tensor)
    fewer = again.of(["fr"])
    assert torch.equal(fewer.probabilities, profile.probabilities[1:])


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({}, "no texts"),
        ({"en": ["a"], "fr": []}, "no texts in fr"),
        ({"en": ["a", "b"], "fr": ["c"]}, "as many rows"),
        ({"en": ["a", ""]}, "en, row 1 is '', a blank text"),
        ({"en": ["a", " \n"]}, "en, row 1 is .* a blank text"),
        ({"en": "text"}, r"en: one text instead of a list; give \['...'\]"),
        ({"en": ["a", 5]}, "en, row 1 is no text but 5"),
        ({"en": ["a \ud800"]}, "en, row 0 is not valid Unicode at character 2"),
    ],
)
def test_bad_texts_are_refused(model: nn.Module, tokenizer, texts: dict, says: str):
    with pytest.raises(FormatError, match=says):
        profile_texts(model, tokenizer, texts, keep_sequences=True)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_at_least_one_text(model: nn.Module, tokenizer, batch_size: int):
    for profiled in (profile_texts, profile_generation):
        with pytest.raises(FormatError, match=f"batch_size is {batch_size}"):
            profiled(model, tokenizer, TEXTS, batch_size=batch_size)


def test_every_row_is_looked_at_before_the_first_is_run(model: nn.Module, tokenizer):
    texts = {"en": ["a"] * 5, "fr": ["a"] * 4 + ["un mot " * 99]}
    model.config.max_position_embeddings = 64
    seen = []
    for profiled in (profile_texts, profile_generation):
        with pytest.raises(FormatError, match=r"fr, row 4: 'un mot .* tokens"):
            profiled(model, tokenizer, texts, batch_size=1, tick=seen.append)
    assert seen == []


def test_the_record_says_how_it_was_measured(model: nn.Module, tokenizer):
    assert profile_texts(model, tokenizer, TEXTS).about == {"dtype": "float32"}
    chat = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    chat.chat_template = "{{ messages[0]['content'] }}"
    options = {"chat": True, "template_tokens": False, "generation_prompt": False}
    kwargs = {"enable_thinking": False}
    found = profile_texts(model, chat, TEXTS, **options, template_kwargs=kwargs)
    assert found.about == {"dtype": "float32", **options, "template_kwargs": kwargs}
    half = profile_texts(model.bfloat16(), tokenizer, TEXTS)
    with pytest.raises(FormatError, match=r"dtype \('float32', 'bfloat16'\)"):
        found + half


def test_shards_add_up_to_one_run(model: nn.Module, tokenizer):
    texts = {language: rows * 2 for language, rows in TEXTS.items()}
    whole = profile_texts(model, tokenizer, texts, batch_size=1, keep_sequences=True)
    halves = [
        profile_texts(model, tokenizer, TEXTS, batch_size=1, keep_sequences=True) for _ in range(2)
    ]
    added = halves[0] + halves[1]
    for name, tensor in whole.tensors().items():
        same = torch.equal if name in ("counts", "tokens", "probabilities") else torch.allclose
        assert same(getattr(added, name), tensor), name
    by_language = profile_texts(model, tokenizer, {"en": TEXTS["en"]}) + profile_texts(
        model, tokenizer, {"fr": TEXTS["fr"]}
    )
    both = profile_texts(model, tokenizer, TEXTS)
    assert by_language.languages == ("en", "fr")
    assert torch.equal(by_language.counts, both.counts)
    with pytest.raises(FormatError, match="cannot be added"):
        both + RoutingProfile(both.languages, both.layers, both.counts, both.tokens)
    with pytest.raises(FormatError, match="different models"):
        replace(both, about={"model": "a"}) + replace(both, about={"model": "b"})
    with pytest.raises(FormatError, match="same languages"):
        whole + whole.of(["en"])


def test_entropy_is_the_mean_over_texts(model: nn.Module, tokenizer):
    profile = profile_texts(model, tokenizer, TEXTS, batch_size=2, keep_sequences=True)
    q = profile.probabilities.double()
    assert torch.allclose(profile.entropy, -(q * q.log()).sum(-1).mean(1), atol=1e-6)
    pooled = q.mean(dim=1)
    assert not torch.allclose(profile.entropy, -(pooled * pooled.log()).sum(-1), atol=1e-3)


def test_consistency_equals_a_plain_loop(model: nn.Module, tokenizer):
    profile = profile_texts(model, tokenizer, TEXTS, batch_size=3)
    for row, rows in enumerate(TEXTS.values()):
        total = torch.zeros(len(profile.layers), dtype=torch.float64)
        for text in rows:
            seen = observe(model, input_ids=tokenizer(text, return_tensors="pt")["input_ids"])
            for layer in profile.layers:
                sets = [set(t.nonzero().flatten().tolist()) for t in seen[layer].selected]
                pairs = [(a, b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
                overlaps = [len(a & b) / len(a | b) for a, b in pairs] or [1.0]
                total[layer] += sum(overlaps) / len(overlaps)
        assert torch.allclose(profile.consistency[row], total / len(rows), atol=1e-9)


def test_long_texts_are_sampled_the_same_in_any_batch():
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, :20] = False
    pairs = token_pairs(mask)
    assert pairs.shape == (2, 1000, 2)
    assert (pairs[..., 0] != pairs[..., 1]).all()
    assert pairs[1].min() >= 20
    assert torch.equal(token_pairs(mask[1:])[0], pairs[1])
    assert not torch.equal(pairs[0], pairs[1])
    assert len(pairs[0].unique(dim=0)) > 900
    selected = torch.stack([torch.arange(100), torch.full((100,), 200)], dim=1).expand(2, -1, -1)
    assert torch.allclose(consistency_of(selected, pairs), torch.tensor(1 / 3).double())
    assert consistency_of(selected[:, :1], token_pairs(mask[:, :1] | True)).tolist() == [1, 1]


def test_prompt_and_answer_are_counted_apart(model: nn.Module, tokenizer):
    prompts = {"en": TEXTS["en"][:2]}
    prompt, answer = profile_generation(
        model, tokenizer, prompts, batch_size=2, max_new_tokens=5, min_new_tokens=5
    )
    alone = profile_texts(model, tokenizer, prompts)
    assert torch.equal(prompt.counts, alone.counts)
    assert answer.tokens[0, 0] == 8
    assert torch.equal(answer.counts.sum(-1), 4 * answer.tokens)
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts["en"], return_tensors="pt", padding=True)
    seen = torch.zeros_like(answer.counts[0])

    def count(router, routing):
        seen[router.layer] += torch.bincount(routing.selected.flatten(), minlength=16)

    with watch_routing(model, count):  # what generate itself routes: its last token never enters
        model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        inside = seen.clone()
        with torch.no_grad():
            model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.equal(inside - (seen - inside), answer.counts[0])


def generated_alone(model: nn.Module, tokenizer, prompts: list[str], **options):
    """What a recorder sees while generate answers each prompt alone: prompt, answer."""
    parts = torch.zeros(2, 6, 16), [0, 0]
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with record_selections(model) as seen:
            model.generate(**inputs, do_sample=False, **options)
        for layer, passes in seen.items():
            for i, selected in enumerate(passes):
                which = int(i > 0)
                parts[0][which, layer] += torch.bincount(selected.flatten(), minlength=16)
                parts[1][which] += len(selected) * (layer == 0)
    return parts


def fourth_token(model: nn.Module, tokenizer, prompt: str) -> int:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=None)
    return int(output[0, inputs["input_ids"].shape[1] + 3])


@pytest.mark.parametrize("told", ["kwargs", "config of kwargs", "config of the model", "none"])
def test_answers_end_where_generate_ends_them(model: nn.Module, tokenizer, told: str):
    """The counts are those of a live recorder, whoever says what ends an answer."""
    prompts = TEXTS["en"]
    end = fourth_token(model, tokenizer, prompts[0])
    options: dict = {"max_new_tokens": 9}
    if told == "kwargs":
        options["eos_token_id"] = [end, 7]
    elif told == "config of kwargs":
        options = {"generation_config": GenerationConfig(max_new_tokens=9, eos_token_id=end)}
    elif told == "config of the model":
        model.generation_config.eos_token_id = torch.tensor([end, 7])
    else:
        options["eos_token_id"] = None
    counts, tokens = generated_alone(model, tokenizer, prompts, **options)
    found = profile_generation(model, tokenizer, {"en": prompts}, batch_size=3, **options)
    assert [int(part.tokens[0, 0]) for part in found] == tokens
    for part, expected in zip(found, counts, strict=True):
        assert torch.equal(part.counts[0], expected.double())
    assert (tokens[1] == 24) == (told == "none")  # 8 of 9 tokens in each answer


def test_an_answer_that_is_only_its_end_has_no_routing(model: nn.Module, tokenizer):
    model.generation_config.eos_token_id = list(range(320))  # every token ends the text
    _, answer = profile_generation(model, tokenizer, {"en": ["A router"]}, max_new_tokens=5)
    assert (answer.tokens[0, 0], answer.sequences[0]) == (0, 0)
    assert not any(tensor.any() for tensor in answer.tensors().values())
    with pytest.raises(FormatError, match="no tokens of en"):
        answer.frequency  # noqa: B018


@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 2},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a"]},
        {"stopping_criteria": [lambda ids, scores: False]},
        {"input_ids": torch.ones(1, 1, dtype=torch.int64)},
    ],
)
def test_settings_of_generate_that_cannot_be_told(model: nn.Module, tokenizer, options: dict):
    name = next(iter(options))
    with pytest.raises(FormatError, match=f"cannot work with {name}"):
        profile_generation(model, tokenizer, {"en": ["A router"]}, max_new_tokens=2, **options)
    if name == "num_beams":
        model.generation_config.num_beams = 3
        with pytest.raises(FormatError, match="cannot work with num_beams=3"):
            profile_generation(model, tokenizer, {"en": ["A router"]}, max_new_tokens=2)


def test_an_answer_has_to_fit_into_the_context(model: nn.Module, tokenizer):
    length = len(tokenizer("A router")["input_ids"])
    model.config.max_position_embeddings = length + 4
    prompts = {"en": ["A router"]}
    profile_generation(model, tokenizer, prompts, max_new_tokens=4)
    profile_generation(model, tokenizer, prompts, max_length=length + 4)
    with pytest.raises(FormatError, match=f"has {length} tokens and 5 more for the answer"):
        profile_generation(model, tokenizer, prompts, max_new_tokens=5)
    with pytest.raises(FormatError, match="20 more for the answer"):
        profile_generation(model, tokenizer, prompts)
    with pytest.raises(FormatError, match=f"max_length is {length + 5}"):
        profile_generation(model, tokenizer, prompts, max_length=length + 5)


def test_no_tensor_of_a_batch_outlives_it(model: nn.Module, tokenizer):
    """Memory must not wait for Python to look for cycles."""
    inputs = tokenizer(TEXTS["en"], return_tensors="pt", padding=True, return_token_type_ids=False)
    collector = RoutingCollector(model)

    def tensors() -> int:
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    def go(batches: int) -> int:
        for _ in range(batches):
            with collector.batch(inputs["attention_mask"]), torch.no_grad():
                model(**inputs, use_cache=False)
        return tensors()

    gc.collect()
    gc.disable()
    try:
        before = go(1)
        assert go(6) == before
        collector.keep_sequences = True
        assert go(6) == before + 5  # what is kept on purpose is seen; the last is there already
    finally:
        gc.enable()
