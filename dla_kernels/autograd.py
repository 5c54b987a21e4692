"""What the ops' autograd Functions share."""

import inspect

import torch


class Function(torch.autograd.Function):
    """A Function around which little happens: on small maps that would take longer than the op."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # `apply` asks for the signature at every call, and has it worked out anew where it is not kept.
        cls.forward.__signature__ = inspect.signature(cls.forward)

    @classmethod
    def call(cls, *args):
        """``apply``; where no gradients are taken, ``forward`` alone."""
        return cls.apply(*args) if torch.is_grad_enabled() else cls.forward(*args)
