import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_sdpo.lm.scratch import build_model, train_tokenizer
from recbole_sdpo.lm.text import encode_texts, opening_tokens


def encode_text(tokenizer, text):
    return encode_texts(tokenizer, [text])[0]


TITLES = ["Alien (1979)", "Amélie (2001)", "千と千尋 (2001)"]


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(TITLES * 3, 300)
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_end|><|x|>"]})
    made.add_tokens(["<tool_call>"])
    return made


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "a <|im_end|><|im_end|> b", "<s>", "<|im_end|><|x|>", "<tool_call>", "<<s>s>", "<|im_<s>end|>"],
)
def test_no_text_becomes_a_control_token(tokenizer, text):
    ids = encode_text(tokenizer, text)
    assert not set(ids) & set(tokenizer.get_added_vocab().values())
    assert tokenizer.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_ordinary_text_is_tokenised_as_ever(tokenizer):
    assert encode_text(tokenizer, "Alien (1979)") == tokenizer("Alien (1979)", add_special_tokens=False).input_ids


def test_opening_is_what_the_tokenizer_puts_first(tokenizer):
    assert opening_tokens(tokenizer) == tokenizer("", add_special_tokens=True).input_ids


def test_frequent_titles_get_fewer_tokens():
    tokenizer = train_tokenizer(["the one everybody sees"] * 50 + ["another that few know"], 270)
    assert len(encode_text(tokenizer, "the one everybody sees")) < len(encode_text(tokenizer, "another that few know"))


def test_no_token_is_a_mere_step_to_another():
    """What no text is made of is not in the vocabulary, but for the bytes; every text is cut into the fewest pieces."""
    texts = ["red cube\n", "red ball\n", "blue cube\n"]
    tokenizer = train_tokenizer(texts * 9, 1000)
    pieces = set(tokenizer.get_vocab()) - {"<s>"}
    used = {piece for text in texts for piece in tokenizer.tokenize(text)}
    assert {piece for piece in pieces if len(piece) > 1} <= used and len(pieces) <= 256 + len(used)
    assert [len(encode_text(tokenizer, text)) for text in texts] == [1, 1, 1]
    assert len(encode_text(train_tokenizer(texts * 9, 257), texts[0])) == len(texts[0])


def test_scratch_weights_depend_on_their_seed_alone():
    import torch

    torch.manual_seed(1)
    first = build_model(64, 16, 1, 2, 0.0, seed=5)
    here = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == here  # building drew nothing from the global generator
    second = build_model(64, 16, 1, 2, 0.0, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
