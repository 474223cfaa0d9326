import re
import threading
import time

from prefixquant.pipeline.bench_watch import STUCK, Watch


def watched(folder, limit_s):
    """Return a watch, what it writes to, and the event and the list of how it ended the process."""
    out, ended, statuses = (folder / "out").open("w+"), threading.Event(), []

    def end(status):
        statuses.append(status)
        ended.set()

    return Watch(1, limit_s, out=out, end=end), out, ended, statuses


def text(out):
    out.seek(0)
    return out.read()


def test_a_rank_that_is_stuck_is_ended_and_says_where_with_its_last_collective(tmp_path):
    watch, out, ended, statuses = watched(tmp_path, 0.2)
    watch.doing = lambda: "last collective: all_gather of mlp.up_proj"
    watch.at("sharded, 4 sequences: capture")
    assert ended.wait(30)
    assert statuses == [STUCK]
    found = text(out)
    assert re.search(r"rank 1 has been at 'sharded, 4 sequences: capture' for \d+ s", found)
    assert "more than the 0.2 s of --timeout; last collective: all_gather of mlp.up_proj; its threads:" in found
    assert "test_a_rank_that_is_stuck" in found  # where its threads are


def test_a_rank_that_goes_on_or_waits_for_a_watched_one_is_left_alone(tmp_path):
    watch, out, ended, _ = watched(tmp_path, 3.0)
    for number in range(5):
        watch.at(f"round {number}")
        time.sleep(0.7)
    watch.at("waiting", unlimited=True)
    assert not ended.wait(4)
    watch.close()
    assert text(out).count("rank 1: ") == 6
