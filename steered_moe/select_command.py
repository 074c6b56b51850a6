"""``steered-moe select``: profiles to a steering repo, by a method or a paper's preset."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from steered_moe.selection import METHODS, PRESETS, Preset, method, preset
from steered_moe.settings import parsed
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
    typer.Option(
        help="first-last, counted from 0; all; or auto, the middle by divergence, which is the "
        "default of every method but risk_difference."
    ),
]
Pivot = Annotated[
    str | None,
    typer.Option(
        help="Language that divergence and the method compare with, as the profile names it "
        "(eng_Latn); by default en."
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method, such as threshold=0.3.")
]
Strength = Annotated[float | None, typer.Option(help="Strength to record; by default 1.")]
BaseModel = Annotated[str | None, typer.Option(help="By default the model of the profile.")]

_PIVOT_SETTING = {"task_experts": "language", "risk_difference": "language"}
"""Setting that is the pivot, of methods that do not call it ``pivot``: their one language."""

logger = logging.getLogger(__name__)


def select(
    method: Method,
    sources: Sources,
    out: Out,
    layers: Layers = None,
    pivot: Pivot = None,
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
        options |= _pivot(make, pivot, options)
        notes = _of_preset(method, known, given[0]) if known else {}
        if (own := inspect.signature(make).parameters.get("layers")) is not None:
            if layers is None:
                layers = _by_default(known, own.default)
            compared = options.get(_PIVOT_SETTING.get(make.__name__, "pivot"), pivot or "en")
            options["layers"], why = _layers(layers, given, compared)
            notes |= {"layers_reason": why} if layers == "auto" else {}
            console.print(why)
        elif layers or pivot:
            raise SteeringError(
                f"{make.__name__} takes the layers of what it is given; leave out "
                "--layers and --pivot"
            )
        steering = _noted(_made(make, given, options), notes)
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
    """``name=value``, read as the method's signature says."""
    kinds = get_type_hints(make)
    sources = (RoutingProfile, RouterSteering)
    names = [name for name in inspect.signature(make).parameters if name != "layers"]
    allowed = [name for name in names if kinds.get(name) not in sources]
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in allowed:
            raise SteeringError(
                f"--set {text}: {make.__name__} has no such setting; write name=value with one of "
                f"{', '.join(allowed)}"
            )
        found[name] = parsed(value, kinds.get(name))
    return found


def _pivot(
    make: Callable[..., Any], asked: str | None, options: Mapping[str, Any]
) -> dict[str, str]:
    """``--pivot`` as a setting of the method, if it has one for it."""
    name = _PIVOT_SETTING.get(make.__name__, "pivot")
    if asked is None or name not in inspect.signature(make).parameters:
        return {}
    if options.get(name, asked) != asked:
        raise SteeringError(
            f"--pivot is {asked} and --set {name}={options[name]}; give one of the two"
        )
    return {name: asked}


def _of_preset(name: str, known: Preset, source: Any) -> dict[str, str]:
    """What a steering records of its preset; a warning where that is for another model."""
    model = source.about.get("model") if isinstance(source, RoutingProfile) else None
    if model is not None and model != known.model:
        logger.warning(
            "preset %s is for %s, and the profile is of %s: unless that is a copy of it, layers, "
            "threshold and strength need not fit",
            name,
            known.model,
            model,
        )
    return {"preset": name, "preset_source": f"arXiv {known.source}"}


def _noted(steering: RouterSteering, notes: Mapping[str, str]) -> RouterSteering:
    """The steering, with notes among the parameters that it records."""
    origin = steering.provenance
    parameters = {**origin.get("parameters", {}), **notes}
    return replace(steering, provenance={**origin, "parameters": parameters}) if notes else steering


def _by_default(known: Preset | None, own: Any) -> str:
    """The layers where none are asked for: the preset's; all, where the method's default is None
    (SteerMoE ranks over all layers); else the middle."""
    if known:
        return f"{known.layers[0]}-{known.layers[-1]}"
    return "all" if own is None else "auto"


def _layers(text: str, given: Sequence[Any], pivot: str) -> tuple[Sequence[int], str]:
    """The layers to steer, and why these."""
    profiles = [source for source in given if isinstance(source, RoutingProfile)]
    profiled = profiles[0].layers
    if text == "all":
        return profiled, "all layers"
    if text == "auto":
        return _middle(profiles[-1], pivot)
    first, last = layer_range(text)
    if last > profiled[-1]:
        raise SteeringError(f"layers are {text}; the last one profiled is {profiled[-1]}")
    return range(first, last + 1), f"layers {text}, as asked"


def _middle(profile: RoutingProfile, pivot: str) -> tuple[Sequence[int], str]:
    """The middle layers by the last profile, which is the one of general text."""
    if len(profile.languages) < 2 or pivot not in profile.languages:
        raise SteeringError(
            f"the middle layers are read off {pivot} and another language, but the (last) profile "
            f"has {', '.join(profile.languages)}; give --pivot, or --layers first-last"
        )
    middle = middle_layers(divergence(profile, pivot), profile.layers)
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
