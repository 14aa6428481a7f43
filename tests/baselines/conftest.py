"""A tiny RoBERTa that knows the words of all systems, small labelled corpora, and a short way to fit a system."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import ANSWER_WORDS, made_once, save_tiny_encoder

from kdecs.baselines.config import BASELINE_VERSION, AnyBaseline, BaselineCard, BaselineConfig, baseline_type
from kdecs.baselines.dialogues import DialogueEncoder, batch_labels, moved, pair_places, training_dialogue
from kdecs.baselines.kec import Knowledge
from kdecs.baselines.model import BaselineModel, Output
from kdecs.baselines.prediction import build_model
from kdecs.baselines.training import train_baseline
from kdecs.config import parse_config
from kdecs.corpus.pairs import candidate_pairs
from kdecs.corpus.reading import bundled_sample
from kdecs.corpus.schema import Dialogue, Evidence, Utterance
from kdecs.models import load_tokenizer
from kdecs.runtime import Runtime
from kdecs.student.model import load_language_model

torch.set_num_threads(1)
NUMBERS = [str(number) for number in range(1, 13)]
WORDS = [*ANSWER_WORDS, *NUMBERS, "yes", "no", "none"]
SYSTEMS: dict[str, dict[str, object]] = {
    "ecpe-2d": {"name": "ecpe-2d", "hidden_size": 16, "pair_size": 12},
    "kec": {"name": "kec", "hidden_size": 16, "layers": 2},
    "mgsag": {"name": "mgsag", "hidden_size": 16, "heads": 2},
    "ueca-prompt": {"name": "ueca-prompt", "max_utterances": 12, "window": None},
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer RoBERTa of 32 hidden units."""
    return made_once(tmp_path_factory, "baseline-base", lambda path: save_tiny_encoder(path, words=WORDS))


@pytest.fixture(scope="session")
def corpus_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train and valid: the first few dialogues of the bundled sample, short enough for a test."""
    directory = tmp_path_factory.mktemp("corpus")
    files = {}
    for split, count in (("train", 6), ("valid", 4)):
        raw = json.loads(bundled_sample(split).read_text(encoding="utf-8"))
        files[split] = directory / f"{split}.json"
        files[split].write_text(json.dumps({key: [raw[key][0][:6]] for key in list(raw)[:count]}))
    return files


@pytest.fixture(scope="session")
def values(base: Path, corpus_files: dict[str, Path]) -> dict[str, object]:
    """A baseline's config over the tiny base, without its output."""
    return {
        "corpus": {name: str(path) for name, path in corpus_files.items()},
        "system": SYSTEMS["ecpe-2d"],
        "model": {"base": str(base)},
        "batches": {"global_batch_dialogues": 2},
        "optimization": {"learning_rate": 3e-3, "epochs": 2},
    }


@pytest.fixture
def make_config(tmp_path: Path, values: dict[str, object]) -> Callable[..., AnyBaseline]:
    """A config of that baseline; keywords replace whole groups."""

    def make(output: str = "baseline", **groups: object) -> AnyBaseline:
        given = {**values, "output": str(tmp_path / output), **groups}
        return parse_config(baseline_type(given), given, source="test")

    return make


@pytest.fixture
def runtime() -> Runtime:
    """One rank on the CPU."""
    return Runtime(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> Path:
    """The directory of an ECPE-2D trained once, for tests that only read it."""
    output = tmp_path_factory.mktemp("baseline") / "trained"
    config = parse_config(BaselineConfig, {**values, "output": str(output)}, source="test")
    return train_baseline(config, Runtime(0, 0, 1, torch.device("cpu")))


EMOTIONS = ("happiness", "neutral", "sadness")


@dataclass
class Bench:
    """One system over the tiny base, to be run on dialogues in memory."""

    model: BaselineModel
    encoder: DialogueEncoder
    after: int = 0

    def batch(self, dialogues: Sequence[Dialogue]) -> tuple[object, ...]:
        """Inputs, pairs, which of them have spans, and labels."""
        found = [training_dialogue(self.encoder.encode(d), EMOTIONS, self.after) for d in dialogues]
        pairs_P3, spanned_P, labels = batch_labels(found)
        inputs = self.model.inputs([item.encoded for item in found], pairs_P3, self.encoder)
        inputs = moved(inputs, torch.device("cpu"))
        return inputs, pairs_P3, spanned_P, labels

    def output(self, dialogues: Sequence[Dialogue]) -> Output:
        """Logits of every pair j <= i + `after`, in order."""
        encoded = [self.encoder.encode(d) for d in dialogues]
        pairs_P3 = pair_places([candidate_pairs(d, after=self.after) for d in dialogues])
        self.model.eval()
        with torch.no_grad():
            inputs = self.model.inputs(encoded, pairs_P3, self.encoder)
            return self.model(inputs, pairs_P3, torch.ones(len(pairs_P3), dtype=torch.bool))

    def fit(
        self, dialogues: Sequence[Dialogue], *, steps: int, rate: float = 3e-3, heads_alone: bool = False
    ) -> float:
        """Train on all dialogues at once, `heads_alone` with the encoder as it is; the last loss."""
        self.model.language_model.requires_grad_(not heads_alone)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=rate)
        inputs, pairs_P3, spanned_P, labels = self.batch(dialogues)
        torch.manual_seed(0)
        self.model.train()
        loss = torch.zeros(())
        for _ in range(steps):
            optimizer.zero_grad()
            parts = self.model.losses(self.model(inputs, pairs_P3, spanned_P), labels, spanned_P)
            loss = torch.stack([part.mean for part in parts]).sum()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    def pair_accuracy(self, dialogues: Sequence[Dialogue]) -> float:
        """The share of labelled pairs whose cause is decided rightly at a probability of one half."""
        inputs, pairs_P3, spanned_P, labels = self.batch(dialogues)
        self.model.eval()
        with torch.no_grad():
            cause_P = self.model(inputs, pairs_P3, spanned_P).cause_P
        return float(((cause_P > 0) == (labels.is_cause_P == 1)).float().mean())


@pytest.fixture
def make_bench(base: Path) -> Callable[..., Bench]:
    """A system by its name, over the tiny base or a livelier one of the same tokenizer, without dropout."""

    def make(
        name: str,
        *,
        task: str = "ecspe",
        knowledge: Knowledge | None = None,
        place: Path = base,
        after: int = 0,
        **settings: object,
    ) -> Bench:
        given = {**SYSTEMS[name], **({} if name == "ueca-prompt" else {"dropout": 0.0}), **settings}
        card = BaselineCard.model_validate(
            {
                "version": BASELINE_VERSION,
                "system": given,
                "task": "ecpe" if name == "ueca-prompt" else task,
                "emotions": EMOTIONS,
                "max_utterance_tokens": 64,
                "threshold": 0.5,
                "candidates_after": after,
            }
        )
        tokenizer = load_tokenizer(place)
        torch.manual_seed(0)
        language_model = load_language_model(place, logs=False)
        for module in language_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with torch.no_grad():  # with Transformers' small random weights all utterances look alike
            for parameter in language_model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(6.0)
        return Bench(
            build_model(language_model, tokenizer, card, knowledge), DialogueEncoder(tokenizer, 64), after
        )

    return make


Line = tuple[str, str, str, tuple[int, ...]]
"""Speaker, text, emotion, and the turns of the causes."""


def dialogue_of(name: str, lines: Sequence[Line]) -> Dialogue:
    """A dialogue whose causes have the whole utterance as their span."""
    return Dialogue(
        name,
        tuple(
            Utterance(
                turn,
                speaker,
                text,
                emotion,
                None
                if emotion == "neutral"
                else tuple(Evidence(cause, lines[cause - 1][1]) for cause in causes),
            )
            for turn, (speaker, text, emotion, causes) in enumerate(lines, start=1)
        ),
    )


@pytest.fixture
def make_dialogue() -> Callable[[str, Sequence[Line]], Dialogue]:
    """A labelled dialogue from its lines."""
    return dialogue_of
