"""gpu.md: a table of every stage whose JSON file is there."""

import json
import time
from pathlib import Path
from typing import Any

from .registry import STAGES


def write_table(output: Path) -> list[str]:
    """Writes DIR/gpu.md; returns the stages that failed."""
    records = [read(output / f"{name}.json") for name in STAGES if (output / f"{name}.json").is_file()]
    lines = ["# On a GPU", "", "| stage | result | machine | torch, CUDA | commit | when | seconds |"]
    lines.append("| --- | --- | --- | --- | --- | --- | ---: |")
    for record in records:
        result = record["status"] + (f": {plain(record['why'])}" if record.get("why") else "")
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(record["started"]))
        lines.append(
            f"| {record['stage']} | {result}{' (dry run)' if record['dry'] else ''} | {record.get('device', '')} | "
            f"{record.get('torch', '')}, {record.get('cuda', '')} | {record.get('commit', '')} | {when} | "
            f"{record.get('seconds', '')} |"
        )
    missing = [name for name in STAGES if name not in [record["stage"] for record in records]]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    for record in records:
        lines += ["", *section(record)]
    temporary = output / "gpu.md.new"
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(output / "gpu.md")
    return [record["stage"] for record in records if record["status"] != "ok"]


def read(path: Path) -> dict[str, Any]:
    """A stage's record; one that cannot be read is a failed one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        broken = {"status": "failed", "why": f"{path.name}: {error}", "dry": False, "rows": []}
        return {"stage": path.stem, "started": path.stat().st_mtime, **broken}


def section(record: dict[str, Any]) -> list[str]:
    """The table of one stage."""
    stage = STAGES[record["stage"]]
    columns = stage.columns
    numbers = {c for c in columns if any(type(row.get(c)) in (int, float) for row in record["rows"])}
    lines = [f"## {stage.name}: {stage.what}", "", f"| {' | '.join(columns)} |"]
    lines.append("|" + "|".join(" ---: " if c in numbers else " --- " for c in columns) + "|")
    for row in record["rows"]:
        cells = [plain(row.get(column)) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plain(value: Any) -> str:
    """A cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "\\|")
