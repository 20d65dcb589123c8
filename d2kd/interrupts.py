"""Ctrl-C while programs still import what they need: one line, instead of a traceback from inside a library."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any


@contextlib.contextmanager
def ending_at_interrupts() -> Iterator[None]:
    """Lets Ctrl-C end the process at once with status 130, until the block ends or `raise_interrupts` is called.

    Nothing is done by then that would need to be undone. An exception would not do: it would arise within an import,
    and extension modules make others of it.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        raise_interrupts()


def raise_interrupts() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again where it ends the process, or is held back.

    Raises:
        KeyboardInterrupt: it has come while it was held back.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _HAS_MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


@contextlib.contextmanager
def held_back_in_new_processes(handle: Callable[[int, Any], None] | None = None) -> Iterator[None]:
    """Holds Ctrl-C back in processes that are started within the block, until they call `raise_interrupts`.

    Args:
        handle: what is done in this process at Ctrl-C meanwhile, in another thread; None holds it back here too, which
            is for blocks that take no time.
    """
    if not _HAS_MASKS or threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # else the start of a process does it, which lets Ctrl-C through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    ended = threading.Event()

    def wait() -> None:
        while True:
            number = signal.sigwait([signal.SIGINT])
            if ended.is_set():
                return
            if handle is not None:
                handle(number, None)

    waiting = threading.Thread(target=wait, daemon=True)
    if handle is not None:
        waiting.start()
    try:
        yield
    finally:
        if waiting.ident is not None:
            ended.set()
            signal.pthread_kill(waiting.ident, signal.SIGINT)
            waiting.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


#: Not on Windows.
_HAS_MASKS = hasattr(signal, "pthread_sigmask")


def _end(number: int, frame: Any) -> None:
    print("Interrupted.", file=sys.stderr, flush=True)
    os._exit(128 + number)
