"""`python -m mnv2_fast` is the command `mnv2`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
