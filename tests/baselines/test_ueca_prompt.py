"""UECA-Prompt: the sequence of a target, its window, and a rule that only the numbers of utterances tell."""

import random
from dataclasses import replace

import pytest
import torch

from kdecs.baselines.dialogues import pair_places
from kdecs.corpus.pairs import candidate_pairs
from kdecs.errors import DialogueError, ModelError

LINES = [
    ("A", "We won !", "happiness", (1,)),
    ("B", "Good .", "happiness", (1, 2)),
    ("A", "So ?", "neutral", ()),
]


def test_a_sequence_has_number_text_and_three_masks_per_utterance(make_bench, make_dialogue):
    bench = make_bench("ueca-prompt")
    inputs, pairs_P3, _, labels = bench.batch([make_dialogue("d", LINES)])
    tokenizer_ids = {name: ids.tolist() for name, ids in bench.model.named_buffers() if name.endswith("_ids")}
    numbers, mask, text = tokenizer_ids["index_ids"], bench.model.mask_id, bench.encoder.tokens_of
    rows = {}
    for group in inputs.groups:
        for row, ids, attention in zip(
            group.rows_G.tolist(), group.token_ids_GT, group.attention_GT, strict=True
        ):
            rows[row] = ids[attention].tolist()
    assert inputs.target_R2.tolist() == [[0, 0], [0, 1], [0, 2]]
    for row, target in enumerate(range(3)):
        expected = [bench.encoder.cls_id]
        for number, (_, words, _, _) in enumerate(LINES[: target + 1]):
            expected += [numbers[number], *text(words, 64), mask, mask, mask, bench.encoder.sep_id]
        assert rows[row] == expected
        assert rows[row][inputs.emotion_R[row]] == mask and inputs.number_R[row] == target
    for place, row, (_, _, candidate) in zip(
        inputs.place_P, inputs.row_P.tolist(), pairs_P3.tolist(), strict=True
    ):
        assert rows[row][place] == rows[row][place + 1] == mask
        assert rows[row][: place + 2].count(mask) == 3 * (candidate + 1)
    output = bench.model(inputs, pairs_P3, torch.ones(6, dtype=torch.bool))
    assert all(part.total.item() > 0 for part in bench.model.losses(output, labels, torch.ones(6)))


def test_old_utterances_give_way_and_are_no_causes(make_bench, make_dialogue):
    lines = [("A", "we won the game and i am so happy for you all", "happiness", (1,))] * 6
    dialogue, pairs = make_dialogue("d", lines), candidate_pairs(make_dialogue("d", lines))
    bench = make_bench("ueca-prompt", max_tokens=80)
    inputs = bench.model.inputs([bench.encoder.encode(dialogue)], pair_places([pairs]), bench.encoder)
    assert all(group.token_ids_GT.size(1) <= 80 for group in inputs.groups)
    reach = int(inputs.number_R.max()) + 1
    assert 1 < reach < 6
    assert inputs.is_held_P.tolist() == [pair.target - pair.candidate < reach for pair in pairs]
    found = bench.output([dialogue]).cause_P
    assert (torch.sigmoid(found[~inputs.is_held_P]) < 1e-9).all() and (found[inputs.is_held_P] > -30).all()
    bench.model.max_tokens = 10
    with pytest.raises(DialogueError, match="turn 1: the utterance alone does not fit into 10 tokens"):
        bench.output([dialogue])


def test_the_window_bounds_causes(make_bench, make_dialogue):
    dialogue = make_dialogue("d", LINES * 2)
    found = make_bench("ueca-prompt", window=1).output([dialogue]).cause_P
    is_near = torch.tensor([pair.target - pair.candidate <= 1 for pair in candidate_pairs(dialogue)])
    assert (found[is_near] > -30).all() and (found[~is_near] == -30).all()


def test_words_of_several_tokens_are_refused(make_bench):
    with pytest.raises(ModelError, match=r"answer words of several tokens: .*200 \("):
        make_bench("ueca-prompt", max_utterances=200)


def _by_number(make_dialogue, count, seed):
    """The last utterance names the number of its cause."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        cause = draw.randint(1, 3)
        lines = [(speaker, "so good", "neutral", ()) for speaker in "ABA"]
        found.append(make_dialogue(f"d{number}", [*lines, ("B", f"see {cause}", "happiness", (cause,))]))
    return found


@pytest.mark.slow
def test_it_learns_from_the_numbers_of_utterances(make_bench, make_dialogue):
    bench = make_bench("ueca-prompt")
    train = [replace(d, utterances=d.utterances) for d in _by_number(make_dialogue, 12, seed=0)]
    bench.fit(train, steps=150)
    assert bench.pair_accuracy(_by_number(make_dialogue, 6, seed=1)) == 1.0
