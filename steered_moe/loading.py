"""A model as the command line names it: what can be told before loading, and loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_moe import hub
from steered_moe.embedded import named_model
from steered_moe.errors import SteeredMoEError
from steered_moe.repo_config import is_repo_id

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str, dtype: str, device_map: str | None) -> tuple[Any, Any, str | None]:
    """A model of transformers, its tokenizer and its commit on the Hub.

    Raises:
        SteeredMoEError: No such dtype or folder.
    """
    check_dtype(dtype)
    check_model(name)
    place, revision = hub.split(named_model(name))
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    model = AutoModelForCausalLM.from_pretrained(
        place, revision=revision, dtype=dtype, trust_remote_code=False, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    return model.eval(), tokenizer, hub.commit_of(place, revision)


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that models are not loaded in.

    Raises:
        SteeredMoEError: Names those that there are.
    """
    if dtype not in DTYPES:
        raise SteeredMoEError(f"no dtype {dtype!r}; use one of {', '.join(DTYPES)}")


def check_model(name: str) -> None:
    """Refuse a model that is neither a folder here nor can be on the Hub.

    Raises:
        SteeredMoEError: Names it.
    """
    place, _ = hub.split(named_model(name))
    if Path(place).is_file():
        raise SteeredMoEError(f"{place} is a file; name the folder of the model")
    if not Path(place).is_dir() and not is_repo_id(place):
        raise SteeredMoEError(f"{place}: no such folder, and no Hub id (user/name) either")
