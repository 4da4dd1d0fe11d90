"""Before any test module imports it: diffusers warns at every Flax class that it is the last release with it."""

import logging

logging.getLogger("diffusers").setLevel(logging.ERROR)
