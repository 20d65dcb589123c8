"""Memory that a step frees is there for the next one."""

import ctypes
import os
import subprocess
import sys

import pytest

STEPS = """
import ctypes, resource, sys, torch
from d2kd.engine.host_memory import reuse_freed_memory

class Account(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

account = ctypes.CDLL(None).mallinfo2
account.restype = Account

def step():
    before = account().hblkhd
    block = torch.ones(7 * 2 ** 20)  # 28 MiB
    return account().hblkhd - before

print(int(reuse_freed_memory()) if sys.argv[1] == "reuse" else 0)
print(step())
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def steps(mode: str, **environment: str) -> tuple[bool, int, int]:
    """Whether something was changed, the bytes that a step gets as mappings of their own, the pages that eight get."""
    run = subprocess.run(
        [sys.executable, "-c", STEPS, mode], capture_output=True, text=True, check=True, env={**_clean(), **environment}
    )
    changed, mapped, pages = map(int, run.stdout.split())
    return bool(changed), mapped, pages


def _clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def glibc() -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("another C library, or a glibc before 2.33")


def test_a_step_gets_the_memory_of_the_one_before():
    # whether pages go back without it depends on what lies behind them in the heap; where blocks come from does not
    _, mapped, _ = steps("leave")
    assert mapped >= 28 * 2**20
    changed, mapped, pages = steps("reuse")
    assert changed and mapped == 0
    assert pages <= 2 * 28 * 2**20 / 4096  # of eight steps, as the heap may grow once more


def test_what_the_user_said_stays():
    assert not steps("reuse", MALLOC_ARENA_MAX="2")[0]
    assert not steps("reuse", GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072")[0]
