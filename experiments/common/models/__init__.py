"""Flax NNX networks; images are NHWC."""

from common.models.small import SmallConvNet, SmallMLP

__all__ = ["SmallConvNet", "SmallMLP"]
