"""A small base model from scratch, so that the demo needs no download: a tokenizer and a language model of a corpus.

It learns from the training split alone. Its texts are worded like the prompts (turn, speaker, utterance, a copy of an
earlier utterance), without causes and connectives. The objective is causal language modelling for llama, span filling
for t5, and masked language modelling for roberta. That takes half a minute, so there are no epochs, checkpoints or
validation.

Legend: B sequences, T tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kdecs.artifact import check_output, write_manifest
from kdecs.config import config_hash, input_checksums, write_config
from kdecs.corpus.answer_words import CONNECTIVES
from kdecs.corpus.pairs import pairs_of
from kdecs.corpus.prompts import history_separator, student_prompt, teacher_prompt
from kdecs.corpus.schema import KNOWN_EMOTIONS, Dialogue
from kdecs.corpus.splits import training_split
from kdecs.demo.config import BaseModelConfig
from kdecs.errors import TrainingError
from kdecs.models import save_pretrained
from kdecs.process import ProgressBar, StopSignal
from kdecs.runtime import Runtime, seed_everything
from kdecs.training.loop import GuardedSteps

IGNORED = -100
NUM_SENTINELS = 10
_REPEATS = 2000  # of each answer word, so that its merges are learnt first and it is one token
_MASK_SHARE = 0.4  # with many masks per sequence a small model gets beyond word frequencies sooner


def train_base_model(config: BaseModelConfig, runtime: Runtime, stop: StopSignal) -> Path:
    """Train tokenizer and model, write a Transformers directory of kind base-model, and return its path.

    A stop saves nothing: the same command starts again from the beginning. Raises Stopped after a requested stop,
    TrainingError if a loss or gradient is not finite, ArtifactError if the output holds other work.
    """
    work = config_hash(config)
    check_output(config.output, "base-model", work)
    seed_everything(config.seed)
    dialogues = list(training_split(config.corpus))
    tokenizer = train_tokenizer(documents(dialogues, seed=config.seed), config)
    model = _new_model(config, tokenizer).to(runtime.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01)
    steps = GuardedSteps(model, optimizer, max_grad_norm=1.0, runtime=runtime)
    batches = _batches(dialogues, tokenizer, config)
    mean_loss = float("nan")
    with ProgressBar(config.max_steps, desc=f"base model {config.name}", unit="step") as bar:
        for step in range(config.max_steps):
            stop.raise_if_requested(f"base model {config.name}: stopped; run the same command again")
            inputs = {name: value.to(runtime.device) for name, value in next(batches).items()}
            loss = _loss(model, inputs, config.architecture)
            # Warm-up over 20 steps, which a model with random weights needs, then linear decay to 0.
            warmup, decay = min(1.0, (step + 1) / 20), 1 - step / config.max_steps
            steps.take(loss, config.learning_rate * warmup * decay)
            # Reading the loss waits for the device; the last step's is read in any case, before anything is saved.
            if step % 20 == 0 or step == config.max_steps - 1:
                mean_loss = float(loss.detach())
                if not steps.all_finite():
                    raise TrainingError(
                        f"base model {config.name}: a loss or gradient is not finite near step {step}; "
                        "lower learning_rate"
                    )
            bar.update(loss=f"{mean_loss:.3f}")
    return _save(config, model, tokenizer, mean_loss, work)


def _loss(model: Any, inputs: dict[str, Tensor], architecture: str) -> Tensor:
    if architecture != "roberta":
        return model(**inputs).loss
    # The head runs at the masked positions only, which saves half of a step's time.
    states_BTH = model.base_model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    chosen_BT = inputs["labels"] != IGNORED
    return functional.cross_entropy(model.lm_head(states_BTH[chosen_BT]), inputs["labels"][chosen_BT])


def documents(
    dialogues: Sequence[Dialogue], *, seed: int, mask: str | None = None, separator: str = "\n"
) -> list[str]:
    """Training texts: one prompt per pair, in a seeded order, without causes and connectives.

    They are Eq. 1 without the connective; with a `mask` every other one is the student's (Eq. 5) with its emotion.
    """
    texts = []
    for number, pair in enumerate(pair for dialogue in dialogues for pair in pairs_of(dialogue, "all")):
        place = (pair.dialogue, pair.target, pair.candidate)
        emotion = str(pair.emotion)
        if mask is None or (number + seed) % 2:
            texts.append(teacher_prompt(*place, emotion=emotion, separator=separator).text)
        else:
            text = student_prompt(*place, mask=mask, separator=separator).text
            texts.append(text.replace(mask, emotion, 1))
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[n] for n in order]


def _batches(
    dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerFast, config: BaseModelConfig
) -> Iterator[dict[str, Tensor]]:
    generator = np.random.default_rng(config.seed)
    epoch = 0
    while True:
        texts = documents(
            dialogues,
            # Seeds of neighbouring epochs differ by one, so that each pair comes in both wordings.
            seed=config.seed + epoch,
            mask=tokenizer.mask_token if config.architecture == "roberta" else None,
            separator=history_separator(tokenizer),
        )
        for start in range(0, len(texts), config.batch_size):
            ids = tokenizer(texts[start : start + config.batch_size])["input_ids"]
            # Long texts are cut at the start: the end of a prompt holds target and candidate.
            rows = [np.asarray(row[:1] + row[1:][-(config.sequence_tokens - 1) :]) for row in ids]
            yield _batch(rows, tokenizer, config, generator)
        epoch += 1


def _batch(
    rows: list[np.ndarray],
    tokenizer: PreTrainedTokenizerFast,
    config: BaseModelConfig,
    generator: np.random.Generator,
) -> dict[str, Tensor]:
    if config.architecture == "t5":
        pairs = [_fill_span(row, tokenizer, generator) for row in rows]
        ids_BT, mask_BT = _pad([source for source, _ in pairs], tokenizer.pad_token_id)
        labels, _ = _pad([target for _, target in pairs], IGNORED)
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels}
    ids_BT, mask_BT = _pad(rows, tokenizer.pad_token_id)
    if config.architecture == "llama":
        labels_BT = ids_BT.masked_fill(mask_BT == 0, IGNORED)
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}
    chosen_BT = torch.from_numpy(generator.random(ids_BT.shape) < _MASK_SHARE) & (mask_BT == 1)
    chosen_BT &= (ids_BT != tokenizer.bos_token_id) & (ids_BT != tokenizer.mask_token_id)
    labels_BT = ids_BT.masked_fill(~chosen_BT, IGNORED)
    # One masked token in ten keeps its word, so that unmasked positions learn useful states too.
    shown_BT = torch.from_numpy(generator.random(ids_BT.shape) < 0.1)
    masked_BT = ids_BT.masked_fill(chosen_BT & ~shown_BT, int(tokenizer.mask_token_id))
    return {"input_ids": masked_BT, "attention_mask": mask_BT, "labels": labels_BT}


def _fill_span(
    row: np.ndarray, tokenizer: PreTrainedTokenizerFast, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Source and target of T5's span filling: several spans of 1 to 5 tokens, about a fifth of all tokens."""
    sentinels = [int(tokenizer.convert_tokens_to_ids(f"<extra_id_{n}>")) for n in range(NUM_SENTINELS)]
    num_spans = min(len(sentinels) - 1, max(1, len(row) // 15))
    starts = np.sort(
        generator.choice(max(1, len(row) - 2), size=min(num_spans, max(1, len(row) - 2)), replace=False)
    )
    source: list[int] = []
    target: list[int] = []
    position = 0
    for number, start in enumerate(starts):
        if start < position:  # inside the span before it
            continue
        end = min(int(start) + int(generator.integers(1, 6)), len(row) - 1)
        source += [*row[position:start], sentinels[number]]
        target += [sentinels[number], *row[start:end]]
        position = end
    source += list(row[position:])
    return np.asarray(source), np.asarray([*target, tokenizer.eos_token_id])


def _pad(rows: Sequence[np.ndarray], value: int | None) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), longest), int(value or 0), dtype=torch.long)
    mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
    for n, row in enumerate(rows):
        ids_BT[n, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask_BT[n, : len(row)] = 1
    return ids_BT, mask_BT


def _new_model(config: BaseModelConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    shape = {"vocab_size": len(tokenizer), "hidden_size": config.hidden_size}
    if config.architecture == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                **shape,
                intermediate_size=3 * config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                max_position_embeddings=config.max_positions,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                # The tokenizer pads with </s>; as the model's padding id its embedding would never be trained.
                pad_token_id=None,
                tie_word_embeddings=True,
            )
        )
    if config.architecture == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=config.hidden_size,
                d_kv=config.hidden_size // config.num_heads,
                d_ff=3 * config.hidden_size,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                dropout_rate=0.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                # As in T5 itself, which has no token for the begin.
                decoder_start_token_id=tokenizer.pad_token_id,
            )
        )
    return RobertaForMaskedLM(
        RobertaConfig(
            **shape,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_positions + 2,  # RoBERTa's positions start after the pad id
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _save(
    config: BaseModelConfig, model: Any, tokenizer: PreTrainedTokenizerFast, loss: float, work: str
) -> Path:
    output = config.output
    output.mkdir(parents=True, exist_ok=True)
    write_config(config, output)
    save_pretrained([model, tokenizer], output)
    write_manifest(
        output,
        "base-model",
        config_hash=work,
        inputs=input_checksums(corpus_train=config.corpus.train),
        files=[path.name for path in output.iterdir() if path.is_file() and not path.name.startswith(".")],
        details={"architecture": config.architecture, "final_loss": round(loss, 4)},
    )
    return output


def train_tokenizer(texts: Iterable[str], config: BaseModelConfig) -> PreTrainedTokenizerFast:
    """A fast tokenizer of the architecture's kind, with the special tokens, template and mask of its family."""
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
        # All 256 bytes, so that no text of another corpus is unknown.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_answer_words(texts), trainer)
    wrapped = _wrap(tokenizer, special, config)
    wrapped.model_max_length = config.max_positions
    return wrapped


def _with_answer_words(texts: Iterable[str]) -> Iterable[str]:
    yield from texts
    # " because" after a space is what prompts have; "because" alone is for tokenizers that add no space.
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
    # Takes the space before it, as RoBERTa's own: the answer word that replaces it begins with that space.
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
