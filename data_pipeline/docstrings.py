"""The embedded corpus: docstrings of the standard library and installed packages, a document per module."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transmamba.data_pipeline.text import Document
from transmamba.data_pipeline.workers import map_in_order

# Where the corpus stops; a module that crosses it is the last one.
MAX_CHARS = 12_000_000
# Modules with less documentation than this, or that are mostly code or tables, are not worth the parsing.
MIN_CHARS = 400
MIN_SHARE = 0.12

_SKIPPED_FOLDERS = {
    "__pycache__",
    "_vendor",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "site-packages",
    "test",
    "testing",
    "tests",
    "transmamba",
}
_SKIPPED_FILE = re.compile(r"(test_.*|.*_test|tests?|conftest|__editable__.*)\.py")
_TRIPLE_QUOTED = re.compile(rb'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of the installed modules and what was left out.

    `n_modules` counts all modules considered, `n_unread` those after the limit of `max_chars`; `last_module`
    is the last one used.
    """

    documents: tuple[Document, ...]
    n_modules: int
    n_unread: int
    last_module: str
    max_chars: int

    @property
    def description(self) -> str:
        """One line for the manifest and the screen."""
        text = f"docstrings of {len(self.documents)} modules of the standard library and the installed packages"
        if self.n_unread:
            text += (
                f", in the order standard library, then packages by name, up to {self.max_chars:,} "
                f"characters (last module {self.last_module}, {self.n_unread} of {self.n_modules} not read)"
            )
        return text


def read_installed_docstrings(
    *, workers: int, max_chars: int = MAX_CHARS, advance: Callable[[int], None] = lambda n_chars: None
) -> Corpus:
    """Collect the docstrings of everything installed, without importing any of it.

    Order: the standard library, then packages by name, modules by path; tests and vendored copies are left
    out.
    A docstring seen before is left out, so the result does not depend on `workers`.

    Args:
        workers: processes that parse, >= 1.
        max_chars: stop after the module that reaches this many characters.
        advance: told the characters of each document as it is read.

    Raises:
        WorkerDied: a process that parses was killed.
    """
    modules = list_modules()
    documents: list[Document] = []
    seen: set[bytes] = set()
    n_chars = n_read = 0
    last_module = ""
    for name, sections in map_in_order(_parse_module, modules, workers, chunk=16):
        n_read += 1
        text = _join_new_sections(sections, seen)
        if not text:
            continue
        documents.append(Document(name, text))
        last_module = name
        n_chars += len(text)
        advance(len(text))
        if n_chars >= max_chars:
            break
    return Corpus(tuple(documents), len(modules), len(modules) - n_read, last_module, max_chars)


def list_modules() -> list[tuple[str, str]]:
    """Qualified name and file of every module considered, in corpus order."""
    standard_library = Path(sysconfig.get_path("stdlib"))
    packages = {Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}
    modules = []
    for root in (standard_library, *sorted(packages)):
        found = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
            for name in names:
                if name.endswith(".py") and not _SKIPPED_FILE.match(name):
                    parts = Path(folder, name[:-3]).relative_to(root).parts
                    found.append((parts[:-1] if parts[-1] == "__init__" else parts, os.path.join(folder, name)))
        found.sort(key=lambda entry: ([part.casefold() for part in entry[0]], entry[1]))
        modules += [(".".join(parts), file) for parts, file in found]
    return modules


def extract_docstrings(source: bytes) -> list[tuple[str, str]]:
    """Qualified names and docstrings of a module (name ""), its classes, functions and methods, in order.

    Source that is no valid Python, or has too little documentation to be worth parsing, gives an empty list.
    """
    quoted = sum(len(first) + len(second) for first, second in _TRIPLE_QUOTED.findall(source))
    if quoted < max(MIN_CHARS, MIN_SHARE * len(source)):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    sections: list[tuple[str, str]] = []
    _collect(tree, "", sections)
    return sections


def _collect(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
    name: str,
    sections: list[tuple[str, str]],
) -> None:
    docstring = ast.get_docstring(node)
    if docstring:
        # Escapes in a docstring may spell half a surrogate pair, which is no text.
        sections.append((name, docstring.encode("utf-8", "ignore").decode("utf-8")))
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            _collect(child, f"{name}.{child.name}" if name else child.name, sections)


def _join_new_sections(sections: list[tuple[str, str]], seen: set[bytes]) -> str:
    parts = []
    for name, docstring in sections:
        digest = hashlib.blake2b(docstring.encode("utf-8"), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            parts.append(f"{name}\n\n{docstring}" if name else docstring)
    text = "\n\n".join(parts)
    return text + "\n" if len(text) >= MIN_CHARS else ""


def _parse_module(module: tuple[str, str]) -> tuple[str, list[tuple[str, str]]]:
    name, file = module
    try:
        return name, extract_docstrings(Path(file).read_bytes())
    except OSError:
        # A package may be removed while its folder is walked.
        return name, []
