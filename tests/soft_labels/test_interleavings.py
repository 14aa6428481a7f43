"""Every interleaving of two workers that label one shard: claims, expiry, renewal, publication and death.

The workers are the export's own. Each runs in a thread that stops before every operation on shared files, and a
scheduler tries every order of these steps, of the moments at which the leases expire, and of the moment at which a
worker is killed. Orders that lead to a state already seen (files, ages, each worker's steps so far) are not repeated.

The default tests try a seeded sample of the orders in which one lease expires, and `make test-slow` all of them. With
more events there are too many orders for CI: `make campaign` (KDECS_CAMPAIGN=1) tries all of them, `make test-slow` a
sample.
"""

import hashlib
import os
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kdecs.process import StopSignal
from kdecs.soft_labels import export
from kdecs.soft_labels.claims import Claims
from kdecs.soft_labels.format import ShardTable, published_record, shard_name

LEASE_S = 10.0
NUM_SAMPLED = 4_000
NUM_SAMPLED_BY_DEFAULT = 500
"""States that a sample of the orders looks at, in the long tests and in the default ones."""


class Abandoned(BaseException):
    """Ends the thread of a worker that is not run any further."""


class Actor(threading.Thread):
    """One worker, run step by step."""

    def __init__(self, name: str, body: Callable[["Actor"], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.steps: list[str] = []
        self.is_done = self.is_killed = self.is_abandoned = False
        self.seen_version: int | None = None  # while it polls: nothing new happened since
        self.fault: BaseException | None = None
        self._body, self._go, self._stopped = body, threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        self._go.acquire()
        try:
            self._body(self)
        except Abandoned:
            pass
        except BaseException as error:
            self.fault = error
        self.is_done = True
        self._stopped.release()

    def pause(self, label: str) -> None:
        """Stop before an operation until the scheduler chooses this worker again."""
        if self.is_abandoned:
            raise Abandoned
        self.steps.append(label)
        self._stopped.release()
        self._go.acquire()
        if self.is_abandoned:
            raise Abandoned

    def step(self) -> None:
        self._go.release()
        assert self._stopped.acquire(timeout=60), f"{self.name} hangs after {self.steps}"

    def abandon(self) -> None:
        self.is_abandoned = True
        self._go.release()
        self.join(60)


def pause(label: str) -> None:
    """Stop here if this thread is a worker."""
    actor = threading.current_thread()
    if isinstance(actor, Actor):
        actor.pause(label)


class World:
    """One run: a directory, a clock and two workers, driven by choices."""

    def __init__(self, directory: Path, expiries: int, kills: int, cleans: bool) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        (directory / ".work").mkdir(parents=True)
        self.directory, self.shard = directory, directory / shard_name(0)
        self.start = self.now = 1e9
        self.version = self.forced_ticks = 0
        self.ticks, self.kills, self.cleans = expiries, kills, cleans
        self.published: bytes | None = None
        self.workers = [self._worker(name) for name in "AB"]
        self.actors = [
            Actor(name, lambda actor, worker=worker: self._run(actor, worker))
            for name, worker in zip("AB", self.workers, strict=True)
        ]
        for actor in self.actors:
            actor.start()

    def _worker(self, name: str) -> export._Worker:
        claims = Claims(
            self.directory / ".work" / "leases",
            lease_s=LEASE_S,
            host=name,
            stamp=self.stamp,
            now=self.time_of_files,
            monotonic=lambda: self.now,
        )
        record = SimpleNamespace(pairs=(1,), entries_sha256="0" * 64)
        plan = SimpleNamespace(num_shards=1, num_pairs=1, record=record)
        config = SimpleNamespace(output=self.directory, top_k=0)
        runtime = SimpleNamespace(rank=0, world_size=1, device=name)  # unlike devices: other bytes
        scorer = SimpleNamespace(answer_words=("because",))
        return export._Worker(config, "", plan, claims, scorer, runtime, StopSignal(), lambda _: None)  # type: ignore[arg-type]

    def _run(self, actor: Actor, worker: export._Worker) -> None:
        while not worker.has_all_shards():
            if not worker.label_free_shards():
                actor.seen_version = self.version
                actor.pause("poll")
        if self.cleans:
            export.remove_temporaries(self.directory, LEASE_S, worker.claims)

    def stamp(self, path: Path) -> None:
        pause("stamp")
        os.utime(path, (self.now, self.now))

    def time_of_files(self) -> float:
        pause("judge")
        return self.now

    def choices(self) -> list[str]:
        """What may happen next. Time passes without end only while nobody can do anything else."""
        able = [a for a in self.actors if not (a.is_done or a.is_killed) and a.seen_version != self.version]
        names = [actor.name for actor in able]
        is_over = all(actor.is_done or actor.is_killed for actor in self.actors)
        if is_over:
            return []
        if self.ticks or not able:
            names.append("tick")
        if self.kills:
            names += [f"kill {actor.name}" for actor in self.actors if not actor.is_done]
        return names

    def do(self, choice: str, *, again: bool = False) -> None:
        """Take a choice and check what must hold after it, unless the same choices were taken and checked before."""
        self.version += 1
        if choice == "tick":
            self.now += 1.5 * LEASE_S
            self.forced_ticks += self.ticks == 0
            self.ticks = max(0, self.ticks - 1)
            assert self.forced_ticks < 4, f"deadlock: {[actor.steps for actor in self.actors]}"
        elif choice.startswith("kill"):
            self.kills -= 1
            next(actor for actor in self.actors if actor.name == choice[-1]).is_killed = True
        else:
            actor = next(actor for actor in self.actors if actor.name == choice)
            actor.seen_version = None
            actor.step()
            if actor.seen_version is not None:
                actor.seen_version = self.version
            assert actor.fault is None, actor.fault
        if not again:
            self.check()

    def check(self) -> None:
        """What holds at any moment: a shard that can be seen never changes, and has its record."""
        if self.published is None and self.shard.exists():
            self.published = self.shard.read_bytes()
        if self.published is not None:
            assert self.shard.read_bytes() == self.published, "a published shard was replaced"
            assert published_record(self.shard) is not None, "a shard can be seen without its record"

    def state(self) -> tuple[object, ...]:
        """All that the future depends on."""
        files = sorted(
            (
                path.name if path.suffix != ".tmp" else path.name.split(".")[1],
                self.owner(path),
                path.suffix == ".lease" and path.stat().st_mtime - self.start,
            )
            for path in self.directory.rglob("*")
            if path.is_file()
        )
        steps = [
            (tuple(a.steps), a.is_done, a.is_killed, a.seen_version == self.version) for a in self.actors
        ]
        return (*files, *steps, self.now, self.ticks, self.kills)

    def owner(self, path: Path) -> str:
        """Whose bytes a file has; the token of a claim differs from run to run."""
        data = path.read_bytes()
        return next((name for name in "AB" if f'"host": "{name}"'.encode() in data), "") or str(data)

    def finish(self) -> None:
        """What holds at the end: one shard, as on record, seen by all who live; nothing of theirs is left."""
        alive = [
            worker for worker, actor in zip(self.workers, self.actors, strict=True) if not actor.is_killed
        ]
        if alive:
            assert self.published is not None, "the shard was lost"
            record = published_record(self.shard)
            assert record is not None
            assert record.sha256 == hashlib.sha256(self.published).hexdigest()
            assert all(worker.records == {0: record} for worker in alive)
        if len(alive) == len(self.workers):
            left = [path for path in self.directory.rglob("*") if path.suffix in (".tmp", ".lease")]
            assert left == []
        assert not (self.directory / "quarantine").exists(), "a good shard was taken for a damaged one"

    def close(self) -> None:
        for actor in self.actors:
            if not actor.is_done:
                actor.abandon()


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations on shared files wait for the scheduler; a shard is a few bytes that tell its worker."""
    real = {name: getattr(os, name) for name in ("open", "link", "unlink", "replace")}

    def before(name: str, label: Callable[..., str | None]) -> None:
        def call(*arguments: object, **keywords: object) -> object:
            if step := label(*arguments):
                pause(step)
            return real[name](*arguments, **keywords)

        monkeypatch.setattr(os, name, call)

    def is_claim(path: object) -> bool:
        return str(path).endswith(".lease")

    before("open", lambda path, flags, *_: "create" if is_claim(path) and flags & os.O_EXCL else None)
    before("link", lambda source, *_: "link")
    before("unlink", lambda path, *_: "unlink" if str(path).endswith((".lease", ".tmp")) else None)
    before("replace", lambda source, *_: "record")
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(export, "ShardScoring", OneRow)
    monkeypatch.setattr(export, "shard_writer", tiny_writer)
    honest = Claims.take

    def take(self: Claims, name: str) -> object:
        claim = honest(self, name)
        if claim is not None:  # files are born at the clock's time
            os.utime(claim.path, (self.monotonic(), self.monotonic()))
        threading.current_thread().claim = claim  # type: ignore[attr-defined]
        return claim

    monkeypatch.setattr(Claims, "take", take)


class OneRow:
    """In the place of ShardScoring: one renewal of the claim, then one row."""

    def __init__(self, *_: object, on_chunk: Callable[[int], None], **__: object) -> None:
        self.agreement: dict[str, object] = {}
        self._on_chunk = on_chunk

    def tables(self) -> Iterator[ShardTable]:
        threading.current_thread().claim.renew()  # type: ignore[attr-defined]
        self._on_chunk(0)
        yield ShardTable(["d/1/1"], ["0"], ["train"], np.zeros((1, 1)), np.zeros(1))


@contextmanager
def tiny_writer(path: Path, *_: object) -> Iterator[SimpleNamespace]:
    data = f"the shard of {threading.current_thread().name}".encode()
    writer = SimpleNamespace(rows=0, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def append(table: ShardTable) -> None:
        writer.rows += len(table)

    writer.append = append
    yield writer
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("expiries", "kills", "cleans", "limit"),
    [
        (1, 0, False, NUM_SAMPLED_BY_DEFAULT),
        pytest.param(1, 0, False, None, marks=pytest.mark.slow),
        pytest.param(2, 0, False, NUM_SAMPLED, marks=pytest.mark.slow),
        pytest.param(1, 1, False, NUM_SAMPLED, marks=pytest.mark.slow),
        pytest.param(1, 0, True, NUM_SAMPLED, marks=pytest.mark.slow),
    ],
)
def test_no_order_of_events_loses_or_replaces_a_shard(
    tmp_path: Path, stepped: None, expiries: int, kills: int, cleans: bool, limit: int | None
) -> None:
    """Leases expire at `expiries` moments of any choice, and later whenever all wait; `kills` workers die.

    With `cleans`, a worker also removes temporary files at the end, as if its shard were the last. All orders are
    tried, or, with a limit, as many as lead to that number of states.
    """
    is_sample = limit is not None and os.environ.get("KDECS_CAMPAIGN") != "1"
    rng = random.Random(f"{expiries}/{kills}/{cleans}")
    seen: set[tuple[object, ...]] = set()
    pending: list[list[str]] = [[]]
    ends: Counter[str] = Counter()
    while pending and not (is_sample and len(seen) >= limit):
        # From anywhere, so that a sample is not of orders that begin alike.
        prefix = pending.pop(rng.randrange(len(pending)) if is_sample else -1)
        world = World(tmp_path / "run", expiries, kills, cleans)
        try:
            for choice in prefix[:-1]:
                world.do(choice, again=True)
            for choice in prefix[-1:]:
                world.do(choice)
            path = list(prefix)
            while (state := world.state()) not in seen:
                seen.add(state)
                choices = world.choices()
                if not choices:
                    world.finish()
                    ends[(world.published or b"nothing").decode()] += 1
                    break
                pending += [[*path, choice] for choice in choices[1:]]
                path.append(choices[0])
                world.do(choices[0])
        finally:
            world.close()
    assert {"the shard of A", "the shard of B"} <= ends.keys()
    assert len(seen) >= NUM_SAMPLED_BY_DEFAULT
    print(f"{len(seen)} states, {sum(ends.values())} ends: {dict(ends)}")
