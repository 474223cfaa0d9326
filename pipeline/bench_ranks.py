"""Time the training of one block on several GPUs of this host: `python -m prefixquant.pipeline.bench_ranks --ranks 2`.

Starts one process a GPU (gloo on CPUs where there is none), without Ray, and compares ways to train a block with random
weights on the same global batch with a single process: milliseconds a step, speed-up, how long the collectives ran and
how long nothing else ran beside them, kernels and host waits of a step. A way whose losses are not those of the single
process gets no speed-up.

    sharded           each rank owns rows of every weight; quantized rows travel; a CUDA graph (tasks/sharded_steps.py)
    sharded-eager     the same without the graph
    ddp               torch's DistributedDataParallel, float32 gradients, the whole update on every rank
    deepspeed-1..3    DeepSpeed ZeRO of that stage (cluster/deepspeed_stepper.py)

The line `single-share` is one process on a rank's share of the batch: the work on the weights is as large as before.

What each rank is at goes to standard error. A rank that is at one thing for longer than `--timeout` ends the benchmark,
with the last collective that it asked for and where its threads are.
"""

import argparse
import gc
import multiprocessing
import os
import socket
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefixquant.cluster.process_group import process_group
from prefixquant.cluster.worker_group import Membership
from prefixquant.pipeline.bench_watch import STUCK, Watch
from prefixquant.tasks.bench_training import build
from prefixquant.tasks.losses import mse
from prefixquant.tasks.model.shapes import SHAPES
from prefixquant.tasks.parallel import ParameterGroup, Stepper
from prefixquant.tasks.sharded_steps import ShardedRanks
from prefixquant.tasks.steps import AdamWStepper, SingleRank
from prefixquant.tasks.train_block import BlockLoss, autocast

CLIP = 0.3
RATE = 1e-5
WAYS = ("sharded", "sharded-eager", "ddp", "deepspeed-1", "deepspeed-2", "deepspeed-3")
TOLERANCE = 0.01
"""Of losses and norms against the single process: bf16 rounds to 0.4 %."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one way measured, on one rank."""

    seconds: float
    """A step, median of the rounds."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    memory_bytes: int
    communication: float = 0.0
    """Seconds of a step in which a collective ran, waiting for the other ranks included."""

    exposed: float = 0.0
    """Seconds of them in which nothing else did."""

    launches: int = 0
    """Calls that launch a kernel or a graph, a step."""

    waits: int = 0
    """Times a step that the host waits for the device."""


@contextmanager
def stepper_of(
    way: str,
    member: Membership,
    device: torch.device,
    module: nn.Module,
    groups: Sequence[ParameterGroup],
    precision: str,
    watch: Watch,
    timeout_s: float,
) -> Iterator[Stepper]:
    """Give the stepper of a way inside its process group."""
    options: dict[str, Any] = {"gradient_clip": CLIP, "precision": precision}
    if way.startswith("deepspeed"):
        from prefixquant.cluster.deepspeed_ranks import join

        with join(member, device, stage=int(way[-1])) as ranks:
            yield ranks.stepper(module, groups, **options)
        return
    with process_group(member, device, timeout_s=timeout_s):
        if way == "ddp":
            yield DdpStepper(module, groups, device, precision)
            return
        sharded = ShardedRanks(cuda_graph=way == "sharded")
        stepper = sharded.stepper(module, groups, **options)
        watch.doing = lambda: f"last collective that it asked for: {stepper.collectives.last}"
        yield stepper
        sharded.close()


class DdpStepper:
    """What a few lines of torch do, for comparison."""

    def __init__(
        self, module: nn.Module, groups: Sequence[ParameterGroup], device: torch.device, precision: str
    ) -> None:
        self._parameters = [each for group in groups for each in group.parameters]
        self._device, self._precision = device, precision
        self._module = nn.parallel.DistributedDataParallel(
            module, device_ids=[0] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
        parameters = [{"params": group.parameters} for group in groups]
        self._optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=device.type == "cuda")

    def step(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step; return loss and norm."""
        self._optimizer.zero_grad(set_to_none=True)
        with autocast(self._device, self._precision):
            loss: Tensor = self._module(*batch)
        loss.backward()
        total = nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._optimizer.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        return mean / dist.get_world_size(), total

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rate of each group."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Tensor]:
        """Not needed for timing."""
        raise NotImplementedError

    def load_state_dict(self, state: Any) -> None:
        """Not needed for timing."""
        raise NotImplementedError


def measure(
    stepper: Stepper,
    groups: int,
    batch: Sequence[Tensor],
    steps: int,
    device: torch.device,
    at: Callable[[str], None],
    *,
    together: bool,
) -> Timing:
    """Take steps on this rank's share of a batch and time them; `at` is told what comes next.

    `together`: with the other ranks.
    """

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        if together:
            dist.barrier()

    at("first steps")
    if isinstance(stepper, AdamWStepper):
        stepper.on_phase = at
    stepper.set_learning_rates([RATE] * groups)
    taken = [tuple(float(each) for each in stepper.step(*batch)) for _ in range(3)]
    rounds = []
    for number in range(3):
        at(f"timing, round {number + 1} of 3")
        synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            stepper.step(*batch)
        synchronize()
        rounds.append((time.perf_counter() - start) / steps)
    at("profiling")
    found = _profiled(lambda: stepper.step(*batch), synchronize, device)
    return Timing(
        seconds=statistics.median(rounds),
        losses=tuple(loss for loss, _ in taken),
        norms=tuple(norm for _, norm in taken),
        memory_bytes=torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        **found,
    )


def _profiled(step: Callable[[], Any], synchronize: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Return what the profiler tells of a few steps, for one."""
    steps = 3
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    synchronize()
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    synchronize()
    collectives: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    launches, waits = 0, 0
    for event in profile.events() or []:
        if event.device_type.name == "CUDA":
            where = collectives if "nccl" in event.name.lower() else others
            if not event.name.startswith(("nccl:", "Activity", "Optimizer.")):  # annotations over kernels
                where.append((event.time_range.start, event.time_range.end))
        elif event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")):
            launches += 1
        elif event.name == "aten::_local_scalar_dense":
            waits += 1
    alone = union_length(collectives + others) - union_length(others)
    return {
        "communication": union_length(collectives) / 1e6 / steps,
        "exposed": alone / 1e6 / steps,
        "launches": launches // steps,
        "waits": waits // steps,
    }


def union_length(intervals: Sequence[tuple[float, float]]) -> float:
    """Return how much the union of intervals covers."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def share(batch: Sequence[Tensor], rank: int, ranks: int) -> list[Tensor]:
    """Return a rank's consecutive part of a batch."""
    size = len(batch[0]) // ranks
    return [each[rank * size :][:size].clone() for each in batch]


def run_rank(rank: int, port: int, args: argparse.Namespace, results: Any, singles_done: Any) -> None:
    """Measure everything on one rank; rank 0 puts lines of the table into `results`."""
    warnings.simplefilter("ignore")  # DeepSpeed's, of names that torch will drop
    watch = Watch(rank, args.timeout)
    try:
        member = Membership(rank, args.ranks, "127.0.0.1", port)
        _run_rank(member, args, results if rank == 0 else None, singles_done, watch)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # NCCL's threads would wait for the other ranks


def _run_rank(member: Membership, args: argparse.Namespace, results: Any, singles_done: Any, watch: Watch) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    if results is not None:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        how = ", compiled where it goes" if args.compile else ""
        results.put((f"{args.shape}, {member.size} ranks on {name}, torch {torch.__version__}{how}", None, None, None))
    singles: dict[int, Timing] = {}
    for way in ("single", "single-share", *args.ways):
        if not way.startswith("single"):  # not before: the others would wait for rank 0 in what has its own time limit
            if member.rank == 0:
                singles_done.set()
            elif not singles_done.is_set():
                watch.at("waiting for rank 0, which measures the single process", unlimited=True)
                singles_done.wait()
        for batch_size in args.batch_sizes:
            try:
                timing = _measure_way(way, batch_size, member, args, device, watch)
            except ImportError as err:
                if results is not None:
                    results.put((f"{way} is left out: {err}", None, None, None))
                break
            if results is None:
                continue
            assert timing is not None
            if way == "single":
                singles[batch_size] = timing
            results.put(("", f"{batch_size:3d} {way}", timing, singles[batch_size]))
    watch.at("end")
    if results is not None:
        results.put(None)
    watch.close()


def _measure_way(
    way: str, batch_size: int, member: Membership, args: argparse.Namespace, device: torch.device, watch: Watch
) -> Timing | None:
    """Return what a way takes with a global batch of this size; the single process is rank 0, None on the others."""
    alone = way.startswith("single")
    if alone and member.rank != 0:
        return None

    def at(phase: str) -> None:
        watch.at(f"{way}, {batch_size} sequences: {phase}")

    at("building the block")
    shape = SHAPES[args.shape]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    block, prefix, groups = build(shape, device)
    generator = torch.Generator(device).manual_seed(1)
    size = (batch_size, args.length, shape.hidden)
    batch = [torch.randn(*size, generator=generator, device=device) for _ in "xy"]
    if way != "single":
        batch = share(batch, member.rank, member.size)
    compiled = args.compile and (alone or way.startswith("sharded"))
    module = BlockLoss(block, prefix, mse, compiled=compiled)
    if alone:
        single = SingleRank().stepper(module, groups, gradient_clip=CLIP, precision=args.precision)
        return measure(single, len(groups), batch, args.steps, device, at, together=False)
    at("joining the other ranks")
    with stepper_of(way, member, device, module, groups, args.precision, watch, args.timeout) as stepper:
        timing = measure(stepper, len(groups), batch, args.steps, device, at, together=True)
        at("leaving the other ranks")
    watch.doing = lambda: ""
    return timing


def agrees(mine: Timing, single: Timing) -> bool:
    """Return whether the steps were those of the single process."""
    pairs = zip(mine.losses + mine.norms, single.losses + single.norms, strict=True)
    return all(abs(got - wanted) <= TOLERANCE * abs(wanted) for got, wanted in pairs)


def line(way: str, mine: Timing, single: Timing) -> str:
    """Return a line of the table."""
    speed = f"{single.seconds / mine.seconds:6.2f}x"
    if not way.endswith("-share") and not agrees(mine, single):
        speed = "  WRONG"
    losses = f"loss {mine.losses[0]:.6f} .. {mine.losses[-1]:.6f} norm {mine.norms[0]:.5f}"
    return (
        f"{way:17} {mine.seconds * 1e3:9.2f} ms {speed}  collectives {mine.communication * 1e3:6.2f} ms, "
        f"alone {mine.exposed * 1e3:6.2f} ms  {mine.launches:5d} launches {mine.waits:3d} waits "
        f"{mine.memory_bytes / 1e9:6.2f} GB  {losses}"
    )


def main() -> None:
    """Parse the arguments, start the ranks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16], help="sequences of all ranks together")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20, help="of each of the three rounds")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the block, where the way allows it")
    parser.add_argument(
        "--timeout", type=float, default=180.0, metavar="S", help="seconds that a rank may be at one thing"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    wrong = [each for each in args.batch_sizes if each % args.ranks]
    if wrong:
        parser.error(f"{args.ranks} ranks cannot share a batch of {wrong[0]}; choose multiples of {args.ranks}")
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results, singles_done = context.SimpleQueue(), context.Event()
    processes = []
    gpus = torch.cuda.device_count()
    if 0 < gpus < args.ranks:
        parser.error(f"{args.ranks} ranks need as many GPUs, here are {gpus}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(gpus)]
    for rank in range(args.ranks):
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = names[rank]  # each process sees its own GPU alone
        processes.append(context.Process(target=run_rank, args=(rank, port, args, results, singles_done)))
        processes[-1].start()
    while (found := _next(results, processes)) is not None:
        title, way, timing, single = found
        if title:
            print(title, flush=True)
        if timing is not None:
            print(line(way, timing, single), flush=True)
    for each in processes:
        each.join(60)
        if each.is_alive():
            each.kill()


def _next(results: Any, processes: Sequence[Any]) -> Any:
    """Return what comes next; exit if a rank has died."""
    while results.empty():
        dead = [rank for rank, each in enumerate(processes) if each.exitcode not in (None, 0)]
        if dead:
            stuck = processes[dead[0]].exitcode == STUCK
            if stuck:
                time.sleep(5)  # in which the others say where they are stuck
            for each in processes:
                each.kill()
            sys.exit(f"rank {dead[0]} {'was stuck' if stuck else 'died'}; what it was at is said above")
        time.sleep(0.1)
    return results.get()


if __name__ == "__main__":
    main()
