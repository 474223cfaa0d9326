"""The command `prefixquant plan`: what a run would do, what it costs, whether it fits, and how it scales."""

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixquant.pipeline.cli_options import DEFAULT_STORE, JsonOption, Overrides, RecipeArgument, StoreOption
from prefixquant.tasks.errors import ConfigError

_GB = 1e9
_SEGMENTS = (1, 2, 4, 8, 16)

ShapeOption = Annotated[
    str | None, typer.Option(help="Plan for the model of this shape, which need not be here: llama-3-70b, ...")
]
MachineOption = Annotated[
    str | None, typer.Option(help="Kind of GPU, as in machines.json: H100, H200, cpu. Default: this machine's.")
]


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    store: StoreOption = DEFAULT_STORE,
    shape: ShapeOption = None,
    machine: MachineOption = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of the cluster.", min=1)] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="0: cores alone.", min=0)] = None,
    cpus_per_node: Annotated[int | None, typer.Option(help="Cores of a node.", min=1)] = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GB of a GPU. Default: as its kind has.", min=0)] = None,
    host_memory: Annotated[float | None, typer.Option(help="GB of a node. Default: not checked.", min=0)] = None,
    disk: Annotated[float | None, typer.Option(help="GB free for store and streams. Default: not checked.")] = None,
    ranks: Annotated[int | None, typer.Option(help="As of `run`.", min=1)] = None,
    gpus: Annotated[
        str | None, typer.Option(help="1,8,64: the whole run's time on so many GPUs, and what holds it up.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compare the predictions with what the stored tasks took.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show every task, whether it will run and why, and what it is expected to cost. Runs nothing.

    With a cluster given, exit status 2 says that the run does not fit it, and the message what would.
    """
    from prefixquant.pipeline.recipe import load_recipe

    if check and gpus is not None:
        raise ConfigError("--check looks at the past and --gpus at the future; give one of them")
    planned = _planned(
        load_recipe(recipe, overrides or ()), store, shape, machine, gpu_memory, (nodes, gpus_per_node, cpus_per_node)
    )
    if gpus is not None:
        _show_scaling(planned, _counts(gpus), gpus_per_node or 8, as_json)
        return
    if check:
        _show_check(planned, as_json)
        return
    sizes = (nodes, gpus_per_node, cpus_per_node, gpu_memory, host_memory, disk)
    cluster = planned.cluster(nodes, gpus_per_node, cpus_per_node, host_memory, disk)
    asked = any(size is not None for size in sizes)
    if asked:
        from prefixquant.pipeline.cluster_plan import check_fits

        check_fits(planned.graph, planned.plan.names("run"), planned.sizes, cluster, ranks)
    _show_plan(planned, cluster if asked else None, ranks, as_json)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """A recipe, its graph and what becomes of it."""

    recipe: Any
    graph: Any
    plan: Any
    sizes: Any
    machine: Any
    store: Any
    rebuild: Callable[[Any, int], Any]
    """From a recipe of the same model, and the tasks that run at the same time, to its graph."""

    def cluster(
        self,
        nodes: int | None,
        gpus_per_node: int | None,
        cpus_per_node: int | None,
        host_memory: float | None,
        disk: float | None,
    ) -> Any:
        from prefixquant.pipeline.cluster_plan import Cluster

        return Cluster(
            machine=self.machine,
            nodes=nodes or 1,
            gpus_per_node=int(self.machine.is_gpu) if gpus_per_node is None else gpus_per_node,
            cpus_per_node=cpus_per_node or 1,
            host_bytes=None if host_memory is None else host_memory * _GB,
            disk_bytes=None if disk is None else disk * _GB,
        )


def _planned(
    recipe: Any,
    store_url: str,
    shape: str | None,
    machine: str | None,
    gpu_memory: float | None,
    cluster: tuple[int | None, int | None, int | None],
) -> _Planned:
    """`cluster`: nodes, and GPUs and cores of each; all None: it is this machine, or one GPU of another kind."""
    from prefixquant.cluster.store import ArtifactStore
    from prefixquant.pipeline.build import Source, build_graph
    from prefixquant.pipeline.loading import known_model
    from prefixquant.pipeline.machines import find_machine, local_machine
    from prefixquant.pipeline.run import local_workers, plan_graph
    from prefixquant.pipeline.shape import Shape
    from prefixquant.tasks.random_checkpoint import SHAPES, shape_model

    kind = local_machine() if machine is None else find_machine(machine)
    if gpu_memory is not None:
        if not kind.memory_bytes:
            raise ConfigError("--gpu-memory is of a GPU and none is planned with; add --machine, e.g. --machine H100")
        kind = replace(kind, memory_bytes=gpu_memory * _GB)
    store = ArtifactStore(store_url)
    if shape is None:
        source, model = known_model(recipe, store)
    elif shape in SHAPES:
        source, model = Source(path=Path(shape), fingerprint=f"shape {shape}"), shape_model(shape)
    else:
        raise ConfigError(f"--shape {shape} is not known; choose one of {', '.join(SHAPES)}")
    nodes, gpus, cpus = cluster
    workers = local_workers() if machine is None else 1
    if any(count is not None for count in cluster):
        workers = (nodes or 1) * ((int(kind.is_gpu) if gpus is None else gpus) or cpus or 1)
    graph = build_graph(recipe, source, model, machine=kind, workers=workers)
    dtype = model.dtype if recipe.model.dtype == "auto" else recipe.model.dtype
    return _Planned(
        recipe=recipe,
        graph=graph,
        plan=plan_graph(graph, store, recipe.name),
        sizes=Shape.of(model, dtype, recipe),
        machine=kind,
        store=store,
        rebuild=lambda other, workers: build_graph(other, source, model, machine=kind, workers=workers),
    )


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--gpus takes numbers with commas between them, as in 1,8,64, got {text!r}") from None


def _show_plan(planned: _Planned, cluster: Any, ranks: int | None, as_json: bool) -> None:
    entries, total = planned.plan.entries, planned.plan.total
    rows = [
        {
            "task": entry.node.name,
            "state": entry.state,
            "reason": entry.reason,
            "key": entry.key,
            "seconds": entry.node.estimate.seconds if entry.node.estimate else None,
            "host_bytes": entry.node.estimate.host_bytes if entry.node.estimate else None,
            "device_bytes": entry.node.estimate.device_bytes if entry.node.estimate else None,
            "read_bytes": entry.node.estimate.read_bytes if entry.node.estimate else None,
            "stored_bytes": entry.node.estimate.stored_bytes if entry.node.estimate else None,
        }
        for entry in entries
    ]
    whole = None
    if cluster is not None:
        from prefixquant.pipeline.cluster_plan import schedule_of

        schedule = schedule_of(planned.graph, planned.plan.names("run"), planned.sizes, cluster, ranks)
        whole = {
            "machine": cluster.machine.name,
            "gpus": cluster.gpus,
            "seconds": schedule.seconds,
            "gpu_hours": cluster.gpus * schedule.seconds / 3600,
            "busy": schedule.busy,
        }
    if as_json:
        print(json.dumps({"tasks": rows, "total": asdict(total), "cluster": whole}))
        return
    console = Console()
    console.print(_task_table(entries))
    worker = f"one GPU ({planned.machine.name})" if total.device_bytes else "one CPU core"
    moved = total.read_bytes + sum(
        entry.node.estimate.stored_bytes for entry in entries if entry.state == "run" and entry.node.estimate
    )
    print(
        f"{len(planned.plan.names('run'))} to run, {len(planned.plan.names('cached'))} cached; estimated for {worker}: "
        f"{total.seconds:.0f} s of work, {total.host_bytes / _GB:.1f} GB at most in a task, "
        f"{moved / _GB:.2f} GB moved, {total.stored_bytes / _GB:.2f} GB stored"
    )
    if whole is not None:
        hours = f"{whole['gpu_hours']:.2f} GPU-hours" if cluster.gpus else f"{cluster.slots} cores"
        print(
            f"on {cluster.nodes} x {cluster.gpus_per_node} {cluster.machine.name}: {_time(whole['seconds'])}, {hours}"
        )


def _task_table(entries: Collection[Any]) -> Table:
    table = Table("task", "will", "why", "est. s", "est. GB", "est. GPU GB")
    for entry in entries:
        cost = entry.node.estimate
        shown = cost is not None and entry.state == "run"
        table.add_row(
            escape(entry.node.name),
            entry.state,
            escape(entry.reason),
            f"{cost.seconds:.1f}" if shown else "",
            f"{cost.host_bytes / _GB:.1f}" if shown else "",
            f"{cost.device_bytes / _GB:.1f}" if shown else "",
        )
    return table


def _show_check(planned: _Planned, as_json: bool) -> None:
    from prefixquant.pipeline.check import compare, stored_measurements, table
    from prefixquant.pipeline.machines import find_machine

    measured, device = stored_measurements(planned.graph, planned.store)
    if not measured:
        raise ConfigError(f"nothing of this recipe is in {planned.store.url}; run it first, or name its --store")
    machine = planned.machine if planned.machine.name in device else find_machine(device)
    rows = compare(planned.graph, measured, planned.sizes, machine)
    if as_json:
        print(json.dumps({"device": device, "stages": [row.to_json() for row in rows]}))
        return
    print(f"tasks that ran on {device}, against the figures of {machine.name}")
    print("\n".join(table(rows)))


def _show_scaling(planned: _Planned, counts: list[int], gpus_per_node: int, as_json: bool) -> None:
    from prefixquant.pipeline.cluster_plan import limits, scaling

    recipe = planned.recipe
    if not planned.machine.memory_bytes:
        raise ConfigError("--gpus counts GPUs and none is planned with; add --machine, e.g. --machine H100")

    def graph_of(gpus: int, segments: int) -> Any:
        cut = recipe if recipe.train is None else replace(recipe, train=replace(recipe.train, segments=segments))
        return planned.rebuild(cut, gpus)

    def names_of(graph: Any) -> list[str]:
        return [name for name in graph.order if graph.nodes[name].task.run is not None]

    segments = _SEGMENTS if recipe.train is not None else (1,)
    rows = scaling(graph_of, names_of, planned.sizes, planned.machine, counts, segments, gpus_per_node)
    if as_json:
        shown = [
            {
                "gpus": row.gpus,
                "segments": row.segments,
                "ranks": row.ranks,
                "seconds": row.schedule.seconds,
                "gpu_hours": row.gpu_hours,
                "busy": row.schedule.busy,
                "critical_seconds": row.schedule.critical_seconds,
                "critical": dict(row.schedule.critical),
            }
            for row in rows
        ]
        print(json.dumps({"machine": planned.machine.name, "scaling": shown}))
        return
    print(f"a whole run of {recipe.name} on {planned.machine.name}, {gpus_per_node} a node")
    print("| GPUs | segments | ranks of each | time | GPU-hours | speed-up | what holds it up |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    first = rows[0].schedule.seconds
    for row in rows:
        print(
            f"| {row.gpus} | {row.segments} | {row.ranks} | {_time(row.schedule.seconds)} | {row.gpu_hours:.1f} | "
            f"{first / row.schedule.seconds:.1f} | {limits(row)} |"
        )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
