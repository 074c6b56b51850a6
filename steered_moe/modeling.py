"""`SteeredMoEForCausalLM`: a base model with its steering on, in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from steered_moe import hub
from steered_moe.base_model import load_base, locate_base, portable
from steered_moe.cards import write_card
from steered_moe.configuration import SteeredMoEConfig
from steered_moe.errors import BaseModelError, SteeringError
from steered_moe.intervention import Intervention, attach, attached
from steered_moe.steering import RouterSteering
from steered_moe.storage import SteeringRepo, read_repo
from steered_moe.strength import Strength, as_given, as_rows, by_name

_AUTO_KWARGS = ("adapter_kwargs", "_from_auto", "_commit_hash", "subfolder", "proxies")
_SWALLOWED = {
    "attn_implementation": "_attn_implementation_internal",
    "experts_implementation": "_experts_implementation_internal",
}
"""Keyword arguments that AutoConfig puts into the config it reads, here the steering's."""


class SteeredMoEForCausalLM(PreTrainedModel):
    """A Mixture-of-Experts causal LM whose routers are steered.

    Made by `from_pretrained` (a steering repo) or `from_base` (a model and a steering). The object
    **is** the base model, of a class that also derives from this one, so ``generate``, pipelines,
    PEFT and ``torch.compile`` work on it as they do on the base.
    """

    config_class = SteeredMoEConfig

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
            pretrained_model_name_or_path: Steering repo: local folder, Hub id or ``id@revision``.
            model_args: For ``AutoModelForCausalLM.from_pretrained`` of the base.
            strength: Overrides the recorded strengths: one value for all steerings, or a mapping
                by name. A value is a number or one number per row of the batch.
            revision: Revision of the steering repo. The base is loaded at its recorded revision.
            base_model: Overrides the recorded base, e.g. with a local copy.
            config: Ignored but for attention and experts implementation; AutoModel passes it.
            kwargs: For ``AutoModelForCausalLM.from_pretrained`` of the base: ``dtype``,
                ``device_map``, ``attn_implementation``, ``quantization_config``, ``token`` ...

        Raises:
            FormatError: The steering repo is damaged, incomplete or too new.
            BaseModelError: Steering and base do not belong together.
            RouterError: The base has no router that can be steered.
            InterventionError: The edit would have no effect.
        """
        for name, attribute in _SWALLOWED.items():
            value = getattr(config, attribute, None)
            if value is not None:
                kwargs.setdefault(name, value)
        kwargs = {key: value for key, value in kwargs.items() if key not in _AUTO_KWARGS}
        hub_kwargs = {name: kwargs[name] for name in hub.KWARGS if name in kwargs}
        folder = hub.fetch(os.fspath(pretrained_model_name_or_path), revision, **hub_kwargs)
        repo = read_repo(folder)
        base, base_revision = locate_base(repo, folder, base_model)
        names = [steering.name for steering in repo.steerings]
        strengths: dict[str, Strength] = dict(zip(names, repo.strengths, strict=True))
        if strength is not None:
            strengths |= by_name(strength, names)
        model = load_base(base, base_revision, repo, *model_args, **kwargs)
        for steering in repo.steerings:
            attach(model, steering, strengths[steering.name])
        return _graft(model, base, base_revision or hub.commit_of(base, None, **hub_kwargs))

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
        if isinstance(base, PreTrainedModel):
            if from_pretrained_kwargs:
                names = ", ".join(from_pretrained_kwargs)
                raise BaseModelError(f"{names} cannot apply to a base model that is loaded already")
            model, name, revision = base, str(base.config.name_or_path), None
        else:
            name = os.fspath(base)
            revision = from_pretrained_kwargs.pop("revision", None)
            unnamed = SteeringRepo({}, steerings, [1.0] * len(steerings))
            model = load_base(name, revision, unnamed, **from_pretrained_kwargs)
            hub_kwargs = {k: v for k, v in from_pretrained_kwargs.items() if k in hub.KWARGS}
            revision = hub.commit_of(name, revision, **hub_kwargs) or revision
        for one in steerings:
            attach(model, one, strength)
        return _graft(model, name, revision)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        raise BaseModelError(
            "a steering repo has no weights to initialise from a config; use from_pretrained"
        )

    @property
    def steerings(self) -> dict[str, RouterSteering]:
        """The attached steerings by name."""
        intervention = attached(self)
        return {} if intervention is None else dict(intervention.steerings)

    @property
    def steering(self) -> RouterSteering:
        """The attached steering.

        Raises:
            SteeringError: None or several are attached; use ``steerings``.
        """
        if len(self.steerings) != 1:
            raise SteeringError(
                f"{len(self.steerings)} steerings are attached; use model.steerings[name]"
            )
        return next(iter(self.steerings.values()))

    @property
    def strengths(self) -> dict[str, float | Tensor]:
        """Strength of each steering now, by name."""
        intervention = attached(self)
        values = {} if intervention is None else intervention.strengths
        return {name: as_given(value) for name, value in values.items()}

    @property
    def strength(self) -> float | Tensor | dict[str, float | Tensor]:
        """Strength now: one value when all steerings agree, else a dict by name. Settable."""
        values = self.strengths
        rows = [as_rows(value) for value in values.values()]
        if rows and all(torch.equal(rows[0], other) for other in rows):
            return as_given(rows[0])
        return values

    @strength.setter
    def strength(self, value: Strength | Mapping[str, Strength]) -> None:
        self.set_strength(value)

    def set_strength(self, strength: Strength | Mapping[str, Strength]) -> None:
        """Set the strength of all steerings, or of those named in a mapping; in place.

        Args:
            strength: A number, or one number per row of the batch (0 = base model).
        """
        self._intervention().set_strengths(by_name(strength, self.steerings))

    @contextmanager
    def steered(self, strength: Strength | Mapping[str, Strength] = 1.0) -> Iterator[None]:
        """Steer at ``strength`` inside the block, then as before."""
        with self._intervention().at(by_name(strength, self.steerings)):
            yield

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """The base model inside the block, then as before."""
        with self.steered(0.0):
            yield

    def add_steering(self, steering: RouterSteering, strength: Strength = 1.0) -> None:
        """Attach one more steering, under its own name."""
        attach(self, steering, strength)

    def remove_steering(self, name: str) -> None:
        """Take a steering off."""
        self._intervention().remove(name)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write a steering repo: config, tensors and card, kilobytes; never the base's weights.

        Args:
            save_directory: Folder to write. A card that is there already is kept.
            push_to_hub: Also push it.
            tokenizer: Saved too when given, so that pipelines work on the folder alone.
            kwargs: ``repo_id`` and the other arguments of `push_to_hub`.

        Raises:
            SteeringError: Nothing is attached, a strength per row, which is not a setting, or
                arguments that have nothing to act on, such as ``state_dict``.
        """
        if kwargs and not push_to_hub:
            raise SteeringError(
                f"{', '.join(kwargs)}: a steering repo holds no weights; to save the base model "
                "too, call save_pretrained of its own class"
            )
        folder = Path(save_directory)
        repo = self._repo(folder)
        repo.write(folder)
        write_card(repo, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if push_to_hub:
            hub.push(folder, kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(self, repo_id: str, *, tokenizer: Any = None, **kwargs: Any) -> str:
        """Push the steering repo, in one commit; returns the commit's URL.

        Args:
            repo_id: Hub id.
            tokenizer: Pushed too when given.
            kwargs: ``private``, ``revision``, ``create_pr``, ``commit_message``, ``token``.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, tokenizer=tokenizer)
            return hub.push(folder, repo_id, **kwargs)

    def _intervention(self) -> Intervention:
        intervention = attached(self)
        if intervention is None:
            raise SteeringError("no steering is attached; use model.add_steering(steering)")
        return intervention

    def _repo(self, folder: Path) -> SteeringRepo:
        intervention = self._intervention()
        per_row = [name for name, rows in intervention.strengths.items() if len(rows) > 1]
        if per_row:
            raise SteeringError(
                f"{', '.join(per_row)} has a strength per row; set one number before saving"
            )
        shape = intervention.shape
        base = {
            "base_model_name_or_path": portable(self._base_name, folder),
            "base_model_revision": self._base_revision,
            "base_model_type": self.config.model_type,
            **shape.fields,
        }
        strengths = [float(intervention.strengths[name]) for name in intervention.steerings]
        return SteeringRepo(base, list(intervention.steerings.values()), strengths)


def _graft(model: PreTrainedModel, name: str, revision: str | None) -> SteeredMoEForCausalLM:
    """Make a loaded model also an instance of `SteeredMoEForCausalLM`; it keeps its own config."""
    base_class = type(model)
    if not issubclass(base_class, SteeredMoEForCausalLM):
        body = {"__module__": base_class.__module__, "config_class": base_class.config_class}
        bases = (SteeredMoEForCausalLM, base_class)
        model.__class__ = type(SteeredMoEForCausalLM.__name__, bases, body)
    model._base_name, model._base_revision = name or None, revision
    return cast(SteeredMoEForCausalLM, model)


AutoModelForCausalLM.register(SteeredMoEConfig, SteeredMoEForCausalLM)
