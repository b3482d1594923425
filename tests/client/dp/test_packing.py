"""Chunks: every image once, patients whole, shapes fixed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.dp.packing import Batch, pack

ROWS = 8


def numbered(counts, order_seed=0):
    """Make a batch in which an image's value says which image it is, and shuffle it."""
    patients = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.int64))
    images = torch.arange(1.0, len(patients) + 1)[:, None, None, None].expand(-1, 1, 2, 2)
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(order_seed))
    return Batch(images[order], (torch.arange(len(patients)) % 5)[order], patients[order], len(counts))


@settings(deadline=None, derandomize=True, max_examples=100)
@given(counts=st.lists(st.integers(0, 3 * ROWS), max_size=8), seed=st.integers(0, 50))
def test_every_image_is_in_one_chunk_with_its_patients_weight(counts, seed):
    batch, seen = numbered(counts, seed), {}
    patient_of = {
        int(image[0, 0, 0]): int(patient) for image, patient in zip(batch.images, batch.patients, strict=True)
    }
    for chunks in pack(batch, ROWS):
        assert len(chunks) == 1 or all(chunk.slots == ROWS for chunk in chunks)
        for chunk in chunks:
            assert chunk.images.shape == (ROWS, 1, 2, 2)
            assert (chunk.labels.shape, chunk.weights.shape) == ((ROWS,), (ROWS,))
            assert ROWS % chunk.slots == 0
            names = [int(image[0, 0, 0]) for image in chunk.images]
            assert [name > 0 for name in names] == (chunk.weights > 0).tolist()
            for start in range(0, ROWS, chunk.slots):
                owners = {patient_of[name] for name in names[start : start + chunk.slots] if name}
                assert len(owners) <= 1
            for name, weight, label in zip(names, chunk.weights.tolist(), chunk.labels.tolist(), strict=True):
                if name:
                    assert name not in seen
                    seen[name] = weight
                    assert label == (name - 1) % 5
    assert seen.keys() == patient_of.keys()
    for name, weight in seen.items():
        assert abs(weight - 1 / counts[patient_of[name]]) < 1e-6


def test_few_chunks_for_many_patients_of_one_image():
    assert len(list(pack(numbered([1] * 20), ROWS))) == 3


def test_a_large_patient_has_chunks_of_its_own():
    assert [len(chunks) for chunks in pack(numbered([2 * ROWS + 1, 1]), ROWS)] == [1, 3]


def test_nobody_gives_no_chunk():
    assert list(pack(numbered([]), ROWS)) == []
    assert list(pack(numbered([0, 0]), ROWS)) == []
