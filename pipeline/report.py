"""What a run found, as one JSON record and as text."""

from dataclasses import dataclass
from typing import Any

from prefixquant.pipeline.graph import Task
from prefixquant.pipeline.worker import TaskContext, TaskOutput
from prefixquant.tasks.artifact import Artifact

LABELS = {
    ("full_precision", False): "full precision",
    ("quantized", False): "quantized",
    ("quantized", True): "quantized without prefix",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportNode:
    """What the report is called and speaks of."""

    name: str
    texts: tuple[str, ...]


def run_report(context: TaskContext) -> TaskOutput:
    """Gather prefix, per-block errors and perplexities."""
    config: ReportNode = context.config
    prefix = context.inputs["prefix"].record
    blocks = [
        {"error": record["error"], "error_before_search": record["error_before_search"]}
        for record in context.inputs["blocks"].records()
    ]
    measured = []
    for name in context.inputs:
        if name.startswith("evaluate["):
            variant, text = name[len("evaluate[") :].rsplit("]", 1)[0].split(",", 1)
            label = LABELS[variant, name.endswith("/without_prefix")]
            measured.append({"model": label, "text": text, **context.inputs[name].record})
    record = {"name": config.name, "prefix": prefix, "blocks": blocks, "perplexity": measured}
    files = {"report.md": render_report(record).encode()}
    return TaskOutput(Artifact(record=record, files=files))


def render_report(record: dict[str, Any]) -> str:
    """Return a report as Markdown."""
    ids, tokens = record["prefix"]["token_ids"], record["prefix"]["tokens"]
    shown = ", ".join(f"{token!r} ({index})" for token, index in zip(tokens, ids, strict=True)) or "none"
    lines = [f"# {record['name']}", "", f"Prefix: {shown}", ""]
    if record["perplexity"]:
        lines += ["| model | text | perplexity | tokens |", "| --- | --- | --- | --- |"]
        lines += [f"| {m['model']} | {m['text']} | {m['ppl']:.2f} | {m['tokens']} |" for m in record["perplexity"]]
        lines.append("")
    lines += ["| block | output error, full range | after search |", "| --- | --- | --- |"]
    lines += [
        f"| {index} | {block['error_before_search']:.5f} | {block['error']:.5f} |"
        for index, block in enumerate(record["blocks"])
    ]
    return "\n".join([*lines, "", "Error: squared error of the block's output over the squared norm.", ""])


REPORT = Task(name="report", version=1, run=run_report)
