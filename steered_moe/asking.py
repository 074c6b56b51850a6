"""What a request to the transformers server may ask for.

That server ignores much of what OpenAI's interface has, with a line in its log. A client would take
the answer for what it asked, so what would change an answer and is ignored is a bad request here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from steered_moe.answering import CHANGE_GREEDY

_NEUTRAL: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "n": (1,),
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "presence_penalty": (0,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "tool_choice": ("auto",),
    }
)
"""Values that ask for nothing."""
_TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "model": (str,),
        "prompt": (str,),
        "stream": (bool,),
        "stop": (str, list),
        "seed": (int,),
        "logit_bias": (dict,),
        "generation_config": (str,),
        **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), (int,)),
        **dict.fromkeys(("temperature", "top_p", "frequency_penalty"), (int, float)),
    }
)
_REQUIRED = ("model", "messages")
_HARMLESS = ("metadata", "parallel_tool_calls", "service_tier", "store", "stream_options", "user")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_ATTRIBUTE = "_steered_moe_sampling"


def validated(original: Callable[..., None]) -> Callable[..., None]:
    """``_validate_request`` of a handler, which refuses what it would ignore."""

    def validate(self: Any, body: Mapping[str, Any]) -> None:
        original(self, body)
        fields = getattr(self._valid_params_class, "__mutable_keys__", ())
        check_types(body, [name for name in _REQUIRED if name in fields])
        check_ignored(self._unused_fields, body)

    return validate


def check_types(body: Mapping[str, Any], required: Collection[str] = ()) -> None:
    """Refuse values of another type than the server computes with.

    Args:
        body: The request.
        required: Fields that it must have.

    Raises:
        HTTPException: 400, with the field and its value.
    """
    from fastapi import HTTPException

    if lacking := sorted(name for name in required if body.get(name) is None):
        raise HTTPException(400, f"the request has no {lacking[0]}")
    for name, kinds in _TYPES.items():
        value = body.get(name)
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if value is not None and wrong:
            told = " or ".join(kind.__name__ for kind in kinds)
            raise HTTPException(400, f"{name}={value!r:.60} is no {told}")
    turns = body.get("messages", [{}])
    if not isinstance(turns, list) or not turns or not all(isinstance(x, dict) for x in turns):
        raise HTTPException(400, f"messages={turns!r:.60}; give a list of one turn or more")


def check_ignored(ignored: Collection[str], body: Mapping[str, Any]) -> None:
    """Refuse a request that sets an ignored field to something that would change its answer.

    Args:
        ignored: Names of fields.
        body: The request.

    Raises:
        HTTPException: 400, with the field and its value.
    """
    from fastapi import HTTPException

    for name in sorted({*ignored, *_NEUTRAL} & {*ignored} & body.keys() - {*_HARMLESS}):
        value = body[name]
        if value is not None and not _neutral(name, value):
            raise HTTPException(
                400,
                f"{name}={value!r:.60} is not supported by this server, which would ignore it; "
                "leave it out, or serve with --engine vllm",
            )


def _neutral(name: str, value: Any) -> bool:
    """Numbers and bools apart, for 0 is not False: it asks for log-probabilities."""
    known = _NEUTRAL.get(name, ())
    return any(isinstance(value, bool) == isinstance(x, bool) and value == x for x in known)


def sampled(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_build_generation_config`` of a handler: a temperature samples, whatever the model's own
    config says, which else would have it ignored."""

    def build(self: Any, body: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        from fastapi import HTTPException

        config = original(self, body, *args, **kwargs)
        if body.get("temperature"):
            config.do_sample = True
        if body.get("top_p", 1) not in (None, 1) and not config.do_sample:
            raise HTTPException(
                400, f"top_p={body['top_p']} has no effect on greedy answers; give a temperature"
            )
        return config

    return build


def alike(original: Callable[..., None]) -> Callable[..., None]:
    """``init_cb`` of continuous batching, which samples for all requests as the first one asked;
    requests that ask for something else are refused."""

    def start(self: Any, model: Any, config: Any) -> None:
        asked = _settings(config)
        known = vars(self).setdefault(_ATTRIBUTE, asked)
        check_alike(known, asked)
        original(self, model, config)

    return start


def check_alike(known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse settings of a request that are not those of the batch.

    Raises:
        HTTPException: 400, with the first setting that differs.
    """
    from fastapi import HTTPException

    differing = [name for name in {**known, **asked} if known.get(name) != asked.get(name)]
    for name in sorted(differing):
        raise HTTPException(
            400,
            f"{name}={asked.get(name)!r}, but the running batch has {known.get(name)!r}: with "
            "--continuous-batching all requests sample as the first one did. Ask for the same, "
            "or serve without it",
        )


def _settings(config: Any) -> dict[str, Any]:
    """What a generation config says about the choice of tokens."""
    given = config.to_diff_dict()
    names = ("do_sample", *CHANGE_GREEDY, *(_SAMPLING if config.do_sample else ()))
    return {name: given[name] for name in names if given.get(name) is not None}
