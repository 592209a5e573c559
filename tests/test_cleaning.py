"""Corrections of training images: how train.py reads and applies them."""

import json
import re
import shlex
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from conftest import DETECT, digits, image_data, printed_commands, read_table, refused, succeed
from PIL import Image

import analyze
import detect_mislabeled_dataset as detect
import pipeline
import train

NAMES = ["cat", "grey owl", "äpfel"]


def cleaning(excluded, new_labels):
    """Decisions in the form that training_examples expects."""
    return {"excluded": excluded, "new_labels": new_labels}


@pytest.fixture
def data():
    """Six images of three classes, each with a path."""
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 32, 32)
    return image_data(
        images, torch.tensor([0, 1, 2, 0, 1, 2]), NAMES, [f"images/{i} ü.png" for i in range(6)]
    )


@pytest.fixture
def written(tmp_path):
    """Writes lines to a csv file and returns its path."""

    def write(*lines, encoding="utf-8"):
        path = tmp_path / "decided.csv"
        path.write_text("\n".join(lines), encoding=encoding)
        return path

    return write


# ---- Files ---------------------------------------------------------------------------------------


def read(path, data, test=None, dataset_dir="images"):
    """The decisions that train.py reads from a file."""
    return pipeline.read_corrections(
        path, data, data.take(torch.arange(0)) if test is None else test, dataset_dir
    )


def without_files(data):
    """The same images without paths, as in CIFAR-10: csv files name them by index."""
    return replace(data, paths=[""] * len(data))


def test_corrections_by_path_and_by_index(written, data, capsys):
    path = written(
        "path,note,new_label",
        "images/2 ü.png,a cat!,cat",
        "images/4 ü.png,, leave out",
        "images/5 ü.png,,cat",
    )
    assert read(path, data) == cleaning([4], {2: 0, 5: 0})
    lines = ["index,label,new_label", "4,grey owl,leave out", "0,cat,äpfel", "1,grey owl,grey owl"]
    path = written(*lines, encoding="utf-8-sig")
    assert read(path, without_files(data)) == cleaning([4], {0: 2, 1: 1})
    assert capsys.readouterr().out.splitlines() == [
        "Corrections: äpfel → cat 2, left out 1",
        "Corrections: cat → äpfel 1, kept 1, left out 1",  # image 1 was a grey owl before
    ]


def test_rows_with_an_empty_new_label_are_ignored_and_counted(written, data, capsys):
    """Users add such a column to a ranking; pandas writes the class None as an empty cell."""
    lines = ["index,new_label", "0,", "1, ", "2,cat", "3,leave out", "77,"]
    assert read(written(*lines), without_files(data)) == cleaning([3], {2: 0})
    ignored = "Ignored 3 rows with an empty new_label, since nothing was decided there; "
    advice = "to leave an image out, write 'leave out'"
    assert capsys.readouterr().out.splitlines()[1] == ignored + advice


def test_rows_by_index_without_a_label_are_counted(written, data, photos, capsys):
    """A path names one image only, so its label is not missed."""
    lines = ("index,label,new_label", "1,,cat", f"0,{data.class_names[data.labels[0]]},cat")
    read(written(*lines), without_files(data))
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("1 rows have no label, so their index is not checked: it must")
    read(written("path,new_label", f"{photos[0].paths[0]},cat"), *photos)
    assert "no label" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["None", "NA", "null", "nan"])
def test_classes_may_have_names_that_pandas_reads_as_missing_values(written, data, name):
    named = replace(without_files(data), class_names=["cat", name, "äpfel"])
    path = written("index,label,new_label", f"0,cat,{name}", f"1,{name},cat")
    assert read(path, named) == cleaning([], {0: 1, 1: 0})


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_corrections_are_read_in_the_formats_of_spreadsheets(written, data, delimiter):
    lines = [
        " Path , NEW_LABEL ,Note",
        'images/1 ü.png,cat,"a, b; c"',
        ",,",
        "images/3 ü.png, grey owl ,",
    ]
    path = written(*(line.replace(",", delimiter) for line in lines), encoding="utf-8-sig")
    assert read(path, data) == cleaning([], {1: 0, 3: 1})


SPREADSHEETS = {  # first bytes, separator, and line end
    "a line for Excel": ("sep=;\r\n", ";", "\r\n"),
    "a line for Excel, another separator": ("sep=|\n", "|", "\n"),
    "a line for Excel in quotes": ('\ufeff"sep=\t"\r\n', "\t", "\r\n"),
    "a line for Excel that was saved again": ("SEP=,,,\n", ",", "\n"),
    "lines of an old Mac": ("", ",", "\r"),
    "blank lines": ("\n \n", ";", "\n\n"),
    "two marks of UTF-8": ("\ufeff\ufeff", ",", "\n"),
}


@pytest.mark.parametrize("kind", SPREADSHEETS)
def test_first_lines_and_line_ends_of_any_system_are_read(written, data, kind):
    above, delimiter, end = SPREADSHEETS[kind]
    rows = [" Index ", "NEW_LABEL", ""], ["0", '"grey owl"', ""], ["2", "cat", '"a, b; c|d"']
    path = written()
    path.write_bytes((above + end.join(map(delimiter.join, rows)) + end).encode())
    assert read(path, without_files(data)) == cleaning([], {0: 1, 2: 0})


def test_a_semicolon_separates_a_header_that_contains_more_commas(written, data):
    path = written('index;"seen by a, b, c, d";new_label', "0;;äpfel")
    assert read(path, without_files(data)) == cleaning([], {0: 2})


BAD_FILES = {  # lines of a csv file, and part of the sentence
    "a quote that stays open": (
        ["path,note,new_label", 'images/0 ü.png,"blurry,cat', "images/1 ü.png,,äpfel"],
        "line 2: a cell in quotes must end on its line",
    ),
    "text after a quote": (
        ["path,note,new_label", "images/0 ü.png,,cat", 'images/2 ü.png,"dark" one,cat'],
        "line 3: a cell in quotes must end on its line, directly before ','",
    ),
    "a blank before a quote": (
        ["path,note,new_label", 'images/0 ü.png, "blurry,cat'],
        "line 2: a blank stands before a quote",
    ),
    "a cell over several lines": (
        ["index,note,new_label", "0,,cat", '1,"one', "two", 'three",cat'],
        "line 3: a cell in quotes must end on its line",
    ),
    "a column twice": (["index,new_label,new_label", "0,cat,äpfel"], "'new_label' is there twice"),
    "a column twice, once in capitals": (
        ["index,new_label, New_Label", "0,cat,äpfel"],
        "'new_label' is there twice",
    ),
    "paths twice": (["path,Path,new_label", "a,b,cat"], "'path' is there twice"),
    "another separator than it says": (["sep=;", "index,new_label", "0,cat"], "must name the col"),
    "a quote in the header": (['index,"new_label', "0,cat"], "its first line must name the column"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_csv_file_that_could_be_misread_is_refused(written, data, kind):
    lines, message = BAD_FILES[kind]
    with pytest.raises(pipeline.UserError, match=re.escape(message)):
        read(written(*lines), data if "path" in lines[0] else without_files(data))


def test_a_quote_inside_a_cell_is_text(written, data):
    path = written("index,note,new_label", '0,a 5" disk,cat', '1,"he said ""cat""",äpfel')
    assert read(path, without_files(data)) == cleaning([], {0: 0, 1: 2})


def test_names_and_paths_are_read_in_either_unicode_form(written, data):
    apart = unicodedata.normalize("NFD", "images/0 ü.png,äpfel")
    path = written("path,new_label", apart, "images/1 ü.png,äpfel")
    assert read(path, data) == cleaning([], {0: 2, 1: 2})


def test_the_name_of_a_class_may_begin_with_a_space(written, data):
    path = written("index,new_label", "0, cat", "1,grey owl ")
    named = replace(without_files(data), class_names=[" cat", "grey owl", "äpfel"])
    assert read(path, named) == cleaning([], {0: 0, 1: 1})


def test_digits_in_a_label_are_class_names_not_class_indices(written, data):
    """Folders are named 1 to 3: the label 1 is the first class, not the class with index 1."""
    named = replace(without_files(data), class_names=["1", "2", "3"])
    assert read(written("index,label,new_label", "0,1,2"), named) == cleaning([], {0: 1})


@pytest.fixture
def photos(folders):
    """ImageData of both splits of class folders, and the folder of the data set."""
    return [
        *(pipeline.load_data("imagefolder", folders, split) for split in ("train", "test")),
        folders,
    ]


SPELLINGS = {
    "absolute": "{tmp}/my images/train/{name}",
    "relative to the working directory": "../my images/train/{name}",
    "relative to the csv": "my images/train/{name}",
    "relative to the data set": "train/{name}",
    "by way of a parent": "{tmp}/my images/train/../train/./{name}",
    "below a link": "{tmp}/link/train/{name}",
    "a blank behind": "{tmp}/my images/train/{name} ",
    "where the data set was before": "/nowhere/old photos/train/{name}",
    "on Windows": "D:\\photos\\train\\{name}",
    "percent-encoded": "{tmp}/my%20images/train/{quoted}",
    "a URL": "file://{tmp}/my%20images/train/{quoted}",
    "a URL of a host": "file://localhost{tmp}/my%20images/train/{quoted}",
    "a URL where it was before": "file:///C:/old%20photos/train/{quoted}",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_row_names_its_image_by_the_path_of_an_existing_file(
    written, photos, tmp_path, monkeypatch, capsys, spelling
):
    """The last parts of the path decide only if no such file exists. This is printed."""
    data, _, folders = photos
    (tmp_path / "link").symlink_to(folders)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names = [str(Path(path).relative_to(folders / "train")) for path in data.paths]
    if "D:" in spelling:
        names = [name.replace("/", "\\") for name in names]
    paths = [spelling.format(tmp=tmp_path, name=name, quoted=quote(name)) for name in names]
    found = read(written("path,new_label", *(f"{path},cat" for path in paths)), *photos)
    assert found == cleaning([], dict.fromkeys(range(len(data)), 0))
    exists = not spelling.startswith(("/nowhere", "D:", "file:///C:", "my images"))
    assert ("last parts" in capsys.readouterr().out) != exists


def test_a_name_that_looks_encoded_is_first_read_without_decoding(written, folders):
    """The name of one file is the encoded name of the other file."""
    for name, colour in (("a b.png", 1), ("a%20b.png", 2)):
        Image.new("RGB", (8, 8), (colour, 0, 0)).save(folders / "train" / "cat" / name)
    data, test = (pipeline.load_data("imagefolder", folders, split) for split in ("train", "test"))
    decided = read(written("path,new_label", "train/cat/a%20b.png,äpfel"), data, test, folders)
    ((index, label),) = decided["new_labels"].items()
    assert Path(data.paths[index]).name == "a%20b.png" and label == 2


def test_rows_matched_by_their_last_parts_are_counted_and_shown(written, photos, capsys):
    """The rows may belong to another data set whose folder no longer exists."""
    rows = ["/gone/train/cat/0.png,äpfel", "train/cat/1.png,äpfel", "/gone/train/cat/2.png,äpfel"]
    read(written("path,new_label", *rows), *photos)
    line = (
        "2 rows name files that do not exist and were matched by the last parts of their paths, "
        "the first: /gone/train/cat/0.png as train/cat/0.png"
    )
    assert capsys.readouterr().out.splitlines()[-2] == line
    read(written("path,new_label", rows[1]), *photos)
    assert "last parts" not in capsys.readouterr().out


def test_an_existing_image_of_another_data_set_is_no_training_image(written, photos, tmp_path):
    """Its last parts are those of a training image, but its file exists."""
    other = Path(shutil.copytree(photos[2], tmp_path / "other"))
    with pytest.raises(
        pipeline.UserError, match=r"line 2: .* among the 15 training images: correct"
    ):
        read(written("path,new_label", f"{other}/train/cat/0.png,äpfel"), *photos)


def test_two_links_to_one_file_are_two_images(written, photos, tmp_path):
    """This holds also if the data set itself is a link. The target alone is ambiguous."""
    _, _, folders = photos
    store = tmp_path / "store.png"
    Image.new("RGB", (8, 8)).save(store)
    for name in ("cat", "äpfel"):
        (folders / "train" / name / "link.png").symlink_to(store)
    data, test = (pipeline.load_data("imagefolder", folders, split) for split in ("train", "test"))
    (tmp_path / "photos").symlink_to(folders)
    rows = ["train/cat/link.png,grey owl", f"{tmp_path}/photos/train/äpfel/link.png,leave out"]
    decided = read(written("path,new_label", *rows), data, test, folders)
    assert [data.class_names[data.labels[i]] for i in decided["new_labels"]] == ["cat"]
    assert [data.class_names[data.labels[i]] for i in decided["excluded"]] == ["äpfel"]
    with pytest.raises(pipeline.UserError, match="is not among"):
        read(written("path,new_label", f"{store},cat"), data, test, folders)


def test_the_target_of_a_link_is_its_image(written, photos, tmp_path):
    path = Path(photos[0].paths[1])
    path.rename(tmp_path / "elsewhere.png")
    path.symlink_to(tmp_path / "elsewhere.png")
    assert read(written("path,new_label", f"{tmp_path}/elsewhere.png,cat"), *photos) == cleaning(
        [], {1: 0}
    )


def test_the_sentence_says_that_an_image_is_in_the_test_split(written, photos):
    with pytest.raises(pipeline.UserError, match=r"2: .*png is a test image: correct or remove"):
        read(written("path,new_label", f"{photos[1].paths[0]},cat"), *photos)


MISTAKES = {  # lines of the file, and part of the sentence
    "index": (
        ["index,new_label", "6,cat"],
        "line 2: there is no training image 6, only 0 to 5: correct or remove this row",
    ),
    "index below a line for Excel": (
        ["sep=;", "index;new_label", "6;cat"],
        "line 3: there is no training image 6",
    ),
    "negative index": (["index,new_label", "-1,cat"], "line 2: there is no training image -1"),
    "endless index": (
        ["index,new_label", f"{'1' * 5000},cat"],
        "line 2: there is no training image 1111",
    ),
    "neither": (["index,new_label", ",cat"], "line 2: needs an index"),
    "class": (
        ["index,new_label", "1,dog"],
        "line 2: 'dog' is none of the classes cat, grey owl, äpfel, nor 'leave out'",
    ),
    "twice": (
        ["index,new_label", "1,cat", "2,cat", "1,leave out"],
        "line 4: image 1 has a row before this one",
    ),
    "column": (
        ["index,label", "1,cat"],
        "its first line must name the column 'new_label', but is 'index,label'",
    ),
    "short row": (["index,new_label", "1"], "line 2: has 1 cells, but the first line has 2"),
    "long row": (["index,new_label", "1,cat,dog"], "line 2: has 3 cells, but the first line"),
    "label": (
        ["index,label,new_label", "1,,cat", "2,cat,cat"],
        "line 3: image 2 has the label äpfel before any cleaning, not cat",
    ),
    "a label in other capitals": (
        ["index,new_label", "1,Leave out"],
        "line 2: 'Leave out' is none of the classes",
    ),
    "index of a table by pandas": (
        ["index,new_label", "1.0,cat"],
        "line 2: there is no training image 1.0",
    ),
    "nothing decided": (
        ["index,new_label", "0,", "1,"],
        "decides nothing: write a class or 'leave",
    ),
    "empty file": ([], "its first line must name the column 'new_label'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_corrections_is_named_with_its_line(written, data, mistake):
    lines, message = MISTAKES[mistake]
    with pytest.raises(pipeline.UserError, match=re.escape(message)):
        read(written(*lines), without_files(data))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("images/7.png,1", "line 2: images/7.png is not among"),
        (",1", "line 2: needs a path; an index is not accepted"),
    ],
)
def test_images_with_files_must_be_named_by_path(written, data, row, message):
    with pytest.raises(pipeline.UserError, match=re.escape(message)):
        read(written("path,index,new_label", f"{row},cat"), data)


@pytest.mark.parametrize("path", ["missing.csv", ".", "", "latin-1.csv"])
def test_a_file_that_cannot_be_read_is_refused(data, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin-1.csv").write_text("path,new_label\nimages/1 ü.png,cat", encoding="latin-1")
    with pytest.raises(pipeline.UserError, match="cannot be read as a csv file in UTF-8"):
        read(path, data)


def test_corrections_change_labels_and_exclude_images(data):
    corrupted = pipeline.training_examples(data, 1 / 2)
    wrong = corrupted.is_corrupted.nonzero().squeeze(1).tolist()
    right = next(i for i in range(6) if i not in wrong)
    decided = {wrong[1]: data.labels[wrong[1]].item(), right: 2 - data.labels[right].item() // 2}
    cleaned = pipeline.training_examples(data, 1 / 2, cleaning=cleaning([wrong[0]], decided))
    assert cleaned.indices.tolist() == [i for i in range(6) if i != wrong[0]]
    assert torch.equal(cleaned.images, data.images[cleaned.indices])
    assert cleaned.paths == [data.paths[i] for i in cleaned.indices]
    still_wrong = cleaned.indices[cleaned.is_corrupted].tolist()
    assert still_wrong == [wrong[2]], "what a person decides is not corrupted"
    untouched = [i for i in range(6) if i not in (*wrong, right)]
    assert all(cleaned.labels[cleaned.indices == i] == corrupted.labels[i] for i in untouched)


# ---- From scores to a better model, by the commands that the scripts print -----------------------


@pytest.fixture(scope="module")
def loop(trained, tmp_path_factory):
    """A folder after training, detection, training without suspects, and a second detection.

    Also the output of each.
    """
    folder = tmp_path_factory.mktemp("loop")
    shutil.copytree(trained[0], folder, dirs_exist_ok=True)
    detect, _ = printed_commands(trained[1])
    detected = succeed(folder, *detect, "--factor_strategy", "identity")
    (correct,) = printed_commands(detected)
    suspects = [row["index"] for row in ranked(*(folder / "influence_results").glob("model_*"))[:6]]
    (folder / "corrections.csv").write_text(
        "\n".join(["index,new_label", *(f"{index},leave out" for index in suspects)])
    )
    cleaned = succeed(folder, *correct)
    again = succeed(folder, *printed_commands(cleaned)[0], "--factor_strategy", "identity")
    return folder, correct, cleaned, again


def ranked(folder):
    """The rows of the only ranking in the results of a model."""
    return read_table(folder / "suspects_identity.csv")[1]


def test_the_suspects_are_left_out_and_the_cleaned_model_has_its_own_name_and_results(loop):
    folder, _, cleaned, again = loop
    assert "Corrections: left out 6" in cleaned and "model_corrupt_0.1_cleaned.pth" in cleaned
    before, after = sorted(
        (folder / "influence_results").glob("model_*"), key=lambda path: "cleaned" in path.name
    )
    removed = {row["index"] for row in ranked(before)[:6]}
    assert {row["index"] for row in ranked(after)} == {str(i) for i in range(60)} - removed
    still_wrong = sum(row["is_corrupted"] == "1" for row in ranked(before)[6:])
    record = json.loads((after / "detection_identity.json").read_text())
    assert record["num_train"] == 54 and record["num_corrupted"] == still_wrong
    assert "Inspecting 10 %" in again
    _, metadata = pipeline.load_checkpoint(folder / "checkpoints" / "model_corrupt_0.1_cleaned.pth")
    assert metadata["cleaning"]["excluded"] == [int(row["index"]) for row in ranked(before)[:6]]


def test_a_ranking_with_a_column_of_the_user_is_not_replaced(loop, trained, tmp_path):
    shutil.copytree(loop[0], tmp_path, dirs_exist_ok=True)
    (ranking,) = tmp_path.glob("influence_results/model_corrupt_0.1-*/suspects_identity.csv")
    columns, *rows = ranking.read_text(encoding="utf-8").splitlines()
    ranking.write_text(
        "\n".join([f"{columns},new_label", *(f"{row},3" for row in rows)]), encoding="utf-8"
    )
    before = ranking.read_bytes()
    command, _ = printed_commands(trained[1])
    sentence = refused(tmp_path, *command, "--factor_strategy", "identity", "--method", "loss")
    assert "suspects_identity.csv would be replaced, but it has columns that you added" in sentence
    assert ranking.read_bytes() == before


def test_corrections_follow_the_printed_command(loop):
    folder, correct, _, _ = loop
    clean = digits(60)
    wrong = pipeline.training_examples(clean, 0.1).is_corrupted.nonzero().squeeze(1).tolist()
    lines = [f"{i},{clean.labels[i]}" for i in wrong[:5]] + [f"{wrong[5]},leave out"]
    (folder / "corrections.csv").write_text("\n".join(["index,new_label", *lines]))
    output = succeed(folder, *correct)
    assert "59 training images, " in output
    assert re.search(r"Corrections: (\d → \d \d, )+left out 1\n", output)
    analyze_command = [
        *printed_commands(output)[1],
        "--factor_strategy",
        "identity",
        "--query_indices",
        "17,3,40-42",
    ]
    output = succeed(folder, *analyze_command)
    (path,) = [
        Path(line.removeprefix("wrote "))
        for line in output.splitlines()
        if line.endswith("identity.csv")
    ]
    _, rows = read_table(folder / path)
    queries = list(dict.fromkeys(row["query"] for row in rows))
    assert queries == ["mean", "17", "3", "40", "41", "42"]
    assert all(row["train"] != str(wrong[5]) for row in rows)
    test = pipeline.load_data("synthetic", "", "test")
    for row in rows:  # the corrected labels are the true labels
        if row["query"] != "mean":
            assert row["query_label"] == str(test.labels[int(row["query"])].item())
        assert row["train_label"] == str(clean.labels[int(row["train"])].item())


def test_the_printed_commands_train_each_model_as_before(monkeypatch, capsys):
    flags = ["--dataset", "synthetic", "--precision", "bf16", "--checkpoint_dir", "a", "b"]
    monkeypatch.setattr("sys.argv", [DETECT, *flags])
    recipe = {
        "recipe": "robust",
        "train_batch_size": 30,
        "learning_rate": 0.3,
        "weight_decay": 0.01,
        "num_train_epochs": 4,
    }
    trained = {"seed": 5, "precision": "fp32", "device": "auto"}
    args = detect.parse_arguments()
    metadata = [trained | {"recipe": recipe}, trained | {"recipe": recipe, "seed": 6}]
    detect.print_next_steps(args, metadata, Path("s.csv"))
    commands = printed_commands(capsys.readouterr().out)
    for command, folder, seed in zip(commands, "ab", (5, 6), strict=True):
        monkeypatch.setattr("sys.argv", command)
        expected = trained | recipe | {"seed": seed, "checkpoint_dir": folder}
        expected["corrections"] = "corrections.csv"
        assert expected.items() <= vars(train.parse_arguments()).items()


def test_a_command_is_quoted_for_the_shell(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["analyze.py", "--dataset_dir", "my $images", "--output_dir=-out"]
    )
    text = pipeline.command(
        "x.py", analyze.parse_arguments(), cleaned=True, seed=3, corrections=None
    )
    words = ["--dataset_dir", "my $images", "--output_dir=-out", "--cleaned", "--seed", "3"]
    assert shlex.split(text) == ["python", "x.py", *words]


def test_a_quoted_cell_may_begin_with_a_blank_and_a_quote():
    """The page writes the name of such a class so."""
    assert pipeline.split_cells("line 2", '1,"x"," ""a"""', ",") == ["1", "x", ' "a"']
    assert pipeline.split_cells("line 2", '1," """,x', ",") == ["1", ' "', "x"]


# ---- Figures of few images, many classes and long names ------------------------------------------


@pytest.mark.parametrize("count", [1, 6, 250])
def test_figures_show_any_number_of_images(tmp_path, data, count):
    data = replace(data, class_names=["$x_1$ and more than sixteen letters", "grey owl", "äpfel"])
    many = data.take(torch.arange(count) % 6)
    scores = torch.linspace(1, 0, count)
    found = detect.Detection(
        data=many,
        method="loss",
        strategy="ekfac",
        scores={"loss": scores.numpy()},
        order=torch.arange(count).numpy(),
        logits=torch.eye(3)[many.labels],
        explanations={},
    )
    detect.plot_suspects(tmp_path / "s.png", found)
    queries = many.take(torch.tensor([0, -1]))
    analyze.plot_top_influences(tmp_path / "i.png", scores.expand(2, -1), queries, many, "diagonal")
    for name in ("s.png", "i.png"):
        Image.open(tmp_path / name).load()


def test_a_contact_sheet_shows_the_images_in_their_order(tmp_path):
    """Twelve images of one grey each are drawn in two rows, ten in the first."""
    images = torch.linspace(20, 240, 12).to(torch.uint8).view(12, 1, 1, 1).expand(12, 3, 32, 32)
    pipeline.draw_contact_sheet(tmp_path / "s.png", images, [""] * 12, ["black"] * 12, 10, "")
    pixels = torch.tensor(list(Image.open(tmp_path / "s.png").convert("L").tobytes()))
    areas = [(pixels == image[0, 0, 0]).sum().item() for image in images]
    assert min(areas) > 3000 and max(areas) < 2 * min(areas)
    places = [(pixels == image[0, 0, 0]).nonzero()[0].item() for image in images]
    assert places == sorted(places)


def test_no_harmful_image_is_listed_as_helpful(tmp_path, data):
    """Two images help the first query, three harm it. All harm the second query, and the mean."""
    scores = torch.tensor([[0.5, -2.0, 0.0, -1.0, 3.0, -0.1], [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]])
    analyze.write_top_influences(tmp_path / "i.csv", scores, data.take(torch.tensor([0, 1])), data)
    _, rows = read_table(tmp_path / "i.csv")
    found = [(row["query"], row["direction"], row["rank"], row["train"]) for row in rows]
    mean = [("harmful", str(n + 1), t) for n, t in enumerate("531240")]
    first = [
        ("helpful", "1", "4"),
        ("helpful", "2", "0"),
        *(("harmful", str(n + 1), t) for n, t in enumerate("135")),
    ]
    second = [("harmful", str(n + 1), t) for n, t in enumerate("543210")]
    rows_by_query = {"mean": mean, "0": first, "1": second}
    assert found == [(query, *row) for query, rows in rows_by_query.items() for row in rows]


def test_a_number_list_keeps_its_order_and_drops_repetitions():
    assert analyze.number_list(" 5 , 1-3, 2-4,7-7") == [5, 1, 2, 3, 4, 7]
