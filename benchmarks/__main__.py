"""Experiments and what came of them: run what the records lack, and write the report from them.

list      the experiments, and how much of each is recorded
run       train what the records of an experiment lack; Ctrl-C keeps what is finished
report    tables and pictures of docs/, from the records
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import json_lines, records, runner
from benchmarks.arguments import whole_number
from benchmarks.experiment import Experiment, part_of, with_settings
from benchmarks.experiments import EXPERIMENTS
from benchmarks.interrupts import deferred_interrupt
from benchmarks.normfree.data import CIFAR100, FASHION_MNIST

GOES_ON = (
    "What was finished is recorded; the same command goes on with the rest. What was begun starts "
    "anew: with --together 1 that is little."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; the exit status is 130 if it was interrupted."""
    options = parse(arguments)
    console = Console(highlight=False, soft_wrap=True)
    commands = {"list": _list, "run": _run, "report": _report}
    try:
        return commands[options.command](options, console)
    except (json_lines.DamagedError, FileNotFoundError) as error:  # or images, and how to get them
        console.print(f"error: {error}", markup=False)
        return 2


def _list(options: argparse.Namespace, console: Console) -> int:
    widest = max(map(len, EXPERIMENTS))
    for experiment in EXPERIMENTS.values():
        recorded, wanted = records.progress(experiment, options.records)
        name = f"{experiment.name:<{widest}}"
        hours = f"{records.hours(experiment, options.records):.1f} h"
        console.print(f"{name} {recorded:>5} of {wanted:<5} {hours:>6}  {experiment.about}")
    return 0


def _report(options: argparse.Namespace, console: Console) -> int:
    from benchmarks.normfree import report as normfree
    from benchmarks.pinn import report as pinn

    missing = [
        experiment.name
        for experiment in EXPERIMENTS.values()
        if not records.progress(experiment, options.records)[0]
    ]
    if missing:  # before a page is written
        raise FileNotFoundError(
            f"{options.records} has no records of {', '.join(missing)}: run them into it first"
        )
    pinn.write(folder=options.records)
    normfree.write(folder=options.records)
    return 0


def _run(options: argparse.Namespace, console: Console) -> int:
    deadline = time.monotonic() + 60 * options.minutes
    commit = options.commit or runner.current_commit()  # that of the code as it was read
    if options.images:
        os.environ |= dict.fromkeys((FASHION_MNIST, CIFAR100), options.images)
    with deferred_interrupt() as check_interrupt:
        try:
            for experiment in options.chosen:
                recorded, wanted = records.progress(experiment, options.records)
                if recorded == wanted:
                    console.print(f"{experiment.name}: nothing lacks, all {wanted} are recorded")
                runner.run(
                    experiment,
                    options.records,
                    together=options.together,
                    deadline=deadline,
                    commit=commit,
                    console=console,
                    check_interrupt=check_interrupt,
                )
        except KeyboardInterrupt:
            console.print(f"Interrupted. {GOES_ON}")
            return 130
        except runner.Stopped:
            console.print(f"Time is over. {GOES_ON}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in ("list", "run", "report"):
        command = commands.add_parser(name, help=f"see above: {name}")
        command.add_argument(
            "--records",
            type=Path,
            default=records.FOLDER,
            help="folder of the records (default: benchmarks/records)",
        )
        if name == "run":
            command.add_argument(
                "experiments",
                nargs="+",
                choices=EXPERIMENTS,
                metavar="EXPERIMENT",
                help="a name that `list` has",
            )
            command.add_argument(
                "--together",
                type=whole_number(1, 999),
                metavar="N",
                help="arms in one program (default: 4 on CPUs, all on GPUs)",
            )
            command.add_argument(
                "--minutes", type=_minutes, default=float("inf"), help="stop after that time"
            )
            command.add_argument(
                "--set",
                nargs="+",
                type=_setting,
                default=[],
                metavar="NAME=VALUE",
                help="another setting of the tasks and networks, such as width=1 data=cifar100; "
                "needs --records",
            )
            command.add_argument(
                "--images",
                metavar="FOLDER",
                help=f"folder of Fashion-MNIST's or CIFAR-100's files (default: {FASHION_MNIST} "
                f"or {CIFAR100}, if set)",
            )
            command.add_argument(
                "--arms", nargs="+", default=[], metavar="NAME", help="these arms only"
            )
            command.add_argument(
                "--tasks", default="", metavar="TEXT", help="the tasks with that in the title only"
            )
            command.add_argument("--commit", help="commit that the records name (default: git's)")
    options = parser.parse_args(arguments)
    if options.records.exists() and not options.records.is_dir():
        parser.error(f"--records {options.records} is not a folder")
    if options.command == "run":
        if options.set and options.records.resolve() == records.FOLDER.resolve():
            parser.error(
                "--set needs --records FOLDER: what has other settings is not to be among the "
                f"records of {options.records}"
            )
        try:
            options.chosen = _chosen(options)
        except ValueError as error:
            parser.error(str(error))
    return options


def _chosen(options: argparse.Namespace) -> list[Experiment]:
    """What is to be run of the experiments."""
    return [
        part_of(with_settings(EXPERIMENTS[name], dict(options.set)), options.arms, options.tasks)
        for name in options.experiments
    ]


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as width=1")
    return name, value


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not minutes >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes from 0")
    return minutes


if __name__ == "__main__":
    # One device per core, so that the runs share all cores. Read when JAX is first used.
    os.environ.setdefault(
        "XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count() or 1}"
    )
    sys.exit(main())
