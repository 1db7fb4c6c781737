# SPDX-License-Identifier: Apache-2.0
"""Training steps as CUDA graphs, for small models, whose kernels a fast GPU finishes before Python launches more."""

import contextlib
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn
from transformers.utils import logging


logger = logging.get_logger(__name__)


class GraphedBackward:
    """Compute loss and gradients of batches of one shape by a CUDA graph, captured once and then replayed.

    Batches of another shape are computed without it; after several of them in a row, a new graph replaces the old one.
    Results equal those of `compute`. The graph keeps the memory of its activations between steps.

    ```python
    def compute(batch):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    step = GraphedBackward(compute, model.parameters())
    loss = step({"input_ids": ids, "labels": ids})  # then clip, optimizer.step() and optimizer.zero_grad() as usual
    ```

    Args:
        compute: takes a batch, adds to the gradients as `loss.backward()` does, and returns the detached loss. It may
            launch kernels but not read from the device; values from outside the batch are captured as they are.
        parameters: the parameters that get gradients.
        warmup: batches of a shape to compute without a graph first, in which kernels are compiled.

    Attributes:
        refusals: for each shape that could not be captured, the reason.
    """

    def __init__(
        self, compute: Callable[[dict[str, Tensor]], Tensor], parameters: Iterable[nn.Parameter], warmup: int = 3
    ):
        self.compute, self.parameters, self.warmup = compute, list(parameters), warmup
        self.refusals: dict[Hashable, str] = {}
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shape: Hashable = None
        self._coming, self._came = None, 0

    def __call__(self, batch: dict[str, Tensor], key: Hashable = None) -> Tensor:
        """Add the gradients of a batch to those of the parameters, and return its loss.

        Args:
            batch: tensors on the CUDA device.
            key: anything else that `compute` depends on; a graph is only replayed for its own key.
        """
        shape = key, tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))
        if self.graph is None or shape != self.shape:
            self._came = self._came + 1 if shape == self._coming else 1
            self._coming = shape
            if self._came <= self.warmup or shape in self.refusals or not self._capture(batch, shape):
                return self.compute(batch)
        self._coming = None
        for name, x in self.inputs.items():
            x.copy_(batch[name], non_blocking=True)
        # A replay overwrites its gradients, so add those of earlier batches in this step.
        held = [None if p.grad is None else p.grad.clone() if p.grad is own else p.grad for p, own in self.gradients]
        self.graph.replay()
        for (parameter, own), before in zip(self.gradients, held, strict=True):
            parameter.grad = own if before is None else before.add_(own)
        return self.loss.clone()

    def _capture(self, batch: dict[str, Tensor], shape: Hashable) -> bool:
        self.graph = self.shape = None
        self.inputs = {name: x.clone() for name, x in batch.items()}
        held = [p.grad for p in self.parameters]
        before, random = torch.cuda.current_stream(), torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        try:
            # Try without a graph first, with an error wherever the host waits for the device: during a capture it
            # would leave CUDA in a bad state.
            with torch.cuda.stream(stream), error_on_sync():
                self._compute_fresh()
            torch.cuda.set_rng_state(random)
            with torch.cuda.graph(graph, stream=stream):
                self.loss = self._compute_fresh()
            self.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
            self.graph, self.shape = graph, shape
        except Exception as error:  # anything in the model that cannot be captured
            self.refusals[shape] = reason_of(error)
            logger.warning(f"Training steps run without a CUDA graph, with the same results: {self.refusals[shape]}")
            # An aborted capture leaves the current stream switched and the RNG in capture mode; restore both.
            torch.cuda.set_stream(before)
            generator = torch.Generator("cuda")
            generator.set_state(random)
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(
                generator.graphsafe_get_state()
            )
        before.wait_stream(stream)
        for parameter, grad in zip(self.parameters, held, strict=True):
            parameter.grad = grad
        return self.graph is not None

    def _compute_fresh(self) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        return self.compute(self.inputs)


@contextlib.contextmanager
def error_on_sync():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def reason_of(error: BaseException) -> str:
    """The first error of a chain, in one line; later ones come from cleaning up."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
