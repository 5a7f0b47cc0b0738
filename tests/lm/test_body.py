"""Fewer layers, weights drawn anew and dropout, against what a model computes without our code."""

import copy

import pytest
import torch
import transformers

from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.body import add_dropout, decoder_layers, keep_layers, redraw
from recbole_sdpo.lm.whole import tables

SHAPES = {
    "Llama": {},
    "Gemma3": {"head_dim": 8, "sliding_window": 4, "tie_word_embeddings": True},
    "GPTNeoX": {},
    "GPT2": {},
}
TOKENS = torch.tensor([[5, 9, 2, 7, 7, 1]])


def build(name, layers=4):
    kind = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    config = getattr(transformers, kind)(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **SHAPES[name],
    )
    torch.manual_seed(0)
    head = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, head)(config).eval()


def states(model):
    """What goes into each layer, and what the last one gives before the final norm."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach()))
        for layer in decoder_layers(model)
    ]
    model(input_ids=TOKENS)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", SHAPES)
def test_the_lowest_layers_are_what_is_left(name):
    model = build(name)
    before = states(model)
    keep_layers(model, 2)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers == 2
    after = states(model)
    assert len(after) == 2
    for mine, theirs in zip(after, before, strict=False):
        assert mine.equal(theirs)


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_of_fewer_layers_is_saved_and_read_again(name, tmp_path):
    model = build(name)
    keep_layers(model, 3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again(input_ids=TOKENS).logits.equal(model(input_ids=TOKENS).logits)


def with_pictures():
    """A model that has as many layers for pictures as for text, and has them first."""
    text, pictures = (
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} for _ in range(2)
    )
    config = transformers.Gemma3Config(
        text_config=text
        | {"vocab_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        vision_config=pictures | {"num_attention_heads": 4, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def test_the_layers_are_those_of_the_text():
    model = with_pictures()
    assert {type(layer).__name__ for layer in decoder_layers(model)} == {"Gemma3DecoderLayer"}


@pytest.mark.parametrize("number", [0, 5])
def test_as_many_layers_as_there_are(number):
    with pytest.raises(UserError, match=f"backbone_layers={number} must be from 1 to 4, "):
        keep_layers(build("Llama"), number)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("titles_alone", [True, False])
def test_weights_are_drawn_as_a_fresh_model_has_them(name, titles_alone):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    redraw(model, titles_alone, 3)
    torch.manual_seed(3)
    fresh = type(model)(model.config).state_dict()
    rows = {table.data_ptr() for table in tables(model)}
    for weight_name, weight in model.state_dict().items():
        drawn = not titles_alone or weight.data_ptr() in rows
        assert weight.equal((fresh if drawn else before)[weight_name])


@pytest.mark.parametrize("name", SHAPES)
def test_dropout_is_of_the_embeddings_and_of_what_a_layer_adds(name):
    """Of a stack of layers with dropout, against the same stack called by hand."""
    model, plain = build(name), build(name)
    add_dropout(model, 0.4)
    assert model(input_ids=TOKENS).logits.equal(plain(input_ids=TOKENS).logits)  # in evaluation
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.train()
    for part in model.modules():  # the architecture's own dropout is not asked about here
        own = isinstance(part, torch.nn.Dropout) and part.p != 0.4
        part.training = part.training and not own
    before, after, kept = [], [], []
    for layer in decoder_layers(model):
        layer.added_dropout.register_forward_hook(lambda m, args, out: kept.append((args[0], out)))
        layer.register_forward_pre_hook(lambda m, args: before.append(args[0]))
        layer.register_forward_hook(lambda m, args, out: after.append(first(out)))
    embeddings = model.get_input_embeddings()
    torch.manual_seed(1)
    states = embeddings(TOKENS)
    rows = type(embeddings).forward(embeddings, TOKENS)
    assert_dropped(rows, states)
    model(input_ids=TOKENS)
    assert len(kept) == len(decoder_layers(model))
    for x, y, (added, dropped) in zip(before, after, kept, strict=True):
        assert_dropped(added, dropped)
        torch.testing.assert_close(y, x + dropped)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def assert_dropped(whole, dropped):
    """About 0.4 of ``whole`` is nothing in ``dropped``, and the rest is 1/0.6 of itself."""
    gone = dropped == 0
    assert 0.25 < gone.float().mean() < 0.55
    torch.testing.assert_close(dropped[~gone], whole[~gone] / 0.6)
