"""A steering in formats of other projects, where it can be expressed exactly; refused elsewhere.

* "easysteer": the JSON with ``layer_configs`` of EasySteer's algorithm ``moe_router``.
* "steermoe": lists of activated and deactivated experts, as SteerMoE's (arXiv 2509.09660) edit
  takes them.

Both turn logits into log-probabilities before they force or ban, and a forced expert gets the
token's maximum plus a margin. Whether that gives the weights of this library depends on what a
router does with logits, so each layer is tried on routers of the family before it is written, in
float32. Both compute in the dtype of the logits; in bfloat16 their log-probabilities round, which
can select other experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steered_moe import hub
from steered_moe.base_model import locate_base, routers_of
from steered_moe.combining import constant_tables
from steered_moe.edit import Edit
from steered_moe.errors import FormatError, SteeringError
from steered_moe.routers import Router
from steered_moe.storage import read_repo
from steered_moe.trial import Trial

MARGIN = 0.01
"""Of both, above the maximum and below the minimum (2509.09660 Sec. 3.2)."""

_CLOSE = 1e-5  # of routing weights
_ROUTERS = 5
_SOFT, _ACTIVATE, _DEACTIVATE = "soft", "activate", "deactivate"

Layer = dict[str, Any]
Parts = Mapping[str, Tensor]


def export(
    repo: str,
    kind: str,
    out: str | Path,
    *,
    strength: float | Mapping[str, float] | None = None,
    steering: str | None = None,
    base_model: str | None = None,
) -> dict[str, Any]:
    """Write a steering for another project; its strength is folded in.

    Args:
        repo: Steering repo: a folder, a Hub id, ``id@revision``.
        kind: "easysteer" or "steermoe".
        out: File to write; new.
        strength: Overrides the recorded one.
        steering: One of several; all of them, added up, by default.
        base_model: Overrides the recorded base model, of which the config is read.

    Returns:
        What was written.

    Raises:
        SteeringError: An edit that the format cannot express; names layer, value and reason.
        FormatError: No such format, or the file exists.
        BaseModelError: The steering does not fit the model.
        RouterError: A router that cannot be tried alone.
    """
    if kind not in _FORMATS:
        raise FormatError(f"no format {kind!r}; there are {', '.join(_FORMATS)}")
    if Path(out).exists():
        raise FormatError(f"{out} exists; export into a new file")
    if not Path(out).parent.is_dir():
        raise FormatError(f"{out} is in no folder that exists; make it first")
    place = hub.fetch(repo)
    found = read_repo(place).only(steering)
    found = found if strength is None else found.at(strength)
    routers = routers_of(found, *locate_base(found, place, base_model))
    layers = {
        layer: _expressed(layer, parts, routers[layer], kind)
        for layer, parts in sorted(constant_tables(found).items())
    }
    if not layers:
        raise SteeringError("at this strength nothing is steered; there is nothing to export")
    content = _FORMATS[kind](layers)
    text = json.dumps(content, indent=1) + "\n"
    Path(out).write_text(text, encoding="utf-8")
    return content


def _expressed(layer: int, parts: Parts, router: Router, kind: str) -> Layer:
    """The entry of a layer in EasySteer's terms, tried."""
    if len(parts) > 1:
        raise SteeringError(f"layer {layer} has edits of the kinds {', '.join(parts)}, not one")
    ((part, row),) = parts.items()
    if part == "force":
        entry = _toggles(row, router.top_k)
    elif part == "std" and kind == "easysteer":
        entry = _soft(layer, row, router.num_experts)
    else:
        reason = "only forces and bans" if kind == "steermoe" else "has std and force only"
        raise SteeringError(f"layer {layer} has an edit of the kind {part!r}; {kind} {reason}")
    if kind == "steermoe" and not entry.pop("epsilon"):
        raise SteeringError(
            f"layer {layer} forces fewer experts than a token gets; SteerMoE would put them "
            f"{MARGIN} above the maximum, which changes their weights. Use easysteer"
        )
    _try(layer, Edit(router.num_experts, **{part: row[None]}), entry, router)
    return entry


def _soft(layer: int, row: Tensor, experts: int) -> Layer:
    """One lambda for a list; theirs counts with the unbiased standard deviation."""
    values = sorted(set(row[row != 0].tolist()))
    if len(values) > 1:
        raise SteeringError(
            f"layer {layer} has {len(values)} different coefficients ({values[0]:g} to "
            f"{values[-1]:g}); EasySteer has one for all experts of a layer"
        )
    scaled = values[0] * math.sqrt((experts - 1) / experts)
    return {"mode": _SOFT, "expert_ids": row.nonzero().flatten().tolist(), "lambda": scaled}


def _toggles(row: Tensor, top_k: int) -> Layer:
    forced, banned = ((row * sign > 0).nonzero().flatten().tolist() for sign in (1, -1))
    # Forced experts share the maximum here, so some beside others get no margin; where they fill
    # all places, or none is forced, a margin changes no weight, and this one survives bfloat16.
    margin = {"epsilon": 0.0 if 0 < len(forced) < top_k else 1.0}
    if not forced:
        return {"mode": _DEACTIVATE, "expert_ids": banned, **margin}
    down = {"deactivate_ids": banned} if banned else {}
    return {"mode": _ACTIVATE, "activate_ids": forced, **down, **margin}


class _Theirs:
    """An entry as their code runs it, with the methods of an `Edit`."""

    rows = 1
    force = None

    def __init__(self, entry: Layer, experts: int) -> None:
        self.entry, self.experts = entry, experts

    def logits(self, logits: Tensor) -> Tensor:
        """What they hand to the router in place of its logits."""
        entry, found = self.entry, logits.clone()
        ids = entry.get("expert_ids", [])
        if entry["mode"] == _SOFT:
            found[..., ids] += entry["lambda"] * logits.std(dim=-1, keepdim=True)
            return found
        scores = torch.log_softmax(logits, dim=-1)
        margin, found = entry.get("epsilon", MARGIN), scores.clone()
        banned = ids if entry["mode"] == _DEACTIVATE else entry.get("deactivate_ids", [])
        found[..., entry.get("activate_ids", [])] = scores.amax(-1, keepdim=True) + margin
        found[..., banned] = scores.amin(-1, keepdim=True) - margin
        return found

    def ranked(self, scores: Tensor) -> Tensor:
        """They rank by logits alone."""
        return scores

    unmasked = ranked


def _try(layer: int, ours: Edit, entry: Layer, router: Router) -> None:
    """Compare both on random routers of the family, of which the edit changes some at least."""
    changed = False
    for seed in range(_ROUTERS):
        trial = Trial(router, seed)
        mine = trial.weights(ours)
        worst = float((mine - trial.weights(_Theirs(entry, router.num_experts))).abs().max())
        changed |= not torch.equal(mine, trial.weights())
        if worst > _CLOSE:
            raise SteeringError(
                f"layer {layer}: there this edit would give other routing weights in "
                f"{type(router.module).__name__} (by up to {worst:.2g}); serve it with steered-moe"
            )
    if not changed:
        raise SteeringError(f"layer {layer}: its edit changes nothing on {_ROUTERS} random routers")


def _lists(layers: Mapping[int, Layer]) -> dict[str, Any]:
    """``[layer, expert]`` pairs."""
    banned = {k: e.get("deactivate_ids", []) for k, e in layers.items()}
    banned |= {k: e["expert_ids"] for k, e in layers.items() if e["mode"] == _DEACTIVATE}
    forced = {layer: entry.get("activate_ids", []) for layer, entry in layers.items()}
    lists = {"activated": forced, "deactivated": banned}
    return {
        name: [[layer, expert] for layer, experts in found.items() for expert in experts]
        for name, found in lists.items()
    }


_FORMATS: dict[str, Callable[[Mapping[int, Layer]], dict[str, Any]]] = {
    "easysteer": lambda layers: {"layer_configs": {str(k): entry for k, entry in layers.items()}},
    "steermoe": _lists,
}
