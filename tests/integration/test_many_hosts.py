"""A job of two processes gives the numbers of one, and goes on when one of them was killed.

The job is ``examples/many_hosts.py``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType

from examples import many_hosts as example

ROOT = Path(__file__).parents[2]
PATIENCE = 300  # seconds for each of three runs, which take ten on an idle machine


@contextmanager
def job(directory: Path, hosts: int, steps: int) -> Generator[list[subprocess.Popen[str]]]:
    """The processes of a job on eight devices; none outlives the context."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "examples.many_hosts", str(directory / "checkpoints")]
    command += ["--steps", str(steps), "--coordinator", f"localhost:{port}", "--hosts", str(hosts)]
    devices = f"--xla_force_host_platform_device_count={8 // hosts}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiled quickly
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}",
    }
    directory.mkdir(exist_ok=True)
    processes: list[subprocess.Popen[str]] = []
    try:
        for host in range(hosts):
            with (directory / f"host_{host}.txt").open("w") as said:
                processes.append(
                    subprocess.Popen(
                        [*command, "--host", str(host)],
                        cwd=ROOT,
                        env=environment,
                        stdout=said,
                        stderr=subprocess.STDOUT,
                        text=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish(directory: Path, hosts: int, steps: int) -> None:
    with job(directory, hosts, steps) as processes:
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.wait(max(0, deadline - time.monotonic()))
            assert process.returncode == 0, said(directory)


def said(directory: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(directory.glob("host_*.txt")))


def losses(directory: Path, host: int = 0) -> dict[int, float]:
    lines = (directory / f"host_{host}.txt").read_text().splitlines()
    steps = (line.removeprefix("step ").split(": loss ") for line in lines if "loss" in line)
    return {int(number): float(value) for number, value in steps}


def saved(directory: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    checkpoints = directory / "checkpoints"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def state(directory: Path, step: int) -> Any:
    """What a checkpoint holds."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    shapes, structure = jax.tree.flatten(jax.eval_shape(example.init, jax.random.key(0)))
    shardings = jax.tree.leaves(example.shardings_on(mesh))
    like = structure.unflatten(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(shapes, shardings, strict=True)
    )
    with ocp.CheckpointManager(directory / "checkpoints") as manager:
        return jax.device_get(manager.restore(step, args=ocp.args.StandardRestore(like)))


def test_two_hosts_of_which_one_is_killed_give_the_numbers_of_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with job(two, hosts=2, steps=10_000) as (survivor, killed):
        deadline = time.monotonic() + PATIENCE
        while max(saved(two), default=0) < example.SAVE_EVERY:  # the first step is saved, too
            assert survivor.poll() is killed.poll() is None, said(two)
            assert time.monotonic() < deadline, said(two)
            time.sleep(0.05)
        killed.kill()  # SIGKILL; the survivor is stopped as a scheduler would
    before = losses(two)
    restart = saved(two)[-1]
    last = restart + example.SAVE_EVERY
    finish(two, hosts=2, steps=last)
    finish(one, hosts=1, steps=last)

    want, after = losses(one), losses(two)
    assert list(want) == list(range(1, last + 1))
    assert list(after) == list(range(restart + 1, last + 1))
    assert losses(two, host=1) == after
    both = {number: before[number] for number in range(1, restart + 1)} | after
    np.testing.assert_allclose(list(both.values()), list(want.values()), atol=2e-6)
    chex.assert_trees_all_close(state(two, last), state(one, last), rtol=1e-4, atol=1e-6)
