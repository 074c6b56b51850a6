"""The card: valid metadata, real values, no placeholder."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import ModelCard

from steered_moe import RouterSteering
from steered_moe.cards import has_edited_card, heat_map, render_card, write_card
from steered_moe.storage import SteeringRepo

WEIGHTS = torch.tensor([[0.0, 1.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.25]])
FORCE = torch.tensor([[1, 0, 0, 0], [0, -1, -1, 0]])


def repo(**base: object) -> SteeringRepo:
    provenance = {"method": "hand", "languages": ["sw", "en"], "parameters": {"a|b": 1}}
    steering = RouterSteering("s", [4, 5], WEIGHTS, FORCE, provenance=provenance)
    return SteeringRepo(base, [steering], [0.5])


def test_metadata_is_what_the_hub_reads():
    card = ModelCard(render_card(repo(base_model_name_or_path="org/base", num_experts=4)))
    data = card.data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "steered-moe"
    assert data["language"] == ["en", "sw"]
    local = ModelCard(render_card(repo(base_model_name_or_path="../base"))).data.to_dict()
    assert "base_model" not in local


def test_it_shows_real_values_and_nothing_else():
    text = render_card(repo(base_model_name_or_path="org/base"))
    assert "| strength | 0.5 |" in text
    assert "| experts steered | 6 |" in text
    assert r'{"a\|b": 1}' in text
    assert "Not evaluated." in text
    assert not any(word in text for word in ("TODO", "More Information Needed", "None"))


def test_the_picture_shows_every_layer_and_force():
    assert heat_map(repo().steerings[0]) == ["   4 | @= | +1 x0", "   5 |   :| +0 x2"]
    wide = RouterSteering("w", [0], torch.eye(128)[127:])
    assert heat_map(wide) == ["   0 |" + " " * 63 + "@|"]


def test_an_edited_card_is_told_from_a_written_one(tmp_path: Path):
    assert not has_edited_card(tmp_path)
    content = repo(base_model_name_or_path="org/base")
    content.write(tmp_path)
    write_card(content, tmp_path)
    assert not has_edited_card(tmp_path)
    (tmp_path / "README.md").write_text(render_card(content) + "\nMine.\n")
    assert has_edited_card(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert has_edited_card(tmp_path)
