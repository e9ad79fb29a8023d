"""What a function computes, as a short hash: of its code without layout, comments, docstrings and annotations.

It is read from the syntax tree, so that it can be taken of a function in memory and of a file that is not installed,
and is the same under every Python.
"""

import ast
import hashlib
import inspect
from collections.abc import Iterator
from typing import Any

# annotations compute nothing; the rest is which Python made the tree, or in which spelling ('u"…"', a load or a store)
_LEFT_OUT = {"annotation", "returns", "type_comment", "type_params", "ctx", "kind", "simple"}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef


def of_function(function: Any) -> str:
    """The fingerprint of a function; "" where its source is not at hand."""
    try:
        source = inspect.getsource(function)
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, TypeError, SyntaxError):
        return ""
    definition = next((node for node in ast.walk(tree) if isinstance(node, _Definition)), None)
    return "" if definition is None else of_definition(definition)


def of_source(source: str, name: str) -> list[str]:
    """The fingerprints of the definitions of `name` ("VAE.loss_function") in a module: more than one, under an `if`."""
    found: list[ast.AST] = [ast.parse(source)]
    for part in name.split("."):
        found = [node for scope in found for node in _defined(scope) if getattr(node, "name", "") == part]
    return list(dict.fromkeys(of_definition(node) for node in found if isinstance(node, _Definition)))


def _defined(scope: ast.AST) -> Iterator[ast.AST]:
    """Functions and classes of a module or class, those under an `if` or `try` too."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, _Definition | ast.ClassDef):
            yield node
        else:
            yield from _defined(node)


def of_definition(definition: ast.AST) -> str:
    return hashlib.sha256(_written(definition).encode()).hexdigest()[:16]


def _written(node: Any) -> str:
    """A tree as text: `ast.dump` less what depends on the Python that parsed it."""
    if isinstance(node, list):
        return "[" + ",".join(map(_written, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign(targets=[node.target], value=node.value)
    fields = []
    for field, value in sorted(ast.iter_fields(node)):
        if field == "body" and isinstance(value, list):
            value = [statement for statement in value if not _computes_nothing(statement)]
        if isinstance(node, ast.JoinedStr):  # 3.12 ends a format specification with an empty string
            value = [part for part in value if not (isinstance(part, ast.Constant) and part.value == "")]
        if field not in _LEFT_OUT and value not in (None, []):
            fields.append(f"{field}={_written(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _computes_nothing(statement: ast.AST) -> bool:
    """A docstring or any other string alone, `pass`, a variable's annotation without a value."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass) or (isinstance(statement, ast.AnnAssign) and statement.value is None)
