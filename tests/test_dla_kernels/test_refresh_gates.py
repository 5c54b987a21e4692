import pytest
import torch
from helpers import assert_close, dsu_weights, require_grad

from dla_kernels import gap_dsu, refresh_gates


def arguments(batch, layers, channels, form):
    features, gates = torch.randn(2, batch, layers, channels, dtype=torch.float64)
    h, c = torch.randn(2, batch, channels, dtype=torch.float64)
    return features, gates, h, c, dsu_weights(form, channels, 3)


@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("gate", ["context", "hidden"])
@pytest.mark.parametrize("layers", [1, 2, 7, 36])
def test_is_one_dsu_step_for_each_layer(form, gate, layers):
    features, gates, h, c, weights = arguments(3, layers, 8, form)
    got = refresh_gates(features, gates, h, c, weights, gate=gate)
    for m in range(layers):
        _, hidden, context, _ = gap_dsu(features[:, m] * gates[:, m], h, c, weights)
        d = context if gate == "context" else hidden
        assert_close(got[:, m], gates[:, m] * d, 1e-14, f"gates of layer {m}")


@pytest.mark.parametrize("form", ["joint", "split"])
def test_gradcheck_of_the_reference(form):
    features, gates, h, c, weights = arguments(2, 3, 4, form)
    require_grad(features, gates, h, c, *weights)
    inputs = (features, gates, h, c, *weights)
    assert torch.autograd.gradcheck(lambda y, g, h, c, *w: refresh_gates(y, g, h, c, w, backend="reference"), inputs)
    assert torch.autograd.gradgradcheck(
        lambda y, g, h, c, *w: refresh_gates(y, g, h, c, w, backend="reference"), inputs
    )


def test_products_of_many_gates_keep_their_digits():
    """Sigmoid gates halve a layer at each refresh: after 36 the product is near 1e-11, far below half precision."""
    with torch.device("cpu"):  # the same numbers on every device
        features, _, h, c, weights = arguments(1, 1, 8, "split")
    device = torch.get_default_device()
    features, h, c, *weights = (t.to(device) for t in (features, h, c, *weights))
    exact = gates = torch.ones(1, 1, 8, dtype=torch.float64)
    single = gates.float()
    for _ in range(36):
        exact = refresh_gates(features, exact, h, c, weights, gate="hidden")
        single = refresh_gates(
            features.float(), single, h.float(), c.float(), [w.float() for w in weights], gate="hidden"
        )
    assert exact.abs().max() < 1e-4
    assert_close(single, exact, 1e-4)
