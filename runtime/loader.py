"""Runs the modules of a verified artifact: the very bytes that were checked, not the files.

They become a synthetic package whose relative imports work (`from ..kernels import rms_norm`). Each
source is registered in linecache, so that tracebacks and Triton's compiler find the checked text.
Only the modules that were asked for can be imported: a rank's own role, the kernels, the cost. What lies
beside them, a kernel's C source, they read by `pkgutil.get_data`.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import linecache
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType

from ..errors import BadInput, RuntimeFault


class ArtifactModules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """The Python modules of one artifact under a package name of their own.

    contents: verified bytes by relative path; wanted: the prefixes of the paths that may be imported.
    """

    def __init__(
        self, directory: Path, contents: Mapping[str, bytes], wanted: Sequence[str]
    ) -> None:
        digest = hashlib.sha256(str(directory).encode())
        for path in sorted(contents):
            digest.update(hashlib.sha256(contents[path]).digest())
        self.package = f"mnemoc_artifact_{digest.hexdigest()[:12]}"
        self.directory = directory
        self._sources: dict[str, tuple[str, str]] = {}  # module name → file name, source
        self._contents = {str(directory / path): data for path, data in contents.items()}
        for path, data in contents.items():
            if path.endswith(".py") and path.startswith(tuple(wanted)):
                name = path.removesuffix(".py").removesuffix("__init__").strip("/")
                module = f"{self.package}.{name.replace('/', '.')}"
                self._sources[module] = (str(directory / path), data.decode())
        self._folders = {self.package}
        for module in self._sources:
            parts = module.split(".")
            self._folders |= {".".join(parts[:end]) for end in range(2, len(parts))}
            if self._sources[module][0].endswith("__init__.py"):
                self._folders.add(module)

    def load(self, name: str) -> ModuleType:
        """Import a module of the artifact by its dotted name ("schedule.stage_0", "cost").

        BadInput: there is none; RuntimeFault: it needs a package that is not installed.
        """
        if self not in sys.meta_path:
            sys.meta_path.append(self)
        if f"{self.package}.{name}" not in self._sources:
            path = self.directory / f"{name.replace('.', '/')}.py"
            raise BadInput("the plan has no such file", where=path, do="make the plan again")
        try:
            return importlib.import_module(f"{self.package}.{name}")
        except ImportError as error:
            raise RuntimeFault(f"what the plan needs is missing: {error}") from error

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._sources and fullname not in self._folders:
            return None
        origin = self._sources.get(fullname, (str(self.directory), ""))[0]
        spec = importlib.machinery.ModuleSpec(
            fullname, self, origin=origin, is_package=fullname in self._folders
        )
        spec.has_location = fullname in self._sources
        return spec

    def get_data(self, path: str) -> bytes:
        """The verified contents of a file that lies beside a module."""
        if path not in self._contents:
            raise FileNotFoundError(errno.ENOENT, "the plan has no such file", path)
        return self._contents[path]

    def get_source(self, fullname: str) -> str:
        return self._sources.get(fullname, ("", ""))[1]

    def get_code(self, fullname: str) -> CodeType:
        file, source = self._sources.get(fullname, (str(self.directory), ""))
        lines = source.splitlines(keepends=True)
        linecache.cache[file] = (len(source), None, lines, file)
        return compile(source, file, "exec", dont_inherit=True)

    def is_package(self, fullname: str) -> bool:
        return fullname in self._folders
