"""Agents that die: each is forked from a warm process, answers one request and is killed at a chosen moment.

Imports and accounting cost seconds, so they are paid for once, here; a victim opens its home and draws its secrets
itself. One JSON line in (`Order`), one JSON line out (`Outcome`).
"""

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, final

import torch

from client.agent import answer, open_site
from client.channel import pack_reply, unpack_request
from client.home import Home

DURABLE_CALLS = ("open", "write", "fsync", "ftruncate", "replace", "rename", "unlink")


@final
@dataclass(frozen=True)
class Order:
    """One request to one agent, and when the agent shall die.

    Attributes:
        home: The site's folder.
        request: File with the request's frame.
        reply: File for what the agent sent, whole or not.
        kill_after_s: SIGKILL this long after the fork, also when it has answered already; None: let it live.
        kill_at_call: The agent kills itself in its n-th call of `DURABLE_CALLS`; a write is torn in the middle.
    """

    home: str
    request: str
    reply: str
    kill_after_s: float | None = None
    kill_at_call: int | None = None


@final
@dataclass(frozen=True)
class Outcome:
    """What became of an agent.

    Attributes:
        killed: It did not end by itself.
        seconds: From the fork to the end of its reply, or to its death.
    """

    killed: bool
    seconds: float


def main() -> None:
    """Answer orders on standard input; arguments: a home to warm up on, then files with requests."""
    torch.set_num_threads(1)
    for request in sys.argv[2:]:  # what is imported late and what accounting remembers: no victim spends its life on it
        answer(open_site(Home(Path(sys.argv[1]))), unpack_request(Path(request).read_bytes()))
    print("warm", flush=True)
    for line in sys.stdin:
        print(json.dumps(asdict(carry_out(Order(**json.loads(line))))), flush=True)


def carry_out(order: Order) -> Outcome:
    """Fork one agent, read what it sends, kill it when it is time."""
    receive, send = os.pipe()
    started = time.monotonic()
    victim = os.fork()
    if victim == 0:
        os.close(receive)
        live(order, send)
    os.close(send)
    deadline = started + (order.kill_after_s if order.kill_after_s is not None else 120.0)
    sent, seconds = bytearray(), 0.0
    while select.select([receive], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(receive, 1 << 20)
        seconds = time.monotonic() - started
        if not part:
            break
        sent += part
    if order.kill_after_s is not None:
        time.sleep(max(0.0, deadline - time.monotonic()))
        os.kill(victim, signal.SIGKILL)
    status = os.waitpid(victim, 0)[1]
    while part := os.read(receive, 1 << 20):
        sent += part
    os.close(receive)
    Path(order.reply).write_bytes(sent)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError("an agent failed by itself; its traceback stands above")
    return Outcome(os.WIFSIGNALED(status), seconds)


def live(order: Order, send: int) -> NoReturn:
    """Be an agent: open the home, answer the request, wait for the next one that never comes."""
    try:
        if order.kill_at_call is not None:
            die_at(order.kill_at_call)
        reply = answer(open_site(Home(Path(order.home))), unpack_request(Path(order.request).read_bytes()))
        frame = memoryview(pack_reply(reply))
        while frame:
            frame = frame[os.write(send, frame) :]
        os.close(send)
        if order.kill_after_s is not None:
            signal.pause()
        os._exit(0)
    finally:  # whatever was raised: what is forked must never go on as its parent
        traceback.print_exc()
        os._exit(1)


def die_at(call: int) -> None:
    """Kill this process in its n-th durable call, counted from 0."""
    counted = 0

    def dying(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call_or_die(*arguments: Any, **named: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted <= call:
                return function(*arguments, **named)
            if name == "write":
                function(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            return None

        return call_or_die

    for name in DURABLE_CALLS:
        setattr(os, name, dying(getattr(os, name), name))


if __name__ == "__main__":
    main()
