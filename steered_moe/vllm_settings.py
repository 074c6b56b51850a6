"""What a vLLM engine is told about steering, by its configuration and by each request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
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
_FINGERPRINT = "fingerprint"
_ENGINE_FIELDS = ("repo_id", "revision", "strength", "steering", _FINGERPRINT, _PROFILE)
_REQUEST_FIELDS = ("strength", "name")
_ATTRIBUTE = "_steered_moe_settings"


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
        """Name -> strength of a request that says nothing.

        Raises:
            SteeringError: A steering has several.
        """
        given: dict[str, Any] = dict(zip(self.steerings, self.repo.strengths, strict=True))
        return by_name_checked(given, given)

    @cached_property
    def layers(self) -> set[int]:
        """Layers that any of them edits."""
        return {int(layer) for one in self.repo.steerings for layer in one.layers}

    @cached_property
    def fingerprint(self) -> str:
        """Changes with every steering, for keys of caches."""
        parts = ",".join(one.fingerprint for one in self.repo.steerings)
        return hashlib.sha256(parts.encode()).hexdigest()[:32]

    def of_request(self, asked: Any) -> dict[str, float]:
        """Strengths that a request asks for, without those of 0.

        Args:
            asked: Its extra argument ``steered_moe``: a strength for all steerings, or a mapping
                with ``strength``, ``name`` or both, which over HTTP may be a JSON string. What a
                ``name``, or a mapping of strengths, leaves out is off. A name without a strength
                has the one that the engine was started with.

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
        off = dict.fromkeys(known, 0.0)
        if "name" not in fields:
            return by_name_checked(fields["strength"], off)
        name = fields["name"]
        if name not in known:
            raise SteeringError(f"no steering named {name!r}; there is {', '.join(known)}")
        return by_name_checked({name: fields.get("strength", known[name])}, off)

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
    if strength == {}:
        raise SteeringError("strength is empty; give a number, or numbers by name")
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
        except (json.JSONDecodeError, RecursionError) as error:
            raise SteeringError(f"{KEY} is {asked!r:.80}, which is no JSON: {error}") from error
    fields = asked if isinstance(asked, Mapping) else {"strength": asked}
    _refuse_unknown(fields, _REQUEST_FIELDS, "a request")
    if not fields:
        raise SteeringError(f"{KEY} is empty; give strength, name or both")
    if nothing := [name for name, value in fields.items() if value is None]:
        raise SteeringError(f"{nothing[0]} of {KEY} is null; give a value, or leave it out")
    if not isinstance(fields.get("name", ""), str):
        raise SteeringError(
            f"name is {fields['name']!r:.80}; give one name, or a strength for each of several: "
            '{"strength": {"NAME": 1.0, "OTHER": 0.5}}'
        )
    return fields


def _refuse_unknown(given: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    if unknown := sorted(set(given) - set(known)):
        fields = ", ".join(known)
        raise SteeringError(f"{KEY} of {where} has no field {unknown[0]!r}; it has {fields}")


def settings_of(vllm_config: Any) -> EngineSettings | None:
    """Settings of an engine, read once in its first process and handed on with its configuration.

    Raises:
        SteeringError: As `engine_settings`.
        FormatError: The repo is damaged.
    """
    if not hasattr(vllm_config, _ATTRIBUTE):
        found = engine_settings(vllm_config.additional_config)
        object.__setattr__(vllm_config, _ATTRIBUTE, found)
        if found is not None:  # part of the key of compiled code; the caller's mapping stays
            fields = {**(_engine_fields(vllm_config.additional_config) or {})}
            marked = {**fields, _FINGERPRINT: found.fingerprint}
            config = {**vllm_config.additional_config, KEY: marked}
            object.__setattr__(vllm_config, "additional_config", config)
    settings: EngineSettings | None = getattr(vllm_config, _ATTRIBUTE)
    return settings


def engine_settings(additional_config: Any) -> EngineSettings | None:
    """Settings of an engine, from what ``--additional-config`` holds; None where it steers nothing.

    Raises:
        SteeringError: An unknown field, no repo, a value that is none, strengths that contradict
            each other, or the repo is not the one that another process of the engine has read.
        FormatError: The repo is damaged.
    """
    fields = _engine_fields(additional_config)
    if fields is None or set(fields) == {_PROFILE}:
        return None
    repo_id = fields.get("repo_id")
    if repo_id is None:
        raise SteeringError(f"{KEY} of --additional-config names no repo_id")
    for name in ("repo_id", "revision", "steering", _FINGERPRINT):
        if not isinstance(fields.get(name, ""), str):
            raise SteeringError(f"{name} of {KEY} is {fields[name]!r:.80}; give a string")
    repo = read_repo(hub.fetch(repo_id, fields.get("revision"))).only(fields.get("steering"))
    if fields.get("strength") is not None:
        repo = repo.at(fields["strength"])
    found = EngineSettings(repo)
    found.check(found.strengths)
    if fields.get(_FINGERPRINT, found.fingerprint) != found.fingerprint:
        raise SteeringError(
            f"{repo_id} has changed since another process of this engine read it; start it again"
        )
    return found


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
