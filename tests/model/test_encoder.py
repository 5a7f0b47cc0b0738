"""Prompts and responses as tokens, read back as text."""

import numpy as np
import pytest

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.prompts import Templates, Units, candidate_prompts, history_prompts
from recbole_sdpo.lm.scratch import train_tokenizer
from recbole_sdpo.model.encoder import Encoder
from recbole_sdpo.ragged import Ragged

TITLES = ("", "Alien (1979)", "Alien 3 (1992)", "Brazil (1985)", "<s>")


@pytest.fixture
def encoder():
    catalogue = Catalogue(TITLES, np.array([], int))
    units = Units(len(TITLES), Templates("Seen:\n", ("Seen:\n{history}Pick:\n{candidates}Next:\n",)))
    return Encoder(catalogue, units, train_tokenizer(TITLES, 280)), units


def sequences(forest, tokenizer):
    """Each response's whole sequence as text, prompt and response told apart by a bar."""
    visible, width = forest.attention().numpy(), forest.tokens.shape[1]
    found = []
    for number in range(forest.responses):
        edges = np.flatnonzero(forest.edge_response.numpy() == number)
        edges = edges[np.argsort(forest.edge_step.numpy()[edges])]
        row, column = divmod(int(forest.states[forest.edge_state[edges[0]]]), width)
        prompt = forest.tokens[row, np.flatnonzero(visible[row, column])]
        found.append(tokenizer.decode(prompt) + "|" + tokenizer.decode(forest.edge_token[edges]))
    return found


def test_history_prompts_are_titles_under_a_header(encoder):
    encoder, units = encoder
    tokenizer = train_tokenizer(TITLES, 280)
    prompts = history_prompts(Ragged.from_rows([[1, 3], [4]]), np.array([2, 1]), np.array([0, 1]), units.header)
    forest = encoder.forest(prompts, np.array([[2, 4], [1, 3]]))
    assert sequences(forest, tokenizer) == [
        "Seen:\nAlien (1979)\nBrazil (1985)\n|Alien 3 (1992)\n",
        "Seen:\nAlien (1979)\nBrazil (1985)\n|<s>\n",
        "Seen:\n<s>\n|Alien (1979)\n",
        "Seen:\n<s>\n|Brazil (1985)\n",
    ]


def test_candidate_prompts_hold_the_candidates(encoder):
    encoder, units = encoder
    tokenizer = train_tokenizer(TITLES, 280)
    past, shown = Ragged.from_rows([[1]]), Ragged.from_rows([[3, 2]])
    prompts = candidate_prompts(past, shown, np.array([2]), np.array([0]), units, np.array([0]))
    assert sequences(encoder.forest(prompts, np.array([[2]])), tokenizer) == [
        "Seen:\nAlien (1979)\nPick:\nBrazil (1985)\nAlien 3 (1992)\nNext:\n|Alien 3 (1992)\n"
    ]


def test_sizes_bound_the_forest(encoder):
    encoder, units = encoder
    prompts = history_prompts(Ragged.from_rows([[1, 3], [4]]), np.array([2, 1]), np.array([0, 1]), units.header)
    items = np.array([[2, 4], [1, 3]])
    forest, sizes = encoder.forest(prompts, items), encoder.sizes(prompts, items)
    assert forest.size <= sizes.sum() and forest.tokens.shape[1] <= sizes.max()
