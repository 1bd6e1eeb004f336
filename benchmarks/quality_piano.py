"""Transkun, a transformer that transcribes piano music: which notes were played, and when?

The music is random, so that the right answer is known, and played by the sampled piano of a SoundFont: 16 seconds, as
long as the model's window.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from quality_cases import Case, Output, Task, folder
from quality_metrics import note_f1
from torch import nn

SECONDS = 16
TOLERANCE = 0.05  # seconds by which an onset may be wrong, as is usual for transcriptions
# Needed by Transkun's files, but not for a forward pass: for MIDI files, for scores, and for mel filters, which are
# part of the checkpoint.
UNUSED = ("pretty_midi", "mir_eval", "torchaudio")


@contextlib.contextmanager
def stand_ins(names: tuple[str, ...] = UNUSED) -> Iterator[None]:
    """Empty modules under these names, as long as a model is made."""
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        module: Any = ModuleType(name)
        module.functional = SimpleNamespace(melscale_fbanks=lambda n_freqs, n_mels, **_: torch.zeros(n_freqs, n_mels))
        sys.modules[name] = module
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def music(seed: int = 0, seconds: float = SECONDS) -> list[tuple[int, float, float, int]]:
    """Random notes: pitch, onset, end, velocity. No pitch is struck again before it has ended."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    notes: list[tuple[int, float, float, int]] = []
    free: dict[int, float] = {}
    onset = 0.3
    while onset < seconds - 1:
        for _ in range(draw(1, 6)):
            pitch, length = draw(36, 97), draw(10, 90) / 100
            if free.get(pitch, 0) < onset:
                notes.append((pitch, onset, onset + length, draw(30, 110)))
                free[pitch] = onset + length + 0.1
        onset += draw(8, 40) / 100
    return notes


def played(notes: list[tuple[int, float, float, int]], font: Path, rate: int, seconds: float = SECONDS) -> torch.Tensor:
    """The sound ``[2, samples]`` of notes, by the first instrument of a SoundFont."""
    import tinysoundfont

    synth = tinysoundfont.Synth(samplerate=rate, gain=-6)
    synth.program_select(0, synth.sfload(str(font)), 0, 0)
    events = [(onset, pitch, velocity) for pitch, onset, _, velocity in notes]
    events += [(end, pitch, 0) for pitch, _, end, _ in notes]
    sound, done = [], 0
    for time, pitch, velocity in [*sorted(events), (seconds, 0, 0)]:
        samples = int(time * rate) - done
        if samples:
            sound.append(torch.frombuffer(bytearray(synth.generate(samples)), dtype=torch.float32).view(-1, 2))
            done += samples
        if velocity:
            synth.noteon(0, pitch, velocity)
        else:
            synth.noteoff(0, pitch)
    return torch.cat(sound).T.contiguous()


class Transcriber(nn.Module):
    """Transkun as a module that is called with frames and gives its features and the scores of all intervals."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, Any]:
        intervals, features = self.network.processFramesBatch(frames)
        return features, intervals


def load() -> Task:
    with stand_ins():
        from transkun.ModelTransformer import Config, TransKun, makeFrame

        files = folder("transkun") / "pretrained"
        config = Config()
        vars(config).update(json.loads((files / "2.0.conf").read_text())["Model"]["config"])
        network = TransKun(config).eval()
    state = torch.load(files / "2.0.pt", weights_only=True, map_location="cpu")["state_dict"]
    network.load_state_dict(state)
    notes = music()
    sound = played(notes, folder("pretty_midi") / "TimGM6mb.sf2", network.fs)
    frames = makeFrame(sound, network.hopSize, network.windowSize)[None]
    seconds = network.hopSize / network.fs
    truth = [(pitch, onset) for pitch, onset, _, _ in notes]

    def run(model: nn.Module) -> Output:
        features, intervals = model(frames)
        paths = zip(network.targetMIDIPitch, intervals.decode(), strict=True)  # pedals have negative pitches
        found = [(pitch, begin * seconds) for pitch, path in paths if pitch > 0 for begin, _ in path]
        return Output(values=features[0], answer=found)

    def measures(found: Output, dense: Output) -> dict[str, float]:
        return {
            "notes F1": note_f1(found.answer, truth, TOLERANCE),
            "F1 to dense": note_f1(found.answer, dense.answer, TOLERANCE),
            "notes": float(len(found.answer)),
        }

    return Task(model=Transcriber(network).eval(), run=run, measures=measures)


CASE = Case(
    name="Transkun",
    kind="piano transcription",
    packages={
        "transkun": "transkun==2.0.1",
        "tinysoundfont": "tinysoundfont",
        "pretty_midi": "pretty_midi",
        "scipy": "scipy",
    },
    license="MIT",
    score="notes F1",
    agreement="F1 to dense",
    load=load,
    dense=("*posEmbed*",),
    why="their outputs are phases, and what a cosine makes of them is wrong if they are off by a radian",
)
