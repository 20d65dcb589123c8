"""Config files, key versions, and `configurable`."""

import pytest
import yaml

from d2lite.config import CfgNode, configurable, downgrade_config, get_cfg, global_cfg, set_global_cfg, upgrade_config


def write(path, text):
    path.write_text(text)
    return str(path)


def merged(path, text):
    cfg = get_cfg()
    cfg.merge_from_file(write(path / "c.yaml", text))
    return cfg


def test_get_cfg_is_fresh():
    get_cfg().MODEL.PIXEL_MEAN.append(0.0)
    assert len(get_cfg().MODEL.PIXEL_MEAN) == 3


def test_dump_merges_back(tmp_path):
    cfg = get_cfg()
    cfg.SOLVER.STEPS = (1, 2)
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2"]
    # YAML has no tuples, so nested ones come back as lists.
    assert yaml.safe_load(merged(tmp_path, cfg.dump()).dump()) == yaml.safe_load(cfg.dump())


@pytest.mark.parametrize("style", ["relative", "absolute", "home"])
def test_base_paths(tmp_path, monkeypatch, style):
    monkeypatch.setenv("HOME", str(tmp_path))
    base = {"relative": "base.yaml", "absolute": str(tmp_path / "base.yaml"), "home": "~/base.yaml"}[style]
    write(tmp_path / "base.yaml", "VERSION: 2\nSEED: 3\nSOLVER: {MAX_ITER: 5}\n")
    cfg = merged(tmp_path, f"_BASE_: {base}\nSOLVER: {{BASE_LR: 0.5}}\n")
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (3, 5, 0.5)


def test_empty_file_changes_nothing(tmp_path):
    assert merged(tmp_path, "") == get_cfg()


def test_unknown_keys_name_near_matches(tmp_path):
    with pytest.raises(KeyError, match=r"SOLVER.BASE_LRR.*Did you mean SOLVER.BASE_LR"):
        merged(tmp_path, "SOLVER: {BASE_LRR: 1.0}")
    with pytest.raises(AssertionError, match=r"MODEL.MASK_ONN.*Did you mean MODEL.MASK_ON"):
        get_cfg().merge_from_list(["MODEL.MASK_ONN", True])
    with pytest.raises(KeyError, match="ZZZZ$|ZZZZ'$"):
        merged(tmp_path, "ZZZZ: 1")


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        get_cfg().merge_from_file("nowhere.yaml")


@pytest.mark.parametrize("allow_unsafe", [False, True])
def test_yaml_never_runs_code(tmp_path, allow_unsafe):
    marker = tmp_path / "ran"
    path = write(tmp_path / "c.yaml", f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(ValueError, match="c.yaml"):
        get_cfg().merge_from_file(path, allow_unsafe=allow_unsafe)
    assert not marker.exists()


def anchor_sizes(tmp_path, expression):
    text = "MODEL:\n  ANCHOR_GENERATOR:\n    SIZES: !!python/object/apply:eval " + expression
    return merged(tmp_path, text).MODEL.ANCHOR_GENERATOR.SIZES


def test_anchor_sizes_as_arithmetic(tmp_path):
    sizes = anchor_sizes(tmp_path, '["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64 ]]"]')
    assert sizes == [[x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64]]
    assert anchor_sizes(tmp_path, '["[-1 + 2, (3 - +1) / 4]"]') == [1, 0.5]


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "[x for x in range(3)]",
        "[x.real for x in [1]]",
        "[x for x in [1] if x]",
        "[x + y for x in [1] for y in [2]]",
        "[(lambda: 1)()]",
        "[[1, 2] * 1000]",
        "['a']",
        "[True]",
        "[y for x in [1]]",
        "[9 ** 9 ** 9]",
        "[1 / 0]",
        "[(-1) ** 0.5]",
        "[1e308 * 10]",
        "[1",
        "[" + "1, " * 1000 + "]",
    ],
)
def test_anything_but_arithmetic_is_refused(tmp_path, expression):
    with pytest.raises(ValueError, match="c.yaml"):
        anchor_sizes(tmp_path, f'["{expression}"]')


@pytest.mark.parametrize("arguments", ["[1]", "['1', '2']", "{a: '[1]'}", "'[1]'"])
def test_arithmetic_needs_one_string(tmp_path, arguments):
    with pytest.raises(ValueError, match="c.yaml"):
        anchor_sizes(tmp_path, arguments)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just text", "SEED: [1"])
def test_files_that_are_no_mapping(tmp_path, text):
    with pytest.raises(ValueError, match="c.yaml"):
        merged(tmp_path, text)


def test_frozen_config_rejects_files(tmp_path):
    cfg = get_cfg()
    cfg.freeze()
    with pytest.raises(AttributeError):
        cfg.SEED = 1
    with pytest.raises(AttributeError):
        cfg.MODEL.DEVICE = "cpu"


def test_old_versions_are_upgraded(tmp_path):
    cfg = merged(tmp_path, "VERSION: 0\nMODEL: {RPN_HEAD: {NAME: X}, WEIGHT: w.pkl}\nTEST: {AUG_ON: true}")
    assert (cfg.MODEL.RPN.HEAD_NAME, cfg.MODEL.WEIGHTS, cfg.TEST.AUG.ENABLED) == ("X", "w.pkl", True)
    assert cfg.VERSION == get_cfg().VERSION
    with pytest.raises(KeyError, match="MODEL.WEIGHT"):
        merged(tmp_path, "VERSION: 2\nMODEL: {WEIGHT: w.pkl}")
    with pytest.raises(ValueError, match="VERSION 3"):
        merged(tmp_path, "VERSION: 3")


def test_downgrade_then_upgrade():
    cfg = get_cfg()
    cfg.USER_KEY = 1
    old = downgrade_config(cfg, to_version=0)
    assert old.MODEL.RPN_HEAD.NAME == "StandardRPNHead" and "WEIGHTS" not in old.MODEL
    assert upgrade_config(old) == cfg
    with pytest.raises(ValueError):
        upgrade_config(cfg, to_version=1)
    with pytest.raises(ValueError):
        downgrade_config(old, to_version=2)


def test_global_cfg():
    cfg = CfgNode({"HELLO": 2})
    set_global_cfg(cfg)
    assert global_cfg.HELLO == 2
    set_global_cfg(CfgNode())
    assert "HELLO" not in global_cfg


class Base:
    @configurable
    def __init__(self, a: int, b=2):
        """Doc of Base."""
        self.a, self.b = a, b

    @classmethod
    def from_config(cls, cfg, factor=1):
        return {"a": cfg.SEED * factor}


class Derived(Base):
    @configurable
    def __init__(self, shape, **kwargs):
        super().__init__(**kwargs)
        self.shape = shape

    @classmethod
    def from_config(cls, cfg, shape):
        return {"shape": shape, **super().from_config(cfg)}


class Legacy(Derived):
    def __init__(self, config, shape):
        super().__init__(config, shape)


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.SEED = 7
    return cfg


def test_configurable_explicit_and_config(cfg):
    assert vars(Base(1)) == {"a": 1, "b": 2}
    assert vars(Base(cfg)) == vars(Base(cfg=cfg)) == {"a": 7, "b": 2}
    assert vars(Base(cfg, 3)) == vars(Base(cfg, factor=3)) == {"a": 21, "b": 2}
    assert vars(Base(cfg, b=5)) == {"a": 7, "b": 5}
    assert vars(Base(cfg, a=5)) == {"a": 5, "b": 2}
    assert Base.__init__.__doc__ == "Doc of Base." and Base.__init__.__annotations__ == {"a": int}


def test_configurable_inheritance(cfg):
    assert vars(Derived(cfg, "s")) == vars(Derived(cfg, shape="s")) == {"a": 7, "b": 2, "shape": "s"}
    assert vars(Derived("s", a=1)) == {"a": 1, "b": 2, "shape": "s"}
    assert Legacy(cfg, "s").a == 7
    with pytest.raises(TypeError):
        Derived(cfg, "s", unknown=1)
    with pytest.raises(TypeError):
        Derived(cfg)


def test_configurable_bad_classes(cfg):
    class NoFromConfig:
        @configurable
        def __init__(self, a):
            pass

    class NotAClassmethod(NoFromConfig):
        def from_config(self, cfg):
            return {}

    class OtherName(NoFromConfig):
        @classmethod
        def from_config(cls, config):
            return {"a": 1}

    with pytest.raises(AttributeError, match="NoFromConfig"):
        NoFromConfig(a=1)
    with pytest.raises(TypeError, match="classmethod"):
        NotAClassmethod(a=1)
    with pytest.raises(TypeError, match="cfg"):
        OtherName(cfg)


def test_configurable_function(cfg):
    @configurable(from_config=lambda cfg, scale=1: {"a": cfg.SEED * scale})
    def add(a, b=1):
        return a + b

    assert (add(1), add(1, b=3), add(cfg), add(cfg, scale=2), add(cfg, b=5)) == (2, 4, 8, 15, 12)
    assert add.from_config(cfg) == {"a": 7}
    with pytest.raises(TypeError):
        configurable(from_config="no function")(add)
    with pytest.raises(TypeError):
        configurable(add)
