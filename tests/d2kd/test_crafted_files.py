"""Files that would run code when they are read: as weights, as teacher, as configuration; on both runtimes' paths."""

import os
import pickle
import zipfile

import pytest
import torch
from runs import make_trainer, tool
from test_bad_input import error_of

from d2kd.engine import load_config
from d2kd.errors import ConfigError, UserError
from d2kd.modeling import checkpoint_files
from d2kd.runtime import Runtime
from detectron2.checkpoint import DetectionCheckpointer


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def unsafe_load_file(self, filename):
    """Reads as Detectron2 does, where pickles run what they ask for."""
    if filename.endswith(".pkl"):
        with open(filename, "rb") as file:
            return {"model": pickle.load(file), "__author__": "x"}
    content = torch.load(filename, map_location="cpu", weights_only=False)
    return content if "model" in content else {"model": content}


@pytest.fixture(params=["d2lite", "detectron2"])
def runtime(request, monkeypatch):
    if request.param == "detectron2":
        monkeypatch.setattr(checkpoint_files, "RUNTIME", Runtime("detectron2", "0.6"))
        monkeypatch.setattr(DetectionCheckpointer, "_load_file", unsafe_load_file)
    return request.param


@pytest.fixture(params=["model.pkl", "model.pth", "model.pyth", "old.pth"])
def crafted(request, tmp_path):
    """A checkpoint that makes a folder, "ran"."""
    path, content = tmp_path / request.param, {"model": {"x": Attack(tmp_path / "ran")}}
    if request.param == "old.pth":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    return path


def test_the_attack_would_work(crafted, tmp_path):
    unsafe_load_file(None, str(crafted))
    assert (tmp_path / "ran").is_dir()


def test_weights_that_would_run_code(runtime, crafted, write_config, tmp_path):
    trainer = make_trainer(write_config(MODEL__WEIGHTS=str(crafted)))
    with pytest.raises(UserError, match=rf"MODEL\.WEIGHTS .*{crafted.name}.*(mkdir|Cannot load|Refused)") as error:
        trainer.resume_or_load(resume=False)
    assert not (tmp_path / "ran").exists() and "weights_only" not in str(error.value)


def test_teachers_that_would_run_code(runtime, crafted, write_config, teacher, tmp_path):
    keys = {**teacher, "DISTILL__TEACHER__WEIGHTS": str(crafted)}
    message = error_of(write_config(**keys), tmp_path / "out")
    assert crafted.name in message and not (tmp_path / "ran").exists()


def test_checkpoints_to_resume_from_that_would_run_code(runtime, crafted, write_config, tmp_path):
    output = tmp_path / "student"
    output.mkdir()
    crafted.rename(output / f"model_0000002{crafted.suffix}")
    (output / "last_checkpoint").write_text(f"model_0000002{crafted.suffix}")
    trainer = make_trainer(write_config())
    with pytest.raises(UserError, match="Cannot resume from"):
        trainer.resume_or_load(resume=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", b"PK\x03\x04", b"\x80\x02}q\x00."], ids=["empty", "text", "zip", "pickle"]
)
@pytest.mark.parametrize("name", ["w.pth", "w.pkl"])
def test_files_that_are_no_checkpoints_are_one_line(runtime, write_config, tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    trainer = make_trainer(write_config(MODEL__WEIGHTS=str(tmp_path / name)))
    with pytest.raises(UserError, match=rf"MODEL\.WEIGHTS .*{name} cannot be loaded") as error:
        trainer.resume_or_load(resume=False)
    assert "\n" not in str(error.value)


def test_truncated_checkpoints_are_one_line(runtime, write_config, teacher, tmp_path):
    whole = open(teacher["DISTILL__TEACHER__WEIGHTS"], "rb").read()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    keys = {**teacher, "DISTILL__TEACHER__WEIGHTS": str(tmp_path / "cut.pth")}
    message = error_of(write_config(**keys), tmp_path / "out")
    assert "truncated or not a checkpoint" in message and "\n" not in message and "Errno" not in message


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir ['{}']", "!!python/object/new:os.mkdir ['{}']"])
@pytest.mark.parametrize("where", ["itself", "its base", "the teacher"])
def test_configurations_that_would_run_code(tmp_path, write_config, teacher, tag, where):
    line = "OUTPUT_DIR: " + tag.format(tmp_path / "ran") + "\n"
    bad, child = tmp_path / "bad.yaml", tmp_path / "child.yaml"
    bad.write_text(line)
    child.write_text("_BASE_: bad.yaml\n")
    with pytest.raises(UserError):
        if where == "the teacher":
            keys = {**teacher, "DISTILL__TEACHER__CONFIG_FILE": str(bad)}
            make_trainer(write_config(**keys))
        else:
            load_config(str(bad if where == "itself" else child))
    assert not (tmp_path / "ran").exists()


def test_bases_that_are_missing_or_based_on_each_other(tmp_path):
    (tmp_path / "a.yaml").write_text("_BASE_: gone.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml.*gone\.yaml"):
        load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("_BASE_: c.yaml\n")
    (tmp_path / "c.yaml").write_text("_BASE_: b.yaml\n")
    with pytest.raises(ConfigError, match="based on each other"):
        load_config(str(tmp_path / "b.yaml"))


def test_export_tells_what_a_file_is_in_its_own_words(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        file.writestr("hello", "x")
    done = tool("export_student", tmp_path / "x.pth", tmp_path / "out.pth", check=False)
    assert done.returncode == 2 and "weights_only" not in done.stdout and "Traceback" not in done.stdout
    assert "x.pth cannot be read as a checkpoint" in done.stdout and not (tmp_path / "out.pth").exists()
