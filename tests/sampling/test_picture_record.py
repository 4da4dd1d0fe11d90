"""What a picture says of itself, read by another program, and made again from it."""

import dataclasses
import json
import re
import shutil
import struct
import zlib

import msgspec
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_parsers import ParserManager
from sd_parsers.data import Generators

import catversion_jax as cv
from catversion_jax.base.schedulers import SCHEDULERS
from catversion_jax.methods import concept_file
from catversion_jax.methods.dreambooth import DreamBooth
from catversion_jax.sampling.picture_record import PictureRecord, UsedConcept, parameters, png_info, read_picture
from catversion_jax.utils.errors import UserError
from catversion_jax.weights import hub
from tests.commands import catversion, error_of

RECORD = PictureRecord(
    "a photo of a teapot, on a beach", "blurry: dark", 7, "dpmpp_2m_karras", 20, 7.5, 4, 512, 512,
    (UsedConcept("teapot", "catversion", 0.7, "0123456789abcdef"),), "you/model", "f" * 16, "float32", "1",
)  # fmt: skip


def written(path, record: PictureRecord) -> None:
    texts = {"parameters": parameters(record), "catversion": msgspec.json.encode(record).decode()}
    Image.new("RGB", (record.width, record.height)).save(path, pnginfo=png_info(texts))


@pytest.mark.parametrize("prompt", ["a teapot", 'a teapot, red: "big"', "une théière", "茶壺", "line\nbreak"])
@pytest.mark.parametrize("negative", ["", "blurry, dark"])
@pytest.mark.parametrize("scheduler", ["", *SCHEDULERS])
def test_another_program_reads_it(tmp_path, prompt, negative, scheduler):
    record = msgspec.structs.replace(RECORD, prompt=prompt, negative_prompt=negative, scheduler=scheduler)
    written(tmp_path / "a.png", record)
    found = ParserManager().parse(tmp_path / "a.png")
    assert found.generator == Generators.AUTOMATIC1111
    assert [str(part) for part in found.prompts] == [prompt]
    assert [str(part) for part in found.negative_prompts] == ([negative] if negative else [])
    (sampler,) = found.samplers
    assert sampler.parameters["steps"] == "20"
    assert float(sampler.parameters["cfg_scale"]) == 7.5
    assert sampler.parameters["seed"] == "7"
    assert found.metadata["Size"] == "512x512"
    assert found.metadata["Concept 1"] == "teapot 0.7 0123456789abcdef"
    (model,) = found.models
    assert model.name == "you/model"
    assert read_picture(tmp_path / "a.png") == record


def test_the_line_of_settings():
    *_, line = parameters(RECORD).split("\n")
    pairs = re.findall(r'\s*([\w ]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line)  # as the web UI reads it
    assert dict(pairs) == {
        "Steps": "20", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "7.5", "Seed": "7",
        "Size": "512x512", "Model": "you/model", "Concept 1": "teapot 0.7 0123456789abcdef",
        "Version": "catversion-jax 1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", "a cup"), ("negative_prompt", ""), ("scheduler", ""), ("steps", 3), ("guidance", 7.6),
        ("width", 64), ("model", "a"), ("dtype", "bfloat16"), ("concepts", ()), ("batch_size", 1),
        ("concepts", (UsedConcept("teapot", "catversion", 0.7, "1" * 16),)),
        ("concepts", (UsedConcept("teapot", "catversion", 0.8, "0123456789abcdef"),)),
    ],
)  # fmt: skip
def test_names_tell_pictures_apart(name, value):
    assert msgspec.structs.replace(RECORD, **{name: value}).key != RECORD.key
    assert msgspec.structs.replace(RECORD, seed=9, version="2").key == RECORD.key
    assert re.fullmatch("[0-9a-f]{8}", RECORD.key)


def test_a_digest_is_of_what_was_learned(concepts):
    teapot, dog = map(concept_file.load, concepts)
    assert teapot.digest == teapot.at(0.3).digest == dataclasses.replace(teapot, steps=9, model_path="x").digest
    others = [
        dog,
        dataclasses.replace(teapot, class_word="pot"),
        dataclasses.replace(teapot, learned={"prefix": teapot.learned["prefix"] + 1}),
        dataclasses.replace(teapot, method=dataclasses.replace(teapot.method, logit_bias=1.0)),
        dataclasses.replace(teapot, method=DreamBooth("sks", 1.0)),
    ]
    assert len({teapot.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_made_again(concepts, tmp_path):
    """By the picture alone, into another folder, byte for byte; other flags change one thing each."""
    out, again = tmp_path / "out", tmp_path / "again"
    same = ["--steps=2", "--scheduler=euler_ancestral", "--guidance=3", "--negative_prompt=a cup", "--batch_size=2"]
    given = [f"--embedding={path}" for path in concepts]
    catversion("generate", *given, "--prompt=a teapot and a dog", "--num=2", "--seed=5", *same, f"--out={out}")
    (picture,) = out.glob("*_6.png")
    record = read_picture(picture)
    assert [(used.class_word, used.strength) for used in record.concepts] == [("teapot", 0.7), ("dog", 0.7)]
    assert (record.prompt, record.negative_prompt, record.seed) == ("a teapot and a dog", "a cup", 6)
    catversion("generate", f"--like={picture}", f"--out={again}")
    assert (again / picture.name).read_bytes() == picture.read_bytes()

    before = {path.name for path in out.glob("*.png")}
    for change in ("--strength=1", "--guidance=4", "--seed=9", "--prompt=a dog", f"--embedding={concepts[1]}"):
        catversion("generate", f"--like={picture}", change, f"--out={out}")
    after = {path.name for path in out.glob("*.png") if not path.name.startswith("grid")}
    assert len(after - before) == 5
    found = [read_picture(out / name) for name in after - before]
    assert sorted(record.seed for record in found) == [6, 6, 6, 6, 9]
    assert sorted(len(record.concepts) for record in found) == [1, 2, 2, 2, 2]
    assert {used.strength for record in found for used in record.concepts} == {0.7, 1.0}
    for path in (picture, out / "grid.png"):
        assert str(tmp_path).encode() not in path.read_bytes()


def test_what_cannot_be_made_again(concepts, tmp_path):
    teapot, out = tmp_path / "teapot", tmp_path / "out"
    shutil.copytree(concepts[0], teapot)
    catversion("generate", f"--embedding={teapot}", "--prompt=a teapot", "--num=1", "--steps=1", f"--out={out}")
    (picture,) = out.glob("*_0.png")
    other = dataclasses.replace(concept_file.load(teapot), class_word="pot")
    concept_file.save(teapot / "concept.safetensors", other)
    assert "another concept by now than the one of" in error_of("generate", f"--like={picture}")
    shutil.rmtree(teapot)
    assert "teapot: not found; expected a learned concept" in error_of("generate", f"--like={picture}")
    (alone := tmp_path / "elsewhere").mkdir()
    shutil.copy(picture, alone)
    said = error_of("generate", f"--like={alone / picture.name}")
    assert "made with a concept of 'teapot'" in said
    assert said.endswith("of which its folder does not say where it is; give --embedding")
    given = [f"--embedding={concepts[0]}", f"--out={alone}"]
    catversion("generate", f"--like={alone / picture.name}", *given)
    assert (alone / picture.name).read_bytes() == picture.read_bytes()
    (alone / ".sources.json").write_text("[]")
    assert ".sources.json" in error_of("generate", f"--like={alone / picture.name}")


LARGE = b"catversion\0\0" + zlib.compress(bytes(2**28))


def test_without_the_concept(concepts, tmp_path):
    """At strength 0 the concept stays out again; of no concept at all, one has to be given."""
    out, given = tmp_path / "out", [f"--embedding={concepts[0]}", "--prompt=a teapot", "--num=1", "--steps=1"]
    catversion("generate", *given, "--strength=0", f"--out={out}")
    (picture,) = out.glob("*_0.png")
    catversion("generate", f"--like={picture}", f"--out={tmp_path / 'again'}")
    assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
    written(tmp_path / "none.png", msgspec.structs.replace(RECORD, concepts=()))
    assert "made without a concept; give --embedding" in error_of("generate", f"--like={tmp_path / 'none.png'}")


def test_another_model(concepts, tiny_model, tmp_path):
    """Models of one name do not share a key, and none takes the place of the one that is gone."""
    model = shutil.copytree(tiny_model, tmp_path / "elsewhere" / tiny_model.name)
    given = [f"--embedding={concepts[0]}", "--prompt=a teapot", "--num=1", "--steps=1", f"--out={tmp_path / 'out'}"]
    catversion("generate", *given)
    catversion("generate", *given, f"--model={model}")
    first, second = (tmp_path / "out").glob("a-teapot_*_0.png")
    for picture in (first, second):
        catversion("generate", f"--like={picture}", f"--out={tmp_path / 'again'}")
        assert (tmp_path / "again" / picture.name).read_bytes() == picture.read_bytes()
    written(tmp_path / "out" / "x.png", msgspec.structs.replace(read_picture(first), fingerprint="0" * 16))
    assert "made with the model" in error_of("generate", f"--like={tmp_path / 'out' / 'x.png'}")


def test_a_model_that_a_picture_names_is_not_downloaded(concepts, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(hub, "fetch", refuse)
    written(tmp_path / "a.png", msgspec.structs.replace(RECORD, model="you/model"))
    said = error_of("generate", f"--like={tmp_path / 'a.png'}", f"--embedding={concepts[0]}")
    assert "made with you/model of https://huggingface.co, which is not in the cache; to download it, say" in said


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_files_that_are_no_picture_of_ours(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    plain = path.read_bytes()
    bad = {**msgspec.to_builtins(RECORD)}
    contents = {
        "does not say how it was made": plain,
        "does not say": b"",
        "does not say how": plain[:40],
        "steps=0; expected": bad | {"steps": 0},
        "seed -1; expected": bad | {"seed": -1},
        "scheduler='x'": bad | {"scheduler": "x"},
        "dtype 'float99'; expected": bad | {"dtype": "float99"},
        "a strength that no": bad | {"concepts": [msgspec.to_builtins(UsedConcept("a", "b", 9.0, "c"))]},
        "expected a picture of catversion generate": {"prompt": 1},
        # A text of a few kilobytes that unpacks to a gigabyte.
        "does not say how it": plain[:33]
        + chunk(b"zTXt", b"catversion\0\0" + zlib.compress(bytes(2**28)))
        + plain[33:],
    }
    for message, content in contents.items():
        if isinstance(content, dict):
            info = PngInfo()
            info.add_text("catversion", json.dumps(content))
            Image.new("RGB", (4, 4)).save(path, pnginfo=info)
        else:
            path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_picture(path)
        assert message in str(error.value), message
        assert str(error.value).startswith(str(path))
    with pytest.raises(UserError, match="not found; expected a picture of catversion generate"):
        read_picture(tmp_path / "none.png")


def test_in_python(concepts, tiny_model, tmp_path):
    pipe = cv.Pipeline.from_pretrained(tiny_model)
    teapot = cv.Concept.load(concepts[0])
    (image,) = pipe("a teapot", concepts=[teapot], seed=np.int64(3), steps=2, guidance=np.float32(7.5))
    image.save(tmp_path / "a.png", pnginfo=cv.png_info(image.info))
    record = read_picture(tmp_path / "a.png")
    assert (record.prompt, record.seed, record.steps) == ("a teapot", 3, 2)
    assert record.concepts == (UsedConcept("teapot", "catversion", 0.7, teapot.digest),)
    assert "Steps: 2, " in Image.open(tmp_path / "a.png").info["parameters"]
