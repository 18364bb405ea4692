"""The first ten minutes on a GPU: one command says what works there, what is wrong, and how fast it is.

    python benchmarks/gpu_smoke.py [-o DIR] [--minutes 10] [--parts ops,learner] [--rehearse]

Each part is a process with a time limit of its own and prints a line of JSON as soon as it knows something:

    ops       every op against float64 arithmetic, compiled and in Triton
    learner   a training step at the shapes of real drafters: memory, seconds, attention kernels, MFU
    serving   tiny random verifiers on vLLM's V2 runner with full graphs: the same greedy texts in all modes
    training  `vllm-dflash train`, then `eval --engine`: exit codes, memory, runner
    speed     Qwen3-8B's shape with dummy weights: ms a step with and without drafts, a profile of one step

The first two need no vLLM. A part that fails or runs out of time does not keep the others from running; the
closing table begins with the worst news. The exit code is 1 if anything failed or was wrong.

`--rehearse` runs every part on a CPU with tiny models, to know that the script reaches its end: what it says
of speed and memory means nothing. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The repository's code and that of its tests, in this process and in all that it starts.
for folder in (HERE, HERE.parent / "tests", HERE.parent):
    sys.path.insert(0, str(folder))

from smoke.run import main  # noqa: E402

if __name__ == "__main__":
    main()
