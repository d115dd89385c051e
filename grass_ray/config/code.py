"""Code of a user's own: found beside a method file or on PYTHONPATH, kept as text, and run from that text.

::

    code = find_code("my_package.samplers", Path("folder/of/the/file"))
    code.install()                                       # from now on its modules can be imported
    sampler_class = load("my_package.samplers:TopHeavy", code.sha256)

The text is what is hashed, what travels to the workers of a sweep, what a record keeps, and what is executed, in every
process the same; files that change meanwhile change nothing. Only a method file that the user names installs code: a
configuration or a record that mentions some does not.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import import_module
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

from grass_ray.errors import ConfigError

MOST_BYTES = 1024**2
_NEVER_OWN = sys.stdlib_module_names | {"grass_ray"}


class Code(BaseModel):
    """The modules that one import path needs.

    Attributes:
        files: text of each module by its path, such as ``my_package/samplers.py``.
    """

    model_config = ConfigDict(frozen=True)

    files: dict[str, str]

    @cached_property
    def sha256(self) -> str:
        """Hash of the paths and texts."""
        sha = hashlib.sha256()
        for path, text in sorted(self.files.items()):
            for part in (path, text):
                sha.update(len(part.encode()).to_bytes(8, "big") + part.encode())
        return sha.hexdigest()

    def install(self) -> None:
        """Make the modules importable in this process, in place of what had their names in code installed before.

        Raises:
            ConfigError: a module of that name is loaded already, from somewhere else.
        """
        for name in sorted({path.partition("/")[0].removesuffix(".py") for path in self.files}):
            loaded = sys.modules.get(name)
            if loaded is not None and getattr(loaded, "__loader__", None) is not _FINDER:
                where = getattr(loaded, "__file__", None) or "the interpreter"
                raise ConfigError(f"the module name {name} is taken by {where}; give your module another name")
        _FINDER.add(self)


class _Finder(MetaPathFinder, ExecutionLoader):
    """Imports modules from texts."""

    def __init__(self) -> None:
        self.installed: dict[str, Code] = {}
        self._files: dict[str, str] = {}

    def add(self, code: Code) -> None:
        """Take over the files of ``code``."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        if any(self._files.get(path, text) != text for path, text in code.files.items()):
            # an edited file: what was loaded from the old text, or with it, is loaded anew
            for name, module in list(sys.modules.items()):
                if getattr(module, "__loader__", None) is self:
                    del sys.modules[name]
            self.installed = {sha: old for sha, old in self.installed.items() if _agree(old, code)}
            self._files = {path: text for old in self.installed.values() for path, text in old.files.items()}
        self.installed[code.sha256] = code
        self._files |= code.files

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The module or package of that name; None if there is no such text."""
        if self.get_filename(fullname) is None:
            return None
        spec = ModuleSpec(fullname, self, origin=self.get_filename(fullname), is_package=self.is_package(fullname))
        spec.has_location = True  # so that tracebacks and inspect find the source
        return spec

    def get_filename(self, fullname: str) -> str:
        """Path of the module among the files; None if there is none."""
        stem = fullname.replace(".", "/")
        candidates = (f"{stem}/__init__.py", f"{stem}.py")
        found = next((path for path in candidates if path in self._files), None)
        if found is None and any(path.startswith(f"{stem}/") for path in self._files):
            found = candidates[0]  # a folder without __init__.py
        return found  # type: ignore[return-value]

    def is_package(self, fullname: str) -> bool:
        """Whether it is a folder of modules."""
        return self.get_filename(fullname).endswith("/__init__.py")

    def get_source(self, fullname: str) -> str:
        """The text."""
        return self._files.get(self.get_filename(fullname), "")

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """None: an ordinary module."""
        return None


_FINDER = _Finder()


def _agree(first: Code, second: Code) -> bool:
    return all(second.files.get(path, text) == text for path, text in first.files.items())


def installed_code() -> tuple[Code, ...]:
    """The code that this process may run, for the workers that are to run it, too."""
    return tuple(_FINDER.installed.values())


def text_of(hashes: Sequence[str]) -> dict[str, str]:
    """The files of the installed code with these hashes, by path."""
    known = [_FINDER.installed[sha] for sha in hashes if sha in _FINDER.installed]
    return {path: text for code in known for path, text in sorted(code.files.items())}


def load(target: str, sha256: str | None) -> type:
    """Import the class at ``module:Name`` from installed code.

    Args:
        target: import path.
        sha256: hash of the code that it belongs to.

    Raises:
        ConfigError: no code with this hash is installed, it cannot be imported, or has no such class.
    """
    module_name, _, name = target.partition(":")
    check_installed(target, sha256)
    try:
        module = import_module(module_name)
    except Exception as error:
        raise ConfigError(f"{target}: cannot import {module_name}: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        own = [key for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module_name]
        what = "has no class" if found is None else f"{name} is not a class; it has the class(es)"
        raise ConfigError(f"{target}: {module_name} {what} {name if found is None else ''}".rstrip() + _named(own))
    return found


def _named(classes: Sequence[str]) -> str:
    return f"; available: {', '.join(classes)}" if classes else "; it has no classes"


def check_installed(target: str, sha256: str | None) -> None:
    """Raise :class:`ConfigError` if this process may not run the code of ``target``, or has another version of it."""
    if sha256 in _FINDER.installed:
        return
    path = target.partition(":")[0].replace(".", "/")
    here = [code for code in _FINDER.installed.values() if {f"{path}.py", f"{path}/__init__.py"} & code.files.keys()]
    if not here:
        raise ConfigError(f"{target} is code of a user's own; give the method file that names it with --method-file")
    raise ConfigError(
        f"the code of {target} is not the code of this configuration: its sha256 is {here[0].sha256[:12]}, and was "
        f"{(sha256 or 'not recorded')[:12]}; go back to that code, or start anew"
    )


# ------------------------------------------------------------------------------------------------------------ finding


def find_code(module: str, folder: Path) -> Code:
    """Read the module's top-level package, and the modules that its files import and that are not installed.

    Args:
        module: dotted name.
        folder: where modules are looked for first; then in the entries of ``sys.path``, such as those of PYTHONPATH.

    Raises:
        ConfigError: there is no such module, it is too large, or a file is not Python.
    """
    if module.partition(".")[0] in _NEVER_OWN:
        raise ConfigError(
            f"{module} is a module of Python's or of this package; give a module of your own another name"
        )
    roots = [folder.resolve(), *_own_roots()]
    files: dict[str, str] = {}
    waiting, seen = [module.partition(".")[0]], set()
    while waiting:
        top = waiting.pop()
        seen.add(top)
        for path, file in _files_of(top, roots):
            files[path] = _read(file)
            if sum(map(len, files.values())) > MOST_BYTES:
                raise ConfigError(
                    f"{module}: {top} and what it imports have more than {MOST_BYTES // 1024**2} MiB of Python files; "
                    "put what you need into a small module of your own"
                )
            waiting += sorted(_imports(files[path], file) - seen - set(waiting))
    stem = module.replace(".", "/")
    if not {f"{stem}.py", f"{stem}/__init__.py"} & files.keys():
        raise ConfigError(
            f"there is no module {module} beside the method file ({roots[0]}) or on PYTHONPATH"
            + (f" ({os.pathsep.join(map(str, roots[1:]))})" if roots[1:] else "")
        )
    return Code(files=files)


def _own_roots() -> list[Path]:
    """The folders of ``sys.path`` that hold no installed packages."""
    installed = [Path(place).resolve() for place in sysconfig.get_paths().values()]
    folders = [Path(entry or os.curdir).resolve() for entry in sys.path]
    return [
        folder
        for folder in dict.fromkeys(folders)
        if folder.is_dir() and not any(folder.is_relative_to(place) for place in installed)
    ]


def _files_of(top: str, roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Path and file of every module of a top-level package, or of the single module of that name."""
    if top in _NEVER_OWN:
        return
    for root in roots:
        if (root / top).is_dir() and any((root / top).glob("*.py")):
            for file in sorted((root / top).rglob("*.py")):
                yield file.relative_to(root).as_posix(), file
            return
        if (root / f"{top}.py").is_file():
            yield f"{top}.py", root / f"{top}.py"
            return


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None


def _imports(text: str, file: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    try:
        tree: Any = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{file} is not Python: {error}") from None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names
