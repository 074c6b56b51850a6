"""What people wrote into a card, kept when the generated part is written anew."""

from __future__ import annotations

import re
from types import NoneType
from typing import Any

import yaml

from steered_moe.errors import FormatError

BEGIN = "<!-- steered-moe: written from this repo's files; text outside these marks is kept -->"
END = "<!-- steered-moe: end -->"
_PART = re.compile(f"{BEGIN}(?:(?!{BEGIN}).)*?{END}\n?", re.DOTALL)
_HEADER = re.compile(r"\A---\n.*?\n---\n*", re.DOTALL)


def merged(card: str, old: str) -> str:
    """A new card with the text and metadata of an old one that the new one does not replace.

    Args:
        card: Just written; its generated part is between `BEGIN` and `END`.
        old: The card that is there, or "".

    Raises:
        FormatError: The old card's metadata cannot be read.
    """
    if not old.strip():
        return card
    part = _PART.search(card)
    if part is None:
        raise FormatError(f"a new card has no part between {BEGIN} and {END}")
    body = _HEADER.sub("", old)
    if _PART.search(body):
        text = _PART.sub(lambda _: part[0], body, count=1)
    else:
        text = f"{body.rstrip()}\n\n{part[0]}" if body.strip() else part[0]
    header = dump_yaml(_merged_metadata(metadata(card), metadata(old)))
    return f"---\n{header}---\n\n{text}"


def with_metadata_of(card: str, old: str) -> str:
    """A card with the metadata that only an old one has.

    Raises:
        FormatError: Metadata that cannot be read.
    """
    fields = {key: value for key, value in metadata(old).items() if key != "model-index"}
    return f"---\n{dump_yaml({**fields, **metadata(card)})}---\n\n{_HEADER.sub('', card)}"


def _merged_metadata(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Fields that only the old card has are kept, tags joined; old scores are not kept."""
    kept = {key: value for key, value in old.items() if key not in (*new, "model-index")}
    tags = old.get("tags") or []
    own = [tag for tag in (tags if isinstance(tags, list) else [tags]) if tag not in new["tags"]]
    return {**new, "tags": [*new["tags"], *own], **kept}


def dump_yaml(content: Any) -> str:
    """YAML in the order that is given, in any script."""
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def own_text(card: str) -> str:
    """The hand-written text of a card."""
    return _PART.sub("", _HEADER.sub("", card)).strip()


def metadata(card: str) -> dict[str, Any]:
    """The YAML header of a card.

    Raises:
        FormatError: It is not valid YAML, or not a mapping.
    """
    header = _HEADER.match(card)
    try:
        content = yaml.safe_load(header[0].strip().strip("-")) if header else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FormatError(f"the card's metadata is not YAML: {error}; repair it") from error
    if not isinstance(content, (dict, NoneType)):
        raise FormatError(f"the card's metadata is a {type(content).__name__}, not a mapping")
    return dict(content or {})
