"""What `import gradless` shows: to people, to type checkers, and in README.md."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradless
from tests.tiny import tiny_gguf

INIT = Path(gradless.__file__)
README = Path(__file__).parents[1] / "README.md"


def test_every_public_name_is_there_and_is_what_type_checkers_see():
    block, _ = [node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If)]
    typed = {f"{alias.name}": f"{node.module}" for node in block.body for alias in node.names}
    assert typed == {name: f"gradless.{home}" for name, home in gradless._HOMES.items()}
    for name in gradless.__all__:
        assert getattr(gradless, name) is not None
        assert name in dir(gradless)
    with pytest.raises(AttributeError, match="no attribute 'QZOO'"):
        gradless.QZOO  # noqa: B018


def test_a_misspelt_name_is_seen_by_a_type_checker(tmp_path):
    (tmp_path / "user.py").write_text("from gradless import QZO, load\nfrom gradless import QZOO\n")
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = skip\n[mypy-gradless]\nfollow_imports = silent\n")
    said = subprocess.run([sys.executable, "-m", "mypy", "user.py"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert re.findall(r"^user.py:(\d+): error: (.*?)  ", said, re.MULTILINE) == [
        ("2", 'Module "gradless" has no attribute "QZOO"; maybe "QZO"?')
    ]


def test_the_command_line_starts_without_torch():
    code = "import sys; from gradless.arguments import parser; parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_readmes_example_runs_as_written(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny_gguf(tmp_path / "model.gguf")
    names: dict[str, object] = {}
    exec(example, names)
    model = names["model"]
    assert isinstance(model, gradless.formats.quantized.QuantizedModel)
    assert (tmp_path / "tuned.gguf").stat().st_size == (tmp_path / "model.gguf").stat().st_size
    assert (tmp_path / "tuned.gguf").read_bytes() != (tmp_path / "model.gguf").read_bytes()
