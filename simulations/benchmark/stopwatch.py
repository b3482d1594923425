"""A stopwatch in every process of a deployment: which part of a round it works on, from when to when.

`deployment` puts it there through Python's `sitecustomize`, so that what it times are the very commands that people
start. Named functions are wrapped as their modules are loaded; every moment of a thread belongs to the innermost. Lines
go to a file for each process and nowhere else. Imports nothing that a relay does not have. Out of scope: what the lines
say of a round (benchmark/split).
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, final

FOLDER = "FEDMEDGAN_STOPWATCH"
"""Environment: the folder for the lines; without it nothing is timed."""
CONSTANTS = "FEDMEDGAN_STOPWATCH_CONSTANTS"
"""Environment: JSON, {module: {constant: value}}, set as the module is loaded, so that two settings can be compared."""

TIMED: Mapping[str, Mapping[str, str]] = {
    "client.agent": {"answer": "agent"},
    "client.train": {"train_round": "training"},
    "client.channel": {
        **dict.fromkeys(("pack_request", "unpack_request", "pack_reply", "unpack_reply"), "serialisation"),
        "connect": "socket",
    },
    "client.fleet": {"Fleet.send": "message"},
    "client.relay": {"_serve_one": "relayed"},
    "common.wire": dict.fromkeys(
        ("encode_requests", "decode_request", "encode_reply", "decode_reply"), "serialisation"
    ),
    "common.seal": dict.fromkeys(
        ("seal_request", "check_request", "sign_reply", "check_reply", "request_digest", "content_digest"),
        "serialisation",
    ),
    "flwr.supercore.inflatable.inflatable_utils": {"inflate_object_from_contents": "serialisation"},
    "flwr.supercore.inflatable.inflatable_object": dict.fromkeys(
        ("get_all_nested_objects", "get_object_tree"), "serialisation"
    ),
    "flwr.supercore.protobuf.client": {"ProtobufClient._unary_unary": "transport"},
    "flwr.superlink.grid.http_grid": {"HttpGrid.push_messages": "message"},
    "server.aggregation": dict.fromkeys(("add_to_mean", "step", "average"), "aggregation"),
    "server.robust": {"combine": "aggregation"},
    "server.exchange": {"ask": "asked"},
    "server.records": {"append_record": "storing"},
    "server.checkpoint": {"save": "checkpoint"},
    "common.sheets": {"save_sheet": "storing"},
}
"""By module: the function, and the part that its time belongs to."""

_CARRIES = frozenset({"PushMessages", "PushObject", "PullMessages", "PullObject", "ConfirmMessageReceived", "GetNodes"})
"""Flower's requests that a round is made of; heartbeats, logs and the like run beside it."""


def wind(environment: Mapping[str, str] | None = None) -> None:
    """Time this process, if the environment says so."""
    given = os.environ if environment is None else environment
    if folder := given.get(FOLDER):
        constants = json.loads(given.get(CONSTANTS, "{}"))
        sys.meta_path.insert(0, _Finder(Stopwatch(Path(folder) / f"{os.getpid()}.jsonl"), constants))


@final
class Stopwatch:
    """Writes `[part, thread, from, until]` lines; seconds of the clock that all processes of the machine share."""

    def __init__(self, path: Path) -> None:
        """Write to `path`, from now on."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._local = threading.local()

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Return the function with its time taken; a generator's from its first value to its end, as one line."""
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def timed_generator(*arguments: Any, **keywords: Any) -> Iterator[Any]:
                started = time.monotonic()
                yield from function(*arguments, **keywords)
                self._write(part, started, time.monotonic())

            return timed_generator

        @functools.wraps(function)
        def timed_call(*arguments: Any, **keywords: Any) -> Any:
            self._enter(part)
            result = None
            try:
                result = function(*arguments, **keywords)
                if part == "socket":  # a function that makes the transport: its calls are what takes time
                    return self.timed(result, "agent wait")
                return result
            finally:
                idle = part == "transport" and _is_idle(str(keywords.get("rpc_method", "")), result)
                self._leave("idle" if idle else part)

        return timed_call

    def _enter(self, part: str) -> None:
        now, stack = time.monotonic(), self._stack()
        if stack:
            self._write(stack[-1][0], stack[-1][1], now)
        stack.append((part, now, now))

    def _leave(self, part: str) -> None:
        now, stack = time.monotonic(), self._stack()
        _, since, entered = stack.pop()
        self._write(part, since, now)
        if part in WINDOWS:
            self._write(f"whole {part}", entered, now)
        if stack:
            stack[-1] = (stack[-1][0], now, stack[-1][2])

    def _stack(self) -> list[tuple[str, float, float]]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _write(self, part: str, since: float, until: float) -> None:
        os.write(self._file, (json.dumps([part, threading.get_ident(), since, until]) + "\n").encode())


WINDOWS = frozenset({"checkpoint", "relayed", "agent wait"})
"""Parts whose whole span is written too, with what is inside them."""


@final
class _Finder(importlib.abc.MetaPathFinder):
    """Finds the timed modules as Python does, and wraps their functions once they are loaded."""

    def __init__(self, watch: Stopwatch, constants: Mapping[str, Mapping[str, Any]]) -> None:
        self._watch, self._constants = watch, constants

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module of the list; the others are left to the next finder."""
        if fullname not in TIMED and fullname not in self._constants:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return None
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            for name, value in self._constants.get(fullname, {}).items():
                setattr(module, name, value)
            for name, part in TIMED.get(fullname, {}).items():
                holder_name, _, function = name.rpartition(".")
                holder = getattr(module, holder_name) if holder_name else module
                setattr(holder, function, self._watch.timed(getattr(holder, function), part))

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]  # of this one loader
        return spec


def _is_idle(method: str, answer: Any) -> bool:
    """Tell whether a request brought nothing: no message was there, or a part of it not yet."""
    return (
        method.rpartition("/")[2] not in _CARRIES
        or (hasattr(answer, "messages_list") and not answer.messages_list)
        or (hasattr(answer, "object_available") and not answer.object_available)
    )
