"""The cost benchmark: what it counts, and how many passes the compiled TPU program makes."""

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.cost import arms, gpu, growth, pod, programs, records, report, times, tpu, training
from benchmarks.cost.__main__ import main
from benchmarks.pinn.networks import Network
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.pinn.task import PinnTask
from benchmarks.tpu_compiler import devices
from examples.tpu_pod import SMALL, mesh_of
from stablegrad_optax import stablegrad

MODULE = """\
HloModule step

%sums (g.1: f32[8,8]) -> (f32[], f32[], f32[8,8]) {
  %g.1 = f32[8,8] parameter(0)
  %product = f32[8,8] convolution(%g.1, %g.1)
}

%branch (p: (f32[8,8])) -> f32[] {
  %p = (f32[8,8]{1,0}) parameter(0)
  %g.2 = f32[8,8]{1,0} get-tuple-element(%p), index=0
  %inside = f32[] fusion(%g.2), calls=%sums
}

%other (p: (f32[8,8])) -> f32[] {
  %zero = f32[] constant(0)
}

ENTRY %main (p.1: f32[8,8], g.1: f32[8,8]) -> f32[8,8] {
  %p.1 = f32[8,8]{1,0} parameter(0)
  %g.1 = f32[8,8]{1,0} parameter(1)
  %operands = (f32[8,8]) tuple(%g.1)
  %first = f32[] conditional(%c, %operands, %operands), branch_computations={%other, %branch}
  %both = (f32[], f32[], f32[8,8]{1,0}) fusion(%g.1), kind=kOutput, calls=%sums
  %reduced = (f32[3]{0}, f32[2]{0}) all-reduce(%a, %b), to_apply=%add
  ROOT %new = f32[8,8]{1,0} fusion(%p.1, %g.1), kind=kLoop, calls=%other
}
"""


def test_passes_are_those_of_every_step() -> None:
    assert programs.passes(MODULE, num_gradients=1) == 2
    assert programs.passes(MODULE.replace("fusion(%p.1, %g.1)", "fusion(%p.1)"), 1) == 1


def test_sums_and_reductions_are_found() -> None:
    assert programs.sums_on_matmuls(MODULE) == 1
    assert programs.sums_on_matmuls(MODULE.replace("convolution", "add")) == 0
    assert programs.all_reduces(MODULE) == {"all_reduces": 1, "all_reduced_numbers": 5}


def test_traffic_is_that_of_hbm_once_and_of_the_largest_branch() -> None:
    assert programs.hbm_bytes(MODULE) == (256 + 4) + 5 * 256 + 2 * 4 + (3 + 2) * 4
    prefetched = MODULE.replace(
        "  ROOT %new = f32[8,8]{1,0} fusion(%p.1, %g.1)",
        """\
  %start = (f32[8,8]{1,0:T(8,128)S(1)}, f32[8,8]{1,0}, u32[]{:S(2)}) copy-start(%g.1)
  %done = f32[8,8]{1,0:T(8,128)S(1)} copy-done(%start)
  ROOT %new = f32[8,8]{1,0} fusion(%p.1, %done)""",
    )
    assert programs.hbm_bytes(prefetched) == programs.hbm_bytes(MODULE)


def test_what_is_recorded_is_not_measured_again(tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"bytes": 7.0}

    for _ in range(2):
        record = records.measured("tpu", {"arm": "alone"}, measure, tmp_path)
    records.measured("tpu", {"arm": "other"}, measure, tmp_path)
    assert len(calls) == 2
    assert record["bytes"] == 7.0
    assert "jax" in record["versions"]
    assert len((tmp_path / "cost_tpu.jsonl").read_text().splitlines()) == 2


@pytest.mark.standard_promotion
def test_a_gpu_is_counted_by_its_own_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU in its place: its compiler makes a pass of every sum."""
    monkeypatch.setattr(gpu, "PLATFORM", "cpu")
    monkeypatch.setattr(programs, "SHAPE", (8, 8))
    cells = [cell for cell in gpu.cells() if cell["base"] == "sgd"]
    assert [cell["arm"] for cell in cells] == ["alone", "stablegrad", "stablegrad, delayed"]
    alone, ours = (gpu.measure(cell) for cell in cells[:2])
    assert alone["passes"] < ours["passes"]
    assert alone["bytes"] < ours["bytes"]


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PLATFORM", "a platform that JAX does not know")
    monkeypatch.setattr("sys.argv", ["cost", "gpu", "--records", str(tmp_path)])
    main()
    assert capsys.readouterr().out == "No GPU is at hand: nothing was measured.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.standard_promotion
@pytest.mark.parametrize("front", [*arms.FRONTS, *arms.WHOLE])
def test_every_arm_takes_a_step(front: str) -> None:
    tx = arms.arm(front, "adam")
    params = {"kernel": jnp.arange(1.0, 13).reshape(4, 3), "bias": jnp.arange(3.0)}
    stepped, _ = arms.step_of(tx)(params, tx.init(params), params)
    assert jnp.all(jnp.isfinite(stepped["kernel"]))
    assert not jnp.array_equal(stepped["kernel"], params["kernel"])


def clock(num_arms: int) -> SimpleNamespace:
    """Every step takes as long as its arm's place in the table, in slower and slower turns.

    Each turn starts with the arm after the one that the turn before it started with.
    """
    calls = itertools.count()

    def perf_counter() -> float:
        (step, is_end) = divmod(next(calls), 2)
        turn, place = divmod(step, num_arms)
        return 1e3 * step + is_end * (1 + turn) * (1 + (turn + place) % num_arms)

    return SimpleNamespace(perf_counter=perf_counter)


@pytest.mark.standard_promotion
def test_times_of_training_are_ratios_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "time", clock(5))
    monkeypatch.setattr(training, "WARMUP", 0)
    monkeypatch.setattr(training, "TURNS", 2)
    monkeypatch.setattr(training, "STEPS", 2)
    task = PinnTask(PROBLEMS["poisson"], Network(depth=2, width=4), points=8)
    ratios = training.measure({"base": "sgd"}, task)["ratios"]
    assert list(ratios.values()) == [[1 + place] * 3 for place in range(5)]
    assert next(iter(ratios)) == "alone"


@pytest.mark.standard_promotion
@pytest.mark.parametrize("more", [{"leaves": 3}, {"leaves": 1, "layers": 5}])
def test_growth_is_beside_the_base_optimizer(more: dict[str, int], tmp_path: Path) -> None:
    for front in ("alone", "stablegrad"):
        cell = {"backend": "cpu", "arm": front, **more}
        records.measured("growth", cell, lambda cell=cell: growth.measure(cell), tmp_path)
    alone, ours = records.read("growth", tmp_path)
    [*_, row] = report.tables(tmp_path)["growth"].splitlines()
    assert row.endswith(f"| {ours['instructions'] / alone['instructions']:.2f} |")
    assert ours["instructions"] > alone["instructions"]


@pytest.mark.standard_promotion
def test_growth_beyond_what_xla_compiles_is_traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "COMPILED", 2)
    measured = growth.measure({"backend": "cpu", "arm": "stablegrad", "leaves": 3})
    assert set(measured) == {"trace_seconds", "lower_seconds", "operations"}


@pytest.mark.standard_promotion
def test_times_are_ratios_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "time", clock(len(arms.FRONTS)))
    monkeypatch.setattr(times, "WARMUP", 0)
    monkeypatch.setattr(times, "TURNS", {100: 2})
    ratios = times.measure({"base": "sgd", "parameters": 100})["ratios"]
    assert ratios == {front: [1 + place] * 3 for place, front in enumerate(arms.FRONTS)}


def test_the_table_has_ratios_to_the_base_optimizer_alone(tmp_path: Path) -> None:
    cell = {"chip": "v5p", "devices": 4, "base": "adam", "grads": "float32"}
    counts = {"temporary_bytes": 0, "all_reduces": 0, "all_reduced_numbers": 0, "passes": 1}
    alone = {"bytes": 7.0, "later_bytes": 7.0, "hbm_bytes": 5.0, "later_hbm_bytes": 5.0, **counts}
    ours = {"bytes": 8.0, "later_bytes": 7.7, "later_hbm_bytes": 5.5, **counts}
    ours["temporary_bytes"] = 2**20
    records.measured("tpu", {**cell, "arm": "alone"}, lambda: alone, tmp_path)
    records.measured("tpu", {**cell, "arm": "stablegrad"}, lambda: ours, tmp_path)
    [*_, row] = report.tables(tmp_path)["tpu"].splitlines()
    want = "v5p | 4 | adam | float32 | stablegrad | 1.1429 | 1.1000 | 1.1000 | 1 | 0 | +1.0 MiB"
    assert row == f"| {want} |"


def test_the_page_is_that_of_the_records(tmp_path: Path) -> None:
    copies = {page: tmp_path / page.name for page in (report.PAGE, report.README)}
    for page, copy in copies.items():
        copy.write_text(page.read_text())
    report.write(*copies.values(), tmp_path / "cost.png")
    for page, copy in copies.items():
        assert copy.read_text() == page.read_text()
    page = copies[report.PAGE]
    assert (tmp_path / "cost.png").stat().st_size > 0
    for name, rows in report.tables().items():
        assert f"<!-- {name} -->" in page.read_text()
        assert all(row in page.read_text() for row in rows.splitlines()[2:])


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: make test-tpu"
)
@pytest.mark.standard_promotion
class TestTpuProgram:
    """Counts, by the TPU's compiler, that may not grow."""

    @pytest.mark.parametrize("base", arms.BASES)
    @pytest.mark.parametrize(
        ("front", "passes"), [("alone", 1), ("stablegrad", 2), ("stablegrad, delayed", 1)]
    )
    def test_passes_over_each_gradient(self, base: str, front: str, passes: int) -> None:
        cell = {"chip": "v5p", "devices": 1, "base": base, "arm": front, "grads": "float32"}
        assert tpu.measure(cell)["passes"] == passes

    def test_without_prefetches_the_traffic_is_the_compilers_count(self) -> None:
        cell = {"chip": "v5p", "devices": 1, "base": "adam", "arm": "alone", "grads": "float32"}
        counted = tpu.measure(cell)
        assert counted["hbm_bytes"] == pytest.approx(counted["bytes"], rel=1e-4)
        assert counted["hbm_bytes"] == pytest.approx(7 * programs.LEAVES * 4 * 4096**2, rel=1e-4)

    @pytest.mark.parametrize(
        ("front", "units"),
        [
            ("stablegrad_adam, bfloat16 mu", 7),
            ("stablegrad_adam, delayed, bfloat16 mu", 6),
            ("stablegrad_sgd, delayed, momentum", 5),
        ],
    )
    def test_ready_optimizers_that_move_no_more_than_adam(self, front: str, units: int) -> None:
        cell = {"chip": "v5p", "devices": 1, "base": "adam", "arm": front, "grads": "float32"}
        traffic = tpu.measure(cell)["later_hbm_bytes"]
        assert traffic == pytest.approx(units * programs.LEAVES * 4 * 4096**2, rel=1e-4)

    @pytest.mark.parametrize("front", ["stablegrad", "stablegrad, delayed"])
    def test_sharded_layers_take_one_reduction(self, front: str) -> None:
        cell = {"chip": "v5p", "devices": 4, "base": "adam", "arm": front, "grads": "float32"}
        counted = tpu.measure(cell)
        assert counted["all_reduces"] == 1
        assert counted["all_reduced_numbers"] == 5 * programs.LEAVES

    @pytest.mark.parametrize("front", ["stablegrad", "stablegrad, delayed"])
    def test_a_training_step_of_a_pod_takes_one_reduction_more(self, front: str) -> None:
        alone, ours = (pod.measure(arm, SMALL, "v5p:2x2x1", tensor=2) for arm in ("alone", front))
        assert ours["all_reduces"] == alone["all_reduces"] + 1
        for kind in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
            assert ours[kind] == alone[kind]

    @pytest.mark.parametrize(
        ("other", "count"), [(("fsdp", "tensor"), 1), (("tensor", "fsdp"), 2), (("fsdp",), 2)]
    )
    def test_kernels_share_a_reduction_if_sharded_over_the_same_axes_in_the_same_order(
        self, other: tuple[str, ...], count: int
    ) -> None:
        mesh = mesh_of(devices("v5p:2x2x1"), tensor=2)

        def kernel(*axes: str) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, PartitionSpec(*axes))
            return jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding)

        grads, tx = [kernel("fsdp", "tensor"), kernel(*other)], stablegrad()
        compiled = jax.jit(tx.update).lower(grads, jax.eval_shape(tx.init, grads)).compile()
        assert programs.all_reduces(compiled.as_text() or "")["all_reduces"] == count
