"""A step as two CUDA graphs: a thousand launches become two, where launching is what takes the time.

The first graph holds forward passes, loss, backward passes and the step's sums, the second what a network does after
the optimiser (clamps, and the gates of a search). The optimiser between them, whose learning rate changes, is a few
grouped launches and stays as it is. So graphs run the kernels that a plain step runs, in the same order on the same
numbers, and the weights are the same to the bit.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, cuda, nn

from harness.config import RunConfig
from harness.errors import UserError
from harness.ranks import Ranks

log = logging.getLogger(__name__)

Compute = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(images, labels) -> two tensors; leaves gradients in the parameters, which had none."""
After = Callable[[], None]
"""What follows the optimiser. Nothing in it may look at the device."""

# Plain steps on a side stream before a capture: libraries set themselves up, kernels are compiled.
_WARM_UP = 3


def obstacle(run: RunConfig, ranks: Ranks) -> str | None:
    """What keeps every stage of a run from being captured, or None."""
    for is_there, words in (
        (ranks.device.type != "cuda", "there is no GPU"),
        (ranks.world > 1, f"{ranks.world} ranks exchange gradients between launches"),
        (run.precision == "fp16", "run.precision = 'fp16' asks the GPU in every step whether a gradient overflowed"),
        (run.profile_steps > 0, "run.profile_steps wants to see single launches"),
    ):
        if is_there:
            return words
    return None


def _nothing_to_keep() -> Callable[[], None]:
    return lambda: None


@dataclass(frozen=True)
class PlainStep:
    """`compute`, and `after`, as they are. captures_after: whether `after` is worth a graph of its own.

    keep_aside: returns a function that undoes in Python what either did there since, for a capture that fails.
    """

    compute: Compute
    after: After
    captures_after: bool = False
    keep_aside: Callable[[], Callable[[], None]] = _nothing_to_keep

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Compute`."""
        return self.compute(images, labels)

    def finish(self) -> None:
        """Call after the optimiser's step."""
        self.after()


def graphed(
    step: PlainStep,
    parameters: Sequence[nn.Parameter],
    run: RunConfig,
    ranks: Ranks,
    stage: str,
    *,
    stage_obstacle: str | None = None,
) -> "PlainStep | GraphedStep":
    """`step`, as graphs where run.cuda_graph, the run and the stage allow; says in one line of log why not.

    Raises `UserError` if run.cuda_graph is true and no stage of this run can be captured.
    """
    if run.cuda_graph is False:
        return step
    reason = obstacle(run, ranks)
    if reason is not None and run.cuda_graph is True:
        raise UserError(f"run.cuda_graph = true cannot be: {reason}. Change that, or set run.cuda_graph = 'auto'")
    reason = reason or stage_obstacle
    if reason is None:
        return GraphedStep(step, parameters, ranks.device, must=run.cuda_graph is True)
    if ranks.main and ranks.device.type == "cuda":
        log.info("%s: no CUDA graph: %s", stage, reason)
    return step


class GraphedStep:
    """A step by replaying its graphs, made anew for every shape of the images after a few plain steps of that shape.

    What it returns is overwritten by the next call. `must`: a capture that fails is an error, not a remark in the log.
    """

    def __init__(
        self, step: PlainStep, parameters: Sequence[nn.Parameter], device: torch.device, *, must: bool
    ) -> None:
        self._compute, self._after, self._captures_after = step.compute, step.after, step.captures_after
        self._keep_aside = step.keep_aside
        self._parameters, self._must = list(parameters), must
        self._device, self._stream = device, cuda.Stream(device)
        self._shape: tuple[torch.Size, torch.dtype] | None = None
        self._graph: cuda.CUDAGraph | None = None
        self._after_graph: cuda.CUDAGraph | None = None
        self._is_given_up = False
        self._forget(None)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Compute`."""
        if self._is_given_up:
            return self._compute(images, labels)
        shape = (images.shape, images.dtype)
        if shape != self._shape:
            self._forget(shape)
        if self._plain_steps < _WARM_UP:
            self._plain_steps += 1
            return self._aside(images, labels)
        if self._graph is None:
            try:
                self._capture(images, labels)
            except Exception as error:
                if self._must:
                    raise
                self._give_up(error)
                return self._compute(images, labels)
        return self._replay(images, labels)

    def finish(self) -> None:
        """Call after the optimiser's step."""
        if self._graph is None or not self._captures_after:
            self._after()
            return
        if self._after_graph is None:
            try:
                self._after_graph = self._captured(self._after)
            except Exception as error:
                if self._must:
                    raise
                self._give_up(error)
                self._after()
                return
        self._after_graph.replay()

    def _forget(self, shape: tuple[torch.Size, torch.dtype] | None) -> None:
        self._shape, self._plain_steps = shape, 0
        self._graph = self._after_graph = None
        self._inputs: tuple[Tensor, Tensor] | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._gradients: list[Tensor | None] = []

    def _aside(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A plain step on the side stream: autograd remembers streams, and a capture must not meet the main one."""
        main = cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        with cuda.stream(self._stream):
            outputs = self._compute(images, labels)
        main.wait_stream(self._stream)
        return outputs

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        """Record the launches; none of them runs yet."""
        self._inputs = inputs = images.clone(), labels.clone()

        def compute() -> None:
            self._outputs = self._compute(*inputs)

        self._graph = self._captured(compute)
        self._gradients = [parameter.grad for parameter in self._parameters]

    def _captured(self, work: Callable[[], None]) -> cuda.CUDAGraph:
        graph, restore = cuda.CUDAGraph(), self._keep_aside()
        # thread_local: loaders' threads may pin memory meanwhile
        try:
            with cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work()
        except Exception:
            restore()
            raise
        return graph

    def _replay(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert self._graph is not None
        assert self._inputs is not None
        assert self._outputs is not None
        self._inputs[0].copy_(images)
        self._inputs[1].copy_(labels)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # whoever took the last step has set them to None
        return self._outputs

    def _give_up(self, error: Exception) -> None:
        log.warning("no CUDA graph: the capture failed (%s: %s)", type(error).__name__, error)
        self._forget(None)
        self._is_given_up = True
        for parameter in self._parameters:
            parameter.grad = None
