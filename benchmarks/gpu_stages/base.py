"""A stage, what it may use, and the file that it writes."""

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
#: How much of the end of a failed program's output a row has.
TAIL = 400


class Recorder:
    """Writes STAGE.json: what ran, where, and a row for each result, as they come."""

    def __init__(self, output: Path, name: str, dry: bool) -> None:
        self.path = output / f"{name}.json"
        self.name = name
        self.dry = dry

    def start(self) -> None:
        """Begins anew."""
        record = {"stage": self.name, "status": "running", "dry": self.dry, "started": time.time(), "rows": []}
        self._write(record)

    def describe(self, **facts: Any) -> None:
        """Adds facts to the head."""
        self._write({**self.read(), **facts})

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row; `ok` is false where something went wrong."""
        record = self.read()
        record["rows"].append({"ok": True, **row})
        self._write(record)

    def finish(self, why: str = "") -> None:
        """Ends the record, with a reason where the stage did not come to its end."""
        record = self.read()
        bad = sum(not row["ok"] for row in record["rows"])
        reasons = [why] if why else []
        reasons += [f"{bad} of {len(record['rows'])} failed"] if bad else []
        reasons += ["nothing was measured"] if not record["rows"] and not why else []
        seconds = round(time.time() - record["started"], 1)
        status = "failed" if reasons else "ok"
        self._write({**record, "status": status, "why": "; ".join(reasons), "seconds": seconds})

    def read(self) -> dict[str, Any]:
        """What the file has."""
        return json.loads(self.path.read_text(encoding="utf-8"))

    def _write(self, record: Mapping[str, Any]) -> None:
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


@dataclass
class Context:
    """What a stage may use.

    Attributes:
        output: folder of all stages.
        folder: of this stage's runs.
        dry: on the CPU, as little as possible.
        device: "cuda" or "cpu".
        end: when the stage must have ended, by `time.monotonic`.
        record: takes the rows.
    """

    output: Path
    folder: Path
    dry: bool
    device: str
    end: float
    record: Callable[[Mapping[str, Any]], None]

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def run(
        self, command: Sequence[Any], name: str = "", limit: float | None = None, environment: Mapping[str, str] = {}
    ) -> tuple[int, str]:
        """Runs a Python program of this project until it ends or the stage's time does.

        Args:
            command: the program, a path or `-m NAME`, and its arguments.
            name: of the file in `folder` for what it prints on stderr.
            limit: seconds.
            environment: changes to the environment.

        Returns:
            The exit status, -1 where it was stopped, and what it printed on stdout.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        name = name or "program"
        # a pytest that this runs in must not make the tests of a stage its own
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        variables = {**inherited, **self.environment(), **environment}
        out, err = self.folder / f"{name}.out", self.folder / f"{name}.err"
        with open(out, "w", encoding="utf-8") as output, open(err, "w", encoding="utf-8") as errors:
            start = forked if self.dry and str(command[0]).endswith(".py") else started
            process = start([str(x) for x in command], variables, output, errors)
            _running.add(process.pid)
            try:
                code = process.wait(max(1.0, min(limit or self.left, self.left)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = -1
            finally:
                _running.discard(process.pid)
        return code, out.read_text(encoding="utf-8", errors="replace")

    def lines(self, command: Sequence[Any], name: str, **run: Any) -> tuple[list[dict[str, Any]], str]:
        """Runs a program that prints JSON lines; returns them, and what went wrong."""
        code, out = self.run(command, name, **run)
        found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return found, "" if code == 0 else self.failure(code, name)

    def failure(self, code: int, name: str) -> str:
        """Why a program failed: the end of what it printed."""
        errors = (self.folder / f"{name}.err").read_text(encoding="utf-8", errors="replace").strip()
        return f"status {code}: {errors[-TAIL:]}" if code >= 0 else "stopped: out of time"

    def side_by_side(self, calls: Sequence[Callable[[], None]], jobs: int) -> None:
        """Runs calls in threads; those whose turn comes after the end are left out, and say so themselves."""
        with ThreadPoolExecutor(jobs) as pool:
            for result in [pool.submit(call) for call in calls]:
                result.result()

    def environment(self) -> dict[str, str]:
        """For the programs: this copy of d2kd, data, and no GPU in a dry run."""
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
        found = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
        found["DETECTRON2_DATASETS"] = str(self.datasets)
        if self.dry:
            found.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        else:
            found.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
        return found

    @property
    def datasets(self) -> Path:
        """The folder of datasets; that of a dry run is made of a few images."""
        return self.output / "datasets" if self.dry else ROOT / "datasets"

    def prepare_data(self) -> None:
        """Builds PhotoDigits where it is not there.

        Raises:
            RuntimeError: it cannot be built.
        """
        small = (
            ["--num-train", 16, "--num-val", 4, "--num-test", 4, "--image-size", 64, "--crop-size", 32]
            if self.dry
            else []
        )
        target = self.datasets / "photo_digits"
        code, _ = self.run(["datasets/prepare_photo_digits.py", "--output", target, *small], "data")
        if code:
            raise RuntimeError(f"PhotoDigits: {self.failure(code, 'data')}")


#: The programs of now, each with a session of its own.
_running: set[int] = set()


def end_programs_when_terminated() -> None:
    """Has SIGTERM end the programs of a stage before this process."""
    signal.signal(signal.SIGTERM, _end_all)


def _end_all(*_: Any) -> None:
    for pid in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(128 + signal.SIGTERM)


def started(command: list[str], environment: Mapping[str, str], out: IO[str], err: IO[str]) -> Any:
    """Starts a program in a session of its own, which can be ended with all that it starts."""
    options = {"cwd": ROOT, "env": environment, "stdout": out, "stderr": err}
    return subprocess.Popen([sys.executable, *command], start_new_session=True, **options)  # type: ignore[call-overload]


def forked(command: list[str], environment: Mapping[str, str], out: IO[str], err: IO[str]) -> Any:
    """The same in a copy of this process, which has imported PyTorch: what a dry run takes most time for."""
    process = multiprocessing.get_context("fork").Process(target=_play, args=(command, environment, out, err))
    process.start()
    return _Forked(process)


class _Forked:
    """`subprocess.Popen`, as far as it is needed."""

    def __init__(self, process: Any) -> None:
        self.process, self.pid = process, process.pid

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return self.process.exitcode


def _play(command: list[str], environment: Mapping[str, str], out: IO[str], err: IO[str]) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.update(environment)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = command
    sys.path[0] = str((ROOT / command[0]).parent)
    import torch

    torch.set_num_threads(1)
    code: Any = 0
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


@dataclass(frozen=True)
class Stage:
    """A part of the benchmark.

    Attributes:
        name: as on the command line; what stands before a dash names a group.
        what: one line about it.
        run: measures, and records rows.
        columns: of its table, keys of the rows.
    """

    name: str
    what: str
    run: Callable[[Context], None]
    columns: tuple[str, ...]

    def work(self, output: Path, dry: bool, limit: float) -> int:
        """Runs in this process; returns the exit status."""
        record = Recorder(output, self.name, dry)
        try:
            record.describe(**environment(dry))
            device = "cpu" if dry else "cuda"
            context = Context(output, output / self.name, dry, device, time.monotonic() + limit, record.add)
            self.run(context)
        except Exception:
            traceback.print_exc()
            return 1
        return 0


def environment(dry: bool) -> dict[str, Any]:
    """Where this runs.

    Raises:
        RuntimeError: there is no GPU, and it is not a dry run.
    """
    import torch

    from d2kd.evaluation.report import describe_environment

    if not dry and not torch.cuda.is_available():
        raise RuntimeError("There is no CUDA device here: --dry runs the same on the CPU.")
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return {"commit": commit, "cuda": torch.version.cuda or "none", **describe_environment()}
