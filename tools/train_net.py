#!/usr/bin/env python
"""Trains or evaluates a Detectron2 model, by distillation where a teacher is given; the same as `d2kd train`.

python tools/train_net.py --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth
python tools/train_net.py --config-file student.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
"""

from d2kd.cli.train import run

if __name__ == "__main__":
    run(description=None)
