"""Data files and prompts."""

import json

import pytest

from gradless.errors import GradlessError
from gradless.tasks.data import read_rows
from gradless.tasks.prompts import TASKS, choose_task


def test_a_headerless_tsv_of_two_columns_is_text_and_label(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('a "quoted" film\t1\nanother\t0\n')
    assert read_rows(str(path)) == [{"text": 'a "quoted" film', "label": "1"}, {"text": "another", "label": "0"}]


def test_a_header_names_the_columns(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n")
    (example,) = TASKS["rte"].examples(read_rows(str(path)))
    assert example.prompt == 'A.\nDoes this mean that "B." is true? Yes or No?\n'
    assert example.candidates[example.label] == "Yes"
    path = tmp_path / "b.csv"
    path.write_text('text,label\n"one, two",1\n')
    assert read_rows(str(path)) == [{"text": "one, two", "label": "1"}]


def test_jsonl_json_and_parquet(tmp_path):
    row = {"prompt": "Say:", "completion": "hello"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps([row]))
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([row]), tmp_path / "a.parquet")
    for kind in ("jsonl", "json", "parquet"):
        assert read_rows(str(tmp_path / f"a.{kind}")) == [row]


def test_a_local_folder_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "x", "label": 1}\n')
    assert read_rows(str(tmp_path / "data")) == [{"text": "x", "label": 1}]


def test_squads_nesting(tmp_path):
    qa = {"question": "Who?", "answers": [{"text": "Ann"}, {"text": "Ann B"}]}
    nested = {"data": [{"title": "T", "paragraphs": [{"context": "C.", "qas": [qa]}]}]}
    (tmp_path / "a.json").write_text(json.dumps(nested))
    (example,) = TASKS["squad"].examples(read_rows(str(tmp_path / "a.json")))
    assert example.prompt == "Title: T\nContext: C.\nQuestion: Who?\nAnswer:"
    assert example.candidates == ("Ann\n",)
    assert example.answers == ("Ann", "Ann B")


@pytest.mark.parametrize(
    ("task", "row", "prompt", "answer"),
    [
        ("sst2", {"text": "fine", "label": 1}, "fine It was", "great"),
        ("cb", {"premise": "P.", "hypothesis": "h", "label": "neutral"}, "Suppose P. Can we infer", "Maybe"),
        ("boolq", {"passage": "P.", "question": "is it", "label": True}, "P. is it?", "Yes"),
        (
            "wsc",
            {"text": "T.", "target": {"span1_text": "Ann", "span2_text": "She"}, "label": False},
            'T.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
            "No",
        ),
        (
            "wic",
            {"word": "w", "sentence1": "A.", "sentence2": "B.", "label": True},
            'Does the word "w" have the same meaning in these two sentences? Yes, No?\nA.\nB.\n',
            "Yes",
        ),
        (
            "copa",
            {"premise": "It rained.", "choice1": "We left.", "choice2": "We sang.", "question": "effect", "label": 1},
            "It rained so",
            "we sang.",
        ),
    ],
)
def test_mezos_prompts(task, row, prompt, answer):
    (example,) = TASKS[task].examples([row])
    assert example.prompt.startswith(prompt)
    assert example.candidates[example.label] == answer


def test_multirc_makes_one_example_an_answer():
    answers = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    row = {"passage": {"text": "P.", "questions": [{"question": "Q?", "answers": answers}]}}
    first, second = TASKS["multirc"].examples([row])
    assert first.prompt.startswith('P.\nQuestion: Q?\nI found this answer "a".')
    assert (first.candidates[first.label], second.candidates[second.label]) == ("Yes", "No")


@pytest.mark.parametrize("task", ["sst2", "rte", "cb", "boolq", "wsc", "wic", "copa", "multirc", "squad"])
def test_the_built_in_tasks_read_the_real_data(task, shared_data):
    files = {"sst2": "sst2/dev.tsv", "rte": "rte/train.tsv", "squad": "squad/dev-v1.1.json"}
    names = {"cb": "CB", "boolq": "BoolQ", "wsc": "WSC", "wic": "WiC", "copa": "COPA", "multirc": "MultiRC"}
    path = shared_data / files.get(task, f"superglue/{names.get(task)}/val.jsonl")
    rows = read_rows(str(path))
    examples = TASKS[task].examples(rows, str(path))
    assert len(examples) >= len(rows)
    assert len({example.label for example in examples}) == (1 if task == "squad" else len(examples[0].candidates))


def test_a_template_and_labels_make_a_task():
    task = choose_task(None, "{text} This is", {"bug": "broken", "wish": "desired"}, {"text": "", "label": ""}, None)
    (example,) = task.examples([{"text": "It crashes.", "label": "bug"}])
    assert (example.prompt, example.candidates, example.label) == ("It crashes. This is", ("broken", "desired"), 0)


def test_columns_decide_without_a_task():
    assert choose_task(None, None, None, {"prompt": "", "completion": ""}, None).name == "completion"
    with pytest.raises(GradlessError, match="columns text, label do not tell what to learn"):
        choose_task(None, None, None, {"text": "", "label": ""}, None)


# -- bad data ---------------------------------------------------------------------------------------------------------


def test_no_rows(tmp_path):
    for kind in ("tsv", "jsonl"):
        (tmp_path / f"a.{kind}").touch()
        with pytest.raises(GradlessError, match="holds no rows"):
            read_rows(str(tmp_path / f"a.{kind}"))


def test_a_missing_column_is_named_with_its_row():
    with pytest.raises(GradlessError, match=r"the data, row 1 has no column 'text', which task sst2 needs; it has label\."):
        TASKS["sst2"].examples([{"label": 1}])


def test_a_label_without_a_verbalizer():
    with pytest.raises(GradlessError, match="row 2: label 'maybe' has no verbalizer; there are some for '0', '1'"):
        TASKS["sst2"].examples([{"text": "a", "label": 0}, {"text": "b", "label": "maybe"}])


def test_a_line_with_the_wrong_number_of_columns(tmp_path):
    (tmp_path / "a.tsv").write_text("good film\t1\nbad\tfilm\t0\n")
    with pytest.raises(GradlessError, match="line 2 has 3 columns and not 2"):
        read_rows(str(tmp_path / "a.tsv"))


def test_a_line_that_is_not_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"text\n')
    with pytest.raises(GradlessError, match="line 2 is not JSON"):
        read_rows(str(tmp_path / "a.jsonl"))


def test_a_file_that_is_not_there_and_a_kind_that_is_unknown(tmp_path):
    with pytest.raises(GradlessError, match="there is no data file"):
        read_rows(str(tmp_path / "none.tsv"))
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(GradlessError, match="unknown kind of data"):
        read_rows(str(tmp_path / "a.xlsx"))


def test_a_task_that_does_not_exist():
    with pytest.raises(GradlessError, match="there is no task 'sst3'; there are sst2, rte"):
        choose_task("sst3", None, None, {}, None)


def test_a_template_without_labels():
    with pytest.raises(GradlessError, match="--template and --labels go together"):
        choose_task(None, "{text}", None, {}, None)
