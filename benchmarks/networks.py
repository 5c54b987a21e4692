"""What the questions about blocks and whole networks share: the forms in which one is run, and its two tasks."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dla_kernels
from dla.benchmarks import literal
from dla.benchmarks.measure import Function, Wrong
from dla.stage import BaseStage, LightStage

#: The largest relative difference of two forms in float64, and how much larger than the reference's the error in
#: float32 may be.
SAME, SLACK = 1e-9, 8


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


def check(network: nn.Module, x: Tensor, task: str, names: Sequence[str] = ("literal",)) -> None:
    """The network and its other forms give the same in float64: output and, of a training step, gradients.

    In float32 its output is about as near to theirs as the reference's is. How much of a rounding error a network lets
    through changes tenfold with the last digits of its input, so the largest error of several inputs counts.

    Raises:
        Wrong: they do not.
    """
    network = copy.deepcopy(network).train()
    network(x)  # so that its running statistics fit what comes
    single = copy.deepcopy(network), On(copy.deepcopy(network), "reference")
    eps = torch.finfo(torch.float32).eps
    inputs = [x * (1 + k * eps) for k in range(4)]
    network, x = network.double(), x.double()
    others = {"reference": On(copy.deepcopy(network), "reference")}
    if "literal" in names:
        others["literal"] = literal_form(network)
    got = _results(network, x, task)
    for name, other in others.items():
        for what, expected in _results(other, x, task).items():
            error = ((got[what] - expected).norm() / expected.norm()).item()
            if not error <= SAME:
                raise Wrong(f"its {what} differs from the {name} form's by {error:.1e}")
    errors = []
    for near in inputs:
        expected = _output(network, near.double(), task)
        errors.append([((_output(form, near, task) - expected).norm() / expected.norm()).item() for form in single])
    own, allowed = torch.tensor(errors).amax(0).tolist()  # a NaN stays
    if not own <= SLACK * allowed + eps:
        raise Wrong(f"in float32 its output is off by {own:.1e}, the reference's by {allowed:.1e}")


def _output(network: nn.Module, x: Tensor, task: str) -> Tensor:
    with torch.no_grad():
        return network.train(task != "inference")(x)


def _results(network: nn.Module, x: Tensor, task: str) -> dict[str, Tensor]:
    if task == "inference":
        return {"output": _output(network, x, task)}
    x = x.clone().requires_grad_()
    out = network.train()(x)
    # A weighting of its own for each element: under a last BatchNorm the gradient of the plain sum is zero.
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    parameters = [p for p in network.parameters() if p.requires_grad]
    grads = torch.autograd.grad((out * weights).sum(), [x, *parameters], materialize_grads=True)
    # All in one vector: alone, those that are zero in exact arithmetic would be compared by their rounding errors.
    return {"output": out.detach(), "gradient": torch.cat([g.flatten() for g in grads])}


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
