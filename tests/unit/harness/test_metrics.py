import math

import pytest
import torch
import torch.nn.functional as F

from harness.metrics import Stopwatch, evaluate, score_sums, scores
from harness.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"), "none", "process")


def test_scores_against_a_count_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 10, generator=generator), torch.randint(10, (50,), generator=generator)
    top1 = top5 = loss = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(10), key=lambda c: -row[c])
        top1 += order[0] == label
        top5 += label in order[:5]
        loss -= row[label] - math.log(sum(math.exp(v) for v in row))
    found = scores(score_sums(logits, labels))
    assert (found.top1, found.top5, found.count) == (100 * top1 / 50, 100 * top5 / 50, 50)
    assert found.loss == pytest.approx(loss / 50, rel=1e-6)


def test_ties_go_to_the_lower_class_and_the_infinite_is_wrong():
    tie = torch.zeros(1, 3)
    assert score_sums(tie, torch.tensor([0]))[1] == 1
    assert score_sums(tie, torch.tensor([1]))[1] == 0
    for bad in [math.nan, math.inf]:
        sums = score_sums(torch.tensor([[bad, 0.0, 0.0]]), torch.tensor([0]))
        assert sums[1:3].tolist() == [0, 0]


def test_fewer_than_five_classes_are_all_within_the_top_five():
    assert score_sums(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))[2] == 4


def test_evaluation_does_not_depend_on_how_images_are_batched():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 6))
    net(torch.randn(8, 3, 2, 2))
    images, labels = torch.randn(23, 3, 2, 2), torch.randint(6, (23,))
    whole = evaluate(net, [(images, labels)], ALONE)
    parts = evaluate(net, zip(images.split(5), labels.split(5), strict=True), ALONE)
    assert (whole.top1, whole.top5, whole.count) == (parts.top1, parts.top5, parts.count)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-6)
    assert not net.training


def test_flip_augmentation_averages_the_logits_of_both_views():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6))
    images, labels = torch.randn(9, 3, 2, 2), torch.randint(6, (9,))
    mirrored = images[..., [1, 0]]
    expected = F.cross_entropy((net(images) + net(mirrored)) / 2, labels).item()
    assert evaluate(net, [(images, labels)], ALONE, flip_tta=True).loss == pytest.approx(expected, rel=1e-5)


def test_stopwatch_counts_images_steps_and_waiting():
    watch = Stopwatch()
    watch.step(32, 0.0)
    watch.step(32, 1e9)
    report = watch.report(torch.device("cpu"))
    assert report["speed/data_wait_share"] == 1.0
    assert report["speed/images_per_s"] == pytest.approx(64 / (2 * report["speed/step_s"]))
    assert report["speed/peak_rss_bytes"] > 1e6
