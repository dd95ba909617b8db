from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from bidensify.train import evaluate


def test_metrics_are_those_of_all_samples_whatever_the_batches(tiny: ModuleType) -> None:
    model, data = tiny.network(), tiny.Colours(7, seed=1)
    results = [evaluate(model, tiny.TASK, data, batch_size=size) for size in (1, 3, 7)]
    assert results[0] == results[1] == results[2]
    model.eval()
    right = total = 0
    with torch.no_grad():
        for i in range(7):
            prediction = model(data[i]["image"][None]).argmax(1)[0].numpy()
            mask = data[i]["mask"].numpy()
            right += int(np.sum((prediction == mask) & (mask != 255)))
            total += int(np.sum(mask != 255))
    assert abs(results[0]["pixel_accuracy"] - right / total) < 1e-9


def test_flags_return_and_batches_are_reported(tiny: ModuleType) -> None:
    model, seen = tiny.network(), []
    model.train()
    model[1].eval()
    evaluate(model, tiny.TASK, tiny.Colours(5, seed=1), batch_size=2, on_batch=lambda *a: seen.append(a))
    assert model.training
    assert not model[1].training
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_worker_processes_and_bf16(tiny: ModuleType) -> None:
    model, data = tiny.network(), tiny.Colours(6, seed=1)
    plain = evaluate(model, tiny.TASK, data)
    assert evaluate(model, tiny.TASK, data, workers=2) == plain
    half = evaluate(model, tiny.TASK, data, precision="bf16", channels_last=True)
    assert abs(half["pixel_accuracy"] - plain["pixel_accuracy"]) < 0.02
