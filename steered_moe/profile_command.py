"""``steered-moe profile``: texts in many languages to a routing profile, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from transformers import AutoModelForCausalLM, AutoTokenizer

from steered_moe import hub
from steered_moe.corpora import read_texts
from steered_moe.embedded import named_model
from steered_moe.shards import profile_in_shards
from steered_moe.terminal import console, errors, progress, table_of

Model = Annotated[
    str, typer.Argument(help="MoE: a folder, a Hub id, id@revision, or the word embedded.")
]
Data = Annotated[
    str,
    typer.Option(
        help="Texts: a folder with a file per language, a path with {language} in it, flores_plus, "
        "belebele, mgsm, gsm8k, global_mmlu, or hub:owner/name/config."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder for the profile.")]
Languages = Annotated[str | None, typer.Option(help="Codes with commas between; all by default.")]
Columns = Annotated[str | None, typer.Option(help="Columns of the data, with commas between.")]
Split = Annotated[str | None, typer.Option(help="Split of a dataset on the Hub.")]
DataRevision = Annotated[str | None, typer.Option(help="Revision of a dataset on the Hub.")]
Limit = Annotated[int | None, typer.Option(min=1, help="First rows of each language only.")]
Chat = Annotated[bool, typer.Option(help="Put each text into the chat template.")]
Template = Annotated[bool, typer.Option(help="Count the tokens of the chat template, too.")]
Sequences = Annotated[
    bool, typer.Option(help="Keep each text's mean routing, which divergence by Eq. 2 needs.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts per forward pass.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="For example auto, cpu or cuda:0.")]


def profile(
    model: Model,
    data: Data,
    out: Out,
    languages: Languages = None,
    columns: Columns = None,
    split: Split = None,
    data_revision: DataRevision = None,
    limit: Limit = None,
    chat: Chat = False,
    template_tokens: Template = True,
    keep_sequences: Sequences = True,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Measure how a model routes texts; after an interruption, the same command goes on."""
    with errors():
        texts = read_texts(
            data,
            _split(languages),
            columns=_split(columns),
            split=split,
            revision=data_revision,
            limit=limit,
        )
        loaded, tokenizer, revision = load_model(model, dtype, device_map)
        rows = sum(map(len, texts.values()))
        with progress("profiling", rows) as tick:
            found = profile_in_shards(
                loaded,
                tokenizer,
                texts,
                out,
                about={"model": hub.split(model)[0], "revision": revision, "corpus": data},
                tick=tick,
                batch_size=batch_size,
                keep_sequences=keep_sequences,
                chat=chat,
                template_tokens=template_tokens,
            )
    shown = {
        "languages": ", ".join(found.languages),
        "texts per language": int(rows / len(texts)),
        "tokens": ", ".join(f"{int(n)}" for n in found.tokens[:, 0]),
        "layers": f"{found.layers[0]}-{found.layers[-1]}",
        "experts": f"{found.num_experts}, {found.top_k} per token",
        "sha256": found.fingerprint[:16],
    }
    console.print(table_of(f"profile {escape(str(out))}", shown))


def load_model(name: str, dtype: str, device_map: str | None) -> tuple[Any, Any, str | None]:
    """A model of transformers, its tokenizer and its commit on the Hub."""
    place, revision = hub.split(named_model(name))
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    model = AutoModelForCausalLM.from_pretrained(
        place, revision=revision, dtype=dtype, trust_remote_code=False, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    return model.eval(), tokenizer, hub.commit_of(place, revision)


def _split(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",")]
