"""The layers of a pretrained model: how many of them, with whose weights, and with what dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.whole import table_names

DROPOUT = "added_dropout"
"""Its name in the parts of a model that it was added to."""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers from the lowest up; none where the model has no plain list of them."""
    depth = model.config.get_text_config().num_hidden_layers
    # a model of pictures, too, has a list for these
    decoder = getattr(model.base_model, "language_model", model.base_model)
    lists = (
        part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == depth
    )
    return next(lists, nn.ModuleList())


def keep_layers(model: PreTrainedModel, number: int) -> None:
    """Keep the lowest ``number`` layers; the final norm and the head come after them.

    Raises:
        UserError: there are not as many, or upper layers take more from lower ones than a state.
    """
    layers, shape = decoder_layers(model), model.config.get_text_config()
    depth = len(layers)
    if not depth or getattr(shape, "num_kv_shared_layers", None):
        raise UserError(
            f"backbone_layers={number}: the layers of backbone {model.config.model_type!r} cannot "
            "do without each other; leave it out."
        )
    if not 1 <= number <= depth:
        raise UserError(
            f"backbone_layers={number} must be from 1 to {depth}, the number of the backbone's "
            "layers, or null for all."
        )
    del layers[number:]
    for key, value in shape.to_dict().items():  # such as the kind of each layer
        if isinstance(value, list) and len(value) == depth:
            setattr(shape, key, value[:number])
    shape.num_hidden_layers = number


def redraw(model: PreTrainedModel, titles_alone: bool, seed: int) -> None:
    """Draw the weights anew, as a model of this shape begins: a control without pretraining.

    Args:
        titles_alone: only what has a row for each token; the body stays.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(model)(model.config).state_dict()
    names = table_names(model, model.state_dict()) if titles_alone else fresh
    model.load_state_dict({name: fresh[name] for name in names}, strict=False)


def add_dropout(model: PreTrainedModel, share: float) -> None:
    """In training, drop that share of the embeddings' output and of what each layer adds to it::

        x ── layer ── y          x ── layer ── y ── x + dropout(y - x)

    Raises:
        UserError: the model has no plain list of layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(
            f"backbone_dropout={share} finds no list of layers in backbone "
            f"{model.config.model_type!r}; leave it out."
        )
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(_drop)
    for layer in layers:
        layer.register_forward_hook(_drop_added, with_kwargs=True)
    for part in (embeddings, *layers):
        # a part of it, so that it follows the model's mode
        part.add_module(DROPOUT, nn.Dropout(share).train(part.training))


def _drop(embeddings: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return embeddings.get_submodule(DROPOUT)(output)


def _drop_added(
    layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    dropout = layer.get_submodule(DROPOUT)
    if not dropout.training:
        return output  # to the last digit
    before = args[0] if args else kwargs["hidden_states"]
    after = output[0] if isinstance(output, tuple) else output
    dropped = before + dropout(after - before)
    return (dropped, *output[1:]) if isinstance(output, tuple) else dropped
