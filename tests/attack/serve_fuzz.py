"""Malformed requests to every route of the service, made from its own description by schemathesis.

    python -m tests.attack.serve_fuzz --count=1000

No answer may be a 500, or of another kind than the description says; and nobody may see what is somebody else's.
"""

import argparse
import contextlib
import tempfile
from collections import Counter
from pathlib import Path

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from tests import tiny
from tests.commands import catversion
from tests.service.servers import Running, ended, learn

SECRET = "unmistakableville"


def fuzz(server: Running, token: str, secrets: list[str], count: int, number: int = 0) -> Counter:
    """Sends at least `count` requests with a token; returns how many had which status. Raises AssertionError."""
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    statuses: Counter = Counter()
    headers = {"Authorization": f"Bearer {token}"}
    each = -(-count // len(operations))

    def check(case) -> None:
        response = case.call(headers=headers)
        statuses[response.status_code] += 1
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            assert response.headers["content-type"][0] == "application/problem+json", response.text
            assert response.json()["status"] == response.status_code
        for secret in secrets:
            assert secret not in response.text, f"{case.method} {case.path}: {secret}"

    how = settings(
        max_examples=each,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    while statuses.total() < count:
        for operation in operations:
            strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
            # Some take nothing that could be malformed.
            with contextlib.suppress(Unsatisfiable):
                seed(number)(how(given(case=strategy)(check)))()
        number += 1
    return statuses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, tokens = tiny.write(folder / "tiny"), folder / "tokens"
        anna, ben = (catversion("token", of, f"--tokens={tokens}").stdout.strip() for of in ("anna", "ben"))
        server = Running(folder / "store", model, f"--tokens={tokens}", "--most_requests=10000").ready()
        client = server.client_of(anna)
        concept = ended(client, learn(client)["id"])
        prompt = f"a teapot in {SECRET}"
        body = {"pictures": [{"prompt": prompt, "concepts": [{"id": concept["id"]}]}], "wait": True}
        (picture,) = client.post("/v1/pictures", json=body).json()["pictures"]
        statuses = fuzz(server, ben, [SECRET, concept["id"], picture["id"]], asked.count, asked.seed)
        assert client.get(f"/v1/concepts/{concept['id']}").json()["status"] == "done"
        assert not [line for line in server.said if "Traceback" in line], "".join(server.said)[-2000:]
        print(f"{statuses.total()} requests: {dict(sorted(statuses.items()))}; exit {server.stop()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
