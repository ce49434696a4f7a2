"""optax's own tests, imported so that ours stand in their tables, and run so that ours are met.

Nothing of them is copied: while a test module of optax is imported, the decorators that give its
tests their parameters are patched, and take our rows.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import os
import unittest
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any
from unittest import mock

import jax
from absl.testing import parameterized
from contenders import OPTIMIZERS, ROWS, TABLES
from optax._src import alias
from optax.schedules import _inject

from stablegrad_optax._layers import layout_of

MODULES = [
    "optax._src.alias_test",
    "optax._src.float64_test",
    "optax._src.sharding_test",
    "optax._src.transform_test",
    "optax.contrib._common_test",
    "optax.contrib._complex_valued_test",
    "optax.contrib._sam_test",
    "optax.contrib._schedule_free_test",
    "optax.experimental._aggregating_test",
    "optax.transforms._accumulation_test",
    "optax.transforms._combining_test",
    "optax.transforms._conditionality_test",
    "optax.transforms._freezing_test",
    "optax.transforms._layouts_test",
    "optax.transforms._masking_test",
    "optax.transforms._monitoring_test",
]

Row = dict[str, Any]
Test = Callable[..., None]
named_parameters = parameterized.named_parameters


def _named_parameters(*table: Any) -> Callable[[Test], Any]:
    def decorate(test: Test) -> Any:
        _, first, *_ = inspect.signature(test).parameters
        return named_parameters(*TABLES.get(first, table))(test)

    return decorate


def _product(*tables: list[Row], **grid: Iterable[Any]) -> Callable[[Test], Any]:
    """As absl's, but with a name that says which case it is, where absl counts."""
    axes = [*map(_with_ours, tables), *([{k: v} for v in values] for k, values in grid.items())]
    cases: list[Row] = [
        {k: v for part in parts for k, v in part.items()} for parts in itertools.product(*axes)
    ]
    return named_parameters(
        [{"testcase_name": "-".join(map(_label, case.values())), **case} for case in cases]
    )


def _with_ours(table: list[Row]) -> list[Row]:
    if "opt_name" not in table[0]:
        return table
    kept = [row for row in table if row["opt_name"] in OPTIMIZERS]
    return kept + [dict.fromkeys(table[0]) | row for row in ROWS]


def _label(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}={_label(v)}" for k, v in value.items())
    return getattr(value, "__name__", str(value)).removeprefix("_setup_")


def _tests_of(name: str) -> Iterator[tuple[str, unittest.TestCase]]:
    with (
        mock.patch.multiple(parameterized, named_parameters=_named_parameters, product=_product),
        mock.patch.dict(os.environ),  # sharding_test overwrites XLA_FLAGS
        warnings.catch_warnings(action="ignore"),  # from optax's optimizers, which we replace
    ):
        module = importlib.import_module(name)
    for value in vars(module).values():
        if inspect.isclass(value) and value.__module__ == name:
            for method in unittest.defaultTestLoader.getTestCaseNames(value):
                yield f"{name.rpartition('.')[2]}.{value.__name__}.{method}", value(method)


TESTS = dict(itertools.chain.from_iterable(map(_tests_of, MODULES)))


def run(name: str) -> tuple[unittest.TestResult, bool]:
    """The outcome of a test, and whether it met our transform."""
    result = unittest.TestResult()
    with _in_their_place() as transform:
        TESTS[name].run(result)
    return result, transform.called


@contextlib.contextmanager
def _in_their_place() -> Generator[mock.Mock]:
    try:
        with (
            mock.patch.multiple(alias, create=True, **OPTIMIZERS),
            mock.patch.object(_inject, "inject_hyperparams", _inject_hyperparams),
            # Compared as a string, "0.10" is less than "0.7": sharding_test would skip its tests.
            mock.patch.object(jax, "__version__", "9"),
            mock.patch("stablegrad_optax._stablegrad.layout_of", wraps=layout_of) as transform,
        ):
            yield transform
    finally:
        jax.config.update("jax_enable_x64", False)  # float64_test leaves it on when it fails


inject_hyperparams = _inject.inject_hyperparams


def _inject_hyperparams(factory: Callable[..., Any], static_args: Iterable[str] = ()) -> Any:
    """As optax's, with the static argument that ours need since a rule looks like a schedule."""
    ours = {"layers"} & inspect.signature(factory).parameters.keys()
    return inject_hyperparams(factory, (*static_args, *ours))
