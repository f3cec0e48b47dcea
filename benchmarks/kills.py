"""Signals to a run's whole process group at random moments: does the run that goes on end as one never stopped?

Tiny pre-trainings, with and without data workers, are launched again and again; each launch gets a signal at a random
moment until one comes to its end. Its weights, optimizer state and every logged number are compared with those of an
undisturbed run. Each launch is a fork of this process, in a process group of its own, as a job of a scheduler is.

python benchmarks/kills.py --kills 56 --json benchmarks/results/kills.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import provenance
from vlmoe.config import load_recipe
from vlmoe.train import plots
from vlmoe.train.checkpoint import newest, read_state
from vlmoe.train.pretrain import pretrain
from vlmoe.train.runlog import METRICS, ROUTING, read_lines

STEPS = 80
SIGNALS = [signal.SIGTERM] * 7 + [signal.SIGHUP, signal.SIGUSR1, signal.SIGINT]
TINY = [
    "seed=3", "model.width=32", "model.depth=2", "model.heads=2", "model.codes=32",
    "data.batch={pair: 4, image: 2, text: 2}",
    "data.text_tokenizer.samples=200", "data.visual_tokenizer.steps=5", f"train.steps={STEPS}", "train.warmup=5",
    "train.device=cpu", "train.checkpoint_every=25", "train.watch_every=10",
]  # fmt: skip
TRAINING = 0.7  # share of the signals that come while steps are made; the others come at any time, start included
TIMING = ("tokens_per_second", "seconds", "wait_share")


def launch(folder: Path, workers: int) -> int:
    """A child process, leader of its own group, that trains in `folder`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgrp()
        with open(folder.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        result = pretrain(load_recipe("characters", [*TINY, f"data.workers={workers}", f"run.dir={folder}"]))
        code = 128 + result.stopped_by if result.stopped_by else 0
    except KeyboardInterrupt:  # outside the loop
        code = 128 + signal.SIGINT
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def steps_of(pid: int, folder: Path) -> int | None:
    """Wait until the launch has logged a step of its own. The status with which it ended, if it has."""
    file = folder / METRICS
    size = file.stat().st_size if file.exists() else 0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        now = file.stat().st_size if file.exists() else 0
        if now > size:
            return None
        size = now  # a launch that goes on cuts the log back first
        time.sleep(0.005)


def end_of(pid: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 128 - code if code < 0 else code


def trace(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions; files by their SHA-256."""
    found = newest(folder / "checkpoints")
    assert found is not None
    metrics = [{k: v for k, v in r.items() if k not in TIMING} for r in read_lines(folder / METRICS)]
    files = json.loads((found / "state.json").read_text())["files"]
    return {"metrics": metrics, "routing": read_lines(folder / ROUTING), "files": files, "step": read_state(found).step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plots.plot_curves = plots.plot_routing = lambda run_dir: None
    draw = random.Random(args.seed)
    began = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for workers in (0, 2):
            whole = Path(scratch) / f"whole-{workers}"
            start = time.perf_counter()
            assert end_of(launch(whole, workers)) == 0, whole.with_suffix(".log").read_text()
            seconds = time.perf_counter() - start
            truth = trace(whole)
            in_loop = read_lines(whole / METRICS)[-1]["seconds"]
            wanted, kills, runs, wrong, saved, trained = args.kills // 2, Counter[str](), 0, 0, 0, 0
            codes: Counter[int] = Counter()
            odd: list[str] = []
            while sum(kills.values()) < wanted:
                folder = Path(scratch) / f"run-{workers}-{runs}"
                for _ in range(8):  # signals to one run, then it is left alone
                    pid = launch(folder, workers)
                    s = draw.choice(SIGNALS)
                    training = draw.random() < TRAINING
                    if training:
                        status = steps_of(pid, folder)
                        pause = draw.uniform(0, 0.5 * in_loop)
                    else:
                        status, pause = None, draw.uniform(0, 0.6 * seconds)
                    time.sleep(pause)
                    if status is None:
                        done, status = os.waitpid(pid, os.WNOHANG)
                        status = status if done else None
                    if status is not None:  # it came to its end before
                        assert os.waitstatus_to_exitcode(status) == 0
                        break
                    try:
                        os.killpg(pid, s)
                    except ProcessLookupError:  # not yet a group
                        os.kill(pid, s)
                    code = end_of(pid)
                    if code == 0:  # complete by the time the signal came
                        break
                    kills[s.name] += 1
                    trained += training
                    codes[code] += 1
                    saved += newest(folder / "checkpoints") is not None
                    if code != 128 + s:
                        odd.append(f"{s.name}: exit code {code}")
                    if sum(kills.values()) >= wanted:
                        break
                assert end_of(launch(folder, workers)) == 0, folder.with_suffix(".log").read_text()
                runs += 1
                wrong += trace(folder) != truth
                shutil.rmtree(folder)
            rows.append(
                {
                    "workers": workers, "signals": sum(kills.values()), "by_signal": dict(kills), "runs": runs,
                    "identical": runs - wrong, "while_training": trained, "with_a_checkpoint": saved,
                    "other_exit_codes": odd,
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            report = {"steps": STEPS, "seed": args.seed, "rows": rows, "seconds": time.perf_counter() - began}
            if args.json:  # after each group, so that a cut benchmark leaves what it has
                args.json.write_text(json.dumps(report | provenance(), indent=1) + "\n")


if __name__ == "__main__":
    main()
