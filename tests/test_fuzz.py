"""Random bytes and random values in a steering repo: refused by our own errors, or read."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steered_moe import storage
from steered_moe.card_text import metadata
from steered_moe.cards import render_card
from steered_moe.errors import SteeredMoEError
from steered_moe.repo_config import CONFIG_FILE, TENSOR_FILE, check_config, read_config
from steered_moe.storage import read_repo

INPUTS = int(os.environ.get("STEERED_MOE_FUZZ", "10000"))


def share(percent: int) -> Callable[..., Any]:
    """Settings for a test that takes its part of all the inputs."""
    return settings(
        max_examples=INPUTS * percent // 100,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


ENTRY = {
    "name": "middle",
    "scale": "std",
    "strength": 0.5,
    "layers": [2, 3],
    "method": "router_gap",
    "parameters": {"share": 0.1},
    "languages": ["sw", "yo"],
    "corpora": ["flores", "mine"],
}
CONFIG: dict[str, Any] = {
    "model_type": "steered_moe",
    "architectures": ["SteeredMoEForCausalLM"],
    "format_version": 1,
    "base_model_name_or_path": "user/base",
    "base_model_revision": "main",
    "base_model_type": "qwen3_moe",
    "num_hidden_layers": 6,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "steerings": [ENTRY],
    "default_steering": "middle",
    "shiny": {"new": [1, None]},
}
HEADER: dict[str, Any] = {
    "middle.layers": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
    "middle.weights": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 32]},
    "middle.force": {"dtype": "I8", "shape": [2, 2], "data_offsets": [32, 36]},
}
PAYLOAD = struct.pack("<qq4f4b", 2, 3, 0.5, -1.0, 0.0, 2.0, 1, 0, -1, 0)


def raw(header: bytes, payload: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


TEXT = json.dumps(CONFIG).encode()
TENSORS = raw(json.dumps(HEADER).encode(), PAYLOAD)

KEYS = st.sampled_from([*CONFIG, *ENTRY, "auto_map", "x", "__class__", "", "a|b", "<b>", "\x1b"])
INFINITE = st.sampled_from([float("inf"), float("-inf"), float("nan")])
NUMBERS = st.sampled_from([0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, 0.0, -0.0, 1e308, 1e-320])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    INFINITE,
    st.integers() | st.floats(),
    st.text(max_size=8),
    st.builds(lambda text: text * 2000, st.text(min_size=1, max_size=2)),
    st.sampled_from(["", "std", "middle", "../x", "/x", "user/x", "a\nb", "`", "{{ 7 }}", "---"]),
)


def nested(value: Any, levels: int, key: str) -> Any:
    for _ in range(levels):
        value = {key: value} if key else [value]
    return value


DEEP = st.builds(
    nested, SCALARS, st.sampled_from([50, 99, 150, 400, 800]), st.sampled_from(["", "a"])
)
INNER = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
VALUES = st.one_of(SCALARS, SCALARS, INNER, INNER, DEEP)
KINDS = st.sampled_from(["I64", "F32", "I8", "U64", "BF16", "BOOL", "C64", "F4", "F8_E5M2", "X"])
SIZES = st.sampled_from([0, 1, 2, 4, 16, 32, 36, -1, 2**31, 2**62, 2**63, 2**64, 2.0, "2", None])


def places(value: Any, levels: int = 9) -> list[tuple[Any, Any]]:
    """Every list or mapping within a value, with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    here = [(value, key) for key in keys]
    inner = [value[key] for key in keys if isinstance(value[key], (dict, list))]
    return here + [place for one in inner if levels for place in places(one, levels - 1)]


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A value that is replaced, deleted, doubled or added to in one to three places."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(value)):
            break
        holder, key = draw(st.sampled_from(found))
        how = draw(st.sampled_from(["replace", "replace", "delete", "double", "add"]))
        if how == "replace":
            holder[key] = draw(VALUES)
        elif how == "delete":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, holder[key] if how == "double" else draw(VALUES))
        else:
            holder[draw(KEYS)] = holder[key] if how == "double" else draw(VALUES)
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which some are flipped, cut out or put in, or the end is missing."""
    kept = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(kept)))
        how = draw(st.sampled_from(["flip", "flip", "cut", "insert", "end"]))
        if how == "flip" and start < len(kept):
            kept[start] ^= draw(st.integers(1, 255))
        elif how == "cut":
            del kept[start : start + draw(st.integers(1, 40))]
        elif how == "insert":
            kept[start:start] = draw(st.binary(max_size=8))
        elif how == "end":
            del kept[start:]
    return bytes(kept)


ITEMS = st.fixed_dictionaries(
    {
        "dtype": KINDS,
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3),
    }
)
NAMES = st.sampled_from([*HEADER, "__metadata__", "middle", "x.layers", "middle.x", "\x1b", ""])
HEADERS = changed(HEADER) | st.dictionaries(NAMES, ITEMS | VALUES, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def refused(error: SteeredMoEError) -> bool:
    assert len(str(error)) <= 1000
    assert str(error).isprintable()
    return False


def check(folder: Path, config: bytes, tensors: bytes) -> bool:
    """Read a repo of these bytes; what is accepted can be written, read again and described."""
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / TENSOR_FILE).write_bytes(tensors)
    try:
        repo = read_repo(folder)
    except SteeredMoEError as error:
        return refused(error)
    (folder / CONFIG_FILE).unlink()
    repo.write(folder)
    again = read_repo(folder)
    assert again.config() == repo.config()
    assert [one.fingerprint for one in again.steerings] == [s.fingerprint for s in repo.steerings]
    assert metadata(render_card(repo))["library_name"] == "steered-moe"
    return True


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


@share(30)
@given(config=changed(CONFIG))
def test_changed_configs(folder: Path, config):
    check(folder, as_json(config), TENSORS)


@share(10)
@given(value=VALUES | changed(CONFIG))
def test_any_value_as_config(value):
    try:
        check_config(value)
    except SteeredMoEError as error:
        refused(error)


@share(15)
@given(data=damaged(TEXT) | st.binary(max_size=64))
def test_damaged_configs(folder: Path, data):
    (folder / CONFIG_FILE).write_bytes(data)
    try:
        read_config(folder / CONFIG_FILE)
    except SteeredMoEError as error:
        refused(error)
        return
    check(folder, data, TENSORS)


@share(20)
@given(data=damaged(TENSORS) | st.binary(max_size=64))
def test_damaged_tensors(folder: Path, data):
    check(folder, TEXT, data)


@share(25)
@given(header=HEADERS, payload=st.just(PAYLOAD) | st.binary(max_size=64))
def test_changed_headers(folder: Path, header, payload):
    check(folder, TEXT, raw(as_json(header), payload))


def test_the_repo_that_is_changed_is_a_good_one(folder: Path):
    assert check(folder, TEXT, TENSORS)
    assert not check(folder, TEXT, TENSORS[:-1])
    assert not check(folder, TEXT[:-1], TENSORS)


def test_both_outcomes_are_common(folder: Path):
    """Inputs that are all refused at the door would show nothing."""
    seen: list[bool] = []

    @share(2)
    @given(config=changed(CONFIG), header=HEADERS)
    def run(config: Any, header: Any) -> None:
        seen.append(check(folder, as_json(config), TENSORS))
        seen.append(check(folder, TEXT, raw(as_json(header), PAYLOAD)))

    run()
    assert 0.05 < sum(seen) / len(seen) < 0.95


@pytest.mark.parametrize("error", [KeyError, AttributeError, OverflowError, BaseException])
def test_an_error_of_another_class_would_be_seen(folder: Path, monkeypatch, error):
    def broken(*args: Any) -> None:
        raise error("raw")

    monkeypatch.setattr(storage, "_check_keys", broken)
    with pytest.raises(error):
        check(folder, TEXT, TENSORS)
