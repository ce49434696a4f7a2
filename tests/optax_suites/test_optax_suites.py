"""optax's own tests of its optimizers and transforms hold for ours, but for those listed here."""

from __future__ import annotations

import re
import unittest
from fnmatch import fnmatchcase
from pathlib import Path

import optax
import pytest
from upstream import MODULES, TESTS, run

# Modules that build an optimizer, or have a table of transforms, and are not imported.
NOT_IMPORTED = {
    "optax._src.combine_test": "the tests of _combining_test once more",
    "optax._src.linesearch_test": "about the line search, whichever direction it is given",
    "optax._src.lookahead_test": "replaces its optimizer by a fake one",
    "optax.schedules._schedule_test": "about schedules, then what ContribTest does with them",
    "optax.tree_utils._state_utils_test": "about the states of optax's own, written out in full",
}

# Tests that do not simply hold, by patterns of their names.

ELSEWHERE = "tests something else of optax, with no optimizer or with one that is not ours"
NOT_OURS = {
    "_accumulation_test.AccumulationTest.test_ema*": ELSEWHERE,
    "_accumulation_test.AccumulationTest.test_multi_steps": ELSEWHERE,
    "_accumulation_test.AccumulationTest.test_multi_steps_computes_mean": ELSEWHERE,
    "_accumulation_test.AccumulationTest.test_skip_*": ELSEWHERE,
    "_combining_test.CombiningTest.*": ELSEWHERE,
    "_combining_test.ExtraArgsTest.test_extra_args_*": ELSEWHERE,
    "_combining_test.NamedChainTest.*": ELSEWHERE,
    "_combining_test.PartitionTest.test_extra_args": ELSEWHERE,
    "_combining_test.PartitionTest.test_labels_mismatch[23]": "raises before it calls an optimizer",
    "_combining_test.PartitionTest.test_partition*": ELSEWHERE,
    "_conditionality_test.ConditionallyMaskTest.*": ELSEWHERE,
    "_conditionality_test.ConditionallyTransformTest.*": ELSEWHERE,
    "_freezing_test.FreezeTest.*": ELSEWHERE,
    "_freezing_test.SelectiveTransformTest.test_selective_bad_structure": (
        "raises before it calls an optimizer"
    ),
    "_masking_test.MaskedTest.test_mask_fn": ELSEWHERE,
    "_masking_test.MaskedTest.test_tree_map_params": ELSEWHERE,
    "_masking_test.MaskedTest.test_tree_mismatch_fails*": "raises before it calls an optimizer",
    "_masking_test.MaskedTest.test_update_requires_params": ELSEWHERE,
    "alias_test.LBFGSTest.*": ELSEWHERE,
    "sharding_test.ShardingTest.test_microbatch_*": ELSEWHERE,
    "transform_test.TransformTest.test_centralize_*": ELSEWHERE,
    "transform_test.TransformTest.test_lion_*": ELSEWHERE,
    "transform_test.TransformTest.test_rms_match_adam": ELSEWHERE,
    "transform_test.TransformTest.test_scale": ELSEWHERE,
    "transform_test.TransformTest.test_scale_by_*": ELSEWHERE,
}

SKIPPED = {
    "_common_test.*_in_inject_hyperparams_*-reduce_on_plateau-": (
        "optax: reduce_on_plateau checks its arguments, which inject_hyperparams traces"
    ),
    "_schedule_free_test.*.test_explicit_dtype_complex64-None": (
        "optax: schedule_free has no real state for complex params"
    ),
    "_schedule_free_test.*.test_explicit_dtype_complex64-bfloat16": "the same",
    "_schedule_free_test.*.test_explicit_dtype_complex64-float32": "the same",
}

PLAIN_SGD = "expects the step of plain SGD, the gradient itself"
NOT_SO_FOR_OURS = {
    "_freezing_test.SelectiveTransformTest.test_nested_train_all": PLAIN_SGD,
    "_freezing_test.*.test_selective_transform_effect_flat_freeze_a": PLAIN_SGD,
    "_freezing_test.*.test_selective_transform_effect_flat_freeze_none": PLAIN_SGD,
    "_freezing_test.*.test_selective_transform_effect_nested_freeze_*": PLAIN_SGD,
    "_layouts_test.LayoutsTest.test_flatten": "flattened, the parameters are one layer",
    "_masking_test.MaskedTest.test_masked_state_structure": (
        "reads the momentum where a chain has its first state, which is ours"
    ),
    "_schedule_free_test.ScheduleFreeTest.test_schedule_free_adamw": (
        "compares adamw, here ours, with schedule_free_adamw, which stays optax's"
    ),
    "transform_test.TransformTest.test_apply_every": (
        "compares sgd, here ours, with a chain of optax's transforms"
    ),
}


def listed(table: dict[str, str]) -> list[str]:
    return [name for name in TESTS if any(fnmatchcase(name, pattern) for pattern in table)]


EXCEPTIONS = NOT_OURS | SKIPPED | NOT_SO_FOR_OURS
OURS = [name for name in TESTS if name not in listed(EXCEPTIONS)]


def problems(result: unittest.TestResult) -> str:
    return "\n".join(text for _, text in result.failures + result.errors)


@pytest.mark.parametrize("name", OURS, ids=str)
def test_it_holds_for_ours(name: str) -> None:
    result, meets_ours = run(name)
    assert not problems(result), problems(result)
    assert not result.skipped, f"optax skips it: say why in SKIPPED. {result.skipped}"
    assert meets_ours, "it never calls our transform: say why in NOT_OURS"


@pytest.mark.parametrize("name", listed(SKIPPED), ids=str)
def test_optax_still_skips_it(name: str) -> None:
    result, _ = run(name)
    assert result.skipped, "it is skipped no more: take it out of SKIPPED"


@pytest.mark.parametrize("name", listed(NOT_SO_FOR_OURS), ids=str)
def test_it_still_does_not_hold_for_ours(name: str) -> None:
    result, meets_ours = run(name)
    assert problems(result), "it holds: take it out of NOT_SO_FOR_OURS"
    assert meets_ours


@pytest.mark.parametrize("pattern", EXCEPTIONS)
def test_every_exception_is_a_test_of_optax(pattern: str) -> None:
    assert any(fnmatchcase(name, pattern) for name in TESTS), "optax has it no more: take it out"


def test_every_module_of_optax_that_could_test_ours_is_imported_or_listed() -> None:
    site = Path(optax.__file__).parents[1]
    could = re.compile(r"import alias$|\boptax\.(sgd|adamw?)\b|_constr\b", re.MULTILINE)
    modules = {
        ".".join(path.relative_to(site).with_suffix("").parts)
        for path in site.glob("optax/**/*_test.py")
        if could.search(path.read_text())
    }
    assert modules == {*MODULES, *NOT_IMPORTED}
