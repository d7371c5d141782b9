"""`kdcache`: the group of commands, and the one table from an exception to what the user sees."""

import importlib
import os
import sys

import click

import kdcache

COMMANDS = {
    "demo": "The main job on embedded data, in minutes on two CPU cores.",
    "fit": "Train a network on labels alone: teachers and baselines.",
    "plan": "What a cache would cost and keep, before any GPU hour.",
    "dump": "Stage one: run the teacher once, store its soft labels.",
    "train": "Stage two: train students from a cache.",
    "evaluate": "Accuracy, recall, calibration, agreement with a teacher.",
    "info": "What a cache holds.",
    "verify": "Whether every byte of a cache is what was written.",
    "convert": "Copy a cache into another layout: zarr, parquet, compact.",
    "pack": "Copy a cache into its smallest layout.",
    "unpack": "Copy a packed cache into the layout for training.",
    "merge": "Join caches that hold different views of one recipe.",
    "models": "The model specs that are known.",
    "augment": "The named augmentations: list them, print one to edit.",
}
"""Command to summary, in the order of the work. A command's module is imported only when it is run."""


class LazyGroup(click.Group):
    """Imports a command when it is needed, so that `kdcache --help` is quick."""

    def list_commands(self, _: click.Context) -> list[str]:
        """In the order of the work."""
        return list(COMMANDS)

    def get_command(self, _: click.Context, name: str) -> click.Command | None:
        """The command `name` of the module of that name."""
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f".{name}", __package__), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "KDCACHE"})
@click.version_option(kdcache.__version__, prog_name="kdcache")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Run the teacher once, train any number of students.

    \b
    kdcache demo                                              see all of it on embedded data
    kdcache dump --teacher FILE --data SPEC --out DIR         stage one
    kdcache train --student small --cache DIR --out DIR       stage two
    """  # noqa: D301
    if debug:
        os.environ["KDCACHE_DEBUG"] = "1"


def main() -> None:
    """The installed entry point."""
    try:
        status = cli.main(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)  # click returns what a command gave to Context.exit
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command goes on where this one stopped", err=True)
        sys.exit(130)
    except kdcache.KdcacheError as error:
        if os.environ.get("KDCACHE_DEBUG"):
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone, as `head` does
        sys.exit(1)
    except OSError as error:
        if os.environ.get("KDCACHE_DEBUG"):
            raise
        click.echo(f"error: {error}", err=True)  # a full disk, no permission: the system's own words are clear
        sys.exit(1)
