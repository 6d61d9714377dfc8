"""`python -m harness`: train one recipe, evaluate what was saved, write data, count costs, look at the machine."""

from pathlib import Path
from typing import Annotated

import typer

from harness.data.cli import app as data_app
from harness.doctor import doctor
from harness.errors import run_cli
from harness.tracking.cli import sync, ui

app = typer.Typer(
    name="python -m harness", help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
app.command()(doctor)
app.command()(ui)
app.command()(sync)
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[str, typer.Argument(help="A named recipe, or the path of a TOML file.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override, e.g. --set search.lambda=0.3; repeatable.")]

DRY_RUN_HELP = "Two steps a stage on made-up images, no data, in this process; --run-dir and --ray have no effect."


@app.command()
def train(
    recipe: RecipeArgument,
    *,
    overrides: SetOption = [],  # noqa: B006 - typer copies it
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/LABEL-KEY).")] = None,
    init: Annotated[Path | None, typer.Option(help="Weights to search from in place of the pretraining.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Use Ray Train with run.workers ranks.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
) -> None:
    """Train one trial: pretrain, search, compress, finetune, report. Run again, it goes on where it stopped.

    Alone it runs in this process; under torchrun on its ranks; with --ray on a Ray cluster (a local one if none runs).
    """
    from harness.train_cli import train as work

    work(recipe, overrides, run_dir, init=init, ray=ray, dry_run=dry_run)


@app.command(name="eval")
def evaluate(
    target: Annotated[Path, typer.Argument(help="A run directory, a file of one, or an exported network.")],
    data: Annotated[Path | None, typer.Option(help="Another prepared data set.")] = None,
    policy: Annotated[Path | None, typer.Option(help="The policy of a plain compressed state dict.")] = None,
    recipe: Annotated[str | None, typer.Option(help="The recipe, where no config.json lies above TARGET.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Top-1, top-5, loss and cost of anything saved: run, stage, checkpoint, weights, export. Also under torchrun."""
    from harness.eval_cli import evaluate_saved as work

    work(target, data, policy, recipe, as_json=as_json)


@app.command()
def cost(
    *,
    model: Annotated[str, typer.Option(help="A model of the zoo, e.g. resnet18.")],
    policy: Annotated[Path | None, typer.Option(help="A policy.json; without it full precision, 32/32 bits.")] = None,
    convention: Annotated[str, typer.Option(help="mac_product or uniq.")] = "mac_product",
    classes: Annotated[int | None, typer.Option(help="Outputs (default: 1000, or 100 for the CIFAR models).")] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels (default: 224, or 32 for the CIFAR models).")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say how the figures come about.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count MACs, bit-operations, parameters and bytes of a network, layer by layer and in all."""
    from harness.cost_cli import cost as work

    work(model, policy, convention=convention, classes=classes, image_size=image_size, explain=explain, as_json=as_json)


if __name__ == "__main__":
    run_cli(app)
