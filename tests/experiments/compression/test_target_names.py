"""Names of targets that look at a trained network."""

import re

import pytest

from experiments.compression import targets
from experiments.compression.pruners import AbstractPruners
from experiments.compression.targets import Part, label, needs_data, parse
from experiments.errors import ConfigError

READ = {
    "w90": (Part("wanda", 0.9), "90 % Wanda"),
    "w2:4": (Part("wanda", numbers=(2, 4)), "2:4 Wanda"),
    "g87.5": (Part("sparse gpt", 0.875), "87.5 % SparseGPT"),
    "g2:4@4bit": (Part("sparse gpt", 0.0, (2, 4), 4), "2:4 SparseGPT in 4-bit"),
    "g0@3bit": (Part("sparse gpt", bits=3), "0 % SparseGPT in 3-bit"),
    "rk90": (Part("global", 0.9, refitted=True), "90 % refitted"),
    "ru50": (Part("layer", 0.5, refitted=True), "50 % uniform refitted"),
    "r2:4": (Part("n of m", numbers=(2, 4), refitted=True), "2:4 refitted"),
    "rg2:4": (
        Part("sparse gpt", numbers=(2, 4), refitted=True),
        "2:4 SparseGPT refitted",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_name_says_what_is_done(name):
    part, words = READ[name]
    assert parse(name) == (part,)
    assert label(name) == words
    assert needs_data(f"4bit+{name}")
    assert targets.sparsity(name) is None  # such as rk90: it is not only sparsity


@pytest.mark.parametrize(
    "name", ["w", "w100", "g3:2", "g50@1bit", "g50@17bit", "r4bit", "rdense", "rrk90"]
)
def test_a_name_that_means_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=re.escape(f"target {name!r}")):
        parse(name)


@pytest.mark.parametrize("name", ["w90", "g50+4bit", "rk90"])
def test_they_are_for_trained_networks(name):
    targets.check(name)
    with pytest.raises(ConfigError, match="looks at a trained network"):
        targets.check(name, training=True)
    with pytest.raises(ConfigError, match="needs a trained network"):
        targets.projector(name)


def test_shapes_are_checked_without_data():
    plain = targets.projector("rg2:4", pruners=AbstractPruners())
    assert plain == targets.projector("2:4")


def test_a_share_by_cost_needs_to_know_the_network():
    assert parse("k90@cost+4bit") == (Part("by cost", 0.9), *parse("4bit"))
    assert label("k90@cost") == "90 % by cost"
    assert targets.sparsity("k90@cost") is None  # other zeros than those of k90
    with pytest.raises(ConfigError, match="what a weight costs is not known"):
        targets.projector("k90@cost")
