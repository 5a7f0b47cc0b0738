"""A causal language model that answers a prefix forest with the log-probabilities of its responses."""

from __future__ import annotations

import copy
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recbole_sdpo.lm.forest import Forest

LOGITS_AT_ONCE = (2**22, 2**26)
"""Largest number of logits held at a time, on a CPU (16 MiB in float32, near its caches) and on a GPU."""

REFERENCE = "reference"
"""Name of the adapter that holds the reference."""


class LanguageModel(nn.Module):
    """Policy and reference over one backbone.

    With adapters, policy and reference are two adapters on one copy of the base weights. A fully trained model keeps a
    frozen copy of itself as the reference.

    Args:
        model: a causal language model of ``transformers``, or a ``peft`` model around one.
        tokenizer: its tokenizer.

    Raises:
        ValueError: the model changes its logits after its output layer in a way not known here.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self._frozen: PreTrainedModel | None = None
        _check_head(_causal_lm(model))

    def forward(self, forest: Forest) -> Tensor:
        """Log-probabilities of the responses under the policy, float32 ``[R]`` (float64 for a float64 model)."""
        return response_logps(_causal_lm(self.model), forest)

    @torch.no_grad()
    def reference_logps(self, forest: Forest) -> Tensor:
        """As :meth:`forward`, under the reference, in evaluation mode and without a gradient.

        Raises:
            RuntimeError: no reference was frozen yet.
        """
        if not self.has_reference:
            raise RuntimeError("There is no reference yet; call freeze_reference() first.")
        if not isinstance(self.model, PeftModel):
            return response_logps(self._frozen.eval(), forest)  # train() reaches it, as it does every submodule
        training = self.model.training
        self.model.eval()
        self.model.set_adapter(REFERENCE, inference_mode=True)
        try:
            return response_logps(_causal_lm(self.model), forest)
        finally:
            self.model.set_adapter("default")
            self.model.train(training)

    def freeze_reference(self) -> None:
        """Make the policy as it now is the reference."""
        if not isinstance(self.model, PeftModel):
            self._frozen = None
            self._frozen = copy.deepcopy(self.model).eval().requires_grad_(False)
            return
        if REFERENCE not in self.model.peft_config:
            self.model.add_adapter(REFERENCE, self.model.peft_config["default"])
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                if f".{REFERENCE}." in name:
                    weight.copy_(weights[name.replace(f".{REFERENCE}.", ".default.")])
        self.model.set_adapter("default")

    @property
    def has_reference(self) -> bool:
        """Has a reference been frozen?"""
        return self._frozen is not None or (isinstance(self.model, PeftModel) and REFERENCE in self.model.peft_config)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The policy's trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device


def response_logps(model: PreTrainedModel, forest: Forest) -> Tensor:
    """One pass over the forest: the sum of each response's token log-probabilities given its prompt, ``[R]``."""
    forest = forest.to(model.device)
    hidden = model.base_model(
        input_ids=forest.tokens,
        # A forest of chains is plain causal attention at positions 0, 1, 2, …, which needs neither.
        attention_mask=None if forest.chains else _attention_mask(model, forest),
        position_ids=None if forest.chains else forest.positions,
        use_cache=False,
    ).last_hidden_state
    hidden = hidden.flatten(0, 1)[forest.states]

    head = model.get_output_embeddings()
    trained = [p for p in head.parameters() if p.requires_grad]
    logps = _TokenLogps.apply(partial(_logits, model), hidden, forest.edge_state, forest.edge_token, *trained)

    # Each token has a place of its own, so the sum has one order on every device.
    steps = int(forest.edge_step.max()) + 1 if len(logps) else 0
    table = logps.new_zeros(forest.responses, steps)
    return table.index_put((forest.edge_response, forest.edge_step), logps).sum(-1)


class _TokenLogps(torch.autograd.Function):
    """log pi of ``edge_token[e]`` after ``hidden[edge_state[e]]``, without ever holding all logits.

    Each state goes through the vocabulary projection once, in chunks; backward computes a chunk's logits again and turns
    them in place into their gradient, softmax and one-hot.
    """

    @staticmethod
    def forward(ctx, logits_of, hidden: Tensor, edge_state: Tensor, edge_token: Tensor, *trained: nn.Parameter) -> Tensor:
        chosen, normalizer = [], []
        for rows, edges in _chunks(hidden, edge_state, logits_of):
            logits = logits_of(hidden[rows])
            normalizer.append(logits.logsumexp(-1))
            chosen.append(logits[edge_state[edges] - rows.start, edge_token[edges]])
        total = torch.cat(normalizer)
        ctx.logits_of = logits_of
        ctx.save_for_backward(hidden, edge_state, edge_token, total, *trained)
        return torch.cat(chosen) - total[edge_state]

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, edge_state, edge_token, total, *trained = ctx.saved_tensors
        weight = torch.zeros_like(total).index_add_(0, edge_state, grad_output)
        grad_hidden = torch.empty_like(hidden)
        grad_trained = [torch.zeros_like(p) for p in trained]
        for rows, edges in _chunks(hidden, edge_state, ctx.logits_of):
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_()
                logits = ctx.logits_of(part)
            grad = logits.detach().sub(total[rows, None]).exp_().mul_(-weight[rows, None])
            grad.index_put_((edge_state[edges] - rows.start, edge_token[edges]), grad_output[edges], accumulate=True)
            grad_hidden[rows], *parts = torch.autograd.grad(logits, [part, *trained], grad)
            for sum_so_far, new in zip(grad_trained, parts, strict=True):
                sum_so_far += new
        return None, grad_hidden, None, None, *grad_trained


def _chunks(hidden: Tensor, edge_state: Tensor, logits_of: partial) -> list[tuple[slice, slice]]:
    """Cuts of the states, and of the edges that leave them, with a bounded number of logits each."""
    (model,) = logits_of.args
    step = max(1, LOGITS_AT_ONCE[hidden.device.type == "cuda"] // model.config.get_text_config().vocab_size)
    bounds = [*range(0, len(hidden), step), len(hidden)]
    edges = torch.searchsorted(edge_state, torch.tensor(bounds, device=hidden.device)).tolist()
    return [(slice(low, high), slice(first, last)) for low, high, first, last in zip(bounds, bounds[1:], edges, edges[1:], strict=False)]


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    logits = model.get_output_embeddings()(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _attention_mask(model: PreTrainedModel, forest: Forest) -> Tensor | dict[str, Tensor]:
    """Additive masks ``[B, 1, L, L]`` in the model's dtype; one for each kind of layer where layers differ."""
    config = model.config.get_text_config()

    def additive(window: int | None) -> Tensor:
        hidden = ~forest.attention(window)[:, None]
        return torch.zeros_like(hidden, dtype=model.dtype).masked_fill_(hidden, torch.finfo(model.dtype).min)

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return additive(window)
    masks = {"full_attention": None, "sliding_attention": window}
    return {kind: additive(masks[kind]) for kind in kinds}


def _causal_lm(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Compare our path from hidden states to logits with the model's own on a few tokens."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        raise ValueError(
            f"backbone {model.config.model_type!r} has layers of kind {', '.join(sorted(kinds))}, which cannot be given "
            "a tree; valid are decoders with full or sliding attention, such as Llama, Qwen, Gemma, Mistral or GPT-2."
        )
    training = model.training
    model.eval()
    tokens = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    theirs = model(input_ids=tokens, use_cache=False).logits[0]
    ours = _logits(model, model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0])
    model.train(training)
    if not torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
        raise ValueError(
            f"backbone {model.config.model_type!r} changes its logits after its output layer in a way that is not known "
            "here; choose another backbone, such as a Llama, Qwen, Gemma, Mistral or GPT-2."
        )
