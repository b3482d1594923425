"""The fast engine against autograd on one image at a time, for layers and shapes beyond the registered networks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client.dp.contributions import Formed, Product
from client.dp.fast import FastEngine
from client.dp.packing import Chunk
from common.errors import ConfigError

SIZE = 8


def rng(seed):
    return torch.Generator().manual_seed(seed)


class Labelled(nn.Module):
    """Give a sequence of layers the signature of a discriminator; the label moves the logit."""

    def __init__(self, *layers, classes=3):
        super().__init__()
        self.body, self.label = nn.Sequential(*layers), nn.Embedding(classes, 1)

    def forward(self, images, labels):
        return self.body(images).flatten(1).mean(1) + self.label(labels).squeeze(1)


def filled(model, seed):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng(seed)) * 0.5)
    return model


def softplus(logits):
    return F.softplus(-logits)


def by_autograd(model, images, labels, weights, slots):
    """Return every patient's gradient as one row, parameters in order."""
    parameters, rows = list(model.parameters()), []
    for image, label, weight in zip(images, labels, weights, strict=True):
        loss = weight * softplus(model(image[None], label[None])).sum()
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]).double())
    return torch.stack(rows).view(len(images) // slots, slots, -1).sum(1)


def by_engine(model, images, labels, weights, slots):
    """Return the same by the engine, from whichever form it gives, and the norms it states."""
    engine = FastEngine(model, len(images))
    parts, last = engine.contributions(softplus, Chunk(images, labels, weights, slots))
    patients = len(images) // slots
    numbers = sum(parameter.numel() for parameter in model.parameters())
    rows, squared = torch.zeros(patients, numbers, dtype=torch.float64), torch.zeros(patients, dtype=torch.float64)
    for part in parts:
        squared += part.squared_norms()
        for patient in range(patients):
            one = torch.zeros(patients, dtype=torch.float64)
            one[patient] = 1.0
            part.add_clipped(rows[patient], one)
    for some, part in last.few() if last else []:
        squared[some] += part.squared_norms()
        rows[some, part.start : part.start + part.values.shape[1]] += part.values
    in_order = [torch.cat([cut.flatten() for cut in engine.by_parameter(row)]) for row in rows]
    return torch.stack(in_order), squared.sqrt(), [*parts, *([last] if last else [])]


def assert_equal_to_autograd(model, rows=4, slots=1, channels=1, seed=0, size=SIZE):
    images = torch.randn(rows, channels, size, size, generator=rng(seed))
    labels = torch.randint(3, (rows,), generator=rng(seed))
    weights = torch.full((rows,), 1 / slots)
    weights[-1] = 0.0  # a blank row
    expected = by_autograd(model, images, labels, weights, slots)
    actual, norms, forms = by_engine(model, images, labels, weights, slots)
    longest = expected.norm(dim=1).max()
    assert (actual - expected).norm(dim=1).max() <= 1e-5 * longest
    torch.testing.assert_close(norms, expected.norm(dim=1), rtol=1e-5, atol=1e-5 * longest.item())
    return forms


CONVOLUTION = {
    "channels": st.integers(1, 3),
    "out": st.integers(1, 5),
    "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
    "bias": st.booleans(),
    "slots": st.sampled_from([1, 2, 4]),
    "seed": st.integers(0, 100),
}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(dilation=st.integers(1, 2), **CONVOLUTION)
def test_convolutions_of_any_shape(channels, out, kernel, stride, padding, dilation, bias, slots, seed):
    layer = nn.Conv2d(channels, out, kernel, stride, padding, dilation, bias=bias)
    assert_equal_to_autograd(filled(Labelled(layer, nn.LeakyReLU(0.2)), seed), 8, slots, channels, seed)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(dilation=st.integers(1, 2), **CONVOLUTION)
def test_transposed_convolutions_of_any_shape(channels, out, kernel, stride, padding, dilation, bias, slots, seed):
    padding = tuple(min(pad, dilation * (side - 1)) for pad, side in zip(padding, kernel, strict=True))
    layer = nn.ConvTranspose2d(channels, out, kernel, stride, padding, bias=bias, dilation=dilation)
    assert_equal_to_autograd(filled(Labelled(layer, nn.LeakyReLU(0.2)), seed), 8, slots, channels, seed)


def test_transposed_convolution_with_output_padding():
    layer = nn.ConvTranspose2d(1, 3, 3, stride=2, padding=1, output_padding=1)
    assert_equal_to_autograd(filled(Labelled(layer, nn.Tanh()), 0))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    groups=st.sampled_from([1, 2, 4]),
    affine=st.booleans(),
    width=st.sampled_from([4, 8]),
    slots=st.sampled_from([1, 2]),
    seed=st.integers(0, 100),
)
def test_norms_of_any_shape(groups, affine, width, slots, seed):
    model = Labelled(
        nn.Conv2d(1, width, 3, padding=1),
        nn.GroupNorm(groups, width, affine=affine),
        nn.LeakyReLU(0.2),
        nn.LayerNorm([SIZE, SIZE], elementwise_affine=affine),
        nn.Linear(SIZE, 16),
        nn.LayerNorm(16, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(width * SIZE * 16, 2),
        nn.Tanh(),
    )
    assert_equal_to_autograd(filled(model, seed), 4, slots, seed=seed)


def test_both_forms_of_a_large_matrix():
    """One position: the factors are cheaper. Many: the matrix is."""
    few = Labelled(nn.Flatten(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 50), nn.Tanh())
    assert Product in map(type, assert_equal_to_autograd(filled(few, 0), 4))
    many = Labelled(nn.Conv2d(1, 20, 3, padding=1), nn.Tanh(), nn.Conv2d(20, 21, 2), nn.Tanh(), nn.Conv2d(21, 22, 2))
    forms = assert_equal_to_autograd(filled(many, 0), 4, 2)
    assert Formed in [type(part) for part in forms[1:]]
    assert type(forms[-1]).__name__ == "Unformed"


def test_norms_of_a_product_whose_positions_cancel_are_never_too_short():
    outputs, inputs = torch.tensor([[[1.0], [-1.0]]]), torch.tensor([[[1e9], [1e9 + 64]]])
    product = Product(outputs.double(), inputs.double(), 0)
    assert product.squared_norms().sqrt().item() >= 64
    lost = Product(torch.tensor([[[1.0], [-1.0]]]).double(), torch.full((1, 2, 1), 1e9).double(), 0)
    assert lost.squared_norms().sqrt().item() == pytest.approx(2e9 * 2.0**-20)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(4, 1)

    def forward(self, images, labels):
        return self.last(images) * self.scale


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Shared(Labelled):
    def forward(self, images, labels):
        return self.body(self.body(images)).flatten(1).mean(1) + self.label(labels).squeeze(1)


class Writing(Labelled):
    def forward(self, images, labels):
        hidden = self.body[0](images)
        out = self.body[1](hidden)
        with torch.no_grad():
            hidden.detach().add_(1.0)
        return out.flatten(1).mean(1) + self.label(labels).squeeze(1)


REFUSED = {
    "BatchNorm2d": Labelled(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
    "InstanceNorm2d": Labelled(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2)),
    "Dropout": Labelled(nn.Dropout()),
    "Conv1d": Labelled(nn.Conv1d(1, 2, 3)),
    "groups=2": Labelled(nn.Conv2d(2, 2, 3, groups=2)),
    "padding=same": Labelled(nn.Conv2d(1, 2, 3, padding="same")),
    "padding_mode=reflect": Labelled(nn.Conv2d(1, 2, 3, padding_mode="reflect")),
    "inplace=True": Labelled(nn.LeakyReLU(0.2, inplace=True)),
    "Doubled": Labelled(Doubled(3, 3)),
    "the whole": Mixed(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what):
    with pytest.raises(ConfigError, match=what):
        FastEngine(REFUSED[what], 4)


@pytest.mark.parametrize(("kind", "message"), [(Shared, "used once"), (Writing, "inplace operation")])
def test_a_layer_used_twice_or_written_over_stops_the_step(kind, message):
    model = kind(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1))
    with pytest.raises(RuntimeError, match=message):
        assert_equal_to_autograd(model)


def test_a_layer_left_out_stops_the_step():
    class Half(Labelled):
        def forward(self, images, labels):
            return self.body(images).flatten(1).mean(1)

    with pytest.raises(RuntimeError, match="used once"):
        by_engine(Half(nn.Conv2d(1, 1, 3)), torch.ones(2, 1, 4, 4), torch.zeros(2).long(), torch.ones(2), 1)
