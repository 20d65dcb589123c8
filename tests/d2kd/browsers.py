"""A page in a headless Chromium: what a script that is appended to it finds, and what goes wrong meanwhile."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
#: Stands before all scripts of the page.
COLLECT = """<script>
window.problems = [];
window.addEventListener("error", (event) => window.problems.push(String(event.message)));
window.addEventListener("securitypolicyviolation", (event) => window.problems.push("blocked " + event.blockedURI));
console.error = console.warn = (...words) => window.problems.push(words.join(" "));
</script>"""
#: Stands behind them.
DRIVE = """<script>
window.addEventListener("load", async () => {
  const rest = (milliseconds = 60) => new Promise((done) => setTimeout(done, milliseconds));
  const all = (selector) => [...document.querySelectorAll(selector)];
  const seen = {};
  try { await rest(); %s; await rest(); } catch (error) { window.problems.push("driver: " + error.stack); }
  document.body.dataset.seen = JSON.stringify({ ...seen, problems: window.problems, width: innerWidth });
});
</script>"""
#: Windows are never as narrow as a phone, but a frame in them is.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body><iframe width="%d" height="%d" srcdoc="%s"></iframe><script>
setInterval(() => {
  const seen = document.querySelector("iframe").contentDocument.body.dataset.seen;
  if (seen) document.body.dataset.seen = seen;
}, 20);
</script></body>"""


def chromium() -> str | None:
    """The program, that of D2KD_CHROMIUM or of one of the usual names; None where there is none."""
    return os.environ.get("D2KD_CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


def visit(page: Path, script: str, size: tuple[int, int] = (1280, 900)) -> dict[str, Any]:
    """Opens a copy of a page and runs a script, which puts what it finds into `seen`.

    Returns:
        What it has found, with the `width` of the window and the `problems`: errors, warnings, and whatever the page
        wanted to load from elsewhere. Skips the test where no Chromium is found.
    """
    program = chromium()
    if program is None:
        pytest.skip(f"No Chromium found (none of {', '.join(NAMES)}; D2KD_CHROMIUM may name one)")
    text = page.read_text(encoding="utf-8").replace("<style>", COLLECT + "<style>", 1)
    text = text.replace("</body>", DRIVE % script + "</body>")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME % (*size, html.escape(text)), encoding="utf-8")
    # as root, as in containers, there is no sandbox
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--virtual-time-budget=8000"]
    profile = f"--user-data-dir={page.with_name('profile')}"
    command = [program, *flags, profile, "--window-size=1600,1200", "--dump-dom", frame.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'<body[^>]* data-seen="([^"]*)"', ended.stdout)
    assert found, f"the page did not get so far: {ended.stderr[-500:]}"
    return json.loads(html.unescape(found[1]))
