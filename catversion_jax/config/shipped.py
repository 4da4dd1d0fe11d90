"""The shipped config files, found by name: `mini` is configs/mini.py, from a checkout as from an installed wheel."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from catversion_jax.utils.errors import UserError, short
from catversion_jax.utils.paths import AnyPath, expand

PACKAGE = Path(__file__).parents[1]


def config_names() -> list[str]:
    """Returns the names of the shipped configs, sorted."""
    return sorted(path.stem for path in shipped_folder().glob("*.py"))


def shipped_folder() -> Path:
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


def load_config(given: str) -> ConfigDict:
    """Returns the config of a name or a file, with an argument behind a colon if it takes one: "sd15:dreambooth".

    Raises UserError for a file that is no config, and for whatever its get_config raises.
    """
    name, _, argument = given.partition(":")
    path = config_file(name)
    try:
        spec = importlib.util.spec_from_file_location(f"catversion_config_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except Exception as error:  # a config file is a program, which may raise anything
        raise UserError(
            f"{given}: {type(error).__name__}: {short(error)}; expected a file with get_config()"
        ) from error


def config_source(given: str) -> str:
    """Returns the value of --config with its file's path in place of a name; what follows a colon stays."""
    name, colon, argument = given.partition(":")
    return f"{config_file(name)}{colon}{argument}"
