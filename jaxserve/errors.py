"""The exceptions that jaxserve raises.

JaxserveError
├── InvalidRequestError (ValueError)  a request can't be served: names field, limit, remedy
├── ConfigError (ValueError)          an engine setting can't be used
├── CheckpointError (ValueError)      a checkpoint can't be read: names tensor, key or file
│   └── UnsupportedModelError         an architecture or a feature of it that we don't have
├── RequestFailedError                one admitted request failed; the others went on
└── EngineClosedError                 the engine was closed
"""

from __future__ import annotations


class JaxserveError(Exception):
    """Root of every exception that jaxserve raises on purpose."""


class InvalidRequestError(JaxserveError, ValueError):
    """A request was refused at admission.

    Attributes:
        param: name of the field at fault, or None when it is the request as a whole.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(JaxserveError, ValueError):
    """An engine setting is wrong, or doesn't fit the model or the machine."""


class CheckpointError(JaxserveError, ValueError):
    """A checkpoint can't be read: the message names the tensor, key or file and the remedy."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is sound, but we have no code for its architecture or for a feature of it."""


class RequestFailedError(JaxserveError):
    """An admitted request failed while it ran, for example because its logits were NaN."""


class EngineClosedError(JaxserveError):
    """The engine was closed; make a new one."""
