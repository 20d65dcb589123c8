"""Learns the receptive tokens of a teacher: the first stage of ReceptiveTokens.

%(prog)s --config-file teacher.yaml MODEL.WEIGHTS teacher.pth OUTPUT_DIR output/tokens
d2kd train --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth \\
    --method ReceptiveTokens DISTILL.RECEPTIVE_TOKENS.FILE output/tokens/tokens.pth
"""

import argparse

from d2kd.engine import add_import_argument, launch_tool, setup
from d2kd.errors import ConfigError
from d2kd.token_learning import TokenTrainer
from detectron2.engine import default_argument_parser


def main(args: argparse.Namespace) -> None:
    """One process of the run."""
    if args.eval_only:
        raise ConfigError("--eval-only: tokens are not evaluated; see the pictures in OUTPUT_DIR/masks.")
    trainer = TokenTrainer(setup(args))
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def run(arguments: list[str] | None = None) -> None:
    """Runs the command with its arguments, by default those of the command line, in as many processes as they say."""
    parser = default_argument_parser()
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.set_defaults(teacher_config=None, teacher_weights=None, method=None)  # the teacher is --config-file here
    add_import_argument(parser)
    launch_tool(main, parser.parse_args(arguments))
