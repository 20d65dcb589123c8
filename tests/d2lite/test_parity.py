"""d2lite against behavior recorded from Detectron2: models and components."""

import sys
from pathlib import Path

import PIL
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from recorded import components, models

# The release of Pillow that the recordings were made with.
RECORDED_PILLOW = 13
PARITY = Path(__file__).parents[1] / "data" / "parity"
MODELS = sorted(path.parent.name for path in PARITY.glob("*/fixture.json"))
COMPONENTS = models.read_json(PARITY / "components" / "components.json")["components"]


def check(report: models.Report) -> None:
    assert report.checked > 0 and not report.bad, "\n".join(f"{key}: {message}" for key, message in report.bad[:20])


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    report = models.Report()
    models.run_fixture(str(PARITY / name), report)
    check(report)


@pytest.mark.parametrize("name", COMPONENTS)
def test_component(name: str) -> None:
    report = models.Report()
    components.run_component(str(PARITY / "components" / name), report)
    if int(PIL.__version__.split(".")[0]) < RECORDED_PILLOW:  # bicubic resampling was rounded differently before
        report.bad = [(key, message) for key, message in report.bad if not key.startswith("resize_bicubic/")]
    check(report)


def test_every_recording_is_used() -> None:
    assert len(MODELS) >= 8
    assert set(COMPONENTS) == set(components.COMPONENTS)
