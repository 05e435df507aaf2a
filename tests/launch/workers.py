"""Functions that the tests of `launch` start in processes of their own."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from meshwright.errors import CannotWork, InputError, Problem, RunFailed
from meshwright.launch import Context


def describe(payload: dict[str, Any], context: Context) -> dict[str, Any]:
    return {
        "rank": context.rank,
        "world": context.world,
        "payload": payload,
        "threads": os.environ["OMP_NUM_THREADS"],
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
        "torch": "torch" in sys.modules,
    }


def kill_one(payload: dict[str, Any], context: Context) -> None:
    """One rank kills itself; the others would work for a long time."""
    if context.rank == payload["rank"]:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def fail(payload: dict[str, Any], context: Context) -> None:
    if context.rank == 1:
        print("about to divide")
        print(1 // payload["zero"])
    time.sleep(600)


def refuse(payload: dict[str, Any], context: Context) -> None:
    if context.rank == 1:
        problems = [Problem("a.jsonl:3", "is no JSON", "write an object"), Problem("data.seq_len", "is 0")]
        raise {"InputError": InputError, "CannotWork": CannotWork}[payload["kind"]](problems)
    time.sleep(600)


def fail_with_resume(payload: dict[str, Any], context: Context) -> None:
    raise RunFailed("the disk is full", resume="meshwright train run/job.toml")


def leave(payload: dict[str, Any], context: Context) -> None:
    os._exit(payload["status"])


def abort_at_exit(payload: dict[str, Any], context: Context) -> int:
    """Returns, but the end of the interpreter would abort, as that of a library with threads of its own can."""
    atexit.register(os.abort)
    return context.rank


def stubborn(payload: dict[str, Any], context: Context) -> None:
    """Does not end when asked."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(payload["folder"], f"ready-{context.rank}").touch()
    time.sleep(600)


def polite(payload: dict[str, Any], context: Context) -> None:
    """Tidies up when asked to end."""

    def tidy(*_: object) -> None:
        Path(payload["folder"], f"tidied-{context.rank}").touch()
        os._exit(0)

    signal.signal(signal.SIGTERM, tidy)
    Path(payload["folder"], f"ready-{context.rank}").touch()
    time.sleep(600)


def save_first(payload: dict[str, Any], context: Context) -> str:
    """Goes on until asked to end, then returns in order."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    Path(payload["folder"], f"ready-{context.rank}").touch()
    while not asked:
        time.sleep(0.01)
    return "saved"


def all_reduce(payload: dict[str, Any], context: Context) -> float:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from meshwright.process_group import store_of

    dist.init_process_group("gloo", store=store_of(context), rank=context.rank, world_size=context.world)
    total = torch.tensor([float(context.rank + 1)])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return float(total)


def resident_after_freeing(payload: dict[str, Any], _: Context) -> int:
    """Bytes resident after 64 MiB in pieces of 1 MiB were taken, filled and freed, less those before."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    pieces = [bytearray(b"x") * (payload["piece"] << 20) for _ in range(64 // payload["piece"])]
    assert resident() - before > 60 << 20
    del pieces
    return resident() - before


def meshes(payload: dict[str, Any], context: Context) -> dict[str, Any]:
    """Sums of rank + 1 over process groups of several kinds."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from meshwright.process_group import process_group

    torch.set_num_threads(1)

    def total(amount: float, group: Any = None) -> float:
        value = torch.tensor([amount])
        dist.all_reduce(value, group=group)
        return float(value)

    answer: dict[str, Any] = {}
    with process_group(context, "gloo", timeout_seconds=60):
        answer["all"] = total(context.rank + 1)
        mesh = init_device_mesh("cpu", (context.world // 2, 2), mesh_dim_names=("rows", "columns"))
        answer["row"] = total(context.rank + 1, mesh["columns"].get_group())
        even = dist.new_group(list(range(0, context.world, 2)))
        answer["even"] = total(context.rank + 1, even) if context.rank % 2 == 0 else None
        dist.barrier()
    with process_group(context, "gloo", timeout_seconds=60, name="again"):
        answer["again"] = total(2 * (context.rank + 1))
    return answer


def meet_without_the_last(payload: dict[str, Any], context: Context) -> None:
    """The last rank never comes."""
    from meshwright.process_group import process_group

    if context.rank == context.world - 1:
        time.sleep(600)
    with process_group(context, "gloo", timeout_seconds=payload["timeout_seconds"]):
        pass


def until_asked(payload: dict[str, Any], context: Context) -> dict[str, Any]:
    """Goes on until it is asked to end, or the file `end` is there; leaves its pid meanwhile."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    folder = Path(payload["folder"])
    (folder / f"pid-{context.generation}-{context.rank}").write_text(str(os.getpid()))
    while not asked and not (folder / "end").exists():
        time.sleep(0.01)
    if asked:
        (folder / f"saved-{context.generation}-{context.rank}").touch()
    return {"generation": context.generation, "pid": os.getpid(), "asked": bool(asked)}


def where(payload: dict[str, Any], context: Context) -> list[int]:
    return [context.local_rank, context.device, os.getppid()]


def answer_calls(payload: dict[str, Any], context: Context) -> str:
    """Gives calls back, until one has another name."""
    for call in context.calls():
        if call.name == "give back":
            call.reply({"got": call.body, "rank": context.rank}, call.blob[::-1])
        elif call.name == "fail":
            call.reply(error="cannot")
        elif call.name == "leave":
            os._exit(3)
        elif call.name == "return":
            break
    return "returned"


def tell(payload: dict[str, Any], context: Context) -> None:
    while "after" in payload and not Path(payload["after"]).exists():
        time.sleep(0.01)
    for number in range(payload["count"]):
        context.tell("number", {"number": number}, number.to_bytes(2, "big") * payload.get("blob", 1))
        time.sleep(payload.get("pause", 0.0))


def tell_while_called(payload: dict[str, Any], context: Context) -> int:
    """Tells, adds to a key, and gives calls back, all at once, until it is called to return."""
    import threading

    def listen() -> None:
        kept = []
        for call in context.calls():
            if call.name == "keep":  # without an answer
                kept.append(call.body)
                continue
            if call.name == "return":
                end.set()
            call.reply(kept if call.name == "kept" else call.body)

    end, keys, added = threading.Event(), context.keys(), 0
    threading.Thread(target=listen, daemon=True).start()
    while not end.is_set():
        added += 1
        context.tell("number", added)
        assert keys.add("n", 1) == added
        time.sleep(0.01)
    return added


def tell_much(payload: dict[str, Any], context: Context) -> None:
    context.tell("large", None, bytes(65 << 20))


def hold(payload: dict[str, Any], context: Context) -> None:
    if context.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def use_up_memory(payload: dict[str, Any], context: Context) -> None:
    """Ends as the kernel ends a process that has used up the memory of its control group."""
    Path(payload["events"]).write_text("low 0\noom_kill 1\n")
    os.kill(os.getpid(), signal.SIGKILL)


def sum_until(payload: dict[str, Any], context: Context) -> None:
    """Sums with the others; rank 1 raises an error after a while."""
    import torch
    import torch.distributed as dist

    from meshwright.process_group import process_group

    torch.set_num_threads(1)
    with process_group(context, "gloo", timeout_seconds=60):
        for step in range(10**9):
            dist.all_reduce(torch.zeros(1))
            if context.rank == 1 and step == 20:
                raise ValueError("the true cause")


def print_until_asked(payload: dict[str, Any], context: Context) -> dict[str, Any]:
    print(f"begin of generation {context.generation}")
    result = until_asked(payload, context)
    print(f"end of generation {context.generation}")
    return result


def print_lines_until_asked(payload: dict[str, Any], context: Context) -> dict[str, Any]:
    """Prints numbered lines until it is asked to end; leaves their number in "printed"."""
    asked: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    number = 0
    while not asked:
        print(f"line {number}")
        number += 1
        time.sleep(0.05)
    (Path(payload["folder"]) / "printed").write_text(str(number))
    return {"asked": False}
