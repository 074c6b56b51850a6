"""``steered-moe lm-eval``: lm-eval's own command line, with the model type ``steered-moe``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Annotated, Any

import typer

from steered_moe.errors import SteeredMoEError
from steered_moe.terminal import console, errors

PASS_ON: Mapping[str, Any] = MappingProxyType(
    {"ignore_unknown_options": True, "help_option_names": []}
)
"""Settings of the command: no option is its own, not even ``--help``."""

_MODEL = "steered-moe"
_OTHER_COMMANDS = ("ls", "validate")

Arguments = Annotated[
    list[str] | None, typer.Argument(help="As lm-eval takes them; see lm-eval run --help.")
]


def lm_eval(context: typer.Context, arguments: Arguments = None) -> None:
    """Run lm-eval on a steering repo; all arguments are lm-eval's own.

    steered-moe lm-eval --model_args pretrained=user/x,strength=1.0 --tasks mgsm_direct_bn

    model_args: pretrained (a folder, a Hub id, id@revision, or the word embedded), strength,
    steering (its name), base_model, revision, load_in_4bit, device_map, dtype, and those of
    lm-eval's model type hf. "steered-moe lm-eval run --help" shows lm-eval's options,
    "steered-moe lm-eval ls tasks" its tasks.
    """
    if not arguments or arguments in (["--help"], ["-h"]):
        console.print(context.get_help(), markup=False, highlight=False)
        return
    with errors():
        run = entry()
        with command_line(with_model(arguments)), in_words():
            run()


def entry() -> Callable[[], None]:
    """lm-eval's entry point, with our model type registered.

    Raises:
        SteeredMoEError: lm-eval is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        import steered_moe.lm_eval_model  # noqa: F401 - it registers itself
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise SteeredMoEError(
            'lm-eval is not installed here; pip install "steered-moe[lm-eval]"'
        ) from error
    run: Callable[[], None] = cli_evaluate
    return run


def with_model(arguments: Sequence[str]) -> list[str]:
    """Arguments for lm-eval that name our model type.

    Raises:
        SteeredMoEError: They name another one.
    """
    if arguments[0] in _OTHER_COMMANDS:
        return list(arguments)
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-M")
    known, others = parser.parse_known_args(list(arguments))
    if known.model not in (None, _MODEL):
        raise SteeredMoEError(
            f"--model {known.model}: this command has the model type {_MODEL} only; for others "
            "call lm-eval itself"
        )
    others = others[1:] if others[:1] == ["run"] else others
    return ["run", *others, "--model", _MODEL]


@contextmanager
def in_words() -> Iterator[None]:
    """What lm-eval says by an assertion, or lacks a package for, as an error of one line.

    Raises:
        SteeredMoEError: In place of either.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise SteeredMoEError(
            f"{error.name} is not installed here; install it, or leave out what needs it"
        ) from error
    except AssertionError as error:
        if not str(error):
            raise
        raise SteeredMoEError(f"lm-eval: {error}") from error


@contextmanager
def command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Let lm-eval, which reads ``sys.argv`` and changes it, see these arguments."""
    before = sys.argv
    sys.argv = ["lm-eval", *arguments]
    try:
        yield
    finally:
        sys.argv = before
