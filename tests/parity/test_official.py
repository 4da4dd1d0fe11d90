"""The authors' adapters and PyTorch's own files, against PyTorch: the same tensors, and the same text states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig as ReferenceConfig
from transformers import CLIPTextModel as Reference

from catversion_jax.base import pipeline
from catversion_jax.methods import concept_file, official
from catversion_jax.models.clip import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.prefix_attention import Prefix
from catversion_jax.utils.json_config import from_json
from catversion_jax.weights.conversion import from_torch
from catversion_jax.weights.rules import CLIP_TEXT
from catversion_jax.weights.torch_zip import open_checkpoint, read_zip
from tests.cli.test_convert_command import concept
from tests.conftest import OFFICIAL, max_error

SD15_TEXT = {
    "vocab_size": 1000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
}


class ModelCheckpoint:
    """A callback as PyTorch Lightning's checkpoints name it, with a state of its own."""

    def __init__(self):
        self.best, self.seen = torch.tensor(0.5), {1, 2}


def same(path, expected: dict[str, torch.Tensor]):
    found = open_checkpoint(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        ours = found[name].read()
        assert ours.shape == tuple(tensor.shape)
        assert str(ours.dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(ours.astype(np.float64), tensor.detach().double().numpy())


def tensors() -> dict[str, torch.Tensor]:
    base = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    return {
        "single": base,
        "half": base.half(),
        "brain": base.bfloat16(),
        "double": base.double(),
        "ids": torch.arange(77)[None],
        "flags": base > 0,
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "view": base[1:3, ::2],
        "turned": base.permute(2, 0, 1),
        "parameter": torch.nn.Parameter(base.half()),
    }


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_pytorch_saves(tmp_path, protocol):
    torch.save(tensors(), tmp_path / "model.bin", pickle_protocol=protocol)
    same(tmp_path / "model.bin", tensors())


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_of_lightning(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 3,
        "state_dict": module.state_dict(),  # an OrderedDict with an attribute
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {ModelCheckpoint: ModelCheckpoint(), "numpy": np.float64(0.5), "array": np.arange(3)},
        "dtype": torch.float16,
    }
    torch.save(checkpoint, tmp_path / "model.ckpt", pickle_protocol=protocol)
    same(tmp_path / "model.ckpt", module.state_dict())
    assert f"{__name__}.ModelCheckpoint" in read_zip(tmp_path / "model.ckpt").foreign


def test_pytorch_reads_what_we_write(tmp_path):
    ours = concept(length=2)
    official.write_adapter(tmp_path / "adapter.bin", ours, tmp_path)
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "adapter.bin", weights_only=True, **options)
        assert tuple(loaded) == official.NAMES
        assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 1
        for tensor in loaded.values():
            np.testing.assert_array_equal(tensor.numpy(), ours.learned["prefix"].ravel())


def attention(layer, x: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
    """One layer's attention as the authors compute it: the prefix in front of the keys and values of each head, and
    one in front of each row of the additive causal mask. `prefix` is [P, 2, 12, 64]."""
    batch, length, width = x.shape

    def heads(projected):
        return projected.view(batch, length, 12, 64).transpose(1, 2)

    query, key, value = (heads(p(x)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    mask = torch.full((length, length), torch.finfo(x.dtype).min).triu(1)
    if prefix is not None:
        learned_key, learned_value = (prefix[:, i].transpose(0, 1).expand(batch, -1, -1, -1) for i in (0, 1))
        key, value = torch.cat([learned_key, key], 2), torch.cat([learned_value, value], 2)
        mask = torch.cat([torch.ones(length, len(prefix)), mask], 1)
    weights = torch.softmax(query @ key.transpose(2, 3) / 8 + mask, -1)
    return layer.out_proj((weights @ value).transpose(1, 2).reshape(batch, length, width))


def forward(model: Reference, token_ids: torch.Tensor, prefixes: dict[int, torch.Tensor]) -> torch.Tensor:
    """The text encoder with prefixes in the layers that have one."""
    text = model.text_model
    x = text.embeddings(input_ids=token_ids)
    for i, layer in enumerate(text.encoder.layers):
        x = x + attention(layer.self_attn, layer.layer_norm1(x), prefixes.get(i))
        x = x + layer.mlp(layer.layer_norm2(x))
    return text.final_layer_norm(x)


def adapters(folder) -> dict[str, concept_file.Concept]:
    """The authors' two where they are there, and one of ours, each through its file."""
    official.write_adapter(folder / "ours.bin", concept(), folder)
    paths = [folder / "ours.bin", *sorted(OFFICIAL.glob("*/pytorch_adapter.bin"))]
    return {str(path): official.read_adapter(path) for path in paths}


@torch.no_grad()
def test_text_states_with_an_adapter(tmp_path):
    torch.manual_seed(0)
    reference = Reference(ReferenceConfig(**SD15_TEXT)).eval()
    for name, parameter in reference.named_parameters():
        parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.03)
    token_ids = torch.randint(0, 1000, (2, 77))
    base = forward(reference, token_ids, {})
    assert max_error(base, reference(token_ids).last_hidden_state) < 1e-4

    torch.save(reference.state_dict(), tmp_path / "model.bin")
    module = CLIPTextModel(from_json(CLIPTextConfig, SD15_TEXT, {}))
    saved = {name: tensor.read() for name, tensor in open_checkpoint(tmp_path / "model.bin").items()}
    params = from_torch(saved, CLIP_TEXT, pipeline.abstract("text", module), "model.bin")
    apply = jax.jit(module.apply)
    ids = jnp.asarray(token_ids.numpy())
    everywhere = jnp.ones((*ids.shape, 1), bool)
    for path, imported in adapters(tmp_path).items():
        (layers,), bias = imported.method.layers, imported.method.logit_bias
        prefix = Prefix(jnp.asarray(imported.learned["prefix"]), bias, jnp.float32(1), everywhere, layers)
        ours = apply({"params": params}, ids, prefix)["last_hidden_state"]
        (flat, *_) = torch.load(path, weights_only=True, map_location="cpu").values()
        per_layer = flat.view(1, 6, 12, 64).split(2, 1)
        theirs = forward(reference, token_ids, dict(zip((9, 10, 11), per_layer, strict=True)))
        print(path)
        assert max_error(theirs, base) > 0.1  # it does something
        assert max_error(ours, theirs) < 1e-4
