"""Profiles: the recorder's files, validation, save and load; the selection of shared experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import real_data

from steered_moe import RoutingProfile
from steered_moe.divergence import divergence
from steered_moe.errors import FormatError, SteeringError
from steered_moe.selection import language_shares, shared_experts

REAL = "real_routing/qwen3_30b_a3b_mgsm"


def recording(counts: list[list[int]], tokens: int = 10) -> dict:
    return {
        str(layer): {
            **{
                str(e): {"activation_tokens": n, "gate_values_sum": n / 4}
                for e, n in enumerate(row)
            },
            "total_tokens": tokens,
        }
        for layer, row in enumerate(counts)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two languages, two layers, four experts."""
    (tmp_path / "mgsm_en.json").write_text(json.dumps(recording([[8, 6, 4, 2], [9, 9, 1, 1]])))
    (tmp_path / "mgsm_zh.json").write_text(json.dumps(recording([[2, 6, 8, 4], [1, 9, 9, 1]])))
    return tmp_path


def test_the_recorder_is_imported_number_by_number(folder: Path):
    profile = RoutingProfile.from_recorder(folder)
    assert profile.languages == ("en", "zh")
    assert profile.layers == (0, 1)
    assert profile.counts[1].tolist() == [[2, 6, 8, 4], [1, 9, 9, 1]]
    assert profile.weight_sums[0, 0].tolist() == [2.0, 1.5, 1.0, 0.5]
    assert profile.frequency[0, 0].tolist() == [0.8, 0.6, 0.4, 0.2]
    assert profile.of(["zh"]).counts.tolist() == profile.counts[1:].tolist()
    with pytest.raises(FormatError, match="sw not in the profile; it has en, zh"):
        profile.of(["sw"])


def test_save_and_load_are_exact(folder: Path, tmp_path: Path):
    profile = RoutingProfile.from_recorder(folder)
    profile.save(tmp_path / "saved")
    loaded = RoutingProfile.load(tmp_path / "saved")
    assert (loaded.languages, loaded.layers) == (profile.languages, profile.layers)
    for name in ("counts", "weight_sums", "tokens"):
        assert torch.equal(getattr(loaded, name), getattr(profile, name))
    (tmp_path / "saved" / "profile.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="cannot be read"):
        RoutingProfile.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("mgsm_sw.json", "[]", "not a JSON object"),
        ("mgsm_sw.json", "{", "cannot be read"),
        ("mgsm_sw.json", '{"0": {"0": {}}}', "not a file of the routing recorder"),
        ("mgsm_sw.json", json.dumps(recording([[1, 2, 3, 4]])), "differ in layers or experts"),
        ("mgsm_sw.json", json.dumps(recording([[-1] * 4] * 2)), "negative or non-finite"),
    ],
)
def test_damaged_recordings_are_refused(folder: Path, name: str, content: str, says: str):
    (folder / name).write_text(content)
    with pytest.raises(FormatError, match=says):
        RoutingProfile.from_recorder(folder)


def test_an_empty_folder_and_wrong_shapes_are_refused(tmp_path: Path):
    with pytest.raises(FormatError, match="holds no"):
        RoutingProfile.from_recorder(tmp_path)
    with pytest.raises(FormatError, match="cannot have"):
        RoutingProfile(("en",), (0,), torch.ones(1, 2, 4), torch.ones(1, 1))


def test_shares_and_shared_experts_by_hand(folder: Path):
    profile = RoutingProfile.from_recorder(folder)
    share = language_shares(profile, top=2)
    # layer 0: en keeps experts 0 and 1, zh keeps 2 and 1; layer 1: en 0 and 1, zh 1 and 2
    assert share[0, 0].tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert share[1, 0].tolist() == pytest.approx([0.0, 0.5, 1.0, 0.0])
    steering = shared_experts(profile, top=2, threshold=0.7, layers=[0, 1])
    assert steering.scale == "abs"
    assert steering.layers.tolist() == [0, 1]
    assert steering.weights[0].tolist() == pytest.approx([0.0, 0.5, 0.0, 0.0])
    lopsided = shared_experts(profile, top=4, threshold=0.7, layers=[0], source="zh")
    assert lopsided.weights[0].tolist() == pytest.approx([0.0, 0.5, 2 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"languages": ["en"]}, "at least two"),
        ({"languages": ["en", "en"]}, "at least two"),
        ({"source": "sw"}, "source is 'sw'"),
        ({"top": 0}, "top is 0"),
        ({"top": 5}, "between 1 and 4"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": 0.4, "top": 2}, "no expert in layers"),
        ({"layers": [7]}, "no expert in layers"),
    ],
)
def test_settings_out_of_range_are_refused(folder: Path, settings, says):
    profile = RoutingProfile.from_recorder(folder)
    with pytest.raises(SteeringError, match=says):
        shared_experts(profile, **{"layers": [0, 1], "top": 2} | settings)


def test_real_recordings_sum_to_top_k():
    profile = RoutingProfile.from_recorder(real_data(REAL))
    assert profile.languages == ("bn", "de", "en", "es", "fr", "ja", "sw", "zh")
    assert profile.counts.shape == (8, 48, 128)
    assert profile.tokens[2].unique().tolist() == [18286]
    sums = profile.frequency.sum(dim=-1)
    assert ((sums - 8).abs() < 8 * 4e-4).all()


def independent_selection(folder: Path) -> dict[tuple[int, int], float]:
    """2601.14050's released rule in plain Python: (layer, expert) -> share of English."""
    files = {code: json.loads((folder / f"mgsm_{code}.json").read_text()) for code in ("en", "zh")}
    chosen = {}
    for layer in range(10, 40):
        kept: dict[str, dict[int, float]] = {}
        for code, content in files.items():
            table = content[str(layer)]
            rates = {
                e: table[str(e)]["activation_tokens"] / table["total_tokens"] for e in range(128)
            }
            best = sorted(rates, key=rates.__getitem__, reverse=True)[:20]
            kept[code] = {expert: rates[expert] for expert in best}
        for expert in range(128):
            rates_here = [kept[code].get(expert, 0.0) for code in ("en", "zh")]
            shares = [rate / (sum(rates_here) + 1e-10) for rate in rates_here]
            if any(share > 0 for share in shares) and all(share < 0.7 for share in shares):
                chosen[layer, expert] = shares[0]
    return chosen


def test_the_real_selection_gives_420_experts():
    folder = real_data(REAL)
    steering = shared_experts(RoutingProfile.from_recorder(folder))
    assert steering.layers.tolist() == list(range(10, 40))
    per_layer = (steering.weights != 0).sum(dim=1)
    values = steering.weights[steering.weights != 0]
    assert (int(per_layer.sum()), int(per_layer.min()), int(per_layer.max())) == (420, 9, 18)
    assert [round(float(v), 2) for v in (values.min(), values.max())] == [0.36, 0.68]
    assert round(float(values.mean()), 3) == 0.507
    expected = independent_selection(folder)
    found = {
        (int(steering.layers[row]), expert): float(steering.weights[row, expert])
        for row, expert in steering.weights.nonzero().tolist()
    }
    assert found == pytest.approx(expected, rel=1e-6)
    other = shared_experts(RoutingProfile.from_recorder(folder), top=15, threshold=0.6)
    assert other.num_steered_experts != 420


TABLE = "language\tlayer\texpert\tcount\nen\t3\t0\t4\nen\t3\t1\t2\nen\t5\t2\t6\n"


def test_a_table_of_counts_is_imported(tmp_path: Path):
    file = tmp_path / "counts.tsv"
    file.write_text(TABLE)
    profile = RoutingProfile.from_table(file, top_k=2)
    assert (profile.languages, profile.layers, profile.weight_sums) == (("en",), (3, 5), None)
    assert profile.counts[0].tolist() == [[4.0, 2.0, 0.0], [0.0, 0.0, 6.0]]
    assert profile.tokens.tolist() == [[3.0, 3.0]]
    profile.save(tmp_path / "saved")
    assert RoutingProfile.load(tmp_path / "saved").fingerprint == profile.fingerprint
    comma = tmp_path / "counts.csv"
    comma.write_text(TABLE.replace("\t", ","))
    assert RoutingProfile.from_table(comma, top_k=2).fingerprint == profile.fingerprint


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        (TABLE, {"top_k": 4}, "not one whole number of tokens"),
        (TABLE + "en\t5\t1\t1\n", {}, "not one whole number of tokens"),
        (TABLE + "en\t5\t1\t2\n", {}, "not one whole number of tokens"),
        (TABLE + "en\t5\t2\t1\n", {}, r"line 5: \('en', 5, 2\) is there twice"),
        (TABLE + "en\t5\tx\t1\n", {}, "line 5: invalid literal"),
        (TABLE + "en\t5\n", {}, "line 5 has not as many columns"),
        (TABLE + "en\t5\t0\t-1\n", {}, "not one whole number"),
        (TABLE, {"count": "topk_count"}, "has no column topk_count; it has language, layer"),
        (TABLE, {"where": {"language": "fr"}}, "has no row where"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path: Path, text: str, options, says: str):
    file = tmp_path / "counts.tsv"
    file.write_text(text)
    with pytest.raises(FormatError, match=says):
        RoutingProfile.from_table(file, **{"top_k": 2, **options})


def test_a_missing_table_is_refused(tmp_path: Path):
    with pytest.raises(FormatError, match=r"none.tsv cannot be read"):
        RoutingProfile.from_table(tmp_path / "none.tsv", top_k=2)


def test_the_real_table_of_domains():
    file = real_data("real_routing/olmoe_domains") / "expert_counts.tsv"
    options = {"language": "domain", "count": "topk_count"}
    olmoe = RoutingProfile.from_table(file, top_k=8, where={"model": "olmoe"}, **options)
    assert set(olmoe.languages) == {"arxiv", "book", "c4", "github", "tulu", "wikipedia"}
    assert olmoe.num_experts == 64
    assert olmoe.of(["arxiv"]).tokens[0].unique().tolist() == [208896.0]
    assert olmoe.of(["arxiv"]).counts[0, 0, 0] == 204013
    curves = {
        domain: float(curve.mean()) for domain, curve in divergence(olmoe, pivot="c4").items()
    }
    assert min(curves, key=curves.get) in ("book", "wikipedia", "tulu")
    assert max(curves, key=curves.get) in ("github", "arxiv")
    mistral = RoutingProfile.from_table(file, top_k=2, where={"model": "mistral"}, **options)
    assert mistral.num_experts == 8
    with pytest.raises(FormatError, match="twice; choose rows with where="):
        RoutingProfile.from_table(file, top_k=8, **options)


def test_the_fingerprint_follows_what_was_measured(folder: Path):
    profile = RoutingProfile.from_recorder(folder)
    assert len(profile.fingerprint) == 64
    assert replace(profile, about={"model": "x"}).fingerprint == profile.fingerprint
    more = profile.counts.clone()
    more[0, 0, 0] += 1
    others = [
        replace(profile, counts=more),
        replace(profile, weight_sums=None),
        replace(profile, languages=profile.languages[::-1]),
        replace(profile, layers=tuple(layer + 1 for layer in profile.layers)),
    ]
    assert profile.fingerprint not in {other.fingerprint for other in others}
