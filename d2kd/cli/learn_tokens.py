"""Learns the receptive tokens of a teacher: the first stage of ReceptiveTokens.

%(prog)s --config-file teacher.yaml MODEL.WEIGHTS teacher.pth OUTPUT_DIR output/tokens
d2kd train --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth \\
    --method ReceptiveTokens DISTILL.RECEPTIVE_TOKENS.FILE output/tokens/tokens.pth
"""

import argparse

from d2kd.engine import add_run_arguments, launch_tool, locked, setup
from d2kd.errors import ConfigError
from d2kd.token_learning import TokenTrainer
from detectron2.engine import default_argument_parser


def main(args: argparse.Namespace) -> None:
    """One process of the run."""
    if args.eval_only:
        raise ConfigError("--eval-only: tokens are not evaluated; see the pictures in OUTPUT_DIR/masks.")
    if args.weights:
        args.opts = ["MODEL.WEIGHTS", args.weights, *args.opts]
    cfg = setup(args)
    with locked(cfg.OUTPUT_DIR):
        trainer = TokenTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line, in as many processes as they say."""
    parser = default_argument_parser()
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.set_defaults(teacher_config=None, teacher_weights=None, method=None)  # the teacher is --config-file here
    parser.add_argument(
        "--teacher-weights", dest="weights", metavar="FILE", help="checkpoint of the teacher (MODEL.WEIGHTS)"
    )
    add_run_arguments(parser)
    launch_tool(main, parser.parse_args(arguments))
