"""Public benchmarks: their subjects and prompts, and where their photos are."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.files import MIB, read_text
from catversion_jax.utils.paths import AnyPath, expand
from catversion_jax.utils.records import read_record

IMAGES_PER_PROMPT = 4
MOST_BYTES = MIB
"""The largest file of prompts; the published ones take kilobytes."""


@dataclass(frozen=True)
class Subject:
    """A concept of a benchmark, and the prompts that it is evaluated with."""

    name: str
    class_word: str
    photos: AnyPath
    prompts: tuple[str, ...]


LIVE_CLASSES = {"cat", "dog"}
"""Classes that DreamBench evaluates with its prompts for live subjects; all others get those for objects."""

CLASSES = {
    "backpack": "backpack",
    "backpack_dog": "backpack",
    "bear_plushie": "stuffed animal",
    "berry_bowl": "bowl",
    "can": "can",
    "candle": "candle",
    "cat": "cat",
    "cat2": "cat",
    "clock": "clock",
    "colorful_sneaker": "sneaker",
    "dog": "dog",
    "dog2": "dog",
    "dog3": "dog",
    "dog5": "dog",
    "dog6": "dog",
    "dog7": "dog",
    "dog8": "dog",
    "duck_toy": "toy",
    "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal",
    "monster_toy": "toy",
    "pink_sunglasses": "glasses",
    "poop_emoji": "toy",
    "rc_car": "toy",
    "red_cartoon": "cartoon",
    "robot_toy": "toy",
    "shiny_sneaker": "sneaker",
    "teapot": "teapot",
    "vase": "vase",
    "wolf_plushie": "stuffed animal",
}
PLACES = (
    "a {} in the jungle",
    "a {} in the snow",
    "a {} on the beach",
    "a {} on a cobblestone street",
    "a {} on top of pink fabric",
    "a {} on top of a wooden floor",
    "a {} with a city in the background",
    "a {} with a mountain in the background",
    "a {} with a blue house in the background",
    "a {} on top of a purple rug in a forest",
)
PROPERTIES = ("a red {}", "a purple {}", "a shiny {}", "a wet {}", "a cube shaped {}")
OBJECT_PROMPTS = (
    *PLACES,
    "a {} with a wheat field in the background",
    "a {} with a tree and autumn leaves in the background",
    "a {} with the Eiffel Tower in the background",
    "a {} floating on top of water",
    "a {} floating in an ocean of milk",
    "a {} on top of green grass with sunflowers around it",
    "a {} on top of a mirror",
    "a {} on top of the sidewalk in a crowded street",
    "a {} on top of a dirt road",
    "a {} on top of a white rug",
    *PROPERTIES,
)
LIVE_PROMPTS = (
    *PLACES,
    "a {} wearing a red hat",
    "a {} wearing a santa hat",
    "a {} wearing a rainbow scarf",
    "a {} wearing a black top hat and a monocle",
    "a {} in a chef outfit",
    "a {} in a firefighter outfit",
    "a {} in a police outfit",
    "a {} wearing pink glasses",
    "a {} wearing a yellow shirt",
    "a {} in a purple wizard outfit",
    *PROPERTIES,
)
"""DreamBench's subjects and prompts (Ruiz et al. 2023, https://github.com/google/dreambooth), without the rare token
that its own prompts have before the class."""


def dreambench(folder: AnyPath) -> list[Subject]:
    """Returns the subjects of `<subject>/*.jpg`, by prompts_and_classes.txt if the folder has it."""
    path = folder / "prompts_and_classes.txt"
    classes, objects, live = read_dreambench(path) if path.is_file() else (CLASSES, OBJECT_PROMPTS, LIVE_PROMPTS)
    return [
        Subject(name, word, folder / name, filled(live if word in LIVE_CLASSES else objects, word))
        for name, word in classes.items()
    ]


def read_dreambench(path: AnyPath) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """Reads subject -> class, the prompts for objects and those for live subjects from DreamBench's own file."""
    expected = "expected DreamBench's table of classes and two lists of prompts; download it again"
    content = "\n".join(read_text(path, MOST_BYTES, expected).splitlines()) + "\n"
    table = re.search(r"subject_name,class\n((?:[^,\n]+,[^,\n]+\n)+)", content)
    lists = re.findall(r"prompt_list = \[([^\[\]]*)\]", content)  # without brackets inside, so that no text takes long
    found = [tuple(p.replace("{0} {1}", "{}") for p in re.findall(r"'([^'\n]*)'\.format", part)) for part in lists]
    if not table or len(found) != 2 or not all(found):
        raise UserError(f"{path}: {expected}")
    objects, live = found
    classes = [line.split(",") for line in table[1].splitlines()]
    return {subject: word for subject, word in classes}, objects, live


@dataclass(frozen=True)
class Entry:
    """What we read of a subject in CustomConcept101's dataset.json."""

    instance_data_dir: str
    class_prompt: str
    prompt_filename: str


def customconcept101(folder: AnyPath) -> list[Subject]:
    """Returns the subjects of `dataset.json`, `prompts/*.txt` and `benchmark_dataset/<subject>/`, as published."""
    path = folder / "dataset.json"
    entries = read_record(path, list[Entry], "expected CustomConcept101's dataset.json, beside prompts/ and its photos")
    subjects = []
    for entry in entries:
        photos, word = folder / expand(entry.instance_data_dir), entry.class_prompt
        expected = f"expected the prompts of {photos.name}, which {path} names"
        prompts = read_text(folder / expand(entry.prompt_filename), MOST_BYTES, expected).splitlines()
        subjects.append(Subject(photos.name, word, photos, filled(filter(str.strip, prompts), word)))
        if not subjects[-1].prompts or not word.strip():
            raise UserError(f"{path}: {photos.name}: no prompts or no class_prompt; download the benchmark again")
    return subjects


def filled(templates, class_word: str) -> tuple[str, ...]:
    return tuple(template.strip().replace("{}", class_word) for template in templates)


BENCHMARKS: dict[str, Callable[[AnyPath], list[Subject]]] = {
    "dreambench": dreambench,
    "customconcept101": customconcept101,
}


def read_subjects(benchmark: str, folder: AnyPath, names: list[str]) -> list[Subject]:
    """Returns all subjects of a benchmark's public folder, or those in `names`. Raises UserError if one is missing."""
    subjects = BENCHMARKS[benchmark](folder)
    known = {subject.name: subject for subject in subjects}
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"subject {unknown[0]}: not of {benchmark}; expected one of {listed(known, 40)}")
    chosen = [known[name] for name in names] or subjects
    if missing := [subject.name for subject in chosen if not subject.photos.is_dir()]:
        raise UserError(f"{folder}: no photos of {listed(missing)}; download them, or choose other subjects")
    if not chosen:
        raise UserError(f"{folder}: no subjects; expected those of {benchmark}; download it again")
    return chosen


def manifest(subjects: list[Subject]) -> str:
    """Returns the subjects as a manifest for `catversion batch`."""
    lines = [{"id": s.name, "dir": str(s.photos.absolute()), "class_word": s.class_word} for s in subjects]
    return "".join(json.dumps(line) + "\n" for line in lines)
