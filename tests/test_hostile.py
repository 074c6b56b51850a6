"""Hostile steering repos on the Hub: no code runs, nothing outside the cache, bounded memory."""

# ruff: noqa: E501 (tables)

from __future__ import annotations

import io
import json
import os
import pickle
import re
import runpy
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from markdown_it import MarkdownIt
from safetensors.torch import load, save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from steered_moe import RouterSteering, SteeredMoEForCausalLM
from steered_moe.card_text import BEGIN, END, metadata, own_text
from steered_moe.cards import code, render_card, write_card
from steered_moe.cli import app
from steered_moe.errors import BaseModelError, FormatError, SteeredMoEError, SteeringError
from steered_moe.hub import pull
from steered_moe.results import read_results
from steered_moe.storage import read_repo

Files = dict[str, bytes]
Change = Callable[[Files], Any]

MARKER = Path(mkdtemp(prefix="steered-moe-hostile-")) / "code-was-run"
CODE = f"open({str(MARKER)!r}, 'w').close()\n".encode()
BASE = "user/hostile-base"
SHORT = 1000
"""Characters of an error at most; the folder of the cache is a hundred or two of them."""


class Bomb:
    """Unpickled, it writes `MARKER`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (CODE.decode(),)


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weights": Bomb()}, buffer)
    return buffer.getvalue()


PICKLE = pickle.dumps(Bomb())
ASCII_PICKLE = pickle.dumps(Bomb(), protocol=0)


def raw(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def item(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


LAYERS, WEIGHTS = item("I64", [2], 0, 16), item("F32", [2, 16], 16, 144)
PAYLOAD = struct.pack("<qq32f", 2, 3, *[1.0] * 32)


def header(payload: bytes = PAYLOAD, **items: Any) -> Change:
    """Replace the tensors by a header of our own around bytes."""
    named = {"layers": LAYERS, "weights": WEIGHTS} | items
    content = {f"middle.{key}": value for key, value in named.items() if value is not None}
    return put("steering.safetensors", raw(content, payload))


def put(name: str, content: bytes) -> Change:
    return lambda files: files.update({name: content})


def config(**fields: Any) -> Change:
    def change(files: Files) -> None:
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | fields).encode()

    return change


def entry(**fields: Any) -> Change:
    def change(files: Files) -> None:
        content = json.loads(files["config.json"])
        content["steerings"][0] |= fields
        files["config.json"] = json.dumps(content).encode()

    return change


def literal(
    value: str | bytes, where: str = "shiny", within: Callable[..., Change] = config
) -> Change:
    """A field with a value that is written as it is given, JSON or not."""

    def change(files: Files) -> None:
        within(**{where: "@@"})(files)
        text = value if isinstance(value, bytes) else value.encode()
        files["config.json"] = files["config.json"].replace(b'"@@"', text)

    return change


def tensors(**changes: torch.Tensor | None) -> Change:
    def change(files: Files) -> None:
        content: dict[str, Any] = load(files["steering.safetensors"])
        content |= {f"middle.{key}": value for key, value in changes.items()}
        files["steering.safetensors"] = save({k: v for k, v in content.items() if v is not None})

    return change


def names(count: int, one: Callable[[int], str]) -> str:
    return "[" + ", ".join(f'{{"name": "{one(n)}", "scale": "std"}}' for n in range(count)) + "]"


MEGABYTE = "a" * 2**20
ROWS = torch.zeros(2, 16)
MANY = {f"x{n}": item("I8", [0], 144, 144) for n in range(20_000)}
UNREAD = "is not a readable safetensors file"
NESTED = {"lists": b"[" * 100_000 + b"]" * 100_000, "maps": b'{"a":' * 100_000 + b"1" + b"}" * 100_000}  # fmt: skip

REFUSED: list[tuple[str, Change, type[SteeredMoEError], str]] = [
    ("a pickle as tensors", put("steering.safetensors", PICKLE), FormatError, "pickles are never read"),
    ("an ASCII pickle as tensors", put("steering.safetensors", ASCII_PICKLE), FormatError, "pickles are never"),
    ("a torch file as tensors", put("steering.safetensors", torch_file()), FormatError, "pickles are never"),
    ("a pickle behind a length", put("steering.safetensors", raw(PICKLE)), FormatError, UNREAD),
    ("a pickle as config", put("config.json", PICKLE), FormatError, "is not JSON"),
    ("an ASCII pickle as config", put("config.json", ASCII_PICKLE), FormatError, "is not JSON"),
    ("a program as config", put("config.json", CODE), FormatError, "is not JSON"),
    ("a program as tensors", put("steering.safetensors", b"#!/bin/sh\n" + CODE), FormatError, UNREAD),
    ("2**62 elements", header(weights=item("F32", [2, 2**62], 16, 144)), FormatError, UNREAD),
    ("2**128 elements", header(weights=item("F32", [2**64 - 1, 2**64 - 1], 16, 144)), FormatError, UNREAD),
    ("2**64 rows", header(weights=item("F32", [2**64, 16], 16, 144)), FormatError, UNREAD),
    ("a negative shape", header(weights=item("F32", [-2, -16], 16, 144)), FormatError, UNREAD),
    ("a shape in words", header(weights=item("F32", ["2", 16], 16, 144)), FormatError, UNREAD),  # type: ignore[list-item]
    ("half a row", header(weights=item("F32", [2.5, 16], 16, 144)), FormatError, UNREAD),  # type: ignore[list-item]
    ("negative offsets", header(weights=item("F32", [2, 16], -16, 112)), FormatError, UNREAD),
    ("offsets that go back", header(weights=item("F32", [2, 16], 144, 16)), FormatError, UNREAD),
    ("overlapping offsets", header(weights=item("F32", [2, 16], 8, 136)), FormatError, UNREAD),
    ("a gap between tensors", header(PAYLOAD + bytes(8), weights=item("F32", [2, 16], 24, 152)), FormatError, UNREAD),
    ("offsets beyond the end", header(weights=item("F32", [2, 2**20], 16, 16 + 2**23)), FormatError, UNREAD),
    ("bytes after the end", header(PAYLOAD + CODE), FormatError, UNREAD),
    ("an unknown type", header(weights=item("OBJECT", [2, 16], 16, 144)), FormatError, UNREAD),
    ("a type of a megabyte", header(weights=item(MEGABYTE, [2, 16], 16, 144)), FormatError, UNREAD),
    ("numbers of four bits", header(weights=item("F4", [2, 128], 16, 144)), FormatError, "it must be torch.float32"),
    ("numbers of eight bits", header(weights=item("F8_E8M0", [2, 64], 16, 144)), FormatError, "it must be torch.float32"),
    ("complex numbers", header(weights=item("C64", [2, 8], 16, 144)), FormatError, "it must be torch.float32"),
    ("unsigned layers", header(layers=item("U64", [2], 0, 16)), FormatError, "it must be torch.int64"),
    ("true and false", header(weights=item("BOOL", [2, 64], 16, 144)), FormatError, "it must be torch.float32"),
    ("layers without a dimension", header(PAYLOAD[8:], layers=item("I64", [], 0, 8), weights=item("F32", [2, 16], 8, 136)), SteeringError, "shape ()"),
    ("no layers", header(b"", layers=item("I64", [0], 0, 0), weights=item("F32", [0, 16], 0, 0)), SteeringError, "at least one"),
    ("no experts", header(PAYLOAD[:16], weights=item("F32", [2, 0], 16, 16)), SteeringError, "shape (2, 0)"),
    ("2**62 rows of nothing", header(PAYLOAD[:16], weights=item("F32", [2**62, 0], 16, 16)), SteeringError, "0); expected"),
    ("no rows of 2**62 experts", header(PAYLOAD[:16], weights=item("F32", [0, 2**62], 16, 16)), SteeringError, "0 rows"),
    ("a cube of weights", header(weights=item("F32", [2, 4, 4], 16, 144)), SteeringError, "shape (2, 4, 4)"),
    ("layer 2**62", tensors(layers=torch.tensor([2, 2**62])), FormatError, "no model has so many layers"),
    ("layer -2**63", tensors(layers=torch.tensor([2, -(2**63)])), SteeringError, "is negative"),
    ("a tensor twice", put("steering.safetensors", raw(b'{"middle.layers":%s,"middle.layers":%s}' % ((json.dumps(LAYERS).encode(),) * 2), PAYLOAD)), FormatError, UNREAD),
    ("20,000 extra tensors", header(**MANY), FormatError, "and 19990 more, which config.json does not name"),
    ("an extra tensor that is a path", header(**{"../../x": item("I8", [0], 144, 144)}), FormatError, "does not name"),
    ("an extra tensor that clears the screen", header(**{"\x1b[2J\u202e": item("I8", [0], 144, 144)}), FormatError, r"middle.\x1b[2J\u202e"),
    ("an extra tensor of a megabyte", header(**{MEGABYTE: item("I8", [0], 144, 144)}), FormatError, "does not name"),
    ("a type that clears the screen", header(weights=item("\x1b[2J\u202e", [2, 16], 16, 144)), FormatError, r"\x1b[2J\u202e"),
    ("metadata that is no text", put("steering.safetensors", raw({"__metadata__": {"a": {"b": 1}}})), FormatError, UNREAD),
    ("a header that is a list", put("steering.safetensors", raw([LAYERS])), FormatError, UNREAD),
    ("a header that is not UTF-8", put("steering.safetensors", raw(b"{\xff\xfe}")), FormatError, UNREAD),
    ("a header nested 100,000 deep", put("steering.safetensors", raw(NESTED["maps"])), FormatError, UNREAD),
    ("a header of 2**63 bytes", put("steering.safetensors", raw({}, length=2**63)), FormatError, "header of 9223372036854775808"),
    ("a header of 2**64 bytes", put("steering.safetensors", raw({}, length=2**64 - 1)), FormatError, UNREAD),
    ("a header of 100 MB that is not there", put("steering.safetensors", raw({}, length=10**8)), FormatError, "header of 100000000"),
    ("a header of 3 MB of blanks", put("steering.safetensors", raw(b"{" + b" " * 3_000_000 + b"}")), FormatError, "header of 3000002"),
    ("half a length", put("steering.safetensors", b"\x08\0\0"), FormatError, UNREAD),
    ("NaN", tensors(weights=ROWS + float("nan")), SteeringError, "weights[0, 0] is nan"),
    ("100,000 nested lists", literal(NESTED["lists"]), FormatError, "is not JSON that can be read"),
    ("100,000 nested maps", literal(NESTED["maps"]), FormatError, "is not JSON that can be read"),
    ("100,000 open brackets", put("config.json", b"[" * 100_000), FormatError, "is not JSON that can be read"),
    ("an unknown field 150 deep", literal("[" * 150 + "]" * 150), FormatError, "more than 100 levels"),
    ("provenance 500 deep", literal('{"a":' * 500 + "1" + "}" * 500, "parameters", entry), FormatError, "more than 100 levels"),
    ("a strength of 5,000 digits", literal("9" * 5000, "strength", entry), FormatError, "is not JSON that can be read"),
    ("a strength of 4,000 digits", literal("9" * 4000, "strength", entry), FormatError, "it must be finite"),
    ("experts of 4,000 digits", literal("9" * 4000, "num_experts"), FormatError, "it must be 1 to 10000"),
    ("a version of 4,000 digits", literal("9" * 4000, "format_version"), FormatError, "needs a newer"),
    ("minus one layer", config(num_hidden_layers=-1), FormatError, "num_hidden_layers is -1; it must be 1"),
    ("2**62 layers", config(num_hidden_layers=2**62), FormatError, "it must be 1 to 10000"),
    ("a strength of 1e400", literal("1e400", "strength", entry), FormatError, "is inf; it must be finite"),
    ("1e400 in an unknown field", literal('{"a": [1e400]}'), FormatError, "is not JSON"),
    ("NaN in an unknown field", literal("NaN"), FormatError, "is not JSON"),
    ("NaN in provenance", literal('{"a": NaN}', "parameters", entry), FormatError, "is not JSON"),
    ("half a character", literal(r'"\ud800"'), FormatError, "remove that character"),
    ("half a character as a key", literal(r'{"\udfff": 1}'), FormatError, "remove that character"),
    ("escape codes of a terminal", config(base_model_type="\x1b]0;owned\x07"), FormatError, r"'\x1b'; remove"),
    ("escape codes in a key", entry(**{"\x9b2J": 1}), FormatError, r"'\x9b'; remove"),
    ("text from right to left", entry(method="\u202egnp.exe"), FormatError, r"'\u202e'; remove"),
    ("isolated text", entry(corpora=["\u2066x\u2069"]), FormatError, r"'\u2066'; remove"),
    ("a null character", config(base_model_name_or_path="./base\0"), FormatError, "remove that character"),
    ("a name of a megabyte", entry(name=MEGABYTE), FormatError, "name is 'aaaa"),
    ("a bad name of a megabyte", entry(name=MEGABYTE + "/"), FormatError, "name is 'aaaa"),
    ("a name that is a path", entry(name="../../x"), FormatError, "name is '../../x'"),
    ("a name that is markup", entry(name="<script>"), FormatError, "name is '<script>'"),
    ("a name of two lines", entry(name="middle\n"), FormatError, r"name is 'middle\n'"),
    ("a name that is a list", entry(name=["middle"]), FormatError, "a steering has no name"),
    ("a megabyte of languages", entry(languages=MEGABYTE), FormatError, "provenance languages is"),
    ("corpora that are maps", entry(corpora=[{"a": MEGABYTE}]), FormatError, "provenance corpora is"),
    ("a base type of a megabyte", config(base_model_type=MEGABYTE), FormatError, "1048576 characters"),
    ("a base of a megabyte", config(base_model_name_or_path="./" + MEGABYTE), FormatError, "characters; 1000"),
    ("a default of a megabyte", config(default_steering=MEGABYTE), FormatError, "default_steering is 'aaaa"),
    ("a default that is a map", config(default_steering={}), FormatError, "default_steering is {}"),
    ("a million unknown fields", lambda f: config(**{f"field_{n}": n for n in range(10**6)})(f), FormatError, "are never"),
    ("one steering 50,000 times", literal(names(50_000, lambda n: "middle"), "steerings"), FormatError, "share a name"),
    ("one steering 100,000 times", literal(names(100_000, lambda n: "middle"), "steerings"), FormatError, "are never"),
    ("40,000 steerings", literal(names(40_000, lambda n: f"n{n}"), "steerings"), FormatError, "79990 more, which config"),
    ("true as experts", config(num_experts=True), FormatError, "num_experts is True"),
    ("true as format", config(format_version=True), FormatError, "format_version is True"),
    ("true as strength", entry(strength=True), FormatError, "strength of 'middle' is True"),
    ("experts with a point", config(num_experts=16.0), FormatError, "num_experts is 16.0"),
    ("a scale that is a list", entry(scale=["std"]), FormatError, "is ['std']; use one of"),
    ("a base that is a map", config(base_model_name_or_path={"a": 1}), FormatError, "it must be a str"),
    ("a base that climbs", config(base_model_name_or_path="user/../../etc"), FormatError, "neither a Hub id"),
    ("a base with a backslash", config(base_model_name_or_path=r"user\..\x"), FormatError, "neither a Hub id"),
    ("a base of three parts", config(base_model_name_or_path="a/b/c"), FormatError, "neither a Hub id"),
    ("a base of two lines", config(base_model_name_or_path="user/x\n"), FormatError, "neither a Hub id"),
    ("a base with a question", config(base_model_name_or_path="user/x?a=b"), FormatError, "neither a Hub id"),
    ("a base with a percent", config(base_model_name_or_path="user/%2e%2e"), FormatError, "neither a Hub id"),
    ("a base with two dashes", config(base_model_name_or_path="user--x/y"), FormatError, "neither a Hub id"),
    ("an empty base", config(base_model_name_or_path=""), FormatError, "neither a Hub id"),
    ("a base by file", config(base_model_name_or_path="file:///etc/passwd"), FormatError, "neither a Hub id"),
    ("a base by http", config(base_model_name_or_path="http://evil.example/x"), FormatError, "neither a Hub id"),
    ("a base by hf", config(base_model_name_or_path="hf://user/x"), FormatError, "neither a Hub id"),
    ("a base of markup", config(base_model_name_or_path="<img src=x>"), FormatError, "neither a Hub id"),
    ("a revision that climbs", config(base_model_revision="../../../x"), FormatError, "is no revision"),
    ("a revision that climbs later", config(base_model_revision="a/../../../x"), FormatError, "is no revision"),
    ("an absolute revision", config(base_model_revision=f"{MARKER}"), FormatError, "is no revision"),
    ("a revision of an option", config(base_model_revision="--upload-pack=x"), FormatError, "is no revision"),
    ("a revision by http", config(base_model_revision="http://evil.example/x"), FormatError, "is no revision"),
    ("a revision with a percent", config(base_model_revision="%2e%2e%2fx"), FormatError, "is no revision"),
    ("a revision with a backslash", config(base_model_revision="..\\x"), FormatError, "is no revision"),
    ("a revision of a megabyte", config(base_model_revision=MEGABYTE), FormatError, "1048576 characters"),
    ("a config in UTF-16", lambda f: f.update({"config.json": f["config.json"].decode().encode("utf-16")}), FormatError, "is not JSON"),
    ("null", put("config.json", b"null"), FormatError, "model_type is 'NoneType'"),
    ("a model type that is a map", config(model_type={"a": MEGABYTE}), FormatError, "model_type is {'a'"),
]  # fmt: skip

LOCAL = ["/etc", "./base", "../../base", "~/base", "C:\\base", "\\\\evil.example\\base", "..\\base"]
"""Bases that are folders: of a repo on the Hub none is loaded."""

MAPPED = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}  # fmt: skip
PICKLES = (
    "pytorch_model.bin",
    "model.pt",
    "steering.pt",
    "training_args.bin",
    "data.pkl",
    "x.ckpt",
)
CLIMBING = (
    "../climbs.py",
    "../../../climbs",
    "/climbs.py",
    "a\\..\\..\\climbs",
    "C:\\climbs",
    "a/../b",
)


def program(files: Files) -> None:
    config(auto_map=MAPPED)(files)
    files |= dict.fromkeys(
        ("code.py", "steering.py", "setup.py", "__init__.py", "conftest.py"), CODE
    )


HARMLESS: list[tuple[str, Change]] = [
    ("programs and auto_map", program),
    ("auto_map of another repo", config(auto_map={"AutoConfig": "user/evil--code.Config"})),
    ("custom pipelines", config(custom_pipelines={"x": {"impl": "code.Pipe", "pt": ["AutoModel"]}})),
    ("pickles", lambda files: files.update(dict.fromkeys(PICKLES, PICKLE))),
    ("a pickle as results", put("evaluation.json", PICKLE)),
    ("a pickle as card", put("notes/README.md", PICKLE)),
    ("a program as generation", put("custom_generate/generate.py", CODE)),
    ("names that climb", lambda files: files.update(dict.fromkeys(CLIMBING, CODE))),
    ("keys of Python in provenance", entry(__class__="x", __init__=1, fingerprint=[], save=None)),
    ("a card that is a program", put("README.md", b"---\n!!python/object/apply:os.system [id]\n---\n")),
    ("JSON that says a key twice", lambda f: f.update({"config.json": f["config.json"].replace(b"{", b'{"steerings": 1,', 1)})),
    ("100,000 unknown fields", lambda f: config(**{f"x{n}": n for n in range(100_000)})(f)),
    ("1,000 lines of unknown fields", config(**{f"x{n}\nERROR": n for n in range(1000)})),
    ("provenance of a megabyte", entry(notes=MEGABYTE)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_runs() -> Iterator[None]:
    yield
    ran = MARKER.exists()
    MARKER.unlink(missing_ok=True)
    assert not ran, "code of a repo was run"


@pytest.fixture(scope="module")
def good(tiny: Path) -> Files:
    """A good steering repo, whose base is on the Hub."""
    files = {path.name: path.read_bytes() for path in (tiny / "steered").iterdir()}
    config(base_model_name_or_path=BASE, base_model_revision=None)(files)
    return files


@pytest.fixture
def publish(hub: HubServer, good: Files, tiny: Path, request) -> Callable[..., str]:
    """Put a changed repo and its base on the Hub; returns the id."""
    hub.commit(BASE, {path.name: path.read_bytes() for path in (tiny / "base").iterdir()})

    own = f"user/hostile-{abs(hash(request.node.nodeid))}"

    def put_it(change: Change, repo: str = own) -> str:
        files = dict(good)
        change(files)
        hub.repos.pop(repo, None)
        hub.commit(repo, files)
        hub.requests.clear()
        return repo

    return put_it


def inspected(repo: str) -> Any:
    return CliRunner().invoke(app, ["inspect", repo])


def asked_for(hub: HubServer) -> set[str]:
    """Names of all the files that anything was asked about."""
    paths = [request.partition("/resolve/")[2] for request in hub.requests]
    return {path.partition("/")[2] for path in paths if path}


def names_of(table: list[Any]) -> list[str]:
    return [case[0] for case in table]


@pytest.mark.parametrize(
    ("change", "error", "says"), [c[1:] for c in REFUSED], ids=names_of(REFUSED)
)
def test_it_is_refused_in_every_way(hub: HubServer, publish, change, error, says):
    repo = publish(change)
    for load_it in (RouterSteering.load, SteeredMoEForCausalLM.from_pretrained):
        with pytest.raises(SteeredMoEError) as caught:
            load_it(repo)
        message = str(caught.value)
        assert type(caught.value) is error
        assert says in message[:SHORT]
        assert len(message) <= SHORT
        assert message.isprintable(), message
    shown = inspected(repo)
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert shown.stderr.startswith(f"{error.__name__}: ")
    if "are never" not in says:  # transformers reads a config of any size, slowly
        with pytest.raises(Exception):  # noqa: B017, PT011 - of transformers' own, perhaps
            AutoModelForCausalLM.from_pretrained(repo)
    assert not any(BASE in request for request in hub.requests)
    assert not {name for name in asked_for(hub) if name.endswith((".py", ".bin", ".pt", ".pkl"))}


@pytest.mark.parametrize("change", [c[1] for c in HARMLESS], ids=names_of(HARMLESS))
def test_what_is_not_known_is_left_alone(hub: HubServer, publish, tiny: Path, tmp_path, change):
    repo = publish(change)
    steering = RouterSteering.load(tiny / "steered")
    assert RouterSteering.load(repo).fingerprint == steering.fingerprint
    assert inspected(repo).exit_code == 0
    assert asked_for(hub) == {"config.json", "steering.safetensors"}
    for kind in (SteeredMoEForCausalLM, AutoModelForCausalLM):
        assert kind.from_pretrained(repo).steering.fingerprint == steering.fingerprint
    assert isinstance(AutoConfig.from_pretrained(repo).steerings, list)
    assert not {name for name in asked_for(hub) if name.endswith((".py", ".bin", ".pt", ".pkl"))}
    if "evaluation.json" in HfApi().list_repo_files(repo):
        with pytest.raises(FormatError, match="is not JSON"):
            pull(repo, tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists()
        return
    pulled = {path.name for path in pull(repo, tmp_path / "pulled").rglob("*")}
    assert pulled - {"README.md"} == {"config.json", "steering.safetensors"}


def test_there_are_at_least_forty():
    table = [*names_of(REFUSED), *names_of(HARMLESS), *LOCAL]
    assert len(set(table)) == len(table) >= 40


def test_the_same_repo_without_a_fault_is_loaded(hub: HubServer, publish):
    repo = publish(lambda files: None)
    assert RouterSteering.load(repo).name == "middle"
    assert inspected(repo).exit_code == 0
    assert isinstance(AutoModelForCausalLM.from_pretrained(repo), SteeredMoEForCausalLM)
    assert any(BASE in request for request in hub.requests)


def test_the_traps_would_run(publish, hub: HubServer, tmp_path: Path):
    """Each kind of trap writes the marker where somebody does load it."""

    def ran() -> bool:
        found = MARKER.exists()
        MARKER.unlink(missing_ok=True)
        return found

    for data in (PICKLE, ASCII_PICKLE):
        pickle.loads(data)
        assert ran()
    torch.load(io.BytesIO(torch_file()), weights_only=False)
    assert ran()
    (tmp_path / "code.py").write_bytes(CODE)
    runpy.run_path(str(tmp_path / "code.py"))
    assert ran()
    mapped = {"model_type": "unheard_of", "auto_map": MAPPED}
    hub.commit("user/trap", {"config.json": json.dumps(mapped).encode(), "code.py": CODE})
    with pytest.raises(AttributeError, match="Config"):
        AutoConfig.from_pretrained("user/trap", trust_remote_code=True)
    assert ran()


FIELDS: dict[str, Any] = {
    "__class__": "x",
    "__dict__": {"a": 1},
    "_fields": "x",
    "to_diff_dict": "x",
    "use_return_dict": True,
    "self": 1,
    "id2label": "x",
    "attn_implementation": "user/evil-kernel",
    "_attn_implementation": "flash_attention_9",
    "experts_implementation": "x",
    "output_hidden_states": "x",
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_a_config_of_transformers_change_nothing(publish, name):
    repo = publish(config(**{name: FIELDS[name]}))
    assert SteeredMoEForCausalLM.from_pretrained(repo).steering.name == "middle"
    assert AutoModelForCausalLM.from_pretrained(repo).steering.name == "middle"


@pytest.mark.parametrize("key", ["[/]", "[link=http://evil.example]x[/link]", "[blink]x"])
def test_markup_of_the_terminal_is_shown_as_it_is(publish, key):
    shown = inspected(publish(entry(**{key: "value"})))
    assert shown.exit_code == 0
    assert key in shown.stdout


@pytest.mark.parametrize("base", LOCAL)
def test_no_folder_of_this_machine_is_loaded(hub: HubServer, publish, base):
    repo = publish(config(base_model_name_or_path=base))
    assert RouterSteering.load(repo).name == "middle"
    for kind in (SteeredMoEForCausalLM, AutoModelForCausalLM):
        with pytest.raises(BaseModelError, match="nothing on this machine is loaded"):
            kind.from_pretrained(repo)


def test_pickles_alone_are_not_asked_for(hub: HubServer, publish):
    files = dict.fromkeys(PICKLES, PICKLE)
    repo = publish(lambda f: (f.pop("steering.safetensors"), f.update(files)))
    for load_it in (RouterSteering.load, SteeredMoEForCausalLM.from_pretrained):
        with pytest.raises(EntryNotFoundError):
            load_it(repo)
    assert asked_for(hub) == {"config.json", "steering.safetensors"}


def test_a_base_of_pickles_and_programs_is_refused(hub: HubServer, publish, tiny: Path):
    base = {path.name: path.read_bytes() for path in (tiny / "base").iterdir()}
    del base["model.safetensors"]
    hub.commit("user/pickled-base", base | {"pytorch_model.bin": torch_file()})
    repo = publish(config(base_model_name_or_path="user/pickled-base"))
    with pytest.raises(OSError):  # noqa: PT011 - the Hub may say that nobody converted it
        SteeredMoEForCausalLM.from_pretrained(repo)
    assert "pytorch_model.bin" not in {r.rpartition("/")[2] for r in hub.requests if "GET" in r}
    mapped = {"model_type": "unheard_of", "auto_map": MAPPED}
    hub.commit("user/mapped-base", {"config.json": json.dumps(mapped).encode(), "code.py": CODE})
    repo = publish(config(base_model_name_or_path="user/mapped-base", base_model_type=None))
    with pytest.raises(ValueError, match="trust_remote_code"):
        SteeredMoEForCausalLM.from_pretrained(repo)
    assert "code.py" not in asked_for(hub)


def test_programs_and_pickles_as_tokenizer(hub: HubServer, publish):
    settings = {"auto_map": MAPPED, "tokenizer_class": "T", "chat_template": "{{ ''.__class__ }}"}
    repo = publish(
        lambda files: files.update(
            dict.fromkeys(("tokenizer.json", "tokenizer.model", "vocab.json"), PICKLE)
            | {"code.py": CODE, "tokenizer_config.json": json.dumps(settings).encode()}
        )
    )
    with pytest.raises(Exception):  # noqa: B017, PT011 - it is transformers that refuses it
        AutoTokenizer.from_pretrained(repo, trust_remote_code=False)
    assert "code.py" not in asked_for(hub)
    assert RouterSteering.load(repo).name == "middle"


SCRIPT = """
import json, os, sys
from steered_moe import RouterSteering, SteeredMoEForCausalLM
from steered_moe.hub import pull
from transformers import AutoModelForCausalLM, AutoTokenizer
outcomes = {}
for repo in json.loads(sys.argv[1]):
    for load in (RouterSteering.load, SteeredMoEForCausalLM.from_pretrained,
                 AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained,
                 lambda repo: pull(repo, "pulled/" + repo.replace("/", "-"))):
        try:
            load(repo)
            outcomes.setdefault(repo, []).append("loaded")
        except Exception as error:
            outcomes.setdefault(repo, []).append(type(error).__name__)
json.dump(outcomes, sys.stdout)
"""


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_nothing_is_written_outside_of_the_cache(hub: HubServer, publish, tiny: Path, tmp_path: Path):  # fmt: skip
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work, tmp_path / "tmp"):
        folder.mkdir()
    base = {path.name: path.read_bytes() for path in (tiny / "base").iterdir()}
    outside = ("../../../../climbed", str(tmp_path / "absolute"))
    for revision in outside:
        hub.commit(BASE, base, revision=revision)
    changes = [
        program,
        lambda files: files.update(dict.fromkeys((*CLIMBING, *PICKLES), PICKLE)),
        *(config(base_model_revision=revision) for revision in outside),
        config(base_model_name_or_path="../../../../work"),
        put("steering.safetensors", PICKLE),
        literal(NESTED["lists"]),
    ]
    repos = [publish(change, f"user/outside-{row}") for row, change in enumerate(changes)]
    own = {"HOME": home, "HF_HOME": home / "hf", "TMPDIR": tmp_path / "tmp", "PYTHONPATH": str(Path.cwd())}  # fmt: skip
    environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(repos)],
        cwd=work, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes[repos[0]] == ["loaded"] * 5
    assert outcomes[repos[2]][:3] == ["FormatError"] * 3
    assert outcomes[repos[3]][:3] == ["FormatError"] * 3
    new = {path for path in tree(tmp_path) - before if not path.startswith("home/hf")}
    pulled = {path for path in new if path.startswith("work/pulled")}
    names = {Path(path).name for path in pulled} - {"pulled", "README.md"}
    assert {name for name in names if "." in name} == {"config.json", "steering.safetensors"}
    assert new == pulled
    # The twin: asked for by itself, the same revision is written to where it points.
    hf_hub_download(BASE, "config.json", revision=outside[1], cache_dir=home / "hf")
    assert "absolute" in tree(tmp_path)


MEMORY = """
import json, os, resource, sys
from pathlib import Path
from steered_moe.errors import SteeredMoEError
from steered_moe.results import read_results
from steered_moe.storage import read_repo
read_repo(sys.argv[1])
for folder in sys.argv[1:]:
    if pid := os.fork():
        os.waitpid(pid, 0)
        continue
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    try:
        read_repo(folder)
        read_results(folder)
        outcome = "read"
        if "greedy" in folder:
            bytearray(b"x") * 400_000_000
    except SteeredMoEError as error:
        outcome = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([Path(folder).name, (peak - now) / 2**20, outcome]), flush=True)
    os._exit(0)
"""
FULL = 2**23 - 1000  # numbers of four bytes that just fit


def blocks(count: int) -> bytes:
    many = b",".join(b'"a%d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}' % n for n in range(count))  # fmt: skip
    return raw(b"{" + many + b"}")


def wide(cell: bytes) -> Change:
    return header(PAYLOAD[:8] + cell * FULL, layers=item("I64", [1], 0, 8), weights=item("F32", [1, FULL], 8, 8 + 4 * FULL))  # fmt: skip


def tall(files: Files) -> None:
    rows = FULL // 3
    payload = torch.arange(rows).numpy().tobytes() + bytes(4 * rows)
    header(payload, layers=item("I64", [rows], 0, 8 * rows), weights=item("F32", [rows, 1], 8 * rows, 12 * rows))(files)  # fmt: skip


MAPS = b"[" + b",".join([b'{"":0}'] * 290_000) + b"]"
HUGE: list[tuple[str, Change, str]] = [
    ("as it should be", lambda files: None, "read"),
    ("greedy", lambda files: None, "read"),
    ("a header of 100 MB", put("steering.safetensors", raw(b"{" + b" " * 10**8 + b"}")), "are never read"),
    ("a header of 30 MB", put("steering.safetensors", blocks(500_000)), "a header of"),
    ("a header that is just allowed", put("steering.safetensors", blocks(36_000)), "lacks"),
    ("tensors of 400 MB", put("steering.safetensors", bytes(400_000_000)), "are never read"),
    ("tensors that just fit", wide(bytes(4)), "says num_experts=16"),
    ("tensors of NaN that just fit", wide(b"\xff" * 4), "is nan"),
    ("layers that just fit", tall, "no model has so many layers"),
    ("2**62 experts", header(weights=item("F32", [2, 2**62], 16, 144)), UNREAD),
    ("a config of 100 MB", put("config.json", b" " * 10**8), "are never read"),
    ("a field of maps", literal(MAPS), "read"),
    ("provenance of maps", literal(MAPS, "notes", entry), "read"),
    ("100,000 nested lists", literal(NESTED["lists"]), "is not JSON"),
    ("results of 100 MB", put("evaluation.json", b" " * 10**8), "are never read"),
    ("results of maps", put("evaluation.json", b'{"results": ' + MAPS + b"}"), "its fields must be"),
]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_bounded(good: Files, tmp_path: Path):
    config(num_experts=16)(good)
    for name, change, _ in HUGE:
        files = dict(good)
        change(files)
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
    folders = [str(tmp_path / name) for name, _, _ in HUGE]
    done = subprocess.run([sys.executable, "-c", MEMORY, *folders], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [name for name, _, _ in HUGE]
    used = {name: megabytes for name, megabytes, _ in rows}
    for (name, _, says), (_, _, outcome) in zip(HUGE, rows, strict=True):
        assert says in outcome, name
        assert len(outcome) <= SHORT, name
    assert used.pop("greedy") > 350  # the twin: what is used is seen
    assert max(used.values()) < 200, used


POISON = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "`</code><script>alert(1)</script>`",
    "``` \n\n# owned\n\n<b>bold</b>",
    "[click](javascript:alert(1))",
    "![](http://evil.example/pixel.png)",
    "<http://evil.example>",
    "http://evil.example www.evil.example",
    "{{ 7*7 }}",
    "{% for x in range(9) %}{{ x }}{% endfor %}",
    "{# gone #}{{ cycler.__init__.__globals__ }}",
    "---\nlicense: mit\n---\n",
    "a\nlicense: mit",
    "x: [1, 2\n- y",
    "!!python/object/apply:os.system ['id']",
    "| a | b |\n|---|---|",
    "*bold* _slanted_ ~~gone~~",
    f"{END}<script>alert(1)</script>",
    f"{BEGIN}",
    "&lt;script&gt; &#60;b&#62;",
    "\\` <b>x</b> \\`",
    "a\\|<b>x</b>",
]
LINKS = ("https://huggingface.co/datasets/", "https://arxiv.org/abs/")


def live(card: str) -> list[str]:
    """What a browser would act on, other than the links that every card has."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    found = []
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    for token in [child for one in tokens for child in (one, *(one.children or []))]:
        if token.type.startswith("html") and token.content.strip() not in (BEGIN, END):
            found.append(token.content)
        target = str(token.attrs.get("href", token.attrs.get("src", "")))
        if target and not target.startswith(LINKS):
            found.append(target)
        if token.type in ("em_open", "strong_open", "s_open", "hr"):
            found.append(token.type)
        if token.type == "text" and re.search(r"://|\bwww\.", token.content):
            found.append(token.content)  # GitHub's flavour links it
    rows = [line for line in body.splitlines() if line.startswith("|")]
    found += [row for row in rows if re.search(r"(?<!\\)(?:\\\\)+\|", row)]  # ends a cell there
    return found


def poisoned(good: Files, folder: Path, text: str) -> Any:
    files = dict(good)
    config(base_model_name_or_path=f"./{text}", base_model_type=text)(files)
    lists = {"languages": [text, "sw"], "corpora": [text, "flores"]}
    entry(method=text, parameters={text: [text]}, **lists, **{text: text})(files)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return read_repo(folder)


def score(repo: Any, folder: Path, text: str) -> Any:
    """A result in which every text is poisoned, read from the disk."""
    gain = {"mean": 1.0, "low": 0.0, "high": 2.0}
    row = {
        "steering": "middle",
        "fingerprint": repo.steerings[0].fingerprint,
        **dict.fromkeys(("task", "language", "metric", "dataset", "task_id"), text),
        **{"strength": 2, "items": 10, "base": 0.5, "steered": 0.6, "gain": gain},
        "controls": {text: gain},
    }
    (folder / "evaluation.json").write_text(json.dumps({"results": [row]}))
    return read_results(folder)


@pytest.mark.parametrize("text", POISON)
def test_nothing_in_a_card_is_live(good: Files, tmp_path: Path, text):
    repo = poisoned(good, tmp_path / "repo", text)
    clean = metadata(render_card(poisoned(good, tmp_path / "clean", "x")))
    card = render_card(repo, "user/x", score(repo, tmp_path / "repo", text))
    header = metadata(card)
    assert live(render_card(repo)) == []
    assert live(card) == []
    assert metadata(render_card(repo)) == clean
    assert clean["language"] == ["sw"]
    assert "license" not in header
    assert header["model-index"][0]["results"][0]["dataset"]["name"] == text
    assert header["tags"] == clean["tags"]
    assert card.count(BEGIN) >= 1
    assert card.count(code(text)) >= 5
    assert code(text).count("`") == 2
    assert "49" not in card.replace(repo.steerings[0].fingerprint, "")


def test_a_live_card_would_be_seen(good: Files, tmp_path: Path):
    card = render_card(poisoned(good, tmp_path / "repo", "x"))
    assert live(card) == []
    for text in (*POISON[:2], *POISON[5:7], "www.evil.example", "_a_", f"{END}<b>", "| a\\\\|b |"):
        assert live(f"{card}\n\n{text}"), text


def test_a_mark_in_a_value_does_not_end_the_generated_part(good: Files, tmp_path: Path):
    repo = poisoned(good, tmp_path / "repo", f"{END} mine {BEGIN}")
    write_card(repo, tmp_path / "repo")
    write_card(repo.at(0.125), tmp_path / "repo")
    card = (tmp_path / "repo" / "README.md").read_text()
    assert own_text(card) == ""
    assert card.count("# Load") == 1


SCORE = {"steering": "middle", "fingerprint": "x", "strength": 1, "task": "t", "language": "sw", "metric": "m", "items": 1, "base": 0.5, "steered": 0.5, "gain": {"mean": 0, "low": 0, "high": 0}}  # fmt: skip
BAD_RESULTS: list[tuple[str, Any, str]] = [
    ("a pickle", PICKLE, "is not JSON"),
    ("a list", [], "has no list of results"),
    ("nested lists", NESTED["lists"], "is not JSON"),
    ("a row that is a list", [[]], "its fields must be"),
    ("an extra field", [{**SCORE, "__class__": 1}], "its fields must be"),
    ("a score beyond 1", [{**SCORE, "base": 1.5}], "scores are 0 to 1"),
    ("a score of true", [{**SCORE, "base": True}], "base is True"),
    ("a score of infinity", [{**SCORE, "steered": float("inf")}], "steered is inf"),
    ("a strength of 400 digits", [{**SCORE, "strength": 10**400}], "strength is 1000"),
    ("minus one item", [{**SCORE, "items": -1}], "-1"),
    ("a task of maps", [{**SCORE, "task": {"a": MEGABYTE}}], "task is {'a'"),
    ("gain of a megabyte", [{**SCORE, "gain": {MEGABYTE: 1}}], "an interval needs"),
    ("gain of text", [{**SCORE, "gain": MEGABYTE}], "gain is 'aaaa"),
    ("controls of text", [{**SCORE, "controls": {"a": MEGABYTE}}], "an interval needs"),
    ("gain of NaN", [{**SCORE, "gain": {"mean": float("nan"), "low": 0, "high": 0}}], "an interval needs"),
    ("gain of 400 digits", [{**SCORE, "gain": {"mean": 0, "low": -(10**400), "high": 0}}], "an interval needs"),
    ("gain the wrong way round", [{**SCORE, "gain": {"mean": 0, "low": 1, "high": -1}}], "an interval of"),
    ("escape codes", [{**SCORE, "task": "\x1b[2J"}], "remove that character"),
    ("half a character", [{**SCORE, "metric": "\ud800"}], "remove that character"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "says"), [c[1:] for c in BAD_RESULTS], ids=names_of(BAD_RESULTS))
def test_results_are_read_with_suspicion(tmp_path: Path, rows, says):
    text = {"results": rows} if rows else []
    data = rows if isinstance(rows, bytes) else json.dumps(text).encode()
    (tmp_path / "evaluation.json").write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_results(tmp_path)
    assert says in str(caught.value)
    assert len(str(caught.value)) <= SHORT


def test_results_without_a_fault_are_read(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": [SCORE]}))
    assert read_results(tmp_path)[0].items == 1
