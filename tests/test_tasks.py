"""Data files and prompts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradless.errors import GradlessError
from gradless.formats.load import load
from gradless.objectives import collate
from gradless.tasks.data import KINDS, read_rows
from gradless.tasks.prepare import prepare
from gradless.tasks.prompts import TASKS, choose_task
from gradless.training.options import RunOptions
from tests import chat_templates


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": NaN}\n', "line 3 holds NaN, which is no JSON"),
        (b'{"text": "a", "text": "b"}\n', "line 1 names 'text' twice"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        (b'{"text": "a"}\n{"text": "\x00"}\n', "line 2 is not JSON"),
        (b'["a"]\n', "line 1 is a list; it must be a JSON object"),
        (b'"a"\n', "line 1 is the text 'a'; it must be a JSON object"),
        (b"null\n", "line 1 is null"),
        (b"[" * 100_000, "line 1 is nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line 1 is not JSON that can be read"),
        ('{"text": "a"}'.encode("utf-16"), "line 1 is not UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(GradlessError, match=rf"a\.jsonl, {message}"):
        read_rows(str(tmp_path / "a.jsonl"))


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("gradless.tasks.data.LONGEST_LINE", 1 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "a" * (1 << 20) + '"}\n')
    with pytest.raises(GradlessError, match="line 2 is longer than 1 MiB"):
        read_rows(str(tmp_path / "a.jsonl"))


def test_byte_order_marks_blank_lines_and_carriage_returns(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert read_rows(str(tmp_path / "a.jsonl")) == [{"text": "a"}, {"text": "b"}]
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbftext,label\r\n\r\n"a\r\nb",1\r\n')
    assert read_rows(str(tmp_path / "a.csv")) == [{"text": "a\r\nb", "label": "1"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["a", "b"]', "row 1 is the text 'a'; it must be a JSON object"),
        ('[["a"]]', "row 1 is a list"),
        ('[{"text": "a"}, "b"]', "row 2 is the text 'b'"),
        ("5", "neither a JSON array of rows nor a file like SQuAD's"),
        ('{"messages": []}', "neither a JSON array of rows"),
        ('{"data": [1]}', "'data', entry 1 is a number; it must be an object with 'title', 'paragraphs'"),
        ('{"data": null}', "'data' is null; it must be a list"),
        ('{"data": [{"title": "T", "paragraphs": [{"context": "C"}]}]}', "'paragraphs', entry 1 has no 'qas'"),
        ('{"data": [{"title": "T", "paragraphs": [{"context": "C", "qas": [{"question": "Q"}]}]}]}', "has no 'answers'"),
        ('{"data": [{"paragraphs": []}]}', "'data', entry 1 has no 'title'"),
        ('{"a": 1,\n "a": 2}', "names 'a' twice"),
        ('[{"a": 1},\n {"b": }]', "is not JSON: Expecting value in line 2"),
    ],
)
def test_a_json_file_of_another_form(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(GradlessError, match=message):
        read_rows(str(tmp_path / "a.json"))


def test_delimited_files_that_would_lose_something(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,text,label\na,b,1\n")
    with pytest.raises(GradlessError, match="names the column 'text' twice"):
        read_rows(str(path))
    path.write_text('text,label\n"a,1\nb,0\n')
    with pytest.raises(GradlessError, match="line 3 cannot be read as CSV: unexpected end of data"):
        read_rows(str(path))
    path.write_text('text,label\n\n"a\nb",1\nc\n')
    with pytest.raises(GradlessError, match="line 5 has 1 columns and not 2"):
        read_rows(str(path))
    path.write_bytes(b"text,label\na\xff,1\n")
    with pytest.raises(GradlessError, match="is not UTF-8"):
        read_rows(str(path))


def test_a_parquet_file_that_unpacks_to_more_than_memory_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 4000, pyarrow.int32()), ["a" * 2**20])
    parquet.write_table(pyarrow.table({"text": long}), tmp_path / "cells.parquet")
    parquet.write_table(pyarrow.table({"n": pyarrow.array([1] * 3_000_000)}), tmp_path / "rows.parquet")
    for name in ("cells", "rows"):
        with pytest.raises(GradlessError, match=rf"{name}\.parquet unpacks to more than 200 times its size"):
            read_rows(str(tmp_path / f"{name}.parquet"))


def test_parquet_that_holds_other_types(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from datetime import date

    from pyarrow import parquet

    rows = [{"text": "a", "label": 1, "on": date(2026, 1, 2), "m": [{"role": "user", "name": None}]}]
    parquet.write_table(
        pyarrow.Table.from_pylist([*rows, {"text": None, "m": [{"role": "user", "name": "A"}]}]), tmp_path / "a.parquet"
    )
    read = read_rows(str(tmp_path / "a.parquet"))
    assert read[0] == {**rows[0], "m": [{"role": "user"}]}
    with pytest.raises(GradlessError, match="row 2: column 'text' is null; it must be a text"):
        TASKS["sst2"].examples(read)
    for value, shown in ((b"a", "of type bytes"), (date(2026, 1, 2), "of type date"), (["a"], "a list")):
        with pytest.raises(GradlessError, match=f"row 1: column 'text' is {shown}; it must be a text"):
            TASKS["sst2"].examples([{"text": value, "label": 1}])
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(GradlessError, match="cannot be read as Parquet"):
        read_rows(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("sst2", {"text": 5, "label": 1}, "column 'text' is a number; it must be a text"),
        ("sst2", {"text": "a", "label": None}, "column 'label' is null; it must be a label"),
        ("sst2", {"text": "a", "label": 0.5}, "column 'label' is a number; it must be a label"),
        ("sst2", {"text": "a", "label": float("nan")}, "column 'label' is a number"),
        ("sst2", {"text": "a", "label": " "}, "column 'label' is a blank text"),
        ("sst2", {"text": "\ud800", "label": 1}, "half of a character"),
        ("boolq", {"passage": "P.", "question": None, "label": True}, "column 'question' is null"),
        ("wsc", {"text": "T.", "target": {"span1_text": "Ann"}, "label": False}, "column 'target' has no 'span2_text'"),
        ("wsc", {"text": "T.", "target": None, "label": False}, "column 'target' is null; it must be an object"),
        ("wsc", {"text": "T.", "target": {"span1_text": "A", "span2_text": "B"}, "label": "x"}, "label 'x' has no verbalizer"),
        ("copa", {"premise": "P.", "choice1": "", "choice2": "b", "question": "effect", "label": 0}, "'choice1' is a blank"),
        ("copa", {"premise": "P.", "choice1": "A", "choice2": "b", "question": "why", "label": 0}, "must be 'effect' or"),
        ("copa", {"premise": "P.", "choice1": "A", "choice2": "b", "question": [], "label": 0}, "must be 'effect' or"),
        ("copa", {"premise": "P.", "choice1": "A", "choice2": "b", "question": "cause", "label": 2}, "label '2' has no verb"),
        ("copa", {"premise": "P.", "choice1": "A", "choice2": "a", "question": "cause", "label": 1}, "two of its candidates"),
        ("multirc", {"passage": {"text": "P."}}, "column 'passage' has no 'questions'"),
        ("multirc", {"passage": {"text": "P.", "questions": [{"question": "Q", "answers": [{}]}]}}, "entry 1 has no 'text'"),
        ("squad", {"title": "T", "context": "C", "question": "Q", "answers": "Ann"}, "it must be a list of texts"),
        ("squad", {"title": "T", "context": "C", "question": "Q", "answers": {"text": [""]}}, "it must be a list of texts"),
        ("squad", {"title": None, "context": "C", "question": "Q", "answers": ["A"]}, "column 'title' is null"),
        ("completion", {"prompt": "a", "completion": None}, "column 'completion' is null; it must be a text that is not blank"),
        ("completion", {"prompt": "a", "completion": 5}, "column 'completion' is a number"),
        ("completion", {"prompt": "a", "completion": " \n"}, "column 'completion' is a blank text"),
        ("completion", {"prompt": ["a"], "completion": "b"}, "column 'prompt' is a list"),
        ("completion", {"prompt": {}, "completion": "b"}, "column 'prompt' is an object"),
        ("completion", {"prompt": "a", "completion": "b", "weight": 0}, "column 'weight' is not read"),
        ("completion", {"prompt": "a", "completion": "b", "label": False}, "column 'label' does not change what is learned"),
        ("completion", {"prompt": "a", "completion": "b", "tools": "[]"}, "column 'tools' belongs to a conversation"),
    ],
)
def test_values_of_the_wrong_type_are_named(task, row, message):
    with pytest.raises(GradlessError, match=rf"^d\.jsonl, row 1: .*{message}"):
        TASKS[task].examples([row], "d.jsonl")


def test_labels_are_known_in_each_spelling():
    for label in (1, 1.0, "1", " 1 "):
        (example,) = TASKS["sst2"].examples([{"text": "fine", "label": label}])
        assert example.candidates[example.label] == "great"
    own = choose_task(None, "{n} is", {"1.0": "a", "true": "b"}, {"n": 3, "label": 1.0}, None)
    found = own.examples([{"n": 3, "label": 1.0}, {"n": 0.5, "label": True}])
    assert [(example.prompt, example.candidates[example.label]) for example in found] == [("3 is", "a"), ("0.5 is", "b")]


@pytest.mark.parametrize(
    "template",
    [
        "{text.__class__}",
        "{text!r}",
        "{0}",
        "{}",
        "{text[0]}",
        "{text:>10000000000}",
        "{text:{label}}",
        "{",
        "fixed",
        "{label} {text}",
    ],
)
def test_a_template_holds_names_of_columns_and_nothing_else(template):
    with pytest.raises(GradlessError, match="the template '"):
        choose_task(None, template, {"0": "bad", "1": "good"}, {"text": "a", "label": "0"}, None)


def test_a_template_with_braces_and_columns_of_other_names():
    task = choose_task(None, "{{{Review Text}}}:", {"0": "bad", "1": "good"}, {}, None)
    (example,) = task.examples([{"Review Text": "{text!r}", "label": 0}])
    assert example.prompt == "{{text!r}}:"
    with pytest.raises(GradlessError, match="row 1: column 'Review Text' is null; it must be a text or a number"):
        task.examples([{"Review Text": None, "label": 0}])


def test_labels_without_a_choice():
    for labels in ({"0": "a"}, {"0": "a", "1": "a"}, {"0": "a", "1": " "}):
        with pytest.raises(GradlessError, match="at least two different words"):
            choose_task(None, "{text}", labels, {}, None)


def test_options_that_nothing_would_read():
    with pytest.raises(GradlessError, match="--train-on is for conversations"):
        choose_task("sst2", None, None, {}, None, "last")
    with pytest.raises(GradlessError, match="are two tasks"):
        choose_task("sst2", "{text}", {"0": "a", "1": "b"}, {}, None)


def test_columns_that_are_not_read_are_listed():
    rows = [{"text": "a", "label": 1, "idx": 0, "none": None}, {"sentence": "b", "label": 0, "source": "x"}]
    assert TASKS["sst2"].unread(rows) == ["idx", "source"]


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(KINDS),
    st.binary(max_size=60) | st.text('[]{}":,.0123eaulnt\n\t\\', max_size=60).map(str.encode),
)
def test_any_bytes_are_rows_or_a_sentence(tmp_path_factory, kind, content):
    path = tmp_path_factory.getbasetemp() / f"any{kind}"
    path.write_bytes(content)
    try:
        rows = read_rows(str(path))
    except GradlessError:
        return
    assert all(isinstance(row, dict) for row in rows)


# -- from files to examples ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talking(tiny):
    loaded = load(tiny)
    loaded.tokenizer.chat_template = chat_templates.ZEPHYR
    return loaded


def test_what_is_not_read_is_said(tmp_path, talking):
    talk = [{"role": "user", "content": "a", "id": 1}, {"role": "assistant", "content": "b" * 60}]
    rows = [{"messages": talk, "source": "x"}, {"messages": [{"role": "user", "content": "a"}, talk[1]], "prompt": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = prepare(str(tmp_path / "a.jsonl"), talking, RunOptions(max_length=40))
    assert prepared.notes == [
        f"{tmp_path}/a.jsonl: 1 of 2 rows: its messages' id are not read",
        f"{tmp_path}/a.jsonl: 2 of 2 rows: what is longer than --max-length is not learned",
        f"{tmp_path}/a.jsonl: 1 of 2 rows: its prompt is not read beside its messages",
        f"{tmp_path}/a.jsonl: not read: source",
    ]
    rows = [{"title": "T", "context": "C", "question": "Q", "answers": answers} for answers in (["A"], [])]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    prepared = prepare(str(tmp_path / "a.json"), talking, RunOptions(task="squad"))
    assert prepared.notes == [f"{tmp_path}/a.json: 1 of 2 rows: nothing to learn in it"]
    (tmp_path / "a.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(GradlessError, match="no row makes an example"):
        prepare(str(tmp_path / "a.json"), talking, RunOptions(task="squad"))


def test_a_row_is_named_by_its_place_in_the_file(tmp_path, talking):
    rows = [{"text": "a", "label": 1} for _ in range(9)] + [{"text": "b" * 500, "label": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(GradlessError, match=r"a\.jsonl, row 10: a prompt of \d+ tokens is longer"):
        prepare(str(tmp_path / "a.jsonl"), talking, RunOptions(task="sst2", train_rows=10), limit=10, shuffled=True)


def test_train_on_last_learns_one_turn(tmp_path, talking):
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}))
    counts = [
        collate(prepare(str(tmp_path / "a.jsonl"), talking, RunOptions(train_on=train_on)).examples).counts
        for train_on in ("all", "last")
    ]
    assert counts[0] == [2 * counts[1][0]]
