"""Steered MoE layers inside a vLLM worker: one table of edits, a row for each strength in use.

Every MoE layer of vLLM hands its router logits through one method before experts are selected. The
edit goes there. A layer has a row of coefficients for each slot; slot 0 is what the engine does by
default, the others belong to requests that ask for strengths of their own. Each token of a batch
has the number of its slot, so that one forward pass mixes them. All buffers have fixed places, so
CUDA graphs and compiled code go on when they are written.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steered_moe.edit import Edit
from steered_moe.errors import InterventionError, SteeringError
from steered_moe.vllm_settings import EngineSettings, by_name_checked

METHOD = "_apply_quant_method"
"""Method of a vLLM MoE layer that has the router logits as its second argument."""

_BUFFER = "steered_moe_"
_SOFTMAX_STEP = 1e-6
_SOFTMAX = "softmax"
_SATURATED = -80.0  # a sigmoid of less is 0 in float32
_TOKENS = "steered_moe_tokens"


class SteeredLayers:
    """The layers that one worker steers.

    Args:
        settings: Steerings and their default strengths.
        slots: How many different strengths can be in use at once, the default included.
        tokens: Most tokens of a forward pass.
        uniform: All tokens take slot 0, whatever their request asks for.

    Attributes:
        fired: Layers whose edit has run outside compiled code.
    """

    def __init__(self, settings: EngineSettings, slots: int, tokens: int, uniform: bool) -> None:
        self.settings = settings
        self.slots = slots
        self.uniform = uniform
        self.layers: dict[int, Any] = {}
        self.fired: set[int] = set()
        self._tokens = torch.zeros(1 if uniform else tokens, dtype=torch.int64)
        self._parts = _parts(settings)
        self._rows: dict[tuple[tuple[str, float], ...], int] = {}
        self.strengths = settings.strengths
        self._mixed = False  # a token of the last forward pass was of another slot than 0

    def install(self, runner: Any, layer: int) -> None:
        """Steer a layer.

        Args:
            runner: vLLM's ``MoERunner``.
            layer: 0-based decoder layer.

        Raises:
            InterventionError: The router of the layer cannot be steered.
        """
        _check_router(runner, layer, self._parts[layer])
        experts = next(iter(self.settings.steerings.values())).num_experts
        for part, dtype in self._parts[layer].items():
            rows = torch.zeros(self.slots, experts, dtype=dtype)
            runner.register_buffer(_BUFFER + part, rows, persistent=False)
        self._tokens = self._tokens.to(rows.device)
        runner.register_buffer(_TOKENS, self._tokens, persistent=False)
        setattr(runner, METHOD, self._steered(runner, layer, experts, getattr(runner, METHOD)))
        self.layers[layer] = runner

    def _steered(self, runner: Any, layer: int, experts: int, original: Any) -> Any:
        top_k = int(runner.moe_config.experts_per_token)
        parts = tuple(self._parts[layer])

        def steered(hidden_states: Tensor, router_logits: Tensor, *args: Any, **kw: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.fired.add(layer)
            logits = _edited(runner, parts, experts, top_k, router_logits)
            return original(hidden_states, logits, *args, **kw)

        return steered

    def set_default(self, strength: Any) -> None:
        """Change what requests that ask for nothing get.

        Args:
            strength: A number for all steerings, or a mapping by name.

        Raises:
            SteeringError: An unknown name, or no finite number.
        """
        found = by_name_checked(strength, self.strengths)
        self.settings.check(found)
        self._write(0, found)
        self.strengths = found

    def _write(self, slot: int, strengths: Mapping[str, float]) -> None:
        tables = self.settings.combined(strengths)
        for layer, runner in self.layers.items():
            found = tables.get(layer, {})
            for part in self._parts[layer]:
                buffer = getattr(runner, _BUFFER + part)
                row = found.get(part)
                if row is None:
                    buffer[slot].zero_()
                else:
                    buffer[slot].copy_(row[0].to(buffer.dtype))

    def assign(self, asked: Sequence[Mapping[str, float] | None], tokens: Sequence[int]) -> None:
        """Say which tokens of the next forward pass belong to which strengths.

        Args:
            asked: For each request of the batch; None for the default.
            tokens: How many tokens it has.
        """
        if self.uniform or not (self._mixed or any(one is not None for one in asked)):
            return
        keys = [None if one is None else tuple(sorted(one.items())) for one in asked]
        self._keep({key for key in keys if key is not None})
        slots = torch.tensor([0 if key is None else self._slot(key) for key in keys])
        of_tokens = slots.repeat_interleave(torch.tensor(tokens))
        self._tokens[: len(of_tokens)].copy_(of_tokens, non_blocking=True)
        self._tokens[len(of_tokens) :].zero_()
        self._mixed = bool(slots.any())

    def _keep(self, keys: set[Any]) -> None:
        """Forget strengths that are not in use, where their slots are needed."""
        new = keys - set(self._rows)
        if len(self._rows) + len(new) < self.slots:
            return
        self._rows = {key: slot for key, slot in self._rows.items() if key in keys}

    def _slot(self, key: tuple[tuple[str, float], ...]) -> int:
        if key not in self._rows:
            free = set(range(1, self.slots)) - set(self._rows.values())
            if not free:
                raise SteeringError(
                    f"one batch has more than {self.slots - 1} different strengths; "
                    "start with a smaller --max-num-seqs"
                )
            self._rows[key] = min(free)
            self._write(self._rows[key], dict(key))
        return self._rows[key]

    def check_complete(self, here: Container[int]) -> None:
        """Refuse an engine in which a steered layer is missing.

        Args:
            here: Layers of this process's stage of a pipeline.

        Raises:
            InterventionError: Names the layers.
        """
        if missing := sorted(x for x in self.settings.layers - set(self.layers) if x in here):
            raise InterventionError(
                f"layers {missing} have no router that vLLM hands over; this process would skip "
                "them. Leave them out with steering.restrict(...), or use the transformers engine"
            )

    @property
    def silent(self) -> list[int]:
        """Layers whose edit has not run yet outside compiled code."""
        return sorted(set(self.layers) - self.fired)

    def check_fired(self) -> None:
        """Refuse an engine in which the edit of a layer never runs.

        Raises:
            InterventionError: Names the layers.
        """
        if self.silent:
            names = ", ".join(str(self.layers[layer].layer_name) for layer in self.silent)
            raise InterventionError(
                f"the edit of {names} did not run: a kernel of this platform goes around it. "
                "Start with another --moe-backend, or use the transformers engine"
            )


def _parts(settings: EngineSettings) -> dict[int, dict[str, torch.dtype]]:
    """Layer -> parts that its edit can have at any strength -> dtype of the buffer."""
    parts: dict[int, dict[str, torch.dtype]] = {}
    for one in settings.repo.steerings:
        for row, layer in enumerate(one.layers.tolist()):
            mine = parts.setdefault(layer, {})
            if one.weights[row].any():
                mine[one.scale] = torch.float32
            if one.force is not None and one.force[row].any():
                mine["force"] = torch.int8
    return {layer: mine for layer, mine in parts.items() if mine}


def _edited(runner: Any, parts: Iterable[str], experts: int, top_k: int, logits: Tensor) -> Tensor:
    """Router logits ``(tokens, columns)`` after the edit."""
    slots = getattr(runner, _TOKENS)[: logits.shape[0]]
    extra = logits.shape[-1] - experts
    rows = {}
    for part in parts:
        row = getattr(runner, _BUFFER + part).index_select(0, slots)
        rows[part] = torch.nn.functional.pad(row, (0, extra)) if extra else row
    edited = Edit(experts, **rows).logits(logits)
    if getattr(getattr(runner, "router", None), "scoring_func", _SOFTMAX) != _SOFTMAX:
        # Scores of 0 for all experts of a token would be divided by their sum, and NaN of one
        # request reaches others through blocks of the cache that they take over.
        edited = torch.where(edited == logits, logits, edited.clamp(min=_SATURATED))
    force = rows.get("force")
    return edited if force is None else _lowered(edited, force, top_k)


def _lowered(logits: Tensor, force: Tensor, top_k: int) -> Tensor:
    """Where force fills all places, other experts lie one step below the forced ones.

    Forced experts share the token's maximum with the expert that had it, which would take a place
    from one of them. What is lowered is not selected. The step is one that a softmax in float32
    shows too, for kernels that rank after it.
    """
    full = (force > 0).sum(dim=-1, keepdim=True) >= top_k
    highest = logits.amax(dim=-1, keepdim=True)
    step = (torch.finfo(logits.dtype).eps * highest.abs()).clamp(min=_SOFTMAX_STEP)
    below = torch.minimum(logits, highest - step)
    return torch.where(full & (force <= 0), below, logits)


def _check_router(runner: Any, layer: int, parts: Mapping[str, Any]) -> None:
    router = getattr(runner, "router", None)
    routing = getattr(router, "custom_routing_function", None)
    module = getattr(getattr(routing, "func", routing), "__module__", "") or ""
    where = f"layer {layer} ({runner.layer_name})"
    if module.endswith("models.transformers.moe") or "Transformers" in type(runner).__name__:
        raise InterventionError(
            f"{where} selects its experts in transformers before vLLM sees logits; use a model "
            "that vLLM implements itself (--model-impl vllm), or the transformers engine"
        )
    corrected = getattr(router, "e_score_correction_bias", None) is not None
    groups = getattr(router, "num_expert_group", None) or 1
    if "force" in parts and (corrected or groups > 1 or routing is not None):
        raise InterventionError(
            f"{where} ranks experts by more than their logits (a correction bias, groups or a "
            "routing function of its own), so logits cannot force or ban one in vLLM; use a soft "
            "steering, or the transformers engine"
        )
