"""Kill something at random for minutes on end; every run must still come to what an undisturbed one comes to.

Opt-in: `make soak`, or PREFIXQUANT_SOAK_MINUTES=5 pytest -m soak. PREFIXQUANT_SOAK_SEED repeats the order of the kills.
"""

import os
import random
import shutil
import sys
import time
from collections import Counter

import pytest
import torch
from disturbed import SLOW, Driver, digests, undisturbed, write_model
from nodes import Nodes, kill

MINUTES = float(os.environ.get("PREFIXQUANT_SOAK_MINUTES", "0"))
SEED = int(os.environ.get("PREFIXQUANT_SOAK_SEED", str(int(time.time()))))
WEIGHTS = {"worker": 5, "node": 3, "driver": 2, "head": 1}
PAUSE_S = (3.0, 30.0)

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(MINUTES == 0, reason="takes as many minutes as PREFIXQUANT_SOAK_MINUTES says"),
    pytest.mark.timeout(60 * MINUTES + 1800),
]


def disturb(what, nodes, driver, *, advanced):
    """Kill one thing, and replace what does not come back by itself. Return whether there was one.

    What ends the run is spared until that has `advanced`, or none would ever come to its end.
    """
    if what in ("driver", "head") and not advanced:
        return False
    if what == "worker":
        victims = nodes.workers("ray::")
        return bool(victims) and kill(random.choice(victims))
    if what == "node":
        nodes.remove(random.choice(nodes.nodes))
        nodes.add()
    elif what == "head":
        nodes.restart_head()
    else:
        driver.kill()
    return True


def test_what_is_killed_at_random_changes_no_digest(finished, tmp_path, capsys):
    random.seed(SEED)
    world = type(finished)(tmp_path)
    write_model(world.model)
    torch.set_num_threads(1)
    graph, wanted = undisturbed(world.recipe(SLOW), tmp_path / "undisturbed")
    recipe, counts = world.recipe_file(SLOW), Counter()
    end = time.monotonic() + 60 * MINUTES
    with Nodes(2) as nodes:
        while time.monotonic() < end or not counts["runs that came to the end"]:
            one_run(nodes, recipe, world.store, end, counts)
            assert digests(world.store, graph) == wanted, f"seed {SEED}: {counts}"
            shutil.rmtree(world.store_path)
    with capsys.disabled():
        print(f"\n{MINUTES:g} minutes, seed {SEED}: {dict(counts)}", file=sys.stderr)


def one_run(nodes, recipe, store, end, counts):
    """Start a driver as often as it takes to come to the end of the recipe, with something killed now and then."""
    while True:
        counts["drivers started"] += 1
        before = len(store.keys())
        with Driver(nodes, recipe, store.url) as driver:
            next_kill = time.monotonic() + random.uniform(*PAUSE_S)
            killed = False
            while driver.process.poll() is None:
                if next_kill < time.monotonic() < end:
                    what = random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
                    if disturb(what, nodes, driver, advanced=len(store.keys()) > before):
                        counts[f"killed: {what}"] += 1
                        killed = what == "driver"
                    next_kill = time.monotonic() + random.uniform(*PAUSE_S)
                if killed:
                    break
                time.sleep(0.1)
            if killed:
                continue
            status, _, stderr = driver.wait()
        if status == 0:
            counts["runs that came to the end"] += 1
            return
        gone = "no Ray cluster answers" in stderr  # the head was restarted while the driver started
        assert status == 1 or gone, f"seed {SEED}, status {status}: {stderr}"
        counts["drivers that gave up"] += 1
