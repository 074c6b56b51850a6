"""Clients that leave before their answer: the server stops working on it.

transformers' server does so for streams. Here the same for answers in one piece: what waits for one
is cancelled when its client disconnects, and that ends the generation after its next token.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Leaving:
    """ASGI middleware: cancels a request whose client disconnects before its response begins.

    Args:
        app: The application inside.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, messages = asyncio.Event(), asyncio.Queue[Message](maxsize=1)

        async def noting(message: Message) -> None:
            begun.set()
            await send(message)

        work = asyncio.ensure_future(self.app(scope, messages.get, noting))
        listener = asyncio.ensure_future(_until_left(receive, messages))
        try:
            await asyncio.wait({work, listener}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not begun.is_set():
                work.cancel()
            await work
        except asyncio.CancelledError:
            work.cancel()
            if not listener.done():  # it was not the client that left
                raise
        finally:
            listener.cancel()


async def _until_left(receive: Receive, messages: asyncio.Queue[Message]) -> None:
    """Hand on what a client sends until it disconnects, that included."""
    while True:
        message = await receive()
        await messages.put(message)
        if message["type"] == "http.disconnect":
            return


class _Left(StoppingCriteria):
    """Ends all rows once the client has left."""

    def __init__(self, left: threading.Event) -> None:
        self.left = left

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """One bool per row."""
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)


def stoppable(original: Callable[..., Any]) -> Callable[..., Any]:
    """``generate_non_streaming`` of one request at a time, which stops when it is cancelled."""

    async def answer(
        self: Any, model: Any, processor: Any, inputs: Any, config: Any, request_id: str
    ) -> Any:
        left = threading.Event()
        given = {**inputs, "stopping_criteria": StoppingCriteriaList([_Left(left)])}
        work = asyncio.ensure_future(original(self, model, processor, given, config, request_id))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            left.set()
            raise

    return answer


def cancellable(original: Callable[..., Any]) -> Callable[..., Any]:
    """``generate_non_streaming`` of continuous batching, which stops when it is cancelled."""

    async def answer(
        self: Any, model: Any, processor: Any, inputs: Any, config: Any, request_id: str
    ) -> Any:
        try:
            return await original(self, model, processor, inputs, config, request_id)
        except asyncio.CancelledError:
            self._cb.cancel_request(request_id)
            raise

    return answer


def watched(original: Callable[..., Any]) -> Callable[..., Any]:
    """``build_server`` whose application has `Leaving` around it."""

    def build(*args: Any, **kwargs: Any) -> Any:
        app = original(*args, **kwargs)
        app.add_middleware(Leaving)
        return app

    return build
