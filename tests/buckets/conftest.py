"""A folder in a bucket of each kind."""

import json
import os
import secrets
import subprocess
import sys

import pytest

from catversion_jax.utils import paths
from catversion_jax.utils.paths import AnyPath, expand
from tests import commands

BUCKET = "my-bucket"


@pytest.fixture(scope="session")
def variables():
    """Both servers, which this process and the commands that it starts find by the environment."""
    run = [sys.executable, "-m", "tests.buckets.servers"]
    servers = subprocess.Popen(
        run, cwd=commands.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    found = json.loads(servers.stdout.readline())
    os.environ.update(found)
    commands.ENVIRONMENT.update(found)
    yield found
    servers.kill()
    for name in found:
        os.environ.pop(name)
        commands.ENVIRONMENT.pop(name)
    paths.file_system.cache_clear()
    paths.reach.cache_clear()


@pytest.fixture(params=["gs", "s3"])
def bucket(request, variables) -> AnyPath:
    """A new folder of a bucket, of each kind in turn."""
    return expand(f"{request.param}://{BUCKET}/{secrets.token_hex(4)}")


@pytest.fixture
def gs(variables) -> AnyPath:
    return expand(f"gs://{BUCKET}/{secrets.token_hex(4)}")
