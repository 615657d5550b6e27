"""`python -m sapwood`: the command line of cli.py."""

import sys

from sapwood.cli import main

if __name__ == "__main__":
    sys.exit(main())
