"""The methods of vLLM that steering needs, and whether a release has them."""

from __future__ import annotations

import importlib
import inspect
import logging
from typing import NamedTuple

from steered_moe.errors import InterventionError
from steered_moe.vllm_counts import CAPTURE
from steered_moe.vllm_layers import METHOD
from steered_moe.vllm_worker import PREPARE

TESTED = ("0.32",)
"""Releases of vLLM that the tests run."""

logger = logging.getLogger(__name__)


class Point(NamedTuple):
    """A method of vLLM that is wrapped.

    Args:
        module: Where its class is.
        owner: The class.
        method: The method.
        parameters: Names that it must have.
    """

    module: str
    owner: str
    method: str
    parameters: tuple[str, ...]


_RUNNER = "vllm.model_executor.layers.fused_moe.runner.moe_runner"
LAYER = Point(_RUNNER, "MoERunner", "__init__", ("layer_name", "router"))
LOGITS = Point(_RUNNER, "MoERunner", METHOD, ("hidden_states", "router_logits"))
BATCH = Point("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", PREPARE,
              ("scheduler_output", "num_scheduled_tokens"))  # fmt: skip
FRONT = Point("vllm.v1.engine.input_processor", "InputProcessor", "__init__", ("vllm_config",))
REQUEST = Point("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", ("params",))
START = Point("vllm.v1.engine.core", "EngineCore", "_initialize_kv_caches", ("vllm_config",))
"""The last thing that workers do before an engine is up. Its __init__ is the one that loads
plugins, so in a process of its own it runs unwrapped."""
CALL = Point("vllm.v1.engine.core", "EngineCore", "collective_rpc", ("method",))
ROUTED = Point("vllm.model_executor.layers.fused_moe.router.base_router", "BaseRouter", CAPTURE,
               ("capture_fn",))  # fmt: skip
RUNNER = Point("vllm.config.vllm", "VllmConfig", "_get_v2_model_runner_unsupported_features", ())
_OPENAI = "vllm.entrypoints.openai"
_TO_BEAMS = "to_beam_search_params"
BEAMS = (
    Point(f"{_OPENAI}.completion.protocol", "CompletionRequest", _TO_BEAMS, ()),
    Point(f"{_OPENAI}.chat_completion.protocol", "ChatCompletionRequest", _TO_BEAMS, ()),
)
"""Of the HTTP server alone."""
POINTS = (RUNNER, LAYER, LOGITS, ROUTED, BATCH, FRONT, REQUEST, START, CALL)


def missing() -> list[str]:
    """Methods that this release of vLLM lacks, or that take other arguments."""
    return [f"{p.owner}.{p.method}" for p in POINTS if owner_of(p) is None]


def check_release() -> None:
    """Refuse a release of vLLM that steering cannot be sure to reach; warn of an untested one.

    Raises:
        InterventionError: Names what it lacks.
    """
    import vllm

    if lacks := missing():
        raise InterventionError(
            f"vLLM {vllm.__version__} lacks {', '.join(lacks)}, where steering acts; use vLLM "
            f"{' or '.join(TESTED)}, or steered-moe serve with its default engine"
        )
    if not vllm.__version__.startswith(TESTED):
        logger.warning(
            "steered-moe is tested with vLLM %s, this is %s", ", ".join(TESTED), vllm.__version__
        )


def owner_of(point: Point) -> type | None:
    """The class of a point, if it is as expected."""
    try:
        owner = getattr(importlib.import_module(point.module), point.owner)
        parameters = inspect.signature(getattr(owner, point.method)).parameters
    except (ImportError, AttributeError):
        return None
    return owner if set(point.parameters) <= set(parameters) else None
