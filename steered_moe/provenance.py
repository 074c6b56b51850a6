"""Where a steering comes from: method, settings and the profiles that it was selected from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steered_moe.errors import SteeringError
from steered_moe.profile import RoutingProfile

_DEFAULTS: Mapping[str, Any] = {"chat": False, "template_tokens": True}
"""How texts were put to the model, and what a profile means that does not say."""

_WHERE_KNOWN = ("dtype", "model_sha256", "tokenizer_sha256")
"""What is compared where both profiles say it; imported ones do not."""


def provenance_of(
    method: str,
    parameters: Mapping[str, Any],
    languages: Sequence[str],
    *profiles: RoutingProfile,
) -> dict[str, Any]:
    """What a steering records: fields of ``config.json``, as the file format names them.

    Args:
        method: Name of the method.
        parameters: Its settings.
        languages: Those whose routing it used.
        profiles: Their corpora (``about["corpus"]``) and their sha256 are recorded.
    """
    corpora = [str(p.about["corpus"]) for p in profiles if p.about.get("corpus")]
    return {
        "method": method,
        "parameters": dict(parameters),
        "languages": list(languages),
        **({"corpora": list(dict.fromkeys(corpora))} if corpora else {}),
        "profile_sha256": list(dict.fromkeys(p.fingerprint for p in profiles)),
    }


def check_same_model(first: RoutingProfile, second: RoutingProfile) -> None:
    """Refuse two profiles that cannot be of one model, or that were measured in different ways.

    Raises:
        SteeringError: Other layers, another number of experts, another model or tokenizer by name
            or sha256, or another chat, template_tokens or dtype.
    """
    if first.layers != second.layers or first.num_experts != second.num_experts:
        raise SteeringError(
            f"profiles of {len(first.layers)} layers x {first.num_experts} experts and "
            f"{len(second.layers)} x {second.num_experts} are not of one model"
        )
    names = [(p.about.get("model"), p.about.get("revision")) for p in (first, second)]
    if None not in (names[0][0], names[1][0]) and names[0] != names[1]:
        one, other = (f"{model} at {revision or 'no revision'}" for model, revision in names)
        raise SteeringError(f"the profiles are of {one} and of {other}; profile one model")
    for name in (*_DEFAULTS, *_WHERE_KNOWN):
        said = [p.about.get(name, _DEFAULTS.get(name)) for p in (first, second)]
        if said[0] != said[1] and None not in said:
            raise SteeringError(
                f"{name} is {said[0]!r} in one profile and {said[1]!r} in the other, which would "
                "be part of their difference; profile both in the same way"
            )
