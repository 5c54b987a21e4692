from dataclasses import FrozenInstanceError, fields, replace

import pytest

import dla


def test_presets_differ_in_what_the_documentation_lists():
    paper, official = dla.PAPER, dla.OFFICIAL
    different = {f.name for f in fields(dla.Config) if getattr(paper, f.name) != getattr(official, f.name)}
    assert different == {"dsu", "initial_state", "gate", "carry", "carry_conv", "cache"}
    assert replace(official, context="first") == dla.RELEASED
    assert dla.Config() == paper


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        dla.PAPER.gate = "hidden"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dsu", "merged", "`dsu` must be one of 'joint', 'split', got 'merged'"),
        ("initial_state", None, "`initial_state` must be one of 'random', 'zeros', got None"),
        ("gate", "h", "`gate` must be one of 'context', 'hidden', got 'h'"),
        ("carry", "input", "`carry` must be one of 'output', 'shortcut', got 'input'"),
        ("carry_conv", "yes", "`carry_conv` must be one of True, False, got 'yes'"),
        ("cache", "keys", "`cache` must be one of 'input', 'key_value', got 'keys'"),
        ("context", "last", "`context` must be one of 'own', 'first', got 'last'"),
        ("activation", "gelu", "`activation` must be one of None, 'identity', 'tanh', 'relu', 'sigmoid', got 'gelu'"),
    ],
)
def test_unknown_value_lists_the_known_ones(field, value, message):
    with pytest.raises(ValueError, match=message):
        dla.Config(**{field: value})
