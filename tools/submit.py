#!/usr/bin/env python
"""Puts a training run into Slurm's queue through submitit, and again when its time is up."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reid.files import OutputError, writing

EPILOG = """\
  python tools/submit.py --nodes 2 --gpus-per-node 4 --hours 12 --partition gpu -- \\
      --config-file projects/TMGF/configs/msmt.yaml OUTPUT_DIR logs/tmgf/msmt

The arguments after -- go to tools/train_net.py, which also gets --resume. This tool needs submitit
(pip install submitit). See docs/distributed.md.
"""
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """The task of one machine: it starts torchrun, which starts a process for each GPU.

    submitit calls this object to run it, and `checkpoint` when Slurm is about to stop the job.
    """

    nodes: int
    gpus_per_node: int
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Runs the training to its end.

        Raises:
            subprocess.CalledProcessError: Training ended with an error.
        """
        import submitit

        job = submitit.JobEnvironment()
        subprocess.run(self.command(job.hostnames[0], job.job_id), cwd=ROOT, check=True)

    def command(self, first_host: str, job_id: str) -> list[str]:
        """The command line of one machine."""
        return [
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes", str(self.nodes),
            "--nproc-per-node", str(self.gpus_per_node),
            "--rdzv-id", job_id,
            "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"{first_host}:29500",
            "tools/train_net.py", *self.arguments, "--resume",
        ]  # fmt: skip

    def checkpoint(self) -> Any:
        """The job to queue next: the same one, which resumes from the last checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def main() -> int:
    """Parses the arguments and submits; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=1, help="(default: 1)")
    parser.add_argument("--cpus-per-gpu", type=int, default=8, help="(default: 8)")
    parser.add_argument("--hours", type=float, default=24, help="time limit (default: 24)")
    parser.add_argument("--partition", help="the cluster's partition")
    parser.add_argument("--name", default="reid", help="name of the job (default: reid)")
    parser.add_argument(
        "--logs", type=Path, default=Path("logs/slurm"), help="folder (default: logs/slurm)"
    )
    parser.add_argument("arguments", nargs="+", help="for tools/train_net.py, after --")
    options = parser.parse_args()
    try:
        import submitit
    except ModuleNotFoundError:
        sys.stderr.write("submitit is not installed; run: pip install submitit\n")
        return 2
    try:
        with writing(options.logs):
            options.logs.mkdir(parents=True, exist_ok=True)
    except OutputError as error:
        sys.stderr.write(f"OutputError: {error}\n")
        return 2
    executor = submitit.AutoExecutor(folder=options.logs)
    executor.update_parameters(
        name=options.name,
        nodes=options.nodes,
        tasks_per_node=1,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_gpu * options.gpus_per_node,
        timeout_min=round(60 * options.hours),
        slurm_signal_delay_s=300,
        **({"slurm_partition": options.partition} if options.partition else {}),
    )
    job = executor.submit(Run(options.nodes, options.gpus_per_node, tuple(options.arguments)))
    sys.stdout.write(f"job {job.job_id}, output in {job.paths.stdout}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
