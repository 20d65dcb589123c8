"""Trains or evaluates a Detectron2 model, by distillation where a teacher is given.

%(prog)s --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth
%(prog)s --config-file student.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
%(prog)s --config-file student.yaml --eval-only --eval-teacher MODEL.WEIGHTS output/model_final.pth
"""

import argparse
from typing import Any

from d2kd.engine import (
    DistillTrainer,
    argument_parser,
    evaluate_student,
    evaluate_teacher,
    evaluate_teacher_and_student,
    launch_tool,
    locked,
    setup,
)
from d2kd.errors import ConfigError
from d2kd.modeling import is_distillation


def main(args: argparse.Namespace) -> Any:
    """One process of the run."""
    cfg = setup(args)
    if args.eval_only or args.eval_teacher:
        DistillTrainer.check_config(cfg, ("TEST",))
    if args.eval_teacher:
        if not is_distillation(cfg):
            raise ConfigError("--eval-teacher needs a teacher: --teacher-config and --teacher-weights.")
        if args.eval_only:
            return evaluate_teacher_and_student(DistillTrainer, cfg, args.resume)
        return evaluate_teacher(DistillTrainer, cfg)
    if args.eval_only:
        return evaluate_student(DistillTrainer, cfg, args.resume)
    with locked(cfg.OUTPUT_DIR):
        trainer = DistillTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line, in as many processes as they say."""
    parser = argument_parser()
    parser.description = __doc__
    launch_tool(main, parser.parse_args(arguments))
