"""The first tab of the demo: one prompt, answered by the base model and steered, and why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any
from urllib.parse import urlencode

import gradio

from steered_moe import demo_html as html
from steered_moe.demo_actions import PROBLEMS, describe
from steered_moe.demo_api import MODEL, told
from steered_moe.demo_tabs import Page
from steered_moe.errors import SteeringError
from steered_moe.problems import Problem, problems
from steered_moe.question import LONGEST_PROMPT, Question, check_number
from steered_moe.steering import ranges
from steered_moe.variants import EDITS

_HIDDEN = {"api_visibility": "private"}
_FIRST_LANGUAGE = "es"  # of the example that is there at the start
_EDIT_INFO = "As saved, or another edit of the same experts"
_LINK = "(query) => location.origin + location.pathname + query"
_CANCELLING = 0.3  # seconds
_FIELDS = tuple(field.name for field in fields(Question))


class Comparison:
    """The controls of the first tab, one for each field of a question, and what they do.

    Args:
        page: What all tabs share.
        demo: The app that is being built.
    """

    def __init__(self, page: Page, demo: Any) -> None:
        self.page = page
        with gradio.Tab("Compare"):
            self.controls: dict[str, Any] = {}
            self._choose()
            self._prompt()
            self._steering()
            self._sampling()
            self._outputs()
        self._events(demo)

    def _choose(self) -> None:
        with gradio.Row():
            self.controls["repo"] = gradio.Dropdown(
                self.page.actions.repos(), value=self.page.repo, allow_custom_value=True,
                label="Steering repo", info="Choose one, or paste a Hub id (user/name)",
            )  # fmt: skip
            self.controls["base_model"] = gradio.Textbox(
                label="Base model", info="Empty for the one that the repo records"
            )
            self.controls["steering"] = gradio.Dropdown(
                [], label="Steering", info="Of several in the repo", allow_custom_value=True
            )
        self.problem = gradio.HTML(elem_id="problem")
        with gradio.Accordion("About this steering", open=False):
            self.facts = gradio.HTML(elem_id="facts")
            self.card = gradio.Textbox(label="Card", lines=12, max_lines=12, interactive=False)

    def _prompt(self) -> None:
        self.examples: list[Problem] = [*problems("embedded"), *problems("large")]
        names = [f"{one.language}: {one.prompt}" for one in self.examples]
        start = next(one for one in self.examples if one.language == _FIRST_LANGUAGE)
        self.example = gradio.Dropdown(
            names, type="index", value=names[self.examples.index(start)], label="Examples",
            info="Word problems with known answers, in many languages",
        )  # fmt: skip
        with gradio.Row():
            self.controls["prompt"] = gradio.Textbox(
                start.prompt, label="Prompt", lines=4, max_length=LONGEST_PROMPT, elem_id="prompt",
                info="In any language",
            )  # fmt: skip
            self.controls["english"] = gradio.Textbox(
                start.english, label="The same in English", lines=4, max_length=LONGEST_PROMPT,
                info="For a reference column; may be empty", elem_id="english",
            )  # fmt: skip
        self.controls["answer"] = gradio.Textbox(
            str(start.answer), label="Known answer",
            info="A number, to mark the columns by; may be empty",
        )  # fmt: skip

    def _steering(self) -> None:
        with gradio.Row():
            self.controls["strength"] = gradio.Slider(
                -8, 8, 1, step=0.05, label="Strength", elem_id="strength",
                info="0 is the base model, negative numbers steer the other way",
            )  # fmt: skip
            self.controls["edit"] = gradio.Dropdown(
                list(EDITS), value="as saved", label="Method", info=_EDIT_INFO
            )
            self.controls["first_layer"] = gradio.Slider(0, 1, 0, step=1, label="First layer")
            self.controls["last_layer"] = gradio.Slider(0, 1, 1, step=1, label="Last layer")

    def _sampling(self) -> None:
        with gradio.Accordion("Length and sampling", open=False), gradio.Row():
            self.controls["max_new_tokens"] = gradio.Slider(
                1, 2048, 64, step=1, label="Longest answer, in tokens"
            )
            self.controls["temperature"] = gradio.Slider(
                0, 2, 0, step=0.05, label="Temperature", info="0 is greedy"
            )
            self.controls["top_p"] = gradio.Slider(0.05, 1, 1, step=0.05, label="Top p")
            self.controls["top_k"] = gradio.Slider(
                0, 200, 0, step=1, label="Top k", info="0 for all"
            )
            self.controls["seed"] = gradio.Number(
                0, label="Seed", precision=0, info="The same seed gives the same answer again"
            )
            self.controls["thinking"] = gradio.Checkbox(label="Let the model think")

    def _outputs(self) -> None:
        with gradio.Row():
            self.run = gradio.Button("Answer", variant="primary", elem_id="run")
            self.stop = gradio.Button("Stop", elem_id="stop")
        self.status = gradio.HTML(elem_id="status")
        self.columns = gradio.HTML(elem_id="columns")
        with gradio.Tabs():
            with gradio.Tab("What is steered"):
                self.steered = gradio.HTML(elem_id="steered")
            with gradio.Tab("Why"):
                self.why = gradio.HTML(elem_id="why")
            with gradio.Tab("Share"):
                self.query = gradio.Textbox(visible=False)
                self.link = gradio.Code(  # a disabled textbox takes no focus, and has no name
                    language=None, label="Link to this question", interactive=False,
                    wrap_lines=True, elem_id="link",
                )  # fmt: skip
                self.python = gradio.Code(
                    language="python", label="The same in Python", interactive=False,
                    elem_id="python",
                )  # fmt: skip

    @property
    def inputs(self) -> list[Any]:
        """The controls in the order of a question's fields."""
        return [self.controls[name] for name in _FIELDS]

    def _events(self, demo: Any) -> None:
        controls = self.controls
        described = [
            self.problem, self.facts, self.card,
            *(controls[n] for n in ("steering", "strength", "first_layer", "last_layer")),
        ]  # fmt: skip
        about = [controls[name] for name in ("repo", "base_model", "steering")]
        shown = [self.problem, self.steered]
        describe, picture = self.page.safely(self._describe, 6), self.page.safely(self._picture, 1)
        restored = [*self.inputs, self.status]
        (
            demo.load(self._restore, None, restored, **_HIDDEN)
            .then(describe, about, described, **_HIDDEN)
            .then(self._restore, None, restored, **_HIDDEN)  # the numbers, which are now in range
            .then(picture, self.inputs, shown, **_HIDDEN)
        )
        for trigger in (
            controls["repo"].input, controls["base_model"].submit, controls["steering"].input
        ):  # fmt: skip
            # A repo named while the last one is still drawn is not dropped.
            trigger(describe, about, described, trigger_mode="always_last", **_HIDDEN).then(
                picture, self.inputs, shown, trigger_mode="always_last", **_HIDDEN
            )
        moved = [controls[n].input for n in ("strength", "first_layer", "last_layer", "edit")]
        gradio.on(
            moved, picture, self.inputs, shown, trigger_mode="always_last", show_progress="hidden",
            **_HIDDEN,
        )  # fmt: skip
        filled = [controls[name] for name in ("prompt", "english", "answer")]
        self.example.input(self._example, self.example, filled, **_HIDDEN)
        outputs = [self.status, self.columns, self.why, self.query, self.python]
        running = gradio.on(
            [self.run.click, controls["prompt"].submit], self._answer, self.inputs, outputs,
            show_progress="minimal", trigger_mode="multiple", **MODEL, **_HIDDEN,
        )  # fmt: skip
        running.then(None, self.query, self.link, js=_LINK, **_HIDDEN)
        self.stop.click(None, cancels=[running], queue=False, **_HIDDEN).then(
            _stopped, None, self.status, queue=False, **_HIDDEN
        )

    def _restore(self, request: gradio.Request) -> list[Any]:
        """Settings from a shared link; what it gets wrong is told and left out."""
        skip = [gradio.skip()] * len(_FIELDS)
        text = dict(request.query_params).get("question", "")
        try:
            values = _of_link(text) if text else {}
        except PROBLEMS as error:
            return [*skip, html.message(f"This link cannot be read. {told(error)}", True)]
        given = [values.get(name, kept) for name, kept in zip(_FIELDS, skip, strict=True)]
        return [*given, ""]

    def _describe(self, name: str, base: str, chosen: str) -> tuple[Any, ...]:
        opened = self.page.actions.shelf.open(name or "", base)
        names = [one.name for one in opened.content.steerings]
        found = opened.content.only(chosen if chosen in names else None)
        steering, strength = found.steerings[0], found.strengths[0]
        end = max(opened.num_layers - 1, 1)
        return (
            html.facts("Steering repo", describe(opened)),
            self.page.actions.card(opened),
            gradio.Dropdown(names, value=steering.name),
            gradio.Slider(value=float(strength)),  # type: ignore[arg-type]
            gradio.Slider(maximum=end, value=int(steering.layers[0])),
            gradio.Slider(maximum=end, value=int(steering.layers[-1])),
        )

    def _picture(self, *values: Any) -> str:
        """What is steered with the controls as they are."""
        question = _question(values, prompt="-")
        opened = self.page.actions.shelf.open(question.repo, question.base_model)
        steering, strength = opened.steering(question)
        caption = (
            f"{question.edit}, strength {strength:g}: "
            f"{html.counted(steering.num_steered_experts, 'expert')} "
            f"in layer{'s' * (len(steering.layers) > 1)} {ranges(steering.layers)}"
        )
        return html.figures({caption: html.steering_map(strength * steering, opened)})

    def _example(self, index: int | None) -> tuple[Any, ...]:
        if index is None:
            return tuple([gradio.skip()] * 3)
        one = self.examples[index]
        english = "" if one.language == "en" else one.english
        return one.prompt, english, str(one.answer)

    def _answer(self, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Stream the columns; at the end also why, the link and the Python lines."""
        skip = gradio.skip()
        try:
            question = _question(values)
            yield html.message("Answering ..."), "", "", skip, skip
            opened = self.page.actions.shelf.open(question.repo, question.base_model)
            steering, _ = opened.steering(question)
            for answers in self.page.actions.ask(question):
                if not answers.done:
                    yield skip, html.columns(answers), skip, skip, skip
                    continue
                yield (
                    html.message("Done."),
                    html.columns(answers),
                    html.why(answers, steering),
                    _as_link(question),
                    html.python_lines(question),
                )
        except PROBLEMS as error:
            yield html.message(told(error), True), skip, skip, skip, skip


async def _stopped() -> str:
    """Told a moment after: a question asked while gradio still cancels would end with an error."""
    await asyncio.sleep(_CANCELLING)
    return html.message("Stopped.")


def _question(values: tuple[Any, ...], **instead: Any) -> Question:
    """A question from the controls, in which empty texts are no choice."""
    given: dict[str, Any] = dict(zip(_FIELDS, values, strict=True)) | instead
    for name in ("base_model", "steering"):
        value = given[name]
        given[name] = (value.strip() if isinstance(value, str) else value) or None
    for name in ("first_layer", "last_layer", "max_new_tokens", "top_k", "seed"):
        given[name] = check_number(name, given[name] or 0, 0, 2**63 - 1, whole=True)
    given["repo"] = given["repo"] or ""
    given["first_layer"], given["last_layer"] = sorted((given["first_layer"], given["last_layer"]))
    return Question(**given)


def _as_link(question: Question) -> str:
    """The query part of a link that asks the same again."""
    return "?" + urlencode({"question": json.dumps(question.given, ensure_ascii=False)})


def _of_link(text: str) -> Mapping[str, Any]:
    """The settings in a link.

    Raises:
        SteeringError: They are no settings of a question.
        ValueError: They are no JSON.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise SteeringError("it is nested too deeply; copy it again") from error
    if not isinstance(values, dict) or set(values) - set(_FIELDS):
        raise SteeringError("it does not hold the settings of a question; copy it again")
    Question(**{"prompt": "-", **values})
    return values
