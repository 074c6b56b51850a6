"""Routing counted inside a vLLM worker: fixed buffers in each MoE layer, fetched by one call.

On only where ``--additional-config '{"steered_moe": {"profile": true}}'`` says so; beside it may
stand a steering, and then the routing is the steered one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steered_moe.errors import InterventionError

CAPTURE = "set_capture_fn"
"""Method of a vLLM router that takes a function of the selected expert ids, ``(tokens, top_k)``."""

_COUNTS = "steered_moe_counts"
_REAL = "steered_moe_real"


class CountedLayers:
    """The MoE layers of one worker, and what their routers selected so far.

    Args:
        tokens: Most tokens of a forward pass.

    Attributes:
        tokens: Tokens of requests that were run since the last fetch.
    """

    def __init__(self, tokens: int) -> None:
        self.layers: dict[int, Any] = {}
        self.tokens = 0
        self._real = torch.zeros(tokens, dtype=torch.float64)

    def install(self, runner: Any, layer: int) -> None:
        """Count in a layer.

        Args:
            runner: vLLM's ``MoERunner``.
            layer: 0-based decoder layer.

        Raises:
            InterventionError: The router of the layer does not say what it selects.
        """
        router = getattr(runner, "router", None)
        zeros = getattr(router, "zero_expert_type", None)  # they are handed on as expert 0
        if not hasattr(router, CAPTURE) or zeros or layer in self.layers:
            raise InterventionError(
                f"{runner.layer_name}: routing cannot be counted in {type(router).__name__}"
                f"{' of a draft model' if layer in self.layers else ''}; profile with transformers"
            )
        counts = torch.zeros(runner.moe_config.num_logical_experts, dtype=torch.float64)
        runner.register_buffer(_COUNTS, counts, persistent=False)
        self._real = self._real.to(counts.device)
        runner.register_buffer(_REAL, self._real, persistent=False)
        getattr(router, CAPTURE)(_counting(runner))
        self.layers[layer] = runner

    def check_complete(self) -> None:
        """Refuse an engine whose kernels select experts themselves.

        Raises:
            InterventionError: Names the layers.
        """
        if inside := [x.layer_name for x in self.layers.values() if x.is_monolithic]:
            raise InterventionError(
                f"the kernel of {', '.join(inside)} selects experts itself, so they cannot be "
                "counted; start with another --moe-backend, or profile with transformers"
            )

    def assign(self, tokens: int) -> None:
        """The next forward pass has so many tokens of requests; what is behind them is padding."""
        self._real[:tokens] = 1.0
        self._real[tokens:] = 0.0
        self.tokens += tokens

    def fetch(self) -> dict[str, Any]:
        """What was counted since the last fetch; counting begins anew.

        Returns:
            ``tokens``, and ``layers``: layer -> list of counts by expert.

        Raises:
            InterventionError: A layer has not counted ``tokens`` times top-k selections.
        """
        self._real.zero_()
        found = {layer: _taken(runner) for layer, runner in self.layers.items()}
        tokens, self.tokens = self.tokens, 0
        for layer, counts in found.items():
            runner = self.layers[layer]
            expected = tokens * int(runner.moe_config.experts_per_token)
            if sum(counts) != expected:
                raise InterventionError(
                    f"{runner.layer_name} has counted {sum(counts):g} selections, not {expected}: "
                    "not all of its tokens pass through this process; profile with tensor or "
                    "pipeline parallelism, or with one process"
                )
        return {"tokens": tokens, "layers": found}


def _counting(runner: Any) -> Callable[[Tensor], None]:
    def counting(ids: Tensor) -> None:
        real = getattr(runner, _REAL)[: ids.shape[0]].unsqueeze(1).expand(ids.shape)
        getattr(runner, _COUNTS).index_add_(0, ids.reshape(-1).long(), real.reshape(-1))

    return counting


def _taken(runner: Any) -> list[float]:
    """The counts as a list; they are 0 afterwards."""
    buffer = getattr(runner, _COUNTS)
    found: list[float] = buffer.tolist()
    buffer.zero_()
    return found
