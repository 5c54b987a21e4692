"""What PyTorch expects of any model: compile, export, functional calls, checkpointing, copies."""

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_close, gradients
from torch.utils.checkpoint import checkpoint

import dla

NAMES = ["resnet20_lii", "resnet20_mrla_b", "resnet20_dla_b", "resnet20_dla_l"]
#: The readings between them take every branch of the stages.
CONFIGS = ["paper", "released"]


def build(name, config="paper"):
    torch.manual_seed(0)
    return dla.create_model(name, config=dla.CONFIGS[config]).double()


def images(batch):
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


def assert_same_gradients(model, actual, expected):
    """What a BatchNorm takes away, such as the bias of the one before it, has rounding errors for a gradient."""
    largest = max(gradient.norm() for gradient in expected)
    for (key, _), a, b in zip(model.named_parameters(), actual, expected, strict=True):
        assert_close(a, b, 1e-9, key, at_least=1e-6 * largest)


@pytest.mark.parametrize("name", ["resnet20_dla_b", "resnet20_dla_l"])
@pytest.mark.parametrize("config", CONFIGS)
def test_compiles_to_one_graph_forward_and_backward(name, config):
    eager, model = build(name, config), build(name, config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images(4)
    expected, got = eager(x), compiled(x)
    assert_close(got, expected, 1e-12)
    assert_same_gradients(
        eager, gradients([got], list(model.parameters())), gradients([expected], list(eager.parameters()))
    )
    for (key, a), b in zip(model.named_buffers(), eager.buffers(), strict=True):
        assert_close(a, b, 1e-12, key)


@pytest.mark.parametrize("name", ["resnet20_dla_b", "resnet20_dla_l"])
def test_batch_size_recompiles_at_most_once(name):
    model = build(name)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for batch in (4, 6, 3, 8, 5):
        compiled(images(batch))
    assert len(graphs) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_dla_b", "resnet20_dla_l"])
def test_compiles_with_inductor(name):
    eager, model = build(name), build(name)
    x = images(4)
    got = torch.compile(model, fullgraph=True)(x)
    assert_close(got, eager(x), 1e-9)
    got.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_exported_program_survives_a_round_trip(name):
    model = build(name).eval()
    x = images(4)
    batch = torch.export.Dim("batch", min=2, max=64)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for size in (4, 7):
        x = images(size)
        assert_close(program(x), model(x), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_functional_call(name):
    model, other = build(name).eval(), dla.create_model(name).double().eval()
    x = images(2)
    state = dict(other.named_parameters()) | dict(other.named_buffers())
    assert_close(torch.func.functional_call(model, state, x), other(x), 1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("config", CONFIGS)
def test_activation_checkpointing_changes_no_gradient(name, config):
    model = build(name, config)
    other = copy.deepcopy(model)
    x = images(4)
    parameters, others = list(model.parameters()), list(other.parameters())
    expected = gradients([model(x)], parameters)

    def stages(x):
        x = other.act(other.bn1(other.conv1(x)))
        for stage in other.stage_names:
            x = checkpoint(getattr(other, stage), x, use_reentrant=False)
        return other.forward_head(x)

    assert_same_gradients(model, gradients([stages(x)], others), expected)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name):
    model = build(name).eval()
    x = images(2)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    model, other = build(name), dla.create_model(name).double()
    other.load_state_dict(model.state_dict())
    x = images(2)
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors(name):
    with torch._subclasses.FakeTensorMode():
        model = dla.create_model(name)
        out = model(torch.randn(2, 3, 8, 8))
    assert out.shape == (2, 10)
