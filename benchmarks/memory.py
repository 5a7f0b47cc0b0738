"""What fits where: bytes of weights, optimizer and activations, for models of any size on GPUs of
any number.

The rule is first checked against what small models of the same kind hold on this machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import measure
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_sdpo.lm.forest import plant
from recbole_sdpo.lm.language_model import LanguageModel
from recbole_sdpo.objectives import Constants, Logps, sdpo
from recbole_sdpo.ragged import Ragged
from recbole_sdpo.report.table import markdown_table

GIB = 2**30

LARGE = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Shapes of Llama 2."""

SMALL = [
    {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "vocab_size": 2048,
    }
    for hidden, layers in ((128, 6), (256, 6), (256, 12), (384, 12))
]

RANK = 16

WAYS = ("LoRA", "QLoRA", "full")

NF4 = 0.5 + 1 / 64 * (1 + 4 / 256)
"""Bytes of a weight in four bits, with its share of a scale in eight bits, and of the scale's."""


@dataclass(frozen=True)
class Shape:
    """Numbers of a model's parameters.

    Attributes:
        layers: how many decoder layers.
        hidden: their width.
        layer: of one decoder layer.
        rest: of embeddings, head and the last norm.
        adapter: of a LoRA adapter on all linear layers.
    """

    layers: int
    hidden: int
    layer: int
    rest: int
    adapter: int

    @classmethod
    def of(cls, shape: dict[str, int]) -> Shape:
        config = LlamaConfig(**shape)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        layer = model.model.layers[0]
        linear = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
        adapter = sum(RANK * (part.in_features + part.out_features) for part in linear)
        each = sum(p.numel() for p in layer.parameters())
        layers = config.num_hidden_layers
        return cls(
            layers,
            config.hidden_size,
            each,
            sum(p.numel() for p in model.parameters()) - layers * each,
            layers * adapter,
        )

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.rest


def state_bytes(shape: Shape, way: str) -> float:
    """Of weights, gradients, AdamW's moments and the reference.

    What is trained is in float32 and has a gradient, two moments and a frozen copy: 20 bytes.
    """
    trained = shape.parameters if way == "full" else shape.adapter
    under = {
        "LoRA": 2 * shape.parameters,
        "QLoRA": NF4 * shape.layers * shape.layer + 2 * shape.rest,
        "full": 0,
    }[way]
    return 20 * trained + under


def activation_bytes(shape: Shape, way: str, tokens: int) -> float:
    """With ``gradient_checkpointing``: each layer's input, which is float32 where weights are, the
    layer that is computed again, and the chunk of logits."""
    width = 4 if way == "full" else 2
    inputs = width * shape.layers * shape.hidden * tokens
    return inputs + AGAIN * shape.hidden * tokens + CHUNKS


AGAIN = 100
"""Bytes that a layer keeps for its backward pass, for a token and a unit of width: what was
measured on small models, rounded up."""

LARGEST = 1024
"""GPUs that are looked at."""

CHUNKS = 4 * 4 * 2**26
"""Of logits on a GPU: a chunk in float32, its softmax, gradient and a copy."""


def fits(
    shape: Shape, way: str, gpus: int, parts: bool, tokens: int, offload: bool = False
) -> float:
    """GiB on each of ``gpus``; with ``parts``, each has a part of the model, which ``offload``
    keeps in the host's memory.

    Meanwhile the embeddings and the head are whole, and two layers at a time; where they are
    trained, so are the reference's, and their gradients.
    """
    state, width = state_bytes(shape, way), 4 if way == "full" else 2
    if parts:
        together = width * (shape.rest + 2 * shape.layer)
        if way == "full":
            together += 4 * shape.rest + 4 * (shape.rest + shape.layer)
        state = together + (0 if offload else state / gpus)
    return (state + activation_bytes(shape, way, tokens)) / GIB


def measured(shape: dict[str, int], way: str, tokens: int) -> tuple[float, float, float]:
    """MiB of weights and optimizer, MiB of activations at the peak, and bytes of a layer's
    activations for a token and a unit of width, of one S-DPO step on this machine."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    if way == "LoRA":
        model = get_peft_model(
            model.bfloat16(),
            LoraConfig(task_type="CAUSAL_LM", r=RANK, target_modules="all-linear"),
        )
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
    lm = LanguageModel(model, tokenizer=None, mixed=True)
    lm.freeze_reference()
    lm.train()
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 2048, 128) for _ in range(tokens // 128)]
    tree = np.arange(len(rows)).repeat(4)
    responses = Ragged.from_rows([[7, 8]] * len(tree))
    forest = plant(Ragged.from_rows(rows), tree, np.full(len(tree), 128), responses)
    trained = list(lm.trainable().values())
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step() -> None:
        policy, reference = (each.view(-1, 4) for each in lm.policy_and_reference(forest))
        logps = Logps.of(policy, reference, torch.ones_like(policy))
        sdpo(logps, Constants()).mean().backward()

    step()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [*lm.parameters(), *(p.grad for p in trained), *moments]
    state = sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
    peak = measure.peak_mib(step, torch.device("cpu"))
    layers, hidden = shape["num_hidden_layers"], shape["hidden_size"]
    return state / 2**20, peak, peak * 2**20 / (layers * hidden * forest.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=80, help="of one GPU")
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch on each GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    checks, rows = [], []
    for shape in SMALL:
        for way in ("LoRA", "full"):
            state, peak, each = measured(shape, way, tokens=1024)
            rule = state_bytes(Shape.of(shape), way) / 2**20
            size = f"{shape['hidden_size']} x {shape['num_hidden_layers']}"
            cells = (state, rule, peak, each)
            checks.append([size, way, *(f"{value:,.1f}" for value in cells)])
    print("Small models here, one S-DPO step of 1,024 tokens, without gradient_checkpointing:\n")
    head = ["width x layers", "trained", "MiB of state", "by the rule", "MiB of activations"]
    print(markdown_table([*head, "bytes a token, layer and unit"], checks))
    for name, given in LARGE.items():
        shape = Shape.of(given)
        for way in WAYS:
            whole = fits(shape, way, 1, False, args.tokens)
            parts = {n: fits(shape, way, n, True, args.tokens) for n in range(2, LARGEST + 1)}
            fewest = 1 if whole < args.gib else min(n for n in parts if parts[n] < args.gib)
            offloaded = fits(shape, way, 2, True, args.tokens, offload=True)
            cells = [whole, *(parts[n] for n in args.gpus), offloaded]
            if way == "QLoRA":  # parallel=fsdp does not go with it
                cells[1:] = [None for _ in cells[1:]]
            texts = ["" if value is None else f"{value:,.0f}" for value in cells]
            rows.append([name, way, *texts, fewest])
    print(f"\nGiB on each GPU, {args.tokens:,} tokens, gradient_checkpointing=True:\n")
    head = [f"fsdp, {n} GPUs" for n in args.gpus]
    print(markdown_table(["model", "trained", "ddp", *head, "offload", "fewest GPUs"], rows))
    if args.json:
        args.json.write_text(json.dumps({"measured": checks, "computed": rows}, indent=2))


if __name__ == "__main__":
    main()
