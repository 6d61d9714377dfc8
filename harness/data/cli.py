"""`python -m harness data write` and `data check`."""

from pathlib import Path
from typing import Annotated, Any

import typer

# The kinds of `harness.data.sources`, which is not imported before a command runs.
SOURCE_KINDS = ("digits", "imagefolder:DIR", "parquet:GLOB", "tar:GLOB", "cifar10:DIR", "cifar100:DIR")

app = typer.Typer(no_args_is_help=True, help="Write and check data sets.")


@app.command()
def write(  # noqa: PLR0917 - a command line's options
    source: Annotated[str, typer.Option(help=f"Where the images come from: {', '.join(SOURCE_KINDS)}.")],
    out: Annotated[Path, typer.Option(help="Folder of the data set.")],
    max_size: Annotated[int | None, typer.Option(min=0, help="Longest side in pixels; 0: as it is.")] = None,
    jpeg_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of JPEG; the rest is raw pixels.")
    ] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="JPEG quality.")] = None,
    page_mib: Annotated[int | None, typer.Option(min=2, max=2048, help="FFCV's page; no image may be larger.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides which images become JPEG.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Writing processes; default one per core.")] = None,
    limit_s: Annotated[float, typer.Option(help="Give up after so many seconds without progress.")] = 600.0,
    val_labels: Annotated[Path | None, typer.Option(help="Labels of ImageNet's flat val folder.")] = None,
    synsets: Annotated[Path | None, typer.Option(help="meta.mat of ImageNet's devkit.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on images or classes with problems.")] = False,
) -> None:
    """Write the train and val files of a source, with a manifest beside each; a broken-off run goes on."""
    import dataclasses

    from harness.data.progress import Reporter
    from harness.data.sources import parse_source
    from harness.data.writer import REPORT, default_settings, write
    from harness.errors import UserError

    found = parse_source(source, val_labels=val_labels, synsets=synsets)
    given: dict[str, Any] = {"max_size": max_size, "jpeg_share": jpeg_share, "quality": quality, "seed": seed}
    if page_mib is not None:
        if page_mib & (page_mib - 1):
            raise UserError(f"--page-mib {page_mib}: FFCV's pages are powers of two (2, 4, 8, 16, ...)")
        given["page_bytes"] = page_mib << 20
    changes = {name: value for name, value in given.items() if value is not None}
    settings = dataclasses.replace(default_settings(found), **changes)
    with Reporter("images") as reporter:
        report = write(found, out, settings, workers=workers, strict=strict, limit_s=limit_s, progress=reporter.update)
    for split, count in report.written.items():
        typer.echo(f"{split}: {count} images in {out / f'{split}.beton'}")
    for change, count in sorted(report.changes.items()):
        typer.echo(f"made RGB and upright ({change}): {count}")
    for problem in report.problems[:10]:
        typer.echo(f"problem: {problem}")
    if len(report.problems) > 10:
        typer.echo(f"and {len(report.problems) - 10} problems more: see {out / REPORT}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the data set.")],
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image as well.")] = False,
) -> None:
    """Compare a data set's files with their manifests: fields, counts, sizes, checksums."""
    from harness.data.check import check
    from harness.data.manifest import data_checksum
    from harness.data.progress import Reporter

    with Reporter("images") as reporter:
        checked = check(folder, deep=deep, progress=reporter.update)
    for each in checked:
        decoded = f", {each.decoded} decoded" if deep else ""
        typer.echo(f"{each.manifest.split}: {each.manifest.num_samples} images, ok{decoded}")
    typer.echo(f"checksum {data_checksum(folder)}")
