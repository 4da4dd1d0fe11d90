"""`catversion serve`: learns and draws many people's concepts, over HTTP."""

import re
from functools import partial

from absl import flags

from catversion_jax.cli.flags import checked_config, define_config
from catversion_jax.cli.ray_flags import define_ray, given_ray
from catversion_jax.config import OF_A_RUN
from catversion_jax.config.shipped import config_source
from catversion_jax.service.limits import Limits
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.paths import expand
from catversion_jax.utils.settings import broken, flatten, replaced

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXTRA = "serve needs {}; pip install 'catversion-jax[serve]'"
SIZE = re.compile(r"(\d{1,4})x(\d{1,4})")


def define_flags() -> None:
    define_config(
        config_source("mini"),
        "Config of the model and of every concept's training: a file or a shipped one; --config.KEY=VALUE overrides a "
        "key. Default: mini.",
    )
    flags.DEFINE_string("store", None, "Folder for what is asked and learned; required. One server at a time.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; others than this machine's own need --tokens.")
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.", 0, 65535)
    flags.DEFINE_string("tokens", None, "File of tokens, which `catversion token NAME --tokens=FILE` makes.")
    flags.DEFINE_float(
        "drawing_share", 0.5, "Part of the device's time for drawing, while concepts train too.", 0.05, 0.95
    )
    flags.DEFINE_list("url_hosts", [], "Servers that photos may be fetched from, as HOST or HOST:PORT.")
    flags.DEFINE_list("sizes", [], "Sizes of pictures beside the model's own, such as 512x768; each is compiled once.")
    define_ray()
    for name, entry, default in flatten(Limits()):
        flags.DEFINE_integer(f"most_{name}", default, f"{entry.metadata['help'].removesuffix('.')}, at most.")


def main(arguments: flags.FlagValues) -> int:
    start(arguments, lambda address: print(f"listening on {address}  (Ctrl-C saves and stops)", flush=True))
    return 0


def start(arguments: flags.FlagValues, on_start) -> None:
    """Serves as the flags say, until a signal; `on_start` is given the address."""
    config = checked_config(arguments, OF_A_RUN)
    if not arguments.store:
        raise UserError("--store: missing; expected a folder for what is asked and learned")
    if arguments.tokens is None and arguments.host not in LOOPBACK:
        raise UserError(f"--host={arguments.host}: for others than this machine --tokens is needed, which says who")
    limits = given_limits(arguments)
    sizes = tuple(map(size_of_text, arguments.sizes))
    try:
        from catversion_jax.service.server import Address, Work, serve
        from catversion_jax.service.service import Rules
        from catversion_jax.service.tokens import read_tokens
    except ImportError as error:
        raise UserError(EXTRA.format(error.name)) from error
    names = None if arguments.tokens is None else read_tokens(expand(arguments.tokens))
    rules = Rules(limits, tuple(arguments.url_hosts), sizes, names)
    address = Address(arguments.host, arguments.port)
    told = partial(tell_address, address, on_start)
    serve(config, arguments.store, rules, address, told, Work(arguments.drawing_share, given_ray(arguments)))


def tell_address(address, on_start, port: int) -> None:
    on_start(str(type(address)(address.host, port)))


def given_limits(arguments: flags.FlagValues) -> Limits:
    limits = replaced(Limits(), {name: arguments[f"most_{name}"].value for name, _, _ in flatten(Limits())})
    for name, value, expected in broken(limits):
        raise UserError(f"--most_{name}={value}: expected {expected}")
    return limits


def size_of_text(text: str) -> tuple[int, int]:
    match = SIZE.fullmatch(text)
    if match is None:
        raise UserError(f"--sizes={text}: expected WIDTHxHEIGHT, such as 512x768")
    return int(match[1]), int(match[2])
