"""``python -m server MODEL``: the same as ``jaxserve serve MODEL``."""

import sys

from jaxserve.__main__ import main

if __name__ == "__main__":
    sys.argv[1:1] = ["serve"]
    sys.exit(main())
