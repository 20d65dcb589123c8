"""Runs `python -m d2kd.cli`, which is the console program `d2kd`."""

import sys

from d2kd.cli import main

if __name__ == "__main__":
    sys.exit(main())
