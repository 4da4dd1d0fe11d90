"""Real servers of both kinds of bucket, on the loopback, and the variables that the clients' libraries find them by.

    python -m tests.buckets.servers

They print their variables as JSON, and serve until their input ends.
"""

import json
import sys
import threading
from http import HTTPStatus

import boto3
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server
from moto.server import ThreadedMotoServer

BUCKET = "my-bucket"
ONE_AT_A_TIME = threading.Lock()


def with_preconditions(upload):
    """Adds what the emulator lacks and Google's service has: ifGenerationMatch=0, for an object that is not there."""

    def checked(request, response, storage):
        with ONE_AT_A_TIME:
            if request.query.get("ifGenerationMatch") == ["0"]:
                try:
                    storage.get_file_obj(request.params["bucket_name"], request.data["meta"]["name"])
                except NotFound:
                    return upload(request, response, storage)
                response.status = HTTPStatus.PRECONDITION_FAILED
                return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return upload(request, response, storage)

    return checked


def start_gcs() -> dict[str, str]:
    """Starts Google's kind; returns its variables."""
    objects._multipart_upload = with_preconditions(objects._multipart_upload)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    url = f"http://127.0.0.1:{server._api._httpd.server_port}"
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


def start_s3() -> dict[str, str]:
    """Starts Amazon's kind; returns its variables."""
    server = ThreadedMotoServer(port=0, ip_address="127.0.0.1", verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    variables = {"AWS_ENDPOINT_URL": f"http://{host}:{port}"} | keys
    boto3.client(
        "s3", endpoint_url=variables["AWS_ENDPOINT_URL"], aws_access_key_id="key", aws_secret_access_key="secret",
        region_name="us-east-1",
    ).create_bucket(Bucket=BUCKET)  # fmt: skip
    return variables


if __name__ == "__main__":
    print(json.dumps(start_gcs() | start_s3()), flush=True)
    sys.stdin.read()
