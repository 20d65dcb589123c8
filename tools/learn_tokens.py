#!/usr/bin/env python
"""Learns the receptive tokens of a teacher, the first stage of ReceptiveTokens: the same as `d2kd learn-tokens`."""

from d2kd.cli.learn_tokens import run
from d2kd.interrupts import ending_at_interrupts

if __name__ == "__main__":
    with ending_at_interrupts():
        run()
