"""The ``steered-moe`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer

from steered_moe import hub
from steered_moe.analyze_command import analyze
from steered_moe.demo_command import demo
from steered_moe.embedded import named_repo
from steered_moe.encoding import encode
from steered_moe.errors import SteeredMoEError
from steered_moe.evaluate_command import evaluate
from steered_moe.export_command import bake, export
from steered_moe.generation import Comparison, Counter, compare
from steered_moe.heat_map import heat_map
from steered_moe.hub_commands import list_command, pull, push
from steered_moe.literature import cited, edits
from steered_moe.lm_eval_command import PASS_ON, lm_eval
from steered_moe.loading import check_dtype
from steered_moe.modeling import SteeredMoEForCausalLM
from steered_moe.profile_command import profile
from steered_moe.select_command import select
from steered_moe.serve_command import PASS_ON as TO_VLLM
from steered_moe.serve_command import serve
from steered_moe.storage import SteeringRepo, read_repo
from steered_moe.terminal import console, errors, progress, table_of
from steered_moe.text_marks import marked
from steered_moe.tune_command import tune

app = typer.Typer(
    help="Steer the routers of Mixture-of-Experts language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.command()(profile)
app.command()(analyze)
app.command()(select)
app.command()(push)
app.command()(pull)
app.command(name="list")(list_command)
app.command()(evaluate)
app.command()(tune)
app.command(name="lm-eval", context_settings=dict(PASS_ON))(lm_eval)
app.command()(demo)
app.command(context_settings=dict(TO_VLLM))(serve)
app.command()(bake)
app.command()(export)

Repo = Annotated[
    str,
    typer.Argument(help="Steering repo: a folder, a Hub id, id@revision, or the word embedded."),
]
Prompt = Annotated[str, typer.Argument(help="The text to go on from.")]
Prompts = Annotated[list[str] | None, typer.Argument(help="Texts to go on from.")]
PromptFile = Annotated[Path | None, typer.Option(help="A file with a text in each line.")]
Strength = Annotated[float | None, typer.Option(help="Overrides the recorded strength; 0 is off.")]
BaseModel = Annotated[str | None, typer.Option(help="Overrides the recorded base model.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
DeviceMap = Annotated[str | None, typer.Option(help="For example auto, cpu or cuda:0.")]
Chat = Annotated[bool | None, typer.Option(help="Chat template; by default if there is one.")]


@app.command()
def inspect(repo: Repo) -> None:
    """Show what a steering repo holds: base model, layers, experts, strength, a picture."""
    with errors():
        content = read_repo(hub.fetch(named_repo(repo)))
    console.print(_base_table(content, repo))
    for steering, strength in zip(content.steerings, content.strengths, strict=True):
        rows = {
            "edit": "; ".join(f"{e.does}, {cited(e)}".rstrip(", ") for e in edits(steering)),
            "strength": strength,
            "experts steered": f"{steering.num_steered_experts} in {len(steering.layers)} layers",
            **steering.provenance,
            "fingerprint": steering.fingerprint[:16],
        }
        console.print(table_of(f"steering {steering.name}", rows))
        console.print("layer | experts, darker is stronger", style="dim")
        console.print("\n".join(heat_map(steering)), markup=False, highlight=False)


@app.command()
def generate(
    repo: Repo,
    prompt: Prompt,
    strength: Strength = None,
    base_model: BaseModel = None,
    max_new_tokens: MaxTokens = 128,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    chat: Chat = None,
) -> None:
    """Answer a prompt with the steered model (greedy)."""
    with errors():
        model, tokenizer = _load(repo, strength, base_model, dtype, device_map)
        inputs = {k: v.to(model.device) for k, v in encode(tokenizer, [prompt], chat).items()}
        with progress("generating", max_new_tokens) as tick:
            output = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=Counter(tick)
            )
    answer = output[0, inputs["input_ids"].shape[1] :]
    console.print(tokenizer.decode(answer, skip_special_tokens=True), markup=False)


@app.command(name="compare")
def compare_command(
    repo: Repo,
    prompts: Prompts = None,
    file: PromptFile = None,
    strength: Strength = None,
    base_model: BaseModel = None,
    max_new_tokens: MaxTokens = 128,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    chat: Chat = None,
) -> None:
    """Answer each prompt with base and steered model side by side, in one batched pass."""
    changed: dict[int, list[float]] = {}
    with errors():
        texts = [*(prompts or []), *_lines_of(file)]
        if not texts:
            raise SteeredMoEError("no prompt; give one or more, or --file with one in each line")
        model, tokenizer = _load(repo, strength, base_model, dtype, device_map)
        for prompt in texts:
            inputs = encode(tokenizer, [prompt], chat)
            with progress("generating", max_new_tokens) as tick:
                result = compare(model, inputs, tick, max_new_tokens=max_new_tokens)
            console.print(_side_by_side(prompt, result, tokenizer, model.strength))
            for layer, share in result.changed.items():
                changed.setdefault(layer, []).append(share)
    console.print(_changes(changed, model))


def _lines_of(file: Path | None) -> list[str]:
    """The lines of a file that are not blank."""
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip()]


def _load(
    repo: str, strength: float | None, base_model: str | None, dtype: str, device_map: str | None
) -> tuple[SteeredMoEForCausalLM, Any]:
    check_dtype(dtype)
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    model = SteeredMoEForCausalLM.from_pretrained(
        named_repo(repo), strength=strength, base_model=base_model, dtype=dtype, **options
    )
    base = model.config.name_or_path
    return model, AutoTokenizer.from_pretrained(base, revision=model.base_model_revision)


def _base_table(content: SteeringRepo, repo: str) -> Table:
    return table_of(escape(repo), {k: v for k, v in content.base.items() if v is not None})


def _side_by_side(prompt: str, result: Comparison, tokenizer: Any, strength: Any) -> Table:
    """Both texts under the prompt; tokens that the other side lacks are marked."""
    table = Table(
        "base",
        f"steered, strength {strength}",
        title=Text(prompt),
        title_justify="left",
        expand=True,
    )
    sides = Text(), Text()
    for text, marks in zip(sides, marked(result.base, result.steered, tokenizer), strict=True):
        for piece, differs in marks:
            text.append(piece, "bold reverse" if differs else "")
    table.add_row(*sides)
    return table


def _changes(changed: dict[int, list[float]], model: SteeredMoEForCausalLM) -> Table:
    """How many routing choices of the prompts steering changed, layer by layer."""
    steered = {int(layer) for s in model.steerings.values() for layer in s.layers}
    table = Table("layer", "steered", "prompt's routing choices changed", "")
    for layer, shares in changed.items():
        share = sum(shares) / len(shares)
        mark = "yes" if layer in steered else ""
        table.add_row(str(layer), mark, f"{share:.1%}", "█" * round(share * 40))
    return table
