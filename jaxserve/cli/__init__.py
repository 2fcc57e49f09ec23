"""The subcommands of the ``jaxserve`` command, one module each. Composition roots.

Each module has ``HELP``, ``make_parser()`` and ``run(args)``, which returns the exit code. Nothing
heavy is imported before ``run``, so that ``--help`` answers at once.
"""

import time

STARTED = time.perf_counter()
"""When the command started: this is the first module of ours that it loads."""
