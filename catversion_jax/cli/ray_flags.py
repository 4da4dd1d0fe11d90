"""The flags of the commands that can train on a Ray cluster."""

from absl import flags

from catversion_jax.fleet.cluster import needs_of
from catversion_jax.fleet.driver import RayOptions

# The flags defined here belong to the command that asks for them.
flags.disclaim_key_flags()


def define_ray() -> None:
    flags.DEFINE_string(
        "ray",
        None,
        "Train on a Ray cluster: its HOST:PORT, auto for the one that this machine belongs to, or local to start one "
        "here; every GPU, or TPU host, gets a worker.",
    )
    flags.DEFINE_string(
        "ray_resources", None, 'With --ray: what one worker takes, such as {"TPU": 4}; if not set, found by itself.'
    )
    flags.DEFINE_integer(
        "ray_patience", 300, "With --ray: seconds without a word after which a worker is given up.", lower_bound=1
    )


def given_ray(arguments: flags.FlagValues) -> RayOptions | None:
    """Returns which cluster to train on, by the flags; None: on none. Raises UserError for what no worker can take."""
    if arguments.ray is None:
        return None
    return RayOptions(arguments.ray, needs_of(arguments.ray_resources), arguments.ray_patience)
