"""How much a sparse layer costs over a dense one of the same FLOPs per token, and over transformers' Mixtral block.

    python benchmarks/moe_layer.py --json benchmarks/results/moe_layer.json

Times a whole layer (router, dispatch, experts, combine, losses), forward and backward, top-1, against a dense
feed-forward layer of the same width and hidden size in the same process. Everything compared is run in turn, repeat by
repeat, so that a slow phase of the machine meets all alike; ratios are taken within a repeat, and their median and
quartiles reported. On a machine with other work to do, give `--threads 1`: threads that wait for each other are slowed
down out of all proportion. "balanced" draws each token's expert uniformly, "skewed" by Zipf's law (exponent 1).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from provenance import provenance
from vlmoe.moe import FeedForward, MoELayer

SHAPES = [(8, 2048, 384, 1536), (32, 4096, 256, 1024), (32, 4096, 768, 3072), (16, 1024, 192, 768)]
# auto is grouped; padded pads to the largest load, so that timing it on skewed loads takes minutes to say nothing new
BACKENDS = {"balanced": ("auto", "padded", "loop"), "skewed": ("auto", "loop")}


def steer(router_weight: Tensor, tokens: int, load: str) -> Tensor:
    """Tokens that this router sends to experts drawn uniformly or by Zipf's law; sets orthogonal router rows."""
    experts, width = router_weight.shape
    with torch.no_grad():
        router_weight.copy_(nn.init.orthogonal_(torch.empty(experts, width)))
    chance = 1 / torch.arange(1, experts + 1) if load == "skewed" else torch.ones(experts)
    wanted = torch.multinomial(chance, tokens, replacement=True)
    x = 0.1 * torch.randn(tokens, width, device=router_weight.device)
    return (x + 4 * router_weight.detach()[wanted.to(x.device)]).requires_grad_()


def training_step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward and backward from a fixed gradient, gradients dropped before as an optimiser would."""
    grad = torch.randn_like(x)
    autocast = torch.autocast("cuda", dtype=torch.bfloat16, enabled=x.is_cuda)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with autocast:
            out = layer(x[None])
        if isinstance(out, tuple) and hasattr(out[1], "loss"):
            torch.autograd.backward([out[0], out[1].loss], [grad[None].to(out[0].dtype), None])
        else:
            out.backward(grad[None].to(out.dtype))

    return step


def mixtral_blocks(experts: int, width: int, hidden: int, device: str) -> dict[str, nn.Module]:
    """transformers' block with each experts implementation worth timing; batched_mm gathers weights per token."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    blocks: dict[str, nn.Module] = {}
    for implementation in ("eager", "grouped_mm"):
        config = MixtralConfig(
            hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=1
        )
        config._experts_implementation = implementation
        block = MixtralSparseMoeBlock(config).to(device)
        for parameter in block.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)
        blocks[implementation] = block
    return blocks


def measure(steps: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each step, `repeats` times in turn after two rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-2, repeats):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Median and quartiles of the ratios within a repeat; `of_best` compares the fastest runs of both."""
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    best = min(times[name]) / min(times[base])
    found = {"median": median, "quartile1": low, "quartile3": high, "of_best": best, "ms": min(times[name])}
    return {key: round(value, 3) for key, value in found.items()}


def against_dense(shape: tuple[int, int, int, int], load: str, repeats: int, device: str) -> dict[str, Any]:
    experts, tokens, width, hidden = shape
    torch.manual_seed(0)
    dense = FeedForward(width, hidden).to(device)
    layers = {name: MoELayer(width, hidden, experts, backend=name).to(device) for name in BACKENDS[load]}
    x = steer(layers["auto"].router.weight, tokens, load)
    for layer in layers.values():
        layer.load_state_dict(layers["auto"].state_dict())
    steps = {"dense": training_step(dense, x)} | {n: training_step(m, x) for n, m in layers.items()}
    load_E = layers["auto"](x)[1].load_E
    times = measure(steps, repeats, device)
    return {
        "shape": dict(zip(("experts", "tokens", "width", "hidden"), shape, strict=True)),
        "load": load,
        "largest_over_mean_load": round(load_E.max().item() * experts / tokens, 2),
        "dense_ms": round(min(times["dense"]), 3),
        "ratio": {name: ratio(times, name, "dense") for name in BACKENDS[load]},
    }


def against_mixtral(shape: tuple[int, int, int, int], repeats: int, device: str) -> dict[str, Any]:
    """Our SwiGLU layer without biases: what the Mixtral block computes, but that it divides its one gate by itself."""
    experts, tokens, width, hidden = shape
    torch.manual_seed(0)
    ours = MoELayer(width, hidden, experts, activation="swiglu", bias=False).to(device)
    x = steer(ours.router.weight, tokens, "balanced")
    steps = {"ours": training_step(ours, x)}
    for name, block in mixtral_blocks(experts, width, hidden, device).items():
        block.gate.weight.data.copy_(ours.router.weight)  # type: ignore[union-attr, operator]
        steps[name] = training_step(block, x)
    times = measure(steps, repeats, device)
    best = min((n for n in times if n != "ours"), key=lambda n: statistics.median(times[n]))
    return {
        "shape": dict(zip(("experts", "tokens", "width", "hidden"), shape, strict=True)),
        "their_best": best,
        "our_time_over_their_best": ratio(times, "ours", best),
        "their_ms": {name: round(min(t), 3) for name, t in times.items() if name != "ours"},
    }


def geometric_mean(values: list[float]) -> float:
    return round(math.exp(statistics.fmean(map(math.log, values))), 3)


def show(results: dict[str, Any]) -> None:
    print(f"{results['machine']}, torch {results['torch']}, {results['threads']} threads, {results['repeats']} repeats")
    print(f"{'experts, tokens, width, hidden':<32}{'load':<10}{'dense ms':>9}   time over dense, median [quartiles]")
    for row in results["dense"]:
        ratios = "   ".join(
            f"{n} {r['median']:.2f} [{r['quartile1']:.2f}-{r['quartile3']:.2f}]" for n, r in row["ratio"].items()
        )
        print(f"{tuple(row['shape'].values())!s:<32}{row['load']:<10}{row['dense_ms']:>9.1f}   {ratios}")
    print(f"geometric mean of auto: balanced {results['geomean_ratio_vs_dense']}", end=", ")
    print(f"skewed {results['geomean_ratio_vs_dense_skewed']}")
    if "note" in results["mixtral"]:
        print(results["mixtral"]["note"])
        return
    for row in results["mixtral"]["shapes"]:
        r = row["our_time_over_their_best"]
        print(
            f"{tuple(row['shape'].values())!s:<32}ours over Mixtral ({row['their_best']}): "
            f"{r['median']:.2f} [{r['quartile1']:.2f}-{r['quartile3']:.2f}]"
        )
    print(f"geometric mean over Mixtral: {results['mixtral']['geomean_ratio']}")


def run(repeats: int, device: str, shapes: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    dense = [against_dense(shape, load, repeats, device) for load in BACKENDS for shape in shapes]
    means = {
        load: geometric_mean([r["ratio"]["auto"]["median"] for r in dense if r["load"] == load]) for load in BACKENDS
    }
    try:
        rows = [against_mixtral(shape, repeats, device) for shape in shapes]
        ratios = [row["our_time_over_their_best"]["median"] for row in rows]
        mixtral: dict[str, Any] = {"shapes": rows, "geomean_ratio": geometric_mean(ratios)}
    except ImportError as error:
        mixtral = {"note": f"comparison with Mixtral skipped: transformers cannot be imported ({error})"}
    return {
        "geomean_ratio_vs_dense": means["balanced"],
        "geomean_ratio_vs_dense_skewed": means["skewed"],
        "dense": dense,
        "mixtral": mixtral,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        **provenance(device),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="numbers of the shapes to run"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice if not given")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    results = run(args.repeats, args.device, [SHAPES[i] for i in args.shapes])
    show(results)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
