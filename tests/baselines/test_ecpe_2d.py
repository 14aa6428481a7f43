"""ECPE-2D: interaction along rows and columns, and a rule that only the distance of a pair tells."""

import random

import pytest
import torch

from kdecs.baselines.ecpe_2d import CrossRoad, Window
from kdecs.baselines.model import causal_mask


def _attend(projection, query, cells):
    """One cell over some cells of its line, with a fused projection of query, key and value."""
    q, _, _ = projection(query).chunk(3)
    keys, values = zip(*((k, v) for _, k, v in (projection(cell).chunk(3) for cell in cells)), strict=True)
    scores = torch.stack([q @ key for key in keys]) / len(q) ** 0.5
    return torch.stack(values).T @ torch.softmax(scores, 0)


def test_a_cell_attends_to_its_row_and_its_column_up_to_its_target():
    torch.manual_seed(0)
    layer, cells = CrossRoad(6, 0.0).eval(), torch.randn(2, 4, 4, 6)
    found = layer(cells, causal_mask(4, cells.device))
    assert torch.isfinite(found).all()
    for d in range(2):
        for i in range(4):
            for j in range(i + 1):
                row = _attend(layer.along_row, cells[d, i, j], [cells[d, i, k] for k in range(i + 1)])
                column = _attend(
                    layer.along_column, cells[d, i, j], [cells[d, k, j] for k in range(j, i + 1)]
                )
                first = layer.first_norm(cells[d, i, j] + (row + column) / 2)
                expected = layer.second_norm(first + layer.feed_forward(first))
                torch.testing.assert_close(found[d, i, j], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("later", [0, 1])
def test_in_a_window_a_cell_attends_to_the_near_cells_of_targets_up_to_its_own(later):
    torch.manual_seed(0)
    layer, cells = Window(6, 0.0, window=1).eval(), torch.randn(2, 4, 4, 6)
    found = layer(cells, causal_mask(4, cells.device, later)[None])
    for d in range(2):
        for i in range(4):
            for j in range(4):
                if not i - 1 <= j <= i + later:
                    assert torch.equal(found[d, i, j], cells[d, i, j])
                    continue
                near = [
                    cells[d, k, m] for k in range(i + 1) for m in range(max(0, k - 1), min(3, k + later) + 1)
                ]
                first = layer.first_norm(cells[d, i, j] + _attend(layer.along_window, cells[d, i, j], near))
                expected = layer.second_norm(first + layer.feed_forward(first))
                torch.testing.assert_close(found[d, i, j], expected, rtol=1e-4, atol=1e-5)


def _by_distance(make_dialogue, count, seed):
    """The cause is the utterance two before the target, whatever is said."""
    draw, words = (
        random.Random(seed),
        ["the", "game", "was", "good", "sorry", "happy", "day", "work", "rain", "money", "friend"],
    )
    return [
        make_dialogue(
            f"d{number}",
            [
                (
                    "AB"[turn % 2],
                    " ".join(draw.sample(words, 4)),
                    "happiness",
                    (turn - 2,) if turn > 2 else (),
                )
                for turn in range(1, 6)
            ],
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("window", [None, 1])
def test_it_learns_the_distance_of_causes(make_bench, make_dialogue, window):
    bench = make_bench("ecpe-2d", task="ecpe", window=window)
    bench.fit(_by_distance(make_dialogue, 4, seed=0), steps=35, rate=1e-2)
    assert bench.pair_accuracy(_by_distance(make_dialogue, 8, seed=1)) > 0.98


@pytest.mark.parametrize("stops", [True, False])
def test_the_matrix_passes_gradients_only_if_asked(make_bench, make_dialogue, stops):
    bench = make_bench("ecpe-2d", task="ecpe", stop_gradient=stops)
    inputs, pairs_P3, spanned_P, _ = bench.batch(_by_distance(make_dialogue, 1, seed=0))
    bench.model(inputs, pairs_P3, spanned_P).cause_P.sum().backward()
    gradient = bench.model.language_model.get_input_embeddings().weight.grad
    assert (gradient is None or not gradient.any()) == stops
    assert bench.model.of_emotion.weight.grad.any()
