"""ComfyUI's own classes: prompts as they read them, and the exported node on their CLIP."""

import dataclasses
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from catversion_jax.methods import concept_file
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.sampling import conditioning, export
from tests import tiny
from tests.commands import catversion
from tests.conftest import max_error
from tests.parity import comfyui

LONG = "a photo of a teapot on the beach, " * 12
PROMPTS = [
    "a photo of a teapot",
    "a (red:1.3) teapot",
    "a (red) ((teapot)) [on] the (beach:0.4)",
    "(a (red:1.5) teapot on (the beach)) in snow",
    r"a teapot \(red\), (blue \(dark\):1.2)",
    "a teapot) (red:1.3) (blue",
    "((a teapot)",
    "(:1.2) (teapot:) (red:1.2:1.4) (blue: -0.5)",
    "(a teapot:nothing) () (snow:1e-1)",
    "",
    LONG,
    f"{LONG} (red:1.3) {LONG}",
    "a (red:1.1) teapot, " * 25,
    "word " * 71 + "(on the beach in snow:1.2)",
    "word " * 75,
    "word " * 74 + "(teapot:0.9)",
    "(:1.5)" * 3,
    "a\nteapot (in\n\nsnow:1.3)",
    "(" * 30 + "teapot" + ")" * 29,
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def xl_model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("xl"), changes=tiny.XL_CHANGES)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_prompts(tiny_model, xl_model, kind):
    model = {"sd": tiny_model, "sdxl": xl_model}[kind]
    clip = {"sd": comfyui.sd_clip, "sdxl": comfyui.sdxl_clip}[kind](model)
    pipeline = tiny.load(model)
    for prompt in PROMPTS:
        states, pooled = comfyui.encode(clip, prompt)
        ours = conditioning.context(pipeline, [prompt])
        assert ours.states.shape == states.shape, prompt
        assert max_error(ours.states, states) < TOLERANCE * max(1, np.abs(states.numpy()).max()), prompt
        if kind == "sdxl":
            assert max_error(ours.pooled, pooled) < TOLERANCE, prompt


SHORT = ["a photo of a teapot on the beach", "a teapot and a red teapot", "a car", ""]


@pytest.fixture(scope="module")
def clip(tiny_model):
    return comfyui.sd_clip(tiny_model)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Export concepts, copy the export over a ComfyUI with its models in a folder, and import its node."""
    import folder_paths

    def run(*concepts):
        given = []
        for i, concept in enumerate(concepts):
            (tmp_path / str(i)).mkdir()
            tiny.save_run(tmp_path / str(i) / concept_file.FILE_NAME, concept)
            given.append(f"--embedding={tmp_path / str(i)}")
        catversion("export", *given, "--out", tmp_path / "out")
        home = tmp_path / "out" / "ComfyUI"
        monkeypatch.setattr(folder_paths, "models_dir", str(home / "models"))
        monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths})
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        package = home / "custom_nodes" / "catversion"
        spec = importlib.util.spec_from_file_location(
            "comfyui_catversion", package / "__init__.py", submodule_search_locations=[str(package)]
        )
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "comfyui_catversion", module)
        spec.loader.exec_module(module)
        return module.NODE_CLASS_MAPPINGS["ApplyCatVersion"]

    yield run
    for name in [name for name in sys.modules if name.startswith("comfyui_catversion")]:
        sys.modules.pop(name)


def random_concept(pipeline, word: str = "teapot", scope: str = "trigger", seed: int = 0):
    prefix = np.random.default_rng(seed).normal(size=(4, 3, 2, 2, 16)).astype(np.float32)
    concept = tiny.concept(prefix, pipeline.fingerprint, "", logit_bias=1.0, scope=scope)
    return dataclasses.replace(concept, class_word=word)


def apply(node, clip, name, strength=1.0):
    return getattr(node(), node.FUNCTION)(clip, name, strength)[0]


def ours(pipeline, prompt, concept=None, strength=1.0):
    return conditioning.context(pipeline, [prompt], concept.at(strength) if concept else None).states


def test_the_node(tiny_pipeline, clip, install):
    """The clone has the concept, the CLIP that it came from has not, in any order; weights and long prompts too."""
    concept = random_concept(tiny_pipeline)
    node = install(concept)
    inputs = node.INPUT_TYPES()["required"]
    assert inputs["concept"] == (["teapot.safetensors"],)
    assert inputs["strength"][1] == {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}
    assert node.IS_CHANGED(clip=None, concept="teapot.safetensors", strength=1.0) > 0
    base = {prompt: comfyui.encode(clip, prompt)[0] for prompt in SHORT}
    clones = {strength: apply(node, clip, "teapot.safetensors", strength) for strength in (1.0, 0.05, 1.5, 0.0)}
    for prompt in SHORT:
        for strength, clone in clones.items():
            states, _ = comfyui.encode(clone, prompt)
            assert max_error(states, ours(tiny_pipeline, prompt, concept, strength)) < TOLERANCE
            assert torch.equal(comfyui.encode(clip, prompt)[0], base[prompt])
    for prompt in PROMPTS:
        states, _ = comfyui.encode(clones[1.0], prompt)
        expected = ours(tiny_pipeline, prompt, concept)
        assert max_error(states, expected) < TOLERANCE * max(1, np.abs(expected).max()), prompt
    assert torch.equal(comfyui.encode(clones[1.0], "a car")[0], base["a car"])


def test_scope_all(tiny_pipeline, clip, install):
    """An empty prompt, as a negative one often is, sees nothing."""
    concept = random_concept(tiny_pipeline, scope="all")
    clone = apply(install(concept), clip, "teapot.safetensors")
    for prompt in ["a car", LONG]:
        assert max_error(comfyui.encode(clone, prompt)[0], ours(tiny_pipeline, prompt, concept)) < TOLERANCE
    assert torch.equal(comfyui.encode(clone, "")[0], comfyui.encode(clip, "")[0])


def test_a_word_between_two_chunks(tiny_pipeline, clip, install):
    """As in our own prompts: found where it ends, and not in the rest of another word."""
    bear, dog = random_concept(tiny_pipeline, "teddy bear"), random_concept(tiny_pipeline, "dog", seed=1)
    node = install(bear, dog)
    hotdog = len(tiny_pipeline.tokenizer.word("hotdog"))
    for concept, prompt in ((bear, "photo " * 74 + "teddy bear"), (dog, "photo " * (76 - hotdog) + "hotdog")):
        clone = apply(node, clip, f"{concept.class_word.replace(' ', '-')}.safetensors")
        states, _ = comfyui.encode(clone, prompt)
        assert max_error(states, ours(tiny_pipeline, prompt, concept)) < TOLERANCE
        moved = max_error(states, comfyui.encode(clip, prompt)[0])
        assert (moved > 0.01) == (concept is bear)


def test_several_on_one_clip(tiny_pipeline, clip, install):
    """One node after the other, in any order; concepts of one class word have names of their own."""
    one, two = random_concept(tiny_pipeline), random_concept(tiny_pipeline, seed=1)
    node = install(one, two, random_concept(tiny_pipeline, "car", seed=2))
    files = node.INPUT_TYPES()["required"]["concept"][0]
    assert files == sorted(["car.safetensors", *(f"teapot-{concept.digest[:8]}.safetensors" for concept in (one, two))])
    teapot = f"teapot-{one.digest[:8]}.safetensors"
    both = apply(node, apply(node, clip, teapot, 0.5), "car.safetensors")
    turned = apply(node, apply(node, clip, "car.safetensors"), teapot, 0.5)
    prompt = "a photo of a teapot"
    assert max_error(comfyui.encode(both, prompt)[0], ours(tiny_pipeline, prompt, one, 0.5)) < TOLERANCE
    states = comfyui.encode(both, "a car and a teapot")[0]
    assert max_error(states, comfyui.encode(turned, "a car and a teapot")[0]) < TOLERANCE
    assert max_error(states, comfyui.encode(clip, "a car and a teapot")[0]) > 0.01


def test_a_copy_of_the_model(tiny_pipeline, clip, install, tmp_path):
    """A patcher that is loaded into another model acts with that one's weights."""
    concept = random_concept(tiny_pipeline)
    clone = apply(install(concept), clip, "teapot.safetensors")
    folder = tiny.write(tmp_path / "other", seed=1)
    other = comfyui.sd_clip(folder)
    moved = clone.clone()
    moved.cond_stage_model = other.cond_stage_model
    moved.patcher = clone.patcher.clone(model_override=other.patcher.get_clone_model_override())
    expected = ours(tiny.load(folder), SHORT[0], concept)
    assert max_error(comfyui.encode(moved, SHORT[0])[0], expected) < TOLERANCE
    assert max_error(comfyui.encode(clone, SHORT[0])[0], ours(tiny_pipeline, SHORT[0], concept)) < TOLERANCE


def test_sdxl_and_others(tiny_pipeline, clip, xl_model, install):
    """Both text encoders of SDXL; a concept of another model, and SD3's CLIP, are refused."""
    pipeline, rng = tiny.load(xl_model), np.random.default_rng(0)
    sizes = zip(("prefix", "prefix_2"), pipeline.networks.heads, strict=True)
    learned = {name: rng.normal(size=(2, 2, 2, *heads)).astype(np.float32) for name, heads in sizes}
    method = CatVersion(layers=((1, 2), (0, 2)), scope="trigger")
    concept = concept_file.Concept(learned, method, "dog", (), pipeline.fingerprint, "", 1, 0.01, 0)
    node, xl = install(concept, random_concept(tiny_pipeline)), comfyui.sdxl_clip(xl_model)
    states, pooled = comfyui.encode(apply(node, xl, "dog.safetensors"), "a photo of a dog")
    expected = conditioning.context(pipeline, ["a photo of a dog"], concept)
    assert max_error(states, expected.states) < TOLERANCE
    assert max_error(pooled, expected.pooled) < TOLERANCE
    with pytest.raises(ValueError, match=r"for 2 text encoder\(s\) .* this CLIP has clip_l; use the base model"):
        apply(node, clip, "dog.safetensors")
    with pytest.raises(ValueError, match=r"for 1 text encoder\(s\) .* this CLIP has clip_l, clip_g"):
        apply(node, xl, "teapot.safetensors")
    xl.cond_stage_model.t5xxl = None  # as in Stable Diffusion 3 without its third encoder
    with pytest.raises(ValueError, match="clip_l, clip_g, t5xxl; use the base model"):
        apply(node, xl, "dog.safetensors")


def test_an_embedding_beside(tiny_model, tiny_pipeline, install, tmp_path):
    """ComfyUI's own textual inversion, in a prompt with the class word behind it."""
    (tmp_path / "embeddings").mkdir()
    torch.save({"string_to_param": {"*": torch.ones(2, 32)}}, tmp_path / "embeddings" / "thing.pt")
    clip = comfyui.sd_clip(tiny_model, tmp_path / "embeddings")
    clone = apply(install(random_concept(tiny_pipeline)), clip, "teapot.safetensors")
    prompt = "embedding:thing and a teapot"
    before, after = (comfyui.encode(each, prompt)[0][0] for each in (clip, clone))
    moved = ((before - after).abs().amax(-1) > TOLERANCE).nonzero()[0].item()
    assert moved == 1 + 2 + len(tiny_pipeline.tokenizer.word("and a teapot")) - 1


LINKED = ("CLIP", "CONDITIONING", "IMAGE", "LATENT", "MODEL", "VAE")


def test_the_example_workflow():
    """Its nodes are ComfyUI's and ours, its links join what they say, and its widgets are as many as the inputs."""
    import nodes

    workflow = json.loads((export.FOLDER / "comfyui_workflow.json").read_text())
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        if node["type"] == "ApplyCatVersion":
            wanted, widgets = ["clip"], 2
        else:
            required = nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"]
            kinds = {name: kind for name, (kind, *_) in required.items()}
            wanted = [name for name, kind in kinds.items() if kind in LINKED]
            widgets = len(required) - len(wanted)
        assert [given["name"] for given in node.get("inputs", [])] == wanted, node["type"]
        # KSampler's seed has a second widget, what becomes of it after each run.
        assert len(node["widgets_values"]) == widgets + (node["type"] == "KSampler"), node["type"]
    for number, source, out, target, into, kind in workflow["links"]:
        assert by_id[source]["outputs"][out]["type"] == by_id[target]["inputs"][into]["type"] == kind
        assert by_id[target]["inputs"][into]["link"] == number
        assert number in by_id[source]["outputs"][out]["links"]
