#!/usr/bin/env python
"""Learns the receptive tokens of a teacher: the first stage of ReceptiveTokens.

python tools/learn_tokens.py --config-file teacher.yaml MODEL.WEIGHTS teacher.pth OUTPUT_DIR output/tokens
python tools/train_net.py --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth \\
    --method ReceptiveTokens DISTILL.RECEPTIVE_TOKENS.FILE output/tokens/tokens.pth
"""

import argparse

import d2kd  # noqa: F401  (makes `detectron2` importable)
from d2kd.engine import ConfigError, TokenTrainer, launch_tool, setup
from detectron2.engine import default_argument_parser


def main(args: argparse.Namespace) -> None:
    """One process of the run."""
    if args.eval_only:
        raise ConfigError("--eval-only: tokens are not evaluated; see the pictures in OUTPUT_DIR/masks.")
    trainer = TokenTrainer(setup(args))
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    parser = default_argument_parser()
    parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
    parser.set_defaults(teacher_config=None, teacher_weights=None, method=None)  # the teacher is --config-file here
    launch_tool(main, parser.parse_args())
