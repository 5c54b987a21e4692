"""Importing a module of ours once a module of others is imported, without importing that one."""

import importlib
import importlib.abc
import sys
import warnings


def import_with(name: str, ours: str) -> None:
    """Imports ``ours`` right after ``name``: now where that is imported, else when somebody imports it.

    A version of ``name`` that ``ours`` does not fit gives a warning; it must not stop who needs nothing of ``ours``.
    """
    if sys.modules.get(name) is not None:
        _import(ours, name)
    else:
        sys.meta_path.insert(0, _Finder(name, ours))


def _import(ours: str, name: str) -> None:
    try:
        importlib.import_module(ours)
    except ImportError as error:
        warnings.warn(f"{ours} was not imported with {name}: {error}", stacklevel=2)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, ours: str):
        self.name = name
        self.ours = ours

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        finders = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next(filter(None, (f.find_spec(name, path, target) for f in finders)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_both(module):
                sys.meta_path.remove(self)
                load(module)
                _import(self.ours, self.name)

            # This loader is of this spec alone.
            spec.loader.exec_module = load_both
        return spec
