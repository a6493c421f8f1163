"""Distillation: a teacher's outputs as targets beside the labels, whatever the method."""

from typing import Any, NamedTuple

import jax
import ml_collections
import optax

PyTree = Any


class Teacher(NamedTuple):
    """Weights of the teacher, a network like the student; no part of the run's state."""

    params: PyTree
    batch_stats: PyTree


class Distillation(NamedTuple):
    """How much the teacher counts."""

    share: float  # a, of the loss, from 0 to 1
    temperature: float  # T, by which both networks' logits are divided

    def blend(self, losses: jax.Array, logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
        """Returns `(1 - a) losses + a T^2 KL(teacher || student)`, both softened by T.

        The divergence's gradient falls as `1 / T^2`, so that the factor keeps the two in balance.

        Args:
          losses: of the labels, one per image.
          logits: of the student, with a last axis of classes.
          teacher_logits: likewise.

        Returns:
          Array of the shape of `losses`.

        Reference: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
        """
        soft, targets = (
            jax.nn.log_softmax(x / self.temperature, axis=-1) for x in (logits, teacher_logits)
        )
        divergence = optax.losses.kl_divergence_with_log_targets(soft, targets)
        return (1 - self.share) * losses + self.share * self.temperature**2 * divergence


def distillation(config: ml_collections.FrozenConfigDict) -> Distillation | None:
    """Returns the config's settings; None if there is no teacher, or it counts nothing."""
    if config.phase == "pretrain" or not config.teacher or not config.distillation:
        return None
    return Distillation(config.distillation, config.temperature)
