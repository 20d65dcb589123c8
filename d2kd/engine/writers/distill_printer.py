"""The lines of the log that tell what every method adds on every level."""

import logging

from detectron2.utils.events import EventWriter, get_event_storage

logger = logging.getLogger(__name__)

#: Scalars shown, by the first part of their name, and what the line calls them.
_SHOWN = {
    "distill": "",
    "gradient_share": "gradient share",
    "gradient_cosine": "cosine with the task's gradient",
    "schedule": "schedule",
    "guard": "guard",
}


class DistillPrinter(EventWriter):
    """Logs one line a period, such as "FeatureMimic: p3 1.2, p4 0.8  gradient share: task 0.4, FeatureMimic 0.6".

    Losses are medians over the period; shares are there when `DISTILL.LOG_GRADIENT_SHARE` asks for them, and the factor
    on each method's weight when `DISTILL.SCHEDULE` has one.
    """

    def __init__(self, window_size: int = 20) -> None:
        """
        Args:
            window_size: iterations that the medians run over.
        """
        self._window_size = window_size
        self._last = -1

    def write(self) -> None:
        """Logs what is newer than the last line."""
        storage = get_event_storage()
        groups: dict[str, list[str]] = {}
        scalars = storage.latest_with_smoothing_hint(self._window_size)
        for kind, title in _SHOWN.items():
            for name, (value, iteration) in scalars.items():
                if name.startswith(f"{kind}/") and iteration > self._last:
                    group, _, what = name[len(kind) + 1 :].rpartition("/")
                    groups.setdefault(title or group, []).append(f"{what} {value:.4g}")
        self._last = storage.iter
        if groups:
            logger.info(" %s", "  ".join(f"{group}: {', '.join(values)}" for group, values in groups.items()))
