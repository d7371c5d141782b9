"""Options that commands share. Flags beat environment (KDCACHE_…) beat `--config FILE.toml` beat defaults."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import kdcache

Command = TypeVar("Command", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def _load_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Makes the file's values the defaults of this command; a key that is no option of it is an error."""
    if path is None:
        return
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise kdcache.ConfigError(f"cannot read the configuration {path}: {error}") from error
    known = {parameter.name: parameter for parameter in context.command.params if parameter.expose_value and parameter.name}
    values = {key.replace("-", "_"): value for key, value in document.items()}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise kdcache.ConfigError(f"{path}: unknown key {', '.join(unknown)}; {context.info_name} takes: {', '.join(sorted(known))}")
    listed = {key: [value] if getattr(known[key], "multiple", False) and isinstance(value, str) else value for key, value in values.items()}
    context.default_map = {**(context.default_map or {}), **{key: value for key, value in listed.items() if value != ""}}


config_option = click.option(
    "--config", type=PATH, is_eager=True, expose_value=False, callback=_load_config,
    help="TOML file with values for these options; flags and environment go before it.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …")


class OneOrSeveral(click.types.StringParamType):
    """Text of an option that may be given several times; in the environment one a line, as file names may hold spaces."""

    envvar_list_splitter = "\n"


TEACHER_HELP = "A .safetensors, .pt, .pt2 or .onnx file, py:MODULE:FUNCTION, or torchvision:NAME,weights=DEFAULT; repeated: averaged."
teacher_option = click.option("--teacher", type=OneOrSeveral(), multiple=True, required=True, help=TEACHER_HELP)
teacher_arch_option = click.option(
    "--arch",
    type=OneOrSeveral(),
    multiple=True,
    help="Which network, where a file does not say it; pt2,norm=imagenet for a .pt2. One for all, or one for each teacher.",
)
ensemble_option = click.option(
    "--ensemble",
    type=click.Choice(["logits", "probabilities"]),
    default="logits",
    show_default=True,
    help="What of several teachers is averaged.",
)
arch_option = click.option("--arch", help="The model's architecture where its file does not say it, such as torchvision:resnet18.")


def training_options(command: Command) -> Command:
    """The options of TrainingOptions."""
    defaults = {
        "epochs": (int, "Passes over the samples."),
        "batch-size": (int, "Samples in a step."),
        "optimizer": (click.Choice(["sgd", "adamw"]), "sgd is with Nesterov momentum 0.9."),
        "lr": (float, "Largest learning rate; warm-up, then a cosine to zero."),
        "weight-decay": (float, "Weight decay."),
        "warmup-epochs": (float, "Epochs of warm-up."),
        "seed": (int, "Seed of weights and order."),
        "precision": (click.Choice(["auto", "float32", "bfloat16"]), "Arithmetic; auto: bfloat16 on CUDA, else float32."),
        "workers": (int, "Processes that decode and augment; 0: the main one."),
    }
    values = {"epochs": 30, "batch-size": 128, "optimizer": "sgd", "lr": 0.1, "weight-decay": 5e-4, "warmup-epochs": 1.0,
              "seed": 0, "precision": "auto", "workers": 0}  # fmt: skip
    command = device_option(command)
    for name, (kind, text) in reversed(defaults.items()):
        command = click.option(f"--{name}", type=kind, default=values[name], show_default=True, help=text)(command)
    return command
