"""Find steerings on the Hub: by base model, author, words, or in a collection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from huggingface_hub import HfApi, ModelInfo

from steered_moe.hub import hub_errors

TAG = "steered-moe"
"""The tag that every card of a steering has."""


@dataclass(frozen=True)
class Found:
    """A steering repo on the Hub, as its card describes it.

    Args:
        repo_id: What to load it by.
        base_model: Hub id of its base model, if the card names one.
        languages: Codes.
        downloads: In the last month, as the Hub counts.
        private: Whether only its owners see it.
    """

    repo_id: str
    base_model: str | None
    languages: tuple[str, ...]
    downloads: int
    private: bool


def find_steerings(
    base_model: str | None = None,
    *,
    author: str | None = None,
    search: str | None = None,
    collection: str | None = None,
    limit: int = 50,
    token: str | bool | None = None,
) -> list[Found]:
    """Steering repos on the Hub, those most downloaded first.

    Args:
        base_model: Hub id of the model to steer.
        author: User or organisation.
        search: A part of the id.
        collection: Slug of a collection, whose steerings alone are looked at, in its order.
        limit: At most so many.
        token: As huggingface_hub takes it.

    Raises:
        HubError: The Hub cannot be reached.
        huggingface_hub.errors.HfHubHTTPError: The Hub's own errors, such as an unknown collection.
    """
    api = HfApi(token=token)
    with hub_errors("looking for steerings"):
        if collection is not None:
            infos = _of_collection(api, collection)
        else:
            wanted = [TAG, *([f"base_model:{base_model}"] if base_model else [])]
            infos = iter(
                api.list_models(
                    filter=wanted,
                    author=author,
                    search=search,
                    sort="downloads",
                    full=True,
                    cardData=True,
                )
            )
        found = (_found(info) for info in infos)
        return list(islice((one for one in found if _fits(one, base_model, author, search)), limit))


def _of_collection(api: HfApi, slug: str) -> Iterator[ModelInfo]:
    """The models of a collection that are steerings."""
    for item in api.get_collection(slug).items:
        if item.item_type == "model":
            info = api.model_info(item.item_id)
            if TAG in (info.tags or []):
                yield info


def _found(info: ModelInfo) -> Found:
    tags = info.tags or []
    kinds = ("adapter", "finetune", "merge", "quantized")
    named = [tag.removeprefix("base_model:") for tag in tags if tag.startswith("base_model:")]
    bases = [name for name in named if name.partition(":")[0] not in kinds]
    languages = getattr(info.card_data, "language", None) or []
    listed = [languages] if isinstance(languages, str) else list(languages)
    return Found(
        repo_id=info.id,
        base_model=bases[0] if bases else None,
        languages=tuple(map(str, listed)),
        downloads=info.downloads or 0,
        private=bool(info.private),
    )


def _fits(one: Found, base_model: str | None, author: str | None, search: str | None) -> bool:
    """For the items of a collection, which the Hub does not filter."""
    return (
        base_model in (None, one.base_model)
        and author in (None, one.repo_id.partition("/")[0])
        and (search or "").lower() in one.repo_id.lower()
    )
