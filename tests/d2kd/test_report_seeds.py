"""Reports of several seeds: means, paired differences, noise, and runs that are no seeds of one another."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml
from detections import made
from runs import forget

from d2kd.cli.report import run
from d2kd.evaluation.results import ResultError, load_result
from d2kd.evaluation.seeds import load_seeds
from d2kd.files import file_checksum
from detectron2.data import DatasetCatalog, MetadataCatalog


def write_run(folder: Path, ap: float, seed: int, **changes: object) -> Path:
    """A finished run on the dataset "val", without pictures."""
    folder.mkdir(parents=True)
    content = {
        "metrics": {"bbox": {"AP": ap, "AP50": 2 * ap, "AP75": ap, "AP-cat": ap + 1}},
        "datasets": ["val"],
        "wall_time_s": 10.0 * seed,
        "iterations": 100,
        "images_per_batch": 8,
        "params": 1000,
        "seed": seed,
    }
    (folder / "result.json").write_text(json.dumps(content))
    settings = {"SEED": seed, "OUTPUT_DIR": str(folder), "SOLVER": {"MAX_ITER": 100, "BASE_LR": 0.1}, **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three seeds of two students, in which a seed changes more than the method does, and a teacher."""
    write_run(tmp_path / "teacher", 50.0, 1)
    for seed, (base, gain) in enumerate([(10.0, 4.0), (20.0, 5.0), (30.0, 6.0)], 1):
        write_run(tmp_path / f"baseline/seed{seed}", base, seed)
        write_run(tmp_path / f"inherit/seed{seed}", base + gain + (-1) ** seed, seed)
        write_run(tmp_path / f"distilled/seed{seed}", base + gain, seed)
    return tmp_path


def report(folder: Path, *arguments: str) -> tuple[dict, str, str]:
    """What a report of these runs says, in its three files."""
    run([*arguments, "--output", str(folder / "out")])
    texts = [(folder / "out" / name).read_text() for name in ("report.json", "report.md", "report.html")]
    return json.loads(texts[0]), texts[1], texts[2]


def test_seeds_are_averaged_and_compared_in_pairs(runs):
    named = [f"--run={name}={runs / name}/seed*" for name in ("baseline", "inherit", "distilled")]
    content, text, page = report(runs, f"--run=teacher={runs / 'teacher'}", *named)
    assert content["models"]["distilled"]["AP"] == pytest.approx(25.0) and content["gain"] == pytest.approx(5.0)
    assert [one["seed"] for one in content["models"]["distilled"]["runs"]] == [1, 2, 3]
    gain = content["seeds"]["over_baseline"]["distilled"]
    half = 4.3027 / 3**0.5  # the differences 4, 5 and 6 have a deviation of 1
    assert [gain["low"], gain["high"]] == pytest.approx([5 - half, 5 + half], abs=1e-3) and not gain["within_noise"]
    assert content["gap_closure"] == pytest.approx((4 + 5 + 6) / (40 + 30 + 20))
    assert content["seeds"]["over_inherit"]["distilled"]["within_noise"]
    for part in (
        "| distilled student | 25.0 | 50.0 | 25.0 | 0.00 M | 100 | 800 | 20 s | 1, 2, 3 |",
        "from 20.0 to 25.0 AP (+5.0).",
        "distilled student over baseline student: +5.0 [+2.5, +7.5] AP in 3 pairs.",
        "distilled student over inherit only: +0.3 [-2.5, +3.2] AP in 3 pairs, which is within noise.",
        "| distilled student | 14.0 (1), 25.0 (2), 36.0 (3) | 25.0 [-2.3, 52.3] | +5.0 [+2.5, +7.5] "
        "| +0.3 [-2.5, +3.2], within noise | 17 [5, 145] % |",
        "(teacher - baseline): 17 [5, 145] %.",
        "| cat | 51.0 | 21.0 | 25.7 | 26.0 | +5.0 |",
    ):
        assert part in text, part
    assert 'id="seeds-table"' in page and "14.0 (1), 25.0 (2), 36.0 (3)" in page
    assert "+0.3 [-2.5, +3.2], within noise" in page and "95 % intervals" in page


def test_a_gain_within_noise_is_called_no_rise(runs):
    better = write_run(runs / "better/seed1", 10.5, 1), write_run(runs / "better/seed2", 19.9, 2)
    baseline = f"--run=baseline={runs}/baseline/seed*"
    content, text, page = report(runs, baseline, "--run", f"distilled={better[0]}", str(better[1]))
    assert content["gain"] == pytest.approx(0.2) and "raises" not in text
    assert "distillation changes nothing beyond noise: 15.0 and 15.2 AP (+0.2)." in text
    assert "to the baseline student, within noise" in page


def test_one_seed_in_common_has_no_interval_and_none_no_pair(runs):
    baseline = [f"--run=baseline={runs}/baseline/seed1", f"--run=baseline={runs}/baseline/seed2"]
    other = f"--run=other={write_run(runs / 'other', 9.0, 7)}"
    content, text, _ = report(runs, *baseline, f"--run=distilled={runs}/distilled/seed2", other)
    assert content["gain"] == pytest.approx(5.0) and content["seeds"]["over_baseline"]["distilled"]["low"] is None
    assert "distilled student over baseline student: +5.0 AP with the one seed that they share" in text
    assert "other and baseline student have no seed in common" in text


def test_single_runs_have_no_table_of_seeds(runs):
    named = [f"--run={name}={runs}/{name}/seed1" for name in ("baseline", "distilled")]
    content, text, page = report(runs, *named)
    assert content["seeds"] is None and "## Seeds" not in text and "seeds-table" not in page
    assert "runs" not in content["models"]["baseline"] and "+4.0" in text


@pytest.mark.parametrize(
    "seed, changes, message",
    [
        (2, {"SOLVER": {"MAX_ITER": 200, "BASE_LR": 0.1}}, r"differ in more than the seed: SOLVER\.MAX_ITER is 100 an"),
        (2, {"SOLVER": {"MAX_ITER": 9, "BASE_LR": 9}}, r"SOLVER\.BASE_LR is 0\.1 and 9, and 1 more\. Give runs"),
        (1, {}, r"seed1 and .*other have the same seed, 1"),
        (-1, {}, r"other has no seed of its own \(SEED\)"),
    ],
)
def test_runs_that_are_not_seeds_of_one_another_are_refused(runs, seed, changes, message):
    other = write_run(runs / "other", 5.0, seed, **changes)
    with pytest.raises(ResultError, match=message) as caught:
        load_seeds("distilled", [str(runs / "distilled/seed1"), str(other)])
    assert "\n" not in str(caught.value)


@pytest.fixture
def drawn(tmp_path):
    """The arguments of a report on detections of two single runs on a dataset, and on the same ones once more."""
    truth, better = made(1, 0.9)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for name, found in (("baseline", made(2, 0.5)[1]), ("inherit", better), ("distilled", better)):
        folder = write_run(tmp_path / name, 1.0 if name == "baseline" else 2.0, 1) / "inference"
        folder.mkdir()
        (folder / "coco_instances_results.json").write_text(json.dumps(found))
    records = [{"file_name": image["file_name"], "image_id": image["id"]} for image in truth["images"]]
    DatasetCatalog.register("val", lambda: records)
    MetadataCatalog.get("val").set(
        json_file=str(tmp_path / "truth.json"),
        thing_classes=["0", "1", "2"],
        thing_dataset_id_to_contiguous_id={7: 0, 8: 1, 9: 2},
    )
    yield ["--dataset", "val", *(f"--run={n}={tmp_path / n}" for n in ("baseline", "inherit", "distilled"))]
    forget({"val"})


def test_single_runs_get_intervals_over_drawn_images(tmp_path, drawn):
    content, text, page = report(tmp_path, *drawn, "--drawings", "100")
    gain = content["seeds"]["over_baseline"]["distilled"]
    assert gain["over"] == "images" and gain["low"] < gain["mean"] < gain["high"] and not gain["within_noise"]
    assert content["seeds"]["over_inherit"]["distilled"]["within_noise"]
    assert "AP over drawings of the test images; another seed may change more." in text
    assert "+0.0 [+0.0, +0.0] (images), within noise" in text and "+0.0 [+0.0, +0.0] (images), within noise" in page
    assert "Where it says images, there is one seed" in text
    assert report(tmp_path, *drawn)[0]["seeds"] is None
    for name in ("baseline", "inherit", "distilled"):  # an evaluation that counted a single detection of an image
        settings = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        file = tmp_path / name / "inference/config.yaml"
        file.write_text(yaml.safe_dump({**settings, "TEST": {"DETECTIONS_PER_IMAGE": 1}}))
    assert report(tmp_path, *drawn, "--drawings", "100")[0]["gain"] < gain["mean"]


def test_drawings_without_a_dataset_or_below_none_are_errors(tmp_path, drawn, capfd):
    for arguments, message in (
        ([*drawn[2:], "--drawings", "9"], "--drawings needs --dataset"),
        ([*drawn, "--drawings", "-1"], "--drawings is -1; it must be at least 0."),
    ):
        with pytest.raises(SystemExit) as stop:
            run([*arguments, "--output", str(tmp_path / "none")])
        assert stop.value.code == 2 and message in "".join(capfd.readouterr())


def test_keys_of_another_version_and_datasets_not_used_do_not_count(runs, caplog):
    data = {"TRAIN": ["a"], "TEST": ["b"], "REGISTER": [{"NAME": "a"}, {"NAME": "b"}]}
    first = write_run(runs / "first", 5.0, 8, DATASETS=data)
    more = {**data, "REGISTER": [*data["REGISTER"], {"NAME": "c"}]}
    second = write_run(runs / "second", 7.0, 9, DATASETS=more, NEW_KEY=1)
    assert load_seeds("x", [str(first), str(second)]).metrics["AP"] == pytest.approx(6.0)
    assert "different versions" in caplog.text
    guarded = write_run(runs / "guarded", 7.0, 10, DATASETS=data, DISTILL={"GUARD": {"ENABLED": True}})
    with pytest.raises(ResultError, match=r"DISTILL\.GUARD\.ENABLED is False and True"):
        load_seeds("x", [str(first), str(guarded)])


def test_a_pattern_without_folders_and_a_run_without_name_are_errors(runs, capsys):
    for argument, message in (
        (f"a={runs}/none*", "no folder is named as"),
        (f"{runs}", "is not of the form NAME=VALUE"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(["--run", argument, "--output", str(runs / "none")])
        assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_what_a_run_was_evaluated_on_later_is_found(runs):
    folder = runs / "distilled/seed1"
    (folder / "model_final.pth").touch()
    inside = folder / "evaluation/inference/test"
    inside.mkdir(parents=True)
    (inside / "coco_instances_results.json").write_text("[]")
    metrics = {"val": {"bbox": {"AP": 1.0}}, "test": {"bbox": {"AP": 2.0}}}
    content = {"metrics": metrics, "datasets": ["val", "test"], "weights": str(folder / "model_final.pth")}
    result = folder / "evaluation/result.json"
    result.write_text(json.dumps(content))
    found = load_result("distilled", str(folder), dataset_name="test")
    assert found.metrics == {"AP": 2.0} and found.seed == 1 and found.iterations == 100
    assert found.dataset == "test" and found.curve_dataset == "val"
    assert found.predictions_file == str(inside / "coco_instances_results.json")
    assert load_result("distilled", str(folder), dataset_name="val").metrics["AP"] == 14.0
    result.write_text(json.dumps({**content, "weights": "another.pth"}))
    with pytest.raises(ResultError, match="an evaluation on val, not on test"):
        load_result("distilled", str(folder), dataset_name="test")


def test_an_evaluation_of_weights_that_were_trained_on_is_not_taken(runs):
    folder = runs / "distilled/seed1"
    weights, result = folder / "model_final.pth", folder / "evaluation/result.json"
    weights.write_bytes(b"at 100 iterations")
    result.parent.mkdir()
    content = {"metrics": {"bbox": {"AP": 2.0}}, "datasets": ["test"], "weights": "moved/model_final.pth"}
    result.write_text(json.dumps({**content, "weights_checksum": file_checksum(weights)}))
    assert load_result("distilled", str(folder), dataset_name="test").metrics == {"AP": 2.0}  # wherever it lies now
    earlier = {**content, "weights": str(weights)}  # an earlier version tells no checksum
    for number, written in enumerate(({**earlier, "weights_checksum": file_checksum(weights)}, earlier)):
        result.write_text(json.dumps(written))
        assert load_result("distilled", str(folder), dataset_name="test").metrics == {"AP": 2.0}
        weights.write_bytes(b"at %d00 iterations" % (3 + number))
        os.utime(weights, (time.time() + 60,) * 2)
        with pytest.raises(ResultError, match=r"on val, not on test\. What \S+ holds is of other weights than \S+\. "):
            load_result("distilled", str(folder), dataset_name="test")
        os.utime(weights, (time.time() - 60,) * 2)


def test_gain_and_gap_closure_are_of_the_same_pairs(tmp_path):
    write_run(tmp_path / "teacher", 40.0, 1)
    for seed, score in enumerate([41.0, 41.2, 30.0, 30.0], 1):  # the baselines that the student has no pair for are bad
        write_run(tmp_path / f"baseline/seed{seed}", score, seed)
    for seed, score in enumerate([41.5, 42.0], 1):
        write_run(tmp_path / f"distilled/seed{seed}", score, seed)
    named = [f"--run={name}={tmp_path / name}/seed*" for name in ("baseline", "distilled")]
    content, text, _ = report(tmp_path, f"--run=teacher={tmp_path / 'teacher'}", *named)
    assert content["gain"] == pytest.approx(0.65) and content["gap_closure"] is None
    assert content["gap_closure_note"] in text and "in the seeds of both" in content["gap_closure_note"]
