"""All experiments by name, in the order in which they are listed."""

from benchmarks.experiment import Experiment
from benchmarks.normfree import experiments as normfree
from benchmarks.pinn import experiments as pinn

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment for experiment in (*pinn.EXPERIMENTS, *normfree.EXPERIMENTS)
}
