"""A trial that takes seconds: 96 + 40 images of 16x16 pixels in 8 classes, ResNet-20, all stages.

A search has 6 steps an epoch, and no gate moves before 16 of them: shorter ones are for tests that are not about gates.
"""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.config import Recipe, TrialSpec, apply_override, parse_recipe
from harness.data import data_checksum
from harness.data.sources.imagefolder import ImageFolder
from harness.data.writer import write
from harness.identity import trial_key, trial_label

CLASSES = 8
RECIPE = """
[model]
name = "resnet20"
num_classes = 8
[data]
image_size = 16
batch_size = 16
eval_batch_size = 12
augment = "translate"
pad = 2
[pretrain]
epochs = 2
lr = 0.05
warmup_epochs = 0.5
[search]
lambda = 0.05
epochs = 4
lr = 0.02
[finetune]
epochs = 2
lr = 0.02
ema_decay = 0.5
[run]
checkpoint_every_steps = 2
"""


def write_data(folder: Path) -> Path:
    """A data set (FFCV files) of stripes whose slope and colour tell the class, under noise; its folder."""
    images = folder / "images"
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :16]
    for split, per_class in (("train", 12), ("val", 5)):
        for label in range(CLASSES):
            place = images / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(per_class):
                wave = np.sin((rows * np.cos(label) + columns * np.sin(label)) * (0.5 + label / 8))
                image = (
                    120 + 60 * wave[..., None] * [1, (label % 3) / 2, (label % 2)] + random.normal(0, 25, (16, 16, 3))
                )
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")
    write(ImageFolder(images, small=True), folder / "data")
    return folder / "data"


def recipe(data: Path, *overrides: str) -> Recipe:
    """The recipe on the data that `write_data` left."""
    tree: dict[str, Any] = tomllib.loads(RECIPE)
    tree["data"] |= {"source": f"imagefolder:{data.parent / 'images'}", "dir": str(data)}
    for override in overrides:
        apply_override(tree, override)
    return parse_recipe(tree, "tiny recipe")


def recipe_file(data: Path, run_section: str = "") -> Path:
    """The recipe as a TOML file beside the data, with more lines for its [run] section."""
    dataset = f'[data]\nsource = "imagefolder:{data.parent}/images"\ndir = "{data}"\n'
    path = data.parent / "tiny.toml"
    path.write_text(RECIPE.replace("[data]\n", dataset).replace("[run]\n", f"[run]\n{run_section}"))
    return path


def spec(data: Path, run_dir: Path, *overrides: str) -> TrialSpec:
    """The trial of `recipe` in a folder of its own."""
    made = recipe(data, *overrides)
    return TrialSpec(
        recipe=made, key=trial_key(made, data_checksum(data)), label=trial_label(made), run_dir=str(run_dir)
    )
