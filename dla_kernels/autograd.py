"""What the ops' autograd Functions share."""

import inspect
from types import SimpleNamespace

import torch


class _AllGiven(inspect.Signature):
    """Binds nothing: every argument is given, by position.

    ``apply`` binds them to forward's signature first, which took tens of microseconds a call.
    """

    def bind(self, *args):
        return SimpleNamespace(args=args, kwargs={}, apply_defaults=lambda: None)


class Function(torch.autograd.Function):
    """A Function around which little happens: on small maps that would take longer than the op."""

    def __init_subclass__(cls):
        cls.forward.__signature__ = _AllGiven(inspect.signature(cls.forward).parameters.values())

    @classmethod
    def call(cls, *args):
        """``apply``; where no gradients are taken, ``forward`` alone."""
        return cls.apply(*args) if torch.is_grad_enabled() else cls.forward(*args)
