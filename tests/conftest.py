"""One thread for each tensor operation: the tests run side by side, and threads that wait for a core spin."""

import torch

torch.set_num_threads(1)
