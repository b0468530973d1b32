"""A module and all that it imports of the same program, as one file: the code inside an exported folder.

diffusers fetches one file for each component of a pipeline from the hub, and of what this file imports by `from .x`
only what lies beside it, not the folders of a program. It copies all of them into one package that every pipeline of
every project shares, where a second `models.py` takes the place of the first. So each component here is one file that
imports nothing but libraries. It is put together from the program's own sources, as they are, comments included: the
modules one after the other, each after those that it imports, without the import statements between them.
"""

from __future__ import annotations

import ast
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
        ValueError: if two modules use one name for different things, or one imports another under another name or not
            at its top level.
    """
    seen: set[str] = set()
    sections: dict[str, str] = {}  # the modules' texts, each after those that it needs
    owners: dict[str, tuple[str, str]] = {}  # a top-level name: where it comes from, and the module that has it

    def add(name: str, path: Path) -> None:
        if name in seen:
            return
        seen.add(name)
        text = path.read_text(encoding="utf-8")
        tree, inner, lines = ast.parse(text), [], text.splitlines()
        for node in ast.walk(tree):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            inner += [(node, found, _file(found, root)) for found in names if _file(found, root)]
        for node, found, file in inner:
            if node not in tree.body or isinstance(node, ast.Import) or any(alias.asname for alias in node.names):
                raise ValueError(f"{path}:{node.lineno} is no plain `from {found} import names` at the top level")
            add(found, file)
        for bound, origin in _bound_names(name, text, tree, [node for node, *_ in inner]).items():
            other, module = owners.setdefault(bound, (origin, name))
            if other != origin:
                raise ValueError(f"{bound} means one thing in {module} and another in {name}: rename one of them")
        future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        dropped = {line for node in [*future, *(node for node, *_ in inner)] for line in range(*_span(node))}
        sections[name] = "\n".join(line for number, line in enumerate(lines, 1) if number not in dropped).strip()

    path = _file(name, root)
    add(name, path)
    if len(sections) == 1:
        return path.read_text(encoding="utf-8")
    ruler = "# " + "-" * 111
    parts = [f"{ruler}\n# {module.replace('.', '/')}.py\n\n{text}\n" for module, text in sections.items()]
    origin = f"# One file of PPFlow's modules {', '.join(sections)}, for diffusers: change them, not this. MIT license."
    return "\n\n".join([f"{origin}\n\nfrom __future__ import annotations\n", *parts])


def _file(name: str, root: Path) -> Path | None:
    """The file of a module below a folder, if it is there."""
    stem = root.joinpath(*name.split("."))
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


def _span(node: ast.stmt) -> tuple[int, int]:
    """First line of a statement, and the line after it."""
    return node.lineno, node.end_lineno + 1


def _bound_names(name: str, text: str, tree: ast.Module, inner: list[ast.stmt]) -> dict[str, str]:
    """What a module means by each name of its top level: the library that it is imported from, or the module itself.

    Args:
        inner: imports of the same program, whose names belong to other modules
    """
    symbols = symtable.symtable(text, name, "exec").get_symbols()
    own = {each.get_name() for each in symbols if each.is_assigned() or each.is_imported() or each.is_namespace()}
    bound = dict.fromkeys(own, name)
    for node in tree.body:
        if isinstance(node, ast.Import):
            # `import a.b` binds a
            bound |= {alias.asname or alias.name.split(".")[0]: f"import {alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name: f"from {node.module} import {alias.name}" for alias in node.names}
    for node in inner:
        for alias in node.names:
            bound.pop(alias.name, None)
    bound.pop("annotations", None)  # of __future__
    return bound
