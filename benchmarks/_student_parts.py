"""What the student's benchmarks share: encoders of a known shape with random weights and a tokenizer of the corpus."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import COARSE_EMOTIONS, FINE_EMOTIONS

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@dataclass(frozen=True)
class Shape:
    """An architecture's sizes; the vocabulary is as large as the real one's, whatever of it the tokenizer uses."""

    description: str
    model: Any
    config: Any
    sizes: dict[str, int]


SHAPES = {
    "minilm": Shape(
        "MiniLM-L6's shape (6 layers of 384)",
        BertForMaskedLM,
        BertConfig,
        {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
        | {"intermediate_size": 1536, "max_position_embeddings": 512},
    ),
    "base": Shape(
        "RoBERTa-base's shape (12 layers of 768)",
        RobertaForMaskedLM,
        RobertaConfig,
        {"vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
}


def make_base(directory: Path, shape: Shape, corpus_file: Path) -> Path:
    """Random weights of a shape, and a byte-level tokenizer trained on a corpus, as a Transformers directory."""
    tokenizer = corpus_tokenizer(corpus_file)
    torch.manual_seed(0)
    config = shape.config(
        **shape.sizes,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    shape.model(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def corpus_tokenizer(corpus_file: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the corpus's words; every answer word is one token."""
    words = " " + " ".join(sorted({*CONNECTIVES, *COARSE_EMOTIONS, *FINE_EMOTIONS, "excited"}))
    texts = [u.text for d in read_corpus(corpus_file).dialogues for u in d.utterances]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *[words] * 200], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_max_length=512,
    )


def some_dialogues(corpus_file: Path, directory: Path, count: int) -> Path:
    """A RECCON file of some of a corpus's dialogues, evenly spaced: a benchmark of some batches tokenises no more."""
    raw = json.loads(corpus_file.read_text(encoding="utf-8-sig"))
    keys = list(raw)
    path = directory / corpus_file.name
    places = np.linspace(0, len(keys) - 1, min(count, len(keys))).astype(int)
    path.write_text(json.dumps({keys[place]: raw[keys[place]] for place in places}), encoding="utf-8")
    return path
