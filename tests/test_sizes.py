"""The house's measure: no function takes 7 or more parameters or is longer than 60 lines."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "catversion_jax"
MOST_PARAMETERS, MOST_LINES = 6, 60


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
