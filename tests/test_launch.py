"""launch/: every script is clean, prints what it would run, and runs it; the clouds' tools are stand-ins."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.commands import catversion

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
PAGES = sorted(LAUNCH.glob("*.md"))
TOOLS = ("gcloud", "sky", "kubectl", "docker", "ray")
SETTINGS = {
    "NAME": "mugs",
    "BUCKET": "gs://b",
    "PROJECT": "p",
    "ZONE": "us-west4-a",
}
TPU_PLACE = "mugs --project=p --zone=us-west4-a --quiet"
BATCH = "--config=sd15 --manifest=gs://b/mugs/concepts/concepts.jsonl --config.run_dir=gs://b/mugs/out"
COUNT = "--num_processes=$((${#hosts} + 1))"
DRY_RUNS = {
    "tpu_vm.sh create": [
        f"tpu-vm create {TPU_PLACE} --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite --spot"
    ],
    "tpu_vm.sh queue": ["queued-resources create mugs --node-id=mugs", "--runtime-version=v2-alpha-tpuv5-lite --spot"],
    "tpu_vm.sh setup": [f"mugs:catversion.tar.gz {TPU_PLACE[5:]} --worker=all", "launch/install.sh tpu,gcs"],
    "tpu_vm.sh run --config.seed=3": [
        "gcloud storage rsync concepts gs://b/mugs/concepts --recursive",
        f"tpu-vm ssh {TPU_PLACE} --worker=all",
        f"launch/worker.sh runs/mugs {BATCH} {COUNT} --process_id=$host --config.seed=3 <",
    ],
    "tpu_vm.sh logs": ["--worker=all", "tail -n 100 -F catversion/runs/mugs.log"],
    "tpu_vm.sh logs 2": ["--worker=2"],
    "tpu_vm.sh collect": ["mkdir -p runs/mugs", "rsync gs://b/mugs/out runs/mugs --recursive"],
    "tpu_vm.sh delete": [
        f"queued-resources delete {TPU_PLACE} --force || gcloud compute tpus tpu-vm delete {TPU_PLACE}"
    ],
    "tpu_vm.sh keep": [
        "list",
        "queued-resources create",
        "install.sh",
        "worker.sh",
        "until",
        "rsync gs://b/mugs/out",
        "delete",
    ],
}
"""Command -> what its --dry-run prints, in this order."""

ERRORS = [
    ("tpu_vm.sh", {}, "no command; expected create"),
    ("tpu_vm.sh start", {}, "start: no such command; expected create"),
    ("tpu_vm.sh create now", {}, "create takes no argument"),
    ("tpu_vm.sh logs all", {}, "logs takes the number of one host"),
    ("tpu_vm.sh create", {"NAME": ""}, "NAME: not set"),
    ("tpu_vm.sh create", {"NAME": "my mugs; ls"}, "NAME=my mugs; ls: expected"),
    ("tpu_vm.sh create", {"SPOT": "1"}, "SPOT=1: expected yes or no"),
    ("tpu_vm.sh create", {"ACCELERATOR": "h100"}, "ACCELERATOR=h100: expected"),
    ("tpu_vm.sh run", {"BUCKET": ""}, "BUCKET=: expected a bucket"),
    ("tpu_vm.sh keep", {"BUCKET": "s3://b"}, "BUCKET=s3://b: expected a bucket"),
    ("tpu_vm.sh run", {"CONCEPTS": "nowhere"}, "nowhere/concepts.jsonl: no such file"),
    ("worker.sh out", {}, "1 arguments; expected HERE FLAG"),
    ("measure.sh", {}, "OUT: missing; expected a folder for the report"),
    ("measure.sh out --size=1x1", {}, "--size=1x1: expected --config, --first, --sizes or --dry-run"),
    ("measure.sh one two", {}, "two: expected one folder"),
]


class Place:
    """A scratch folder with concepts/, and stand-ins for the tools in bin/, first on PATH."""

    def __init__(self, path: Path):
        self.path, self.calls_file = path, path / "calls"
        (path / "bin").mkdir()
        (path / "concepts").mkdir()
        (path / "concepts" / "concepts.jsonl").write_text('{"id": "a", "dir": "a", "class_word": "mug"}\n')
        for name in TOOLS:
            self.fake(name, "exit 99")
        self.fake("catversion", "exit 0")
        self.environment = SETTINGS | {
            "PATH": f"{path / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(path),
            "TMPDIR": str(path),
            "CALLS": str(self.calls_file),
            "CUDA_VISIBLE_DEVICES": "3,5",
        }

    def fake(self, name: str, body: str, path: str = "bin") -> None:
        """A program that appends its name and arguments to `calls`, quoted, and then does `body`."""
        script = self.path / path / name
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(f'#!/bin/bash\necho "{name} ${{*@Q}}" >> "$CALLS"\n{body}\n')
        script.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [shlex.split(line) for line in lines]

    def start(self, command: str, **settings: str) -> subprocess.Popen:
        """`command` is a script of launch/ with its arguments."""
        return self.shell(f"{LAUNCH}/{command}", **settings)

    def shell(self, line: str, **settings: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", f"exec {line}" if line.startswith(str(LAUNCH)) else line],
            cwd=self.path,
            env=self.environment | settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
        )

    def until(self, condition) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "nothing happened in 10 s"
            time.sleep(0.02)

    def read(self, name: str) -> str:
        path = self.path / name
        return path.read_text() if path.exists() else ""


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=20)
    assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
    return out, err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) or script.name == "lib.sh"


def test_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    program = beside if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing: pip install -e '.[test]'"
    done = subprocess.run([program, "--external-sources", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", DRY_RUNS)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_dry_run_prints_and_runs_nothing(place, command, first):
    script, *arguments = command.split()
    words = [script, "--dry-run", *arguments] if first else [script, *arguments, "--dry-run"]
    before = set(place.path.rglob("*"))
    out, _ = finish(place.start(" ".join(words)))
    at = 0
    for part in DRY_RUNS[command]:
        assert part in out[at:], f"{part!r} is not in, or not in this order:\n{out}"
        at = out.index(part, at)
    assert place.calls == []
    assert set(place.path.rglob("*")) == before


@pytest.mark.parametrize("command", [c for c in DRY_RUNS if "keep" not in c])
def test_what_a_dry_run_prints_is_what_runs(place, command):
    out, _ = finish(place.start(f"{command} --dry-run"))
    place.fake("tar", "")
    for name in TOOLS:
        place.fake(name, PLAYED if name == "gcloud" else "")
    finish(place.start(command))
    ran = place.calls
    place.calls_file.unlink()
    finish(place.shell(out))
    assert ran == place.calls
    assert ran


@pytest.mark.parametrize(("command", "settings", "message"), ERRORS)
def test_errors_are_one_line(place, command, settings, message):
    out, err = finish(place.start(command, **settings), status=1)
    assert message in err
    assert (out, err.count("\n")) == ("", 1)
    assert place.calls == []


def test_help(place):
    out, _ = finish(place.start("tpu_vm.sh --help", NAME=""))
    assert out.startswith("usage: launch/tpu_vm.sh")


PLAYED = """
next() { head -n 1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *"queued-resources list"*) next states ;;
  *"until ["*) exit "$(next ends)" ;;
  *install.sh*) exit "$(cat broken 2> /dev/null || echo 0)" ;;
  *"rsync gs://b/mugs/out "*) mkdir -p "$4/mug-0" && echo artifact > "$4/mug-0/concept.safetensors" ;;
esac
"""
"""A gcloud whose queue and hosts behave as the files `states`, `ends` and `broken` say."""


def keep(place: Place, states: list[str], ends: list[int], status: int = 0) -> tuple[str, list[str]]:
    """What `tpu_vm.sh keep` complains of, and which of the calls below it made."""
    place.fake("gcloud", PLAYED)
    place.fake("tar", "")
    place.fake("sleep", "exec /bin/sleep 0.01")
    (place.path / "states").write_text("".join(f"{state}\n" for state in states))
    (place.path / "ends").write_text("".join(f"{end}\n" for end in ends))
    _, err = finish(place.start("tpu_vm.sh keep"), status)
    known = {"create": "queue", "delete": "delete", "install": "set up", "worker.sh": "run", "until": "await"}
    known |= {"rsync gs://b/mugs/out ": "collect"}
    lines = [" ".join(call) for call in place.calls if call[0] == "gcloud"]
    return err, [what for line in lines for word, what in known.items() if re.search(word, line)]


def test_keep_goes_on_after_a_preemption(place):
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"]
    _, did = keep(place, states, ends=[255, 0])
    attempt = ["queue", "set up", "run", "await"]
    assert did == [*attempt, "delete", *attempt, "collect", "delete"]
    assert place.read("runs/mugs/mug-0/concept.safetensors") == "artifact\n"


def test_keep_stops_at_a_mistake(place):
    err, did = keep(place, ["ACTIVE"], ends=[1], status=1)
    assert did == ["set up", "run", "await", "collect"]
    assert "a host ended with status 1, see the logs; the VM is still there and paid for" in err


def test_keep_stops_where_the_hosts_cannot_be_set_up(place):
    (place.path / "broken").write_text("1")
    err, did = keep(place, ["ACTIVE"] * 9, ends=[], status=1)
    assert did == ["set up"] * 3
    assert "not set up in 3 attempts" in err


WAITS = """
import os, signal, sys, time
received = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))
process = "".join(word[13:] for word in sys.argv if word.startswith("--process_id="))
open(f"ready-{process}", "w").close()
while not received:
    time.sleep(0.02)
time.sleep(0.3)
with open(f"saved-{process}", "w") as file:
    file.write(" ".join([os.environ["CUDA_VISIBLE_DEVICES"], *received]))
sys.exit(143)
"""
"""A catversion that runs until a signal, and a moment longer, and tells its GPU and all signals it got."""


def process_that_waits(place: Place) -> None:
    place.fake("catversion", f"exec {sys.executable} -I -S - \"$@\" << 'END'\n{WAITS}\nEND")


WORKER = "worker.sh out --config=x --config.run_dir=gs://b/out"


@pytest.mark.parametrize(
    ("ends", "status"), [([0], 0), ([1], 1), ([2], 0), ([137, 134, 143, 0], 0), ([74, 0], 0), ([139] * 21, 139)]
)
def test_worker_restarts_after_a_crash_only(place, ends, status):
    place.fake("sleep", "exec /bin/sleep 0.01")
    place.fake("catversion", 'exit "$(head -n 1 ends; sed -i 1d ends)"')
    (place.path / "ends").write_text("".join(f"{end}\n" for end in ends))
    out, _ = finish(place.start(WORKER), status)
    calls = [call for call in place.calls if call[0] == "catversion"]
    assert calls == [["catversion", "batch", "--config=x", "--config.run_dir=gs://b/out"]] * len(ends)
    assert place.read("out.status") == f"{status}\n"
    assert ("catversion status lists them" in out) == (ends == [2])


def test_worker_passes_a_signal_on_and_runs_once(place):
    process_that_waits(place)
    process = place.start(WORKER)
    place.until(lambda: (place.path / "ready-").exists())
    assert "a worker runs here already" in finish(place.start(WORKER), status=1)[1]
    assert not (place.path / "out.status").exists()
    process.terminate()
    finish(process, status=143)
    assert place.read("saved-") == "3,5 SIGTERM"


def test_what_a_tpu_host_runs(place):
    """The line that `tpu_vm.sh run` sends to the hosts, in a shell as ssh would start it."""
    out, _ = finish(place.start("tpu_vm.sh run --dry-run --config.seed=3"))
    (line,) = [word for word in shlex.split(out) if word.startswith("--command=")]
    shutil.copytree(LAUNCH, place.path / "catversion" / "launch")
    place.fake("curl", "case $* in *-number) echo 3 ;; *-endpoints) echo a:b:1,a:b:2,a:b:3,a:b:4 ;; esac")
    place.fake("catversion", "echo training", "catversion/.venv/bin")
    finish(place.shell(line.removeprefix("--command=")))
    place.until(lambda: place.read("catversion/runs/mugs.status") == "0\n")
    assert "training\n" in place.read("catversion/runs/mugs.log")
    share = ["--num_processes=4", "--process_id=3"]
    assert [*BATCH.split(), *share, "--config.seed=3"] in [call[2:] for call in place.calls]


def test_install(place):
    """On the host: a new environment, with the extra it was asked for."""
    shutil.copytree(LAUNCH, place.path / "launch")
    place.fake("python3", "[[ $* != *venv\\ --* ]] || { mkdir -p .venv/bin; cp bin/catversion .venv/bin; }")
    finish(place.shell("launch/install.sh tpu,gcs"))
    finish(place.shell("launch/install.sh cuda"))
    uv = "python3 -m pip install --quiet --user uv"
    pip = "python3 -m uv pip install --quiet --python .venv/bin/python -e"
    assert [" ".join(call) for call in place.calls] == [
        *[uv, "python3 -m uv venv --quiet --python 3.12 .venv", f"{pip} .[tpu,gcs]", "catversion --version"],
        *[uv, f"{pip} .[cuda]", "catversion --version"],
    ]


def skypilot_settings(task: dict, **more: str) -> dict[str, str]:
    return {key: value for key, value in task["envs"].items() if value is not None} | more


def test_skypilot_task(place):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["resources"]["use_spot"] is True
    recovered = task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert {74, 143} <= set(recovered)
    assert not {0, 1, 2} & set(recovered)
    assert [key for key, value in task["envs"].items() if value is None] == ["NAME", "BUCKET"]
    assert task["setup"] == 'launch/install.sh "${EXTRA},gcs,s3,ray"'
    place.fake("catversion", "exit 2", ".venv/bin")
    # It is in the background: whoever asks for its health waits until it has begun.
    place.fake("ray", '[[ $1 != health-check ]] || grep -q "^ray .start" "$CALLS"', ".venv/bin")
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "FLAGS": "--config.seed=3 --config.train.steps=5"}
    finish(place.shell(task["run"], **skypilot_settings(task, SKYPILOT_NODE_RANK="0", **nodes)), status=2)
    manifest = place.path / "concepts" / "concepts.jsonl"
    flags = f"--ray=10.0.0.1:6379 --config=sd15 --manifest={manifest} --config.run_dir=gs://b/mugs"
    assert ["ray", "start", "--head", "--port=6379", "--dashboard-host=127.0.0.1", "--block"] in place.calls
    assert place.calls[-1] == ["catversion", "batch", *flags.split(), "--config.seed=3", "--config.train.steps=5"]
    place.calls_file.unlink()
    place.fake("ray", "[[ $1 != start ]] || exit 1", ".venv/bin")  # as it ends when the head has stopped
    finish(place.shell(task["run"], **skypilot_settings(task, SKYPILOT_NODE_RANK="1", **nodes)))
    assert place.calls == [
        ["ray", "health-check", "--address=10.0.0.1:6379"],
        ["ray", "start", "--address=10.0.0.1:6379", "--block"],
    ]


def test_gke_manifest(place):
    """Ray's own reader sees the TPU hosts, the command's flags exist, and a pod that goes says so."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    job = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    spec = job["spec"]["rayClusterSpec"]
    read = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "c", "namespace": "n"}, "spec": spec})
    kinds = read["available_node_types"]
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    assert kinds["tpu-hosts"]["resources"]["TPU"] == 8
    program, command, *flags = job["spec"]["entrypoint"].partition("||")[0].split()
    assert (program, command, flags[0]) == ("catversion", "batch", "--ray=auto")
    known = catversion("batch", "--help").stdout
    assert all(flag.partition("=")[0].partition(".")[0] in known for flag in flags)
    (worker,) = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    place.fake("python", "echo abc")
    place.fake("ray", "")
    place.fake("sleep", "")
    shell, option, line = worker["lifecycle"]["preStop"]["exec"]["command"]
    finish(place.shell(f"{shell} {option} {shlex.quote(line)}", RAY_ADDRESS="head:6379"))
    (told,) = [call for call in place.calls if call[0] == "ray"]
    assert told[1:4] == ["drain-node", "--address=head:6379", "--node-id=abc"]


MEASURED = [
    "doctor", "bench --kernels", "bench --config=mini --sizes=1x1", "train", "bench --config=mini --pictures=1,8",
    "bench --config=mini --sizes=2x1",
]  # fmt: skip
MEASURE = "measure.sh out --config=mini --first=1x1 --sizes=2x1"


def test_a_measurement_dry(place):
    out, _ = finish(place.start(f"{MEASURE} --dry-run"))
    lines = out.splitlines()
    assert len(lines) == len(MEASURED)
    assert all(f"catversion {part}".split()[:2] == line.split()[:2] for part, line in zip(MEASURED, lines, strict=True))
    assert not (place.path / "out").exists()
    assert place.calls == []


def test_a_part_that_fails_does_not_keep_the_others_from_being_measured(place):
    place.fake("catversion", 'if [[ $2 = --kernels ]]; then echo "cudnn differs"; exit 1; fi; echo "| $1 |"')
    out, _ = finish(place.start(MEASURE), status=1)
    assert out == "out/report.md\n"
    said = [" ".join(call[1:]) for call in place.calls]
    assert [any(part in line for part in MEASURED) for line in said] == [True] * len(MEASURED)
    assert "--trace=out/trace" in said[2]
    report = place.read("out/report.md")
    assert report.count("\n## ") == len(MEASURED)
    assert report.count("FAILED with status 1") == 1
    assert report.index("cudnn differs") < report.index("FAILED") < report.index("| train |")


def test_a_measurement_needs_catversion(place):
    (place.path / "bin" / "catversion").unlink()
    _, err = finish(place.start(MEASURE), status=1)
    assert err.startswith("measure.sh: catversion: not on the PATH")


def test_what_is_copied_to_hosts_and_images_exists(place):
    out, _ = finish(place.start("tpu_vm.sh setup --dry-run"))
    archived = shlex.split(out.splitlines()[0])[6:]
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert sorted(archived) == sorted(copied)
    assert all((ROOT / name).exists() for name in archived)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_the_pages(place, page):
    """What a page says to run exists; its links lead somewhere."""
    text = page.read_text()
    for line in re.findall(r"^\$ (launch/[^#\n]*)", text, re.MULTILINE):
        out, _ = finish(place.start(f"{line.removeprefix('launch/')} --dry-run"))
        assert out
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (LAUNCH / target).exists(), target


def test_every_script_is_in_the_index():
    index = (LAUNCH / "README.md").read_text()
    for name in ["tpu_vm.sh", "measure.sh", "gke.yaml", "skypilot.yaml", "Dockerfile"]:
        assert f"]({name})" in index
