"""Trains or evaluates a Detectron2 model, by distillation where a teacher is given.

d2kd train --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth
d2kd eval --config-file student.yaml MODEL.WEIGHTS output/model_final.pth
"""

import argparse
from typing import Any

from d2kd.data.datasets import check_class_counts, check_datasets
from d2kd.engine import (
    DistillTrainer,
    argument_parser,
    evaluate_student,
    evaluate_teacher,
    launch_tool,
    setup,
)
from d2kd.errors import ConfigError
from d2kd.evaluation.build import check_evaluators
from d2kd.modeling import is_distillation


def main(args: argparse.Namespace) -> Any:
    """One process of the run."""
    cfg = setup(args)
    if args.eval_only or args.eval_teacher:
        check_datasets(cfg)
        check_class_counts(cfg)
        check_evaluators(cfg)
    if args.eval_teacher:
        if not is_distillation(cfg):
            raise ConfigError("--eval-teacher needs a teacher: --teacher-config and --teacher-weights.")
        return evaluate_teacher(cfg)
    if args.eval_only:
        return evaluate_student(DistillTrainer, cfg, args.resume)
    trainer = DistillTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(arguments: list[str] | None = None, description: str | None = __doc__) -> None:
    """Runs the command, in as many processes as its arguments say.

    Args:
        arguments: those of the command line by default.
        description: what `--help` says above them.
    """
    parser = argument_parser()
    parser.description = description
    launch_tool(main, parser.parse_args(arguments))
