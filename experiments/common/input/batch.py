"""What a batch is: the labels that are not classes, the types, and a data set as batches."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_collections
import numpy as np

if TYPE_CHECKING:  # the processes that decode photos import this module and need no jax
    import jax

PADDING = -1  # label of the images that fill up the last batch of an evaluation
UNREADABLE = -2  # label of an image that could not be read or decoded; the image is black

# "image": what a `Preprocess` takes; "label": int32, shape=(batch,), negative where there is no
# image to learn from. Of text, both are tokens, shape=(batch, length). In a `HostBatch` both are
# numpy arrays.
Batch = Mapping[str, Any]
HostBatch = dict[str, np.ndarray]
# Maps a batch and a random key to the network's input.
Preprocess = Callable[[Batch, "jax.Array"], "jax.Array"]


class Loader(NamedTuple):
    """A data set as this host's batches."""

    train_images: int
    eval_images: int
    train: Callable[[int], Iterator[HostBatch]]  # endless, from the given step on
    # One pass over the data, or over the given number of images spread evenly over it.
    evaluate: Callable[[int | None], Iterator[HostBatch]]
    train_preprocess: Preprocess
    eval_preprocess: Preprocess
    # Likewise of the test images, where `evaluate` has validation images; None: they are the same.
    test: Callable[[int | None], Iterator[HostBatch]] | None = None

    def evaluation(self, test: bool = False) -> Callable[[int | None], Iterator[HostBatch]]:
        """Returns `evaluate`, or what gives the test images."""
        return (test and self.test) or self.evaluate


def eval_batch_size(config: ml_collections.ConfigDict) -> int:
    """Images evaluated at a time, over all hosts; `config.eval_batch_size` of 0: `batch_size`."""
    return config.get("eval_batch_size", 0) or config.batch_size
