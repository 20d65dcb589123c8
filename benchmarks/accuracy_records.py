"""What finished runs of benchmarks/accuracy.py scored, kept in the repository: runs go with their machine."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d2kd.files import write_json

logger = logging.getLogger("d2kd.benchmarks.accuracy")

FILE = Path("benchmarks/results/accuracy.json")


class Run(NamedTuple):
    """A finished run: its scores by split, and the commit that it was started at."""

    scores: dict[str, float]
    commit: str


class Records:
    """The recorded runs of one table: by row their command and, by seed, what `Run` has.

    Runs stand in one table only where dataset and teacher are the same. Both are compared by what they come to: the
    dataset's checksum, and the teacher's scores to the last bit, which two trainings do not share by chance.
    """

    def __init__(self, table: str, file: Path = FILE) -> None:
        self.table = table
        self.file = file
        self.content: dict[str, Any] = self._read().get(table, {"dataset": "", "teacher": {}, "rows": {}})

    def _read(self) -> dict[str, Any]:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}

    def fits(self, dataset: str, teacher: Mapping[str, float]) -> bool:
        """Whether what is recorded is of this dataset and teacher; a teacher that was not trained ({}) fits any."""
        return self.content["dataset"] == dataset and (not teacher or teacher == self.content["teacher"])

    def runs(self, row: str, command: Sequence[str]) -> dict[int, Run]:
        """The recorded runs of a row by seed; {} where `command`, if there is one, is not theirs."""
        found = self.content["rows"].get(row, {"command": [], "seeds": {}})
        if command and found["seeds"] and found["command"] != list(command):
            logger.warning("%s: the recorded seeds were made by another command: left out", row)
            return {}
        return {int(seed): Run(**run) for seed, run in found["seeds"].items()}

    def write(
        self, dataset: str, teacher: Mapping[str, float], rows: Mapping[str, tuple[Sequence[str], Mapping[int, Run]]]
    ) -> None:
        """Adds runs, by row their command and, by seed, themselves.

        What was recorded of another dataset or teacher, and of another command of the same row, is replaced.
        """
        if not self.fits(dataset, teacher):
            if self.content["rows"]:
                logger.warning("%s: what was recorded of another teacher or dataset is replaced", self.table)
            self.content = {"dataset": dataset, "teacher": {}, "rows": {}}
        self.content["teacher"] = dict(teacher) or self.content["teacher"]
        for name, (command, runs) in rows.items():
            every = {**self.runs(name, command), **runs}
            seeds = {str(seed): every[seed]._asdict() for seed in sorted(every)}
            self.content["rows"][name] = {"command": list(command), "seeds": seeds}
        write_json(self.file, {**self._read(), self.table: self.content})
