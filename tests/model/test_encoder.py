"""Prompts and responses as tokens, read back as text."""

import numpy as np
import pytest
from tokenizers import normalizers

from recbole_sdpo.data.catalogue import Catalogue
from recbole_sdpo.data.prompts import Templates, Units, candidate_prompts, history_prompts
from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.scratch import train_tokenizer
from recbole_sdpo.model.encoder import Encoder
from recbole_sdpo.ragged import Ragged
from tests.lm.tokenizers import bert, byte_level, sentencepiece

TITLES = ("", "Alien (1979)", "Alien 3 (1992)", "Brazil (1985)", "<s>")


@pytest.fixture
def encoder():
    catalogue = Catalogue(TITLES, np.array([], int))
    units = Units(
        len(TITLES), Templates("Seen:\n", ("Seen:\n{history}Pick:\n{candidates}Next:\n",))
    )
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
    prompts = history_prompts(
        Ragged.from_rows([[1, 3], [4]]), np.array([2, 1]), np.array([0, 1]), units.header
    )
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
    prompts = history_prompts(
        Ragged.from_rows([[1, 3], [4]]), np.array([2, 1]), np.array([0, 1]), units.header
    )
    items = np.array([[2, 4], [1, 3]])
    forest, sizes = encoder.forest(prompts, items), encoder.sizes(prompts, items)
    assert forest.size <= sizes.sum() and forest.tokens.shape[1] <= sizes.max()


def encode(tokenizer, *titles, header="seen\n"):
    return Encoder(
        Catalogue(("", *titles), np.array([], int)),
        Units(len(titles) + 1, Templates(header, ())),
        tokenizer,
    )


@pytest.mark.parametrize(
    ("tokenizer", "titles", "message"),
    [
        (bert(), ["alien"], r"does not end 'alien\\n' with its line break"),
        (
            sentencepiece(normalizers.Strip()),
            ["alien"],
            r"does not end 'alien\\n' with its line break",
        ),
        (
            sentencepiece(normalizers.Replace("\n", " ")),
            ["alien"],
            r"does not end 'alien\\n' with its line break",
        ),
        (sentencepiece(), ["alien", "千"], "control token '<unk>' of '千' in"),
        (
            byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
            ["Amélie"],
            "makes 'Amelie.*' of 'Amélie",
        ),
        (byte_level(normalizers.Replace("(", "\n")), ["alien (1979)"], "does not end|makes"),
        (
            byte_level(normalizers.Replace(" ", "")),
            ["a lien", "al ien"],
            "no difference between the titles 'a lien' and 'al ien'",
        ),
        (byte_level(dropout=0.5), ["alien (1979)"] * 20, "otherwise each time"),
        (
            byte_level(),
            ["a" * 2001],
            r"the title 'a{60}…' has 2001 characters and must have 2000 at most",
        ),
    ],
)
def test_a_tokenizer_that_makes_something_else_of_titles_is_refused(tokenizer, titles, message):
    with pytest.raises(UserError, match=message):
        encode(tokenizer, *titles)


def test_a_template_is_read_as_strictly_as_a_title():
    with pytest.raises(UserError, match="control token '<unk>' of '→' in 'seen →"):
        encode(sentencepiece(), "alien", header="seen →\n")


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(),
        byte_level(normalizers.NFKC()),
        byte_level(normalizers.Lowercase()),
        sentencepiece(),
    ],
)
def test_titles_are_lines_of_their_own(tokenizer):
    """None is the beginning of another; those alike but for case may be one."""
    titles = ["alien", "alien 3", "(alien)", "al"] + (
        ["Alien"] if tokenizer.eos_token_id == 1 else []
    )
    encoder = encode(tokenizer, *titles)
    rows = [encoder.tokens[item].tolist() for item in range(1, 5)]
    assert not any(a == b[: len(a)] for a in rows for b in rows if a is not b)


def test_strange_titles_are_titles_of_a_byte_level_tokenizer():
    titles = ["\u0301" * 50, "שלום עולם", "🚀🧑‍🚀", "nul\x00nul", "a" * 2000, "\u202eright", "ﬁn"]
    tokenizer = byte_level()
    encoder = encode(tokenizer, *titles)
    assert [tokenizer.decode(encoder.tokens[item]) for item in range(1, 8)] == [
        title + "\n" for title in titles
    ]
