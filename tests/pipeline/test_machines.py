"""The table of machines and its loader."""

import json
from dataclasses import asdict
from importlib import resources

import pytest

from prefixquant.pipeline.machines import CPU, Work, find_machine, machine_of, machines, parse_machine
from prefixquant.tasks.errors import ConfigError


def test_every_record_has_rates_for_every_stage_and_says_what_it_comes_from():
    assert {"NVIDIA H100", "NVIDIA H200", CPU} <= {machine.name for machine in machines()}
    for machine in machines():
        assert machine.measured
        assert machine.flops_per_s.keys() == {"rotate", "forward_float32", "forward_bfloat16", "search", "train"}
        assert machine.elements_per_s.keys() == {"forward", "search", "train"}
        assert all(rate > 0 for rate in (*machine.flops_per_s.values(), *machine.elements_per_s.values()))
        assert (machine.memory_bytes > 0) == (machine.name != CPU)


def test_a_gpu_is_found_by_the_name_its_driver_gives():
    assert find_machine("NVIDIA H100 80GB HBM3").name == "NVIDIA H100"
    assert find_machine("H200").name == "NVIDIA H200"
    assert find_machine("cpu").name == CPU
    with pytest.raises(ConfigError, match=r"called 'Voodoo 2'; known: cpu core, NVIDIA H200, NVIDIA H100.*rehearse"):
        find_machine("Voodoo 2")


def test_an_unknown_gpu_of_a_cluster_keeps_its_own_memory():
    assert machine_of(("Voodoo 2", 12_000_000)).memory_bytes == 12e6
    assert machine_of(("NVIDIA H100 80GB HBM3", 85_000_000_000)).memory_bytes == 85e9
    assert machine_of(None).name == CPU


def test_a_record_with_a_missing_or_a_new_field_is_refused():
    record = json.loads((resources.files("prefixquant.pipeline") / "machines.json").read_text())[0]
    assert asdict(parse_machine(record))["name"] == record["name"]
    with pytest.raises(ConfigError, match="step_s"):
        parse_machine({name: value for name, value in record.items() if name != "step_s"})
    with pytest.raises(ConfigError, match="colour"):
        parse_machine(record | {"colour": "green"})


def test_twice_the_work_takes_twice_the_time_beyond_the_overhead():
    machine = find_machine("H200")
    once = Work(stage="x", flops={"train": 1e15}, elements={"train": 1e9}, updates=1e9, steps=7, read_bytes=1e9)
    twice = Work(stage="x", flops={"train": 2e15}, elements={"train": 2e9}, updates=2e9, steps=14, read_bytes=2e9)
    assert machine.time(twice) - machine.task_s == pytest.approx(2 * (machine.time(once) - machine.task_s))
