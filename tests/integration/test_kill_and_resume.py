"""A killed Flax job goes on from its Orbax checkpoint as if nothing had been: the fast form."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.robustness.kill_and_resume import Kill, Outcome, compare, kill_and_resume, report


def test_a_job_killed_twice_ends_bit_equal_to_one_that_was_not(tmp_path: Path) -> None:
    outcome = kill_and_resume("delayed", steps=100, kills=2, seed=0, directory=tmp_path)
    assert len(outcome.kills) == 2
    assert 0 < outcome.last_start < 100
    assert outcome.leaves > 30
    assert outcome.different == (), report("delayed", outcome)


def test_a_sign_of_zero_a_dtype_and_a_missing_array_are_differences(tmp_path: Path) -> None:
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    np.savez(one, same=np.float32([1, np.nan]), zero=np.zeros(2), dtype=np.int32(0), one=1)
    np.savez(other, same=np.float32([1, np.nan]), zero=-np.zeros(2), dtype=np.float32(0))
    assert compare(one, other) == (4, ("dtype", "one", "zero"))


def test_the_report_says_where_each_kill_hit_and_what_differs() -> None:
    kills = (
        Kill(start=0, reached=17, unfinished=True),
        Kill(start=10, reached=31, unfinished=False),
    )
    said = report("running", Outcome(kills, last_start=30, leaves=35, different=("count",)))
    assert "step   17, went on from step   10, an unfinished checkpoint left behind" in said
    assert "step   31, went on from step   30\n" in said
    assert said.endswith("35 arrays: 1 DIFFER, the first: count")
