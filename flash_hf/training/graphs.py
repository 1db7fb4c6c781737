# SPDX-License-Identifier: Apache-2.0
"""Training steps as CUDA graphs: a small model on a fast GPU computes faster than Python issues its kernels."""

import contextlib
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor, nn
from transformers.utils import logging


logger = logging.get_logger(__name__)


class GraphedBackward:
    """Loss and gradients of batches of one shape, recorded once as a CUDA graph and then replayed.

    Batches of another shape are computed as usual; when several have come in a row, a graph of theirs takes the place
    of the old one. The numbers are those of `compute`. The graph keeps the memory of its activations between steps.

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
        compute: from a batch to its loss, detached; adds to the gradients, as `loss.backward()` does. It may launch
            kernels but not read from the device, and what it takes from anywhere but the batch is recorded as it was.
        parameters: those that get gradients.
        warmup: batches of a shape that are computed as usual first; in these, kernels are compiled.

    Attributes:
        refusals: why there is no graph, by the shape that it could not be recorded for.
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
        """The loss of a batch, and gradients added to those of the parameters.

        Args:
            batch: tensors on the CUDA device.
            key: whatever else `compute` depends on: a graph is not replayed for another key.
        """
        shape = key, tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))
        if self.graph is None or shape != self.shape:
            self._came = self._came + 1 if shape == self._coming else 1
            self._coming = shape
            if self._came <= self.warmup or shape in self.refusals or not self._record(batch, shape):
                return self.compute(batch)
        self._coming = None
        for name, x in self.inputs.items():
            x.copy_(batch[name], non_blocking=True)
        # A replay writes its gradients anew: what earlier batches of this step left there has to be added.
        held = [None if p.grad is None else p.grad.clone() if p.grad is own else p.grad for p, own in self.gradients]
        self.graph.replay()
        for (parameter, own), before in zip(self.gradients, held, strict=True):
            parameter.grad = own if before is None else before.add_(own)
        return self.loss.clone()

    def _record(self, batch: dict[str, Tensor], shape: Hashable) -> bool:
        self.graph = self.shape = None
        self.inputs = {name: x.clone() for name, x in batch.items()}
        held = [p.grad for p in self.parameters]
        before, random = torch.cuda.current_stream(), torch.cuda.get_rng_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        try:
            # First without a graph, and whatever waits for the device raises: within a recording it would break more
            # than itself.
            with torch.cuda.stream(stream), waiting_is_an_error():
                self._compute_anew()
            torch.cuda.set_rng_state(random)  # as if that had not been
            with torch.cuda.graph(graph, stream=stream):
                self.loss = self._compute_anew()
            self.gradients = [(p, p.grad) for p in self.parameters if p.grad is not None]
            self.graph, self.shape = graph, shape
        except Exception as error:  # whatever the model does that a graph cannot hold
            self.refusals[shape] = reason_of(error)
            logger.warning(
                f"No CUDA graph of training steps: {self.refusals[shape]} They are issued one by one, which gives the "
                "same numbers."
            )
            # A recording that was broken off leaves its stream, and a generator that believes to be recorded still.
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

    def _compute_anew(self) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        return self.compute(self.inputs)


@contextlib.contextmanager
def waiting_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def reason_of(error: BaseException) -> str:
    """The first error of a chain in one line: those after it come from cleaning up."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
