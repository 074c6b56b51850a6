"""Texts that end an answer: a row ends with the token that completes one, and no row before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_random_moe import build_model, build_tokenizer

from steered_moe.answering import answers
from steered_moe.stopping import StopTexts

PROMPTS = ["A router sends each token", "Un routeur envoie", "Kipanga", "Ein Router schickt"]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return build_model(), build_tokenizer()


def generated(loaded: Any, prompt: str, **options: Any) -> list[int]:
    model, tokenizer = loaded
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, **options)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_row_ends_where_stop_strings_of_transformers_end_it(loaded: Any, prompt: str) -> None:
    tokenizer = loaded[1]
    whole = generated(loaded, prompt)
    text = tokenizer.decode(whole)
    start = len(tokenizer(prompt)["input_ids"])
    ended = set()
    for stops in ([text[3:5]], [text[8:12], "never"], [text[0]]):
        mine = generated(loaded, prompt, stopping_criteria=[StopTexts(tokenizer, stops, start)])
        theirs = generated(loaded, prompt, stop_strings=stops, tokenizer=tokenizer)
        assert mine == theirs == whole[: len(mine)]
        assert any(stop in tokenizer.decode(mine) for stop in stops)
        assert not any(stop in tokenizer.decode(mine[:-1]) for stop in stops)
        ended.add(len(mine))
    assert len(ended) > 1
    assert max(ended) < len(whole)


def test_a_text_in_the_prompt_ends_nothing_and_special_tokens_do(loaded: Any) -> None:
    tokenizer = loaded[1]
    ids = tokenizer(["A router", "A router"], return_tensors="pt")["input_ids"]
    eos = tokenizer.eos_token_id
    row = torch.cat([ids, torch.tensor([[eos], [int(ids[0, 0])]])], dim=1)
    stops = StopTexts(tokenizer, ["router", tokenizer.eos_token], ids.shape[1])
    assert stops(row, None).tolist() == [True, False]
    assert StopTexts(tokenizer, ["router"], 0)(row, None).tolist() == [True, True]


def test_answers_are_cut_and_rows_end_alone(loaded: Any) -> None:
    whole = answers(*loaded, PROMPTS, max_new_tokens=16)
    stop = whole[0][4:6]
    cut = answers(*loaded, PROMPTS, max_new_tokens=16, stops=[stop])
    assert cut == [text.split(stop)[0] for text in whole]
    assert cut[0] != whole[0]
    assert cut != whole[:1] * 4
