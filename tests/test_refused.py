"""Bad steering repos and bases: each is refused with an error that names value and fix."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from steered_moe import RouterSteering, SteeredMoEForCausalLM
from steered_moe.errors import (
    BaseModelError,
    FormatError,
    RouterError,
    SteeredMoEError,
    SteeringError,
)

Change = Callable[[Path], Any]


def config(**fields: Any) -> Change:
    """Set fields of config.json; a value of None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | fields
        kept = {key: value for key, value in content.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def entry(**fields: Any) -> Change:
    """Set fields of the only steering in config.json."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["steerings"][0] |= fields
        (folder / "config.json").write_text(json.dumps(content))

    return change


def tensors(**changes: torch.Tensor | None) -> Change:
    """Replace, add or (None) remove tensors of the steering "middle"."""

    def change(folder: Path) -> None:
        content: dict[str, Any] = load_file(folder / "steering.safetensors")
        content |= {f"middle.{key}": value for key, value in changes.items()}
        kept = {key: value for key, value in content.items() if value is not None}
        save_file(kept, folder / "steering.safetensors")

    return change


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder: Path) -> None:
    path = folder / "steering.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def corrupt(folder: Path) -> None:
    path = folder / "steering.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def base(make: Callable[[Path], Any]) -> Change:
    """Put another base model where the steering repo points to."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder.parent / "base")
        make(folder.parent / "base")

    return change


def qwen(**fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder.parent / "base" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


SMALL = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
ROWS = torch.zeros(2, 16)
FIVE = torch.zeros(2, 16, dtype=torch.int8).index_fill(1, torch.arange(5), 1)
BANS = torch.full((2, 16), -1, dtype=torch.int8).index_fill(1, torch.arange(3), 0)

CASES: list[tuple[str, Change, type[SteeredMoEError], str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), FormatError, "config.json is missing"),
    ("no tensors", lambda f: (f / "steering.safetensors").unlink(), FormatError, "is missing"),
    ("config is not JSON", write("config.json", b"{"), FormatError, "is not JSON"),
    ("config is not UTF-8", write("config.json", b"\xff\xfe"), FormatError, "is not JSON"),
    ("config is a list", write("config.json", b"[]"), FormatError, "model_type is 'list'"),
    ("a plain model", config(model_type="qwen3_moe"), FormatError, "use SteeredMoEForCausalLM.from_base"),
    ("a newer format", config(format_version=2), FormatError, "format_version 2 needs a newer"),
    ("no format version", config(format_version=None), FormatError, "format_version is None"),
    ("a format of zero", config(format_version=0), FormatError, "format_version is 0"),
    ("a format in words", config(format_version="1"), FormatError, "format_version is '1'"),
    ("no steerings", config(steerings=[]), FormatError, "at least one steering"),
    ("steerings of a kind", config(steerings={"a": 1}), FormatError, "at least one steering"),
    ("a steering without name", config(steerings=[{"scale": "std"}]), FormatError, "has no name"),
    ("an unknown scale", entry(scale="variance"), FormatError, "'variance'; use one of std"),
    ("a strength in words", entry(strength="high"), FormatError, "strength of 'middle' is 'high'"),
    ("an infinite strength", entry(strength=float("inf")), FormatError, "strength of 'middle' is inf"),
    ("a name with a dot", entry(name="a.b"), FormatError, "name is 'a.b'"),
    ("another name", entry(name="late"), FormatError, "lacks late.layers, late.weights"),
    ("experts in words", config(num_experts="many"), FormatError, "num_experts is 'many'"),
    ("other experts", config(num_experts=8), FormatError, "has 16 experts but config.json says"),
    ("no base", config(base_model_name_or_path=None), BaseModelError, "pass base_model="),
    ("tensors of text", write("steering.safetensors", b"weights"), FormatError, "not a readable"),
    ("an empty file", write("steering.safetensors", b""), FormatError, "not a readable"),
    ("a pickle", write("steering.safetensors", pickle.dumps({"a": 1})), FormatError, "pickles are never"),
    ("a truncated file", truncate, FormatError, "truncated"),
    ("a damaged header", corrupt, FormatError, "damaged"),
    ("missing weights", tensors(weights=None), FormatError, "lacks middle.weights"),
    ("missing layers", tensors(layers=None), FormatError, "lacks middle.layers"),
    ("an extra tensor", tensors(extra=ROWS), FormatError, "holds middle.extra"),
    ("16-bit weights", tensors(weights=ROWS.half()), FormatError, "is torch.float16; it must be"),
    ("32-bit layers", tensors(layers=torch.tensor([2, 3], dtype=torch.int32)), FormatError, "int32"),
    ("float force", tensors(force=ROWS), FormatError, "middle.force is torch.float32"),
    ("NaN", tensors(weights=ROWS + float("nan")), SteeringError, "weights[0, 0] is nan"),
    ("infinity", tensors(weights=ROWS + float("inf")), SteeringError, "weights[0, 0] is inf"),
    ("a row too few", tensors(weights=ROWS[:1]), SteeringError, "1 rows but there are 2 layers"),
    ("flat weights", tensors(weights=ROWS[0]), SteeringError, "shape (16,)"),
    ("a layer twice", tensors(layers=torch.tensor([2, 2])), SteeringError, "layer 2 appears twice"),
    ("a negative layer", tensors(layers=torch.tensor([-1, 2])), SteeringError, "layer -1"),
    ("force of 2", tensors(force=torch.full((2, 16), 2, dtype=torch.int8)), SteeringError, "holds 2"),
    ("narrow force", tensors(force=FIVE[:, :8].clone()), SteeringError, "force has shape (2, 8)"),
    ("a layer too far", tensors(layers=torch.tensor([2, 6])), BaseModelError, "layer 6 but"),
    ("five of four forced", tensors(force=FIVE), BaseModelError, "layer 2: 5 experts are forced"),
    ("three of four left", tensors(force=BANS), BaseModelError, "layer 2: bans leave 3 experts"),
    ("other top-k", config(num_experts_per_tok=8), BaseModelError, "num_experts_per_tok=8"),
    ("other layers", config(num_hidden_layers=48), BaseModelError, "num_hidden_layers=48"),
    ("another base type", config(base_model_type="gpt_oss"), BaseModelError, "made for a 'gpt_oss'"),
    ("base of 8 experts", qwen(num_experts=8, num_local_experts=8), BaseModelError, "made for num_experts=16"),
    ("base of 3 layers", qwen(num_hidden_layers=3), BaseModelError, "num_hidden_layers=6"),
    ("a dense layer", qwen(mlp_only_layers=[3]), BaseModelError, "layer 3 of Qwen3MoeForCausalLM"),
    (
        "a dense base",
        lambda f: (config(base_model_type=None)(f), base(LlamaConfig(**SMALL).save_pretrained)(f)),
        RouterError,
        "LlamaForCausalLM has no router: it is a dense model",
    ),
    ("a Mixtral base", base(MixtralConfig(**SMALL).save_pretrained), BaseModelError, "is 'mixtral'"),
]  # fmt: skip


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good steering repo with its base; loading weights fails the test."""
    shutil.copytree(tiny, tmp_path / "repo")

    def loaded(*args: Any, **kwargs: Any) -> None:
        pytest.fail("weights were loaded before the check")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    return tmp_path / "repo" / "steered"


@pytest.mark.parametrize(
    ("change", "error", "says"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_it_is_refused_before_weights_are_loaded(folder: Path, change, error, says):
    change(folder)
    with pytest.raises(error) as caught:
        SteeredMoEForCausalLM.from_pretrained(folder)
    assert type(caught.value) is error
    assert says in str(caught.value)


def test_the_same_repo_without_a_fault_gets_to_the_weights(folder: Path):
    with pytest.raises(pytest.fail.Exception, match="weights were loaded"):
        SteeredMoEForCausalLM.from_pretrained(folder)


def test_there_are_at_least_thirty():
    assert len(CASES) >= 30


@pytest.mark.parametrize("where", ["./nowhere", "a/b/c", "~/x"])
def test_a_place_that_does_not_exist(where):
    with pytest.raises(FormatError, match="no folder here, and no Hub id"):
        RouterSteering.load(where)


def test_a_revision_of_a_folder(folder: Path):
    with pytest.raises(FormatError, match="local folder and has no revision 'v1'"):
        SteeredMoEForCausalLM.from_pretrained(folder, revision="v1")
