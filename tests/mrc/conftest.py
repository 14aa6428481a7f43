"""A tiny BERT-like encoder with segments and its own word-piece tokenizer, and small labelled corpora."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from kdecs.config import parse_config
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.mrc.config import MrcConfig
from kdecs.runtime import Runtime

torch.set_num_threads(1)
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_piece_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer: [CLS] question [SEP] context [SEP], segments 0 and 1."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT of 32 hidden units, saved as a masked language model without an answer head."""
    directory = tmp_path_factory.mktemp("base")
    texts = [u.text for d in read_corpus(bundled_sample("train")).dialogues for u in d.utterances]
    tokenizer = word_piece_tokenizer([*texts, "The target utterance is evidence span emotion relevant"] * 3)
    torch.manual_seed(0)
    transformers_logging.disable_progress_bar()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
    )
    BertForMaskedLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


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


@pytest.fixture
def make_config(tmp_path: Path, base: Path, corpus_files: dict[str, Path]) -> Callable[..., MrcConfig]:
    """A baseline's config over the tiny base; keywords replace whole groups."""

    def make(output: str = "mrc", **groups: object) -> MrcConfig:
        values: dict[str, object] = {
            "output": str(tmp_path / output),
            "corpus": {name: str(path) for name, path in corpus_files.items()},
            "model": {"base": str(base), "max_tokens": 256},
            "optimization": {"learning_rate": 3e-3, "epochs": 2},
        }
        return parse_config(MrcConfig, {**values, **groups}, source="test")

    return make


@pytest.fixture
def runtime() -> Runtime:
    """One rank on the CPU."""
    return Runtime(0, 0, 1, torch.device("cpu"))
