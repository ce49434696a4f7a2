"""XLA's TPU compiler, which is in the package libtpu and runs without a TPU."""

import os

import numpy as np


def devices(topology: str) -> np.ndarray:
    """The devices of a topology such as "v5p:2x2x1", for a mesh to compile for."""
    # Read by libtpu when it is loaded.
    os.environ |= {
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    from jax.experimental import topologies

    return np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def entry_of(text: str) -> str:
    """The entry computation of a compiled module's text: what every run of it runs."""
    entry = text[text.index("\nENTRY") :]
    return entry[: entry.index("\n}")]
