"""How long the prompts of fold 1 are, in words or in the tokens of a tokenizer.

Counted are the student's prompts (Eq. 5); for a tokenizer without a mask token the teacher's (Eq. 1).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdecs.corpus.pairs import Pair, pairs_of
from kdecs.corpus.prompts import student_prompt, teacher_prompt
from kdecs.corpus.schema import Corpus
from kdecs.errors import ModelError


def prompt_words(corpus: Corpus) -> list[int]:
    """Words (split at white space) of the student's prompt of every pair; each mask is a word."""
    return [
        len(_student_text(pair, "<mask>", "\n").split())
        for dialogue in corpus.dialogues
        for pair in pairs_of(dialogue)
    ]


def prompt_tokens(corpus: Corpus, tokenizer: Any) -> list[int]:
    """Tokens of the whole prompt of every pair, special ones included, nothing truncated."""
    text_of = _prompt_writer(tokenizer)
    lengths: list[int] = []
    for dialogue in corpus.dialogues:
        if texts := [text_of(pair) for pair in pairs_of(dialogue)]:
            lengths += map(len, tokenizer(texts, verbose=False)["input_ids"])
    return lengths


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model's directory; nothing is downloaded. Raises ModelError, one line."""
    if not directory.is_dir():
        raise ModelError(f"tokenizer {directory}: found no directory, expected one with a tokenizer's files")
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"tokenizer {directory}: {reason}; expected a tokenizer's files") from None


def _prompt_writer(tokenizer: Any) -> Callable[[Pair], str]:
    mask, separator = tokenizer.mask_token, tokenizer.sep_token or "\n"
    if mask is not None:
        return lambda pair: _student_text(pair, mask, separator)
    return lambda pair: (
        teacher_prompt(
            pair.dialogue, pair.target, pair.candidate, emotion=str(pair.emotion), separator=separator
        ).text
    )


def _student_text(pair: Pair, mask: str, separator: str) -> str:
    prompt = student_prompt(pair.dialogue, pair.target, pair.candidate, mask=mask, separator=separator)
    return prompt.text
