"""Learns the receptive tokens of a teacher: the first stage of ReceptiveTokens.

%(prog)s --config-file teacher.yaml MODEL.WEIGHTS teacher.pth OUTPUT_DIR output/tokens
d2kd train --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth \\
    --method ReceptiveTokens DISTILL.RECEPTIVE_TOKENS.FILE output/tokens/tokens.pth
"""

import argparse

from d2kd.arguments import add_run_arguments, run_parser
from d2kd.errors import ConfigError

from .mistakes import stop_at_mistakes


def main(args: argparse.Namespace) -> None:
    """One process of the run."""
    from d2kd.engine import setup_training
    from d2kd.token_learning import TokenTrainer

    if args.eval_only:
        raise ConfigError("--eval-only: tokens are not evaluated; see the pictures in OUTPUT_DIR/masks.")
    if args.weights:
        args.opts = ["MODEL.WEIGHTS", args.weights, *args.opts]
    with setup_training(args) as cfg:
        trainer = TokenTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line, in as many processes as they say."""
    parser = run_parser(__doc__)
    parser.set_defaults(teacher_config=None, teacher_weights=None, method=None)  # the teacher is --config-file here
    parser.add_argument(
        "--teacher-weights", dest="weights", metavar="FILE", help="checkpoint of the teacher (MODEL.WEIGHTS)"
    )
    add_run_arguments(parser)
    args = parser.parse_args(arguments)
    stop_at_mistakes(args)
    from d2kd.engine import launch_tool

    launch_tool(main, args)
