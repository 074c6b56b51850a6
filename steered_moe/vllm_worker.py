"""What a vLLM worker does about steering: the layers of its model, and calls from outside."""

from __future__ import annotations

from typing import Any

from steered_moe.errors import InterventionError
from steered_moe.vllm_counts import CountedLayers
from steered_moe.vllm_layers import METHOD, SteeredLayers
from steered_moe.vllm_settings import is_profiling, settings_of

SETTERS = ("steered_moe_set",)
"""Methods of workers after which cached prefixes are stale."""

PREPARE = "_prepare_inputs"
"""Method of vLLM's first model runner before each forward pass; its second one has none."""

_ATTRIBUTE = "_steered_moe"
_COUNTED = "_steered_moe_counted"
_EAGER = "do_not_compile"


def steered_layers(vllm_config: Any) -> SteeredLayers | None:
    """The steered layers of the worker that has this configuration, made when first asked for."""
    if not hasattr(vllm_config, _ATTRIBUTE):
        object.__setattr__(vllm_config, _ATTRIBUTE, _new_layers(vllm_config))
    layers: SteeredLayers | None = getattr(vllm_config, _ATTRIBUTE)
    return layers


def counted_layers(vllm_config: Any) -> CountedLayers | None:
    """The counted layers of the worker that has this configuration, made when first asked for."""
    if not hasattr(vllm_config, _COUNTED):
        asked = is_profiling(vllm_config.additional_config)
        made = CountedLayers(_most_tokens(vllm_config)) if asked else None
        object.__setattr__(vllm_config, _COUNTED, made)
    layers: CountedLayers | None = getattr(vllm_config, _COUNTED)
    return layers


def _most_tokens(vllm_config: Any) -> int:
    """Most tokens of a forward pass, padding of CUDA graphs included."""
    largest = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(int(vllm_config.scheduler_config.max_num_batched_tokens), int(largest))


def _new_layers(vllm_config: Any) -> SteeredLayers | None:
    settings = settings_of(vllm_config)
    if settings is None:
        return None
    uniform = vllm_config.parallel_config.data_parallel_size > 1
    slots = 1 if uniform else vllm_config.scheduler_config.max_num_seqs + 1
    return SteeredLayers(settings, slots, _most_tokens(vllm_config), uniform)


def stage(vllm_config: Any) -> range:
    """Decoder layers of this process's stage of a pipeline."""
    start, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    return range(start, end)


def check_worker(worker: Any) -> None:
    """Switch steering on in a worker whose model is loaded, by any loader, and make sure of it.

    Raises:
        InterventionError: A layer is missing, its edit does not run, or it cannot be counted.
    """
    runner = worker.model_runner
    counted = counted_layers(runner.vllm_config)
    if counted is not None:
        counted.check_complete()
    layers = steered_layers(runner.vllm_config)
    if layers is None:
        return
    if not hasattr(runner, PREPARE):
        raise InterventionError(
            f"strengths of requests do not reach {type(runner).__module__}; start with "
            "VLLM_USE_V2_MODEL_RUNNER=0, or without that variable"
        )
    layers.check_complete(stage(runner.vllm_config))
    layers.set_default(layers.strengths)
    if layers.silent:  # none where vLLM's own first run was not compiled through
        _run_once(runner)
    layers.check_fired()


def _run_once(runner: Any) -> None:
    """Two tokens through a worker's model, outside compiled code."""
    compiled = [m for m in runner.model.modules() if getattr(m, _EAGER, True) is False]
    for module in compiled:
        setattr(module, _EAGER, True)
    runner._dummy_run(2)
    for module in compiled:
        setattr(module, _EAGER, False)


class WorkerExtension:
    """Methods for ``collective_rpc``, by ``--worker-extension-cls`` of vLLM.

    After `steered_moe_set` the engine drops cached prefixes, and starts running requests again.
    """

    model_runner: Any

    def steered_moe_set(self, strength: Any) -> dict[str, float]:
        """Change the strength of requests that ask for none.

        Args:
            strength: For all steerings, or by name; 0 is the base model.
        """
        layers = self._steered_layers()
        layers.set_default(strength)
        return layers.strengths

    def steered_moe_state(self) -> dict[str, Any]:
        """Strengths and layers of this worker."""
        layers = self._steered_layers()
        return {"strengths": layers.strengths, "layers": sorted(layers.layers)}

    def steered_moe_profile(self) -> dict[str, Any]:
        """What this worker's routers selected since the last call: `CountedLayers.fetch`."""
        layers = counted_layers(self.model_runner.vllm_config)
        if layers is None:
            raise InterventionError("this engine counts no routing; start it with profile: true")
        return layers.fetch()

    def steered_moe_touched(self) -> list[str]:
        """Names of all MoE layers whose methods are not vLLM's own."""
        modules = self.model_runner.model.named_modules()
        return [name for name, module in modules if METHOD in vars(module)]

    def _steered_layers(self) -> SteeredLayers:
        layers = steered_layers(self.model_runner.vllm_config)
        if layers is None:
            raise InterventionError("this engine steers nothing; start it with --additional-config")
        return layers
