"""What tests of several folders share: stops and kills, damage, tiny networks and tokenizers, and child processes.

Everything heavy (torch, transformers) is imported inside the function that needs it, so that a test module that wants
a port or a damaged file does not pay for a network. Import it as `from support import ...`: pytest puts this folder on
the path, and `child_environment` does the same for child processes.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kdecs.artifact import file_lock, read_manifest, write_manifest
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import COARSE_EMOTIONS, FINE_EMOTIONS
from kdecs.process import StopSignal

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
ANSWER_WORDS = sorted({*CONNECTIVES, *COARSE_EMOTIONS, *FINE_EMOTIONS})


# --- Stops and kills ---------------------------------------------------------------------------------------------


class StopAfter(StopSignal):
    """A stop signal that arrives after its owner has looked at it `looks` times; without a number it never comes."""

    def __init__(self, looks: int | None = None) -> None:
        self.looks = looks
        super().__init__()

    @property
    def requested(self) -> bool:  # type: ignore[override]
        if self.looks is None:
            return False
        self.looks -= 1
        return self.looks < 0

    @requested.setter
    def requested(self, value: bool) -> None:
        if value:
            self.looks = 0


class Killed(Exception):
    """Stands for a SIGKILL inside one process: nothing in the code under test catches it."""


def kill(*arguments: object, **keywords: object) -> None:
    """Raise Killed, in the place of whatever function was to be called."""
    raise Killed


# --- Damage and comparison ---------------------------------------------------------------------------------------


def leave_temporary(path: Path) -> Path:
    """An empty temporary file beside a path, as a writer of it that was killed leaves it."""
    from kdecs.artifact import temporary_path

    path.parent.mkdir(parents=True, exist_ok=True)
    leftover = temporary_path(path)
    leftover.touch()
    return leftover


def flip_bit(path: Path, offset: int | None = None, bit: int = 0) -> bytes:
    """Flip one bit of a file, of its middle byte unless told otherwise; returns the bytes as they were."""
    before = path.read_bytes()
    damaged = bytearray(before)
    damaged[len(before) // 2 if offset is None else offset] ^= 1 << bit
    path.write_bytes(damaged)
    return before


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (exec, (f"open({str(self.mark)!r}, 'w').close()",))  # type: ignore[return-value]


def rewrite_manifest(directory: Path, *more: str) -> None:
    """Make an artifact's manifest agree with its files again, and list `more`, as one who forges them would."""
    manifest = read_manifest(directory)
    write_manifest(
        directory,
        manifest.kind,
        config_hash=manifest.config_hash,
        inputs=manifest.inputs,
        files=[*(entry.path for entry in manifest.files), *more],
        rows={entry.path: entry.rows for entry in manifest.files if entry.rows is not None},
        details=manifest.details,
    )


def change_json(path: Path, **changes: object) -> None:
    """Set keys of a file that holds a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(directory: Path) -> "dict[str, torch.Tensor]":
    """All tensors of a product's safetensors files (adapter, model or heads), by name; those of checkpoints aside."""
    from safetensors.torch import load_file

    paths = [
        path
        for path in sorted(directory.rglob("*.safetensors"))
        if "checkpoints" not in path.relative_to(directory).parts
    ]
    files = [load_file(path) for path in paths]
    found = {name: tensor for file in files for name, tensor in file.items()}
    assert found and len(found) == sum(map(len, files)), f"{directory}: no weights, or one name in two files"
    return found


def assert_same_weights(left: Path, right: Path) -> None:
    """Two products hold the same tensors, bit for bit."""
    import torch

    first, second = weights(left), weights(right)
    assert first.keys() == second.keys()
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different, f"{left} and {right} differ in {different}"


# --- Tiny networks and tokenizers --------------------------------------------------------------------------------

TINY: dict[str, dict[str, int]] = {
    "llama": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "t5": {"d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 3, "num_heads": 6},
    "encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}


def tiny_config(kind: str, **changes: Any) -> "PretrainedConfig":
    """The Transformers config of a tiny network: llama, t5, roberta, bert, mpnet, modernbert or xlm-roberta."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **{**TINY.get(kind, TINY["encoder"]), **changes})


def _sample_lines(words: Iterable[str]) -> list[str]:
    """The bundled training texts, and words so often that a small vocabulary holds each as one token."""
    texts = [u.text for d in read_corpus(bundled_sample("train")).dialogues for u in d.utterances]
    return [*texts, *[" " + " ".join(words)] * 200]


def tiny_tokenizer(kind: str, words: Iterable[str] = ANSWER_WORDS) -> "PreTrainedTokenizerFast":
    """A tokenizer of 900 tokens of an encoder's own sort, in which each of `words` is one token.

    WordPiece for bert and mpnet, byte-level BPE for roberta and modernbert, Unigram for xlm-roberta.
    """
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    words = list(words)
    if kind in ("bert", "modernbert"):
        special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        mask = "[MASK]"
    else:
        special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        special |= {"cls_token": "<s>", "sep_token": "</s>"}
        mask = "<mask>"
    names = [*dict.fromkeys(special.values()), mask]
    options: dict[str, Any] = {"vocab_size": 900, "special_tokens": names, "show_progress": False}
    if kind in ("bert", "mpnet"):
        tokenizer = Tokenizer(models.WordPiece(unk_token=special["unk_token"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    elif kind in ("roberta", "modernbert"):
        tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**options, unk_token=special["unk_token"])
    tokenizer.train_from_iterator(_sample_lines(words), trainer)
    if kind == "xlm-roberta":  # the Unigram trainer drops rare words; a large vocabulary would hold them
        trained = json.loads(tokenizer.to_str())["model"]
        pieces = [(piece, score) for piece, score in trained["vocab"] if piece.strip("▁") not in words]
        pieces += [(f"▁{word}", -4.0) for word in words]
        tokenizer.model = models.Unigram(pieces, unk_id=trained["unk_id"])
    first, last = special["cls_token"], special["sep_token"]
    if kind == "roberta":  # unlike a template it takes the leading space out of a token's offsets
        ends = [(name, tokenizer.token_to_id(name)) for name in (last, first)]
        tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    else:
        second = "$B:1 {last}:1" if kind == "bert" else "{last} $B {last}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} {second.format(last=last)}",
            special_tokens=[(name, tokenizer.token_to_id(name)) for name in (first, last)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token=AddedToken(mask, lstrip=kind != "bert", special=True),
        model_max_length=256,
        **special,
    )


def save_tiny_encoder(directory: Path, kind: str = "roberta", words: Iterable[str] = ANSWER_WORDS) -> Path:
    """Save a random masked language model with 256 positions, and its tokenizer, to a directory; always the same."""
    import torch
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging

    tokenizer = tiny_tokenizer(kind, words)
    ids = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    # RoBERTa's relatives count positions from the padding's id on.
    positions = 256 + (0 if kind in ("bert", "modernbert") else tokenizer.pad_token_id + 1)
    if kind == "modernbert":
        ids |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    elif kind == "roberta":
        ids["type_vocab_size"] = 1
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = tiny_config(kind, **ids, max_position_embeddings=positions)
    AutoModelForMaskedLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_lively_encoder(directory: Path, kind: str = "roberta") -> Path:
    """A tiny encoder, of DistilBERT too, whose layers do not cancel out.

    With Transformers' small random weights every mask looks alike.
    """
    import torch
    from transformers import AutoModelForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

    if kind != "distilbert":
        save_tiny_encoder(directory, kind)
        model = AutoModelForMaskedLM.from_pretrained(directory)
    else:
        save_tiny_encoder(directory, "bert")
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 256}
        model = DistilBertForMaskedLM(DistilBertConfig(vocab_size=900, pad_token_id=0, **sizes))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    return directory


def save_tiny_decoder(directory: Path, config: "PretrainedConfig | None" = None) -> Path:
    """Save a random LLaMA, or a decoder of another config, whose byte-level tokenizer reads and writes any text.

    Its weights are so large that every token matters.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer("roberta")
    config = config or tiny_config("llama")
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.max_position_embeddings = 2048
    config.initializer_range = 0.15
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that the first worker to ask for it makes and all workers of the run share. Read-only: copy it.

    `name` is unique in the whole suite; `make` is given a path that does not exist yet.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory = base / "shared" / name
    with file_lock(directory.with_name(f"{name}.lock")):
        done = directory.with_name(f"{name}.done")
        if not done.exists():
            make(directory)
            done.touch()
    return directory


def empty_mlflow(factory: pytest.TempPathFactory) -> Path:
    """A SQLite database with MLflow's schema and nothing else. Making it takes seconds; copy it."""

    def make(directory: Path) -> None:
        from mlflow import MlflowClient

        directory.mkdir(parents=True)
        MlflowClient(f"sqlite:///{directory / 'mlflow.db'}").search_experiments()

    return made_once(factory, "mlflow", make) / "mlflow.db"


# --- Child processes ---------------------------------------------------------------------------------------------


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child: this checkout and these tests on the path, on the CPU, one thread."""
    paths = [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "KDECS_DEVICE": "cpu",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def run_python(
    *arguments: object, timeout_s: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python with arguments (a script, or -c, or -m) from the checkout's root; waits for its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=child_environment(**environment),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def start_python(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start this Python with arguments from the checkout's root, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=child_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


_SERVER = multiprocessing.get_context("forkserver")


class ForkedPython:
    """A process that runs an entry script as `start_python` does, forked from one that has imported the libraries.

    Most of a start's time is the import of torch, Transformers and DeepSpeed, which the processes of a test run share
    so. It has the methods of `subprocess.Popen` that tests use.
    """

    def __init__(
        self,
        script: str | Path,
        arguments: Iterable[object],
        environment: dict[str, str],
        log: Path | None = None,
    ) -> None:
        """Start it. With a `log` all that it prints is appended to that file, otherwise `communicate` returns it."""
        place = Path(tempfile.mkdtemp(prefix="forked-"))
        self._streams = (log, log) if log else (place / "out", place / "err")
        for path in self._streams:
            path.touch()  # the process may be killed before it opens them
        self.args = [str(script), *map(str, arguments)]
        _SERVER.set_forkserver_preload(["preloaded"])
        # A daemon, so that pytest does not wait at its end for one that a failed test has left behind.
        self._process = _SERVER.Process(
            target=_run_script,
            args=(self.args, environment, [str(path) for path in self._streams]),
            daemon=True,
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        weakref.finalize(self, _clear_up, self._process, place)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait, and return what was printed to standard output and error."""
        self.wait(timeout)
        out, err = (path.read_text(errors="replace") for path in self._streams)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _clear_up(process: "multiprocessing.process.BaseProcess", place: Path) -> None:
    if process.exitcode is None:
        process.kill()
    shutil.rmtree(place, ignore_errors=True)


def _run_script(argv: list[str], environment: dict[str, str], streams: list[str]) -> None:
    """The body of a forked process: its streams, environment and arguments, then the script."""
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def start_forked(
    script: str | Path, *arguments: object, log: Path | None = None, **environment: str
) -> ForkedPython:
    """Start an entry script of the checkout (launch/NAME.py) in a forked process."""
    return ForkedPython(ROOT / script, arguments, child_environment(**environment), log)


def run_forked(
    script: str | Path, *arguments: object, timeout_s: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run an entry script of the checkout in a forked process to its end."""
    process = start_forked(script, *arguments, **environment)
    try:
        out, err = process.communicate(timeout_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


def start_forked_ranks(
    script: str | Path, *arguments: object, num_ranks: int = 2, log: Path | None = None
) -> list[ForkedPython]:
    """Start the ranks of a job in forked processes, with the environment that a launcher gives them."""
    shared = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start_forked(script, *arguments, log=log, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(num_ranks)
    ]


def run_forked_ranks(
    script: str | Path, *arguments: object, num_ranks: int = 2, timeout_s: float = 1200
) -> subprocess.CompletedProcess[str]:
    """Run the ranks of a job in forked processes to their end: what all of them printed, and the worst exit code."""
    ranks = start_forked_ranks(script, *arguments, num_ranks=num_ranks)
    try:
        ends = [rank.communicate(timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    worst = max((rank.wait() for rank in ranks), key=abs)
    return subprocess.CompletedProcess(
        ranks[0].args, worst, *("".join(parts) for parts in zip(*ends, strict=True))
    )


def wait_until(
    condition: Callable[[], object], what: str, timeout_s: float = 120, poll_s: float = 0.02
) -> None:
    """Wait until a condition holds; fails naming what was awaited."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain until {what}"
        time.sleep(poll_s)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
