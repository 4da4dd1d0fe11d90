"""`catversion token NAME --tokens=FILE`: adds a token of a service, and prints it this once."""

from absl import flags

from catversion_jax.service.tokens import add_token
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import expand

POSITIONALS = ("NAME",)


def define_flags() -> None:
    flags.DEFINE_string("tokens", None, "File of tokens, which is made if need be; required.")


def main(arguments: flags.FlagValues, name: str) -> int:
    if not arguments.tokens:
        raise UserError("--tokens: missing; expected the file that the token is added to")
    print(add_token(expand(arguments.tokens), name))
    return 0
