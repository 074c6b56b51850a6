"""``steered-moe select``: profiles to a steering repo, by a method or a paper's preset."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from steered_moe.base_model import locate_base, repo_for
from steered_moe.cards import write_card
from steered_moe.divergence import divergence
from steered_moe.embedded import named_model, named_repo
from steered_moe.errors import BaseModelError, SteeringError
from steered_moe.heat_map import heat_map
from steered_moe.hub import fetch, split
from steered_moe.layers import layer_range, middle_layers
from steered_moe.profile import RoutingProfile
from steered_moe.selection import METHODS, PRESETS, method, preset
from steered_moe.steering import RouterSteering
from steered_moe.storage import read_repo
from steered_moe.terminal import console, errors, table_of

Method = Annotated[
    str, typer.Argument(help=f"A method: {', '.join(METHODS)}; or a preset: {', '.join(PRESETS)}.")
]
Sources = Annotated[
    list[Path],
    typer.Argument(help="Profiles in the method's order (task, then general); of random, a repo."),
]
Out = Annotated[Path, typer.Option(help="Folder for the steering repo.")]
Layers = Annotated[
    str | None,
    typer.Option(help="first-last, counted from 0; all; or auto, the middle by divergence."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method, such as threshold=0.3.")
]
Strength = Annotated[float | None, typer.Option(help="Strength to record; by default 1.")]
BaseModel = Annotated[str | None, typer.Option(help="By default the model of the profile.")]


def select(
    method: Method,
    sources: Sources,
    out: Out,
    layers: Layers = None,
    settings: Settings = None,
    strength: Strength = None,
    base_model: BaseModel = None,
) -> None:
    """Choose experts from profiles, and write a steering repo with a card."""
    with errors():
        known = preset(method) if method in PRESETS else None
        make = _method(known.method if known else method)
        given = [_source(kind, path) for kind, path in _paired(make, sources)]
        options = {**(known.parameters if known else {}), **_settings(make, settings or [])}
        if "layers" in inspect.signature(make).parameters:
            if known and layers is None:
                layers = f"{known.layers[0]}-{known.layers[-1]}"
            chosen, why = _layers(layers or "auto", given, options)
            options["layers"] = chosen
            console.print(why)
        steering = _made(make, given, options)
        base, revision = _base(base_model, sources[0], given[0])
        recorded = known.strength if known and strength is None else strength
        repo = repo_for(steering, 1.0 if recorded is None else recorded, base, revision, out)
        repo.write(out)
        write_card(repo, out)
    rows = {"strength": repo.strengths[0], "experts": steering.num_steered_experts}
    console.print(table_of(f"steering {escape(str(out))}", {**rows, **steering.provenance}))
    console.print("\n".join(heat_map(steering)), markup=False, highlight=False)


def _method(name: str) -> Callable[..., RouterSteering]:
    if name not in METHODS:
        raise SteeringError(
            f"there is no method or preset {name!r}; there are {', '.join((*METHODS, *PRESETS))}"
        )
    return method(name)


def _paired(make: Callable[..., Any], paths: Sequence[Path]) -> list[tuple[type, Path]]:
    """The profiles or steerings that a method works on, with where they are."""
    kinds = {
        name: kind
        for name, kind in get_type_hints(make).items()
        if kind in (RoutingProfile, RouterSteering) and name != "return"
    }
    if len(paths) != len(kinds):
        raise SteeringError(
            f"{make.__name__} works on {len(kinds)} folders ({', '.join(kinds)}), not {len(paths)}"
        )
    return list(zip(kinds.values(), paths, strict=True))


def _source(kind: type, path: Path) -> RoutingProfile | RouterSteering:
    if kind is RoutingProfile:
        return RoutingProfile.load(path)
    return RouterSteering.load(named_repo(str(path)))


def _settings(make: Callable[..., Any], texts: Sequence[str]) -> dict[str, Any]:
    """``name=value``; values are JSON, text, or a list with commas between."""
    allowed = [name for name in inspect.signature(make).parameters if name != "layers"]
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in allowed:
            raise SteeringError(
                f"--set {text}: {make.__name__} has no such setting; write name=value with one of "
                f"{', '.join(allowed)}"
            )
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.split(",") if "," in text else text


def _layers(
    text: str, given: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Sequence[int], str]:
    """The layers to steer, and why these."""
    profiles = [source for source in given if isinstance(source, RoutingProfile)]
    profiled = profiles[0].layers
    if text == "all":
        return profiled, "all layers"
    if text == "auto":
        return _middle(profiles, str(options.get("pivot", options.get("language", "en"))))
    first, last = layer_range(text)
    if last > profiled[-1]:
        raise SteeringError(f"layers are {text}; the last one profiled is {profiled[-1]}")
    return range(first, last + 1), f"layers {text}, as asked"


def _middle(profiles: Sequence[RoutingProfile], pivot: str) -> tuple[Sequence[int], str]:
    several = [p for p in profiles if len(p.languages) > 1 and pivot in p.languages]
    if not several:
        raise SteeringError(
            f"no profile has {pivot} and another language, from which the middle layers could be "
            "read; give --layers first-last"
        )
    middle = middle_layers(divergence(several[0], pivot), several[0].layers)
    if not middle.u_shaped:
        raise SteeringError(f"{middle.reason}: give --layers first-last")
    return middle.layers, middle.reason


def _made(
    make: Callable[..., RouterSteering], given: Sequence[Any], options: Mapping[str, Any]
) -> RouterSteering:
    try:
        inspect.signature(make).bind(*given, **options)
    except TypeError as error:
        raise SteeringError(f"{make.__name__}: {error}; give it with --set name=value") from error
    return make(*given, **options)


def _base(asked: str | None, path: Path, source: Any) -> tuple[str, str | None]:
    """The base model: the one asked for, or that of the profile or steering."""
    if asked is not None:
        return split(named_model(asked))
    if isinstance(source, RouterSteering):
        folder = fetch(named_repo(str(path)))
        return locate_base(read_repo(folder), folder, None)
    if source.about.get("model") is None:
        raise BaseModelError(f"{path} does not say which model it is of; give --base-model")
    return named_model(source.about["model"]), source.about.get("revision")
