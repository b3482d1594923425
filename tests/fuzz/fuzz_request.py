"""Coverage-guided fuzzing of what a coordinator can send, with atheris, which is no dependency of the project.

In a virtual environment of its own that sees the project's packages and has atheris:

    python -m tests.fuzz.fuzz_request FOUND tests/client/corpus -max_total_time=600 -max_len=8192 -len_control=0

New inputs are written to the folder FOUND, one that crashes to `crash-*` in the current folder. Put it into
tests/client/corpus: tests/client/test_request_fuzz.py replays all that stands there.
"""

import sys

import atheris

with atheris.instrument_imports(include=["client", "common"]):
    from tests.fuzz.targets import one_input

if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
