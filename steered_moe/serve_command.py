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
            more = ["--host", host, "--port", str(port), "--dtype", dtype, *context.args]
            _only_transformers(device_map, load_in_4bit, continuous_batching)
            _run(vllm_command(repo, strength, base_model) + more, dry_run)
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


def vllm_command(repo: str, strength: float | None, base_model: str | None) -> list[str]:
    """vLLM's server on the base model that a steering repo names, at its revision.

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
    return [*command, "--additional-config", json.dumps({KEY: settings})]


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
