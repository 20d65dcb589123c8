"""Weights of torchvision and timm by name, and their files, in the networks of Detectron2 and of these libraries."""

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from models import config, model
from runs import ROOT
from safetensors.torch import save_file
from torch import nn

import d2kd
from d2kd import model_zoo
from d2kd.engine import CheckpointError, load_config, load_start
from d2kd.errors import ConfigError
from d2kd.modeling import StrictLoadingError, load_teacher
from d2kd.modeling.library_weights import fetch, fetch_start, find_weights
from detectron2.utils.file_io import PathManager

RGB = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
RETINANET = {"MODEL.DEVICE": "cpu", "MODEL.FPN.OUT_CHANNELS": 8, "MODEL.RETINANET.NUM_CONVS": 1, "MODEL.WEIGHTS": ""}
R18 = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
R34 = {**R18, "MODEL.RESNETS.DEPTH": 34}
R50: dict[str, Any] = {}
X101 = {"MODEL.RESNETS.DEPTH": 101, "MODEL.RESNETS.NUM_GROUPS": 32, "MODEL.RESNETS.WIDTH_PER_GROUP": 8}
TIMM = {
    "MODEL.BACKBONE.NAME": "build_retinanet_timm_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.TIMM.NAME": "mobilenetv3_small_050",
    "MODEL.TIMM.OUT_FEATURES": ["res3", "res4", "res5"],
}
BASE = "configs/Base-RetinaNet.yaml"


def options(*parts: dict[str, Any]) -> list[Any]:
    return [x for part in parts for pair in part.items() for x in pair]


def with_statistics(net: nn.Module) -> nn.Module:
    """A network whose batch norms have random statistics, so that each of them matters."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5)):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
            nn.init.uniform_(module.weight, 0.5, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return net.eval()


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub, and no network."""

    def no_network(*args: Any, **kwargs: Any) -> Any:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    return tmp_path / "hub/checkpoints"


@pytest.fixture
def timm_loads(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Lets timm give pretrained networks with random weights; lists them."""
    given: list[nn.Module] = []
    original = timm.create_model

    def create_model(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        if not pretrained or arguments:
            return original(name, pretrained=pretrained, **arguments)
        given.append(with_statistics(original(name)))
        return given[-1]

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [args])
    return given


def started(path: str, *parts: dict[str, Any]) -> nn.Module:
    """A RetinaNet that starts from weights."""
    cfg = load_config(BASE, options(RETINANET, *parts, {"MODEL.WEIGHTS": path}))
    student = model(cfg).eval()
    load_start(cfg, student)
    return student


def require_same_maps(student: Any, stages: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
    """Compares the maps of `res3` to `res5` for one image: raw for the student, in the library's way for the other."""
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    theirs = stages(((image / 255 - mean[:, None, None]) / std[:, None, None])[None].double())
    ours = student.double().backbone.bottom_up(student.preprocess_image([{"image": image}]).tensor.double())
    assert sorted(ours) == ["res3", "res4", "res5"]
    for (_, a), b in zip(sorted(ours.items()), theirs, strict=True):
        a = a[..., : b.shape[-2], : b.shape[-1]]  # the rest is padding
        assert b.std() > 0.05
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=0)


def resnet_stages(net: Any) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    def run(images: torch.Tensor) -> list[torch.Tensor]:
        net.double()
        act = net.relu if hasattr(net, "relu") else net.act1
        x = net.layer1(net.maxpool(act(net.bn1(net.conv1(images)))))
        maps = []
        for stage in (net.layer2, net.layer3, net.layer4):
            maps.append(x := stage(x))
        return maps

    return run


# ---- the same maps as in the libraries ----


@torch.no_grad()
@pytest.mark.parametrize(
    "name, file, keys",
    [
        ("resnet18", "resnet18-f37072fd.pth", R18),
        ("resnet34", "resnet34-b627a593.pth", R34),
        ("resnet50/IMAGENET1K_V1", "resnet50-0676ba61.pth", R50),
        ("resnext101_32x8d", "resnext101_32x8d-110c445d.pth", X101),
    ],
)
def test_resnets_of_torchvision_give_the_same_maps(name: str, file: str, keys: dict[str, Any], hub: Path) -> None:
    torch.manual_seed(0)
    theirs = with_statistics(torchvision.models.get_model(name.partition("/")[0], weights=None))
    torch.save(theirs.state_dict(), hub / file)
    require_same_maps(started(f"torchvision://{name}", RGB, keys), resnet_stages(theirs))


@torch.no_grad()
def test_a_resnet_of_timm_gives_the_same_maps(timm_loads: list[nn.Module]) -> None:
    ours = started("timm://resnet18.tv_in1k", RGB, R18)
    require_same_maps(ours, resnet_stages(timm_loads[0]))
    assert len(timm_loads) == 1
    started("timm://resnet18.tv_in1k", RGB, R18)
    assert len(timm_loads) == 1  # it is kept


@torch.no_grad()
@pytest.mark.parametrize("how", ["address", "pth", "safetensors"])
def test_a_backbone_of_timm_gives_the_same_maps(
    how: str, timm_loads: list[nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    path = f"timm://{TIMM['MODEL.TIMM.NAME']}"
    if how != "address":
        path = str(tmp_path / f"net.{how}")
        timm_loads.append(with_statistics(timm.create_model(TIMM["MODEL.TIMM.NAME"])))
        save = save_file if how == "safetensors" else torch.save
        save(timm_loads[0].state_dict(), path)
    with caplog.at_level(logging.WARNING):
        ours = started(path, TIMM)
    assert not [record for record in caplog.records if record.name.startswith("d2kd")]
    theirs: Any = timm_loads[0].double()

    def stages(images: torch.Tensor) -> list[torch.Tensor]:
        x = theirs.bn1(theirs.conv_stem(images))
        maps = [x := block(x) for block in theirs.blocks]
        return [maps[1], maps[3], maps[5]]  # of the strides 8, 16, 32

    require_same_maps(ours, stages)


# ---- the library's own download, and what is said where there is none ----


def test_torchvision_downloads_once_and_checks_the_file(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(url: str, file: str, hash_prefix: str, progress: bool = True) -> None:
        calls.append((url, hash_prefix))
        torch.save({"conv1.weight": torch.ones(1)}, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert Path(PathManager.get_local_path("torchvision://resnet18")) == hub / "resnet18-f37072fd.pth"
    assert calls == [("https://download.pytorch.org/models/resnet18-f37072fd.pth", "f37072fd")]


@pytest.mark.parametrize(
    "address, url",
    [
        ("torchvision://resnet34", "https://download.pytorch.org/models/resnet34-b627a593.pth"),
        ("timm://resnet18.a1_in1k", "https://huggingface.co/timm/resnet18.a1_in1k/resolve/main/model.safetensors"),
    ],
)
def test_without_a_network_one_line_says_what_to_fetch(address: str, url: str) -> None:
    keys = R34 if "34" in address else R18
    with pytest.raises(CheckpointError) as error:
        started(address, RGB, keys)
    text = str(error.value)
    assert text.startswith(f"MODEL.WEIGHTS {address} cannot be loaded: it is not on this machine") and "\n" not in text
    assert f"curl -LO {url}" in text and "no network" in text and "or '' for no weights" in text


@pytest.mark.parametrize(
    "address, words",
    [
        ("torchvision://resnet19", r"'resnet19' is no network of torchvision's\. Did you mean resnet18"),
        ("torchvision://retinanet_resnet50_fpn", "is no classifier"),
        ("torchvision://resnet50/V3", "no weights 'V3' of resnet50, but IMAGENET1K_V1"),
        ("timm://mobilnetv3_large_100", "no such network. Did you mean mobilenetv3_large_100"),
        ("timm://resnet18.foo", "no weights 'foo' of resnet18"),
        ("timm://test_vit4", "no weights of it"),
    ],
)
def test_names_are_checked_when_the_configuration_is_read(address: str, words: str) -> None:
    for key in ("MODEL.WEIGHTS", "DISTILL.TEACHER.WEIGHTS"):
        with pytest.raises(ConfigError, match=f"^{key} is {address}: .*{words}"):
            load_config(BASE, options(RETINANET, RGB, {key: address}))


# ---- images that are not those of the weights ----


def test_images_that_do_not_suit_are_an_error_that_names_every_key() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(BASE, ["MODEL.WEIGHTS", "torchvision://resnet50"])
    assert str(error.value).startswith(
        "MODEL.WEIGHTS torchvision://resnet50 needs what it was trained with: set INPUT.FORMAT to RGB (it is BGR), "
        "MODEL.PIXEL_MEAN to [123.675, 116.28, 103.53] (it is [103.53, 116.28, 123.675]), "
        "MODEL.PIXEL_STD to [58.395, 57.12, 57.375] (it is [1.0, 1.0, 1.0]), "
        "MODEL.RESNETS.STRIDE_IN_1X1 to False (it is True)."
    )
    load_config(BASE, options(RGB, {"MODEL.WEIGHTS": "torchvision://resnet50"}))


def test_mean_and_deviation_are_those_of_the_named_weights() -> None:
    address = "timm://vit_base_patch16_224.augreg_in1k"  # 0.5, not ImageNet's
    assert find_weights(address).mean == (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"PIXEL_MEAN to \[127.5, 127.5, 127.5\] \(it is \[123"):
        load_config(BASE, options(RGB, {"MODEL.WEIGHTS": address, "MODEL.BACKBONE.NAME": "build_vit_sfp_backbone"}))


@pytest.mark.parametrize("recipe", ["retinanet_R{}_1x", "retinanet_R{}_R101_FeatureMimic_1x"])
def test_recipes_of_small_resnets_start_from_torchvisions_weights(recipe: str) -> None:
    for depth in (18, 34):
        cfg = load_config(f"configs/COCO/{recipe.format(depth)}.yaml", ["MODEL.DEVICE", "cpu"])
        assert (cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.DEPTH) == (f"torchvision://resnet{depth}", depth)


def test_weights_of_the_same_network_for_other_images() -> None:
    keys = {**TIMM, "MODEL.TIMM.NAME": "vit_base_patch16_224.augreg_in1k", "MODEL.TIMM.OUT_FEATURES": ["last_feat"]}
    with pytest.raises(ConfigError, match=r"dino was trained with the mean \[123.*stands for \[127\.5.* the same name"):
        load_config(BASE, options(keys, {"MODEL.WEIGHTS": "timm://vit_base_patch16_224.dino"}))


def test_weights_are_fetched_before_a_run_begins(tmp_path: Path) -> None:
    cfg = load_config("configs/COCO/retinanet_R18_1x.yaml", ["MODEL.DEVICE", "cpu"])
    with pytest.raises(
        ConfigError, match=r"^MODEL\.WEIGHTS torchvision://resnet18 cannot be loaded: it is not on this"
    ):
        fetch_start(cfg)
    with pytest.raises(ConfigError, match=r"^MODEL\.WEIGHTS torchvision://resnet18 cannot be loaded"):
        d2kd.train("configs/COCO/retinanet_R18_1x.yaml", output=tmp_path / "run", MODEL__DEVICE="cpu")
    assert not (tmp_path / "run/config.yaml").exists()


def test_backbones_of_timm_get_their_own_images() -> None:
    cfg = load_config(BASE, options(RETINANET, TIMM, {"MODEL.WEIGHTS": "timm://mobilenetv3_small_050"}))
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.PIXEL_STD == RGB["MODEL.PIXEL_STD"]


def test_of_a_file_one_warning_names_the_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    with caplog.at_level(logging.WARNING):
        started(str(tmp_path / "r18.pth"), {**R18, "INPUT.FORMAT": "BGR"})
    assert [r.message for r in caplog.records if "INPUT.FORMAT to RGB (it is BGR), MODEL.PIXEL_MEAN" in r.message]


# ---- weights that do not fit ----


@pytest.mark.parametrize(
    "network, keys, words",
    [
        ("resnet34", R18, r"it is of another torchvision or timm ResNet: the file has res2\.2\.conv1\.weight"),
        ("mobilenet_v3_small", R18, "nothing of it fits the backbone"),
        ("shufflenet_v2_x0_5", TIMM, "it does not fit mobilenetv3_small_050 of timm"),
    ],
)
def test_another_network_is_an_error(network: str, keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    torch.save(torchvision.models.get_model(network, weights=None).state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=words) as error:
        started(str(tmp_path / "net.pth"), RGB, keys)
    assert "\n" not in str(error.value)


def test_detectors_of_torchvision_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        names = list(
            torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        )
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "detector.pth")
    with pytest.raises(CheckpointError, match=r"a whole detector of torchvision's.* torchvision://resnet50"):
        started(str(tmp_path / "detector.pth"), RGB)


# ---- teachers ----


def test_a_classifier_of_torchvision_teaches_by_its_name(hub: Path) -> None:
    theirs = torchvision.models.resnet18(weights=None)
    torch.save(theirs.state_dict(), hub / "resnet18-f37072fd.pth")
    cfg = load_config(
        "configs/ImageNet/resnet18.yaml", ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "torchvision://resnet18"]
    )
    teacher, _ = load_teacher(cfg)
    state = teacher.state_dict()
    assert all(torch.equal(state[f"backbone.net.{name}"], tensor) for name, tensor in theirs.state_dict().items())


def test_a_backbone_is_no_teacher(hub: Path, timm_loads: list[nn.Module]) -> None:
    keys = options(RETINANET, TIMM, {"MODEL.WEIGHTS": "timm://mobilenetv3_small_050"})
    with pytest.raises(StrictLoadingError, match=r"missing in the checkpoint: .*fpn_lateral"):
        load_teacher(load_config(BASE, keys))


@pytest.mark.skipif(model_zoo.RUNTIME.name == "detectron2", reason="Detectron2 has them")
def test_names_of_the_model_zoo_need_detectron2() -> None:
    path = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    with pytest.raises(ConfigError, match=r"CONFIG_FILE \(--teacher-config\) is 'COCO-Detection/.*model zoo"):
        load_config(BASE, ["DISTILL.TEACHER.CONFIG_FILE", path])
    with pytest.raises(ConfigError, match="--config-file is 'Misc/"):
        load_config("Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml")


def test_a_teacher_of_the_model_zoo_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zoo:
        @staticmethod
        def get_config_file(name: str) -> str:
            if name != "COCO-Detection/retinanet_R_101_FPN_3x.yaml":
                raise RuntimeError("not available in Model Zoo")
            return str(ROOT / "configs/COCO/retinanet_R101.yaml")

        @staticmethod
        def get_checkpoint_url(name: str) -> str:
            return "https://dl.example.org/model_final_971ab9.pkl"

    monkeypatch.setattr(model_zoo, "RUNTIME", type(model_zoo.RUNTIME)("detectron2", "0.6"))
    monkeypatch.setattr(model_zoo, "_zoo", lambda: Zoo)
    key = "DISTILL.TEACHER.CONFIG_FILE"
    teacher = load_config(BASE, [key, "COCO-Detection/retinanet_R_101_FPN_3x.yaml"]).DISTILL.TEACHER
    assert teacher.CONFIG_FILE.endswith("retinanet_R101.yaml") and teacher.WEIGHTS.endswith("model_final_971ab9.pkl")
    own = ["DISTILL.TEACHER.WEIGHTS", "mine.pth", key, "COCO-Detection/retinanet_R_101_FPN_3x.yaml"]
    assert load_config(BASE, own).DISTILL.TEACHER.WEIGHTS == "mine.pth"
    assert load_config(BASE, [key, "COCO-Detection/no.yaml"]).DISTILL.TEACHER.CONFIG_FILE == "COCO-Detection/no.yaml"


def test_the_zoo_is_trusted_also_where_its_folder_is_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation that can be edited."""
    import detectron2

    monkeypatch.setattr(model_zoo, "RUNTIME", type(model_zoo.RUNTIME)("detectron2", "0.6"))
    monkeypatch.setattr(detectron2, "__file__", str(tmp_path / "detectron2/__init__.py"))
    for folder in ("configs/Misc", "detectron2/model_zoo"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "detectron2/model_zoo/configs").symlink_to(tmp_path / "configs")
    for folder in ("detectron2/model_zoo/configs/Misc", "configs/Misc", "detectron2/model_zoo"):
        assert model_zoo.is_of_zoo(str(tmp_path / folder / "x.yaml")), folder
    assert not model_zoo.is_of_zoo(str(tmp_path / "x.yaml"))


def test_published_weights_of_teachers_without_a_network() -> None:
    cfg = config(MODEL__WEIGHTS="detectron2://COCO-Detection/retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl")
    with pytest.raises(ConfigError.__base__, match=r"190397697/model_final_971ab9\.pkl.*fetch https://dl\.fbaipublic"):
        load_teacher(cfg)


def test_an_address_is_fetched_by_the_main_door(hub: Path) -> None:
    (hub / "resnet18-f37072fd.pth").write_bytes(b"there")
    assert fetch("torchvision://resnet18") == str(hub / "resnet18-f37072fd.pth")
    with PathManager.open("torchvision://resnet18", "rb") as file:
        assert file.read() == b"there" and PathManager.isfile("torchvision://resnet18")
