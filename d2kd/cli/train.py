"""Trains or evaluates a Detectron2 model, by distillation where a teacher is given.

%(prog)s --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth
%(prog)s --config-file student.yaml --check
%(prog)s --config-file student.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
%(prog)s --config-file student.yaml --eval-only --eval-teacher MODEL.WEIGHTS output/model_final.pth
"""

import argparse
from typing import Any

from d2kd.arguments import argument_parser
from d2kd.errors import ConfigError

from .mistakes import stop_at_mistakes


def main(args: argparse.Namespace) -> Any:
    """One process of the run."""
    from d2kd import engine
    from d2kd.modeling import is_distillation

    trainer_class = engine.DistillTrainer
    if args.check:
        return engine.check_run(trainer_class, args)
    if not (args.eval_only or args.eval_teacher):
        with engine.setup_training(args) as cfg:
            trainer = trainer_class(cfg)
            trainer.resume_or_load(resume=args.resume)
            return trainer.train()
    cfg = engine.setup(args)
    trainer_class.check_config(cfg, ("TEST",))
    if args.eval_teacher:
        if not is_distillation(cfg):
            raise ConfigError("--eval-teacher needs a teacher: --teacher-config and --teacher-weights.")
        if args.eval_only:
            return engine.evaluate_teacher_and_student(trainer_class, cfg, args.resume)
        return engine.evaluate_teacher(trainer_class, cfg)
    return engine.evaluate_student(trainer_class, cfg, args.resume)


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line, in as many processes as they say."""
    args = argument_parser(__doc__).parse_args(arguments)
    stop_at_mistakes(args)
    from d2kd.engine import launch_tool

    launch_tool(main, args)
