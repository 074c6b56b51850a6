"""The plugin that vLLM loads into each of its processes (entry point ``vllm.general_plugins``).

    vllm serve BASE --additional-config '{"steered_moe": {"repo_id": "user/x", "strength": 1.0}}'

Without that field nothing is changed in an engine. vLLM has no public hook for routing, so a few
methods of its classes are wrapped. `vllm_points` names them all, and an engine whose vLLM lacks one
is refused when it asks for steering.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from steered_moe.errors import InterventionError, SteeredMoEError
from steered_moe.vllm_points import (
    BATCH,
    BEAMS,
    CALL,
    FRONT,
    LAYER,
    REQUEST,
    RUNNER,
    START,
    Point,
    check_release,
    owner_of,
)
from steered_moe.vllm_settings import KEY, EngineSettings, is_profiling, settings_of
from steered_moe.vllm_worker import SETTERS, check_worker, counted_layers, steered_layers

_WRAPPED = "_steered_moe_wraps"


def register() -> None:
    """What vLLM calls in each process, more than once perhaps."""
    wrappers: dict[Point, Callable[..., Any]] = {
        **{RUNNER: _unsupported, LAYER: _layer, BATCH: _batch},  # in workers
        **{FRONT: _front, REQUEST: _request, START: _start, CALL: _call},
    }
    for point, wrapper in wrappers.items():
        _wrap(point, wrapper)


def _wrap(point: Point, wrapper: Callable[..., Any]) -> None:
    owner = owner_of(point)
    if owner is None:
        return  # told by check_release, in an engine that asks for steering
    original = getattr(owner, point.method)
    if getattr(original, _WRAPPED, False):
        return

    @wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, point.method, wrapped)


def _unsupported(original: Any, self: Any) -> list[str]:
    """vLLM asks what its second model runner cannot do, and takes the first one for that."""
    given: list[str] = original(self)
    config = self.additional_config
    asked = isinstance(config, Mapping) and KEY in config
    return [*given, "router steering"] if asked else given


def _layer(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """A MoE layer is built: steer it."""
    from vllm.config import get_current_vllm_config

    original(self, *args, **kwargs)
    vllm_config = get_current_vllm_config()
    layers, counted = steered_layers(vllm_config), counted_layers(vllm_config)
    if counted is not None:
        counted.install(self, self.layer_id)
    if layers is None or self.layer_id not in layers.settings.layers:
        return
    if self.layer_id in layers.layers:
        raise InterventionError(
            f"{self.layer_name} is a MoE layer of a draft model, which steering does not reach; "
            "start without speculative decoding, or with one that has no draft model (ngram)"
        )
    layers.install(self, self.layer_id)


def _batch(original: Any, self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
    """A forward pass is prepared: say which token belongs to which request's strengths."""
    layers = steered_layers(self.vllm_config)
    if layers is not None:
        asked = [_asked(self, name) for name in self.input_batch.req_ids]
        layers.assign(asked, num_scheduled_tokens.tolist())
    counted = counted_layers(self.vllm_config)
    if counted is not None:
        counted.assign(int(num_scheduled_tokens.sum()))
    return original(self, scheduler_output, num_scheduled_tokens)


def _asked(runner: Any, request_id: str) -> dict[str, float] | None:
    params = runner.requests[request_id].sampling_params
    extra = None if params is None else params.extra_args
    found = None if not extra else extra.get(KEY)
    return found if found is None else dict(found)


def _front(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """An engine starts, here in the caller's process: refuse what cannot be steered."""
    original(self, *args, **kwargs)
    settings = settings_of(self.vllm_config)
    profiling = is_profiling(self.vllm_config.additional_config)
    if settings is not None or profiling:
        check_release()
    if profiling:
        _check_profiling(self.vllm_config)
    if settings is None:
        return
    _refuse_in_beams()
    from steered_moe.base_model import check_base

    model = self.vllm_config.model_config
    check_base(settings.repo, model.hf_config, bool(model.trust_remote_code))


def _refuse_in_beams() -> None:
    """vLLM's beam search takes no extra arguments of a request; over HTTP they would be lost."""
    for point in BEAMS:
        if point.module in sys.modules:
            _wrap(point, _beams)


def _beams(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if KEY in (self.vllm_xargs or {}):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"beam search has the engine's strength for all requests; leave {KEY} out, or "
            "use_beam_search",
            parameter=KEY,
        )
    return original(self, *args, **kwargs)


def _check_profiling(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    captured = getattr(vllm_config.model_config, "enable_return_routed_experts", False)
    if captured:
        raise InterventionError("profile: leave --enable-return-routed-experts out, it counts too")
    if parallel.data_parallel_size > 1 or vllm_config.speculative_config is not None:
        raise InterventionError(
            "profile: routing is counted without data parallelism and speculative decoding, whose "
            "tokens are not those of the texts; leave them out"
        )


def _request(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A request arrives: resolve what it asks for, and keep its cached prefixes apart."""
    request = original(self, *args, **kwargs)
    params = request.sampling_params
    asked = (params.extra_args or {}).get(KEY) if params is not None else None
    settings = settings_of(self.vllm_config)
    if asked is None:
        if settings is not None:  # other engines may share a cache outside
            request.cache_salt = _salt(request, settings, "default", settings.strengths)
        return request
    try:
        strengths = _of_request(settings, asked, self.vllm_config)
    except SteeredMoEError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error), parameter=KEY) from error
    params.extra_args = {**params.extra_args, KEY: strengths}
    request.cache_salt = _salt(request, settings, "own", strengths)
    return request


def _salt(request: Any, settings: Any, kind: str, strengths: Mapping[str, float]) -> str:
    """Part of the key of cached prefixes; the default may change while an engine runs, and what
    was cached by it is dropped then."""
    key = ",".join(f"{name}={value!r}" for name, value in sorted(strengths.items()))
    return f"{request.cache_salt or ''}|{KEY}:{settings.fingerprint}:{kind}:{key}"


def _of_request(settings: EngineSettings | None, asked: Any, vllm_config: Any) -> dict[str, float]:
    if settings is None:
        raise SteeredMoEError(
            f"the request asks for {KEY} but this engine steers nothing; start it with "
            f'--additional-config \'{{"{KEY}": {{"repo_id": ...}}}}\''
        )
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise SteeredMoEError(
            f"{KEY} of a request: with data parallelism tokens of several engines share a layer, "
            "and all have the engine's strength; start one server for each strength"
        )
    return settings.of_request(asked)


def _start(original: Any, self: Any, vllm_config: Any) -> Any:
    """Workers are ready: switch steering on, and run each edit once."""
    result = original(self, vllm_config)
    if settings_of(vllm_config) is not None or is_profiling(vllm_config.additional_config):
        self.model_executor.collective_rpc(check_worker)
    return result


def _call(original: Any, self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """Workers are called: after a change of strength, cached prefixes are stale."""
    result = original(self, method, *args, **kwargs)
    if not isinstance(method, str) or method not in SETTERS:
        return result
    if not self.reset_prefix_cache(True, True):  # those in other memory too
        raise InterventionError("the prefix cache could not be reset after a change of strength")
    return result
