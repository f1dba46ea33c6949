"""Names for what ``multiprocessing`` shares: shared memory and semaphores that outlive their maker bear his name.

Python names them by chance. With a prefix of its own, what a worker leaves can be told from what is somebody else's,
and is removed after its death. The modules are not imported for it: most workers never need them.

What a child that was made by "spawn" or "forkserver" shares has Python's own names again.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

#: random hexadecimal digits after the prefix
_RANDOM_CHARS: Final = 16


def name_with(prefix: str) -> None:
    """Have what this process makes from now on named so; "" changes nothing.

    Args:
        prefix: without a slash, such as ``mcpb-…-``.
    """
    if not prefix:
        return

    def semaphores(module: ModuleType) -> None:
        config: dict[str, object] = module.current_process()._config  # noqa: SLF001 (nothing public names them)
        config["semprefix"] = f"/{prefix}mp"

    def memory(module: ModuleType) -> None:
        begin = f"/{prefix}psm_"
        # the second is what some systems allow at most; Linux takes 255
        vars(module).update(_SHM_NAME_PREFIX=begin, _SHM_SAFE_NAME_LENGTH=len(begin) + _RANDOM_CHARS)

    changes: dict[str, Callable[[ModuleType], None]] = {
        "multiprocessing.process": semaphores,
        "multiprocessing.shared_memory": memory,
    }
    for name in list(changes):
        if name in sys.modules:
            changes.pop(name)(sys.modules[name])
    if changes:
        sys.meta_path.insert(0, _Finder(changes))


class _Finder(importlib.abc.MetaPathFinder):
    """Changes modules when they are imported."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self._changes = changes

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """Find one of our modules as the others would, once."""
        del path, target
        change = self._changes.pop(fullname, None)
        if change is None:
            return None
        if not self._changes:
            sys.meta_path.remove(self)
        # we no longer know the name, so this asks the finders after us
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, change)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, and changes it afterwards."""

    def __init__(self, loader: Any, change: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As its own loader does."""
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """As its own loader does, then change the module."""
        self._loader.exec_module(module)
        self._change(module)
