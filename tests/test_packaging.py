"""The wheel: what is in it, what it needs, and that it imports with nothing else installed."""

import email.message
import email.parser
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import stablegrad_optax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stablegrad_optax"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("wheel"))


def built(out: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", f"--outdir={out}", ROOT]
    environment = {**os.environ, **environment}
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    return metadata_of(wheel)


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def requirements(lines: list[str]) -> set[str]:
    """The names of the distributions required without an extra, in normal form."""
    unconditional = (line for line in lines if "extra ==" not in line)
    return {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in unconditional}


def test_wheel_holds_the_package_its_license_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"stablegrad_optax-{stablegrad_optax.__version__}.dist-info/"
    modules = {f"stablegrad_optax/{path.name}" for path in PACKAGE.glob("*.py")}
    assert "stablegrad_optax/_stablegrad.py" in modules
    assert {n for n in names if not n.startswith(info)} == modules | {"stablegrad_optax/py.typed"}
    assert f"{info}licenses/LICENSE" in names


def test_wheel_has_the_version_of_the_package(metadata: email.message.Message) -> None:
    assert metadata["Version"] == stablegrad_optax.__version__


def test_a_released_readme_links_to_the_files_of_its_tag(tmp_path: Path) -> None:
    repository = "https://example.org/owner/name"
    readme = metadata_of(built(tmp_path, REPOSITORY_URL=f"{repository}/")).get_payload()
    tag = f"v{stablegrad_optax.__version__}"
    assert f"]({repository}/raw/{tag}/docs/images/demo_burgers.png)" in readme
    assert f"]({repository}/blob/{tag}/docs/when.md)" in readme
    links = re.findall(r"\]\(([^)]+)\)", str(readme))
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_readme_of_a_wheel_is_that_of_the_repository(metadata: email.message.Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text().strip()


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {stablegrad_optax.__version__}\n" in citation


def test_wheel_states_license_and_python_floor(metadata: email.message.Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_wheel_requires_jax_and_optax_alone_each_with_a_floor(
    metadata: email.message.Message,
) -> None:
    lines = metadata.get_all("Requires-Dist", [])
    runtime = [line for line in lines if "extra ==" not in line]
    assert requirements(lines) == {"jax", "optax"}
    assert all(re.fullmatch(r"\w+>=[\d.]+", line) for line in runtime)


def test_wheel_imports_where_only_jax_and_optax_are_installed(wheel: Path, tmp_path: Path) -> None:
    distributions, names = dict[str, importlib.metadata.Distribution](), {"jax", "optax"}
    while names := names - distributions.keys():
        distributions |= {name: importlib.metadata.distribution(name) for name in names}
        names = {n for d in distributions.values() for n in requirements(d.requires or [])}
    packages = tmp_path / "packages"
    packages.mkdir()
    for distribution in distributions.values():
        for top in {path.parts[0] for path in distribution.files or []} - {".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)

    script = (
        f"import sys; sys.path.append({str(packages)!r}); import stablegrad_optax as package; "
        "print(package.__file__, all(hasattr(package, name) for name in package.__all__))"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(packages / "stablegrad_optax/__init__.py"), "True"]


def test_make_help_lists_every_command() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    # Without what an outer `make test` leaves in the environment for inner ones.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        ["make", "help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    listed = re.findall(r"^make ([\w-]+) +\S", result.stdout, re.MULTILINE)
    assert listed == targets.split()
