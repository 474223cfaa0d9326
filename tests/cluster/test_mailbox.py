import subprocess
import sys
import time

import pytest
import ray
from ray import cloudpickle

from prefixquant.cluster.mailbox import Mailbox
from prefixquant.cluster.ray_session import RaySession, connect

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


def report(mailbox, sender, count):
    for number in range(count):
        mailbox.put({"sender": sender, "number": number})
    return mailbox.flush(60)  # the mailbox may still be starting


def report_what_cannot_be_sent(mailbox):
    mailbox.put({"lock": sys._getframe()})
    mailbox.put({"fine": True})
    return mailbox.flush(60)  # the mailbox may still be starting


@pytest.fixture
def session(ray_session):
    with connect() as session:  # one that joins: what it starts it must end
        yield session


def drain(session: RaySession, count):
    messages, end = [], time.monotonic() + 120
    while len(messages) < count and time.monotonic() < end:
        messages += session.messages()
        time.sleep(0.02)
    return messages


def test_messages_arrive_once_and_in_the_order_of_each_sender(session):
    mailbox = session.mailbox()
    refs = [session.submit(report, mailbox, sender, 50, name="report") for sender in range(3)]
    assert all(session.result(ref) for ref in refs)
    messages = drain(session, 150)
    assert len(messages) == 150
    for sender in range(3):
        assert [each["number"] for each in messages if each["sender"] == sender] == list(range(50))
    assert session.messages() == []


def test_a_flushed_message_is_there_when_the_task_ends(session):
    assert session.result(session.submit(report, session.mailbox(), 0, 1, name="report"))
    assert session.messages() == [{"sender": 0, "number": 0}]


def test_a_message_that_cannot_be_sent_is_dropped_and_raises_nothing(session):
    assert session.result(session.submit(report_what_cannot_be_sent, session.mailbox(), name="report"))
    assert session.messages() == [{"fine": True}]


def test_a_session_without_a_mailbox_has_no_messages(session):
    assert session.messages() == []


def test_closing_the_session_ends_the_mailbox_and_later_messages_go_nowhere(ray_session):
    session = connect()
    mailbox: Mailbox = session.mailbox()
    assert report(mailbox, 0, 1)
    session.close()
    start = time.monotonic()
    report(mailbox, 0, 3)
    assert ray_session.result(ray_session.submit(report, mailbox, 0, 3, name="report")) in (True, False)
    assert time.monotonic() - start < 120


def test_messages_survives_the_death_of_the_mailbox_process(session):
    mailbox = session.mailbox()
    assert report(mailbox, 0, 1)
    ray.kill(session._box, no_restart=False)
    end = time.monotonic() + 120
    while not (report(mailbox, 1, 1) and session.messages()):  # what it held may be lost; it comes back
        assert time.monotonic() < end


ORPHAN = """
from prefixquant.cluster.ray_session import connect
session = connect(num_cpus=1, num_gpus=0, object_store_bytes=100 * 2**20)
mailbox = session.mailbox()
session.close()
mailbox.put({"to": "no one"})
print("fine", mailbox.flush(1.0))
"""


def test_put_outlives_the_cluster():
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("fine"), done.stderr
