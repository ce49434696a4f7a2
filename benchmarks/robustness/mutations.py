"""Break the core on purpose, one way at a time: does the test suite notice each?

Every mutation replaces one piece of the package's text in a copy of the repository and runs the
package's tests there until the first one fails. A mutation that no test notices has survived, and
is a hole in the suite. The unbroken copy is run first: it must pass.

Results are added to the record one by one; a rerun goes on from there. Remove the record to begin
anew, as after a change of the core.

    python -m benchmarks.robustness.mutations
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RECORD = Path("docs/records/mutations.txt")
# The quick and general ones first; before them all, the tests of the module that is broken.
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "stablegrad",
        "reference",
        "layers",
        "scale_laws",
        "statistics",
        "trees_and_dtypes",
        "gain",
        "prediction",
        "diagnostics",
        "optimizers",
        "errors",
        "transformations",
        "initializers",
        "properties",
    )
]
# Modules whose tests have another name.
TESTED_BY = {"running": "stablegrad", "arithmetic": "gain", "checks": "errors"}


class Mutation(NamedTuple):
    """``old``, which the module has exactly once, becomes ``new``."""

    name: str
    module: str
    old: str
    new: str
    tests: str = ""  # what notices it, where that is not the module's own tests


MUTATIONS = [
    # The statistic.
    Mutation(
        "centering dropped", "statistics", "has_std = centered & (", "has_std = ~centered & ("
    ),
    Mutation("everything centered", "statistics", "has_std = centered & (", "has_std = ("),
    Mutation("no RMS for a constant layer", "statistics", "> 512 * limits.eps", "> -1"),
    Mutation("RMS where the std is only small", "statistics", "> 512 * limits.eps", "> 0.01"),
    Mutation(
        "no NaN for a non-finite entry",
        "statistics",
        "jnp.where(jnp.isfinite(big), statistic, jnp.nan)",
        "statistic",
    ),
    Mutation(
        "big entries dropped",
        "statistics",
        "[big, jnp.maximum(x, -limit)",
        "[jnp.zeros_like(x), jnp.maximum(x, -limit)",
    ),
    Mutation(
        "small entries dropped",
        "statistics",
        "within(x, 2 * limit / unit, unit)]",
        "jnp.zeros_like(x)]",
    ),
    Mutation(
        "one sum of squares for all",
        "statistics",
        "is_big, is_middle = big >= enough, middle >= enough",
        "is_big, is_middle = big < 0, middle >= 0",
    ),
    Mutation(
        "a sum is taken before there is enough",
        "statistics",
        "is_big, is_middle = big >= enough, middle >= enough",
        "is_big, is_middle = big > 0, middle > 0",
    ),
    Mutation(
        "squares of too large entries", "statistics", "(84, 48, -72, 40)", "(84, 70, -28, 40)"
    ),
    Mutation(
        "plain sums of squares that vanish",
        "statistics",
        "(plain[0] >= enough) & (plain[0] <= limit**2)",
        "plain[0] <= limit**2",
    ),
    Mutation(
        "plain sums of squares that overflow",
        "statistics",
        "(plain[0] >= enough) & (plain[0] <= limit**2)",
        "plain[0] >= enough",
    ),
    Mutation(
        "plain sums if one layer has them",
        "statistics",
        "jnp.all((plain[0] >= enough)",
        "jnp.any((plain[0] >= enough)",
    ),
    Mutation(
        "plain sums counted as big ones",
        "statistics",
        "jnp.stack([none, total, none])",
        "jnp.stack([total, none, none])",
    ),
    Mutation(
        "an infinity made by a constant is folded away",
        "statistics",
        "jnp.maximum(jnp.abs(x) * (1 / unit), 1 / unit)",
        "jnp.maximum(x * (1 / unit), -largest)",
    ),
    Mutation(
        "nothing against constant folding before a factor",
        "statistics",
        "jnp.maximum(x, -bound) * factor, bound",
        "x * factor, bound",
    ),
    Mutation(
        "nothing against constant folding behind a factor",
        "statistics",
        "jnp.minimum(jnp.maximum(x, -bound) * factor, bound * factor)",
        "jnp.maximum(x, -bound) * factor",
    ),
    Mutation(
        "entries of big layers summed in the small unit",
        "statistics",
        "[of_big * (shift / unit),",
        "[of_other * (1 / shift / unit),",
    ),
    Mutation(
        "n - 1 in place of n", "statistics", "np.maximum(entries, 1)", "np.maximum(entries - 1, 1)"
    ),
    Mutation("imaginary squares dropped", "statistics", "[x + y * y for x, y", "[x for x, _"),
    Mutation(
        "imaginary means dropped",
        "statistics",
        "+= in_two_units(imaginary)",
        "+= in_two_units(0 * imaginary)",
    ),
    Mutation(
        "tiny statistics become 0",
        "statistics",
        "jnp.clip(statistic, limits.tiny, limits.max)",
        "statistic",
    ),
    Mutation(
        "statistics in the gradient's dtype",
        "statistics",
        "real = jnp.real(values).astype(dtype)",
        "real = jnp.real(values)",
    ),
    Mutation(
        "float64 measured in float32", "statistics", "jnp.float64 if wide", "jnp.float32 if wide"
    ),
    Mutation(
        "sharded layers left apart",
        "statistics",
        "if is_spread else x",
        "if False else x",
        tests="transformations",
    ),
    # The running scale.
    Mutation("decay and its complement swapped", "running", "(d * (scale", "((1 - d) * (scale"),
    Mutation(
        "attack ignored",
        "running",
        "jnp.where(statistic > scale, jnp.asarray(attack, scale.dtype), d)",
        "d",
    ),
    Mutation(
        "first statistic averaged with zero",
        "running",
        "jnp.where(scale == 0, statistic, ",
        "jnp.where(scale < 0, statistic, ",
    ),
    Mutation(
        "NaN enters the state",
        "running",
        "is_news = jnp.isfinite(statistic)",
        "is_news = jnp.ones_like(statistic, bool)",
    ),
    Mutation("no clamp at the top", "running", "jnp.where(mean > larger, larger, mean)", "mean"),
    Mutation("no unit at the bottom", "running", "larger < 2**-60, 2**-60, 1", "larger < 0, 1, 1"),
    Mutation("delayed scale decays through zeros", "running", "is_news &= statistic > 0", "pass"),
    Mutation(
        "a spike makes a peak", "running", "confirmed = jnp.minimum(", "confirmed = jnp.maximum("
    ),
    Mutation("peaks forget", "running", "confirmed, before)", "confirmed, 0.5 * before)"),
    Mutation(
        "delayed first step unscaled",
        "running",
        "return jnp.where(before > 0, before, after)",
        "return before",
    ),
    Mutation(
        "delayed first step of an accelerator unscaled",
        "running",
        "lambda: known_or(take_after())",
        "lambda: before",
        tests="stablegrad",
    ),
    Mutation(
        "delayed takes the statistic twice on a CPU",
        "running",
        "cpu=lambda: known_or(after)",
        "cpu=without_waiting",
        tests="stablegrad",
    ),
    Mutation(
        "delayed never in the steady state",
        "running",
        "jnp.all(before > 0), lambda: before",
        "jnp.all(before > 0), take_after",
        tests="statistics",
    ),
    # The reference.
    Mutation(
        "reference ignored",
        "reference",
        "constant = jnp.asarray(reference,",
        "constant = jnp.asarray(1,",
    ),
    Mutation("reference never fades", "reference", "is_low = most < limit", "is_low = most < 0"),
    Mutation(
        "reference fades with any layer",
        "reference",
        "jnp.max(left, initial=0)",
        "jnp.min(left, initial=1)",
    ),
    Mutation(
        "fading jumps at the limit",
        "reference",
        "jnp.where(is_low, limit, 1)",
        "jnp.ones_like(limit)",
    ),
    # The gain and the update.
    Mutation(
        "equal norms whatever the balance",
        "gain",
        "jnp.asarray(growth, scale.dtype) ** b",
        "jnp.asarray(growth, scale.dtype)",
    ),
    Mutation("balance ignored", "gain", "own**b * pooled ** (1 - b)", "own", tests="stablegrad"),
    Mutation(
        "pooled scale blind to sizes",
        "gain",
        "entries / max(entries.sum(), 1)",
        "np.full(len(entries), 1 / max(len(entries), 1))",
        tests="stablegrad",
    ),
    Mutation(
        "pooled scale overflows",
        "gain",
        "jnp.where(seen, largest, 1))",
        "jnp.ones_like(largest))",
        tests="stablegrad",
    ),
    Mutation(
        "gain taken before the gradient is divided",
        "gain",
        "quotient(gradient.astype(wide), divisor.astype(wide)) * multiplier.astype(wide)",
        "gradient.astype(wide) * (multiplier.astype(wide) / divisor.astype(wide))",
        tests="statistics",
    ),
    Mutation(
        "divisor has no upper end",
        "gain",
        "beyond = exact > largest",
        "beyond = exact > jnp.inf",
        tests="stablegrad",
    ),
    Mutation(
        "update in the wrong dtype",
        "gain",
        "update.astype(gradient.dtype)",
        "update",
        tests="trees_and_dtypes",
    ),
    Mutation(
        "gain in the gradient's dtype",
        "gain",
        "wide = max(gradient.dtype, divisor.dtype, key=",
        "wide = max(gradient.dtype, gradient.dtype, key=",
        tests="trees_and_dtypes",
    ),
    Mutation(
        "meta-gradient blind to the scale",
        "arithmetic",
        "x_dot / y - result * (y_dot / y)",
        "x_dot / y",
    ),
    Mutation(
        "meta-gradient with a square",
        "arithmetic",
        "x_dot / y - result * (y_dot / y)",
        "(x_dot * y - x * y_dot) / (y * y)",
    ),
    Mutation(
        "meta-gradient of a dead layer",
        "arithmetic",
        "jnp.sqrt(jnp.where(positive, x, 1))",
        "jnp.sqrt(x)",
    ),
    # The transform.
    Mutation(
        "scale of the step before",
        "stablegrad",
        "scale = grad_scale\n",
        "scale = jnp.where(state.grad_scale > 0, state.grad_scale, grad_scale)\n",
    ),
    Mutation("delayed ignored", "stablegrad", "        if delayed:\n", "        if False:\n"),
    Mutation(
        "state never moves",
        "stablegrad",
        "StableGradState(grad_scale, reference_scale, peak",
        "StableGradState(state.grad_scale, reference_scale, peak",
    ),
    Mutation(
        "state of another dtype",
        "stablegrad",
        "StableGradState(grad_scale, reference_scale, peak",
        "StableGradState(grad_scale.astype(jnp.bfloat16), reference_scale, peak",
    ),
    Mutation(
        "prediction reference not averaged",
        "stablegrad",
        "running(state.reference_scale, seen, decay, attack)",
        "seen",
    ),
    # What a layer is.
    Mutation(
        "biases skipped", "layers", "_whole_leaf(leaf, min_ndim=1)", "_whole_leaf(leaf, min_ndim=2)"
    ),
    Mutation(
        "weights_only takes biases",
        "layers",
        "_whole_leaf(leaf, min_ndim=2)",
        "_whole_leaf(leaf, min_ndim=1)",
    ),
    Mutation("biases centered", "layers", "centered=len(shape) >= 2)", "centered=True)"),
    Mutation("stacked axes not shifted", "layers", "a if a < 0 else a + 1", "a"),
    Mutation(
        "layers of a leaf in another order",
        "layers",
        "jnp.split(vector, np.cumsum(sizes)[:-1])",
        "jnp.split(vector, np.cumsum(sizes)[:-1])[::-1]",
    ),
    Mutation(
        "single layers read with their neighbour",
        "layers",
        "jnp.pad(pieces[index], (0, 1))",
        "jnp.pad(pieces[index], (0, 1), constant_values=1)",
    ),
    # Around it.
    Mutation(
        "prediction gradient of the loss's sum",
        "prediction",
        "return value, (grads, prediction_grad)",
        "return value, (grads, jax.tree.map(lambda g: 2 * g, prediction_grad))",
    ),
    Mutation(
        "a state of other layers passes", "checks", "if shape != (layout.num_layers,):", "if False:"
    ),
    Mutation(
        "a decay of 1 passes",
        "checks",
        "_concrete(name, value, 0.0) < 1",
        "_concrete(name, value, 0.0) <= 1",
    ),
]


def copy_of_the_repository(folder: Path) -> Path:
    """What the tests need: the package, the tests, the benchmarks they import and the settings."""
    copy = folder / "repository"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("stablegrad_optax", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def first_failure(copy: Path, first: str = "stablegrad") -> str | None:
    """The first test that fails, or None if all pass; an error outside a test is not a finding."""
    first = f"tests/test_{first}.py"
    tests = sorted(TESTS, key=lambda test: test != first)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(copy), "CI": "true", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, *tests], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return found[1]


def apply(mutation: Mutation, copy: Path) -> Path:
    """Break the copy, and return the file that was broken."""
    file = copy / "stablegrad_optax" / f"_{mutation.module}.py"
    text = file.read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"{mutation.name}: the text to replace is {text.count(mutation.old)} times in "
            f"{file.name}, and must be there once: adapt the mutation to the code."
        )
    file.write_text(text.replace(mutation.old, mutation.new))
    return file


def main(arguments: list[str] | None = None) -> None:
    """Run every mutation that the record lacks, and exit with 1 if one has survived."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.robustness.mutations")
    parser.add_argument("--record", type=Path, default=RECORD, help=f"default: {RECORD}")
    record: Path = parser.parse_args(arguments).record

    def note(line: str) -> None:
        print(line, flush=True)
        with record.open("a") as file:
            file.write(line + "\n")

    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of_the_repository(Path(folder))
        if not record.exists():
            failure = first_failure(copy)
            if failure:
                sys.exit(f"the unbroken code fails {failure}")
            note("command: python -m benchmarks.robustness.mutations")
            note("mutation, and the first test that fails; the unbroken code passes all of them")
        done = record.read_text()
        for mutation in MUTATIONS:
            if f"\n{mutation.name:<42} " in done:
                continue
            file = apply(mutation, copy)
            tested_by = TESTED_BY.get(mutation.module, mutation.module)
            noticed = first_failure(copy, mutation.tests or tested_by)
            shutil.copy(ROOT / "stablegrad_optax" / file.name, file)
            note(f"{mutation.name:<42} {noticed or 'SURVIVED'}")
    survivors = record.read_text().count("SURVIVED")
    verdict = f"{len(MUTATIONS) - survivors} of {len(MUTATIONS)} mutations noticed"
    if f"\n{verdict}\n" not in record.read_text():
        note(verdict)
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
