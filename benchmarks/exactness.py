"""Is a forest as near to the truth on a device as one sequence at a time is?

The truth is one sequence at a time in float64 on the CPU, by the model's own logits. A forest
passes if its error is at most :data:`TIMES` that of one sequence at a time in the same precision on
the same device, or below :data:`ROUNDING`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from recbole.data import data_preparation
from torch import Tensor, nn

from recbole_sdpo.compat import no_arguments
from recbole_sdpo.config import RunConfig
from recbole_sdpo.data.dataset import create_dataset
from recbole_sdpo.lm.backbone import cast_nothing
from recbole_sdpo.lm.forest import Forest, plant
from recbole_sdpo.lm.generation import write
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.lm.ranking import TitleTree, score_all, score_top
from recbole_sdpo.model import SDPOLLM
from recbole_sdpo.objectives import Constants, sdpo
from recbole_sdpo.ragged import Ragged

VOCABULARY, WINDOW, TIMES = 256, 64, 3.0

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of a response's log-probability, in nats, and of a gradient, as a share of its norm."""

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen3": {},
    "Gemma3Text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 32,
    },
    "Gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 32},
    "GPTNeoX": {"attention_dropout": 0.0},
    "GPT2": {"n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
NO_SDPA, NO_FLEX = {"Gemma2"}, {"GPT2"}
"""Attention with a soft cap is eager or FlexAttention; GPT-2 has no FlexAttention."""


@dataclass(frozen=True)
class Work:
    """Trees with branches, longer than FlexAttention's blocks of 128, and a weight for each
    response's log-probability."""

    trunks: list[np.ndarray]
    tree: np.ndarray
    start: np.ndarray
    responses: list[np.ndarray]
    weights: Tensor

    @classmethod
    def draw(cls, seed: int = 7, trees: int = 3, responses: int = 48) -> Work:
        rng = np.random.default_rng(seed)
        trunks = [rng.integers(3, VOCABULARY, size) for size in rng.integers(60, 200, trees)]
        tree = rng.integers(0, trees, responses)
        start = np.array([rng.integers(1, len(trunks[t]) + 1) for t in tree])
        branches = [rng.integers(3, 9, rng.integers(1, 12)) for _ in tree]
        return cls(trunks, tree, start, branches, torch.from_numpy(rng.normal(size=responses)))

    def forest(self) -> Forest:
        return plant(
            Ragged.from_rows(self.trunks), self.tree, self.start, Ragged.from_rows(self.responses)
        )

    def one_by_one(self, model: nn.Module, device: torch.device) -> Tensor:
        """log pi of each response, ``[R]``, by the model's own logits of its whole sequence."""
        sums = []
        for tree, start, response in zip(self.tree, self.start, self.responses, strict=True):
            ids = torch.from_numpy(np.concatenate([self.trunks[tree][:start], response])).to(device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            sums.append(logps[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum())
        return torch.stack(sums)


def build(name: str, lora: bool) -> nn.Module:
    """A random model in float64, whose weights bfloat16 holds exactly, so that all precisions
    have the same."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE | ARCHITECTURES[name])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    if lora:
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
        )
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.data.normal_(std=0.1)
    return model.bfloat16().double().eval()


def compare(
    name: str,
    dtype: torch.dtype,
    attention: str,
    lora: bool,
    device: torch.device,
    trees: int = 3,
    mixed: bool = False,
) -> dict[str, object]:
    """Errors of log-probabilities (the largest, in nats) and of gradients (share of their norm), of
    the forest and one by one.

    Args:
        dtype: of the weights.
        mixed: computed in bfloat16, the trained weights in float32.
    """
    torch.set_float32_matmul_precision("highest")  # our loader has lowered it, of another row
    work, truth = Work.draw(trees=trees), build(name, lora)
    expected = _with_gradient(
        truth, lambda: work.one_by_one(truth, torch.device("cpu")), work.weights
    )
    model = copy.deepcopy(truth).to(device, dtype)
    if mixed and lora:
        cast_nothing(model)
        for weight in model.parameters():
            weight.data = weight.data.float() if weight.requires_grad else weight.data
    arithmetic = torch.autocast(device.type, torch.bfloat16, enabled=mixed)
    with arithmetic:
        slow = _with_gradient(model, lambda: work.one_by_one(model, device), work.weights)
    lm = LanguageModel(model, None, attention, mixed=mixed)
    forest = work.forest()
    fast = _with_gradient(model, lambda: lm(forest), work.weights)
    again = _with_gradient(model, lambda: lm(forest), work.weights)
    taken = lm.causal_lm.config._attn_implementation
    if taken != attention:
        raise AssertionError(f"{attention} was asked for, and {taken} taken")
    row = {"longest row": forest.tokens.shape[1]}
    for what, of_slow, of_fast in zip(
        ("logps", "gradient"), _errors(slow, expected), _errors(fast, expected), strict=True
    ):
        row |= {f"{what}, forest": of_fast, f"{what}, one by one": of_slow}
        if not of_fast <= max(TIMES * of_slow, ROUNDING[torch.bfloat16 if mixed else dtype]):
            raise AssertionError(
                f"{what}: the forest is off by {of_fast:.2e}, "
                f"one sequence at a time by {of_slow:.2e}"
            )
    return row | {
        "repeats bit for bit": all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))
    }


@torch.no_grad()
def rank(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """A catalogue under prompts with a cache, and the answers written greedily, against one
    sequence at a time on the CPU."""
    torch.set_float32_matmul_precision("highest")
    rng, truth = np.random.default_rng(3), build(name, lora=False)
    prompts = Ragged.from_rows([rng.integers(3, VOCABULARY, size) for size in (90, 33, 71)])
    titles = Ragged.from_rows(
        [np.append(rng.integers(3, 12, rng.integers(1, 6)), 2) for _ in range(60)]
    )
    rows = [(p, t) for p in range(len(prompts)) for t in range(len(titles))]
    trunks, tree = [prompts[p] for p, _ in rows], np.arange(len(rows))
    work = Work(
        trunks,
        tree,
        prompts.lengths[[p for p, _ in rows]],
        [titles[t] for _, t in rows],
        torch.ones(len(rows)),
    )
    expected = work.one_by_one(truth, torch.device("cpu")).view(len(prompts), -1)
    model = copy.deepcopy(truth).to(device, dtype)
    slow = work.one_by_one(model, device).double().cpu().view(expected.shape)
    lm = LanguageModel(model, None)
    every, best = (
        score_all(lm, prompts, TitleTree(titles)),
        score_top(lm, prompts, TitleTree(titles), 5),
    )
    error, bound = (float((side.double().cpu() - expected).abs().max()) for side in (every, slow))
    if not error <= max(TIMES * bound, ROUNDING[dtype]):
        raise AssertionError(
            f"the catalogue's scores are off by {error:.2e}, one sequence at a time by {bound:.2e}"
        )
    apart = float((best.topk(5).values - every.topk(5).values).abs().max())
    if not apart <= max(2 * error, ROUNDING[dtype]):
        raise AssertionError(
            f"the five best are {apart:.2e} apart from those of the whole catalogue"
        )
    answers, true_answers = (
        write(side, prompts, int(titles.lengths.max()), [2], [titles] * len(prompts))
        for side in (lm, LanguageModel(truth, None))
    )
    alike = int((answers == true_answers).all(1).sum())
    return {
        "scores": error,
        "one by one": bound,
        "five best": apart,
        "answers as on the CPU": f"{alike} of {len(prompts)}",
    }


def sdpo_loss(device: torch.device, precision: str, negatives: int = 3) -> dict[str, object]:
    """S-DPO's loss and gradient on a batch of ml-100k, in float32, on ``device`` against the
    CPU's.

    Args:
        precision: of matrix products; "high", as in a run, has 10 bits on a GPU (TF32).
    """
    sides = []
    for place in (torch.device("cpu"), device):
        given = {"scratch_dropout": 0.0, "train_neg_sample_args": {"sample_num": negatives}}
        with no_arguments():
            config = RunConfig(
                "SDPO-LLM",
                "ml-100k",
                config_dict=given | {"backbone": "scratch", "show_progress": False},
            )
            train_data, *_ = data_preparation(config, create_dataset(config))
            recommender = SDPOLLM(config, train_data._dataset).to(place).eval()
        torch.set_float32_matmul_precision(precision)
        lm = recommender.lm
        lm.freeze_reference()
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():  # as in the middle of training, away from the reference
            for weight in lm.trainable().values():
                weight += 0.01 * torch.randn(weight.shape, generator=rng).to(place)
        examples = recommender.examples(train_data._dataset, train_data._sampler, negatives)
        prompts, items = examples.batch(np.arange(8), 0, "exactness")
        forest = recommender.encoder.forest(prompts, items)
        loss = sdpo(recommender(forest, 1 + negatives, True)[0], Constants()).mean()
        loss.backward()
        sides.append(
            (
                loss.detach().double().cpu(),
                torch.cat([p.grad.flatten().double().cpu() for p in lm.trainable().values()]),
            )
        )
    (expected, true_gradient), (loss, gradient) = sides
    row = {"loss, CPU": float(expected), "loss, device": float(loss)}
    row["gradient"] = float((gradient - true_gradient).norm() / true_gradient.norm())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    if not row["gradient"] < 1e-3:
        raise AssertionError(f"the gradients differ by {row['gradient']:.1e} of their norm")
    return row


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, object]]]]:
    """All comparisons that ``device`` can make, by name, in the order of their worth."""
    gpu = device.type == "cuda"
    dtypes = {"bf16": torch.bfloat16, "float32": torch.float32}
    for precision in ("high", "highest"):
        label = f"S-DPO, scratch on ml-100k, float32, products {precision}"
        yield label, lambda p=precision: sdpo_loss(device, p)
    for attention in ("sdpa", "flex_attention", "eager"):
        for name in ARCHITECTURES:
            if (attention == "sdpa" and name in NO_SDPA) or (
                attention == "flex_attention" and (name in NO_FLEX or not gpu)
            ):
                continue
            for short, dtype in dtypes.items():
                for lora in (False, True) if name == "Llama" else (False,):
                    label = f"{name}{', LoRA' if lora else ''}, {attention}, {short}"
                    yield label, lambda a=(name, dtype, attention, lora, device): compare(*a)
        for lora, dtype in (
            ((True, torch.bfloat16), (False, torch.float32))
            if attention != "flex_attention" or gpu
            else ()
        ):
            label = f"Llama{', LoRA' if lora else ''}, {attention}, mixed"
            yield label, lambda a=("Llama", dtype, attention, lora, device, 3, True): compare(*a)
    for name in ("Llama", "Gemma3Text"):
        for short, dtype in dtypes.items():
            yield f"{name}, ranking and answers, {short}", lambda a=(name, dtype, device): rank(*a)


def _with_gradient(
    model: nn.Module, logps: Callable[[], Tensor], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the gradient of their weighted sum as one vector; both float64 on
    the CPU."""
    model.zero_grad()
    values = logps()
    (values * weights.to(values)).sum().backward()
    gradient = torch.cat(
        [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    )
    return values.detach().double().cpu(), gradient


def _errors(side: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    (values, gradient), (true_values, true_gradient) = side, truth
    return float((values - true_values).abs().max()), float(
        (gradient - true_gradient).norm() / true_gradient.norm()
    )
