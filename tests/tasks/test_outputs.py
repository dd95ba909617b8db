"""What models return: tensors, dicts, ModelOutputs, lists of heads; and the errors for what is none of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from bidensify.errors import ConfigError
from bidensify.tasks import SegmentationTask
from bidensify.tasks.outputs import auxiliary_outputs, raw_output

MAIN, OTHER = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)


@pytest.mark.parametrize(
    ("output", "heads"),
    [
        (MAIN, 0),
        ({"out": MAIN}, 0),
        ({"out": MAIN, "aux": OTHER}, 1),
        ({"logits": MAIN, "aux_logits": OTHER, "loss": None}, 1),
        (SimpleNamespace(logits=MAIN, auxiliary_logits=OTHER), 1),
        ([MAIN, OTHER, OTHER], 2),
        ((MAIN,), 0),
        ({"predicted_depth": MAIN[:, 0]}, 0),
    ],
)
def test_prediction_and_heads(output: object, heads: int) -> None:
    wanted = MAIN[:, :1] if isinstance(output, dict) and "predicted_depth" in output else MAIN
    assert torch.equal(raw_output(output), wanted)
    assert [head.shape for head in auxiliary_outputs(output)] == [OTHER.shape] * heads


def test_transformers_outputs() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    assert torch.equal(raw_output(outputs.SemanticSegmenterOutput(logits=MAIN)), MAIN)
    assert torch.equal(raw_output(outputs.DepthEstimatorOutput(predicted_depth=MAIN[:, 0])), MAIN[:, :1])


def test_the_loss_of_every_head_counts() -> None:
    mask = torch.randint(0, 3, (2, 8, 8))
    task = SegmentationTask(3, aux_weight=0.25)
    parts = [task.loss(value, {"mask": mask}).item() for value in (MAIN, OTHER)]
    assert task.loss([MAIN, OTHER, OTHER], {"mask": mask}).item() == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-6)
    assert task.loss((MAIN, OTHER), {"mask": mask}).item() == pytest.approx(parts[0] + 0.25 * parts[1], rel=1e-6)


@pytest.mark.parametrize(
    ("output", "quoted"),
    [
        ("text", "returned str"),
        ({"boxes": MAIN}, r"dict with the keys \['boxes'\].*logits, predicted_depth, out"),
        ([], r"a list of \[\]"),
        ([MAIN, torch.zeros(2, 5)], r"list of \[\(2, 3, 4, 4\), \(2, 5\)\]; a list may hold.*Wrap the model"),
        ((MAIN, MAIN[:, :2]), "the same N and C"),
        ((MAIN, None), "NoneType"),
        (MAIN.long(), "type torch.int64"),
        (MAIN[0, 0], r"shape \(4, 4\)"),
        (
            {"class_queries_logits": torch.zeros(1, 5, 4), "masks_queries_logits": torch.zeros(1, 5, 8, 8)},
            "scores of queries, not of pixels.*einsum",
        ),
    ],
)
def test_what_is_no_dense_prediction(output: object, quoted: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){quoted}"):
        raw_output(output)


def test_the_proposed_wrapper_of_query_models_gives_their_own_map() -> None:
    """What the error proposes is transformers' post_process_semantic_segmentation."""
    output = {"class_queries_logits": torch.randn(1, 5, 4), "masks_queries_logits": torch.randn(1, 5, 8, 8)}
    with pytest.raises(ConfigError) as caught:
        raw_output(output)
    text = str(caught.value)
    scores = eval(text[text.index("torch.einsum") :], {"torch": torch, **output})
    masks, classes = output["masks_queries_logits"].sigmoid(), output["class_queries_logits"].softmax(-1)[..., :-1]
    wanted = (masks[:, :, None] * classes[..., None, None]).sum(1).argmax(1)
    assert torch.equal(SegmentationTask(3).predict(scores), wanted)


def test_miou_equals_torchmetrics() -> None:
    torch.manual_seed(0)
    task = SegmentationTask(6, ignore_index=9)
    metrics, jaccard = task.metrics(), MulticlassJaccardIndex(6, ignore_index=9)
    for _ in range(3):
        logits, mask = torch.randn(2, 6, 5, 5), torch.randint(0, 5, (2, 5, 5))
        logits[:, 5] = -9  # a class that is nowhere
        mask[torch.rand(mask.shape) < 0.2] = 9
        metrics.update(logits, {"mask": mask})
        jaccard.update(logits, mask)
    assert metrics.compute()["miou"] == pytest.approx(float(jaccard.compute()), abs=1e-6)
