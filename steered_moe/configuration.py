"""`SteeredMoEConfig`: what transformers' Auto classes see of a steering repo."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from steered_moe.repo_config import (
    BASE_FIELDS,
    FORMAT_VERSION,
    KNOWN_FIELDS,
    MODEL_TYPE,
    check_config,
)

_TAKEN = KNOWN_FIELDS - {"dtype", "auto_map"} | {"_commit_hash", "_name_or_path", "name_or_path"}
"""What transformers may set as attributes: the file's other fields could be any attribute."""


class SteeredMoEConfig(PreTrainedConfig):
    """Config of a steering repo, see `steered_moe.storage` for the fields.

    It describes the base model by name and shape and lists the steerings; it is not the config of
    the base model, which a loaded model keeps as its own.

    Raises:
        FormatError: A field that cannot be right, with value and fix.
    """

    model_type = MODEL_TYPE

    format_version: int = FORMAT_VERSION
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_type: str | None = None
    num_hidden_layers: int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    steerings: list[Any] | None = None
    default_steering: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.steerings is not None:  # transformers also makes an empty one, to find defaults
            check_config(self._fields())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers calls it; of the file only the fields of a steering repo are taken."""
        own = {key: value for key, value in config_dict.items() if key in _TAKEN}
        return super().from_dict(own, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``, without transformers' own bookkeeping."""
        return self._fields()

    def to_diff_dict(self) -> dict[str, Any]:
        """Same as `to_dict`: a steering repo is written whole."""
        return self._fields()

    def _fields(self) -> dict[str, Any]:
        fields = {
            name: getattr(self, name) for name in ("format_version", *BASE_FIELDS, "steerings")
        }
        if self.default_steering is not None:
            fields["default_steering"] = self.default_steering
        return {"model_type": MODEL_TYPE, "architectures": self.architectures, **fields}


AutoConfig.register(MODEL_TYPE, SteeredMoEConfig)
