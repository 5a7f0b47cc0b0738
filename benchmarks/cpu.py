"""How fast is a training step of a pretrained backbone on this CPU, and how much of it are its
matrix products?

    python benchmarks/cpu.py
    python benchmarks/cpu.py --trained "full, whole titles" --tokens 1024 4096 --negatives 0 15

A row is a step with its optimizer on a batch of ml-100k: SFT, or S-DPO with K negatives. The
products alone are replayed on operands of the same shapes, in turns with the step.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys

import torch
from run import device_name, show
from throughput import TRAINED, Workload

from recbole_sdpo.report.table import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument(
        "--trained",
        nargs="+",
        choices=TRAINED,
        default=["LoRA", "LoRA, float32", "LoRA, whole titles", "full, whole titles"],
        help="ways to train",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024], help="of a batch (default: 1024)"
    )
    parser.add_argument(
        "--negatives", type=int, nargs="+", default=[0, 3], help="K, 0 for SFT (default: 0 3)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads it, too
    logging.disable(logging.INFO)
    rows = []
    for trained in args.trained:
        workload = Workload(trained, args)
        for tokens in args.tokens:
            for negatives in args.negatives:
                row = {"trained": trained, "K": negatives}
                rows.append(row | workload.over_products(negatives, tokens))
                print(rows[-1], file=sys.stderr)
    print(markdown_table(list(rows[0]), [[show(value) for value in row.values()] for row in rows]))
    machine = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bf16 is fast": torch.cpu._is_amx_tile_supported(),
        "backbone": args.backbone,
    }
    print(f"\n{json.dumps(machine)}")


if __name__ == "__main__":
    main()
