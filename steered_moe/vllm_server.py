"""vLLM's OpenAI server as ``steered-moe serve --engine vllm`` starts it.

It is vLLM's own, with one difference: when its engine dies it ends with 1. vLLM's ends with 0,
which service managers take for a success.
"""

from __future__ import annotations

import runpy
import sys
from threading import Event
from typing import Any

_SERVER = "vllm.entrypoints.openai.api_server"


def main() -> None:
    """Serve until a signal, or until the engine dies.

    Raises:
        SystemExit: With 1 and the reason when the engine has died.
    """
    died: list[BaseException] = []
    _watch(died)
    runpy.run_module(_SERVER, run_name="__main__", alter_sys=True)
    if died:
        sys.exit(f"the vLLM engine has died: {died[0]}")


def _watch(died: list[BaseException]) -> None:
    """Note what vLLM tells all waiting requests when its engine dies.

    An engine that is told to end may report its end in the same way.
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.output_processor import OutputProcessor

    told, ending = OutputProcessor.propagate_error, AsyncLLM.shutdown
    asked = Event()

    def noted(self: Any, error: BaseException) -> Any:
        if not asked.is_set():
            died.append(error)
        return told(self, error)

    def ended(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.set()
        return ending(self, *args, **kwargs)

    OutputProcessor.propagate_error = noted
    AsyncLLM.shutdown = ended


if __name__ == "__main__":
    main()
