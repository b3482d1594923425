"""Peak memory of one step, counted from the profiler's record of every allocation, not sampled."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], None]) -> int:
    """Run a step and return the most bytes it held at a time beyond what was held before it.

    Everything that torch's allocators hand out counts, the scratch and the reordered weights of oneDNN with it.
    Not seen: what MKL, Python and the system's allocator keep for themselves.

    Args:
        step: Takes the step; what it leaves behind counts too.

    Guarantees:
        - exact: The result is a sum of sizes that were asked for, the same whatever else the machine does.
        - beyond_before: What was allocated before the step counts neither while it is held nor when it is freed.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines to stderr for every step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return _peak([event for event in events if event.get("name") == "[memory]"])


def _peak(events: list[dict[str, Any]]) -> int:
    held: dict[tuple[int, int], int] = {}
    total = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        what = event["args"]
        where = (what["Device Type"], what["Addr"])
        if what["Bytes"] > 0:
            held[where] = what["Bytes"]
            total += what["Bytes"]
            peak = max(peak, total)
        else:
            total -= held.pop(where, 0)  # 0: it was there before the step
    return peak
