"""`kdcache verify`."""

from pathlib import Path

import click

import kdcache

from .console import ConsoleProgress, emit, format_bytes
from .options import PATH, OneOrSeveral, device_option, json_option, teacher_arch_option

EPILOG = """\b
Examples:
  kdcache verify runs/cache
  kdcache verify runs/cache --json
  kdcache verify runs/cache --replay 64 --teacher teacher.safetensors
"""


@click.command(epilog=EPILOG)
@click.argument("cache", type=PATH)
@click.option("--replay", "num_records", type=click.IntRange(min=1), metavar="N",
              help="Also make N views again and compare their labels with the teacher's answers; needs --teacher.")  # fmt: skip
@click.option(
    "--teacher", type=OneOrSeveral(), multiple=True, help="The teacher, or all that the cache's labels are averaged from, for --replay."
)
@click.option("--data", help="Dataset spec for --replay, if the cached set lies elsewhere now.")
@teacher_arch_option
@device_option
@json_option
@click.pass_context
def verify(
    context: click.Context, cache: Path, num_records: int | None, teacher: tuple[str, ...], data: str | None, arch: tuple[str, ...],
    device: str, as_json: bool,
) -> None:  # fmt: skip
    """Compare every byte of a cache with its manifest. Exits 3 and names each bad file and its block if any differs.

    With --replay, also run the teacher on some views again: the error of the stored labels is shown beside what encoding them costs
    and beside the teacher's own noise, and any that do not belong to their views end in exit 3 too.
    """
    if (num_records is None) == bool(teacher):
        raise kdcache.ConfigError("--replay and --teacher go together: kdcache verify CACHE --replay 64 --teacher FILE")
    if num_records is None and (data or arch):
        raise kdcache.ConfigError("--data and --arch are for --replay: kdcache verify CACHE --replay 64 --teacher FILE --data SPEC")
    result = kdcache.verify(cache, progress=ConsoleProgress())
    replayed = None
    if num_records is not None and not result.problems:
        replayed = kdcache.replay(
            cache, teacher, num_records=num_records, data=data, arch=arch, device=device, progress=ConsoleProgress()
        )  # fmt: skip
    emit({"files": result, "replay": replayed} if num_records else result, as_json=as_json, show=lambda: _show(result, replayed))
    if result.problems or (replayed and replayed.problems):
        context.exit(kdcache.IntegrityError.exit_code)


def _show(result: "kdcache.VerifyResult", replayed: "kdcache.ReplayResult | None") -> None:
    if result.problems:
        click.echo(f"{result.path}: {len(result.problems)} of {result.num_files} files are bad; dump or pull the cache again")
        for problem in result.problems:
            click.echo(f"  {problem}")
        return
    click.echo(f"{result.path}: all {result.num_files} files ({format_bytes(result.size_bytes)}) are as they were written")
    if replayed:
        click.echo(
            f"{replayed.num_records} records replayed: error {replayed.error:.2e} nat, of which encoding {replayed.encoding_error:.2e};"
            f" largest error {replayed.largest_error:.2e}, allowed {replayed.limit:.2e}; the teacher's own noise {replayed.noise:.2e}"
        )
        for problem in replayed.problems:
            click.echo(f"  {problem}")
