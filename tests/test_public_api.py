"""The public names are the design's table, and each one says all a user needs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

import stablegrad_optax

TABLE = {
    "stablegrad",
    "StableGradState",
    "LayerAxes",
    "per_leaf",
    "weights_only",
    "stacked",
    "prediction_value_and_grad",
    "stablegrad_sgd",
    "stablegrad_adam",
    "stablegrad_adamw",
    "activation_gain",
    "activation_aware",
    "layer_scales",
    "scale_metrics",
    "ScaleHistory",
    "plot_scales",
    "scale_table",
}
PUBLIC = sorted(set(stablegrad_optax.__all__) | TABLE)
CLASSES = {
    "StableGradState": ("grad_scale", "reference_scale", "peak_scale"),
    "LayerAxes": ("reduce", "centered"),
    "ScaleHistory": ("step", "grad_scale", "reference_scale", "stride", "num_seen"),
}


def public(name: str) -> Any:
    return getattr(stablegrad_optax, name)


def documentation(name: str) -> str:
    return inspect.getdoc(public(name)) or ""


def test_all_is_the_designs_table() -> None:
    assert set(stablegrad_optax.__all__) == TABLE
    assert len(stablegrad_optax.__all__) == len(TABLE)


def test_the_namespace_holds_nothing_else_public() -> None:
    names = {
        name
        for name, value in vars(stablegrad_optax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert names - {"annotations"} == TABLE


def test_modules_start_with_an_underscore() -> None:
    modules = [module.name for module in pkgutil.iter_modules(stablegrad_optax.__path__)]
    assert modules
    assert all(name.startswith("_") for name in modules), modules


def test_every_public_object_has_one_home_and_one_name() -> None:
    for name in TABLE:
        module = importlib.import_module(public(name).__module__)
        assert module.__name__.startswith("stablegrad_optax._")
        assert getattr(module, name) is public(name)


def optax_modules() -> Iterator[types.ModuleType]:
    yield optax
    for module in pkgutil.iter_modules(optax.__path__):
        if not module.name.startswith("_") and module.name != "experimental":
            yield importlib.import_module(f"optax.{module.name}")


def test_names_collide_with_nothing_in_optax() -> None:
    fields = set()
    for module in optax_modules():
        assert not TABLE & set(dir(module)), module.__name__
        for value in vars(module).values():
            fields |= set(getattr(value, "_fields", ()))
    assert {"mu", "nu", "count"} <= fields
    assert not fields & set(stablegrad_optax.StableGradState._fields)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("math", r"\.\. math::|:math:`"),
        ("shapes", r"shape|\[num_layers\]|\bscalar"),
        ("dtypes", r"dtype|float32|float64|\bf32\b|\bfloat\b"),
        ("errors", r"^Raises:|[Rr]aises nothing|[Nn]ever raises"),
        ("example", r"^Examples?:[\s\S]*>>> "),
        ("source", r"^References?:|arXiv:\d|^Source:"),
    ],
    ids=lambda value: value if value.isalpha() else "",
)
def test_docstring_has(name: str, what: str, pattern: str) -> None:
    assert re.search(pattern, documentation(name), re.MULTILINE), f"{name} has no {what}"


@pytest.mark.parametrize("name", sorted(TABLE - set(CLASSES)))
def test_function_docstring_names_every_argument_and_the_result(name: str) -> None:
    text = documentation(name)
    for section in ("Args:", "Returns:"):
        assert re.search(rf"^{section}", text, re.MULTILINE), f"{name} has no {section}"
    arguments = text[text.index("Args:") : text.index("Returns:")]
    own = inspect.signature(public(name)).parameters
    for argument in own:
        assert re.search(rf"(^|[\s`*,]){argument}\b", arguments), f"{name}: {argument}"


@pytest.mark.parametrize(("name", "fields"), CLASSES.items())
def test_class_docstring_names_every_field(name: str, fields: tuple[str, ...]) -> None:
    text = documentation(name)
    match = re.search(r"^(Attributes|Args|Fields):", text, re.MULTILINE)
    assert match, f"{name} documents no fields"
    for field in fields:
        assert re.search(rf"^\s+`*{field}`*\b.*:", text[match.start() :], re.MULTILINE), field


@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_examples_run(name: str) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    finder = doctest.DocTestFinder(recurse=False)
    tests = finder.find(public(name), name, globs={})
    for test in tests:
        runner.run(test)
    assert runner.tries > 0
    assert runner.failures == 0


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_argument_is_annotated(name: str) -> None:
    signature = inspect.signature(public(name))
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
    if name not in CLASSES:
        assert signature.return_annotation is not inspect.Signature.empty


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The packages outside the standard library that the import statements among these name."""
    nodes = list(nodes)
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_package_is_typed_and_needs_only_jax_and_optax() -> None:
    root = Path(stablegrad_optax.__file__).parent
    assert (root / "py.typed").is_file()
    allowed = {"jax", "optax", "stablegrad_optax", "numpy"}
    for source in root.glob("*.py"):
        tree = ast.parse(source.read_text())
        # What only a picture or a table needs is imported when one is made.
        foreign = imported(ast.walk(tree)) - allowed - {"matplotlib", "rich"}
        if source.name != "_picture.py":
            foreign |= imported(tree.body) - allowed
        assert not foreign, (source.name, foreign)


def test_importing_the_package_imports_neither_matplotlib_nor_rich() -> None:
    loaded = "print(sorted({name.split('.')[0] for name in sys.modules}))"
    code = f"import sys, jax, optax; {loaded}; import stablegrad_optax; {loaded}"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    before, after = (set(ast.literal_eval(line)) for line in result.stdout.splitlines())
    assert not (after - before) & {"matplotlib", "rich"}
    assert "matplotlib" not in after


def test_signatures_are_the_designs() -> None:
    parameters = inspect.signature(stablegrad_optax.stablegrad).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert defaults == {
        "reference": 1.0,
        "decay": 0.0,
        "attack": None,
        "balance": 1.0,
        "equalize": "std",
        "fade_below": 2**-23,
        "delayed": False,
        "layers": stablegrad_optax.per_leaf,
    }
    kinds = [parameter.kind for parameter in parameters.values()]
    assert kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD, *[inspect.Parameter.KEYWORD_ONLY] * 7]
    assert issubclass(stablegrad_optax.StableGradState, tuple)
    update = inspect.signature(stablegrad_optax.stablegrad().update).parameters
    assert update["prediction_grad"].kind == inspect.Parameter.KEYWORD_ONLY
    assert isinstance(stablegrad_optax.stablegrad(), optax.GradientTransformationExtraArgs)
    assert jax.tree.structure(stablegrad_optax.stablegrad().init({})).num_leaves == 3
