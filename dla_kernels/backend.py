"""Which implementation of an op runs: the backends, and the choice between them.

A backend is asked for by an op's argument ``backend``, else by :func:`use_backend`, else by the environment variable
``DLA_KERNELS_BACKEND``, else it is "auto": the first of :data:`BACKENDS` that can run, Triton's interpreter left out.
On a GPU for which :data:`dla_kernels.measured.FASTEST` has a figure of the op, the faster one comes first instead.
One that is asked for by name runs or raises its reason; only "auto" falls back.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from dla_kernels import measured, native, triton
from dla_kernels.common import constant_to_a_compiler

#: By name, the one that "auto" prefers first.
BACKENDS = ("native", "triton", "reference")
ENVIRONMENT = "DLA_KERNELS_BACKEND"

_in_context: list[str] = []


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Sets the backend of all ops called inside the ``with`` block that do not name one themselves."""
    _check(name, "`name`")
    _in_context.append(name)
    try:
        yield
    finally:
        _in_context.pop()


def backends() -> dict[str, bool | str]:
    """The backends by name: True for one that runs on some device here, otherwise the reason why it does not."""
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    reasons = {name: [why_not(name, device) for device in devices] for name in BACKENDS}
    return {name: True if None in given else given[-1] for name, given in reasons.items()}


def can_run(backend: str, device: torch.device, raise_error: bool = False) -> bool:
    """Whether ``backend`` can run ops on ``device``.

    Raises:
        RuntimeError: it cannot, and ``raise_error`` is set; the message is the reason.
    """
    reason = why_not(backend, device)
    if reason is not None and raise_error:
        raise RuntimeError(f"backend {backend}: {reason}")
    return reason is None


def preference(device: torch.device, op: str | None = None) -> tuple[str, ...]:
    """The backends of an op on ``device``, the one that "auto" prefers first."""
    if not measured.FASTEST or device.type != "cuda":
        return BACKENDS
    first = measured.FASTEST.get(_capability(device), {}).get(op, BACKENDS[0])
    return first, *(name for name in BACKENDS if name != first)


@constant_to_a_compiler  # a compiler does not see into a device
def _capability(device: torch.device) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def choose(device: torch.device, backend: str | None = None, op: str | None = None) -> str:
    """The backend that ``op`` runs on ``device``, given its argument ``backend``; without an op, most of them.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend that was asked for cannot run.
    """
    asked = _asked(backend)
    if asked != "auto":
        can_run(asked, device, raise_error=True)
        return asked
    for name in preference(device, op):
        if why_not(name, device) is None and not (name == "triton" and triton.interpreting()):
            return name


def _asked(backend: str | None) -> str:
    if backend is not None:
        return _check(backend, "`backend`")
    if _in_context:
        return _in_context[-1]
    asked = os.environ.get(ENVIRONMENT)
    return _check(asked, ENVIRONMENT) if asked else "auto"


def _check(backend: str, source: str) -> str:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def why_not(backend: str, device: torch.device) -> str | None:
    """The reason why ``backend`` cannot run ops on ``device``; None where it can."""
    if backend == "reference":
        return None
    return triton.why_not(device) if backend == "triton" else native.why_not(device)
