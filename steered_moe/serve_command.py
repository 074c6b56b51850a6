"""``steered-moe serve``: an OpenAI-compatible server, by transformers or by vLLM."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType
from typing import Annotated, Any

import typer

from steered_moe import hub
from steered_moe.base_model import locate_base
from steered_moe.embedded import named_model, named_repo
from steered_moe.errors import SteeredMoEError
from steered_moe.loading import check_dtype
from steered_moe.storage import read_repo
from steered_moe.terminal import console, errors
from steered_moe.vllm_settings import KEY

PASS_ON: Mapping[str, Any] = MappingProxyType(
    {"ignore_unknown_options": True, "allow_extra_args": True}
)
ENGINES = ("transformers", "vllm")
_VLLM_SERVER = "steered_moe.vllm_server"
_EXTENSION = "steered_moe.vllm_worker.WorkerExtension"
_CONFIG = "--additional-config"
_DECIDED = ("--model", "--revision", "--worker-extension-cls")
_INSTEAD = {"--model": "--base-model names another base"}
_ELSE = "the steering repo decides it; for another one start vLLM itself with --additional-config"

Repo = Annotated[str, typer.Argument(help="Steering repo: a folder, a Hub id, or embedded.")]
Engine = Annotated[str, typer.Option(help="transformers or vllm.")]
Strength = Annotated[float | None, typer.Option(help="Overrides the recorded strength; 0 is off.")]
BaseModel = Annotated[str | None, typer.Option(help="Overrides the recorded base model.")]
Host = Annotated[str, typer.Option(help="0.0.0.0 to let other machines in.")]
Port = Annotated[int, typer.Option(help="Port to listen on.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="transformers: for example auto or cuda:0.")]
FourBit = Annotated[bool, typer.Option("--load-in-4bit", help="transformers: base in 4 bit.")]
Batching = Annotated[
    bool, typer.Option("--continuous-batching", help="transformers: many requests at once.")
]
Share = Annotated[
    float, typer.Option(min=0.01, max=0.45, help="Free memory for each model's cache with it.")
]
Dry = Annotated[bool, typer.Option("--dry-run", help="vllm: print the command.")]


def serve(
    context: typer.Context,
    repo: Repo,
    engine: Engine = ENGINES[0],
    strength: Strength = None,
    base_model: BaseModel = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    load_in_4bit: FourBit = False,
    continuous_batching: Batching = False,
    cache_memory: Share = 0.3,
    dry_run: Dry = False,
) -> None:
    """Serve base and steered model to OpenAI clients; vLLM takes its own options too."""
    with errors():
        check_dtype(dtype)
        if engine not in ENGINES:
            raise SteeredMoEError(f"no engine {engine!r}; there are {', '.join(ENGINES)}")
        if engine == "vllm":
            _only_transformers(device_map, load_in_4bit, continuous_batching)
            config, given = _own_config(context.args)
            more = ["--host", host, "--port", str(port), "--dtype", dtype, *given]
            _run(vllm_command(repo, strength, base_model, config) + more, dry_run)
            return
        if context.args:
            raise SteeredMoEError(f"no option {context.args[0]}; with --engine vllm it is vLLM's")
        from steered_moe.serving import serve as run

        options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
        options |= {"load_in_4bit": True} if load_in_4bit else {}
        run(
            repo, strength=strength, base_model=base_model, host=host, port=port,
            continuous_batching=continuous_batching, cache_memory=cache_memory, dtype=dtype,
            **options,
        )  # fmt: skip


def vllm_command(
    repo: str,
    strength: float | None,
    base_model: str | None,
    config: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """vLLM's server on the base model that a steering repo names, at its revision.

    Args:
        repo: Steering repo.
        strength: Overrides the recorded strengths.
        base_model: Overrides the recorded base.
        config: What else ``--additional-config`` holds.

    Raises:
        SteeredMoEError: The repo cannot be read, or names no base model.
    """
    place = named_repo(repo)
    folder = hub.fetch(place)
    base = None if base_model is None else named_model(base_model)
    name, revision = locate_base(read_repo(folder), folder, base)
    settings: dict[str, Any] = {"repo_id": place}
    settings |= {} if strength is None else {"strength": strength}
    command = [sys.executable, "-m", _VLLM_SERVER, "--model", name]
    command += [] if revision is None else ["--revision", revision]
    command += ["--worker-extension-cls", _EXTENSION]
    return [*command, "--additional-config", json.dumps({**config, KEY: settings})]


def _own_config(given: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """vLLM's options without ``--additional-config``, and what that holds: vLLM takes the last one
    of several, which would leave the steering out.

    Raises:
        SteeredMoEError: It is no JSON object, or an option that the steering repo decides.
    """
    config: dict[str, Any] = {}
    left, options = [], iter(given)
    for option in options:
        word, _, value = option.partition("=")
        name = word.replace("_", "-")
        if name.partition(".")[0] in _DECIDED or name.startswith(f"{_CONFIG}."):
            raise SteeredMoEError(f"{word} is not for here: {_INSTEAD.get(name, _ELSE)}")
        if name != _CONFIG:
            left.append(option)
            continue
        config |= _json_object(value or next(options, ""))
    return config, left


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SteeredMoEError(f"{_CONFIG} is {text!r:.80}, which is no JSON: {error}") from error
    if not isinstance(found, dict) or KEY in found:
        raise SteeredMoEError(
            f"{_CONFIG} is {text!r:.80}; give a JSON object, without {KEY}: that is the repo"
        )
    return found


def _only_transformers(device_map: str | None, load_in_4bit: bool, batching: bool) -> None:
    given = {"--device-map": device_map, "--load-in-4bit": load_in_4bit,
             "--continuous-batching": batching}  # fmt: skip
    if unused := [name for name, value in given.items() if value]:
        raise SteeredMoEError(f"{unused[0]} is for the transformers engine; vLLM has its own")


def _run(command: Sequence[str], dry_run: bool) -> None:
    if dry_run:
        console.print(shlex.join(command), soft_wrap=True, markup=False, highlight=False)
        return
    if find_spec("vllm") is None:
        raise SteeredMoEError("vLLM is not installed here; pip install vllm, beside steered-moe")
    os.execv(command[0], list(command))  # noqa: S606
