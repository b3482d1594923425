"""What a hostile coordinator sends: each entry turns an honest request into one that must be refused and cost nothing.

`tests/client/test_hostile_coordinator.py` asks with them in one process, `tests/e2e/test_hostile_coordinator.py` over
the socket of a real agent.
"""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from client.channel import MAGIC, pack_request
from common.config import ImageConfig
from common.lens import Lens, Sight, coordinates, make_network, to_arrays
from common.messages import Arrays, Request
from common.models import draw_weights
from tests.tiny_site import PROPOSAL, train_request

Change = Callable[[Request], Request]
BIAS = "discriminator.last.bias"


def changed(request: Request, section: str, **values: Any) -> Request:
    """Change values of one section of the proposal."""
    tree = json.loads(request.proposal)
    tree.setdefault(section, {}).update(values)
    return replace(request, proposal=json.dumps(tree))


def proposing(section: str, **values: Any) -> Change:
    """Return what changes values of one section of the proposal."""
    return lambda request: changed(request, section, **values)


def asking(**values: Any) -> Change:
    """Return what changes fields of the request itself."""
    return lambda request: replace(request, **values)


def with_bias(array: npt.NDArray[Any]) -> Change:
    """Return what puts another array in the place of one weight."""
    return lambda request: replace(request, arrays={**request.arrays, BIAS: array})


def all_weights(change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Change:
    """Return what changes every array."""
    return lambda request: replace(request, arrays={name: change(array) for name, array in request.arrays.items()})


def appended(text: str) -> Change:
    """Return what writes a section a second time: JSON's last word counts."""
    return lambda request: replace(request, proposal=f"{request.proposal[:-1]},{text}}}")


NO_PROPOSALS: Mapping[str, Change] = {
    "nothing": asking(proposal=""),
    "no JSON": lambda r: replace(r, proposal=r.proposal[:-1]),
    "a list": asking(proposal="[]"),
    "null": asking(proposal="null"),
    "60,000 deep": asking(proposal="[" * 60_000),
    "1,000,000 deep": asking(proposal='{"image":' * 10**6),
    "objects 7,000 deep": asking(proposal='{"image":' * 7_000 + "0" + "}" * 7_000),
    "no text": asking(proposal="\ud800"),
    "1 MB": lambda r: replace(r, proposal=r.proposal + " " * 10**6),
    "left over": lambda r: replace(r, proposal=r.proposal + r.proposal),
    "a byte order mark": lambda r: replace(r, proposal="\ufeff" + r.proposal),
    "6,000 unknown keys": asking(proposal="{" + ",".join(f'"k{i}":1' for i in range(6_000)) + "}"),
    "4,000 unknown keys in a section": asking(
        proposal='{"privacy":{' + ",".join(f'"k{i}":1' for i in range(4_000)) + "}}"
    ),
    "an unknown section": proposing("secrets", key="x"),
    "a section of the simulator": proposing("simulation", data="/"),
    "a section twice, the second over the policy": appended('"privacy":{"epsilon":8.1}'),
    "a section twice, the second unknown": appended('"privacy":{"sigma":0}'),
}
PRIVACY: Mapping[str, Change] = {
    "epsilon above the policy": proposing("privacy", epsilon=8.1),
    "epsilon without end": proposing("privacy", epsilon=1e300),
    "epsilon infinite": proposing("privacy", epsilon=float("inf")),
    "epsilon NaN": proposing("privacy", epsilon=float("nan")),
    "epsilon of nothing": proposing("privacy", epsilon=0.0),
    "epsilon negative": proposing("privacy", epsilon=-1.0),
    "another delta": proposing("privacy", delta=2e-5),
    "delta one place off": proposing("privacy", delta=1.0000000000000002e-5),
    "delta of nearly one": proposing("privacy", delta=0.999),
    "delta of one": proposing("privacy", delta=1.0),
    "delta of nearly nothing": proposing("privacy", delta=1e-300),
    "delta of nothing": proposing("privacy", delta=0),
    "sigma of nothing": proposing("privacy", noise_multiplier=0.0),
    "sigma in the section of training": proposing("train", noise_multiplier=0.0),
    "a divisor of its own": proposing("privacy", divisor=1e-9),
    "a seed for the secrets": proposing("privacy", seed=1),
    "clip norm of 1e9": proposing("privacy", max_grad_norm=1e9),
    "clip norm infinite": proposing("privacy", max_grad_norm=float("inf")),
    "clip norm of nothing": proposing("privacy", max_grad_norm=0.0),
    "clip norm of nearly nothing": proposing("privacy", max_grad_norm=1e-30),
    "51 images per patient": proposing("privacy", images_per_patient=51),
    "no image per patient": proposing("privacy", images_per_patient=0),
    "more patients than declared": proposing("privacy", min_patients=41),
    "one patient is enough": proposing("privacy", min_patients=1),
    "a batch of nobody": proposing("privacy", batch_patients=0),
    "a batch less than nobody": proposing("privacy", batch_patients=-4),
    "a batch of half a patient": proposing("privacy", batch_patients=0.5),
    "a batch that no float holds": proposing("privacy", batch_patients=10**400),
}
TRAINING: Mapping[str, Change] = {
    "1e9 steps": proposing("train", steps_per_round=10**9),
    "more steps than the policy": proposing("train", steps_per_round=1001),
    "no steps": proposing("train", steps_per_round=0),
    "negative steps": proposing("train", steps_per_round=-(10**9)),
    "a generator batch that fits no memory": proposing("train", generator_batch=10**12),
    "a learning rate without end": proposing("train", learning_rate_d=float("inf")),
    "a learning rate that climbs": proposing("train", learning_rate_g=-1.0),
    "an average that never moves": proposing("train", ema_decay=1.0),
    "too many rounds": proposing("federation", rounds=501),
    "1e9 rounds": proposing("federation", rounds=10**9),
    "no rounds": proposing("federation", rounds=0),
    "a seed of 2^63": proposing("federation", seed=2**63),
    "round 0": asking(round=0),
    "round 4 of 3": asking(round=4),
    "round -1": asking(round=-1),
    "round 10^100": asking(round=10**100),
    "another setting": lambda r: replace(r, settings={**r.settings, "seed": 1}),
    "sigma as a setting": lambda r: replace(r, settings={**r.settings, "noise_multiplier": 0.0}),
    "10,000 settings": lambda r: replace(r, settings={**r.settings, **{f"s{i}": i for i in range(10_000)}}),
}
MODELS: Mapping[str, Change] = {
    "a foreign architecture": proposing("model", name="diffusion"),
    "a path as architecture": proposing("model", name="../../etc"),
    "code as architecture": proposing("model", name="os.system('id')"),
    "another architecture than the weights": proposing("model", name="dcgan"),
    "a width that fits no memory": proposing("model", generator_width=10**6),
    "no latents": proposing("model", latent_dim=0),
    "no classes": proposing("image", classes=[]),
    "one class more": proposing("image", classes=["clear", "opacity", "nodule"]),
    "a class twice": proposing("image", classes=["clear", "clear"]),
    "classes in another order": proposing("image", classes=["opacity", "clear"]),
    "10,000 classes": proposing("image", classes=["c"] * 10_000),
    "a class that clears the screen": proposing(
        "image", classes=["clear", "\x1b[2J\x07\r\n2026-01-01 INFO all is well"]
    ),
    "a class that is a path": proposing("image", classes=["clear", "../../keys/site.json"]),
    "a class with a null": proposing("image", classes=["clear", "opacity\0"]),
    "a size that was never imported": proposing("image", size=64),
    "a size that no model has": proposing("image", size=10**9),
    "a size of nothing": proposing("image", size=0),
}
WEIGHTS: Mapping[str, Change] = {
    "NaN": with_bias(np.full(1, np.nan, np.float32)),
    "infinite": with_bias(np.full(1, -np.inf, np.float32)),
    "NaN everywhere": all_weights(lambda array: array * np.float32(np.nan)),
    "none": asking(arrays={}),
    "one missing": lambda r: replace(r, arrays={name: array for name, array in r.arrays.items() if name != BIAS}),
    "one too many": lambda r: replace(r, arrays={**r.arrays, "extra": np.zeros(1, np.float32)}),
    "one too many that is a path": lambda r: replace(r, arrays={**r.arrays, "../x": np.zeros(0, np.float32)}),
    "10,000 too many": lambda r: replace(r, arrays={**r.arrays, **{f"a{i}": np.zeros(1) for i in range(10_000)}}),
    "huge": with_bias(np.zeros(10**7, np.float32)),
    "of size zero": with_bias(np.zeros(0, np.float32)),
    "of size zero and a billion": with_bias(np.zeros((10**9, 0), np.float32)),
    "of another shape": with_bias(np.zeros((1, 1), np.float32)),
    "doubles": with_bias(np.zeros(1)),
    "halves": with_bias(np.zeros(1, np.float16)),
    "whole numbers": with_bias(np.zeros(1, np.int32)),
    "booleans": with_bias(np.zeros(1, np.bool_)),
    "complex": with_bias(np.zeros(1, np.complex64)),
    "doubles everywhere": all_weights(lambda array: array.astype(np.float64)),
}
NOT_ON_THE_SOCKET: Mapping[str, Change] = {
    "without a dimension": with_bias(np.zeros((), np.float32)),
    "texts": with_bias(np.array(["x"])),
    "objects": with_bias(np.array([None], dtype=object)),
    "records": with_bias(np.zeros(1, [("x", "<f4")])),
    "times": with_bias(np.zeros(1, "datetime64[s]")),
    "swapped bytes": with_bias(np.zeros(1, ">f4")),
    "swapped bytes everywhere": all_weights(lambda array: array.astype(">f4")),
}
"""What `pack_request` cannot carry as it is: it meets the agent only where that is called in the same process."""

TRAIN: Mapping[str, Change] = {
    f"{part}: {name}": change
    for part, changes in {
        "proposal": NO_PROPOSALS,
        "privacy": PRIVACY,
        "training": TRAINING,
        "model": MODELS,
        "weights": WEIGHTS,
    }.items()
    for name, change in changes.items()
}
LOOKS = ("", "Public", "PUBLIC", "pixels", "means", "learned", "../x", "x" * 10**5, None, 0, True, 1.0)
"""With no arrays, what is not `public` cannot be looked at."""


def make_lens(image: ImageConfig = PROPOSAL.image, sight: Sight = "learned") -> Arrays:
    """Make an honest lens: random weights, centred on and scaled by what they see of noise."""
    rng = torch.Generator().manual_seed(5)
    network = None
    if sight == "learned":
        network = make_network(image)
        draw_weights(network, rng)
        network.eval().requires_grad_(False)
    seen = coordinates(network, torch.rand(16, image.channels, image.size, image.size, generator=rng) * 2 - 1)
    return to_arrays(Lens(image, seen.mean(0).expand(len(image.classes), -1), seen.std(0) + 1e-3, network))


Lenses = Callable[[Arrays], Arrays]


def one_array(name: str, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Lenses:
    """Return what changes one array of a lens."""
    return lambda arrays: {**arrays, name: change(arrays[name])}


def each_array(change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], only: str = "lens.") -> Lenses:
    """Return what changes every array of a lens, or those whose names begin so."""
    return lambda arrays: {n: change(array) if n.startswith(only) else array for n, array in arrays.items()}


HOSTILE_LENSES: Mapping[str, Lenses] = {
    "honest": dict,
    "a scale of nothing": one_array("lens.scale", np.zeros_like),
    "a scale of next to nothing": one_array("lens.scale", lambda array: np.full_like(array, 1e-45)),
    "a scale that reads the last bits": one_array("lens.scale", lambda array: np.full_like(array, 1e-9)),
    "a negative scale": one_array("lens.scale", np.negative),
    "a scale without end": one_array("lens.scale", lambda array: np.full_like(array, 3.4e38)),
    "a centre far off": one_array("lens.centre", lambda array: np.full_like(array, -3.4e38)),
    "far off and next to nothing": lambda arrays: {
        **arrays,
        "lens.centre": np.full_like(arrays["lens.centre"], 3.4e38),
        "lens.scale": np.full_like(arrays["lens.scale"], 1e-45),
    },
    "loud": each_array(lambda array: np.full_like(array, 3.4e38)),
    "weights that overflow": each_array(lambda array: np.copysign(np.float32(3e38), array), "lens.network."),
    "weights of 1e12": each_array(lambda array: array * np.float32(1e12), "lens.network."),
    "nothing": each_array(np.zeros_like),
}
"""Finite, of the right shapes, and made to break the bound on one patient: taken, and harmless."""

BAD_LENSES: Mapping[str, Lenses] = {
    "no scale": lambda arrays: {name: array for name, array in arrays.items() if name != "lens.scale"},
    "one array more": lambda arrays: {**arrays, "lens.more": np.zeros(1, np.float32)},
    "of means only": lambda arrays: {name: array for name, array in arrays.items() if "network" not in name},
    "a class more": one_array("lens.centre", lambda array: np.concatenate([array, array[:1]])),
    "a scale too short": one_array("lens.scale", lambda array: array[:-1]),
    "a huge scale": one_array("lens.scale", lambda array: np.ones(10**7, np.float32)),
    "an empty centre": one_array("lens.centre", lambda array: array[:0]),
    "a scale of NaN": one_array("lens.scale", lambda array: array * np.float32(np.nan)),
    "a centre without end": one_array("lens.centre", lambda array: np.full_like(array, np.inf)),
    "weights of NaN": each_array(lambda array: np.full_like(array, np.nan), "lens.network."),
    "doubles": each_array(lambda array: array.astype(np.float64)),
    "halves": one_array("lens.scale", lambda array: array.astype(np.float16)),
}
"""Refused before they cost anything."""


def bad_lens(change: Lenses) -> Change:
    """Return what asks for a look through a lens that does not decode."""
    return lambda request: replace(request, settings={"look": "learned"}, arrays=change(make_lens()))


WARMUP: Mapping[str, Change] = {
    "share of 0": proposing("warmup", share=0.0),
    "share of 1": proposing("warmup", share=1.0),
    "share below 0": proposing("warmup", share=-0.5),
    "share NaN": proposing("warmup", share=float("nan")),
    "in round 1": asking(round=1),
    "in round -1": asking(round=-1),
    "with weights": asking(arrays={"w": np.zeros(1, np.float32)}),
    "with settings": asking(settings={"d_steps_per_g_step": 1}),
    "without settings": asking(settings={}),
    "with one setting more": asking(settings={"look": "public", "noise_multiplier": 0.0}),
    **{f"look {str(look)[:20]!r}": asking(settings={"look": look}) for look in LOOKS},
    "refinements below 0": proposing("warmup", refinements=-1),
    "refinements without end": proposing("warmup", refinements=10**9),
    "half a refinement": proposing("warmup", refinements=0.5),
    **{f"lens: {name}": bad_lens(change) for name, change in BAD_LENSES.items()},
    "above the policy": proposing("privacy", epsilon=9.0),
    "of classes that were never imported": proposing("image", classes=["opacity", "clear"]),
}
RUN_IDS = (
    *(
        "",
        "a/b",
        "../../x",
        "../../../etc/passwd",
        "/",
        "a.b",
        "A",
        "a b",
        "a\n",
        "\x1b[2J",
        "ü",
        "a" * 65,
        "a" * 10**5,
    ),
    *("*", "[0-9]", "\0", "\ud800", "run-1\0"),
)
D_STEPS = (None, 0, -1, 5001, 10**9, 10**400, 1.0, 2.5, True, "1", "x" * 10**5, float("nan"), [1], [[[]]], {}, {"a": 1})


def _frame(header: Mapping[str, Any] | bytes, tensors: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    listing = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    body = struct.pack("<Q", len(listing)) + listing + data
    return struct.pack("<8sIQ", MAGIC, len(text), len(body)) + text + body


def _lie(**tensor: Any) -> bytes:
    listing = {BIAS: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | tensor}
    return _frame(_HEADER, listing, bytes(4))


_HONEST = train_request()
_HEADER: dict[str, Any] = {
    "kind": "train",
    "run": "run-1",
    "round": 1,
    "proposal": _HONEST.proposal,
    "settings": dict(_HONEST.settings),
}
FRAMES: Mapping[str, bytes] = {
    "round is true": _frame(_HEADER | {"round": True}, {}),
    "round is 1.0": _frame(_HEADER | {"round": 1.0}, {}),
    "round is infinite": _frame(json.dumps(_HEADER).replace('"round": 1,', '"round": 1e999,').encode(), {}),
    "round has 5,000 digits": _frame(
        json.dumps(_HEADER).replace('"round": 1,', f'"round": {"9" * 5000},').encode(), {}
    ),
    "header is deep": _frame(b"[" * 10**6, {}),
    "header is deep in settings": _frame(json.dumps(_HEADER)[:-3].encode() + b"[" * 10**5, {}),
    "header is cut": _frame(json.dumps(_HEADER).encode()[:-1], {}),
    "a key too many": _frame(_HEADER | {"noise_multiplier": 0}, {}),
    "a reply": _frame({"kind": "train", "run": "run-1", "round": 1, "refusal": None, "fields": {}}, {}),
    "tensors that overlap": _frame(
        _HEADER, {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)
    ),
    "a tensor of 2^62": _lie(shape=[2**62, 2**62]),
    "a tensor of a negative side": _lie(shape=[-1]),
    "a tensor beyond its end": _lie(data_offsets=[0, 2**40], shape=[2**38]),
    "a tensor that ends before it starts": _lie(data_offsets=[4, 0]),
    "a tensor with a hole": _lie(data_offsets=[2, 6]),
    "a tensor of another size": _lie(shape=[2]),
    "an unknown dtype": _lie(dtype="PICKLE"),
    "bfloat16": _lie(dtype="BF16", shape=[2]),
    "eight-bit floats": _lie(dtype="F8_E4M3", shape=[4]),
    "tensor header of 2^63 bytes": struct.pack("<8sIQ", MAGIC, 2, 8) + b"{}" + struct.pack("<Q", 2**63),
    "tensor header is deep": _frame(_HEADER, b"[" * 10**5),
    "a body of 2^63": struct.pack("<8sIQ", MAGIC, 2, 2**63) + b"{}",
    "half a frame": pack_request(_HONEST)[:-3],
    "pickle": b"\x80\x04\x95" + b"posix system" * 10,
}
"""Raw bytes that no honest relay sends; none of them decodes."""
