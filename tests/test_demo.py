"""The demo, as a program."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from matplotlib.image import imread

from benchmarks import demo
from benchmarks.demo import ARMS
from benchmarks.history import train
from benchmarks.pinn.problems import PROBLEMS

ROOT = Path(__file__).parents[1]
TINY = ("--depth", "2", "--width", "4", "--seeds", "2", "--steps", "4")

# A shell that started the test run in the background may have made children ignore SIGINT.
PROGRAM = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("benchmarks.demo", run_name="__main__", alter_sys=True)
"""


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(autouse=True)
def any_learning_rate(monkeypatch):
    """The sizes here are not those that were tuned."""
    monkeypatch.setattr(demo, "tuned_learning_rate", lambda *_: 1e-3)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_demo_prints_a_table_and_writes_a_picture(problem, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "new" / "picture.png"
    arms = ["adam", "stablegrad_sgd"] if problem == "burgers" else ["stablegrad_sgd"]
    arguments = ["--problem", problem, *TINY, "--arms", *arms, "--out", str(out)]
    assert demo.main(arguments) == 0
    text = capsys.readouterr().out
    for arm in arms:
        assert ARMS[arm].label in text
    for heading in ("rel. L2", "solved", "memory", "time"):
        assert heading in text
    assert f"python -m benchmarks.demo --problem {problem} --depth 2" in text
    assert imread(out).shape[1] >= 1500


@pytest.mark.standard_promotion
def test_diverged_seeds_are_in_the_table_and_do_not_break_the_picture(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(demo, "tuned_learning_rate", lambda *_: 1e30)
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "picture.svg"
    assert demo.main([*TINY, "--arms", "stablegrad_sgd", "--out", str(out)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "0%" in line)
    assert row.split()[4:7] == ["inf", "inf-inf", "0%"]
    assert out.exists()


def test_the_demo_needs_nothing_that_its_extra_does_not_install():
    """Of what the tests import, these are in other extras."""
    others = ("sklearn", "scipy.stats", "flax", "grain", "mlxtend", "pandas")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({others}))"
    subprocess.run(
        [sys.executable, "-c", f"{blocked}; import benchmarks.demo"], cwd=ROOT, check=True
    )


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        demo.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for option in ("--problem", "--depth", "--width", "--seeds", "--steps", "--arms", "--out"):
        assert option in text


def test_the_command_to_repeat_it_has_the_python_of_this_folders_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert demo.command(demo.parse([])).startswith(".venv/bin/python -m benchmarks.demo --problem ")


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["--problem", "heat"], "burgers, poisson, helmholtz"),
        (["--depth", "0"], "a whole number from 2 to 99"),
        (["--width", "1.5"], "a whole number from 1 to 1024"),
        (["--seeds", "many"], "a whole number from 1 to 64"),
        (["--steps", "-3"], "a whole number from 1 to 1000000"),
        (["--arms", "adam", "lion"], ", ".join(ARMS)),
        (["--out", "picture.bmp"], ".png, .pdf, .svg"),
        (["--out", f"{__file__}/picture.png"], "choose another"),
        (["--speed", "9"], "--speed"),
    ],
)
def test_a_bad_value_gets_one_line_that_names_the_choices(arguments, choices, capsys):
    with pytest.raises(SystemExit) as exit_info:
        demo.main(arguments)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("demo: error: ")
    assert error.count("\n") == 1
    assert choices in error.replace("'", "")  # Python before 3.12 quotes each choice


def test_an_interrupt_still_prints_the_table_and_writes_the_picture(tmp_path):
    out = tmp_path / "picture.png"
    with start([*TINY, "--arms", "adam", "adam_eps", "--out", str(out)]) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("Adam: ") for line in lines)
        process.send_signal(signal.SIGINT)
        text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted" in text
    assert "solved" in text
    assert "Traceback" not in text + errors
    assert out.exists()


@pytest.mark.standard_promotion
def test_an_arm_that_is_cut_short_is_marked(tmp_path, capsys, monkeypatch):
    def interrupted(task, arm, learning_rate, seeds, steps, on_chunk):
        def interrupt(history):
            signal.raise_signal(signal.SIGINT)
            on_chunk(history)

        return train(task, arm, learning_rate, seeds, steps, interrupt)

    monkeypatch.setattr(demo, "train", interrupted)
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "picture.png"
    handler = signal.getsignal(signal.SIGINT)
    assert demo.main([*TINY, "--out", str(out)]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    text = capsys.readouterr().out
    assert "1 of 4" in text
    assert ARMS["clip_adam"].label not in text
    assert out.exists()


def test_an_interrupt_before_any_result_ends_quietly(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    out = tmp_path / "picture.png"
    assert demo.main([*TINY, "--out", str(out)]) == 130
    assert "Interrupted" in capsys.readouterr().out
    assert not out.exists()


def test_an_interrupt_marks_the_bar_of_the_arm_that_was_training(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # a terminal, to rich
    monkeypatch.setenv("COLUMNS", "80")
    assert demo.main([*TINY, "--out", str(tmp_path / "picture.png")]) == 130
    *_, last_bars = capsys.readouterr().out.split("\x1b[2K")
    assert [line.split()[0] for line in last_bars.splitlines()[:3]] == [
        "Adam",
        "interrupted",
        "Adam,",
    ]
