"""How many private steps D takes for each generator step: fixed, or a ladder that reads D's accuracy on fakes only."""

from dataclasses import replace

from common.config import TrainConfig
from server.checkpoint import State

LADDER = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
G_STEPS_A_RUNG = 200
ACCURACY_FLOOR = 0.6
_DECAY = 0.99


def first_rung(train: TrainConfig) -> int:
    """Return where a run starts."""
    return LADDER[0] if train.d_steps_per_g_step == "adaptive" else train.d_steps_per_g_step


def climb(train: TrainConfig, state: State, fake_accuracy: float) -> State:
    """Move the ladder's state by one round.

    Args:
        train: Fixed number or "adaptive", and the steps of a round.
        state: The state before; only the ladder's fields change.
        fake_accuracy: D's accuracy on the round's fakes, mean over the sites: free, since it reads no patient.

    Returns:
        The state with one rung more when D has ceased to tell fakes from reals for long enough. The rung never exceeds
        the steps of a round, so that every round trains G.

    Source: Bie et al. 2023 (arXiv 2302.02936), section 4.2; moving average with decay 0.99 a generator step.
    """
    if train.d_steps_per_g_step != "adaptive":
        return state
    g_steps = train.steps_per_round // state.d_steps_per_g_step
    decay = _DECAY**g_steps
    accuracy = decay * state.fake_accuracy + (1 - decay) * fake_accuracy
    on_rung = state.g_steps_on_rung + g_steps
    higher = [rung for rung in LADDER if state.d_steps_per_g_step < rung <= train.steps_per_round]
    if on_rung >= G_STEPS_A_RUNG and accuracy <= ACCURACY_FLOOR and higher:
        return replace(state, d_steps_per_g_step=higher[0], fake_accuracy=1.0, g_steps_on_rung=0)
    return replace(state, fake_accuracy=accuracy, g_steps_on_rung=on_rung)
