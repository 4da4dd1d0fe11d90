#!/usr/bin/env bash
# Install this checkout on a host, into .venv; $1: extras of setup.py, such as tpu,gcs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# uv brings a Python of its own: the TPU images' is older than the 3.11 that is needed.
python3 -m pip install --quiet --user uv
[[ -d .venv ]] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e ".[$1]"
.venv/bin/catversion --version
