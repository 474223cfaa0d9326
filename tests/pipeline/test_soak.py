"""Kill something at random for minutes on end; every run must still come to what an undisturbed one comes to.

Opt-in: `make soak`, or PREFIXQUANT_SOAK_MINUTES=5 pytest -m soak. It says what it kills as it goes, and its seed:
PREFIXQUANT_SOAK_SEED repeats what is killed and after how many seconds.
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
from nodes import Nodes
from processes import kill

MINUTES = float(os.environ.get("PREFIXQUANT_SOAK_MINUTES", "0"))
SEED = int(os.environ.get("PREFIXQUANT_SOAK_SEED", str(int(time.time()))))
ROUND = ["worker"] * 5 + ["node"] * 3 + ["driver"] * 2 + ["head"]
PAUSE_S = (3.0, 30.0)

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(MINUTES == 0, reason="takes as many minutes as PREFIXQUANT_SOAK_MINUTES says"),
    pytest.mark.timeout(60 * MINUTES + 1800),
]


class Disturbance:
    """Kills one thing after another, in rounds of `ROUND` in random order, until each kind was and time is over."""

    def __init__(self, nodes, seconds):
        self.nodes, self.random = nodes, random.Random(SEED)
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.killed = Counter(dict.fromkeys(ROUND, 0))
        self._round = []
        self._pause()

    def _pause(self):
        self._next = time.monotonic() + self.random.uniform(*PAUSE_S)

    @property
    def over(self):
        return time.monotonic() > self.end and all(self.killed.values())

    def disturb(self, driver, *, advanced):
        """Kill what is next if it is time to, and replace what does not come back by itself. Return what was killed.

        What ends the run waits until that has `advanced`, or none would ever come to its end.
        """
        if self.over or time.monotonic() < self._next:
            return None
        if not self._round:
            self._round = self.random.sample(ROUND, len(ROUND))
        what = self._round[-1]
        if (what in ("driver", "head") and not advanced) or not self._kill(what, driver):
            return None
        self._round.pop()
        self._pause()
        self.killed[what] += 1
        say(f"{time.monotonic() - self.start:.0f} s: {what} killed")
        return what

    def _kill(self, what, driver):
        nodes = self.nodes
        if what == "worker":
            victims = nodes.workers("ray::")
            return bool(victims) and kill(self.random.choice(victims))
        if what == "node":
            nodes.remove(self.random.choice(nodes.nodes))
            nodes.add()
        elif what == "head":
            nodes.restart_head()
        else:
            driver.kill()
        return True


def say(line):
    print(f"soak, seed {SEED}: {line}", file=sys.stderr, flush=True)


def test_what_is_killed_at_random_changes_no_digest(finished, tmp_path, capsys):
    world = type(finished)(tmp_path)
    write_model(world.model)
    torch.set_num_threads(1)
    graph, wanted = undisturbed(world.recipe(SLOW), tmp_path / "undisturbed")
    recipe, counts = world.recipe_file(SLOW), Counter()
    try:
        with capsys.disabled(), Nodes(2) as nodes:
            disturbance = Disturbance(nodes, 60 * MINUTES)
            while not (disturbance.over and counts["runs that came to the end"]):
                one_run(disturbance, recipe, world.store, counts)
                assert digests(world.store, graph) == wanted
                counts["runs whose digests are those of the undisturbed one"] += 1
                shutil.rmtree(world.store_path)
            minutes = (time.monotonic() - disturbance.start) / 60
            say(f"{minutes:.0f} minutes, killed {dict(disturbance.killed)}; {dict(counts)}")
    except BaseException as err:
        err.add_note(f"PREFIXQUANT_SOAK_SEED={SEED} repeats it; so far {dict(counts)}")
        raise


def one_run(disturbance, recipe, store, counts):
    """Start a driver as often as it takes to come to the end of the recipe, with something killed now and then."""
    while True:
        counts["drivers started"] += 1
        before = len(store.keys())
        with Driver(disturbance.nodes, recipe, store.url) as driver:
            what = None
            while what != "driver" and driver.process.poll() is None:
                what = disturbance.disturb(driver, advanced=len(store.keys()) > before)
                time.sleep(0.1)
            if what == "driver":
                continue
            status, _, stderr = driver.wait()
        if status == 0:
            counts["runs that came to the end"] += 1
            return
        gone = "no Ray cluster answers" in stderr  # the head was restarted while the driver started
        assert status == 1 or gone, f"status {status}: {stderr}"
        counts["drivers that gave up"] += 1
