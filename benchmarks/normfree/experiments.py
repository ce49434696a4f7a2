"""The experiments with deep networks whose normalization layers were left out."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from benchmarks.arms import (
    ADAMW_PEERS,
    ARMS,
    PEERS,
    Arm,
    changed,
    compressor_arm,
    in_range,
    stablegrad_arm,
)
from benchmarks.experiment import Experiment, part_of
from benchmarks.normfree.convnets import NETWORKS, ConvNet
from benchmarks.normfree.networks import DeepNetwork
from benchmarks.normfree.task import ClassificationTask, ConvolutionTask, TextTask
from benchmarks.normfree.transformer import Transformer


def _for_classifiers(arm: Arm) -> Arm:
    """The arm with a sweep that starts higher with SGD: a few hundred steps have to do."""
    if arm.base != "sgd":
        return arm
    if ("reference", "prediction") in arm.options or arm.scaling == "agc":
        return replace(arm, first_rate=1e-3)
    is_unit = arm.scaling in ("stablegrad", "z_normalized", "compressor")
    return replace(arm, first_rate=1e-5) if is_unit else arm


_ARMS = tuple(
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


_DEPTH = Experiment(
    "normfree-depth",
    "which optimizer trains deep classifiers without normalization",
    # What can be trained at all: python -m benchmarks.normfree.starts
    _digits("residual 50", "plain 50", "residual 150", "plain 20"),
    _ARMS,
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
            *(stablegrad_arm("muon", decay=0.0, balance=balance) for balance in (0.5, 1.0)),
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
        *(ARMS[f"{name}_adamw"] for name in ("block_rms", "block_normalized", "z_normalized")),
    )
)

_TEXT_SCREEN = replace(
    _DEPTH,
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
    """Some arms of a screen, on its first task, in more steps and on more seeds."""
    return replace(
        part_of(screen, arms),
        name=name,
        about=about,
        tasks=screen.tasks[:1],
        steps=2000,
        tuning_seeds=_DEPTH.tuning_seeds,
        reported_seeds=_DEPTH.reported_seeds,
    )


_TEXT = _longer(
    _TEXT_SCREEN,
    "normfree-transformer",
    "which optimizer trains a decoder of 12 blocks without LayerNorm",
    (
        *("adamw", "clip_adamw", "stablegrad-adamw-fixed-d0.0-b1.0"),
        # What was chosen on residual classifiers.
        "stablegrad-adamw-fixed-d0.9-b0.5-a0.0",
    ),
)

# Ideas for SGD, which has the layers' norms in its steps, and for AdamW, which does not.
_VARIANTS = tuple(
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
_TO_CONFIRM = tuple(
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
_DEEPER = tuple(
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

_ALL = tuple(dict.fromkeys((*_TO_CONFIRM, *_MEMORY, *_ARMS)))

EXPERIMENTS: tuple[Experiment, ...] = (
    _DEPTH,
    replace(
        _DEPTH,
        name="normfree-variants",
        about="whether equal norms, or a slow release, do better on networks of 50 layers",
        tasks=_digits("residual 50", "plain 50"),
        arms=_VARIANTS,
    ),
    replace(
        _DEPTH,
        name="normfree-confirm",
        about="whether what did well on 50 layers does so on other networks",
        tasks=_digits("residual 150", "plain 20", "residual 300"),
        arms=_TO_CONFIRM,
    ),
    replace(
        _DEPTH,
        name="normfree-gelu",
        about="whether it holds with another activation",
        tasks=_digits("residual 50", "plain 50", activation="gelu"),
        arms=_ALL,
    ),
    replace(
        _DEPTH,
        name="normfree-deeper",
        about="whether it holds with 150 layers, plain, and residual with GELU",
        tasks=(
            *_digits("plain 150"),
            *_digits("residual 150", activation="gelu", initialization="quarter_variance"),
        ),
        arms=_DEEPER,
    ),
    replace(
        _DEPTH,
        name="normfree-scaled",
        about="whether it holds where 300 residual layers stay within float32",
        tasks=_digits("residual 150", "residual 300", initialization="quarter_variance"),
        arms=_ALL,
    ),
    replace(
        _DEPTH,
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
        _DEPTH,
        name="normfree-memory",
        about="the control of attack: the same memory without it",
        tasks=_digits("residual 50", "residual 150"),
        arms=_MEMORY,
    ),
    replace(
        _DEPTH,
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
        _DEPTH,
        name="normfree-like-agc",
        about="what AGC has ahead of StableGrad with SGD on 150 layers",
        tasks=_digits("residual 150", "residual 50"),
        arms=_LIKE_AGC,
    ),
    replace(
        _DEPTH,
        name="normfree-per-unit",
        about="what a scale for each unit, or RMS, does on easier and deeper networks",
        tasks=_digits("residual 150", "residual 300", initialization="quarter_variance"),
        arms=tuple(arm for arm in _LIKE_AGC if arm.scaling in ("per_unit", "of_rms")),
    ),
    _IMAGES,
    replace(
        _IMAGES,
        name="normfree-images-he",
        about="whether ResNet-50 needs more from torchvision's start, with which gradients grow",
        tasks=(
            ConvolutionTask(
                "fashion_mnist", ConvNet("resnet50", initialization="he_fan_out"), batch=32
            ),
        ),
        arms=part_of(
            _IMAGES,
            (
                *("adamw", "adamw_eps", "clip_adamw", "sgd", "clip_sgd"),
                *(
                    f"stablegrad-{base}-fixed-d0.0-b{balance}"
                    for base, balance in product(("adamw", "sgd"), (0.5, 1.0))
                ),
            ),
        ).arms,
    ),
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
        "whether 48 blocks that do not explode at their start need anything in front of AdamW",
        ("adamw", "clip_adamw", "stablegrad-adamw-fixed-d0.0-b1.0"),
    ),
    replace(
        _TEXT,
        name="normfree-transformer-layernorm",
        about="what the same decoders come to with LayerNorm",
        tasks=tuple(TextTask(Transformer(depth, layer_norm=True)) for depth in (12, 48)),
        arms=(ARMS["adamw"],),
    ),
)
