"""What a vLLM engine is told about steering, by its configuration and by each request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor

from steered_moe import hub
from steered_moe.combining import combine
from steered_moe.errors import SteeringError
from steered_moe.fit import check_force
from steered_moe.steering import RouterSteering
from steered_moe.storage import SteeringRepo, read_repo
from steered_moe.strength import as_rows, by_name

KEY = "steered_moe"
"""Of ``--additional-config``, and of a request's extra arguments."""

_PROFILE = "profile"
_ENGINE_FIELDS = ("repo_id", "revision", "strength", "steering", "fingerprint", _PROFILE)
_REQUEST_FIELDS = ("strength", "name")


@dataclass(frozen=True)
class EngineSettings:
    """The steerings of an engine.

    Args:
        repo: As it was read, with its strengths.
    """

    repo: SteeringRepo

    @cached_property
    def steerings(self) -> dict[str, RouterSteering]:
        """Name -> steering."""
        return {steering.name: steering for steering in self.repo.steerings}

    @cached_property
    def strengths(self) -> dict[str, float]:
        """Name -> strength of a request that says nothing."""
        names = self.steerings
        return {n: float(as_rows(s)) for n, s in zip(names, self.repo.strengths, strict=True)}

    @cached_property
    def layers(self) -> set[int]:
        """Layers that any of them edits."""
        return {int(layer) for one in self.repo.steerings for layer in one.layers}

    @cached_property
    def fingerprint(self) -> str:
        """Changes with every steering, for keys of caches."""
        return ",".join(one.fingerprint for one in self.repo.steerings)

    def of_request(self, asked: Any) -> dict[str, float]:
        """Strengths that a request asks for, without those of 0.

        Args:
            asked: Its extra argument ``steered_moe``: a strength for all steerings, or a mapping
                with ``strength``, ``name`` or both, which over HTTP may be a JSON string.

        Raises:
            SteeringError: An unknown field or name, a strength that is not a finite number, or
                steerings that contradict each other at these strengths.
            BaseModelError: More forced experts in a layer than a token gets, or too few left.
        """
        named = self._named(_request_fields(asked))
        found = {name: value for name, value in named.items() if value}
        self.check(found)
        return found

    def _named(self, fields: Mapping[str, Any]) -> dict[str, float]:
        known = self.strengths
        name, strength = fields.get("name"), fields.get("strength")
        if name is None:
            return by_name_checked(0.0 if strength is None else strength, known)
        if name not in known:
            raise SteeringError(f"no steering named {name!r}; there is {', '.join(known)}")
        own = known[name] if strength is None else strength
        return by_name_checked({name: own}, {name: own})

    def check(self, strengths: Mapping[str, float]) -> None:
        """Refuse strengths under which steerings contradict each other."""
        top_k = self.repo.base.get("num_experts_per_tok")
        for layer, parts in self.combined(strengths).items():
            if top_k is not None:
                check_force(parts.get("force"), layer, top_k)

    def combined(self, strengths: Mapping[str, float]) -> dict[int, dict[str, Tensor]]:
        """Layer -> part -> one row: the sum of the steerings whose strength is not 0.

        Raises:
            SteeringError: They contradict each other.
        """
        rows = {name: as_rows(value) for name, value in strengths.items() if value}
        return combine({name: self.steerings[name] for name in rows}, rows)


def by_name_checked(strength: Any, known: Mapping[str, float]) -> dict[str, float]:
    """One finite number for each steering.

    Raises:
        SteeringError: An unknown name, several rows, or no finite number.
    """
    found: dict[str, float] = {}
    for name, value in by_name(strength, known).items():
        if len(rows := as_rows(value)) != 1:
            raise SteeringError(f"strength of {name!r} is {value!r}; give one number")
        found[name] = float(rows)
    return {**known, **found}


def _request_fields(asked: Any) -> Mapping[str, Any]:
    if isinstance(asked, str):
        try:
            asked = json.loads(asked)
        except json.JSONDecodeError as error:
            raise SteeringError(f"{KEY} is {asked!r:.80}, which is no JSON: {error}") from error
    if isinstance(asked, Mapping):
        _refuse_unknown(asked, _REQUEST_FIELDS, "a request")
        if not asked:
            raise SteeringError(f"{KEY} is empty; give strength, name or both")
        return asked
    return {"strength": asked}


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(given) - set(known)):
        fields = ", ".join(known)
        raise SteeringError(f"{KEY} of {where} has no field {unknown[0]!r}; it has {fields}")


def engine_settings(additional_config: Any) -> EngineSettings | None:
    """Settings of an engine, from what ``--additional-config`` holds; None where it steers nothing.

    Raises:
        SteeringError: An unknown field, or no repo.
        FormatError: The repo is damaged.
    """
    fields = _engine_fields(additional_config)
    if fields is None or set(fields) == {_PROFILE}:
        return None
    if not isinstance(fields.get("repo_id"), str):
        raise SteeringError(f"{KEY} of --additional-config names no repo_id")
    return _settings(json.dumps(fields, sort_keys=True))


def is_profiling(additional_config: Any) -> bool:
    """Whether an engine counts what its routers select.

    Raises:
        SteeringError: An unknown field, or ``profile`` is neither true nor false.
    """
    value = (_engine_fields(additional_config) or {}).get(_PROFILE, False)
    if not isinstance(value, bool):
        raise SteeringError(f"{_PROFILE} of {KEY} is {value!r:.40}; give true or false")
    return value


def _engine_fields(additional_config: Any) -> dict[str, Any] | None:
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        return None
    fields = {"repo_id": given} if isinstance(given, str) else given
    if not isinstance(fields, Mapping):
        raise SteeringError(f"{KEY} is {given!r:.80}; give a repo_id, or a mapping that has one")
    _refuse_unknown(fields, _ENGINE_FIELDS, "--additional-config")
    return dict(fields)


@lru_cache(maxsize=8)
def _settings(text: str) -> EngineSettings:
    fields = json.loads(text)
    folder = hub.fetch(fields["repo_id"], fields.get("revision"))
    repo = read_repo(folder).only(fields.get("steering"))
    if fields.get("strength") is not None:
        repo = repo.at(fields["strength"])
    return EngineSettings(repo)
