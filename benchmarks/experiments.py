"""The experiments, as data: which tasks, which arms, how many steps, which seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import numpy as np

from benchmarks.arms import (
    ADAMW_PEERS,
    ARMS,
    PEERS,
    Arm,
    changed,
    compressor_arm,
    in_range,
    stablegrad_arm,
    variant_arm,
)
from benchmarks.normfree.convnets import NETWORKS, ConvNet
from benchmarks.normfree.networks import DeepNetwork
from benchmarks.normfree.task import ClassificationTask, ConvolutionTask, TextTask
from benchmarks.normfree.transformer import Transformer
from benchmarks.pinn.networks import Network
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.pinn.task import PREDICTIONS, PinnTask
from benchmarks.training import Task


@dataclass(frozen=True)
class Experiment:
    """Every arm on every task: a sweep of learning rates, then the best of them on other seeds.

    Attributes:
        name: What it is called on the command line; its records have that name.
        about: What it asks, in one line.
        tasks: What is trained.
        arms: The optimizers.
        steps: Steps of each run.
        num_rates: Learning rates of a sweep, the same number for every arm, up from the arm's own
            lowest.
        rates_per_decade: How many of them there are in a decade.
        tuning_seeds: The seeds of the sweep.
        reported_seeds: The seeds on which the best learning rate is run; none if the sweep is all.
    """

    name: str
    about: str
    tasks: tuple[Task, ...]
    arms: tuple[Arm, ...]
    steps: int
    num_rates: int
    rates_per_decade: int
    tuning_seeds: tuple[int, ...]
    reported_seeds: tuple[int, ...] = ()

    def rates(self, arm: Arm) -> list[float]:
        """The learning rates of an arm's sweep."""
        powers = np.arange(self.num_rates) / self.rates_per_decade
        return [float(f"{rate:.3g}") for rate in arm.first_rate * 10.0**powers]


def with_settings(experiment: Experiment, settings: Mapping[str, str]) -> Experiment:
    """The experiment with other settings of its tasks and their networks, such as ``width``.

    Args:
        experiment: The experiment.
        settings: Values as text, by the name of the task's or the network's attribute.

    Raises:
        ValueError: A task has no such setting, or the value is none for it.
    """

    def changed(owner: Any) -> Any:
        mine = [field.name for field in fields(owner) if field.name in settings]
        return replace(
            owner, **{name: _parsed(name, getattr(owner, name), settings[name]) for name in mine}
        )

    def task(old: Any) -> Any:
        known = {
            field.name
            for owner in (old, old.network)
            for field in fields(owner)
            if isinstance(getattr(owner, field.name), int | float | str)
        }
        # What tells the tasks of an experiment apart, and what follows from the problem.
        known -= {"name", "inputs"}
        if unknown := sorted(settings.keys() - known):
            raise ValueError(
                f"{old.title} has no {', '.join(unknown)}: set one of {', '.join(sorted(known))}"
            )
        return replace(changed(old), network=changed(old.network))

    if not settings:
        return experiment
    # Tasks that differed in these settings alone are one now.
    return replace(experiment, tasks=tuple(dict.fromkeys(map(task, experiment.tasks))))


def part_of(experiment: Experiment, arms: Sequence[str] = (), title: str = "") -> Experiment:
    """The experiment with some of its arms and tasks alone.

    Args:
        experiment: The experiment.
        arms: Names of its arms; if none are given, all.
        title: Text that the titles of the tasks have in them.

    Raises:
        ValueError: An arm has none of the names, or no task has the text.
    """
    known = [arm.name for arm in experiment.arms]
    if unknown := [name for name in arms if name not in known]:
        raise ValueError(
            f"{experiment.name} has no arm {', '.join(unknown)}: choose of {', '.join(known)}"
        )
    found = tuple(task for task in experiment.tasks if title in task.title)
    if not found:
        titles = "; ".join(task.title for task in experiment.tasks)
        raise ValueError(f"{experiment.name} has no task with {title!r} in its title: {titles}")
    chosen = tuple(arm for arm in experiment.arms if not arms or arm.name in arms)
    return replace(experiment, arms=chosen, tasks=found)


def _parsed(name: str, old: Any, text: str) -> Any:
    """The text as a value of the same type; numbers are above 0."""
    if isinstance(old, bool):
        if text not in ("True", "False"):
            raise ValueError(f"{name}={text} is neither True nor False")
        return text == "True"
    if isinstance(old, str):
        return text
    what = "a whole number" if isinstance(old, int) else "a number"
    try:
        value = type(old)(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={text} is not {what} above 0")
    return value


def tasks(
    names: str, depths: Sequence[int], points: int = 128, width: int = 32, **options: str
) -> tuple[PinnTask, ...]:
    """Tasks for names such as ``"burgers poisson-soft"``, each at every depth."""
    activation = options.pop("activation", "tanh")
    initialization = options.pop("initialization", "glorot")

    def task(name: str, depth: int) -> PinnTask:
        problem, _, boundary = name.partition("-")
        network = Network(depth, width, activation, initialization)
        return PinnTask(PROBLEMS[problem], network, points, boundary or "exact", **options)

    return tuple(task(name, depth) for name, depth in product(names.split(), depths))


# The tasks on which settings are chosen, and those on which the choice is confirmed.
CHOOSING = "burgers poisson-soft helmholtz"
CONFIRMING = "burgers-soft poisson helmholtz-soft"

_GRID = tuple(
    stablegrad_arm(base, reference, decay=decay, balance=balance, delayed=delayed)
    for base, reference, delayed, decay, balance in product(
        ("adam", "adamw", "sgd", "muon"),
        (1.0, "prediction"),
        (False, True),
        (0.0, 0.5, 0.9, 0.99),
        (0.0, 0.5, 1.0),
    )
)
_VARIANTS = tuple(
    compressor_arm(base, **numbers)
    for base in ("adam", "sgd")
    for numbers in (
        *(
            {"attack": attack, "release": release, "largest_gain": gain, "balance": balance}
            for attack, release, gain, balance in product(
                (0.0,), (0.9, 0.99, 0.999), (1e30, 1.0), (0.0, 0.5, 1.0)
            )
        ),
        *({"attack": 0.0, "release": release} for release in (0.0, 0.9, 0.99)),
    )
)


def _for_screening(arm: Arm) -> Arm:
    """The arm with a sweep that starts where nothing was known yet."""
    unit = arm.base == "sgd" and (
        arm.scaling in ("z_normalized", "compressor")
        or (arm.scaling == "stablegrad" and ("reference", 1.0) in arm.options)
    )
    return replace(arm, first_rate=1e-6 if unit else 1e-4 if arm.base == "lamb" else 1e-5)


# What the screen leaves: each base optimizer, the best of its peers, the best settings of
# StableGrad and those it had before.
_KEPT = tuple(
    ARMS[name]
    for name in (
        *("adam", "adam_eps", "clip_adam", "z_normalized_adam", "block_normalized_adam"),
        *("novograd", "sgd", "clip_sgd", "gradient_stabilizer_sgd", "muon", "clip_muon"),
    )
)
_SETTINGS = tuple(
    stablegrad_arm(base, reference, decay=decay, balance=balance)
    for base, reference, settings in (
        ("adam", 1.0, ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.5, 0.5), (0.9, 1.0))),
        ("adam", "prediction", ((0.0, 1.0), (0.0, 0.0))),
        ("sgd", 1.0, ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5))),
        ("sgd", "prediction", ((0.0, 1.0), (0.0, 0.5), (0.9, 1.0))),
        ("muon", 1.0, ((0.0, 0.0), (0.5, 1.0), (0.9, 1.0))),
    )
    for decay, balance in settings
)

# What is to be confirmed: gains of this step, with and without the layers' own proportions, beside
# the rivals that did best and the defaults of before.
_TO_CONFIRM = (
    *(ARMS[name] for name in ("adam", "clip_adam", "sgd", "clip_sgd", "muon", "clip_muon")),
    ARMS["adam_eps"],
    *(
        stablegrad_arm(base, 1.0, decay=0.0, balance=balance)
        for base in ("adam", "sgd", "muon")
        for balance in (0.5, 1.0)
    ),
    stablegrad_arm("adam", 1.0, decay=0.9, balance=1.0),
)

BY_DEPTH = tuple(
    arm
    for base in ("adam", "sgd", "muon")
    for arm in (
        ARMS[base],
        ARMS[f"clip_{base}"],
        stablegrad_arm(base, 1.0, decay=0.0, balance=0.5),
        stablegrad_arm(base, 1.0, decay=0.0, balance=1.0),
    )
)
"""Each base optimizer alone, behind the strongest rival, and behind StableGrad as it is recommended
for PINNs and as it comes."""

_SCREEN = Experiment(
    "pinn-screen",
    "which settings of StableGrad, and which peers, are worth a longer look",
    tasks("burgers poisson-soft", (16,)),
    tuple(_for_screening(arm) for arm in (*PEERS, *_GRID, *_VARIANTS)),
    steps=1000,
    num_rates=5,
    rates_per_decade=1,
    tuning_seeds=(100, 101),
)
# Helmholtz is learned with Muon alone, so of the grid there is Muon's part.
_MUON_GRID = tuple(
    stablegrad_arm("muon", decay=decay, balance=balance)
    for decay, balance in product((0.0, 0.5, 0.9), (0.0, 0.5, 1.0))
)

DEMO = Experiment(
    "demo",
    "the learning rates of the demo",
    tasks("burgers poisson helmholtz", (16,), points=256),
    tuple(
        ARMS[name]
        for name in (
            *("adam", "adam_eps", "clip_adam", "stablegrad_adam", "stablegrad_sgd"),
            *("muon", "clip_muon", "stablegrad_muon"),
        )
    ),
    steps=2000,
    num_rates=8,
    rates_per_decade=2,
    tuning_seeds=(100, 101),
)

_DEPTH = Experiment(
    "pinn-depth",
    "which optimizer trains plain networks of depth 32 on a PDE",
    tasks(CHOOSING, (32,)),
    (*_KEPT, *_SETTINGS),
    steps=3000,
    num_rates=8,
    rates_per_decade=2,
    tuning_seeds=(100, 101),
    reported_seeds=tuple(range(16)),
)

_BY_DEPTH = replace(
    _DEPTH,
    name="pinn-by-depth",
    about="how the error grows with depth",
    tasks=tasks("burgers poisson-soft", (4, 8, 16, 32, 64)),
    arms=BY_DEPTH,
    reported_seeds=tuple(range(8)),
)

# Questions about details, on networks that a few thousand steps can train.
_SHALLOW = replace(_BY_DEPTH, steps=2000)


def _for_classifiers(arm: Arm) -> Arm:
    """The arm with a sweep that starts higher with SGD: a few hundred steps have to do."""
    if arm.base != "sgd":
        return arm
    if ("reference", "prediction") in arm.options or arm.scaling == "agc":
        return replace(arm, first_rate=1e-3)
    is_unit = arm.scaling in ("stablegrad", "z_normalized", "compressor")
    return replace(arm, first_rate=1e-5) if is_unit else arm


_NORMFREE_ARMS = tuple(
    _for_classifiers(arm)
    for arm in (
        *ADAMW_PEERS,
        *(arm for arm in PEERS if arm.base in ("sgd", "lamb", "novograd", "muon")),
        *(
            stablegrad_arm(base, reference, decay=0.0, balance=balance)
            for base, reference in product(("adamw", "sgd", "muon"), (1.0, "prediction"))
            if reference == 1.0 or base == "sgd"
            for balance in (0.0, 0.5, 1.0)
        ),
    )
)


def _digits(
    *names: str, activation: str = "relu", initialization: str = "lecun"
) -> tuple[ClassificationTask, ...]:
    """The digits, for networks by their shape and depth, such as ``"residual 50"``."""

    def task(name: str) -> ClassificationTask:
        shape, depth = name.split()
        network = DeepNetwork(
            int(depth), shape=shape, activation=activation, initialization=initialization
        )
        return ClassificationTask("digits", network)

    return tuple(map(task, names))


NORMFREE = Experiment(
    "normfree-depth",
    "which optimizer trains deep classifiers without normalization",
    # What can be trained at all: python -m benchmarks.normfree.starts
    _digits("residual 50", "plain 50", "residual 150", "plain 20"),
    _NORMFREE_ARMS,
    steps=600,
    num_rates=8,
    rates_per_decade=2,
    tuning_seeds=(100, 101),
    reported_seeds=tuple(range(5)),
)

# What did best with SGD on the residual classifiers of 50 layers.
_EQUAL_NORMS = stablegrad_arm("sgd", decay=0.9, attack=0.0, balance=1.0, equalize="norm")

# The lowest learning rates of the sweeps that do not start a decade above those for the classifiers
# of before, as factors of them: these networks do not explode at their start.
_CONVOLUTION_STARTS = {"sgd": 1000, "clip_sgd": 1}


def _for_convolutions(arm: Arm) -> Arm:
    arm = _for_classifiers(arm)
    usual = 1 if arm.base == "sgd" and arm.scaling == "stablegrad" else 10
    return replace(arm, first_rate=arm.first_rate * _CONVOLUTION_STARTS.get(arm.name, usual))


_IMAGES = Experiment(
    "normfree-images",
    "which optimizer trains ResNet-50 and EfficientNetV2-S without BatchNorm",
    tuple(ConvolutionTask("fashion_mnist", ConvNet(name), batch=32) for name in NETWORKS),
    tuple(
        _for_convolutions(arm)
        for arm in (
            *(ARMS[name] for name in ("adamw", "adamw_eps", "clip_adamw", "agc_adamw")),
            *(ARMS[name] for name in ("sgd", "clip_sgd", "muon", "clip_muon", "novograd")),
            *(ARMS[f"gradient_stabilizer_{base}"] for base in ("adamw", "sgd")),
            *(ARMS[f"{name}_adamw"] for name in ("block_rms", "block_normalized", "z_normalized")),
            ARMS["lamb"],
            *(
                stablegrad_arm(base, 1.0, decay=0.0, balance=balance)
                for base in ("adamw", "sgd")
                for balance in (0.0, 0.5, 1.0)
            ),
            # What did best on the residual classifiers of 50 and 150 layers.
            *(
                stablegrad_arm("adamw", decay=0.9, attack=0.0, balance=balance)
                for balance in (0.5, 1.0)
            ),
            _EQUAL_NORMS,
        )
    ),
    steps=600,
    num_rates=6,
    rates_per_decade=2,
    tuning_seeds=(100,),
    reported_seeds=(0, 1, 2),
)

# What interests most first. SGD alone diverges from where others start: gradients explode here.
_TEXT_ARMS = tuple(
    _for_classifiers(arm)
    for arm in (
        *(ARMS[name] for name in ("adamw", "clip_adamw")),
        *(stablegrad_arm("adamw", decay=0.0, balance=balance) for balance in (1.0, 0.5, 0.0)),
        *(
            stablegrad_arm("adamw", decay=0.9, attack=0.0, balance=balance)
            for balance in (1.0, 0.5)
        ),
        *(replace(ARMS["sgd"], first_rate=1e-9), ARMS["clip_sgd"]),
        *(stablegrad_arm("sgd", decay=0.0, balance=balance) for balance in (1.0, 0.5, 0.0)),
        *(
            stablegrad_arm("sgd", decay=0.9, attack=0.0, balance=1.0, equalize=equalize)
            for equalize in ("std", "norm")
        ),
        *(ARMS[name] for name in ("muon", "clip_muon")),
        *(stablegrad_arm("muon", decay=0.0, balance=balance) for balance in (1.0, 0.5)),
        *(ARMS[f"gradient_stabilizer_{base}"] for base in ("adamw", "sgd")),
        *(ARMS[name] for name in ("agc_adamw", "novograd", "lamb", "adamw_eps")),
    )
)

_TEXT_SCREEN = replace(
    NORMFREE,
    name="normfree-transformer-screen",
    about="which optimizers are worth a longer look at decoders without LayerNorm",
    tasks=tuple(TextTask(Transformer(depth)) for depth in (12, 48)),
    arms=_TEXT_ARMS,
    steps=500,
    tuning_seeds=(100,),
    reported_seeds=(0, 1, 2),
)
_SCALED_TEXT_SCREEN = replace(
    _TEXT_SCREEN,
    name="normfree-transformer-screen-scaled",
    about="the same where 48 blocks do not explode at their start",
    tasks=(TextTask(Transformer(48, initialization="scaled_residual")),),
    arms=tuple(replace(arm, first_rate=1e-4) if arm.name == "sgd" else arm for arm in _TEXT_ARMS),
)


def _longer(screen: Experiment, name: str, about: str, arms: Sequence[str]) -> Experiment:
    """What a screen kept, on its first task, in more steps and on more seeds."""
    return replace(
        part_of(screen, arms),
        name=name,
        about=about,
        tasks=screen.tasks[:1],
        steps=2000,
        tuning_seeds=NORMFREE.tuning_seeds,
        reported_seeds=NORMFREE.reported_seeds,
    )


_TEXT = _longer(
    _TEXT_SCREEN,
    "normfree-transformer",
    "which optimizer trains a decoder of 12 blocks without LayerNorm",
    (
        *("adamw", "clip_adamw", "clip_sgd", "clip_muon"),
        *("stablegrad-adamw-fixed-d0.0-b1.0", "stablegrad-adamw-fixed-d0.0-b0.5"),
        *("stablegrad-sgd-fixed-d0.0-b0.5", "stablegrad-muon-fixed-d0.0-b1.0"),
        # What was chosen on residual classifiers.
        "stablegrad-adamw-fixed-d0.9-b0.5-a0.0",
    ),
)

# Ideas for SGD, which has the layers' norms in its steps, and for AdamW, which does not.
_NORMFREE_VARIANTS = tuple(
    _for_classifiers(
        compressor_arm(base, attack=0.0, release=release, balance=balance, norm_power=p)
    )
    for base, powers, releases in (
        ("sgd", (0.0, 0.5, 1.0), (0.0, 0.9)),
        ("adamw", (0.0,), (0.9, 0.99)),
    )
    for p, release, balance in product(powers, releases, (1.0, 0.5))
    if p or release  # without either it is StableGrad
)

# What the two networks of 50 layers and the variants suggested, beside the rivals that won there.
_NORMFREE_TO_CONFIRM = tuple(
    _for_classifiers(arm)
    for arm in (
        stablegrad_arm("sgd", decay=0.0, balance=1.0),
        stablegrad_arm("sgd", decay=0.0, balance=1.0, equalize="norm"),
        stablegrad_arm("sgd", decay=0.9, attack=0.0, balance=1.0),
        _EQUAL_NORMS,
        *(ARMS[f"{name}_sgd"] for name in ("gradient_stabilizer", "block_normalized", "clip")),
        stablegrad_arm("adamw", decay=0.0, balance=0.5),
        *(
            stablegrad_arm("adamw", decay=0.9, attack=0.0, balance=balance)
            for balance in (1.0, 0.5)
        ),
        *(ARMS[f"{name}_adamw"] for name in ("gradient_stabilizer", "clip")),
    )
)

# The control of attack: the same memory without it.
_MEMORY = tuple(
    _for_classifiers(stablegrad_arm(base, decay=0.9, balance=balance, equalize=equalize))
    for base, balance, equalize in (
        ("sgd", 1.0, "std"),
        ("sgd", 1.0, "norm"),
        ("adamw", 1.0, "std"),
        ("adamw", 0.5, "std"),
    )
)

# What AGC does with SGD and StableGrad does not: it moves small biases little, and steps in
# proportion to the weights. Its best rate in the sweep of normfree-depth is the highest.
_AGC = replace(ARMS["agc_sgd"], first_rate=1e-2)
_LIKE_AGC = (
    _AGC,
    changed(_AGC, "agc_eps", "eps 1"),
    changed(_for_classifiers(_EQUAL_NORMS), "without_biases", "biases stay 0"),
    *(
        replace(changed(arm, scaling, about), first_rate=first_rate)
        for scaling, about, first_rate in (
            ("per_unit", "a scale for each unit", 1e-3),
            ("of_rms", "RMS for std", 1e-5),
        )
        for arm in (
            _EQUAL_NORMS,
            stablegrad_arm("sgd", decay=0.0, balance=1.0, equalize="norm"),
        )
    ),
    replace(
        changed(_EQUAL_NORMS, "of_weights", "reference: RMS of the weights"),
        first_rate=1e-4,  # the weights' RMS is a fifth or so
    ),
)

# Each base optimizer alone or behind clipping, and the rivals and the settings that did best where
# gradients vanish and where they explode.
_NORMFREE_DEEPER = tuple(
    _for_classifiers(arm)
    for arm in (
        *(ARMS[name] for name in ("adamw", "adamw_eps", "clip_adamw", "z_normalized_adamw")),
        *(ARMS[f"{name}_adamw"] for name in ("agc", "gradient_stabilizer")),
        stablegrad_arm("adamw", decay=0.0, balance=1.0),
        stablegrad_arm("adamw", decay=0.9, attack=0.0, balance=0.5),
        *(ARMS[f"{name}_sgd"] for name in ("clip", "z_normalized", "block_normalized")),
        _EQUAL_NORMS,
        *(ARMS[name] for name in ("muon", "clip_muon")),
        *(stablegrad_arm("muon", decay=0.0, balance=balance) for balance in (1.0, 0.5)),
    )
)

_NORMFREE_ALL = tuple(dict.fromkeys((*_NORMFREE_TO_CONFIRM, *_MEMORY, *_NORMFREE_ARMS)))

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        DEMO,
        _SCREEN,
        replace(
            _SCREEN,
            name="pinn-screen-helmholtz",
            about="whether a third problem has anything to screen in so few steps",
            tasks=tasks("helmholtz", (16,)),
            arms=tuple(_for_screening(arm) for arm in dict.fromkeys((*BY_DEPTH, *_MUON_GRID))),
        ),
        _DEPTH,
        _BY_DEPTH,
        # In 3,000 steps Adam alone solves shallow networks on Poisson only.
        replace(
            _BY_DEPTH,
            name="pinn-by-depth-helmholtz",
            about="the same on Helmholtz, with more steps",
            tasks=tasks("helmholtz", (4, 8, 16, 32)),
            arms=(*BY_DEPTH, ARMS["adam_eps"]),
            steps=5000,
        ),
        replace(
            _BY_DEPTH,
            name="pinn-by-depth-burgers",
            about="the same on Burgers, with more steps",
            tasks=tasks("burgers", (4, 8, 16)),
            arms=(*BY_DEPTH, ARMS["adam_eps"]),
            steps=15_000,
        ),
        replace(
            _DEPTH,
            name="pinn-confirm",
            about="whether what was chosen holds on the other half of the problems",
            tasks=tasks(CONFIRMING, (16,)),
            arms=_TO_CONFIRM,
            steps=2000,
        ),
        replace(
            _BY_DEPTH,
            name="pinn-attack",
            about="whether scales that rise at once, and equal norms, do better on PINNs too",
            tasks=tasks("burgers poisson-soft", (16,)),
            arms=tuple(
                stablegrad_arm(base, decay=decay, attack=attack, balance=0.5, equalize=equalize)
                for base, equalize in (
                    ("adam", "std"),
                    ("sgd", "std"),
                    ("sgd", "norm"),
                    ("muon", "std"),
                )
                for decay, attack in ((0.0, None), (0.9, 0.0))
            ),
        ),
        replace(
            _BY_DEPTH,
            name="pinn-variants",
            about="whether other forms of the rule do better",
            tasks=tasks("burgers poisson-soft", (8,)),
            arms=tuple(
                variant_arm(base, scaling, balance=0.5, **options)
                for base in ("adam", "sgd")
                for scaling, options in (
                    ("of_modules", {}),
                    ("of_weights", {}),
                    ("warmed_up", {"warm_up": 300}),
                )
            ),
        ),
        replace(
            _SHALLOW,
            name="pinn-biases",
            about="whether to scale the biases or, as the paper does, the weights alone",
            tasks=tasks("burgers poisson-soft", (8,)),
            arms=tuple(
                stablegrad_arm(base, decay=0.0, balance=0.5, biases=biases)
                for base in ("adam", "sgd", "muon")
                for biases in (True, False)
            ),
        ),
        replace(
            _SHALLOW,
            name="pinn-prediction",
            about="which gradient to take for that of the prediction of a PINN",
            tasks=tuple(
                task
                for prediction in PREDICTIONS
                for task in tasks("burgers-soft poisson helmholtz", (8,), prediction=prediction)
            ),
            arms=(
                stablegrad_arm("adam", "prediction", decay=0.0, balance=0.5),
                # The scale of the field's gradient is small: SGD's usual sweep ends too low.
                replace(
                    stablegrad_arm("sgd", "prediction", decay=0.0, balance=0.5), first_rate=1e-4
                ),
            ),
        ),
        replace(
            _SHALLOW,
            name="pinn-reference",
            about="the control of the prediction's scale: a fixed one, and rivals",
            tasks=tasks("burgers-soft poisson helmholtz", (8,)),
            arms=tuple(
                arm
                for base in ("adam", "sgd")
                for arm in (
                    *(ARMS[base], ARMS[f"clip_{base}"]),
                    stablegrad_arm(base, decay=0.0, balance=0.5),
                )
            ),
        ),
        replace(
            _SHALLOW,
            name="pinn-networks",
            about="whether it holds with another activation and another initialization",
            tasks=tuple(
                task
                for activation, initialization in (
                    ("sin", "glorot"),
                    ("tanh", "activation_aware"),
                )
                for task in tasks(
                    "burgers poisson",
                    (8,),
                    activation=activation,
                    initialization=initialization,
                )
            ),
            arms=BY_DEPTH,
        ),
        NORMFREE,
        replace(
            NORMFREE,
            name="normfree-variants",
            about="whether equal norms, or a slow release, do better on networks of 50 layers",
            tasks=_digits("residual 50", "plain 50"),
            arms=_NORMFREE_VARIANTS,
        ),
        replace(
            NORMFREE,
            name="normfree-confirm",
            about="whether what did well on 50 layers does so on other networks",
            tasks=_digits("residual 150", "plain 20", "residual 300"),
            arms=_NORMFREE_TO_CONFIRM,
        ),
        replace(
            NORMFREE,
            name="normfree-gelu",
            about="whether it holds with another activation",
            tasks=_digits("residual 50", "plain 50", activation="gelu"),
            arms=_NORMFREE_ALL,
        ),
        replace(
            NORMFREE,
            name="normfree-deeper",
            about="whether it holds with 150 layers, plain, and residual with GELU",
            tasks=(
                *_digits("plain 150"),
                *_digits("residual 150", activation="gelu", initialization="quarter_variance"),
            ),
            arms=_NORMFREE_DEEPER,
        ),
        replace(
            NORMFREE,
            name="normfree-scaled",
            about="whether it holds where 300 residual layers stay within float32",
            tasks=_digits("residual 150", "residual 300", initialization="quarter_variance"),
            arms=_NORMFREE_ALL,
        ),
        replace(
            NORMFREE,
            name="normfree-range",
            about="the control of range: rivals whose norms do not overflow",
            tasks=(
                *_digits("residual 300", initialization="quarter_variance"),
                *_digits("residual 150"),
            ),
            arms=tuple(
                _for_classifiers(in_range(ARMS[name]))
                for name in (
                    *("clip_muon", "clip_adamw", "clip_sgd"),
                    *("block_normalized_adamw", "block_normalized_sgd"),
                )
            ),
        ),
        replace(
            NORMFREE,
            name="normfree-memory",
            about="the control of attack: the same memory without it",
            tasks=_digits("residual 50", "residual 150"),
            arms=_MEMORY,
        ),
        replace(
            NORMFREE,
            name="normfree-muon",
            about="whether scales that rise at once do better in front of Muon, too",
            tasks=_digits("residual 50", "residual 150"),
            arms=(
                *(
                    stablegrad_arm("muon", decay=0.9, attack=0.0, balance=balance)
                    for balance in (0.0, 0.5, 1.0)
                ),
                stablegrad_arm("muon", decay=0.9, balance=0.5),
            ),
        ),
        replace(
            NORMFREE,
            name="normfree-like-agc",
            about="what AGC has ahead of StableGrad with SGD on 150 layers",
            tasks=_digits("residual 150", "residual 50"),
            arms=_LIKE_AGC,
        ),
        replace(
            NORMFREE,
            name="normfree-per-unit",
            about="what a scale for each unit, or RMS, does on easier and deeper networks",
            tasks=_digits("residual 150", "residual 300", initialization="quarter_variance"),
            arms=tuple(arm for arm in _LIKE_AGC if arm.scaling in ("per_unit", "of_rms")),
        ),
        _IMAGES,
        replace(
            _IMAGES,
            name="normfree-images-batchnorm",
            about="what the same networks come to with BatchNorm",
            tasks=tuple(
                replace(task, network=replace(task.network, batch_norm=True))
                for task in _IMAGES.tasks
                if isinstance(task, ConvolutionTask)
            ),
            arms=tuple(arm for arm in _IMAGES.arms if arm.name in ("adamw", "sgd")),
        ),
        _TEXT_SCREEN,
        _SCALED_TEXT_SCREEN,
        _TEXT,
        _longer(
            _SCALED_TEXT_SCREEN,
            "normfree-transformer-scaled",
            "whether 48 blocks that do not explode at their start need an optimizer",
            (
                *("adamw", "clip_adamw", "stablegrad-adamw-fixed-d0.0-b1.0"),
                *("muon", "clip_muon", "stablegrad-muon-fixed-d0.0-b0.5"),
            ),
        ),
        replace(
            _TEXT,
            name="normfree-transformer-layernorm",
            about="what the same decoders come to with LayerNorm",
            tasks=tuple(TextTask(Transformer(depth, layer_norm=True)) for depth in (12, 48)),
            arms=(ARMS["adamw"],),
        ),
    )
}
