"""`python -m moebius.compare` is the `moebius` command."""

import sys

from moebius.compare.entry import main

if __name__ == "__main__":
    sys.exit(main())
