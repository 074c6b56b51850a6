"""The card: valid metadata, real values, no placeholder, hand-written text kept."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard

from steered_moe import RouterSteering
from steered_moe.card_text import BEGIN, END, merged, metadata, own_text
from steered_moe.cards import render_card, write_card
from steered_moe.errors import FormatError
from steered_moe.heat_map import heat_map
from steered_moe.literature import edits
from steered_moe.results import Interval, Result, current, read_results, write_results
from steered_moe.storage import SteeringRepo, read_repo

WEIGHTS = torch.tensor([[0.0, 1.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.25]])
FORCE = torch.tensor([[1, 0, 0, 0], [0, -1, -1, 0]])
BASE = {"base_model_name_or_path": "org/base", "num_hidden_layers": 6, "num_experts": 4}


def repo(name: str = "s", **provenance: object) -> SteeringRepo:
    told = {"method": "task_experts", "languages": ["swh_Latn", "en"], "parameters": {"a|b": 1}}
    steering = RouterSteering(name, [4, 5], WEIGHTS, FORCE, provenance=told | provenance)
    return SteeringRepo(BASE, [steering], [0.5])


def result(of: SteeringRepo, language: str = "sw", **fields: object) -> Result:
    steering = of.steerings[0]
    values = {"steering": steering.name, "fingerprint": steering.fingerprint, "strength": 0.5}
    values |= {"task": "MGSM", "language": language, "metric": "exact match", "items": 250}
    values |= {"base": 0.5, "steered": 0.52, "gain": Interval(2.0, -0.5, 4.5)}
    values |= {"controls": {"random": Interval(0.0, -1.0, 1.0)}, "dataset": "juletxara/mgsm"}
    return Result(**(values | fields))


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(render_card(repo(corpora=["mgsm", "my own"]))).data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "steered-moe"
    assert data["language"] == ["en", "swh"]
    assert data["datasets"] == ["juletxara/mgsm"]
    assert "model-index" not in data
    local = repo().of_base({"base_model_name_or_path": "../base"})
    assert "base_model" not in ModelCard(render_card(local)).data.to_dict()


def test_results_become_a_table_and_a_model_index():
    content = repo()
    text = render_card(content, "user/s", [result(content), result(content, "bn", controls={})])
    assert (
        "| `sw` | 250 | 0.5000 | 0.5200 | +2.00 (-0.50 to +4.50) | +0.00 (-1.00 to +1.00) |" in text
    )
    assert "| `bn` | 250 | 0.5000 | 0.5200 | +2.00 (-0.50 to +4.50) |  |" in text
    assert "Not evaluated" not in text
    assert "Measured for `bn`, `sw`" in text
    (scored, _) = ModelCard(text).data.eval_results
    assert (scored.dataset_type, scored.metric_value) == ("juletxara/mgsm", 0.52)
    assert "sw, strength 0.5, 250 items" in scored.metric_name


def test_results_belong_to_the_steering_that_they_were_measured_with(tmp_path: Path, caplog):
    content = repo()
    content.write(tmp_path)
    write_results([result(content)], tmp_path)
    assert read_results(tmp_path) == [result(content)]
    write_card(content, tmp_path)
    assert "+2.00" in (tmp_path / "README.md").read_text()
    other = SteeringRepo(BASE, [0.5 * content.steerings[0]], [0.5])
    assert not caplog.records
    write_card(other, tmp_path)
    assert "1 of 1 results in evaluation.json are of other steerings" in caplog.text
    card = (tmp_path / "README.md").read_text()
    assert "Not evaluated." in card
    assert "model-index" not in metadata(card)
    assert current([result(content)], content.steerings) == [result(content)]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"base": 1.5}, "base score is 1.5"),
        ({"items": 0}, "items is 0"),
        ({"strength": float("nan")}, "strength nan"),
        ({"gain": Interval(0, 0, 0), "steered": -0.1}, "steered score is -0.1"),
    ],
)
def test_results_that_cannot_be_are_refused(fields: dict, says: str):
    with pytest.raises(FormatError, match=says):
        result(repo(), **fields)


def test_an_interval_holds_its_mean():
    with pytest.raises(FormatError, match=r"interval of 1 to 2 around 3"):
        Interval(3, 1, 2)


LINES = [
    r"# [\w, -]+ for `[^`]+`",
    r"Router steering for a Mixture-of-Experts language model: .*",
    r"it runs\. No weight is changed, and none is in this repo\.",
    r"\| (base model )?\| \|",
    r"\|(---\|)+",
    r"\| (base model|revision|type|layers|experts per layer|experts per token) \| `[^`]+` \|",
    r"## [\w-]+",
    r"It .+ in \d+ layers? \([\d, -]+, counted from 0\)\.",
    r"\| (edit|strength|router logits edited|weights|forced|banned|fingerprint) \| `[^`]+`.* \|",
    r"\| `[\w]+` \| `[^`]+` \|",
    r"\| corpora \| .+ \|",
    r"!\[Layers and experts that [\w-]+ steers\]\(plots/[\w-]+\.png\)",
    r"```(text|bash|python|bibtex)?",
    r" *\d+ \|[ .:=+*#%@Fx-]+\|( \+\d+ x\d+)?",
    r"## (Evaluation|Load|Limits|Citation)",
    r"Not evaluated\.",
    r"`\w+` at strength [\d.]+: `[^`]+` on `[^`]+`\. Gain: steered minus base in",
    r"points, paired over prompts, with its 95 % interval\.",
    r"\| language \| prompts \| base \| steered \| gain \|( control: `[^`]+` \|)*",
    r"\| `[^`]+` \| \d+ \| [\d.]{6} \| [\d.]{6} \|( ([+-][\d.]+ \(\S+ to [^ )]+\))? \|)+",
    r"pip install steered-moe",
    r"from (steered_moe|transformers) import .+|import steered_moe",
    r"model = SteeredMoEForCausalLM\.from_pretrained\(\"[\w./-]+\"(, steering=\"\w+\")?\)",
    r"With transformers alone in sight, as any other model:",
    r"generator = pipeline\(\"text-generation\", model=\"[\w./-]+\"\)",
    r"On a model that is loaded already, in place:",
    r"steering = RouterSteering\.load\(\"[\w./-]+\"(, \"\w+\")?\)",
    r"handle = attach\(model, steering, strength=[\d.]+\)",
    r"\* .+\.",
    r"(@article\{arxiv\d+_\d+,)|\}|  \w+ = \{.+\},",
    r"",
]


def strangers(text: str) -> list[str]:
    """Lines of a card's generated part that no pattern knows."""
    body = text.split(BEGIN)[1].split(END)[0].strip("\n").split("\n")
    return [line for line in body if not any(re.fullmatch(one, line) for one in LINES)]


def test_every_line_of_a_card_is_known():
    several = SteeringRepo(
        BASE, [*repo().steerings, *repo("t", method="mine").steerings], [0.5, 1.0], default="t"
    )
    text = render_card(several, "user/s", [result(several)], {"s"})
    assert strangers(text) == []
    assert 'from_pretrained("user/s", steering="t")' in text
    assert "strength=1.0)" in text
    assert text.count("@article") == 2  # of task experts, and of bans
    assert not any(word in text for word in ("TODO", "More Information Needed", "None", "nan"))
    assert strangers(text.replace("## Load", "## Load\nTODO")) == ["TODO"]


def test_every_value_comes_from_the_repo():
    """Twin: other data give another card, in each of the lines that carry them."""
    one = render_card(repo(), "user/s")
    for other, where in {
        render_card(repo(method="shared_experts"), "user/s"): "2601.14050",
        render_card(repo(corpora=["belebele"]), "user/s"): "CC BY-SA 4.0",
        render_card(repo().at(0.75), "user/s"): "| strength | `0.75` |",
        render_card(repo().of_base({"base_model_revision": "a" * 40}), "user/s"): "a" * 40,
        render_card(repo(), "user/other"): 'from_pretrained("user/other")',
    }.items():
        assert where in other
        assert where not in one


def test_values_are_shown_as_code_and_cannot_be_markup():
    name = "<script>alert(1)</script>[x](javascript:1)`<b>`{{ 7*7 }}\n## Title\n---"
    text = render_card(repo(languages=[name], corpora=[name], note=name), "user/s")
    assert strangers(text) == []
    plain = re.sub(r"`[^`\n]*`", "", text.split(BEGIN)[1])
    assert "script" not in plain
    assert "javascript" not in plain
    assert "{{ 7*7 }}" in text
    assert "49" not in text
    assert yaml.safe_load(text.split("---\n")[1])["tags"][0] == "steered-moe"


def test_the_picture_shows_every_layer_and_force():
    assert heat_map(repo().steerings[0]) == ["   4 |F@= | +1 x0", "   5 | xx:| +0 x2"]
    force = torch.zeros(1, 128)
    force[0, 3], force[0, 2] = 1, -1
    wide = RouterSteering("w", [0], torch.eye(128)[127:], force)
    assert heat_map(wide) == ["   0 | F" + " " * 61 + "@| +1 x1"]
    wide = RouterSteering("w", [0], torch.eye(128)[127:])
    assert heat_map(wide) == ["   0 |" + " " * 63 + "@|"]


def test_hand_written_text_and_metadata_are_kept(tmp_path: Path):
    content = repo()
    content.write(tmp_path)
    write_card(content, tmp_path)
    written = (tmp_path / "README.md").read_text()
    assert own_text(written) == ""
    edited = written.replace("library_name", "license: mit\nlibrary_name").replace(
        BEGIN, f"Mine, *before*.\n\n{BEGIN}"
    )
    edited = edited.replace("- router-steering", "- router-steering\n- swahili") + "\nAnd after.\n"
    (tmp_path / "README.md").write_text(edited)
    changed = content.at(0.75)
    write_card(changed, tmp_path)
    again = (tmp_path / "README.md").read_text()
    assert own_text(again).split() == ["Mine,", "*before*.", "And", "after."]
    assert "`0.75`" in again
    assert "`0.5`" not in again
    assert metadata(again)["license"] == "mit"
    assert metadata(again)["tags"][-1] == "swahili"
    write_card(changed, tmp_path)
    assert (tmp_path / "README.md").read_text() == again  # nothing piles up


def test_a_card_of_somebody_else_gets_the_generated_part_below():
    card = render_card(repo())
    both = merged(card, "# My model\n\nText with \\1 and {{ braces }}.\n")
    assert own_text(both) == "# My model\n\nText with \\1 and {{ braces }}."
    assert both.index("My model") < both.index(BEGIN)
    assert merged(card, "") == card
    with pytest.raises(FormatError, match="metadata is not YAML"):
        merged(card, "---\na: [\n---\n\nText")
    with pytest.raises(FormatError, match="is a list, not a mapping"):
        merged(card, "---\n- a\n---\n\nText")


def test_text_survives_a_lost_end_mark():
    card = render_card(repo())
    once = merged(card, card.replace(END, "") + "HAND")
    assert "HAND" in merged(card, once)


def test_example_cards_are_current(tmp_path: Path):
    build = runpy.run_path(str(ROOT / "hub_cards" / "build.py"))
    build["main"](tmp_path)
    for name in build["CARDS"]:
        fresh = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert fresh == (ROOT / "hub_cards" / name / "README.md").read_text(encoding="utf-8")
        assert strangers(fresh) == []
        assert (tmp_path / name / "plots").is_dir()
    real = (ROOT / "hub_cards" / "qwen3-30b-a3b-english-shared" / "README.md").read_text()
    steering = read_repo(ROOT / "examples" / "qwen3-30b-a3b-english-shared").steerings[0]
    assert steering.fingerprint in real
    assert ModelCard(real).data.base_model == "Qwen/Qwen3-30B-A3B"


def test_the_edit_of_a_steering_is_what_it_does():
    weights, force = torch.zeros(1, 4), torch.tensor([[1, -1, 0, 0]])
    hard = RouterSteering("h", [0], weights, force)
    said = [edit.where for edit in edits(hard)]
    assert said == ["Eq. 5", "Eq. 8"]
    both = edits(RouterSteering("h", [0], weights + 1, force))
    assert [edit.where for edit in both] == ["Eq. 4", "Eq. 5", "Eq. 8"]
    assert [e.where for e in edits(RouterSteering("h", [0], weights))] == ["Eq. 4"]
