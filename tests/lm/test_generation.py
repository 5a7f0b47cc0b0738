"""Greedy answers of padded batches against one prompt at a time without a cache, and against the
likelihood of whole answers."""

import numpy as np
import pytest
import torch

from recbole_sdpo.lm.generation import NOTHING, line_ends, write
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.scratch import train_tokenizer
from recbole_sdpo.ragged import Ragged
from tests.lm.test_architectures import EAGER_ONLY, NAMES, VOCAB, build, one_by_one

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5], [5, 6, 20], [40, 41, 42, 43, 44]]
ENDS = [3, 30]


def greedy(model, prompt, limit, ends, among=None):
    """The most likely next token again and again, by the model's logits over the whole text."""
    answer = []
    while len(answer) < limit and not (answer and answer[-1] in ends):
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, -1]
        if among is not None:
            follow = {
                response[len(answer)]
                for response in among
                if response[: len(answer)] == answer and len(response) > len(answer)
            }
            logits = logits.masked_fill(
                ~torch.isin(torch.arange(len(logits)), torch.tensor(sorted(follow))), -torch.inf
            )
        answer.append(int(logits.argmax()))
    return answer


def rows(found):
    return [row[row != NOTHING].tolist() for row in found]


@pytest.mark.parametrize("name", [*NAMES, *EAGER_ONLY])
@torch.no_grad()
def test_answers_are_those_of_one_prompt_at_a_time(name):
    # whose softmax is of float32, in which the mask of a float64 model is minus infinity
    eager = name in EAGER_ONLY
    model = build(
        name, "eager" if eager else "sdpa", True, torch.float32 if eager else torch.float64
    )
    lm = LanguageModel(model, None)
    # what a backbone's files may say
    model.get_base_model().generation_config.repetition_penalty = 9.0
    found = write(lm, Ragged.from_rows(PROMPTS), 12, ENDS)
    assert found.shape == (4, 12)
    assert rows(found) == [greedy(model, prompt, 12, ENDS) for prompt in PROMPTS]


@torch.no_grad()
def test_prompts_of_several_lengths_are_answered_where_every_token_ends_one():
    model = build("GPTNeoX", "sdpa", False, torch.float64)
    lines = write(LanguageModel(model, None), Ragged.from_rows(PROMPTS), 3, range(VOCAB))
    assert rows(lines) == [greedy(model, prompt, 1, []) for prompt in PROMPTS]


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_constrained_answers_stay_among_theirs(seed):
    rng = np.random.default_rng(seed)
    among = [
        [[*rng.integers(4, 8, rng.integers(0, 5)).tolist(), 3] for _ in range(6)] for _ in PROMPTS
    ]
    lm = LanguageModel(build("Llama", "sdpa", False, torch.float64), None)
    found = rows(write(lm, Ragged.from_rows(PROMPTS), 5, ENDS, list(map(Ragged.from_rows, among))))
    assert found == [
        greedy(lm.model, prompt, 5, ENDS, own) for prompt, own in zip(PROMPTS, among, strict=True)
    ]
    assert all(answer in own for answer, own in zip(found, among, strict=True))


@torch.no_grad()
def test_greedy_decoding_finds_the_likeliest_answer_unless_its_first_tokens_are_less_likely():
    """Both choose the same answer where the greedy path is the best path. They differ where one
    likely first token is shared by answers that are each less likely than one that begins
    otherwise."""
    model = build("Llama", "sdpa", False, torch.float64)
    model.lm_head.weight.data.mul_(12)  # far from uniform
    lm, rng, differ = LanguageModel(model, None), np.random.default_rng(1), 0
    for _ in range(60):
        prompt = rng.integers(4, 90, 6).tolist()
        among = [[first, second, 3] for first in (10, 11, 12) for second in (20, 21, 22)]
        (found,) = rows(write(lm, Ragged.from_rows([prompt]), 3, ENDS, [Ragged.from_rows(among)]))
        scores = one_by_one(model, [prompt], np.zeros(9, int), np.full(9, len(prompt)), among)
        best = among[int(scores.argmax())]
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        if first[best[0]] == first[[10, 11, 12]].max():
            assert found[0] == best[0]
        if found != best:
            differ += 1
            first_two = one_by_one(
                model, [prompt], np.zeros(2, int), np.full(2, len(prompt)), [found[:2], best[:2]]
            )
            # ahead at the first fork, behind at the end
            assert first[found[0]] > first[best[0]] or first_two[0] > first_two[1]
    assert 0 < differ < 60


def test_what_ends_a_line():
    tokenizer = train_tokenizer(["Alien (1979)\n", "Heat\n"], 400)
    ends = line_ends(tokenizer)
    for title in ("Alien (1979)", "Heat", "a title never seen"):
        *inside, last = tokenizer.encode(title + "\n", add_special_tokens=False)
        assert last in ends and not set(inside) & set(ends)
    assert tokenizer.eos_token_id in ends
