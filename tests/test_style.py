"""The measure of the code: short functions of few parameters, and a name that means one thing."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "catversion_jax"
MOST_PARAMETERS, MOST_LINES = 6, 60
OF_COMMANDS = {"define_flags", "main"}
"""The interface of a command's module."""


def functions():
    """Each function of the package, and where it stands; what is exported for other programs too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}", node


def parameters(node: ast.FunctionDef) -> int:
    """Without self and cls."""
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([argument for argument in given if argument.arg not in ("self", "cls")])


def test_parameters():
    assert {where: n for where, node in functions() if (n := parameters(node)) > MOST_PARAMETERS} == {}


def test_lines():
    lengths = {where: node.end_lineno - node.lineno + 1 for where, node in functions()}
    assert {where: n for where, n in lengths.items() if n > MOST_LINES} == {}


def test_a_name_means_one_thing():
    """No two classes or functions of the package's modules have one name."""
    homes: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "exported" not in path.parts:  # for other programs
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in OF_COMMANDS:
                    homes.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
