#!/usr/bin/env python
"""Compares finished runs: writes report.md, report.json, curves and pictures of detections.

python tools/report.py --dataset photo_digits_val --output output/report --run teacher=output/teacher \\
    --run baseline=output/baseline --run distilled=output/distilled
"""

from d2kd.cli.report import run

if __name__ == "__main__":
    run(description=__doc__, program="python tools/report.py")
