"""Optional scores: what they compute, and what they say when something is missing."""

import os
import socket
import urllib.request

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.metrics import Metric, MetricConfig, MetricUnavailable, _no_network, missing

torch = pytest.importorskip("torch")


def pyiqa_metric(model: str, **options) -> MetricConfig:
    pytest.importorskip("pyiqa", reason="pyiqa is not installed: pip install 'clearshard[iqa]'")
    return MetricConfig(name="score", kind="pyiqa", model=model, device="cpu", **options)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    rng = np.random.default_rng(7)
    smooth = np.kron(rng.integers(0, 256, (12, 16, 3)), np.ones((16, 16, 1)))
    return (0.8 * smooth + rng.uniform(0, 40, smooth.shape)).astype(np.uint8)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A classifier with random weights, 3 labels, and its image processor."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        id2label={0: "safe", 1: "watermark", 2: "unsafe"}, label2id={"safe": 0, "watermark": 1, "unsafe": 2},
        initializer_range=0.5,
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def classifier(folder, label: str = "watermark", **options) -> MetricConfig:
    return MetricConfig(name="score", kind="classifier", model=str(folder), label=label, device="cpu", **options)


def direct_probabilities(folder, image: np.ndarray) -> np.ndarray:
    import transformers
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(**processor(images=Image.fromarray(image), return_tensors="pt")).logits[0]
    return logits.softmax(0).numpy()


def test_piqe_runs_without_weights_and_finds_noise_worse_than_the_picture(picture):
    metric = Metric(pyiqa_metric("piqe"))
    rng = np.random.default_rng(3)
    noisy = np.clip(picture + rng.normal(0, 60, picture.shape), 0, 255).astype(np.uint8)
    assert 0 <= metric(picture) < metric(noisy) <= 100


def test_a_metric_that_needs_weights_names_the_file_and_its_place():
    answer = missing(pyiqa_metric("musiq"))
    if answer is None:
        pytest.skip("the weights of musiq are on this machine")
    assert "musiq_koniq" in answer and "https://" in answer
    assert os.path.join("pyiqa", "musiq_koniq") in answer


def test_a_metric_that_can_run_misses_nothing():
    assert missing(pyiqa_metric("piqe")) is None


def test_a_mistyped_metric_answers_with_near_names():
    assert "piqe" in missing(pyiqa_metric("piqqe"))


def test_a_weights_file_that_is_not_there_is_named():
    assert "no/such/file.pth" in missing(pyiqa_metric("musiq", weights="no/such/file.pth"))


def test_building_a_metric_never_reaches_the_network():
    with _no_network():
        with pytest.raises(RuntimeError, match="example"):
            urllib.request.urlopen("http://weights.example/file.pth")
        with pytest.raises(RuntimeError, match="weights"):
            socket.getaddrinfo("weights.example", 443)


def test_the_network_is_refused_only_while_a_metric_is_built():
    with _no_network():
        pass
    assert socket.getaddrinfo("127.0.0.1", 80)


@pytest.mark.parametrize("label", ["safe", "watermark", "unsafe"])
def test_a_classifier_gives_the_probability_of_its_label(model_folder, picture, label):
    expected = direct_probabilities(model_folder, picture)
    index = ["safe", "watermark", "unsafe"].index(label)
    assert expected.max() - expected.min() > 0.01
    assert Metric(classifier(model_folder, label))(picture) == pytest.approx(expected[index], abs=1e-5)


def test_size_reduces_the_image_before_it_is_scored(model_folder, picture):
    import cv2

    height, width = picture.shape[:2]
    small = cv2.resize(picture, (64, round(height * 64 / width)), interpolation=cv2.INTER_AREA)
    assert Metric(classifier(model_folder, size=64))(picture) == Metric(classifier(model_folder))(small)


def test_an_unknown_label_answers_with_near_names(model_folder):
    with pytest.raises(MetricUnavailable, match="no label 'watermarks'; nearest: watermark"):
        Metric(classifier(model_folder, "watermarks"))


def test_a_model_that_is_not_here_is_asked_for_and_not_downloaded():
    answer = missing(classifier("nobody/no-such-classifier"))
    assert "nobody/no-such-classifier" in answer and "hf download" in answer


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_metric_without_gpu_says_so(model_folder):
    config = classifier(model_folder).model_copy(update={"device": "cuda"})
    assert "no GPU" in missing(config)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"kind": "classifier", "model": "folder"}, "needs `label`"),
        ({"kind": "pyiqa", "model": "piqe", "label": "safe"}, "label"),
        ({"kind": "classifier", "model": "folder", "label": "a", "weights": "b"}, "weights"),
        ({"kind": "pyiqa", "model": "piqe", "sise": 512}, "sise"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(options, complaint):
    with pytest.raises(ValidationError, match=complaint):
        MetricConfig(name="score", **options)
