"""`RouterSteering`: the value that says how router logits are edited, layer by layer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from steered_moe.errors import SteeringError
from steered_moe.validation import as_force, as_layers, as_provenance, as_weights, check_name

if TYPE_CHECKING:
    from pathlib import Path

    from huggingface_hub import CommitInfo

Scale = Literal["std", "abs", "none"]
SCALES: tuple[str, ...] = get_args(Scale)


@dataclass(frozen=True, eq=False, repr=False)
class RouterSteering:
    """How the router logits ``z`` of some decoder layers are edited.

    The soft part adds ``strength * weights[row, e] * s_e(z)`` to the logit of expert ``e``, where
    ``s`` is the token's standard deviation (``"std"``, arXiv 2510.04694 Eq. 4), ``|z_e|``
    (``"abs"``, the released code of arXiv 2601.14050) or 1 (``"none"``). The hard part puts
    experts among the selected ones (+1) or keeps them out (-1) for every token (2510.04694 Eq. 5,
    the masks of 2601.14050, arXiv 2509.09660).

    Args:
        name: Letters, digits, ``_``, ``-`` and ``+``; the key under which tensors are saved.
        layers: int64 ``(rows,)``, 0-based decoder layers; sorted when the value is made.
        weights: float32 ``(rows, experts)``; 0 leaves an expert alone.
        force: int8 ``(rows, experts)`` of -1, 0, +1, or None when no expert is forced or banned.
        scale: ``"std"``, ``"abs"`` or ``"none"``.
        provenance: How it was made (method, parameters, languages, corpora); JSON values only.

    Raises:
        SteeringError: A shape, dtype, number or name that cannot be right, with value and fix.
    """

    name: str
    layers: Tensor
    weights: Tensor
    force: Tensor | None = None
    scale: Scale = "std"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.scale not in SCALES:
            raise SteeringError(f"scale is {self.scale!r}; use one of {', '.join(SCALES)}")
        layers, weights = as_layers(self.layers), as_weights(self.weights)
        force = None if self.force is None else as_force(self.force, weights)
        if weights.shape[0] != layers.shape[0]:
            raise SteeringError(
                f"weights have {weights.shape[0]} rows but there are {layers.shape[0]} layers; "
                "give one row per layer"
            )
        order = torch.argsort(layers)
        object.__setattr__(self, "layers", layers[order])
        object.__setattr__(self, "weights", weights[order])
        object.__setattr__(self, "force", None if force is None else force[order])
        object.__setattr__(self, "provenance", as_provenance(self.provenance))

    @property
    def num_experts(self) -> int:
        """Number of experts per layer, the width of ``weights``."""
        return int(self.weights.shape[1])

    @property
    def num_steered_experts(self) -> int:
        """Number of (layer, expert) pairs that are edited at all."""
        edited = self.weights != 0
        return int((edited if self.force is None else edited | (self.force != 0)).sum())

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of what the steering does: layers, weights, force and scale."""
        digest = hashlib.sha256(self.scale.encode())
        force = torch.zeros_like(self.weights) if self.force is None else self.force
        for tensor in (self.layers, self.weights + 0.0, force.to(torch.int8)):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RouterSteering):
            return NotImplemented
        return (self.name, self.fingerprint, self.provenance) == (
            other.name,
            other.fingerprint,
            other.provenance,
        )

    def __hash__(self) -> int:
        return hash((self.name, self.fingerprint))

    def __repr__(self) -> str:
        forced = 0 if self.force is None else int((self.force > 0).sum())
        banned = 0 if self.force is None else int((self.force < 0).sum())
        return (
            f"RouterSteering({self.name!r}, scale={self.scale!r}, layers={ranges(self.layers)}, "
            f"experts={self.num_experts}, weighted={int((self.weights != 0).sum())}, "
            f"forced={forced}, banned={banned}, fingerprint={self.fingerprint[:12]})"
        )

    def __mul__(self, factor: float) -> RouterSteering:
        """Acts at strength 1 as ``self`` acts at strength ``factor``; 0 drops force."""
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        if not math.isfinite(factor):
            raise SteeringError(f"factor is {factor}; multiply by a finite number")
        return replace(self, weights=self.weights * factor, force=self.force if factor else None)

    __rmul__ = __mul__

    def __neg__(self) -> RouterSteering:
        return self * -1.0

    def __add__(self, other: RouterSteering) -> RouterSteering:
        """Sum of two steerings of the same scale over the union of their layers."""
        if not isinstance(other, RouterSteering):
            return NotImplemented
        _check_summands(self, other)
        layers = torch.unique(torch.cat([self.layers, other.layers]))
        force = self._force_over(layers) + other._force_over(layers)
        return RouterSteering(
            name=f"{self.name}+{other.name}",
            layers=layers,
            weights=self._weights_over(layers) + other._weights_over(layers),
            force=force.clamp(-1, 1) if force.any() else None,
            scale=self.scale,
            provenance={"method": "sum", "parts": [dict(self.provenance), dict(other.provenance)]},
        )

    def restrict(self, layers: Iterable[int]) -> RouterSteering:
        """The same steering on those of its layers that are in ``layers`` (0-based)."""
        wanted = sorted({int(layer) for layer in layers})
        keep = torch.isin(self.layers, torch.tensor(wanted, dtype=torch.int64))
        if not keep.any():
            raise SteeringError(
                f"none of the layers {wanted} is steered; {self.name!r} has {ranges(self.layers)}"
            )
        force = None if self.force is None else self.force[keep]
        return replace(self, layers=self.layers[keep], weights=self.weights[keep], force=force)

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``steering.safetensors`` (format version 1) into ``folder``."""
        from steered_moe.storage import save_steering

        save_steering(self, folder)

    @classmethod
    def load(
        cls, folder_or_repo: str | Path, name: str | None = None, revision: str | None = None
    ) -> RouterSteering:
        """Read a steering from a local folder or a Hub repo; ``name`` when it holds several."""
        from steered_moe.hub import load_steering

        return load_steering(folder_or_repo, name, revision)

    def push_to_hub(
        self, repo_id: str, *, base_model: str, strength: float = 1.0, **kwargs: Any
    ) -> CommitInfo:
        """Push a steering repo with this steering; of the base model only the config is read.

        Args:
            repo_id: Hub id.
            base_model: Hub id of the base model, or ``id@revision``.
            strength: To record.
            kwargs: For `steered_moe.publishing.push`: ``private``, ``revision``, ``tag``,
                ``create_pr``, ``commit_message``, ``token``, ``tokenizer`` ...

        Raises:
            BaseModelError: The steering does not fit the base model.
            FormatError: What cannot be pushed; nothing was sent.
            HubError: A connection that broke off; the remote is as it was.
        """
        from steered_moe.publishing import push_steering

        return push_steering(self, repo_id, base_model, strength, **kwargs)

    def _weights_over(self, layers: Tensor) -> Tensor:
        rows = torch.zeros(len(layers), self.num_experts, dtype=torch.float32)
        rows[torch.searchsorted(layers, self.layers)] = self.weights
        return rows

    def _force_over(self, layers: Tensor) -> Tensor:
        rows = torch.zeros(len(layers), self.num_experts, dtype=torch.int8)
        if self.force is not None:
            rows[torch.searchsorted(layers, self.layers)] = self.force
        return rows


def _check_summands(left: RouterSteering, right: RouterSteering) -> None:
    if left.scale != right.scale:
        raise SteeringError(
            f"cannot add scale {left.scale!r} and scale {right.scale!r}; "
            "attach both steerings under their own names instead"
        )
    if left.num_experts != right.num_experts:
        raise SteeringError(
            f"cannot add {left.num_experts} experts and {right.num_experts} experts; "
            "both steerings must be for the same base model"
        )
    layers = torch.unique(torch.cat([left.layers, right.layers]))
    clash = (left._force_over(layers) * right._force_over(layers) < 0).nonzero()
    if len(clash):
        row, expert = clash[0].tolist()
        raise SteeringError(
            f"layer {int(layers[row])}, expert {expert} is forced by one steering and banned by "
            "the other; remove it from one of them"
        )


def ranges(layers: Tensor) -> str:
    """``[10, 11, 12, 20]`` as ``10-12, 20``."""
    parts: list[list[int]] = []
    for layer in layers.tolist():
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
