"""What every caller of an endpoint shares. tests/baselines/generative and tests/annotate ask real questions."""

import pytest
from chat_server import ChatServer, running, sends, status

from kdecs.endpoint import client
from kdecs.endpoint.client import Ask, Endpoint, check_url, main_reason, work_through
from kdecs.errors import ConfigError
from kdecs.process import StopSignal


@pytest.mark.parametrize(
    "url", ["api.openai.com/v1", "ftp://host/v1", "http://", "http://me:pw@host/v1", "http://host/v1?key=x"]
)
def test_a_base_url_holds_no_secret(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_url(url)
    assert "pw" not in str(raised.value)
    assert check_url("http://host/v1/") == "http://host/v1"


def test_calls_are_spread_over_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(client.time, "monotonic", lambda: now)
    pace = client._Pace(30)
    assert [pace.wait_s() for _ in range(3)] == [0, 2, 4]
    now = 200.0
    assert [pace.wait_s(), pace.wait_s()] == [0, 2]
    assert client._Pace(0).wait_s() == 0


def test_a_task_that_fails_leaves_the_others_alone_and_five_in_a_row_end_all() -> None:
    done: list[int] = []
    counts: list[int] = []

    def work(number: int, ask: Ask) -> None:
        if (reply := ask(endpoint.body(str(number)))) is not None:
            done.append(int(reply.text))

    with running(ChatServer(lambda messages: messages[0]["content"])) as server:
        endpoint = Endpoint(server.url, "m", attempts=1, concurrency=1)
        server.faults = [status(400, "first")]
        failures = work_through(endpoint, range(8), work, StopSignal(), on_done=counts.append)
        assert sorted(done) == list(range(1, 8)) and counts[-1] == 1 and len(counts) == 8
        assert str(main_reason(failures)) == "HTTP status 400: first" and failures[0].status == 400
        server.always = lambda prompt: sends(b"{}")
        failures = work_through(endpoint, range(100), work, StopSignal(), on_done=counts.append)
        assert 5 <= len(failures) <= 7
