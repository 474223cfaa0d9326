"""A run as a job for a cluster: the command it is there, what travels along, and what could not be found there."""

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from prefixquant.cluster.jobs import JobSpec
from prefixquant.pipeline.recipe import Recipe, load_recipe
from prefixquant.tasks.errors import ConfigError
from prefixquant.tasks.texts import NAMED_SETS

_COMMAND = ("python", "-m", "prefixquant.pipeline", "run")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitOptions:
    """Where the run takes place, as the cluster sees it; nothing of it enters an artifact's key."""

    store: str
    """URL, or folder of a disk that all nodes share."""

    out: str | None = None
    """Folder of the head node, or of a disk it shares."""

    tracking: str | None = None
    """MLflow URI that the head node reaches, or `off`."""

    ranks: int | None = None
    """Processes that train a block together. None: as many as the GPUs allow."""

    working_dir: Path | None = None
    """Folder of this machine that travels along; relative paths of the recipe are inside it."""

    env: tuple[str, ...] = ()
    """Names of variables that the job gets with their values here."""

    json: bool = False
    """Whether the job prints its summary as one JSON object, and no progress."""


def job_spec(source: str, overrides: Sequence[str], options: SubmitOptions) -> JobSpec:
    """Return the job that runs a recipe, a file or the name of a shipped one, on a cluster.

    Raises:
        ConfigError: a line for each thing that is wrong with the recipe, or that the cluster could not find.
    """
    recipe = load_recipe(source, overrides)
    problems = [*_place_problems(options), *_path_problems(recipe, options.working_dir)]
    if problems:
        raise ConfigError("\n".join(problems))
    name, files = _recipe_file(source, options.working_dir)
    given = {"--out": options.out, "--tracking": options.tracking, "--ranks": options.ranks}
    arguments = [str(part) for option, value in given.items() if value is not None for part in (option, value)]
    arguments += ["--json"] if options.json else []
    return JobSpec(
        job_id=f"{recipe.name}-{secrets.token_hex(4)}",
        command=(*_COMMAND, name, *overrides, "--store", options.store, "--address", "auto", *arguments),
        files=files,
        working_dir=options.working_dir,
        env=_environment(options.env, os.environ),
        metadata={"recipe": recipe.name, "store": options.store, "prefixquant": version("prefixquant")},
    )


def _recipe_file(source: str, working_dir: Path | None) -> tuple[str, dict[str, bytes]]:
    """Return how the job calls the recipe, and the file to send where it is not in `working_dir`."""
    path = Path(source).expanduser()
    if not path.is_file():
        return source, {}  # a shipped one: it is in the package
    if working_dir is None:
        return path.name, {path.name: path.read_bytes()}
    try:
        return str(path.resolve().relative_to(working_dir.resolve())), {}
    except ValueError as err:
        raise ConfigError(f"recipe {source} is not inside --working-dir {working_dir}; move it there") from err


def _place_problems(options: SubmitOptions) -> Iterator[str]:
    """Yield what is wrong with store, output folder, tracking and working folder."""
    if options.working_dir is not None and not options.working_dir.is_dir():
        yield f"--working-dir {options.working_dir} is no folder of this machine"
    out = options.out
    if out is not None and "://" in out:
        if problem := _url_problem("--out", out):
            yield problem
    elif out is not None and not out.startswith("/"):
        yield f"--out {out} would be lost with the job; give a URL, or an absolute path on a disk of the head node"
    if problem := _url_problem("--store", options.store):
        yield problem
    tracking = options.tracking
    if tracking not in (None, "off", "databricks") and (problem := _url_problem("--tracking", tracking)):
        yield problem


def _url_problem(option: str, url: str) -> str | None:
    """Return why a URL or folder of this option serves no job, or None if it does."""
    place = urlsplit(url)
    if "@" in place.netloc:
        return (
            f"{option} holds a user name or password, which anyone who may list the cluster's jobs would see; "
            f"take it out of the URL and give it by --env NAME or, better, as a secret of the cluster"
        )
    if place.scheme == "memory":
        return f"{option} {url} lives in one process alone; give a URL, or a folder that all nodes share"
    absolute = {"": url.startswith("/"), "file": not place.netloc, "sqlite": place.path.startswith("//")}
    if not absolute.get(place.scheme, True):
        return (
            f"{option} {url} is relative to a folder of this machine; give a URL (s3://...), or the absolute path of "
            f"a disk that all nodes share"
        )
    return None


def _path_problems(recipe: Recipe, working_dir: Path | None) -> Iterator[str]:
    """Yield the paths of the recipe that cannot exist on the cluster. An absolute one is taken as a path over there."""
    texts = [("data.calibration", recipe.data.calibration), *(("evaluate.texts", t) for t in recipe.evaluate.texts)]
    paths = [(key, text) for key, text in texts if text not in NAMED_SETS]
    if recipe.evaluate.task_folder is not None:
        paths.append(("evaluate.task_folder", recipe.evaluate.task_folder))
    source = recipe.model.source
    inside = working_dir is not None and (working_dir / source).exists()
    if source.endswith(".gguf") or source.startswith(".") or Path(source).exists() or inside:  # otherwise a hub id
        paths.append(("model.source", source))
    for key, path in paths:
        if os.path.isabs(path):
            continue
        if working_dir is None:
            yield (
                f"{key} {path} is relative to a folder of this machine, which the cluster does not have; give the "
                f"absolute path of a disk that its nodes share, or send the folder along with --working-dir"
            )
        elif not (working_dir / path).exists():
            yield f"{key} {path} is not in --working-dir {working_dir}, where the job would look for it"


def _environment(names: Sequence[str], values: Mapping[str, str]) -> dict[str, str]:
    """Return name -> value here."""
    for name in names:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"--env takes the name of a variable, got {name!r}; its value is taken from this shell")
        if name not in values:
            raise ConfigError(f"--env {name} is not set in this shell; export it first")
    return {name: values[name] for name in names}
