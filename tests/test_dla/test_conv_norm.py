"""A convolution's output is written over only where nobody else can have it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import dla
from dla.conv_norm import conv_norm


@pytest.fixture
def block():
    conv, bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4).eval()
    nn.init.uniform_(bn.running_mean)
    return conv, bn


def expected(conv, bn, x):
    return bn(conv(x)).relu()


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_hook_keeps_what_the_convolution_computed(block, everywhere):
    conv, bn = block
    x, kept = torch.randn(2, 4, 5, 5), []

    def keep(module, args, output):
        kept.append(output)

    handle = register_module_forward_hook(keep) if everywhere else conv.register_forward_hook(keep)
    try:
        with torch.no_grad():
            out, _ = conv_norm(conv, bn, x, relu="branch")
    finally:
        handle.remove()
    assert torch.equal(kept[0], conv(x))
    torch.testing.assert_close(out, expected(conv, bn, x))


class Repeats(nn.Conv2d):
    """Returns the same tensor at every call."""

    def forward(self, x):
        if not hasattr(self, "last"):
            self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("conv", [nn.Identity(), Repeats(4, 4, 1)])
def test_another_module_in_the_convolution_s_place(block, conv):
    _, bn = block
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        before = conv(x).clone()
        out, _ = conv_norm(conv, bn, x, x, relu="sum")
        assert torch.equal(conv(x), before)
        torch.testing.assert_close(out, (bn(before) + x).relu())


def test_a_hook_keeps_what_layer_attention_took():
    model, kept = dla.create_model("resnet20_dla_b", num_classes=10).eval(), []
    x = torch.randn(2, 3, 16, 16)
    attention = model.layer1.attention[1]
    handle = attention.register_forward_hook(lambda module, args, output: kept.append((args[0], output[0])))
    with torch.no_grad():
        model(x)
        handle.remove()
        (before, after) = kept[0]
        assert before.data_ptr() != after.data_ptr()
        plain = model(x)
    torch.testing.assert_close(plain, model(x), rtol=1e-4, atol=1e-4)


def test_a_hook_keeps_what_the_next_layer_is_given():
    model, kept = dla.create_model("resnet56_dla_l", num_classes=10).eval(), []
    handle = model.layer1.attention[0].register_forward_hook(lambda m, args, output: kept.append(output[2]))
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
        handle.remove()
    assert kept[0]._version == 0


@pytest.mark.parametrize("name", ["resnet20_dla_l", "resnet20_dla_b"])
def test_inference_is_the_same_with_and_without_gradients(name):
    model = dla.create_model(name, num_classes=10)
    x = torch.randn(2, 3, 16, 16)
    model(x)  # BatchNorm's statistics
    model.eval()
    given, state = x.clone(), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(x)
    torch.testing.assert_close(logits, model(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(x, given)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
