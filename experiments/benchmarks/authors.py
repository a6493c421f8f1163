"""The authors' PyTorch step (dooseokjeong/CBP) on the tensors of our benchmarks, from a clone.

None of their code is here: their `module.py` is imported from the clone, and called as their
training loop calls it in a step: every layer's constraint, the sum of the Lagrangian, the backward
pass through both, gradient clipping, the optimizer, the clamp. The loss's gradient is given, as in
ours.
"""

import importlib.util
import pathlib
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import jax
import numpy as np

PyTree = Any
PLAIN = "PyTorch SGD with momentum"
# Their names for the constraints.
_MODES = {"binary": "bin", "ternary": "ter", "one_bit_shift": "1bit", "two_bit_shift": "2bit"}
_WINDOW = 5


def load(clone: str) -> ModuleType:
    """Imports their module, which asks for CUDA by name, for whatever device there is."""
    import torch

    path = pathlib.Path(clone) / "module.py"
    if not path.is_file():
        raise FileNotFoundError(f"no module.py in {clone}: give a clone of dooseokjeong/CBP")
    if not torch.cuda.is_available():
        tensor_class: Any = torch.Tensor
        tensor_class.cuda = lambda self, *args, **kwargs: self
    spec = importlib.util.spec_from_file_location("authors_module", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _to_torch(tree: PyTree) -> list[Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [torch.from_numpy(np.array(leaf)).to(device) for leaf in jax.tree.leaves(tree)]


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def steps(
    clone: str, params: PyTree, grads: PyTree, mask: PyTree, constraints: Iterable[str], count: int
) -> dict[str, Callable[[], list[Any]]]:
    """Returns their plain step and their step under each constraint.

    A call takes `count` steps and returns the tensors.
    """
    import torch

    module = load(clone)
    flags = jax.tree.leaves(mask)

    def make(constraint: str | None) -> Callable[[], list[Any]]:
        tensors, gradients = _to_torch(params), _to_torch(grads)
        decay = 1e-4 if constraint else 0.0
        optimizer = torch.optim.SGD(tensors, lr=1e-3, momentum=0.9, weight_decay=decay)
        pairs = zip(tensors, flags, strict=True)
        chosen = [tensor for tensor, flag in pairs if flag and constraint]
        layer = module.QLinear(2, 2, mode=_MODES[constraint]) if constraint else None
        scales = [tensor.abs().mean().reshape(1) for tensor in chosen]
        multipliers = [torch.full_like(tensor, 1e-3) for tensor in chosen]
        for tensor in chosen:
            tensor.requires_grad_()

        def step() -> None:
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient.clone() if constraint else gradient
            if layer is not None:
                total = torch.zeros(1, device=tensors[0].device)
                for w, scale, multiplier in zip(chosen, scales, multipliers, strict=True):
                    violation = module.constraint.apply(
                        w, scale, layer.factor, layer.b, 1 - 1 / _WINDOW
                    )
                    total = total + (violation * multiplier).sum()
                total.backward()
                torch.nn.utils.clip_grad_value_(tensors, clip_value=1)
            optimizer.step()
            for w in chosen:
                w.data.clamp_(min=-1, max=1)

        def run() -> list[Any]:
            for _ in range(count):
                step()
            _wait()
            return tensors

        return run

    return {PLAIN: make(None)} | {f"their step, {name}": make(name) for name in constraints}


def quantizers(
    clone: str, params: PyTree, mask: PyTree, constraints: Iterable[str]
) -> dict[str, Callable[[], None]]:
    """Returns their forward quantizer under each constraint, on all constrained tensors."""
    import torch

    module = load(clone)
    pairs = zip(_to_torch(params), jax.tree.leaves(mask), strict=True)
    chosen = [tensor for tensor, flag in pairs if flag]
    scales = [tensor.abs().mean().reshape(1) for tensor in chosen]

    def make(constraint: str) -> Callable[[], None]:
        layer = module.QLinear(2, 2, mode=_MODES[constraint])

        def run() -> None:
            with torch.no_grad():
                for w, scale in zip(chosen, scales, strict=True):
                    module.Quantizetotal.apply(w, scale, layer.b, layer.df)
            _wait()

        return run

    return {f"their quantizer, {name}": make(name) for name in constraints}
