"""`catversion ui`: starts the service and opens its page in the browser."""

import webbrowser

from absl import flags

from catversion_jax.cli import serve


def define_flags() -> None:
    serve.define_flags()
    flags.adopt_module_key_flags(serve)  # for the help


def main(arguments: flags.FlagValues) -> int:
    serve.start(arguments, open_page)
    return 0


def open_page(address: str) -> None:
    print(f"opening {address}  (Ctrl-C saves and stops)", flush=True)
    webbrowser.open(address)
