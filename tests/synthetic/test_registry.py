from dataclasses import dataclass

import pytest
import torch

from unweave import UnweaveError
from unweave.synthetic.magnitudes import LinearMagnitudeConfig, MagnitudeConfig, get_magnitude_class, register_magnitude
from unweave.synthetic.probabilities import (
    ConstantFiringProbabilityConfig,
    FiringProbabilityConfig,
    RandomFiringProbabilityConfig,
    ZipfianFiringProbabilityConfig,
    get_firing_probability_class,
    register_firing_probability,
)
from unweave.synthetic.registry import Registry


@pytest.mark.parametrize(
    "config",
    [
        ZipfianFiringProbabilityConfig(exponent=2.0, max_prob=0.5, min_prob=0.1),
        ConstantFiringProbabilityConfig(0.2),
        RandomFiringProbabilityConfig(),
    ],
)
def test_a_config_survives_its_dictionary(config):
    saved = config.to_dict()
    assert saved["generator_name"] == config.generator_name()
    assert FiringProbabilityConfig.from_dict(saved) == config
    assert type(config).from_dict(saved) == config
    assert saved == config.to_dict()  # reading it has not changed it


def test_the_two_registries_are_apart():
    assert get_firing_probability_class("constant") is ConstantFiringProbabilityConfig
    assert get_magnitude_class("linear") is LinearMagnitudeConfig
    with pytest.raises(UnweaveError, match="there is no firing probability 'folded_normal'"):
        get_firing_probability_class("folded_normal")


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"generator_name": "zipfain"}, r"no firing probability 'zipfain'; did you mean 'zipfian'\?"),
        ({"generator_name": "zzz"}, r"no firing probability 'zzz'; known are zipfian, linear, random, constant\."),
        ({"exponent": 1.0}, "has a generator_name, and there is none in {'exponent': 1.0}"),
        ({"generator_name": "zipfian", "exponnet": 1}, "Config has no field 'exponnet'; did you mean 'exponent'"),
        ({"generator_name": "constant", "probability": 2}, r"probability must be .* at most 1, got 2\."),
    ],
)
def test_a_wrong_dictionary(saved, message):
    with pytest.raises(UnweaveError, match=message):
        FiringProbabilityConfig.from_dict(saved)


def test_a_dictionary_of_another_class_or_without_a_field():
    with pytest.raises(UnweaveError, match="of a ConstantFiringProbabilityConfig, not of a ZipfianFiring"):
        ZipfianFiringProbabilityConfig.from_dict(ConstantFiringProbabilityConfig().to_dict())
    with pytest.raises(UnweaveError, match="LinearMagnitudeConfig needs the field 'end'"):
        MagnitudeConfig.from_dict({"generator_name": "linear", "start": 1.0})


def test_a_config_of_ones_own(monkeypatch):
    """Also a dataclass that is not frozen, as notebooks have them, and defined a second time."""
    monkeypatch.setattr(FiringProbabilityConfig, "registry", Registry("firing probability"))

    def define():
        @dataclass
        class Halves(FiringProbabilityConfig):
            probability: float = 0.5

            @classmethod
            def generator_name(cls):
                return "halves"

            def generate(self, num_features, seed=None):
                return torch.full((num_features,), self.probability)

        return Halves

    register_firing_probability("halves", define())
    again = define()
    register_firing_probability("halves", again)
    assert FiringProbabilityConfig.from_dict({"generator_name": "halves", "probability": 0.25}) == again(0.25)
    with pytest.raises(UnweaveError, match="calls itself 'halves' and cannot be registered as 'half'"):
        register_firing_probability("half", again)


def test_a_name_belongs_to_one_class():
    class Other(MagnitudeConfig):
        @classmethod
        def generator_name(cls):
            return "linear"

        def generate(self, num_features, seed=None):
            return torch.ones(num_features)

    with pytest.raises(UnweaveError, match="magnitude 'linear' is already registered, as LinearMagnitudeConfig"):
        register_magnitude("linear", Other)
    assert get_magnitude_class("linear") is LinearMagnitudeConfig
