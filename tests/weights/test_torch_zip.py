"""torch.save's files are read without PyTorch and without unpickling; what is not such a file is refused."""

import contextlib
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from catversion_jax.utils.errors import UserError
from catversion_jax.weights import pickle, torch_zip
from catversion_jax.weights.torch_zip import open_checkpoint
from tests.torch_files import Call, Global, Raw, View, encode, save, save_tensors, whole

LIGHTNING = Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
SYSTEM = Call(Global("posix", "system"), ("touch PWNED",))


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    dtypes = {"single": np.float32, "half": np.float16, "brain": jnp.bfloat16, "double": np.float64}
    return {name: rng.normal(size=(3, 4, 5)).astype(dtype) for name, dtype in dtypes.items()} | {
        "ids": np.arange(77)[None],
        "flags": np.asarray([True, False]),
        "scalar": np.asarray(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def same(found: dict[str, torch_zip.ZipTensor], expected: dict[str, np.ndarray]):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
        read = tensor.read()
        assert read.dtype == tensor.dtype
        np.testing.assert_array_equal(read, expected[name])


def test_tensors_of_every_kind(tmp_path, tensors):
    same(open_checkpoint(save_tensors(tmp_path / "model.bin", tensors)), tensors)


def test_a_checkpoint_with_other_things_in_it(tmp_path, tensors):
    """What PyTorch Lightning adds is passed over, whatever it is and whatever it would do."""
    state = {"best_model_score": Call(Global("numpy.core.multiarray", "scalar"), (1, "x")), "monitor": None}
    others = {
        "global_step": 840000,
        "rate": 1e-4,
        "callbacks": {LIGHTNING: state},
        "optimizer_states": [{"state": {0: {"step": 1}}}, SYSTEM],
        "loops": Call(Global("my.module", "Loop"), (1, [2]), {"done": True}),
        "more": Raw(encode(SYSTEM) + encode([1]) + b"a" + encode({"x": 1})[1:]),  # items and entries for it
    }
    path = save_tensors(tmp_path / "model.ckpt", tensors, **others)
    same(open_checkpoint(path), tensors)
    names = {"posix.system", "my.module.Loop", "numpy.core.multiarray.scalar", f"{LIGHTNING.module}.{LIGHTNING.name}"}
    assert torch_zip.read_zip(path).foreign == names
    assert [file.name for file in tmp_path.iterdir()] == ["model.ckpt"]


def test_views_of_one_storage(tmp_path):
    numbers = np.arange(24, dtype=np.float32)
    views = {
        "all": View("0", np.float32, 24, (4, 6), (6, 1)),
        "turned": View("0", np.float32, 24, (6, 4), (1, 6)),
        "part": View("0", np.float32, 24, (2, 3), (6, 2), offset=7),
        "parameter": Call(
            Global("torch._utils", "_rebuild_parameter"), (View("0", np.float32, 24, (24,), (1,)), True, None)
        ),
    }
    path = save(tmp_path / "model.bin", views, {"0": numbers})
    grid = numbers.reshape(4, 6)
    same(open_checkpoint(path), {"all": grid, "turned": grid.T, "part": grid[1:3, 1::2], "parameter": numbers})


def test_only_what_is_asked_for_is_read(tmp_path, tensors, monkeypatch):
    path = save_tensors(tmp_path / "model.bin", tensors)
    read = []
    original = zipfile.ZipFile.read
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda self, name: read.append(name) or original(self, name))
    found = open_checkpoint(path)
    assert read == ["archive/data.pkl"]
    found["half"].read()
    assert read[1:] == ["archive/data/1"]


def read_all(path) -> list[np.ndarray]:
    return [tensor.read() for tensor in open_checkpoint(path).values()]


def refused(path, *parts: str):
    with pytest.raises(UserError) as error:
        read_all(path)
    for part in (str(path), *parts):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert not (path.parent / "PWNED").exists()


def view(**changes) -> View:
    return View(**{"key": "0", "dtype": np.float32, "size": 6, "shape": (2, 3), "strides": (3, 1)} | changes)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (view(offset=1), "reaches beyond its storage of 6"),
        (view(strides=(4, 1)), "reaches beyond its storage of 6"),
        (view(strides=(10**18, 1)), "reaches beyond its storage of 6"),
        (view(shape=(2**62, 2, 0), strides=(1, 1, 1)), "damaged"),
        (view(shape=(10**30, 0), strides=(1, 1)), "are no sizes"),
        (view(shape=(7, 1), strides=(0, 0)), "a tensor of 7 numbers"),
        (view(strides=(-3, 1), offset=3), "are no sizes"),
        (view(strides=(1,)), "no view of a storage"),
        (view(shape=(1,) * 40, strides=(0,) * 40), "no view of a storage"),
        (view(shape=[2, 3]), "no view of a storage"),
        (view(shape=(2.0, 3)), "are no sizes"),
        (view(size=7), "storage '0' has 24 bytes, expected 7 of float32"),
        (view(dtype=np.float64), "storage '0' has 24 bytes, expected 6 of float64"),
        (view(key="../data/0"), "storage '../data/0' has no bytes"),
        (view(key="/etc/passwd"), "storage '/etc/passwd' has no bytes"),
        (SYSTEM, "'weight' is no tensor but 'posix.system'; save the model's tensors alone"),
        (Call(SYSTEM, ()), "no tensor but 'posix.system'"),
        (Call(Global("torch._utils", "_rebuild_tensor_v2"), (SYSTEM, 0, (), ())), "no tensor but 'posix.system'"),
        (Call(Global("torch._utils", "_rebuild_tensor_v2"), ("0", 0, (), ())), "no view of a storage"),
        (Call(Global("torch._utils", "_rebuild_tensor_v2"), ()), "malformed pickle: TypeError"),
        (Call("os.system", ("touch PWNED",)), "a call of something that is no name"),
        (Call({}, ()), "a call of something that is no name"),
        (Raw(encode("x") + b"Q"), "a persistent id that names no storage"),
        (Raw(encode(("storage", "torch.FloatStorage", "0", "cpu", 6)) + b"Q"), "names no storage"),
        (Raw(b"(cposix\nsystem\n" + encode("touch PWNED") + b"o"), "opcode OBJ"),
        (Raw(b"(" + encode("touch PWNED") + b"iposix\nsystem\n"), "opcode INST"),
        (Raw(b"\x82\x01"), "opcode EXT1"),
        (Raw(encode("x") + encode([1])[1:]), "items for something that is no list"),
        (Raw(encode("x") + encode({"x": 1})[1:]), "entries for something that is no dict"),
        (Raw(encode(1) + encode("system") + b"\x93"), "a name that is no string"),
        (Raw(b"h\x05"), "malformed pickle: KeyError"),
        (Raw(b"0" * 9), "opcode POP"),
        (Raw(b"R" * 9), "malformed pickle: IndexError"),
        (Raw(b"."), "a pickle of no value or several"),
        (Raw(b"X\xff\xff\xff\x7f"), "expected 2147483647 bytes"),
        (Raw(encode("a\n") + encode("b" * 300) + b"\x93"), r"no tensor but 'a\n.bbb"),
        (3, "'weight' is no tensor but 'int'"),
    ],
)
def test_forged_tensors(tmp_path, monkeypatch, tensor, message):
    monkeypatch.chdir(tmp_path)
    refused(save(tmp_path / "bad.ckpt", {"weight": tensor}, {"0": np.zeros(6, np.float32)}), message)


@pytest.mark.parametrize("value", [[], {}, "x", {"state_dict": [1]}, {"state_dict": {}}, SYSTEM], ids=repr)
def test_no_tensors_by_name(tmp_path, value):
    refused(save(tmp_path / "bad.ckpt", value, {}), "expected tensors by name")


def test_entries_that_are_no_plain_parts(tmp_path, tensors):
    path, weights = tmp_path / "bad.bin", {"0": np.zeros(600, np.float32)}
    value = {"weight": whole("0", weights["0"])}
    refused(save(path, value, weights, zipfile.ZIP_DEFLATED), "'archive/data.pkl' is compressed")
    refused(save(path, value, weights, **{"sub/data.pkl": b"", "x": b""}, byteorder=b"big"), "big-endian")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", b"N.")
    refused(path, "2 entries data.pkl")
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("archive/x", b"")
    refused(path, "zip entries, some of one name")


def test_limits(tmp_path, monkeypatch, tensors):
    path = save_tensors(tmp_path / "model.bin", tensors)
    for module, name, message in (
        (torch_zip, "MAX_PICKLE_BYTES", "a pickle of more than 0 MiB"),
        (torch_zip, "MAX_ENTRIES", "more than 5"),
        (pickle, "MAX_OPCODES", "more than 5 opcodes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 5)
            refused(path, message)


LONG = "x" * 100_000
BOMBS = {
    # A long text, remembered once, as the module of thousands of names.
    "names": (
        Raw(b"]" + encode(LONG) + b"q\x00" + b"".join(b"h\x00" + encode(str(i)) + b"\x93a" for i in range(20_000))),
        "a name of more than 400 characters",
    ),
    "keys": (
        Raw(
            b"](" + encode("storage") + encode(Global("torch", "FloatStorage")) + encode(LONG)
            + encode("cpu") + encode(600) + b"tQa"
        ),
        "has a name of more than 400 characters",
    ),
    "opcodes": (Raw(b"](" + b"}" * 600_000 + b"e"), "more than 500,000 opcodes"),
    "tensor": ({LONG: whole("0", np.zeros(600, np.float32))}, "a tensor has a name of more than 400 characters"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_files_that_ask_for_much_memory(tmp_path, bomb):
    value, message = BOMBS[bomb]
    path = save(tmp_path / "bad.bin", value, {"0": np.zeros(600, np.float32)})
    tracemalloc.start()
    try:
        refused(path, message)
        assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    finally:
        tracemalloc.stop()


def test_long_names_of_entries(tmp_path):
    path = save(tmp_path / "bad.bin", {}, {}, **{"x" * 500: b""})
    refused(path, "has a name of more than 400 characters")


def test_overlapping_entries(tmp_path):
    """Two names for one place, as a zip bomb has it."""
    weights = {"0": np.zeros(600, np.float32), "1": np.zeros(600, np.float32)}
    path = save(tmp_path / "bad.bin", {"weight": whole("0", weights["0"])}, weights)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        second = file.getinfo("archive/data/1").header_offset
    at = data.index(b"archive/data/1", data.index(b"PK\x01\x02")) - 4
    assert int.from_bytes(data[at : at + 4], "little") == second
    del data[second + 44 : second + 44 + 2400]  # the second storage's numbers
    end = data.index(b"PK\x05\x06") + 16
    data[end : end + 4] = (int.from_bytes(data[end : end + 4], "little") - 2400).to_bytes(4, "little")
    path.write_bytes(data)
    refused(path)


def test_damaged_files(tmp_path, tensors):
    whole_file = save_tensors(tmp_path / "model.bin", tensors).read_bytes()
    path = tmp_path / "bad.bin"
    for data, message in (
        (whole_file[:-30], "cut short or damaged"),
        (whole_file[:2000], "cut short or damaged"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "saved by PyTorch before 1.6; load it in PyTorch once"),
        (b"", "expected a file of torch.save"),
        (b"{}", "expected a file of torch.save"),
    ):
        path.write_bytes(data)
        refused(path, message)
    refused(tmp_path / "nothing.ckpt", "not found")
    numbers = tensors["single"].tobytes()
    path.write_bytes(whole_file.replace(numbers, b"x" + numbers[1:]))
    refused(path, "Bad CRC-32")


def test_random_damage_is_at_worst_refused(tmp_path, tensors):
    whole_file = save_tensors(tmp_path / "model.bin", tensors).read_bytes()
    path, rng = tmp_path / "bad.bin", np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole_file)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(UserError):  # some damage changes nothing that is read
            read_all(path)
