"""Profiles: the recorder's files, validation, save and load; the selection of shared experts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import real_data
from safetensors.torch import save_file

from steered_moe import RoutingProfile
from steered_moe.divergence import divergence
from steered_moe.errors import FormatError, SteeringError
from steered_moe.merging import stack
from steered_moe.provenance import provenance_of
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


@pytest.mark.parametrize(
    ("names", "languages"),
    [
        (["mgsm_en", "mgsm_zh"], ("en", "zh")),
        (["global_mmlu_en", "global_mmlu_zh"], ("en", "zh")),
        (["mgsm_eng_Latn", "mgsm_zho_Hans"], ("eng_Latn", "zho_Hans")),
        (["x_ntrex_eng-US", "x_ntrex_sr_Latn_RS"], ("eng-US", "sr_Latn_RS")),
        (["my_corpus_english", "my_corpus_swahili"], ("english", "swahili")),
    ],
)
def test_the_language_is_what_the_name_ends_in(tmp_path: Path, names, languages):
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps(recording([[5, 5, 5, 5]])))
    assert RoutingProfile.from_recorder(tmp_path).languages == languages


def test_two_files_of_one_language_are_refused(folder: Path):
    (folder / "belebele_zh.json").write_text(json.dumps(recording([[5] * 4] * 2)))
    with pytest.raises(FormatError, match=r"belebele_zh.json and .*mgsm_zh.json are both of zh"):
        RoutingProfile.from_recorder(folder)


@pytest.mark.parametrize("change", ["more", "fewer"])
def test_a_layer_with_other_experts_is_named(folder: Path, change: str):
    content = recording([[5, 5, 5, 5]] * 3)
    if change == "more":
        content["1"]["4"] = {"activation_tokens": 9, "gate_values_sum": 1.0}
    else:
        del content["1"]["3"]
    (folder / "mgsm_sw.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"mgsm_sw.json: layer 1 has not the experts of layer 0"):
        RoutingProfile.from_recorder(folder)


def profile_of(counts: list[list[float]], tokens: float = 10.0, **fields) -> RoutingProfile:
    """One language, a row of counts per layer."""
    shape = (1, len(counts))
    values = {"languages": ("en",), "layers": tuple(range(len(counts)))} | fields
    return RoutingProfile(counts=torch.tensor([counts]), tokens=torch.full(shape, tokens), **values)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layers": (3, 3)}, "layers of a profile name 3 twice"),
        ({"layers": (-1, 0)}, "they count from 0"),
        ({"tokens": 8.0}, "expert 0 of layer 1 is counted 9 times in en, which has 8 tokens"),
        ({"tokens": -1.0}, "tokens of a profile holds negative"),
    ],
)
def test_numbers_that_cannot_be_are_refused(fields, says: str):
    counts = [[8.0, 6.0, 4.0, 2.0], [9.0, 9.0, 1.0, 1.0]]
    assert profile_of(counts, tokens=9.0).top_k == 2
    assert profile_of(counts, tokens=8.992).num_experts == 4  # counts that were summed in bf16
    with pytest.raises(FormatError, match=says):
        profile_of(counts, **fields)


def test_a_language_is_there_once(folder: Path):
    profile = RoutingProfile.from_recorder(folder)
    with pytest.raises(FormatError, match="languages of a profile name en twice"):
        profile.of(["en", "zh", "en"])
    with pytest.raises(FormatError, match="name zh twice"):
        stack([profile, profile.of(["zh"])])


def test_a_language_without_tokens_has_no_frequency(folder: Path):
    profile = RoutingProfile.from_recorder(folder)
    none = replace(profile.of(["zh"]), languages=("xx",), counts=torch.zeros(1, 2, 4))
    none = replace(none, tokens=torch.zeros(1, 2), weight_sums=torch.zeros(1, 2, 4))
    both = stack([profile, none])
    for name in ("frequency", "top_k", "routing_distributions"):
        with pytest.raises(FormatError, match=r"no tokens of xx; choose the others with of\(\)"):
            getattr(both, name)
    assert torch.equal(both.of(["en", "zh"]).frequency, profile.frequency)
    texts = replace(none, sequences=torch.zeros(1), entropy_sums=torch.zeros(1, 2))
    with pytest.raises(FormatError, match="no texts of xx"):
        texts.entropy  # noqa: B018


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


TABLE = "language\tlayer\texpert\tcount\nen\t3\t0\t3\nen\t3\t1\t3\nen\t5\t2\t3\nen\t5\t3\t3\n"


def test_a_table_of_counts_is_imported(tmp_path: Path):
    file = tmp_path / "counts.tsv"
    file.write_text(TABLE)
    profile = RoutingProfile.from_table(file, top_k=2)
    assert (profile.languages, profile.layers, profile.weight_sums) == (("en",), (3, 5), None)
    assert profile.counts[0].tolist() == [[3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0]]
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
        (TABLE + "en\t5\t2\t1\n", {}, r"line 6: \('en', 5, 2\) is there twice"),
        (TABLE + "en\t5\tx\t1\n", {}, "line 6: invalid literal"),
        (TABLE + "en\t5\n", {}, "line 6 has not as many columns"),
        (TABLE + "en\t5\t0\t-1\n", {}, "not one whole number"),
        (TABLE, {"count": "topk_count"}, "has no column topk_count; it has language, layer"),
        (TABLE, {"where": {"language": "fr"}}, "has no row where"),
        (TABLE + "en\t5\t-1\t1\n", {}, "line 6: layer 5, expert -1; both count from 0"),
        (TABLE + "en\t-2\t0\t1\n", {}, "line 6: layer -2, expert 0; both count from 0"),
        (TABLE, {"top_k": 5}, "top_k is 5; it must lie between 1 and 4"),
        (TABLE, {"top_k": 0}, "top_k is 0; it must lie"),
        (TABLE, {"num_experts": 3}, "names expert 3, but num_experts is 3"),
        (TABLE, {"top_k": 3}, "counted more often than there are tokens"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path: Path, text: str, options, says: str):
    file = tmp_path / "counts.tsv"
    file.write_text(text)
    with pytest.raises(FormatError, match=says):
        RoutingProfile.from_table(file, **{"top_k": 2, **options})


def test_experts_that_a_table_lacks_at_its_end_can_be_counted(tmp_path: Path):
    file = tmp_path / "counts.tsv"
    file.write_text(TABLE)
    profile = RoutingProfile.from_table(file, top_k=2, num_experts=8)
    assert profile.num_experts == 8
    assert profile.counts[0, 1].tolist() == [0, 0, 3, 3, 0, 0, 0, 0]


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


def about(profile: RoutingProfile, **more) -> RoutingProfile:
    return replace(profile, about={"model": "m", "revision": "1", **more})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"revision": "2"}, r"revision \('1', '2'\)"),
        ({"chat": True}, r"chat \(False, True\)"),
        ({"template_tokens": False}, "template_tokens"),
        ({"generation_prompt": False}, "generation_prompt"),
        ({"template_kwargs": {"enable_thinking": False}}, "template_kwargs"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"model_sha256": "b"}, "model_sha256"),
        ({"tokenizer_sha256": "b"}, "tokenizer_sha256"),
    ],
)
def test_only_what_was_measured_alike_is_put_together(folder: Path, change, says: str):
    profile = RoutingProfile.from_recorder(folder)
    known = {"dtype": "float32", "model_sha256": "a", "tokenizer_sha256": "a"}
    one, other = about(profile, **known), about(profile, **known | change)
    with pytest.raises(FormatError, match=f"they differ in {says}"):
        one + other
    with pytest.raises(FormatError, match=f"they differ in {says}"):
        stack([one.of(["en"]), other.of(["zh"])])
    old = about(profile)  # from before dtype and sha256 were recorded
    assert (one + old).about["model"] == "m"


def test_stack_needs_the_same_sums(folder: Path):
    profile = RoutingProfile.from_recorder(folder)
    fewer = replace(profile.of(["zh"]), weight_sums=None)
    for pair in ([profile.of(["en"]), fewer], [fewer, profile.of(["en"])]):
        with pytest.raises(FormatError, match=r"they differ in sums \("):
            stack(pair)
    kept = [
        replace(profile.of([name]), probabilities=torch.full((1, texts, 2, 4), 0.25))
        for name, texts in (("en", 3), ("zh", 2))
    ]
    with pytest.raises(FormatError, match=r"need as many each, not \[3, 2\]"):
        stack(kept)


def test_the_record_of_a_sum_names_every_corpus(folder: Path):
    profile = RoutingProfile.from_recorder(folder)
    a = about(profile, corpus="flores", limit=100)
    b = about(profile, corpus="mgsm")
    c = about(profile, corpus="gsm8k", limit=100)
    assert (a + a).about == a.about
    assert (a + b).about == {
        "model": "m",
        "revision": "1",
        "corpus": "flores; mgsm",
        "parts": [{"corpus": "flores", "limit": 100}, {"corpus": "mgsm"}],
    }
    three = (a + b) + c
    assert three.about["corpus"] == "flores; mgsm; gsm8k"
    assert three.about == (a + (b + c)).about
    assert len(three.about["parts"]) == 3
    assert provenance_of("x", {}, ["en"], a + b)["corpora"] == ["flores; mgsm"]


def test_a_killed_save_leaves_the_old_profile_or_is_noticed(folder: Path, tmp_path: Path):
    profile = RoutingProfile.from_recorder(folder)
    place, other = tmp_path / "saved", tmp_path / "other"
    profile.save(place)
    turned = profile.of(["zh", "en"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steered_moe.profile_files.save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            turned.save(place)
    assert RoutingProfile.load(place).fingerprint == profile.fingerprint
    assert sorted(path.name for path in place.iterdir()) == [
        *("profile.json", "profile.safetensors")
    ]
    turned.save(other)
    for name in ("profile.json", "profile.safetensors"):  # killed between the two files
        mixed = shutil.copytree(place, tmp_path / f"mixed-{name}")
        shutil.copy(other / name, mixed / name)
        with pytest.raises(FormatError, match="are not of one profile"):
            RoutingProfile.load(mixed)


def killed(tensors, path: Path, **options) -> None:
    path.write_bytes(b"half")
    raise KeyboardInterrupt


def test_a_profile_from_before_the_sha256_is_read(folder: Path, tmp_path: Path):
    profile = RoutingProfile.from_recorder(folder)
    profile.save(tmp_path / "old")
    save_file(profile.tensors(), tmp_path / "old" / "profile.safetensors")
    assert RoutingProfile.load(tmp_path / "old").fingerprint == profile.fingerprint


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("about", None, "about in profile.json is None, no JSON object"),
        ("about", [1], "no JSON object"),
        ("layers", ["0", "1"], "no list of whole numbers"),
        ("layers", [0.0, 1.0], "no list of whole numbers"),
        ("languages", [1, 2], "no list of texts"),
        ("languages", "en", "no list of texts"),
    ],
)
def test_fields_of_another_type_are_refused(folder: Path, tmp_path: Path, field, value, says: str):
    RoutingProfile.from_recorder(folder).save(tmp_path / "p")
    file = tmp_path / "p" / "profile.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(FormatError, match=says):
        RoutingProfile.load(tmp_path / "p")


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
