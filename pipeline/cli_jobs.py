"""The commands `prefixquant submit` and `prefixquant job`: runs as jobs of a Ray cluster."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixquant.cluster.jobs import Job, JobCluster
from prefixquant.pipeline.cli_options import JsonOption, Overrides, RecipeArgument

AddressOption = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster, http://HEAD:8265.")
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="As `submit` and `job list` print it.")]

job_app = typer.Typer(no_args_is_help=True, help="Look after submitted runs.")


def submit(
    recipe: RecipeArgument,
    address: AddressOption,
    store: Annotated[
        str, typer.Option(envvar="PREFIXQUANT_STORE", help="URL of the artifact store, or a folder all nodes share.")
    ],
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option(help="Folder of the head node that gets the loadable model.")] = None,
    tracking: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="MLflow URI as the head node reaches it, or `off`.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Processes that train a block together. Default: as many as the GPUs allow.")
    ] = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder to send along; relative paths of the recipe are inside it.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of a variable of this shell to give to the job. Ray logs its value in clear on the nodes."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option(help="Show the job's log and wait for its end.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe as a job of a Ray cluster, with this version of the package."""
    from prefixquant.pipeline.submission import SubmitOptions, job_spec

    options = SubmitOptions(
        store=store,
        out=out,
        tracking=tracking,
        ranks=ranks,
        working_dir=working_dir,
        env=tuple(env or ()),
        json=as_json and follow,
    )
    spec = job_spec(recipe, overrides or (), options)
    cluster = JobCluster(address)
    cluster.submit(spec)
    _say(f"job {spec.job_id} submitted to {cluster.address}")
    if not follow:
        _say(_advice(cluster, spec.job_id))
        print(json.dumps({"job_id": spec.job_id, "address": cluster.address}) if as_json else spec.job_id)
        return
    _follow(cluster, spec.job_id, as_json)


@job_app.command("list")
def list_jobs(address: AddressOption, as_json: JsonOption = False) -> None:
    """List the cluster's jobs, the oldest first."""
    jobs = JobCluster(address).list()
    if as_json:
        print(json.dumps({"jobs": [_plain(job) for job in jobs]}))
        return
    table = Table()
    table.add_column("job", no_wrap=True)  # to be copied
    for name in ("status", "started", "seconds", "store"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        store = escape(job.metadata.get("store", ""))
        table.add_row(escape(job.job_id), job.status, _clock(job), _seconds(job), store)
    Console().print(table)


@job_app.command()
def status(job_id: JobArgument, address: AddressOption, as_json: JsonOption = False) -> None:
    """Show what has become of a job."""
    job = JobCluster(address).get(job_id)
    if as_json:
        print(json.dumps(_plain(job)))
        return
    print(f"{job.job_id}: {job.status}, started {_clock(job)}, {_seconds(job)} s\n{job.command}\n{job.message}")


@job_app.command()
def stop(job_id: JobArgument, address: AddressOption) -> None:
    """Interrupt a job as Ctrl-C interrupts a run. What it has finished stays in its store."""
    job = JobCluster(address).stop(job_id)
    print(f"{job.job_id}: {job.status}")


@job_app.command()
def logs(
    job_id: JobArgument,
    address: AddressOption,
    follow: Annotated[bool, typer.Option(help="Wait for the job's end, whose exit status becomes this one's.")] = False,
) -> None:
    """Print what a job has printed."""
    cluster = JobCluster(address)
    if follow:
        _follow(cluster, job_id, as_json=False)
    else:
        print(cluster.logs(job_id), end="")


def _follow(cluster: JobCluster, job_id: str, as_json: bool) -> None:
    """Show the log, to stderr if stdout is for JSON, until the job ends; leave with its exit status."""
    stream, shown = sys.stderr if as_json else sys.stdout, []

    def write(text: str) -> None:
        shown.append(text)
        print(text, end="", file=stream, flush=True)

    try:
        job = cluster.follow(job_id, write)
    except KeyboardInterrupt:
        _say(f"\nno longer following; job {job_id} goes on. {_advice(cluster, job_id)}")
        sys.exit(1)
    except ConnectionError as err:
        _say(f"\nerror: {err}\njob {job_id} may go on. {_advice(cluster, job_id)}")
        sys.exit(1)
    if as_json:
        print(json.dumps(_plain(job) | {"address": cluster.address, "run": _summary("".join(shown))}))
    code = exit_status(job)
    reason = job.message if job.exit_code is None else f"its process ended with {job.exit_code}"
    _say(f"job {job_id} {job.status}" + (f": {reason}" if code else ""))
    if code == 1:
        _say("finished tasks are stored; submitting the same recipe again goes on from them")
    sys.exit(code)


def exit_status(job: Job) -> int:
    """Return what `prefixquant run` would have ended with: 0 done, 1 a task failed or it was stopped, 2 wrong input."""
    if job.status == "SUCCEEDED":
        return 0
    return 2 if job.exit_code == 2 else 1


def _summary(log: str) -> dict[str, Any] | None:
    """Return what `run --json` printed last, or None if it did not come to that."""
    last = log.rstrip().rpartition("\n")[2]
    try:
        found = json.loads(last)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "run_id" in found else None


def _plain(job: Job) -> dict[str, Any]:
    return {
        "job_id": job.job_id,
        "status": job.status,
        "message": job.message,
        "command": job.command,
        "metadata": job.metadata,
        "started": job.started,
        "finished": job.finished,
        "exit_code": job.exit_code,
    }


def _advice(cluster: JobCluster, job_id: str) -> str:
    """Return how to get back to a job."""
    return "\n".join(
        ["Follow, look at or stop it with:"]
        + [
            f"  prefixquant job {verb} {job_id} --address {cluster.address}"
            for verb in ("logs --follow", "status", "stop")
        ]
    )


def _clock(job: Job) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else "not yet"


def _seconds(job: Job) -> str:
    return f"{(job.finished or time.time()) - job.started:.0f}" if job.started else "0"


def _say(message: str) -> None:
    print(message, file=sys.stderr)
