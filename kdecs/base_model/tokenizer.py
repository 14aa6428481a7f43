"""A small byte-level BPE tokenizer trained on a corpus, with every answer word as one token."""

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kdecs.base_model.config import BaseModelConfig
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.schema import KNOWN_EMOTIONS

NUM_SENTINELS = 10
_REPEATS = 2000  # makes each answer word frequent enough that its merges are learned first


def train_tokenizer(texts: Iterable[str], config: BaseModelConfig) -> PreTrainedTokenizerFast:
    """A fast tokenizer of the architecture's kind: special tokens, template and mask as its family has them."""
    special = {
        "llama": ["<unk>", "<s>", "</s>"],
        "t5": ["<pad>", "</s>", "<unk>", *(f"<extra_id_{n}>" for n in range(NUM_SENTINELS))],
        "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    }[config.architecture]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_answer_words(texts), trainer)
    wrapped = _wrap(tokenizer, special, config)
    wrapped.model_max_length = config.max_positions
    return wrapped


def _with_answer_words(texts: Iterable[str]) -> Iterable[str]:
    yield from texts
    # " because" (after a space) for the causal prompt, "because" (first) where a tokenizer adds no space.
    words = [*CONNECTIVES, *sorted(KNOWN_EMOTIONS)]
    line = "".join(f" {word}" for word in words)
    for _ in range(_REPEATS):
        yield line
        yield from words


def _wrap(tokenizer: Tokenizer, special: Sequence[str], config: BaseModelConfig) -> PreTrainedTokenizerFast:
    ids = {token: tokenizer.token_to_id(token) for token in special}
    if config.architecture == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
        )
    if config.architecture == "t5":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", ids["</s>"])]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
            extra_special_tokens=[f"<extra_id_{n}>" for n in range(NUM_SENTINELS)],
        )
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )
