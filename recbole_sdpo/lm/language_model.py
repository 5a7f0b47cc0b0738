"""A causal language model that answers a prefix forest with the log-probabilities of its
responses."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from logging import getLogger

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recbole_sdpo.errors import UserError
from recbole_sdpo.lm.attention import (
    FLEX,
    attention_inputs,
    check_attention,
    dense_implementation,
    positions,
    set_attention,
)
from recbole_sdpo.lm.body import decoder_layers
from recbole_sdpo.lm.forest import Forest, plant
from recbole_sdpo.lm.parts import all_of
from recbole_sdpo.lm.projection import next_logps, rows_at_once, token_logps
from recbole_sdpo.lm.whole import is_whole, tables
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.random import generator

VALID = "choose another backbone, such as a Llama, Qwen, Gemma, Mistral or GPT-2."

BACKEND, GRAPHS = "inductor", 64
"""What compiles layers, and how many graphs of one code it may make before it leaves the rest as
they are; torch's limit is 8."""

Attention = tuple[str, dict[str, object]]
"""An implementation, and the decoder's arguments, as :func:`attention_inputs` gives them."""

Places = list[tuple[nn.Module, str, nn.Parameter | None]]
"""Modules, the name of a weight in each, and the weight."""

REFERENCE = "reference"
"""Name of the adapter that holds the reference."""

FROZEN = "lm.frozen."
"""Begins the names of what a frozen reference is made of, in a recommender."""


class LanguageModel(nn.Module):
    """Policy and reference over one backbone.

    With adapters, policy and reference are two adapters on one copy of the base weights, and the
    layers under the lowest adapter, which are the same for both, run once. A fully trained model
    keeps a frozen copy of itself as the reference.

    Args:
        model: a causal language model of ``transformers``, or a ``peft`` model around one.
        tokenizer: its tokenizer.
        attention: ``sdpa``, ``eager``, ``flex_attention``, or ``auto``, as in
            :func:`attention_inputs`.
        mixed: compute in bfloat16, whatever the weights are in (``torch.autocast``).
        compiled: compile the decoder's layers, but for those that policy and reference share.

    Raises:
        UserError: a forest's scores are not those of one sequence at a time, or ``attention`` or
            ``compiled`` is not for this model.
    """

    _caches = True  # weights in bfloat16, while it computes
    _device: torch.device | None = None  # that computes, where the weights are elsewhere

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        attention: str = "auto",
        mixed: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.attention, self.mixed, self.compiled = attention, mixed, compiled
        self._adapted: tuple[BaseTunerLayer, ...] = ()  # what switches between the adapters
        # what has to leave the training mode for the reference
        self._moody: tuple[nn.Module, ...] = ()
        # the reference of a policy that is trained as a whole
        self.frozen: PreTrainedModel | None = None
        # under an adapter, what is trained beside it: where it is, and the reference's
        self._beside: Places = []
        check_attention(self.causal_lm, attention)
        self._layers = tuple(decoder_layers(self.causal_lm))
        self._shared = _layers_below_training(self.causal_lm, self._layers)
        _check_kinds(self.causal_lm)
        if compiled:
            if not self._layers:
                raise UserError(
                    "compile=True finds no list of layers in backbone "
                    f"{self.causal_lm.config.model_type!r}; leave it out."
                )
            _compile(self._layers[self._shared :])  # the others' forward is replaced at every step
        self._check_scores(attention)
        self._flex_is_checked = attention == FLEX

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The policy's ``transformers`` model, without the wrapper of ``peft``."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def train(self, mode: bool = True) -> LanguageModel:
        """As in ``nn.Module``, but what policy and reference share stays in evaluation mode, so
        that no dropout is in it."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        if self._shared:
            self.causal_lm.eval()
            for layer in self._layers[self._shared :]:
                layer.train(mode)
        return self

    def forward(self, forest: Forest) -> Tensor:
        """Log-probabilities of the responses under the policy, float32 ``[R]`` (float64 for a
        float64 model)."""
        return self._answers(forest)[0]

    @torch.no_grad()
    def reference_logps(self, forest: Forest) -> Tensor:
        """As :meth:`forward`, under the reference, in evaluation mode and without a gradient.

        Raises:
            RuntimeError: no reference was frozen yet.
        """
        return self._reference_answers(forest)[0]

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The reference's ``transformers`` model, as in evaluation mode; with adapters, the policy
        is away meanwhile.

        Raises:
            RuntimeError: no reference was frozen yet.
        """
        if not self.has_reference:
            raise RuntimeError("There is no reference yet; call freeze_reference() first.")
        if self.frozen is not None:
            yield self.frozen
            return
        training = [part for part in self._moody if part.training]
        policy = [(part, name, part._parameters[name]) for part, name, _ in self._beside]
        _switch(self._adapted, REFERENCE)
        _put(self._beside)
        for part in training:
            vars(part)["training"] = False
        try:
            yield self.causal_lm
        finally:
            _put(policy)
            _switch(self._adapted, "default")
            for part in training:
                vars(part)["training"] = True

    def policy_and_reference(self, forest: Forest) -> tuple[Tensor, Tensor]:
        """:meth:`forward` and :meth:`reference_logps`; what lies under the lowest adapter runs
        once for both."""
        return self.compared(forest, torch.empty(0, dtype=torch.long))[:2]

    def compared(self, forest: Forest, watched: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`policy_and_reference`, and how far they are apart.

        Args:
            watched: int64 ``[W]``, some of the responses.

        Returns:
            the log-probabilities of both, ``[R]`` each, and for each watched response the KL
            divergence of the policy from the reference, over all tokens that might come first in
            place of its own, in nats ``[W]``, without a gradient.
        """
        forest = forest.to(self.device)  # once for both, as are the masks
        with self.arithmetic():  # in which the masks are, too
            attention = self._attention(forest)
        outputs: list = []
        hook: AbstractContextManager = nullcontext()
        if self._shared:
            hook = self._layers[self._shared - 1].register_forward_hook(
                lambda layer, args, output: outputs.append(output)
            )
        with hook:
            policy, mine = self._answers(forest, attention)
        with self._below_gives(outputs[0]) if self._shared else nullcontext():
            reference, theirs = self._reference_answers(forest, attention)
        at = forest.openings()[watched.to(self.device, non_blocking=True)]
        return policy, reference, self._divergence(mine.detach()[at], theirs[at])

    @torch.no_grad()
    def _divergence(self, mine: Tensor, theirs: Tensor) -> Tensor:
        """The KL divergence over the next token after the policy's states ``mine [W, H]`` from that
        after the reference's, ``[W]``."""
        if not len(mine):
            return torch.zeros(0, device=self.device)
        apart = []
        with self.arithmetic():
            each = rows_at_once(self.causal_lm, mine)
            for some, others in zip(mine.split(each), theirs.split(each), strict=True):
                policy = next_logps(self.causal_lm, some)
                with self.reference() as model:
                    reference = next_logps(model, others)
                terms = F.kl_div(reference, policy, reduction="none", log_target=True)
                apart.append(terms.sum(-1))
        return torch.cat(apart)

    @contextmanager
    def _below_gives(self, output: Tensor | tuple) -> Iterator[None]:
        """Let each shared layer return ``output`` of the last of them, whatever it is given."""
        shared = self._layers[: self._shared]
        own = [vars(layer).get("forward") for layer in shared]  # such as a hook of accelerate
        for layer in shared:
            layer.forward = lambda *args, **kwargs: output
        try:
            yield
        finally:
            for layer, forward in zip(shared, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def freeze_reference(self) -> None:
        """Make the policy as it now is the reference."""
        if self.frozen is not None:
            with torch.no_grad():
                for mine, theirs in zip(_state(self.frozen), _state(self.model), strict=True):
                    mine.copy_(theirs)
            return
        if not isinstance(self.model, PeftModel):
            self.frozen = copy.deepcopy(self.model).eval().requires_grad_(False)
            if self.compiled:  # a copy is not
                _compile(tuple(decoder_layers(self.frozen)))
            return
        if REFERENCE not in self.model.peft_config:
            trained = self.trainable().values()
            self.model.add_adapter(REFERENCE, self.model.peft_config["default"])
            for weight in trained:  # peft freezes what is trained beside adapters
                weight.requires_grad_()
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                if f".{REFERENCE}." in name:
                    weight.copy_(weights[name.replace(f".{REFERENCE}.", ".default.")])
        self.model.set_adapter("default")
        self._beside = _trained_beside(self.causal_lm)
        self._adapted = tuple(
            part for part in self.model.modules() if isinstance(part, BaseTunerLayer)
        )
        self._moody = tuple(self.model.modules()) if _depends_on_mode(self.causal_lm) else ()

    @property
    def may_leave_weights_out(self) -> bool:
        """May a pass reach not all of the weights, such as those for pictures? Of what is not by
        ``transformers``, that is not known."""
        model = self.causal_lm
        return (
            hasattr(model.base_model, "language_model")
            or not type(model).__module__.startswith("transformers.models.")
            or bool(getattr(model.config.get_text_config(), "layerdrop", 0))
        )

    def take_parts(self, device: torch.device) -> None:
        """Be ready for :func:`~recbole_sdpo.lm.parts.part`, and compute on ``device``.

        A bfloat16 copy of each layer, kept for a whole pass, would be the whole model. And whether
        to try FlexAttention is each process's own question, whose answer takes passes of all.
        """
        self._caches, self._device = False, device
        self.attention = dense_implementation(self.causal_lm, self.attention)

    @property
    def has_reference(self) -> bool:
        """Has a reference been frozen?"""
        return self.frozen is not None or (
            isinstance(self.model, PeftModel) and REFERENCE in self.model.peft_config
        )

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The decoder's layers from the lowest up, and a frozen reference's."""
        return (*self._layers, *(decoder_layers(self.frozen) if self.frozen is not None else ()))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The policy's trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def title_tables(self) -> list[nn.Parameter]:
        """What has a row for each title, where titles are tokens."""
        return tables(self.causal_lm) if is_whole(self.tokenizer) else []

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that the policy is made of, trained or not, buffers too, by name."""
        everything = chain(self.model.named_parameters(), self.model.named_buffers())
        return ((name, weight) for name, weight in everything if f".{REFERENCE}." not in name)

    def add_to(self, digest: hashlib._Hash) -> None:
        """Add to ``digest`` the name, the dtype and the bytes of each of :meth:`policy_weights`."""
        for name, weight in self.policy_weights():
            digest.update(f"{name} {weight.dtype}".encode())
            content = all_of(weight).cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(content.numpy().data)

    @property
    def padding(self) -> tuple[int, int]:
        """``multiple`` and ``together``, to which a forest had better be padded (:func:`plant`);
        padding changes numbers by rounding alone."""
        if self.device.type == "cuda":
            # Attention copies a mask whose rows are not aligned, in every layer; FlexAttention
            # works by blocks of 128.
            return (128 if self.attention == FLEX else 16), 1
        # In bfloat16, oneDNN makes and keeps a program for each number of tokens: up to three
        # quarters of the time, and GiB.
        return 1, 64 if self.mixed or self.causal_lm.dtype == torch.bfloat16 else 1

    @property
    def breadth(self) -> float:
        """Tokens of a row at which attention costs as much as a layer's products
        (:func:`cut_wide`).

        A layer of width h has about 12 h^2 weights, and 2 h numbers for each pair of tokens.
        Infinite on a GPU, where FlexAttention leaves out what is masked of wide rows.
        """
        width = self.causal_lm.config.get_text_config().hidden_size
        return math.inf if self.device.type == "cuda" else 6.0 * width

    def arithmetic(self) -> torch.autocast:
        """The precision of matrix products and attention, to be entered around a call of the
        model."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.mixed, cache_enabled=self._caches
        )

    @property
    def device(self) -> torch.device:
        """That computes."""
        return self._device or self.model.device

    @torch.no_grad()
    def _check_scores(self, choice: str) -> None:
        """Score a forest with that attention, and the same responses one sequence at a time by the
        model's own logits.

        Raises:
            UserError: the model cannot, or the scores differ by more than rounding.
        """
        model, device = self.causal_lm, self.device
        trunk, starts, responses = _probe(model)
        some = np.arange(7, len(starts), 8)
        training = self.model.training
        self.eval()
        forest = plant(
            Ragged.from_rows([trunk]), np.zeros_like(starts), starts, Ragged.from_matrix(responses)
        ).to(device)
        try:
            with self.arithmetic():
                # In bfloat16, two implementations differ in rounding by more than a tolerance.
                attention = attention_inputs(model, forest, choice)
                flex = attention[0] == FLEX
                set_attention(model, dense_implementation(model, choice) if flex else attention[0])
                # what was compiled
                with torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
                    pairs = zip(starts[some], responses[some], strict=True)
                    truth = [_logp(model, trunk[:start], response) for start, response in pairs]
                scores = self._pass(model, forest, attention)[0].double()[some]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"backbone {model.config.model_type!r} cannot score a tree ({error}); {VALID}"
            ) from error
        finally:
            self.train(training)
        # Far above rounding, and far below what a wrong mask, position or logit does. Of the spread
        # of scores, SmolLM2 in bfloat16 is off by 0.02 %, and by 21 % with wrong positions.
        exact = model.dtype in (torch.float32, torch.float64) and not self.mixed
        limit = 1e-3 if exact and device.type == "cpu" else 0.03  # a GPU may have TF32
        expected = torch.stack(truth)
        apart = (scores - expected).abs()
        if not apart.mean() < limit * expected.std() + 1e-4:
            raise UserError(
                f"backbone {model.config.model_type!r} scores a tree otherwise than one sequence "
                f"at a time, by up to {float(apart.max()):.2g}: its positions, masks or logits are "
                f"of a kind not known here; {VALID}"
            )

    def _attention(self, forest: Forest) -> Attention:
        """How to attend to ``forest``, which is on this device."""
        attention = attention_inputs(self.causal_lm, forest, self.attention)
        # auto takes it for long rows alone, late in a run
        if attention[0] == FLEX and not self._flex_is_checked:
            self._flex_is_checked = True
            try:
                self._check_scores(FLEX)
            except UserError as error:
                getLogger().warning(f"attention='auto' does without FlexAttention: {error}")
                self.attention = dense_implementation(self.causal_lm, self.attention)
                return self._attention(forest)
        return attention

    def _answers(self, forest: Forest, attention: Attention | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`_pass` under the policy."""
        with self.arithmetic():
            return self._pass(self.causal_lm, forest, attention)

    @torch.no_grad()
    def _reference_answers(
        self, forest: Forest, attention: Attention | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`_pass` under the reference."""
        with self.reference() as model, self.arithmetic():
            return self._pass(model, forest, attention)

    def _pass(
        self, model: PreTrainedModel, forest: Forest, attention: Attention | None
    ) -> tuple[Tensor, Tensor]:
        """One pass over the forest: the sum of each response's token log-probabilities given its
        prompt, ``[R]``, and the last hidden states of the tokens that predict, ``[S, H]``."""
        forest = forest.to(self.device)
        implementation, inputs = attention or self._attention(forest)
        set_attention(model, implementation)
        hidden = model.base_model(
            input_ids=forest.tokens, use_cache=False, **inputs
        ).last_hidden_state
        # The states are distinct: the gradient of this adds in no order.
        states = hidden.flatten(0, 1).index_select(0, forest.states)
        logps = token_logps(model, states, forest.edge_state, forest.edge_token, forest.first_edge)
        return forest.sum_by_response(logps), states


def _probe(model: PreTrainedModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A trunk of random tokens, how many of them each of 64 responses has for a prompt, int64
    ``[64]``, and these responses, int64 ``[64, 4]``.

    Branches lie far in the row from where they start, so that a model that takes columns for
    positions is seen. Each second response begins as the one before it.
    """
    draw = generator(0, "check of scores")
    tokens = min(1000, model.get_input_embeddings().weight.shape[0])
    length = max(4, min(40, (positions(model)[0] or 44) - 4))
    trunk, responses = draw.integers(tokens, size=length), draw.integers(tokens, size=(64, 4))
    responses[1::2, :2] = responses[::2, :2]
    return trunk, np.repeat(length * np.arange(1, 5) // 4, 16), responses


def _logp(model: PreTrainedModel, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """log pi of ``response`` after ``prompt`` by the model's own logits, float64 ``[]``."""
    text = torch.from_numpy(np.concatenate([prompt, response])).to(model.device)
    logps = model(input_ids=text[None], use_cache=False).logits[0].double().log_softmax(-1)
    return logps[torch.arange(len(prompt) - 1, len(text) - 1), text[len(prompt) :]].sum()


def _state(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _compile(layers: tuple[nn.Module, ...]) -> None:
    """Compile each layer, for lengths of any size.

    All share one code, of which there is a graph for each of: with and without gradients, training
    and evaluation, policy and reference, the first layer and the others, one row and several, kinds
    of attention.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS)
    for layer in layers:
        layer.compile(dynamic=True, backend=BACKEND)


def _switch(layers: tuple[BaseTunerLayer, ...], adapter: str) -> None:
    """Let the adapter of that name take part, and no other.

    peft's ``set_adapter`` also walks all modules, and turns gradients off and on: 30 ms at 30
    layers, twice a step. The reference's weights have none anyway.
    """
    for layer in layers:
        layer._active_adapter = [adapter]


def _trained_beside(model: PreTrainedModel) -> Places:
    """What of a model under an adapter is trained, but for the adapter, each with a frozen copy;
    what is tied shares one."""
    adapters = {
        id(p)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for p in layer.parameters()
    }
    places = [
        (part, name, p)
        for part in model.modules()
        for name, p in part._parameters.items()
        if p is not None and p.requires_grad and id(p) not in adapters
    ]
    copies = {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for *_, p in places}
    return [(part, name, copies[id(p)]) for part, name, p in places]


def _put(weights: Places) -> None:
    """Put each weight into its place."""
    for part, name, weight in weights:
        part._parameters[name] = weight


def _depends_on_mode(model: PreTrainedModel) -> bool:
    """Does the model compute anything else in training mode? Of what is not by ``transformers``,
    that is not known."""
    if not type(model).__module__.startswith("transformers.models."):
        return True
    for part in model.modules():
        if getattr(part, "gradient_checkpointing", False) or (
            isinstance(part, nn.modules.dropout._DropoutNd) and part.p
        ):
            return True
    shape = model.config.get_text_config().to_dict()  # of which attention and routers read theirs
    return any(
        isinstance(value, float | int) and value and re.search("drop|jitter", key)
        for key, value in shape.items()
    )


def _layers_below_training(model: PreTrainedModel, layers: tuple[nn.Module, ...]) -> int:
    """How many of the lowest layers have nothing trained in or under them."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    by_layer = [{id(p) for p in layer.parameters()} & trained for layer in layers]
    if not trained or trained - set().union(*by_layer):
        return 0  # embeddings are trained, or norms or an output layer, which may be one with them
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        return 0  # upper layers take keys and values from lower ones, not their output alone
    return next(number for number, own in enumerate(by_layer) if own)


def _check_kinds(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    kinds = {
        kind
        for name in ("layer_types", "attention_layers")  # the second of GPT-Neo, by columns
        for kind in getattr(config, name, None) or ()
    } - {"full_attention", "sliding_attention", "global"}
    if kinds:
        raise UserError(
            f"backbone {model.config.model_type!r} has layers of kind {', '.join(sorted(kinds))}, "
            f"which cannot be given a tree; {VALID}"
        )
