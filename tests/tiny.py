"""Models the command-line tests name as `tiny:callable`."""

from torch import nn


def sequential() -> nn.Sequential:
    """Returns the seed's network."""
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


def not_a_model() -> int:
    """Returns something else."""
    return 3
