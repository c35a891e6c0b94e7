"""A layout's job on edited source: transmamba is imported anew with one text replaced."""

import importlib.abc
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from typing import Any

from tests.parity.mutations import Mutation


class _Edited(SourceFileLoader):
    def __init__(self, loader: SourceFileLoader, mutation: Mutation):
        super().__init__(loader.name, loader.path)
        self._mutation = mutation

    def get_code(self, fullname: str) -> Any:
        source = self.get_source(fullname) or ""
        if source.count(self._mutation.old) != 1:
            raise LookupError(f"{self._mutation.name}: its text is not in {fullname} exactly once")
        return compile(source.replace(self._mutation.old, self._mutation.new), self.path, "exec")


class _Editor(importlib.abc.MetaPathFinder):
    """Finds the one module that is edited; the others are found as always."""

    def __init__(self, mutation: Mutation):
        self._mutation = mutation

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != self._mutation.module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None and isinstance(spec.loader, SourceFileLoader)
        spec.loader = _Edited(spec.loader, self._mutation)
        return spec


def mutated_job(mutation: Mutation, options: dict[str, Any], n_steps: int) -> Any:
    """As `job.job`, by code that has the fault; only in a process that ends afterwards."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transmamba" or name.startswith("tests.parity")]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Editor(mutation))
    from tests.parity.job import job

    return job(options, n_steps)
