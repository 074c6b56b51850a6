"""``steered-moe profile``: texts in many languages to a routing profile, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from steered_moe import hub
from steered_moe.chat import Form
from steered_moe.corpora import read_texts
from steered_moe.loading import check_dtype, check_model, load_model
from steered_moe.shards import check_folder, profile_in_shards
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
Prompt = Annotated[
    bool, typer.Option(help="End a chat with what the template puts before an answer.")
]
Thinking = Annotated[bool, typer.Option(help="Leave enable_thinking of the template as it is.")]
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
    generation_prompt: Prompt = True,
    thinking: Thinking = True,
    keep_sequences: Sequences = True,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
) -> None:
    """Measure how a model routes texts; after an interruption, the same command goes on."""
    with errors():
        form: dict[str, Any] = {"chat": chat, "template_tokens": template_tokens}
        form |= {"generation_prompt": generation_prompt}
        form |= {"template_kwargs": None if thinking else {"enable_thinking": False}}
        Form(**form)
        check_folder(out)
        check_dtype(dtype)
        check_model(model)
        which: dict[str, Any] = {"columns": _split(columns), "split": split, "limit": limit}
        texts = read_texts(data, _split(languages), revision=data_revision, **which)
        loaded, tokenizer, revision = load_model(model, dtype, device_map)
        about = {"model": hub.split(model)[0], "revision": revision, "corpus": data}
        which |= {"data_revision": data_revision, "languages": _split(languages)}
        rows = sum(map(len, texts.values()))
        with progress("profiling", rows) as tick:
            found = profile_in_shards(
                loaded,
                tokenizer,
                texts,
                out,
                about=about | {name: value for name, value in which.items() if value is not None},
                tick=tick,
                batch_size=batch_size,
                keep_sequences=keep_sequences,
                **form,
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


def _split(names: str | None) -> list[str] | None:
    return None if names is None else [name.strip() for name in names.split(",")]
