import pytest

from prefixquant.cluster.errors import ResourceError
from prefixquant.cluster.inline_session import InlineSession


def test_functions_run_one_at_a_time_when_waited_for_in_the_order_of_the_handles():
    ran = []
    with InlineSession(device="cpu") as session:
        refs = [session.submit(lambda i=i: ran.append(i) or i * i, name=str(i)) for i in range(3)]
        assert ran == []
        assert session.wait(refs) == [refs[0]]
        assert session.wait(refs[1:], timeout=0.0) == [refs[1]]
        assert ran == [0, 1]
        assert session.result(refs[1]) == 1


def test_result_raises_what_the_function_raised():
    session = InlineSession(device="cpu")
    ref = session.submit(int, "four", name="parse")
    assert session.wait([ref]) == [ref]
    with pytest.raises(ValueError, match="four") as caught:
        session.result(ref)
    assert "Traceback" in str(caught.value.__cause__)


def test_messages_are_taken_once():
    session = InlineSession(device="cpu")
    box = session.mailbox()
    box.put({"key": "a"})
    assert box.flush()
    assert session.messages() == [{"key": "a"}]
    assert session.messages() == []


def test_requests_are_cut_to_one_process_and_several_ranks_are_refused():
    session = InlineSession(device="cpu", cpus=2)
    assert session.fit(16, 1) == (2, 0)
    assert session.gpu() is None
    with pytest.raises(ResourceError, match=r"train\[0\]: 4 ranks need a Ray cluster"):
        session.submit_group(print, name="train[0]", ranks=4)
