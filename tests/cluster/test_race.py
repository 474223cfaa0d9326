"""Eight writers on the same keys of a real S3 server. The full race, 200 keys, is PREFIXQUANT_RACE_KEYS=200."""

import os

from s3 import make_bucket, s3_server, use

from prefixquant.cluster.race import race

KEYS = int(os.environ.get("PREFIXQUANT_RACE_KEYS", "10"))


def test_eight_writers_racing_over_s3_leave_one_whole_artifact_a_key_and_show_no_other(monkeypatch, capsys):
    with s3_server() as endpoint:
        use(endpoint, monkeypatch)
        result = race(make_bucket(endpoint, "race"), writers=8, keys=KEYS, size=16384)
    with capsys.disabled():
        print(f"\n{result}")
    assert result.ok
    assert result.published == 8 * KEYS
    assert result.contested > KEYS / 2  # they did meet
    assert result.reads > 0


def test_a_race_on_a_local_folder_keeps_the_same_promises(tmp_path):
    result = race(str(tmp_path), writers=4, keys=20, size=16384)
    assert result.ok
    assert (result.published, result.leftovers) == (80, 0)
    assert list(tmp_path.iterdir()) == []
