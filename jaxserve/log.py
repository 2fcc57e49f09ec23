"""The "jaxserve" logger: messages on standard error, unless the program set up logging itself."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

logger = logging.getLogger("jaxserve")


def set_up() -> None:
    """Gives the logger a handler of its own if nobody else handles its messages.

    The level comes from ``JAXSERVE_LOG_LEVEL``, INFO by default.
    """
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("jaxserve: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(os.environ.get("JAXSERVE_LOG_LEVEL", "INFO").upper())


@functools.cache
def own_code_is_not_run(where: str | Path, what: str) -> None:
    """Says once that a checkpoint brings Python code along ("auto_map") for its model or its
    tokenizer: code of a checkpoint is never run."""
    logger.info("%s names Python code of its own for its %s; jaxserve's is used.", where, what)
