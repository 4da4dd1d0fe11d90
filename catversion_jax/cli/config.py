"""`catversion config NAME`: prints a shipped config file, to be redirected to a file of one's own and edited."""

from absl import flags

from catversion_jax.config.shipped import config_file
from catversion_jax.utils.files import MIB, read_text

POSITIONALS = ("NAME",)


def define_flags() -> None:
    """Defines no flags."""


def main(arguments: flags.FlagValues, name: str) -> int:
    print(read_text(config_file(name), MIB, "expected a config file"), end="")
    return 0
