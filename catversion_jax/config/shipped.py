"""The shipped config files, found by name: `mini` is configs/mini.py, from a checkout as from an installed wheel."""

from pathlib import Path

from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import AnyPath, expand

PACKAGE = Path(__file__).parents[1]


def config_names() -> list[str]:
    """Returns the names of the shipped configs, sorted."""
    return sorted(path.stem for path in shipped_folder().glob("*.py"))


def shipped_folder() -> AnyPath:
    """Returns the folder of the shipped configs."""
    # A wheel has it inside the package (setup.py); a checkout has it beside the package, where people look for it.
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def config_file(name: str) -> AnyPath:
    """Returns the config file that a path or the name of a shipped config stands for. Raises UserError for neither."""
    path = expand(name)
    if path.is_file():
        return path
    shipped = config_names()
    if name in shipped:
        return shipped_folder() / f"{name}.py"
    raise UserError(f"{name}: no such config file; expected a path, or one of {', '.join(shipped)}")


def config_source(given: str) -> str:
    """Returns the value of --config with its file's path in place of a name; what follows a colon stays."""
    name, colon, argument = given.partition(":")
    return f"{config_file(name)}{colon}{argument}"
