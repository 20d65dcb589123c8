"""Settings: declared once, the same for constructor and YAML, and checked with their whole key."""

from typing import Any

import pytest
import torch
from helpers import tap_pair
from models import config

from d2kd.distillers import DISTILLERS, Distiller, HeadRest, Prediction, TapPair
from d2kd.distillers.receptive_tokens.tokens import Tokens
from d2kd.errors import ConfigError
from d2kd.settings import Configurable, setting

METHODS = dict(DISTILLERS)


@pytest.mark.parametrize("method", METHODS)
def test_constructor_and_yaml_have_the_same_defaults(method):
    needed = {
        "ReceptiveTokens": {"tokens": [Tokens(torch.zeros(2, 4))]},
        "LogitKD": {"form": "softmax"},  # of a tap that is no known prediction
    }
    given = needed.get(method, {})
    pair = tap_pair("p3", channels=(4, 4))
    if METHODS[method].CONTINUES_HEAD:
        scores = Prediction("p3", "class_logits", "anchor", "p3", "sigmoid")
        pair = TapPair(pair.student, pair.teacher._replace(prediction=scores, rest=HeadRest(torch.nn.Identity(), 4)))
    pairs = [pair]
    if method == "LD":  # of known predictions alone
        kinds = (("class_logits", "sigmoid"), ("box_distribution", ""))
        known = [Prediction(kind, kind, "anchor", "p3", activation) for kind, activation in kinds]
        pairs = [TapPair(*(tap._replace(name=x.tap, prediction=x) for tap in pair)) for x in known]
    built = METHODS[method](pairs=pairs, **given)
    node = config().DISTILL[METHODS[method].NODE]
    for name, declared in METHODS[method].SETTINGS.items():
        if not declared.config_only and name not in given:
            assert getattr(built, name) == node[declared.key], declared.key


def test_every_key_of_a_method_is_declared_and_documented():
    for method in METHODS.values():
        node = config().DISTILL[method.NODE]
        assert set(node) - set(method.NODES) == {declared.key for declared in method.SETTINGS.values()}
        assert all(declared.doc.endswith((".", ")", "SGD")) for declared in method.SETTINGS.values())


def test_lists_are_not_shared():
    node = config().DISTILL.CHANNEL_MATCHING
    node.TAPS.append("p3")
    assert "p3" not in config().DISTILL.CHANNEL_MATCHING.TAPS


def test_a_whole_number_stands_for_a_float_and_a_tuple_for_a_list():
    class Part(Configurable):
        share: float = setting(0, "A share.", at_least=0)
        steps: list[int] = setting([], "Some steps.", items=int)

        def __init__(self, **given: Any) -> None:
            self.configure(given, "PART")

    part = Part(share=1, steps=(1, 2))
    assert (part.share, type(part.share), part.steps) == (1.0, float, [1, 2])
    assert Part.default_node() == {"SHARE": 0.0, "STEPS": []} and type(Part.default_node().SHARE) is float


def test_subclasses_inherit_and_change_defaults_by_key():
    class Base(Configurable):
        number: int = setting(1, "A number.", key="NUM")

    class Middle(Base):
        DEFAULTS = {"NUM": 2}

    class Last(Middle):
        other: str = setting("x", "Another.")

    assert [part.default_node().NUM for part in (Base, Middle, Last)] == [1, 2, 2]
    assert list(Last.SETTINGS) == ["number", "other"]


def test_mistakes_of_an_author_are_errors_when_the_class_is_made():
    with pytest.raises(TypeError, match=r"DEFAULTS of Wrong names WIEGHT.*Did you mean WEIGHT"):

        class Wrong(Distiller):
            DEFAULTS = {"WIEGHT": 1.0}

    with pytest.raises(ConfigError, match=r"The default of Low\.SHARE is -1\.0"):

        class Low(Configurable):
            share: float = setting(-1.0, "A share.", at_least=0)


def test_an_unknown_argument_is_an_error_with_near_matches():
    with pytest.raises(TypeError, match="FeatureMimic has no argument 'wieght'.*weight"):
        METHODS["FeatureMimic"](pairs=[tap_pair("p3", channels=(4, 4))], wieght=1.0)


def test_a_plain_attribute_does_not_hide_a_setting():
    with pytest.raises(TypeError, match=r"Hidden\.weight hides a setting.*DEFAULTS\['WEIGHT'\]"):

        class Hidden(Distiller):
            weight = 9.0


@pytest.mark.parametrize("name", ["training", "forward", "level_loss", "pairs", "state_dict", "configure", "SETTINGS"])
def test_a_setting_cannot_have_the_name_of_something_else(name):
    with pytest.raises(TypeError, match=rf"\.{name} cannot be a setting"):
        type("Taken", (Distiller,), {name: setting(1.0, "A number.")})


def test_defaults_have_the_type_of_the_declaration():
    assert type(type("Whole", (Distiller,), {"DEFAULTS": {"WEIGHT": 4}}).SETTINGS["weight"].default) is float
    for key, default in (("WEIGHT", "high"), ("TAPS", "p3"), ("WEIGHT", -1.0)):
        with pytest.raises(ConfigError, match=rf"The default of Wrong\.{key}"):
            type("Wrong", (Distiller,), {"DEFAULTS": {key: default}})


def test_two_settings_cannot_have_one_key():
    with pytest.raises(TypeError, match="have one key"):
        type("Two", (Distiller,), {"other": setting(1.0, "A number.", key="WEIGHT")})


def test_a_mixin_brings_settings_and_another_base_cannot_hide_them():
    class Tempered:
        temperature: float = setting(2, "A temperature.", above=0)

    class Both(Tempered, Distiller):
        DEFAULTS = {"WEIGHT": 3.0}

    assert (Both.default_node().TEMPERATURE, Both.default_node().WEIGHT) == (2.0, 3.0)

    class Plain:
        weight = 9.0

    with pytest.raises(TypeError, match=r"Plain\.weight hides a setting"):
        type("Hidden", (Plain, Distiller), {})


def test_a_module_cannot_take_the_place_of_a_setting():
    class Projected(Distiller):
        head: float = setting(1.0, "A number.")

        def __init__(self, **settings):
            super().__init__(**settings)
            self.head = torch.nn.Linear(4, 4)

    with pytest.raises(TypeError, match="head"):
        Projected(pairs=[tap_pair("p3", channels=(4, 4))])
