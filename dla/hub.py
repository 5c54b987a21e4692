"""Sharing of models: ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``, by huggingface_hub.

A shared model is a folder or a repository of ``config.json``, the arguments that build it, and ``model.safetensors``.
"""

from pathlib import Path
from pickle import UnpicklingError

try:
    import safetensors
    from huggingface_hub import PyTorchModelHubMixin
except ImportError as error:
    _missing = error

    class PyTorchModelHubMixin:
        """Stands in where huggingface_hub or safetensors is missing: models work, each way to share them says so."""

        def __init_subclass__(cls, **info):
            super().__init_subclass__()

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            raise ImportError("to share models, install huggingface_hub and safetensors") from _missing

        def save_pretrained(self, *args, **kwargs):
            self.from_pretrained()

        push_to_hub = save_pretrained


class Shared(PyTorchModelHubMixin):
    """Mixin of a model whose ``arguments`` are those of its constructor, as values that JSON knows."""

    def save_pretrained(self, save_directory: str | Path, *, config: dict | None = None, **kwargs) -> str | None:
        """Writes the model into a folder; see :meth:`huggingface_hub.ModelHubMixin.save_pretrained`."""
        # On its own the mixin takes an argument named `config` for all of them.
        return super().save_pretrained(save_directory, config=config or self.arguments, **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, strict: bool = True, **kwargs):
        try:
            return super()._from_pretrained(model_id=model_id, strict=strict, **kwargs)
        except (TypeError, RuntimeError, UnpicklingError, safetensors.SafetensorError) as error:
            raise ValueError(f"{model_id} holds no {cls.__name__} that its config.json describes: {error}") from error
