"""The layout tree against its definition: a trunk and one branch at a time, each token with the mask of Eq. 5's cut."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import made_once, save_lively_encoder, save_tiny_encoder

from kdecs.corpus.encoding import PairEncoder, TreeEncoder
from kdecs.corpus.pairs import batches_of_tokens, candidate_pairs, encoded_targets
from kdecs.corpus.prompts import PromptVariant, student_branch, student_prompt
from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.errors import ModelError
from kdecs.models import first_position, load_tokenizer
from kdecs.student.config import Outputs
from kdecs.student.data import encoded_batch
from kdecs.student.model import StudentModel, load_language_model, student_answer_ids
from kdecs.trees import attend, check_trees, plant

FAMILIES = ("roberta", "bert", "xlm-roberta", "modernbert", "distilbert")
VARIANTS = (
    PromptVariant(),
    PromptVariant(has_connective=False, history_utterances=1),
    PromptVariant(given_emotions={}, has_short_branch=True),
)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> Path:
    kind = request.param
    return made_once(tmp_path_factory, f"tree-{kind}", lambda path: save_lively_encoder(path, kind))


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    return list(read_corpus(bundled_sample("valid")).dialogues[:2])


def student_of(base: Path, variant: PromptVariant, span_head: str) -> StudentModel:
    torch.manual_seed(0)
    outputs = Outputs(
        cause_by="connective" if variant.has_connective else "cls", emotions=variant.given_emotions is None
    )
    answers = student_answer_ids(load_tokenizer(base), ["neutral", "happiness", "anger"])
    model = StudentModel(
        load_language_model(base), answers, span_head=span_head, max_prompt_tokens=256, outputs=outputs
    )
    return model.eval()


def one_by_one(model: StudentModel, pair) -> dict[str, torch.Tensor]:
    """The definition: a single prompt with plain positions, in which the trunk does not see the branch."""
    ids = torch.tensor([[*pair.trunk_ids, *pair.token_ids]])
    num_trunk, size = len(pair.trunk_ids), ids.size(1)
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[:num_trunk, num_trunk:] = False
    attention = mask[None, None]
    encoder = model.language_model.base_model
    if "sliding_attention" in (getattr(encoder.config, "layer_types", None) or ()):
        places = torch.arange(size)
        near = (places[:, None] - places).abs() <= encoder.config.sliding_window
        attention = {"full_attention": attention, "sliding_attention": attention & near}
    inputs = {"input_ids": ids, "attention_mask": attention}
    if getattr(encoder.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(ids)  # a prompt is one segment, in either layout
    logits = model.language_model(**inputs).logits[0]
    # All layers in full: the student's own shortcut through the last one is off.
    states = encoder(**inputs)[0][0]
    first, last = pair.candidate_first, pair.candidate_first + len(pair.candidate_offsets)
    start, end = model.span_head(
        states[None, pair.start_mask],
        states[None, pair.end_mask],
        states[None, first:last],
        torch.arange(first, last)[None],
    )
    found = {"start_BS": start[0], "end_BS": end[0]}
    if model.outputs.emotions:
        found["emotion_BE"] = logits[pair.emotion_mask, model.emotion_ids]
    if model.classifier is None:
        found["connective_BA"] = logits[pair.connective_mask, model.connective_ids]
    else:
        found["classifier_B2"] = model.classifier(states[-1])
    return found


@pytest.mark.parametrize(
    ("variant", "span_head"), zip(VARIANTS, ("pointer", "position", "pointer"), strict=True)
)
def test_a_tree_gives_what_trunk_and_branch_give_alone(base, dialogues, variant, span_head):
    """Logits and gradients over trees of all sizes in one batch, in shuffled order."""
    model = student_of(base, variant, span_head)
    encoder = TreeEncoder(load_tokenizer(base), 128, variant)
    pairs = [pair for dialogue in dialogues for pair in candidate_pairs(dialogue)]
    generator = np.random.default_rng(0)
    chosen = generator.choice(len(pairs), size=12, replace=False)
    # Encoded together, so that the pairs of a target share their trunk, then taken in any order.
    encoded = list(encoder.encode(pairs))
    batch = encoded_batch([encoded[index] for index in chosen], pad_id=1)
    assert batch.tree is not None
    targets = {id(encoded[index].trunk_ids): encoded[index].trunk_ids for index in chosen}
    assert len(targets) < len(chosen), "some targets have several branches"
    branches = [encoded[index].token_ids for index in chosen]
    assert batch.token_ids_RT.shape == (1, sum(map(len, [*targets.values(), *branches])))
    output = model(batch)
    weights = torch.randn(len(chosen))
    total = torch.zeros(())
    for row, index in enumerate(chosen):
        for name, alone in one_by_one(model, encoded[index]).items():
            found = getattr(output, name)[row][: len(alone)]
            torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
            total = total + weights[row] * alone.sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(total, parameters, allow_unused=True)
    ours = torch.zeros(())
    for logits in output:
        if logits is not None:
            ours = ours + (weights[:, None] * logits.masked_fill(logits == -torch.inf, 0)).sum()
    found = torch.autograd.grad(ours, parameters, allow_unused=True)
    assert [gradient is None for gradient in found] == [gradient is None for gradient in expected]
    # Of all parameters together: the gradient of a key's bias is zero but for rounding.
    found_N, expected_N = (
        torch.cat([g.flatten() for g in some if g is not None]) for some in (found, expected)
    )
    assert (found_N - expected_N).norm() <= 1e-5 * expected_N.norm()


def test_trunk_and_branch_are_the_tokens_of_the_prompt(base, dialogues):
    tokenizer = load_tokenizer(base)
    for variant in VARIANTS:
        pairs = [pair for dialogue in dialogues for pair in candidate_pairs(dialogue)]
        trees = TreeEncoder(tokenizer, 256, variant).encode(pairs)
        for tree, plain in zip(trees, PairEncoder(tokenizer, 256, variant).encode(pairs), strict=True):
            assert [*tree.trunk_ids, *tree.token_ids] == plain.token_ids
            for name in ("emotion_mask", "connective_mask", "start_mask", "end_mask", "candidate_first"):
                assert getattr(tree, name) == getattr(plain, name), name
            assert tree.candidate_offsets == plain.candidate_offsets
            assert (tree.span_start, tree.span_end) == (plain.span_start, plain.span_end)
            assert tree.distance == plain.distance


def test_a_short_branch_keeps_what_tells_its_parts_apart(dialogues):
    dialogue = dialogues[0]
    text, speaker = dialogue.utterances[1].text, dialogue.utterances[1].speaker
    short = student_branch(dialogue, 2, mask="<mask>", variant=PromptVariant(has_short_branch=True))
    assert short.text == f" <mask> 2 {speaker}: {text} <mask> <mask>"
    places = (short.connective_mask, short.start_mask, short.end_mask)
    assert [short.text[place:].startswith("<mask>") for place in places] == [True] * 3
    assert short.text[slice(*short.candidate_range)] == text


def test_tokens_of_a_tree_have_the_types_of_their_prompts(base, dialogues):
    """Of the models that embed token types: trunk and branches are one segment, as the tokenizer types a prompt."""
    tokenizer = load_tokenizer(base)
    model = student_of(base, PromptVariant(), "pointer")
    types = getattr(model.language_model.base_model.embeddings, "token_type_embeddings", None)
    if types is None:
        pytest.skip("this model embeds no token types")
    given: list[torch.Tensor] = []
    types.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    pairs = [pair for dialogue in dialogues for pair in candidate_pairs(dialogue)]
    batch = encoded_batch(list(TreeEncoder(tokenizer, 128).encode(pairs)), pad_id=1)
    # More tokens than the model has positions: the types that Transformers keeps by position still do.
    assert batch.token_ids_RT.size(1) > model.language_model.config.max_position_embeddings
    with torch.no_grad():
        model(batch)
    (types_RT,) = given
    assert types_RT.shape == batch.token_ids_RT.shape
    prompt = student_prompt(
        pairs[-1].dialogue, 2, 1, mask=tokenizer.mask_token, separator=tokenizer.sep_token
    )
    of_prompt = tokenizer(prompt.text, return_token_type_ids=True)["token_type_ids"]
    assert set(types_RT.flatten().tolist()) == set(of_prompt) == {0}


def long_dialogue(*lengths: int) -> Dialogue:
    texts = [" ".join(["anger"] * length) for length in lengths]
    return Dialogue("d", tuple(Utterance(n, "A", text, "anger", ()) for n, text in enumerate(texts, 1)))


@pytest.mark.parametrize("lengths", [(30, 30, 30, 5), (5, 90, 5, 5), (5, 5, 5, 90), (90, 90), (200, 3, 200)])
def test_long_prompts_lose_the_history_once_for_all_branches(base, lengths):
    """History first, then the end of u_i; a branch keeps what the trunk leaves, and at least half."""
    tokenizer = load_tokenizer(base)
    dialogue, limit = long_dialogue(*lengths), 64
    encoder = TreeEncoder(tokenizer, limit)
    pairs = candidate_pairs(dialogue)
    together = list(encoder.encode(pairs))
    for pair, found in zip(pairs, together, strict=True):
        prompt = [*found.trunk_ids, *found.token_ids]
        assert len(prompt) <= limit
        masks = (found.emotion_mask, found.connective_mask, found.start_mask, found.end_mask)
        assert [prompt[place] for place in masks] == [tokenizer.mask_token_id] * 4
        text = dialogue.utterances[pair.candidate - 1].text
        kept = found.candidate_offsets
        assert text[kept[0][0] : kept[-1][1]] == " ".join(["anger"] * len(kept)), (
            "a token each, from the first on"
        )
        # Alone, a pair has the prompt that it has beside others.
        (alone,) = TreeEncoder(tokenizer, limit).encode([pair])
        assert [*alone.trunk_ids, *alone.token_ids] == prompt
        assert alone.num_truncated == found.num_truncated


def test_a_template_that_does_not_fit_is_refused(base):
    dialogue = Dialogue("d", (Utterance(1, "Anna " * 60, "Hello !", "anger", ()),))
    with pytest.raises(
        ModelError, match=r"d/1/1: the template with its speakers alone has more than 32 tokens"
    ):
        list(TreeEncoder(load_tokenizer(base), 32).encode(candidate_pairs(dialogue)))


def test_batches_keep_the_pairs_of_a_target_together(base, dialogues):
    pairs = [pair for dialogue in dialogues for pair in candidate_pairs(dialogue)]
    encoded = list(TreeEncoder(load_tokenizer(base), 128).encode(pairs))
    lengths = np.array([len(pair.token_ids) for pair in encoded])
    found = batches_of_tokens(lengths, np.arange(len(encoded)), 512, encoded_targets(encoded))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(encoded)))
    place = {int(row): number for number, rows in enumerate(found) for row in rows}
    for row, pair in enumerate(encoded[1:], start=1):
        if pair.trunk_ids is encoded[row - 1].trunk_ids:
            assert place[row] == place[row - 1]
    assert len(found) > 2


def test_dropout_keeps_the_weights_of_its_share():
    """A trunk that sees itself evenly, and values that show each weight: dropped, or divided by the share kept."""
    _, _, _, tree = plant([list(range(64))], [], np.zeros(0, dtype=np.int64))
    torch.manual_seed(0)
    query = torch.zeros(1, 32, 64, 64, requires_grad=True)
    value = torch.eye(64).expand(1, 32, 64, 64).clone().requires_grad_()
    found, _ = attend(torch.nn.Module(), query, query, value, None, dropout=0.1, target_tree=tree)
    kept = found[found > 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 64 / 0.9), rtol=1e-4, atol=0)
    assert kept.numel() / found.numel() == pytest.approx(0.9, abs=0.005)
    again, _ = attend(torch.nn.Module(), query, query, value, None, dropout=0.1, target_tree=tree)
    assert not torch.equal(found > 0, again > 0)
    (gradient,) = torch.autograd.grad(found.sum(), value)
    torch.testing.assert_close(gradient, found.sum(1)[..., None].expand_as(gradient))


def test_an_encoder_that_ignores_positions_is_refused(tmp_path):
    model = student_of(save_tiny_encoder(tmp_path / "mpnet", "mpnet"), PromptVariant(), "pointer")
    with pytest.raises(ModelError, match=r"^mpnet: .*set model\.layout=pair$"):
        check_trees(model.language_model.base_model, "mpnet")


def test_encoders_of_the_other_families_are_not(base):
    model = student_of(base, PromptVariant(), "pointer")
    check_trees(model.language_model.base_model, "base")
    assert first_position(model.language_model.base_model) == (2 if "roberta" in base.name else 0)
