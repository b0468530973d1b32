"""A module and all that it imports of the same program, as one file: the code inside an exported folder.

diffusers fetches one file for each component of a pipeline from the hub, and of what this file imports by `from .x`
only what lies beside it, not the folders of a program. It copies all of them into one package that every pipeline of
every project shares, where a second `models.py` takes the place of the first. So each component here is one file that
imports nothing but libraries. It is put together from the program's own sources, as they are, comments included: the
modules one after the other, each after those that it imports, without the import statements between them.
"""

from __future__ import annotations

import ast
import builtins
import symtable
import sys
from pathlib import Path


def code_of(kind: type) -> str:
    """The code of a class as one file, which begins with a comment on its origin."""
    name = kind.__module__
    path = Path(sys.modules[name].__file__)
    return one_file(name, path.parents[name.count(".")])


def one_file(name: str, root: Path) -> str:
    """The code of a module and of those below a folder that it imports; where it imports none, its own as it is.

    Args:
        name: of the module, with dots
        root: the folder that its name starts from

    Raises:
        ValueError: if two modules use one name for different things, or as `Module`.
    """
    modules: dict[str, Module] = {}  # each after those that it imports
    owners: dict[str, tuple[str, str]] = dict.fromkeys(dir(builtins), ("builtins", "Python"))

    def add(name: str) -> None:
        module = Module(name, root)
        for inner in module.imports.values():
            if inner not in modules:
                add(inner)
        modules[name] = module

    add(name)
    if len(modules) == 1:
        return modules[name].text
    for module in modules.values():
        for bound, origin in module.bound_names().items():
            other, where = owners.setdefault(bound, (origin, module.name))
            if other != origin:
                raise ValueError(f"{bound} means one thing in {where} and another in {module.name}: rename one of them")
    ruler = "# " + "-" * 111
    parts = [f"{ruler}\n# {each.replace('.', '/')}.py\n\n{module.body()}\n" for each, module in modules.items()]
    origin = f"# One file of PPFlow's modules {', '.join(modules)}, for diffusers: change them, not this. MIT license."
    return "\n\n".join([f"{origin}\n\nfrom __future__ import annotations\n", *parts])


class Module:
    """A module, and the statements by which it imports others of the same program.

    Raises:
        ValueError: if it imports one under another name, or not at its top level.
    """

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.text = file_of(name, root).read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.imports: dict[ast.stmt, str] = {}
        for node in ast.walk(self.tree):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for found in names:
                if file_of(found, root):
                    self.imports[node] = found
        for node, found in self.imports.items():
            if node not in self.tree.body or isinstance(node, ast.Import) or any(alias.asname for alias in node.names):
                raise ValueError(
                    f"line {node.lineno} of {name} is no plain `from {found} import names` at the top level"
                )

    def body(self) -> str:
        """The text without these statements, and without imports from __future__, which begin a file."""
        future = [node for node in self.tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        dropped = {n for node in (*future, *self.imports) for n in range(node.lineno, node.end_lineno + 1)}
        return "\n".join(line for n, line in enumerate(self.text.splitlines(), 1) if n not in dropped).strip()

    def bound_names(self) -> dict[str, str]:
        """Meanings of the module's own top-level names: the library that they are imported from, or the module."""
        symbols = symtable.symtable(self.text, self.name, "exec").get_symbols()
        bound = {
            symbol.get_name(): self.name
            for symbol in symbols
            if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
        }
        for node in self.tree.body:
            for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
                if isinstance(node, ast.Import):  # `import a.b` binds a
                    bound[alias.asname or alias.name.partition(".")[0]] = f"import {alias.name}"
                elif node in self.imports or node.module == "__future__":
                    bound.pop(alias.name, None)
                else:
                    bound[alias.asname or alias.name] = f"from {node.module} import {alias.name}"
        return bound


def file_of(name: str, root: Path) -> Path | None:
    """The file of a module below a folder, if it is there."""
    stem = root.joinpath(*name.split("."))
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)
