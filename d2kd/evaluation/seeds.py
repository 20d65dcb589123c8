"""Several seeds of a run as one model of a report: their means, and paired differences with intervals."""

import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from d2kd.config import add_distill_config
from d2kd.evaluation.image_bootstrap import DETECTIONS, bootstrap_difference, coco_matches
from d2kd.evaluation.results import ModelResult, ResultError, load_result
from d2kd.evaluation.statistics import CONFIDENCE, Estimate, estimate, gap_closure, paired_difference
from d2kd.evaluation.tasks import split_variant
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog

logger = logging.getLogger(__name__)

#: Differences over drawn images, by the names of the models.
Drawn = Mapping[tuple[str, str], Estimate]

#: Keys in which the runs of a model may differ.
OF_A_SEED = {"SEED", "OUTPUT_DIR"}


def load_seeds(
    name: str, directories: Sequence[str], label: str = "", dataset_name: str | None = None, task: str = "bbox"
) -> ModelResult:
    """Reads the OUTPUT_DIRs of one run for several seeds, or of a single run; arguments as of `load_result`.

    Raises:
        ResultError: see `load_result`; or two runs have the same seed, or differ in more than it.
    """
    runs = [load_result(name, directory, label, dataset_name, task) for directory in directories]
    if len(runs) == 1:
        return runs[0]
    places: dict[int, str] = {}
    for run, directory in zip(runs, directories):
        if run.seed is None or run.seed < 0:
            raise ResultError(f"Run {name!r}: {directory} has no seed of its own (SEED), by which runs are paired.")
        if run.seed in places:
            raise ResultError(f"Run {name!r}: {places[run.seed]} and {directory} have the same seed, {run.seed}.")
        places[run.seed] = directory
        differences = sorted(_differences(runs[0], run))
        if differences:
            more = f", and {len(differences) - 1} more" if len(differences) > 1 else ""
            raise ResultError(
                f"Run {name!r}: {directories[0]} and {directory} differ in more than the seed: {differences[0]}{more}. "
                "Give runs of another kind a --run NAME of their own."
            )
    return merge_seeds(sorted(runs, key=lambda run: run.seed or 0))


def merge_seeds(runs: Sequence[ModelResult]) -> ModelResult:
    """One model whose metrics and training time are the means of several runs; the rest is that of the first one."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    metrics = {name: statistics.fmean(run.metrics.get(name, math.nan) for run in runs) for name in names}
    wall_time = _mean([run.wall_time_s for run in runs])
    teacher_time = _mean([run.teacher_time_s for run in runs])
    return replace(
        runs[0], metrics=metrics, wall_time_s=wall_time, teacher_time_s=teacher_time, seed=None, runs=tuple(runs)
    )


def _mean(times: Sequence[float | None]) -> float | None:
    known = [time for time in times if time is not None]
    return statistics.fmean(known) if known and len(known) == len(times) else None


def compare_seeds(models: Mapping[str, ModelResult], metric: str, drawn: Drawn | None = None) -> dict[str, Any]:
    """What several seeds say about a metric: means, and differences of runs that share a seed.

    Args:
        models: by name.
        metric: what is compared.
        drawn: differences over drawn images, which stand in where two models do not share several seeds.

    Returns:
        `seeds`, None where every model is a single run and nothing is drawn; else, by the name of a model, `mean`,
        `over_baseline`, `over_inherit` and `gap_closure` with their bounds, as `Estimate` has them. Where the distilled
        student and the baseline share seeds, also `gain`, `gap_closure` and `gap_closure_note` (see `compare`), and
        likewise `inherit_gain`, of these seeds alone.
    """
    drawn = drawn or {}
    if not drawn and not any(model.runs for model in models.values()):
        return {"seeds": None}
    values = {name: model.by_seed(metric) for name, model in models.items()}
    baseline, inherit = values.get("baseline", {}), values.get("inherit", {})
    teacher = models["teacher"].metrics.get(metric, math.nan) if "teacher" in models else math.nan
    students = [name for name in models if name != "teacher"]
    others = [name for name in students if name != "baseline"]
    found = {
        "mean": {name: estimate(list(of_model.values())) for name, of_model in values.items()},
        "over_baseline": {n: drawn.get((n, "baseline")) or paired_difference(values[n], baseline) for n in others},
        "over_inherit": {
            n: drawn.get((n, "inherit")) or paired_difference(values[n], inherit) for n in others if n != "inherit"
        },
        "gap_closure": {name: gap_closure(values[name], baseline, teacher) for name in others},
    }
    described = {key: {name: _described(x) for name, x in of_model.items()} for key, of_model in found.items()}
    seeds = {"confidence": CONFIDENCE, "values": values, **described}
    gain, inherit_gain = (found["over_baseline"].get(name) for name in ("distilled", "inherit"))
    gains = {key: x.mean for key, x in (("gain", gain), ("inherit_gain", inherit_gain)) if x is not None}
    if not (values.get("distilled", {}).keys() & baseline.keys() and math.isfinite(teacher)):  # as `compare` has it
        return {"seeds": seeds, **gains}
    closure, note = found["gap_closure"].get("distilled"), ""
    if closure is None:
        note = "Gap closure is not defined: in the seeds of both the teacher is not better than the baseline."
    return {"seeds": seeds, **gains, "gap_closure": closure and closure.mean, "gap_closure_note": note}


def draw_images(models: Mapping[str, ModelResult], dataset_name: str, task: str, drawings: int) -> Drawn:
    """Differences of AP, with their intervals over drawn images, of single runs against baseline and inherit only.

    Returns:
        Nothing where models have no detections on a dataset in COCO's format.
    """
    annotations = MetadataCatalog.get(dataset_name).get("json_file")
    single = {name: model.predictions_file for name, model in models.items() if not model.runs and name != "teacher"}
    if split_variant(task)[0] not in ("bbox", "segm") or annotations is None:
        logger.warning("--drawings is for boxes and masks on a dataset in COCO's format: no images are drawn.")
        return {}
    matches = {
        name: coco_matches(annotations, file, split_variant(task)[0], _detections_per_image(models[name]))
        for name, file in single.items()
        if file is not None
    }
    pairs = [(n, other) for other in ("baseline", "inherit") for n in matches if n not in ("baseline", other)]
    drawn = {
        (n, other): bootstrap_difference(matches[n], matches[other], drawings) for n, other in pairs if other in matches
    }
    return {pair: found for pair, found in drawn.items() if found is not None}


def estimate_in(report: Mapping[str, Any], key: str, name: str) -> Estimate | None:
    """An estimate of `compare_seeds` in the content of report.json; None where there is none."""
    found = ((report.get("seeds") or {}).get(key) or {}).get(name)
    return Estimate(**{k: v for k, v in found.items() if k != "within_noise"}) if found else None


def mean_of_shared(report: Mapping[str, Any], name: str, other: str, otherwise: float) -> float:
    """A model's mean over the seeds that it shares with another one, as differences are; else `otherwise`."""
    values = (report.get("seeds") or {}).get("values", {})
    shared = [value for seed, value in values.get(name, {}).items() if seed in values.get(other, {})]
    found = estimate([math.nan if value is None else value for value in shared])
    return otherwise if found is None else found.mean


def _described(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "within_noise": found.within_noise}


def _detections_per_image(model: ModelResult) -> int:
    """What the evaluation has counted, by the configuration that lies nearest to its predictions."""
    nearest = [folder / "config.yaml" for folder in Path(model.predictions_file or "").parents[:3]]
    file = next((str(path) for path in nearest if path.is_file()), model.config_file)
    return int(_settings(replace(model, config_file=file)).get("TEST.DETECTIONS_PER_IMAGE", DETECTIONS))


def _differences(first: ModelResult, second: ModelResult) -> Iterator[str]:
    """What two runs do not share, beside what a seed may change, in words."""
    ours, theirs = (_settings(model) for model in (first, second))
    if set(ours) != set(theirs):
        logger.warning("Run %r: seeds were trained by different versions of d2kd, as to their keys.", first.name)
        cfg = get_cfg()
        add_distill_config(cfg)
        defaults = dict(_flat(yaml.safe_load(cfg.dump())))  # what a version without the key did
        ours, theirs = {**defaults, **ours}, {**defaults, **theirs}
    for key in set(ours) & set(theirs) - OF_A_SEED:
        if ours[key] != theirs[key]:
            yield f"{key} is {ours[key]} and {theirs[key]}"


def _settings(model: ModelResult) -> dict[str, Any]:
    """Every key of a run's configuration with its value, and what its result tells."""
    known = ("iterations", "images_per_batch", "params")
    told = {name: getattr(model, name) for name in known}
    if model.config_file is None:
        return told
    try:
        content = yaml.safe_load(Path(model.config_file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ResultError(f"Run {model.name!r}: {model.config_file} cannot be read ({error}).") from error
    settings = dict(_flat(content))
    used = [*settings.get("DATASETS.TRAIN", ()), *settings.get("DATASETS.TEST", ())]
    register = settings.get("DATASETS.REGISTER", ())
    settings["DATASETS.REGISTER"] = [entry for entry in register if entry["NAME"] in used]
    return {**settings, **told}


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content
