"""Tasks of EleutherAI's lm-eval, cut into three: build the requests, answer shares of them, score all answers.

lm-eval itself reads the task, builds the requests (few-shot examples included), makes values of a document's answers
and aggregates them, standard errors included. Only the answering, which takes the time, is spread: a share is whole
chunks of documents, each chunk is answered by itself, and so no answer depends on how many shares there are.
"""

import contextlib
import difflib
import hashlib
import io
import json
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prefixquant.tasks.errors import ConfigError, DataError, NumericalError

SEED = 1234
"""lm-eval's own default, of the few-shot examples among others."""

BOOTSTRAP_RESAMPLES = 1000
"""For standard errors that lm-eval has no formula for (perplexities, F1); those of accuracies are exact."""

CHUNK_DOCUMENTS = 8
"""Documents answered together. Part of the last digits, so it is no setting."""

Answer = Any
"""loglikelihood: [float, whether greedy]. loglikelihood_rolling: float. generate_until: text."""


def lm_eval_version() -> str:
    """Return the version of lm-eval, which decides prompts and metrics."""
    return version("lm_eval")


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessConfig:
    """One task, or group of tasks, of lm-eval."""

    name: str
    """As `lm_eval --tasks` has it."""

    shots: int | None = None
    """Solved examples in front of each question. None: as the task says, else none."""

    limit: int | None = None
    """Use only the first so many documents of each task. None: all."""

    version: str = field(default_factory=lm_eval_version)
    """Of lm-eval."""

    def __post_init__(self) -> None:
        check_counts(self.shots, self.limit)


def check_counts(shots: int | None, limit: int | None) -> None:
    """Raise ConfigError if shots or limit cannot be."""
    if shots is not None and shots < 0:
        raise ConfigError(f"evaluate.shots must not be negative, got {shots}")
    if limit is not None and limit < 1:
        raise ConfigError(f"evaluate.limit must be at least 1, or off for all documents, got {limit}")


@dataclass(frozen=True, slots=True)
class Request:
    """One thing that a model is asked."""

    kind: str
    """loglikelihood, loglikelihood_rolling or generate_until."""

    arguments: list[Any]
    """What lm-eval passes: context and continuation, text, or context and generation settings."""

    task: str
    """Leaf task it belongs to."""

    document: int
    """Index of its document in the task."""


def check_task_names(names: Sequence[str], folder: Path | None) -> None:
    """Raise ConfigError unless lm-eval, or the folder of task files, has a task, group or tag of each name."""
    own = _own_tasks(folder).all_tasks if folder is not None else []
    rest = [name for name in names if name not in own]
    if not rest:
        return
    known = _all_tasks(None).all_tasks
    for name in rest:
        if name not in known:
            near = difflib.get_close_matches(name, [*own, *known], n=3)
            advice = f"; did you mean {' or '.join(near)}?" if near else ""
            where = f"lm-eval {lm_eval_version()}" + (f" and {folder} have" if folder is not None else " has")
            raise ConfigError(f"evaluate.tasks: {where} no task called {name!r}{advice}")


def folder_fingerprint(folder: Path) -> str:
    """Return a digest of a folder of task files: every file in it, and the data that its YAML names elsewhere.

    Raises:
        ConfigError: it is no folder, or holds no task.
    """
    if not folder.is_dir():
        raise ConfigError(f"evaluate.task_folder {folder} is no folder; give one with lm-eval's YAML files")
    entries = _own_tasks(folder).task_index
    if not entries:
        raise ConfigError(f"evaluate.task_folder {folder} holds no task; lm-eval looks for `task: NAME` in *.yaml")
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if file.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            digest.update(json.dumps([*parts, hashlib.sha256(file.read_bytes()).hexdigest()]).encode())
    for name in sorted(entries):
        config = entries[name].cfg or {}  # with what it includes from elsewhere
        digest.update(json.dumps([name, config], sort_keys=True, default=str).encode())
        for data in _data_files((config.get("dataset_kwargs") or {}).get("data_files")):
            path = folder / data
            if path.is_file() and folder not in path.parents:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _data_files(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _data_files(inner)


def build_requests(config: HarnessConfig, folder: Path | None = None) -> list[Request]:
    """Return what a model is asked, in lm-eval's order.

    Args:
        config: which task.
        folder: of task files; relative paths in them are relative to it.
    Raises:
        ConfigError: there is no such task, or it cannot be run here.
        DataError: its data cannot be had.
    """
    from lm_eval.evaluator_utils import get_sample_size

    by_kind: dict[str, list[Request]] = {}
    with _lm_eval_at_work(folder):
        for name, task in _load(config, folder)["tasks"].items():
            _check_runnable(name, task)
            task.build_all_requests(limit=get_sample_size(task, config.limit))
            for each in task.instances:
                request = Request(each.request_type, json.loads(json.dumps(each.args)), name, each.doc_id)
                by_kind.setdefault(each.request_type, []).extend([request] * each.repeats)
    return [request for requests in by_kind.values() for request in requests]


def chunks_of(requests: Sequence[Request], shard: int = 0, shards: int = 1) -> Iterator[tuple[int, list[int]]]:
    """Give number and request indices of a share's chunks: one kind of request, documents of like length.

    Chunks are dealt out in turn, the longest first, so shares take about the same time.
    """
    documents: dict[tuple[str, str, int], list[int]] = {}
    for index, request in enumerate(requests):
        documents.setdefault((request.kind, request.task, request.document), []).append(index)
    length = {key: max(_characters(requests[index]) for index in indices) for key, indices in documents.items()}
    ordered = sorted(documents, key=lambda key: (key[0], -length[key], documents[key][0]))
    number = 0
    for kind in dict.fromkeys(key[0] for key in ordered):
        own = [documents[key] for key in ordered if key[0] == kind]
        for start in range(0, len(own), CHUNK_DOCUMENTS):
            if number % shards == shard:
                yield number, [index for indices in own[start : start + CHUNK_DOCUMENTS] for index in indices]
            number += 1


def _characters(request: Request) -> int:
    return sum(len(each) for each in request.arguments if isinstance(each, str))


def answer(model: Any, requests: Sequence[Request], shard: int = 0, shards: int = 1) -> dict[int, Answer]:
    """Return the answers of a share by request index. `model`: a `harness_model.PrefixModel`.

    Raises:
        NumericalError: a log-likelihood is NaN.
    """
    found: dict[int, Answer] = {}
    for number, indices in chunks_of(requests, shard, shards):
        torch.manual_seed(SEED + number)  # for tasks that sample: no matter what was answered before
        answers = model.answer([requests[index] for index in indices])
        found |= dict(zip(indices, answers, strict=True))
    for index, each in found.items():
        value = each[0] if isinstance(each, list) else each
        if isinstance(value, float) and math.isnan(value):
            raise NumericalError(
                f"task {requests[index].task}, document {requests[index].document}: the logits are NaN"
            )
    return found


def score(
    config: HarnessConfig, requests: Sequence[Request], answers: Mapping[int, Answer], folder: Path | None = None
) -> list[dict[str, Any]]:
    """Return what lm-eval makes of the answers to all requests, by its own filters, metrics and aggregation.

    A record for the task, or for a group and each of its tasks: `task`, `metrics` (name -> value; filters other than
    lm-eval's `none` behind a comma), `stderr` (likewise, None where there is none), `higher_is_better`, `documents`,
    `shots`, `version`.

    Raises:
        DataError: the task's documents are no longer those that the requests were built from.
    """
    from lm_eval.evaluator import evaluate

    with _lm_eval_at_work(folder), contextlib.redirect_stdout(io.StringIO()):
        loaded = _load(config, folder)
        results = evaluate(
            _replay(config, requests, answers),
            loaded,
            limit=config.limit,
            bootstrap_iters=BOOTSTRAP_RESAMPLES,
            log_samples=False,
        )
    assert results is not None
    return [
        _record(name, values, results, config.limit is not None)
        for name, values in results["results"].items()
        if any("," in key for key in values)  # a group without a score of its own has none
    ]


def _record(name: str, values: Mapping[str, Any], results: Mapping[str, Any], limited: bool) -> dict[str, Any]:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        is_error = metric.endswith("_stderr")
        label = metric.removesuffix("_stderr") + ("" if chosen == "none" else f",{chosen}")
        (errors if is_error else metrics)[label] = float(value)
    return {
        "task": name,
        "metrics": metrics,
        "stderr": {label: errors.get(label) for label in metrics},
        "higher_is_better": results["higher_is_better"].get(name, {}),
        "documents": int(values["sample_len"]) if "sample_len" in values else None,
        "limited": limited,
        "shots": results["n-shot"].get(name),
        "version": results["versions"].get(name),
    }


def _replay(config: HarnessConfig, requests: Sequence[Request], answers: Mapping[int, Answer]) -> Any:
    """Return an lm-eval model that gives recorded answers."""
    from lm_eval.api.model import LM

    recorded: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        recorded.setdefault(request.kind, []).append(index)

    def take(kind: str, asked: Sequence[Any]) -> list[Any]:
        own = recorded.get(kind, [])
        if [json.dumps(each.args) for each in asked] != [json.dumps(requests[index].arguments) for index in own]:
            raise DataError(
                f"task {config.name}: its documents changed while it was measured; remove the old requests with "
                f"`prefixquant gc`, or set another evaluate.limit, and run again"
            )
        return [tuple(each) if isinstance(each := answers[index], list) else each for index in own]

    class Replay(LM):
        def loglikelihood(self, requests: Any) -> Any:
            return take("loglikelihood", requests)

        def loglikelihood_rolling(self, requests: Any) -> Any:
            return take("loglikelihood_rolling", requests)

        def generate_until(self, requests: Any) -> Any:
            return take("generate_until", requests)

    return Replay()


def _own_tasks(folder: Path) -> Any:
    """Return lm-eval's index of a folder of task files."""
    from lm_eval.tasks import TaskManager

    with quiet_lm_eval():
        return TaskManager(include_path=folder, include_defaults=False)


@cache
def _all_tasks(folder: Path | None) -> Any:
    """Return lm-eval's index of its own 14,000 tasks, which takes seconds, and those of a folder."""
    from lm_eval.tasks import TaskManager

    with quiet_lm_eval():
        return TaskManager(include_path=folder)


def _load_named(name: str, folder: Path | None) -> Any:
    """Return lm-eval's loaded tasks, from the folder alone if that is enough."""
    if folder is not None:
        own = _own_tasks(folder)
        if name in own.task_index:
            with contextlib.suppress(KeyError):  # a group may name tasks of lm-eval
                return own.load([name])
    return _all_tasks(folder).load([name])


def _load(config: HarnessConfig, folder: Path | None) -> Any:
    """Return lm-eval's loaded tasks, set up as its `simple_evaluate` does."""
    import numpy as np

    random.seed(0)  # the defaults of simple_evaluate, for tasks that draw documents or examples
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        loaded = _load_named(config.name, folder)
    except (OSError, ValueError, KeyError) as err:
        check_task_names([config.name], folder)  # says which names there are
        reason = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise DataError(
            f"task {config.name}: its data cannot be had ({reason}); check the network, or give task files with local "
            f"data as evaluate.task_folder"
        ) from err
    for task in loaded["tasks"].values():
        stated = task.get_config("num_fewshot")
        if config.shots is not None and stated != 0:  # a task that insists on none keeps to that
            task.set_config(key="num_fewshot", value=config.shots)
        elif stated is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def _check_runnable(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"task {name} executes what the model writes, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name} needs images or sound, and the models here read text; leave it out")


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Within the context, lm-eval speaks of errors only."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _lm_eval_at_work(folder: Path | None) -> Iterator[None]:
    """Within the context, relative paths are the folder's."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would fork a process that has threads
    try:
        with contextlib.chdir(folder or Path.cwd()), quiet_lm_eval():
            yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before
