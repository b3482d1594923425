import subprocess
import sys

_PROGRAM = """
import resource
from client.intake.memory import within
limits = 2**40, 2**41
resource.setrlimit(resource.RLIMIT_AS, limits)
for size, fits in ((2**20, False), (2**27, True)):
    try:
        with within(size):
            bytes(2**26)
        print(fits)
    except MemoryError:
        print(not fits)
print(resource.getrlimit(resource.RLIMIT_AS) == limits, len(bytes(2**27)) == 2**27)
"""


def test_bounded_and_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4
