"""``opentrans-lab``: its commands, and exit code 0, 1 (a run failed) or 2 (mend this)."""

import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, OmitSubcommandPrefixes
from tyro.conf import subcommand as named

from .. import __version__
from ..checks import check
from ..errors import LabError
from ..files import at_home
from .masks import MaskCommand
from .running import (
    CampaignCommand,
    MiniClipCommand,
    NotebooksCommand,
    PlanCommand,
    ReportCommand,
    RunCommand,
)
from .tables import AlphaCommand, CostCommand, DataCommand, EvaluateCommand

REPEATED = ("--parameter", "--exclude")  # options that may be given more than once

Command = (
    Annotated[RunCommand, named("run")]
    | Annotated[PlanCommand, named("plan")]
    | Annotated[ReportCommand, named("report")]
    | Annotated[AlphaCommand, named("alpha")]
    | Annotated[CostCommand, named("cost")]
    | Annotated[MaskCommand, named("mask")]
    | Annotated[DataCommand, named("data")]
    | Annotated[EvaluateCommand, named("evaluate")]
    | Annotated[CampaignCommand, named("campaign")]
    | Annotated[NotebooksCommand, named("notebooks")]
    | Annotated[MiniClipCommand, named("mini-clip")]
)


def _expand(command: object) -> None:
    """Put the home folder for ``~`` in a command's paths: no shell does it in ``--out=~/x``."""
    for name, value in vars(command).items():
        if isinstance(value, Path):
            setattr(command, name, at_home(value))
        elif is_dataclass(value):
            _expand(value)


def _once(args: list[str]) -> None:
    options = [arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")]
    for option in set(options).difference(REPEATED):
        if options.count(option) > 1:
            raise LabError(f"{option} is there twice, and only one could count; give it once")


def main(args: list[str] | None = None) -> None:
    """Entry point; ``args`` replaces the command line."""
    args = sys.argv[1:] if args is None else args
    for stream in (sys.stdout, sys.stderr):  # a locale that lacks a letter ends no run
        stream.reconfigure(errors="backslashreplace")
    if args == ["--version"]:
        print(f"opentrans-lab {__version__}")
        return
    command = tyro.cli(
        FlagCreatePairsOff[OmitArgPrefixes[OmitSubcommandPrefixes[Command]]],
        prog="opentrans-lab",
        description="Transferable and principled efficiency for open-vocabulary segmentation."
        f" Version {__version__}.",
        args=args,
    )
    try:
        _expand(command)
        _once(args)
        check(command)
        code = command()
    except LabError as error:
        print(f"opentrans-lab: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("opentrans-lab: stopped; finished runs are kept", file=sys.stderr)
        code = 130
    sys.exit(code)
