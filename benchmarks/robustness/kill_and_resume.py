"""Kill a training job with SIGKILL again and again: it must end where an undisturbed one does.

The job is ``digits_job``. It is killed at steps drawn at random and, because a checkpoint takes
longer to write than most steps to do, a random moment after that; some kills hit while a checkpoint
is being written. In the end the params and all of the optimizer's state are compared bit for bit.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.robustness.digits_job import OPTIONS, SAVE_EVERY
from benchmarks.versions import versions

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "records" / "kill_and_resume.txt"
LONGEST_WAIT = 0.05  # seconds from the drawn step to the kill, about what a checkpoint takes


@dataclass(frozen=True)
class Kill:
    """A kill that has happened.

    Attributes:
        start: The step that the job started from.
        reached: The last step that it is known to have done.
        unfinished: Whether it left behind a checkpoint that it had not finished writing.
    """

    start: int
    reached: int
    unfinished: bool


@dataclass(frozen=True)
class Outcome:
    """What came of a job that was killed.

    Attributes:
        kills: In order.
        last_start: The step that the job started from when it was left to finish.
        leaves: How many arrays were compared.
        different: The paths of those that differ from the undisturbed job's in a bit, a shape or a
            dtype, or that only one of the two has.
    """

    kills: tuple[Kill, ...]
    last_start: int
    leaves: int
    different: tuple[str, ...]


def kill_and_resume(name: str, steps: int, kills: int, seed: int, directory: Path) -> Outcome:
    """Run a job undisturbed, then once more with kills, and compare how the two end."""
    calm, killed = directory / "calm", directory / "killed"
    for path in (calm, killed):
        path.mkdir()
    finish(calm, name, steps)
    rng = np.random.default_rng(seed)
    # None so late that the job could end before it.
    targets = np.sort(rng.choice(np.arange(1, steps - 5 * SAVE_EVERY), kills, replace=False))
    waits = rng.uniform(0, LONGEST_WAIT, kills)
    done = [
        kill_at(killed, name, steps, int(target), float(wait))
        for target, wait in zip(targets, waits, strict=True)
    ]
    last_start = finish(killed, name, steps)
    leaves, different = compare(calm / "final.npz", killed / "final.npz")
    return Outcome(tuple(done), last_start, leaves, different)


@contextmanager
def job(directory: Path, name: str, steps: int) -> Generator[subprocess.Popen[str], None, None]:
    """The job as a process of its own that says a line for every step."""
    command = [sys.executable, "-m", "benchmarks.robustness.digits_job", str(directory)]
    command += ["--options", name, "--steps", str(steps)]
    with (
        (directory / "errors.txt").open("w") as errors,
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def steps_of(process: subprocess.Popen[str]) -> Iterator[int]:
    """The step that the job starts from, then every step as it is done."""
    assert process.stdout is not None
    # What a kill cut short is no step.
    return (int(line) for line in process.stdout if line.endswith("\n"))


def finish(directory: Path, name: str, steps: int) -> int:
    """Let the job run to its end; the step that it started from."""
    with job(directory, name, steps) as process:
        start, *_ = [*steps_of(process), -1]
    check(process, 0, directory)
    return start


def kill_at(directory: Path, name: str, steps: int, target: int, wait: float) -> Kill:
    """Kill the job ``wait`` seconds after it has done the target step, or started beyond it."""
    with job(directory, name, steps) as process:
        seen = steps_of(process)
        start = reached = next(seen, -1)
        while 0 <= reached < target:
            reached = next(seen, -1)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        reached = max(reached, *seen, -1)  # what it said before it died
    check(process, -signal.SIGKILL, directory)
    return Kill(start, reached, is_unfinished(directory / "checkpoints"))


def check(process: subprocess.Popen[str], returncode: int, directory: Path) -> None:
    """Raise if the job did not end in the way that it was made to."""
    if process.returncode != returncode:
        errors = (directory / "errors.txt").read_text()[-2000:]
        raise RuntimeError(
            f"the job ended with status {process.returncode}, not {returncode}:\n{errors}"
        )


def is_unfinished(checkpoints: Path) -> bool:
    """Whether there is a checkpoint under the name that Orbax gives it until it is complete."""
    return checkpoints.exists() and any(not p.name.isdecimal() for p in checkpoints.iterdir())


def compare(calm: Path, killed: Path) -> tuple[int, tuple[str, ...]]:
    """How many arrays two files have between them, and the names of those that differ."""

    def content(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        with np.load(path) as file:
            return {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in file.items()}

    one, other = content(calm), content(killed)
    names = sorted(one.keys() | other.keys())
    return len(names), tuple(name for name in names if one.get(name) != other.get(name))


def report(name: str, outcome: Outcome) -> str:
    """The outcome of one job, for people."""
    starts = [*(kill.start for kill in outcome.kills[1:]), outcome.last_start]
    lines = [f"{name}: stablegrad({', '.join(f'{k}={v!r}' for k, v in OPTIONS[name].items())})"]
    lines += [
        f"  killed at step {kill.reached:4}, went on from step {start:4}"
        f"{', an unfinished checkpoint left behind' if kill.unfinished else ''}"
        for kill, start in zip(outcome.kills, starts, strict=True)
    ]
    few = ", ".join(outcome.different[:3])
    verdict = f"{len(outcome.different)} DIFFER, the first: {few}" if few else "bit-equal"
    lines.append(f"  params and optimizer state, {outcome.leaves} arrays: {verdict}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill the jobs that the command line asks for; the exit status is 1 if one ended elsewhere."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness.kill_and_resume",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--options", choices=OPTIONS, nargs="+", default=list(OPTIONS), help="jobs")
    parser.add_argument("--steps", type=int, default=400, help="steps of a job")
    parser.add_argument("--kills", type=int, default=10, help="kills of a job")
    parser.add_argument("--seed", type=int, default=0, help="draws when the kills are")
    parser.add_argument("--record", type=Path, default=RECORD, help="where the record goes")
    given = parser.parse_args(arguments)

    command = ["python", "-m", "benchmarks.robustness.kill_and_resume", "--options"]
    command += [*given.options, "--steps", given.steps, "--kills", given.kills]
    command += ["--seed", given.seed]
    said = [
        shlex.join(map(str, command)),
        versions("jax", "optax", "flax", "orbax-checkpoint", "numpy"),
        "",
        f"Flax MLP, optax.chain(stablegrad(...), optax.adam(1e-3)), digits, {given.steps} steps, "
        "an asynchronous",
        f"Orbax checkpoint every {SAVE_EVERY} steps; every kill is a SIGKILL, from seed "
        f"{given.seed}.",
    ]
    print("\n".join(said), flush=True)
    outcomes: list[Outcome] = []
    for name in given.options:
        with tempfile.TemporaryDirectory() as directory:
            outcome = kill_and_resume(name, given.steps, given.kills, given.seed, Path(directory))
        outcomes.append(outcome)
        said += ["", report(name, outcome)]
        print("\n".join(said[-2:]), flush=True)
    unfinished = sum(kill.unfinished for outcome in outcomes for kill in outcome.kills)
    kills = sum(len(outcome.kills) for outcome in outcomes)
    different = sum(bool(outcome.different) for outcome in outcomes)
    said += [
        "",
        f"{kills} kills, {unfinished} of them while a checkpoint was being written; "
        f"{len(outcomes) - different} of {len(outcomes)} jobs ended",
        "bit-equal to the undisturbed one.",
    ]
    print("\n".join(said[-3:]))
    given.record.write_text("\n".join(said) + "\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
