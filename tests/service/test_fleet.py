"""`catversion serve --ray`: the service draws, and the nodes of a cluster learn; nothing accepted is lost."""

import signal

import pytest

from catversion_jax.config import Config
from catversion_jax.service.fleet_trainer import check_state_size
from catversion_jax.training.step import StepConfig
from catversion_jax.utils.errors import UserError
from tests.commands import catversion, error_of
from tests.fleet.clusters import cluster_of, workers_of
from tests.service.servers import Running, config_flags, ended, learn, running, wait_for
from tests.service.test_durability import NAMES, bytes_of

STEPS = "150"
WORDS = (*NAMES, "robot", "rocket")


@pytest.fixture(scope="module")
def expected(tiny_model, tmp_path_factory, one_core) -> dict[str, bytes]:
    """What a server learns that trains by itself."""
    with running(tmp_path_factory.mktemp("alone") / "store", tiny_model, sample__every=50) as server:
        ids = {name: learn(server.client, name, steps=STEPS)["id"] for name in WORDS}
        return {name: bytes_of(server, ended(server.client, concept_id)["id"]) for name, concept_id in ids.items()}


def on_ray(store, model, address: str) -> Running:
    return Running(store, model, f"--ray={address}", sample__every=50, checkpoint__every=10)


def check(server: Running, ids: dict[str, str], expected: dict[str, bytes]) -> None:
    for name, concept_id in ids.items():
        found = ended(server.client, concept_id)
        assert found["status"] == "done", found
        assert {preview["step"] for preview in found["previews"]} >= {int(STEPS)}
        assert bytes_of(server, concept_id) == expected[name], name


def steps_of(server: Running) -> dict[str, int]:
    """How far each concept has come, by id."""
    return {found["id"]: found["step"] for found in server.client.get("/v1/concepts").json()["concepts"]}


def test_a_node_is_lost_and_another_joins(tiny_model, tmp_path, expected):
    with cluster_of("ab") as nodes:
        server = on_ray(tmp_path / "store", tiny_model, nodes.address).ready()
        ids = {name: learn(server.client, name, steps=STEPS)["id"] for name in WORDS}
        wait_for(lambda: max(steps_of(server).values()) > 20, server)
        nodes.kill("a")
        nodes.add("c")
        check(server, ids, expected)
        assert server.stop() == 0
    assert "a: a worker was lost with its node; what it had goes to others" in "".join(server.said)
    assert "Traceback" not in "".join(server.said)


def test_the_server_is_killed_and_stopped(tiny_model, tmp_path, expected):
    with cluster_of("ab") as nodes:
        server = on_ray(tmp_path / "store", tiny_model, nodes.address).ready()
        ids = {name: learn(server.client, name, steps=STEPS)["id"] for name in WORDS}
        wait_for(lambda: list((tmp_path / "store" / "checkpoints").glob("[0-9]*")), server)
        server.kill()
        server = on_ray(tmp_path / "store", tiny_model, nodes.address).ready()
        wait_for(lambda: max(steps_of(server).values()) > 20, server)
        steps = steps_of(server)
        assert server.stop() == 0
    # The next one trains by itself.
    with running(tmp_path / "store", tiny_model, sample__every=50, checkpoint__every=10) as server:
        # They go on from where they were, and not from the start.
        last = max(steps, key=steps.__getitem__)
        wait_for(lambda: steps_of(server)[last] > 0, server)
        assert steps_of(server)[last] >= steps[last]
        check(server, ids, expected)
        assert server.stop() == 0


def test_what_is_removed_leaves_its_worker(tiny_model, tmp_path, expected):
    store = tmp_path / "store"
    with cluster_of("a") as nodes:
        server = on_ray(store, tiny_model, nodes.address).ready()
        ids = {name: learn(server.client, name, steps=STEPS)["id"] for name in NAMES}
        gone = ids[NAMES[0]]
        wait_for(lambda: steps_of(server)[gone] > 20, server)
        assert server.client.delete(f"/v1/concepts/{gone}").status_code == 204
        check(server, {name: ids[name] for name in NAMES[1:]}, expected)
        assert server.client.get(f"/v1/concepts/{gone}").json()["status"] == "cancelled"
        for path in (store / "checkpoints").rglob("*"):
            assert not path.is_file() or gone.encode() not in path.read_bytes()
        assert server.stop() == 0


def test_a_worker_crashes(tiny_model, tmp_path, expected):
    """Its concepts go on with another one, and the service never knows."""
    with cluster_of("ab") as nodes:
        server = on_ray(tmp_path / "store", tiny_model, nodes.address).ready()
        ids = {name: learn(server.client, name, steps=STEPS)["id"] for name in NAMES}
        wait_for(lambda: max(steps_of(server).values()) > 20, server)
        (worker,) = workers_of(nodes.by_name["a"])
        worker.send_signal(signal.SIGKILL)
        check(server, ids, expected)
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--ray=127.0.0.1:1"], "--ray=127.0.0.1:1: no Ray cluster answers"),
        (["--ray=local", "--ray_resources=4"], "--ray_resources=4: expected what one worker takes"),
    ],
)
def test_mistakes(tiny_model, tmp_path, flags, expected):
    error = error_of("serve", *config_flags(tiny_model), f"--store={tmp_path / 'store'}", "--port=0", *flags)
    assert error.startswith(f"catversion: error: {expected}")


def test_states_that_are_too_large(tiny_pipeline):
    """DreamBooth's state has the UNet and its moments."""
    config = Config().replaced({"method": "dreambooth"})
    step = StepConfig.of(config, tiny_pipeline.networks)
    check_state_size(config, StepConfig.of(Config(), tiny_pipeline.networks))
    with pytest.raises(UserError, match=r"'dreambooth' has a state of \d+ MiB a concept.*at most 0"):
        check_state_size(config, step, most=0)


def test_the_flags_are_in_the_help():
    assert "--ray_resources" in catversion("serve", "--help").stdout
