"""What the ranks of a process group check together, one process per rank; test_distributed.py starts them.

distributed_checks.py WORLD_SIZE FOLDER     ranks join through FOLDER/store; writes FOLDER/results.json and FOLDER/*.log

Every check is a function of the rank's `World`. Ranks agree on each check's outcome before the next one starts, so a
failure on one rank is everybody's; a check that leaves ranks waiting for one another fails by the group's timeout.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import distributed_index_loss  # noqa: F401  (registers its checks, as do the next ones)
import distributed_index_topk  # noqa: F401
import distributed_keys  # noqa: F401
import distributed_sharding  # noqa: F401
import distributed_training  # noqa: F401
import torch
import torch.distributed as dist
import torch.multiprocessing
from distributed_world import CHECKS, TIMEOUT, World

__all__ = ["CHECKS"]


def run_checks(world: World) -> dict[str, str | None]:
    outcomes: dict[str, str | None] = {}
    for name, function in CHECKS[world.size].items():
        error = None
        try:
            function(world)
        except Exception:
            error = traceback.format_exc()
            print(f"{name} failed:\n{error}", flush=True)  # told again if the other ranks can still be reached
        errors: list[str | None] = [None] * world.size
        dist.all_gather_object(errors, error)
        failed = [f"rank {rank}:\n{text}" for rank, text in enumerate(errors) if text is not None]
        outcomes[name] = "\n".join(failed) or None
    return outcomes


def run_rank(rank: int, size: int, folder: Path) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    outcomes = run_checks(World(rank, size))
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # Past Python's finalization: DTensor's caches keep gloo's threads alive that long, and one of them that then frees
    # a tensor waits for a lock it cannot have, and aborts the process ("terminate called without an active exception").
    os._exit(0)


def main() -> None:
    """Fork the ranks, which spares each the seconds that importing torch takes; nothing has started a thread yet."""
    size, folder = int(sys.argv[1]), Path(sys.argv[2])
    fork = torch.multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(rank, size, folder), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        sys.exit(f"ranks ended with {codes}")


if __name__ == "__main__":
    main()
