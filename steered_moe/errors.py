"""The error classes. Each message names the value that was refused and what to do about it."""


class SteeredMoEError(Exception):
    """Base class of every error that this library raises on purpose."""


class SteeringError(SteeredMoEError, ValueError):
    """A steering value, or a strength, that cannot be right whatever the model."""


class EmptySelectionError(SteeringError):
    """Settings of a method that select no expert."""


class FormatError(SteeredMoEError, ValueError):
    """A steering repo or a profile on disk that is damaged, incomplete or too new."""


class BaseModelError(SteeredMoEError, ValueError):
    """A steering and a base model that do not belong together."""


class RouterError(SteeredMoEError, ValueError):
    """A model, or a layer of it, whose routers cannot be steered."""


class InterventionError(SteeredMoEError, RuntimeError):
    """Steering that is attached but does not reach the selection of experts."""


class CorpusError(SteeredMoEError, ValueError):
    """Texts that cannot be read, or that are not parallel."""


class HubError(SteeredMoEError, OSError):
    """A transfer from or to the Hub that broke off, or a cache folder that cannot be used."""


class QuantizationError(SteeredMoEError, ValueError):
    """A model that cannot be brought to 4 bit, or not in the way that is asked for."""
