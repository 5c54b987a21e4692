import pytest
import torch
from helpers import assert_close
from torch import nn

from dla.cells import CELLS, State, create_cell
from dla_kernels.common import ACTIVATIONS

B, C, R = 3, 16, 4


def draw(cell, *shape):
    y = torch.randn(*shape, C, dtype=torch.float64)
    return y, State(*torch.randn(2, *shape, C, dtype=torch.float64))


def weights_of(cell):
    """Parameters without biases, as the paper counts them."""
    return sum(p.numel() for p in cell.parameters() if p.dim() == 2)


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [
        ("dsu", "joint", 5 * C**2 // R),
        ("dsu", "split", 8 * C**2 // R),
        ("dia", None, 10 * C**2 // R),
        ("lstm", None, 8 * C**2),
        ("rnn", None, 2 * C**2),
    ],
)
def test_parameter_counts(name, form, count):
    assert weights_of(create_cell(name, C, R, form or "joint")) == count


def take_weights(torch_cell, cell):
    torch_cell.load_state_dict(
        {
            "weight_ih": cell.input.weight,
            "weight_hh": cell.hidden.weight,
            "bias_ih": cell.input.bias,
            "bias_hh": torch.zeros_like(cell.input.bias),
        }
    )


def test_lstm_is_torch_lstm():
    cell, torch_cell = create_cell("lstm", C).double(), nn.LSTMCell(C, C).double()
    y, state = draw(cell, B)
    take_weights(torch_cell, cell)
    for got, expected in zip(cell(y, state)[:2], torch_cell(y, state[:2]), strict=True):
        assert_close(got, expected, 1e-14)


def test_rnn_is_torch_rnn():
    cell, torch_cell = create_cell("rnn", C).double(), nn.RNNCell(C, C).double()
    y, state = draw(cell, B)
    take_weights(torch_cell, cell)
    new = cell(y, state)
    assert_close(new.hidden, torch_cell(y, state.hidden), 1e-14)
    assert torch.equal(new.hidden, new.context)


def test_dia_is_its_equation():
    cell = create_cell("dia", C, R).double()
    y, state = draw(cell, B)
    i, f, candidate, o = (cell.input(y) + cell.hidden(state.hidden)).chunk(4, dim=1)
    context = f.sigmoid() * state.context + i.sigmoid() * candidate.tanh()
    new = cell(y, state)
    assert_close(new.context, context, 1e-14)
    assert_close(new.hidden, o.sigmoid() * context.sigmoid(), 1e-14)


def test_joint_dsu_is_equations_7_to_9():
    cell = create_cell("dsu", C, R, "joint").double()
    y, state = draw(cell, B)
    s = cell.reduce(torch.cat([state.hidden, y], 1)).relu()
    candidate, i, f = cell.expand(s).chunk(3, dim=1)
    context = f.sigmoid() * state.context + i.sigmoid() * candidate.tanh()
    new = cell(y, state)
    assert_close(new.context, context, 1e-14)
    assert_close(new.hidden, context.sigmoid(), 1e-14)


def test_split_dsu_is_two_branches():
    cell = create_cell("dsu", C, R, "split").double()
    y, state = draw(cell, B)
    i, f, candidate = (cell.input(y) + cell.hidden(state.hidden)).chunk(3, dim=1)
    context = f.sigmoid() * state.context + i.sigmoid() * candidate.tanh()
    new = cell(y, state)
    assert_close(new.context, context, 1e-14)
    assert_close(new.hidden, context.sigmoid(), 1e-14)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_a_choice(name, activation):
    """Table 5: sigma alone changes, and only the hidden state sees it (an RNN's state is sigma itself)."""
    torch.manual_seed(1)
    cell = create_cell(name, C, R, activation=activation).double()
    torch.manual_seed(1)
    plain = create_cell(name, C, R, activation="identity").double()
    y, state = draw(cell, B)
    new, expected = cell(y, state), plain(y, state)
    if name in ("lstm", "dia"):
        ratio = expected.hidden / expected.context  # the output gate
        assert_close(new.hidden, ratio * ACTIVATIONS[activation](expected.context), 1e-13)
    else:
        assert_close(new.hidden, ACTIVATIONS[activation](expected.hidden), 1e-13)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("gate", ["context", "hidden"])
def test_refresh_is_one_step_for_each_layer(name, gate):
    cell = create_cell(name, C, R).double()
    features, state = draw(cell, B)
    features, gates = torch.randn(2, B, 5, C, dtype=torch.float64)
    got = cell.refresh(features, gates, state, gate)
    for m in range(5):
        expected = gates[:, m] * getattr(cell(features[:, m] * gates[:, m], state), gate)
        assert_close(got[:, m], expected, 1e-13, f"layer {m}")


@pytest.mark.parametrize("name", CELLS)
def test_observe_pools_and_steps(name):
    cell = create_cell(name, C, R).double()
    x = torch.randn(B, C, 5, 3, dtype=torch.float64)
    _, state = draw(cell, B)
    y, new = cell.observe(x, state)
    assert_close(y, x.mean((2, 3)), 1e-14)
    for got, expected in zip(new[:2], cell(y, state)[:2], strict=True):
        assert_close(got, expected, 1e-14)


@pytest.mark.parametrize("name", CELLS)
def test_random_initial_state_is_kept_in_the_state_dict(name):
    cell, other = (create_cell(name, C, R, initial_state="random") for _ in range(2))
    assert not torch.equal(cell.initial_context, other.initial_context)
    other.load_state_dict(cell.state_dict())
    x = torch.randn(B, C, 4, 4)
    for a, b in zip(cell.initial_state(x)[:2], other.initial_state(x)[:2], strict=True):
        assert torch.equal(a, b)
        assert a.shape == (B, C)
    state = cell.initial_state(x)
    assert torch.equal(state.hidden, ACTIVATIONS[cell.activation](state.context))


@pytest.mark.parametrize("name", CELLS)
def test_zero_initial_state(name):
    cell = create_cell(name, C, R)
    assert all(s.eq(0).all() for s in cell.initial_state(torch.randn(B, C, 4, 4))[:2])
    assert "initial_context" not in cell.state_dict()


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_state_precision_follows_the_map_not_the_weights(name, dtype):
    cell = create_cell(name, C, R, initial_state="random").to(dtype)
    x = torch.randn(B, C, 4, 4).to(dtype)
    y, state = cell.observe(x, cell.initial_state(x))
    assert {y.dtype, *(s.dtype for s in state[:2])} == {torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parametrize("name", CELLS)
def test_autocast_leaves_the_state_alone(name):
    cell = create_cell(name, C, R)
    x = torch.randn(B, C, 4, 4)
    expected = cell(x.mean((2, 3)), cell.initial_state(x))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = cell(x.mean((2, 3)), cell.initial_state(x))
    assert all(torch.equal(a, b) for a, b in zip(got[:2], expected[:2], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gru"}, "`cell` must be one of rnn, lstm, dia, dsu, got 'gru'"),
        ({"name": "dsu", "form": "both"}, "`form` must be joint or split, got 'both'"),
        ({"name": "dia", "reduction": 17}, "`reduction` must be between 1 and the 16 channels, got 17"),
        ({"name": "dsu", "reduction": 0}, "`reduction` must be between 1 and the 16 channels, got 0"),
        (
            {"name": "rnn", "activation": "gelu"},
            "`activation` must be one of identity, tanh, relu, sigmoid, got 'gelu'",
        ),
        ({"name": "rnn", "initial_state": "learned"}, "`initial_state` must be zeros or random, got 'learned'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_cell(channels=C, **arguments)
