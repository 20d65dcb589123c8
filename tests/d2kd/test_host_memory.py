"""Memory that a step frees is there for the next one."""

import os
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from d2kd.engine.host_memory import reuse_freed_memory

def step():
    parts = [torch.ones(2 ** 20) for _ in range(16)]  # 64 MiB, in blocks of 4

print(int(reuse_freed_memory()) if sys.argv[1] == "reuse" else 0)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **environment: str) -> tuple[int, int]:
    run = subprocess.run(
        [sys.executable, "-c", STEPS, mode], capture_output=True, text=True, check=True, env={**_clean(), **environment}
    )
    changed, count = map(int, run.stdout.split())
    return changed, count


def _clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_pages_are_not_given_anew_every_step():
    (_, before), (changed, after) = faults("leave"), faults("reuse")
    if not changed:
        pytest.skip("another C library")
    assert before > 10_000 and after < before / 20


def test_what_the_user_said_stays():
    assert faults("reuse", MALLOC_ARENA_MAX="2")[0] == 0
    assert faults("reuse", GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")[0] == 0
