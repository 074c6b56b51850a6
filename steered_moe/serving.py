"""Base and steered model behind one OpenAI-compatible server: that of ``transformers serve``.

transformers looks model classes up in itself alone, so its server is started here with a manager
of models that knows two names, of one loaded model: the base, and a second module tree on the same
weights that is steered. `Serve` of transformers is not a public interface; all that is used of it
is in this module.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from steered_moe.asking import alike, sampled, validated
from steered_moe.cutting import answered
from steered_moe.embedded import named_repo
from steered_moe.errors import SteeredMoEError
from steered_moe.intervention import attach_all, attached
from steered_moe.leaving import cancellable, stoppable, watched
from steered_moe.modeling import SteeredMoEForCausalLM

_MARK = re.compile(r"<\|?\w+\|?>")  # <|im_start|>
_MAIN = "@main"  # what the server puts behind a name without a revision


def serve(
    repo: str,
    *,
    strength: Any = None,
    base_model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    continuous_batching: bool = False,
    cache_memory: float = 0.3,
    **loading: Any,
) -> Any:
    """Serve until interrupted.

    Args:
        repo: Steering repo.
        strength: Overrides the recorded strengths.
        base_model: Overrides the recorded base.
        host: Address to listen on.
        port: Port to listen on.
        continuous_batching: Answer many requests at once, with paged attention; all take the
            sampling settings of the first one, a limit of transformers.
        cache_memory: Share of the free memory that each of the two models may use for its cache
            in continuous batching.
        loading: For ``SteeredMoEForCausalLM.from_pretrained``.

    Raises:
        SteeredMoEError: What the server needs is not installed.
    """
    start = _server()
    model = SteeredMoEForCausalLM.from_pretrained(
        named_repo(repo), strength=strength, base_model=base_model, **loading
    )
    tokenizer = AutoTokenizer.from_pretrained(
        model.config.name_or_path, revision=model.base_model_revision
    )
    models = by_name(repo, model)
    tokenizer = within(tokenizer, model.config.get_text_config().max_position_embeddings)
    with _replaced(models, tokenizer):
        start(
            host=host,
            port=port,
            continuous_batching=continuous_batching,
            cb_max_memory_percent=cache_memory if continuous_batching else None,
        )


def by_name(repo: str, model: SteeredMoEForCausalLM) -> dict[str, PreTrainedModel]:
    """The steered model and its base on the same weights, by the names that requests give.

    A name is the id or, of a folder, its last part.

    Raises:
        SteeredMoEError: Both have the same name.
    """
    names = [_short(repo), _short(str(model.base_model_name))]
    if names[0] == names[1]:
        raise SteeredMoEError(f"steering and base are both named {names[0]!r}; rename a folder")
    return dict(zip(names, (model, unsteered_twin(model)), strict=True))


def unsteered_twin(model: SteeredMoEForCausalLM) -> PreTrainedModel:
    """A second module tree on the same parameters and buffers, without the steering."""
    steerings, strengths = model.steerings, model.strengths
    intervention = attached(model)
    if intervention is None:
        raise SteeredMoEError("the model is not steered")
    for name in steerings:
        intervention.remove(name)
    kept = (*model.parameters(), *model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    twin.__class__ = type(model).__bases__[1]
    attach_all(model, list(steerings.values()), [strengths[name] for name in steerings])
    return twin


def within(tokenizer: Any, context: int | None) -> Any:
    """A tokenizer that refuses a prompt without room for an answer, as a bad request."""
    from fastapi import HTTPException

    def checked(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = method(self, *args, **kwargs)
            ids = found["input_ids"] if isinstance(found, Mapping) else found
            length = ids.shape[-1] if hasattr(ids, "shape") else len(ids)
            if context is not None and length >= context:
                raise HTTPException(
                    400, f"the prompt has {length} tokens; the model's context is {context}"
                )
            return found

        return call

    parent = type(tokenizer)
    methods = {name: checked(getattr(parent, name)) for name in ("__call__", "apply_chat_template")}
    made = copy.copy(tokenizer)
    made.__class__ = type(parent.__name__, (parent,), methods)
    return made


def _short(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name


def _server() -> Callable[..., Any]:
    from transformers.cli.serve import Serve
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise SteeredMoEError('the server needs more: pip install "steered-moe[serving]"')
    start: Callable[..., Any] = Serve
    return start


@contextmanager
def _replaced(models: Mapping[str, PreTrainedModel], tokenizer: Any) -> Iterator[None]:
    """Let `Serve` make a manager and a state of ours, and parse answers only where it can."""
    from transformers.cli.serving import chat_completion, completion, model_manager, server, utils

    ours: dict[tuple[Any, str], Callable[[Any], Any]] = {
        (model_manager, "ModelManager"): partial(_manager, models=models, tokenizer=tokenizer),
        (utils.BaseHandler, "_resolve_model"): partial(_named, models=models),
        (utils.BaseHandler, "_validate_request"): validated,
        (utils.BaseHandler, "_build_generation_config"): sampled,
        (utils.CBGenerateManager, "init_cb"): alike,
        (chat_completion.ChatCompletionHandler, "handle_request"): answered,
        (completion.CompletionHandler, "handle_request"): answered,
        (utils, "GenerationState"): _state,
        (utils, "get_response_template"): _template,
        (utils.GenerateManager, "generate_non_streaming"): stoppable,
        (utils.CBGenerateManager, "generate_non_streaming"): cancellable,
        (server, "build_server"): watched,
    }
    before = {place: getattr(*place) for place in ours if hasattr(*place)}
    for place, original in before.items():
        setattr(*place, ours[place](original))
    try:
        yield
    finally:
        utils.GenerationState.end()
        for place, original in before.items():
            setattr(*place, original)


def _template(original: Callable[..., Any]) -> Callable[..., Any]:
    """How answers are parsed goes by the model type; a chat template of another form has none."""

    def found(processor: Any, model: Any) -> Any:
        template = original(processor, model)
        anchors = (template or {}).get("start_anchor") or []
        anchors = [anchors] if isinstance(anchors, str) else anchors
        written = str(processor.chat_template)
        known = any(mark in written for anchor in anchors for mark in _MARK.findall(anchor)[:1])
        return template if known else None

    return found


def _manager(parent: type, models: Mapping[str, PreTrainedModel], tokenizer: Any) -> type:
    from fastapi import HTTPException

    class Models(parent):
        """Two models that are loaded already."""

        def load_model_and_processor(self, name: str, *args: Any, **kwargs: Any) -> Any:
            found = _known(name, models)
            if found is None:
                asked, names = name.removesuffix(_MAIN), ", ".join(models)
                raise HTTPException(404, f"there is no model {asked!r}; there are {names}")
            return models[found], tokenizer

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            about = {"object": "model", "owned_by": "steered-moe", "created": 0}
            return [{"id": name, **about} for name in models]

        def shutdown(self) -> None:
            """The models stay, whatever asks for it."""

    return Models


def _known(name: str, models: Container[str]) -> str | None:
    """The name of a model for one that the server has perhaps put a revision behind."""
    return next((x for x in (name, name.removesuffix(_MAIN)) if x in models), None)


def _named(original: Callable[..., Any], models: Container[str]) -> Callable[..., Any]:
    """``_resolve_model`` of a handler: answers name the model as its client did."""

    def resolve(self: Any, body: Any) -> Any:
        name, *found = original(self, body)
        return (_known(name, models) or name, *found)

    return resolve


def _state(parent: type) -> type:
    made: list[Any] = []

    class State(parent):
        """One continuous batch per model; transformers has one, and drops it for another model."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._batches: dict[str, Any] = {}
            made.append(self)

        @staticmethod
        def end() -> None:
            """Stop what would keep the process from ending."""
            for state in made:
                state.shutdown()

        def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
            if not use_cb:
                return super().get_manager(model_id)
            self._cb_manager, self._cb_model_id = self._batches.get(model_id), model_id
            self._batches[model_id] = super().get_manager(model_id, use_cb=True)
            return self._batches[model_id]

        def shutdown(self) -> None:
            for manager in self._batches.values():
                manager.stop()

        def is_cb_alive(self) -> bool:
            return all(manager.is_alive() for manager in self._batches.values())

    return State
