"""Derived tensors used from several streams; streams, events and tensors only take notes."""

from types import SimpleNamespace

import pytest
import torch

from pyrobust.ops import _cuda_streams as streams


class Stream:
    def __init__(self, device, handle):
        self.device, self.cuda_stream = device, handle


class Event:
    def record(self, stream):
        self.recorded = stream

    def wait(self, stream):
        waits.append((self.recorded.cuda_stream, stream.cuda_stream))


class Kept:
    def __init__(self, device):
        self.device, self.is_cuda, self.used = device, True, []

    def record_stream(self, stream):
        self.used.append(stream.cuda_stream)


waits: list[tuple[int, int]] = []


@pytest.fixture
def card(monkeypatch):
    """Two devices; the current one is 0."""
    waits.clear()
    now = SimpleNamespace(streams={0: Stream(0, 10), 1: Stream(1, 20)}, capturing=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=0: now.streams[device])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    return now


@pytest.mark.parametrize("device", [0, 1])
def test_other_streams_of_the_device_wait_once_and_are_noted(card, device):
    tensor = Kept(device)
    made = streams.made_now(tensor)
    first = card.streams[device].cuda_stream
    made.wait([tensor, None])
    assert not waits
    card.streams[device] = Stream(device, first + 1)
    for _ in range(2):
        made.wait([tensor, None])
    assert waits == [(first, first + 1)]
    assert tensor.used == [first + 1]
    card.streams[device] = Stream(device, first)
    made.wait([tensor])
    assert len(waits) == 1


def test_nothing_waits_within_a_capture_or_on_a_cpu(card):
    tensor = Kept(0)
    made = streams.made_now(tensor)
    card.capturing = True
    card.streams[0] = Stream(0, 11)
    made.wait([tensor])
    assert not waits
    assert streams.made_now(tensor) is None
    assert streams.made_now(torch.zeros(1)) is None
    card.capturing = False
    made.wait([tensor])  # not forgotten for it
    assert waits == [(10, 11)]
