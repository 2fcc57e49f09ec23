"""The "jaxserve" logger: messages on standard error, unless the program set up logging itself."""

from __future__ import annotations

import logging
import os

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
