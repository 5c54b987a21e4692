"""What the ops' autograd Functions share."""

import inspect
from types import SimpleNamespace

import torch


class _AllGiven(inspect.Signature):
    """Binds nothing: every argument is given, by position.

    From torch 2.14 on the arguments are bound to forward's signature on the way to it, tens of microseconds a call.
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
        if not torch.is_grad_enabled():
            return cls.forward(*args)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        # What `apply` comes to, without binding the arguments to forward's signature first: all of them are given.
        return super(torch.autograd.Function, cls).apply(*args)
