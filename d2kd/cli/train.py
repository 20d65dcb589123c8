"""Trains or evaluates a Detectron2 model, by distillation where a teacher is given.

d2kd train --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth
d2kd eval --config-file student.yaml MODEL.WEIGHTS output/model_final.pth
"""

import argparse
from typing import Any

from d2kd.data.datasets import check_class_counts, check_datasets
from d2kd.engine import ConfigError, DistillTrainer, argument_parser, evaluate_teacher, launch_tool, setup
from d2kd.evaluation.build import check_evaluators
from d2kd.files import find_config
from d2kd.modeling import build_network, is_distillation, load_strictly
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm


def evaluate_student(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    """Evaluates `MODEL.WEIGHTS`, or with `resume` the last checkpoint of `OUTPUT_DIR`; every key must fit."""
    last = DetectionCheckpointer(None, cfg.OUTPUT_DIR)
    path = last.get_checkpoint_file() if resume and last.has_checkpoint() else cfg.MODEL.WEIGHTS
    if not path:
        raise ConfigError(
            "--eval-only has nothing to evaluate: give MODEL.WEIGHTS, or --resume for the last checkpoint of "
            "OUTPUT_DIR."
        )
    model = build_network(cfg, "--config-file")
    load_strictly(model, path, "student", "--config-file and MODEL.WEIGHTS")
    results = dict(DistillTrainer.test(cfg, model))
    if cfg.TEST.AUG.ENABLED:
        results.update(DistillTrainer.test_with_tta(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


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
        return evaluate_student(cfg, args.resume)
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
    args = parser.parse_args(arguments)
    args.config_file = find_config(args.config_file)
    if args.teacher_config:
        args.teacher_config = find_config(args.teacher_config)
    launch_tool(main, args)
