#!/usr/bin/env python
"""Writes the student of a training checkpoint as a plain Detectron2 checkpoint, without optimizer and distillers.

python tools/export_student.py output/model_0004999.pth student.pth [--config-file student.yaml]
"""

from d2kd.cli.export_student import run

if __name__ == "__main__":
    run(description=__doc__)
