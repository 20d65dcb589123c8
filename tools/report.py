#!/usr/bin/env python
"""Compares finished runs: writes report.md, report.json, curves and pictures of detections.

python tools/report.py --dataset photo_digits_val --output output/report --run teacher=output/teacher \\
    --run baseline=output/baseline --run distilled=output/distilled
"""

import sys

from d2kd.cli.report import argument_parser, run


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status; wrong usage raises SystemExit."""
    argument_parser(__doc__).parse_args(arguments)
    try:
        run(arguments, __doc__, "python tools/report.py")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
