"""Text files that people write by hand, or with the programs of their systems."""

from collections.abc import Callable


def read_text(path: str, error: Callable[[str], Exception]) -> str:
    """Returns the content of a text file in UTF-8, with or without the mark that Windows puts in front.

    Args:
        path: of a local file.
        error: makes an error of a message.

    Raises:
        Exception: by `error`; it cannot be read, or is in another encoding.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason.strerror or reason}).") from reason
    except UnicodeDecodeError as reason:
        line = reason.object.count(b"\n", 0, reason.start) + 1
        raise error(f"{path} is no UTF-8 text, first in line {line}: save it in that encoding.") from reason
