"""Registers the classes of saved models with Keras as soon as Keras is imported.

Then `keras.saving.load_model` works after `import mm_model`, which does not import Keras itself.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_keras() -> None:
    """Register the classes now if Keras is imported, else when it is."""
    if "keras" in sys.modules:
        if not _is_importing("keras"):
            import mm_model.loading  # noqa: F401
    elif not any(isinstance(finder, _KerasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _KerasFinder())


def _is_importing(package: str) -> bool:
    """Whether a module of a package is being imported."""
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == package
    )


class _KerasFinder(MetaPathFinder):
    """Finds Keras once, and registers the classes after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "keras":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module with another loader, then registers the classes."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # A module of this package that imports Keras registers its own classes; importing the
        # others now would be a cycle.
        if not _is_importing("mm_model"):
            import mm_model.loading  # noqa: F401
