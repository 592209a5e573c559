"""The page for review in a real browser, and the influence that it shows."""

import base64
import io
import json
import shutil
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ANALYZE, DETECT, TRAIN, digits, read_table, result_folder, succeed
from PIL import Image
from safetensors.torch import load_file
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import detect_mislabeled_dataset as detect
import pipeline

CHROMIUM, DRIVER = map(shutil.which, ("chromium", "chromedriver"))
in_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
)
NAMES, PAGE = ["<b>\"'&", "a, b; c", "owl"], "suspects_identity.html"
LEAVE_OUT = "leave out"
DATA = (
    "--dataset",
    "imagefolder",
    "--dataset_dir",
    "photos",
    "--device",
    "cpu",
    "--precision",
    "fp32",
)
TRAINING = (TRAIN, *DATA, "--train_batch_size", 8, "--num_train_epochs", 1)
DETECTION = (DETECT, *DATA, "--factor_strategy", "identity")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model of 24 images in three classes, and its page.

    The names of classes and files contain html.
    """
    root = tmp_path_factory.mktemp("review")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 2)):
        for name in NAMES:
            class_folder = root / "photos" / split / name
            class_folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
                file_name = f"<img src=x onerror='alert({i})'>, \"{i}.png"
                Image.fromarray(pixels).save(class_folder / file_name)
    succeed(root, *TRAINING)
    printed = succeed(root, *DETECTION)
    assert f"{PAGE} in a browser, review the suspects, save corrections.csv" in printed
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window. It saves files in its folder `downloads`."""
    options = webdriver.ChromeOptions()
    home = tmp_path_factory.mktemp("browser")
    options.binary_location = CHROMIUM
    quiet = (
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    )
    for flag in ("headless=new", "no-sandbox", "disable-gpu", *quiet, f"user-data-dir={home}"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option(
        "prefs", {"download.default_directory": str(home / "downloads")}
    )
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.downloads = home / "downloads"
    yield driver
    driver.quit()


def detection(class_names, count=12, **fields):
    """A Detection of digits with given class names.

    Image i is the i-th suspect. Its file is named `i.png`.
    """
    data = digits(count)
    labels = torch.arange(count) % len(class_names)
    paths = [f"photos/{i}.png" for i in range(count)]
    data = replace(data, labels=labels, true_labels=labels, class_names=class_names, paths=paths)
    suspicion = np.linspace(1, 0, count, dtype=np.float32)
    values = {
        "data": data,
        "method": "loss",
        "strategy": "ekfac",
        "scores": {"loss": suspicion},
        "order": np.arange(count),
        "logits": torch.eye(len(class_names))[labels],
        "explanations": {},
    }
    return detect.Detection(**values | fields)


def open_page(browser, path):
    """Opens a page without stored decisions. Returns the dictionaries of its cards."""
    browser.get(path.as_uri())
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    return json.loads(browser.find_element("id", "data").get_attribute("textContent"))["cards"]


def open_new_page(browser, folder, class_names, count=12):
    """Writes and opens the page of a `detection`. Returns the Detection."""
    found = detection(class_names, count)
    detect.write_page(folder / "page.html", found, num_review=count, cleaned=False)
    open_page(browser, folder / "page.html")
    return found


def decide(browser, card, how, name=""):
    """Decides about a card by a key, or by the button with a text; then types a name, if any."""
    if len(how) > 1:
        buttons = browser.find_elements("xpath", f"//article[{card['rank']}]//button")
        next(button for button in buttons if button.text == how).click()
    else:
        press(browser, how)
    if name:
        press(browser, name, Keys.ENTER)


def press(browser, *keys):
    """Presses keys; the focused element receives them.

    Chromium drops keys until a new page was drawn for the first time, so a frame is awaited. It is
    not awaited for ever, since windows in the background draw none.
    """
    browser.execute_async_script(
        "const done = arguments[0];"
        "requestAnimationFrame(() => setTimeout(done));"
        "setTimeout(done, 1000);"
    )
    ActionChains(browser).send_keys(*keys).perform()


def press_layout(browser, key, code, **modifiers):
    """Presses the key at the position `code` of a keyboard layout that has `key` there."""
    script = (
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown',"
        " {key: arguments[0], code: arguments[1], bubbles: true, ...arguments[2]}))"
    )
    browser.execute_script(script, key, code, modifiers)


def texts(browser, selector):
    """The texts of the displayed elements."""
    return [
        element.text
        for element in browser.find_elements("css selector", selector)
        if element.is_displayed()
    ]


def notice(browser):
    """The latest notice of the page."""
    return "".join(texts(browser, "#notice"))


def load(browser, path, beginning):
    """Loads a file into the page, and waits for a notice that begins so. Returns the notice."""
    browser.find_element("id", "file").send_keys(str(path))
    WebDriverWait(browser, 10).until(lambda _: notice(browser).startswith(beginning))
    return notice(browser)


def save(browser):
    """Saves corrections.csv by the button of the page. Returns the path of the file."""
    path = browser.downloads / "corrections.csv"
    path.unlink(missing_ok=True)
    browser.find_element("css selector", "[value=save]").click()
    WebDriverWait(browser, 10).until(lambda _: path.exists())
    return path


def train_with(folder, path):
    """Trains with a file of corrections. Returns the new label by path: a class or LEAVE_OUT."""
    succeed(folder, *TRAINING, "--corrections", path)
    cleaning = pipeline.load_checkpoint(folder / "checkpoints/model_cleaned.pth")[1]["cleaning"]
    paths = pipeline.load_data("imagefolder", folder / "photos", "train").paths
    found = {i: NAMES[label] for i, label in cleaning["new_labels"].items()}
    found |= dict.fromkeys(cleaning["excluded"], LEAVE_OUT)
    return {paths[i].removeprefix(f"{folder}/"): name for i, name in found.items()}


# ---- Decisions -----------------------------------------------------------------------------------


@in_browser
def test_decisions_survive_a_reload_and_reach_the_model(browser, folder):
    """The file contains kept labels too. It restores all decisions in another browser."""
    cards = open_page(browser, result_folder(folder, "model-") / PAGE)
    suggested = [card["suggested"] for card in cards]
    kept = [card["label"] for card in cards]
    ways = [
        (Keys.ENTER, "", suggested[0]),
        (Keys.ENTER, "", suggested[1]),
        ("k", "", kept[2]),
        ("x", "", LEAVE_OUT),
        ("2", "", NAMES[1]),
        ("c", NAMES[0], NAMES[0]),
        (f"→ {suggested[6]}", "", suggested[6]),
        (f"keep {kept[7]}", "", kept[7]),
        ("leave out", "", LEAVE_OUT),
        ("other…", NAMES[2], NAMES[2]),
    ]
    for card, (how, typed, _) in zip(cards, ways, strict=False):
        decide(browser, card, how, typed)
    for key in "xu":
        decide(browser, cards[10], key)
    browser.refresh()
    decided = {card["key"]: name for card, (*_, name) in zip(cards, ways, strict=False)}
    states = []
    for card in cards[:10]:
        name = decided[card["key"]]
        state = "kept" if name == card["label"] else f"→ {name}"
        states.append("left out" if name == LEAVE_OUT else state)
    headings = [f"{i}. {state}" for i, state in enumerate([*states, *["undecided"] * 14], 1)]
    assert texts(browser, "h2") == headings
    num_changed = sum(state.startswith("→") for state in states)
    counts = [f"10 of 24 decided, {num_changed} changed, 2 left out"]
    assert texts(browser, "#counts") == counts

    path = save(browser)
    rows = [[*row.values()] for row in read_table(path)[1]]
    assert rows == [[card["key"], card["label"], decided[card["key"]]] for card in cards[:10]]
    assert train_with(folder, path) == decided
    open_page(browser, result_folder(folder, "model-") / PAGE)
    load(browser, path, "Loaded 10 decisions, 10 of them for images on this page.")
    assert texts(browser, "h2") == headings and texts(browser, "#counts") == counts


@in_browser
def test_a_loaded_file_that_replaces_decisions_says_how_many(browser, tmp_path):
    paths = open_new_page(browser, tmp_path, ["cat", "dog"], 4).data.paths
    path = tmp_path / "corrections.csv"
    path.write_text(f"path,new_label\n{paths[0]},cat\n{paths[1]},dog\n{paths[2]},cat\n")
    press(browser, "x", "k")  # leaves the first image out, and keeps dog for the second
    before = texts(browser, "h2")
    loaded = "Loaded 3 decisions, 3 of them for images on this page."
    load(browser, path, f"{loaded} Replaced 1 decision of this page; Undo restores what was there.")
    assert texts(browser, "h2") != before
    browser.find_element("css selector", "nav [value=undo]").click()
    assert texts(browser, "h2") == before
    save(browser)
    assert notice(browser) == "Saved 2 decisions."
    save(browser)
    assert notice(browser).endswith("The browser may have numbered the file: use the newest one.")


@in_browser
def test_the_filter_shows_only_the_undecided_suspects_of_a_pair(browser, folder):
    cards = open_page(browser, result_folder(folder, "model-") / PAGE)
    press(browser, *"kkk")
    browser.find_element("id", "undecided").click()
    assert len(texts(browser, "h2")) == 21
    pairs = [f"{card['label']} → {card['suggested']}" for card in cards]
    options = browser.find_elements("tag name", "option")
    next(option for option in options if option.get_attribute("value") == pairs[12]).click()
    assert len(texts(browser, "h2")) == pairs[3:].count(pairs[12]) < 21


@in_browser
def test_a_second_review_continues_with_the_file_of_the_first(browser, folder):
    """A spreadsheet wrote the file. The page has the labels after cleaning, and loses no row."""
    path = folder / "corrections.csv"
    cards = open_page(browser, result_folder(folder, "model-") / PAGE)
    first = {cards[0]["key"]: cards[0]["suggested"], cards[1]["key"]: LEAVE_OUT}
    quoted = [
        '"{}";"{}"'.format(*(cell.replace('"', '""') for cell in row)) for row in first.items()
    ]
    path.write_text(
        "\n".join(["path;new_label", *quoted, ";"]), encoding="utf-8-sig", newline="\r\n"
    )
    succeed(folder, *TRAINING, "--corrections", path)
    succeed(folder, *DETECTION, "--cleaned")
    cards = open_page(browser, result_folder(folder, "model_cleaned-") / PAGE)
    assert "load your earlier corrections.csv first" in texts(browser, "header")[0]
    load(browser, path, "Loaded 2 decisions, 1 of them for images on this page.")
    new = next(card for card in cards if card["key"] not in first)
    decide(browser, new, "leave out")
    expected = first | {new["key"]: LEAVE_OUT}
    saved = save(browser)
    assert [[*row.values()] for row in read_table(saved)[1]] == [
        [key, "", name] for key, name in expected.items()
    ]
    assert train_with(folder, saved) == expected


@in_browser
def test_two_windows_of_a_page_share_their_decisions(browser, tmp_path):
    """Each window shows the decisions of the other at once, and undoes only its own decisions."""
    open_new_page(browser, tmp_path, ["cat", "dog"])
    press(browser, "k", "k")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    second = browser.current_window_handle
    browser.get((tmp_path / "page.html").as_uri())
    press(browser, "x", "x")
    browser.switch_to.window(first)
    WebDriverWait(browser, 10).until(
        lambda _: texts(browser, "#counts") == ["4 of 12 decided, 0 changed, 2 left out"]
    )
    press(browser, Keys.ENTER)
    press(browser, "u")
    ActionChains(browser).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
    browser.switch_to.window(second)
    browser.close()
    browser.switch_to.window(first)
    browser.refresh()
    assert texts(browser, "#counts") == ["3 of 12 decided, 0 changed, 2 left out"]


@in_browser
def test_only_ctrl_z_without_shift_takes_back(browser, tmp_path):
    """With Shift, it takes back an undo in other programs."""
    open_new_page(browser, tmp_path, ["cat", "dog"])
    press(browser, "k", "k")
    press_layout(browser, "Z", "KeyZ", ctrlKey=True, shiftKey=True)
    assert texts(browser, "#counts") == ["2 of 12 decided, 0 changed, 0 left out"]
    press_layout(browser, "z", "KeyZ", ctrlKey=True)
    assert texts(browser, "#counts") == ["1 of 12 decided, 0 changed, 0 left out"]


@in_browser
def test_a_notice_disappears_when_it_is_no_longer_true(browser, tmp_path):
    open_new_page(browser, tmp_path, ["cat", "dog"], count=2)
    box = browser.find_element("css selector", "header input[type=checkbox]")
    box.click()  # shows undecided suspects only
    browser.find_element("css selector", "body").click()
    press(browser, "k", "k")
    assert notice(browser).startswith("No suspect matches the filter")
    press(browser, "u")
    assert notice(browser) == ""
    press(browser, "k")
    assert notice(browser).startswith("No suspect matches the filter")
    box.click()
    assert notice(browser) == ""


@in_browser
def test_undo_of_a_hidden_card_goes_to_a_card_that_is_shown(browser, tmp_path):
    open_new_page(browser, tmp_path, ["cat", "dog"])
    press(browser, "k")
    first = texts(browser, "h2")[0]
    labels = browser.execute_script("return cards.map((card) => card.label)")
    other = next(label for label in labels if label != labels[0])
    script = (
        "const list = document.getElementById('filter'); list.value = arguments[0];"
        "list.dispatchEvent(new Event('change', {bubbles: true}))"
    )
    browser.execute_script(script, other)
    assert first not in texts(browser, "h2")
    press(browser, "u", "k")  # the second key decides a card that is shown
    assert texts(browser, "#counts") == ["1 of 12 decided, 0 changed, 0 left out"]
    assert "kept" in " ".join(texts(browser, "h2"))


@in_browser
@pytest.mark.parametrize("typed", ["dog", "do"], ids=["a class", "no class"])
def test_escape_drops_the_name_in_the_field(browser, tmp_path, typed):
    open_new_page(browser, tmp_path, ["cat", "dog", "owl"])
    press(browser, "c", typed, Keys.ESCAPE)
    assert texts(browser, "#counts") == ["0 of 12 decided, 0 changed, 0 left out"]
    assert notice(browser) == ""
    press(browser, "k")  # the suspect has the focus again
    assert texts(browser, "h2")[0] == "1. kept"


@in_browser
def test_a_decision_keeps_earlier_decisions_of_another_window(browser, tmp_path):
    """The page has received no event about them."""
    open_new_page(browser, tmp_path, ["cat", "dog"])
    press(browser, "k")
    script = (
        "const [key] = Object.keys(localStorage);"
        "const rows = JSON.parse(localStorage[key]);"
        "rows.push(['photos/7.png', ['dog', 'cat']]);"
        "localStorage[key] = JSON.stringify(rows);"
    )
    browser.execute_script(script)
    press(browser, "x")
    assert texts(browser, "#counts") == ["3 of 12 decided, 1 changed, 1 left out"]


@in_browser
def test_decisions_are_saved_in_the_file_if_the_browser_storage_is_full(browser, tmp_path):
    """The warning stays visible during later actions."""
    open_new_page(browser, tmp_path, ["cat", "dog"])
    press(browser, "k")
    fill = """
        for (let size = 2 ** 24; size >= 1; size /= 2) {
            try {
                localStorage["x" + size] = "x".repeat(size);
            } catch {}
        }
    """
    browser.execute_script(fill)
    press(browser, "x", "k", "u", Keys.ENTER)
    assert "The browser storage is full: save the file" in texts(browser, "#warning")[0]
    assert texts(browser, "#counts") == ["3 of 12 decided, 1 changed, 1 left out"]
    assert [row["new_label"] for row in read_table(save(browser))[1]] == ["cat", LEAVE_OUT, "dog"]
    assert texts(browser, "#warning")
    browser.execute_script("localStorage.clear()")


@in_browser
def test_the_page_warns_of_damaged_storage_and_still_works(browser, tmp_path):
    open_new_page(browser, tmp_path, ["cat", "dog"])
    press(browser, "k")
    damage = """
        for (const key of Object.keys(localStorage)) {
            localStorage[key] = '[["photos';
        }
        return localStorage.length;
    """
    assert browser.execute_script(damage) == 1
    browser.refresh()
    WebDriverWait(browser, 10).until(lambda _: texts(browser, "#warning"))
    assert "are damaged: load your saved file" in texts(browser, "#warning")[0]
    press(browser, "x")
    browser.refresh()
    assert texts(browser, "#counts") == ["1 of 12 decided, 0 changed, 1 left out"]


@in_browser
def test_the_page_says_that_no_suspect_matches_the_filter(browser, tmp_path):
    open_new_page(browser, tmp_path, ["cat", "dog"], count=2)
    browser.find_element("id", "undecided").click()
    press(browser, "k", "x")
    assert (
        notice(browser) == "No suspect matches the filter: save the file, or show other suspects."
    )
    press(browser, Keys.ENTER, "k")
    assert texts(browser, "#counts") == ["2 of 2 decided, 0 changed, 1 left out"]


@in_browser
def test_a_double_click_decides_one_card(browser, tmp_path):
    """The next card is under the pointer at the second click. Two clicks on Undo undo two."""
    open_new_page(browser, tmp_path, ["cat", "dog"])
    browser.find_element("id", "undecided").click()
    button = browser.find_element("css selector", "article [value=keep]")
    ActionChains(browser).double_click(button).perform()
    assert texts(browser, "#counts") == ["1 of 12 decided, 0 changed, 0 left out"]
    press(browser, "k")
    undo = browser.find_element("css selector", "nav [value=undo]")
    ActionChains(browser).double_click(undo).perform()
    assert texts(browser, "#counts") == ["0 of 12 decided, 0 changed, 0 left out"]


# ---- Keys, layout, labels ------------------------------------------------------------------------


@in_browser
@pytest.mark.parametrize(
    ("key", "code", "state"),
    [
        ("л", "KeyK", "kept"),  # Cyrillic
        ("κ", "KeyK", "kept"),  # Greek
        ("ㅏ", "KeyK", "kept"),  # Korean
        ("Process", "KeyK", "kept"),  # an input method
        ("é", "Digit2", "→ dog"),  # AZERTY
        ("k", "KeyV", "kept"),  # Dvorak: the letter decides, not the position
        ("t", "KeyK", "undecided"),
        ("K", "KeyK", "kept"),
    ],
)
def test_keys_work_on_other_keyboards(browser, tmp_path, key, code, state):
    open_new_page(browser, tmp_path, ["cat", "dog"])
    press_layout(browser, key, code)
    assert texts(browser, "h2")[0] == f"1. {state}"
    assert "Enter takes the suggestion, k keeps the label" in texts(browser, "header")[0]


@in_browser
@pytest.mark.parametrize("width", [1200, 720])
def test_no_card_is_hidden_under_the_bar(browser, tmp_path, width):
    """The height of the bar grows with ten long class names."""
    browser.set_window_size(width, 900)
    names = [f"a class whose name is very long, with number {i}" for i in range(10)]
    open_new_page(browser, tmp_path, names, count=40)
    bar = browser.find_element("tag name", "nav")
    assert bar.size["height"] > 140
    for _ in range(39):
        press(browser, Keys.ARROW_RIGHT)
    for _ in range(30):
        press(browser, Keys.ARROW_LEFT)
        card = browser.switch_to.active_element
        top = "return arguments[0].getBoundingClientRect().{}"
        bar_ends = browser.execute_script(top.format("bottom"), bar)
        assert browser.execute_script(top.format("top"), card) >= bar_ends
    browser.set_window_size(1200, 900)


@in_browser
def test_right_to_left_names_stand_in_the_order_of_the_arrow(browser, tmp_path):
    """Options of the filter cannot contain elements, so their text is measured in a <span>."""
    given, suggested = "שלום", "עולם"
    open_new_page(browser, tmp_path, [given, suggested])
    script = """
        const option = [...document.querySelectorAll("#filter option")]
            .find(({ value }) => value === arguments[0]);
        const line = document.body.appendChild(document.createElement("span"));
        line.textContent = option.textContent;
        return arguments[0].split(" → ").map((name) => {
            const range = document.createRange();
            const start = line.textContent.indexOf(name);
            range.setStart(line.firstChild, start);
            range.setEnd(line.firstChild, start + name.length);
            return range.getBoundingClientRect().left;
        });
    """
    left, right = browser.execute_script(script, f"{given} → {suggested}")
    assert left < right
    elements = browser.find_elements("css selector", ".facts bdi, .buttons bdi, #digits bdi")
    assert {element.text for element in elements} >= {given, suggested}


@in_browser
def test_facts_and_buttons_name_the_classes(browser, tmp_path):
    logits = torch.tensor([[0.0, 4.0, 2.0]] * 12)
    found = detection(["cat", "frog", "owl"], logits=logits)
    detect.write_page(tmp_path / "page.html", found, num_review=2, cleaned=False)
    open_page(browser, tmp_path / "page.html")
    facts = texts(browser, ".facts")
    expected = "given: cat (1.6 %)\nsuggested: frog (86.7 %)\nscore 1\n0.png"
    assert facts[0] == expected
    assert "given: frog (86.7 %)" in facts[1]
    buttons = texts(browser, "article button")
    assert buttons[:4] == ["→ frog", "keep cat", "leave out", "other…"]
    assert buttons[4:6] == ["→ owl", "keep frog"]


@in_browser
def test_elements_have_labels_for_screen_readers(browser, tmp_path):
    open_new_page(browser, tmp_path, ["cat", "dog"])
    press(browser, "x", "u", "u", "x")
    labels = {
        "progress": "Suspects decided",
        "#filter": "Show one class or one pair of classes",
        "#notice": "Notice",
        "#other": "Another class",
        "article": "Suspect 1. left out; given cat, suggested dog",
    }
    for selector, label in labels.items():
        assert browser.find_element("css selector", selector).accessible_name == label
    assert browser.find_element("id", "notice").aria_role == "status"
    assert browser.find_element("css selector", "canvas").aria_role in ("img", "image")


# ---- Files ---------------------------------------------------------------------------------------

ROWS = "photos/0.png,owl\nphotos/2.png,leave out\nphotos/3.png,äpfel\n"
PLAIN = "path,new_label\n" + ROWS
FILES = {
    "plain": PLAIN,
    "semicolons": PLAIN.replace(",", ";"),
    "tabs": PLAIN.replace(",", "\t"),
    "Windows": PLAIN.replace("\n", "\r\n"),
    "old Mac": PLAIN.replace("\n", "\r"),
    "byte order mark": "\ufeff" + PLAIN,
    "declared comma": "sep=,\n" + PLAIN,
    "declared semicolon": "sep=;\r\n" + PLAIN.replace(",", ";").replace("\n", "\r\n"),
    "declared bar": '"sep=|"\n' + PLAIN.replace(",", "|"),
    "blanks and capitals": PLAIN.replace(",", " , ").replace("path , new", " Path , New"),
    "blank lines": "\n" + PLAIN.replace("\n", "\n\n,\n"),
    "quotes": '"' + PLAIN.replace(",", '","').replace("\n", '"\n"')[:-1],
    "other columns": PLAIN.replace("\n", ',"a, ""b""; c"\n').replace('"a, ""b""; c"', "note", 1),
    "a name within quotes": PLAIN.replace("owl\n", '"owl"\n'),
    "decomposed letters": unicodedata.normalize("NFD", PLAIN),
    "percent-encoded": PLAIN.replace("photos/3", "file:photos/%33"),
    "absolute": PLAIN.replace("photos/", "/data/photos/"),
    "relative to this folder": PLAIN.replace("photos/", "./photos/"),
    "nothing decided": PLAIN + "photos/5.png,\nphotos/6.png, \n",
}


@in_browser
@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_the_page_loads_every_format_that_train_reads(browser, tmp_path, text):
    found = open_new_page(browser, tmp_path, ["cat", "owl", "äpfel"])
    path = tmp_path / "decided.csv"
    path.write_bytes(text.encode())
    no_test = found.data.take(torch.arange(0))
    cleaning = pipeline.read_corrections(path, found.data, no_test, ".")
    assert cleaning == {"excluded": [2], "new_labels": {0: 1, 3: 2}}
    text_of_notice = load(browser, path, "Loaded 3 decisions, 3 of them for images on this page.")
    num_ignored = text.count("photos/5.png") + text.count("photos/6.png")
    assert ("Ignored 2 rows whose new_label is empty" in text_of_notice) == (num_ignored == 2)
    headings = texts(browser, "h2")
    assert [headings[0], headings[2], headings[3]] == ["1. → owl", "3. left out", "4. → äpfel"]
    assert texts(browser, "#counts") == ["3 of 12 decided, 2 changed, 1 left out"]


@in_browser
@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["path,new_label", "x.png,dog"], "line 2: “dog” is no class"),
        (["path,label", "x.png,owl"], "must contain the columns path and new_label"),
        (["file,new_label", "x.png,owl"], "must contain the columns path and new_label"),
        (["path,new_label,New_Label", "x.png,owl,cat"], "the column new_label appears twice"),
        (["path,note,new_label", 'x.png,"dark" one,owl'], "line 2: a cell in quotes must end"),
        (["path,note,new_label", 'x.png,"dark,owl', "y.png,,"], "line 2: a cell in quotes must"),
        (["path,new_label", "x.png,owl,cat"], "line 2 has 3 cells, but the first line has 2"),
        (["path,new_label", "x.png,owl", "x.png,cat"], "line 3: x.png has an earlier row"),
        (["path,label,new_label", "photos/0.png,owl,owl"], "label here is “cat”, not “owl”"),
        (["path,new_label", ",owl"], "line 2 has no path"),
        (["sep=;", "path;new_label", "x.png;dog"], "line 3: “dog” is no class"),
    ],
)
def test_a_file_with_a_mistake_is_refused(browser, tmp_path, lines, problem):
    open_new_page(browser, tmp_path, ["cat", "owl"])
    (tmp_path / "decided.csv").write_text("\n".join(lines))
    assert problem in load(browser, tmp_path / "decided.csv", "Nothing was loaded: ")
    assert texts(browser, "#counts") == ["0 of 12 decided, 0 changed, 0 left out"]


@in_browser
def test_the_page_finds_paths_that_are_relative_to_the_data_set(browser, tmp_path):
    """`cat/2.png` could also be the end of the path of an image that the page lacks."""
    found = detection(["cat", "owl"])
    found.data.paths[:] = [f"photos/train/cat/{i}.png" for i in range(12)]
    detect.write_page(tmp_path / "page.html", found, num_review=12, cleaned=False)
    open_page(browser, tmp_path / "page.html")
    names = ["train/cat/1.png", "cat/2.png", "3.png", "test/cat/7.png"]
    path = tmp_path / "decided.csv"
    path.write_text("path,new_label\n" + "".join(f"{name},owl\n" for name in names))
    load(browser, path, "Loaded 4 decisions, 1 of them for images on this page.")
    rows = save(browser).read_text().splitlines()[1:]
    saved = ["photos/train/cat/1.png", *names[1:]]
    assert [row.split(",")[0] for row in rows] == saved


@in_browser
def test_special_characters_in_file_names_survive_saving_and_loading(browser, tmp_path):
    """train.py and another browser read the names, even with a line break."""
    names = [
        "a#1?%41.png",
        'ü "q", x;y.png',
        "new\nline %.png",
        " blank .png ",
        "=1+1.png",
        "\t.png",
    ]
    found = detection(["cat", "dog"], count=6)
    found = found._replace(data=replace(found.data, paths=[f"photos/{name}" for name in names]))
    detect.write_page(tmp_path / "page.html", found, num_review=6, cleaned=False)
    open_page(browser, tmp_path / "page.html")
    press(browser, *"xkxkxk")
    path = save(browser)
    no_test = found.data.take(torch.arange(0))
    cleaning = pipeline.read_corrections(path, found.data, no_test, ".")
    assert cleaning == {"excluded": [0, 2, 4], "new_labels": {1: 1, 3: 1, 5: 1}}
    open_page(browser, tmp_path / "page.html")
    load(browser, path, "Loaded 6 decisions, 6 of them for images on this page.")


@in_browser
@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_file_in_another_encoding_is_refused(browser, tmp_path, encoding):
    open_new_page(browser, tmp_path, ["cat", "äpfel"])
    path = tmp_path / "decided.csv"
    path.write_text("path,new_label\nphotos/0.png,äpfel\n", encoding=encoding)
    assert "the file is not UTF-8 text" in load(browser, path, "Nothing was loaded: ")


@in_browser
def test_a_page_in_a_sandbox_offers_the_text_of_the_file(browser, tmp_path):
    """Notebooks and editors show pages in frames that may not save files or store decisions."""
    open_new_page(browser, tmp_path, ["cat", "dog"])
    frame = '<iframe sandbox="allow-scripts" src="page.html" width="900" height="700"></iframe>'
    (tmp_path / "notebook.html").write_text(frame)
    browser.get((tmp_path / "notebook.html").as_uri())
    browser.switch_to.frame(0)
    press_layout(browser, "k", "KeyK")
    assert (
        "cannot store your decisions: save the file before you close"
        in texts(browser, "#warning")[0]
    )
    browser.find_element("css selector", "[value=save]").click()
    text = browser.find_element("id", "text")
    expected = "path,label,new_label\nphotos/0.png,cat,cat\n"
    assert text.is_displayed() and text.get_attribute("value") == expected
    browser.find_element("css selector", "[value=copy]").click()
    assert texts(browser, "#copied") == ["Copied."]
    browser.find_element("css selector", "[value=close]").click()
    assert not text.is_displayed()
    press_layout(browser, "x", "KeyX")
    assert texts(browser, "#counts") == ["2 of 12 decided, 0 changed, 1 left out"]
    browser.switch_to.default_content()


@in_browser
def test_html_in_names_is_shown_as_text_and_the_page_requests_nothing(browser, folder, tmp_path):
    """Some class names cannot be names of folders."""
    browser.get_log("performance")
    cards = open_page(browser, result_folder(folder, "model-") / PAGE)
    assert texts(browser, ".facts div div bdi") == [
        name for card in cards for name in (card["label"], card["suggested"])
    ]
    links = browser.find_elements("css selector", "article a")
    files = [(card["name"], (folder / card["key"]).as_uri()) for card in cards]
    assert [(link.text, link.get_attribute("href")) for link in links] == files
    names = ["</script><script>alert(1)</script>", "{{data}}<!--<script>"]
    open_new_page(browser, tmp_path, names, count=6)
    assert texts(browser, ".facts div div bdi") == [*names, *names[::-1]] * 3
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert urls and all(url.startswith(("file:///", "data:")) for url in urls)


# ---- Contents of the page ------------------------------------------------------------------------


def page_and_facts(path, detection_shown):
    """Writes the page of a Detection. Returns its html and the embedded facts, a dictionary."""
    detect.write_page(path, detection_shown, num_review=5, cleaned=False)
    page = path.read_text(encoding="utf-8")
    embedded = page.partition('id="data">')[2].partition("</script>")[0]
    return page, embedded


def test_a_card_has_its_image_and_the_best_class_other_than_its_label(tmp_path):
    order = np.array([3, 0, 4, 2, 1])
    logits = torch.tensor([[5.0, 1, 3], [5, 1, 3], [5, 1, 3], [0, 4, 2], [2, 4, 6]])
    names = ["cat", "dog", "owl"]
    found = detection(names, 5, order=order, logits=logits)
    page, embedded = page_and_facts(tmp_path / PAGE, found)
    cards = json.loads(embedded)["cards"]
    assert [card["rank"] for card in cards] == [1, 2, 3, 4, 5]
    assert [card["suggested"] for card in cards] == [names[label] for label in (1, 2, 2, 0, 0)]
    sprite = Image.open(
        io.BytesIO(base64.b64decode(page.partition("base64,")[2].partition('"')[0]))
    )
    for card, position in zip(cards, order.tolist(), strict=True):
        row, column = divmod(card["tile"], sprite.width // 32)
        tile = sprite.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
        image = found.data.images[position].permute(1, 2, 0).numpy()
        assert np.abs(np.asarray(tile).astype(int) - image).mean() < 12


def test_no_name_ends_the_embedded_data(tmp_path):
    names = ["</script><script>alert(1)</script>", "{{data}}<!--<script>", "owl"]
    page, embedded = page_and_facts(tmp_path / PAGE, detection(names, 5))
    assert json.loads(embedded)["classes"] == names
    assert "<" not in embedded and "alert(1)" not in page.replace(embedded, "")


def test_pages_of_the_same_images_labels_and_paths_share_their_decisions(tmp_path):
    """Decisions are stored by fingerprint. On a GPU the suspicion differs in its last bits."""
    found = detection(["cat", "dog", "owl"], 5)
    data = found.data
    same = [
        found._replace(scores={"loss": found.suspicion + 1}, order=found.order[::-1]),
        found._replace(scores={"aum": found.suspicion}, method="aum"),
    ]
    others = [
        found._replace(data=replace(data, paths=["a"] * 5)),
        found._replace(data=replace(data, labels=data.labels.flip(0))),
        found._replace(data=replace(data, images=data.images.flip(0))),
    ]

    def fingerprint(detection_shown):
        _, embedded = page_and_facts(tmp_path / PAGE, detection_shown)
        return json.loads(embedded)["fingerprint"]

    expected = fingerprint(found)
    assert [fingerprint(shown) for shown in same] == [expected] * 2
    assert len({expected, *map(fingerprint, others)}) == 4


def test_explanations_equal_the_influence_on_the_same_images_in_the_test_split(folder, tmp_path):
    """All images are explained, although `--explain` asks for more.

    The influence of an image on itself is not used.
    """
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    diagonal = ("--factor_strategy", "diagonal", "--factor_examples", "all")
    assert "/explanations_diagonal.csv\n" in succeed(
        tmp_path, *DETECTION, *diagonal, "--explain", 100
    )
    shutil.rmtree(tmp_path / "photos/test")
    # Images of both splits are then in the same order.
    shutil.copytree(tmp_path / "photos/train", tmp_path / "photos/test")
    succeed(tmp_path, ANALYZE, *DATA, *diagonal, "--damping_factor", "heuristic")
    results = result_folder(tmp_path, "model-")
    path = max(results.glob("scores_pairwise_diagonal*"), key=lambda path: path.stat().st_mtime)
    influence = load_file(path / "pairwise_scores.safetensors")["all_modules"].fill_diagonal_(0)
    header, rows = read_table(results / "explanations_diagonal.csv")
    assert header == ["suspect", "rank", "image", "label", "score"]
    labels = [
        NAMES[label]
        for label in pipeline.load_data("imagefolder", tmp_path / "photos", "train").labels
    ]
    close = {"abs": 1e-6 * influence.abs().max().item()}
    for suspect, scores in enumerate(influence):
        found = [row for row in rows if row["suspect"] == str(suspect)]
        low, high = scores.sort().values[:3], scores.sort(descending=True).values[:3]
        expected = torch.cat([low[low < 0], high[high > 0]]).tolist()
        assert [float(row["score"]) for row in found] == pytest.approx(expected, **close)
        assert scores[[int(row["image"]) for row in found]].tolist() == pytest.approx(
            expected, **close
        )
        assert [row["rank"] for row in found] == [
            *"123"[: (low < 0).sum()],
            *"123"[: (high > 0).sum()],
        ]
        assert [row["label"] for row in found] == [labels[int(row["image"])] for row in found]

    written = [results / "suspects_diagonal.html", results / "explanations_diagonal.csv"]
    assert all(path.exists() for path in written)
    assert written[0].name not in succeed(tmp_path, *DETECTION, *diagonal, "--num_review", 0)
    assert not any(path.exists() for path in written), "files of an earlier run must be removed"
