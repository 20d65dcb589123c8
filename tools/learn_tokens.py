#!/usr/bin/env python
"""Learns the receptive tokens of a teacher: the first stage of ReceptiveTokens.

python tools/learn_tokens.py --config-file teacher.yaml MODEL.WEIGHTS teacher.pth OUTPUT_DIR output/tokens
python tools/train_net.py --config-file student.yaml --teacher-config teacher.yaml --teacher-weights teacher.pth \\
    --method ReceptiveTokens DISTILL.RECEPTIVE_TOKENS.FILE output/tokens/tokens.pth
"""

from d2kd.cli.learn_tokens import run

if __name__ == "__main__":
    run(description=__doc__)
