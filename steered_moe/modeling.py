"""`SteeredMoEForCausalLM`: a base model with its steering on, in one line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from huggingface_hub import CommitInfo
from transformers import AutoModelForCausalLM, PreTrainedModel

from steered_moe import hub
from steered_moe.base_model import (
    arguments_for_base,
    check_unchanged,
    load_base,
    locate_base,
    portable,
    warn_of_other_revision,
)
from steered_moe.cards import write_card
from steered_moe.configuration import SteeredMoEConfig
from steered_moe.control import SteeringControl
from steered_moe.errors import BaseModelError, SteeringError
from steered_moe.intervention import attach_all
from steered_moe.publishing import push
from steered_moe.steering import RouterSteering
from steered_moe.storage import SteeringRepo, read_repo
from steered_moe.strength import Strength


class SteeredMoEForCausalLM(SteeringControl):
    """A Mixture-of-Experts causal LM whose routers are steered.

    Made by `from_pretrained` (a steering repo) or `from_base` (a model and a steering). The object
    **is** the base model, of a class that also derives from this one, so ``generate``, pipelines,
    PEFT and ``torch.compile`` work on it as they do on the base.
    """

    config_class = SteeredMoEConfig
    base_model_name: str | None
    base_model_revision: str | None
    _extra: Mapping[str, Any]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        raise BaseModelError(
            "SteeredMoEForCausalLM has no weights of its own; use "
            "SteeredMoEForCausalLM.from_pretrained(repo) or .from_base(model, steering)"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        steering: str | Sequence[str] | None = None,
        strength: Strength | Mapping[str, Strength] | None = None,
        revision: str | None = None,
        base_model: str | os.PathLike[str] | None = None,
        config: Any = None,
        **kwargs: Any,
    ) -> SteeredMoEForCausalLM:
        """Load a base model with the steerings of a steering repo attached.

        The steering is read and checked against the base model's config before any weight is
        downloaded or loaded.

        Args:
            pretrained_model_name_or_path: Steering repo: local folder, Hub id, ``id@revision`` or
                ``hf://id@revision``.
            model_args: For ``AutoModelForCausalLM.from_pretrained`` of the base.
            steering: Which steerings of the repo, by name. Left out, it is the repo's default
                one, or all of them where it names no default.
            strength: Overrides the recorded strengths: one value for all steerings, or a mapping
                by name. A value is a number or one number per row of the batch.
            revision: Revision of the steering repo. The base is loaded at its recorded revision.
            base_model: Overrides the recorded base, e.g. with a local copy.
            config: What AutoModel passes; it cannot change the base model.
            kwargs: For ``AutoModelForCausalLM.from_pretrained`` of the base: ``dtype``,
                ``device_map``, ``attn_implementation``, ``token`` ... ``load_in_4bit=True`` or a
                ``BitsAndBytesConfig`` as ``quantization_config`` quantizes its experts too.

        Raises:
            FormatError: The steering repo is damaged, incomplete or too new.
            BaseModelError: Steering and base do not belong together.
            RouterError: The base has no router that can be steered.
            InterventionError: The edit would have no effect.
            QuantizationError: The base cannot be loaded in 4 bit.
        """
        kwargs = arguments_for_base(config, kwargs)
        hub_kwargs = {name: kwargs[name] for name in hub.KWARGS if name in kwargs}
        folder = hub.fetch(os.fspath(pretrained_model_name_or_path), revision, **hub_kwargs)
        repo = read_repo(folder).only(steering)
        check_unchanged(config, repo)
        if strength is not None:
            repo = repo.at(strength)
        base, base_revision = locate_base(repo, folder, base_model)
        loaded = load_base(base, base_revision, repo, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        attach_all(model, repo.steerings, repo.strengths)
        commit = hub.commit_of(base, base_revision, **hub_kwargs)
        warn_of_other_revision(repo, base, commit)
        steered = _graft(model, base, commit or base_revision, repo.extra)
        with_info = (steered, *loaded[1:]) if isinstance(loaded, tuple) else steered
        return cast(SteeredMoEForCausalLM, with_info)  # a tuple if output_loading_info is asked

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | str | os.PathLike[str],
        steering: RouterSteering | Sequence[RouterSteering],
        strength: Strength = 1.0,
        **from_pretrained_kwargs: Any,
    ) -> SteeredMoEForCausalLM:
        """Steer a base model: a loaded one (in place), or one to load by name.

        Args:
            base: A MoE causal LM, or the id or folder of one.
            steering: One steering, or several with different names.
            strength: For each of them.
            from_pretrained_kwargs: For loading the base (``revision``, ``dtype`` ...); none when
                the base is loaded already.

        Raises:
            BaseModelError: The steering does not fit, or keyword arguments for a loaded base.
            RouterError: The base has no router that can be steered.
            InterventionError: The edit would have no effect.
        """
        steerings = [steering] if isinstance(steering, RouterSteering) else list(steering)
        if not steerings:
            raise SteeringError("no steering is given; for the base model alone use AutoModel")
        strengths = [strength] * len(steerings)
        if isinstance(base, PreTrainedModel):
            if from_pretrained_kwargs:
                names = ", ".join(from_pretrained_kwargs)
                raise BaseModelError(f"{names} cannot apply to a base model that is loaded already")
            model, name = base, str(base.config.name_or_path)
            revision = getattr(base.config, "_commit_hash", None)
        else:
            name = os.fspath(base)
            revision = from_pretrained_kwargs.pop("revision", None)
            unnamed = SteeringRepo({}, steerings, strengths)
            model = load_base(name, revision, unnamed, **from_pretrained_kwargs)
            hub_kwargs = {k: v for k, v in from_pretrained_kwargs.items() if k in hub.KWARGS}
            revision = hub.commit_of(name, revision, **hub_kwargs) or revision
        attach_all(model, steerings, strengths)
        return _graft(model, name, revision, {})

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        raise BaseModelError(
            "a steering repo has no weights to initialise from a config; use from_pretrained"
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        tokenizer: Any = None,
        base_model: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a steering repo: config, tensors and card, kilobytes; never the base's weights.

        Args:
            save_directory: Folder to write. What somebody wrote into a card there is kept.
            push_to_hub: Also push it.
            tokenizer: Saved too when given, so that pipelines work on the folder alone.
            base_model: Hub id to record as the base, for one that was loaded from a folder.
            kwargs: ``repo_id`` and the other arguments of `push_to_hub`.

        Raises:
            SteeringError: Nothing is attached, a strength per row, which is not a setting, or
                arguments that have nothing to act on, such as ``state_dict``.
            FormatError: The folder belongs to something else, such as the base model itself.
        """
        if kwargs and not push_to_hub:
            raise SteeringError(
                f"{', '.join(kwargs)}: a steering repo holds no weights; to save the base model "
                "too, call save_pretrained of its own class"
            )
        folder = Path(save_directory)
        repo = self._repo(folder, base_model)
        repo.write(folder)
        write_card(repo, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if push_to_hub:
            push(folder, kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(
        self, repo_id: str, *, tokenizer: Any = True, base_model: str | None = None, **kwargs: Any
    ) -> CommitInfo:
        """Push the steering repo, in one commit.

        Args:
            repo_id: Hub id.
            tokenizer: True for the base's tokenizer files, False for none, or a tokenizer.
            base_model: Hub id to record as the base, for one that was loaded from a folder.
            kwargs: For `steered_moe.publishing.push`: ``private``, ``revision``, ``tag``,
                ``create_pr``, ``commit_message``, ``token``, ``replace_card``.

        Raises:
            FormatError: What cannot be pushed, such as a base model in a local folder; nothing
                was sent.
            HubError: A connection that broke off; the remote is as it was.
        """
        own = None if isinstance(tokenizer, bool) else tokenizer
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, tokenizer=own, base_model=base_model)
            return push(folder, repo_id, tokenizer=bool(tokenizer), **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and deepcopy: the class is made at run time, so it is named by its base."""
        return _empty, (type(self).__bases__[1],), self.__dict__

    def _repo(self, folder: Path, base_model: str | None) -> SteeringRepo:
        intervention = self._intervention()
        per_row = [name for name, rows in intervention.strengths.items() if len(rows) > 1]
        if per_row:
            raise SteeringError(
                f"{', '.join(per_row)} has a strength per row; set one number before saving"
            )
        shape = intervention.shape
        base = {
            "base_model_name_or_path": base_model or portable(self.base_model_name, folder),
            "base_model_revision": None if base_model else self.base_model_revision,
            "base_model_type": self.config.model_type,
            **shape.fields,
        }
        strengths = [float(intervention.strengths[name]) for name in intervention.steerings]
        steerings = list(intervention.steerings.values())
        return SteeringRepo(base, steerings, strengths, self._extra)


@cache
def _steered_class(base_class: type) -> type:
    """The class of a steered model: this one and the base's, under the name that is registered."""
    body = {"__module__": base_class.__module__, "config_class": base_class.config_class}  # type: ignore[attr-defined]
    return type(SteeredMoEForCausalLM.__name__, (SteeredMoEForCausalLM, base_class), body)


def _empty(base_class: type) -> Any:
    return object.__new__(_steered_class(base_class))


def _graft(
    model: PreTrainedModel, name: str, revision: str | None, extra: Mapping[str, Any]
) -> SteeredMoEForCausalLM:
    """Make a loaded model also an instance of `SteeredMoEForCausalLM`; it keeps its own config."""
    if not isinstance(model, SteeredMoEForCausalLM):
        model.__class__ = _steered_class(cast(type, type(model)))
    steered = cast(SteeredMoEForCausalLM, model)
    steered.base_model_name, steered.base_model_revision = name or None, revision
    steered._extra = dict(extra)
    return steered


AutoModelForCausalLM.register(SteeredMoEConfig, SteeredMoEForCausalLM)
