"""What the questions about blocks and whole networks share: the forms in which one is run, and its two tasks."""

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dla_kernels
from dla.benchmarks import literal
from dla.benchmarks.measure import Function, Wrong
from dla.stage import BaseStage, LightStage

#: The largest relative difference of two forms' outputs in float64.
SAME = 1e-9


class Literal(nn.Module):
    """A stage that computes the equations as they are written, each prior map rewritten at every layer."""

    def __init__(self, stage: BaseStage | LightStage):
        super().__init__()
        self.stage = stage
        self.compute = literal.base_stage if isinstance(stage, BaseStage) else literal.light_stage

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self.stage, x)


def literal_form(network: nn.Module) -> nn.Module:
    """A copy whose attention stages are literal; the network itself, where it is such a stage, is wrapped."""
    network = copy.deepcopy(network)
    if isinstance(network, (BaseStage, LightStage)):
        return Literal(network)
    for name, stage in list(network.named_children()):
        if isinstance(stage, (BaseStage, LightStage)):
            setattr(network, name, Literal(stage))
    return network


class On(nn.Module):
    """A network whose ops run on one backend."""

    def __init__(self, network: nn.Module, backend: str):
        super().__init__()
        self.network, self.backend = network, backend

    def forward(self, x: Tensor) -> Tensor:
        with dla_kernels.use_backend(self.backend):
            return self.network(x)


def check(network: nn.Module, x: Tensor, names=("literal",)) -> None:
    """The network and its other forms give the same in float64.

    Raises:
        Wrong: they do not.
    """
    network, x = copy.deepcopy(network).double().train(), x.double()
    others = {"reference": On(copy.deepcopy(network), "reference")}
    if "literal" in names:
        others["literal"] = literal_form(network)
    got = network(x)
    for name, other in others.items():
        expected = other(x)
        error = ((got - expected).norm() / expected.norm()).item()
        if not error <= SAME:
            raise Wrong(f"its output differs from the {name} form's by {error:.1e}")


def train_step(network: nn.Module, x: Tensor, y: Tensor | None = None) -> Function:
    """Forward and backward; without labels the gradient is of the sum."""
    network.train()

    def step():
        network.zero_grad(set_to_none=True)
        out = network(x)
        (out.float().sum() if y is None else F.cross_entropy(out, y)).backward()

    return step


def inference(network: nn.Module, x: Tensor, y: Tensor | None = None) -> Function:
    network.eval()
    return functools.partial(torch.no_grad()(network), x)


#: Column and function of the two tasks.
TASKS: dict[str, Callable[..., Function]] = {"train step": train_step, "inference": inference}
