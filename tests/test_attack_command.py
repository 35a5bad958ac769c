"""`gradless attack`, as a user runs it: on a Python callable, a quantized module, an ONNX file, an address."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
import torch

from gradless.attacks.endpoint import Endpoint
from gradless.cli import main
from gradless.errors import GradlessError

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
        ("predict = 3", "predict", "is int; it must be callable"),
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


NOISY = "generator = torch.Generator().manual_seed(0)\n" + PREDICT.replace("weight.T\n", "weight.T + {}\n")


def test_a_model_that_adds_noise_is_refused_unless_its_answers_are_repeated(tmp_path, module, images, weight, capsys):
    noise = "0.05 * torch.randn(len(batch), 4, generator=generator).numpy()"
    name = module(NOISY.format(noise))
    assert attack(f"{name}:predict", images, tmp_path / "run") == 1
    assert "answered one input twice, and differently" in capsys.readouterr().err
    more = ["--repeat", "20", "--overwrite", "--max-queries", "2000"]
    assert attack(f"{name}:predict", images, tmp_path / "run", *more) == 0
    with np.load(tmp_path / "run" / "result.npz") as result:
        assert not (result["queries"] % 20).any()
        after = (torch.from_numpy(result["images"]).flatten(1) @ weight.T).argmax(1).numpy()
        assert (after == result["classes"])[result["success"]].mean() > 0.5


def test_a_model_whose_answers_depend_on_their_batch_is_told(tmp_path, module, images, capsys):
    text = (
        "def predict(batch):\n    flat = batch.numpy().reshape(len(batch), -1)\n    return (flat - flat.mean(0)) @ weight.T\n"
    )
    assert attack(f"{module(text)}:predict", images, tmp_path / "run", "--max-queries", "20") == 0
    assert "depends on what else is in its batch" in " ".join(capsys.readouterr().err.split())


def test_what_is_tried_in_this_process_is_no_query(tmp_path, module, images, weight):
    from gradless import ZOQOAttack

    assert attack(f"{module(PREDICT)}:predict", images, tmp_path / "run", "--max-queries", "50") == 0
    with np.load(images) as given, np.load(tmp_path / "run" / "result.npz") as result:
        plain = ZOQOAttack(60 / 255, max_queries=50).attack(
            lambda batch: batch.flatten(1) @ weight.T, given["images"].astype(np.float32) / 255, given["labels"]
        )
        assert np.array_equal(result["queries"], plain.queries.numpy())


def test_a_torch_module_says_how_many_images_it_gets_right(tmp_path, module, images, capsys):
    text = (
        "net = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(108, 4, bias=False))\n"
        "net[2].weight.data = torch.from_numpy(weight)\n"
    )
    assert attack(f"{module(text)}:net", images, tmp_path / "run", "--max-queries", "20") == 0
    assert "is right on 9 of 9 images as they are" in capsys.readouterr().err
    with np.load(images) as held:
        np.savez(tmp_path / "wrong.npz", images=held["images"], labels=(held["labels"] + 1) % 4)
    assert attack(f"{module(text)}:net", tmp_path / "wrong.npz", tmp_path / "other", "--max-queries", "20") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "is right on 0 of 9 images" in said
    assert "images were found by their first query" in said


@pytest.mark.parametrize("form", ["column", "one-hot", "big-endian"])
def test_labels_of_a_file_may_have_another_form(tmp_path, module, images, form):
    name = module(PREDICT)
    with np.load(images) as held:
        pixels, labels = held["images"], held["labels"]
    forms = {"column": labels[:, None].astype(np.uint8), "one-hot": np.eye(4)[labels], "big-endian": labels.astype(">i4")}
    np.savez(tmp_path / "form.npz", images=(pixels / 255).astype(">f4"), labels=forms[form])
    for file, run in ((images, "plain"), (tmp_path / "form.npz", "form")):
        assert attack(f"{name}:predict", file, tmp_path / run, "--max-queries", "60") == 0
    with np.load(tmp_path / "plain" / "result.npz") as plain, np.load(tmp_path / "form" / "result.npz") as other:
        assert np.array_equal(plain["queries"], other["queries"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": np.zeros((2, 3, 6, 6), np.int32)}, "floats in [0, 1] or of bytes: they are int32"),
        ({"images": np.zeros((2, 3, 6, 6)) - 1}, "pixels must lie in [0, 1]"),
        ({"images": np.full((2, 3, 6, 6), np.nan)}, "pixels must lie in [0, 1]"),
        ({"images": np.full((2, 3, 6, 6), 255.0)}, "pixels must lie in [0, 1]"),
        ({"images": np.zeros(2)}, "images are of shape (2,)"),
        ({"images": np.zeros((2, 0))}, "images are of shape (2, 0)"),
        ({"images": np.zeros((2, 3), np.complex64)}, "they are complex64"),
        ({"labels": np.array(["cat", "dog"])}, "labels cannot be read"),
        ({"labels": np.array([0.5, 0.5])}, "2 images need integers"),
        ({"labels": np.zeros(3, int)}, "2 images need integers"),
    ],
)
def test_images_and_labels_that_cannot_be(tmp_path, module, capsys, change, says):
    np.savez(tmp_path / "bad.npz", **{"images": np.zeros((2, 3, 6, 6)), "labels": np.zeros(2, int), **change})
    assert attack(f"{module(PREDICT)}:predict", tmp_path / "bad.npz", tmp_path / "run") == 1
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def net(path, weight, *, batch="n", dtype="FLOAT", outputs=("scores",), shape=(3, 6, 6)):
    """Write an ONNX file of the linear model; its outputs are of "scores", "label", "more" (n, 7), "one" (n, 1), "names"."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=kinds.FLOAT),
        helper.make_node("Flatten", ["f"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["plain"]),
        helper.make_node("Identity", ["plain"], ["scores"]),
        helper.make_node("ArgMax", ["plain"], ["label"], axis=1, keepdims=0),
        helper.make_node("Concat", ["plain", "plain"], ["more"], axis=1),
        helper.make_node("ReduceMax", ["plain"], ["one"], axes=[1], keepdims=1),
    ]
    made = {"label": (kinds.INT64, [batch])}
    values = [helper.make_tensor_value_info(n, *made.get(n, (kinds.FLOAT, [batch, None]))) for n in outputs]
    taken = helper.make_tensor_value_info("x", getattr(kinds, dtype), [batch, *shape])
    held = onnx.numpy_helper.from_array((weight / (255 if dtype == "UINT8" else 1)).T.contiguous().numpy(), "weight")
    graph = helper.make_graph(nodes, "net", [taken], values, [held])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


ONNX = {
    "a batch of 8": ({"batch": 8}, []),
    "a batch of 1": ({"batch": 1}, []),
    "fp16": ({"dtype": "FLOAT16"}, ["--pixel-bits", "8"]),
    "fp64": ({"dtype": "DOUBLE"}, []),
    "bytes": ({"dtype": "UINT8"}, ["--pixel-bits", "8"]),
    "a label first": ({"outputs": ("label", "scores")}, []),
    "a batch of 8, a label first": ({"batch": 8, "outputs": ("label", "scores")}, []),
    "a name tells": ({"outputs": ("more", "scores")}, []),
}


@pytest.mark.parametrize("case", ONNX)
def test_onnx_files_give_the_model_s_own_answers(tmp_path, module, images, weight, case):
    how, more = ONNX[case]
    more = ["--max-queries", "60", "--batch-size", "12", *more]
    assert attack(f"{module(PREDICT)}:predict", images, tmp_path / "plain", *more) == 0
    assert attack(net(tmp_path / "net.onnx", weight, **how), images, tmp_path / "run", *more) == 0
    with np.load(tmp_path / "plain" / "result.npz") as plain, np.load(tmp_path / "run" / "result.npz") as result:
        if "fp16" not in case:
            assert np.array_equal(plain["queries"], result["queries"])
        assert np.array_equal(plain["success"], result["success"])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"shape": (6, 6, 3)}, "give them with their dimensions in that order"),
        ({"shape": (108,)}, "takes images of shape (108,), and these are of shape (3, 6, 6)"),
        ({"dtype": "UINT8"}, "takes bytes; give --pixel-bits 8"),
        ({"dtype": "INT64"}, "takes tensor(int64)"),
        ({"outputs": ("more", "plain")}, "alone or so that they can be told"),
        ({"outputs": ("one",)}, "of two classes return both scores"),
    ],
)
def test_onnx_files_that_cannot_be_asked(tmp_path, images, weight, capsys, how, says):
    model = net(tmp_path / "net.onnx", weight, **how)
    assert attack(model, images, tmp_path / "run", "--method", "zo_signsgd") == 1
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_onnx(tmp_path, images, capsys):
    (tmp_path / "net.onnx").write_bytes(b"no graph")
    assert attack(str(tmp_path / "net.onnx"), images, tmp_path / "run") == 1
    assert "cannot be loaded by onnxruntime" in capsys.readouterr().err


def test_maps_of_classes_are_scores():
    from gradless.attacks.onnx_file import _listed

    assert _listed([{0: 0.3, 1: 0.7}, {0: 0.9, 1: 0.1}]).tolist() == [[0.3, 0.7], [0.9, 0.1]]
    with pytest.raises(GradlessError, match="names its classes cat, dog"):
        _listed([{"cat": 0.3, "dog": 0.7}])


class Odd(BaseHTTPRequestHandler):
    """A server that does what the path says."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        Odd.asked.append("GET " + self.path)
        self.answer(200, b"{}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Odd.asked.append("POST " + self.path)
        good = json.dumps({"scores": [[1.0, 0.0]] * len(body["images"])}).encode()
        what, count = self.path.strip("/").partition("?")[0], len(Odd.asked)
        if what.isdigit():
            self.answer(int(what), b"", Location="/elsewhere?token=secret")
        elif what == "drip":
            self.send_response(200)
            self.send_header("Content-Length", str(len(good)))
            self.end_headers()
            for i in range(len(good)):
                self.wfile.write(good[i : i + 1])
                self.wfile.flush()
                time.sleep(0.2)
        elif what == "slow-headers":
            for byte in b"HTTP/1.1 200 OK\r\nA: b\r\n" * 20:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.2)
        elif what == "drops" and count < 3:
            self.close_connection = True
        elif what == "half" and count < 3:
            self.send_response(200)
            self.send_header("Content-Length", str(len(good)))
            self.end_headers()
            self.wfile.write(good[:5])
            self.close_connection = True
        elif what == "large":
            self.answer(200, b" " * 4 * 2**20)
        elif what == "bomb":
            self.answer(200, gzip.compress(b" " * 8 * 2**20, 1), Content_Encoding="gzip")
        elif what == "gzip":
            self.answer(200, gzip.compress(good), Content_Encoding="gzip")
        elif what in ("seconds", "date") and count < 2:
            self.answer(429, b"", Retry_After="0" if what == "seconds" else formatdate(time.time() - 5, usegmt=True))
        elif what == "ages":
            self.answer(503, b"", Retry_After="1000000000")
        elif what in TEXTS:
            self.answer(200, TEXTS[what])
        else:
            self.answer(200, good)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


TEXTS = {
    "html": b"<html>",
    "deep": b"[" * 100_000,
    "nothing": b"{}",
    "null": b'{"scores": null}',
    "flat": b'{"scores": [1, 2]}',
    "ragged": b'{"scores": [[1, 2], [1]]}',
    "words": b'{"scores": [["1", "2"], ["1", "2"]]}',
    "one": b'{"scores": [[0.5], [0.5]]}',
    "few": b'{"scores": [[1, 2]]}',
    "digits": b'{"scores": [[' + b"9" * 5000 + b", 2], [1, 2]]}",
}


@pytest.fixture
def odd(monkeypatch):
    from gradless.attacks import endpoint

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass

    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)
    running, Odd.asked[:] = Quiet(("127.0.0.1", 0), Odd), []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{running.server_port}"
    running.shutdown()


@pytest.mark.parametrize("what", ["fine", "drops", "half", "gzip", "seconds", "date"])
def test_an_endpoint_answers_in_the_end(odd, what):
    assert Endpoint(f"http://{odd}/{what}", timeout=5)(torch.zeros(2, 3)).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        *((str(code), rf"sends its callers to http://\S+/elsewhere\?\w{{4}} \({code}\)") for code in (301, 302, 303, 307, 308)),
        ("404", "answered 404 Not Found"),
        ("drip", "took more than 0.5 seconds"),
        ("slow-headers", "took more than 0.5 seconds"),
        ("large", "more than 3145728 bytes"),
        ("bomb", "more than 3145728 bytes"),
        ("ages", "left alone for 1000000000 seconds"),
        *((what, "no JSON of") for what in ("html", "deep", "nothing", "digits")),
        *((what, "it must return scores") for what in ("null", "flat", "ragged", "words", "one", "few")),
    ],
)
def test_an_endpoint_that_does_not_answer_is_refused_in_a_sentence(odd, what, says):
    began = time.monotonic()
    with pytest.raises(GradlessError, match=says) as caught:
        Endpoint(f"http://user:password@{odd}/{what}?token=secret", timeout=0.5)(torch.zeros(2, 3))
    assert time.monotonic() - began < 5
    assert "secret" not in str(caught.value)
    assert "password" not in str(caught.value)
    assert Odd.asked == [f"POST /{what}?token=secret"], "nothing else was asked"


def test_addresses_that_lead_nowhere():
    with pytest.raises(GradlessError, match="that is no address"):
        Endpoint("http://")
    with pytest.raises(GradlessError, match=r"http://127.0.0.1:9/x cannot be reached: .*\."):
        Endpoint("http://me:secret@127.0.0.1:9/x")(torch.zeros(1, 2))


def test_what_an_address_keeps_for_the_server_is_written_nowhere(tmp_path, odd):
    images = tmp_path / "two.npz"
    np.savez(images, images=np.zeros((2, 3), np.uint8), labels=np.zeros(2, int))
    address = f"http://user:password@{odd}/fine?token=secret"
    assert attack(address, images, tmp_path / "run", "--max-queries", "4") == 0
    assert Odd.asked[0] == "POST /fine?token=secret"
    for path in (tmp_path / "run").iterdir():
        assert b"secret" not in path.read_bytes()
        assert b"password" not in path.read_bytes()
    assert attack(address.replace("secret", "other"), images, tmp_path / "run", "--max-queries", "4", "--resume") == 1


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
