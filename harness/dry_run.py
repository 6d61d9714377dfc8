"""Two steps of every stage of a recipe on made-up images: shows within a minute that a recipe is alive."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.config import Recipe, TrialSpec
from harness.context import Data
from harness.identity import trial_key, trial_label
from harness.stages import run

_STEPS = 2
_IMAGES_PER_PART = 2
_CHECKSUM = "made up"


def dry_run(recipe: Recipe, init: Path | None = None) -> dict[str, Any]:
    """Run the recipe's real network at its real image size, two small steps a stage; the result (worth nothing).

    `init`: weights that take the place of the pretraining, as in a real run. Raises `UserError` if they do not fit.
    """
    small = shortened(recipe)
    with tempfile.TemporaryDirectory(prefix="sbs-dry-run-") as folder:
        spec = TrialSpec(
            recipe=small,
            key=trial_key(small, _CHECKSUM),
            label=trial_label(small),
            run_dir=str(Path(folder) / "run"),
            init=None if init is None else str(init.absolute()),
        )
        return run(spec, data=Data(open=_MadeUp, checksum=lambda _: _CHECKSUM, made_up=True))


def shortened(recipe: Recipe) -> Recipe:
    """The recipe in one process, with one epoch a stage and the smallest batches that its accumulation allows."""
    stages = {"pretrain": recipe.pretrain, "search": recipe.search, "finetune": recipe.finetune}
    gpus = recipe.run.gpus_per_worker if torch.cuda.is_available() else 0.0
    compiled = recipe.run.compile and gpus > 0  # on a CPU it would take minutes
    images = max(stage.accumulate for stage in stages.values()) * _IMAGES_PER_PART
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"batch_size": images, "eval_batch_size": images}),
            "run": recipe.run.model_copy(update={"workers": 1, "gpus_per_worker": gpus, "compile": compiled}),
        }
        | {
            name: stage.model_copy(update={"epochs": min(1, stage.epochs), "warmup_epochs": 0.0})
            for name, stage in stages.items()
        }
    )


class _MadeUp:
    """A loader of two batches of noise, like `harness.data.Loader`."""

    stack, order, memory, waited_s = "made-up images", "made up", "made up", 0.0

    def __init__(self, data: Any, split: str, *, batch_size: int, device: torch.device, **_: Any) -> None:
        self._size = data.image_size if split == "train" else data.eval_image_size or data.image_size
        self._batch_size, self._device = batch_size, device
        self.num_classes: int | None = None
        self.num_samples = _STEPS * batch_size

    def __len__(self) -> int:
        return _STEPS

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Noise with labels 0 and 1."""
        for batch in range(skip, _STEPS):
            generator = torch.Generator().manual_seed(_STEPS * epoch + batch)
            images = torch.randn(self._batch_size, 3, self._size, self._size, generator=generator)
            labels = torch.arange(self._batch_size) % 2
            yield images.to(self._device, memory_format=torch.channels_last), labels.to(self._device)

    def indices(self, epoch: int, batch: int) -> Sequence[int]:  # noqa: ARG002 - what a loader is
        """The images of a batch."""
        return range(batch * self._batch_size, (batch + 1) * self._batch_size)

    def close(self) -> None:
        """Nothing is open."""
