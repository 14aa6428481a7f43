"""Who holds a lease, when it is out, and that at most one of many takers gets it."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from kdecs.soft_labels.claims import Leases

LEASE_S = 1.5  # a thread that renews every fifth of it may be late on a busy machine


def leases(directory: Path, host: str = "here") -> Leases:
    return Leases(directory, lease_s=LEASE_S, host=host)


def wait_for_lease(who: Leases, name: str, timeout_s: float = 20) -> float:
    """Seconds until a lease could be taken."""
    started = time.monotonic()
    while not (lease := who.take(name)):
        assert time.monotonic() - started < timeout_s
        time.sleep(0.02)
    who.release(lease)
    return time.monotonic() - started


def age(path: Path, seconds: float) -> None:
    """Make a lease look as if its owner had been silent for so long."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_one_holder_until_released(tmp_path: Path) -> None:
    mine, theirs = leases(tmp_path), leases(tmp_path)
    lease = mine.take("a")
    assert lease is not None
    assert theirs.take("a") is None
    assert theirs.take("b") is not None
    mine.release(lease)
    assert not lease.is_held
    assert theirs.take("a") is not None


def test_a_lease_is_renewed_for_as_long_as_it_is_held(tmp_path: Path) -> None:
    """A worker of another host, whom kernel locks tell nothing, waits for ever."""
    mine, theirs = leases(tmp_path), leases(tmp_path, host="there")
    lease = mine.take("a")
    deadline = time.monotonic() + 3 * LEASE_S
    while time.monotonic() < deadline:
        assert theirs.take("a") is None
        time.sleep(0.05)
    assert lease is not None
    assert lease.is_held


def test_the_lease_of_a_dead_worker_of_this_host_is_free_at_once(tmp_path: Path) -> None:
    child = _start(_hold, tmp_path, "here")
    _wait_for_file(tmp_path / "a.lease")
    mine = Leases(tmp_path, lease_s=1000, host="here")
    assert mine.take("a") is None
    child.kill()
    child.join(10)
    assert wait_for_lease(mine, "a") < 5


def test_the_lease_of_a_dead_worker_of_another_host_runs_out(tmp_path: Path) -> None:
    child = _start(_hold, tmp_path, "there")
    _wait_for_file(tmp_path / "a.lease")
    mine = leases(tmp_path)
    child.kill()
    child.join(10)
    assert mine.take("a") is None  # its kernel lock is gone, but that says nothing between hosts
    assert 0.3 * LEASE_S < wait_for_lease(mine, "a") < 10


def test_a_holder_that_was_silent_for_too_long_learns_it_and_leaves_the_new_owner_alone(
    tmp_path: Path,
) -> None:
    silent, other = Leases(tmp_path, lease_s=5, host="here"), leases(tmp_path, host="there")
    lease = silent.take("a")
    assert lease is not None
    age(lease.path, 60)
    taken = other.take("a")
    assert taken is not None
    lease.renew()
    assert not lease.is_held
    silent.release(lease)
    assert taken.path.exists()
    taken.renew()
    assert taken.is_held


def test_a_file_system_that_fails_for_a_moment_costs_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Leases(tmp_path, lease_s=5, host="here")
    lease = mine.take("a")
    assert lease is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", _fail)
        lease.renew()
        assert lease.is_held
    lease.renew()
    assert lease.is_held
    assert lease.confirm()


def test_a_lease_that_cannot_be_renewed_for_as_long_as_it_lasts_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Leases(tmp_path, lease_s=LEASE_S, host="here").take("a")
    assert lease is not None
    monkeypatch.setattr(os, "utime", _fail)
    deadline = time.monotonic() + 20
    while lease.is_held:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_lease_is_confirmed_only_where_it_can_be_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is about to put something in place must know, not hope."""
    silent, other = Leases(tmp_path, lease_s=60, host="here"), leases(tmp_path, host="there")
    lease, gone = silent.take("a"), silent.take("b")
    assert lease is not None
    assert gone is not None
    age(lease.path, 120)
    assert other.take("a") is not None
    assert not lease.confirm()
    gone.path.unlink()
    assert not gone.confirm()
    unsure = silent.take("c")
    assert unsure is not None
    monkeypatch.setattr(os, "utime", _fail)
    assert not unsure.confirm()
    assert not unsure.is_held


def test_clocks_of_hosts_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now is the file system's: a host whose clock runs a day ahead takes nothing over."""
    lease = leases(tmp_path, host="there").take("a")
    assert lease is not None
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert leases(tmp_path).take("a") is None


def test_a_lease_that_is_being_written_is_held(tmp_path: Path) -> None:
    (tmp_path / "a.lease").touch()
    mine = leases(tmp_path)
    assert mine.take("a") is None
    age(tmp_path / "a.lease", 60)
    assert mine.take("a") is not None


def test_one_of_many_takers_gets_a_dead_lease(tmp_path: Path) -> None:
    """Four processes race for each of 30 leases that are out; no two believe that they hold one."""
    for number in range(30):
        path = tmp_path / f"n{number}.lease"
        path.touch()
        age(path, 60)
    takers = [_start(_take_all, tmp_path, f"host{n}") for n in range(4)]
    for taker in takers:
        taker.join(60)
        assert taker.exitcode == 0
    owners = [line for path in tmp_path.glob("won-*") for line in path.read_text().split()]
    assert sorted(owners) == sorted({f"n{number}" for number in range(30)})


def test_nothing_is_left_of_released_leases(tmp_path: Path) -> None:
    mine = leases(tmp_path)
    with mine.holding("a") as lease:
        assert lease is not None
        assert leases(tmp_path, host="there").take("a") is None
    assert list(tmp_path.iterdir()) == []


def _start(target: object, *arguments: object) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)  # type: ignore[arg-type]
    process.start()
    return process


def _fail(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _hold(directory: Path, host: str) -> None:
    Leases(directory, lease_s=LEASE_S, host=host).take("a")
    time.sleep(60)


def _take_all(directory: Path, host: str) -> None:
    mine = Leases(directory, lease_s=30, host=host)
    won = [name for name in (f"n{number}" for number in range(30)) if mine.take(name)]
    (directory / f"won-{host}").write_text(" ".join(won))
    time.sleep(0.5)  # holding them until every taker has tried


def _wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not (path.is_file() and path.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.01)
