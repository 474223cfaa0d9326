"""Training on several processes: each owns a run of rows of every weight, with their gradients and optimizer state.

What a step costs besides the block's products does not shrink with a rank's share of the batch: taking the weights to
their grid, the straight-through gradients, AdamW. So these are divided among the ranks as well: a rank quantizes its
own rows, the ranks exchange quantized rows (in the autocast type), and in the backward they exchange the gradients of
quantized rows (in the same type, summed in float32). Both exchanges run beside the block's products; on a GPU all of it
is one CUDA graph. Float32 weights and gradients never travel while training. Letters: O outputs, I inputs of a linear.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from prefixquant.kernels.adamw import total_norm
from prefixquant.tasks.model.modules import SiteLinear
from prefixquant.tasks.model.quantizer import product_dtype
from prefixquant.tasks.model.sharded_product import SHARDS
from prefixquant.tasks.parallel import ParameterGroup
from prefixquant.tasks.steps import AdamWStepper, check_groups

# Its name since torch 2.13, which warns at the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Collectives:
    """The collectives of a stepper, which remembers the last one and names it in what goes wrong."""

    last = "none"
    """What was last asked for on this rank, by its number since the beginning of the step."""

    def __init__(self) -> None:
        self._number = 0

    def begin_step(self) -> None:
        """Count from 1 again."""
        self._number = 0

    def call(self, what: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return function(*args, **options); an error gets a note that names rank and collective."""
        self._number += 1
        self.last = f"{what}, collective {self._number} of a step"
        return self._named(self.last, function, *args, **options)

    def wait(self, what: str, work: Any) -> None:
        """Wait for what an asynchronous one returned; on a GPU the stream does."""
        self._named(what, work.wait)

    def _named(self, what: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except Exception as err:
            err.add_note(f"on rank {dist.get_rank()} of {dist.get_world_size()}, in {what}")
            raise


class ShardedRanks:
    """One of the processes of torch's default process group, which train together."""

    compiles = True

    def __init__(self, *, cuda_graph: bool = True, parts: int = 1) -> None:
        """With `cuda_graph`, steps on a GPU are recorded once and replayed, except in fp16.

        A rank's share of a batch passes in `parts`, one after the other, to save memory.
        """
        self._cuda_graph, self.parts = cuda_graph, parts
        self._stepper: ShardedStepper | None = None

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        return dist.get_rank()

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size()

    def stepper(
        self, module: nn.Module, groups: Sequence[ParameterGroup], *, gradient_clip: float | None, precision: str
    ) -> "ShardedStepper":
        """Return what takes steps on `module(*batch)`, a scalar loss: the mean over this rank's share of a batch.

        Rank 0's parameters go to all. It ends the stepper made before.

        Args:
            module: on the device; its trained parameters are float32.
            groups: of every parameter that requires a gradient.
            gradient_clip: largest norm of all gradients together, or None.
            precision: bf16, fp16 or fp32, the autocast type around the forward.
        """
        self.close()
        self._stepper = ShardedStepper(module, groups, gradient_clip, precision, self._cuda_graph, self.parts)
        return self._stepper

    def mean(self, value: Tensor) -> Tensor:
        """Return a tensor averaged over the ranks."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    @contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Have every parameter of the module whole: it may be read or, if all ranks do the same, overwritten."""
        if self._stepper is not None:
            self._stepper.complete()
        yield

    def close(self) -> None:
        """End the stepper, if there is one: its parameters are whole. All ranks must call it."""
        if self._stepper is not None:
            stepper, self._stepper = self._stepper, None
            stepper.close()


class ShardedStepper(AdamWStepper):
    """Forward, backward, clipping and update on all ranks together. Made by `ShardedRanks.stepper`."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        gradient_clip: float | None,
        precision: str,
        cuda_graph: bool,
        passes: int,
    ) -> None:
        names = {name: each for name, each in module.named_parameters() if each.requires_grad}
        check_groups(names, groups, gradient_clip, precision)
        self._module, self._size, self._passes = module, dist.get_world_size(), passes
        self.collectives = Collectives()
        self._cuts = [
            _Cut(each, name, self.collectives)
            for name, each in module.named_modules()
            if isinstance(each, SiteLinear) and _divisible(each)
        ]
        parts = {whole: part for cut in self._cuts for whole, part in cut.parts.items() if part.requires_grad}
        for name, each in module.named_parameters():
            self.collectives.call(f"broadcast of {name}", dist.broadcast, each.data, 0)
        self._cut = {name: each for name, each in names.items() if each in parts}
        self._replicated = [each for each in names.values() if each not in parts]
        device = next(iter(names.values())).device
        super().__init__(
            {name: parts.get(each, each) for name, each in names.items()},
            [
                ParameterGroup([parts.get(each, each) for each in group.parameters], group.weight_decay)
                for group in groups
            ],
            gradient_clip,
            precision,
            cuda_graph=cuda_graph,
            scaler=_scaler(device) if precision == "fp16" else None,
        )
        self._token = torch.zeros((), device=device, requires_grad=True)
        self._stale = False
        self._stepping = False
        self._hook = module.register_forward_pre_hook(self._before_forward)

    def step(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step on this rank's share of a batch.

        Returns the loss, averaged over the ranks, and the norm of the averaged gradient before clipping: float32
        scalars on the device, valid until the next step. Nothing waits for the device, except in fp16.
        """
        self._stale = True
        return super().step(*batch)

    def _gradients(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        self._optimizer.zero_grad(set_to_none=True)
        self.collectives.begin_step()
        with self._autocast():
            for cut in self._cuts:
                cut.gather()
        share = torch.zeros((), device=self._device)
        parts = list(zip(*(each.chunk(self._passes) for each in batch), strict=True))
        for part in parts:
            for cut in self._cuts:
                cut.last = part is parts[-1]
            with self._sharded(), self._autocast():
                loss: Tensor = self._module(*part) * (len(part[0]) / len(batch[0]) / self._size)
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()
            share += loss.detach()
        for cut in self._cuts:
            cut.finish()
        self._fill()
        owned = [part.grad for cut in self._cuts for part in cut.parts.values() if part.grad is not None]
        square = total_norm(owned).square() if owned else torch.zeros_like(share)
        mean, square = self._reduce(share, square)
        norm = square.sqrt()
        if self._scaler is not None:
            norm = norm / self._scaler.get_scale()
            self._scaler.unscale_(self._optimizer)
        self._clip(norm)
        return mean, norm

    def _reduce(self, loss: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the ranks, in one go, the gradients that all of them hold, the loss, and the square of the norm.

        Returns the loss and the square of the norm of all gradients.
        """
        gradients = [each.grad for each in self._replicated if each.grad is not None]
        together = torch.cat([*(each.flatten().float() for each in gradients), loss.view(1), square.view(1)])
        self.collectives.call("all_reduce of what all ranks hold, loss and norm", dist.all_reduce, together)
        start = 0
        for each in self._replicated:
            each.grad = together[start : start + each.numel()].view_as(each)
            start += each.numel()
        return together[-2], together[-1] + together[:start].square().sum()

    @contextmanager
    def _sharded(self) -> Iterator[None]:
        """Within it the linears take their products with what the ranks exchange."""
        self._stepping = True
        for number, cut in enumerate(self._cuts):
            cut.linear.shard, SHARDS[number] = (number, self._token), cut
        try:
            yield
        finally:
            self._stepping = False
            for cut in self._cuts:
                cut.linear.shard = None

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        if not self._stepping:
            self.complete()

    @torch.no_grad()
    def complete(self) -> None:
        """Bring the whole parameters up to date with the rows that other ranks have trained. All must call it."""
        if self._stale:
            self._stale = False
            for name, each in self._cut.items():
                own = self._tensors[name].detach().clone()
                self.collectives.call(f"all_gather of trained rows of {name}", _all_gather, each.data, own)

    def _whole_of(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._cut:
            return super()._whole_of(name, tensor)
        whole = torch.empty_like(self._cut[name], requires_grad=False)
        self.collectives.call(f"all_gather of optimizer state of {name}", _all_gather, whole, tensor)
        return whole.cpu()

    def _part_of(self, name: str, tensor: Tensor) -> Tensor:
        return _own_rows(tensor) if name in self._cut else tensor

    def close(self) -> None:
        """Leave an ordinary module with whole parameters. All ranks must call it.

        The recorded step goes first: NCCL does not end a communicator, and so torch does not leave a process group, as
        long as there is a CUDA graph that holds collectives of it.
        """
        self.forget_graph()
        self.complete()
        self._hook.remove()
        SHARDS.clear()
        for each in self._tensors.values():
            each.grad = None


class _Cut:
    """A linear whose weight and grid are cut by rows: one part is trained here. Satisfies `Shard`."""

    def __init__(self, linear: SiteLinear, name: str, collectives: Collectives) -> None:
        self.linear, self._quantizer = linear, linear.weight_quantizer
        self._gathering, self._sending = f"all_gather of quantized rows of {name}", f"all_to_all of gradients of {name}"
        self._collectives = collectives
        self._weight = _part(linear.weight)
        grid = {} if self._quantizer is None else dict(self._quantizer.named_parameters())
        self._grid = {name: _part(each) for name, each in grid.items()}
        self._buffers = {} if self._quantizer is None else {n: _own_rows(b) for n, b in self._quantizer.named_buffers()}
        self.parts: dict[Tensor, Tensor] = {linear.weight: self._weight}
        self.parts |= {each: self._grid[name] for name, each in grid.items()}
        """What is trained here, by the whole parameter."""

        self.last = True
        """Whether the present backward brings the last part of the gradient."""

    def gather(self) -> None:
        """Take the rows to their grid and begin to exchange them."""
        self._rows = self._quantized()
        self._whole = self._rows.new_empty(self.linear.weight.shape)
        given = self._whole, self._rows.detach()
        self._work: Any = self._collectives.call(self._gathering, _all_gather, *given, async_op=True)
        self._sent: Tensor | None = None

    def _quantized(self) -> Tensor:
        if self._quantizer is not None:
            quantized: Tensor = functional_call(self._quantizer, self._grid | self._buffers, (self._weight,))
            return quantized
        return self._weight.to(product_dtype(self._weight))

    def arrived(self) -> Tensor:
        """Return the whole quantized weight [O, I]; the stream, not the host, waits for it."""
        if self._sent is None:
            self._collectives.wait(self._gathering, self._work)
        return self._whole

    def send(self, gradient_OI: Tensor) -> None:
        """Take the gradient of a part of the batch; with the last one, begin to send each rank that of its rows."""
        self._sent = gradient_OI if self._sent is None else self._sent + gradient_OI
        if self.last:
            self._received = torch.empty_like(self._sent)
            given = self._received, self._sent
            self._work = self._collectives.call(self._sending, dist.all_to_all_single, *given, async_op=True)

    def finish(self) -> None:
        """Sum what came for the own rows, and take it through the straight-through estimator."""
        if self._sent is not None:
            self._collectives.wait(self._sending, self._work)
            # A sum of bf16 or fp16 accumulates in float32 and is rounded once, as the gradient of one rank is.
            torch.autograd.backward(self._rows, self._received.unflatten(0, (dist.get_world_size(), -1)).sum(0))
            del self._received
        del self._rows, self._whole, self._sent


def _divisible(linear: SiteLinear) -> bool:
    """Return whether something of a linear's weight is trained and the ranks can share its rows equally, by fours."""
    tensors: list[Tensor] = [linear.weight]
    if linear.weight_quantizer is not None:
        tensors += [*linear.weight_quantizer.parameters(), *linear.weight_quantizer.buffers()]
    rows = {len(each) for each in tensors}
    trained = any(each.requires_grad for each in tensors)
    share = 4 * dist.get_world_size()  # every part then starts on 16 bytes, the scales' as well
    return trained and rows == {linear.out_features} and linear.out_features % share == 0


def _own_rows(tensor: Tensor) -> Tensor:
    """Return this rank's rows, a view."""
    rows = len(tensor) // dist.get_world_size()
    return tensor.detach()[rows * dist.get_rank() :][:rows]


def _part(parameter: Tensor) -> Tensor:
    return _own_rows(parameter).requires_grad_(parameter.requires_grad)


def _scaler(device: torch.device) -> torch.amp.GradScaler:
    """Return a loss scaler whose ranks agree on what has overflowed."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler(device.type)
