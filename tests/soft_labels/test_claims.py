"""Who holds a claim, when it expires, and which of several files gets a name. Time is a clock that the tests set."""

import errno
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from kdecs.soft_labels.claims import Claim, Claims, publish

LEASE_S = 10.0


class Clock:
    """The file system's time and every process' own."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now

    def stamp(self, path: Path) -> None:
        os.utime(path, (self.now, self.now))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def claims_of(directory: Path, clock: Clock, host: str = "here") -> Claims:
    return Claims(directory, lease_s=LEASE_S, host=host, stamp=clock.stamp, now=clock, monotonic=clock)


def take(claims: Claims, name: str = "a") -> Claim:
    """A claim that must be free, made at the clock's time."""
    claim = claims.take(name)
    assert claim is not None
    claims.stamp(claim.path)
    return claim


def test_one_holder_until_released(tmp_path: Path, clock: Clock) -> None:
    mine, theirs = claims_of(tmp_path, clock), claims_of(tmp_path, clock)
    claim = take(mine)
    assert theirs.take("a") is None
    assert theirs.take("b") is not None
    claim.release()
    assert not claim.is_held
    assert theirs.take("a") is not None


def test_a_claim_lasts_for_as_long_as_it_is_renewed(tmp_path: Path, clock: Clock) -> None:
    """A worker of another host, which the kernel's lock tells nothing, gets it only after a silence of LEASE_S."""
    claim, theirs = take(claims_of(tmp_path, clock)), claims_of(tmp_path, clock, "there")
    for _ in range(5):
        clock.now += 0.9 * LEASE_S
        assert theirs.take("a") is None
        assert claim.renew()
    clock.now += 1.1 * LEASE_S
    assert theirs.take("a") is not None
    assert not claim.renew()


def test_a_held_claim_is_renewed_by_a_thread(tmp_path: Path) -> None:
    stamps = threading.Semaphore(0)
    claims = Claims(tmp_path, lease_s=0.05, stamp=lambda path: stamps.release())
    with claims.holding("a") as claim:
        assert claim is not None
        for _ in range(3):
            assert stamps.acquire(timeout=20)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == 1 or "renew a" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("host", ["here", "there"])
def test_the_claim_of_a_dead_worker(tmp_path: Path, clock: Clock, host: str) -> None:
    """Free at once if it was of this host, after its lease if of another."""
    child = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, clock, host))
    child.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mine = claims_of(tmp_path, clock)
    assert mine.take("a") is None
    child.kill()
    child.join(10)
    if host == "there":
        assert mine.take("a") is None  # the kernel's lock is gone, but that tells nothing between hosts
        clock.now += 1.1 * LEASE_S
    assert mine.take("a") is not None


def _hold(directory: Path, clock: Clock, host: str) -> None:
    claim = take(claims_of(directory, clock, host))
    (directory / "ready").touch()
    time.sleep(60)
    claim.release()


def test_a_silent_holder_learns_of_the_new_one_and_leaves_it_alone(tmp_path: Path, clock: Clock) -> None:
    claim = take(claims_of(tmp_path, clock))
    clock.now += 1.1 * LEASE_S
    other = take(claims_of(tmp_path, clock, "there"))
    assert not claim.renew()
    claim.release()
    assert other.renew()


def test_a_file_system_that_fails_costs_the_claim_only_after_the_lease(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = take(claims_of(tmp_path, clock))
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", _fail)
        assert claim.renew()
        clock.now += 0.9 * LEASE_S
        assert claim.renew()
    assert claim.renew()
    monkeypatch.setattr(os, "utime", _fail)
    clock.now += 1.1 * LEASE_S
    assert not claim.renew()


def _fail(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_clocks_of_hosts_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now is the file system's: a host whose clock runs a day ahead takes nothing over."""
    assert Claims(tmp_path, lease_s=LEASE_S, host="there").take("a") is not None
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert Claims(tmp_path, lease_s=LEASE_S, host="here").take("a") is None


def test_a_claim_that_is_being_written_is_held(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "a.lease").touch()
    mine = claims_of(tmp_path, clock)
    assert mine.take("a") is None
    clock.now += 1.1 * LEASE_S
    assert mine.take("a") is not None


def test_what_is_cleared_of_a_complete_export(tmp_path: Path, clock: Clock) -> None:
    """Of a claim that was never finished nobody knows whose it is; a worker that is alive keeps its claim."""
    mine = claims_of(tmp_path, clock)
    held = take(mine, "held")
    (tmp_path / "unfinished.lease").touch()
    (tmp_path / ".now-0").touch()
    take(claims_of(tmp_path, clock, "there"), "silent")
    clock.now += LEASE_S + 1
    mine.stamp(held.path)
    mine.stamp(tmp_path / "unfinished.lease")
    mine.clear()
    assert list(tmp_path.iterdir()) == [held.path]


def test_of_many_takers_of_a_dead_claim_one_keeps_it(tmp_path: Path) -> None:
    """Four processes race for 30 expired claims. Several may take one, but only the last holds it after a look."""
    for number in range(30):
        path = tmp_path / f"n{number}.lease"
        path.touch()
        os.utime(path, (0, 0))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    takers = [context.Process(target=_take_all, args=(tmp_path, f"host{n}", barrier)) for n in range(4)]
    for taker in takers:
        taker.start()
    for taker in takers:
        taker.join(60)
        assert taker.exitcode == 0
    owners = [line for path in tmp_path.glob("won-*") for line in path.read_text().split()]
    assert sorted(owners) == sorted({f"n{number}" for number in range(30)})


def _take_all(directory: Path, host: str, barrier: object) -> None:
    claims = Claims(directory, lease_s=30, host=host)
    barrier.wait()  # type: ignore[attr-defined]
    held = {name: claim for name in (f"n{n}" for n in range(30)) if (claim := claims.take(name))}
    barrier.wait()  # type: ignore[attr-defined]
    (directory / f"won-{host}").write_text(" ".join(name for name, claim in held.items() if claim.renew()))
    barrier.wait()  # type: ignore[attr-defined]


@pytest.mark.parametrize("has_links", [True, False])
def test_the_first_file_gets_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", _refuse_link)
    first, second, path = tmp_path / "first", tmp_path / "second", tmp_path / "shard"
    first.write_text("first")
    second.write_text("second")
    assert publish(first, path)
    assert not publish(second, path)
    assert path.read_text() == "first"


def _refuse_link(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
