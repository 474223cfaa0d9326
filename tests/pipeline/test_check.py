"""Predictions beside measurements, and rates that follow from these."""

from dataclasses import replace

import pytest
from planned import H200, build

from prefixquant.pipeline.check import Measured, compare, fit, stored_measurements, table
from prefixquant.pipeline.estimates import estimate
from prefixquant.pipeline.machines import find_machine
from prefixquant.pipeline.shape import Shape
from prefixquant.tasks.load import load_model

STAGES = ("rotate", "prefix", "calibrate", "stream", "block", "train", "evaluate")


def sizes_of(world):
    recipe, model = world.recipe(), load_model(str(world.model))
    return Shape.of(model, model.dtype, recipe)


def as_measured(graph, sizes, machine, slower):
    """Return what the nodes would take on the machine, every stage `slower` times its rates' time."""
    found = {}
    for name in graph.order:
        if graph.nodes[name].task.run is not None:
            cost = estimate(graph.nodes[name], sizes, machine)
            found[name] = Measured(
                seconds=cost.seconds * slower,
                host_bytes=cost.host_bytes,
                device_bytes=cost.device_bytes,
                read_bytes=cost.read_bytes,
                written_bytes=cost.stored_bytes,
            )
    return found


def test_ratios_are_predicted_over_measured_by_stage():
    graph, sizes, _ = build("smollm2-135m", "float32")
    rows = compare(graph, as_measured(graph, sizes, H200, 2.0), sizes, H200)
    assert set(STAGES) <= {row.stage for row in rows}
    assert all(row.seconds_ratio == pytest.approx(0.5) for row in rows)
    assert all(row.memory_ratio == pytest.approx(1.0) for row in rows)
    blocks = next(row for row in rows if row.stage == "block")
    assert blocks.tasks == 30
    lines = table(rows)
    assert len(lines) == len(rows) + 1
    assert len({len(line) for line in lines}) == 1


def test_the_fitted_machine_predicts_what_was_measured():
    graph, sizes, _ = build("llama-3-8b", "bfloat16", "train.lookahead=1")
    slow = replace(
        H200,
        flops_per_s={kind: rate / 3 for kind, rate in H200.flops_per_s.items()},
        elements_per_s={kind: rate / 3 for kind, rate in H200.elements_per_s.items()},
        parameters_per_s=H200.parameters_per_s / 3,
        forward_s=3 * H200.forward_s,
        step_s=3 * H200.step_s,
        trained_block_s=3 * H200.trained_block_s,
    )
    measured = as_measured(graph, sizes, slow, 1.0)
    fitted = fit(graph, measured, sizes, H200)
    for row in compare(graph, measured, sizes, fitted):
        assert row.seconds_ratio == pytest.approx(1.0, rel=0.05), row.stage
    assert fitted.flops_per_s["search"] == pytest.approx(H200.flops_per_s["search"] / 3, rel=0.05)


def test_manifests_tell_what_stored_tasks_took(done):
    graph = done.graph()
    measured, device = stored_measurements(graph, done.store)
    assert device == "cpu"
    assert {"load", "rotate[0]", "prefix", "calibrate", "block[1]", "export", "report"} <= measured.keys()
    assert not any(name.startswith("stream") for name in measured)  # they have served
    rows = compare(graph, measured, sizes_of(done), find_machine("cpu"))
    for row in rows:
        assert row.memory_ratio == pytest.approx(1.0, rel=0.5), row.stage
        assert row.seconds > 0
        assert row.processor_seconds > 0
    blocks = next(row for row in rows if row.stage == "block")
    assert blocks.read_bytes > 0
    assert blocks.written_bytes > 0
