"""Paths in buckets: they are read and written there, and what cannot be is said in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from catversion_jax.utils import paths
from catversion_jax.utils.errors import StorageError, UserError
from catversion_jax.utils.files import check_writable, read_text, write_atomically
from catversion_jax.utils.paths import (
    create,
    download,
    entries,
    expand,
    files_below,
    is_remote,
    named_in,
    upload_folder,
)
from tests.commands import ENVIRONMENT, ROOT, command, error_of


def test_files_and_folders(bucket, tmp_path):
    (tmp_path / "a b" / "ü").mkdir(parents=True)
    (tmp_path / "a b" / "ü" / "x.txt").write_text("1")
    (tmp_path / "y.txt").write_text("2")
    upload_folder(tmp_path, bucket)
    assert [(path.name, is_folder) for path, is_folder in entries(bucket)] == [("a b", True), ("y.txt", False)]
    assert files_below(bucket) == [bucket / "a b" / "ü" / "x.txt", bucket / "y.txt"]
    write_atomically(bucket / "y.txt", lambda path: path.write_text("3"))
    assert read_text(bucket / "y.txt", 9, "a text") == "3"
    with pytest.raises(UserError, match=r"y\.txt: larger than 0 bytes"):
        read_text(bucket / "y.txt", 0, "a text")
    download(bucket, tmp_path / "copy")
    assert (tmp_path / "copy" / "a b" / "ü" / "x.txt").read_text() == "1"
    check_writable(bucket / "z.txt")
    assert not (bucket / "z.txt").exists()
    paths.remove_folder(bucket)
    assert not bucket.exists()


def test_one_of_several_creates_a_file(bucket, tmp_path):
    for folder in (bucket, tmp_path):
        assert [create(folder / "claim", word) for word in (b"first", b"second")] == [True, False]
        assert (folder / "claim").read_bytes() == b"first"


def test_what_paths_mean(variables, tmp_path):
    remote = expand("gs://my-bucket/a/b")
    assert str(remote) == "gs://my-bucket/a/b"
    assert expand("gs:/my-bucket/a/b") == remote, "as pathlib writes it"
    assert str(named_in(tmp_path, "gs://my-bucket/a/b")) == str(remote)
    assert str(named_in(remote, "c/d")) == "gs://my-bucket/a/b/c/d"
    assert named_in(remote, "/c/d") == Path("/c/d")
    assert expand(f"file://{tmp_path}") == tmp_path
    assert not is_remote(expand("photos:/mine"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("az://box/x", "az:// is no kind of path; expected gs://, s3:// or a path of this machine"),
        ("ftp://host/x", "ftp:// is no kind of path"),
        ("gs://no-such-bucket/x", "gs://no-such-bucket: no such bucket; make it, or correct its name"),
        ("s3://no-such-bucket/x", "s3://no-such-bucket: no such bucket"),
        ("gs:///x", "names no bucket; expected gs://BUCKET/FOLDER"),
    ],
)
@pytest.mark.parametrize(
    "key", ["config.run_dir", "config.data.dir", "config.model.path", "manifest", "out", "embedding"]
)
def test_no_such_place(variables, tmp_path, monkeypatch, url, message, key):
    monkeypatch.chdir(tmp_path)
    photos = ROOT / "catversion_jax" / "concepts" / "teapot" / "train"
    given = {"config": "mini", "config.run_dir": tmp_path / "run", "config.data.dir": photos}
    given |= {"config.concept.class_word": "teapot"}
    command, given = {
        "manifest": ("batch", given),
        "out": ("generate", {"embedding": tmp_path, "prompt": "a teapot"}),
        "embedding": ("generate", {"prompt": "a teapot"}),
    }.get(key, ("train", given))
    line = error_of(command, *(f"--{name}={value}" for name, value in (given | {key: url}).items()))
    # Of `generate --out`, the concept is missed first.
    assert message in line or (key == "out" and "expected a learned concept" in line)
    assert list(tmp_path.iterdir()) == []


def test_no_package(variables, monkeypatch):
    for scheme, module, extra in (("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")):
        paths.file_system.cache_clear()
        paths.reach.cache_clear()
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"needs {module} .*; pip install 'catversion-jax\[{extra}\]'"):
            expand(f"{scheme}://my-bucket/x")
    paths.file_system.cache_clear()


def test_no_credentials(variables):
    """The real client's words, with what to do."""
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("AWS_")}
    environment |= {"AWS_ENDPOINT_URL": variables["AWS_ENDPOINT_URL"], "AWS_EC2_METADATA_DISABLED": "true"}
    run = command("generate", "--embedding=s3://my-bucket/x", "--prompt=a mug")
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "s3://my-bucket: no access (" in done.stderr
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_fails(bucket, monkeypatch):
    """Is a failure of storage, after which the same command may succeed."""

    def fail(*_, **__):
        raise RuntimeError("503 Service Unavailable")

    monkeypatch.setattr(paths.of_path(bucket), "put_file", fail)
    with pytest.raises(StorageError, match=r"not reached \(503 Service Unavailable\); run the command again"):
        write_atomically(bucket / "x", Path.touch)
