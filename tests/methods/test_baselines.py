"""The baselines: what each learns and where it enters, its gradient, and the prior that two of them preserve."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.base.words import find_word
from catversion_jax.cli import train as train_command
from catversion_jax.config import Config, from_config_dict
from catversion_jax.data.photos import Photo, read_photos
from catversion_jax.methods import concept_file, official
from catversion_jax.methods.registry import METHODS
from catversion_jax.sampling import conditioning, sampler
from catversion_jax.sampling.conditioning import movement
from catversion_jax.training import class_images
from catversion_jax.training import step as ts
from catversion_jax.training.concept_data import check_masks, prepare, subject_weights
from catversion_jax.training.many_concepts import train_many
from catversion_jax.training.run import train_once
from catversion_jax.training.share import Share
from catversion_jax.training.state import ConceptData, Frozen
from catversion_jax.utils.errors import UserError
from configs import sd15
from tests.cli.test_commands import TEAPOT
from tests.commands import catversion, error_of
from tests.conftest import max_error

BASELINES = ("textual_inversion", "dreambooth", "custom_diffusion")


def config_of(method: str, model="", run_dir="", **changes) -> Config:
    return Config().replaced({
        "method": method, "model.path": str(model), "run_dir": str(run_dir), "data.dir": str(TEAPOT / "train"),
        "data.masks_dir": str(TEAPOT / "train_masks"), "concept.class_word": "teapot",
        "adapter.length": 2, "adapter.init_std": 0.1, "prior.pictures": 3, "prior.weight": 0.5,
        "sample.steps": 2, "sample.prompts": ("a {class_word}",), "train.steps": 2,
    } | changes)  # fmt: skip


@pytest.fixture(scope="module")
def setting(tiny_pipeline):
    """The step's config, data and frozen share of each method."""

    def make(method: str, **changes):
        config = config_of(method, **changes)
        step_config = ts.StepConfig.of(config, tiny_pipeline.networks)
        photos = read_photos(config.data.dir, tiny_pipeline.networks.resolution, config.data.masks_dir)
        data = prepare(config, step_config.method, tiny_pipeline, photos)
        return step_config, data, Frozen.of(tiny_pipeline, step_config.mesh, config.mesh.rules, step_config.method)

    return make


def a_batch(step_config, data: ConceptData, seed: int = 0) -> ts.Minibatch:
    state = step_config.init_state([seed])
    return jax.vmap(partial(ts.draw_minibatch, config=step_config))(state, data)


@pytest.mark.parametrize("method", METHODS)
def test_gradient(setting, method):
    """Along itself it is the slope of the loss, by central differences."""
    step_config, data, frozen = setting(method)
    drawn = a_batch(step_config, data)

    @jax.jit
    def loss(learned):
        return ts.denoising_loss(learned, frozen, drawn, step_config)[0]

    learned = step_config.init_state([0]).learned
    gradient = jax.jit(jax.grad(loss))(learned)
    norm = float(optax.tree.norm(gradient))
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(gradient))
    step = 1e-3 / norm  # the loss moves by 1e-3
    ahead, behind = (
        float(loss(jax.tree.map(lambda x, g, sign=sign: x + sign * step / norm * g, learned, gradient)))
        for sign in (1, -1)
    )
    assert (ahead - behind) / (2 * step) == pytest.approx(norm, rel=0.02)


@pytest.mark.parametrize("method", BASELINES)
def test_it_starts_as_the_base_model(tiny_pipeline, method):
    learned = jax.device_get(config_of(method).make_method(tiny_pipeline.networks).init(
        jax.random.key(0), tiny_pipeline.networks
    ))  # fmt: skip
    assert not any(x.any() for x in jax.tree.leaves(learned))


def test_what_is_learned(tiny_pipeline):
    networks = tiny_pipeline.networks
    shapes = {
        method: {
            "/".join(path): x.shape
            for path, x in flatten_dict(
                jax.eval_shape(
                    partial(config_of(method).make_method(networks).init, networks=networks),
                    jax.random.key(0),
                )
            ).items()
        }
        for method in BASELINES
    }
    assert shapes["textual_inversion"] == {"word": (32,)}
    unet = {f"unet/{'/'.join(path)}": x.shape for path, x in flatten_dict(tiny_pipeline.params["unet"]).items()}
    assert shapes["dreambooth"] == unet
    projections = {name: shape for name, shape in unet.items() if "attn2/to_k" in name or "attn2/to_v" in name}
    assert len(projections) == 8  # keys and values of the four cross-attentions
    assert shapes["custom_diffusion"] == projections | {"word": (32,)}


def test_the_published_settings():
    """`configs/sd15.py:METHOD` is the method with its own hyperparameters; an unknown one is refused in a line."""
    settings = {method: sd15.get_config(method) for method in METHODS}
    rates = {method: config.train.learning_rate for method, config in settings.items()}
    assert rates == {"catversion": 0.01, "textual_inversion": 2e-3, "dreambooth": 5e-6, "custom_diffusion": 8e-5}
    for config in settings.values():
        from_config_dict(config, unset=("run_dir", "data.dir", "concept.class_word"))
    line = error_of("train", "--config=configs/sd15.py:lora")
    assert "lora: no such method; expected one of catversion, textual_inversion" in line


def concept_of(method: str, tiny_pipeline, scale: float = 0.1) -> concept_file.Concept:
    """A concept of random changes."""
    networks = tiny_pipeline.networks
    of_method = config_of(method).make_method(networks)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(of_method.init, networks=networks), jax.random.key(0))
    learned = jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(np.float32), shapes)
    return concept_file.Concept(learned, of_method, "teapot", (), tiny_pipeline.fingerprint, "", 1, 0.01, 0)


def test_textual_inversion_is_another_row_of_the_embedding(tiny_pipeline):
    concept = concept_of("textual_inversion", tiny_pipeline)
    prompts = ["a photo of a teapot in the snow", "a red Teapot"]
    (token,) = tiny_pipeline.tokenizer.word("teapot")
    text = jax.tree.map(np.array, tiny_pipeline.params["text"][0])
    for strength in (1.0, 0.5):
        moved = jax.tree.map(np.copy, text)
        moved["text_model"]["embeddings"]["token_embedding"]["embedding"][token] += strength * concept.learned["word"]
        edited = dataclasses.replace(tiny_pipeline, params=tiny_pipeline.params | {"text": (moved,)})
        expected = conditioning.condition(edited, prompts).states
        ours = conditioning.condition(tiny_pipeline, prompts, concept.at(strength)).states
        assert max_error(ours, expected) < 1e-5
    base = conditioning.condition(tiny_pipeline, ["a car"]).states
    np.testing.assert_array_equal(conditioning.condition(tiny_pipeline, ["a car"], concept).states, base)


def test_custom_diffusions_word_is_another_row_of_the_embedding(tiny_pipeline):
    """That of the identifier's last token, where the identifier stands and nowhere else."""
    concept = concept_of("custom_diffusion", tiny_pipeline)
    prompt = "a red sks teapot, a teapot"
    (ids,) = tiny_pipeline.tokenizer([prompt])
    at = find_word(tiny_pipeline.tokenizer, ids[None], "sks")[0]
    (encoder,) = tiny_pipeline.networks.text
    (params,) = tiny_pipeline.params["text"]
    table = params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    new = len(table)  # a row of its own: the identifier's tokens may be in other words
    moved = jax.tree.map(np.copy, params)
    moved["text_model"]["embeddings"]["token_embedding"]["embedding"] = np.concatenate(
        [table, table[ids[at]][None] + concept.learned["word"]]
    )
    changed = ids.copy()
    changed[at] = new
    larger = type(encoder)(dataclasses.replace(encoder.config, vocab_size=new + 1))
    expected = larger.apply({"params": moved}, jnp.asarray(changed[None]))["last_hidden_state"]
    ours = conditioning.condition(tiny_pipeline, ["a red teapot, a teapot"], concept).states
    assert max_error(ours, expected) < 1e-5


def test_check_tells_what_moved(tiny_pipeline):
    """Against the base model with the identifier too; and that the UNet is another one, where it is."""
    for method, moves in (("dreambooth", "nothing moved"), ("custom_diffusion", "moved by ")):
        (line,) = movement(tiny_pipeline, ["a teapot"], concept_of(method, tiny_pipeline))
        assert line.startswith(f"'a teapot': {moves}")
        assert line.endswith("; the UNet is another one")
    still = concept_of("custom_diffusion", tiny_pipeline).at(0.0)
    (line,) = movement(tiny_pipeline, ["a teapot"], still)
    assert line == "'a teapot': nothing moved"


@pytest.mark.parametrize("method", ["dreambooth", "custom_diffusion"])
def test_the_identifier_and_the_unet(tiny_pipeline, method):
    concept = concept_of(method, tiny_pipeline)
    learned = dict(concept.learned)
    if "word" in learned:
        learned["word"] = 0 * learned["word"]
    still = dataclasses.replace(concept, learned=learned)
    states = conditioning.condition(tiny_pipeline, ["a red Teapot, a teapot, a car"], still).states
    assert max_error(states, conditioning.condition(tiny_pipeline, ["a red sks Teapot, a teapot, a car"]).states) < 1e-5
    moved = flatten_dict(conditioning.with_unet(tiny_pipeline, concept.at(0.5)).params["unet"])
    change = flatten_dict(concept.learned["unet"])
    for path, base in flatten_dict(tiny_pipeline.params["unet"]).items():
        expected = np.asarray(base) + np.float32(0.5) * change.get(path, np.float32(0))
        np.testing.assert_allclose(moved[path], expected, atol=1e-6)
    assert conditioning.with_unet(tiny_pipeline, concept.at(0.0)) is tiny_pipeline


def test_the_prior(setting, tiny_pipeline):
    """The batch has the class's pictures beside the photos, without the identifier, and the loss their weighted sum."""
    step_config, data, frozen = setting("dreambooth")
    prior = data.prior
    assert (prior.photos[0], prior.mean.shape[2]) == (3, 1)
    request = sampler.SampleRequest.every(["a photo of a teapot"], range(3), SamplerConfig(2, 7.5, 4))
    ((latents, real),) = list(sampler.sample_latents(tiny_pipeline, request))
    np.testing.assert_allclose(prior.mean[0, :3, 0], latents[:real], atol=1e-5)
    for prompts, asked in ((prior.prompts, "a photo of a teapot"), (data.prompts, "a photo of a sks teapot")):
        (of_encoder,) = jax.tree.map(lambda x: jnp.asarray(x[0]), prompts)
        states = step_config.method.condition({}, (of_encoder,), frozen.text, step_config.networks).states
        assert max_error(states[0], conditioning.condition(tiny_pipeline, [asked]).states[0]) < 1e-5
    both = a_batch(step_config, data)
    size = step_config.batch_size
    assert both.latents.shape[1] == 2 * size
    np.testing.assert_array_equal(both.weight[0, :, 0, 0, 0], [1.0] * size + [0.5] * size)
    learned = step_config.init_state([0]).learned

    def loss(part: slice) -> float:
        share = jax.tree.map(lambda x: x[:, part], both)
        return float(ts.denoising_loss(learned, frozen, share.replace(weight=None), step_config)[0])

    own, of_class = loss(slice(None, size)), loss(slice(size, None))
    whole = float(ts.denoising_loss(learned, frozen, both, step_config)[0])
    assert whole == pytest.approx((own + 0.5 * of_class) / 2, rel=1e-4)
    plain, data, _ = setting("dreambooth", **{"prior.weight": 0.0})
    assert data.prior is None
    assert a_batch(plain, data).latents.shape[1] == size


def test_the_class_pictures_are_drawn_once(setting, tiny_pipeline, tmp_path, monkeypatch):
    """Unless their file was cut or is of other pictures."""
    step_config, data, _ = setting("dreambooth")
    config = config_of("dreambooth")
    photos = read_photos(config.data.dir, tiny_pipeline.networks.resolution)
    kept, drawn, sample = tmp_path / "class.npy", [], sampler.sample_latents
    monkeypatch.setattr(class_images, "sample_latents", lambda *asked: drawn.append(asked) or sample(*asked))

    def prepared():
        found = prepare(config, step_config.method, tiny_pipeline, photos, kept=kept)
        np.testing.assert_array_equal(found.prior.mean, data.prior.mean)
        return len(drawn)

    assert [prepared(), prepared()] == [1, 1]
    kept.write_bytes(kept.read_bytes()[:-1])
    assert [prepared(), prepared()] == [2, 2]
    np.save(kept, np.zeros((2, 2), np.float32))
    assert prepared() == 3


def test_the_background_in_the_loss(setting):
    mask = np.zeros((8, 8), bool)
    mask[:4, :3] = True
    photo = Photo("a", np.zeros((8, 8, 3), np.uint8), mask)
    ((own, mirrored),) = subject_weights([photo], (1, 2, 4, 4, 4), 0.25)
    share = np.array([[1, 0.5, 0, 0]] * 2 + [[0] * 4] * 2)
    expected = 0.25 + 0.75 * share
    np.testing.assert_allclose(own[..., 0], expected / expected.mean(), rtol=1e-6)
    np.testing.assert_array_equal(mirrored, own[:, ::-1])
    assert subject_weights([photo], (1, 2, 4, 4, 4), 1.0) is None
    bare = dataclasses.replace(photo, mask=None)
    with pytest.raises(UserError, match=r"background_weight=0\.5: photo a has no mask, or an empty one; give masks"):
        check_masks([bare], 0.5)
    check_masks([bare], 1.0)

    step_config, data, frozen = setting("catversion", **{"train.background_weight": 0.25})
    drawn = a_batch(step_config, data)
    learned = step_config.init_state([0]).learned
    context = step_config.method.condition(
        *jax.tree.map(lambda x: x[0], (learned, drawn.prompts)), frozen.text, step_config.networks
    )
    alpha = frozen.alphas_cumprod[drawn.timesteps[0]][:, None, None, None]
    noisy = jnp.sqrt(alpha) * drawn.latents[0] + jnp.sqrt(1 - alpha) * drawn.noise[0]
    prediction = step_config.networks.unet.apply({"params": frozen.unet}, noisy, drawn.timesteps[0], *context)
    weighted = np.asarray(drawn.weight[0]) * np.square(np.asarray(prediction) - np.asarray(drawn.noise[0]))
    assert float(ts.denoising_loss(learned, frozen, drawn, step_config)[0]) == pytest.approx(weighted.mean(), rel=1e-4)


@pytest.mark.parametrize("method", BASELINES)
def test_trained_stored_and_drawn(tiny_model, tiny_pipeline, tmp_path, method):
    config = config_of(method, tiny_model, tmp_path / "run")
    assert train_command.run_training(config) == 0
    concept = concept_file.load(tmp_path / "run")
    assert concept.method == config.make_method(tiny_pipeline.networks)
    assert any(x.any() for x in jax.tree.leaves(concept.learned))
    concept_file.save(tmp_path / "again.safetensors", concept)
    again = concept_file.load(tmp_path / "again.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.learned, concept.learned)
    assert again.metadata() == concept.metadata()
    if method == "textual_inversion":
        refused = error_of("export", f"--embedding={tmp_path / 'run'}", f"--out={tmp_path / 'out'}")
        assert "learned by textual_inversion; only catversion's can be exported" in refused
        with pytest.raises(
            UserError, match="learned by textual_inversion; the authors' format holds catversion's alone"
        ):
            official.write_adapter(tmp_path / "adapter.bin", concept, tmp_path)
    if method == "custom_diffusion":
        arguments = ["--prompt=a teapot", "--num=1", "--steps=1", f"--out={tmp_path}"]
        catversion("generate", f"--embedding={tmp_path / 'run'}", *arguments)
        assert len([*tmp_path.glob("a-teapot_*_0.png")]) == 1


def test_no_masks_no_run(tiny_model, tmp_path):
    """Refused before the folder is taken, so that the command can be given again, with masks."""
    changes = {"train.background_weight": 0.5, "data.masks_dir": ""}
    with pytest.raises(UserError, match="photo 00 has no mask"):
        train_command.run_training(config_of("catversion", tiny_model, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_batches(tiny_model, tiny_pipeline, tmp_path):
    """Words are learned side by side, each as alone; UNets are not."""
    lines = tmp_path / "list.jsonl"
    of_lines = ({"id": name, "dir": str(TEAPOT / name), "class_word": "teapot"} for name in ("train", "heldout"))
    lines.write_text("".join(json.dumps(line) + "\n" for line in of_lines))
    config = config_of("textual_inversion", tiny_model, tmp_path / "out", **{"batch.slots": 2})
    assert train_many(Share.of(config, lines), tiny_pipeline).failed == 0
    train_word, word = (concept_file.load(tmp_path / "out" / name).learned["word"] for name in ("train", "heldout"))
    changes = {"data.dir": str(TEAPOT / "heldout"), "data.masks_dir": ""}
    alone = train_once(config_of("textual_inversion", tiny_model, tmp_path / "alone", **changes), tiny_pipeline)
    np.testing.assert_allclose(word, alone.learned["word"], atol=1e-5)
    assert np.abs(word - train_word).max() > 1e-3
    refused = r"config\.method='dreambooth': changes the UNet, which the 8 concepts of a step share"
    with pytest.raises(UserError, match=refused):
        train_many(Share.of(config_of("dreambooth", tiny_model, tmp_path / "unets"), lines))
