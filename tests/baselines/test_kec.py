"""KEC: the graph against its equations, a rule that only speakers tell, and the file of commonsense phrases."""

import json
import random

import pytest
import torch

from kdecs.baselines.kec import DagLayer, Phrases, polarity_of, read_knowledge
from kdecs.errors import CorpusError


@pytest.mark.parametrize("has_knowledge", [False, True])
def test_a_layer_against_its_equations(has_knowledge):
    torch.manual_seed(0)
    size, window = 5, 2
    layer = DagLayer(size, window, has_knowledge=has_knowledge)
    state, speakers = torch.randn(2, 4, size), torch.tensor([[0, 1, 0, 0], [0, 0, 1, 2]])
    same = speakers[:, :, None] == speakers[:, None]
    phrases = None
    if has_knowledge:
        phrases = Phrases(
            torch.randn(7, size), torch.randint(0, 7, (2, 4, 2, 3)), torch.randint(0, 3, (2, 4))
        )
    found = layer(state, same, phrases)
    for d in range(2):
        new = []
        for i in range(4):
            own, scores, messages, edges = state[d, i], [], [], []
            for j in range(max(0, i - window), i):
                edge = torch.zeros(size)
                if phrases is not None:
                    number = phrases.phrase_DN23[d, j, 0 if same[d, i, j] else 1, phrases.polarity_DN[d, i]]
                    edge = layer.edge(phrases.vectors_KC[number])
                scores.append(layer.attention(torch.cat((own, new[j] + edge))))
                messages.append((layer.of_same if same[d, i, j] else layer.of_other)(new[j]))
                edges.append(edge)
            message = knowledge = torch.zeros(size)
            if scores:
                weights = torch.softmax(torch.cat(scores), 0)
                message = sum(w * m for w, m in zip(weights, messages, strict=True))
                knowledge = sum(w * e for w, e in zip(weights, edges, strict=True))
            total = layer.context(own, message) + layer.past(message, own)
            if phrases is not None:
                itself = phrases.vectors_KC[phrases.phrase_DN23[d, i, 0, phrases.polarity_DN[d, i]]]
                total = total + layer.knowledge(knowledge, own) + layer.itself(itself, own)
            new.append(total)
            torch.testing.assert_close(found[d, i], total, rtol=1e-4, atol=1e-5)


def _by_speaker(make_dialogue, count, seed):
    """All utterances so far are causes if the one before was somebody else's, and none is otherwise."""
    draw, words = (
        random.Random(seed),
        ["the", "game", "was", "good", "sorry", "happy", "day", "work", "rain", "money", "friend"],
    )
    found = []
    for number in range(count):
        speakers = [draw.choice("AB") for _ in range(6)]
        lines = []
        for turn in range(1, 7):
            is_answer = turn > 1 and speakers[turn - 1] != speakers[turn - 2]
            causes = tuple(range(1, turn + 1)) if is_answer else ()
            lines.append((speakers[turn - 1], " ".join(draw.sample(words, 4)), "happiness", causes))
        found.append(make_dialogue(f"d{number}", lines))
    return found


def test_it_learns_from_who_speaks(make_bench, make_dialogue):
    bench = make_bench("kec", task="ecpe", window=1, layers=1)
    bench.fit(_by_speaker(make_dialogue, 12, seed=0), steps=30, rate=1e-2)
    assert bench.pair_accuracy(_by_speaker(make_dialogue, 8, seed=1)) > 0.95


LINE = {"dialogue_id": "d0", "turn": 1, "relation": "oReact", "text": "feels glad", "polarity": "positive"}


def test_phrases_reach_the_edges_that_ask_for_them(make_bench, make_dialogue, tmp_path):
    path = tmp_path / "phrases.jsonl"
    path.write_text("\n".join(json.dumps({**LINE, "text": text}) for text in ("feels glad", "to thank him")))
    knowledge = read_knowledge(path)
    assert knowledge == {("d0", 1): {(1, 2): ["feels glad", "to thank him"]}}
    bench = make_bench("kec", task="ecpe", knowledge=knowledge)
    assert bench.model.parts == ("polarity", "emotion", "pair")
    lines = [("A", "We won", "happiness", (1,)), ("B", "Good for you", "happiness", (1,))]
    dialogue = make_dialogue("d0", lines)
    inputs, *_ = bench.batch([dialogue])
    assert inputs.phrase_DN23[0, 0].tolist() == [[0, 0, 0], [0, 0, 1]] and not inputs.phrase_DN23[0, 1].any()
    bench.fit([dialogue], steps=2)
    # The second utterance asks for positive phrases of another speaker only if its polarity is found to be positive.
    with torch.no_grad():
        bench.model.polarity_head.weight.zero_()
        found = []
        for polarity in range(3):
            bench.model.polarity_head.bias.copy_(torch.eye(3)[polarity])
            found.append(bench.output([dialogue]).cause_P)
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(found[1][:1], found[2][:1]) and not torch.allclose(found[1][1:], found[2][1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turn": 0}, "turn: found 0, expected an integer from 1"),
        ({"relation": "xWant"}, "relation: found .*, expected one of xEffect, xReact, oEffect, oReact"),
        ({"polarity": "+"}, "polarity: found .*, expected one of negative, neutral, positive"),
        ({"text": " "}, "text: found .*, expected a phrase"),
        (None, "line 2: found .*, expected"),
    ],
)
def test_a_faulty_file_of_phrases_is_refused_in_one_line(tmp_path, changes, message):
    path = tmp_path / "phrases.jsonl"
    second = "no JSON" if changes is None else json.dumps({**LINE, **changes})
    path.write_text(f"{json.dumps(LINE)}\n{second}\n")
    with pytest.raises(CorpusError, match=message) as caught:
        read_knowledge(path)
    assert "\n" not in str(caught.value)


def test_every_emotion_has_a_polarity():
    assert [polarity_of(e) for e in ("anger", "worry", "neutral", "others", "happiness", "gratitude")] == [
        *(0, 0),
        *(1, 1),
        *(2, 2),
    ]
