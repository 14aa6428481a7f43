"""Each family against a plain Transformers forward, and the tree against prompts one by one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdecs.corpus.answer_words import CONNECTIVES, answer_token_ids
from kdecs.corpus.pairs import Pair
from kdecs.corpus.prompts import history_text, teacher_prompt
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.errors import ArtifactError, ModelError
from kdecs.teacher.config import LoraConfig
from kdecs.teacher.data import target_units
from kdecs.teacher.families import Family, Seq2SeqFamily
from kdecs.teacher.network import TeacherNetwork, add_lora, connective_loss, trainable_parameters
from kdecs.teacher.product import separator_details, template_digest, trained_separator

FAMILY_NAMES = ["causal", "seq2seq", "masked"]


def network_of(family: Family, base: Path, *, use_tree: bool, seed: int = 0) -> TeacherNetwork:
    torch.manual_seed(seed)
    lora = add_lora(family.load_network(str(base), dtype=torch.float32), LoraConfig(rank=4), family.lora_task)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:  # B is zero at the start: give the adapter something to do
            torch.nn.init.normal_(parameter, std=0.05)
    return TeacherNetwork(family, lora, use_tree=use_tree, device=torch.device("cpu")).eval()


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_logits_equal_a_plain_forward_of_each_prompt(
    name: str, families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families(name)
    network = network_of(family, bases(name), use_tree=False)
    pairs = some_pairs[:6]
    with torch.no_grad():
        ours_PA = network([family.encode(pair) for pair in pairs])
        for pair, row_A in zip(pairs, ours_PA, strict=True):
            prompt = family.encode(pair)
            ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
            if name == "seq2seq":
                start = network.network.config.decoder_start_token_id
                decoder = torch.tensor([[start, family.tokenizer.convert_tokens_to_ids("<extra_id_0>")]])
                logits_V = network.network(input_ids=ids, decoder_input_ids=decoder).logits[0, 1]
            else:
                logits_V = network.network(input_ids=ids).logits[0, prompt.answer]
            torch.testing.assert_close(row_A, logits_V[family.answer_ids], atol=1e-5, rtol=1e-5)


def test_tree_gives_the_same_loss_and_gradients(
    families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families("causal")
    prompts = [family.encode(pair) for pair in some_pairs]
    is_cause_P = torch.tensor([pair.is_cause for pair in some_pairs])
    results = []
    for use_tree in (False, True):
        network = network_of(family, bases("causal"), use_tree=use_tree)
        logits_PA = network(prompts)
        loss = connective_loss(logits_PA, is_cause_P)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in trainable_parameters(network)])
        results.append((logits_PA.detach(), loss.detach(), gradients))
    (logits_a, loss_a, grad_a), (logits_b, loss_b, grad_b) = results
    torch.testing.assert_close(logits_a, logits_b, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-5, atol=0)
    assert float((grad_a - grad_b).norm() / grad_a.norm()) < 1e-5
    assert float(grad_a.norm()) > 0


def test_a_masked_teacher_in_trees_reads_trunk_and_branch_alone(
    families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    """Against prompts one by one in which the trunk does not see the branch; logits and gradients."""
    family = families("masked")
    family.layout = "tree"
    prompts = [family.encode(pair) for pair in some_pairs]
    order = np.random.default_rng(0).permutation(len(prompts))
    is_cause_P = torch.tensor([some_pairs[n].is_cause for n in order])
    network = network_of(family, bases("masked"), use_tree=False)
    with torch.no_grad():
        for (
            name,
            parameter,
        ) in network.named_parameters():  # small random weights hardly attend, whatever the mask
            parameter.mul_(8.0 if "base_layer.weight" in name and "attention" in name else 1.0)
    logits_PA = network([prompts[n] for n in order])
    connective_loss(logits_PA, is_cause_P).backward()
    found = torch.cat([p.grad.flatten() for p in trainable_parameters(network)])
    network.zero_grad()
    alone = []
    for n in order:
        prompt = prompts[n]
        assert family.tokenizer.decode(prompt.tokens[: prompt.num_trunk]).endswith(".")
        ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
        mask = torch.ones(1, 1, ids.size(1), ids.size(1), dtype=torch.bool)
        mask[..., : prompt.num_trunk, prompt.num_trunk :] = False
        logits_V = network.network(input_ids=ids, attention_mask=mask).logits[0, prompt.answer]
        alone.append(logits_V[family.answer_ids])
    torch.testing.assert_close(logits_PA, torch.stack(alone), atol=1e-4, rtol=1e-4)
    family.layout = "pair"
    with torch.no_grad():
        as_pairs = network([family.encode(some_pairs[n]) for n in order])
    assert float((as_pairs - logits_PA).abs().max()) > 2e-3, "the trunk that sees a branch is another model"
    connective_loss(torch.stack(alone), is_cause_P).backward()
    expected = torch.cat([p.grad.flatten() for p in trainable_parameters(network)])
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    units = target_units(prompts, max_tokens=300, max_pairs=4)
    assert sorted(n for unit in units for n in unit.pairs) == list(range(len(prompts)))
    assert max(len(unit.pairs) for unit in units) == 4
    for unit in units:
        assert len({prompts[n].trunk for n in unit.pairs}) == 1
        assert unit.tokens <= 300 or len(unit.pairs) == 1
    assert sum(unit.tokens for unit in units) < 0.7 * sum(len(prompt.tokens) for prompt in prompts)


@pytest.mark.parametrize("limit", [40, 48, 64, 90, 130])
def test_an_over_long_target_loses_its_oldest_history_once_for_all_candidates(
    limit: int, families: Callable[..., Family], some_pairs: list[Pair]
) -> None:
    """One trunk for a target, cut as its longest branch needs it: against the whole prompts, cut by hand."""
    whole, short = families("masked"), families("masked", max_prompt_tokens=limit)
    whole.layout = short.layout = "tree"
    order = np.random.default_rng(limit).permutation(len(some_pairs))
    found = {n: short.encode(some_pairs[n]) for n in order}
    num_cut = 0
    for n, pair in enumerate(some_pairs):
        candidates = [replace(pair, candidate=j) for j in range(1, pair.target + 1)]
        uncut = [whole.encode(candidate) for candidate in candidates]
        branches = [prompt.tokens[prompt.num_trunk :] for prompt in uncut]
        # Of a branch all but u_j has to stay, and of u_j a token.
        bare = []
        for candidate, branch in zip(candidates, branches, strict=True):
            said = candidate.dialogue.utterances[candidate.candidate - 1].text
            bare.append(len(branch) - len(whole.tokenizer(f" {said}", add_special_tokens=False).input_ids))
        room = min(max(map(len, branches)), max(limit // 2, max(bare) + 1))
        own = uncut[pair.candidate - 1]
        trunk = own.tokens[: own.num_trunk].tolist()
        history = history_text(pair.dialogue, pair.target, whole.separator)
        num_history = len(whole.tokenizer(history, add_special_tokens=False).input_ids)
        if len(trunk) > limit - room:
            num_cut += 1
            surplus = len(trunk) - (limit - room)
            of_history = min(surplus, num_history)
            kept = trunk[:1] + trunk[1 + of_history :]  # the first token is special
            of_text = surplus - of_history
            trunk = kept[: len(kept) - 1 - of_text] + kept[-1:]  # u_i ends before the full stop
        prompt = found[n]
        assert prompt.tokens[: prompt.num_trunk].tolist() == trunk
        branch = branches[pair.candidate - 1]
        lost = max(0, len(trunk) + len(branch) - limit)
        assert len(prompt.tokens) - prompt.num_trunk == len(branch) - lost
        assert prompt.tokens[prompt.num_trunk :][-10:].tolist() == branch[-10:].tolist()
        assert short.encode_with_hint(pair).trunk == prompt.trunk
    assert num_cut > (5 if limit < 130 else 0)


def test_rest_mass_completes_the_distribution(
    families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families("causal")
    network = network_of(family, bases("causal"), use_tree=True)
    prompts = [family.encode(pair) for pair in some_pairs[:5]]
    with torch.no_grad():
        answers_PA, log_rest_P = network.answers_and_rest(prompts)
        hidden = family.hidden_at_leaves(network.network, prompts, network.device)
        log_all_P = torch.logsumexp(family.head(network.network, hidden), dim=-1)
    total = torch.exp(answers_PA - log_all_P[:, None]).sum(-1) + torch.exp(log_rest_P)
    torch.testing.assert_close(total, torch.ones(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_prompt_ends_as_the_family_wants(
    name: str, families: Callable[..., Family], some_pairs: list[Pair]
) -> None:
    family = families(name)
    pair = some_pairs[-1]
    text = family.tokenizer.decode(family.encode(pair).tokens)
    question = f"The connective word between {pair.target} and {pair.candidate} is"
    ending = {"causal": question, "seq2seq": f"{question} <extra_id_0>.", "masked": f"{question}<mask>."}[
        name
    ]
    assert ending in text.replace(" <mask>", "<mask>")
    if name == "causal":
        assert text.endswith(question)  # no trailing space, mask or full stop


def test_a_hint_is_a_sentence_between_the_candidate_and_the_question() -> None:
    turns = (Utterance(1, "A", "We won !", "neutral", ()), Utterance(2, "B", "Great .", "happiness", ()))
    texts = [
        teacher_prompt(Dialogue("d", turns), 2, 1, emotion="happiness", shown_relation=shown).text
        for shown in (None, True, False)
    ]
    begin = "We won !\n2 B feels happiness and says Great .. 1 A says We won !."
    question = " The connective word between 2 and 1 is"
    assert texts == [
        begin + question,
        f"{begin} The relation between 2 and 1 is causal.{question}",
        f"{begin} The relation between 2 and 1 is not causal.{question}",
    ]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_hint_says_what_is_gold_and_changes_nothing_else(
    name: str, families: Callable[..., Family], some_pairs: list[Pair]
) -> None:
    family = families(name)
    for is_cause, verb in ((True, "is"), (False, "is not")):
        pair = next(p for p in some_pairs if p.is_cause == is_cause and p.target > 1)
        plain, hinted = family.encode(pair), family.encode_with_hint(pair)
        place = f"between {pair.target} and {pair.candidate}"
        assert family.tokenizer.decode(hinted.tokens) == family.tokenizer.decode(plain.tokens).replace(
            f"The connective word {place}", f"The relation {place} {verb} causal. The connective word {place}"
        )
        if name != "seq2seq":  # whose answer is a place of the decoder
            assert hinted.tokens[hinted.answer :].tolist() == plain.tokens[plain.answer :].tolist()
        # An over-long prompt keeps the hint and loses its oldest history.
        cut = families(name, max_prompt_tokens=len(hinted.tokens) - 1).encode_with_hint(pair)
        assert cut.cut == "history"
        assert f"{place} {verb} causal." in family.tokenizer.decode(cut.tokens)


@pytest.mark.parametrize("name", ["causal", "masked"])
def test_no_prompt_of_a_tree_sees_the_hint_of_another(
    name: str, families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families(name)
    family.layout = "tree" if name == "masked" else "pair"
    network = network_of(family, bases(name), use_tree=name == "causal")
    plain = [family.encode(pair) for pair in some_pairs]
    hinted = [family.encode_with_hint(pair) for pair in some_pairs]
    assert [prompt.trunk for prompt in hinted] == [prompt.trunk for prompt in plain]
    mixed = [hinted[n] if n % 2 else plain[n] for n in range(len(plain))]
    with torch.no_grad():
        plain_PA, hinted_PA, mixed_PA = (network(prompts) for prompts in (plain, hinted, mixed))
    torch.testing.assert_close(mixed_PA[::2], plain_PA[::2], atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed_PA[1::2], hinted_PA[1::2], atol=1e-4, rtol=0)
    assert float((hinted_PA - plain_PA).abs().max()) > 1e-2


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_long_prompts_lose_their_oldest_history_first(
    name: str, families: Callable[..., Family], some_pairs: list[Pair]
) -> None:
    pair = max(some_pairs, key=lambda p: p.target)
    whole = families(name).encode(pair)
    budget = len(whole.tokens) - 10
    cut = families(name, max_prompt_tokens=budget).encode(pair)
    assert len(cut.tokens) == budget
    keep = budget // 2
    assert cut.tokens[-keep:].tolist() == whole.tokens[-keep:].tolist()


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of T5's kind: Unigram, whose NMT normaliser reads a newline as a space."""
    pieces = {**{chr(n): -9.0 for n in range(33, 127)}, "▁": -8.0, "▁is": -3.0}
    pieces |= {f"▁{word}": -2.0 for word in CONNECTIVES}
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    made = Tokenizer(models.Unigram([*special, *pieces.items()], unk_id=2, byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["</s>", "<extra_id_0>"])
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    path = tmp_path_factory.mktemp("unigram")
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


def test_a_tokenizer_that_drops_newlines_joins_the_history_by_its_end_token(
    families: Callable[..., Family], sentencepiece_like: Path, some_pairs: list[Pair]
) -> None:
    """T5's prompts keep the utterances apart; where the tokenizer keeps newlines or has a separator nothing changes."""
    assert [families(name).separator for name in FAMILY_NAMES] == ["\n", "\n", "</s>"]
    family = Seq2SeqFamily(str(sentencepiece_like), max_prompt_tokens=4000, emotions_shown="coarse")
    assert family.separator == "</s>"
    end = family.tokenizer.eos_token_id
    pair = max(some_pairs, key=lambda p: p.target)
    prompt = family.encode(pair)
    # One behind each utterance of the history, and the tokenizer's at the end.
    assert prompt.tokens.tolist().count(end) == (pair.target - 1) + 1
    pieces = family.tokenizer.decode(prompt.tokens).split("</s>")
    squeezed = ["".join(text.split()) for text in pieces]
    history = ["".join(u.text.split()) for u in pair.dialogue.utterances[: pair.target - 1]]
    assert squeezed[: len(history)] == history
    # Cut prompts lose whole utterances and their separators from the oldest on.
    budget = len(prompt.tokens) - len(family.tokenizer(pair.dialogue.utterances[0].text).input_ids)
    family.max_prompt_tokens = budget
    assert family.encode(pair).tokens.tolist() == prompt.tokens[-budget:].tolist()
    family.max_prompt_tokens = 4000
    # As before, utterances would run together.
    family.separator = "\n"
    assert family.encode(pair).tokens.tolist().count(end) == 1


def test_a_teacher_keeps_the_separator_that_it_was_trained_with(sentencepiece_like: Path) -> None:
    """Labels of T5 teachers from before keep their prompts and lineage; new teachers have another of both."""
    family = Seq2SeqFamily(str(sentencepiece_like), max_prompt_tokens=4000, emotions_shown="coarse")
    new = separator_details(family), template_digest(family)
    family.separator = trained_separator({}, family)
    old = separator_details(family), template_digest(family)
    assert (new[0], old[0]) == ({"history_separator": "</s>"}, {}) and new[1] != old[1]
    family.separator = trained_separator(new[0], family)
    assert (separator_details(family), template_digest(family)) == new
    with pytest.raises(ArtifactError, match="history_separator"):
        trained_separator({"history_separator": 7}, family)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_answer_words_are_one_token_each(name: str, families: Callable[..., Family]) -> None:
    family = families(name)
    words = [family.tokenizer.decode([token]).strip() for token in family.answer_ids]
    assert words == list(CONNECTIVES)


def test_a_split_answer_word_asks_for_another_model(families: Callable[..., Family]) -> None:
    tokenizer = families("causal").tokenizer
    with pytest.raises(ModelError, match=r"flabbergasted.*choose a model whose tokenizer") as caught:
        answer_token_ids(tokenizer, ["flabbergasted"], before="is ")
    assert "stand_ins" not in str(caught.value)
    with pytest.raises(ModelError, match="map each of them to a single-token word in stand_ins"):
        answer_token_ids(tokenizer, ["flabbergasted"], before="is ", stand_ins={})


def test_coarse_teacher_is_not_shown_fine_emotions(
    families: Callable[..., Family], some_pairs: list[Pair]
) -> None:
    family = families("causal")
    fine = next(p for p in some_pairs if p.emotion in ("gratitude", "praise", "like", "hope"))
    assert "feels happiness and says" in family.tokenizer.decode(family.encode(fine).tokens)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_answer_rows_are_those_of_the_whole_head(
    name: str, families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families(name)
    network = network_of(family, bases(name), use_tree=False)
    prompts = [family.encode(pair) for pair in some_pairs[:6]]
    is_cause_P = torch.tensor([pair.is_cause for pair in some_pairs[:6]])
    results = []
    for whole in (False, True):
        hidden_PH = network._hidden(prompts)
        if whole:
            logits_PA = family.head(network.network, hidden_PH)[:, family.answer_ids]
        else:
            logits_PA = family.answer_logits(network.network, hidden_PH)
            assert logits_PA.shape == (6, len(CONNECTIVES))
        gradients = torch.autograd.grad(
            connective_loss(logits_PA, is_cause_P), trainable_parameters(network), allow_unused=True
        )
        results.append((logits_PA.detach(), torch.cat([g.flatten() for g in gradients if g is not None])))
    (rows_PA, of_rows), (whole_PA, of_whole) = results
    torch.testing.assert_close(rows_PA, whole_PA, atol=1e-5, rtol=1e-5)
    assert of_rows.shape == of_whole.shape
    assert float((of_rows - of_whole).norm() / of_whole.norm()) < 1e-5


def test_an_adapted_head_is_multiplied_whole(
    families: Callable[..., Family], bases: Callable[[str], Path], some_pairs: list[Pair]
) -> None:
    family = families("causal")
    base = family.load_network(str(bases("causal")), dtype=torch.float32)
    adapted = add_lora(base, LoraConfig(rank=4, targets=("q_proj", "lm_head")), family.lora_task)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    network = TeacherNetwork(family, adapted, use_tree=True, device=torch.device("cpu")).eval()
    prompts = [family.encode(pair) for pair in some_pairs[:3]]
    with torch.no_grad():
        expected = adapted.get_base_model().lm_head(network._hidden(prompts))[:, family.answer_ids]
        torch.testing.assert_close(network(prompts), expected, atol=1e-6, rtol=0)
        plain = torch.nn.functional.linear(
            network._hidden(prompts), adapted.get_base_model().lm_head.weight[family.answer_ids]
        )
        assert float((plain - expected).abs().max()) > 1e-2  # its rows alone would miss the adapter
