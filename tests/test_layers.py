"""The rooms of the package: a file imports from its own room and from those to its left, so that no import goes up."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "catversion_jax"
ORDER = (
    "utils < models, weights < base < data < methods < sampling < config < training < api, evaluation, bench, fleet "
    "< study, service < cli"
)
LEVEL = {room: level for level, rooms in enumerate(ORDER.split(" < ")) for room in rooms.split(", ")}
FILES = [path for room in LEVEL for path in sorted((PACKAGE / room).rglob("*.py"))]


def imported_rooms(path: Path) -> set[str]:
    """The rooms that a file's import statements name; anything else of the package must be its version."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            modules |= {node.module} if node.module != "catversion_jax" else {
                f"catversion_jax.{alias.name}" for alias in node.names if alias.name != "__version__"
            }  # fmt: skip
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {module.split(".")[1] for module in modules if module.split(".")[0] == "catversion_jax"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_import_goes_up(path):
    room = path.relative_to(PACKAGE).parts[0]
    up = {other for other in imported_rooms(path) - {room} if LEVEL[other] >= LEVEL[room]}
    assert not up, f"{room} imports {', '.join(sorted(up))}"


def test_every_file_is_in_a_room():
    files = {path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "exported"}
    assert files - set(FILES) == {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
