"""What does not fit a cluster, what would, and how a run scales."""

import re
from dataclasses import replace

import pytest
from planned import build

from prefixquant.pipeline.cluster_plan import Cluster, DoesNotFitError, check_fits, limits, scaling, schedule_of
from prefixquant.pipeline.machines import CPU, find_machine
from prefixquant.tasks.errors import ConfigError

H100 = find_machine("H100")
LARGE = "llama-3-70b-w4a4kv4-trained"


def cluster(gpu_memory=80e9, host=None, disk=None, gpus=1, nodes=1):
    machine = replace(H100, memory_bytes=gpu_memory)
    return Cluster(machine=machine, nodes=nodes, gpus_per_node=gpus, cpus_per_node=16, host_bytes=host, disk_bytes=disk)


def run_names(graph):
    return [name for name in graph.order if graph.nodes[name].task.run is not None]


def check(place, *overrides, ranks=None, recipe=LARGE):
    graph, sizes, _ = build("llama-3-70b", "bfloat16", *overrides, machine=place.machine, recipe=recipe)
    check_fits(graph, run_names(graph), sizes, place, ranks)


def problems(place, *overrides, **options):
    try:
        check(place, *overrides, **options)
    except DoesNotFitError as err:
        return str(err)
    return ""


def refusal(place, *overrides, **options):
    found = problems(place, *overrides, **options)
    assert found
    return found


def test_a_70b_model_fits_one_gpu_of_80_gb_with_64_gb_of_host_memory():
    check(cluster(host=64e9))


def test_what_is_too_large_for_the_gpu_is_named_with_both_numbers():
    message = refusal(cluster(gpu_memory=16e9))
    assert re.search(r"train\[0\] needs \d+\.\d GB of GPU memory, there are 15\.3 GB; what would do: ", message)
    assert "a GPU with" in message


@pytest.mark.parametrize(
    ("place", "overrides"),
    [
        (cluster(gpu_memory=21e9), []),
        (cluster(gpu_memory=30e9), ["train.lookahead=2"]),
        (cluster(gpu_memory=60e9, host=20e9), []),
        (cluster(gpu_memory=26e9), ["data.search.sequences=512"]),
        (cluster(gpu_memory=24e9), ["data.statistics.sequences=2048"]),
    ],
    ids=["small-gpu", "lookahead", "small-host", "large-search", "large-statistics"],
)
def test_every_way_out_that_a_refusal_names_is_one(place, overrides):
    lines = refusal(place, *overrides).splitlines()
    for line in lines:
        stage = line.split("[")[0].split(" ")[0]
        ways = re.findall(r"(?<![\w.])((?:train|data|evaluate)\.[\w.]+=\w+)", line)
        ranks = re.findall(r"--ranks (\d+)", line)
        sizes = re.findall(r"(a GPU|nodes) with (\d+) GB", line)
        assert ways or ranks or sizes
        trials = [(place, [way], None) for way in ways]
        trials += [(replace(place, gpus_per_node=int(count)), [], int(count)) for count in ranks]
        for kind, size in sizes:
            room = float(size) * 1e9
            wider = replace(place.machine, memory_bytes=room) if kind == "a GPU" else place.machine
            host = room if kind == "nodes" else place.host_bytes
            trials.append((replace(place, machine=wider, host_bytes=host), [], None))
        for changed, way, count in trials:
            left = problems(changed, *overrides, *way, ranks=count)
            assert f"\n{stage}" not in f"\n{left}", f"{way or count}: {left}"


def test_a_disk_too_small_for_the_store_is_refused():
    message = refusal(cluster(disk=100e9))
    assert re.search(r"store: \d+\.\d GB are kept and the disk has 100\.0 GB; .*s3://", message)


def test_more_gpus_and_more_segments_are_faster_up_to_the_longest_chain():
    _, sizes, _ = build("llama-3-70b", "bfloat16", machine=H100, recipe=LARGE)

    def graph_of(segments):
        return build("llama-3-70b", "bfloat16", f"train.segments={segments}", machine=H100, recipe=LARGE)[0]

    rows = scaling(graph_of, run_names, sizes, H100, [1, 8, 64], [1, 8])
    found = {(row.gpus, row.segments): row for row in rows}
    assert found.keys() == {(1, 1), (8, 1), (8, 8), (64, 1), (64, 8)}
    hours = {key: row.schedule.seconds for key, row in found.items()}
    assert hours[8, 8] < hours[8, 1] < hours[1, 1]
    assert hours[64, 8] < hours[8, 8]
    for row in rows:
        assert row.schedule.seconds >= row.schedule.critical_seconds > 0
        assert row.schedule.slot_seconds <= row.gpus * row.schedule.seconds * (1 + 1e-9)
    assert found[1, 1].schedule.busy > 0.99
    assert limits(found[1, 1]).startswith("work, the GPUs are busy")
    assert limits(found[64, 1]).startswith("the longest chain (train")


def test_gpus_that_make_no_whole_nodes_are_refused():
    graph, sizes, _ = build("llama-3-70b", "bfloat16", machine=H100, recipe=LARGE)
    with pytest.raises(ConfigError, match="12 GPUs are no whole nodes of 8"):
        scaling(lambda segments: graph, run_names, sizes, H100, [12], [1])


def test_without_gpus_the_slots_are_cores():
    cores = find_machine(CPU)
    graph, sizes, _ = build("smollm2-135m", "float32", machine=cores)
    place = Cluster(machine=cores, nodes=2, gpus_per_node=0, cpus_per_node=4, host_bytes=None, disk_bytes=None)
    assert place.slots == 8
    assert schedule_of(graph, run_names(graph), sizes, place, None).slots == 8
