"""Prompt texts of teacher (Eq. 1) and student (Eq. 5), with the character ranges that training needs.

Both begin with the history u_1 … u_{i-1}, joined by the tokenizer's separator, by a newline if it has none, or by its
end token if it reads a newline as a space (`history_separator`). Prompts are tokenised as a whole. A mask is found by
its character offset, not by its token id, since a speaker may have typed a mask token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kdecs.corpus.schema import Dialogue
from kdecs.errors import DialogueError

PROMPT_VERSION = 1
"""Part of every lineage, so that labels and caches of different template versions are never mixed."""


@dataclass(frozen=True, slots=True)
class PromptVariant:
    """How a student's prompt differs from Eq. 5.

    If `has_connective` is false, <mask_cau> is left out (the last two rows of Table 5). `given_emotions` replaces
    <mask_emo> with the target's emotion (Table 6), looked up in this table of labels to show; labels that it does not
    name are shown unchanged, and None keeps the mask. `history_utterances` keeps only the last k utterances before
    the target. Candidates may follow the target by `candidates_after` turns: their clause is as any other's, and the
    history still ends before u_i. With `has_short_branch` only `<mask_cau> d_j sp_j: u_j <mask_st> <mask_ed>` follows
    the target clause.
    """

    has_connective: bool = True
    given_emotions: Mapping[str, str] | None = None
    history_utterances: int | None = None
    has_short_branch: bool = False
    candidates_after: int = 0

    @property
    def key(self) -> dict[str, Any]:
        """What tells this variant's encodings from others'."""
        fields = asdict(self)
        # Caches of prompts with the paper's branches were built before there were others.
        if not self.has_short_branch:
            del fields["has_short_branch"]
        if not self.candidates_after:
            del fields["candidates_after"]
        return fields


EQ_5 = PromptVariant()
"""The student's prompt as the paper writes it."""


@dataclass(frozen=True, slots=True)
class TeacherPrompt:
    """The text before the connective, and the character ranges that may be cut to fit a model."""

    text: str
    history_end: int
    target_range: tuple[int, int]
    candidate_range: tuple[int, int]


@dataclass(frozen=True, slots=True)
class StudentPrompt:
    """A text with masks: the character offset of each mask, and the ranges [start, end) of u_i's and u_j's copies.

    `emotion_mask` and `connective_mask` are None if the variant has no such mask.
    """

    text: str
    history_end: int
    emotion_mask: int | None
    connective_mask: int | None
    start_mask: int
    end_mask: int
    target_range: tuple[int, int]
    candidate_range: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TrunkPrompt:
    """What all prompts of a target begin with, and the character ranges that may be cut to fit a model."""

    text: str
    history_end: int
    emotion_mask: int | None
    target_range: tuple[int, int]


@dataclass(frozen=True, slots=True)
class BranchPrompt:
    """What follows the trunk for one candidate; all offsets count from the branch's own begin."""

    text: str
    connective_mask: int | None
    start_mask: int
    end_mask: int
    candidate_range: tuple[int, int]


class _Writer:
    """Joins pieces of text and returns where each begins."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self.length = 0

    def add(self, piece: str) -> int:
        start = self.length
        self._pieces.append(piece)
        self.length += len(piece)
        return start

    def text(self) -> str:
        return "".join(self._pieces)


def history_separator(tokenizer: Any) -> str:
    """What joins the utterances of the history for a fast tokenizer: its separator, a newline, or its end token.

    T5's normaliser turns a newline into a space, so that the utterances would run together. Which tokenizers do so is
    seen from their tokens.
    """
    if tokenizer.sep_token:
        return str(tokenizer.sep_token)
    joined, spaced = (
        tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        for text in ("one.\ntwo", "one. two")
    )
    return "\n" if joined != spaced else tokenizer.eos_token or "\n"


def history_text(dialogue: Dialogue, target: int, separator: str, last: int | None = None) -> str:
    """u_1 … u_{i-1} (or the `last` of them), each followed by the separator; empty for the first turn."""
    first = 0 if last is None else max(0, target - 1 - last)
    return "".join(u.text + separator for u in dialogue.utterances[first : target - 1])


def teacher_prompt(
    dialogue: Dialogue,
    target: int,
    candidate: int,
    *,
    emotion: str,
    separator: str = "\n",
    shown_relation: bool | None = None,
) -> TeacherPrompt:
    """Eq. 1 up to the word `is`; the model family then adds the mask or reads the logits of the next token.

    Unless `shown_relation` is None, a sentence before the question says whether the relation is causal. Such hints are
    CP-KD's (Wu et al., ACL 2023), and the wording is our own.
    """
    u_i, u_j = dialogue.utterances[target - 1], dialogue.utterances[candidate - 1]
    writer = _Writer()
    writer.add(history_text(dialogue, target, separator))
    history_end = writer.length
    writer.add(f"{target} {u_i.speaker} feels {emotion} and says ")
    target_start = writer.add(u_i.text)
    target_range = (target_start, writer.length)
    writer.add(f". {candidate} {u_j.speaker} says ")
    candidate_start = writer.add(u_j.text)
    candidate_range = (candidate_start, writer.length)
    if shown_relation is not None:
        # Behind the candidate, so that hinted prompts share trunks and prefixes with all others of their target.
        verb = "is" if shown_relation else "is not"
        writer.add(f". The relation between {target} and {candidate} {verb} causal")
    # No space at the end: tokenizers join it to the word that follows, and that word is the answer.
    writer.add(f". The connective word between {target} and {candidate} is")
    return TeacherPrompt(writer.text(), history_end, target_range, candidate_range)


def student_prompt(
    dialogue: Dialogue,
    target: int,
    candidate: int,
    *,
    mask: str,
    separator: str = "\n",
    variant: PromptVariant = EQ_5,
) -> StudentPrompt:
    """Eq. 5 with the tokenizer's mask token in all four places, or a variant of it: a trunk and one branch.

    Raises DialogueError if the variant shows emotions and the target has none.
    """
    trunk = student_trunk(dialogue, target, mask=mask, separator=separator, variant=variant)
    branch = student_branch(dialogue, candidate, mask=mask, variant=variant)
    shift = len(trunk.text)
    connective, (start, end) = branch.connective_mask, branch.candidate_range
    return StudentPrompt(
        text=trunk.text + branch.text,
        history_end=trunk.history_end,
        emotion_mask=trunk.emotion_mask,
        connective_mask=None if connective is None else shift + connective,
        start_mask=shift + branch.start_mask,
        end_mask=shift + branch.end_mask,
        target_range=trunk.target_range,
        candidate_range=(shift + start, shift + end),
    )


def student_trunk(
    dialogue: Dialogue, target: int, *, mask: str, separator: str = "\n", variant: PromptVariant = EQ_5
) -> TrunkPrompt:
    """Eq. 5 up to the end of the target clause, `[his] d_i sp_i feels <mask_emo> and says u_i.`

    Raises CorpusError if the variant shows emotions and the target has none.
    """
    u_i = dialogue.utterances[target - 1]
    writer = _Writer()
    writer.add(history_text(dialogue, target, separator, variant.history_utterances))
    history_end = writer.length
    writer.add(f"{target} {u_i.speaker} feels ")
    emotion_mask = writer.add(mask if variant.given_emotions is None else _given(dialogue, target, variant))
    writer.add(" and says ")
    target_start = writer.add(u_i.text)
    target_range = (target_start, writer.length)
    writer.add(".")
    return TrunkPrompt(
        text=writer.text(),
        history_end=history_end,
        emotion_mask=emotion_mask if variant.given_emotions is None else None,
        target_range=target_range,
    )


def student_branch(
    dialogue: Dialogue, candidate: int, *, mask: str, variant: PromptVariant = EQ_5
) -> BranchPrompt:
    """Eq. 5 after the target clause, from the space on: the same text for every target that has this candidate."""
    u_j = dialogue.utterances[candidate - 1]
    writer = _Writer()
    # The space is the branch's, because tokenizers join a space to the word after it.
    writer.add(" ")
    connective_mask = None
    if variant.has_connective:
        connective_mask = writer.add(mask)
        writer.add(" ")
    # The paper's own wording, grammar included (Eq. 5), or only what tells the parts from one another.
    says, before_start, before_end, end = (
        (": ", " ", " ", "")
        if variant.has_short_branch
        else (" says ", ". The causal span start at ", ", end at ", ".")
    )
    writer.add(f"{candidate} {u_j.speaker}{says}")
    candidate_start = writer.add(u_j.text)
    candidate_range = (candidate_start, writer.length)
    writer.add(before_start)
    start_mask = writer.add(mask)
    writer.add(before_end)
    end_mask = writer.add(mask)
    writer.add(end)
    return BranchPrompt(
        text=writer.text(),
        connective_mask=connective_mask,
        start_mask=start_mask,
        end_mask=end_mask,
        candidate_range=candidate_range,
    )


def _given(dialogue: Dialogue, target: int, variant: PromptVariant) -> str:
    emotion = dialogue.utterances[target - 1].emotion
    if emotion is None:
        raise DialogueError(
            f"dialogue {dialogue.id}, turn {target}: found no emotion, and this student reads the emotion "
            "of its target; give each utterance an emotion, or use a student that predicts it"
        )
    return (variant.given_emotions or {}).get(emotion, emotion)


def kept_tokens(
    offsets: Sequence[tuple[int, int]], prompt: TeacherPrompt | StudentPrompt, max_tokens: int
) -> list[int]:
    """Indices of the tokens that stay when a prompt is cut to `max_tokens`.

    The oldest history is dropped first, then the end of u_i, then the end of u_j. `offsets` are the characters of each
    token, (0, 0) for special tokens, which always stay.
    """
    surplus = len(offsets) - max_tokens
    if surplus <= 0:
        return list(range(len(offsets)))
    ranges = ((0, prompt.history_end), prompt.target_range, prompt.candidate_range)
    inside = [tokens_inside(offsets, characters) for characters in ranges]
    candidates = [*inside[0], *reversed(inside[1]), *reversed(inside[2])]
    dropped = set(candidates[:surplus])
    return [n for n in range(len(offsets)) if n not in dropped]


def kept_in_tree(
    offsets: Sequence[tuple[int, int]],
    prompt: TeacherPrompt,
    *,
    num_trunk: int,
    room: int,
    max_tokens: int,
) -> list[int]:
    """Indices of the tokens that stay when a prompt whose first `num_trunk` tokens are a trunk is cut to `max_tokens`.

    The trunk leaves `room` for a branch, and so is the same for all candidates of a target. A branch that is still too
    long loses the end of u_j. Offsets as for `kept_tokens`.
    """
    dropped = lost_of_trunk(offsets, prompt, num_trunk - (max_tokens - room))
    surplus = max(0, len(offsets) - len(dropped) - max_tokens)
    dropped.update([*reversed(tokens_inside(offsets, prompt.candidate_range))][:surplus])
    return [n for n in range(len(offsets)) if n not in dropped]


def lost_of_trunk(
    offsets: Sequence[tuple[int, int]], prompt: TeacherPrompt | TrunkPrompt, surplus: int
) -> set[int]:
    """Indices of the tokens that a trunk with `surplus` too many loses: the oldest history, then the end of u_i."""
    removable = [
        *tokens_inside(offsets, (0, prompt.history_end)),
        *reversed(tokens_inside(offsets, prompt.target_range)),
    ]
    return set(removable[: max(0, surplus)])


def room_for_branch(branches: Iterable[tuple[int, int]], max_tokens: int) -> int:
    """What a trunk leaves for a branch: the longest one, or half of `max_tokens`, or a template and one token.

    `branches` are, for each candidate that the target could have, the tokens of its branch and those of u_j in it.
    """
    lengths = [(whole, whole - text + 1) for whole, text in branches]
    longest, shortest = (max(column) for column in zip(*lengths, strict=True)) if lengths else (0, 0)
    return min(longest, max(max_tokens // 2, shortest))


def tokens_inside(offsets: Sequence[tuple[int, int]], characters: tuple[int, int]) -> list[int]:
    """Indices of the tokens that lie in a range of characters [start, end), special tokens aside."""
    start, end = characters
    # Byte-level tokenizers trim white space off offsets: (n, n) with n > 0 is a token of spaces, not a special one.
    return [n for n, (left, right) in enumerate(offsets) if right > 0 and left >= start and right <= end]
