"""What a run found, as one JSON record, as text and, if blocks were trained, as a plot of their losses."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefixquant.pipeline.graph import Task
from prefixquant.pipeline.worker import TaskContext, TaskOutput
from prefixquant.tasks.artifact import Artifact

LABELS = {
    ("full_precision", ""): "full precision",
    ("quantized", ""): "quantized",
    ("quantized", "/without_prefix"): "quantized without prefix",
    ("quantized", "/untrained"): "quantized without training",
    ("quantized", "/sequential"): "quantized, trained in sequence",
}
"""What is measured, by variant and the suffix of the node that measures it."""

LOSSES_FILE = "losses.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportNode:
    """What the report is called and speaks of."""

    name: str
    texts: tuple[str, ...]

    segments: int = 1
    """Parts of the model that were trained side by side."""


def run_report(context: TaskContext) -> TaskOutput:
    """Gather prefix, per-block errors, training losses, perplexities and what lm-eval's tasks gave."""
    config: ReportNode = context.config
    final = list(context.inputs["blocks"].records())
    trained = any("loss_before" in each for each in final)
    searched = context.inputs["searched"].records() if trained else final
    blocks = [{"error": each["error"], "error_before_search": each["error_before_search"]} for each in searched]
    measured, answered = [], []
    for name in context.inputs:
        if name.startswith("evaluate["):
            model, text = _measured(name)
            measured.append({"model": model, "text": text, **context.inputs[name].record})
        if name.startswith("tasks["):
            model, _ = _measured(name)
            answered += [{"model": model, **each} for each in context.inputs[name].record["results"]]
    record = {
        "name": config.name,
        "prefix": context.inputs["prefix"].record,
        "blocks": blocks,
        "training": {"segments": config.segments, "blocks": [_training(each) for each in final]} if trained else None,
        "perplexity": measured,
        "tasks": answered,
    }
    files = {"report.md": render_report(record).encode()}
    if trained:
        files[LOSSES_FILE] = plot_losses(record["training"]["blocks"])
    return TaskOutput(Artifact(record=record, files=files))


def _measured(node: str) -> tuple[str, str]:
    """Return which model a node measures, in words, and on what."""
    inner, suffix = node.partition("[")[2].rsplit("]", 1)
    variant, subject = inner.split(",", 1)
    return LABELS[variant, suffix], subject


def task_rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """Return task, metric, value, standard error and documents of each number of lm-eval, as a table has them."""
    rows = []
    for each in results:
        documents = "" if each["documents"] is None else str(each["documents"])
        for metric, value in each["metrics"].items():
            error = each["stderr"][metric]
            rows.append((each["task"], metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", documents))
    return rows


def _training(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the report says of a trained block."""
    kept = ("loss_before", "loss_after", "best_epoch", "loss_gptq", "learning_rate_factor", "divergence")
    seconds = sum(epoch["seconds"] for epoch in record["epochs"])
    return {name: record[name] for name in kept if name in record} | {
        "epochs": len(record["epochs"]),
        "seconds": seconds,
    }


def render_report(record: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    ids, tokens = record["prefix"]["token_ids"], record["prefix"]["tokens"]
    shown = ", ".join(f"{token!r} ({index})" for token, index in zip(tokens, ids, strict=True)) or "none"
    lines = [f"# {record['name']}", "", f"Prefix: {shown}", ""]
    if record["perplexity"]:
        rows = [f"| {m['model']} | {m['text']} | {m['ppl']:.2f} | {m['tokens']} |" for m in record["perplexity"]]
        lines += ["| model | text | perplexity | tokens |", "| --- | --- | --- | --- |", *rows, ""]
    if record["tasks"]:
        lines += ["| model | task | metric | value | standard error | documents |", "| --- " * 6 + "|"]
        lines += [f"| {each['model']} | {' | '.join(row)} |" for each in record["tasks"] for row in task_rows([each])]
        lines.append("")
    lines += ["| block | output error, full range | after search |", "| --- | --- | --- |"]
    lines += [
        f"| {index} | {block['error_before_search']:.5f} | {block['error']:.5f} |"
        for index, block in enumerate(record["blocks"])
    ]
    lines += ["", "Error: squared error of the block's output over the squared norm.", ""]
    if record["training"]:
        lines += _render_training(**record["training"], costs=_segment_costs(record["perplexity"]))
    return "\n".join(lines)


def _segment_costs(perplexity: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line a text on what training in segments cost, where training in sequence was measured as well."""
    found = {(each["model"], each["text"]): each["ppl"] for each in perplexity}
    lines = []
    for (model, text), sequential in found.items():
        if model == LABELS["quantized", "/sequential"]:
            ppl = found[LABELS["quantized", ""], text]
            change = (ppl / sequential - 1) * 100
            lines.append(
                f"On {text} segments change the perplexity from {sequential:.2f} to {ppl:.2f} ({change:+.1f} %)."
            )
    return lines


def _render_training(segments: int, blocks: Sequence[dict[str, Any]], costs: Sequence[str]) -> list[str]:
    rounded = any("loss_gptq" in block for block in blocks)
    head = ["block", "loss before", "loss after", *(["after GPTQ"] if rounded else []), "best epoch", "seconds"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for index, block in enumerate(blocks):
        losses = [block[name] for name in ("loss_before", "loss_after", "loss_gptq") if name in block]
        cells = [index, *(f"{loss:.4g}" for loss in losses), f"{block['best_epoch']} of {block['epochs']}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {block['seconds']:.1f} |")
    lines.append("")
    lines += [
        f"Block {index} was trained at {block['learning_rate_factor']:g} of the learning rates: {block['divergence']}."
        for index, block in enumerate(blocks)
        if block["divergence"]
    ]
    together = "one after the other" if segments == 1 else f"in {segments} segments, each starting in full precision"
    lines += [f"Loss: the training loss on the validation sequences. Blocks were trained {together}.", ""]
    if segments > 1:
        lines += [*(costs or ["What that costs was not measured; evaluate.sequential=true does."]), ""]
    return lines


def plot_losses(blocks: Sequence[dict[str, Any]]) -> bytes:
    """Return the losses of the trained blocks before and after training as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import, and only reports need it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curves = {"before training": "loss_before", "after training": "loss_after"}
    if any("loss_gptq" in block for block in blocks):
        curves["after GPTQ"] = "loss_gptq"
    for (label, name), marker in zip(curves.items(), "os^", strict=False):
        axes.plot([block.get(name, float("nan")) for block in blocks], marker=marker, markersize=4, label=label)
    axes.set(xlabel="block (index)", ylabel="validation loss (units of train.loss)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # no version: the same numbers, the same file
    return buffer.getvalue()


REPORT = Task(name="report", version=3, run=run_report)
