"""What the ops' autograd Functions share."""

import torch


class Function(torch.autograd.Function):
    """A Function around which little happens: on small maps that would take longer than the op."""

    @classmethod
    def call(cls, *args):
        """``apply``; where no gradients are taken, ``forward`` alone."""
        if not torch.is_grad_enabled():
            return cls.forward(*args)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return cls.apply(*args)
        # What `apply` comes to, without binding the arguments to forward's signature first: all of them are given.
        return super(torch.autograd.Function, cls).apply(*args)
