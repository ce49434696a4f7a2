"""The experiments with physics-informed networks."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from benchmarks.arms import ARMS, PEERS, Arm, compressor_arm, stablegrad_arm, variant_arm
from benchmarks.experiment import Experiment
from benchmarks.pinn.networks import Network
from benchmarks.pinn.problems import PROBLEMS
from benchmarks.pinn.task import PREDICTIONS, PinnTask


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

EXPERIMENTS: tuple[Experiment, ...] = (
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
            replace(stablegrad_arm("sgd", "prediction", decay=0.0, balance=0.5), first_rate=1e-4),
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
)
