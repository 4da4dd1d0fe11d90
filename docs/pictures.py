"""Draws docs/pictures.png and docs/pictures_2.png, one row a feature, from `make demo`'s run and two others:

PHOTOS=catversion_jax/concepts
catversion train --config=mini:textual_inversion --config.run_dir=runs/embedding --config.concept.class_word=teapot \
    --config.data.dir=$PHOTOS/teapot/train --config.data.masks_dir=$PHOTOS/teapot/train_masks
catversion train --config=mini:custom_diffusion --config.run_dir=runs/tuned --config.concept.class_word=robot \
    --config.data.dir=$PHOTOS/robot/train --config.data.masks_dir=$PHOTOS/robot/train_masks
python docs/pictures.py

The second is made a LoRA of rank 8, the first an embedding as kohya saves one, so that they come in as other programs'.
"""

import re
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

import catversion_jax as cv
from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.sampling.sampler import SampleRequest
from catversion_jax.utils.image_grid import grid

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs"
PROMPT = "a photo of a teapot on the beach"
BOX = (6, 4, 60, 60)
RANK = 8


def draw(path: str, rows: dict[str, list[Image.Image]]) -> None:
    images = [[np.asarray(image) for image in row] for row in rows.values()]
    grid(images, list(rows)).save(ROOT / "docs" / path)


def from_pictures(pipe: cv.Pipeline, teapot: cv.Concept) -> dict[str, list[Image.Image]]:
    (wide,) = pipe(PROMPT, concepts=teapot, width=104, height=64, seed=1)
    (dog,) = pipe("a photo of a dog on the beach", seed=1)
    mask = Image.new("L", dog.size)
    mask.paste(255, BOX)
    anew = [pipe(PROMPT, concepts=teapot, image=dog, denoise=share)[0] for share in (0.3, 0.6)]
    inside = [pipe(PROMPT, concepts=teapot, image=dog, mask=mask, denoise=1.0, seed=seed)[0] for seed in (0, 1)]
    return {
        "width=104": [wide],
        "image=..., denoise=0.3 and 0.6": [dog, *anew],
        "image=..., mask=...": [dog, mask.convert("RGB"), *inside],
    }


def embedding(pipe: cv.Pipeline) -> cv.Concept:
    """The learned word as kohya's file of one vector."""
    learned = cv.Concept.load(RUNS / "embedding")
    table = pipe.base.params["text"][0]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    last = pipe.base.tokenizer.word(learned.class_word)[-1]
    save_file({"emb_params": np.asarray(table[last] + learned.learned["word"])[None]}, RUNS / "mine.safetensors")
    return cv.Concept.load(RUNS / "mine.safetensors")


def lora(pipe: cv.Pipeline) -> Path:
    """What Custom Diffusion changed in the UNet's attention to the text, as a LoRA by diffusers' names."""
    tuned = cv.Concept.load(RUNS / "tuned")
    before, after = pipe.base.params["unet"], tuned.method.unet(tuned.learned, pipe.base.params["unet"])
    before, after = (flatten_dict(params, sep="/") for params in (before, after))
    tensors = {}
    for path, kernel in before.items():
        if match := re.fullmatch(r"(.*/attn2/to_[kv])/kernel", path):
            up, size, down = np.linalg.svd((np.asarray(after[path]) - np.asarray(kernel)).T, full_matrices=False)
            name = "unet." + re.sub(r"_(\d+)(?=/)", r".\1", match[1]).replace("/", ".")
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(down[:RANK])
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(up[:, :RANK] * size[:RANK])
    save_file(tensors, RUNS / "style.safetensors")
    return RUNS / "style.safetensors"


def others(pipe: cv.Pipeline, teapot: cv.Concept) -> dict[str, list[Image.Image]]:
    blue = "a photo of a (blue:{}) teapot in the snow"
    robot, mine, style = "a photo of a robot on the beach", embedding(pipe), lora(pipe)
    each = [[teapot.at(0.3)], [teapot.at(1.0)], [mine], []]
    prompts = ("a photo of a teapot at night",) * 2 + ("a photo of a mine at night", "a photo of a dog at night")
    together = dict(pipe.sample_each(SampleRequest(prompts, (1,) * 4, SamplerConfig(batch_size=4)), each))
    return {
        "(blue:w) for w = 0, 0.5, 1, 1.5": [pipe(blue.format(w), concepts=teapot, seed=2)[0] for w in (0, 0.5, 1, 1.5)],
        "the prompt 14 times: 126 tokens": pipe(" ".join([PROMPT] * 14), concepts=teapot, num=3),
        "8 steps of heun, dpmpp_sde, unipc": [
            pipe(PROMPT, concepts=teapot, seed=1, steps=8, scheduler=name)[0] for name in ("heun", "dpmpp_sde", "unipc")
        ],
        "--jobs: one batch": [Image.fromarray(together[i]) for i in range(4)],
        "an embedding of kohya": pipe("a photo of a mine on the beach", concepts=mine, num=3),
        "--lora: 0, 0.5, 1, and with the teapot": [
            *(pipe.with_lora(style, scale)(robot, seed=1)[0] for scale in (0.0, 0.5, 1.0)),
            *pipe.with_lora(style)(PROMPT, concepts=teapot, seed=1),
        ],
    }


def main() -> None:
    pipe, teapot = cv.Pipeline.from_pretrained(), cv.Concept.load(RUNS / "demo")
    draw("pictures.png", from_pictures(pipe, teapot))
    draw("pictures_2.png", others(pipe, teapot))


if __name__ == "__main__":
    main()
