"""One server for all tests that only ask, and leave nothing behind that others would mind."""

import pytest

from tests.service.servers import Running, ended, learn, running


@pytest.fixture(scope="session")
def server(tiny_model, tmp_path_factory):
    with running(tmp_path_factory.mktemp("service") / "store", tiny_model, "--sizes=24x16") as server:
        yield server


@pytest.fixture(scope="session")
def teapot(server: Running) -> dict:
    """A concept that is done."""
    return ended(server.client, learn(server.client)["id"])
