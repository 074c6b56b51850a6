"""A router under steering: its wrapped forward, and the buffers that hold the numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from steered_moe.edit import Edit, RouterScope
from steered_moe.errors import SteeringError
from steered_moe.routers import Router

BUFFERS = {part: f"steering_{part}" for part in ("std", "abs", "none", "force")}
"""Part of an edit -> name of the non-persistent buffer of the router module that holds it."""

_MARK = "_is_steered"


class Entry:
    """A method of one module that is replaced for a while.

    Args:
        module: The module.
        name: The method; what another library put there (accelerate's offload) counts as it.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.original: Callable[..., Any] = getattr(module, name)
        self._before = module.__dict__.get(name)
        self._ours: Callable[..., Any] | None = None
        self.live = False

    def replace(self, function: Callable[..., Any]) -> None:
        """Let the module call ``function`` instead."""
        self.live = True
        self._ours = partial(_call, self, function)
        setattr(self.module, self.name, self._ours)

    def restore(self) -> None:
        """Let the module call what it called before.

        What somebody else has put around it since then stays, and passes through to that.
        """
        self.live = False
        if self.module.__dict__.get(self.name) is not self._ours:
            return
        if self._before is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self._before)


def _call(entry: Entry, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs) if entry.live else entry.original(*args, **kwargs)


class SteeredRouter:
    """Wraps one router. The numbers are buffers of the module, so that ``.to()``, offload,
    compile and CUDA graphs see them; changing them adds and removes no hook.

    Args:
        router: The router; its module's forward is wrapped at once.

    Attributes:
        fired: Whether an eager forward has passed through the edit.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.fired = False
        self._entries = [Entry(module, name) for module, name in router.entries]
        wrappers: list[Callable[..., Any]] = [_steered_forward, _steered_selection]
        for entry, wrapper in zip(self._entries, wrappers, strict=False):
            entry.replace(partial(wrapper, self, entry.original))
        setattr(router.module, _MARK, True)

    @property
    def edit(self) -> Edit:
        """The edit that the buffers hold now."""
        return current_edit(self.router)

    @property
    def cast(self) -> bool:
        """Whether casting the model has cast the coefficients too, and so rounded them."""
        parts = (self.edit.std, self.edit.abs, self.edit.none)
        return any(part is not None and part.dtype != torch.float32 for part in parts)

    def scope(self, edit: Edit) -> RouterScope:
        """A scope in which this router feels ``edit``."""
        return RouterScope(edit, self.router.weight_shape)

    def run(self, edit: Edit, args: Any, kwargs: Any) -> tuple[RouterScope, list[Any]]:
        """What the router hands on to the experts under ``edit``, its logits left out."""
        scope = self.scope(edit)
        with scope:
            output = self._entries[0].original(*args, **kwargs)
            for selection in self._entries[1:]:
                others = [*args[: len(signature(selection.original).parameters) - 1], output]
                return scope, list(selection.original(*others))
        parts = output if isinstance(output, tuple) else (output,)
        return scope, [part for i, part in enumerate(parts) if i != self.router.logits_index]

    def write(self, parts: Mapping[str, Tensor]) -> None:
        """Make the buffers hold exactly ``parts``, each ``(rows, experts)``.

        A buffer of the same shape is written in place: compiled code goes on with it.
        """
        module = self.router.module
        for part, name in BUFFERS.items():
            if part in parts:
                self._write(name, parts[part])
            else:
                module._buffers.pop(name, None)

    def _write(self, name: str, rows: Tensor) -> None:
        module = self.router.module
        rows = nn.functional.pad(rows, (0, self.router.weight_shape[0] - rows.shape[1]))
        present: Tensor | None = getattr(module, name, None)
        with torch.inference_mode(False), torch.no_grad():
            if present is not None and (present.shape, present.dtype) == (rows.shape, rows.dtype):
                present.copy_(rows)
            else:
                fresh = torch.empty(rows.shape, dtype=rows.dtype, device=execution_device(module))
                module.register_buffer(name, fresh.copy_(rows), persistent=False)

    def unwrap(self) -> None:
        """Give the module back as it was."""
        for entry in self._entries:
            entry.restore()
        self.write({})
        delattr(self.router.module, _MARK)


def _steered_forward(steered: SteeredRouter, forward: Any, *args: Any, **kwargs: Any) -> Any:
    scope = steered.scope(steered.edit)
    with scope:
        output = forward(*args, **kwargs)
    if not torch.compiler.is_compiling():
        steered.fired = scope.products == 1
    return output


def _steered_selection(steered: SteeredRouter, method: Any, *args: Tensor) -> Any:
    scope = steered.scope(steered.edit)
    scope.leading = args[-1].shape[:-1]
    with scope:
        return method(*args)


def is_steered(router: Router) -> bool:
    """Whether some model object steers this router."""
    return hasattr(router.module, _MARK)


def current_edit(router: Router) -> Edit:
    """The edit that the buffers of a router's module hold now; one without parts if none do."""
    buffers = router.module._buffers
    return Edit(router.num_experts, **{part: buffers.get(name) for part, name in BUFFERS.items()})


def check_free(router: Router) -> None:
    """Refuse a router that is steered through another model object, e.g. its decoder alone.

    Raises:
        SteeringError: Names the router.
    """
    if is_steered(router):
        raise SteeringError(
            f"router {router.path!r} is steered already, through another model object that it is "
            "part of; attach to the same object, or remove that steering first"
        )


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes; accelerate keeps offloaded weights on the meta device."""
    for sub in module.modules():
        hook = getattr(sub, "_hf_hook", None)
        for part in getattr(hook, "hooks", [hook]):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device
