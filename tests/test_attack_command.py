"""`gradless attack`, as a user runs it: on a Python callable, a quantized module, an ONNX file, an address."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

from gradless.cli import main

PIXELS, CLASSES = 3 * 6 * 6, 4


@pytest.fixture
def weight():
    return torch.randn(CLASSES, PIXELS, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def images(tmp_path, weight):
    """A .npz of bytes and right labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 3, 6, 6), dtype=np.uint8)
    labels = (torch.from_numpy(pixels).flatten(1).float() / 255 @ weight.T).argmax(1).numpy()
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    return tmp_path / "images.npz"


@pytest.fixture
def module(tmp_path, weight, monkeypatch):
    """Makes a module of Python with a given text behind a model's weights; its name."""
    np.save(tmp_path / "weight.npy", weight.numpy())
    monkeypatch.chdir(tmp_path)
    made = []

    def make(text: str) -> str:
        name = f"victim_{len(made)}_{tmp_path.name.replace('-', '_')}"
        made.append(name)
        (tmp_path / f"{name}.py").write_text(
            f"import numpy as np, torch\nfrom torch import nn\nweight = np.load('weight.npy')\n{text}"
        )
        return name

    return make


def attack(model: str, images, output, *more: str) -> int:
    return main(["attack", "--model", model, "--images", str(images), "--eps", "60/255", "--output", str(output), *more])


def check(output, images, weight) -> dict:
    summary = json.loads((output / "summary.json").read_text())
    with np.load(output / "result.npz") as result, np.load(images) as given:
        after = (torch.from_numpy(result["images"]).flatten(1) @ weight.T).argmax(1).numpy()
        assert np.array_equal(after != given["labels"], result["success"])
        assert np.array_equal(after[result["success"]], result["classes"][result["success"]])
        assert np.abs(result["images"] - given["images"] / 255).max() <= 60 / 255 + 1e-6
        assert summary["total_queries"] == result["queries"].sum()
    assert summary["failure_rate"] < 1
    return summary


PREDICT = "def predict(batch):\n    return batch.numpy().reshape(len(batch), -1) @ weight.T\n"


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--directions", "random", "--bits", "4"],
        ["--labels-only"],
        ["--method", "signhunter", "--pixel-bits", "8"],
        ["--method", "zo_signsgd", "--bits", "8"],
    ],
    ids=lambda more: "-".join(more) or "default",
)
def test_a_python_callable(tmp_path, module, images, weight, capsys, more):
    name = module(PREDICT)
    assert attack(f"{name}:predict", images, tmp_path / "run", "--max-queries", "2000", *more) == 0
    assert "images have an adversarial twin, found in" in capsys.readouterr().out
    summary = check(tmp_path / "run", images, weight)
    assert summary["model"] == f"{name}:predict"
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<figure>") == 9
    assert "Success against the budget" in page


def test_a_module_that_torch_quantized(tmp_path, module, images, capsys):
    text = (
        "net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4, bias=False))\n"
        "net[1].weight.data = torch.from_numpy(weight)\n"
        "net = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)\n"
    )
    assert attack(f"{module(text)}:net", images, tmp_path / "run", "--max-queries", "300", "--json") == 0
    assert json.loads(capsys.readouterr().out)["failure_rate"] < 0.5


def test_an_onnx_file(tmp_path, images, weight, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    held = onnx.numpy_helper.from_array(weight.T.contiguous().numpy(), "weight")
    nodes = [onnx.helper.make_node("Flatten", ["x"], ["flat"]), onnx.helper.make_node("MatMul", ["flat", "weight"], ["y"])]
    floats = onnx.TensorProto.FLOAT
    x, y = (
        onnx.helper.make_tensor_value_info(*info) for info in (("x", floats, ["n", 3, 6, 6]), ("y", floats, ["n", CLASSES]))
    )
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "net", [x], [y], [held]), opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.save(model, tmp_path / "net.onnx")
    assert attack(str(tmp_path / "net.onnx"), images, tmp_path / "run", "--max-queries", "200") == 0
    check(tmp_path / "run", images, weight)
    assert attack(str(tmp_path / "none.onnx"), images, tmp_path / "none") == 1
    assert "there is no such file" in capsys.readouterr().err


@pytest.fixture
def server(weight):
    """A model behind HTTP that is busy at every fifth request and breaks for good after so many images."""

    class Handler(BaseHTTPRequestHandler):
        asked, requests, most = 0, 0, 10**9

        def do_POST(self):
            Handler.requests += 1
            batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["images"]
            status = 429 if Handler.requests % 5 == 0 else 500 if Handler.asked >= Handler.most else 200
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            if status == 200:
                Handler.asked += len(batch)
                scores = torch.tensor(batch).flatten(1) @ weight.T
                self.wfile.write(json.dumps({"scores": scores.tolist()}).encode())

        def log_message(self, *_):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/", Handler
    running.shutdown()


def test_an_address_that_breaks_half_way_is_resumed(tmp_path, server, images, weight, capsys):
    address, handler = server
    handler.most = 40
    limits = ["--max-queries", "60", "--batch-size", "4"]
    assert attack(address, images, tmp_path / "run", *limits) == 1
    assert "answered 500" in capsys.readouterr().err
    assert attack(address, images, tmp_path / "run", *limits) == 1
    assert "give --resume to go on with it" in capsys.readouterr().err
    handler.most = 10**9
    assert attack(address, images, tmp_path / "run", *limits, "--resume", "--max-total-queries", "60") == 0
    assert handler.asked == 60
    assert attack(address, images, tmp_path / "run", *limits, "--resume") == 0
    assert check(tmp_path / "run", images, weight)["total_queries"] == handler.asked
    assert attack(address, images, tmp_path / "run", *limits, "--resume", "--seed", "3") == 1
    assert "seed is 0, not 3" in capsys.readouterr().err


def test_an_endpoint_keeps_below_its_rate(server):
    import time

    from gradless.attacks.models import Endpoint

    endpoint, began = Endpoint(server[0], rate=50.0), time.monotonic()
    for _ in range(3):
        endpoint(torch.zeros(5, 3, 6, 6))
    assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize(
    ("text", "attribute", "says"),
    [
        (
            "def predict(batch):\n    raise RuntimeError('out of cheese')",
            "predict",
            "the model failed .RuntimeError: out of cheese",
        ),
        (PREDICT, "other", "has no attribute 'other'"),
        ("predict = 3", "predict", "is int, nothing that can be called"),
        (PREDICT, "", "give module:attribute"),
    ],
)
def test_models_that_cannot_be(tmp_path, module, images, capsys, text, attribute, says):
    import re

    assert attack(f"{module(text)}:{attribute}".rstrip(":"), images, tmp_path / "run") == 1
    assert re.search(says, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--method", "signhunter", "--bits", "8"], "signhunter has no grid"),
        (["--method", "zo_signsgd", "--directions", "random"], "directions are zoqo's choice"),
        (["--labels-only", "--method", "signhunter"], "labels_only is for zoqo"),
        (["--resume"], "holds no attack to resume"),
        (["--resume", "--overwrite"], "contradict each other"),
        (["--max-queries", "1"], "one step takes 2"),
        (["--bits", "0"], "bits is 0"),
        (["--rate", "0"], "rate is 0"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_options_that_contradict(tmp_path, module, images, capsys, more, says):
    assert attack(f"{module(PREDICT)}:predict", images, tmp_path / "run", *more) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--max-queries", "1"], ["--bits", "9"], ["--model", "no_such_module:predict"]])
def test_what_cannot_begin_replaces_nothing(tmp_path, module, images, more):
    name, run = module(PREDICT), tmp_path / "run"
    assert attack(f"{name}:predict", images, run, "--max-queries", "50") == 0
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert attack(f"{name}:predict", images, run, "--overwrite", *more) == 1
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert attack(f"{name}:predict", images, tmp_path / "new", *more) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "text", ["def predict(batch):\n    raise OSError\n", "def predict(batch):\n    return batch[:, 0, 0, 0]\n"]
)
def test_a_model_that_does_not_answer_replaces_nothing(tmp_path, module, images, text):
    run = tmp_path / "run"
    assert attack(f"{module(PREDICT)}:predict", images, run, "--max-queries", "50") == 0
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert attack(f"{module(text)}:predict", images, run, "--overwrite") == 1
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert attack(f"{module(PREDICT)}:predict", images, run, "--overwrite", "--max-queries", "40") == 0
    assert {path.name for path in run.iterdir()} == before.keys()


def test_an_output_that_is_a_file(tmp_path, module, images, capsys):
    (tmp_path / "run").write_text("")
    assert attack(f"{module(PREDICT)}:predict", images, tmp_path / "run") == 1
    assert "is a file; give --output a folder" in capsys.readouterr().err


def test_an_eps_that_is_no_quotient(tmp_path, images, capsys):
    with pytest.raises(SystemExit):
        attack("m:predict", images, tmp_path / "run", "--eps", "1/0")
    assert "argument --eps: invalid fraction value: '1/0'" in capsys.readouterr().err


def test_images_that_cannot_be(tmp_path, module, capsys):
    np.savez(tmp_path / "one.npz", images=np.zeros((2, 3)))
    (tmp_path / "two.npz").write_text("no archive")
    np.savez(tmp_path / "four.npz", images=np.array(["a", "b"]), labels=np.zeros(2, int))
    whole = tmp_path / "whole.npz"
    np.savez(whole, images=np.zeros((2, 3)), labels=np.zeros(2, int))
    (tmp_path / "five.npz").write_bytes(whole.read_bytes()[:-40])
    (tmp_path / "six.npz").write_bytes(b"")
    for name in ("one", "two", "three", "four", "five", "six"):
        assert attack(f"{module(PREDICT)}:predict", tmp_path / f"{name}.npz", tmp_path / "run") == 1
        assert "is no .npz with arrays" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_in_a_browser(tmp_path, module, images):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    assert attack(f"{module(PREDICT)}:predict", images, tmp_path / "run", "--max-queries", "100") == 0
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--window-size=1000,1600"]
    page, picture = (tmp_path / "run" / "report.html").as_uri(), tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page], check=True, capture_output=True, timeout=120)
    from PIL import Image

    shown = np.asarray(Image.open(picture).convert("L"))
    assert shown.shape == (1600, 1000)
    assert shown.std() > 5, "the page is not blank"
    dom = subprocess.run([*command, "--dump-dom", page], check=True, capture_output=True, timeout=120, text=True).stdout
    assert dom.count("<figure>") == 9
    assert "have an adversarial twin" in dom
